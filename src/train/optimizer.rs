use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::cpu::{self, AdamW, MOMENT_BLOCKSIZE, MomentsMut};
use crate::nf4::{DYNAMIC_MAP, block_count, check_len};
use crate::tensor::DataMut;
use crate::{Element, Error, Result};

/// Elements of a task.
const TASK: usize = 64 * MOMENT_BLOCKSIZE;

/// AdamW over any number of named tensors, each with moments and a count of steps of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer {
    pub(super) adamw: AdamW,
    pub(super) moment_type: MomentType,
    pub(super) slots: BTreeMap<String, Slot>,
}

/// How new moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MomentType {
    /// In f32: 8 bytes per element.
    F32,
    /// In blocks of 8 bits, as bitsandbytes' 8-bit optimisers keep them: 2.03 bytes per element.
    Blockwise,
}

/// What is kept for one tensor.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slot {
    pub shape: Vec<usize>,
    pub steps: u64,
    pub moments: Moments,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Moments {
    F32 { m: Vec<f32>, v: Vec<f32> },
    Blockwise { m: Vec<u8>, m_absmax: Vec<f32>, v: Vec<u8>, v_absmax: Vec<f32> },
}

/// A tensor that is trained.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// What its moments are found by, and errors call it.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: DataMut<'a>,
    /// Its gradient, as long.
    pub gradient: &'a [f32],
}

/// What to do with gradients that are not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotFinite {
    /// The step is an error that names the tensor.
    Refuse,
    /// The step is left out, and its report names the tensor: what scaling of losses in f16 needs.
    Skip,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The norm of all gradients together, before clipping.
    pub norm: f32,
    /// What they were multiplied by.
    pub scale: f32,
    /// The tensor with a gradient that is not finite, if the step was left out for it.
    pub skipped: Option<String>,
}

impl Optimizer {
    /// Without moments: each tensor's begin at zero with its first step.
    pub fn new(adamw: AdamW, moment_type: MomentType) -> Self {
        Self { adamw, moment_type, slots: BTreeMap::new() }
    }

    /// The hyper-parameters, which may change between steps.
    pub fn adamw_mut(&mut self) -> &mut AdamW {
        &mut self.adamw
    }

    /// How many steps a tensor has taken; 0 for one that is not known.
    pub fn steps(&self, name: &str) -> u64 {
        self.slots.get(name).map_or(0, |slot| slot.steps)
    }

    /// One step of all `parameters` ([`cpu::adamw`]). With `max_norm` their gradients are clipped together, as
    /// `torch.nn.utils.clip_grad_norm_` does. Tensors that are not in the list stay as they are, with their moments and counts:
    /// adapters without tokens in a batch.
    ///
    /// # Errors
    /// [`Error::Argument`], naming the tensor, for a gradient or moments of another shape, a name that comes twice, a number that
    /// AdamW does not take, and with [`NotFinite::Refuse`] a gradient that is not finite. Nothing has changed then.
    pub fn step(
        &mut self,
        parameters: Vec<Parameter<'_>>,
        learning_rate: f64,
        max_norm: Option<f32>,
        not_finite: NotFinite,
    ) -> Result<StepReport> {
        let mut steps = BTreeMap::new();
        for parameter in &parameters {
            parameter.check()?;
            let count = match self.slots.get(&parameter.name) {
                Some(slot) if slot.shape != parameter.shape => {
                    let wanted = format!("shape {:?}, that of its moments", slot.shape);
                    return Err(Error::argument(&parameter.name, wanted, format!("{:?}", parameter.shape)));
                }
                slot => slot.map_or(1, |slot| slot.steps + 1),
            };
            let factors = self.adamw.step(learning_rate, count)?;
            if steps.insert(parameter.name.clone(), factors).is_some() {
                return Err(Error::argument(&parameter.name, "one parameter of this name", "two"));
            }
        }
        if let Some(max_norm) = max_norm
            && (max_norm.is_nan() || max_norm <= 0.0)
        {
            return Err(Error::argument("max_norm", "a number above 0", max_norm));
        }
        let gradients: Vec<&[f32]> = parameters.iter().map(|parameter| parameter.gradient).collect();
        let norm = cpu::gradient_norm(&gradients);
        if let Some(i) = norm.not_finite() {
            let (name, gradient) = (parameters[i].name.clone(), parameters[i].gradient);
            return match not_finite {
                NotFinite::Skip => Ok(StepReport { norm: norm.norm, scale: 0.0, skipped: Some(name) }),
                NotFinite::Refuse => {
                    let at = gradient.iter().position(|g| !g.is_finite()).unwrap_or(0);
                    let got = format!("{} at {at}", gradient[at]);
                    Err(Error::argument(format!("gradient of {name}"), "finite numbers", got))
                }
            };
        }
        let scale = max_norm.map_or(1.0, |max_norm| norm.clip(max_norm));

        for parameter in &parameters {
            let new = || Slot::zeros(parameter.shape.clone(), parameter.gradient.len(), self.moment_type);
            self.slots.entry(parameter.name.clone()).or_insert_with(new).steps += 1;
        }
        let mut slots: BTreeMap<&String, &mut Slot> = self.slots.iter_mut().collect();
        let mut tasks = Vec::new();
        for parameter in parameters {
            let slot = slots.remove(&parameter.name).expect("it was made above");
            let pieces = slot.moments.pieces().into_iter().zip(parameter.gradient.chunks(TASK));
            let values = chunks(parameter.values);
            let factors = steps[&parameter.name];
            tasks.extend(
                pieces.zip(values).map(|((moments, gradient), values)| (factors, values, gradient, moments)),
            );
        }
        tasks.into_par_iter().try_for_each(|(factors, values, gradient, moments)| match values {
            DataMut::F32(values) => cpu::adamw(&factors, scale, values, gradient, moments),
            DataMut::F16(values) => cpu::adamw(&factors, scale, values, gradient, moments),
            DataMut::BF16(values) => cpu::adamw(&factors, scale, values, gradient, moments),
        })?;
        Ok(StepReport { norm: norm.norm, scale, skipped: None })
    }
}

/// The elements of each task.
fn chunks(values: DataMut<'_>) -> Vec<DataMut<'_>> {
    fn split<'a, T: Element>(values: &'a mut [T], wrap: fn(&'a mut [T]) -> DataMut<'a>) -> Vec<DataMut<'a>> {
        values.chunks_mut(TASK).map(wrap).collect()
    }
    match values {
        DataMut::F32(values) => split(values, DataMut::F32),
        DataMut::F16(values) => split(values, DataMut::F16),
        DataMut::BF16(values) => split(values, DataMut::BF16),
    }
}

impl Parameter<'_> {
    fn check(&self) -> Result<()> {
        let count = match &self.values {
            DataMut::F32(values) => values.len(),
            DataMut::F16(values) => values.len(),
            DataMut::BF16(values) => values.len(),
        };
        if crate::tensor::numel(&self.shape) != Some(count) {
            return Err(Error::argument(&self.name, format!("elements of shape {:?}", self.shape), count));
        }
        check_len(&format!("gradient of {}", self.name), count, "elements", self.gradient.len())
    }
}

impl Slot {
    fn zeros(shape: Vec<usize>, count: usize, moment_type: MomentType) -> Self {
        let blocks = block_count(count, MOMENT_BLOCKSIZE);
        let zero = DYNAMIC_MAP.iter().position(|value| *value == 0.0).expect("it is in the map") as u8;
        let moments = match moment_type {
            MomentType::F32 => Moments::F32 { m: vec![0.0; count], v: vec![0.0; count] },
            MomentType::Blockwise => Moments::Blockwise {
                m: vec![zero; count],
                m_absmax: vec![0.0; blocks],
                v: vec![0; count],
                v_absmax: vec![0.0; blocks],
            },
        };
        Self { shape, steps: 0, moments }
    }
}

impl Moments {
    /// Those of each task.
    fn pieces(&mut self) -> Vec<MomentsMut<'_>> {
        match self {
            Self::F32 { m, v } => {
                let pieces = m.chunks_mut(TASK).zip(v.chunks_mut(TASK));
                pieces.map(|(m, v)| MomentsMut::F32 { m, v }).collect()
            }
            Self::Blockwise { m, m_absmax, v, v_absmax } => {
                const BLOCKS: usize = TASK / MOMENT_BLOCKSIZE;
                let codes = m.chunks_mut(TASK).zip(v.chunks_mut(TASK));
                let scales = m_absmax.chunks_mut(BLOCKS).zip(v_absmax.chunks_mut(BLOCKS));
                let piece =
                    |((m, v), (m_absmax, v_absmax))| MomentsMut::Blockwise { m, m_absmax, v, v_absmax };
                codes.zip(scales).map(piece).collect()
            }
        }
    }
}
