//! `pissa` and `loftq`: a model's folder in 4 bits, and the adapter that training begins with, which makes up for a part of what 4 bits
//! lose.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail, ensure};
use lora_kernels::DType;
use lora_kernels::adapter::{self, Adapter, Initial};
use lora_kernels::formats::bitsandbytes::Parameter;
use lora_kernels::formats::peft::{self, AdapterFile};
use serde_json::json;

use crate::model::{Change, Fate, Output, Rows, Slab, Source, Summary, adapter_config, number, rewrite};
use crate::quantize::{Out, Plan, Quantisation, Type, dtype};
use crate::table::Table;

pub const PISSA_EXAMPLES: &str = "\
Examples:
  lora-kernels pissa Llama-3-8B --rank 16 --out Llama-3-8B-pissa
  lora-kernels pissa Llama-3-8B --rank 16 --out Llama-3-8B-pissa --double-quant --only q_proj --only v_proj

The folder holds the base in 4 bits, and in pissa_init the adapter: train with PeftModel.from_pretrained(base, folder,
subfolder=\"pissa_init\", is_trainable=True). The base is not the plainly quantised model: an adapter that was trained on it needs it.";

pub const LOFTQ_EXAMPLES: &str = "\
Examples:
  lora-kernels loftq Llama-3-8B --rank 16 --out Llama-3-8B-loftq
  lora-kernels loftq Llama-3-8B --rank 16 --iterations 1 --out Llama-3-8B-loftq --double-quant

The folder holds the base in 4 bits, and in loftq_init the adapter: train with PeftModel.from_pretrained(base, folder,
subfolder=\"loftq_init\", is_trainable=True). The base is not the plainly quantised model: an adapter that was trained on it needs it.";

/// Arguments of `lora-kernels pissa`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The folder of a dense model.
    model: PathBuf,
    #[command(flatten)]
    out: Out,
    /// The rank of every adapter; a smaller side of a weight limits it.
    #[arg(long)]
    rank: usize,
    /// The type of the factors: f32, f16 or bf16.
    #[arg(long, value_parser = dtype, default_value = "f32")]
    adapter_dtype: DType,
    #[command(flatten)]
    quantisation: Quantisation,
    /// The table of values.
    #[arg(long, value_enum, default_value_t = Type::Nf4)]
    quant_type: Type,
}

/// Arguments of `lora-kernels loftq`.
#[derive(clap::Args)]
pub struct LoftqArguments {
    #[command(flatten)]
    common: Arguments,
    /// How often base and adapter are made in turn; the best of these is kept.
    #[arg(long, default_value_t = 5)]
    iterations: usize,
}

/// How an adapter begins.
#[derive(Debug, Clone, Copy)]
enum Method {
    Pissa,
    Loftq { iterations: usize },
}

impl Method {
    /// The subfolder of the adapter: those that the papers' own models have.
    fn folder(self) -> &'static str {
        match self {
            Method::Pissa => "pissa_init",
            Method::Loftq { .. } => "loftq_init",
        }
    }
}

/// Runs `pissa`.
pub fn pissa(arguments: &Arguments) -> Result<bool> {
    run(arguments, Method::Pissa)
}

/// Runs `loftq`.
pub fn loftq(arguments: &LoftqArguments) -> Result<bool> {
    ensure!(arguments.iterations > 0, "--iterations: wanted 1 or more, got 0");
    run(&arguments.common, Method::Loftq { iterations: arguments.iterations })
}

fn run(arguments: &Arguments, method: Method) -> Result<bool> {
    let mut summary = Summary::start();
    ensure!(arguments.rank > 0, "--rank: wanted 1 or more, got 0");
    let source = Source::open(&arguments.model)?;
    if let Some(name) = source.four_bit().next() {
        bail!("{}: wanted a dense model, got {name} in 4 bits", source.folder().display());
    }
    let plan = arguments.quantisation.plan(&source, arguments.quant_type)?;
    let output = Output::create(&arguments.out.out, &[source.folder()], arguments.out.force)?;
    let change = Begin {
        quantisation: plan.quantisation(),
        plan,
        method,
        rank: arguments.rank,
        dtype: arguments.adapter_dtype,
        made: Mutex::default(),
    };
    let [read, mut written] = rewrite(&source, &output, &change, &mut summary)?;
    change.plan.write_config(&source, &output)?;
    let made = change.made.into_inner().unwrap_or_else(PoisonError::into_inner);

    let mut table = Table::new(
        &["module", "rank", "error in 4 bits", "with the adapter"],
        &["rank", "error in 4 bits", "with the adapter"],
    );
    let (mut plain, mut rest, mut rows) = (0.0, 0.0, Vec::new());
    for (module, Made { adapter, plain_error, error }) in &made {
        let (plain_error, error, rank) = (*plain_error, *error, adapter.rank());
        (plain, rest) = (plain + plain_error * plain_error, rest + error * error);
        table.push(vec![
            module.clone(),
            rank.to_string(),
            format!("{plain_error:.4}"),
            format!("{error:.4}"),
        ]);
        rows.push(json!({ "module": module, "rank": rank, "plain_error": number(plain_error), "error": number(error) }));
    }
    let adapters: BTreeMap<String, Adapter> =
        made.into_iter().map(|(module, made)| (module, made.adapter)).collect();
    let mut config = adapter_config(&source, &adapters)?;
    config.other.insert("base_model_name_or_path".into(), json!(arguments.out.out.display().to_string()));
    let (config, model) = AdapterFile { config, adapters, base_tensors: BTreeMap::new() }.to_bytes()?;
    for (name, bytes) in [(peft::MODEL, &model), (peft::CONFIG, &config)] {
        output.write(&format!("{}/{name}", method.folder()), bytes)?;
        written += bytes.len() as u64;
    }
    output.commit()?;

    summary.say(table.to_string());
    summary.say(format!(
        "{} adapters in {}: of the error of 4 bits (Frobenius norm) {:.4} is left",
        rows.len(),
        arguments.out.out.join(method.folder()).display(),
        (rest / plain).sqrt()
    ));
    summary.field("layers", rows);
    summary.field("adapter", method.folder());
    summary.field("plain_error", number(plain.sqrt()));
    summary.field("error", number(rest.sqrt()));
    summary.finish("begun", [read, written], arguments.out.json);
    Ok(true)
}

/// What has been made of a weight.
struct Made {
    adapter: Adapter,
    plain_error: f64,
    error: f64,
}

/// Makes of each weight a base and an adapter.
struct Begin {
    plan: Plan,
    quantisation: adapter::Quantisation,
    method: Method,
    rank: usize,
    dtype: DType,
    /// By module.
    made: Mutex<BTreeMap<String, Made>>,
}

impl Change for Begin {
    fn fate(&self, name: &str, parameter: &Parameter) -> Result<Fate> {
        Ok(match self.plan.fate(name, parameter)? {
            // Of a whole weight there is a decomposition, of a slab none.
            Fate::Change(parameter, _) => Fate::Change(parameter, Slab::Whole),
            Fate::Keep => Fate::Keep,
        })
    }

    fn rows(&self, source: &Source, name: &str, _: Range<usize>) -> Result<Rows> {
        let weight = source.reader().dense(name)?;
        let rank = weight.shape().iter().fold(self.rank, |rank, side| rank.min(*side));
        let Initial { base, lora, plain_error, error } = match self.method {
            Method::Pissa => Initial::pissa(&weight, rank, self.dtype, &self.quantisation)?,
            Method::Loftq { iterations } => {
                Initial::loftq(&weight, rank, iterations, self.dtype, &self.quantisation)?
            }
        };
        let module = name.trim_end_matches(".weight").to_owned();
        let made = Made { adapter: lora.into(), plain_error, error };
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(module, made);
        Ok(Rows::Nf4(base.into()))
    }
}
