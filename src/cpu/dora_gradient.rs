//! The gradient of DoRA's magnitude, and what of the gradient goes on to the weight and its adapter.

use super::matmul::checked;
use crate::nf4::check_len;
use crate::{Element, Result};

/// Takes DoRA's scale out of a gradient: of `y = row_scale ⊙ z + bias`, with `z = x (W + s B A)ᵀ` and `row_scale = magnitude /
/// ||W + s B A||` (arXiv:2402.09353; the norm is a constant in the gradient, as section 4.3 proposes and PEFT does),
///
/// ```text
/// dm[n] = inverse_norm[n] Σ_i dy[i, n] z[i, n]        the gradient of the magnitude
/// dz[i, n] = round_T(row_scale[n] dy[i, n])           takes the place of dy
/// ```
///
/// `dz` is what the gradients of `x`, A and B are made of, as without DoRA. `dy` and `z` are `[m, n]`; the others `[n]`.
/// `inverse_norm` is [`super::dora_scale`] of magnitudes that are all 1. With `accumulate` the sum is added to `dm`, otherwise it
/// replaces it. The sum is f32, in the order of the tokens, from 0, every product rounded.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit. Nothing is written then.
pub fn dora_gradient<T: Element>(
    dy: &mut [T],
    z: &[T],
    [m, n]: [usize; 2],
    row_scale: &[f32],
    inverse_norm: &[f32],
    accumulate: bool,
    dm: &mut [f32],
) -> Result<()> {
    check_len("dy", checked("dy", m, n)?, "elements", dy.len())?;
    check_len("z", dy.len(), "elements", z.len())?;
    check_len("row_scale", n, "elements", row_scale.len())?;
    check_len("inverse_norm", n, "elements", inverse_norm.len())?;
    check_len("dm", n, "elements", dm.len())?;
    for n_ in 0..n {
        let mut sum = 0.0;
        for i in 0..m {
            let dy = &mut dy[i * n + n_];
            sum += dy.to_f32() * z[i * n + n_].to_f32();
            *dy = T::from_f32(row_scale[n_] * dy.to_f32());
        }
        let sum = inverse_norm[n_] * sum;
        dm[n_] = if accumulate { dm[n_] + sum } else { sum };
    }
    Ok(())
}
