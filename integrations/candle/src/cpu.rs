//! The forward pass on the CPU: the library's fast path, on candle's own slices.

use candle_core::{CpuStorage, Layout, Result, Shape, WithDType};
use half::{bf16, f16};
use lora_kernels::Element;
use lora_kernels::cpu::{self, LowRank, MatmulExtras};

use crate::product::{Branch, Frozen, Operand, cpu_storage};
use crate::weight::{Place, Weight};
use crate::{refuse, wrap};

/// `y` of `x`, with one adapter for all tokens, or the adapter that `index` (i32) names.
pub fn forward(
    frozen: &Frozen,
    x: Operand<'_, CpuStorage>,
    branches: &[Branch<'_, CpuStorage>],
    index: Option<Operand<'_, CpuStorage>>,
) -> Result<(CpuStorage, Shape)> {
    use CpuStorage::{BF16, F16, F32};
    let factors = branches.first().map_or(x.0, |branch| branch.lora_a.0);
    match (x.0, factors) {
        (F32(_), F32(_)) => run::<f32, f32>(frozen, x, branches, index),
        (F16(_), F16(_)) => run::<f16, f16>(frozen, x, branches, index),
        (F16(_), F32(_)) => run::<f16, f32>(frozen, x, branches, index),
        (BF16(_), BF16(_)) => run::<bf16, bf16>(frozen, x, branches, index),
        (BF16(_), F32(_)) => run::<bf16, f32>(frozen, x, branches, index),
        _ => refuse("lora_a, lora_b", "the type of x, or f32", "another"),
    }
}

fn run<T: Element + WithDType, A: Element + WithDType>(
    frozen: &Frozen,
    x: Operand<'_, CpuStorage>,
    branches: &[Branch<'_, CpuStorage>],
    index: Option<Operand<'_, CpuStorage>>,
) -> Result<(CpuStorage, Shape)> {
    let (n, k) = frozen.weight.dims2()?;
    let shape = frozen.output_shape(x.1)?;
    let tokens = x.1.dims()[..x.1.dims().len() - 1].iter().product();

    let adapters = branches.iter().map(low_rank::<A>).collect::<Result<Vec<_>>>()?;

    let weight_guard;
    let weight = match &frozen.weight {
        Weight::Nf4(nf4) => match &nf4.0 {
            Place::Host(matrix) => cpu::Weight::Nf4(matrix),
            #[cfg(feature = "cuda")]
            Place::Cuda(_) => return refuse("weight", "the CPU, as x", "CUDA"),
        },
        Weight::Dense(tensor) => {
            weight_guard = tensor.storage_and_layout();
            cpu::Weight::Dense { data: slice((cpu_storage(&weight_guard.0)?, weight_guard.1))?, n, k }
        }
    };
    let bias = frozen.bias.as_ref().map(|tensor| tensor.storage_and_layout());
    let bias = bias.as_ref().map(|(storage, layout)| slice((cpu_storage(storage)?, layout))).transpose()?;
    let scale = frozen.row_scale.as_ref().map(|tensor| tensor.storage_and_layout());
    let scale = scale.as_ref().map(|(storage, layout)| slice((cpu_storage(storage)?, layout))).transpose()?;

    let extras = MatmulExtras {
        bias,
        row_scale: scale,
        adapters: &adapters,
        adapter_index: index.map(slice::<i32>).transpose()?,
        ..MatmulExtras::default()
    };
    let mut y = vec![<T as Element>::from_f32(0.0); shape.elem_count()];
    cpu::fast::matmul(slice(x)?, tokens, &weight, &extras, &mut y).map_err(wrap)?;
    Ok((T::to_cpu_storage_owned(y), shape))
}

fn low_rank<'a, A: WithDType>(branch: &Branch<'a, CpuStorage>) -> Result<LowRank<'a, A>> {
    let Branch { lora_a, lora_b, scaling } = *branch;
    let rank = lora_a.1.dims()[0];
    Ok(LowRank { lora_a: slice(lora_a)?, lora_b: slice(lora_b)?, rank, scaling: scaling as f32 })
}

/// The elements of an operand that lies in rows.
fn slice<'a, T: WithDType>((storage, layout): (&'a CpuStorage, &Layout)) -> Result<&'a [T]> {
    let (start, end) = match layout.contiguous_offsets() {
        Some(offsets) => offsets,
        None => return refuse("operand", "contiguous elements", format!("strides {:?}", layout.stride())),
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}
