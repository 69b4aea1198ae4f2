//! `reduce`: an adapter's folder to one of smaller ranks.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lora_kernels::adapter::{Adapter, Lora, Rank};
use lora_kernels::formats::peft::{self, AdapterFile, Method};
use lora_kernels::{DType, Tensor};
use serde_json::json;

use crate::model::{Output, Summary, number, set_ranks};
use crate::quantize::{Out, dtype};
use crate::table::Table;

pub const EXAMPLES: &str = "\
Examples:
  lora-kernels reduce my-adapter --rank 8 --out my-adapter-r8
  lora-kernels reduce my-adapter --energy 0.99 --dtype bf16 --out my-adapter-small

Each module gets the nearest update of the smaller rank (that of the singular value decomposition of lora_b @ lora_a). With --energy it
has the smallest rank that keeps this share of its squares. AdaLoRA becomes LoRA; DoRA's magnitude, and what was saved whole, stay.";

/// What AdaLoRA's configuration has and LoRA's has not.
const OF_ADALORA: [&str; 8] =
    ["target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"];

/// Arguments of `lora-kernels reduce`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("size").required(true).args(["rank", "energy"]))]
pub struct Arguments {
    /// The folder of a PEFT adapter.
    adapter: PathBuf,
    #[command(flatten)]
    out: Out,
    /// The rank of every module; those that have less keep theirs.
    #[arg(long)]
    rank: Option<usize>,
    /// The share of each module's squares to keep, from 0 to 1.
    #[arg(long, value_name = "SHARE")]
    energy: Option<f64>,
    /// The type of the factors: f32, f16 or bf16 [default: that of lora_a].
    #[arg(long, value_parser = dtype)]
    dtype: Option<DType>,
}

/// An update of rank 1 that is zero: what AdaLoRA has left of a module when it has pruned all its ranks.
fn nothing(adapter: &Adapter, dtype: DType) -> lora_kernels::Result<Adapter> {
    let zeros = |shape: [usize; 2]| Tensor::from_f32(shape, &vec![0.0; shape[0] * shape[1]], dtype);
    let lora = Lora::new(zeros([1, adapter.in_features()])?, zeros([adapter.out_features(), 1])?, 1.0)?;
    Ok(lora.with_fan_in_fan_out(adapter.fan_in_fan_out()).into())
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut summary = Summary::start();
    ensure!(arguments.rank != Some(0), "--rank: wanted 1 or more, got 0");
    let wanted = match (arguments.rank, arguments.energy) {
        (Some(rank), _) => Rank::Number(rank),
        (None, share) => Rank::Energy(share.unwrap_or(1.0)),
    };
    if let Rank::Energy(share) = wanted {
        ensure!((0.0..=1.0).contains(&share), "--energy: wanted a share from 0 to 1, got {share}");
    }
    let folder = &arguments.adapter;
    ensure!(folder.is_dir(), "{}: wanted an adapter's folder, got none", folder.display());
    let AdapterFile { mut config, adapters, base_tensors } = peft::load(folder)?;
    ensure!(!adapters.is_empty(), "{}: wanted an adapter, got none", folder.display());
    let output = Output::create(&arguments.out.out, &[folder], arguments.out.force)?;
    let bytes =
        |adapter: &Adapter| (adapter.lora_a().as_bytes().len() + adapter.lora_b().as_bytes().len()) as u64;
    let read: u64 = adapters.values().map(bytes).sum();
    summary.bar().set_length(read);

    const COLUMNS: [&str; 5] = ["module", "from rank", "to rank", "energy kept", "error"];
    let mut table = Table::new(&COLUMNS, &["from rank", "to rank", "energy kept", "error"]);
    let (mut reduced, mut rows) = (BTreeMap::new(), Vec::new());
    let (mut norm, mut error) = (0.0, 0.0);
    for (module, adapter) in &adapters {
        let dtype = arguments.dtype.unwrap_or(adapter.lora_a().dtype());
        let of_rank = |rank: Rank| adapter.decompose(rank).with_context(|| module.clone());
        let mut made = of_rank(wanted)?;
        if made.rank() == 0 {
            // Nothing is enough; but files of LoRA have no factors of rank 0.
            made = of_rank(Rank::Number(1))?;
        }
        let small = match adapter.rank() {
            0 => nothing(adapter, dtype),
            _ => adapter.reduced(Rank::Number(made.rank()), dtype),
        };
        let small = small.with_context(|| module.clone())?;
        let relative = if made.norm() == 0.0 { 0.0 } else { made.frobenius_error() / made.norm() };
        (norm, error) = (norm + made.norm().powi(2), error + made.frobenius_error().powi(2));
        let (from, to, energy) = (adapter.rank(), small.rank(), 1.0 - relative * relative);
        table.push(vec![
            module.clone(),
            from.to_string(),
            to.to_string(),
            format!("{energy:.4}"),
            format!("{relative:.4}"),
        ]);
        rows.push(json!({
            "module": module, "from": from, "rank": to, "energy": number(energy), "relative_error": number(relative),
        }));
        reduced.insert(module.clone(), small);
        summary.bar().inc(bytes(adapter));
    }
    if matches!(config.method, Method::AdaLora { .. }) {
        config.method = Method::Lora;
        OF_ADALORA.iter().for_each(|field| drop(config.other.remove(*field)));
    }
    config.use_rslora = false;
    set_ranks(&mut config, &reduced)?;
    let parameters: usize =
        reduced.values().map(|small| small.lora_a().numel() + small.lora_b().numel()).sum();
    let (config, model) = AdapterFile { config, adapters: reduced, base_tensors }.to_bytes()?;
    output.write(peft::MODEL, &model)?;
    output.write(peft::CONFIG, &config)?;
    output.commit()?;

    let relative = if norm == 0.0 { 0.0 } else { (error / norm).sqrt() };
    summary.say(table.to_string());
    summary.say(format!(
        "{} modules: {parameters} parameters, {:.4} of the squares kept (error {relative:.4})",
        rows.len(),
        1.0 - relative * relative
    ));
    summary.field("layers", rows);
    summary.field("parameters", parameters);
    summary.field("energy", number(1.0 - relative * relative));
    summary.field("relative_error", number(relative));
    summary.finish("reduced", [read, (config.len() + model.len()) as u64], arguments.out.json);
    Ok(true)
}
