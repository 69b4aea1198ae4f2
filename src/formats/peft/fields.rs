//! Fields of `adapter_config.json`, one by one.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::Bias;
use super::patterns::{Patterns, Targets};
use crate::formats::json;
use crate::{Error, Result};

/// The file's name in errors.
pub(super) const FILE: &str = "adapter_config.json";

/// Names of `bias`.
pub(super) const BIAS: [(&str, Bias); 3] =
    [("none", Bias::None), ("lora_only", Bias::LoraOnly), ("all", Bias::All)];

/// Ways to initialise that leave the base weight as it is. All others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, so that
/// their adapter is right only on the changed base.
const HARMLESS_INIT: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Fields without influence on the result, whatever their value: bookkeeping, training, and the settings of initialisations
/// and variants that another field turns on.
const HARMLESS: [&str; 29] = [
    "auto_mapping",
    "base_model_name_or_path",
    "beta1",
    "beta2",
    "corda_config",
    "deltaT",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "orth_reg_weight",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "target_r",
    "task_type",
    "tfinal",
    "tinit",
    "total_step",
    "init_lora_weights",
    "r",
];

/// The object of the file, and how its values are read.
pub(super) struct Fields(pub(super) Map<String, Value>);

impl Fields {
    /// The value, unless it is absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn wrong(&self, key: &str, wanted: &str) -> Error {
        let got = self.0.get(key).map_or("none".to_owned(), json::short);
        Error::format(format!("{FILE}: {key}"), wanted, got)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| self.wrong(key, "a string"))).transpose()
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        self.get(key).map_or(Ok(false), |v| v.as_bool().ok_or_else(|| self.wrong(key, "true or false")))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.get(key).and_then(size).ok_or_else(|| self.wrong(key, "a whole number above 0"))
    }

    pub(super) fn number(&self, key: &str) -> Result<f64> {
        self.get(key).and_then(number).ok_or_else(|| self.wrong(key, "a number"))
    }

    pub(super) fn bias(&self) -> Result<Bias> {
        let name = self.text("bias")?.unwrap_or("none");
        let known = BIAS.iter().find(|(known, _)| *known == name);
        known.map(|(_, bias)| *bias).ok_or_else(|| self.wrong("bias", "none, lora_only or all"))
    }

    pub(super) fn names(&self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let name = |v: &Value| v.as_str().map(str::to_owned);
        let names = value.as_array().and_then(|list| list.iter().map(name).collect());
        names.map(Some).ok_or_else(|| self.wrong(key, "a list of names"))
    }

    pub(super) fn targets(&self, key: &str) -> Result<Option<Targets>> {
        match self.get(key) {
            // The shorthand for every linear layer, which needs the model to be resolved.
            Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => Targets::expression(text).map(Some),
            Some(Value::Array(list)) if list.is_empty() => Ok(None),
            _ => Ok(self.names(key)?.map(Targets::Names)),
        }
    }

    pub(super) fn object(&self, key: &str) -> Result<impl Iterator<Item = (&String, &Value)>> {
        let object =
            self.get(key).map(|v| v.as_object().ok_or_else(|| self.wrong(key, "an object"))).transpose()?;
        Ok(object.into_iter().flatten())
    }

    pub(super) fn pattern<T>(&self, key: &str, read: fn(&Value) -> Option<T>) -> Result<Patterns<T>> {
        let entry = |(pattern, value): (&String, &Value)| {
            let place = || format!("{FILE}: {key}: {pattern}");
            let value =
                read(value).ok_or_else(|| Error::format(place(), "a number above 0", json::short(value)))?;
            Ok((pattern.clone(), value))
        };
        Patterns::new(self.object(key)?.map(entry).collect::<Result<Vec<_>>>()?)
    }

    /// AdaLoRA's `rank_pattern`.
    pub(super) fn kept_ranks(&self) -> Result<BTreeMap<String, Vec<bool>>> {
        let entry = |(key, value): (&String, &Value)| {
            let place = || format!("{FILE}: rank_pattern: {key}");
            let module = key.strip_suffix(".lora_E");
            let module = module.ok_or_else(|| Error::format(place(), "a name that ends in .lora_E", key))?;
            let flags = value.as_array().and_then(|list| list.iter().map(Value::as_bool).collect());
            let flags = flags
                .ok_or_else(|| Error::format(place(), "a list of true and false", json::short(value)))?;
            Ok((module.to_owned(), flags))
        };
        self.object("rank_pattern")?.map(entry).collect()
    }

    /// What has no type of its own. Fails at the first field that would change the result.
    pub(super) fn others(self) -> Result<Map<String, Value>> {
        const TYPED: [&str; 11] = [
            "lora_alpha",
            "use_rslora",
            "use_dora",
            "lora_bias",
            "fan_in_fan_out",
            "bias",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "init_r",
            "peft_type",
        ];
        let adalora = self.text("peft_type")? == Some("ADALORA");
        let typed =
            |key: &str| TYPED.contains(&key) && (adalora || key != "init_r") || !adalora && key == "r";
        for (key, value) in &self.0 {
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::String(s) => s.is_empty(),
                Value::Array(a) => a.is_empty(),
                Value::Object(o) => o.is_empty(),
                _ => false,
            };
            if !off && !typed(key) && !HARMLESS.contains(&key.as_str()) {
                return Err(Error::unsupported(format!("{FILE}: {key}"), json::short(value)));
            }
        }
        match self.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => {}
            Some(Value::String(name)) if HARMLESS_INIT.contains(&name.as_str()) => {}
            Some(other) => {
                let what = format!("{} (its base weight is not the original one)", json::short(other));
                return Err(Error::unsupported(format!("{FILE}: init_lora_weights"), what));
            }
        }
        Ok(self.0.into_iter().filter(|(key, _)| !typed(key)).collect())
    }
}

pub(super) fn size(value: &Value) -> Option<usize> {
    value.as_u64().filter(|n| *n > 0).and_then(|n| usize::try_from(n).ok())
}

pub(super) fn number(value: &Value) -> Option<f64> {
    value.as_f64()
}
