//! `dX = dY W + u A`: the gradient of a linear layer's input, with `u = scaling · dY B` of each token's adapter.

use super::Dropout;
use super::lora_shrink::branch_scale;
use super::matmul::{
    Accumulate, LowRank, Real, Truth, Weight, adapter_of, check_adapter_index, check_lora_a, check_lora_b,
    checked,
};
use crate::nf4::check_len;
use crate::{Element, Result};

/// What the layer has besides its weight. The default is nothing.
#[derive(Debug, Clone, Copy)]
pub struct TransposedExtras<'a, A> {
    /// The adapters to choose from.
    pub adapters: &'a [LowRank<'a, A>],
    /// `[M]`: each token's adapter, -1 for none. Without it every token has the first adapter, if there is one.
    pub adapter_index: Option<&'a [i32]>,
    /// That of the forward pass.
    pub dropout: Option<Dropout>,
}

impl<A> Default for TransposedExtras<'_, A> {
    fn default() -> Self {
        Self { adapters: &[], adapter_index: None, dropout: None }
    }
}

/// The product for `m` tokens with the transposed weight: `dy` is `[m, N]`, `dx` is `[m, K]`, both row-major.
///
/// `dx[i, k] = round_T(Σ_n dy[i, n] w[n, k] + Σ_r u[i, r] A[r, k])`, where `u[i, r] = scaling * Σ_n dy[i, n] B[n, r]`, with A,
/// B and scaling of the adapter of token `i`: the derivative of [`super::matmul()`] by its `x` (LoRA, arXiv:2106.09685). With
/// dropout u is that of [`super::lora_shrink_transposed`], and the second sum is only where `x[i, k]` stays.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit, a 4-bit weight is not a matrix, or a token's adapter
/// does not exist. `dx` is not written then.
pub fn matmul_transposed<T: Element, A: Element>(
    dy: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &TransposedExtras<'_, A>,
    accumulate: Accumulate,
    dx: &mut [T],
) -> Result<()> {
    let len = check(dy, m, weight, extras)?;
    check_len("dx", len, "elements", dx.len())?;
    match accumulate {
        Accumulate::F32 => {
            for (dx, sum) in dx.iter_mut().zip(product::<T, A, f32>(dy, m, weight, extras, |v| v)?) {
                *dx = T::from_f32(sum);
            }
        }
        Accumulate::F64 => {
            for (dx, sum) in dx.iter_mut().zip(product::<T, A, f64>(dy, m, weight, extras, |v| v)?) {
                *dx = T::from_f64(sum);
            }
        }
    }
    Ok(())
}

/// What [`matmul_transposed`] rounds, in f64, row-major `[m, K]`.
///
/// # Errors
/// As [`matmul_transposed`].
pub fn truth_transposed<T: Element, A: Element>(
    dy: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &TransposedExtras<'_, A>,
) -> Result<Vec<Truth>> {
    check(dy, m, weight, extras)?;
    let values = product::<T, A, f64>(dy, m, weight, extras, |v| v)?;
    let magnitudes = product::<T, A, f64>(dy, m, weight, extras, f64::abs)?;
    Ok(values.into_iter().zip(magnitudes).map(|(value, magnitude)| Truth { value, magnitude }).collect())
}

/// The formula. Every number goes through `map` (itself, or its magnitude).
fn product<T: Element, A: Element, R: Real>(
    dy: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &TransposedExtras<'_, A>,
    map: impl Fn(R) -> R,
) -> Result<Vec<R>> {
    let (n, k) = weight.shape()?;
    let real = |value: f32| map(R::of(value));
    let dy: Vec<R> = dy.iter().map(|v| real(v.to_f32())).collect();
    let mut sums = vec![R::ZERO; m * k];
    let mut row = vec![T::from_f32(0.0); k];
    for n_ in 0..n {
        weight.row(n_, k, &mut row);
        let w: Vec<R> = row.iter().map(|v| real(v.to_f32())).collect();
        for (i, sums) in sums.chunks_exact_mut(k.max(1)).enumerate() {
            sums.iter_mut().zip(&w).for_each(|(sum, &w)| *sum = *sum + dy[i * n + n_] * w);
        }
    }
    for (i, sums) in sums.chunks_exact_mut(k.max(1)).enumerate() {
        let Some(adapter) = adapter_of(extras.adapters, extras.adapter_index, i) else { continue };
        let element = |factor: &[A], at: usize| real(factor[at].to_f32());
        let u: Vec<R> = (0..adapter.rank)
            .map(|r| {
                let terms = (0..n).map(|n_| dy[i * n + n_] * element(adapter.lora_b, n_ * adapter.rank + r));
                let scaling = real(branch_scale(adapter, extras.dropout.as_ref()));
                scaling * terms.fold(R::ZERO, |sum, term| sum + term)
            })
            .collect();
        for (k_, sum) in sums.iter_mut().enumerate() {
            if extras.dropout.is_some_and(|dropout| !dropout.keeps(i, k_)) {
                continue;
            }
            let terms = u.iter().enumerate().map(|(r, &u)| u * element(adapter.lora_a, r * k + k_));
            *sum = *sum + terms.fold(R::ZERO, |sum, term| sum + term);
        }
    }
    Ok(sums)
}

/// Checks everything but `dx`, and says how long that is.
fn check<T: Element, A: Element>(
    dy: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &TransposedExtras<'_, A>,
) -> Result<usize> {
    let (n, k) = weight.shape()?;
    check_len("dy", checked("dy", m, n)?, "elements", dy.len())?;
    for (i, adapter) in extras.adapters.iter().enumerate() {
        check_lora_a(&format!("adapters[{i}]"), adapter, k)?;
        check_lora_b(&format!("adapters[{i}]"), adapter, n)?;
    }
    check_adapter_index(extras.adapter_index, m, extras.adapters.len())?;
    checked("dx", m, k)
}
