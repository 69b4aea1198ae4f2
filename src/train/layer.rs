use crate::adapter::{Adapter, Base};
use crate::cpu::{self, Dropout, LoraGradient, LowRank, MatmulExtras, Weight, fast};
use crate::nf4::check_len;
use crate::tensor::TensorView;
use crate::{Element, Error, Result, Tensor};

use super::Gradient;

/// A frozen linear layer `[out, in]`, dense or in 4 bits, on the CPU: the whole step of its adapter, by [`cpu::fast`].
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    base: Base<'a>,
    bias: Option<&'a Tensor>,
    n: usize,
    k: usize,
}

/// What a forward pass leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Forward<T> {
    /// `[m, out]`.
    pub y: Vec<T>,
    dropout: Option<Dropout>,
    dora: Option<Direction<T>>,
}

/// What DoRA's gradient needs of the forward pass.
#[derive(Debug, Clone, PartialEq)]
struct Direction<T> {
    /// The output before the scale and the bias.
    z: Vec<T>,
    row_scale: Vec<f32>,
    inverse_norm: Vec<f32>,
}

/// An adapter as a pair of f32 factors.
struct Factors {
    lora_a: Vec<f32>,
    lora_b: Vec<f32>,
    rank: usize,
    scaling: f32,
}

impl<'a> Layer<'a> {
    /// Of a weight `[out, in]`, and a bias `[out]` of the activations' type.
    ///
    /// # Errors
    /// [`Error::Argument`] when the weight is not a matrix, or the bias does not fit.
    pub fn new(base: impl Into<Base<'a>>, bias: Option<&'a Tensor>) -> Result<Self> {
        let base = base.into();
        let &[n, k] = base.shape() else {
            return Err(Error::argument("base", "shape [out, in]", format!("{:?}", base.shape())));
        };
        if let Some(bias) = bias
            && bias.shape() != [n]
        {
            return Err(Error::argument("bias", format!("shape [{n}]"), format!("{:?}", bias.shape())));
        }
        Ok(Self { base, bias, n, k })
    }

    /// The output for `m` tokens, `x` `[m, in]`. A dense weight and a bias have the type of `x`; a 4-bit weight is dequantised to it.
    /// The adapter's parameters may have any type: they are widened to f32. DoRA's norm is taken from the weight in its own type,
    /// as PEFT does.
    ///
    /// # Errors
    /// [`Error::Argument`] when a shape or a type does not fit, the weight's layout is `[in, out]`, or the adapter is an embedding's.
    pub fn forward<T: Element>(
        &self,
        adapter: &Adapter,
        x: &[T],
        m: usize,
        dropout: Option<Dropout>,
    ) -> Result<Forward<T>> {
        self.check(adapter)?;
        let weight = self.weight::<T>()?;
        let bias = self.bias.map(|bias| typed::<T>("bias", bias.view())).transpose()?;
        let (factors, len) = (Factors::of(adapter)?, self.n.saturating_mul(m));
        let adapters = [factors.low_rank()];
        let extras = MatmulExtras { adapters: &adapters, dropout, ..MatmulExtras::default() };
        check_len("x", self.k.saturating_mul(m), "elements", x.len())?;
        let mut y = vec![T::from_f32(0.0); len];
        let Adapter::Dora(dora) = adapter else {
            fast::matmul(x, m, &weight, &MatmulExtras { bias, ..extras }, &mut y)?;
            if let Adapter::Lora(lora) = adapter
                && let Some(lora_bias) = lora.lora_bias()
            {
                let scaled: Vec<f32> = lora_bias.to_f32().iter().map(|b| factors.scaling * b).collect();
                let outputs = y.iter_mut().zip(scaled.iter().cycle());
                outputs.for_each(|(y, b)| *y = T::from_f32(y.to_f32() + b));
            }
            return Ok(Forward { y, dropout, dora: None });
        };
        fast::matmul(x, m, &weight, &extras, &mut y)?;
        let z = y.clone();
        let norms = adapter.norms(self.base);
        let magnitude = dora.magnitude().to_f64();
        let direction = Direction {
            z,
            row_scale: magnitude.iter().zip(&norms).map(|(m, norm)| (m / norm) as f32).collect(),
            inverse_norm: norms.iter().map(|norm| norm.recip() as f32).collect(),
        };
        for (i, y) in y.iter_mut().enumerate() {
            let scaled = direction.row_scale[i % self.n] * y.to_f32();
            *y = T::from_f32(bias.map_or(scaled, |bias| scaled + bias[i % self.n].to_f32()));
        }
        Ok(Forward { y, dropout, dora: Some(direction) })
    }

    /// Adds to `gradient` what these tokens give it, and writes the gradient of `x`, if it is asked for. `dy` is the gradient of
    /// [`Forward::y`]; `adapter` and `x` are those of the forward pass.
    ///
    /// # Errors
    /// [`Error::Argument`] as [`Layer::forward`], and when `dy`, `gradient` or `dx` does not fit. Nothing is written then.
    pub fn backward<T: Element>(
        &self,
        adapter: &Adapter,
        [x, dy]: [&[T]; 2],
        forward: &Forward<T>,
        gradient: &mut Gradient,
        dx: Option<&mut [T]>,
    ) -> Result<()> {
        self.check(adapter)?;
        gradient.check(adapter)?;
        check_len("dy", forward.y.len(), "elements", dy.len())?;
        let (weight, factors) = (self.weight::<T>()?, Factors::of(adapter)?);
        let m = dy.len().checked_div(self.n).unwrap_or(0);
        let adapters = [factors.low_rank()];
        let extras =
            MatmulExtras { adapters: &adapters, dropout: forward.dropout, ..MatmulExtras::default() };
        let (mut da, mut db) = (vec![0.0; factors.lora_a.len()], vec![0.0; factors.lora_b.len()]);
        let mut own = [LoraGradient { lora_a: &mut da, lora_b: &mut db, rank: factors.rank }];
        match &forward.dora {
            None => fast::backward([x, dy], m, &weight, &extras, false, &mut own, dx)?,
            Some(Direction { z, row_scale, inverse_norm }) => {
                let (mut dz, mut dm) = (dy.to_vec(), vec![0.0; self.n]);
                cpu::dora_gradient(&mut dz, z, [m, self.n], row_scale, inverse_norm, false, &mut dm)?;
                fast::backward([x, &dz], m, &weight, &extras, false, &mut own, dx)?;
                gradient.add("lora_magnitude_vector", &dm);
            }
        }
        if let Adapter::AdaLora(adalora) = adapter {
            let (a, e) = (adalora.lora_a().to_f32(), adalora.lora_e().to_f32());
            let mut de = vec![0.0; factors.rank];
            cpu::adalora_gradient(&mut da, &a, &e, [factors.rank, self.k], &mut de)?;
            gradient.add("lora_E", &de);
        }
        if gradient.get("lora_B.bias").is_some() {
            let mut sum = vec![0.0; self.n];
            for dy in dy.chunks_exact(self.n.max(1)) {
                sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy.to_f32());
            }
            sum.iter_mut().for_each(|sum| *sum *= factors.scaling);
            gradient.add("lora_B.bias", &sum);
        }
        gradient.add("lora_A", &da);
        gradient.add("lora_B", &db);
        Ok(())
    }

    fn check(&self, adapter: &Adapter) -> Result<()> {
        if matches!(adapter, Adapter::Embedding(_)) {
            return Err(Error::argument("adapter", "that of a linear layer", "an embedding's"));
        }
        if adapter.fan_in_fan_out() {
            return Err(Error::argument("adapter.fan_in_fan_out", "false (transpose the weight)", true));
        }
        match adapter.weight_shape() == [self.n, self.k] {
            true => Ok(()),
            false => {
                let wanted = format!("one for a weight [{}, {}]", self.n, self.k);
                Err(Error::argument("adapter", wanted, format!("{:?}", adapter.weight_shape())))
            }
        }
    }

    fn weight<T: Element>(&self) -> Result<Weight<'a, T>> {
        match self.base {
            Base::Dense(tensor) => Ok(Weight::Dense { data: typed("base", tensor)?, n: self.n, k: self.k }),
            Base::Nf4(nf4) => Ok(Weight::Nf4(nf4)),
        }
    }
}

fn typed<'a, T: Element>(argument: &str, tensor: TensorView<'a>) -> Result<&'a [T]> {
    let wrong = || Error::argument(argument, format!("{} as the activations", T::DTYPE), tensor.dtype());
    tensor.as_slice().ok_or_else(wrong)
}

impl Factors {
    fn of(adapter: &Adapter) -> Result<Self> {
        let (rank, mut lora_a) = (adapter.rank(), adapter.lora_a().to_f32());
        if let Adapter::AdaLora(adalora) = adapter {
            let (a, e) = (lora_a.clone(), adalora.lora_e().to_f32());
            cpu::adalora_fold(&a, &e, [rank, adapter.in_features()], &mut lora_a)?;
        }
        Ok(Self { lora_a, lora_b: adapter.lora_b().to_f32(), rank, scaling: adapter.scaling() as f32 })
    }

    fn low_rank(&self) -> LowRank<'_, f32> {
        LowRank { lora_a: &self.lora_a, lora_b: &self.lora_b, rank: self.rank, scaling: self.scaling }
    }
}
