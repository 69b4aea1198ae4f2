//! The norm of all gradients together, for clipping.

use rayon::prelude::*;

/// The norm of a list of tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct GradientNorm {
    /// Σ g² of each tensor, in f64: not finite where an element is not.
    pub squares: Vec<f64>,
    /// The 2-norm of all elements.
    pub norm: f32,
}

/// The 2-norm of all elements of `gradients`, and the sum of squares of each tensor. Sums are f64 in the order of the elements,
/// those of the tensors are added in their order, and the root is rounded once.
pub fn gradient_norm(gradients: &[&[f32]]) -> GradientNorm {
    let square = |gradient: &&[f32]| gradient.iter().map(|g| f64::from(*g).powi(2)).sum();
    let squares: Vec<f64> = gradients.par_iter().map(square).collect();
    let norm = squares.iter().sum::<f64>().sqrt() as f32;
    GradientNorm { squares, norm }
}

impl GradientNorm {
    /// What gradients are multiplied by so that their norm is at most `max_norm`: `min(1, max_norm / (norm + 1e-6))` in f32, as
    /// `torch.nn.utils.clip_grad_norm_` has it.
    pub fn clip(&self, max_norm: f32) -> f32 {
        (max_norm / (self.norm + 1e-6)).min(1.0)
    }

    /// The first tensor with an element that is not finite.
    pub fn not_finite(&self) -> Option<usize> {
        self.squares.iter().position(|square| !square.is_finite())
    }
}
