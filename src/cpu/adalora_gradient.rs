//! AdaLoRA's `P Λ Q` as a product of two factors, and the gradients of its three.

use super::matmul::checked;
use crate::nf4::check_len;
use crate::{Element, Result};

/// `folded[r, k] = A[r, k] E[r]`, in f32: AdaLoRA's product `B (A ⊙ E)` (arXiv:2303.10512, there `P Λ Q`) as LoRA's, so that
/// all that LoRA does is done with `folded` in the place of A.
///
/// `lora_a` and `folded` are `[rank, k]`, `lora_e` is `[rank]`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit. Nothing is written then.
pub fn adalora_fold<A: Element>(
    lora_a: &[A],
    lora_e: &[A],
    [rank, k]: [usize; 2],
    folded: &mut [f32],
) -> Result<()> {
    check_len("lora_a", checked("lora_a", rank, k)?, "elements", lora_a.len())?;
    check_len("lora_e", rank, "elements", lora_e.len())?;
    check_len("folded", lora_a.len(), "elements", folded.len())?;
    for (i, (folded, a)) in folded.iter_mut().zip(lora_a).enumerate() {
        *folded = a.to_f32() * lora_e[i / k].to_f32();
    }
    Ok(())
}

/// From the gradient of `folded = A ⊙ E` those of its factors: `dE[r] = Σ_k gradient[r, k] A[r, k]`, and `dA[r, k] =
/// gradient[r, k] E[r]`, which takes the place of `gradient`. (The gradient of B is [`super::lora_gradient`]'s.)
///
/// `gradient` and `lora_a` are `[rank, k]`, `lora_e` and `de` are `[rank]`. The sum is f32, in the order of k, every product
/// rounded.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit. Nothing is written then.
pub fn adalora_gradient<A: Element>(
    gradient: &mut [f32],
    lora_a: &[A],
    lora_e: &[A],
    [rank, k]: [usize; 2],
    de: &mut [f32],
) -> Result<()> {
    check_len("gradient", checked("gradient", rank, k)?, "elements", gradient.len())?;
    check_len("lora_a", gradient.len(), "elements", lora_a.len())?;
    check_len("lora_e", rank, "elements", lora_e.len())?;
    check_len("de", rank, "elements", de.len())?;
    for r in 0..rank {
        let row = r * k..(r + 1) * k;
        de[r] = 0.0;
        for (gradient, a) in gradient[row.clone()].iter_mut().zip(&lora_a[row]) {
            de[r] += *gradient * a.to_f32();
            *gradient *= lora_e[r].to_f32();
        }
    }
    Ok(())
}
