use std::collections::BTreeMap;

use super::Gradient;
use crate::adapter::{AdaLora, Adapter};
use crate::cpu::{self, Importance, ImportanceMut};
use crate::formats::peft::{AdapterFile, Config, Method};
use crate::tensor::{DataMut, each_dtype};
use crate::{Error, Result, Tensor};

/// When AdaLoRA takes ranks away, and how it weighs them: PEFT's `AdaLoraConfig`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankSchedule {
    /// `init_r`: the rank that every module begins with.
    pub init_r: usize,
    /// `target_r`: the average rank that is left.
    pub target_r: usize,
    /// `tinit`: steps before the first rank goes.
    pub tinit: u64,
    /// `tfinal`: steps at the end in which the ranks stay.
    pub tfinal: u64,
    /// `deltaT`: steps from one allocation to the next.
    pub delta_t: u64,
    /// `total_step`: steps of the whole training.
    pub total_step: u64,
    /// `beta1`: how much of the smoothed sensitivity stays.
    pub beta1: f64,
    /// `beta2`: how much of the smoothed uncertainty stays.
    pub beta2: f64,
}

impl RankSchedule {
    /// That of an adapter's configuration.
    ///
    /// # Errors
    /// [`Error::Argument`] when it is not AdaLoRA's, a field is missing or no number, or as [`RankSchedule::check`].
    pub fn from_config(config: &Config) -> Result<Self> {
        if config.method == Method::Lora {
            return Err(Error::argument("config.peft_type", "ADALORA", "LORA"));
        }
        let field = |name: &str| {
            let value = config.other.get(name);
            value.ok_or_else(|| Error::argument(format!("config.{name}"), "a number", "none"))
        };
        let whole = |name: &str| {
            let value = field(name)?;
            value.as_u64().ok_or_else(|| Error::argument(format!("config.{name}"), "a whole number", value))
        };
        let number = |name: &str| {
            let value = field(name)?;
            value.as_f64().ok_or_else(|| Error::argument(format!("config.{name}"), "a number", value))
        };
        let schedule = Self {
            init_r: config.rank,
            target_r: whole("target_r")? as usize,
            tinit: whole("tinit")?,
            tfinal: whole("tfinal")?,
            delta_t: whole("deltaT")?,
            total_step: whole("total_step")?,
            beta1: number("beta1")?,
            beta2: number("beta2")?,
        };
        schedule.check()?;
        Ok(schedule)
    }

    /// Checks what PEFT checks, and that no interval is 0.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no step between `tinit` and the last `tfinal` ones, `target_r` is more than `init_r`,
    /// `delta_t` is 0, or a beta is not between 0 and 1.
    pub fn check(&self) -> Result<()> {
        let wrong = |name: &str, wanted: String, got: String| Err(Error::argument(name, wanted, got));
        if self.total_step.checked_sub(self.tfinal).is_none_or(|last| self.tinit >= last) {
            let got = format!("{} + {}", self.tinit, self.tfinal);
            return wrong("tinit + tfinal", format!("less than total_step = {}", self.total_step), got);
        }
        if self.target_r > self.init_r {
            return wrong("target_r", format!("at most init_r = {}", self.init_r), self.target_r.to_string());
        }
        if self.delta_t == 0 {
            return wrong("delta_t", "1 or more".into(), "0".into());
        }
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return wrong(name, "0 < beta < 1".into(), beta.to_string());
            }
        }
        Ok(())
    }

    /// How many ranks `modules` modules may have after step `step`, and whether they are allocated then (Zhang et al. 2023,
    /// arXiv:2303.10512, section 3.3): all until `tinit`; then fewer, by a cube; `target_r` each in the end.
    pub fn budget(&self, step: u64, modules: usize) -> (usize, bool) {
        let (first, last) = (self.init_r * modules, self.target_r * modules);
        let end = self.total_step - self.tfinal;
        if step <= self.tinit {
            (first, false)
        } else if step > end {
            (last, true)
        } else {
            let left = 1.0 - (step - self.tinit) as f64 / (end - self.tinit) as f64;
            let budget = (first - last) as f64 * left.powf(3.0) + last as f64;
            (budget as usize, step.is_multiple_of(self.delta_t))
        }
    }
}

/// AdaLoRA's `RankAllocator`, step by step as PEFT's `update_and_allocate`.
#[derive(Debug, Clone, PartialEq)]
pub struct RankAllocator {
    pub(super) schedule: RankSchedule,
    /// Sensitivity and uncertainty of `lora_A`, `lora_E`, `lora_B`, by module; `[rank, n, k]`.
    pub(super) modules: BTreeMap<String, ModuleImportance>,
    /// The last allocation.
    pub(super) kept: BTreeMap<String, Vec<bool>>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct ModuleImportance {
    pub shape: [usize; 3],
    pub parts: [Smoothed; 3],
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Smoothed {
    pub sensitivity: Vec<f32>,
    pub uncertainty: Vec<f32>,
}

/// The parameters of a module, in the order of [`ModuleImportance::parts`].
pub(super) const PARTS: [&str; 3] = ["lora_A", "lora_E", "lora_B"];

impl RankAllocator {
    /// For modules that all have the rank `init_r`.
    ///
    /// # Errors
    /// [`Error::Argument`] as [`RankSchedule::check`], and when an adapter is not AdaLoRA's or has another rank (a pruned one is
    /// trained without an allocator).
    pub fn new(schedule: RankSchedule, adapters: &BTreeMap<String, Adapter>) -> Result<Self> {
        schedule.check()?;
        let module = |(name, adapter): (&String, &Adapter)| {
            let adalora = adalora(name, adapter)?;
            if adapter.rank() != schedule.init_r {
                let wanted = format!("init_r = {}", schedule.init_r);
                return Err(Error::argument(format!("rank of {name}"), wanted, adapter.rank()));
            }
            let zeros = |t: &Tensor| Smoothed {
                sensitivity: vec![0.0; t.numel()],
                uncertainty: vec![0.0; t.numel()],
            };
            let parts = [adalora.lora_a(), adalora.lora_e(), adalora.lora_b()].map(zeros);
            let shape = [adapter.rank(), adapter.out_features(), adapter.in_features()];
            Ok((name.clone(), ModuleImportance { shape, parts }))
        };
        let modules = adapters.iter().map(module).collect::<Result<_>>()?;
        Ok(Self { schedule, modules, kept: BTreeMap::new() })
    }

    /// The schedule.
    pub fn schedule(&self) -> &RankSchedule {
        &self.schedule
    }

    /// [`RankSchedule::budget`] of these modules.
    pub fn budget(&self, step: u64) -> (usize, bool) {
        self.schedule.budget(step, self.modules.len())
    }

    /// Which ranks of each module the last allocation kept; empty before the first.
    pub fn kept(&self) -> &BTreeMap<String, Vec<bool>> {
        &self.kept
    }

    /// After the optimiser's step number `step` (which counts from 0, as PEFT's `global_step`), and before the gradients are
    /// cleared: smooths the importance of all parameters, and where the schedule says so sets `lora_E` of the least important
    /// triplets to 0, until the budget is kept. At step `total_step - tfinal` the last allocation is made, and from then on it is
    /// applied after every step.
    ///
    /// # Errors
    /// [`Error::Argument`] when an adapter or a gradient is missing, or of another shape. Nothing has changed then.
    pub fn step(
        &mut self,
        step: u64,
        adapters: &mut BTreeMap<String, Adapter>,
        gradients: &BTreeMap<String, Gradient>,
    ) -> Result<()> {
        self.check(adapters)?;
        let end = self.schedule.total_step - self.schedule.tfinal;
        if step < end {
            for module in self.modules.keys() {
                let gradient = gradients.get(module).ok_or_else(|| {
                    Error::argument(format!("gradients[{module:?}]"), "a gradient of every module", "none")
                })?;
                gradient.check(&adapters[module]).map_err(|error| error.within(module))?;
            }
            self.smooth(adapters, gradients)?;
        }
        let (budget, scheduled) = self.budget(step);
        let allocates = step == end || (step < end && scheduled);
        if allocates {
            self.kept = allocate(&self.scores()?, budget);
        }
        if step == end {
            let parts = self.modules.values_mut().flat_map(|module| &mut module.parts);
            parts.for_each(|part| {
                part.sensitivity.fill(0.0);
                part.uncertainty.fill(0.0);
            });
        }
        if allocates || step > end {
            self.mask(adapters);
        }
        Ok(())
    }

    /// One step of [`cpu::importance`] for every parameter.
    fn smooth(
        &mut self,
        adapters: &BTreeMap<String, Adapter>,
        gradients: &BTreeMap<String, Gradient>,
    ) -> Result<()> {
        let betas = [self.schedule.beta1, self.schedule.beta2];
        for (name, module) in &mut self.modules {
            let parameters = adapters[name].parameters();
            for (part, (parameter, tensor)) in module.parts.iter_mut().zip(parameters) {
                let gradient = gradients[name].get(parameter).expect("it has been checked");
                let smoothed =
                    ImportanceMut { sensitivity: &mut part.sensitivity, uncertainty: &mut part.uncertainty };
                each_dtype!(tensor.data(), v => cpu::importance(v, gradient, betas, smoothed))?;
            }
        }
        Ok(())
    }

    /// [`cpu::triplet_importance`] of every module.
    ///
    /// # Errors
    /// None that a caller could cause.
    pub fn scores(&self) -> Result<BTreeMap<String, Vec<f32>>> {
        let module = |(name, module): (&String, &ModuleImportance)| {
            let parts = module
                .parts
                .each_ref()
                .map(|part| Importance { sensitivity: &part.sensitivity, uncertainty: &part.uncertainty });
            let mut score = vec![0.0; module.shape[0]];
            cpu::triplet_importance(parts, module.shape, &mut score)?;
            Ok((name.clone(), score))
        };
        self.modules.iter().map(module).collect()
    }

    /// Sets `lora_E` to 0 where the last allocation did not keep the rank.
    fn mask(&self, adapters: &mut BTreeMap<String, Adapter>) {
        fn zero<T: crate::Element>(e: &mut [T], kept: &[bool]) {
            e.iter_mut().zip(kept).filter(|(_, kept)| !**kept).for_each(|(e, _)| *e = T::from_f32(0.0));
        }
        for (name, kept) in &self.kept {
            let parameters = adapters.get_mut(name).expect("it has been checked").parameters_mut();
            match parameters.into_iter().find(|(name, _)| *name == "lora_E") {
                Some((_, DataMut::F32(e))) => zero(e, kept),
                Some((_, DataMut::F16(e))) => zero(e, kept),
                Some((_, DataMut::BF16(e))) => zero(e, kept),
                None => {}
            }
        }
    }

    /// Drops the ranks that the last allocation did not keep from the adapters of `file`, and writes down in its configuration which
    /// ones they were (`rank_pattern`), as PEFT does on saving. Before the first allocation it does nothing.
    ///
    /// # Errors
    /// [`Error::Argument`] when an adapter is missing, or of another shape. Nothing has changed then.
    pub fn prune(&self, file: &mut AdapterFile) -> Result<()> {
        self.check(&file.adapters)?;
        let pruned = self.kept.iter().map(|(name, kept)| {
            let adalora = adalora(name, &file.adapters[name])?;
            let ranks: Vec<usize> = (0..kept.len()).filter(|r| kept[*r]).collect();
            let [rank, n, k] = self.modules[name].shape;
            let pick = |tensor: &Tensor, shape: [usize; 2], at: &dyn Fn(usize) -> usize| {
                let data = tensor.data().pick((0..shape[0] * shape[1]).map(at));
                Tensor::new(shape, data)
            };
            let lora_a = pick(adalora.lora_a(), [ranks.len(), k], &|i| ranks[i / k] * k + i % k)?;
            let lora_e = pick(adalora.lora_e(), [ranks.len(), 1], &|i| ranks[i])?;
            let columns = ranks.len().max(1);
            let lora_b =
                pick(adalora.lora_b(), [n, ranks.len()], &|i| i / columns * rank + ranks[i % columns])?;
            let pruned = AdaLora::new(lora_a, lora_e, lora_b, adalora.alpha(), adalora.init_r())?;
            Ok((name.clone(), Adapter::from(pruned.with_fan_in_fan_out(adalora.fan_in_fan_out()))))
        });
        let pruned: BTreeMap<String, Adapter> = pruned.collect::<Result<_>>()?;
        file.adapters.extend(pruned);
        file.config.method = Method::AdaLora { kept: self.kept.clone() };
        Ok(())
    }

    /// Checks that `adapters` are those of these modules.
    pub(super) fn check(&self, adapters: &BTreeMap<String, Adapter>) -> Result<()> {
        for (name, module) in &self.modules {
            let adapter = adapters.get(name).ok_or_else(|| {
                Error::argument(format!("adapters[{name:?}]"), "an adapter of every module", "none")
            })?;
            adalora(name, adapter)?;
            let shape = [adapter.rank(), adapter.out_features(), adapter.in_features()];
            if shape != module.shape {
                let argument = format!("[rank, out, in] of {name}");
                return Err(Error::argument(argument, format!("{:?}", module.shape), format!("{shape:?}")));
            }
        }
        Ok(())
    }
}

/// Which triplets are kept: those whose score is above the highest one that `budget` leaves out, over all modules. Equal scores go
/// together, as in PEFT.
pub fn allocate(scores: &BTreeMap<String, Vec<f32>>, budget: usize) -> BTreeMap<String, Vec<bool>> {
    let mut all: Vec<f32> = scores.values().flatten().copied().collect();
    all.sort_by(f32::total_cmp);
    let threshold = all.len().checked_sub(budget + 1).map(|last| all[last]);
    let keep = |score: &f32| threshold.is_none_or(|threshold| *score > threshold);
    scores.iter().map(|(name, score)| (name.clone(), score.iter().map(keep).collect())).collect()
}

fn adalora<'a>(name: &str, adapter: &'a Adapter) -> Result<&'a AdaLora> {
    match adapter {
        Adapter::AdaLora(adalora) => Ok(adalora),
        _ => Err(Error::argument(format!("adapters[{name:?}]"), "AdaLoRA", "another kind")),
    }
}
