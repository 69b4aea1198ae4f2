//! Models and adapters of any size, with the names of a Llama.
#![allow(dead_code)] // each test file uses a part of this

use lora_kernels::adapter::{Adapter, Dora, Lora};
use lora_kernels::formats::bitsandbytes::{Checkpoint, SaveOptions};
use lora_kernels::formats::peft::{AdapterFile, Bias, Config};
use lora_kernels::{DType, Tensor};
use serde_json::json;

use crate::common::Set;

/// Numbers that look like weights.
pub fn noise(seed: u32, shape: &[usize], dtype: DType) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state as i32 as f32) * (0.05 / (1u32 << 31) as f32)
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_f32(shape, &values, dtype).unwrap()
}

/// Writes a model with one layer: `up_proj` is [n, k], and everything else small.
pub fn model(set: &Set, name: &str, [n, k]: [usize; 2], dtype: DType) -> Checkpoint {
    let mut checkpoint = Checkpoint::default();
    for (seed, (name, shape)) in [
        ("model.embed_tokens.weight", &[9, 32][..]),
        ("model.layers.0.input_layernorm.weight", &[32]),
        ("model.layers.0.mlp.down_proj.weight", &[31, 33]),
        ("model.layers.0.mlp.up_proj.weight", &[n, k]),
        ("lm_head.weight", &[9, 32]),
    ]
    .into_iter()
    .enumerate()
    {
        checkpoint.dense.insert(name.to_owned(), noise(seed as u32, shape, dtype));
    }
    let config = json!({ "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "model_type": "llama" });
    checkpoint.config = config.as_object().cloned();
    checkpoint.save(set.path(name), &SaveOptions::default()).unwrap();
    checkpoint
}

/// Writes an adapter on its `up_proj`.
pub fn adapter(set: &Set, name: &str, [n, k]: [usize; 2], dora: bool) -> Adapter {
    let mut config = Config::lora(3, 6.0, &["up_proj"]).unwrap();
    config.use_dora = dora;
    config.bias = Bias::None;
    let lora = Lora::new(noise(11, &[3, k], DType::F32), noise(12, &[n, 3], DType::F32), 2.0).unwrap();
    let adapter: Adapter = match dora {
        true => Dora::new(lora, noise(13, &[n], DType::F32)).unwrap().into(),
        false => lora.into(),
    };
    let adapters = [("model.layers.0.mlp.up_proj".to_owned(), adapter.clone())].into();
    AdapterFile { config, adapters, base_tensors: Default::default() }.save(set.path(name)).unwrap();
    adapter
}
