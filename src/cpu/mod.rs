//! The reference: every operation of the kernels on the CPU, in loops that can be checked against the formula.
//!
//! [`matmul`] is the definition, [`truth`] the same in f64 with the magnitudes that error bounds need, and [`fast`] the
//! one to run whole models with.

pub mod fast;
mod matmul;

pub use matmul::{Accumulate, LowRank, MatmulExtras, Truth, Weight, matmul, truth};
