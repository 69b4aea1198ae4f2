//! Low-rank updates written into a 4-bit weight: dequantise, add, and quantise again, or store the sum.

use half::{bf16, f16};

use super::merge::Update;
use crate::nf4::{Nf4Matrix, check_len, quantize};
use crate::{DType, Element, Error, Result};

/// Quantises `t = row_scale * (w + Σ scaling · B A)` in f32, as [`super::merge()`] defines it, where `w` is the weight
/// dequantised to its `dtype` (as PEFT dequantises it in a merge).
///
/// `packed` and `absmax` are those of the merged weight, with the same block size and codebook; scales are plain, and
/// [`crate::nf4::nest`] quantises them again for a doubly quantised weight. The merged weight differs from the sum by what
/// 4 bits lose, some 9 % of its norm: to keep the adapter's effect, merge into 16 bits ([`nf4_merge_dense`]).
///
/// # Errors
/// [`Error::Argument`] when the weight is not a matrix, `update.fan_in_fan_out` is set, or a length does not fit. Nothing is
/// written then.
pub fn nf4_merge<A: Element>(
    weight: &Nf4Matrix,
    update: &Update<'_, A>,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let sum = merged(weight, update)?;
    quantize(&sum, weight.blocksize(), weight.codebook(), packed, absmax)
}

/// As [`nf4_merge`], but `merged` `[n, k]` receives `round_T(t)`.
///
/// # Errors
/// As [`nf4_merge`].
pub fn nf4_merge_dense<T: Element, A: Element>(
    weight: &Nf4Matrix,
    update: &Update<'_, A>,
    merged_weight: &mut [T],
) -> Result<()> {
    check_len("merged_weight", weight.numel(), "elements", merged_weight.len())?;
    T::round(&merged(weight, update)?, merged_weight);
    Ok(())
}

/// The sum, before it is stored.
fn merged<A: Element>(weight: &Nf4Matrix, update: &Update<'_, A>) -> Result<Vec<f32>> {
    let &[n, k] = weight.shape() else {
        return Err(Error::argument("weight.shape", "[N, K]", format!("{:?}", weight.shape())));
    };
    if update.fan_in_fan_out {
        return Err(Error::argument("update.fan_in_fan_out", "false for a 4-bit weight", true));
    }
    update.check([n, k])?;
    let mut sum = match weight.dtype() {
        DType::F32 => weight.dequantize::<f32>(),
        DType::F16 => weight.dequantize::<f16>().into_iter().map(f16::to_f32).collect(),
        DType::BF16 => weight.dequantize::<bf16>().into_iter().map(bf16::to_f32).collect(),
    };
    for (i, w) in sum.iter_mut().enumerate() {
        *w = update.apply(i, [n, k], *w);
    }
    Ok(sum)
}
