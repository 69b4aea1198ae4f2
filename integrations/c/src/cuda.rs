//! Launches on device memory, by address.

use std::ffi::c_void;

use lora_kernels::cuda::{
    CudaQueue, Queue, expert_groups, expert_index, expert_matmul, matmul, merge, nf4_quantize, raw,
};
use lora_kernels::nf4::Codebook;
use lora_kernels::{Error, Result};

use crate::memory::{elements, out, reference, slice};
use crate::{LkDType, LkStatus, call, dtype};

/// A CUDA stream with the kernels. Opaque.
pub struct LkQueue(Box<dyn Queue>);

impl LkQueue {
    /// Of any queue that runs the kernels: for tests in Rust.
    #[doc(hidden)]
    pub fn new(queue: impl Queue + 'static) -> Self {
        Self(Box::new(queue))
    }
}

/// Adapters of one module on a device, as the kernels read them. Opaque.
pub struct LkCudaAdapters(raw::Adapters);

/// `delta = scaling * lora_b @ lora_a`, on a device.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LkCudaAdapter {
    /// `[rank, k]`, aligned to 16 bytes.
    pub lora_a: u64,
    /// `[n, rank]`, aligned to 16 bytes.
    pub lora_b: u64,
    /// At most 256; 0 is an adapter that does nothing.
    pub rank: usize,
    /// The factor of the product.
    pub scaling: f32,
}

/// A 4-bit matrix on a device; addresses of absent parts are 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LkCudaNf4 {
    /// `[ceil(numel / 2)]`, u8, aligned to 16 bytes.
    pub packed: u64,
    /// `[blocks]`, f32; 0 where the scales are quantised themselves.
    pub absmax: u64,
    /// `[blocks]`, u8: the quantised scales, and what follows, where `absmax` is 0.
    pub nested_q: u64,
    /// `[ceil(blocks / nested_blocksize)]`, f32.
    pub nested_absmax: u64,
    /// `[256]`, f32.
    pub nested_map: u64,
    /// `[1]`, f32.
    pub nested_offset: u64,
    /// Scales that share a scale: 256 in every known file.
    pub nested_blocksize: usize,
    /// Elements per scale: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// `[16]`, on the HOST: what the codes stand for; NULL for the values of NF4.
    pub codebook: *const f32,
}

/// The operands of `lk_cuda_matmul`. Addresses are of the queue's device, those of absent operands 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LkCudaMatmul {
    /// Rows of x and y.
    pub tokens: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// The type of x, y, the bias and a dense weight.
    pub dtype: LkDType,
    /// `[tokens, k]`, aligned to 16 bytes.
    pub x: u64,
    /// `[n, k]`, aligned to 16 bytes; 0 with `nf4`.
    pub dense: u64,
    /// The weight in 4 bits, or NULL.
    pub nf4: *const LkCudaNf4,
    /// `[n]`, or 0.
    pub bias: u64,
    /// `[n]`, f32: DoRA's `magnitude / norm`, or 0.
    pub row_scale: u64,
    /// The adapters to choose from, or NULL.
    pub adapters: *const LkCudaAdapters,
    /// `[tokens]`, i32: every token's adapter, -1 for none; with 0 all tokens use the first.
    pub adapter_index: u64,
    /// `[tokens, n]`, aligned to 16 bytes, written.
    pub y: u64,
    /// As many bytes as `lk_cuda_matmul_scratch` says, aligned to 16.
    pub scratch: u64,
}

/// The operands of `lk_cuda_expert_matmul`. Addresses are of the queue's device, those of absent operands 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LkCudaExpertMatmul {
    /// Rows of x.
    pub tokens: usize,
    /// Rows of y for each row of x: experts that the router chooses, or 1.
    pub choices: usize,
    /// Experts of the stack.
    pub experts: usize,
    /// Outputs of an expert.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// The type of x, y, the bias and a dense weight: `LK_F16` or `LK_BF16`.
    pub dtype: LkDType,
    /// `[tokens, k]`, aligned to 16 bytes.
    pub x: u64,
    /// `[experts, n, k]`, aligned to 16 bytes; 0 with `nf4`.
    pub dense: u64,
    /// The stack in 4 bits, as one matrix `[experts * n, k]`, or NULL.
    pub nf4: *const LkCudaNf4,
    /// What `lk_cuda_expert_groups` made of the experts of `tokens * choices` rows.
    pub groups: u64,
    /// `[experts, n]`, or 0.
    pub bias: u64,
    /// `[experts, n]`, f32, or 0.
    pub row_scale: u64,
    /// The adapters to choose from, those of a stack one behind the other, or NULL.
    pub adapters: *const LkCudaAdapters,
    /// `[tokens * choices]`, i32: every row's adapter, -1 for none, as `lk_cuda_expert_index` makes them; with 0 all rows use the first.
    pub adapter_index: u64,
    /// `[tokens * choices, n]`, aligned to 16 bytes, written. A token's rows are one behind the other; those without an expert become 0.
    pub y: u64,
    /// As many bytes as `lk_cuda_expert_matmul_scratch` says, aligned to 16.
    pub scratch: u64,
}

/// The queue of a CUDA stream (a `CUstream` or `cudaStream_t`; NULL is the default stream) in the primary context of a device.
/// Gives `LK_STATUS_NO_DEVICE` where there is no GPU or no driver.
///
/// # Safety
/// The stream outlives the queue, and `queue` takes a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_queue_new(
    device: usize,
    stream: *mut c_void,
    queue: *mut *mut LkQueue,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        let (put, cuda) = unsafe { (out("queue", queue)?, CudaQueue::from_raw(device, stream)?) };
        put(Box::into_raw(Box::new(LkQueue(Box::new(cuda)))));
        Ok(())
    })
}

/// Frees a queue; NULL does nothing. The stream stays.
///
/// # Safety
/// `queue` is a handle that nobody uses any more, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_queue_free(queue: *mut LkQueue) {
    if !queue.is_null() {
        // SAFETY: the handle was made by `lk_queue_new`.
        drop(unsafe { Box::from_raw(queue) });
    }
}

/// The bytes of the device buffer that `lk_cuda_adapters_new` wants for `count` adapters and slices.
#[unsafe(no_mangle)]
pub extern "C" fn lk_cuda_adapters_bytes(count: usize) -> usize {
    count.saturating_mul(raw::table_bytes(1))
}

/// Uploads what the kernels need to know of the adapters of a module with `k` inputs, whose outputs are `slices`, one behind the
/// other (query, key and value of a packed module; a single slice otherwise). Adapter i has `adapters[i * slice_count + s]` for
/// slice s. Once, not per token.
///
/// # Safety
/// The arguments and what they point to are as their types say. Factors and `buffer` (`lk_cuda_adapters_bytes`, aligned to 16) are
/// memory of the queue's device, and stay until the stream has done all work with the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_adapters_new(
    queue: *const LkQueue,
    adapters: *const LkCudaAdapter,
    adapter_count: usize,
    adapter_dtype: LkDType,
    k: usize,
    slices: *const usize,
    slice_count: usize,
    buffer: u64,
    result: *mut *mut LkCudaAdapters,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            let put = out("result", result)?;
            let adapters = raw_adapters(adapters, adapter_count)?;
            let slices = slice("slices", slices, slice_count)?;
            let dtype = dtype("adapter_dtype", adapter_dtype)?;
            let table = raw::adapters(queue, &adapters, dtype, k, slices, buffer)?;
            put(Box::into_raw(Box::new(LkCudaAdapters(table))));
        }
        Ok(())
    })
}

/// Frees the handle, not the memory of the device; NULL does nothing.
///
/// # Safety
/// `adapters` is a handle that nobody uses any more, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_adapters_free(adapters: *mut LkCudaAdapters) {
    if !adapters.is_null() {
        // SAFETY: the handle was made by `lk_cuda_adapters_new`.
        drop(unsafe { Box::from_raw(adapters) });
    }
}

/// How many bytes `lk_cuda_matmul` wants as scratch for these operands; `scratch` and addresses do not matter yet.
///
/// # Safety
/// As `lk_cuda_matmul`; `bytes` takes a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_matmul_scratch(
    queue: *const LkQueue,
    operands: *const LkCudaMatmul,
    bytes: *mut usize,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            let operands = reference("operands", operands)?;
            let put = out("bytes", bytes)?;
            let adapters = operands.adapters.as_ref().map(|adapters| &adapters.0);
            put(raw::scratch(queue, &operands.shape()?, adapters)?);
        }
        Ok(())
    })
}

/// `y = row_scale * (x W^T + scaling (x A^T) B^T) + bias`, enqueued.
///
/// # Safety
/// `operands` and what it points to are as `LkCudaMatmul` says, and the memory of the device stays until the stream has done the
/// work; y and scratch overlap nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_matmul(queue: *const LkQueue, operands: *const LkCudaMatmul) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            let operands = reference("operands", operands)?;
            let codebook = codebook(operands.nf4)?;
            let weight = weight(operands.dense, operands.nf4, &codebook)?;
            let adapters = branch(operands.adapters, operands.adapter_index);
            let LkCudaMatmul { x, bias, row_scale, y, scratch, .. } = *operands;
            let shape = operands.shape()?;
            raw::matmul(queue, &shape, &raw::Matmul { x, weight, bias, row_scale, adapters, y, scratch })
        }
    })
}

/// The bytes of the device buffer that `lk_cuda_expert_groups` fills for so many rows and experts.
///
/// # Safety
/// `queue` is a handle, and `bytes` takes a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_expert_groups_bytes(
    queue: *const LkQueue,
    rows: usize,
    experts: usize,
    bytes: *mut usize,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        let (queue, put) = unsafe { (&*reference("queue", queue)?.0, out("bytes", bytes)?) };
        put(raw::expert_groups_bytes(queue, &expert_groups::Shape { rows, experts })?);
        Ok(())
    })
}

/// Sorts the rows of a mixture of experts by expert, enqueued: once for all products that share the choices. `expert` is `[rows]`, i32: the
/// expert of every row, -1 for none; any other number that is none makes its row NaN. `groups` is aligned to 4 bytes.
///
/// # Safety
/// The addresses are memory of the queue's device that stays until the stream has done the work.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_expert_groups(
    queue: *const LkQueue,
    rows: usize,
    experts: usize,
    expert: u64,
    groups: u64,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            raw::expert_groups(queue, &expert_groups::Shape { rows, experts }, expert, groups)
        }
    })
}

/// The adapter of every row of a mixture of experts, enqueued: `index[i] = adapter[i / choices] * experts + expert[i]`, -1 where either is -1.
/// `adapter` is `[tokens]`, `expert` and `index` are `[tokens * choices]`, all i32; there are `adapters` stacks of adapters.
///
/// # Safety
/// As `lk_cuda_expert_groups`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_expert_index(
    queue: *const LkQueue,
    tokens: usize,
    choices: usize,
    adapters: usize,
    experts: usize,
    adapter: u64,
    expert: u64,
    index: u64,
) -> LkStatus {
    call(|| {
        let shape = expert_index::Shape { tokens, choices, adapters, experts };
        // SAFETY: the caller's promise.
        unsafe { raw::expert_index(&*reference("queue", queue)?.0, &shape, adapter, expert, index) }
    })
}

/// How many bytes `lk_cuda_expert_matmul` wants as scratch for these operands; `scratch` and addresses do not matter yet.
///
/// # Safety
/// As `lk_cuda_expert_matmul`; `bytes` takes a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_expert_matmul_scratch(
    queue: *const LkQueue,
    operands: *const LkCudaExpertMatmul,
    bytes: *mut usize,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            let operands = reference("operands", operands)?;
            let put = out("bytes", bytes)?;
            let adapters = operands.adapters.as_ref().map(|adapters| &adapters.0);
            put(raw::expert_scratch(queue, &operands.shape()?, adapters)?);
        }
        Ok(())
    })
}

/// `y[i] = row_scale[e] * (x[i / choices] W[e]^T + scaling (x A^T) B^T) + bias[e]`, with e the expert of row i, enqueued.
///
/// # Safety
/// `operands` and what it points to are as `LkCudaExpertMatmul` says, and the memory of the device stays until the stream has done
/// the work; y and scratch overlap nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_expert_matmul(
    queue: *const LkQueue,
    operands: *const LkCudaExpertMatmul,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            let operands = reference("operands", operands)?;
            let codebook = codebook(operands.nf4)?;
            let weight = weight(operands.dense, operands.nf4, &codebook)?;
            let adapters = branch(operands.adapters, operands.adapter_index);
            let LkCudaExpertMatmul { x, groups, bias, row_scale, y, scratch, .. } = *operands;
            let product = raw::ExpertMatmul { x, weight, groups, bias, row_scale, adapters, y, scratch };
            raw::expert_matmul(queue, &operands.shape()?, &product)
        }
    })
}

/// Encodes `numel` elements to NF4, enqueued: codes to `packed` (`ceil(numel / 2)` bytes, aligned to 16), scales to `absmax`
/// (`ceil(numel / blocksize)` f32).
///
/// # Safety
/// The addresses are memory of the queue's device that stays until the stream has done the work.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_nf4_quantize(
    queue: *const LkQueue,
    data: u64,
    dtype: LkDType,
    numel: usize,
    blocksize: usize,
    packed: u64,
    absmax: u64,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            let numel = elements("numel", &[numel])?;
            let shape = nf4_quantize::Shape { numel, blocksize, dtype: crate::dtype("dtype", dtype)? };
            raw::nf4_quantize(queue, &shape, &Codebook::nf4(), data, packed, absmax)
        }
    })
}

/// Decodes a matrix of `numel` elements to `data`, of type `dtype`, enqueued.
///
/// # Safety
/// As `lk_cuda_nf4_quantize`; `nf4` and what it points to are as its type says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_nf4_dequantize(
    queue: *const LkQueue,
    nf4: *const LkCudaNf4,
    numel: usize,
    dtype: LkDType,
    data: u64,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            let nf4 = reference("nf4", nf4)?;
            let (numel, dtype) = (elements("numel", &[numel])?, crate::dtype("dtype", dtype)?);
            raw::nf4_dequantize(queue, &nf4.raw(&nf4.codebook()?), numel, dtype, data)
        }
    })
}

/// Merges up to 8 adapters into a dense weight `[n, k]` of type `dtype`, or with `unmerge` takes them out, enqueued. `merged` may be
/// `weight`; both are aligned to 16 bytes. `row_scale` is `[n]` f32 (DoRA's `magnitude / norm`), or 0.
///
/// # Safety
/// As `lk_cuda_nf4_quantize`; `adapters` has `adapter_count` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_cuda_merge(
    queue: *const LkQueue,
    n: usize,
    k: usize,
    dtype: LkDType,
    weight: u64,
    adapters: *const LkCudaAdapter,
    adapter_count: usize,
    adapter_dtype: LkDType,
    row_scale: u64,
    unmerge: bool,
    merged: u64,
) -> LkStatus {
    call(|| {
        let dtypes = (crate::dtype("dtype", dtype)?, crate::dtype("adapter_dtype", adapter_dtype)?);
        let direction = if unmerge { merge::Direction::Unmerge } else { merge::Direction::Merge };
        let shape = merge::Shape { n, k, fan_in_fan_out: false, dtype: dtypes.0, direction };
        // SAFETY: the caller's promise.
        unsafe {
            let queue = &*reference("queue", queue)?.0;
            let adapters = raw_adapters(adapters, adapter_count)?;
            raw::merge(queue, &shape, weight, &adapters, dtypes.1, row_scale, merged)
        }
    })
}

/// # Safety
/// `nf4` is one, or NULL.
unsafe fn codebook(nf4: *const LkCudaNf4) -> Result<Codebook> {
    // SAFETY: the caller's promise.
    unsafe { nf4.as_ref().map_or(Ok(Codebook::nf4()), |nf4| nf4.codebook()) }
}

/// # Safety
/// `nf4` is one, or NULL.
unsafe fn weight(dense: u64, nf4: *const LkCudaNf4, codebook: &Codebook) -> Result<raw::Weight<'_>> {
    // SAFETY: the caller's promise.
    match unsafe { nf4.as_ref() } {
        None => Ok(raw::Weight::Dense(dense)),
        Some(_) if dense != 0 => Err(Error::argument("operands.dense", "0 beside nf4", dense)),
        Some(nf4) => Ok(raw::Weight::Nf4(nf4.raw(codebook))),
    }
}

/// # Safety
/// `nf4` is one, or NULL.
unsafe fn format(nf4: *const LkCudaNf4) -> matmul::WeightFormat {
    // SAFETY: the caller's promise.
    match unsafe { nf4.as_ref() } {
        None => matmul::WeightFormat::Dense,
        Some(nf4) => matmul::WeightFormat::Nf4 { blocksize: nf4.blocksize },
    }
}

/// # Safety
/// `adapters` is a handle that lives for `'a`, or NULL.
unsafe fn branch<'a>(adapters: *const LkCudaAdapters, index: u64) -> Option<raw::Branch<'a>> {
    // SAFETY: the caller's promise.
    unsafe { adapters.as_ref().map(|adapters| raw::Branch { adapters: &adapters.0, index }) }
}

/// # Safety
/// `adapters` has `count` elements.
unsafe fn raw_adapters(adapters: *const LkCudaAdapter, count: usize) -> Result<Vec<raw::Adapter>> {
    // SAFETY: the caller's promise.
    let adapters = unsafe { slice("adapters", adapters, count)? };
    let raw = |a: &LkCudaAdapter| raw::Adapter {
        lora_a: a.lora_a,
        lora_b: a.lora_b,
        rank: a.rank,
        scaling: a.scaling,
    };
    Ok(adapters.iter().map(raw).collect())
}

impl LkCudaNf4 {
    /// # Safety
    /// The table has sixteen values, or is NULL.
    unsafe fn codebook(&self) -> Result<Codebook> {
        match self.codebook.is_null() {
            true => Ok(Codebook::nf4()),
            // SAFETY: the caller's promise.
            false => Codebook::from_values(unsafe {
                slice("nf4.codebook", self.codebook, 16)?.try_into().expect("sixteen values")
            }),
        }
    }

    fn raw<'a>(&self, codebook: &'a Codebook) -> raw::Nf4<'a> {
        let absmax = match self.absmax {
            0 => raw::Absmax::Nested {
                q: self.nested_q,
                absmax: self.nested_absmax,
                map: self.nested_map,
                offset: self.nested_offset,
                blocksize: self.nested_blocksize,
            },
            plain => raw::Absmax::Plain(plain),
        };
        raw::Nf4 { packed: self.packed, absmax, blocksize: self.blocksize, codebook }
    }
}

impl LkCudaMatmul {
    /// # Safety
    /// `nf4` is one, or NULL.
    unsafe fn shape(&self) -> Result<matmul::Shape> {
        let LkCudaMatmul { tokens, n, k, .. } = *self;
        // SAFETY: the caller's promise.
        let weight = unsafe { format(self.nf4) };
        Ok(matmul::Shape { tokens, n, k, dtype: dtype("dtype", self.dtype)?, weight })
    }
}

impl LkCudaExpertMatmul {
    /// # Safety
    /// `nf4` is one, or NULL.
    unsafe fn shape(&self) -> Result<expert_matmul::Shape> {
        let LkCudaExpertMatmul { tokens, choices, experts, n, k, .. } = *self;
        // SAFETY: the caller's promise.
        let weight = unsafe { format(self.nf4) };
        let dtype = dtype("dtype", self.dtype)?;
        Ok(expert_matmul::Shape { tokens, choices, experts, n, k, dtype, weight })
    }
}
