//! AdaLoRA's penalty on singular vectors that are not orthonormal.

use super::matmul::checked;
use crate::nf4::check_len;
use crate::{Element, Result};

/// Which lines of a factor are the singular vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Vectors {
    /// The rows: of `lora_a` `[rank, in]`.
    Rows,
    /// The columns: of `lora_b` `[out, rank]`.
    Columns,
}

/// `||D||_F` with `D = A Aᵀ - I` (of columns: `D = Bᵀ B - I`), and adds `weight` times its gradient, `2 D A / ||D||_F` (`2 B D /
/// ||D||_F`), to `gradient`; where the norm is 0 the gradient is, too.
///
/// The regularisation of AdaLoRA (arXiv:2303.10512, equation 4) as PEFT has it: the norms are not squared, and the loss gets
/// `orth_reg_weight` times their mean over all `lora_a` and `lora_b` of the model. So `weight` is `orth_reg_weight` over the
/// number of factors.
///
/// `factor` and `gradient` are `shape`, row-major. Sums are f64; what is added is rounded to f32, and the sum again.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when a length does not fit. Nothing is written then.
pub fn orthogonality<T: Element>(
    factor: &[T],
    shape: [usize; 2],
    vectors: Vectors,
    weight: f32,
    gradient: &mut [f32],
) -> Result<f64> {
    let [rows, columns] = shape;
    check_len("factor", checked("factor", rows, columns)?, "elements", factor.len())?;
    check_len("gradient", factor.len(), "elements", gradient.len())?;
    let (count, length) = match vectors {
        Vectors::Rows => (rows, columns),
        Vectors::Columns => (columns, rows),
    };
    let place = |vector: usize, i: usize| match vectors {
        Vectors::Rows => vector * columns + i,
        Vectors::Columns => i * columns + vector,
    };
    let element = |vector: usize, i: usize| factor[place(vector, i)].to_f64();
    let mut difference = vec![0.0; count * count];
    for (ij, difference) in difference.iter_mut().enumerate() {
        let (i, j) = (ij / count, ij % count);
        let product: f64 = (0..length).map(|l| element(i, l) * element(j, l)).sum();
        *difference = product - f64::from(u8::from(i == j));
    }
    let norm = difference.iter().map(|d| d * d).sum::<f64>().sqrt();
    if norm > 0.0 {
        for vector in 0..count {
            for l in 0..length {
                let sum: f64 = (0..count).map(|j| difference[vector * count + j] * element(j, l)).sum();
                gradient[place(vector, l)] += (2.0 * f64::from(weight) * sum / norm) as f32;
            }
        }
    }
    Ok(norm)
}
