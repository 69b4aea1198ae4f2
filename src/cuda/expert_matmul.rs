//! `y[i] = row_scale[e] ⊙ (x[i / choices] W[e]ᵀ + v[i] Bᵀ) + bias[e]` with e = `expert[i]`: the products of a mixture of experts. Each
//! row of y has an expert of the stack W `[experts, n, k]`, as the router chose it on the device.
//!
//! A token has `choices` rows of y, one behind the other: for the first product of a layer x has a row for each token, and is
//! not copied; for the second one, whose x is what became of y, `choices` is 1. [`expert_groups`] sorts the rows
//! by expert once for both: nothing here waits for the host, and rows may be in any order.
//!
//! A row without an expert (-1) becomes zeros, without bias; a number that is no expert's makes its row NaN.
//!
//! A block takes rows of one expert's weight, and a tile of those tokens that chose it. W is read once for each tile, that is once
//! where no expert has more tokens than a tile; neighbouring blocks share it in L2 where there are more. What nobody chose is not read.
//!
//! | kernel | for | tile |
//! |---|---|---|
//! | `skinny` | 4-bit W, k a multiple of 64, blocks of 64 or more, on average up to 16 rows for each expert | 8 or 16 tokens |
//! | `matmul` | all else | 16, 64 or 128 tokens |
//!
//! They are the kernels of [`matmul`], and what is said there of sums, rounding and the branch holds here; x is f16 or bf16. The
//! bits of a row depend on its own x, expert and adapter alone. Hopper has no kernels of its own for this yet: `skinny` and
//! `matmul` serve it, too.
//!
//! Adapters of experts are a table of [`Lora::of_experts`](crate::adapter::Lora::of_experts) with the index that
//! [`expert_index`](super::expert_index) makes, `[tokens * choices]`; v is that of
//! [`lora_shrink`](super::lora_shrink::Plan::with_choices).
//!
//! The stack is one matrix `[experts * n, k]`, so 4-bit blocks may begin in one row, or expert, and end in the next. Weights of
//! experts that were quantised by themselves are stacked by [`Nf4Matrix::stacked`](crate::nf4::Nf4Matrix::stacked).

use bytemuck::{Pod, Zeroable};

use super::adapter_table::LowRankParams;
use super::check::{blocks, dimension, find, read_only};
use super::expert_groups::{self, Groups, check_experts};
use super::matmul::{self, Choice, Extras, Rounding, Tile, Weight, WeightFormat};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::nf4::check_blocksize;
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    skinny("skinny_nf4_f16_t8_experts"),
    skinny("skinny_nf4_f16_t16_experts"),
    skinny("skinny_nf4_bf16_t8_experts"),
    skinny("skinny_nf4_bf16_t16_experts"),
    matmul("matmul_nf4_f16_t16_experts"),
    matmul("matmul_nf4_f16_t64_experts"),
    matmul("matmul_nf4_f16_t128_experts"),
    matmul("matmul_nf4_f16_t64_ragged_experts"),
    matmul("matmul_nf4_bf16_t16_experts"),
    matmul("matmul_nf4_bf16_t64_experts"),
    matmul("matmul_nf4_bf16_t128_experts"),
    matmul("matmul_nf4_bf16_t64_ragged_experts"),
    matmul("matmul_dense_f16_t16_experts"),
    matmul("matmul_dense_f16_t64_experts"),
    matmul("matmul_dense_f16_t128_experts"),
    matmul("matmul_dense_f16_t64_ragged_experts"),
    matmul("matmul_dense_bf16_t16_experts"),
    matmul("matmul_dense_bf16_t64_experts"),
    matmul("matmul_dense_bf16_t128_experts"),
    matmul("matmul_dense_bf16_t64_ragged_experts"),
];

const fn skinny(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("skinny", entry)
}

const fn matmul(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("matmul", entry)
}

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of x.
    pub tokens: usize,
    /// Rows of y for each row of x: experts that the router chooses, or 1.
    pub choices: usize,
    /// Experts of the stack.
    pub experts: usize,
    /// Rows of an expert's W, columns of y.
    pub n: usize,
    /// Columns of x and W.
    pub k: usize,
    /// The type of x, y, the bias and a dense W: f16 or bf16.
    pub dtype: DType,
    /// How W is stored.
    pub weight: WeightFormat,
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
    /// The kernel; none where y has no elements.
    pub kernel: Option<Kernel>,
    /// Rows of y: `tokens * choices`.
    pub rows: usize,
    /// Share of one block: tokens of one expert.
    pub tile: Tile,
    /// Blocks: for every tile of rows of W as many as tiles of tokens can be, whatever the router chooses. Those that are too many
    /// leave at once.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// What W is rounded to.
    pub rounding: Rounding,
    /// Whether rows of x and W are read in pieces of 16 bytes, as in [`matmul::Details`].
    pub vectors: bool,
}

/// `ExpertParams` of `product.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    product: matmul::Params,
    start: u64,
    expert: u64,
    row: u64,
    count: u32,
    choices: u32,
}

const _: () = assert!(size_of::<Params>() == 256);

/// Chooses the kernel, its tile and the grid.
///
/// # Errors
/// [`Error::Argument`] for x that is not f16 or bf16, a block size that the format does not know, too many experts, or sizes or a
/// grid of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    let Shape { tokens, choices, experts, n, k, dtype, weight } = *shape;
    if dtype == DType::F32 {
        return Err(Error::argument("dtype", "f16 or bf16", dtype));
    }
    dimension("tokens", tokens)?;
    dimension("choices", choices)?;
    dimension("n", n)?;
    dimension("k", k)?;
    check_experts(experts)?;
    let rows = tokens * choices;
    dimension("tokens * choices", rows)?;
    dimension("experts * n", experts * n)?;
    if let WeightFormat::Nf4 { blocksize } = weight {
        check_blocksize("weight.blocksize", blocksize)?;
    }
    let vectors = weight.has_vectors(k, dtype);
    // If the router is fair.
    let each = rows.div_ceil(experts.clamp(1, rows.max(1)));
    let codes = weight != WeightFormat::Dense;
    let choice = if codes && k == 0 || weight.has_one_absmax(k) && each <= 16 {
        Choice::skinny(each.min(16))
    } else {
        let tokens = match each {
            _ if !vectors => 64,
            0..=16 => 16,
            17..=64 => 64,
            _ => 128,
        };
        Choice::matmul_with(tokens, weight, vectors)
    };
    let Choice { name, tile, threads, shared_bytes, rounding, .. } = choice;
    let slots = if rows > 0 { rows / tile.tokens + expert_groups::count(rows, experts) } else { 0 };
    let tiles = slots as u64 * n.div_ceil(tile.rows) as u64;
    let kind = if codes { "nf4" } else { "dense" };
    let ragged = if vectors { "" } else { "_ragged" };
    let entry = format!("{name}_{kind}_{dtype}_t{}{ragged}_experts", tile.tokens);
    Ok(Plan(Details {
        shape: *shape,
        kernel: (tiles > 0).then(|| find(KERNELS, &entry)),
        rows,
        tile,
        grid: [blocks("tokens * choices * n", tiles)?, 1, 1],
        threads,
        shared_bytes,
        rounding,
        vectors,
    }))
}

impl Plan {
    /// The shape of what sorts the rows.
    pub fn groups_shape(&self) -> expert_groups::Shape {
        expert_groups::Shape { rows: self.rows, experts: self.shape.experts }
    }

    /// Computes `y` `[tokens * choices, n]` from `x` `[tokens, k]` and the stack `weight` `[experts, n, k]`; x, y and a dense W are
    /// aligned to 16 bytes. `groups` is what [`expert_groups`] made for [`groups_shape`](Plan::groups_shape). In
    /// `extras`, bias and `row_scale` are `[experts, n]`, the branch's index has `tokens * choices` numbers, and its v as many rows;
    /// `overlap` changes nothing.
    ///
    /// # Errors
    /// [`Error::Argument`] for views or adapters that are not as the plan's shape says, [`Error::Device`] when the launch
    /// fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        x: View<'_, T>,
        weight: &Weight<'_, T>,
        groups: &Groups<'_>,
        extras: &Extras<'_, T, A>,
        y: ViewMut<'_, T>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { tokens, choices, experts, n, k, dtype, weight: format } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("x", dtype.name(), T::DTYPE));
        }
        x.check("x", tokens * k, 16, device)?;
        y.check("y", self.rows * n, 16, device)?;
        let [start, expert, row] = groups.check(self.groups_shape(), device)?;
        let stack = matmul::Shape { tokens, n: experts * n, k, dtype, weight: format };
        let count = expert_groups::count(self.rows, experts);
        let params = Params {
            product: matmul::Params {
                x: x.address(),
                weight: matmul::weight_params(&stack, weight, device)?,
                branch: match &extras.low_rank {
                    Some(branch) => branch.params(dtype, self.rows, n, device)?,
                    None => LowRankParams::zeroed(),
                },
                output: matmul::Output {
                    y: y.address(),
                    bias: matmul::optional("bias", &extras.bias, experts * n, device)?,
                    row_scale: matmul::optional("row_scale", &extras.row_scale, experts * n, device)?,
                    partial: 0,
                },
                tokens: self.rows as u32,
                n: n as u32,
                k: k as u32,
                splits: 1,
            },
            start,
            expert,
            row,
            count: count as u32,
            choices: choices as u32,
        };
        let Some(kernel) = self.kernel else { return Ok(()) };
        let launch = Launch {
            kernel,
            grid: self.grid,
            block: [self.threads, 1, 1],
            shared_bytes: self.shared_bytes,
            params: bytemuck::bytes_of(&params),
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes: all were checked above, the adapters' factors when
        // their table was made; they are borrowed, so they live until the caller lets go of them.
        unsafe { queue.launch(&launch) }
    }
}
