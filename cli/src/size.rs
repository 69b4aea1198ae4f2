//! `size`: how large an adapter for a model is, and the model itself, from `config.json` alone.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use lora_kernels::DType;
use lora_kernels::formats::safetensors::Layout;
use lora_kernels::nf4::{NESTED_BLOCKSIZE, block_count, packed_len};
use serde_json::{Map, Value};

use crate::dequantize::stored;
use crate::quantize::dtype;
use crate::table::Table;

mod architecture;

use architecture::{Kind, Model, PRESETS, Parameter, unfold};

/// Elements per scale in checkpoints of transformers.
const BLOCKSIZE: usize = 64;

/// Arguments of `lora-kernels size`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A config.json, a model's folder, or chatglm-6b, llama-2-7b, llama-3-8b, qwen2.5-7b.
    model: String,
    /// The rank of the adapter.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// The adapted modules by the end of their names, or all-linear [default: those that PEFT takes].
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    /// The type of the adapter's factors.
    #[arg(long, value_parser = dtype, default_value = "f32")]
    dtype: DType,
    /// The size of the base in NF4, blocks of 64.
    #[arg(long)]
    nf4: bool,
    /// Its scales in 8 bits.
    #[arg(long, requires = "nf4")]
    double_quant: bool,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let (place, config) = read(&arguments.model)?;
    let model = unfold(&config).with_context(|| place.clone())?;
    let modules = chosen(&model, &arguments.targets)?;
    ensure!(arguments.rank > 0, "--rank: wanted 1 or more, got 0");
    if let Some(module) = modules.iter().find(|m| arguments.rank > *m.shape.iter().min().unwrap_or(&0)) {
        bail!(
            "--rank: wanted at most the sides of {} {:?}, got {}",
            module.module,
            module.shape,
            arguments.rank
        );
    }
    println!("{place}: {}, {} layers", model.name, model.layers);
    print!("\n{}", table(&modules, arguments.rank));
    let parameters: usize = modules.iter().map(|m| factors(m, arguments.rank)).sum();
    let dtype = arguments.dtype;
    let file = file_size(&modules, arguments.rank, dtype)?;
    println!("\nadapter of rank {}: {parameters} parameters", arguments.rank);
    println!("  in {dtype}: {}, as a file {file} bytes", megabytes((parameters * dtype.size()) as u64));
    let base: usize = model.parameters.iter().map(numel).sum();
    println!(
        "base: {base} parameters, of which the adapter has {:.4} %",
        100.0 * parameters as f64 / base as f64
    );
    let dense = stored_type(&config)?;
    println!("  in {dense}: {}", megabytes((base * dense.size()) as u64));
    if arguments.nf4 {
        let bytes = model.parameters.iter().map(|p| four_bit(p, arguments.double_quant, dense)).sum();
        let scales = if arguments.double_quant { "scales in 8 bits" } else { "scales in f32" };
        println!("  in NF4, {scales}, the rest in {dense}: {}", megabytes(bytes));
    }
    Ok(true)
}

/// What to call the model, and its configuration.
fn read(model: &str) -> Result<(String, Map<String, Value>)> {
    let preset = PRESETS.iter().find(|(name, _)| name.eq_ignore_ascii_case(model));
    let path = Path::new(model);
    let (place, bytes) = match preset {
        Some((name, config)) if !path.exists() => ((*name).to_owned(), config.as_bytes().to_vec()),
        _ => {
            let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
            let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
            let bytes = lora_kernels::formats::read(&path).with_context(|| {
                format!("{}: cannot be read, and is none of {}", path.display(), names.join(", "))
            })?;
            (path.display().to_string(), bytes)
        }
    };
    let config: Value = serde_json::from_slice(&bytes).with_context(|| format!("{place}: wanted JSON"))?;
    match config {
        Value::Object(config) => Ok((place, config)),
        other => bail!("{place}: wanted an object, got {other}"),
    }
}

/// The modules that get an adapter.
fn chosen<'a>(model: &'a Model, targets: &[String]) -> Result<Vec<&'a Parameter>> {
    let linear = || model.parameters.iter().filter(|p| p.kind != Kind::Other);
    if targets.iter().any(|target| target.eq_ignore_ascii_case("all-linear")) {
        ensure!(targets.len() == 1, "--targets: wanted all-linear or names, got both");
        return Ok(linear().filter(|p| p.kind == Kind::Linear).collect());
    }
    let named: Vec<&str> = targets.iter().map(String::as_str).collect();
    let names = if named.is_empty() { model.default_targets } else { &named[..] };
    let ends = |module: &str, name: &str| {
        module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let all = || {
        let mut all: Vec<&str> = linear().map(|p| p.module.rsplit('.').next().unwrap_or(&p.module)).collect();
        all.sort_unstable();
        all.dedup();
        all.join(", ")
    };
    ensure!(!names.is_empty(), "--targets: PEFT has no default for {}; wanted some of {}", model.name, all());
    if let Some(name) = names.iter().find(|name| !linear().any(|p| ends(&p.module, name))) {
        bail!("--targets: wanted some of {}, got {name}", all());
    }
    Ok(linear().filter(|p| names.iter().any(|name| ends(&p.module, name))).collect())
}

/// A row per kind of module.
fn table(modules: &[&Parameter], rank: usize) -> Table {
    let mut kinds: BTreeMap<(&str, &[usize]), usize> = BTreeMap::new();
    for module in modules {
        let name = module.module.rsplit('.').next().unwrap_or(&module.module);
        *kinds.entry((name, &module.shape)).or_default() += 1;
    }
    let mut table = Table::new(
        &["module", "out", "in", "parameters each", "modules", "parameters"],
        &["out", "in", "parameters each", "modules", "parameters"],
    );
    for ((name, shape), count) in kinds {
        let each = rank * shape.iter().sum::<usize>();
        let cells = [shape[0], shape[1], each, count, each * count].map(|n| n.to_string());
        table.push([name.to_owned()].into_iter().chain(cells).collect());
    }
    table
}

/// Parameters of an adapter on a module.
fn factors(module: &Parameter, rank: usize) -> usize {
    rank * module.shape.iter().sum::<usize>()
}

fn numel(parameter: &Parameter) -> usize {
    parameter.shape.iter().product()
}

/// Bytes of `adapter_model.safetensors`, with its header, as this crate and PEFT write it.
fn file_size(modules: &[&Parameter], rank: usize, dtype: DType) -> Result<u64> {
    let tensors: BTreeMap<String, Vec<usize>> = modules
        .iter()
        .flat_map(|module| {
            let name = |factor: &str| format!("base_model.model.{}.lora_{factor}.weight", module.module);
            [(name("A"), vec![rank, module.shape[1]]), (name("B"), vec![module.shape[0], rank])]
        })
        .collect();
    Ok(Layout::new(tensors.into_iter().map(|(name, shape)| (name, stored(dtype), shape)), 0)?.len())
}

/// Bytes of a parameter's elements; of a 4-bit one, its codes and scales.
fn four_bit(parameter: &Parameter, nested: bool, dense: DType) -> u64 {
    let elements = numel(parameter);
    if parameter.kind != Kind::Linear {
        return (elements * dense.size()) as u64;
    }
    let blocks = block_count(elements, BLOCKSIZE);
    let scales = match nested {
        false => blocks * DType::F32.size(),
        true => blocks + block_count(blocks, NESTED_BLOCKSIZE) * DType::F32.size(),
    };
    (packed_len(elements) + scales) as u64
}

/// The type of the base's elements: what `config.json` says, else bf16.
fn stored_type(config: &Map<String, Value>) -> Result<DType> {
    let name = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(*key).and_then(Value::as_str));
    match name {
        None | Some("bfloat16") => Ok(DType::BF16),
        Some("float16") => Ok(DType::F16),
        Some("float32") => Ok(DType::F32),
        Some(other) => bail!("config.json: torch_dtype: wanted float32, float16 or bfloat16, got {other}"),
    }
}

fn megabytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000_000 => format!("{:.1} MB ({bytes} bytes)", bytes as f64 / 1e6),
        _ => format!("{:.2} GB ({bytes} bytes)", bytes as f64 / 1e9),
    }
}
