//! The reference: every operation of the kernels on the CPU, in loops that can be checked against the formula.
//!
//! [`matmul`] is the definition, [`truth`] the same in f64 with the magnitudes that error bounds need, and [`fast`] the
//! one to run whole models with.

mod dora_scale;
pub mod fast;
mod lora_expand;
mod lora_shrink;
mod matmul;
mod merge;
mod nf4_merge;

pub use dora_scale::dora_scale;
pub use lora_expand::lora_expand;
pub use lora_shrink::lora_shrink;
pub use matmul::{Accumulate, LowRank, MatmulExtras, Truth, Weight, matmul, truth};
pub use merge::{Update, merge, unmerge};
pub use nf4_merge::{nf4_merge, nf4_merge_dense};
