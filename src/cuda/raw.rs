//! The kernels for callers that have addresses and no types: engines with memory of their own, on another version of cudarc or
//! on none.
//!
//! What the other modules take as views and type parameters is here an address and a [`DType`]; plans, checks of shapes and
//! kernels are the same. An address is what `cuMemAlloc` gives, as a number; 0 stands for what is absent. The queue is
//! [`CudaQueue::from_raw`](super::CudaQueue::from_raw), of a `CUstream` by its handle, or any other [`Queue`].
//!
//! | | |
//! |---|---|
//! | [`adapters`], [`scratch`], [`matmul`](fn@matmul) | a linear layer: dense or 4-bit weight, bias, DoRA's scale, an adapter per token |
//! | [`nf4_quantize`](fn@nf4_quantize), [`nf4_dequantize`](fn@nf4_dequantize) | numbers to 4-bit codes and back |
//! | [`merge`](fn@merge) | adapters into a dense weight, or out of it |
//! | [`expert_groups`](fn@expert_groups), [`expert_index`](fn@expert_index), [`expert_matmul`](fn@expert_matmul) | a mixture of experts: rows sorted by expert, their adapters, products with a stack of weights |
//!
//! ```no_run
//! # #[cfg(feature = "cuda")]
//! # fn layer(stream: u64, x: u64, packed: u64, absmax: u64, y: u64, lora_a: u64, lora_b: u64, table: u64, scratch: u64) -> lora_kernels::Result<()> {
//! use lora_kernels::DType;
//! use lora_kernels::cuda::{CudaQueue, matmul, raw};
//! use lora_kernels::nf4::Codebook;
//!
//! // SAFETY: the stream is one of device 0, and outlives the queue.
//! let queue = unsafe { CudaQueue::from_raw(0, stream as *mut _)? };
//! let shape = matmul::Shape {
//!     tokens: 1, n: 4096, k: 4096, dtype: DType::BF16, weight: matmul::WeightFormat::Nf4 { blocksize: 64 },
//! };
//! let adapter = raw::Adapter { lora_a, lora_b, rank: 16, scaling: 2.0 };
//! // SAFETY: the addresses hold what the documentation of each argument says, until the queue has done its work.
//! unsafe {
//!     // Once; `table` has `raw::table_bytes(1)` bytes.
//!     let adapters = raw::adapters(&queue, &[adapter], DType::BF16, shape.k, &[shape.n], table)?;
//!     // Per token; `scratch` has `raw::scratch(&queue, &shape, Some(&adapters))?` bytes.
//!     let weight = raw::Weight::Nf4(raw::Nf4 {
//!         packed, absmax: raw::Absmax::Plain(absmax), blocksize: 64, codebook: &Codebook::nf4(),
//!     });
//!     let adapters = Some(raw::Branch { adapters: &adapters, index: 0 });
//!     raw::matmul(&queue, &shape, &raw::Matmul { x, weight, bias: 0, row_scale: 0, adapters, y, scratch })?;
//! }
//! # Ok(())
//! # }
//! ```

use bytemuck::Pod;
use half::{bf16, f16};

use super::{
    AbsmaxView, AdapterTable, AdapterView, LowRank, NestedView, Nf4View, Nf4ViewMut, Queue, UpdateView, View,
    ViewMut, expert_groups, expert_index, expert_matmul, lora_shrink, matmul, merge, nf4_dequantize,
    nf4_quantize,
};
use crate::nf4::{Codebook, block_count, check_blocksize, packed_len};
use crate::tensor::numel;
use crate::{DType, Element, Error, Result};

/// Calls a product whose types are those of x and of the adapters.
macro_rules! of_types {
    ($product:ident, $queue:expr, $shape:expr, $operands:expr) => {
        match ($shape.dtype, $operands.adapters.as_ref().map(|branch| &branch.adapters.0)) {
            (DType::F32, None) => $product::<f32, f32>($queue, $shape, $operands, None),
            (DType::F32, Some(Table::F32(table))) => {
                $product::<f32, _>($queue, $shape, $operands, Some(table))
            }
            (DType::F16, None) => $product::<f16, f16>($queue, $shape, $operands, None),
            (DType::F16, Some(Table::F16(table))) => {
                $product::<f16, _>($queue, $shape, $operands, Some(table))
            }
            (DType::F16, Some(Table::F32(table))) => {
                $product::<f16, _>($queue, $shape, $operands, Some(table))
            }
            (DType::BF16, None) => $product::<bf16, bf16>($queue, $shape, $operands, None),
            (DType::BF16, Some(Table::BF16(table))) => {
                $product::<bf16, _>($queue, $shape, $operands, Some(table))
            }
            (DType::BF16, Some(Table::F32(table))) => {
                $product::<bf16, _>($queue, $shape, $operands, Some(table))
            }
            (dtype, Some(_)) => Err(Error::argument("adapters", format!("{dtype} or f32"), "another type")),
        }
    };
}

/// A 4-bit matrix.
#[derive(Debug, Clone, Copy)]
pub struct Nf4<'a> {
    /// `[ceil(numel / 2)]`, u8, aligned to 16 bytes.
    pub packed: u64,
    /// The scale of every block.
    pub absmax: Absmax,
    /// Elements per block: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// What the codes stand for.
    pub codebook: &'a Codebook,
}

/// The scales of a 4-bit matrix.
#[derive(Debug, Clone, Copy)]
pub enum Absmax {
    /// `[blocks]`, f32.
    Plain(u64),
    /// Double quantised.
    Nested {
        /// `[blocks]`, u8.
        q: u64,
        /// `[ceil(blocks / blocksize)]`, f32.
        absmax: u64,
        /// `[256]`, f32.
        map: u64,
        /// `[1]`, f32.
        offset: u64,
        /// Elements of `q` per element of `absmax`; 256 in every known file.
        blocksize: usize,
    },
}

/// The weight of a product, `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// Elements of x's type, aligned to 16 bytes.
    Dense(u64),
    /// 4-bit blocks.
    Nf4(Nf4<'a>),
}

/// `delta = scaling * lora_b @ lora_a`.
#[derive(Debug, Clone, Copy)]
pub struct Adapter {
    /// `[rank, k]`, aligned to 16 bytes.
    pub lora_a: u64,
    /// `[n, rank]`, aligned to 16 bytes.
    pub lora_b: u64,
    /// At most [`MAX_RANK`](super::MAX_RANK); 0 is an adapter that does nothing.
    pub rank: usize,
    /// The factor of the product.
    pub scaling: f32,
}

/// Adapters of one module, on the device: an [`AdapterTable`] whose type is a value.
#[derive(Debug)]
pub struct Adapters(Table);

#[derive(Debug)]
enum Table {
    F32(AdapterTable<'static, f32>),
    F16(AdapterTable<'static, f16>),
    BF16(AdapterTable<'static, bf16>),
}

/// The low-rank branch of a product.
#[derive(Debug, Clone, Copy)]
pub struct Branch<'a> {
    /// The adapters.
    pub adapters: &'a Adapters,
    /// `[tokens]`, i32: every token's adapter, -1 for none; see [`LowRank::index`]. With address 0 all tokens use adapter 0.
    pub index: u64,
}

/// The operands of [`matmul`](fn@matmul).
#[derive(Debug, Clone, Copy)]
pub struct Matmul<'a> {
    /// `[tokens, k]`, aligned to 16 bytes.
    pub x: u64,
    /// `[n, k]`.
    pub weight: Weight<'a>,
    /// `[n]`, of x's type, or 0.
    pub bias: u64,
    /// `[n]`, f32: DoRA's `magnitude / norm`, or 0.
    pub row_scale: u64,
    /// The adapters, if there are any.
    pub adapters: Option<Branch<'a>>,
    /// `[tokens, n]`, aligned to 16 bytes.
    pub y: u64,
    /// As many bytes as [`scratch`] says, aligned to 16. What they hold does not matter, before or after.
    pub scratch: u64,
}

/// The operands of [`expert_matmul`](fn@expert_matmul).
#[derive(Debug, Clone, Copy)]
pub struct ExpertMatmul<'a> {
    /// `[tokens, k]`, aligned to 16 bytes.
    pub x: u64,
    /// `[experts, n, k]`.
    pub weight: Weight<'a>,
    /// What [`expert_groups`](fn@expert_groups) made of the experts of all `tokens * choices` rows.
    pub groups: u64,
    /// `[experts, n]`, of x's type, or 0.
    pub bias: u64,
    /// `[experts, n]`, f32, or 0.
    pub row_scale: u64,
    /// The adapters, if there are any; the index has `tokens * choices` numbers, as [`expert_index`](fn@expert_index) makes them.
    pub adapters: Option<Branch<'a>>,
    /// `[tokens * choices, n]`, aligned to 16 bytes.
    pub y: u64,
    /// As many bytes as [`expert_scratch`] says, aligned to 16. What they hold does not matter, before or after.
    pub scratch: u64,
}

/// The size of the buffer that [`adapters`] wants for `count` adapters and slices.
pub const fn table_bytes(count: usize) -> usize {
    AdapterTable::<f32>::bytes(count)
}

/// Uploads what the kernels need to know of the adapters of a module with `k` inputs and these slices of outputs (one slice: a
/// module that is not packed); see [`AdapterTable::upload_slices`]. Factors are of type `dtype`. Once, not per token.
///
/// # Errors
/// As there.
///
/// # Safety
/// 1. `buffer` is valid for [`table_bytes`] bytes, aligned to 16, and every factor for its elements, on the device of `queue`.
/// 2. They stay so, and the factors in place, until all work that was enqueued with the result has completed.
pub unsafe fn adapters(
    queue: &dyn Queue,
    adapters: &[Adapter],
    dtype: DType,
    k: usize,
    slices: &[usize],
    buffer: u64,
) -> Result<Adapters> {
    // SAFETY: the caller's promises.
    let table = unsafe {
        match dtype {
            DType::F32 => Table::F32(table(queue, adapters, k, slices, buffer)?),
            DType::F16 => Table::F16(table(queue, adapters, k, slices, buffer)?),
            DType::BF16 => Table::BF16(table(queue, adapters, k, slices, buffer)?),
        }
    };
    Ok(Adapters(table))
}

/// # Safety
/// As [`adapters`], with factors of type `A`.
unsafe fn table<A: Element>(
    queue: &dyn Queue,
    adapters: &[Adapter],
    k: usize,
    slices: &[usize],
    buffer: u64,
) -> Result<AdapterTable<'static, A>> {
    let rows = |i: usize| slices.get(i % slices.len().max(1)).copied().unwrap_or(0);
    // SAFETY: the caller's promises.
    let views = adapters.iter().enumerate().map(|(i, adapter)| unsafe { adapter.view(i, k, rows(i), queue) });
    let views = views.collect::<Result<Vec<_>>>()?;
    // SAFETY: the same.
    let buffer = unsafe { write(queue, "buffer", buffer, table_bytes(adapters.len()))? };
    AdapterTable::upload_slices(queue, &views, k, slices, buffer)
}

impl Adapter {
    /// # Safety
    /// The addresses are valid for the factors of a module with `k` inputs and `n` outputs.
    unsafe fn view<'a, A: Element>(
        &self,
        i: usize,
        k: usize,
        n: usize,
        queue: &dyn Queue,
    ) -> Result<AdapterView<'a, A>> {
        let Self { lora_a, lora_b, rank, scaling } = *self;
        let factor = |address: u64, of: usize| {
            let len = elements("rank", &[rank, of])?;
            // SAFETY: the caller's promise.
            unsafe { read(queue, "factors", address, len) }
        };
        let factors = || Ok((factor(lora_a, k)?, factor(lora_b, n)?));
        let (lora_a, lora_b) = factors().map_err(|e: Error| e.within(format_args!("adapters[{i}]")))?;
        Ok(AdapterView { lora_a, lora_b, rank, scaling })
    }
}

impl Adapters {
    fn shrink(&self, queue: &dyn Queue, tokens: usize, dtype: DType) -> Result<lora_shrink::Plan> {
        let shape = match &self.0 {
            Table::F32(table) => table.shrink_shape(tokens, dtype),
            Table::F16(table) => table.shrink_shape(tokens, dtype),
            Table::BF16(table) => table.shrink_shape(tokens, dtype),
        };
        lora_shrink::plan(&shape, queue.properties())
    }
}

/// How many bytes [`matmul`](fn@matmul) wants as scratch.
///
/// # Errors
/// As [`matmul::plan`] and [`lora_shrink::plan`].
pub fn scratch(queue: &dyn Queue, shape: &matmul::Shape, adapters: Option<&Adapters>) -> Result<usize> {
    let product = matmul::plan(shape, queue.properties())?.workspace_bytes;
    let v = match adapters {
        Some(adapters) => adapters.shrink(queue, shape.tokens, shape.dtype)?.v_len() * size_of::<f32>(),
        None => 0,
    };
    Ok(product.next_multiple_of(16) + v)
}

/// `y = row_scale ⊙ (x Wᵀ + scaling (x Aᵀ) Bᵀ) + bias`: [`lora_shrink`] where there are adapters, and [`matmul`](mod@matmul).
///
/// # Errors
/// As the plans of these, and for adapters of a type that does not go with x.
///
/// # Safety
/// Every address is valid for what [`Matmul`] says, on the device of `queue`, until the work has completed; `y` and `scratch`
/// are written, and overlap nothing else.
pub unsafe fn matmul(queue: &dyn Queue, shape: &matmul::Shape, operands: &Matmul<'_>) -> Result<()> {
    // SAFETY: the caller's promises.
    unsafe { of_types!(product, queue, shape, operands) }
}

/// # Safety
/// As [`matmul`], with x of type `T`.
unsafe fn product<T: Element, A: Element>(
    queue: &dyn Queue,
    shape: &matmul::Shape,
    operands: &Matmul<'_>,
    table: Option<&AdapterTable<'_, A>>,
) -> Result<()> {
    let matmul::Shape { tokens, n, k, .. } = *shape;
    let plan = matmul::plan(shape, queue.properties())?;
    let Matmul { bias, row_scale, y, scratch, .. } = *operands;
    // SAFETY: the caller's promises; the product's workspace is the first part of the scratch, and v the rest.
    unsafe {
        let x = read::<T>(queue, "x", operands.x, elements("tokens * k", &[tokens, k])?)?;
        let workspace = write(queue, "scratch", scratch, plan.workspace_bytes)?;
        let low_rank = match (table, &operands.adapters) {
            (Some(table), Some(branch)) => {
                let index = optional(queue, branch.index, tokens);
                let shrink = branch.adapters.shrink(queue, tokens, shape.dtype)?;
                let v = scratch + plan.workspace_bytes.next_multiple_of(16) as u64;
                shrink.run(queue, x, table, index, write(queue, "scratch", v, shrink.v_len())?)?;
                Some(LowRank { adapters: table, index, v: read(queue, "scratch", v, shrink.v_len())? })
            }
            _ => None,
        };
        let extras = matmul::Extras {
            bias: optional(queue, bias, n),
            row_scale: optional(queue, row_scale, n),
            low_rank,
            overlap: false,
        };
        let weight = operands.weight.view(queue, elements("n * k", &[n, k])?)?;
        let y = write::<T>(queue, "y", y, elements("tokens * n", &[tokens, n])?)?;
        plan.run(queue, x, &weight, &extras, y, workspace)
    }
}

/// The size in bytes of what [`expert_groups`](fn@expert_groups) writes for so many rows.
///
/// # Errors
/// As [`expert_groups::plan`].
pub fn expert_groups_bytes(queue: &dyn Queue, shape: &expert_groups::Shape) -> Result<usize> {
    Ok(expert_groups::plan(shape, queue.properties())?.len() * size_of::<i32>())
}

/// Sorts rows by expert: [`expert_groups`](mod@expert_groups). Once for all products that share the choices.
///
/// # Errors
/// As there.
///
/// # Safety
/// The addresses are valid on the device of `queue` until the work has completed: `expert` for `rows` i32, -1 for none, and `groups`
/// for [`expert_groups_bytes`], aligned to 4. `groups` is written, and overlaps nothing else.
pub unsafe fn expert_groups(
    queue: &dyn Queue,
    shape: &expert_groups::Shape,
    expert: u64,
    groups: u64,
) -> Result<()> {
    let plan = expert_groups::plan(shape, queue.properties())?;
    // SAFETY: the caller's promises.
    unsafe {
        let expert = read(queue, "expert", expert, shape.rows)?;
        plan.run(queue, expert, write(queue, "groups", groups, plan.len())?).map(drop)
    }
}

/// The adapter of every row, from that of its token and its expert: [`expert_index`](mod@expert_index).
///
/// # Errors
/// As there.
///
/// # Safety
/// The addresses are valid on the device of `queue` until the work has completed: `adapter` for `tokens` i32, `expert` and `index` for
/// `tokens * choices`. `index` is written, and overlaps nothing else.
pub unsafe fn expert_index(
    queue: &dyn Queue,
    shape: &expert_index::Shape,
    adapter: u64,
    expert: u64,
    index: u64,
) -> Result<()> {
    let plan = expert_index::plan(shape, queue.properties())?;
    // SAFETY: the caller's promises.
    unsafe {
        let adapter = read(queue, "adapter", adapter, shape.tokens)?;
        let expert = read(queue, "expert", expert, plan.rows)?;
        plan.run(queue, adapter, expert, write(queue, "index", index, plan.rows)?)
    }
}

/// How many bytes [`expert_matmul`](fn@expert_matmul) wants as scratch.
///
/// # Errors
/// As [`expert_matmul::plan`] and [`lora_shrink::plan`].
pub fn expert_scratch(
    queue: &dyn Queue,
    shape: &expert_matmul::Shape,
    adapters: Option<&Adapters>,
) -> Result<usize> {
    let rows = expert_matmul::plan(shape, queue.properties())?.rows;
    Ok(match adapters {
        Some(adapters) => adapters.shrink(queue, rows, shape.dtype)?.v_len() * size_of::<f32>(),
        None => 0,
    })
}

/// Products of rows with the weights of their experts, out of a stack `[experts, n, k]`: [`lora_shrink`] where there are adapters, and
/// [`expert_matmul`](mod@expert_matmul). The adapters are those of one stack behind the other, one for each expert.
///
/// # Errors
/// As the plans of these, and for adapters of a type that does not go with x.
///
/// # Safety
/// Every address is valid for what [`ExpertMatmul`] says, on the device of `queue`, until the work has completed; `y` and `scratch`
/// are written, and overlap nothing else.
pub unsafe fn expert_matmul(
    queue: &dyn Queue,
    shape: &expert_matmul::Shape,
    operands: &ExpertMatmul<'_>,
) -> Result<()> {
    // SAFETY: the caller's promises.
    unsafe { of_types!(expert_product, queue, shape, operands) }
}

/// # Safety
/// As [`expert_matmul`], with x of type `T`.
unsafe fn expert_product<T: Element, A: Element>(
    queue: &dyn Queue,
    shape: &expert_matmul::Shape,
    operands: &ExpertMatmul<'_>,
    table: Option<&AdapterTable<'_, A>>,
) -> Result<()> {
    let expert_matmul::Shape { tokens, choices, experts, n, k, .. } = *shape;
    let plan = expert_matmul::plan(shape, queue.properties())?;
    let sort = expert_groups::plan(&plan.groups_shape(), queue.properties())?;
    let ExpertMatmul { bias, row_scale, y, scratch, .. } = *operands;
    // SAFETY: the caller's promises.
    unsafe {
        let x = read::<T>(queue, "x", operands.x, elements("tokens * k", &[tokens, k])?)?;
        let groups = read(queue, "groups", operands.groups, sort.len())?;
        let weight = operands.weight.view(queue, elements("experts * n * k", &[experts, n, k])?)?;
        let y = write::<T>(queue, "y", y, elements("tokens * choices * n", &[plan.rows, n])?)?;
        let low_rank = match (table, &operands.adapters) {
            (Some(table), Some(branch)) => {
                let index = optional(queue, branch.index, plan.rows);
                let shrink = branch.adapters.shrink(queue, plan.rows, shape.dtype)?.with_choices(choices)?;
                shrink.run(queue, x, table, index, write(queue, "scratch", scratch, shrink.v_len())?)?;
                let v = read(queue, "scratch", scratch, shrink.v_len())?;
                Some(LowRank { adapters: table, index, v })
            }
            _ => None,
        };
        let extras = matmul::Extras {
            bias: optional(queue, bias, experts * n),
            row_scale: optional(queue, row_scale, experts * n),
            low_rank,
            overlap: false,
        };
        let groups = expert_groups::Groups::of(plan.groups_shape(), groups);
        plan.run(queue, x, &weight, &groups, &extras, y)
    }
}

/// Encodes `x` `[numel]` into `packed` and `absmax`: [`nf4_quantize`](mod@nf4_quantize).
///
/// # Errors
/// As there.
///
/// # Safety
/// The addresses are valid on the device of `queue` until the work has completed: `x` for `numel` elements of the shape's type,
/// `packed` for `ceil(numel / 2)` bytes, aligned to 16, and `absmax` for `ceil(numel / blocksize)` f32. The last two are
/// written, and overlap nothing else.
pub unsafe fn nf4_quantize(
    queue: &dyn Queue,
    shape: &nf4_quantize::Shape,
    codebook: &Codebook,
    x: u64,
    packed: u64,
    absmax: u64,
) -> Result<()> {
    let plan = nf4_quantize::plan(shape, codebook, queue.properties())?;
    let nf4_quantize::Shape { numel, blocksize, dtype } = *shape;
    // SAFETY: the caller's promises.
    unsafe {
        let packed = write(queue, "packed", packed, packed_len(numel))?;
        let absmax = write(queue, "absmax", absmax, block_count(numel, blocksize))?;
        let out = Nf4ViewMut { packed, absmax };
        match dtype {
            DType::F32 => plan.run::<f32>(queue, read(queue, "x", x, numel)?, out),
            DType::F16 => plan.run::<f16>(queue, read(queue, "x", x, numel)?, out),
            DType::BF16 => plan.run::<bf16>(queue, read(queue, "x", x, numel)?, out),
        }
    }
}

/// Decodes a matrix into `out` `[numel]`: [`nf4_dequantize`](mod@nf4_dequantize).
///
/// # Errors
/// As there.
///
/// # Safety
/// The addresses are valid on the device of `queue` until the work has completed: `out` for `numel` elements of type `dtype`, and
/// those of `weight` for what they say of so many elements. `out` is written, and overlaps nothing else.
pub unsafe fn nf4_dequantize(
    queue: &dyn Queue,
    weight: &Nf4<'_>,
    numel: usize,
    dtype: DType,
    out: u64,
) -> Result<()> {
    let shape = nf4_dequantize::Shape { numel, blocksize: weight.blocksize, dtype };
    let plan = nf4_dequantize::plan(&shape, queue.properties())?;
    // SAFETY: the caller's promises.
    unsafe {
        let weight = weight.view(queue, numel)?;
        match dtype {
            DType::F32 => plan.run::<f32>(queue, &weight, write(queue, "out", out, numel)?),
            DType::F16 => plan.run::<f16>(queue, &weight, write(queue, "out", out, numel)?),
            DType::BF16 => plan.run::<bf16>(queue, &weight, write(queue, "out", out, numel)?),
        }
    }
}

/// Merges adapters, whose factors are of type `adapter_dtype`, into a dense weight, or takes them out of it:
/// [`merge`](mod@merge). `out` may be `weight`.
///
/// # Errors
/// As there.
///
/// # Safety
/// The addresses are valid on the device of `queue` until the work has completed: `weight` and `out` for the `n * k` elements of
/// the shape, aligned to 16 bytes, factors for theirs, and `row_scale`, unless it is 0, for `n` f32. `out` is written, and
/// overlaps nothing else but all of `weight`.
pub unsafe fn merge(
    queue: &dyn Queue,
    shape: &merge::Shape,
    weight: u64,
    adapters: &[Adapter],
    adapter_dtype: DType,
    row_scale: u64,
    out: u64,
) -> Result<()> {
    use DType::{BF16, F16, F32};
    let run = match (shape.dtype, adapter_dtype) {
        (F32, F32) => merge_as::<f32, f32>,
        (F32, F16) => merge_as::<f32, f16>,
        (F32, BF16) => merge_as::<f32, bf16>,
        (F16, F32) => merge_as::<f16, f32>,
        (F16, F16) => merge_as::<f16, f16>,
        (F16, BF16) => merge_as::<f16, bf16>,
        (BF16, F32) => merge_as::<bf16, f32>,
        (BF16, F16) => merge_as::<bf16, f16>,
        (BF16, BF16) => merge_as::<bf16, bf16>,
    };
    // SAFETY: the caller's promises.
    unsafe { run(queue, shape, weight, adapters, row_scale, out) }
}

/// # Safety
/// As [`merge`], with a weight of type `T` and factors of type `A`.
unsafe fn merge_as<T: Element, A: Element>(
    queue: &dyn Queue,
    shape: &merge::Shape,
    weight: u64,
    adapters: &[Adapter],
    row_scale: u64,
    out: u64,
) -> Result<()> {
    let plan = merge::plan(shape, queue.properties())?;
    let merge::Shape { n, k, .. } = *shape;
    let numel = elements("n * k", &[n, k])?;
    // SAFETY: the caller's promises; where `out` is the weight, there is one view of it.
    unsafe {
        let views = adapters.iter().enumerate().map(|(i, adapter)| adapter.view::<A>(i, k, n, queue));
        let views = views.collect::<Result<Vec<_>>>()?;
        let update = UpdateView { adapters: &views, row_scale: optional(queue, row_scale, n) };
        match out == weight {
            true => plan.run_in_place(queue, write::<T>(queue, "weight", weight, numel)?, &update),
            false => {
                let weight = read::<T>(queue, "weight", weight, numel)?;
                plan.run(queue, weight, &update, write(queue, "out", out, numel)?)
            }
        }
    }
}

impl<'a> Weight<'a> {
    /// # Safety
    /// The addresses are valid for a weight of `numel` elements, if it is dense of type `T`.
    unsafe fn view<T: Element>(&self, queue: &dyn Queue, numel: usize) -> Result<matmul::Weight<'a, T>> {
        // SAFETY: the caller's promise.
        unsafe {
            Ok(match self {
                Weight::Dense(address) => matmul::Weight::Dense(read(queue, "weight", *address, numel)?),
                Weight::Nf4(nf4) => matmul::Weight::Nf4(nf4.view(queue, numel)?),
            })
        }
    }
}

impl<'a> Nf4<'a> {
    /// # Safety
    /// The addresses are valid for a matrix of `numel` elements.
    unsafe fn view(&self, queue: &dyn Queue, numel: usize) -> Result<Nf4View<'a>> {
        check_blocksize("weight.blocksize", self.blocksize)?;
        let blocks = block_count(numel, self.blocksize);
        // SAFETY: the caller's promise.
        unsafe {
            let absmax = match self.absmax {
                Absmax::Plain(absmax) => AbsmaxView::Plain(read(queue, "weight.absmax", absmax, blocks)?),
                Absmax::Nested { q, absmax, map, offset, blocksize } => {
                    check_blocksize("weight.absmax.blocksize", blocksize)?;
                    AbsmaxView::Nested(NestedView {
                        q: read(queue, "weight.absmax.q", q, blocks)?,
                        absmax: read(queue, "weight.absmax.absmax", absmax, block_count(blocks, blocksize))?,
                        map: read(queue, "weight.absmax.map", map, 256)?,
                        offset: read(queue, "weight.absmax.offset", offset, 1)?,
                        blocksize,
                    })
                }
            };
            let packed = read(queue, "weight.packed", self.packed, packed_len(numel))?;
            Ok(Nf4View { packed, absmax, blocksize: self.blocksize, codebook: self.codebook })
        }
    }
}

/// The product of sizes, unless it overflows.
fn elements(argument: &str, sizes: &[usize]) -> Result<usize> {
    numel(sizes)
        .ok_or_else(|| Error::argument(argument, "a product that fits in memory", format!("{sizes:?}")))
}

fn check_address(argument: &str, address: u64, len: usize) -> Result<()> {
    match address == 0 && len > 0 {
        true => Err(Error::argument(argument, "an address", 0)),
        false => Ok(()),
    }
}

/// # Safety
/// As [`View::from_raw`].
unsafe fn read<'a, T: Pod>(
    queue: &dyn Queue,
    argument: &str,
    address: u64,
    len: usize,
) -> Result<View<'a, T>> {
    check_address(argument, address, len)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { View::from_raw(address, len, queue.properties().memory) })
}

/// # Safety
/// As [`ViewMut::from_raw`].
unsafe fn write<'a, T: Pod>(
    queue: &dyn Queue,
    argument: &str,
    address: u64,
    len: usize,
) -> Result<ViewMut<'a, T>> {
    check_address(argument, address, len)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { ViewMut::from_raw(address, len, queue.properties().memory) })
}

/// # Safety
/// As [`View::from_raw`], unless the address is 0.
unsafe fn optional<'a, T: Pod>(queue: &dyn Queue, address: u64, len: usize) -> Option<View<'a, T>> {
    // SAFETY: the caller's promise.
    (address != 0).then(|| unsafe { View::from_raw(address, len, queue.properties().memory) })
}
