//! `adapter_config.json`: what changes the result is typed, the rest is kept as it is.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::fields::{BIAS, FILE, Fields, number, size};
use super::patterns::{Patterns, Targets, compile, ends_with_name};
use crate::adapter::Scaling;
use crate::formats::json as strict;
use crate::{Error, Result};

/// The configuration of an adapter (PEFT's `LoraConfig` and `AdaLoraConfig`).
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// LoRA (also rsLoRA and DoRA) or AdaLoRA.
    pub method: Method,
    /// `r`: the rank of every module that [`rank_pattern`](Self::rank_pattern) does not name. For AdaLoRA `init_r`, the rank
    /// that training began with.
    pub rank: usize,
    /// `lora_alpha`, for every module that [`alpha_pattern`](Self::alpha_pattern) does not name.
    pub alpha: f64,
    /// rsLoRA: the scale is `alpha / sqrt(rank)`.
    pub use_rslora: bool,
    /// DoRA: every module has a magnitude.
    pub use_dora: bool,
    /// `lora_b` has a bias.
    pub lora_bias: bool,
    /// Base weights are stored `[in, out]` (GPT-2's Conv1D).
    pub fan_in_fan_out: bool,
    /// Which biases of the base the file carries.
    pub bias: Bias,
    /// Ranks of single modules.
    pub rank_pattern: Patterns<usize>,
    /// Alphas of single modules.
    pub alpha_pattern: Patterns<f64>,
    /// `modules_to_save`: modules that were trained whole, by the end of their name.
    pub modules_to_save: Vec<String>,
    /// The other fields: which modules were chosen (`target_modules`, `layers_to_transform` and so on), and what concerns
    /// only training.
    pub other: Map<String, Value>,
}

/// How the low-rank update is parametrised.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// `peft_type` LORA.
    Lora,
    /// `peft_type` ADALORA.
    AdaLora {
        /// `rank_pattern`: for each module which of the `init_r` ranks were kept. Empty as long as nothing was pruned.
        kept: BTreeMap<String, Vec<bool>>,
    },
}

/// `bias`: which biases of the base were trained, and are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// None.
    None,
    /// Those of the adapted modules.
    LoraOnly,
    /// All.
    All,
}

impl Config {
    /// The configuration of plain LoRA on `target_modules` (names, or their ends from a dot on).
    ///
    /// # Errors
    /// [`Error::Argument`] when `rank` is 0 or `alpha` not finite.
    pub fn lora(rank: usize, alpha: f64, target_modules: &[&str]) -> Result<Self> {
        if rank == 0 {
            return Err(Error::argument("rank", "1 or more", rank));
        }
        if !alpha.is_finite() {
            return Err(Error::argument("alpha", "a finite number", alpha));
        }
        let mut other = Map::new();
        other.insert("target_modules".into(), json!(target_modules));
        Ok(Self {
            method: Method::Lora,
            rank,
            alpha,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            fan_in_fan_out: false,
            bias: Bias::None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            modules_to_save: Vec::new(),
            other,
        })
    }

    /// The rank of a module: its entry of [`rank_pattern`](Self::rank_pattern), else [`rank`](Self::rank); for AdaLoRA the
    /// number of ranks kept.
    pub fn rank_of(&self, module: &str) -> usize {
        match &self.method {
            Method::Lora => *self.rank_pattern.get(module).unwrap_or(&self.rank),
            Method::AdaLora { kept } => {
                kept.get(module).map_or(self.rank, |ranks| ranks.iter().filter(|kept| **kept).count())
            }
        }
    }

    /// The `alpha` of a module: its entry of [`alpha_pattern`](Self::alpha_pattern), else [`alpha`](Self::alpha).
    pub fn alpha_of(&self, module: &str) -> f64 {
        *self.alpha_pattern.get(module).unwrap_or(&self.alpha)
    }

    /// The factor of `lora_b @ lora_a` in a module: `alpha / rank`, for rsLoRA `alpha / sqrt(rank)`, with that module's own
    /// alpha and rank. For AdaLoRA `alpha / (init_r + 1e-5)`, also after pruning.
    pub fn scaling_of(&self, module: &str) -> f64 {
        let (alpha, rank) = (self.alpha_of(module), self.rank_of(module));
        match self.method {
            Method::AdaLora { .. } => self.alpha / (self.rank as f64 + 1e-5),
            Method::Lora if self.use_rslora => Scaling::RsLora.factor(alpha, rank),
            Method::Lora => Scaling::Lora.factor(alpha, rank),
        }
    }

    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::Format`] for a field that is missing or of the wrong type; [`Error::Unsupported`] for one that would change the
    /// result in a way this crate does not know. A field of a name it does not know is one of those, unless it is off (null,
    /// false, empty).
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let fields = Fields(strict::object(FILE, bytes)?);
        let adalora = match fields.text("peft_type")? {
            Some("LORA") => false,
            Some("ADALORA") => true,
            other => return Err(Error::unsupported(format!("{FILE}: peft_type"), other.unwrap_or("none"))),
        };
        let config = Self {
            rank: fields.size(if adalora { "init_r" } else { "r" })?,
            alpha: fields.number("lora_alpha")?,
            use_rslora: fields.flag("use_rslora")?,
            use_dora: fields.flag("use_dora")?,
            lora_bias: fields.flag("lora_bias")?,
            fan_in_fan_out: fields.flag("fan_in_fan_out")?,
            bias: fields.bias()?,
            method: if adalora { Method::AdaLora { kept: fields.kept_ranks()? } } else { Method::Lora },
            rank_pattern: if adalora { Patterns::default() } else { fields.pattern("rank_pattern", size)? },
            alpha_pattern: fields.pattern("alpha_pattern", number)?,
            modules_to_save: fields.names("modules_to_save")?.unwrap_or_default(),
            other: fields.others()?,
        };
        config.check()?;
        Ok(config)
    }

    /// Combinations that PEFT refuses, or silently ignores a part of.
    fn check(&self) -> Result<()> {
        let unsupported = |field: &str, what: &str| Err(Error::unsupported(format!("{FILE}: {field}"), what));
        if self.use_dora && self.lora_bias {
            return unsupported("lora_bias", "a bias of lora_b together with DoRA");
        }
        if let Method::AdaLora { kept } = &self.method {
            if self.use_dora || self.use_rslora || self.lora_bias || !self.alpha_pattern.is_empty() {
                return unsupported(
                    "peft_type",
                    "AdaLoRA with use_dora, use_rslora, lora_bias or alpha_pattern",
                );
            }
            if self.alpha <= 0.0 {
                return Err(Error::format(format!("{FILE}: lora_alpha"), "a number above 0", self.alpha));
            }
            if let Some((module, ranks)) = kept.iter().find(|(_, ranks)| ranks.len() != self.rank) {
                let place = format!("{FILE}: rank_pattern: {module}.lora_E");
                return Err(Error::format(place, format!("init_r = {} flags", self.rank), ranks.len()));
            }
        }
        self.selection().map(drop)
    }

    /// The configuration as PEFT writes it: sorted keys, two spaces. Patterns keep their order, which is their precedence.
    pub fn to_json(&self) -> String {
        let mut fields: BTreeMap<&str, Value> =
            self.other.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        let adalora = matches!(self.method, Method::AdaLora { .. });
        let bias = BIAS.iter().find(|(_, bias)| *bias == self.bias).map(|(name, _)| *name);
        fields.insert("peft_type", json!(if adalora { "ADALORA" } else { "LORA" }));
        fields.insert(if adalora { "init_r" } else { "r" }, json!(self.rank));
        fields.insert("lora_alpha", plain_number(self.alpha));
        fields.insert("use_rslora", json!(self.use_rslora));
        fields.insert("use_dora", json!(self.use_dora));
        fields.insert("lora_bias", json!(self.lora_bias));
        fields.insert("fan_in_fan_out", json!(self.fan_in_fan_out));
        fields.insert("bias", json!(bias));
        fields.insert(
            "alpha_pattern",
            object(self.alpha_pattern.iter().map(|(k, v)| (k.to_owned(), plain_number(*v)))),
        );
        fields.insert(
            "modules_to_save",
            match &self.modules_to_save[..] {
                [] => Value::Null,
                names => json!(names),
            },
        );
        fields.insert(
            "rank_pattern",
            match &self.method {
                Method::Lora => object(self.rank_pattern.iter().map(|(k, v)| (k.to_owned(), json!(v)))),
                Method::AdaLora { kept } if kept.is_empty() => Value::Null,
                Method::AdaLora { kept } => {
                    object(kept.iter().map(|(k, v)| (format!("{k}.lora_E"), json!(v))))
                }
            },
        );
        format!("{:#}", Value::Object(fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()))
    }

    /// Which modules the configuration chooses.
    pub(super) fn selection(&self) -> Result<Selection> {
        let fields = Fields(self.other.clone());
        let layers = match fields.get("layers_to_transform") {
            None => Vec::new(),
            Some(Value::Array(list)) => strict::sizes(&format!("{FILE}: layers_to_transform"), &json!(list))?,
            Some(one) => strict::sizes(&format!("{FILE}: layers_to_transform"), &json!([one]))?,
        };
        let names = match fields.get("layers_pattern") {
            Some(Value::String(one)) => vec![one.clone()],
            _ => fields.names("layers_pattern")?.unwrap_or_default(),
        };
        let named = |name: &String| compile(&format!(r"^(?:|.*?\.)(?:{name})\.(?P<idx>\d+)\."), name);
        let layer = match &names[..] {
            _ if layers.is_empty() => Vec::new(),
            [] => vec![compile(r"^.*?\.[^.]*\.(?P<idx>\d+)\.", "layers_pattern")?],
            names => names.iter().map(named).collect::<Result<_>>()?,
        };
        Ok(Selection {
            targets: fields.targets("target_modules")?,
            excluded: fields.targets("exclude_modules")?,
            layers,
            layer,
        })
    }

    /// Whether a tensor of the base (`lm_head.weight`) belongs to a module of [`modules_to_save`](Self::modules_to_save). PEFT
    /// goes by the end of the module's name, wherever that begins: `norm` is also `input_layernorm`.
    pub fn saves(&self, tensor: &str) -> bool {
        modules(tensor).any(|module| self.modules_to_save.iter().any(|name| module.ends_with(name)))
    }

    /// Whether a module lies in one of [`modules_to_save`](Self::modules_to_save), which PEFT does not adapt. Here it does go by
    /// whole names.
    pub(super) fn saves_around(&self, module: &str) -> bool {
        modules(module)
            .chain([module])
            .any(|m| self.modules_to_save.iter().any(|name| ends_with_name(m, name)))
    }
}

/// The modules that a name lies in, outermost first.
fn modules(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').map(|(dot, _)| &name[..dot])
}

/// `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern`.
pub(super) struct Selection {
    /// `None` when that is left to the model.
    targets: Option<Targets>,
    excluded: Option<Targets>,
    /// Layer numbers; empty for all.
    layers: Vec<usize>,
    /// Finds the layer number in a name.
    layer: Vec<regex::Regex>,
}

impl Selection {
    pub(super) fn contains(&self, module: &str) -> bool {
        if self.excluded.as_ref().is_some_and(|targets| targets.matches(module)) {
            return false;
        }
        match &self.targets {
            // A whole name counts in any layer.
            Some(Targets::Names(names)) if names.iter().any(|name| name == module) => true,
            Some(targets) if !targets.matches(module) => false,
            _ => self.layers.is_empty() || self.layer_of(module).is_some_and(|n| self.layers.contains(&n)),
        }
    }

    fn layer_of(&self, module: &str) -> Option<usize> {
        let captures = self.layer.iter().find_map(|regex| regex.captures(module))?;
        captures["idx"].parse().ok()
    }
}

/// Whole numbers without a point, as PEFT's `lora_alpha` is an integer.
fn plain_number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

fn object(entries: impl Iterator<Item = (String, Value)>) -> Value {
    Value::Object(entries.collect())
}
