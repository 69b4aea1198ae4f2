use super::{check_factors, check_finite, check_shape};
use crate::{Result, Tensor};

/// `delta = lora_b @ (lora_a * lora_e) * alpha / (init_r + 1e-5)` (Zhang et al. 2023, arXiv:2303.10512; the scale is PEFT's).
#[derive(Debug, Clone, PartialEq)]
pub struct AdaLora {
    lora_a: Tensor,
    lora_e: Tensor,
    lora_b: Tensor,
    alpha: f64,
    init_r: usize,
    fan_in_fan_out: bool,
}

impl AdaLora {
    /// From `lora_a` `[rank, in]`, `lora_e` `[rank, 1]` (the diagonal Λ), `lora_b` `[out, rank]`, of any dtypes, and of the
    /// configuration `lora_alpha` and `init_r`. The rank may be less than `init_r` (pruned), down to 0.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when the shapes do not fit or `alpha` is not finite.
    pub fn new(lora_a: Tensor, lora_e: Tensor, lora_b: Tensor, alpha: f64, init_r: usize) -> Result<Self> {
        check_factors(&lora_a, &lora_b)?;
        check_shape("lora_e", &lora_e, &[lora_a.shape()[0], 1])?;
        check_finite("alpha", alpha)?;
        Ok(Self { lora_a, lora_e, lora_b, alpha, init_r, fan_in_fan_out: false })
    }

    /// For a base weight that is stored `[in, out]`.
    pub fn with_fan_in_fan_out(self, fan_in_fan_out: bool) -> Self {
        Self { fan_in_fan_out, ..self }
    }

    pub(super) fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("lora_A", &mut self.lora_a), ("lora_E", &mut self.lora_e), ("lora_B", &mut self.lora_b)]
    }

    /// `[rank, in]`.
    pub fn lora_a(&self) -> &Tensor {
        &self.lora_a
    }

    /// `[rank, 1]`, the diagonal. A masked rank holds 0.
    pub fn lora_e(&self) -> &Tensor {
        &self.lora_e
    }

    /// `[out, rank]`.
    pub fn lora_b(&self) -> &Tensor {
        &self.lora_b
    }

    /// `lora_alpha` of the configuration.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// The rank that training began with.
    pub fn init_r(&self) -> usize {
        self.init_r
    }

    /// `alpha / (init_r + 1e-5)`: the rank that training began with stays in the scale after pruning.
    pub fn scaling(&self) -> f64 {
        self.alpha / (self.init_r as f64 + 1e-5)
    }

    /// Whether the base weight is stored `[in, out]`.
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }
}
