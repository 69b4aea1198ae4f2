//! A linear layer with an adapter per token.

use std::sync::{Arc, RwLock};

use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_kernels::adapter::Adapter;

use crate::adapters::Adapters;
use crate::lora::frozen_factors;
use crate::product::{AdapterPerToken, Factors, Frozen, NoAdapter};
use crate::weight::Weight;
use crate::{load, refuse};

/// Which adapter every token of the batch uses: one handle for all layers of a model, set before each forward pass.
#[derive(Debug, Clone, Default)]
pub struct AdapterIndex(Arc<RwLock<Option<Tensor>>>);

impl AdapterIndex {
    /// A handle with no batch: all tokens are without an adapter until [`set`](AdapterIndex::set) is called.
    pub fn new() -> Self {
        Self::default()
    }

    /// Numbers of adapters, -1 for none, of an integer type: `[batch]`, one for each sequence, or one for each token, of the
    /// shape that activations have without their last dimension.
    ///
    /// # Errors
    /// For a tensor of another type.
    pub fn set(&self, index: &Tensor) -> Result<()> {
        let index = match index.dtype() {
            DType::I32 | DType::I64 => index.to_dtype(DType::I32)?,
            other => return refuse("index", "i32 or i64", other.as_str()),
        };
        *self.0.write().expect("nothing panics while it is held") = Some(index);
        Ok(())
    }

    /// All tokens without an adapter.
    pub fn clear(&self) {
        *self.0.write().expect("nothing panics while it is held") = None;
    }

    /// `[tokens]`, for activations `[.., in]`.
    fn of(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let index = self.0.read().expect("nothing panics while it is held").clone();
        let Some(index) = index else { return Ok(None) };
        let leading = &x.dims()[..x.dims().len() - 1];
        let per_sequence = index.dims().len() == 1 && leading.first() == index.dims().first();
        let index = if index.dims() == leading {
            index
        } else if per_sequence {
            let mut shape = vec![1; leading.len()];
            shape[0] = leading[0];
            index.reshape(shape)?.broadcast_as(leading)?
        } else {
            let wanted = format!("shape {leading:?}, or [{}]", leading.first().unwrap_or(&1));
            return refuse("index", wanted, format!("{:?}", index.dims()));
        };
        Ok(Some(index.flatten_all()?.contiguous()?))
    }
}

/// `y = x Wᵀ + s_i (x A_iᵀ) B_iᵀ + bias` where i is the token's adapter, with W frozen, dense or in 4 bits.
///
/// Adapters may have different ranks, up to 256 on a GPU. A number that is not an adapter's is an error on the CPU; on a GPU,
/// where nobody waits for it, the token's outputs are NaN.
#[derive(Debug, Clone)]
pub struct MultiLoraLinear {
    frozen: Arc<Frozen>,
    adapters: Arc<[Factors]>,
    index: AdapterIndex,
    #[cfg(feature = "cuda")]
    table: crate::cuda::TableCache,
}

impl MultiLoraLinear {
    /// The layer with `adapters`: none where a module is not adapted. LoRA, rsLoRA and AdaLoRA; factors are f32, or of type
    /// `dtype` (that of the activations) where all are stored in it.
    ///
    /// # Errors
    /// When an adapter does not fit the weight, is DoRA or has a bias of its own: these are not products of two factors.
    pub fn new(
        weight: impl Into<Weight>,
        bias: Option<Tensor>,
        adapters: &[Option<&Adapter>],
        dtype: DType,
        index: &AdapterIndex,
    ) -> Result<Self> {
        let frozen = Frozen::new(weight.into(), bias)?;
        let mut factors = adapters
            .iter()
            .map(|adapter| match adapter {
                None => nothing(&frozen, dtype),
                Some(Adapter::Dora(_)) => refuse("adapters", "LoRA, rsLoRA or AdaLoRA", "DoRA"),
                Some(Adapter::Lora(lora)) if lora.lora_bias().is_some() => {
                    refuse("adapters", "factors alone", "lora_bias")
                }
                Some(adapter) => frozen_factors(adapter, dtype, &frozen),
            })
            .collect::<Result<Vec<_>>>()?;
        if factors.iter().any(|f| f.lora_a.dtype() == DType::F32) {
            for f in &mut factors {
                f.lora_a = f.lora_a.to_dtype(DType::F32)?;
                f.lora_b = f.lora_b.to_dtype(DType::F32)?;
            }
        }
        Ok(Self {
            frozen: Arc::new(frozen),
            adapters: factors.into(),
            index: index.clone(),
            #[cfg(feature = "cuda")]
            table: Default::default(),
        })
    }

    /// Loads the layer at `vb` as [`LoraLinear::load`](crate::LoraLinear::load) does, with the adapters of several folders:
    /// adapter i is that of `adapters[i]`.
    ///
    /// # Errors
    /// As there and as [`MultiLoraLinear::new`]; and when a folder has a weight or bias in place of the base model's.
    pub fn load(
        in_dim: usize,
        out_dim: usize,
        vb: VarBuilder,
        adapters: &[&Adapters],
        index: &AdapterIndex,
    ) -> Result<Self> {
        let (weight, bias) = load::linear(in_dim, out_dim, &vb, adapters)?;
        let module: Vec<_> = adapters.iter().map(|adapters| adapters.take(&vb.prefix())).collect();
        Self::new(weight, bias, &module, vb.dtype(), index)
    }
}

/// An adapter of rank 0.
fn nothing(frozen: &Frozen, dtype: DType) -> Result<Factors> {
    let ((n, k), device) = (frozen.weight.dims2()?, frozen.weight.device());
    let (lora_a, lora_b) = (Tensor::zeros((0, k), dtype, &device)?, Tensor::zeros((n, 0), dtype, &device)?);
    Factors::new(&lora_a, &lora_b, 0.0, frozen)
}

impl Module for MultiLoraLinear {
    /// `x` is `[.., in]`; the result `[.., out]`. Gradients reach x.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.frozen.rows(x)?;
        let frozen = Arc::clone(&self.frozen);
        match self.index.of(&x)? {
            None => x.apply_op1(NoAdapter(frozen)),
            Some(index) => x.apply_op1(AdapterPerToken {
                frozen,
                adapters: Arc::clone(&self.adapters),
                index,
                #[cfg(feature = "cuda")]
                table: self.table.clone(),
            }),
        }
    }
}
