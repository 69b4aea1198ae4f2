//! `merge`: adapters into a model's folder.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use lora_kernels::DType;
use lora_kernels::adapter::{Adapter, Base, MergeReport, Requantize, Rounding, Scale, Stack};
use lora_kernels::formats::bitsandbytes::{Parameter, QuantState};
use lora_kernels::formats::safetensors::Dtype;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::dequantize::{dense_config, stored};
use crate::model::{
    Adapters, Change, Fate, Output, Rows, Slab, Source, Summary, cast, number, record, rewrite,
};
use crate::quantize::{Out, dtype, write_config};

const EXAMPLES: &str = "\
Examples:
  lora-kernels merge Llama-3-8B my-adapter --out Llama-3-8B-merged
  lora-kernels merge Llama-3-8B my-adapter --out Llama-3-8B-merged --undo my-adapter.undo
  lora-kernels merge Llama-3-8B style facts --weight 0.7 --weight 1 --out both
  lora-kernels merge Llama-3-8B-nf4 my-adapter --out merged-bf16 --dtype bf16
  lora-kernels merge Llama-3-8B-nf4 my-adapter --out merged-nf4 --scale least-error --rounding keep-gain

All adapters are added in f32, and each weight is rounded once. A 4-bit model stays one unless --dtype says otherwise; as 4 bits
may swallow an adapter, the merge is refused when less than --min-gain of it is left.";

/// Arguments of `lora-kernels merge`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// The model's folder.
    model: PathBuf,
    /// Folders of PEFT adapters, merged in this order.
    #[arg(required = true)]
    adapters: Vec<PathBuf>,
    #[command(flatten)]
    out: Out,
    /// What to multiply each adapter's delta with, in the order of the adapters [default: 1].
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    weight: Vec<f64>,
    /// The type of the merged weights: f32, f16 or bf16 [default: as they are; 4-bit ones are quantised again].
    #[arg(long, value_parser = dtype)]
    dtype: Option<DType>,
    /// How the scales of a 4-bit weight are chosen anew.
    #[arg(long, value_enum, default_value_t = ScaleArgument::Largest, conflicts_with = "dtype")]
    scale: ScaleArgument,
    /// How its codes are.
    #[arg(long, value_enum, default_value_t = RoundingArgument::Nearest, conflicts_with = "dtype")]
    rounding: RoundingArgument,
    /// For --rounding stochastic: the same number gives the same codes.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The share of the adapters that must be left of them in the merged model [default: 0.9 in 4 bits, else 0].
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    min_gain: Option<f64>,
    /// Write a file from which `unmerge` restores the model bit for bit.
    #[arg(long, value_name = "FILE")]
    undo: Option<PathBuf>,
    /// Leave out adapted modules that the model does not have.
    #[arg(long)]
    allow_missing: bool,
}

/// See [`Scale`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ScaleArgument {
    /// The largest magnitude of each block.
    Largest,
    /// The one that leaves the least squared error.
    LeastError,
}

/// See [`Rounding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RoundingArgument {
    /// The nearest value.
    Nearest,
    /// One of the two nearest, at random: right on average, and noisy.
    Stochastic,
    /// The nearest value, and then steps along the adapter until it is retained.
    KeepGain,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut summary = Summary::start();
    let source = Source::open(&arguments.model)?;
    let adapters = Adapters::open(&source, &arguments.adapters, &arguments.weight, arguments.allow_missing)?;
    let four_bit = source.four_bit().count() > 0;
    ensure!(
        four_bit
            || arguments.scale == ScaleArgument::Largest && arguments.rounding == RoundingArgument::Nearest,
        "--scale, --rounding: wanted a 4-bit model, got {}, which is dense",
        source.folder().display()
    );
    if let Some(undo) = &arguments.undo {
        ensure!(
            !four_bit || arguments.dtype.is_none(),
            "--undo: wanted a target in 4 bits, got a dense one: keep the 4-bit model, it is smaller than what could be recorded"
        );
        ensure!(
            arguments.out.force || !undo.exists(),
            "--undo {}: is there already (--force replaces it)",
            undo.display()
        );
    }
    let inputs: Vec<&Path> =
        [source.folder()].into_iter().chain(arguments.adapters.iter().map(PathBuf::as_path)).collect();
    if let Some(undo) = &arguments.undo {
        apart(undo, &inputs)?;
    }
    let output = Output::create(&arguments.out.out, &inputs, arguments.out.force)?;
    let merge = Merge {
        adapters: &adapters,
        dtype: arguments.dtype,
        requantize: arguments.requantize(),
        reports: Mutex::default(),
    };
    let bytes = rewrite(&source, &output, &merge, &mut summary)?;

    let reports = merge.reports();
    let total: MergeReport = reports.values().copied().sum();
    let min_gain =
        arguments.min_gain.unwrap_or(if four_bit && arguments.dtype.is_none() { 0.9 } else { 0.0 });
    if total.retained_gain().is_nan() || total.retained_gain() < min_gain {
        bail!(
            "too little of the adapters is left: wanted a retained gain of at least {min_gain}, got {total}; --dtype bf16 keeps more, \
             so may --scale least-error and --rounding keep-gain, and --min-gain 0 accepts anything"
        );
    }
    match arguments.dtype {
        Some(_) => write_config(&output, dense_config(source.config(), arguments.dtype))?,
        None => write_config(&output, source.config().clone())?,
    }
    if let Some(undo) = &arguments.undo {
        let bytes = record(&source, &adapters, &output, undo).context("--undo")?;
        let per_weight = bytes as f64 / total.elements.max(1) as f64;
        summary.say(format!("{}: {bytes} bytes, {per_weight:.3} for each merged weight", undo.display()));
        summary.field("undo_bytes", bytes);
    }
    output.commit()?;
    describe(&mut summary, &adapters, &reports, total);
    summary.finish("merged", bytes, arguments.out.json);
    Ok(true)
}

/// Refuses a file in one of the folders that are read.
fn apart(undo: &Path, inputs: &[&Path]) -> Result<()> {
    let folder = undo.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = folder.canonicalize().with_context(|| format!("--undo {}", undo.display()))?;
    for input in inputs {
        let input = input.canonicalize().with_context(|| input.display().to_string())?;
        ensure!(
            !folder.starts_with(&input),
            "--undo {}: wanted a file apart from the input {}",
            undo.display(),
            input.display()
        );
    }
    Ok(())
}

impl Arguments {
    fn requantize(&self) -> Requantize {
        let scale = match self.scale {
            ScaleArgument::Largest => Scale::Largest,
            ScaleArgument::LeastError => Scale::LeastError,
        };
        let rounding = match self.rounding {
            RoundingArgument::Nearest => Rounding::Nearest,
            RoundingArgument::Stochastic => Rounding::Stochastic { seed: self.seed },
            RoundingArgument::KeepGain => Rounding::KeepGain,
        };
        // What is left is judged of the whole model.
        Requantize { scale, rounding, ..Requantize::default() }.forced()
    }
}

fn describe(
    summary: &mut Summary,
    adapters: &Adapters,
    reports: &BTreeMap<String, MergeReport>,
    total: MergeReport,
) {
    let replaced: Vec<&String> = adapters.replaced().collect();
    summary.say(format!("{} weights with adapters, {} tensors replaced", adapters.len(), replaced.len()));
    if !adapters.missing().is_empty() {
        summary.say(format!("left out, as the model has no such modules: {}", adapters.missing().join(", ")));
    }
    summary.say(total.to_string());
    if let Some((name, least)) =
        reports.iter().min_by(|a, b| a.1.retained_gain().total_cmp(&b.1.retained_gain()))
    {
        summary.say(format!("least of all is left in {name}: {least}"));
    }
    summary.field("report", json_report(&total));
    summary.field(
        "weights",
        reports
            .iter()
            .map(|(name, report)| (name.clone(), json_report(report)))
            .collect::<serde_json::Map<_, _>>(),
    );
    summary.field("replaced", json!(replaced));
    summary.field("missing", json!(adapters.missing()));
}

fn json_report(report: &MergeReport) -> Value {
    json!({
        "elements": report.elements,
        "retained_gain": number(report.retained_gain()),
        "relative_error": number(report.relative_error()),
        "relative_delta": number(report.relative_delta()),
        "changed_share": number(report.changed_share()),
        "changed_bytes_share": number(report.changed_bytes_share()),
    })
}

/// Adds adapters.
struct Merge<'a> {
    adapters: &'a Adapters,
    dtype: Option<DType>,
    requantize: Requantize,
    /// By weight and first row, so that they add up in one order.
    reports: Mutex<BTreeMap<(String, usize), MergeReport>>,
}

impl Merge<'_> {
    /// By weight.
    fn reports(&self) -> BTreeMap<String, MergeReport> {
        let slabs = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reports: BTreeMap<String, MergeReport> = BTreeMap::new();
        for ((name, _), report) in slabs.iter() {
            *reports.entry(name.clone()).or_default() += *report;
        }
        reports
    }

    fn note(&self, name: &str, row: usize, report: MergeReport) {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).insert((name.to_owned(), row), report);
    }

    /// The type that a dense parameter has afterwards.
    fn dense(&self, name: &str, dtype: Dtype) -> Result<DType> {
        let dtype = match dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => bail!("{name}: wanted F32, F16 or BF16, got {other}"),
        };
        Ok(self.dtype.filter(|_| !self.adapters.on(name).is_empty()).unwrap_or(dtype))
    }

    fn requantize(&self, name: &str) -> Requantize {
        match self.requantize.rounding {
            Rounding::Stochastic { seed } => {
                // The same in every version: a seed is there to give the same codes again.
                let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name).finalize();
                let seed = u64::from_le_bytes(digest[..8].try_into().expect("eight bytes"));
                Requantize { rounding: Rounding::Stochastic { seed }, ..self.requantize }
            }
            _ => self.requantize,
        }
    }
}

impl Change for Merge<'_> {
    fn fate(&self, name: &str, parameter: &Parameter) -> Result<Fate> {
        let adapted = !self.adapters.on(name).is_empty();
        let touched = adapted || self.adapters.has_bias(name) || self.adapters.replacement(name).is_some();
        Ok(match (parameter, self.dtype) {
            (Parameter::Nf4 { state, .. }, Some(dtype)) => {
                Fate::Change(Parameter::Dense { dtype: stored(dtype), shape: state.shape.clone() }, Slab::Any)
            }
            (Parameter::Nf4 { state, storage }, None) if adapted => {
                let state = QuantState { shape: state.shape.clone(), ..*state };
                Fate::Change(Parameter::Nf4 { state, storage: *storage }, Slab::Whole)
            }
            (Parameter::Dense { dtype, shape }, _) if touched => {
                let parameter =
                    Parameter::Dense { dtype: stored(self.dense(name, *dtype)?), shape: shape.clone() };
                let whole = self.adapters.need_whole(name) || self.adapters.has_bias(name);
                Fate::Change(parameter, if whole { Slab::Whole } else { Slab::Any })
            }
            _ => Fate::Keep,
        })
    }

    fn rows(&self, source: &Source, name: &str, rows: Range<usize>) -> Result<Rows> {
        let reader = source.reader();
        let adapters = self.adapters.rows(name, rows.clone())?;
        let stack = |base: Base<'_>| Stack::new(&adapters.iter().collect::<Vec<&Adapter>>(), base);
        match &reader.parameters()[name] {
            Parameter::Nf4 { state, .. } => {
                if let Some(dtype) = self.dtype {
                    let weight = reader.nf4_rows(name, rows.clone())?;
                    if adapters.is_empty() {
                        return crate::dequantize::decode(&weight, dtype).map(Rows::Dense);
                    }
                    let merged = stack((&weight).into())?.merge(&weight, dtype)?;
                    self.note(name, rows.start, merged.report);
                    return Ok(Rows::Dense(merged.weight));
                }
                debug_assert_eq!(rows, 0..state.shape[0], "4-bit weights are quantised as a whole");
                let weight = reader.nf4(name)?;
                let merged = stack((&weight).into())?.merge(&weight, self.requantize(name))?;
                self.note(name, 0, merged.report);
                Ok(Rows::Nf4(merged.weight.into()))
            }
            Parameter::Dense { dtype, .. } => {
                let dtype = self.dense(name, *dtype)?;
                let weight = match self.adapters.replacement(name) {
                    Some(replacement) => cast(&replacement.rows(rows.clone())?, dtype)?,
                    None => reader.dense_rows(name, rows.clone())?,
                };
                if self.adapters.has_bias(name) {
                    let merged = self.adapters.bias_stack(name)?.merge_bias(Some(&weight), dtype)?;
                    return Ok(Rows::Dense(merged.expect("there is a bias")));
                }
                if adapters.is_empty() {
                    return Ok(Rows::Dense(weight));
                }
                let merged = stack((&weight).into())?.merge(&weight, dtype)?;
                self.note(name, rows.start, merged.report);
                Ok(Rows::Dense(merged.weight))
            }
        }
    }
}
