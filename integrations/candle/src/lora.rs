//! A linear layer with at most one adapter.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_kernels::adapter::{Adapter, Stack};

use crate::adapters::Adapters;
use crate::product::{Factors, Frozen, NoAdapter, OneAdapter};
use crate::weight::{Weight, element, from_host, to_host};
use crate::{load, refuse, wrap};

/// `y = m ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + bias`, with W frozen, dense or in 4 bits.
#[derive(Debug, Clone)]
pub struct LoraLinear {
    frozen: Arc<Frozen>,
    factors: Option<Factors>,
    #[cfg(feature = "cuda")]
    table: crate::cuda::TableCache,
}

/// [`LoraLinear`] by the name that goes with 4-bit weights. It is one type, so that a model's field can hold either.
pub type QLoraLinear = LoraLinear;

impl LoraLinear {
    /// The layer without an adapter. `bias` is `[out]`.
    ///
    /// # Errors
    /// When weight and bias do not fit each other, or are not f32, f16 or bf16.
    pub fn new(weight: impl Into<Weight>, bias: Option<Tensor>) -> Result<Self> {
        Ok(Self::of(Frozen::new(weight.into(), bias)?, None))
    }

    /// Loads the layer at `vb` (`vb.pp("q_proj")`): in 4 bits where the checkpoint has bitsandbytes' tensors for it, and with
    /// the adapter that `adapters` has for the module of that name.
    ///
    /// Dense tensors get the type of `vb`, and the adapter's factors too if they are stored in it; otherwise they are f32.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, and as [`LoraLinear::with_adapter`].
    pub fn load(in_dim: usize, out_dim: usize, vb: VarBuilder, adapters: &Adapters) -> Result<Self> {
        let (weight, bias) = load::linear(in_dim, out_dim, &vb, &[adapters])?;
        let layer = Self::new(weight, bias)?;
        match adapters.take(&vb.prefix()) {
            Some(adapter) => layer.with_adapter(adapter, vb.dtype()),
            None => Ok(layer),
        }
    }

    /// The layer with an adapter of a file, for activations of type `dtype`. LoRA, rsLoRA, AdaLoRA (its diagonal goes into
    /// `lora_a`) and DoRA, whose scale is computed here once, from the weight.
    ///
    /// # Errors
    /// When the adapter does not fit the weight, or is one of an embedding or of a weight stored `[in, out]`.
    pub fn with_adapter(self, adapter: &Adapter, dtype: DType) -> Result<Self> {
        let mut frozen = (*self.frozen).clone();
        let device = frozen.weight.device();
        let factors = frozen_factors(adapter, dtype, &frozen)?;
        // What is not a product of two factors: DoRA's scale and the bias of lora_b.
        let (dora, lora_bias) = match adapter {
            Adapter::Dora(_) => (true, false),
            Adapter::Lora(lora) => (false, lora.lora_bias().is_some()),
            _ => (false, false),
        };
        if dora || lora_bias {
            let host = frozen.weight.to_host()?;
            let stack = Stack::new(&[adapter], host.base()).map_err(wrap)?;
            if let Some(scale) = stack.row_scale() {
                let scale: Vec<f32> = scale.iter().map(|&scale| scale as f32).collect();
                frozen.row_scale = Some(Tensor::from_vec(scale, factors.lora_b.dim(0)?, &device)?);
            }
            let bias = frozen.bias.as_ref().map(|bias| to_host("bias", bias)).transpose()?;
            let bias = stack.merge_bias(bias.as_ref(), element("dtype", dtype)?).map_err(wrap)?;
            frozen.bias = bias.map(|bias| from_host(&bias, &device)).transpose()?;
        }
        Ok(Self::of(frozen, Some(factors)))
    }

    /// The layer with factors `[rank, in]` and `[out, rank]` of one type: that of the activations, or f32. They may be `Var`s:
    /// gradients reach them, and the next forward pass sees what an optimiser made of them.
    ///
    /// # Errors
    /// When they do not fit the weight or each other, or `scaling` is not finite.
    pub fn with_factors(self, lora_a: &Tensor, lora_b: &Tensor, scaling: f64) -> Result<Self> {
        let factors = Factors::new(lora_a, lora_b, scaling, &self.frozen)?;
        Ok(Self::of((*self.frozen).clone(), Some(factors)))
    }

    /// The frozen weight.
    pub fn weight(&self) -> &Weight {
        &self.frozen.weight
    }

    /// `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.frozen.bias.as_ref()
    }

    fn of(frozen: Frozen, factors: Option<Factors>) -> Self {
        Self {
            frozen: Arc::new(frozen),
            factors,
            #[cfg(feature = "cuda")]
            table: Default::default(),
        }
    }
}

impl Module for LoraLinear {
    /// `x` is `[.., in]`; the result `[.., out]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.frozen.rows(x)?;
        let frozen = Arc::clone(&self.frozen);
        match &self.factors {
            None => x.apply_op1(NoAdapter(frozen)),
            Some(Factors { lora_a, lora_b, scaling }) => x.apply_op3(
                lora_a,
                lora_b,
                OneAdapter {
                    frozen,
                    scaling: *scaling,
                    #[cfg(feature = "cuda")]
                    table: self.table.clone(),
                },
            ),
        }
    }
}

/// The factors of a file's adapter, on the device of the weight: in `dtype` if that is how they are stored, else in f32.
pub(crate) fn frozen_factors(adapter: &Adapter, dtype: DType, frozen: &Frozen) -> Result<Factors> {
    if adapter.fan_in_fan_out() {
        return refuse("adapter", "one of a linear layer whose weight is [out, in]", "a weight [in, out]");
    }
    let device = frozen.weight.device();
    let stored = element("dtype", dtype)?;
    let same = adapter.lora_a().dtype() == stored && adapter.lora_b().dtype() == stored;
    let dtype = if same { dtype } else { DType::F32 };
    let tensor = |tensor| from_host(tensor, &device)?.to_dtype(dtype);
    let mut lora_a = tensor(adapter.lora_a())?;
    if let Adapter::AdaLora(adalora) = adapter {
        let diagonal = from_host(adalora.lora_e(), &device)?.to_dtype(DType::F32)?.reshape(((), 1))?;
        lora_a = lora_a.to_dtype(DType::F32)?.broadcast_mul(&diagonal)?.to_dtype(dtype)?;
    }
    Factors::new(&lora_a, &tensor(adapter.lora_b())?, adapter.scaling(), frozen)
}
