use super::{Lora, check_shape};
use crate::{Error, Result, Tensor};

/// `W' = magnitude / ||W + delta||_row * (W + delta)` (Liu et al. 2024, arXiv:2402.09353). The norm is over the inputs
/// of each output; the base's bias is not scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct Dora {
    lora: Lora,
    magnitude: Tensor,
}

impl Dora {
    /// From the direction's update and `magnitude` `[out]`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when the shape does not fit, or `lora` has a bias (DoRA does not define it, PEFT refuses it).
    pub fn new(lora: Lora, magnitude: Tensor) -> Result<Self> {
        check_shape("magnitude", &magnitude, &[lora.lora_b().shape()[0]])?;
        match lora.lora_bias() {
            None => Ok(Self { lora, magnitude }),
            Some(_) => Err(Error::argument("lora.lora_bias", "none under DoRA", "a bias")),
        }
    }

    pub(super) fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        let magnitude = ("lora_magnitude_vector", &mut self.magnitude);
        self.lora.parameters_mut().into_iter().chain([magnitude]).collect()
    }

    /// The direction's update.
    pub fn lora(&self) -> &Lora {
        &self.lora
    }

    /// `[out]`.
    pub fn magnitude(&self) -> &Tensor {
        &self.magnitude
    }
}
