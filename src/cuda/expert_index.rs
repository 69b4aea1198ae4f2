//! `index[i] = adapter[i / choices] * experts + expert[i]`: the adapter of every row in a mixture of experts, from that of its token and
//! the expert that the router chose, on the device, where both are. [`lora_shrink`](super::lora_shrink) and
//! [`lora_expand`](super::lora_expand) take it, with a table of the stacks' adapters one behind the other
//! ([`Lora::of_experts`](crate::adapter::Lora::of_experts)), and rows in any order.
//!
//! A row has no adapter (-1) where its token has none or it has no expert (-1). A wrong number gives -2, which no table has: the
//! row's outputs become NaN.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, find, read_only};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::Result;
use crate::cpu::check_experts;

pub(super) const KERNELS: &[Kernel] = &[Kernel::new::<Params>("expert_index", "expert_index_i32")];

const THREADS: u32 = 256;

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Tokens before the router.
    pub tokens: usize,
    /// Experts that the router chooses for each token: rows of a token.
    pub choices: usize,
    /// Adapters, each a stack of experts.
    pub adapters: usize,
    /// Experts of a stack.
    pub experts: usize,
}

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run: a thread for every row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// The kernel; none where there are no rows.
    pub kernel: Option<Kernel>,
    /// Rows: `tokens * choices`.
    pub rows: usize,
    /// Blocks.
    pub grid: [u32; 3],
}

/// `Params` of `expert_index.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    adapter: u64,
    expert: u64,
    index: u64,
    rows: u32,
    choices: u32,
    adapters: u32,
    experts: u32,
}

/// Chooses the grid.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when there are 2^31 rows and more, or `adapters * experts` does not fit in 31 bits.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    let Shape { tokens, choices, adapters, experts } = *shape;
    dimension("tokens", tokens)?;
    dimension("choices", choices)?;
    check_experts(adapters, experts)?;
    let rows = tokens * choices;
    dimension("tokens * choices", rows)?;
    Ok(Plan(Details {
        shape: *shape,
        kernel: (rows > 0).then(|| find(KERNELS, "expert_index_i32")),
        rows,
        grid: [blocks("tokens * choices", rows.div_ceil(THREADS as usize) as u64)?, 1, 1],
    }))
}

impl Plan {
    /// Writes `index` `[tokens * choices]` from `adapter` `[tokens]` and `expert` `[tokens * choices]`.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for views that are not as the plan's shape says,
    /// [`Error::Device`](crate::Error::Device) when the launch fails.
    pub fn run(
        &self,
        queue: &dyn Queue,
        adapter: View<'_, i32>,
        expert: View<'_, i32>,
        index: ViewMut<'_, i32>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { tokens, choices, adapters, experts } = self.shape;
        adapter.check("adapter", tokens, 4, device)?;
        expert.check("expert", self.rows, 4, device)?;
        index.check("index", self.rows, 4, device)?;
        let Some(kernel) = self.kernel else { return Ok(()) };
        let params = Params {
            adapter: adapter.address(),
            expert: expert.address(),
            index: index.address(),
            rows: self.rows as u32,
            choices: choices as u32,
            adapters: adapters as u32,
            experts: experts as u32,
        };
        let launch = Launch {
            kernel,
            grid: self.grid,
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes, and are borrowed: they live until the caller lets go of them.
        unsafe { queue.launch(&launch) }
    }
}
