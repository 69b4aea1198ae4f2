//! The first half of a low-rank product: `v = scaling · x Aᵀ`, each token with its own adapter.

use super::Dropout;
use super::matmul::{LowRank, adapter_of, check_adapter_index, check_lora_a, check_rank, checked};
use crate::nf4::check_len;
use crate::{Element, Result};

/// `v[i, r] = scaling * Σ_k x[i, k] A[r, k]` for the `rank` of token `i`'s adapter; the rest of its row is zero, and so is
/// the row of a token without an adapter.
///
/// `x` is `[m, k]`; `v` is `[m, max_rank]`. `adapter_index` is as in [`super::MatmulExtras`]. Sums are f32, in the order of
/// k, every product rounded. (`lora_b` of the adapters is not looked at.)
///
/// With `dropout` the sum is over the elements of `x` that stay, and `scaling` times [`Dropout::scale`] comes before it.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit, a rank exceeds `max_rank`, or a token's adapter does not exist.
pub fn lora_shrink<T: Element, A: Element>(
    x: &[T],
    [m, k]: [usize; 2],
    adapters: &[LowRank<'_, A>],
    adapter_index: Option<&[i32]>,
    dropout: Option<&Dropout>,
    max_rank: usize,
    v: &mut [f32],
) -> Result<()> {
    check_len("x", checked("x", m, k)?, "elements", x.len())?;
    check_len("v", checked("v", m, max_rank)?, "elements", v.len())?;
    check_adapter_index(adapter_index, m, adapters.len())?;
    for (i, adapter) in adapters.iter().enumerate() {
        check_lora_a(&format!("adapters[{i}]"), adapter, k)?;
        check_rank(&format!("adapters[{i}]"), adapter, max_rank)?;
    }
    v.fill(0.0);
    let mut token = vec![T::from_f32(0.0); k];
    for i in 0..m {
        let Some(adapter) = adapter_of(adapters, adapter_index, i) else { continue };
        token.copy_from_slice(&x[i * k..(i + 1) * k]);
        if let Some(dropout) = dropout {
            dropout.mask(i, T::from_f32(0.0), &mut token);
        }
        for r in 0..adapter.rank {
            let a = &adapter.lora_a[r * k..(r + 1) * k];
            let dot = token.iter().zip(a).fold(0.0, |sum, (x, a)| sum + x.to_f32() * a.to_f32());
            v[i * max_rank + r] = branch_scale(adapter, dropout) * dot;
        }
    }
    Ok(())
}

/// What the low-rank branch is multiplied by.
pub(super) fn branch_scale<A>(adapter: &LowRank<'_, A>, dropout: Option<&Dropout>) -> f32 {
    dropout.map_or(adapter.scaling, |dropout| adapter.scaling * dropout.scale())
}
