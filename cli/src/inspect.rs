//! `inspect`: what a checkpoint or an adapter holds. Only headers, configurations and quantisation states are read.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use lora_kernels::adapter::Adapter;
use lora_kernels::formats::bitsandbytes::{Parameter, QuantState, Reader};
use lora_kernels::formats::peft::{self, AdapterFile};
use lora_kernels::nf4::{QuantType, block_count, packed_len};
use lora_kernels::{DType, Tensor};

use crate::table::Table;

/// Arguments of `lora-kernels inspect`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A safetensors file, a model's folder, or an adapter's folder.
    path: PathBuf,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let path = &arguments.path;
    match adapter_folder(path) {
        Some(folder) => {
            let file = peft::load(folder).with_context(|| folder.display().to_string())?;
            print_adapter(folder, &file);
        }
        None if path.is_dir() && !is_model(path) => bail!(
            "{}: wanted {} (an adapter), or model.safetensors or its index (a model)",
            path.display(),
            peft::CONFIG
        ),
        None => print_checkpoint(path, &Reader::open(path)?),
    }
    Ok(true)
}

/// The folder of the adapter that `path` is, or is the tensors of.
fn adapter_folder(path: &Path) -> Option<&Path> {
    let folder = if path.is_dir() { path } else { path.parent().filter(|_| path.ends_with(peft::MODEL))? };
    folder.join(peft::CONFIG).exists().then_some(folder)
}

fn is_model(path: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| path.join(name).exists())
}

fn print_checkpoint(path: &Path, reader: &Reader<'_>) {
    let mut nf4 = Table::new(
        &[
            "4-bit weight",
            "shape",
            "type",
            "blocksize",
            "nested",
            "dtype",
            "stored as",
            "bits/weight",
            "bytes",
        ],
        &["blocksize", "bits/weight", "bytes"],
    );
    let mut dense = Table::new(&["tensor", "shape", "dtype", "bytes"], &["bytes"]);
    let (mut weights, mut matrices, mut nf4_bytes, mut dense_bytes) = (0, 0, 0, 0);
    for (name, parameter) in reader.parameters() {
        match parameter {
            Parameter::Nf4 { state, storage } => {
                let bytes = stored_bytes(state);
                (weights, matrices, nf4_bytes) = (weights + state.numel(), matrices + 1, nf4_bytes + bytes);
                nf4.push(vec![
                    name.clone(),
                    shape(&state.shape),
                    quant_type(state.quant_type).to_owned(),
                    state.blocksize.to_string(),
                    state.nested.map_or("no".to_owned(), |n| format!("by {}", n.blocksize)),
                    state.dtype.to_string(),
                    storage.name().to_owned(),
                    bits_per_weight(bytes, state.numel()),
                    bytes.to_string(),
                ]);
            }
            Parameter::Dense { dtype, shape: sizes } => {
                let bytes = sizes.iter().product::<usize>() * dtype.bitsize() / 8;
                dense_bytes += bytes;
                dense.push(vec![name.clone(), shape(sizes), dtype.to_string(), bytes.to_string()]);
            }
        }
    }
    println!("{}", path.display());
    print_table(&nf4);
    print_table(&dense);
    println!(
        "\n{matrices} 4-bit weights of {weights} elements in {nf4_bytes} bytes ({} bits each), {} other tensors in {dense_bytes} bytes",
        bits_per_weight(nf4_bytes, weights),
        reader.parameters().len() - matrices,
    );
}

fn print_table(table: &Table) {
    if !table.is_empty() {
        print!("\n{table}");
    }
}

/// Codes and scales; the tables of values, which are the same for every weight, do not count.
fn stored_bytes(state: &QuantState) -> usize {
    let blocks = block_count(state.numel(), state.blocksize);
    let scales = match state.nested {
        None => blocks * DType::F32.size(),
        Some(nested) => blocks + block_count(blocks, nested.blocksize) * DType::F32.size(),
    };
    packed_len(state.numel()) + scales
}

fn bits_per_weight(bytes: usize, weights: usize) -> String {
    if weights == 0 { "-".to_owned() } else { format!("{:.3}", bytes as f64 * 8.0 / weights as f64) }
}

fn quant_type(quant_type: QuantType) -> &'static str {
    match quant_type {
        QuantType::Nf4 => "nf4",
        QuantType::Fp4 => "fp4",
        QuantType::Custom => "custom",
    }
}

fn shape(sizes: &[usize]) -> String {
    format!("{sizes:?}")
}

fn print_adapter(folder: &Path, file: &AdapterFile) {
    let mut modules = Table::new(
        &["module", "kind", "in", "out", "rank", "alpha", "scaling", "dtype", "parameters", "bytes"],
        &["in", "out", "rank", "alpha", "scaling", "parameters", "bytes"],
    );
    let (mut parameters, mut bytes) = (0, 0);
    for (name, adapter) in &file.adapters {
        let tensors = parts(adapter);
        let count: usize = tensors.iter().map(|t| t.numel()).sum();
        let size: usize = tensors.iter().map(|t| t.as_bytes().len()).sum();
        (parameters, bytes) = (parameters + count, bytes + size);
        modules.push(vec![
            name.clone(),
            kind(adapter, file.config.use_rslora).to_owned(),
            adapter.in_features().to_string(),
            adapter.out_features().to_string(),
            adapter.rank().to_string(),
            file.config.alpha_of(name).to_string(),
            format!("{:.6}", adapter.scaling()).trim_end_matches('0').trim_end_matches('.').to_owned(),
            adapter.lora_a().dtype().to_string(),
            count.to_string(),
            size.to_string(),
        ]);
    }
    let mut base = Table::new(&["tensor in place of the base's", "shape", "dtype", "bytes"], &["bytes"]);
    for (name, tensor) in &file.base_tensors {
        let size = tensor.as_bytes().len().to_string();
        base.push(vec![name.clone(), shape(tensor.shape()), tensor.dtype().to_string(), size]);
    }
    println!("{}", folder.display());
    print_table(&modules);
    print_table(&base);
    println!("\n{} adapted modules with {parameters} parameters in {bytes} bytes", file.adapters.len());
}

fn kind(adapter: &Adapter, rslora: bool) -> &'static str {
    match (adapter, rslora) {
        (Adapter::Lora(_), false) => "LoRA",
        (Adapter::Lora(_), true) => "rsLoRA",
        (Adapter::Dora(_), _) => "DoRA",
        (Adapter::AdaLora(_), _) => "AdaLoRA",
        (Adapter::Embedding(_), _) => "embedding",
    }
}

/// Every parameter of an adapter.
fn parts(adapter: &Adapter) -> Vec<&Tensor> {
    let more = match adapter {
        Adapter::Lora(lora) => lora.lora_bias(),
        Adapter::Dora(dora) => Some(dora.magnitude()),
        Adapter::AdaLora(adalora) => Some(adalora.lora_e()),
        Adapter::Embedding(_) => None,
    };
    [adapter.lora_a(), adapter.lora_b()].into_iter().chain(more).collect()
}
