//! AdaLoRA's allocation of ranks against the trace of a run of PEFT: importance bit for bit, budgets, masks, and the ranks in the
//! end; then pruning, and everything that does not fit.

mod fixtures;

use std::collections::BTreeMap;

use fixtures::Fixture;
use lora_kernels::adapter::{AdaLora, Adapter, Lora};
use lora_kernels::cpu::{self, Importance, ImportanceMut};
use lora_kernels::formats::peft::{self, Method};
use lora_kernels::train::{Gradient, RankAllocator, RankSchedule};
use lora_kernels::{DType, Error, Tensor};

const TRACE: &str = "peft/llama/adalora_trace";

fn schedule(file: &Fixture) -> RankSchedule {
    let number = |key: &str| file.json["config"][key].as_f64().unwrap();
    RankSchedule {
        init_r: number("init_r") as usize,
        target_r: number("target_r") as usize,
        tinit: number("tinit") as u64,
        tfinal: number("tfinal") as u64,
        delta_t: number("deltaT") as u64,
        total_step: number("total_step") as u64,
        beta1: number("beta1"),
        beta2: number("beta2"),
    }
}

/// Names of the modules of the trace; parameters of the first layer were recorded.
fn modules(layers: &[usize]) -> Vec<String> {
    let names = ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"];
    layers.iter().flat_map(|layer| names.map(|name| format!("model.layers.{layer}.{name}"))).collect()
}

#[test]
fn budgets() {
    let file = Fixture::open(TRACE);
    let (schedule, steps) = (schedule(&file), file.json["trace"].as_array().unwrap());
    assert_eq!(steps.len(), 14);
    for step in steps {
        let wanted = (step["budget"].as_u64().unwrap() as usize, step["mask_ind"].as_bool().unwrap());
        assert_eq!(schedule.budget(step["step"].as_u64().unwrap(), 6), wanted, "{step}");
    }
}

/// Sensitivity and uncertainty of every recorded parameter, from nothing and from what was recorded before, to the bit.
#[test]
fn importance() {
    let file = Fixture::open(TRACE);
    let betas = [schedule(&file).beta1, schedule(&file).beta2];
    let mut checked = 0;
    for (step, module) in
        [0, 5].into_iter().flat_map(|step| modules(&[0]).into_iter().map(move |m| (step, m)))
    {
        for part in ["lora_A", "lora_E", "lora_B"] {
            let values = |what: &str| file.get::<f32>(&format!("step{step}.{module}.{part}.{what}"));
            let parameter = values("param");
            let before = |what: &str| if step == 0 { vec![0.0; parameter.len()] } else { values(what) };
            let (mut sensitivity, mut uncertainty) =
                (before("exp_avg_ipt_before"), before("exp_avg_unc_before"));
            let smoothed = ImportanceMut { sensitivity: &mut sensitivity, uncertainty: &mut uncertainty };
            cpu::importance(&parameter, &values("grad"), betas, smoothed).unwrap();
            assert_eq!(sensitivity, values("exp_avg_ipt_after"), "{module} {part} {step}");
            assert_eq!(uncertainty, values("exp_avg_unc_after"), "{module} {part} {step}");
            checked += 1;
        }
    }
    assert_eq!(checked, 18);
}

/// The score of a triplet: that of its value, and the means of its vectors'.
#[test]
fn scores() {
    let (rank, n, k) = (3, 4, 5);
    let values = |count: usize, seed: usize| -> Vec<f32> {
        (0..count).map(|i| ((i + seed) * 7 % 11) as f32 / 8.0).collect()
    };
    let parts = [(rank * k, 1), (rank, 2), (n * rank, 3)]
        .map(|(count, seed)| (values(count, seed), values(count, seed + 5)));
    let importance = parts.each_ref().map(|(s, u)| Importance { sensitivity: s, uncertainty: u });
    let mut score = [f32::NAN; 3];
    cpu::triplet_importance(importance, [rank, n, k], &mut score).unwrap();
    let at = |part: usize, i: usize| f64::from(parts[part].0[i]) * f64::from(parts[part].1[i]);
    for (r, score) in score.into_iter().enumerate() {
        let a = (0..k).map(|k_| at(0, r * k + k_)).sum::<f64>() / k as f64;
        let b = (0..n).map(|n_| at(2, n_ * rank + r)).sum::<f64>() / n as f64;
        let wanted = at(1, r) + a + b;
        // Products are exact here; each mean is rounded, and both sums.
        assert!(
            (f64::from(score) - wanted).abs() <= 4.0 * DType::F32.unit_roundoff() * wanted,
            "{score} {wanted}"
        );
    }
    cpu::triplet_importance([Importance { sensitivity: &[], uncertainty: &[] }; 3], [0, n, k], &mut [])
        .unwrap();
    let short = Importance { sensitivity: &parts[0].0[1..], uncertainty: &parts[0].1[1..] };
    let wrong = cpu::triplet_importance([short, importance[1], importance[2]], [rank, n, k], &mut [0.0; 3]);
    assert!(matches!(wrong, Err(Error::Argument { argument, .. }) if argument == "lora_a.sensitivity"));
}

/// Adapters of the layers of the trace, with the parameters of `step` where they were recorded.
fn adapters(file: &Fixture, step: usize, modules: &[String]) -> BTreeMap<String, Adapter> {
    let module = |name: &String| {
        let part = |part: &str| file.tensor(&format!("step{step}.{name}.{part}.param"));
        let adalora = AdaLora::new(part("lora_A"), part("lora_E"), part("lora_B"), 32.0, 12).unwrap();
        (name.clone(), Adapter::from(adalora))
    };
    modules.iter().map(module).collect()
}

fn gradients(
    file: &Fixture,
    step: usize,
    adapters: &BTreeMap<String, Adapter>,
) -> BTreeMap<String, Gradient> {
    let module = |(name, adapter): (&String, &Adapter)| {
        let mut gradient = Gradient::zeros(adapter);
        for part in ["lora_A", "lora_E", "lora_B"] {
            let values: Vec<f32> = file.get(&format!("step{step}.{name}.{part}.grad"));
            gradient.get_mut(part).unwrap().copy_from_slice(&values);
        }
        (name.clone(), gradient)
    };
    adapters.iter().map(module).collect()
}

/// What the allocator does to three modules over the whole run is what the formulas say: with the budget of three modules, the
/// threshold is the score of that rank from below, and `lora_E` is 0 at and below it.
#[test]
fn the_whole_run() {
    let file = Fixture::open(TRACE);
    let modules = modules(&[0]);
    let mut allocator: Option<RankAllocator> = None;
    for step in 0..14 {
        let recorded = if step < 5 { 0 } else { 5 }; // the steps whose parameters were recorded
        let mut adapters = adapters(&file, recorded, &modules);
        let gradients = gradients(&file, recorded, &adapters);
        let allocator =
            allocator.get_or_insert_with(|| RankAllocator::new(schedule(&file), &adapters).unwrap());
        let before = adapters.clone();
        let kept_before = allocator.kept().clone();
        allocator.step(step as u64, &mut adapters, &gradients).unwrap();

        let (budget, allocates) = allocator.budget(step as u64);
        if (allocates && step < 11) || step == 11 {
            let kept: usize = allocator.kept().values().flatten().filter(|kept| **kept).count();
            assert_eq!(kept, budget, "step {step}");
            if step < 11 {
                let scores = allocator.scores().unwrap();
                let score = |keeps: bool| {
                    let pairs = scores.iter().flat_map(|(name, s)| s.iter().zip(&allocator.kept()[name]));
                    pairs.filter(move |(_, kept)| **kept == keeps).map(|(score, _)| *score)
                };
                assert!(score(true).fold(f32::INFINITY, f32::min) > score(false).fold(0.0, f32::max));
            } else {
                assert!(allocator.scores().unwrap().values().flatten().all(|score| *score == 0.0));
            }
        } else {
            assert_eq!(*allocator.kept(), kept_before, "step {step}");
        }
        for module in &modules {
            let e = |adapters: &BTreeMap<String, Adapter>| match &adapters[module] {
                Adapter::AdaLora(adalora) => adalora.lora_e().to_f32(),
                _ => unreachable!(),
            };
            let masks = step >= 11 || (allocates && step <= 11);
            let wanted: Vec<f32> = e(&before)
                .into_iter()
                .enumerate()
                .map(|(r, e)| if !masks || allocator.kept()[module][r] { e } else { 0.0 })
                .collect();
            assert_eq!(e(&adapters), wanted, "{module} step {step}");
        }
    }
}

/// A training with PEFT (`tests/peers/adalora.py`), step by step: its scores, but for the order of sums, and its ranks, of which
/// one module has none in the end.
#[test]
fn as_peft() {
    let file = Fixture::open("../peers/adalora");
    let (beta1, beta2) = (0.85, 0.85);
    let schedule = RankSchedule {
        init_r: 5,
        target_r: 2,
        tinit: 2,
        tfinal: 4,
        delta_t: 3,
        total_step: 16,
        beta1,
        beta2,
    };
    let modules = ["up", "down"].map(str::to_owned);
    let mut allocator: Option<RankAllocator> = None;
    for step in 0..16 {
        let mut adapters = adapters(&file, step, &modules);
        let gradients = gradients(&file, step, &adapters);
        let allocator = allocator.get_or_insert_with(|| RankAllocator::new(schedule, &adapters).unwrap());
        allocator.step(step as u64, &mut adapters, &gradients).unwrap();
        for module in &modules {
            let Adapter::AdaLora(adalora) = &adapters[module] else { unreachable!() };
            let masked = file.get::<f32>(&format!("step{step}.{module}.masked"));
            assert_eq!(adalora.lora_e().to_f32(), masked, "{module} step {step}");
            // With the last allocation, at step 12, the scores are forgotten.
            let name = format!("step{step}.{module}.score");
            if step < 12 && file.has(&name) {
                let ours = &allocator.scores().unwrap()[module];
                // Products, means of at most 11 of them, and two sums.
                for (ours, theirs) in ours.iter().zip(file.get::<f32>(&name)) {
                    assert!((ours - theirs).abs() <= 16.0 * f32::EPSILON * theirs, "{name}: {ours} {theirs}");
                }
            }
        }
    }
    let kept = |module: &str| allocator.as_ref().unwrap().kept()[module].iter().filter(|kept| **kept).count();
    assert_eq!([kept("up"), kept("down")], [0, 4]);
}

/// PEFT's masks from PEFT's scores, over all six modules: the threshold, and the pattern in the end.
#[test]
fn masks() {
    let file = Fixture::open(TRACE);
    let (schedule, modules) = (schedule(&file), modules(&[0, 1]));
    let mut pattern: BTreeMap<String, Vec<bool>> = BTreeMap::new();
    for step in 4..14 {
        let key = |module: &str, what: &str| format!("mask.step{step}.{module}.lora_E.{what}");
        if file.has(&key(&modules[0], "importance")) {
            let scores: BTreeMap<String, Vec<f32>> =
                modules.iter().map(|m| (m.clone(), file.get(&key(m, "importance")))).collect();
            pattern = lora_kernels::train::allocate(&scores, schedule.budget(step, 6).0);
        }
        if file.has(&key(&modules[0], "after")) {
            for module in &modules {
                let (before, after) =
                    (file.get::<f32>(&key(module, "before")), file.get::<f32>(&key(module, "after")));
                let masked: Vec<f32> = before
                    .iter()
                    .zip(&pattern[module])
                    .map(|(e, kept)| if *kept { *e } else { 0.0 })
                    .collect();
                assert_eq!(masked, after, "{module} step {step}");
            }
        }
    }
    for module in &modules {
        let wanted = file.json["rank_pattern"][format!("{module}.lora_E.default")].as_array().unwrap();
        let wanted: Vec<bool> = wanted.iter().map(|kept| kept.as_bool().unwrap()).collect();
        assert_eq!(pattern[module], wanted, "{module}");
    }
}

/// The adapter that PEFT saved with its ranks masked becomes the one that it saved pruned; a module may end with rank 0.
#[test]
fn pruning() {
    let mut file = peft::load(fixtures::path("peft/llama/adalora_masked")).unwrap();
    let pruned = peft::load(fixtures::path("peft/llama/adalora_pruned")).unwrap();
    let Method::AdaLora { kept } = &pruned.config.method else { panic!("AdaLoRA") };
    let schedule = RankSchedule::from_config(&file.config).unwrap();
    assert_eq!((schedule.init_r, schedule.total_step), (12, 14));
    let mut allocator = RankAllocator::new(schedule, &file.adapters).unwrap();
    let untouched = file.clone();
    allocator.prune(&mut file).unwrap();
    assert_eq!(file.adapters, untouched.adapters, "nothing has been allocated");

    // Gradients of 1 where a rank was kept and 0 elsewhere lead to that very allocation.
    let gradients: BTreeMap<String, Gradient> = file
        .adapters
        .iter()
        .map(|(name, adapter)| {
            let mut gradient = Gradient::zeros(adapter);
            let flags = kept[name].iter().map(|kept| f32::from(u8::from(*kept)));
            gradient.get_mut("lora_E").unwrap().iter_mut().zip(flags).for_each(|(g, flag)| *g = flag);
            (name.clone(), gradient)
        })
        .collect();
    let mut adapters = file.adapters.clone();
    allocator.step(10, &mut adapters, &gradients).unwrap();
    assert_eq!(allocator.kept(), kept);
    allocator.prune(&mut file).unwrap();
    assert_eq!(file.adapters, pruned.adapters);
    assert!(file.adapters.values().any(|adapter| adapter.rank() == 0));
    assert_eq!(file.config.method, pruned.config.method);
    file.to_bytes().unwrap();
}

#[test]
fn what_does_not_fit() {
    fn refused<R: std::fmt::Debug>(argument: &str, result: Result<R, Error>) {
        let Err(Error::Argument { argument: got, .. }) = result else { panic!("{argument}: {result:?}") };
        assert_eq!(got, argument);
    }
    let file = Fixture::open(TRACE);
    let schedule = schedule(&file);
    refused("tinit + tfinal", RankSchedule { tinit: 11, ..schedule }.check());
    refused("tinit + tfinal", RankSchedule { tfinal: 15, ..schedule }.check());
    refused("target_r", RankSchedule { target_r: 13, ..schedule }.check());
    refused("delta_t", RankSchedule { delta_t: 0, ..schedule }.check());
    refused("beta1", RankSchedule { beta1: 1.0, ..schedule }.check());
    refused("beta2", RankSchedule { beta2: f64::NAN, ..schedule }.check());
    refused("config.peft_type", RankSchedule::from_config(&peft::Config::lora(8, 16.0, &["q"]).unwrap()));

    let modules = modules(&[0]);
    let mut adapters = adapters(&file, 0, &modules);
    let mut gradients = gradients(&file, 0, &adapters);
    let name = modules[1].clone();
    refused(
        &format!("rank of {}", modules[0]),
        RankAllocator::new(RankSchedule { init_r: 11, ..schedule }, &adapters),
    );
    let mut allocator = RankAllocator::new(schedule, &adapters).unwrap();
    let before = (allocator.clone(), adapters.clone());

    let gradient = gradients.remove(&name).unwrap();
    refused(&format!("gradients[{name:?}]"), allocator.step(4, &mut adapters, &gradients));
    let tensor =
        |shape: [usize; 2]| Tensor::from_f32(shape, &vec![0.5; shape[0] * shape[1]], DType::F32).unwrap();
    let lora = Adapter::from(Lora::new(tensor([12, 64]), tensor([64, 12]), 1.0).unwrap());
    gradients.insert(name.clone(), Gradient::zeros(&lora));
    refused(&format!("{name}.gradient"), allocator.step(4, &mut adapters, &gradients));
    gradients.insert(name.clone(), gradient);
    assert_eq!((&allocator, &adapters), (&before.0, &before.1));

    let own = adapters.insert(name.clone(), lora).unwrap();
    refused(&format!("adapters[{name:?}]"), allocator.step(4, &mut adapters, &gradients));
    let thin = AdaLora::new(tensor([3, 64]), tensor([3, 1]), tensor([64, 3]), 32.0, 12).unwrap();
    adapters.insert(name.clone(), thin.into());
    refused(&format!("[rank, out, in] of {name}"), allocator.step(4, &mut adapters, &gradients));
    adapters.remove(&name);
    refused(&format!("adapters[{name:?}]"), allocator.step(4, &mut adapters, &gradients));
    adapters.insert(name, own);
    assert_eq!((allocator, adapters), before);
}
