use rayon::prelude::*;

use super::update::{Update, panels, read, zeros};
use super::{Adapter, Base, Dora, check_shape};
use crate::{Error, Result, Tensor};

/// The adapters that are active together on one weight, in order, folded into one update:
///
/// `W' = row_scale ⊙ W + B' A'`
///
/// LoRA and AdaLoRA add their delta; DoRA adds it and scales each output by `magnitude / ||W + delta||`, with W the weight
/// without the adapters before it, as in PEFT. So DoRA also scales what came before, and order matters.
///
/// Making it reads the weight once for each DoRA, and not at all otherwise. It serves any number of forward passes and
/// merges, and it can unmerge when the weight itself is gone.
#[derive(Debug, Clone)]
pub struct Stack {
    pub(super) update: Update,
    /// `[out]`.
    pub(super) row_scale: Option<Vec<f64>>,
    /// `[DoRA adapters, out]`, the factors of each.
    pub(super) scales: Vec<f64>,
    /// `[out]`, the sum of `scaling * lora_bias`.
    pub(super) bias: Option<Vec<f64>>,
}

impl Stack {
    /// Folds `adapters` for `base`. A 4-bit base is dequantised to its dtype for DoRA's norm, as PEFT does.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no adapter, a shape does not fit, a 4-bit base is stored `[in, out]`, or DoRA's
    /// `magnitude / ||W + delta||` is not finite (a row of zeros, or an element that is not finite).
    pub fn new<'a>(adapters: &[&Adapter], base: impl Into<Base<'a>>) -> Result<Self> {
        let base = base.into();
        if let (Base::Nf4(_), Some(true)) = (base, adapters.first().map(|first| first.fan_in_fan_out())) {
            return Err(Error::argument("adapters[0].fan_in_fan_out", "false on a 4-bit weight", true));
        }
        Self::fold(adapters, base.shape(), |dora, update| {
            let norms = update.norms(base).into_iter();
            Ok(dora.magnitude().to_f64().iter().zip(norms).map(|(m, norm)| m / norm).collect())
        })
    }

    /// Folds `adapters` for a weight of `shape` that is not at hand, with the factors of its DoRA adapters,
    /// `[DoRA adapters, out]`.
    pub(super) fn with_scales(adapters: &[&Adapter], shape: [usize; 2], scales: &[f64]) -> Result<Self> {
        let doras = adapters.iter().filter(|adapter| matches!(adapter, Adapter::Dora(_)));
        let outputs: usize = doras.map(|dora| dora.out_features()).sum();
        if outputs != scales.len() {
            let wanted = format!("{} outputs of DoRA adapters", scales.len());
            return Err(Error::argument("adapters", wanted, outputs));
        }
        let mut rest = scales;
        Self::fold(adapters, &shape, |dora, _| {
            let (scale, after) = rest.split_at(dora.lora().lora_b().shape()[0]);
            rest = after;
            Ok(scale.to_vec())
        })
    }

    /// Folds `adapters`, with the factors that `scale` gives for each DoRA adapter.
    fn fold(
        adapters: &[&Adapter],
        shape: &[usize],
        mut scale: impl FnMut(&Dora, &Update) -> Result<Vec<f64>>,
    ) -> Result<Self> {
        let Some(first) = adapters.first() else {
            return Err(Error::argument("adapters", "at least one", "none"));
        };
        let update = Update::empty(first);
        let mut stack = Self { update, row_scale: None, scales: Vec::new(), bias: None };
        for (i, adapter) in adapters.iter().enumerate() {
            if adapter.fan_in_fan_out() != first.fan_in_fan_out() {
                let argument = format!("adapters[{i}].fan_in_fan_out");
                return Err(Error::argument(argument, "that of adapters[0]", adapter.fan_in_fan_out()));
            }
            if adapter.weight_shape() != shape {
                let (argument, wanted) = (format!("base of adapters[{i}]"), adapter.weight_shape());
                return Err(Error::argument(argument, format!("shape {wanted:?}"), format!("{shape:?}")));
            }
            stack.push(i, adapter, &mut scale)?;
        }
        Ok(stack)
    }

    fn push(
        &mut self,
        i: usize,
        adapter: &Adapter,
        scale: &mut impl FnMut(&Dora, &Update) -> Result<Vec<f64>>,
    ) -> Result<()> {
        let update = Update::of(adapter);
        self.update.append(&update);
        match adapter {
            Adapter::Lora(lora) => {
                if let Some(lora_bias) = lora.lora_bias() {
                    let bias = self.bias.get_or_insert_with(|| vec![0.0; update.outputs]);
                    let scaled = lora_bias.to_f64().into_iter().map(|b| lora.scaling() * b);
                    bias.iter_mut().zip(scaled).for_each(|(sum, b)| *sum += b);
                }
            }
            Adapter::Dora(dora) => {
                let scale = scale(dora, &update)?;
                if let Some(n) = scale.iter().position(|scale| !scale.is_finite()) {
                    let argument = format!("adapters[{i}].magnitude[{n}] / ||W + delta||");
                    return Err(Error::argument(argument, "a finite number", scale[n]));
                }
                self.update.scale(&scale);
                let row_scale = self.row_scale.get_or_insert_with(|| vec![1.0; update.outputs]);
                row_scale.iter_mut().zip(&scale).for_each(|(product, scale)| *product *= scale);
                self.scales.extend(scale);
            }
            Adapter::AdaLora(_) | Adapter::Embedding(_) => {}
        }
        Ok(())
    }

    /// `[out]`, the product of DoRA's factors; none without DoRA.
    pub fn row_scale(&self) -> Option<&[f64]> {
        self.row_scale.as_deref()
    }

    /// The shape of the weight as it is stored.
    pub fn weight_shape(&self) -> [usize; 2] {
        self.update.shape()
    }

    /// `y = row_scale ⊙ (x Wᵀ) + (x A'ᵀ) B'ᵀ + bias + Σ scaling * lora_bias`, `[.., out]`, in f64 throughout: round it to the
    /// type that you need. DoRA does not scale a bias.
    ///
    /// `x` is `[.., in]`; a 4-bit base is dequantised to the type of `x`. What is not finite goes through as through any
    /// product. A token's bits depend on that token alone. For speed there is [`crate::cpu::fast`].
    ///
    /// # Errors
    /// [`Error::Argument`] when a shape does not fit, or `y` does not fit in memory.
    pub fn forward<'a>(
        &self,
        x: &Tensor,
        base: impl Into<Base<'a>>,
        bias: Option<&Tensor>,
    ) -> Result<Vec<f64>> {
        let (base, Update { outputs, inputs, fan_in_fan_out, .. }) = (base.into(), &self.update);
        let [rows, columns] = self.weight_shape();
        base.check_shape("base", [rows, columns])?;
        let Some(tokens) = x.shape().strip_suffix(&[*inputs]) else {
            return Err(Error::argument("x", format!("shape [.., {inputs}]"), format!("{:?}", x.shape())));
        };
        if let Some(bias) = bias {
            check_shape("bias", bias, &[*outputs])?;
        }

        let mut y = zeros("y", tokens.iter().product(), *outputs)?;
        let values = x.to_f64();
        let mut for_each_token = |f: &(dyn Fn(&[f64], &mut [f64]) + Sync)| {
            let tokens = y.par_chunks_mut((*outputs).max(1)).enumerate();
            tokens.for_each(|(i, y)| f(&values[i * inputs..(i + 1) * inputs], y));
        };
        for panel in panels(rows, self.update.panel_rows(1)) {
            let weight = read(base, x.dtype(), panel.clone(), columns);
            let weight = || panel.clone().zip(weight.chunks(columns.max(1)));
            match fan_in_fan_out {
                true => for_each_token(&|x, y| weight().for_each(|(k, w)| add(y, x[k], w))),
                false => for_each_token(&|x, y| weight().for_each(|(n, w)| y[n] = dot(x, w))),
            }
        }
        let bias = bias.map(Tensor::to_f64);
        for_each_token(&|x, y| self.adapt(x, bias.as_deref(), y));
        Ok(y)
    }

    /// Makes the output of the base weight that of the adapted one.
    fn adapt(&self, x: &[f64], bias: Option<&[f64]>, y: &mut [f64]) {
        let Update { outputs, inputs, a, b, .. } = &self.update;
        if let Some(row_scale) = &self.row_scale {
            y.iter_mut().zip(row_scale).for_each(|(y, scale)| *y *= scale);
        }
        for (a, b) in a.chunks((*inputs).max(1)).zip(b.chunks((*outputs).max(1))) {
            add(y, dot(x, a), b);
        }
        for bias in bias.into_iter().chain(self.bias.as_deref()) {
            add(y, 1.0, bias);
        }
    }

    /// Rows `ids` of the merged table `[in, out]`, in f64: what an embedding's forward pass looks up.
    ///
    /// # Errors
    /// [`Error::Argument`] when the table has another shape, is not stored `[in, out]`, or has no row for an id.
    pub fn lookup<'a>(&self, ids: &[usize], table: impl Into<Base<'a>>) -> Result<Vec<f64>> {
        let (table, Update { outputs, inputs, a, b, fan_in_fan_out, .. }) = (table.into(), &self.update);
        table.check_shape("table", self.weight_shape())?;
        if !fan_in_fan_out {
            return Err(Error::argument("adapters.fan_in_fan_out", "true for a table", false));
        }
        if let Some(i) = ids.iter().position(|id| id >= inputs) {
            return Err(Error::argument(format!("ids[{i}]"), format!("less than {inputs}"), ids[i]));
        }
        let mut rows = Vec::with_capacity(ids.len() * outputs);
        for &id in ids {
            let mut row = read(table, table.dtype(), id..id + 1, *outputs);
            if let Some(row_scale) = &self.row_scale {
                row.iter_mut().zip(row_scale).for_each(|(w, scale)| *w *= scale);
            }
            for (a, b) in a.chunks((*inputs).max(1)).zip(b.chunks((*outputs).max(1))) {
                add(&mut row, a[id], b);
            }
            rows.extend(row);
        }
        Ok(rows)
    }
}

/// `y += factor * x`.
fn add(y: &mut [f64], factor: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}
