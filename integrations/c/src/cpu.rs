//! Operations on host memory.

use std::ffi::c_void;
use std::ptr;

use half::{bf16, f16};
use lora_kernels::adapter::{Adapter, Base, Dora, Lora, MergeReport, Requantize, Stack};
use lora_kernels::cpu::{self, LowRank, MatmulExtras};
use lora_kernels::nf4::{Absmax, Codebook, NestedAbsmax, Nesting, Nf4Matrix, block_count, packed_len};
use lora_kernels::{DType, Element, Error, Result};

use crate::memory::{elements, out, reference, slice, slice_mut, tensor, view};
use crate::{LkDType, LkStatus, call, dtype, with_type};

/// A 4-bit matrix in host memory. Opaque.
pub struct LkNf4(Nf4Matrix);

/// The parts of a 4-bit matrix, as bitsandbytes stores them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LkNf4Parts {
    /// Rows of the matrix: outputs.
    pub rows: usize,
    /// Columns of the matrix: inputs.
    pub columns: usize,
    /// Elements per scale: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// What the matrix was quantised from, and what merges decode it to.
    pub dtype: LkDType,
    /// `ceil(rows * columns / 2)` bytes: two codes each, the first in the high four bits.
    pub packed: *const u8,
    /// `[16]`: what the codes stand for; NULL for the values of NF4.
    pub codebook: *const f32,
    /// `[blocks]`, `blocks = ceil(rows * columns / blocksize)`: the scales. NULL where they are quantised themselves.
    pub absmax: *const f32,
    /// `[blocks]`: the quantised scales, and what follows, where `absmax` is NULL.
    pub nested_q: *const u8,
    /// `[ceil(blocks / nested_blocksize)]`: the scales of the scales.
    pub nested_absmax: *const f32,
    /// `[256]`: what the quantised scales stand for.
    pub nested_map: *const f32,
    /// What is added to every scale.
    pub nested_offset: f32,
    /// Scales that share a scale: 256 in every known file.
    pub nested_blocksize: usize,
}

/// The weight of a linear layer, `[n, k]`: `dense` or `nf4`, the other is NULL.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LkWeight {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Elements of the call's `dtype`.
    pub dense: *const c_void,
    /// 4-bit blocks.
    pub nf4: *const LkNf4,
}

/// `delta = scaling * lora_b @ lora_a`, on the host.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LkAdapter {
    /// `[rank, k]`.
    pub lora_a: *const c_void,
    /// `[n, rank]`.
    pub lora_b: *const c_void,
    /// `[n]`: DoRA's magnitude, of the factors' type, for merges and `lk_dora_scale`. NULL for LoRA.
    pub magnitude: *const c_void,
    /// Rows of `lora_a`; may be 0.
    pub rank: usize,
    /// The factor of the product.
    pub scaling: f64,
}

/// The operands of `lk_matmul`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LkMatmul {
    /// Rows of x and y.
    pub tokens: usize,
    /// The type of x, y, the bias and a dense weight.
    pub dtype: LkDType,
    /// The type of the factors: that of x, or `LK_F32`.
    pub adapter_dtype: LkDType,
    /// `[n, k]`.
    pub weight: LkWeight,
    /// `[tokens, k]`.
    pub x: *const c_void,
    /// `[n]`, or NULL.
    pub bias: *const c_void,
    /// `[n]`: DoRA's `magnitude / norm` (`lk_dora_scale`), or NULL.
    pub row_scale: *const f32,
    /// The adapters to choose from; their magnitudes have to be NULL.
    pub adapters: *const LkAdapter,
    /// How many there are.
    pub adapter_count: usize,
    /// `[tokens]`: every token's adapter, -1 for none. With NULL all tokens use the first, if there is one.
    pub adapter_index: *const i32,
    /// `[tokens, n]`, written.
    pub y: *mut c_void,
}

/// What a merge has kept of its adapters.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LkMergeReport {
    /// `<R, D> / <D, D>` of the wanted change D and the realised change R: 1 is all.
    pub retained_gain: f64,
    /// `|R - D| / |D|`: 0 is best, and 1 is what leaving the adapters out would give.
    pub relative_error: f64,
    /// The share of elements (of a 4-bit weight: codes) that the adapters have changed.
    pub changed_share: f64,
}

/// Quantises `[rows, columns]` elements to NF4, as bitsandbytes does; with `nested` its scales too (double quantisation).
///
/// # Safety
/// `data` has `rows * columns` elements of type `dtype`, and `nf4` takes a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_nf4_quantize(
    data: *const c_void,
    dtype: LkDType,
    rows: usize,
    columns: usize,
    blocksize: usize,
    nested: bool,
    nf4: *mut *mut LkNf4,
) -> LkStatus {
    call(|| {
        let (dtype, numel) = (crate::dtype("dtype", dtype)?, elements("rows * columns", &[rows, columns])?);
        let nesting = if nested { Nesting::Nested } else { Nesting::Plain };
        // SAFETY: the caller's promise.
        let put = unsafe { out("nf4", nf4)? };
        let matrix = with_type!(dtype, T => {
            // SAFETY: the caller's promise.
            let data = unsafe { slice::<T>("data", data.cast(), numel)? };
            Nf4Matrix::quantize(data, [rows, columns], blocksize, &Codebook::nf4(), nesting)?
        });
        put(boxed(matrix));
        Ok(())
    })
}

/// Takes a copy of the parts of a matrix.
///
/// # Safety
/// `parts` and what it points to are as `LkNf4Parts` says, and `nf4` takes a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_nf4_new(parts: *const LkNf4Parts, nf4: *mut *mut LkNf4) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        let (parts, put) = unsafe { (reference("parts", parts)?, out("nf4", nf4)?) };
        let numel = elements("rows * columns", &[parts.rows, parts.columns])?;
        lora_kernels::nf4::check_blocksize("blocksize", parts.blocksize)?;
        let blocks = block_count(numel, parts.blocksize);
        // SAFETY: the caller's promise.
        let absmax = unsafe {
            if !parts.absmax.is_null() || blocks == 0 {
                Absmax::Plain(slice("absmax", parts.absmax, blocks)?.to_vec())
            } else {
                lora_kernels::nf4::check_blocksize("nested_blocksize", parts.nested_blocksize)?;
                let nested = block_count(blocks, parts.nested_blocksize);
                let q = slice("nested_q", parts.nested_q, blocks)?.to_vec();
                let absmax = slice("nested_absmax", parts.nested_absmax, nested)?.to_vec();
                let map: &[f32; 256] =
                    slice("nested_map", parts.nested_map, 256)?.try_into().expect("256 values");
                let (offset, blocksize) = (parts.nested_offset, parts.nested_blocksize);
                Absmax::Nested(NestedAbsmax::from_parts(q, absmax, Box::new(*map), offset, blocksize)?)
            }
        };
        let codebook = match parts.codebook.is_null() {
            true => Codebook::nf4(),
            // SAFETY: the caller's promise.
            false => Codebook::from_values(unsafe {
                slice("codebook", parts.codebook, 16)?.try_into().expect("sixteen values")
            })?,
        };
        // SAFETY: the caller's promise.
        let packed = unsafe { slice("packed", parts.packed, packed_len(numel))? }.to_vec();
        let (shape, dtype) = ([parts.rows, parts.columns], dtype("dtype", parts.dtype)?);
        put(boxed(Nf4Matrix::from_parts(shape, packed, absmax, parts.blocksize, codebook, dtype)?));
        Ok(())
    })
}

/// The parts of a matrix. The pointers lead into it, and are good until it is freed.
///
/// # Safety
/// `nf4` is a handle, and `parts` takes an `LkNf4Parts`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_nf4_parts(nf4: *const LkNf4, parts: *mut LkNf4Parts) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        let (nf4, put) = unsafe { (&reference("nf4", nf4)?.0, out("parts", parts)?) };
        let dtype = match nf4.dtype() {
            DType::F32 => crate::LK_F32,
            DType::F16 => crate::LK_F16,
            DType::BF16 => crate::LK_BF16,
        };
        let plain = LkNf4Parts {
            rows: nf4.shape()[0],
            columns: nf4.shape()[1],
            blocksize: nf4.blocksize(),
            dtype,
            packed: nf4.packed().as_ptr(),
            codebook: nf4.codebook().values().as_ptr(),
            absmax: ptr::null(),
            nested_q: ptr::null(),
            nested_absmax: ptr::null(),
            nested_map: ptr::null(),
            nested_offset: 0.0,
            nested_blocksize: 0,
        };
        put(match nf4.absmax() {
            Absmax::Plain(absmax) => LkNf4Parts { absmax: absmax.as_ptr(), ..plain },
            Absmax::Nested(nested) => LkNf4Parts {
                nested_q: nested.q().as_ptr(),
                nested_absmax: nested.absmax().as_ptr(),
                nested_map: nested.map().as_ptr(),
                nested_offset: nested.offset(),
                nested_blocksize: nested.blocksize(),
                ..plain
            },
        });
        Ok(())
    })
}

/// Decodes a matrix into `len` elements of type `dtype`: as many as it has.
///
/// # Safety
/// `nf4` is a handle, and `data` takes `len` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_nf4_dequantize(
    nf4: *const LkNf4,
    dtype: LkDType,
    data: *mut c_void,
    len: usize,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        let nf4 = unsafe { &reference("nf4", nf4)?.0 };
        let dtype = crate::dtype("dtype", dtype)?;
        if len != nf4.numel() {
            return Err(Error::argument("len", nf4.numel().to_string(), len));
        }
        with_type!(dtype, T => {
            // SAFETY: the caller's promise.
            let data = unsafe { slice_mut::<T>("data", data.cast(), len)? };
            nf4.dequantize_into(data)?;
        });
        Ok(())
    })
}

/// Frees a matrix; NULL does nothing.
///
/// # Safety
/// `nf4` is a handle that nobody uses any more, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_nf4_free(nf4: *mut LkNf4) {
    if !nf4.is_null() {
        // SAFETY: the handle was made by `boxed`.
        drop(unsafe { Box::from_raw(nf4) });
    }
}

/// `y = row_scale * (x W^T + scaling (x A^T) B^T) + bias`, with every token's own adapter. Sums are f32, in an order that does not
/// depend on the other tokens, with one rounding at the end.
///
/// # Safety
/// `operands` and what it points to are as `LkMatmul` says; `y` overlaps nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_matmul(operands: *const LkMatmul) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        let operands = unsafe { reference("operands", operands)? };
        let dtypes = (dtype("dtype", operands.dtype)?, dtype("adapter_dtype", operands.adapter_dtype)?);
        // SAFETY: the same.
        unsafe {
            match dtypes {
                (DType::F32, DType::F32) => matmul::<f32, f32>(operands),
                (DType::F16, DType::F16) => matmul::<f16, f16>(operands),
                (DType::F16, DType::F32) => matmul::<f16, f32>(operands),
                (DType::BF16, DType::BF16) => matmul::<bf16, bf16>(operands),
                (DType::BF16, DType::F32) => matmul::<bf16, f32>(operands),
                (x, other) => Err(Error::argument("adapter_dtype", format!("{x} or f32"), other)),
            }
        }
    })
}

/// # Safety
/// As [`lk_matmul`], with these types.
unsafe fn matmul<T: Element, A: Element>(operands: &LkMatmul) -> Result<()> {
    let LkMatmul { tokens, weight, .. } = *operands;
    let (n, k) = (weight.n, weight.k);
    // SAFETY: the caller's promise.
    unsafe {
        let adapters = slice("adapters", operands.adapters, operands.adapter_count)?;
        let low_rank = |(i, a): (usize, &LkAdapter)| -> Result<LowRank<'_, A>> {
            if !a.magnitude.is_null() {
                let argument = format!("adapters[{i}].magnitude");
                return Err(Error::argument(argument, "NULL (row_scale is for DoRA)", "a pointer"));
            }
            let (name_a, name_b) = (format!("adapters[{i}].lora_a"), format!("adapters[{i}].lora_b"));
            Ok(LowRank {
                lora_a: slice(&name_a, a.lora_a.cast(), elements(&name_a, &[a.rank, k])?)?,
                lora_b: slice(&name_b, a.lora_b.cast(), elements(&name_b, &[n, a.rank])?)?,
                rank: a.rank,
                scaling: a.scaling as f32,
            })
        };
        let adapters = adapters.iter().enumerate().map(low_rank).collect::<Result<Vec<_>>>()?;
        let optional = |argument, pointer: *const T| match pointer.is_null() {
            true => Ok(None),
            false => slice(argument, pointer, n).map(Some),
        };
        let row_scale = match operands.row_scale.is_null() {
            true => None,
            false => Some(slice("row_scale", operands.row_scale, n)?),
        };
        let adapter_index = match operands.adapter_index.is_null() {
            true => None,
            false => Some(slice("adapter_index", operands.adapter_index, tokens)?),
        };
        let bias = optional("bias", operands.bias.cast())?;
        let extras =
            MatmulExtras { bias, row_scale, adapters: &adapters, adapter_index, ..Default::default() };
        let weight = match weight.nf4.is_null() {
            true => {
                let data = slice("weight.dense", weight.dense.cast(), elements("weight", &[n, k])?)?;
                cpu::Weight::Dense { data, n, k }
            }
            false => cpu::Weight::Nf4(weight.nf4()?),
        };
        let x = slice::<T>("x", operands.x.cast(), elements("x", &[tokens, k])?)?;
        let y = slice_mut("y", operands.y.cast(), elements("y", &[tokens, n])?)?;
        cpu::fast::matmul(x, tokens, &weight, &extras, y)
    }
}

/// DoRA's `magnitude / ||W + delta||` of each output, from the weight without the adapter: the `row_scale` of `lk_matmul`. A dense
/// weight is of type `dtype`.
///
/// # Safety
/// `weight`, `adapter` and what they point to are as their types say, and `row_scale` takes `[n]` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_dora_scale(
    weight: *const LkWeight,
    dtype: LkDType,
    adapter: *const LkAdapter,
    adapter_dtype: LkDType,
    row_scale: *mut f32,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let weight = reference("weight", weight)?;
            let row_scale = slice_mut("row_scale", row_scale, weight.n)?;
            let adapters = slice("adapter", adapter, 1)?;
            let shape = [weight.n, weight.k];
            let stack = stack(adapters, adapter_dtype, weight.base(dtype, &shape)?)?;
            let Some(scale) = stack.row_scale() else {
                return Err(Error::argument("adapter.magnitude", "a pointer", "NULL"));
            };
            row_scale.iter_mut().zip(scale).for_each(|(to, &scale)| *to = scale as f32);
        }
        Ok(())
    })
}

/// Merges adapters, all at once and in their order, into a dense weight `[n, k]` of type `out_dtype`. A 4-bit weight is decoded to its
/// own type first.
///
/// In place where `merged` is `weight->dense`, which is possible where `out_dtype` is `dtype`. A report costs time; with NULL
/// none is made.
///
/// # Safety
/// The arguments and what they point to are as their types say. A dense weight is of type `dtype`; `merged` takes
/// `weight.n * weight.k` elements, and overlaps nothing else but that it may be the weight; `report` takes an `LkMergeReport`, or is
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_merge(
    weight: *const LkWeight,
    dtype: LkDType,
    adapters: *const LkAdapter,
    adapter_count: usize,
    adapter_dtype: LkDType,
    out_dtype: LkDType,
    merged: *mut c_void,
    report: *mut LkMergeReport,
) -> LkStatus {
    call(|| {
        let out_dtype = crate::dtype("out_dtype", out_dtype)?;
        // SAFETY: the caller's promise.
        unsafe {
            let weight = reference("weight", weight)?;
            let adapters = slice("adapters", adapters, adapter_count)?;
            let numel = elements("weight", &[weight.n, weight.k])?;
            let in_place = weight.is_at("merged", merged, dtype, out_dtype)?;
            let shape = [weight.n, weight.k];
            let stack = stack(adapters, adapter_dtype, weight.base(dtype, &shape)?)?;
            let mut sums = (!report.is_null()).then(MergeReport::default);
            with_type!(out_dtype, T => {
                let merged = slice_mut::<T>("merged", merged.cast(), numel)?;
                match in_place {
                    true => stack.merge_in_place(merged, sums.as_mut())?,
                    false => stack.merge_into(weight.base(dtype, &shape)?, merged, sums.as_mut())?,
                }
            });
            if let Some(sums) = sums {
                put_report(report, &sums);
            }
        }
        Ok(())
    })
}

/// Takes adapters out of a dense weight of type `dtype`, up to what rounding lost: the inverse of `lk_merge`, for adapters without
/// a magnitude. In place where `weight` is `merged->dense`, as there.
///
/// # Safety
/// As `lk_merge`, without a report.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_unmerge(
    merged: *const LkWeight,
    dtype: LkDType,
    adapters: *const LkAdapter,
    adapter_count: usize,
    adapter_dtype: LkDType,
    out_dtype: LkDType,
    weight: *mut c_void,
) -> LkStatus {
    call(|| {
        let out_dtype = crate::dtype("out_dtype", out_dtype)?;
        // SAFETY: the caller's promise.
        unsafe {
            let merged = reference("merged", merged)?;
            let adapters = slice("adapters", adapters, adapter_count)?;
            if let Some(i) = adapters.iter().position(|adapter| !adapter.magnitude.is_null()) {
                // Its scale is that of the weight which is not here.
                let argument = format!("adapters[{i}].magnitude");
                return Err(Error::argument(argument, "NULL: DoRA cannot be unmerged here", "a pointer"));
            }
            let numel = elements("merged", &[merged.n, merged.k])?;
            let in_place = merged.is_at("weight", weight, dtype, out_dtype)?;
            let shape = [merged.n, merged.k];
            let stack = stack(adapters, adapter_dtype, merged.base(dtype, &shape)?)?;
            with_type!(out_dtype, T => {
                let weight = slice_mut::<T>("weight", weight.cast(), numel)?;
                match in_place {
                    true => stack.unmerge_in_place(weight)?,
                    false => stack.unmerge_into(merged.base(dtype, &shape)?, weight)?,
                }
            });
        }
        Ok(())
    })
}

/// Merges adapters into a 4-bit matrix, which stays 4-bit: a new one, with the same block size and table. 4 bits lose much of an
/// adapter; the call fails when less is left than `min_gain` (as `retained_gain`; 0 takes anything).
///
/// # Safety
/// As `lk_merge`; `merged` takes a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lk_nf4_merge(
    nf4: *const LkNf4,
    adapters: *const LkAdapter,
    adapter_count: usize,
    adapter_dtype: LkDType,
    min_gain: f64,
    merged: *mut *mut LkNf4,
    report: *mut LkMergeReport,
) -> LkStatus {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let matrix = &reference("nf4", nf4)?.0;
            let put = out("merged", merged)?;
            let adapters = slice("adapters", adapters, adapter_count)?;
            let stack = stack(adapters, adapter_dtype, matrix.into())?;
            let result = stack.merge(matrix, Requantize { min_gain, ..Requantize::default() })?;
            put_report(report, &result.report);
            put(boxed(result.weight));
        }
        Ok(())
    })
}

fn boxed(matrix: Nf4Matrix) -> *mut LkNf4 {
    Box::into_raw(Box::new(LkNf4(matrix)))
}

/// # Safety
/// The report is NULL, or takes one.
unsafe fn put_report(to: *mut LkMergeReport, report: &MergeReport) {
    let value = LkMergeReport {
        retained_gain: report.retained_gain(),
        relative_error: report.relative_error(),
        changed_share: report.changed_share(),
    };
    if !to.is_null() {
        // SAFETY: the caller's promise.
        unsafe { to.write_unaligned(value) };
    }
}

impl LkWeight {
    /// # Safety
    /// The weight is as its type says, for as long as the result is used; a dense one is of type `dtype`, and nobody writes it.
    unsafe fn base<'a>(&self, dtype: LkDType, shape: &'a [usize; 2]) -> Result<Base<'a>> {
        let dtype = crate::dtype("dtype", dtype)?;
        // SAFETY: the caller's promise.
        unsafe {
            match self.nf4.is_null() {
                true => Ok(view("weight.dense", self.dense, shape, dtype)?.into()),
                false => Ok(self.nf4()?.into()),
            }
        }
    }

    /// Whether a result of type `out_dtype` goes where the dense weight is; it must not go beside it.
    fn is_at(&self, argument: &str, out: *mut c_void, dtype: LkDType, out_dtype: DType) -> Result<bool> {
        let (dtype, numel) = (crate::dtype("dtype", dtype)?, elements(argument, &[self.n, self.k])?);
        let (weight, out) = (self.dense as usize, out as usize);
        let apart = out.saturating_add(numel * out_dtype.size()) <= weight
            || weight.saturating_add(numel * dtype.size()) <= out;
        match apart || !self.nf4.is_null() || numel == 0 {
            true => Ok(false),
            false if weight == out && dtype == out_dtype => Ok(true),
            false => {
                let wanted = "memory of its own, or that of a weight of its type";
                Err(Error::argument(argument, wanted, "a part of the weight's"))
            }
        }
    }

    /// # Safety
    /// The handle is one, for as long as the result is used.
    unsafe fn nf4<'a>(&self) -> Result<&'a Nf4Matrix> {
        // SAFETY: the caller's promise.
        let nf4 = unsafe { &reference("weight.nf4", self.nf4)?.0 };
        if !self.dense.is_null() {
            return Err(Error::argument("weight.dense", "NULL beside weight.nf4", "a pointer"));
        }
        match nf4.shape() == [self.n, self.k] {
            true => Ok(nf4),
            false => Err(Error::argument(
                "weight.nf4",
                format!("shape [{}, {}]", self.n, self.k),
                format!("{:?}", nf4.shape()),
            )),
        }
    }
}

/// Adapters on a weight, for a merge.
///
/// # Safety
/// The adapters and what they point to are as their type says.
unsafe fn stack(adapters: &[LkAdapter], adapter_dtype: LkDType, base: Base<'_>) -> Result<Stack> {
    let (adapter_dtype, shape) = (dtype("adapter_dtype", adapter_dtype)?, base.shape());
    let (n, k) = (shape[0], shape[1]);
    let adapter = |(i, a): (usize, &LkAdapter)| -> Result<Adapter> {
        let name = |part: &str| format!("adapters[{i}].{part}");
        // SAFETY: the caller's promise.
        unsafe {
            let lora = Lora::new(
                tensor(&name("lora_a"), a.lora_a, &[a.rank, k], adapter_dtype)?,
                tensor(&name("lora_b"), a.lora_b, &[n, a.rank], adapter_dtype)?,
                a.scaling,
            )?;
            match a.magnitude.is_null() {
                true => Ok(lora.into()),
                false => {
                    let magnitude = tensor(&name("magnitude"), a.magnitude, &[n], adapter_dtype)?;
                    Ok(Dora::new(lora, magnitude)?.into())
                }
            }
        }
    };
    let adapters = adapters.iter().enumerate().map(adapter).collect::<Result<Vec<_>>>()?;
    Stack::new(&adapters.iter().collect::<Vec<&Adapter>>(), base)
}
