//! Memory that a caller lends, checked as far as that goes.

use lora_kernels::tensor::{Data, TensorView};
use lora_kernels::{DType, Element, Error, Result, Tensor};

use crate::with_type;

/// The product of sizes, if bytes of it can be counted.
pub fn elements(argument: &str, sizes: &[usize]) -> Result<usize> {
    let count = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let fits =
        |count: &usize| count.checked_mul(size_of::<f64>()).is_some_and(|bytes| bytes <= isize::MAX as usize);
    count
        .filter(fits)
        .ok_or_else(|| Error::argument(argument, "a size that fits in memory", format!("{sizes:?}")))
}

fn check<T>(argument: &str, pointer: *const T, len: usize) -> Result<()> {
    if len > 0 && pointer.is_null() {
        return Err(Error::argument(argument, "a pointer", "NULL"));
    }
    if len > 0 && !pointer.is_aligned() {
        let wanted = format!("alignment to {} bytes", align_of::<T>());
        return Err(Error::argument(argument, wanted, format!("{pointer:?}")));
    }
    Ok(())
}

/// # Safety
/// The pointer is NULL, or valid for reads of `len` elements that nobody writes during `'a`.
pub unsafe fn slice<'a, T>(argument: &str, pointer: *const T, len: usize) -> Result<&'a [T]> {
    check(argument, pointer, len)?;
    // SAFETY: the caller's promise; it is neither NULL nor misaligned, as checked above.
    Ok(if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(pointer, len) } })
}

/// # Safety
/// The pointer is NULL, or valid for writes of `len` elements that nobody else uses during `'a`.
pub unsafe fn slice_mut<'a, T>(argument: &str, pointer: *mut T, len: usize) -> Result<&'a mut [T]> {
    check(argument, pointer, len)?;
    // SAFETY: as in `slice`.
    Ok(if len == 0 { &mut [] } else { unsafe { std::slice::from_raw_parts_mut(pointer, len) } })
}

/// # Safety
/// As [`slice`], of one element.
pub unsafe fn reference<'a, T>(argument: &str, pointer: *const T) -> Result<&'a T> {
    check(argument, pointer, 1)?;
    // SAFETY: as in `slice`.
    Ok(unsafe { &*pointer })
}

/// Where a call puts its result, checked before there is one.
///
/// # Safety
/// As [`slice_mut`], of one element, which is only written: it may be uninitialised.
pub unsafe fn out<'a, T>(argument: &str, pointer: *mut T) -> Result<impl FnOnce(T) + use<'a, T>> {
    check(argument, pointer, 1)?;
    // SAFETY: as in `slice`.
    Ok(move |value| unsafe { pointer.write(value) })
}

/// A copy as a tensor.
///
/// # Safety
/// As [`slice`], of elements of type `dtype` and as many as the shape has.
pub unsafe fn tensor(
    argument: &str,
    pointer: *const std::ffi::c_void,
    shape: &[usize],
    dtype: DType,
) -> Result<Tensor> {
    let len = elements(argument, shape)?;
    with_type!(dtype, T => {
        // SAFETY: the caller's promise.
        let data: Data = T::into_data(unsafe { slice::<T>(argument, pointer.cast(), len)? }.to_vec());
        Tensor::new(shape, data)
    })
}

/// Memory as a tensor, without a copy.
///
/// # Safety
/// As [`tensor`].
pub unsafe fn view<'a>(
    argument: &str,
    pointer: *const std::ffi::c_void,
    shape: &'a [usize],
    dtype: DType,
) -> Result<TensorView<'a>> {
    let len = elements(argument, shape)?;
    with_type!(dtype, T => {
        // SAFETY: the caller's promise.
        TensorView::new(shape, unsafe { slice::<T>(argument, pointer.cast(), len)? })
    })
}
