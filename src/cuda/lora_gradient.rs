//! The gradients of adapters' factors (LoRA, arXiv:2106.09685): `dA = uᵀ x` and `dB = dYᵀ v` in f32, summed over the tokens of
//! each adapter, with `v = s x Aᵀ` and `u = s dY B` from [`lora_shrink`](super::lora_shrink). The gradients replace what is there,
//! or are added to it.
//!
//! Products are exact and sums are f32: 512 tokens of an adapter are a chunk, tensor cores add 16 at a time to the chunk's sum,
//! and a second kernel adds the chunks in their order. So a mixed batch gives an adapter the bits that a batch of its tokens
//! alone would give. Tokens without an adapter (-1), or with a number that is not an adapter's, add nothing; an adapter
//! without tokens has gradients of zero. (An infinite x, dY, u or v gives NaN where it is not bf16.)
//!
//! A launch makes both gradients of all adapters and slices. Before it, where there is an index, one finds each adapter's tokens.

use bytemuck::{Pod, Zeroable};

use super::adapter_table::{MAX_RANK, MAX_SLICES, v_columns};
use super::check::{blocks, dimension, find, read_only};
use super::{GradientTable, Kernel, Launch, Properties, Queue, View, ViewMut, dropout};
use crate::cpu::Dropout;
use crate::{DType, Element, Error, Result};

const TOKENS: Kernel = kernel("lora_gradient_tokens");
const FINISH: Kernel = kernel("lora_gradient_finish");

pub(super) const KERNELS: &[Kernel] = &[
    kernel("lora_gradient_f32_r16"),
    kernel("lora_gradient_f32_r64"),
    kernel("lora_gradient_f16_r16"),
    kernel("lora_gradient_f16_r64"),
    kernel("lora_gradient_bf16_r16"),
    kernel("lora_gradient_bf16_r64"),
    TOKENS,
    FINISH,
];

const fn kernel(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("lora_gradient", entry)
}

const THREADS: u32 = 128;
/// Threads of the other two kernels.
const SIDE_THREADS: u32 = 256;

/// Columns of x or dY that a block takes, and tokens whose sum is one chunk.
const COLUMNS: usize = 128;
const CHUNK: usize = 512;

/// What is to be computed; see [`GradientTable::shape`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of x and dY.
    pub tokens: usize,
    /// Columns of dY.
    pub n: usize,
    /// Columns of x.
    pub k: usize,
    /// How many adapters have gradients.
    pub adapters: usize,
    /// Slices of the outputs that have factors of their own.
    pub slices: usize,
    /// Outputs of the largest slice: n, where there is one.
    pub widest_slice: usize,
    /// The largest rank.
    pub max_rank: usize,
    /// The type of x and dY.
    pub dtype: DType,
}

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// The kernel; none where there are no gradients.
    pub kernel: Option<Kernel>,
    /// Blocks: for every adapter, slice, 16 or 64 ranks, 128 columns, and chunk.
    pub blocks: u32,
    /// Chunks of 512 tokens. Above 1, a second kernel adds their sums.
    pub chunks: usize,
    /// Device memory that [`Plan::run`] wants to be lent.
    pub workspace_bytes: usize,
    /// What the adapters' inputs went through; see [`Plan::with_dropout`].
    pub dropout: Option<Dropout>,
}

/// What a batch gives to the gradients. All views are row-major and aligned to 16 bytes (the index to 4).
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a, T> {
    /// `[tokens, k]`: what went into the layer, without dropout.
    pub x: View<'a, T>,
    /// `[tokens, n]`: the gradient of what came out of it.
    pub dy: View<'a, T>,
    /// `[parts, tokens, v_columns]` from [`lora_shrink`](super::lora_shrink) with the same adapters, index and dropout: kept from
    /// the forward pass, or made again. 1, 2, 4 or 8 parts.
    pub v: View<'a, f32>,
    /// The same from dY, with a transposed plan.
    pub u: View<'a, f32>,
    /// `[tokens]`: each token's adapter, -1 for none. Without it all tokens have adapter 0.
    pub index: Option<View<'a, i32>>,
}

/// `Source` of `lora_gradient.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Source {
    rows: u64,
    ranks: u64,
    columns: u32,
    tiles: u32,
    parts: u32,
    vectors: u32,
}

/// `Params` of `lora_gradient.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    inputs: Source,
    outputs: Source,
    gradients: u64,
    index: u64,
    order: u64,
    spans: u64,
    partial: u64,
    dropout: dropout::Params,
    tokens: u32,
    adapters: u32,
    slices: u32,
    pitch: u32,
    max_rank: u32,
    chunks: u32,
    accumulate: u32,
    padding: u32,
}

const _: () = assert!(size_of::<Params>() == 160);

/// Chooses the kernel, the grid and the chunks.
///
/// # Errors
/// [`Error::Argument`] for a rank above [`MAX_RANK`], slices that are none, more than [`MAX_SLICES`] or wider than the outputs, or
/// sizes or a grid of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    let Shape { tokens, n, k, adapters, slices, widest_slice, max_rank, dtype } = *shape;
    for (argument, size) in [("tokens", tokens), ("n", n), ("k", k), ("adapters", adapters)] {
        dimension(argument, size)?;
    }
    if max_rank > MAX_RANK {
        return Err(Error::argument("max_rank", format!("at most {MAX_RANK}"), max_rank));
    }
    if slices == 0 || slices > MAX_SLICES {
        return Err(Error::argument("slices", format!("1 to {MAX_SLICES}"), slices));
    }
    if widest_slice > n {
        return Err(Error::argument("widest_slice", format!("at most {n}"), widest_slice));
    }
    let ranks = if max_rank <= 16 { 16 } else { 64 };
    let chunks = tokens.div_ceil(CHUNK).max(1);
    let tiles = k.div_ceil(COLUMNS) + widest_slice.div_ceil(COLUMNS);
    let grid = [adapters, slices, max_rank.div_ceil(ranks), tiles, chunks]
        .iter()
        .fold(1u64, |product, &count| product.saturating_mul(count as u64));
    let elements = of_adapter(shape).saturating_mul(adapters);
    // The second kernel's blocks.
    blocks("adapters * max_rank * (k + n)", elements.div_ceil(SIDE_THREADS as usize) as u64)?;
    let partial = if chunks > 1 { chunks * elements * size_of::<f32>() } else { 0 };
    Ok(Plan(Details {
        shape: *shape,
        kernel: (grid > 0).then(|| find(KERNELS, &format!("lora_gradient_{dtype}_r{ranks}"))),
        blocks: blocks("adapters * (k + n) * tokens", grid)?,
        chunks,
        workspace_bytes: partial + order_bytes(shape),
        dropout: None,
    }))
}

/// Elements of an adapter in one chunk's part of the workspace.
fn of_adapter(shape: &Shape) -> usize {
    shape.max_rank * (shape.slices * shape.k + shape.n)
}

/// What the adapters' tokens take of the workspace: where each adapter's begin and how many they are, and then their numbers.
fn order_bytes(shape: &Shape) -> usize {
    (shape.adapters * 8 + shape.tokens * size_of::<u32>()).next_multiple_of(16)
}

impl Plan {
    /// The same for adapters that saw x after `dropout`: what it took from x adds nothing to dA. (The factor of the rest is in u
    /// and v.)
    #[must_use]
    pub fn with_dropout(self, dropout: Dropout) -> Self {
        Self(Details { dropout: Some(dropout), ..self.0 })
    }

    /// Writes `gradients`, or with `accumulate` adds to them. `workspace` has `Plan::workspace_bytes()` or more, aligned to 16;
    /// what it holds does not matter, before or after.
    ///
    /// # Errors
    /// [`Error::Argument`] for views or gradients that are not as the plan's shape says, [`Error::Device`] when a launch fails.
    pub fn run<T: Element>(
        &self,
        queue: &dyn Queue,
        batch: &Batch<'_, T>,
        accumulate: bool,
        gradients: &mut GradientTable<'_>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<()> {
        let device = queue.properties();
        let shape = self.shape;
        let Shape { tokens, n, k, adapters, slices, widest_slice, max_rank, dtype } = shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("x", dtype.name(), T::DTYPE));
        }
        if gradients.shape(tokens, dtype) != shape {
            let got = format!("{:?}", gradients.shape(tokens, dtype));
            return Err(Error::argument("gradients", format!("{shape:?}"), got));
        }
        let address = gradients.address(device)?;
        batch.x.check("x", tokens * k, 16, device)?;
        batch.dy.check("dy", tokens * n, 16, device)?;
        let pitch = v_columns(max_rank);
        let [u_parts, v_parts] = [("u", batch.u), ("v", batch.v)].map(|(name, ranks)| {
            let len = tokens * pitch * slices;
            let parts =
                ranks.len().checked_div(len).filter(|parts| [1, 2, 4, 8].contains(parts)).unwrap_or(1);
            ranks.check(name, parts * len, 16, device).map(|()| parts)
        });
        if let Some(index) = batch.index {
            index.check("adapter_index", tokens, 4, device)?;
        }
        workspace.check_at_least("workspace", self.workspace_bytes, 16, device)?;
        let source = |rows, ranks, columns: usize, widest: usize, parts: usize, aligned: bool| Source {
            rows,
            ranks,
            columns: columns as u32,
            tiles: widest.div_ceil(COLUMNS) as u32,
            parts: parts as u32,
            vectors: u32::from(aligned && columns.is_multiple_of(8)),
        };
        let aligned = gradients.slices_are_aligned();
        let params = Params {
            inputs: source(batch.x.address(), batch.u.address(), k, k, u_parts?, true),
            outputs: source(batch.dy.address(), batch.v.address(), n, widest_slice, v_parts?, aligned),
            gradients: address,
            index: batch.index.map_or(0, |index| index.address()),
            order: workspace.address() + adapters as u64 * 8,
            spans: workspace.address(),
            partial: if self.chunks > 1 { workspace.address() + order_bytes(&shape) as u64 } else { 0 },
            dropout: dropout::Params::new(self.dropout.as_ref()),
            tokens: tokens as u32,
            adapters: adapters as u32,
            slices: slices as u32,
            pitch: pitch as u32,
            max_rank: max_rank as u32,
            chunks: self.chunks as u32,
            accumulate: u32::from(accumulate),
            padding: 0,
        };
        let Some(kernel) = self.kernel else { return Ok(()) };
        let launch = |kernel, blocks, threads| {
            let launch = Launch {
                kernel,
                grid: [blocks, 1, 1],
                block: [threads, 1, 1],
                shared_bytes: 0,
                params: bytemuck::bytes_of(&params),
                overlap: false,
            };
            // SAFETY: the views cover what the kernels read and write: all were checked above, the gradients when their table
            // was made; they are borrowed, so they live until the caller lets go of them. The workspace has room for the order
            // of the tokens and for the sums of all chunks, which each launch reads after the one before has written them.
            unsafe { queue.launch(&launch) }
        };
        if batch.index.is_some() {
            launch(TOKENS, adapters as u32, SIDE_THREADS)?;
        }
        launch(kernel, self.blocks, THREADS)?;
        if self.chunks > 1 {
            let elements = adapters * of_adapter(&shape);
            launch(FINISH, elements.div_ceil(SIDE_THREADS as usize) as u32, SIDE_THREADS)?;
        }
        Ok(())
    }
}
