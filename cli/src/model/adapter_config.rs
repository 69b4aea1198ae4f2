//! The configuration of adapters that are made for a model.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use lora_kernels::adapter::Adapter;
use lora_kernels::formats::peft::{Config, Patterns};
use serde_json::{Value, json};

use super::Source;

/// LoRA of these modules and no others, with a scaling of 1. The commonest rank is that of the configuration, and modules with another
/// are named.
pub fn adapter_config(model: &Source, adapters: &BTreeMap<String, Adapter>) -> Result<Config> {
    let targets = targets(model, adapters);
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    let mut config = Config::lora(1, 1.0, &targets)?;
    set_ranks(&mut config, adapters)?;
    config.fan_in_fan_out = adapters.values().any(Adapter::fan_in_fan_out);
    let causal = model.config().get("architectures").and_then(Value::as_array).is_some_and(|list| {
        list.iter().any(|name| name.as_str().is_some_and(|name| name.ends_with("ForCausalLM")))
    });
    if causal {
        config.other.insert("task_type".into(), json!("CAUSAL_LM"));
    }
    Ok(config)
}

/// Gives a configuration the ranks of the adapters, and alphas that make their scalings 1.
pub fn set_ranks(config: &mut Config, adapters: &BTreeMap<String, Adapter>) -> Result<()> {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    adapters.values().for_each(|adapter| *counts.entry(adapter.rank()).or_default() += 1);
    let rank = counts.iter().max_by_key(|(_, count)| **count).map_or(1, |(rank, _)| *rank);
    let others: Vec<(&String, usize)> = adapters
        .iter()
        .map(|(module, adapter)| (module, adapter.rank()))
        .filter(|(_, r)| *r != rank)
        .collect();
    (config.rank, config.alpha) = (rank, rank as f64);
    config.rank_pattern = Patterns::new(others.iter().map(|(module, r)| ((*module).clone(), *r)))?;
    config.alpha_pattern = Patterns::new(others.iter().map(|(module, r)| ((*module).clone(), *r as f64)))?;
    Ok(())
}

/// Names that choose the adapted modules and no others: the last part of a name where all modules of that name are adapted, else
/// whole names.
fn targets(model: &Source, adapters: &BTreeMap<String, Adapter>) -> BTreeSet<String> {
    let last = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
    let mut others: BTreeSet<String> = BTreeSet::new();
    for name in model.reader().parameters().keys() {
        for (dot, _) in name.match_indices('.') {
            let module = &name[..dot];
            if !adapters.contains_key(module) {
                others.insert(last(module));
            }
        }
    }
    let target = |module: &String| match last(module) {
        name if others.contains(&name) => module.clone(),
        name => name,
    };
    adapters.keys().map(target).collect()
}
