//! AdaLoRA's importance: of every parameter, smoothed over the steps, and of every triplet of singular value and vectors.

use super::matmul::checked;
use crate::nf4::check_len;
use crate::{Element, Result};

/// What is smoothed of one tensor's importance, as long as the tensor.
#[derive(Debug)]
pub struct ImportanceMut<'a> {
    /// The moving average of the sensitivity `|p ∂L/∂p|`.
    pub sensitivity: &'a mut [f32],
    /// The moving average of how far the sensitivity is from its own average.
    pub uncertainty: &'a mut [f32],
}

/// One step of the smoothing (arXiv:2303.10512, equations 8 to 10), element by element in f32, every operation rounded:
///
/// ```text
/// s  = |p g|
/// s̄ <- beta1 s̄ + (1 - beta1) s
/// ū <- beta2 ū + (1 - beta2) |s - s̄|         with the new s̄, as PEFT has it
/// ```
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit. Nothing is written then.
pub fn importance<T: Element>(
    parameter: &[T],
    gradient: &[f32],
    [beta1, beta2]: [f64; 2],
    importance: ImportanceMut<'_>,
) -> Result<()> {
    check_len("gradient", parameter.len(), "elements", gradient.len())?;
    check_len("importance.sensitivity", parameter.len(), "elements", importance.sensitivity.len())?;
    check_len("importance.uncertainty", parameter.len(), "elements", importance.uncertainty.len())?;
    let smooth = |beta: f64, average: f32, value: f32| beta as f32 * average + (1.0 - beta) as f32 * value;
    let averages = importance.sensitivity.iter_mut().zip(importance.uncertainty);
    for ((p, g), (sensitivity, uncertainty)) in parameter.iter().zip(gradient).zip(averages) {
        let s = (p.to_f32() * g).abs();
        *sensitivity = smooth(beta1, *sensitivity, s);
        *uncertainty = smooth(beta2, *uncertainty, (s - *sensitivity).abs());
    }
    Ok(())
}

/// The smoothed importance of one tensor.
#[derive(Debug, Clone, Copy)]
pub struct Importance<'a> {
    /// See [`ImportanceMut`].
    pub sensitivity: &'a [f32],
    /// See [`ImportanceMut`].
    pub uncertainty: &'a [f32],
}

/// The importance of each of a module's `rank` triplets (arXiv:2303.10512, equation 7), with `I = s̄ ū`:
///
/// `score[r] = I(E[r]) + (mean_k I(A[r, k]) + mean_n I(B[n, r]))`
///
/// `lora_a` is `[rank, k]`, `lora_e` `[rank]`, `lora_b` `[n, rank]`; `shape` is `[rank, n, k]`. Products are f32, means are summed
/// in f64 and rounded once.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit. Nothing is written then.
pub fn triplet_importance(
    [lora_a, lora_e, lora_b]: [Importance<'_>; 3],
    [rank, n, k]: [usize; 3],
    score: &mut [f32],
) -> Result<()> {
    lora_a.check("lora_a", [rank, k])?;
    lora_e.check("lora_e", [rank, 1])?;
    lora_b.check("lora_b", [n, rank])?;
    check_len("score", rank, "ranks", score.len())?;
    let mean = |count: usize, terms: &mut dyn Iterator<Item = f32>| match count {
        0 => 0.0,
        count => (terms.map(f64::from).sum::<f64>() / count as f64) as f32,
    };
    for (r, score) in score.iter_mut().enumerate() {
        let a = mean(k, &mut (r * k..(r + 1) * k).map(|i| lora_a.at(i)));
        let b = mean(n, &mut (0..n).map(|n_| lora_b.at(n_ * rank + r)));
        *score = lora_e.at(r) + (a + b);
    }
    Ok(())
}

impl Importance<'_> {
    fn check(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<()> {
        let count = checked(name, rows, columns)?;
        check_len(&format!("{name}.sensitivity"), count, "elements", self.sensitivity.len())?;
        check_len(&format!("{name}.uncertainty"), count, "elements", self.uncertainty.len())
    }

    fn at(&self, i: usize) -> f32 {
        self.sensitivity[i] * self.uncertainty[i]
    }
}
