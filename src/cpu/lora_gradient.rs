//! The gradients of adapters' factors: `dA = uᵀ (mask ⊙ x)` and `dB = dYᵀ v`, kept apart per adapter.

use super::Dropout;
use super::matmul::{check_adapter_index, checked};
use crate::nf4::check_len;
use crate::{Element, Error, Result};

/// What a batch of `m` tokens gives to the gradients of its adapters.
#[derive(Debug, Clone, Copy)]
pub struct LoraBatch<'a, T> {
    /// `[m, n, k]`: tokens, outputs, inputs.
    pub shape: [usize; 3],
    /// `[m, k]`, what went into the layer, without dropout.
    pub x: &'a [T],
    /// `[m, n]`, the gradient of what came out of it (of DoRA, from [`super::dora_gradient`]).
    pub dy: &'a [T],
    /// `[m, max_rank]` from [`super::lora_shrink`]: kept from the forward pass, or made again.
    pub v: &'a [f32],
    /// `[m, max_rank]` from [`super::lora_shrink_transposed`].
    pub u: &'a [f32],
    /// Columns of `v` and `u`.
    pub max_rank: usize,
    /// `[m]`: each token's adapter, -1 for none. Without it every token has the first adapter.
    pub adapter_index: Option<&'a [i32]>,
    /// That of the forward pass.
    pub dropout: Option<Dropout>,
}

/// Where one adapter's gradients go. They are f32, whatever the factors are.
#[derive(Debug)]
pub struct LoraGradient<'a> {
    /// `[rank, k]`.
    pub lora_a: &'a mut [f32],
    /// `[n, rank]`.
    pub lora_b: &'a mut [f32],
    /// That of the adapter; may be 0.
    pub rank: usize,
}

/// `dA[r, k] = Σ_i u[i, r] x[i, k]` over the elements of `x` that dropout lets stay, and `dB[n, r] = Σ_i dy[i, n] v[i, r]`, over
/// the tokens of each adapter (LoRA, arXiv:2106.09685: `dA = s (dY B)ᵀ x`, `dB = s dYᵀ (x Aᵀ)`). With `accumulate` they are
/// added to what `gradients` hold, otherwise they replace it; an adapter without tokens has gradients of zero.
///
/// `gradients` has one entry per adapter. Sums are f32, in the order of the tokens, from 0, every product rounded; so a mixed
/// batch gives an adapter the bits that its tokens alone would give.
///
/// # Errors
/// [`Error::Argument`] when a length does not fit, a rank exceeds `max_rank`, or a token's adapter does not exist. Nothing is
/// written then.
pub fn lora_gradient<T: Element>(
    batch: &LoraBatch<'_, T>,
    accumulate: bool,
    gradients: &mut [LoraGradient<'_>],
) -> Result<()> {
    let LoraBatch { shape: [m, n, k], max_rank, .. } = *batch;
    batch.check(gradients)?;
    let row = |i: usize, values: &[T], columns: usize| -> Vec<f32> {
        values[i * columns..][..columns].iter().map(|value| value.to_f32()).collect()
    };
    let mut sums: Vec<[Vec<f32>; 2]> =
        gradients.iter().map(|g| [vec![0.0; g.rank * k], vec![0.0; n * g.rank]]).collect();
    for i in 0..m {
        let adapter = batch.adapter_index.map_or(0, |index| index[i]);
        let Some([a, b]) = usize::try_from(adapter).ok().and_then(|adapter| sums.get_mut(adapter)) else {
            continue;
        };
        let rank = gradients[adapter as usize].rank;
        let (v, u) = (&batch.v[i * max_rank..][..rank], &batch.u[i * max_rank..][..rank]);
        let (mut x, dy) = (row(i, batch.x, k), row(i, batch.dy, n));
        if let Some(dropout) = batch.dropout {
            dropout.mask(i, 0.0, &mut x);
        }
        add_outer(u, &x, a);
        add_outer(&dy, v, b);
    }
    for (gradient, [a, b]) in gradients.iter_mut().zip(sums) {
        for (to, sum) in gradient.lora_a.iter_mut().zip(a).chain(gradient.lora_b.iter_mut().zip(b)) {
            *to = if accumulate { *to + sum } else { sum };
        }
    }
    Ok(())
}

/// `sum[i, j] += left[i] right[j]`.
fn add_outer(left: &[f32], right: &[f32], sum: &mut [f32]) {
    for (left, row) in left.iter().zip(sum.chunks_exact_mut(right.len().max(1))) {
        row.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * right);
    }
}

impl<T> LoraBatch<'_, T> {
    pub(super) fn check(&self, gradients: &[LoraGradient<'_>]) -> Result<()> {
        let [m, n, k] = self.shape;
        check_len("x", checked("x", m, k)?, "elements", self.x.len())?;
        check_len("dy", checked("dy", m, n)?, "elements", self.dy.len())?;
        check_len("v", checked("v", m, self.max_rank)?, "elements", self.v.len())?;
        check_len("u", checked("u", m, self.max_rank)?, "elements", self.u.len())?;
        check_adapter_index(self.adapter_index, m, gradients.len())?;
        for (i, gradient) in gradients.iter().enumerate() {
            let name = |field: &str| format!("gradients[{i}].{field}");
            let (a, b) = (name("lora_a"), name("lora_b"));
            check_len(&a, checked(&a, gradient.rank, k)?, "elements", gradient.lora_a.len())?;
            check_len(&b, checked(&b, n, gradient.rank)?, "elements", gradient.lora_b.len())?;
            if gradient.rank > self.max_rank {
                return Err(Error::argument(
                    name("rank"),
                    format!("at most {}", self.max_rank),
                    gradient.rank,
                ));
            }
        }
        Ok(())
    }
}
