use super::{check_factors, check_finite};
use crate::{Result, Tensor};

/// LoRA on an embedding table `[vocab, dim]`: `delta = scaling * (lora_b @ lora_a)^T`.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingLora {
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: f64,
}

impl EmbeddingLora {
    /// From `lora_a` `[rank, vocab]` and `lora_b` `[dim, rank]`, of any dtypes (PEFT's `lora_embedding_A`, `lora_embedding_B`).
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when the shapes do not fit or `scaling` is not finite.
    pub fn new(lora_a: Tensor, lora_b: Tensor, scaling: f64) -> Result<Self> {
        check_factors(&lora_a, &lora_b)?;
        check_finite("scaling", scaling)?;
        Ok(Self { lora_a, lora_b, scaling })
    }

    pub(super) fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("lora_embedding_A", &mut self.lora_a), ("lora_embedding_B", &mut self.lora_b)]
    }

    /// `[rank, vocab]`.
    pub fn lora_a(&self) -> &Tensor {
        &self.lora_a
    }

    /// `[dim, rank]`.
    pub fn lora_b(&self) -> &Tensor {
        &self.lora_b
    }

    /// The factor of `(lora_b @ lora_a)^T`.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }
}
