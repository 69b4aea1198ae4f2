//! The second half of a low-rank product's gradient, onto what the base weight has made of it: `dX += mask ⊙ (u A)`.

use super::Dropout;
use super::matmul::{LowRank, adapter_of, check_adapter_index, check_lora_a, check_rank, checked};
use crate::nf4::check_len;
use crate::{Element, Result};

/// `dx[i, k] = round_T(dx[i, k] + Σ_r u[i, r] A[r, k])` with A of token `i`'s adapter, where `dropout` lets `x[i, k]` stay.
///
/// `u` is `[m, max_rank]` from [`super::lora_shrink_transposed`] with the same adapters, index and dropout (which has put the
/// scale in); its columns from the adapter's rank on are not read. `dx` is `[m, k]`. The sum over r is f32, in order, from 0. An
/// element that is dropped keeps its bits, and so does the row of a token without an adapter, or with one of rank 0.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit, a rank exceeds `max_rank`, or a token's adapter does
/// not exist. `dx` is not written then.
pub fn lora_expand_transposed<T: Element, A: Element>(
    u: &[f32],
    max_rank: usize,
    adapters: &[LowRank<'_, A>],
    adapter_index: Option<&[i32]>,
    dropout: Option<&Dropout>,
    [m, k]: [usize; 2],
    dx: &mut [T],
) -> Result<()> {
    check_len("u", checked("u", m, max_rank)?, "elements", u.len())?;
    check_len("dx", checked("dx", m, k)?, "elements", dx.len())?;
    check_adapter_index(adapter_index, m, adapters.len())?;
    for (i, adapter) in adapters.iter().enumerate() {
        check_lora_a(&format!("adapters[{i}]"), adapter, k)?;
        check_rank(&format!("adapters[{i}]"), adapter, max_rank)?;
    }
    for i in 0..m {
        let Some(adapter) = adapter_of(adapters, adapter_index, i).filter(|adapter| adapter.rank > 0) else {
            continue;
        };
        let u = &u[i * max_rank..][..adapter.rank];
        for (k_, dx) in dx[i * k..(i + 1) * k].iter_mut().enumerate() {
            if dropout.is_none_or(|dropout| dropout.keeps(i, k_)) {
                let terms = u.iter().enumerate().map(|(r, u)| u * adapter.lora_a[r * k + k_].to_f32());
                *dx = T::from_f32(dx.to_f32() + terms.fold(0.0, |sum, term| sum + term));
            }
        }
    }
    Ok(())
}
