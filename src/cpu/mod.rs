//! The reference: every operation of the kernels on the CPU, in loops that can be checked against the formula.
//!
//! [`matmul`] is the definition, [`truth`] the same in f64 with the magnitudes that error bounds need, and [`fast`] the
//! one to run whole models with.

mod adalora_gradient;
mod adamw;
mod dora_gradient;
mod dora_scale;
mod dropout;
mod expert_groups;
mod expert_index;
mod expert_matmul;
pub mod fast;
mod gradient_norm;
mod importance;
mod lora_expand;
mod lora_expand_transposed;
mod lora_gradient;
mod lora_shrink;
mod lora_shrink_transposed;
mod matmul;
mod matmul_transposed;
mod merge;
mod merge_report;
mod nf4_merge;
mod nf4_requantize;
mod orthogonality;

pub use adalora_gradient::{adalora_fold, adalora_gradient};
pub use adamw::{AdamW, AdamWStep, MOMENT_BLOCKSIZE, MomentsMut, adamw};
pub use dora_gradient::dora_gradient;
pub use dora_scale::dora_scale;
pub use dropout::{Dropout, philox4x32};
pub use expert_groups::expert_groups;
pub(crate) use expert_index::check_experts;
pub use expert_index::expert_index;
pub use expert_matmul::expert_matmul;
pub use gradient_norm::{GradientNorm, gradient_norm};
pub use importance::{Importance, ImportanceMut, importance, triplet_importance};
pub use lora_expand::lora_expand;
pub use lora_expand_transposed::lora_expand_transposed;
pub use lora_gradient::{LoraBatch, LoraGradient, lora_gradient};
pub use lora_shrink::lora_shrink;
pub use lora_shrink_transposed::lora_shrink_transposed;
pub use matmul::{Accumulate, LowRank, MatmulExtras, Truth, Weight, matmul, truth};
pub use matmul_transposed::{TransposedExtras, matmul_transposed, truth_transposed};
pub use merge::{Update, merge, unmerge};
pub use merge_report::merge_report;
pub use nf4_merge::{nf4_merge, nf4_merge_dense};
pub use nf4_requantize::{nf4_requantize, nf4_requantize_scales};
pub use orthogonality::{Vectors, orthogonality};
