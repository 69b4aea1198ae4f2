use std::collections::BTreeMap;

use super::Parameter;
use crate::adapter::Adapter;
use crate::cpu::{self, Vectors};
use crate::tensor::each_dtype;
use crate::{Error, Result};

/// The gradients of one adapter's parameters, in f32, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradient {
    parts: Vec<(&'static str, Vec<f32>)>,
}

impl Gradient {
    /// Zeros, to which batches are added.
    pub fn zeros(adapter: &Adapter) -> Self {
        let zeros = |(name, tensor): (_, &crate::Tensor)| (name, vec![0.0; tensor.numel()]);
        Self { parts: adapter.parameters().into_iter().map(zeros).collect() }
    }

    /// That of one parameter, by its name in [`Adapter::parameters`].
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.parts.iter().find(|(n, _)| *n == name).map(|(_, values)| values.as_slice())
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        self.parts.iter_mut().find(|(n, _)| *n == name).map(|(_, values)| values.as_mut_slice())
    }

    /// Names and gradients, in the order of [`Adapter::parameters`].
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &[f32])> {
        self.parts.iter().map(|(name, values)| (*name, values.as_slice()))
    }

    /// Begins anew.
    pub fn clear(&mut self) {
        self.parts.iter_mut().for_each(|(_, values)| values.fill(0.0));
    }

    /// Checks that these are the gradients of `adapter`.
    pub(super) fn check(&self, adapter: &Adapter) -> Result<()> {
        let parameters = adapter.parameters();
        let fits = self.parts.len() == parameters.len()
            && self.parts.iter().zip(&parameters).all(|(g, p)| g.0 == p.0 && g.1.len() == p.1.numel());
        if fits {
            return Ok(());
        }
        let wanted: Vec<_> = parameters.iter().map(|(name, p)| (*name, p.numel())).collect();
        let got: Vec<_> = self.parts.iter().map(|(name, p)| (*name, p.len())).collect();
        Err(Error::argument("gradient", format!("{wanted:?} elements"), format!("{got:?}")))
    }

    /// Adds `values` to a part that exists.
    pub(super) fn add(&mut self, name: &str, values: &[f32]) {
        let part = self.get_mut(name).expect("it has been checked");
        part.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
}

/// The parameters of all modules that have a gradient, for [`super::Optimizer::step`]: named `module.lora_A` and so on.
///
/// # Errors
/// [`Error::Argument`] when a gradient's module does not exist, or is not that of its adapter.
pub fn parameters<'a>(
    adapters: &'a mut BTreeMap<String, Adapter>,
    gradients: &'a BTreeMap<String, Gradient>,
) -> Result<Vec<Parameter<'a>>> {
    if let Some(module) = gradients.keys().find(|module| !adapters.contains_key(*module)) {
        return Err(Error::argument(format!("gradients[{module:?}]"), "a module with an adapter", "none"));
    }
    let mut list = Vec::new();
    for (module, adapter) in adapters {
        let Some(gradient) = gradients.get(module) else { continue };
        gradient.check(adapter).map_err(|error| error.within(module))?;
        let shapes: Vec<_> = adapter.parameters().iter().map(|(_, tensor)| tensor.shape().to_vec()).collect();
        let parts = adapter.parameters_mut().into_iter().zip(&gradient.parts).zip(shapes);
        list.extend(parts.map(|(((name, values), (_, gradient)), shape)| Parameter {
            name: format!("{module}.{name}"),
            shape,
            values,
            gradient,
        }));
    }
    Ok(list)
}

/// AdaLoRA's orthogonal regularisation of all modules that have a gradient: `weight` (PEFT's `orth_reg_weight`) times the mean of
/// `||A Aᵀ - I||_F` and `||Bᵀ B - I||_F` over all their factors. Its gradient is added to `gradients`; the loss gains what is
/// returned.
///
/// # Errors
/// [`Error::Argument`] when a gradient has no adapter, or is not that of its adapter.
pub fn orthogonality(
    adapters: &BTreeMap<String, Adapter>,
    gradients: &mut BTreeMap<String, Gradient>,
    weight: f64,
) -> Result<f64> {
    for (module, gradient) in &*gradients {
        let adapter = adapters.get(module).ok_or_else(|| {
            Error::argument(format!("gradients[{module:?}]"), "a module with an adapter", "none")
        })?;
        gradient.check(adapter).map_err(|error| error.within(module))?;
    }
    let share = weight / (2 * gradients.len().max(1)) as f64;
    let mut penalty = 0.0;
    for (module, gradient) in gradients {
        let (a, b) = (adapters[module].lora_a(), adapters[module].lora_b());
        for (name, factor, vectors) in [("lora_A", a, Vectors::Rows), ("lora_B", b, Vectors::Columns)] {
            let Some(sum) = gradient.get_mut(name) else { continue };
            let shape = [factor.shape()[0], factor.shape()[1]];
            let norm =
                each_dtype!(factor.data(), v => cpu::orthogonality(v, shape, vectors, share as f32, sum));
            penalty += share * norm?;
        }
    }
    Ok(penalty)
}
