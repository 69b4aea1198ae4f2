//! `adapter_model.safetensors`: names and shapes.

use std::collections::BTreeMap;

use super::{AdapterFile, Bias, Config, Method};
use crate::adapter::{AdaLora, Adapter, Dora, EmbeddingLora, Lora};
use crate::formats::safetensors::{File, Item};
use crate::{Error, Result, Tensor};

/// What every name begins with: the wrappers that PEFT puts around the base model.
const PREFIX: &str = "base_model.model.";
/// Between a wrapped module's name and its own parameters.
const BASE_LAYER: &str = ".base_layer";
/// Modules whose whole table PEFT may save beside the adapter.
const EMBEDDINGS: [&str; 2] = ["embed_tokens", "lm_head"];

/// A parameter of one adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    BBias,
    Magnitude,
    EmbeddingA,
    EmbeddingB,
    AdaA,
    AdaB,
    AdaE,
}

/// The ends of the names.
const SUFFIX: [(&str, Part); 9] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.bias", Part::BBias),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_embedding_A", Part::EmbeddingA),
    (".lora_embedding_B", Part::EmbeddingB),
    (".lora_A", Part::AdaA),
    (".lora_B", Part::AdaB),
    (".lora_E", Part::AdaE),
];

fn suffix(part: Part) -> &'static str {
    SUFFIX[part as usize].0
}

/// The tensors of one module that have not been taken yet.
struct Module<'a> {
    name: &'a str,
    file: &'a File<'a>,
    parts: BTreeMap<Part, Tensor>,
}

pub(super) fn read(config: Config, file: &File) -> Result<AdapterFile> {
    let mut modules: BTreeMap<String, BTreeMap<Part, Tensor>> = BTreeMap::new();
    let mut others = Vec::new();
    for key in file.entries().keys() {
        let name = key.strip_prefix(PREFIX);
        let name = name.ok_or_else(|| Error::format(file.place(key), format!("a name in {PREFIX}"), key))?;
        match SUFFIX.iter().find_map(|(suffix, part)| Some((name.strip_suffix(suffix)?, *part))) {
            Some((module, part)) => {
                modules.entry(module.to_owned()).or_default().insert(part, finite(file, key)?);
            }
            None if name.contains(".lora_") => {
                return Err(Error::format(file.place(key), "a parameter of LoRA, DoRA or AdaLoRA", key));
            }
            None => others.push((key, name)),
        }
    }
    let adapters = adapters(&config, file, modules)?;
    let mut base_tensors = BTreeMap::new();
    for (key, name) in others {
        let name = base_name(&config, &adapters, name)
            .ok_or_else(|| Error::format(file.place(key), "a tensor that the configuration mentions", key))?;
        base_tensors.insert(name, file.tensor(key)?);
    }
    Ok(AdapterFile { config, adapters, base_tensors })
}

fn adapters(
    config: &Config,
    file: &File,
    modules: BTreeMap<String, BTreeMap<Part, Tensor>>,
) -> Result<BTreeMap<String, Adapter>> {
    if let Method::AdaLora { kept } = &config.method
        && let Some(module) = kept.keys().find(|module| !modules.contains_key(*module))
    {
        return Err(Error::format(file.name(), format!("the module {module} of rank_pattern"), "none"));
    }
    let selection = config.selection()?;
    let mut adapters = BTreeMap::new();
    for (name, parts) in modules {
        if !selection.contains(&name) || config.saves_around(&name) {
            let place = format!("{}: {PREFIX}{name}", file.name());
            return Err(Error::format(place, "a module that target_modules chooses", "one that it does not"));
        }
        let mut module = Module { name: &name, file, parts };
        let adapter = module.adapter(config)?;
        if let Some(part) = module.parts.keys().next() {
            return Err(Error::format(
                module.place(*part),
                "a parameter that the configuration asks for",
                "it",
            ));
        }
        adapters.insert(name, adapter);
    }
    Ok(adapters)
}

impl Module<'_> {
    fn adapter(&mut self, config: &Config) -> Result<Adapter> {
        if let Method::AdaLora { .. } = config.method {
            return self.adalora(config).map(Adapter::from);
        }
        if self.parts.contains_key(&Part::EmbeddingA) || self.parts.contains_key(&Part::EmbeddingB) {
            return self.embedding(config).map(Adapter::from);
        }
        let lora = self.lora(config)?;
        if !config.use_dora {
            return Ok(lora.into());
        }
        let magnitude = self.vector(Part::Magnitude, lora.lora_b())?;
        Dora::new(lora, magnitude).map(Adapter::from)
    }

    fn lora(&mut self, config: &Config) -> Result<Lora> {
        let (lora_a, lora_b) = self.factors(config, Part::A, Part::B)?;
        let lora_bias = config.lora_bias.then(|| self.vector(Part::BBias, &lora_b)).transpose()?;
        let lora = Lora::new(lora_a, lora_b, config.scaling_of(self.name))?
            .with_fan_in_fan_out(config.fan_in_fan_out);
        match lora_bias {
            Some(bias) => lora.with_lora_bias(bias),
            None => Ok(lora),
        }
    }

    fn embedding(&mut self, config: &Config) -> Result<EmbeddingLora> {
        if config.use_dora || config.lora_bias {
            return Err(Error::unsupported(
                self.place(Part::EmbeddingA),
                "DoRA or lora_bias on an embedding",
            ));
        }
        let (lora_a, lora_b) = self.factors(config, Part::EmbeddingA, Part::EmbeddingB)?;
        EmbeddingLora::new(lora_a, lora_b, config.scaling_of(self.name))
    }

    fn adalora(&mut self, config: &Config) -> Result<AdaLora> {
        let (lora_a, lora_b) = self.factors(config, Part::AdaA, Part::AdaB)?;
        let lora_e = self.take(Part::AdaE)?;
        let wanted = [lora_a.shape()[0], 1];
        if lora_e.shape() != wanted {
            return Err(Error::format(
                self.place(Part::AdaE),
                format!("shape {wanted:?}"),
                format!("{:?}", lora_e.shape()),
            ));
        }
        let adalora = AdaLora::new(lora_a, lora_e, lora_b, config.alpha, config.rank)?;
        Ok(adalora.with_fan_in_fan_out(config.fan_in_fan_out))
    }

    /// `lora_A` [rank, in] and `lora_B` [out, rank], of the rank that the configuration gives.
    fn factors(&mut self, config: &Config, a: Part, b: Part) -> Result<(Tensor, Tensor)> {
        let rank = config.rank_of(self.name);
        let (lora_a, lora_b) = (self.take(a)?, self.take(b)?);
        for (part, tensor, rank_axis) in [(a, &lora_a, 0), (b, &lora_b, 1)] {
            let shape = tensor.shape();
            if shape.len() > 2 {
                return Err(Error::unsupported(
                    self.place(part),
                    format!("a factor of shape {shape:?} (a convolution)"),
                ));
            }
            if shape.len() != 2 || shape[rank_axis] != rank || shape[1 - rank_axis] == 0 {
                let wanted = if rank_axis == 0 {
                    format!("shape [{rank}, in]")
                } else {
                    format!("shape [out, {rank}]")
                };
                return Err(Error::format(self.place(part), wanted, format!("{shape:?}")));
            }
        }
        Ok((lora_a, lora_b))
    }

    /// A value per output.
    fn vector(&mut self, part: Part, lora_b: &Tensor) -> Result<Tensor> {
        let tensor = self.take(part)?;
        let wanted = &lora_b.shape()[..1];
        if tensor.shape() != wanted {
            return Err(Error::format(
                self.place(part),
                format!("shape {wanted:?}"),
                format!("{:?}", tensor.shape()),
            ));
        }
        Ok(tensor)
    }

    fn take(&mut self, part: Part) -> Result<Tensor> {
        let tensor = self.parts.remove(&part);
        tensor.ok_or_else(|| Error::format(self.place(part), "this tensor", "none"))
    }

    fn place(&self, part: Part) -> String {
        self.file.place(&format!("{PREFIX}{}{}", self.name, suffix(part)))
    }
}

/// A tensor without NaN and infinities.
fn finite(file: &File, key: &str) -> Result<Tensor> {
    let tensor = file.tensor(key)?;
    match tensor.to_f32().iter().position(|v| !v.is_finite()) {
        None => Ok(tensor),
        Some(i) => {
            Err(Error::format(file.place(key), "finite values", format!("{} at {i}", tensor.to_f32()[i])))
        }
    }
}

/// The name that a tensor of the base model has there, if the configuration explains why it is here.
fn base_name(config: &Config, adapters: &BTreeMap<String, Adapter>, name: &str) -> Option<String> {
    let (module, parameter) = name.rsplit_once('.')?;
    let (module, wrapped) = match module.strip_suffix(BASE_LAYER) {
        Some(module) => (module, true),
        None => (module, false),
    };
    let plain = format!("{module}.{parameter}");
    let embedding = module.rsplit('.').next().is_some_and(|last| EMBEDDINGS.contains(&last))
        || matches!(adapters.get(module), Some(Adapter::Embedding(_)));
    let bias = parameter == "bias"
        && match config.bias {
            Bias::None => false,
            Bias::LoraOnly => wrapped,
            Bias::All => true,
        };
    let explained = embedding || bias || config.saves(&plain);
    (explained && wrapped == adapters.contains_key(module)).then_some(plain)
}

/// The parameters of an adapter.
fn parts(adapter: &Adapter) -> Vec<(Part, &Tensor)> {
    let (a, b, more) = match adapter {
        Adapter::Lora(lora) => (Part::A, Part::B, lora.lora_bias().map(|bias| (Part::BBias, bias))),
        Adapter::Dora(dora) => (Part::A, Part::B, Some((Part::Magnitude, dora.magnitude()))),
        Adapter::AdaLora(adalora) => (Part::AdaA, Part::AdaB, Some((Part::AdaE, adalora.lora_e()))),
        Adapter::Embedding(_) => (Part::EmbeddingA, Part::EmbeddingB, None),
    };
    [(a, adapter.lora_a()), (b, adapter.lora_b())].into_iter().chain(more).collect()
}

/// All tensors, under the names that PEFT gives them.
pub(super) fn items(file: &AdapterFile) -> BTreeMap<String, Item<'_>> {
    let mut items = BTreeMap::new();
    for (module, adapter) in &file.adapters {
        for (part, tensor) in parts(adapter) {
            items.insert(format!("{PREFIX}{module}{}", suffix(part)), Item::from(tensor));
        }
    }
    for (name, tensor) in &file.base_tensors {
        let (module, parameter) = name.rsplit_once('.').unwrap_or(("", name));
        let layer = if file.adapters.contains_key(module) { BASE_LAYER } else { "" };
        items.insert(format!("{PREFIX}{module}{layer}.{parameter}"), Item::from(tensor));
    }
    items
}

/// The first thing that came back otherwise than it was written.
pub(super) fn difference(written: &AdapterFile, back: &AdapterFile) -> Option<String> {
    let (items, back_items) = (items(written), items(back));
    let lost =
        items.iter().find(|(name, item)| back_items.get(*name) != Some(item)).map(|(name, _)| name.clone());
    let other = || {
        written.adapters.iter().find_map(|(module, adapter)| {
            let same = back.adapters.get(module).is_some_and(|back| same_formula(adapter, back));
            (!same).then(|| format!("adapters[{module:?}]"))
        })
    };
    lost.or_else(other)
}

/// Whether two adapters of equal parameters mean the same, but for the last bits of the scale (`alpha / rank` cannot yield
/// every number).
fn same_formula(a: &Adapter, b: &Adapter) -> bool {
    let close = (a.scaling() - b.scaling()).abs() <= 4.0 * f64::EPSILON * a.scaling().abs();
    close && a.fan_in_fan_out() == b.fan_in_fan_out()
}
