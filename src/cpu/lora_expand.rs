//! The second half of a low-rank product, onto an output that the base weight has made: `y += v Bᵀ`.

use super::matmul::{LowRank, adapter_of, check_adapter_index, check_lora_b, check_rank, checked};
use crate::nf4::check_len;
use crate::{Element, Result};

/// `y[i, n] = round_T(y[i, n] + Σ_r v[i, r] B[n, r])` with B of token `i`'s adapter.
///
/// `v` is `[m, max_rank]` from [`super::lora_shrink`] with the same adapters and index (which has put the scaling in); its
/// columns from the adapter's rank on are not read. `y` is `[m, n]`. The sum over r is f32, in order, from 0. A token
/// without an adapter, or with one of rank 0, keeps the bits of its row.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit, a rank exceeds `max_rank`, or a token's adapter does
/// not exist. `y` is not written then.
pub fn lora_expand<T: Element, A: Element>(
    v: &[f32],
    max_rank: usize,
    adapters: &[LowRank<'_, A>],
    adapter_index: Option<&[i32]>,
    [m, n]: [usize; 2],
    y: &mut [T],
) -> Result<()> {
    check_len("v", checked("v", m, max_rank)?, "elements", v.len())?;
    check_len("y", checked("y", m, n)?, "elements", y.len())?;
    check_adapter_index(adapter_index, m, adapters.len())?;
    for (i, adapter) in adapters.iter().enumerate() {
        check_lora_b(&format!("adapters[{i}]"), adapter, n)?;
        check_rank(&format!("adapters[{i}]"), adapter, max_rank)?;
    }
    for i in 0..m {
        let Some(adapter) = adapter_of(adapters, adapter_index, i).filter(|adapter| adapter.rank > 0) else {
            continue;
        };
        let v = &v[i * max_rank..][..adapter.rank];
        let rows = adapter.lora_b.chunks_exact(adapter.rank);
        for (y, b) in y[i * n..(i + 1) * n].iter_mut().zip(rows) {
            let sum = v.iter().zip(b).fold(0.0, |sum, (v, b)| sum + v * b.to_f32());
            *y = T::from_f32(y.to_f32() + sum);
        }
    }
    Ok(())
}
