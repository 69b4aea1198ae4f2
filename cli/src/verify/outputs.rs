//! Outputs of a layer against what the packages put out and against the f64 truth.

use anyhow::Result;
use lora_kernels::{DType, Tensor};

use super::bounds::{self, Factors};
use super::engine::{Engine, Slack};
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

/// An engine's outputs, `None` where it lacks the operation, and what they may be off by besides f32 sums.
pub struct Ours {
    /// The outputs.
    pub y: Option<Vec<f64>>,
    /// The type that they are rounded to.
    pub dtype: DType,
    /// From [`Engine::slack`].
    pub slack: Slack,
}

impl Ours {
    fn new(case: &mut Case, engine: &dyn Engine, layer: &Layer, x: &Tensor) -> Result<Self> {
        Ok(Self { y: layer.forward(case, engine, x)?, dtype: x.dtype(), slack: layer.slack(engine, x)? })
    }
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
    let (exact, ours) = (layer.truth(x), Ours::new(case, engine, layer, x)?);
    compare(case, &exact, &ours, packages, Source::Packages(layer.factors()))?;
    truth.map_or(Ok(()), |truth| compare(case, &exact, &ours, truth, Source::Truth))
}

/// Compares the engine's output for `x` with the stored truth, and that with the formula.
pub fn check_truth(
    case: &mut Case,
    engine: &dyn Engine,
    layer: &Layer,
    x: &Tensor,
    truth: &Stored,
) -> Result<()> {
    let ours = Ours::new(case, engine, layer, x)?;
    compare(case, &layer.truth(x), &ours, truth, Source::Truth)
}

/// Compares a stored output with the formula, and the engine's output with it.
pub fn compare(
    case: &mut Case,
    exact: &[Output],
    ours: &Ours,
    stored: &Stored,
    source: Source,
) -> Result<()> {
    let stored_bound = |t: &Output| match source {
        Source::Packages(factors) => bounds::forward_packages(ours.dtype, factors, t),
        Source::Truth => bounds::forward_stored(stored.unit_roundoff(), t),
    };
    let formula: Vec<f64> = exact.iter().map(|t| t.y).collect();
    let (name, theirs) = (stored.name(), stored.f64s()?);
    case.close(&format!("{name} (formula)"), &theirs, &formula, |i| stored_bound(&exact[i]));
    if let Some(y) = &ours.y {
        let bound = |t: &Output| bounds::forward(ours.dtype, ours.slack, t) + stored_bound(t);
        case.close(name, y, &theirs, |i| bound(&exact[i]));
    }
    Ok(())
}
