//! `train_step/`: one layer with its adapter, the gradients that PEFT's autograd gave, and torch's AdamW.

use anyhow::{Context, Result, ensure};
use lora_kernels::adapter::{AdaLora, Adapter, Dora, Lora};
use lora_kernels::cpu::AdamW;
use lora_kernels::{DType, Tensor};

use super::engine::{Engine, Weight};
use super::layer::{Frozen, Layer, cast, decoded};
use super::outputs;
use super::report::Case;
use super::truth::Scale;
use super::{Family, blocks, bounds};
use crate::tensors::{Sidecar, TensorFile};

/// Inputs, weights and adapters of one type, and the names of what the packages made of them.
struct Variant {
    prefix: &'static str,
    x: DType,
    adapter: DType,
}

const F32: Variant = Variant { prefix: "f32", x: DType::F32, adapter: DType::F32 };
const MIXED: Variant = Variant { prefix: "bf16_mixed", x: DType::BF16, adapter: DType::F32 };
const ALL: Variant = Variant { prefix: "bf16_all", x: DType::BF16, adapter: DType::BF16 };

/// Checks the family.
pub fn check(family: &mut Family) {
    for pair in family.pairs("", |_| true) {
        let opened = Step::open(&pair.sidecar, &pair.tensors);
        let Some(step) = family.need(&pair.label, opened) else { continue };
        let known = [F32, MIXED, ALL];
        let stored = known.iter().filter(|variant| pair.tensors.has(&format!("{}.dX", variant.prefix)));
        for variant in stored {
            family.case(&pair.label, variant.prefix, |case, engine| step.check(case, engine, variant));
        }
        if !pair.tensors.has("f32.dX") {
            family.case(&pair.label, "f32", |_, _| anyhow::bail!("there is no `f32.dX`"));
        }
        if pair.sidecar.has("adamw") {
            family.case(&pair.label, "adamw", |case, engine| step.check_adamw(case, engine));
        }
    }
}

/// A layer and a batch.
struct Step<'a> {
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    weight: Frozen,
    bias: Option<Tensor>,
    adapter: Adapter,
}

/// A number by the formula, and the same sum over magnitudes.
#[derive(Clone, Copy, Default)]
struct Sum {
    value: f64,
    size: f64,
}

impl Sum {
    fn of(value: f64) -> Self {
        Self { value, size: value.abs() }
    }

    fn add(&mut self, a: Sum, b: Sum) {
        self.value += a.value * b.value;
        self.size += a.size * b.size;
    }

    fn times(self, factor: f64) -> Self {
        Self { value: self.value * factor, size: self.size * factor.abs() }
    }
}

/// One gradient by the formula, and how often f32 rounds on the way to it.
struct Exact {
    /// `dX`, `dA` and so on, as the file calls it.
    name: &'static str,
    sums: Vec<Sum>,
    /// What a f32 path may be off by, as a share of the sum over magnitudes.
    share: f64,
    /// How many tensors on the way the packages store in the type of the adapter.
    stored: f64,
}

impl<'a> Step<'a> {
    fn open(sidecar: &'a Sidecar, tensors: &'a TensorFile) -> Result<Self> {
        let get = |name: &str| tensors.get(name)?.tensor();
        let (lora_a, lora_b, scaling) = (get("lora_A")?, get("lora_B")?, sidecar.number("scaling")?);
        ensure!(lora_a.shape().len() == 2 && lora_b.shape().len() == 2, "lora_A, lora_B: wanted matrices");
        let (n, k) = (lora_b.shape()[0], lora_a.shape()[1]);
        let adapter = if tensors.has("lora_E") {
            let init_r = sidecar.number("ranknum")? as usize;
            AdaLora::new(lora_a, get("lora_E")?, lora_b, scaling, init_r)?.into()
        } else if tensors.has("magnitude") {
            Dora::new(Lora::new(lora_a, lora_b, scaling)?, get("magnitude")?)?.into()
        } else {
            Lora::new(lora_a, lora_b, scaling)?.into()
        };
        let weight = match tensors.find("weight")? {
            Some(weight) => Frozen::Dense(weight.shaped(&[n, k])?.tensor()?),
            None => {
                let nested = sidecar.flag("double_quant")?.then_some("base.");
                let blocksize = sidecar.size("blocksize")?;
                blocks::matrix(tensors, "base.", nested, &[n, k], blocksize, DType::F32)?.into()
            }
        };
        let bias = tensors.find("bias")?.map(|bias| bias.shaped(&[n])?.tensor()).transpose()?;
        let step = Self { sidecar, tensors, weight, bias, adapter };
        let m = step.tensors.get("x")?.shape()[0];
        tensors.get("x")?.shaped(&[m, k])?;
        tensors.get("dY")?.shaped(&[m, n])?;
        Ok(step)
    }

    /// Forward and backward in one type.
    fn check(&self, case: &mut Case, engine: &dyn Engine, variant: &Variant) -> Result<()> {
        let rounded = |name: &str| cast(&self.tensors.get(name)?.tensor()?, variant.x);
        let (x, dy) = (rounded("x")?, rounded("dY")?);
        let layer = Layer::new(self.weight.clone(), self.bias.clone())
            .with_adapter(&self.adapter, variant.adapter)?
            .in_dtype(variant.x)?;
        let get = |name: &str| self.tensors.get(&format!("{}.{name}", variant.prefix));
        let exact = variant.prefix == "f32";
        let truth = self.tensors.find("f64.y")?.filter(|_| exact && !self.has_f32_scale());
        outputs::check(case, engine, &layer, &x, &get("y")?, truth.as_ref())?;

        let adapter = self.adapter_in(variant.adapter)?;
        let weight = match &self.weight {
            Frozen::Dense(weight) => Frozen::Dense(cast(weight, variant.x)?),
            nf4 => nf4.clone(),
        };
        let borrowed = match &weight {
            Frozen::Dense(weight) => Weight::Dense(weight),
            Frozen::Nf4(weight) => Weight::Nf4(weight),
        };
        let ours = case.offered(engine.gradients(borrowed, &adapter, &x, &dy))?;
        for gradient in self.truth(&weight, &adapter, &layer, &x, &dy) {
            let Exact { name, sums, share, stored } = &gradient;
            let values: Vec<f64> = sums.iter().map(|sum| sum.value).collect();
            let unit = if variant.adapter == DType::F32 { 0.0 } else { variant.adapter.unit_roundoff() };
            let kept = if *name == "dX" { variant.x } else { variant.adapter };
            // The input's gradient is the sum of two that are stored in its type, and is stored again.
            let halves =
                if *name == "dX" && variant.x != DType::F32 { 2.0 * variant.x.unit_roundoff() } else { 0.0 };
            let packages = |i: usize| {
                let error = (share + halves + stored * unit * (1.0 + 8.0 * unit)) * sums[i].size;
                bounds::rounded(kept, values[i], error)
            };
            let theirs = get(name)?.f64s()?;
            case.close(&format!("{}.{name} (formula)", variant.prefix), &theirs, &values, packages);
            let slack = engine.slack(&x, borrowed)?;
            let own = |i: usize| {
                let kept = if *name == "dX" { variant.x } else { DType::F32 };
                bounds::rounded(kept, values[i], (share + slack.weight + slack.low_rank) * sums[i].size)
            };
            if let Some(ours) = &ours {
                let ours = ours.get(name).with_context(|| format!("no {name} came back"))?;
                case.close(&format!("{}.{name}", variant.prefix), ours, &theirs, |i| own(i) + packages(i));
                if exact {
                    let double = |i: usize| self.f64_share() * sums[i].size;
                    let theirs = self.tensors.get(&format!("f64.{name}"))?.f64s()?;
                    case.close(&format!("f64.{name} (formula)"), &theirs, &values, double);
                    case.close(&format!("f64.{name}"), ours, &theirs, |i| own(i) + double(i));
                }
            }
        }
        Ok(())
    }

    /// PEFT adds AdaLoRA's 1e-5 to the rank in f32, also in its f64 run.
    fn has_f32_scale(&self) -> bool {
        matches!(self.adapter, Adapter::AdaLora(_))
    }

    /// How far two sums in f64 may be apart, as a share of their magnitudes: some hundred terms each.
    fn f64_share(&self) -> f64 {
        let [n, k] = [self.adapter.out_features(), self.adapter.in_features()];
        let scale = if self.has_f32_scale() { DType::F32.unit_roundoff() } else { 0.0 };
        (2 * (n + k) + 64) as f64 * f64::EPSILON + scale
    }

    fn adapter_in(&self, dtype: DType) -> Result<Adapter> {
        match &self.adapter {
            adapter if dtype == DType::F32 => Ok(adapter.clone()),
            Adapter::Lora(lora) => {
                Ok(Lora::new(cast(lora.lora_a(), dtype)?, cast(lora.lora_b(), dtype)?, lora.scaling())?
                    .into())
            }
            _ => anyhow::bail!("{dtype}: only LoRA is stored in this type"),
        }
    }

    /// `dX = dZ (W + s B A)`, `dA = s (dZ B)ᵀ x`, `dB = s dZᵀ (x Aᵀ)` with `dZ = scale dY`; DoRA's `dm = Σ dY z / ||W + s B A||`,
    /// and of AdaLoRA's `A' = A E` those of A and E.
    fn truth(
        &self,
        weight: &Frozen,
        adapter: &Adapter,
        layer: &Layer,
        x: &Tensor,
        dy: &Tensor,
    ) -> Vec<Exact> {
        let (n, k, rank) = (adapter.out_features(), adapter.in_features(), adapter.rank());
        let m = x.shape()[0];
        let w = match weight {
            Frozen::Dense(weight) => weight.to_f64(),
            Frozen::Nf4(weight) => decoded(weight, x.dtype()).to_f64(),
        };
        let (x, dy, b, s) = (x.to_f64(), dy.to_f64(), adapter.lora_b().to_f64(), adapter.scaling());
        let plain_a = adapter.lora_a().to_f64();
        let e = match adapter {
            Adapter::AdaLora(adalora) => adalora.lora_e().to_f64(),
            _ => vec![1.0; rank],
        };
        let a: Vec<f64> = plain_a.iter().enumerate().map(|(i, a)| a * e[i / k.max(1)]).collect();
        let scale = layer.scale();
        let scale_of = |n: usize| scale.as_ref().map_or(Scale::ONE, |scale| scale[n]);
        // PEFT splits what DoRA scales by f into f - 1 and 1.
        let spread = |n: usize| 1.0 + (scale_of(n).value - 1.0).abs();
        let dz = |i: usize, n_: usize| {
            let dz = dy[i * n + n_] * scale_of(n_).value;
            Sum { value: dz, size: dy[i * n + n_].abs() * spread(n_) }
        };
        let sum = |count: usize, term: &dyn Fn(usize) -> [Sum; 2]| {
            let mut sum = Sum::default();
            (0..count).map(term).for_each(|[a, b]| sum.add(a, b));
            sum
        };
        let grid = |rows: usize, columns: usize, at: &dyn Fn(usize, usize) -> Sum| -> Vec<Sum> {
            (0..rows * columns).map(|i| at(i / columns, i % columns)).collect()
        };
        let v =
            grid(m, rank, &|i, r| sum(k, &|k_| [Sum::of(x[i * k + k_]), Sum::of(a[r * k + k_])]).times(s));
        let u = grid(m, rank, &|i, r| sum(n, &|n_| [dz(i, n_), Sum::of(b[n_ * rank + r])]).times(s));
        let da = grid(rank, k, &|r, k_| sum(m, &|i| [u[i * rank + r], Sum::of(x[i * k + k_])]));
        let db = grid(n, rank, &|n_, r| sum(m, &|i| [dz(i, n_), v[i * rank + r]]));
        let dx = grid(m, k, &|i, k_| {
            let mut base = sum(n, &|n_| [dz(i, n_), Sum::of(w[n_ * k + k_])]);
            (0..rank).for_each(|r| base.add(u[i * rank + r], Sum::of(a[r * k + k_])));
            base
        });
        // Sums one after the other, each product and each scale on the way, and what DoRA's factor is off by.
        let factor =
            (0..n).map(|n| bounds::scale_error(&scale_of(n))).fold(0.0, f64::max) + bounds::accumulation(4);
        let share =
            |sums: &[usize]| factor + sums.iter().map(|terms| bounds::accumulation(terms + 3)).sum::<f64>();
        let exact = |name, sums, terms: &[usize], stored| Exact { name, sums, share: share(terms), stored };
        let mut all = vec![exact("dX", dx, &[n, rank], 3.0), exact("dB", db, &[k, m], 2.0)];
        match adapter {
            Adapter::AdaLora(_) => {
                let de = grid(rank, 1, &|r, _| sum(k, &|k_| [da[r * k + k_], Sum::of(plain_a[r * k + k_])]));
                let da = grid(rank, k, &|r, k_| da[r * k + k_].times(e[r]));
                all.extend([exact("dA", da, &[n, m], 2.0), exact("dE", de, &[n, m, k], 2.0)]);
            }
            Adapter::Dora(dora) => {
                let m_ = dora.magnitude().to_f64();
                let z = |i: usize, n_: usize| {
                    let mut z = sum(k, &|k_| [Sum::of(x[i * k + k_]), Sum::of(w[n_ * k + k_])]);
                    (0..rank).for_each(|r| z.add(v[i * rank + r], Sum::of(b[n_ * rank + r])));
                    z
                };
                let dm = grid(n, 1, &|n_, _| {
                    sum(m, &|i| [Sum::of(dy[i * n + n_]), z(i, n_)]).times(scale_of(n_).value / m_[n_])
                });
                all.extend([exact("dA", da, &[n, m], 2.0), exact("dm", dm, &[k, rank, m], 2.0)]);
            }
            _ => all.push(exact("dA", da, &[n, m], 2.0)),
        }
        all
    }

    /// Torch's steps from its own moments, in f32 and f64, and ours from the same.
    fn check_adamw(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let config = self.sidecar.object("adamw")?;
        let adamw = AdamW {
            beta1: config.number("b1")?,
            beta2: config.number("b2")?,
            epsilon: config.number("eps")?,
            weight_decay: config.number("wd")?,
        };
        let lr = config.number("lr")?;
        for (step, factor) in [(1, "A"), (1, "B"), (5, "A"), (5, "B")] {
            let get = |name: String| self.tensors.get(&name);
            let start = get(format!("lora_{factor}"))?.f32s()?;
            let moment = |name: &str| match step {
                1 => Ok(vec![0.0; start.len()]),
                _ => get(format!("adamw.step5.{name}0_{factor}"))?.f32s(),
            };
            let (m0, v0) = (moment("m")?, moment("v")?);
            let gradient = get(format!("f32.d{factor}"))?.f32s()?;
            let ours = case.offered(engine.adamw(&adamw.step(lr, step)?, &start, &gradient, [&m0, &v0]))?;
            let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|v| f64::from(*v)).collect() };
            for prefix in ["f32", "f64"] {
                let gradient = get(format!("{prefix}.d{factor}"))?.f64s()?;
                let exact: Vec<[(f64, f64); 3]> = (0..start.len())
                    .map(|i| {
                        let [p, m, v] = [start[i], m0[i], v0[i]].map(f64::from);
                        bounds::adamw(&adamw, lr, step, [p, gradient[i], m, v])
                    })
                    .collect();
                for (part, name) in ["", "m_", "v_"].into_iter().enumerate() {
                    let name = format!("adamw.{prefix}.step{step}.{name}{factor}");
                    let theirs = get(name.clone())?.f64s()?;
                    let values: Vec<f64> = exact.iter().map(|exact| exact[part].0).collect();
                    // Of f64 2^-29 of what f32 may be off by.
                    let unit = if prefix == "f32" { 1.0 } else { 2f64.powi(-29) };
                    case.close(&format!("{name} (formula)"), &theirs, &values, |i| unit * exact[i][part].1);
                    if let Some(ours) = ours.as_ref().filter(|_| prefix == "f32") {
                        case.close(&name, &wide(&ours[part]), &theirs, |i| 2.0 * exact[i][part].1);
                    }
                }
            }
        }
        Ok(())
    }
}
