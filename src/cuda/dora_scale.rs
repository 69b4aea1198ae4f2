//! DoRA's factor of each output: `row_scale[n] = magnitude[n] / ||W[n] + sum of scaling * (lora_b @ lora_a)[n]||`, the norm
//! over the inputs (arXiv:2402.09353, equation 5).
//!
//! Elements, squares and sums are f32, in an order that depends on `k` alone. Two launches: the weight is read once, in
//! pieces of 1024 columns; then the pieces' sums are added. A row whose norm is zero yields infinity, or NaN under a
//! magnitude of 0.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, find, read_only};
use super::deltas::{Deltas, rows_are_aligned};
use super::nf4::{Nf4View, Weight};
use super::{AdapterView, Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::nf4::check_blocksize;
use crate::{DType, Element, Error, Result};

const FINISH: Kernel = Kernel::new::<Params>("dora_scale", "dora_scale_finish");

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("dora_scale", "dora_scale_sum_f32"),
    Kernel::new::<Params>("dora_scale", "dora_scale_sum_f16"),
    Kernel::new::<Params>("dora_scale", "dora_scale_sum_bf16"),
    Kernel::new::<Params>("dora_scale", "dora_scale_sum_nf4"),
    FINISH,
];

const THREADS: u32 = 256;
const TILE_ROWS: usize = 64;

/// Columns whose squares one block of threads adds.
const PIECE: usize = 1024;

/// `Params` of `dora_scale.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    dense: u64,
    weight: Weight,
    magnitude: u64,
    sums: u64,
    row_scale: u64,
    rows: u32,
    columns: u32,
    pieces: u32,
    vectors: u32,
    deltas: Deltas,
}

const _: () = assert!(size_of::<Params>() == 376);

/// The weight's type in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// Elements of this type.
    Dense(DType),
    /// 4-bit codes.
    Nf4 {
        /// Elements per block.
        blocksize: usize,
        /// The weight is rounded to this type first: that of the quant_state, as PEFT does it.
        dtype: DType,
    },
}

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// The weight's type in memory.
    pub storage: Storage,
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
    /// The kernels, in order; none where there are no outputs.
    pub kernels: Option<[Kernel; 2]>,
    /// Blocks of threads of each.
    pub blocks: [u32; 2],
    /// Whether the weight is read in pieces: 16 bytes of a dense row, 8 codes of a 4-bit one. Else element by element.
    pub vectors: bool,
    pieces: u32,
}

/// Chooses the kernels and the grids.
///
/// # Errors
/// [`Error::Argument`] for a block size that the format does not know, or sizes of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    dimension("n", shape.n)?;
    dimension("k", shape.k)?;
    let (entry, vectors) = match shape.storage {
        Storage::Dense(dtype) => (format!("dora_scale_sum_{dtype}"), rows_are_aligned(shape.k, dtype)),
        Storage::Nf4 { blocksize, .. } => {
            check_blocksize("blocksize", blocksize)?;
            ("dora_scale_sum_nf4".to_owned(), shape.k.is_multiple_of(8))
        }
    };
    let pieces = shape.k.div_ceil(PIECE).max(1);
    let sum_blocks = shape.n.div_ceil(TILE_ROWS) as u64 * pieces as u64;
    Ok(Plan(Details {
        shape: *shape,
        kernels: (shape.n > 0).then(|| [find(KERNELS, &entry), FINISH]),
        blocks: [blocks("n * k", sum_blocks)?, shape.n.div_ceil(THREADS as usize) as u32],
        vectors,
        pieces: pieces as u32,
    }))
}

impl Plan {
    /// Bytes of scratch that a run wants.
    pub fn workspace_bytes(&self) -> usize {
        self.pieces as usize * self.shape.n * size_of::<f32>()
    }

    /// Computes `row_scale` `[n]` of a dense `weight` `[n, k]`, aligned to 16 bytes, and `magnitude` `[n]`. `workspace` is
    /// `Plan::workspace_bytes()` long and aligned to 4.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, more than
    /// [`MAX_DELTAS`](super::MAX_DELTAS) adapters or a scaling that is not finite; [`Error::Device`] when a launch fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        weight: View<'_, T>,
        adapters: &[AdapterView<'_, A>],
        magnitude: View<'_, f32>,
        workspace: ViewMut<'_, u8>,
        row_scale: ViewMut<'_, f32>,
    ) -> Result<()> {
        let Shape { n, k, storage } = self.shape;
        if storage != Storage::Dense(T::DTYPE) {
            return Err(Error::argument("weight", format!("{storage:?}"), T::DTYPE));
        }
        weight.check("weight", n * k, 16, queue.properties())?;
        let params = Params { dense: weight.address(), ..Params::zeroed() };
        self.launch(queue, params, adapters, magnitude, workspace, row_scale)
    }

    /// As [`Plan::run`], of a 4-bit weight.
    ///
    /// # Errors
    /// As [`Plan::run`].
    pub fn run_nf4<A: Element>(
        &self,
        queue: &dyn Queue,
        weight: &Nf4View<'_>,
        adapters: &[AdapterView<'_, A>],
        magnitude: View<'_, f32>,
        workspace: ViewMut<'_, u8>,
        row_scale: ViewMut<'_, f32>,
    ) -> Result<()> {
        let Shape { n, k, storage } = self.shape;
        let Storage::Nf4 { blocksize, dtype } = storage else {
            return Err(Error::argument("weight", format!("{storage:?}"), "codes"));
        };
        if weight.blocksize != blocksize {
            return Err(Error::argument("weight.blocksize", blocksize.to_string(), weight.blocksize));
        }
        weight.check("weight", n * k, queue.properties())?;
        let params = Params { weight: Weight::new(weight, dtype), ..Params::zeroed() };
        self.launch(queue, params, adapters, magnitude, workspace, row_scale)
    }

    /// The weight is checked, and in `params`.
    fn launch<A: Element>(
        &self,
        queue: &dyn Queue,
        params: Params,
        adapters: &[AdapterView<'_, A>],
        magnitude: View<'_, f32>,
        workspace: ViewMut<'_, u8>,
        row_scale: ViewMut<'_, f32>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { n, k, .. } = self.shape;
        let deltas = Deltas::new(adapters, [n, k], device)?;
        magnitude.check("magnitude", n, 4, device)?;
        workspace.check("workspace", self.workspace_bytes(), 4, device)?;
        row_scale.check("row_scale", n, 4, device)?;
        let params = Params {
            magnitude: magnitude.address(),
            sums: workspace.address(),
            row_scale: row_scale.address(),
            rows: n as u32,
            columns: k as u32,
            pieces: self.pieces,
            vectors: u32::from(self.vectors),
            deltas,
            ..params
        };
        for (kernel, blocks) in self.kernels.into_iter().flatten().zip(self.blocks) {
            let launch = Launch {
                kernel,
                grid: [blocks, 1, 1],
                block: [THREADS, 1, 1],
                shared_bytes: 0,
                params: bytemuck::bytes_of(&params),
                overlap: false,
            };
            // SAFETY: the views cover what the kernels read and write, as checked above and by the callers, and those that
            // are written are borrowed alone. The second launch reads what the first has written: a queue keeps their order.
            unsafe { queue.launch(&launch)? };
        }
        Ok(())
    }
}
