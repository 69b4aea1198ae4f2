//! Layers for [candle](candle_core): a linear layer on a frozen weight, dense or in 4 bits, with LoRA adapters beside it.
//!
//! | | weight | adapters |
//! |---|---|---|
//! | [`LoraLinear`] | dense or NF4 | none or one; its factors can be trained by candle's autograd |
//! | [`QLoraLinear`] | the same layer, by its name for 4-bit weights | |
//! | [`MultiLoraLinear`] | dense or NF4 | any number; every token, or every sequence, has its own or none |
//!
//! All are [`Module`](candle_nn::Module)s: in a model file of `candle-transformers` they take the place of its `Linear`
//! (`examples/llama` does that with its Llama). They load themselves through a `VarBuilder`: where the checkpoint has
//! bitsandbytes' tensors for a weight, it is 4-bit, and where the PEFT folder has an adapter for the module, it has one.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, VarBuilder};
//! use lora_kernels_candle::{Adapters, QLoraLinear};
//!
//! # fn main() -> candle_core::Result<()> {
//! # let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/nf4_checkpoint/hf_dq_bf16/model.safetensors");
//! # let adapter = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/first");
//! // SAFETY: nobody changes the file while it is mapped.
//! let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[model], DType::F32, &Device::Cpu)? };
//! let adapters = Adapters::open(adapter)?;
//! let q_proj = QLoraLinear::load(128, 128, vb.pp("model.layers.0.self_attn.q_proj"), &adapters)?;
//!
//! let x = Tensor::ones((1, 3, 128), DType::F32, &Device::Cpu)?;
//! assert_eq!(q_proj.forward(&x)?.dims(), [1, 3, 128]);
//! # Ok(())
//! # }
//! ```
//!
//! # Types
//! Activations are f32, f16 or bf16. A dense weight and the bias have their type; the factors of adapters have it too, or are
//! f32, as PEFT keeps them. Sums are f32 on every device, with one rounding at the end.
//!
//! # Devices
//! On the CPU layers run `lora_kernels::cpu::fast`. With the feature `cuda` they launch the kernels of `lora_kernels::cuda` on
//! candle's own stream, on candle's own buffers.
//!
//! # Training
//! [`LoraLinear::with_factors`] takes tensors, which may be `Var`s. The backward pass gives
//! `dX = dY W + s (dY B) A`, `dA = s (dY B)ᵀ x` and `dB = s dYᵀ (x Aᵀ)`, in f32, rounded to the type of each. The frozen weight
//! is decoded a panel at a time. Weight, bias and DoRA's scale get no gradient.

mod adapters;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod load;
mod lora;
mod multi;
mod product;
mod weight;

pub use adapters::Adapters;
pub use lora::{LoraLinear, QLoraLinear};
pub use multi::{AdapterIndex, MultiLoraLinear};
pub use weight::{Nf4Weight, Weight};

/// What the library's errors are in candle's.
fn wrap(error: lora_kernels::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// An error that names the argument, what was wanted and what came.
fn refuse<T>(argument: &str, wanted: impl Into<String>, got: impl ToString) -> candle_core::Result<T> {
    Err(wrap(lora_kernels::Error::argument(argument, wanted, got)))
}
