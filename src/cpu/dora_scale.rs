//! DoRA's factor of each output.

use super::matmul::{LowRank, Weight, check_lora_a, check_lora_b};
use crate::nf4::check_len;
use crate::{Element, Result};

/// `row_scale[n] = magnitude[n] / ||W[n] + scaling · (B A)[n]||₂`, the norm over the inputs (arXiv:2402.09353, equation 5).
/// Sums are f64, and the quotient is rounded once.
///
/// A 4-bit weight is dequantised to `T`; PEFT takes the quant_state's dtype there. A row whose sum is zero yields infinity,
/// or NaN under a magnitude of 0.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit or a 4-bit weight is not a matrix. Nothing is
/// written then.
pub fn dora_scale<T: Element, A: Element>(
    weight: &Weight<'_, T>,
    adapter: &LowRank<'_, A>,
    magnitude: &[f32],
    row_scale: &mut [f32],
) -> Result<()> {
    let (n, k) = weight.shape()?;
    check_lora_a("adapter", adapter, k)?;
    check_lora_b("adapter", adapter, n)?;
    check_len("magnitude", n, "elements", magnitude.len())?;
    check_len("row_scale", n, "elements", row_scale.len())?;
    let mut row = vec![T::from_f32(0.0); k];
    for (n, (row_scale, magnitude)) in row_scale.iter_mut().zip(magnitude).enumerate() {
        weight.row(n, k, &mut row);
        let squares = row.iter().enumerate().map(|(k_, w)| {
            let delta: f64 = (0..adapter.rank)
                .map(|r| adapter.lora_b[n * adapter.rank + r].to_f64() * adapter.lora_a[r * k + k_].to_f64())
                .sum();
            (w.to_f64() + f64::from(adapter.scaling) * delta).powi(2)
        });
        *row_scale = (f64::from(*magnitude) / squares.sum::<f64>().sqrt()) as f32;
    }
    Ok(())
}
