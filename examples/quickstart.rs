//! A PEFT adapter over a model in 4 bits: its outputs, and the merged weights. `cargo run --release --example quickstart`

use lora_kernels::adapter::Stack;
use lora_kernels::formats::{bitsandbytes, peft};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Result, Tensor};

fn main() -> Result<()> {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/peft/llama");
    let model = bitsandbytes::Reader::open(format!("{data}/base"))?;
    let adapters = peft::load(format!("{data}/lora_r8a16"))?.adapters;

    for (module, adapter) in &adapters {
        // The model is stored in f32. A checkpoint that is 4-bit already gives this matrix with `model.nf4(name)`.
        let dense = model.dense(&format!("{module}.weight"))?;
        let weight = Nf4Matrix::quantize_tensor(&dense, 64, &Codebook::nf4(), Nesting::Nested)?;

        let tokens: Vec<f32> = (0..3 * adapter.in_features()).map(|i| (i as f32).sin()).collect();
        let x = Tensor::from_f32([3, adapter.in_features()], &tokens, DType::F32)?;
        let stack = Stack::new(&[adapter], &weight)?;
        let y = stack.forward(&x, &weight, None)?;

        let merged = stack.merge(&weight, DType::BF16)?;
        println!("{module}: {} outputs, the first {:.4}; merged: {}", y.len(), y[0], merged.report);
    }
    Ok(())
}
