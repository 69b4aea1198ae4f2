//! `dX = dY W + u A`: the gradient of a linear layer's input, with W dense or in 4 bits as it is stored for the forward
//! product, and the low-rank branch of every token's adapter. (LoRA, arXiv:2106.09685: the derivative of
//! `y = x Wᵀ + s (x Aᵀ) Bᵀ` by x, with `u = s dY B`.)
//!
//! W is read once for each tile of tokens and transposed on its way to the tensor cores; no transposed copy of it is made, and a dequantised
//! one only where [`matmul`](mod@super::matmul) would make one, too (`Plan::dequantize`). [`plan`] chooses between two kernels:
//!
//! | kernel | for | how |
//! |---|---|---|
//! | `prefill_transposed` | on Hopper, 16-bit dY from 17 tokens on, rows of whole 16 bytes | the loop of `prefill` (see [`matmul`](mod@super::matmul)): products of warpgroups, which take the columns of a dense W as they lie; codes are decoded to the left operand's registers, as in `prefill` to [`Rounding::Half`] |
//! | `matmul_transposed` | the rest | `mma.sync`; codes are decoded to what [`nf4_dequantize`] gives. f32 dY has f32 products |
//!
//! `prefill_transposed` has run in the emulator only; its tile and splits are chosen by the times that were measured for `prefill`,
//! and that it should serve from 17 tokens on is modelled, not measured. It takes u and A as sums of two bf16 each, which errs by less than
//! 2⁻¹⁴ of `|u| |A|`; in `matmul_transposed` the branch's products are exact.
//!
//! Everything else is as in [`matmul`](mod@super::matmul): f32 sums over the rows of W in an order that the plan fixes, splits that
//! a second kernel adds in their order, a token's outputs independent of the other tokens, one rounding at the end.

use bytemuck::{Pod, Zeroable};

use super::adapter_table::LowRankParams;
use super::block_product::{self, Format};
use super::check::{blocks, dimension, find, read_only};
use super::matmul::{
    self, FINISH_THREADS, Output, Params, Rounding, Shape, Tile, Weight, WeightFormat, splits,
};
use super::prefill::{self, PrefillParams, Side};
use super::{
    Kernel, Launch, LowRank, Properties, Queue, Target, View, ViewMut, dropout, nf4_dequantize, two_passes,
};
use crate::cpu::Dropout;
use crate::nf4::check_blocksize;
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    kernel("matmul_transposed_nf4_f32"),
    kernel("matmul_transposed_dense_f32"),
    kernel("matmul_transposed_nf4_f16_t16"),
    kernel("matmul_transposed_nf4_f16_t64"),
    kernel("matmul_transposed_nf4_f16_t128"),
    kernel("matmul_transposed_nf4_f16_t64_ragged"),
    kernel("matmul_transposed_nf4_bf16_t16"),
    kernel("matmul_transposed_nf4_bf16_t64"),
    kernel("matmul_transposed_nf4_bf16_t128"),
    kernel("matmul_transposed_nf4_bf16_t64_ragged"),
    kernel("matmul_transposed_dense_f16_t16"),
    kernel("matmul_transposed_dense_f16_t64"),
    kernel("matmul_transposed_dense_f16_t128"),
    kernel("matmul_transposed_dense_f16_t64_ragged"),
    kernel("matmul_transposed_dense_bf16_t16"),
    kernel("matmul_transposed_dense_bf16_t64"),
    kernel("matmul_transposed_dense_bf16_t128"),
    kernel("matmul_transposed_dense_bf16_t64_ragged"),
    prefill("prefill_transposed_nf4_f16_t64"),
    prefill("prefill_transposed_nf4_f16_t128"),
    prefill("prefill_transposed_nf4_f16_t256"),
    prefill("prefill_transposed_nf4_bf16_t64"),
    prefill("prefill_transposed_nf4_bf16_t128"),
    prefill("prefill_transposed_nf4_bf16_t256"),
    prefill("prefill_transposed_dense_f16_t64"),
    prefill("prefill_transposed_dense_f16_t128"),
    prefill("prefill_transposed_dense_f16_t256"),
    prefill("prefill_transposed_dense_bf16_t64"),
    prefill("prefill_transposed_dense_bf16_t128"),
    prefill("prefill_transposed_dense_bf16_t256"),
];

const fn kernel(entry: &'static str) -> Kernel {
    Kernel::new::<TransposedParams>("matmul_transposed", entry)
}

const fn prefill(entry: &'static str) -> Kernel {
    Kernel::new::<PrefillParams>("prefill_transposed", entry)
}

/// Rows of W that one step of f32 products takes, and columns of W that a block has.
const F32_STEP: usize = 16;
const F32_TILE: usize = 64;

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// What makes a 16-bit copy of a 4-bit W, in the workspace, which the kernel multiplies then: two passes, where these take less by the
    /// model. The copy has what [`nf4_dequantize`] gives.
    pub dequantize: Option<nf4_dequantize::Plan>,
    /// The kernel; none where dX has no elements.
    pub kernel: Option<Kernel>,
    /// The kernel that adds the parts of split sums.
    pub finish: Option<Kernel>,
    /// Share of one block: tokens, `rows` of dX's columns, and rows of W at a time (`step`).
    pub tile: Tile,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Blocks that share a sum over n. Above 1, a second kernel adds their parts.
    pub splits: usize,
    /// What W is rounded to.
    pub rounding: Rounding,
    /// Whether rows of dY and W are read in pieces of 16 bytes. Otherwise ("ragged": k is not a multiple of 32 for codes, of 8 for
    /// dense 16-bit W, or n not one of 8) dY is read element by element, and W in pieces that are not aligned to its rows.
    pub vectors: bool,
    /// Device memory that [`Plan::run`] wants to be lent.
    pub workspace_bytes: usize,
    /// What the adapters' inputs went through; see [`Plan::with_dropout`].
    pub dropout: Option<Dropout>,
}

/// `TransposedParams` of `matmul_transposed.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TransposedParams {
    product: Params,
    dropout: dropout::Params,
}

/// Chooses the kernel, its tile, the grid and the number of splits. `shape` is the forward product's: W is `[n, k]`, and the
/// type is that of dY, dX and a dense W.
///
/// # Errors
/// [`Error::Argument`] for a block size that the format does not know, or sizes or a grid of 2^31 and above.
pub fn plan(shape: &Shape, device: &Properties) -> Result<Plan> {
    let Shape { tokens, n, k, dtype, weight } = *shape;
    dimension("tokens", tokens)?;
    dimension("n", n)?;
    dimension("k", k)?;
    if let WeightFormat::Nf4 { blocksize } = weight {
        check_blocksize("weight.blocksize", blocksize)?;
    }
    let hopper = Target::for_capability(device.capability)? == Target::Compute90a;
    let (mut choice, mut operand) = (Choice::new(shape, hopper, device), *shape);
    // As in `matmul`.
    if let Some(one) = choice.nanoseconds.filter(|_| choice.name != "prefill_transposed") {
        let copy = two_passes::of_copy(shape);
        let of_copy = Choice::new(&copy, hopper, device);
        if of_copy.nanoseconds.is_some_and(|two| two_passes::take_less(shape, device, one, two)) {
            (choice, operand) = (of_copy, copy);
        }
    }
    let dequantize = if operand == *shape { None } else { Some(two_passes::plan(shape, device)?) };
    let Choice { name, variant, tile, threads, shared_bytes, splits, units, .. } = choice;
    let tiles = tokens.div_ceil(tile.tokens) as u64 * k.div_ceil(tile.rows) as u64;
    let kind = if operand.weight == WeightFormat::Dense { "dense" } else { "nf4" };
    let parts = if splits > 1 { splits * tokens * k * size_of::<f32>() } else { 0 };
    let entry = format!("{name}_{kind}_{dtype}{variant}");
    Ok(Plan(Details {
        shape: *shape,
        kernel: (tiles > 0).then(|| find(KERNELS, &entry)),
        finish: (splits > 1).then(|| find(matmul::KERNELS, &format!("matmul_finish_{dtype}"))),
        tile,
        grid: match units {
            true => [blocks("tokens * k", tiles * splits as u64)?.min(device.sm_count), 1, 1],
            false => [blocks("tokens * k", tiles)?, splits as u32, 1],
        },
        threads,
        shared_bytes,
        splits,
        rounding: match operand.weight {
            _ if weight == WeightFormat::Dense || dtype == DType::F32 => Rounding::Exact,
            WeightFormat::Nf4 { .. } if units => Rounding::Half,
            _ => Rounding::ToInput,
        },
        vectors: has_vectors(&operand),
        workspace_bytes: parts + if dequantize.is_some() { two_passes::bytes(shape) } else { 0 },
        dequantize,
        dropout: None,
    }))
}

/// What a kernel has to say to a plan.
struct Choice {
    name: &'static str,
    variant: String,
    tile: Tile,
    threads: u32,
    shared_bytes: u32,
    splits: usize,
    /// Whether there are no more blocks than the device runs at once, which go through all tiles and splits; else one for each.
    units: bool,
    /// What it takes by the model, where there is one.
    nanoseconds: Option<f64>,
}

/// Whether rows of dY and W can be read in pieces of 16 bytes.
fn has_vectors(shape: &Shape) -> bool {
    let piece = if shape.weight == WeightFormat::Dense { 8 } else { 32 };
    shape.dtype != DType::F32 && shape.n > 0 && shape.n.is_multiple_of(8) && shape.k.is_multiple_of(piece)
}

impl Choice {
    fn new(shape: &Shape, hopper: bool, device: &Properties) -> Self {
        let Shape { tokens, n, k, weight, .. } = *shape;
        if !(hopper && has_vectors(shape) && tokens > 16) {
            return Self::matmul(shape, device);
        }
        let codes = weight != WeightFormat::Dense;
        let choice = prefill::choose(tokens, k, n, codes, device);
        Self {
            name: "prefill_transposed",
            variant: format!("_t{}", choice.tile.tokens),
            tile: choice.tile,
            threads: prefill::THREADS,
            shared_bytes: choice.shared_bytes,
            splits: choice.splits,
            units: true,
            nanoseconds: Some(choice.nanoseconds),
        }
    }

    /// `matmul_transposed`.
    fn matmul(shape: &Shape, device: &Properties) -> Self {
        let Shape { tokens, n, k, dtype, weight } = *shape;
        if dtype == DType::F32 {
            let tiles = tokens.div_ceil(F32_TILE) as u64 * k.div_ceil(F32_TILE) as u64;
            return Self {
                name: "matmul_transposed",
                variant: String::new(),
                tile: Tile { tokens: F32_TILE, rows: F32_TILE, step: F32_STEP },
                threads: 256,
                shared_bytes: 0,
                splits: splits(tiles, n.div_ceil(F32_STEP), u64::from(device.sm_count)),
                units: false,
                nanoseconds: None,
            };
        }
        let vectors = has_vectors(shape);
        let format = Format::new(weight, vectors);
        let choice = block_product::choose(tokens, k, n, format, Side::Columns, device);
        let ragged = if vectors { "" } else { "_ragged" };
        Self {
            name: "matmul_transposed",
            variant: format!("_t{}{ragged}", choice.tile.tokens),
            tile: choice.tile,
            threads: block_product::THREADS,
            shared_bytes: choice.shared_bytes,
            splits: choice.splits,
            units: false,
            nanoseconds: Some(choice.nanoseconds),
        }
    }
}

impl Plan {
    /// The same for adapters that saw x after `dropout`: what it took from x gets nothing of their branch. (The factor of the rest
    /// is in u.)
    #[must_use]
    pub fn with_dropout(self, dropout: Dropout) -> Self {
        Self(Details { dropout: Some(dropout), ..self.0 })
    }

    /// Computes `dx` `[tokens, k]` from `dy` `[tokens, n]`; both, and a dense W `[n, k]`, are aligned to 16 bytes. `workspace`
    /// has `Plan::workspace_bytes()` or more, aligned to 16; what it holds does not matter, before or after.
    ///
    /// The branch's `v` is u here: what [`lora_shrink`](super::lora_shrink) made of dY with a transposed plan. Slices of the outputs
    /// (see [`AdapterTable`](super::AdapterTable)) each add theirs.
    ///
    /// # Errors
    /// [`Error::Argument`] for views or adapters that are not as the plan's shape says, [`Error::Device`] when a launch
    /// fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        dy: View<'_, T>,
        weight: &Weight<'_, T>,
        low_rank: Option<&LowRank<'_, A>>,
        dx: ViewMut<'_, T>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { tokens, n, k, dtype, .. } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("dy", dtype.name(), T::DTYPE));
        }
        dy.check("dy", tokens * n, 16, device)?;
        dx.check("dx", tokens * k, 16, device)?;
        workspace.check_at_least("workspace", self.workspace_bytes, 16, device)?;
        let copy_bytes = if self.dequantize.is_some() { two_passes::bytes(&self.shape) } else { 0 };
        // To the kernel the outputs are dX's columns.
        let mut product = Params {
            x: dy.address(),
            weight: matmul::weight_params(&self.shape, weight, device)?,
            branch: match low_rank {
                Some(branch) => branch.transposed_params(dtype, [tokens, n, k], device)?,
                None => LowRankParams::zeroed(),
            },
            output: Output {
                y: dx.address(),
                bias: 0,
                row_scale: 0,
                partial: if self.splits > 1 { workspace.address() + copy_bytes as u64 } else { 0 },
            },
            tokens: tokens as u32,
            n: k as u32,
            k: n as u32,
            splits: self.splits as u32,
        };
        let Some(kernel) = self.kernel else { return Ok(()) };
        let mut operand = self.shape;
        if let Some(dequantize) = &self.dequantize {
            operand = two_passes::of_copy(&operand);
            product.weight = two_passes::run(dequantize, queue, weight, &workspace)?;
        }
        let dropout = dropout::Params::new(self.dropout.as_ref());
        let (transposed, prefill);
        let launch = Launch {
            kernel,
            grid: self.grid,
            block: [self.threads, 1, 1],
            shared_bytes: self.shared_bytes,
            params: if kernel.module == "prefill_transposed" {
                prefill = PrefillParams::new(queue, &operand, &self.tile, Side::Columns, product, dropout)?;
                bytemuck::bytes_of(&prefill)
            } else {
                transposed = TransposedParams { product, dropout };
                bytemuck::bytes_of(&transposed)
            },
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes: all were checked above, the adapters' factors when
        // their table was made; they are borrowed, so they live until the caller lets go of them.
        unsafe { queue.launch(&launch)? };
        let Some(kernel) = self.finish else { return Ok(()) };
        let finish = Launch {
            kernel,
            grid: [blocks("tokens * k", (tokens * k).div_ceil(FINISH_THREADS) as u64)?, 1, 1],
            block: [FINISH_THREADS as u32, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&product),
            overlap: false,
        };
        // SAFETY: as above; the workspace has room for the parts of all splits, which the first kernel has written.
        unsafe { queue.launch(&finish) }
    }
}
