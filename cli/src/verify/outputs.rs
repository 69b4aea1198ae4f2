//! Outputs of a layer against what the packages put out and against the f64 truth.

use anyhow::Result;
use lora_kernels::{DType, Tensor};

use super::bounds::{self, Factors};
use super::engine::Engine;
use super::layer::Layer;
use super::report::Case;
use super::truth::Output;
use crate::tensors::Stored;

/// Who put out what is stored.
#[derive(Clone, Copy)]
pub enum Source {
    /// PEFT or bitsandbytes, in the type of the inputs.
    Packages(Factors),
    /// The formula in f64, rounded to the type that it is stored in.
    Truth,
}

/// Compares the engine's output for `x` with the stored output of the packages in the same type, and with the stored truth
/// where there is one. Both are also compared with the formula.
pub fn check(
    case: &mut Case,
    engine: &dyn Engine,
    layer: &Layer,
    x: &Tensor,
    packages: &Stored,
    truth: Option<&Stored>,
) -> Result<()> {
    let (exact, ours) = (layer.truth(x), layer.forward(case, engine, x)?);
    compare(case, x.dtype(), &exact, ours.as_deref(), packages, Source::Packages(layer.factors()))?;
    match truth {
        Some(truth) => compare(case, x.dtype(), &exact, ours.as_deref(), truth, Source::Truth),
        None => Ok(()),
    }
}

/// Compares the engine's output for `x` with the stored truth, and that with the formula.
pub fn check_truth(
    case: &mut Case,
    engine: &dyn Engine,
    layer: &Layer,
    x: &Tensor,
    truth: &Stored,
) -> Result<()> {
    let ours = layer.forward(case, engine, x)?;
    compare(case, x.dtype(), &layer.truth(x), ours.as_deref(), truth, Source::Truth)
}

/// Compares a stored output with the formula, and the engine's output in `dtype` with it.
pub fn compare(
    case: &mut Case,
    dtype: DType,
    exact: &[Output],
    ours: Option<&[f64]>,
    stored: &Stored,
    source: Source,
) -> Result<()> {
    let stored_bound = |t: &Output| match source {
        Source::Packages(factors) => bounds::forward_packages(dtype, factors, t),
        Source::Truth => bounds::forward_stored(stored.unit_roundoff(), t),
    };
    let formula: Vec<f64> = exact.iter().map(|t| t.y).collect();
    let (name, theirs) = (stored.name(), stored.f64s()?);
    case.close(&format!("{name} (formula)"), &theirs, &formula, |i| stored_bound(&exact[i]));
    if let Some(ours) = ours {
        case.close(name, ours, &theirs, |i| bounds::forward(dtype, &exact[i]) + stored_bound(&exact[i]));
    }
    Ok(())
}
