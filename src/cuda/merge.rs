//! Adapters into a dense weight, and out again. Bit for bit what [`cpu::merge`](crate::cpu::merge()) and
//! [`cpu::unmerge`](crate::cpu::unmerge) do: f32 throughout, one rounding to the weight's type.
//!
//! [`merge_report`](super::merge_report) tells what rounding has left of the adapters.
//!
//! It reads and writes every weight once, which is the limit up to a rank of about 24 in all; above that, multiply-adds are.

use bytemuck::{Pod, Zeroable};

use super::check::{dimension, find, read_only};
use super::deltas::{Deltas, Tiles, UpdateView, row_scale, rows_are_aligned};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("merge", "merge_f32"),
    Kernel::new::<Params>("merge", "merge_f16"),
    Kernel::new::<Params>("merge", "merge_bf16"),
];

const THREADS: u32 = 256;

/// `Params` of `merge.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    w: u64,
    out: u64,
    row_scale: u64,
    rows: u32,
    columns: u32,
    transposed: u32,
    unmerge: u32,
    vectors: u32,
    column_tiles: u32,
    deltas: Deltas,
}

const _: () = assert!(size_of::<Params>() == 248);

/// In or out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// `round(row_scale * (W + delta))`.
    Merge,
    /// `round(W / row_scale - delta)`, the adapters in reverse order. What rounding lost in the merge stays lost.
    Unmerge,
}

/// What is to be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Whether the weight is stored `[k, n]` and not `[n, k]`. The factors are not.
    pub fan_in_fan_out: bool,
    /// The type of the weight.
    pub dtype: DType,
    /// In or out.
    pub direction: Direction,
}

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// The kernel; none where the weight has no elements.
    pub kernel: Option<Kernel>,
    /// Blocks of threads, one for 64 x 128 elements of the stored weight.
    pub blocks: u32,
    /// Whether weights are moved in pieces of 16 bytes: the stored rows are multiples of that. Else element by element.
    pub vectors: bool,
    across: u32,
}

/// Chooses the kernel and the grid.
///
/// # Errors
/// [`Error::Argument`] for sizes of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    dimension("n", shape.n)?;
    dimension("k", shape.k)?;
    let (rows, columns) = shape.stored();
    let tiles = Tiles::over(rows, columns)?;
    Ok(Plan(Details {
        shape: *shape,
        kernel: (tiles.blocks > 0).then(|| find(KERNELS, &format!("merge_{}", shape.dtype))),
        blocks: tiles.blocks,
        vectors: rows_are_aligned(columns, shape.dtype),
        across: tiles.across,
    }))
}

impl Shape {
    /// Rows and columns as stored.
    fn stored(&self) -> (usize, usize) {
        if self.fan_in_fan_out { (self.k, self.n) } else { (self.n, self.k) }
    }
}

impl Plan {
    /// Reads `weight` and writes `out`, both `[n, k]` (`[k, n]` with `fan_in_fan_out`) and aligned to 16 bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, more than
    /// [`MAX_DELTAS`](super::MAX_DELTAS) adapters or a scaling that is not finite; [`Error::Device`] when the launch fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        weight: View<'_, T>,
        update: &UpdateView<'_, A>,
        out: ViewMut<'_, T>,
    ) -> Result<()> {
        let Shape { n, k, .. } = self.shape;
        out.check("out", n * k, 16, queue.properties())?;
        self.launch(queue, weight, update, out.address())
    }

    /// As [`Plan::run`], writing over the weight.
    ///
    /// # Errors
    /// As [`Plan::run`].
    pub fn run_in_place<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        weight: ViewMut<'_, T>,
        update: &UpdateView<'_, A>,
    ) -> Result<()> {
        self.launch(queue, weight.as_view(), update, weight.address())
    }

    /// `out` is `weight`, or has been checked.
    fn launch<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        weight: View<'_, T>,
        update: &UpdateView<'_, A>,
        out: u64,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { n, k, fan_in_fan_out, dtype, direction } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("weight", dtype.name(), T::DTYPE));
        }
        weight.check("weight", n * k, 16, device)?;
        let deltas = Deltas::new(update.adapters, [n, k], device)?;
        let row_scale = row_scale(update.row_scale, n, device)?;
        let Some(kernel) = self.kernel else { return Ok(()) };
        let (rows, columns) = self.shape.stored();
        let params = Params {
            w: weight.address(),
            out,
            row_scale,
            rows: rows as u32,
            columns: columns as u32,
            transposed: u32::from(fan_in_fan_out),
            unmerge: u32::from(direction == Direction::Unmerge),
            vectors: u32::from(self.vectors),
            column_tiles: self.across,
            deltas,
        };
        let launch = Launch {
            kernel,
            grid: [self.blocks, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes, as checked above; what it writes is borrowed alone, and
        // where that is the weight itself, a thread reads its elements before it writes them, and no one else's.
        unsafe { queue.launch(&launch) }
    }
}
