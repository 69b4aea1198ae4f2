//! The kernels, behind safe calls: one module per file of `kernels/`, with the same name.
//!
//! Every call has the same three steps, which data flows through one way: *check* the shapes, *plan* (a pure function of
//! shape and device: which entry, which grid, how much workspace), *launch* on the caller's [`Queue`]. A queue is a CUDA
//! stream, or anything else that executes the same PTX.

pub mod absmax_quantize;
pub mod adalora;
pub mod adamw;
mod adapter_table;
mod block_product;
mod check;
mod deltas;
pub mod dora_gradient;
pub mod dora_scale;
#[cfg(feature = "cuda")]
mod driver;
mod dropout;
pub mod expert_groups;
pub mod expert_index;
pub mod expert_matmul;
mod gradient_table;
mod image;
pub mod lora_expand;
pub mod lora_gradient;
pub mod lora_shrink;
pub mod matmul;
pub mod matmul_transposed;
pub mod merge;
pub mod merge_report;
mod nf4;
pub mod nf4_dequantize;
pub mod nf4_merge;
pub mod nf4_quantize;
pub mod nf4_requantize;
pub mod orthogonality;
mod prefill;
mod queue;
pub mod raw;
mod rounds;
mod tensor_map;
mod two_passes;
mod view;

pub use adapter_table::{AdapterTable, AdapterView, LowRank, MAX_RANK, MAX_SLICES, check_adapter_index};
pub use deltas::{MAX_DELTAS, UpdateView};
#[cfg(feature = "cuda")]
pub use driver::{CudaQueue, CudaRead, CudaWrite};
pub use gradient_table::{GradientTable, GradientView};
pub use image::{Image, Target, modules, origin};
pub use nf4::{AbsmaxView, NestedView, Nf4View, Nf4ViewMut, Search};
pub use queue::{Kernel, Launch, Properties, Queue};
pub use tensor_map::{EncodedMap, Swizzle, TensorMap};
pub use view::{MemoryId, View, ViewMut};

/// The tables of all operations: one line each.
const KERNELS: &[&[Kernel]] = &[
    absmax_quantize::KERNELS,
    adalora::KERNELS,
    adamw::KERNELS,
    dora_gradient::KERNELS,
    dora_scale::KERNELS,
    expert_groups::KERNELS,
    expert_index::KERNELS,
    expert_matmul::KERNELS,
    lora_expand::KERNELS,
    lora_gradient::KERNELS,
    lora_shrink::KERNELS,
    matmul::KERNELS,
    matmul_transposed::KERNELS,
    merge::KERNELS,
    merge_report::KERNELS,
    nf4_dequantize::KERNELS,
    nf4_merge::KERNELS,
    nf4_quantize::KERNELS,
    nf4_requantize::KERNELS,
    orthogonality::KERNELS,
];

/// Every kernel that this crate can launch.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    KERNELS.iter().flat_map(|table| table.iter().copied())
}
