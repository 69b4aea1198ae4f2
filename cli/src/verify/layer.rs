//! A linear layer with an adapter, ready for an engine and for the formula.

use anyhow::Result;
use lora_kernels::adapter::Adapter;
use lora_kernels::nf4::Nf4Matrix;
use lora_kernels::{DType, Tensor};

use super::bounds::Factors;
use super::engine::{Engine, Extras, LowRank, Slack, Weight};
use super::report::Case;
use super::truth::{Factor, Linear, Merged, Output, Scale, transpose};

/// A frozen weight `[n, k]`.
#[derive(Clone)]
pub enum Frozen {
    /// Dense.
    Dense(Tensor),
    /// 4-bit.
    Nf4(Box<Nf4Matrix>),
}

impl From<Nf4Matrix> for Frozen {
    fn from(weight: Nf4Matrix) -> Self {
        Frozen::Nf4(Box::new(weight))
    }
}

/// A frozen weight, a bias, and at most one adapter.
#[derive(Clone)]
pub struct Layer {
    weight: Frozen,
    bias: Option<Tensor>,
    lora: Option<Lora>,
}

#[derive(Clone)]
struct Lora {
    factors: Factors,
    low_rank: LowRank,
    factor: Factor,
    magnitude: Option<Tensor>,
    bias: Option<Vec<f64>>,
}

impl Layer {
    /// A layer with a weight `[n, k]` and a bias `[n]`.
    pub fn new(weight: Frozen, bias: Option<Tensor>) -> Self {
        Self { weight, bias, lora: None }
    }

    /// The same layer with `adapter` on it, whose parameters are rounded to `dtype` where it is not f32.
    pub fn with_adapter(&self, adapter: &Adapter, dtype: DType) -> Result<Self> {
        let as_stored = |t: &Tensor| if dtype == DType::F32 { Ok(t.clone()) } else { cast(t, dtype) };
        let (lora_a, lora_b) = (as_stored(adapter.lora_a())?, as_stored(adapter.lora_b())?);
        let (magnitude, bias) = match adapter {
            Adapter::Dora(dora) => (Some(as_stored(dora.magnitude())?), None),
            Adapter::Lora(lora) => (None, lora.lora_bias().map(as_stored).transpose()?),
            Adapter::AdaLora(_) | Adapter::Embedding(_) => (None, None),
        };
        let (rank, scaling) = (adapter.rank(), adapter.scaling());
        let mut factor = Factor { a: lora_a.to_f64(), b: lora_b.to_f64(), rank, scaling };
        let mut low_rank = LowRank { lora_a, lora_b, scaling };
        if let Adapter::AdaLora(adalora) = adapter {
            let diagonal = as_stored(adalora.lora_e())?.to_f64();
            for (row, e) in factor.a.chunks_mut(adapter.in_features().max(1)).zip(diagonal) {
                row.iter_mut().for_each(|a| *a *= e);
            }
            low_rank.lora_a = from_f64(low_rank.lora_a.shape(), &factor.a)?;
            low_rank.lora_b = cast(&low_rank.lora_b, DType::F32)?;
        }
        let factors = match (dtype, adapter) {
            (DType::F32, _) => Factors::F32,
            (_, Adapter::AdaLora(_)) => Factors::StoredDiagonal,
            _ => Factors::Stored,
        };
        let bias = bias.map(|b| b.to_f64().iter().map(|b| b * scaling).collect());
        Ok(Self { lora: Some(Lora { factors, low_rank, factor, magnitude, bias }), ..self.clone() })
    }

    /// The same layer with a dense weight and the bias rounded to `dtype`.
    pub fn in_dtype(&self, dtype: DType) -> Result<Self> {
        let weight = match &self.weight {
            Frozen::Dense(weight) => Frozen::Dense(cast(weight, dtype)?),
            Frozen::Nf4(_) => self.weight.clone(),
        };
        let bias = self.bias.as_ref().map(|b| cast(b, dtype)).transpose()?;
        Ok(Self { weight, bias, lora: self.lora.clone() })
    }

    /// The same layer, bias and adapter over another weight.
    pub fn over(&self, weight: Frozen) -> Self {
        Self { weight, ..self.clone() }
    }

    /// The same layer without its adapter.
    pub fn without_adapter(&self) -> Self {
        Self { lora: None, ..self.clone() }
    }

    fn borrowed(&self) -> Weight<'_> {
        match &self.weight {
            Frozen::Dense(weight) => Weight::Dense(weight),
            Frozen::Nf4(weight) => Weight::Nf4(weight),
        }
    }

    /// `(n, k)`.
    pub fn shape(&self) -> (usize, usize) {
        let shape = match &self.weight {
            Frozen::Dense(weight) => weight.shape(),
            Frozen::Nf4(weight) => weight.shape(),
        };
        (shape[0], shape[1])
    }

    /// The weight as a product in `dtype` reads it.
    fn weight_f64(&self, dtype: DType) -> Vec<f64> {
        match &self.weight {
            Frozen::Dense(weight) => weight.to_f64(),
            Frozen::Nf4(weight) => decoded(weight, dtype).to_f64(),
        }
    }

    /// The bias with the adapter's own, in f64.
    fn bias_f64(&self) -> Option<Vec<f64>> {
        let extra = self.lora.as_ref().and_then(|l| l.bias.as_ref());
        match (self.bias.as_ref().map(Tensor::to_f64), extra) {
            (Some(bias), Some(extra)) => Some(bias.iter().zip(extra).map(|(b, e)| b + e).collect()),
            (bias, extra) => bias.or(extra.cloned()),
        }
    }

    /// What the adapter's bias makes of the layer's bias, where it has one.
    pub fn merged_bias(&self) -> Option<Vec<f64>> {
        self.lora.as_ref()?.bias.as_ref().and_then(|_| self.bias_f64())
    }

    /// DoRA's factor of every row by the formula. A 4-bit weight counts in the type that it was before.
    pub fn scale(&self) -> Option<Vec<Scale>> {
        let lora = self.lora.as_ref()?;
        let magnitude = lora.magnitude.as_ref()?.to_f64();
        let dtype = match &self.weight {
            Frozen::Dense(weight) => weight.dtype(),
            Frozen::Nf4(weight) => weight.dtype(),
        };
        let ((n, k), weight) = (self.shape(), self.weight_f64(dtype));
        Some(Linear::new(&weight, n, k).dora_scale(&lora.factor, &magnitude))
    }

    /// DoRA's factor of every row by the engine; `Some(None)` when the layer has none, `None` when the engine lacks it.
    pub fn row_scale(&self, case: &mut Case, engine: &dyn Engine) -> Result<Option<Option<Vec<f32>>>> {
        let lora = self.lora.as_ref();
        match lora.and_then(|l| Some((&l.low_rank, l.magnitude.as_ref()?))) {
            None => Ok(Some(None)),
            Some((low_rank, magnitude)) => {
                let scale = engine.dora_scale(self.borrowed(), low_rank, &magnitude.to_f32());
                Ok(case.offered(scale)?.map(Some))
            }
        }
    }

    /// The engine's outputs for `x`, in the type of `x`.
    pub fn forward(&self, case: &mut Case, engine: &dyn Engine, x: &Tensor) -> Result<Option<Vec<f64>>> {
        let Some(row_scale) = self.row_scale(case, engine)? else { return Ok(None) };
        let (n, _) = self.shape();
        let bias = self.bias_f64().map(|b| cast(&from_f64(&[n], &b)?, x.dtype())).transpose()?;
        let adapters: Vec<LowRank> = self.lora.iter().map(|l| l.low_rank.clone()).collect();
        let extras = Extras {
            bias: bias.as_ref(),
            row_scale: row_scale.as_deref(),
            adapters: &adapters,
            adapter_index: None,
        };
        Ok(case.offered(engine.matmul(x, self.borrowed(), extras))?.map(|y| y.to_f64()))
    }

    /// What the engine's outputs for `x` may be off by, besides f32 sums.
    pub fn slack(&self, engine: &dyn Engine, x: &Tensor) -> Result<Slack> {
        Ok(engine.slack(x, self.borrowed())?)
    }

    /// The outputs for `x` by the formula.
    pub fn truth(&self, x: &Tensor) -> Vec<Output> {
        let ((n, k), weight) = (self.shape(), self.weight_f64(x.dtype()));
        let (bias, scale) = (self.bias.as_ref().map(Tensor::to_f64), self.scale());
        let own = self.lora.as_ref().and_then(|l| l.bias.as_deref());
        let linear = Linear::new(&weight, n, k).with_bias(bias.as_deref()).with_adapter_bias(own);
        let linear = linear.with_scale(scale.as_deref());
        linear.forward(&x.to_f64(), |_| self.lora.as_ref().map(|l| &l.factor))
    }

    /// How the adapter's factors are held.
    pub fn factors(&self) -> Factors {
        self.lora.as_ref().map_or(Factors::F32, |l| l.factors)
    }

    /// The adapter's factors, for the engine.
    pub fn low_rank(&self) -> &LowRank {
        &self.lora.as_ref().expect("a layer with an adapter").low_rank
    }

    /// The adapter's factors, for the formula.
    pub fn factor(&self) -> &Factor {
        &self.lora.as_ref().expect("a layer with an adapter").factor
    }

    /// The merged weight by the formula. `unmerge` takes the adapter out of `weight` instead.
    pub fn merged(&self, dtype: DType) -> Vec<Merged> {
        let ((n, k), weight, scale) = (self.shape(), self.weight_f64(dtype), self.scale());
        Linear::new(&weight, n, k).with_scale(scale.as_deref()).merge(self.factor())
    }

    /// What is left of `merged` `[n, k]` without the adapter, by the formula.
    pub fn unmerged(&self, merged: &[f64]) -> Vec<Merged> {
        let ((n, k), scale) = (self.shape(), self.scale());
        Linear::new(merged, n, k).with_scale(scale.as_deref()).unmerge(self.factor())
    }
}

/// `weight` in `dtype`.
pub fn decoded(weight: &Nf4Matrix, dtype: DType) -> Tensor {
    use lora_kernels::Element;
    let data = match dtype {
        DType::F32 => Element::into_data(weight.dequantize::<f32>()),
        DType::F16 => Element::into_data(weight.dequantize::<half::f16>()),
        DType::BF16 => Element::into_data(weight.dequantize::<half::bf16>()),
    };
    Tensor::new(weight.shape(), data).expect("as many elements as the shape has")
}

/// `tensor` rounded to `dtype`.
pub fn cast(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::from_f32(tensor.shape(), &tensor.to_f32(), dtype)?)
}

/// f64 values as an f32 tensor.
pub fn from_f64(shape: &[usize], values: &[f64]) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    Ok(Tensor::from_f32(shape, &values, DType::F32)?)
}

/// A matrix with rows and columns exchanged.
pub fn transposed(tensor: &Tensor) -> Result<Tensor> {
    let [rows, columns] = tensor.shape() else {
        anyhow::bail!("wanted a matrix, got shape {:?}", tensor.shape());
    };
    let values = transpose(&tensor.to_f32(), *rows, *columns);
    Ok(Tensor::from_f32([*columns, *rows], &values, tensor.dtype())?)
}
