//! Low-rank adapters on dense and NF4 weights: CUDA kernels, and a CPU reference that they are checked against.

pub mod adapter;
pub mod cpu;
pub mod cuda;
mod dtype;
mod error;
pub mod formats;
pub mod nf4;
pub mod tensor;

pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use tensor::Tensor;
