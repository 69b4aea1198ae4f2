use super::{check_factors, check_finite, check_shape};
use crate::{Error, Result, Tensor};

/// How LoRA's scale follows from `alpha` and the rank. A module's own alpha and rank, after `alpha_pattern` and
/// `rank_pattern`, go in. (AdaLoRA has a rule of its own: [`super::AdaLora::scaling`].)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scaling {
    /// `alpha / rank` (Hu et al. 2021, section 4.1).
    Lora,
    /// `alpha / sqrt(rank)` (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
    RsLora,
}

impl Scaling {
    /// The factor; 0 for rank 0, whose delta is zero in any case.
    pub fn factor(self, alpha: f64, rank: usize) -> f64 {
        match (self, rank) {
            (_, 0) => 0.0,
            (Scaling::Lora, rank) => alpha / rank as f64,
            (Scaling::RsLora, rank) => alpha / (rank as f64).sqrt(),
        }
    }
}

/// `delta = scaling * lora_b @ lora_a` (Hu et al. 2021, arXiv:2106.09685).
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    lora_a: Tensor,
    lora_b: Tensor,
    lora_bias: Option<Tensor>,
    scaling: f64,
    fan_in_fan_out: bool,
}

impl Lora {
    /// From `lora_a` `[rank, in]` and `lora_b` `[out, rank]`, of any dtypes; `scaling` from [`Scaling::factor`].
    ///
    /// The elements are not looked at: one that is not finite goes through a forward pass as through any product, and
    /// makes a merge fail.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when the shapes do not fit or `scaling` is not finite.
    pub fn new(lora_a: Tensor, lora_b: Tensor, scaling: f64) -> Result<Self> {
        check_factors(&lora_a, &lora_b)?;
        check_finite("scaling", scaling)?;
        Ok(Self { lora_a, lora_b, lora_bias: None, scaling, fan_in_fan_out: false })
    }

    /// The adapters of a stack of experts, one for each, from the factors that PEFT stores for a 3-D parameter
    /// (`target_parameters`): `lora_a` `[experts * rank, in]` with the rows of an expert together, and `lora_b`
    /// `[out, rank * experts]` with the experts of a rank together.
    ///
    /// In a [`cuda::AdapterTable`](crate::cuda::AdapterTable) of several such stacks, one behind the other, the factors of adapter
    /// `a` for expert `e` have the number `a * experts + e`; [`cuda::expert_index`](crate::cuda::expert_index) makes these numbers
    /// of every row's adapter and expert.
    ///
    /// # Errors
    /// As [`Lora::new`], and when the rows of `lora_a` are not a multiple of `experts`.
    pub fn of_experts(lora_a: &Tensor, lora_b: &Tensor, experts: usize, scaling: f64) -> Result<Vec<Self>> {
        check_factors(lora_a, lora_b)?;
        let (rows, k, n) = (lora_a.shape()[0], lora_a.shape()[1], lora_b.shape()[0]);
        if experts == 0 || !rows.is_multiple_of(experts) {
            let wanted = format!("shape [rank * {experts}, in]");
            return Err(Error::argument("lora_a", wanted, format!("{:?}", lora_a.shape())));
        }
        let rank = rows / experts;
        let expert = |e: usize| {
            let a = lora_a.data().pick((0..rank * k).map(|i| e * rank * k + i));
            let b = lora_b.data().pick((0..n * rank).map(|i| i * experts + e));
            Self::new(Tensor::new([rank, k], a)?, Tensor::new([n, rank], b)?, scaling)
        };
        (0..experts).map(expert).collect()
    }

    /// With the bias of `lora_b` (PEFT's `lora_bias`), `[out]`: the output gains `scaling * lora_bias`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when its shape is not `[out]`.
    pub fn with_lora_bias(self, lora_bias: Tensor) -> Result<Self> {
        check_shape("lora_bias", &lora_bias, &[self.lora_b.shape()[0]])?;
        Ok(Self { lora_bias: Some(lora_bias), ..self })
    }

    /// For a base weight that is stored `[in, out]` (GPT-2's Conv1D). The factors stay as they are.
    pub fn with_fan_in_fan_out(self, fan_in_fan_out: bool) -> Self {
        Self { fan_in_fan_out, ..self }
    }

    pub(super) fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        let factors = [("lora_A", &mut self.lora_a), ("lora_B", &mut self.lora_b)];
        factors.into_iter().chain(self.lora_bias.as_mut().map(|bias| ("lora_B.bias", bias))).collect()
    }

    /// `[rank, in]`.
    pub fn lora_a(&self) -> &Tensor {
        &self.lora_a
    }

    /// `[out, rank]`.
    pub fn lora_b(&self) -> &Tensor {
        &self.lora_b
    }

    /// `[out]`, added as `scaling * lora_bias`.
    pub fn lora_bias(&self) -> Option<&Tensor> {
        self.lora_bias.as_ref()
    }

    /// The factor of `lora_b @ lora_a`.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// Whether the base weight is stored `[in, out]`.
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }
}
