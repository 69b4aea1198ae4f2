//! The kernels as an [`Engine`]: on a GPU, or in the emulator.

mod training;

use bytemuck::Pod;
use half::{bf16, f16};
use lora_kernels::adapter::Adapter;
use lora_kernels::cpu::AdamWStep;
use lora_kernels::cuda::absmax_quantize::NestedViewMut;
use lora_kernels::cuda::matmul::{Rounding, WeightFormat};
use lora_kernels::cuda::{
    AbsmaxView, AdapterTable, AdapterView, NestedView, Nf4View, Nf4ViewMut, Properties, Queue, UpdateView,
    View, absmax_quantize, dora_scale, lora_shrink, matmul, merge, nf4_dequantize, nf4_merge, nf4_quantize,
};
use lora_kernels::nf4::{
    Absmax, Codebook, DYNAMIC_MAP, NESTED_BLOCKSIZE, NestedAbsmax, Nf4Matrix, block_count, check_blocksize,
    packed_len,
};
use lora_kernels::{DType, Element, Result, Tensor};
use lora_kernels_devices::{Buffer, Device};

use super::cpu::{elements, typed};
use super::engine::{Direction, Engine, Extras, Gradients, LowRank, Slack, Weight};

/// The kernels on some device.
pub struct Kernels(Device);

impl Kernels {
    /// The first GPU.
    ///
    /// # Errors
    /// [`Error::NoDevice`](lora_kernels::Error::NoDevice) where there is none.
    pub fn cuda() -> Result<Self> {
        Ok(Self(Device::cuda()?))
    }

    /// An emulated GPU.
    pub fn emulator() -> Self {
        Self(Device::emulator())
    }

    fn properties(&self) -> &Properties {
        self.queue().properties()
    }

    fn queue(&self) -> &dyn Queue {
        self.0.queue()
    }

    fn nf4(&self, weight: &Nf4Matrix) -> Nf4Buffers {
        let device = &self.0;
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
        self.0.name()
    }

    fn nf4_quantize(&self, x: &Tensor, blocksize: usize) -> Result<(Vec<u8>, Vec<f32>)> {
        check_blocksize("blocksize", blocksize)?;
        let shape = nf4_quantize::Shape { numel: x.numel(), blocksize, dtype: x.dtype() };
        let plan = nf4_quantize::plan(&shape, &Codebook::nf4(), self.properties())?;
        let mut packed = self.0.alloc(packed_len(x.numel()));
        let mut absmax = self.0.alloc(block_count(x.numel(), blocksize));
        let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
        typed!(x.dtype(), T => {
            plan.run(self.queue(), self.0.upload(elements::<T>(x)).view(), out)
        })?;
        Ok((packed.download(), absmax.download()))
    }

    fn absmax_quantize(&self, absmax: &[f32]) -> Result<NestedAbsmax> {
        let device = &self.0;
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
            let mut out = self.0.alloc::<T>(weight.numel());
            plan.run(self.queue(), &buffers.view(), out.view_mut())?;
            tensor(weight.shape(), &out)
        })
    }

    fn matmul(&self, x: &Tensor, weight: Weight<'_>, extras: Extras<'_>) -> Result<Tensor> {
        let adapters = extras.adapters.first().map_or(x.dtype(), |l| l.lora_a.dtype());
        typed!(x.dtype(), T => typed!(adapters, A => self.product::<T, A>(x, weight, extras)))
    }

    fn slack(&self, x: &Tensor, weight: Weight<'_>) -> Result<Slack> {
        let plan = matmul::plan(&product_shape(x, weight), self.properties())?;
        let u = x.dtype().unit_roundoff();
        let weight = match (weight, plan.rounding) {
            (Weight::Dense(_), _) | (_, Rounding::ToInput) => 0.0,
            // The formula rounds every weight, the kernel none of them.
            (_, Rounding::Exact) => u,
            // The formula rounds every weight, the kernel every value.
            (_, Rounding::Value) => 2.0 * u,
            // Both round every weight, the kernel after it has rounded every value to f16: they may go apart.
            (_, Rounding::Half) => DType::F16.unit_roundoff() + 2.0 * u,
        };
        // `v` and `B` are taken as sums of two bf16.
        let low_rank = if plan.kernel.is_some_and(|k| k.module == "prefill") { 2f64.powi(-14) } else { 0.0 };
        Ok(if x.dtype() == DType::F32 { Slack::default() } else { Slack { weight, low_rank } })
    }

    fn dora_scale(&self, weight: Weight<'_>, lora: &LowRank, magnitude: &[f32]) -> Result<Vec<f32>> {
        typed!(lora.lora_a.dtype(), A => self.row_scale::<A>(weight, lora, magnitude))
    }

    fn merge(
        &self,
        direction: Direction,
        weight: &Tensor,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
        fan_in_fan_out: bool,
    ) -> Result<Tensor> {
        let direction = match direction {
            Direction::Merge => merge::Direction::Merge,
            Direction::Unmerge => merge::Direction::Unmerge,
        };
        let [n, k] = lora.shape();
        let shape = merge::Shape { n, k, fan_in_fan_out, dtype: weight.dtype(), direction };
        typed!(weight.dtype(), T => typed!(lora.lora_a.dtype(), A => self.merged::<T, A>(&shape, weight, lora, row_scale)))
    }

    fn nf4_merge(
        &self,
        direction: Direction,
        weight: &Nf4Matrix,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
    ) -> Result<Nf4Matrix> {
        let (packed, absmax) = match direction {
            Direction::Merge => {
                typed!(lora.lora_a.dtype(), A => self.nf4_merged::<A>(weight, lora, row_scale))?
            }
            Direction::Unmerge => {
                let values = self.nf4_dequantize(weight, weight.dtype())?.to_f32();
                let merged = Tensor::from_f32(weight.shape(), &values, DType::F32)?;
                let unmerged = self.merge(direction, &merged, lora, row_scale, false)?;
                self.nf4_quantize(&unmerged, weight.blocksize())?
            }
        };
        self.like(weight, packed, absmax)
    }

    fn gradients(&self, weight: Weight<'_>, adapter: &Adapter, x: &Tensor, dy: &Tensor) -> Result<Gradients> {
        self.layer_gradients(weight, adapter, x, dy)
    }

    fn adamw(
        &self,
        step: &AdamWStep,
        p: &[f32],
        gradient: &[f32],
        moments: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 3]> {
        self.adamw_step(step, p, gradient, moments)
    }

    fn importance(
        &self,
        p: &[f32],
        gradient: &[f32],
        betas: [f64; 2],
        state: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 2]> {
        self.importance_step(p, gradient, betas, state)
    }
}

impl Kernels {
    fn factors<A: Element>(&self, lora: &LowRank) -> Factors<A> {
        let upload = |t: &Tensor| self.0.upload(elements::<A>(t));
        let rank = lora.lora_a.shape()[0];
        Factors {
            lora_a: upload(&lora.lora_a),
            lora_b: upload(&lora.lora_b),
            rank,
            scaling: lora.scaling as f32,
        }
    }

    fn product<T: Element, A: Element>(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        extras: Extras<'_>,
    ) -> Result<Tensor> {
        let (device, [n, k]) = (&self.0, weight.shape());
        let shape = product_shape(x, weight);
        let plan = matmul::plan(&shape, self.properties())?;
        let x = device.upload(elements::<T>(x));
        let factors: Vec<_> = extras.adapters.iter().map(|l| self.factors::<A>(l)).collect();
        let index = extras.adapter_index.map(|index| device.upload(index));
        let index = || index.as_ref().map(Buffer::view);

        let views: Vec<_> = factors.iter().map(Factors::view).collect();
        let mut entries = device.alloc(AdapterTable::<A>::bytes(views.len()));
        let table = AdapterTable::upload(self.queue(), &views, k, n, entries.view_mut())?;
        let shrink = lora_shrink::plan(&table.shrink_shape(shape.tokens, T::DTYPE), self.properties())?;
        let mut v = device.alloc::<f32>(shrink.v_len());
        if !table.is_empty() {
            shrink.run(self.queue(), x.view(), &table, index(), v.view_mut())?;
        }
        let low_rank = matmul_low_rank(&table, index(), &v);
        let bias = extras.bias.map(|b| device.upload(elements::<T>(b)));
        let row_scale = extras.row_scale.map(|s| device.upload(s));
        let extras = matmul::Extras {
            bias: bias.as_ref().map(Buffer::view),
            row_scale: row_scale.as_ref().map(Buffer::view),
            low_rank: (!table.is_empty()).then_some(low_rank),
            overlap: false,
        };
        let mut workspace = device.alloc::<u8>(plan.workspace_bytes);
        let mut y = device.alloc::<T>(shape.tokens * n);
        let base = Base::<T>::new(self, weight);
        plan.run(self.queue(), x.view(), &base.view(), &extras, y.view_mut(), workspace.view_mut())?;
        tensor(&[shape.tokens, n], &y)
    }

    fn row_scale<A: Element>(
        &self,
        weight: Weight<'_>,
        lora: &LowRank,
        magnitude: &[f32],
    ) -> Result<Vec<f32>> {
        let (device, [n, k]) = (&self.0, weight.shape());
        let storage = match weight {
            Weight::Dense(weight) => dora_scale::Storage::Dense(weight.dtype()),
            Weight::Nf4(weight) => {
                dora_scale::Storage::Nf4 { blocksize: weight.blocksize(), dtype: weight.dtype() }
            }
        };
        let plan = dora_scale::plan(&dora_scale::Shape { n, k, storage }, self.properties())?;
        let factors = self.factors::<A>(lora);
        let (adapters, magnitude) = ([factors.view()], device.upload(magnitude));
        let mut workspace = device.alloc::<u8>(plan.workspace_bytes());
        let mut scale = device.alloc::<f32>(n);
        let (queue, workspace, out) = (self.queue(), workspace.view_mut(), scale.view_mut());
        match weight {
            Weight::Nf4(weight) => {
                plan.run_nf4(queue, &self.nf4(weight).view(), &adapters, magnitude.view(), workspace, out)?;
            }
            Weight::Dense(weight) => typed!(weight.dtype(), T => {
                let weight = device.upload(elements::<T>(weight));
                plan.run(queue, weight.view(), &adapters, magnitude.view(), workspace, out)?;
            }),
        }
        Ok(scale.download())
    }

    fn merged<T: Element, A: Element>(
        &self,
        shape: &merge::Shape,
        weight: &Tensor,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
    ) -> Result<Tensor> {
        let plan = merge::plan(shape, self.properties())?;
        let factors = self.factors::<A>(lora);
        let row_scale = row_scale.map(|s| self.0.upload(s));
        let update =
            UpdateView { adapters: &[factors.view()], row_scale: row_scale.as_ref().map(Buffer::view) };
        let mut out = self.0.alloc::<T>(weight.numel());
        let buffer = self.0.upload(elements::<T>(weight));
        plan.run(self.queue(), buffer.view(), &update, out.view_mut())?;
        tensor(weight.shape(), &out)
    }

    fn nf4_merged<A: Element>(
        &self,
        weight: &Nf4Matrix,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
    ) -> Result<(Vec<u8>, Vec<f32>)> {
        let ([n, k], blocksize) = (lora.shape(), weight.blocksize());
        let shape =
            nf4_merge::Shape { n, k, blocksize, dtype: weight.dtype(), target: nf4_merge::Target::Nf4 };
        let plan = nf4_merge::plan(&shape, weight.codebook(), self.properties())?;
        let factors = self.factors::<A>(lora);
        let row_scale = row_scale.map(|s| self.0.upload(s));
        let update =
            UpdateView { adapters: &[factors.view()], row_scale: row_scale.as_ref().map(Buffer::view) };
        let mut packed = self.0.alloc(packed_len(weight.numel()));
        let mut absmax = self.0.alloc(block_count(weight.numel(), blocksize));
        let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
        plan.run(self.queue(), &self.nf4(weight).view(), &update, out)?;
        Ok((packed.download(), absmax.download()))
    }
}

/// The weight of a layer on the device.
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
enum Base<T> {
    Dense(Buffer<T>),
    Nf4(Nf4Buffers),
}

impl<T: Element> Base<T> {
    fn new(kernels: &Kernels, weight: Weight<'_>) -> Self {
        match weight {
            Weight::Dense(weight) => Self::Dense(kernels.0.upload(elements::<T>(weight))),
            Weight::Nf4(weight) => Self::Nf4(kernels.nf4(weight)),
        }
    }

    fn view(&self) -> matmul::Weight<'_, T> {
        match self {
            Self::Dense(weight) => matmul::Weight::Dense(weight.view()),
            Self::Nf4(weight) => matmul::Weight::Nf4(weight.view()),
        }
    }
}

/// One adapter on the device.
struct Factors<A> {
    lora_a: Buffer<A>,
    lora_b: Buffer<A>,
    rank: usize,
    scaling: f32,
}

impl<A: Element> Factors<A> {
    fn view(&self) -> AdapterView<'_, A> {
        AdapterView {
            lora_a: self.lora_a.view(),
            lora_b: self.lora_b.view(),
            rank: self.rank,
            scaling: self.scaling,
        }
    }
}

fn matmul_low_rank<'a, A: Element>(
    table: &'a AdapterTable<'a, A>,
    index: Option<View<'a, i32>>,
    v: &'a Buffer<f32>,
) -> lora_kernels::cuda::LowRank<'a, A> {
    lora_kernels::cuda::LowRank { adapters: table, index, v: v.view() }
}

fn product_shape(x: &Tensor, weight: Weight<'_>) -> matmul::Shape {
    let [n, k] = weight.shape();
    let weight = match weight {
        Weight::Dense(_) => WeightFormat::Dense,
        Weight::Nf4(weight) => WeightFormat::Nf4 { blocksize: weight.blocksize() },
    };
    matmul::Shape { tokens: x.shape()[0], n, k, dtype: x.dtype(), weight }
}

/// What a buffer holds, as a tensor.
fn tensor<T: Element + Pod>(shape: &[usize], buffer: &Buffer<T>) -> Result<Tensor> {
    Tensor::new(shape, T::into_data(buffer.download()))
}
