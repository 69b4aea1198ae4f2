//! The first half of a low-rank product's gradient: `u = scaling · dY B`, each token with its own adapter.

use super::Dropout;
use super::lora_shrink::branch_scale;
use super::matmul::{LowRank, adapter_of, check_adapter_index, check_lora_b, check_rank, checked};
use crate::nf4::check_len;
use crate::{Element, Result};

/// `u[i, r] = scaling * Σ_n dy[i, n] B[n, r]` for the `rank` of token `i`'s adapter; the rest of its row is zero, and so is the
/// row of a token without an adapter.
///
/// `dy` is `[m, n]`; `u` is `[m, max_rank]`. `adapter_index` is as in [`super::MatmulExtras`]. Sums are f32, in the order of
/// n, every product rounded. (`lora_a` of the adapters is not looked at.)
///
/// `u` carries the scale of the branch, as `v` of [`super::lora_shrink`] does: with `dropout` that is `scaling` times
/// [`Dropout::scale`]. Its mask comes in where `u` meets `x`, and in the gradient of `x`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit, a rank exceeds `max_rank`, or a token's adapter does
/// not exist. `u` is not written then.
pub fn lora_shrink_transposed<T: Element, A: Element>(
    dy: &[T],
    [m, n]: [usize; 2],
    adapters: &[LowRank<'_, A>],
    adapter_index: Option<&[i32]>,
    dropout: Option<&Dropout>,
    max_rank: usize,
    u: &mut [f32],
) -> Result<()> {
    check_len("dy", checked("dy", m, n)?, "elements", dy.len())?;
    check_len("u", checked("u", m, max_rank)?, "elements", u.len())?;
    check_adapter_index(adapter_index, m, adapters.len())?;
    for (i, adapter) in adapters.iter().enumerate() {
        check_lora_b(&format!("adapters[{i}]"), adapter, n)?;
        check_rank(&format!("adapters[{i}]"), adapter, max_rank)?;
    }
    u.fill(0.0);
    for i in 0..m {
        let adapter = adapter_of(adapters, adapter_index, i).filter(|adapter| adapter.rank > 0);
        let Some(adapter) = adapter else { continue };
        let u = &mut u[i * max_rank..][..adapter.rank];
        for (dy, b) in dy[i * n..(i + 1) * n].iter().zip(adapter.lora_b.chunks_exact(adapter.rank)) {
            u.iter_mut().zip(b).for_each(|(u, b)| *u += dy.to_f32() * b.to_f32());
        }
        u.iter_mut().for_each(|u| *u *= branch_scale(adapter, dropout));
    }
    Ok(())
}
