//! The guide: what the files hold, what may be relied on, how the kernels work, and how to come from bitsandbytes and PEFT.
//!
//! | chapter | |
//! |---|---|
//! | [`formats`] | how a 4-bit weight and an adapter are stored, and what goes wrong when a reader guesses |
//! | [`numerics`] | what is rounded where, and how far a result may be from the exact one |
//! | [`kernels`] | each kernel: its tiles, the way of its data, its limit |
//! | [`cpu`] | the same without a GPU: instructions, the order of sums, how to measure |
//! | [`plans`] | which kernel runs, what a call needs, graphs, several adapters |
//! | [`porting`] | calls of bitsandbytes and PEFT, and what takes their place |
//!
//! There is nothing but text in these modules.

#[doc = include_str!("formats.md")]
#[doc = include_str!("nf4.svg")]
pub mod formats {}

#[doc = include_str!("numerics.md")]
pub mod numerics {}

#[doc = include_str!("kernels.md")]
#[doc = include_str!("kernels/decode.md")]
#[doc = include_str!("kernels/decode.svg")]
#[doc = include_str!("kernels/skinny.md")]
#[doc = include_str!("kernels/skinny.svg")]
#[doc = include_str!("kernels/matvec.md")]
#[doc = include_str!("kernels/matvec.svg")]
#[doc = include_str!("kernels/matmul.md")]
#[doc = include_str!("kernels/matmul.svg")]
#[doc = include_str!("kernels/prefill.md")]
#[doc = include_str!("kernels/prefill.svg")]
#[doc = include_str!("kernels/lora_shrink.md")]
#[doc = include_str!("kernels/lora_shrink.svg")]
#[doc = include_str!("kernels/lora_expand.md")]
#[doc = include_str!("kernels/lora_expand.svg")]
#[doc = include_str!("kernels/matmul_transposed.md")]
#[doc = include_str!("kernels/matmul_transposed.svg")]
#[doc = include_str!("kernels/lora_gradient.md")]
#[doc = include_str!("kernels/lora_gradient.svg")]
#[doc = include_str!("kernels/merge.md")]
#[doc = include_str!("kernels/merge.svg")]
#[doc = include_str!("kernels/nf4_quantize.md")]
#[doc = include_str!("kernels/nf4_quantize.svg")]
#[doc = include_str!("kernels/nf4_dequantize.md")]
#[doc = include_str!("kernels/nf4_dequantize.svg")]
#[doc = include_str!("kernels/dora_scale.md")]
#[doc = include_str!("kernels/dora_scale.svg")]
pub mod kernels {}

#[doc = include_str!("cpu.md")]
pub mod cpu {}

#[doc = include_str!("plans.md")]
pub mod plans {}

#[doc = include_str!("porting.md")]
pub mod porting {}
