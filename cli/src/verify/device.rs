//! The kernels as an [`Engine`]: on a GPU, or in the emulator.

use bytemuck::Pod;
use half::{bf16, f16};
use lora_kernels::cuda::absmax_quantize::{self, NestedViewMut};
use lora_kernels::cuda::{
    AbsmaxView, NestedView, Nf4View, Nf4ViewMut, Properties, nf4_dequantize, nf4_quantize,
};
use lora_kernels::nf4::{
    Absmax, Codebook, DYNAMIC_MAP, NESTED_BLOCKSIZE, NestedAbsmax, Nf4Matrix, block_count, check_blocksize,
    packed_len,
};
use lora_kernels::{DType, Element, Error, Result, Tensor};
use lora_kernels_devices::{Buffer, Device};

use super::cpu::{elements, typed};
use super::engine::{Direction, Engine, Extras, LowRank, Weight};

/// A device, and what it is called.
pub struct Kernels {
    device: Device,
    name: String,
}

impl Kernels {
    /// The first GPU.
    ///
    /// # Errors
    /// [`Error::NoDevice`] where there is none.
    pub fn cuda() -> Result<Self> {
        let device = Device::cuda()?;
        let Properties { capability: (major, minor), sm_count, .. } = *device.queue().properties();
        let name = format!("the GPU (compute capability {major}.{minor}, {sm_count} multiprocessors)");
        Ok(Self { device, name })
    }

    fn properties(&self) -> &Properties {
        self.device.queue().properties()
    }

    fn lacks<T>(&self, operation: &str) -> Result<T> {
        Err(Error::unsupported("the kernels", operation))
    }

    fn nf4(&self, weight: &Nf4Matrix) -> Nf4Buffers {
        let device = &self.device;
        let scales = match weight.absmax() {
            Absmax::Plain(absmax) => Scales::Plain(device.upload(absmax)),
            Absmax::Nested(nested) => Scales::Nested {
                q: device.upload(nested.q()),
                absmax: device.upload(nested.absmax()),
                map: device.upload(nested.map()),
                offset: device.upload(&[nested.offset()]),
                blocksize: nested.blocksize(),
            },
        };
        Nf4Buffers {
            packed: device.upload(weight.packed()),
            scales,
            blocksize: weight.blocksize(),
            codebook: weight.codebook().clone(),
        }
    }
}

/// A 4-bit matrix on the device.
struct Nf4Buffers {
    packed: Buffer<u8>,
    scales: Scales,
    blocksize: usize,
    codebook: Codebook,
}

enum Scales {
    Plain(Buffer<f32>),
    Nested { q: Buffer<u8>, absmax: Buffer<f32>, map: Buffer<f32>, offset: Buffer<f32>, blocksize: usize },
}

impl Nf4Buffers {
    fn view(&self) -> Nf4View<'_> {
        let absmax = match &self.scales {
            Scales::Plain(absmax) => AbsmaxView::Plain(absmax.view()),
            Scales::Nested { q, absmax, map, offset, blocksize } => AbsmaxView::Nested(NestedView {
                q: q.view(),
                absmax: absmax.view(),
                map: map.view(),
                offset: offset.view(),
                blocksize: *blocksize,
            }),
        };
        Nf4View { packed: self.packed.view(), absmax, blocksize: self.blocksize, codebook: &self.codebook }
    }
}

impl Engine for Kernels {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn nf4_quantize(&self, x: &Tensor, blocksize: usize) -> Result<(Vec<u8>, Vec<f32>)> {
        check_blocksize("blocksize", blocksize)?;
        let shape = nf4_quantize::Shape { numel: x.numel(), blocksize, dtype: x.dtype() };
        let plan = nf4_quantize::plan(&shape, &Codebook::nf4(), self.properties())?;
        let mut packed = self.device.alloc(packed_len(x.numel()));
        let mut absmax = self.device.alloc(block_count(x.numel(), blocksize));
        let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
        typed!(x.dtype(), T => {
            plan.run(self.device.queue(), self.device.upload(elements::<T>(x)).view(), out)
        })?;
        Ok((packed.download(), absmax.download()))
    }

    fn absmax_quantize(&self, absmax: &[f32]) -> Result<NestedAbsmax> {
        let device = &self.device;
        let plan = absmax_quantize::plan(absmax.len(), self.properties())?;
        let mut q = device.alloc(absmax.len());
        let mut nested = device.alloc(block_count(absmax.len(), NESTED_BLOCKSIZE));
        let mut offset = device.alloc(1);
        let mut workspace = device.alloc(plan.workspace_bytes());
        plan.run(
            device.queue(),
            device.upload(absmax).view(),
            device.upload(&DYNAMIC_MAP).view(),
            workspace.view_mut(),
            NestedViewMut { q: q.view_mut(), absmax: nested.view_mut(), offset: offset.view_mut() },
        )?;
        let (q, nested, offset) = (q.download(), nested.download(), offset.download());
        NestedAbsmax::from_parts(q, nested, Box::new(DYNAMIC_MAP), offset[0], NESTED_BLOCKSIZE)
    }

    fn nf4_dequantize(&self, weight: &Nf4Matrix, dtype: DType) -> Result<Tensor> {
        let shape = nf4_dequantize::Shape { numel: weight.numel(), blocksize: weight.blocksize(), dtype };
        let plan = nf4_dequantize::plan(&shape, self.properties())?;
        let buffers = self.nf4(weight);
        typed!(dtype, T => {
            let mut out = self.device.alloc::<T>(weight.numel());
            plan.run(self.device.queue(), &buffers.view(), out.view_mut())?;
            tensor(weight.shape(), &out)
        })
    }

    fn matmul(&self, _: &Tensor, _: Weight<'_>, _: Extras<'_>) -> Result<Tensor> {
        self.lacks("matmul")
    }

    fn dora_scale(&self, _: Weight<'_>, _: &LowRank, _: &[f32]) -> Result<Vec<f32>> {
        self.lacks("dora_scale")
    }

    fn merge(&self, _: Direction, _: &Tensor, _: &LowRank, _: Option<&[f32]>, _: bool) -> Result<Tensor> {
        self.lacks("merge")
    }

    fn nf4_merge(&self, _: Direction, _: &Nf4Matrix, _: &LowRank, _: Option<&[f32]>) -> Result<Nf4Matrix> {
        self.lacks("nf4_merge")
    }
}

/// What a buffer holds, as a tensor.
fn tensor<T: Element + Pod>(shape: &[usize], buffer: &Buffer<T>) -> Result<Tensor> {
    Tensor::new(shape, T::into_data(buffer.download()))
}
