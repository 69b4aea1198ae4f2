//! A training step by the kernels.

use half::{bf16, f16};
use lora_kernels::adapter::Adapter;
use lora_kernels::cpu::AdamWStep;
use lora_kernels::cuda::adamw::{self, Moments, TensorTable, TensorView};
use lora_kernels::cuda::dora_gradient::{self, Gradient};
use lora_kernels::cuda::lora_gradient::{self, Batch};
use lora_kernels::cuda::{
    AdapterTable, GradientTable, GradientView, adalora, lora_shrink, matmul_transposed,
};
use lora_kernels::{DType, Element, Error, Result, Tensor};
use lora_kernels_devices::Buffer;

use super::{Base, Kernels, matmul_low_rank, product_shape, tensor};
use crate::verify::cpu::{elements, typed};
use crate::verify::engine::{Engine, Extras, Gradients, LowRank, Weight};

impl Kernels {
    /// The gradients of a layer; see [`Engine::gradients`].
    pub(super) fn layer_gradients(
        &self,
        weight: Weight<'_>,
        adapter: &Adapter,
        x: &Tensor,
        dy: &Tensor,
    ) -> Result<Gradients> {
        let (a, b) = (adapter.lora_a(), adapter.lora_b());
        let low_rank = |lora_a: &Tensor, lora_b: &Tensor| LowRank {
            lora_a: lora_a.clone(),
            lora_b: lora_b.clone(),
            scaling: adapter.scaling(),
        };
        match adapter {
            Adapter::Lora(_) => Ok(self.lora_gradients(weight, &low_rank(a, b), x, dy)?.named()),
            Adapter::Dora(dora) => {
                let lora = low_rank(a, b);
                let row_scale = self.dora_scale(weight, &lora, &dora.magnitude().to_f32())?;
                let inverse_norm = self.dora_scale(weight, &lora, &vec![1.0; row_scale.len()])?;
                let adapters = std::slice::from_ref(&lora);
                let z = self.matmul(x, weight, Extras { adapters, ..Extras::default() })?;
                let (dz, dm) =
                    typed!(x.dtype(), T => self.without_scale::<T>(dy, &z, &row_scale, &inverse_norm))?;
                let mut all = self.lora_gradients(weight, &lora, x, &dz)?.named();
                all.0.push(("dm", widen(&dm)));
                Ok(all)
            }
            // A ⊙ E takes the place of A. It is f32, and so is B then.
            Adapter::AdaLora(adalora) => typed!(a.dtype(), T => {
                let (queue, device, shape) = (self.queue(), &self.0, [a.shape()[0], a.shape()[1]]);
                let plan = adalora::plan(
                    &adalora::Shape { rows: shape[0], columns: shape[1], dtype: a.dtype() },
                    self.properties(),
                )?;
                let on_a = device.upload(elements::<T>(a));
                let on_e = device.upload(elements::<T>(adalora.lora_e()));
                let mut folded = device.alloc::<f32>(a.numel());
                plan.fold(queue, on_a.view(), on_e.view(), folded.view_mut())?;
                let b = Tensor::from_f32(b.shape(), &b.to_f32(), DType::F32)?;
                let got = self.lora_gradients(weight, &low_rank(&tensor(a.shape(), &folded)?, &b), x, dy)?;
                let (mut gradient, mut de) = (device.upload(&got.da), device.alloc::<f32>(shape[0]));
                plan.gradient(queue, on_a.view(), on_e.view(), gradient.view_mut(), de.view_mut())?;
                let mut all = LoraGradients { da: gradient.download(), ..got }.named();
                all.0.push(("dE", widen(&de.download())));
                Ok(all)
            }),
            Adapter::Embedding(_) => Err(Error::unsupported(self.name(), "the gradient of an embedding")),
        }
    }

    fn lora_gradients(
        &self,
        weight: Weight<'_>,
        lora: &LowRank,
        x: &Tensor,
        dy: &Tensor,
    ) -> Result<LoraGradients> {
        typed!(x.dtype(), T => typed!(lora.lora_a.dtype(), A => self.lora_gradients_of::<T, A>(weight, lora, x, dy)))
    }

    fn lora_gradients_of<T: Element, A: Element>(
        &self,
        weight: Weight<'_>,
        lora: &LowRank,
        x: &Tensor,
        dy: &Tensor,
    ) -> Result<LoraGradients> {
        let (device, queue, properties, [n, k]) = (&self.0, self.queue(), self.properties(), weight.shape());
        let shape = product_shape(x, weight);
        let tokens = shape.tokens;
        let base = Base::<T>::new(self, weight);
        let (x, dy) = (device.upload(elements::<T>(x)), device.upload(elements::<T>(dy)));
        let factors = self.factors::<A>(lora);
        let mut entries = device.alloc(AdapterTable::<A>::bytes(1));
        let table = AdapterTable::upload(queue, &[factors.view()], k, n, entries.view_mut())?;
        let plan = lora_shrink::plan(&table.shrink_shape(tokens, T::DTYPE), properties)?;
        let mut v = device.alloc::<f32>(plan.v_len());
        plan.run(queue, x.view(), &table, None, v.view_mut())?;
        let plan =
            lora_shrink::plan_transposed(&table.shrink_transposed_shape(tokens, T::DTYPE), properties)?;
        let mut u = device.alloc::<f32>(plan.v_len());
        plan.run(queue, dy.view(), &table, None, u.view_mut())?;

        let plan = matmul_transposed::plan(&shape, properties)?;
        let mut workspace = device.alloc::<u8>(plan.workspace_bytes);
        let mut dx = device.alloc::<T>(tokens * k);
        let branch = matmul_low_rank(&table, None, &u);
        let scratch = workspace.view_mut();
        plan.run(queue, dy.view(), &base.view(), Some(&branch), dx.view_mut(), scratch)?;

        let rank = factors.rank;
        let (mut da, mut db) = (device.alloc::<f32>(rank * k), device.alloc::<f32>(n * rank));
        let mut entries = device.alloc(GradientTable::bytes(1));
        let view = GradientView { lora_a: da.view_mut(), lora_b: db.view_mut(), rank };
        let mut gradients = GradientTable::upload(queue, vec![view], k, n, entries.view_mut())?;
        let plan = lora_gradient::plan(&gradients.shape(tokens, T::DTYPE), properties)?;
        let mut workspace = device.alloc::<u8>(plan.workspace_bytes);
        let batch = Batch { x: x.view(), dy: dy.view(), v: v.view(), u: u.view(), index: None };
        plan.run(queue, &batch, false, &mut gradients, workspace.view_mut())?;
        let dx = dx.download().iter().map(|dx| dx.to_f64()).collect();
        Ok(LoraGradients { dx, da: da.download(), db: db.download() })
    }

    /// dY without DoRA's scale, and the gradient of the magnitude.
    fn without_scale<T: Element>(
        &self,
        dy: &Tensor,
        z: &Tensor,
        row_scale: &[f32],
        inverse_norm: &[f32],
    ) -> Result<(Tensor, Vec<f32>)> {
        let device = &self.0;
        let shape = dora_gradient::Shape { tokens: dy.shape()[0], n: row_scale.len(), dtype: T::DTYPE };
        let plan = dora_gradient::plan(&shape, self.properties())?;
        let (mut dz, z) = (device.upload(elements::<T>(dy)), device.upload(elements::<T>(z)));
        let [row_scale, inverse_norm] = [row_scale, inverse_norm].map(|factor| device.upload(factor));
        let mut dm = device.alloc::<f32>(shape.n);
        let mut workspace = device.alloc::<u8>(plan.workspace_bytes);
        let gradient = Gradient {
            dy: dz.view_mut(),
            z: z.view(),
            row_scale: row_scale.view(),
            inverse_norm: inverse_norm.view(),
            dm: dm.view_mut(),
        };
        plan.run(self.queue(), gradient, false, workspace.view_mut())?;
        Ok((tensor(dy.shape(), &dz)?, dm.download()))
    }

    /// One step of one tensor; see [`Engine::adamw`].
    pub(super) fn adamw_step(
        &self,
        step: &AdamWStep,
        p: &[f32],
        gradient: &[f32],
        moments: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 3]> {
        let device = &self.0;
        let [mut p, mut m, mut v] = [p, moments[0], moments[1]].map(|values| device.upload(values));
        let gradient = device.upload(gradient);
        let mut entries = device.alloc(TensorTable::bytes(1));
        let moments = Moments::F32 { m: m.view_mut(), v: v.view_mut() };
        let view = TensorView { parameter: p.view_mut(), gradient: gradient.view(), moments };
        let mut tensors = TensorTable::upload(self.queue(), vec![view], entries.view_mut())?;
        let plan = adamw::plan(&tensors.shape(), self.properties())?;
        plan.step(self.queue(), step, &mut tensors, None, false)?;
        Ok([p, m, v].map(|buffer| buffer.download()))
    }

    /// One step of the averages; see [`Engine::importance`].
    pub(super) fn importance_step(
        &self,
        p: &[f32],
        gradient: &[f32],
        betas: [f64; 2],
        state: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 2]> {
        let device = &self.0;
        let shape = adalora::Shape { rows: 1, columns: p.len(), dtype: DType::F32 };
        let plan = adalora::plan(&shape, self.properties())?;
        let [p, gradient] = [p, gradient].map(|values| device.upload(values));
        let [mut sensitivity, mut uncertainty] = state.map(|values| device.upload(values));
        let averages = [sensitivity.view_mut(), uncertainty.view_mut()];
        plan.importance(self.queue(), p.view(), gradient.view(), betas, averages)?;
        Ok([sensitivity, uncertainty].map(|buffer: Buffer<f32>| buffer.download()))
    }
}

/// The gradients of a layer with one adapter.
struct LoraGradients {
    dx: Vec<f64>,
    da: Vec<f32>,
    db: Vec<f32>,
}

impl LoraGradients {
    fn named(self) -> Gradients {
        Gradients(vec![("dX", self.dx), ("dA", widen(&self.da)), ("dB", widen(&self.db))])
    }
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}
