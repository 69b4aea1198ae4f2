//! `peft/*/adalora_trace`: how PEFT's `RankAllocator` shares out ranks in a run: budgets, smoothed importance, masks.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use lora_kernels::train::{RankSchedule, allocate};

use super::engine::Engine;
use super::report::Case;
use super::{Family, Pair};
use crate::tensors::{Sidecar, TensorFile};

/// Checks one trace.
pub fn check(family: &mut Family, pair: &Pair) {
    let Some(trace) = family.need(&pair.label, Trace::open(&pair.sidecar, &pair.tensors)) else { return };
    family.case(&pair.label, "budget", |case, _| trace.check_budget(case));
    family.case(&pair.label, "importance", |case, engine| trace.check_importance(case, engine));
    family.case(&pair.label, "mask", |case, _| trace.check_masks(case));
}

struct Trace<'a> {
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    schedule: RankSchedule,
    steps: Vec<Sidecar>,
    /// Modules of the masks.
    modules: BTreeSet<&'a str>,
}

impl<'a> Trace<'a> {
    fn open(sidecar: &'a Sidecar, tensors: &'a TensorFile) -> Result<Self> {
        let config = sidecar.object("config")?;
        let schedule = RankSchedule {
            init_r: config.size("init_r")?,
            target_r: config.size("target_r")?,
            tinit: config.size("tinit")? as u64,
            tfinal: config.size("tfinal")? as u64,
            delta_t: config.size("deltaT")? as u64,
            total_step: config.size("total_step")? as u64,
            beta1: config.number("beta1")?,
            beta2: config.number("beta2")?,
        };
        schedule.check()?;
        let module = |name: &'a str| {
            name.strip_prefix("mask.step")?.split_once('.')?.1.strip_suffix(".lora_E.importance")
        };
        let modules: BTreeSet<&str> = tensors.names().filter_map(module).collect();
        ensure!(!modules.is_empty(), "there is no `mask.step*.lora_E.importance`");
        Ok(Self { sidecar, tensors, schedule, steps: sidecar.list("trace")?, modules })
    }

    fn check_budget(&self, case: &mut Case) -> Result<()> {
        let count = self.modules.len();
        case.equal("init_budget", self.schedule.init_r * count, self.sidecar.size("init_budget")?);
        case.equal("target_budget", self.schedule.target_r * count, self.sidecar.size("target_budget")?);
        for step in &self.steps {
            let number = step.size("step")?;
            let ours = self.schedule.budget(number as u64, count);
            case.equal(&format!("step {number}"), ours, (step.size("budget")?, step.flag("mask_ind")?));
        }
        Ok(())
    }

    /// Every update that was recorded, to the bit.
    fn check_importance(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let recorded = self.tensors.names().filter_map(|name| name.strip_suffix(".exp_avg_ipt_after"));
        let recorded: BTreeSet<&str> = recorded.collect();
        let (mut ours, mut theirs) = (Vec::<f32>::new(), Vec::<f32>::new());
        for name in recorded {
            let get = |what: &str| self.tensors.get(&format!("{name}.{what}"))?.f32s();
            let parameter = get("param")?;
            let before = |what: &str| match self.tensors.has(&format!("{name}.{what}")) {
                true => get(what),
                false => Ok(vec![0.0; parameter.len()]),
            };
            let state = [before("exp_avg_ipt_before")?, before("exp_avg_unc_before")?];
            let betas = [self.schedule.beta1, self.schedule.beta2];
            let after = engine.importance(&parameter, &get("grad")?, betas, [&state[0], &state[1]]);
            let Some(after) = case.offered(after)? else { return Ok(()) };
            ours.extend(after.concat());
            theirs.extend([get("exp_avg_ipt_after")?, get("exp_avg_unc_after")?].concat());
        }
        ensure!(!theirs.is_empty(), "there is no `*.exp_avg_ipt_after`");
        case.bits("exp_avg_ipt exp_avg_unc", 4, bytemuck::cast_slice(&ours), bytemuck::cast_slice(&theirs));
        Ok(())
    }

    /// PEFT's masks from its scores and our threshold; the last allocation is the pattern that was saved.
    fn check_masks(&self, case: &mut Case) -> Result<()> {
        let mut kept: BTreeMap<String, Vec<bool>> = BTreeMap::new();
        for step in &self.steps {
            let number = step.size("step")?;
            let get = |module: &str, what: &str| {
                self.tensors
                    .find(&format!("mask.step{number}.{module}.lora_E.{what}"))?
                    .map(|t| t.f32s())
                    .transpose()
            };
            let scores = self.modules.iter().map(|module| Ok((*module, get(module, "importance")?)));
            let scores = scores.collect::<Result<BTreeMap<_, _>>>()?;
            if scores.values().all(Option::is_some) {
                let scores =
                    scores.into_iter().filter_map(|(module, score)| Some((module.to_owned(), score?)));
                let (budget, _) = self.schedule.budget(number as u64, self.modules.len());
                kept = allocate(&scores.collect(), budget);
                let count = kept.values().flatten().filter(|kept| **kept).count();
                case.equal(&format!("step {number}: ranks"), count, step.size("kept_total")?);
            }
            let (mut ours, mut theirs) = (Vec::<f32>::new(), Vec::<f32>::new());
            for module in &self.modules {
                let stored = get(module, "before")?.zip(get(module, "after")?);
                let Some((before, after)) = stored else { continue };
                let kept = kept.get(*module).with_context(|| format!("step {number}: no allocation yet"))?;
                ours.extend(before.iter().zip(kept).map(|(e, kept)| if *kept { *e } else { 0.0 }));
                theirs.extend(after);
            }
            if !theirs.is_empty() {
                let (ours, theirs) = (bytemuck::cast_slice(&ours), bytemuck::cast_slice(&theirs));
                case.bits(&format!("step {number}: lora_E"), 4, ours, theirs);
            }
        }
        let pattern = self.sidecar.object("rank_pattern")?;
        for module in &self.modules {
            let stored = pattern.flags(&format!("{module}.lora_E.default"))?;
            case.equal(&format!("rank_pattern: {module}"), kept.get(*module), Some(&stored));
        }
        Ok(())
    }
}
