//! Low-rank adapters on dense and 4-bit weights: CUDA kernels, and a CPU reference that they are checked against.
//!
//! For tokens `x`, a frozen weight `W` and an adapter with factors `A` and `B`:
//!
//! ```text
//! y  = m ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + bias        the layer with its adapter
//! W' = m ⊙ (W + s B A)                         the same, merged into the weight
//! W  = code[i] · absmax[i / blocksize]         W in 4 bits
//! ```
//!
//! `m` is 1, or DoRA's `magnitude / ‖W + s B A‖`.
//!
//! The [`guide`] explains formats, numerics and kernels, and how to come from bitsandbytes and PEFT.
//!
//! # Where to begin
//!
//! [`formats`] reads models and adapters, [`adapter::Stack`] is an adapter (or several) on a weight, and
//! [`nf4::Nf4Matrix`] is a weight in 4 bits:
//!
//! ```
//! use lora_kernels::adapter::Stack;
//! use lora_kernels::formats::{bitsandbytes, peft};
//! use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
//! use lora_kernels::{DType, Tensor};
//!
//! # fn main() -> lora_kernels::Result<()> {
//! # let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/peft/llama");
//! let model = bitsandbytes::Reader::open(format!("{data}/base"))?;
//! let adapters = peft::load(format!("{data}/lora_r8a16"))?.adapters;
//!
//! // The model is stored in f32; here its weight is brought to 4.1 bits.
//! let module = "model.layers.0.self_attn.q_proj";
//! let dense = model.dense(&format!("{module}.weight"))?;
//! let weight = Nf4Matrix::quantize_tensor(&dense, 64, &Codebook::nf4(), Nesting::Nested)?;
//!
//! // Two tokens through the layer with its adapter.
//! let stack = Stack::new(&[&adapters[module]], &weight)?;
//! let x = Tensor::from_f32([2, 64], &[0.5; 128], DType::F32)?;
//! let y = stack.forward(&x, &weight, None)?;
//!
//! // The merged weight gives the same outputs, but for the roundings of the merge.
//! let merged = stack.merge(&weight, DType::F32)?.weight;
//! let row: f32 = merged.to_f32()[..64].iter().map(|w| 0.5 * w).sum();
//! assert!((f64::from(row) - y[0]).abs() < 1e-5);
//! # Ok(())
//! # }
//! ```
//!
//! An engine that holds a CUDA stream and its buffers calls the kernels themselves. Every operation has one name:
//!
//! | operation | on the CPU | on a GPU |
//! |---|---|---|
//! | numbers to 4-bit codes | [`nf4::quantize()`] | [`cuda::nf4_quantize`] |
//! | their scales to 8 bits | [`nf4::nest`] | [`cuda::absmax_quantize`] |
//! | codes to numbers | [`nf4::dequantize()`] | [`cuda::nf4_dequantize`] |
//! | `x Wᵀ`, W dense or 4-bit, with adapters, scale and bias | [`cpu::matmul()`], [`cpu::fast`] | [`cuda::matmul`] |
//! | the same with an expert per row, W a stack | [`cpu::expert_matmul()`] | [`cuda::expert_matmul`] |
//! | rows by expert | [`cpu::expert_groups()`] | [`cuda::expert_groups`] |
//! | `s x Aᵀ`, an adapter per token | [`cpu::lora_shrink()`] | [`cuda::lora_shrink`] |
//! | `dY W + u A`, the gradient of x | [`cpu::matmul_transposed()`] | [`cuda::matmul_transposed`] |
//! | `u = s dY B`, an adapter per token | [`cpu::lora_shrink_transposed()`] | [`cuda::lora_shrink::plan_transposed`] |
//! | `dA = uᵀ x` and `dB = dYᵀ v`, per adapter | [`cpu::lora_gradient()`] | [`cuda::lora_gradient`] |
//! | DoRA's part of the gradient | [`cpu::dora_gradient()`] | [`cuda::dora_gradient`] |
//! | AdaLoRA's parts: `A ⊙ E`, dE, importance | [`cpu::adalora_fold()`], [`cpu::adalora_gradient()`], [`cpu::importance()`] | [`cuda::adalora`] |
//! | AdaLoRA's penalty `‖A Aᵀ - I‖` and its gradient | [`cpu::orthogonality()`] | [`cuda::orthogonality`] |
//! | AdamW, and the norm of all gradients | [`cpu::adamw()`], [`cpu::gradient_norm()`] | [`cuda::adamw`] |
//! | `y += v Bᵀ`, an adapter per token | [`cpu::lora_expand()`] | [`cuda::lora_expand`] |
//! | which adapter a row has, of a stack of experts | [`cpu::expert_index()`] | [`cuda::expert_index`] |
//! | merge and unmerge, dense | [`cpu::merge()`], [`cpu::unmerge`] | [`cuda::merge`] |
//! | merge into 4-bit codes, or out of them | [`cpu::nf4_merge()`], [`cpu::nf4_merge_dense`] | [`cuda::nf4_merge`] |
//! | a merged weight to 4-bit codes that keep more | [`cpu::nf4_requantize_scales`], [`cpu::nf4_requantize()`] | [`cuda::nf4_requantize`] |
//! | what a merge has kept of its adapters | [`cpu::merge_report()`] | [`cuda::merge_report`] |
//! | DoRA's `m` | [`cpu::dora_scale()`] | [`cuda::dora_scale`] |
//!
//! Training goes on from files and back to them in [`train`]: layers forward and backward, AdamW, AdaLoRA's allocation of ranks. On the
//! CPU there are also [`cpu::adamw()`], [`cpu::dora_gradient()`], [`cpu::adalora_gradient()`], [`cpu::importance()`] and
//! [`cpu::orthogonality()`].
//!
//! GPU calls have three steps: a plan that depends on shapes alone and says which kernel will run, the caller's buffers as views, and a launch on
//! the caller's queue. They allocate nothing, never wait, and refuse what does not fit before anything is launched.
//! Engines that have addresses and no views call [`cuda::raw`], from C or Python by way of `integrations/c`; those on candle have layers in
//! `integrations/candle`.
//! The crate builds and starts without CUDA; the driver is looked for when a `cuda::CudaQueue` is made.
//!
//! # What may be relied on
//!
//! * Codes, scales and decoded weights are those of bitsandbytes in IEEE arithmetic, to the bit. (Its CUDA builds take an approximate
//!   reciprocal: an f32 element within an ulp of a threshold may get the next code there.)
//! * Products have f32 sums in a fixed order: the same plan gives the same bits, whatever else is in the batch.
//! * No input makes a safe call panic or read out of bounds: an [`Error`] names the argument, what was wanted and what came.

pub mod adapter;
pub mod cpu;
pub mod cuda;
mod dtype;
mod error;
pub mod formats;
pub mod guide;
pub mod nf4;
pub mod parallel;
mod simd;
pub mod tensor;
pub mod train;

pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use tensor::Tensor;

/// The example in README compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
