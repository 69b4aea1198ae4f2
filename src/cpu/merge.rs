//! Low-rank updates written into a dense weight, and taken out again. Every bit is defined.

use super::matmul::{LowRank, check_lora_a, check_lora_b, checked};
use crate::nf4::check_len;
use crate::{Element, Result};

/// What a merge does to a weight of `n` outputs and `k` inputs: `W' = row_scale ⊙ (W + Σ scaling · B A)`
/// (LoRA, arXiv:2106.09685; `row_scale` from DoRA, arXiv:2402.09353, is `magnitude / ||W + scaling · B A||` of each output).
#[derive(Debug, Clone, Copy)]
pub struct Update<'a, A> {
    /// Added in this order.
    pub adapters: &'a [LowRank<'a, A>],
    /// `[N]`: one factor for each output.
    pub row_scale: Option<&'a [f32]>,
    /// Whether the weight is stored `[K, N]` and not `[N, K]`. The factors are not.
    pub fan_in_fan_out: bool,
}

/// `merged = round_T(row_scale * t)` with `t = fma(scaling, delta, w)` for one adapter after the other, where
/// `delta = fma(B[n, r], A[r, k], delta)` for r ascending from `delta = 0`: f32, and one rounding to `T`.
///
/// `weight` and `merged` are `[n, k]` row-major (`[k, n]` with `fan_in_fan_out`). Without adapters the bits stay;
/// with a scaling or a rank of 0 they do too, but that -0 becomes 0.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit. Nothing is written then.
pub fn merge<T: Element, A: Element>(
    weight: &[T],
    [n, k]: [usize; 2],
    update: &Update<'_, A>,
    merged: &mut [T],
) -> Result<()> {
    update.check([n, k])?;
    check_len("weight", checked("weight", n, k)?, "elements", weight.len())?;
    check_len("merged", weight.len(), "elements", merged.len())?;
    for (i, (merged, weight)) in merged.iter_mut().zip(weight).enumerate() {
        *merged = T::from_f32(update.apply(i, [n, k], weight.to_f32()));
    }
    Ok(())
}

/// The inverse of [`merge`], up to its roundings: `weight = round_T(t)` with `t = merged / row_scale` and then
/// `t = fma(-scaling, delta, t)` from the last adapter to the first, with the same `delta`.
///
/// What rounding to `T` has lost in the merge does not come back: to restore every bit, keep the weight.
///
/// # Errors
/// As [`merge`].
pub fn unmerge<T: Element, A: Element>(
    merged: &[T],
    [n, k]: [usize; 2],
    update: &Update<'_, A>,
    weight: &mut [T],
) -> Result<()> {
    update.check([n, k])?;
    check_len("merged", checked("merged", n, k)?, "elements", merged.len())?;
    check_len("weight", merged.len(), "elements", weight.len())?;
    for (i, (weight, merged)) in weight.iter_mut().zip(merged).enumerate() {
        *weight = T::from_f32(update.undo(i, [n, k], merged.to_f32()));
    }
    Ok(())
}

impl<A: Element> Update<'_, A> {
    /// Checks the factors against a weight of `n` outputs and `k` inputs.
    pub(super) fn check(&self, [n, k]: [usize; 2]) -> Result<()> {
        for (i, adapter) in self.adapters.iter().enumerate() {
            check_lora_a(&format!("adapters[{i}]"), adapter, k)?;
            check_lora_b(&format!("adapters[{i}]"), adapter, n)?;
        }
        match self.row_scale {
            None => Ok(()),
            Some(row_scale) => check_len("row_scale", n, "elements", row_scale.len()),
        }
    }

    /// The merged value of element `i` of the stored weight, before it is rounded.
    pub(super) fn apply(&self, i: usize, [n, k]: [usize; 2], weight: f32) -> f32 {
        let (row, column) = self.place(i, [n, k]);
        let add =
            |t: f32, adapter: &LowRank<'_, A>| adapter.scaling.mul_add(adapter.product(row, column, k), t);
        let sum = self.adapters.iter().filter(|adapter| adapter.rank > 0).fold(weight, add);
        self.row_scale.map_or(sum, |row_scale| row_scale[row] * sum)
    }

    fn undo(&self, i: usize, [n, k]: [usize; 2], merged: f32) -> f32 {
        let (row, column) = self.place(i, [n, k]);
        let sum = self.row_scale.map_or(merged, |row_scale| merged / row_scale[row]);
        let subtract =
            |t: f32, adapter: &LowRank<'_, A>| (-adapter.scaling).mul_add(adapter.product(row, column, k), t);
        self.adapters.iter().rev().filter(|adapter| adapter.rank > 0).fold(sum, subtract)
    }

    /// Output and input of element `i`.
    fn place(&self, i: usize, [n, k]: [usize; 2]) -> (usize, usize) {
        if self.fan_in_fan_out { (i % n, i / n) } else { (i / k, i % k) }
    }
}

impl<A: Element> LowRank<'_, A> {
    /// `(B A)[n, column]`.
    fn product(&self, n: usize, column: usize, k: usize) -> f32 {
        (0..self.rank).fold(0.0, |sum: f32, r| {
            self.lora_b[n * self.rank + r].to_f32().mul_add(self.lora_a[r * k + column].to_f32(), sum)
        })
    }
}
