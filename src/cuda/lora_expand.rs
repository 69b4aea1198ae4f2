//! `y[m] += v[m] lora_b^T` with an adapter per token: the second half of the low-rank branch, for engines that have a base
//! product of their own. (With this crate's, [`matmul`](super::matmul) adds it before y is rounded.)
//!
//! The product is summed in f32 and added to y with one rounding to y's type. A row whose token has no adapter (-1), or
//! one of rank 0, keeps its bits; one with a number that is not an adapter's becomes NaN.

use bytemuck::{Pod, Zeroable};

use super::adapter_table::{LowRankParams, check_adapter_dtype};
use super::check::{blocks, dimension, find, read_only};
use super::lora_shrink::{WINDOW, few_slots, slots};
use super::{Kernel, Launch, LowRank, Properties, Queue, ViewMut};
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("lora_expand", "lora_expand_f32"),
    Kernel::new::<Params>("lora_expand", "lora_expand_f16"),
    Kernel::new::<Params>("lora_expand", "lora_expand_bf16"),
];

const THREADS: u32 = 128;
const ROWS: usize = 128;

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of y.
    pub tokens: usize,
    /// Columns of y, rows of every lora_b.
    pub n: usize,
    /// The type of y.
    pub dtype: DType,
    /// The type of the adapters: that of y, or f32.
    pub adapter_dtype: DType,
}

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run: blocks of up to eight tokens that share an adapter, by 128 outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// The kernel; none where y has no elements.
    pub kernel: Option<Kernel>,
    /// Blocks: for 32 tokens and 128 outputs, `slots` of them.
    pub grid: [u32; 3],
    /// Blocks that take turns with the groups of 32 tokens. A table of few adapters, which can make few groups, gets fewer.
    pub slots: usize,
}

/// `Params` of `lora_expand.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    y: u64,
    branch: LowRankParams,
    tokens: u32,
    n: u32,
    slots: u32,
    padding: u32,
}

/// Chooses the kernel and the grid.
///
/// # Errors
/// [`Error::Argument`] for an adapter type that does not go with y, or sizes or a grid of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    dimension("tokens", shape.tokens)?;
    dimension("n", shape.n)?;
    check_adapter_dtype(shape.adapter_dtype, shape.dtype)?;
    let slots = slots(shape.tokens);
    let tiles = (shape.tokens.div_ceil(WINDOW) * slots) as u64 * shape.n.div_ceil(ROWS) as u64;
    let entry = format!("lora_expand_{}", shape.dtype);
    Ok(Plan(Details {
        shape: *shape,
        kernel: (tiles > 0).then(|| find(KERNELS, &entry)),
        grid: [blocks("tokens * n", tiles)?, 1, 1],
        slots,
    }))
}

impl Plan {
    /// Adds the branch to `y` `[tokens, n]`.
    ///
    /// # Errors
    /// [`Error::Argument`] for views or adapters that are not as the plan's shape says, [`Error::Device`] when the launch
    /// fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        branch: &LowRank<'_, A>,
        y: ViewMut<'_, T>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { tokens, n, dtype, adapter_dtype } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("y", dtype.name(), T::DTYPE));
        }
        if A::DTYPE != adapter_dtype {
            return Err(Error::argument("adapters", adapter_dtype.name(), A::DTYPE));
        }
        y.check("y", tokens * n, dtype.size() as u64, device)?;
        let slots = few_slots(self.slots, branch.adapters.len());
        let branch = branch.params(dtype, tokens, n, device)?;
        let Some(kernel) = self.kernel else { return Ok(()) };
        let params = Params {
            y: y.address(),
            branch,
            tokens: tokens as u32,
            n: n as u32,
            slots: slots as u32,
            padding: 0,
        };
        let launch = Launch {
            kernel,
            grid: [self.grid[0] / self.slots as u32 * slots as u32, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: true,
        };
        // SAFETY: the views cover what the kernel reads and writes: y, v, the index and the table were checked above, the
        // factors when the table was made; they are borrowed, so they live until the caller lets go of them.
        unsafe { queue.launch(&launch) }
    }
}
