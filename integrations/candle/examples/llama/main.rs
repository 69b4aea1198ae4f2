//! A 4-bit Llama with PEFT adapters, from the folders that transformers and PEFT wrote, to logits:
//!
//!     cargo run --example llama
//!
//! It prints how far the logits are from those of transformers + PEFT, which are stored beside the adapters.

mod model;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Config, LlamaConfig};
use lora_kernels_candle::{AdapterIndex, Adapters, MultiLoraLinear, QLoraLinear};
use model::{Cache, Layer, Layers, Llama};

/// One adapter for all tokens, or none for a module that it does not have.
struct One(Adapters);

impl Layers for One {
    fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> candle_core::Result<Layer> {
        Ok(Box::new(QLoraLinear::load(in_dim, out_dim, vb, &self.0)?))
    }
}

/// Several adapters, of which every sequence has its own.
struct Many<'a>(&'a [&'a Adapters], AdapterIndex);

impl Layers for Many<'_> {
    fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> candle_core::Result<Layer> {
        Ok(Box::new(MultiLoraLinear::load(in_dim, out_dim, vb, self.0, &self.1)?))
    }
}

fn main() -> Result<()> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let base = repository.join("tests/data/nf4_checkpoint/hf_dq_bf16");
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let device = Device::cuda_if_available(0)?;

    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(base.join("config.json"))?)?;
    let config = config.into_config(false);
    let weights: PathBuf = base.join("model.safetensors");
    // SAFETY: nobody changes the file while it is mapped.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[weights], DType::F32, &device)? };
    let stored = candle_core::safetensors::load(adapters.join("logits.safetensors"), &device)?;
    let tokens = &stored["input_ids"];
    let logits = |model: &Llama, config: &Config| -> candle_core::Result<Tensor> {
        model.forward(tokens, 0, &mut Cache::new(DType::F32, config, &device)?)
    };

    println!("{} with adapters of {}, on {device:?}", base.display(), adapters.display());
    println!("{:10} {:>14} {:>28}", "adapter", "largest logit", "off by at most, from PEFT's");
    let report = |name: &str, ours: Tensor| -> Result<()> {
        let theirs = stored.get(&format!("logits_{name}")).context("logits of that name")?;
        let largest = theirs.abs()?.max_all()?.to_scalar::<f32>()?;
        let off = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
        println!("{name:10} {largest:14.3} {off:28.1e}");
        Ok(())
    };
    for name in ["first", "second"] {
        let layers = One(Adapters::open(adapters.join(name))?);
        let model = Llama::load(vb.clone(), &config, &layers)?;
        layers.0.check_all_taken()?;
        report(name, logits(&model, &config)?)?;
    }

    let (first, second) = (Adapters::open(adapters.join("first"))?, Adapters::open(adapters.join("second"))?);
    let index = AdapterIndex::new();
    let model = Llama::load(vb.clone(), &config, &Many(&[&first, &second], index.clone()))?;
    report("base", logits(&model, &config)?)?;
    index.set(&Tensor::new(&[1i64, -1, 0], &device)?)?;
    report("mixed", logits(&model, &config)?)
}
