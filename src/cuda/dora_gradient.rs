//! Takes DoRA's scale out of the gradient of its output (arXiv:2402.09353; the norm is a constant in the gradient, as section 4.3
//! proposes and PEFT does): of `y = row_scale ⊙ z + bias` with `z = x (W + s B A)ᵀ`,
//!
//! ```text
//! dm[n] = inverse_norm[n] Σ_m dy[m, n] z[m, n]       the gradient of the magnitude
//! dy[m, n] <- row_scale[n] dy[m, n]                  what the gradients of x, A and B are made of, as without DoRA
//! ```
//!
//! `inverse_norm` is [`dora_scale`](super::dora_scale) of magnitudes that are all 1. Sums are f32 in an order that depends on the number
//! of tokens alone, in two launches.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, find, read_only};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::{DType, Element, Error, Result};

const FINISH: Kernel = Kernel::new::<Params>("dora_gradient", "dora_gradient_finish");

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("dora_gradient", "dora_gradient_sum_f32"),
    Kernel::new::<Params>("dora_gradient", "dora_gradient_sum_f16"),
    Kernel::new::<Params>("dora_gradient", "dora_gradient_sum_bf16"),
    FINISH,
];

const THREADS: u32 = 256;
/// Columns and tokens of a block.
const COLUMNS: usize = 32;
const CHUNK: usize = 512;

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of dY.
    pub tokens: usize,
    /// Columns of dY.
    pub n: usize,
    /// The type of dY and z.
    pub dtype: DType,
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
    /// Device memory that [`Plan::run`] wants to be lent.
    pub workspace_bytes: usize,
    chunks: u32,
}

/// The views of a [`Plan::run`].
#[derive(Debug)]
pub struct Gradient<'a, T> {
    /// `[tokens, n]`: the gradient of y, and then of z.
    pub dy: ViewMut<'a, T>,
    /// `[tokens, n]`: the product before row_scale and bias.
    pub z: View<'a, T>,
    /// `[n]`: magnitude over norm.
    pub row_scale: View<'a, f32>,
    /// `[n]`: 1 over norm.
    pub inverse_norm: View<'a, f32>,
    /// `[n]`: the gradient of the magnitude.
    pub dm: ViewMut<'a, f32>,
}

/// `Params` of `dora_gradient.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    dy: u64,
    z: u64,
    row_scale: u64,
    inverse_norm: u64,
    dm: u64,
    sums: u64,
    tokens: u32,
    n: u32,
    chunks: u32,
    accumulate: u32,
}

/// Chooses the kernels and the grids.
///
/// # Errors
/// [`Error::Argument`] for sizes or a grid of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    dimension("tokens", shape.tokens)?;
    dimension("n", shape.n)?;
    let chunks = shape.tokens.div_ceil(CHUNK).max(1);
    let of_sums = blocks("tokens * n", chunks as u64 * shape.n.div_ceil(COLUMNS) as u64)?;
    let first = find(KERNELS, &format!("dora_gradient_sum_{}", shape.dtype));
    Ok(Plan(Details {
        shape: *shape,
        kernels: (shape.n > 0).then_some([first, FINISH]),
        blocks: [of_sums, shape.n.div_ceil(THREADS as usize) as u32],
        workspace_bytes: chunks * shape.n * size_of::<f32>(),
        chunks: chunks as u32,
    }))
}

impl Plan {
    /// Writes `dm`, or with `accumulate` adds to it, and scales `dy`. Views are aligned to their elements; `workspace` has
    /// `Plan::workspace_bytes()` or more, aligned to 4.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, [`Error::Device`] when a launch fails.
    pub fn run<T: Element>(
        &self,
        queue: &dyn Queue,
        gradient: Gradient<'_, T>,
        accumulate: bool,
        workspace: ViewMut<'_, u8>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { tokens, n, dtype } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("dy", dtype.name(), T::DTYPE));
        }
        gradient.dy.check("dy", tokens * n, dtype.size() as u64, device)?;
        gradient.z.check("z", tokens * n, dtype.size() as u64, device)?;
        gradient.row_scale.check("row_scale", n, 4, device)?;
        gradient.inverse_norm.check("inverse_norm", n, 4, device)?;
        gradient.dm.check("dm", n, 4, device)?;
        workspace.check_at_least("workspace", self.workspace_bytes, 4, device)?;
        let params = Params {
            dy: gradient.dy.address(),
            z: gradient.z.address(),
            row_scale: gradient.row_scale.address(),
            inverse_norm: gradient.inverse_norm.address(),
            dm: gradient.dm.address(),
            sums: workspace.address(),
            tokens: tokens as u32,
            n: n as u32,
            chunks: self.chunks,
            accumulate: u32::from(accumulate),
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
            // SAFETY: the views cover what the kernels read and write, as checked above, and those that are written are borrowed
            // alone. The second launch reads what the first has written: a queue keeps their order.
            unsafe { queue.launch(&launch)? };
        }
        Ok(())
    }
}
