//! `extract`: a PEFT adapter from two models' folders.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use lora_kernels::adapter::{Adapter, Base, Difference, Extraction, Rank, Ranks, Spectrum};
use lora_kernels::formats::bitsandbytes::{Parameter, Reader};
use lora_kernels::formats::peft::{self, AdapterFile, Config};
use lora_kernels::formats::safetensors::{Dtype, Layout};
use lora_kernels::nf4::Nf4Matrix;
use lora_kernels::{DType, Tensor};
use serde_json::{Value, json};

use crate::dequantize::stored;
use crate::model::{Output, Source, Summary, adapter_config, number};
use crate::quantize::{CONV1D, EMBEDDINGS, HEADS, Out, dtype, mark, matrix};
use crate::table::Table;

const EXAMPLES: &str = "\
Examples:
  lora-kernels extract Llama-3-8B my-finetune --rank 32 --out my-adapter
  lora-kernels extract Llama-3-8B my-finetune --energy 0.9 --dtype bf16 --out my-adapter
  lora-kernels extract Llama-3-8B-nf4 my-finetune --budget 100MB --save-others --out my-adapter

Every two-dimensional weight that differs gets the nearest factors of its rank; tables of embeddings do not. With --energy each
has the smallest rank that keeps this share of its squared difference, with --budget the ranks are those that keep most of the
model's in a file of that size.";

/// Arguments of `lora-kernels extract`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
#[command(group = clap::ArgGroup::new("size").required(true).args(["rank", "energy", "budget"]))]
pub struct Arguments {
    /// The folder of the model that was tuned, dense or in 4 bits.
    base: PathBuf,
    /// The folder of the model that it became.
    tuned: PathBuf,
    #[command(flatten)]
    out: Out,
    /// The rank of every weight.
    #[arg(long)]
    rank: Option<usize>,
    /// The share of each weight's squared difference to keep, from 0 to 1.
    #[arg(long, value_name = "SHARE")]
    energy: Option<f64>,
    /// The size of adapter_model.safetensors at most: bytes, or a number with kB, MB, GB, KiB, MiB or GiB.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    budget: Option<u64>,
    /// The type of the factors: f32, f16 or bf16.
    #[arg(long, value_parser = dtype, default_value = "f32")]
    dtype: DType,
    /// Leave out these modules: a name, or its beginning or end up to a dot. May be repeated.
    #[arg(long, value_name = "NAME")]
    skip: Vec<String>,
    /// Take these modules and no others. May be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Save modules that differ and get no factors (norms, embeddings) whole, as modules_to_save.
    #[arg(long)]
    save_others: bool,
}

/// A size with a unit.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err("wanted kB, MB, GB, KiB, MiB or GiB".to_owned()),
    };
    let number = digits.parse::<f64>().ok().filter(|n| (0.0..1e15).contains(n));
    number.map(|n| (n * unit) as u64).ok_or_else(|| "wanted a number of bytes".to_owned())
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut summary = Summary::start();
    let (base, tuned) = (Source::open(&arguments.base)?, Source::open(&arguments.tuned)?);
    ensure!(arguments.rank != Some(0), "--rank: wanted 1 or more, got 0");
    if let Some(share) = arguments.energy {
        ensure!((0.0..=1.0).contains(&share), "--energy: wanted a share from 0 to 1, got {share}");
    }
    let pair = Pair::new(base, tuned, arguments)?;
    let output =
        Output::create(&arguments.out.out, &[pair.base.folder(), pair.tuned.folder()], arguments.out.force)?;
    summary.bar().set_length(pair.layers.iter().map(|layer| layer.bytes).sum());
    let others = pair.others()?;
    let saved = if arguments.save_others { pair.saved(&others)? } else { BTreeMap::new() };
    let found = match arguments.budget {
        None => pair.extract(arguments, &summary)?,
        Some(budget) => pair.within(budget, arguments.dtype, &saved, &summary)?,
    };
    ensure!(
        found.iter().any(|(_, made)| made.rank() > 0),
        "{}: wanted linear weights that differ from those of {}, got none",
        pair.tuned.folder().display(),
        pair.base.folder().display()
    );

    let mut table = Table::new(
        &["module", "shape", "rank", "parameters", "energy kept", "error"],
        &["rank", "parameters", "energy kept", "error"],
    );
    let (mut adapters, mut rows) = (BTreeMap::new(), Vec::new());
    let (mut norm, mut error, mut parameters) = (0.0, 0.0, 0);
    for (layer, made) in &found {
        // Of the factors as they are written, where there are some.
        let rest = match made.rank() {
            0 => made.norm(),
            _ => {
                let adapter =
                    Adapter::from(made.lora(arguments.dtype).with_context(|| layer.module.clone())?);
                let [base, tuned] = pair.weights(layer)?;
                let rest = pair.difference(&base, &tuned)?.rest(&adapter)?;
                adapters.insert(layer.module.clone(), adapter);
                rest
            }
        };
        let count = made.rank() * layer.cost();
        (norm, error, parameters) = (norm + made.norm().powi(2), error + rest * rest, parameters + count);
        let share = 1.0 - (rest / made.norm()).powi(2);
        let relative = rest / made.norm();
        table.push(vec![
            layer.module.clone(),
            format!("{:?}", layer.shape),
            made.rank().to_string(),
            count.to_string(),
            format!("{share:.4}"),
            format!("{relative:.4}"),
        ]);
        rows.push(json!({
            "module": layer.module, "rank": made.rank(), "energy": number(share), "relative_error": number(relative),
        }));
    }
    let config = pair.config(&adapters, &saved, arguments)?;
    let file = AdapterFile { config, adapters, base_tensors: saved };
    let (config, model) = file.to_bytes()?;
    output.write(peft::MODEL, &model)?;
    output.write(peft::CONFIG, &config)?;
    output.commit()?;

    let lost: Vec<&String> = others.iter().filter(|name| !file.base_tensors.contains_key(*name)).collect();
    let unchanged = pair.layers.len() - found.len();
    summary.say(table.to_string());
    summary.say(format!(
        "{} modules adapted, {unchanged} unchanged: {parameters} parameters, {:.4} of the squared difference kept (error {:.4})",
        file.adapters.len(),
        1.0 - error / norm,
        (error / norm).sqrt()
    ));
    if !file.base_tensors.is_empty() {
        summary.say(format!("saved whole: {}", list(file.base_tensors.keys())));
    }
    if !lost.is_empty() {
        summary.say(format!("differ, and are not captured: {}", list(lost.iter().copied())));
    }
    summary.field("layers", rows);
    summary.field("parameters", parameters);
    summary.field("energy", number(1.0 - error / norm));
    summary.field("relative_error", number((error / norm).sqrt()));
    summary.field("unchanged", unchanged);
    summary.field("saved", file.base_tensors.keys().cloned().collect::<Vec<_>>());
    summary.field("not_captured", lost.into_iter().cloned().collect::<Vec<_>>());
    let read = pair.layers.iter().map(|layer| layer.bytes).sum();
    summary.finish("extracted", [read, (config.len() + model.len()) as u64], arguments.out.json);
    Ok(true)
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// A linear weight of both models.
struct Layer {
    module: String,
    /// As it is stored.
    shape: [usize; 2],
    /// What is read of it.
    bytes: u64,
}

impl Layer {
    fn weight(&self) -> String {
        format!("{}.weight", self.module)
    }

    /// Parameters per rank.
    fn cost(&self) -> usize {
        self.shape.iter().sum()
    }
}

/// A weight of one model.
enum Weight {
    Dense(Tensor),
    Nf4(Box<Nf4Matrix>),
}

impl Weight {
    fn read(reader: &Reader<'_>, name: &str) -> Result<Self> {
        Ok(match reader.parameters().get(name) {
            Some(Parameter::Nf4 { .. }) => Self::Nf4(Box::new(reader.nf4(name)?)),
            _ => Self::Dense(reader.dense(name)?),
        })
    }

    fn base(&self) -> Base<'_> {
        match self {
            Self::Dense(tensor) => tensor.into(),
            Self::Nf4(matrix) => matrix.as_ref().into(),
        }
    }
}

/// Two models with the same parameters.
struct Pair {
    base: Source,
    tuned: Source,
    layers: Vec<Layer>,
    /// All other parameters.
    rest: Vec<String>,
    fan_in_fan_out: bool,
}

impl Pair {
    fn new(base: Source, tuned: Source, arguments: &Arguments) -> Result<Self> {
        check_same(&base, &tuned)?;
        let model_type = base.config().get("model_type").and_then(Value::as_str).unwrap_or_default();
        let fan_in_fan_out = CONV1D.contains(&model_type);
        let (mut layers, mut rest) = (Vec::new(), Vec::new());
        let (mut skipped, mut chosen) =
            (vec![false; arguments.skip.len()], vec![false; arguments.only.len()]);
        for (name, parameter) in tuned.reader().parameters() {
            let linear = name.strip_suffix(".weight").filter(|module| {
                let last = module.rsplit('.').next().unwrap_or(module);
                let head = HEADS.contains(&last);
                // Of a model with transposed layers the head is not transposed: one configuration cannot have both.
                let table = EMBEDDINGS.iter().any(|part| last.contains(part)) && !head;
                let matrices = [&base, &tuned].map(|s| s.reader().parameters().get(name).and_then(matrix));
                !(table || head && fan_in_fan_out) && matrices.iter().all(Option::is_some)
            });
            let Some(module) = linear else {
                rest.push(name.clone());
                continue;
            };
            let skip = mark(&arguments.skip, &mut skipped, module);
            let only = mark(&arguments.only, &mut chosen, module);
            if skip || !arguments.only.is_empty() && !only {
                rest.push(name.clone());
                continue;
            }
            let &[rows, columns] = parameter.shape() else { unreachable!("it is a matrix") };
            let bytes =
                [&base, &tuned].map(|source| element_bytes(&source.reader().parameters()[name])).iter().sum();
            layers.push(Layer { module: module.to_owned(), shape: [rows, columns], bytes });
        }
        for (option, names, used) in
            [("--skip", &arguments.skip, &skipped), ("--only", &arguments.only, &chosen)]
        {
            if let Some(i) = used.iter().position(|used| !used) {
                bail!("{option} {}: wanted a linear module of the model, got none", names[i]);
            }
        }
        ensure!(
            !layers.is_empty(),
            "{}: wanted a two-dimensional weight, got none",
            tuned.folder().display()
        );
        Ok(Self { base, tuned, layers, rest, fan_in_fan_out })
    }

    fn weights(&self, layer: &Layer) -> Result<[Weight; 2]> {
        let name = layer.weight();
        Ok([Weight::read(self.base.reader(), &name)?, Weight::read(self.tuned.reader(), &name)?])
    }

    fn difference<'a>(&self, base: &'a Weight, tuned: &'a Weight) -> lora_kernels::Result<Difference<'a>> {
        Ok(Difference::between(base.base(), tuned.base())?.with_fan_in_fan_out(self.fan_in_fan_out))
    }

    /// The nearest update of a layer; none where it has not changed.
    fn of(&self, layer: &Layer, rank: Rank, summary: &Summary) -> Result<Option<Extraction>> {
        let [base, tuned] = self.weights(layer)?;
        let difference = self.difference(&base, &tuned).with_context(|| layer.weight())?;
        let rank = match rank {
            Rank::Number(rank) => Rank::Number(rank.min(layer.shape[0]).min(layer.shape[1])),
            energy => energy,
        };
        let made = match difference.norm() {
            0.0 => None,
            _ => Some(difference.extract(rank).with_context(|| layer.weight())?),
        };
        summary.bar().inc(layer.bytes);
        Ok(made)
    }

    /// By a rank or an energy for every layer.
    fn extract(&self, arguments: &Arguments, summary: &Summary) -> Result<Vec<(&Layer, Extraction)>> {
        let rank = match (arguments.rank, arguments.energy) {
            (Some(rank), _) => Rank::Number(rank),
            (None, share) => Rank::Energy(share.unwrap_or(1.0)),
        };
        let made = |layer| Ok(self.of(layer, rank, summary)?.map(|made| (layer, made)));
        self.layers.iter().filter_map(|layer| made(layer).transpose()).collect()
    }

    /// By the size of the file. Giving a layer its rank once more after each further one only takes ranks away, so that no more
    /// than a file's worth of factors, and those of one layer, are ever in memory.
    fn within<'a>(
        &'a self,
        budget: u64,
        dtype: DType,
        saved: &BTreeMap<String, Tensor>,
        summary: &Summary,
    ) -> Result<Vec<(&'a Layer, Extraction)>> {
        let fixed = self.fixed(dtype, saved)?;
        let spend = budget.saturating_sub(fixed) / dtype.size() as u64;
        let all: usize = self.layers.iter().map(Layer::cost).sum();
        let first = (2 * spend as usize / all.max(1)).max(16);
        let mut found: Vec<Found> = Vec::new();
        for layer in &self.layers {
            if let Some(made) = self.of(layer, Rank::Number(first), summary)? {
                found.push(Found { layer, known: made.rank(), made });
                let ranks = give(spend, &found).ranks;
                found = found.into_iter().zip(ranks).map(|(found, rank)| found.cut(rank)).collect();
            }
        }
        loop {
            let Ranks { ranks, open } = give(spend, &found);
            let least = found.iter().map(|found| found.layer.cost()).min();
            if let (Some(least), true) = (least, ranks.iter().all(|rank| *rank == 0)) {
                let wanted = fixed + (least * dtype.size()) as u64;
                bail!("--budget: wanted at least {wanted} bytes, for one rank of one module, got {budget}");
            }
            if open.is_empty() {
                let cut = |(found, rank): (Found<'a>, usize)| (found.layer, found.made.cut(rank));
                return Ok(found.into_iter().zip(ranks).map(cut).collect());
            }
            for i in open {
                let Found { layer, known, .. } = found[i];
                summary.bar().inc_length(layer.bytes);
                let made = self.of(layer, Rank::Number(2 * known), summary)?;
                let made = made.context("the file has changed meanwhile")?;
                found[i] = Found { layer, known: made.rank(), made };
            }
        }
    }

    /// Bytes of the file that do not depend on the ranks: at most this, as offsets have fewer digits than here.
    fn fixed(&self, dtype: DType, saved: &BTreeMap<String, Tensor>) -> Result<u64> {
        let mut tensors = BTreeMap::new();
        for layer in &self.layers {
            let [rows, columns] = layer.shape;
            let side = rows.min(columns);
            let name = |factor: &str| format!("base_model.model.{}.lora_{factor}.weight", layer.module);
            tensors.insert(name("A"), (dtype, vec![side, columns]));
            tensors.insert(name("B"), (dtype, vec![rows, side]));
        }
        for (name, tensor) in saved {
            tensors.insert(format!("base_model.model.{name}"), (tensor.dtype(), tensor.shape().to_vec()));
        }
        let tensors = tensors.into_iter().map(|(name, (dtype, shape))| (name, stored(dtype), shape));
        let header = Layout::new(tensors, 0)?.header().len() as u64;
        Ok(header + saved.values().map(|tensor| tensor.as_bytes().len() as u64).sum::<u64>())
    }

    /// The other parameters that differ.
    fn others(&self) -> Result<Vec<String>> {
        let differs = |name: &&String| -> Result<bool> {
            let [base, tuned] = [&self.base, &self.tuned].map(|source| source.reader());
            match [base, tuned].map(|reader| reader.parameters().get(*name)) {
                [Some(Parameter::Dense { dtype: a, .. }), Some(Parameter::Dense { dtype: b, .. })]
                    if a == b =>
                {
                    Ok(base.raw(name)?.bytes != tuned.raw(name)?.bytes)
                }
                _ => {
                    let values = |reader| -> Result<Vec<f32>> {
                        Ok(match Weight::read(reader, name)? {
                            Weight::Dense(tensor) => tensor.to_f32(),
                            Weight::Nf4(matrix) => matrix.dequantize_tensor().to_f32(),
                        })
                    };
                    Ok(values(base)? != values(tuned)?)
                }
            }
        };
        let mut others = Vec::new();
        for name in &self.rest {
            if differs(&name).with_context(|| name.clone())? {
                others.push(name.clone());
            }
        }
        Ok(others)
    }

    /// All parameters of the modules that differ and are not adapted, as far as they are dense.
    fn saved(&self, others: &[String]) -> Result<BTreeMap<String, Tensor>> {
        let adapted: BTreeSet<&str> = self.layers.iter().map(|layer| layer.module.as_str()).collect();
        let modules: BTreeSet<&str> = others
            .iter()
            .filter_map(|name| Some(name.rsplit_once('.')?.0))
            .filter(|module| !adapted.contains(module))
            .collect();
        let reader = self.tuned.reader();
        let mut saved = BTreeMap::new();
        for (name, parameter) in reader.parameters() {
            let dense =
                matches!(parameter, Parameter::Dense { dtype: Dtype::F32 | Dtype::F16 | Dtype::BF16, .. });
            if dense && name.rsplit_once('.').is_some_and(|(module, _)| modules.contains(module)) {
                saved.insert(name.clone(), reader.dense(name)?);
            }
        }
        Ok(saved)
    }

    fn config(
        &self,
        adapters: &BTreeMap<String, Adapter>,
        saved: &BTreeMap<String, Tensor>,
        arguments: &Arguments,
    ) -> Result<Config> {
        let mut config = adapter_config(&self.base, adapters)?;
        let modules: BTreeSet<&str> =
            saved.keys().filter_map(|name| Some(name.rsplit_once('.')?.0)).collect();
        config.modules_to_save = modules.into_iter().map(str::to_owned).collect();
        config.other.insert("base_model_name_or_path".into(), json!(arguments.base.display().to_string()));
        config.other.insert("inference_mode".into(), json!(true));
        Ok(config)
    }
}

/// A layer whose rank is not yet final.
struct Found<'a> {
    layer: &'a Layer,
    made: Extraction,
    /// Singular values that had vectors when it was made.
    known: usize,
}

impl Found<'_> {
    fn cut(self, rank: usize) -> Self {
        Self { made: self.made.cut(rank), ..self }
    }
}

/// The best ranks for what is known.
fn give(spend: u64, found: &[Found<'_>]) -> Ranks {
    let all = |one: &Found<'_>| one.made.is_complete() && one.known == one.made.singular_values().len();
    let spectra: Vec<Spectrum<'_>> = found
        .iter()
        .map(|one| Spectrum {
            singular_values: &one.made.singular_values()[..one.known],
            complete: all(one),
            cost: one.layer.cost(),
        })
        .collect();
    Ranks::within(spend, &spectra)
}

/// Bytes of a parameter's tensors, without tables.
fn element_bytes(parameter: &Parameter) -> u64 {
    match parameter {
        Parameter::Nf4 { state, .. } => state.numel() as u64 / 2,
        Parameter::Dense { dtype, shape } => (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64,
    }
}

/// Checks that both models have the same parameters, of the same shapes.
fn check_same(base: &Source, tuned: &Source) -> Result<()> {
    let [have, wanted] = [tuned, base].map(|source| source.reader().parameters());
    let missing = |from: &BTreeMap<String, Parameter>, of: &BTreeMap<String, Parameter>| {
        let names: Vec<&str> =
            of.keys().filter(|name| !from.contains_key(*name)).map(String::as_str).collect();
        let more = if names.len() > 5 { format!(" and {} more", names.len() - 5) } else { String::new() };
        (!names.is_empty()).then(|| names[..names.len().min(5)].join(", ") + &more)
    };
    let (base, tuned) = (base.folder().display(), tuned.folder().display());
    if let Some(names) = missing(have, wanted) {
        bail!("{tuned}: wanted the parameters of {base}, got none called {names}");
    }
    if let Some(names) = missing(wanted, have) {
        bail!("{base}: wanted the parameters of {tuned}, got none called {names}");
    }
    for (name, parameter) in have {
        let shape = wanted[name].shape();
        ensure!(
            parameter.shape() == shape,
            "{tuned}: {name}: wanted shape {shape:?}, as in {base}, got {:?}",
            parameter.shape()
        );
    }
    Ok(())
}
