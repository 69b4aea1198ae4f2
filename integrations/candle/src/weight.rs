//! Frozen weights, where candle keeps its tensors.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use lora_kernels::Tensor as HostTensor;
use lora_kernels::adapter::Base;
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::tensor::Data;

#[cfg(feature = "cuda")]
use crate::cuda::DeviceNf4;
use crate::{refuse, wrap};

/// The weight of a linear layer, `[out, in]`. It is never trained.
#[derive(Debug, Clone)]
pub enum Weight {
    /// f32, f16 or bf16: the type of the activations.
    Dense(Tensor),
    /// 4-bit blocks.
    Nf4(Nf4Weight),
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Weight::Dense(tensor)
    }
}

impl From<Nf4Weight> for Weight {
    fn from(weight: Nf4Weight) -> Self {
        Weight::Nf4(weight)
    }
}

/// A 4-bit matrix on a device. Clones share it.
#[derive(Debug, Clone)]
pub struct Nf4Weight(pub(crate) Place);

/// Where the blocks are.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    Host(Arc<Nf4Matrix>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<DeviceNf4>),
}

impl Nf4Weight {
    /// Brings a matrix `[out, in]` to a device.
    ///
    /// # Errors
    /// When it is not a matrix, or the device is not one that this build has kernels for.
    pub fn new(matrix: Nf4Matrix, device: &Device) -> Result<Self> {
        if matrix.shape().len() != 2 {
            return refuse("matrix", "shape [out, in]", format!("{:?}", matrix.shape()));
        }
        match device {
            Device::Cpu => Ok(Self(Place::Host(Arc::new(matrix)))),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self(Place::Cuda(Arc::new(DeviceNf4::new(&matrix, device)?)))),
            other => refuse("device", "the CPU, or CUDA with the feature `cuda`", format!("{other:?}")),
        }
    }

    /// Quantises a dense weight `[out, in]` to NF4 in blocks of `blocksize`, on the CPU, with the bits of bitsandbytes. It stays
    /// on the weight's device.
    ///
    /// # Errors
    /// When the weight is not f32, f16 or bf16, or the block size is not a power of two from 32 to 4096.
    pub fn quantize(weight: &Tensor, blocksize: usize, nesting: Nesting) -> Result<Self> {
        let host = to_host("weight", weight)?;
        let matrix = Nf4Matrix::quantize_tensor(&host, blocksize, &Codebook::nf4(), nesting).map_err(wrap)?;
        Self::new(matrix, weight.device())
    }

    /// `(out, in)`.
    pub fn dims2(&self) -> (usize, usize) {
        match &self.0 {
            Place::Host(matrix) => (matrix.shape()[0], matrix.shape()[1]),
            #[cfg(feature = "cuda")]
            Place::Cuda(nf4) => nf4.dims2(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match &self.0 {
            Place::Host(_) => Device::Cpu,
            #[cfg(feature = "cuda")]
            Place::Cuda(nf4) => nf4.device(),
        }
    }

    /// The dense weight, in f32, f16 or bf16.
    ///
    /// # Errors
    /// For other types.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        match &self.0 {
            Place::Host(_) => self.rows(dtype, 0, self.dims2().0),
            #[cfg(feature = "cuda")]
            Place::Cuda(nf4) => nf4.dequantize(dtype),
        }
    }

    /// The matrix itself; from a GPU it is copied.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn to_matrix(&self) -> Result<Arc<Nf4Matrix>> {
        match &self.0 {
            Place::Host(matrix) => Ok(Arc::clone(matrix)),
            #[cfg(feature = "cuda")]
            Place::Cuda(nf4) => Ok(Arc::new(nf4.to_matrix()?)),
        }
    }

    /// `count` rows from `first` on, on the host.
    fn rows(&self, dtype: DType, first: usize, count: usize) -> Result<Tensor> {
        let (matrix, (_, k)) = (self.to_matrix()?, self.dims2());
        match dtype {
            DType::F32 => decode::<f32>(&matrix, first, count, k),
            DType::F16 => decode::<f16>(&matrix, first, count, k),
            DType::BF16 => decode::<bf16>(&matrix, first, count, k),
            other => refuse("dtype", "f32, f16 or bf16", other.as_str()),
        }
    }
}

fn decode<T>(matrix: &Nf4Matrix, first: usize, count: usize, k: usize) -> Result<Tensor>
where
    T: lora_kernels::Element + candle_core::WithDType,
{
    let mut out = vec![<T as lora_kernels::Element>::from_f32(0.0); count * k];
    matrix.decode(first * k, &mut out).map_err(wrap)?;
    Tensor::from_vec(out, (count, k), &Device::Cpu)
}

/// Elements of a weight that the backward pass decodes at a time on the host.
const PANEL: usize = 1 << 22;

impl Weight {
    /// `(out, in)`.
    ///
    /// # Errors
    /// When a dense weight is not a matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Weight::Dense(tensor) => tensor.dims2(),
            Weight::Nf4(nf4) => Ok(nf4.dims2()),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match self {
            Weight::Dense(tensor) => tensor.device().clone(),
            Weight::Nf4(nf4) => nf4.device(),
        }
    }

    /// `grad W` in f32, of `grad` f32 `[tokens, out]`. A 4-bit weight is what it was in the forward pass of activations in
    /// `dtype`.
    pub(crate) fn times_transposed(&self, grad: &Tensor, dtype: DType) -> Result<Tensor> {
        let (n, k) = self.dims2()?;
        let dense = match self {
            Weight::Dense(tensor) => tensor.clone(),
            Weight::Nf4(nf4) if !nf4.device().is_cpu() => nf4.dequantize(dtype)?,
            Weight::Nf4(nf4) => {
                return panels(grad, n, k, |first, count| nf4.rows(dtype, first, count));
            }
        };
        panels(grad, n, k, |first, count| dense.narrow(0, first, count))
    }

    /// A copy on the host, for what is done once at load.
    pub(crate) fn to_host(&self) -> Result<HostWeight> {
        match self {
            Weight::Dense(tensor) => Ok(HostWeight::Dense(to_host("weight", tensor)?)),
            Weight::Nf4(nf4) => Ok(HostWeight::Nf4(nf4.to_matrix()?)),
        }
    }
}

/// The sum over panels of rows of `grad[:, panel] W[panel]`.
fn panels(
    grad: &Tensor,
    n: usize,
    k: usize,
    rows: impl Fn(usize, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let step = (PANEL / k.max(1)).max(1);
    let mut sum = Tensor::zeros((grad.dim(0)?, k), DType::F32, grad.device())?;
    for first in (0..n).step_by(step) {
        let count = step.min(n - first);
        let panel = rows(first, count)?.to_dtype(DType::F32)?;
        sum = (sum + grad.narrow(1, first, count)?.contiguous()?.matmul(&panel)?)?;
    }
    Ok(sum)
}

/// A weight in the library's own types.
pub(crate) enum HostWeight {
    Dense(HostTensor),
    Nf4(Arc<Nf4Matrix>),
}

impl HostWeight {
    pub fn base(&self) -> Base<'_> {
        match self {
            HostWeight::Dense(tensor) => tensor.into(),
            HostWeight::Nf4(matrix) => (&**matrix).into(),
        }
    }
}

/// A copy of a tensor in the library's own type.
pub(crate) fn to_host(argument: &str, tensor: &Tensor) -> Result<HostTensor> {
    let flat = tensor.flatten_all()?;
    let data = match tensor.dtype() {
        DType::F32 => Data::F32(flat.to_vec1()?),
        DType::F16 => Data::F16(flat.to_vec1()?),
        DType::BF16 => Data::BF16(flat.to_vec1()?),
        other => return refuse(argument, "f32, f16 or bf16", other.as_str()),
    };
    HostTensor::new(tensor.dims(), data).map_err(wrap)
}

/// A tensor of the library, on a device of candle's.
pub(crate) fn from_host(tensor: &HostTensor, device: &Device) -> Result<Tensor> {
    match tensor.data() {
        Data::F32(values) => Tensor::from_slice(values, tensor.shape(), device),
        Data::F16(values) => Tensor::from_slice(values, tensor.shape(), device),
        Data::BF16(values) => Tensor::from_slice(values, tensor.shape(), device),
    }
}

/// The library's name for a type of candle's.
pub(crate) fn element(argument: &str, dtype: DType) -> Result<lora_kernels::DType> {
    match dtype {
        DType::F32 => Ok(lora_kernels::DType::F32),
        DType::F16 => Ok(lora_kernels::DType::F16),
        DType::BF16 => Ok(lora_kernels::DType::BF16),
        other => refuse(argument, "f32, f16 or bf16", other.as_str()),
    }
}
