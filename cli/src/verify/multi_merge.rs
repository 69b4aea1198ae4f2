//! `peft/multi_merge`: several adapters on one module, active together, and merged one after another.
//!
//! Each adapter adds its delta to what the ones before it made of the weight; DoRA then scales the rows of that sum by a
//! factor that it takes from the base weight alone. So the order matters, and everything together is
//! `F_0 W + F_1 delta_1 + F_2 delta_2 + ...`, where `F_i` is the product of the factors that come at or after adapter `i`.

use anyhow::{Context, Result};
use lora_kernels::{DType, Tensor};

use super::bounds;
use super::bounds::Factors;
use super::engine::{Direction, Engine, Extras, LowRank, Weight};
use super::layer::from_f64;
use super::report::Case;
use super::truth::{Factor, Linear, Scale};
use super::{Family, Pair};
use crate::tensors::{Stored, TensorFile};

/// Checks every combination in a file.
pub fn check(family: &mut Family, pair: &Pair) {
    let combinations: Vec<&str> = pair.tensors.names().filter_map(|n| n.strip_prefix("merged.")).collect();
    if combinations.is_empty() {
        family.case(&pair.label, "", |_, _| anyhow::bail!("there is no `merged.*`"));
    }
    for combination in combinations {
        family.case(&pair.label, combination, |case, engine| {
            Combination::open(pair, combination)?.check(case, engine)
        });
    }
}

/// Adapters in the order in which they are merged.
struct Combination<'a> {
    name: &'a str,
    tensors: &'a TensorFile,
    weight: Tensor,
    n: usize,
    k: usize,
    adapters: Vec<Part>,
}

/// One of them.
struct Part {
    low_rank: LowRank,
    factor: Factor,
    magnitude: Option<Vec<f32>>,
}

impl<'a> Combination<'a> {
    fn open(pair: &'a Pair, name: &'a str) -> Result<Self> {
        let tensors = &pair.tensors;
        let weight = tensors.get("base_weight")?.tensor()?;
        let [n, k] = *weight.shape() else {
            anyhow::bail!("base_weight: wanted a matrix, got {:?}", weight.shape())
        };
        let scaling = pair.sidecar.object("scaling")?;
        let part = |adapter: &str| -> Result<Part> {
            let lora_a = tensors.get(&format!("{adapter}.lora_A"))?.tensor()?;
            let rank = *lora_a.shape().first().context("lora_A: wanted a matrix")?;
            anyhow::ensure!(
                lora_a.shape() == [rank, k],
                "{adapter}.lora_A: wanted [rank, {k}], got {:?}",
                lora_a.shape()
            );
            let lora_b = tensors.get(&format!("{adapter}.lora_B"))?.shaped(&[n, rank])?.tensor()?;
            let magnitude = tensors.find(&format!("{adapter}.magnitude"))?;
            let magnitude = magnitude.map(|m| m.shaped(&[n])?.f32s()).transpose()?;
            let scaling = scaling.number(adapter)?;
            let factor = Factor { a: lora_a.to_f64(), b: lora_b.to_f64(), rank, scaling };
            Ok(Part { low_rank: LowRank { lora_a, lora_b, scaling }, factor, magnitude })
        };
        let adapters = name.split('+').map(part).collect::<Result<_>>()?;
        Ok(Self { name, tensors, weight, n, k, adapters })
    }

    fn get(&self, what: &str) -> Result<Stored> {
        self.tensors.get(&format!("{what}.{}", self.name))
    }

    fn check(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let mut row_scales = Vec::new();
        for part in &self.adapters {
            let Some(magnitude) = &part.magnitude else {
                row_scales.push(None);
                continue;
            };
            let scale = engine.dora_scale(Weight::Dense(&self.weight), &part.low_rank, magnitude);
            let Some(scale) = case.offered(scale)? else { return Ok(()) };
            row_scales.push(Some(scale));
        }
        let merged = self.check_merged(case, engine, &row_scales)?;
        self.check_active(case, engine, &row_scales)?;
        merged.map_or(Ok(()), |(weight, error)| self.check_forward_merged(case, engine, &weight, &error))
    }

    /// DoRA's factors by the formula, `None` for other adapters.
    fn scales(&self) -> Vec<Option<Vec<Scale>>> {
        let base = self.weight.to_f64();
        let scale = |part: &Part| {
            let magnitude: Vec<f64> = part.magnitude.as_ref()?.iter().map(|&m| f64::from(m)).collect();
            Some(Linear::new(&base, self.n, self.k).dora_scale(&part.factor, &magnitude))
        };
        self.adapters.iter().map(scale).collect()
    }

    /// Merges one adapter after the other. The engine's weight, and how far it may be off.
    fn check_merged(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        row_scales: &[Option<Vec<f32>>],
    ) -> Result<Option<(Tensor, Vec<f64>)>> {
        let (mut ours, mut exact) = (Some(self.weight.clone()), self.weight.to_f64());
        let mut error = vec![0.0; exact.len()];
        for ((part, scale), row_scale) in self.adapters.iter().zip(self.scales()).zip(row_scales) {
            let step = Linear::new(&exact, self.n, self.k).with_scale(scale.as_deref()).merge(&part.factor);
            error = step
                .iter()
                .zip(&error)
                .map(|(t, e)| bounds::merge(DType::F32, t) + t.scale.value.abs() * e)
                .collect();
            exact = step.iter().map(|t| t.w).collect();
            if let Some(weight) = ours {
                let merged =
                    engine.merge(Direction::Merge, &weight, &part.low_rank, row_scale.as_deref(), false);
                ours = case.offered(merged)?;
            }
        }
        let stored = self.get("merged")?.shaped(&[self.n, self.k])?.f64s()?;
        case.close("merged (formula)", &stored, &exact, |i| error[i]);
        let Some(ours) = ours else { return Ok(None) };
        case.close("merged", &ours.to_f64(), &stored, |i| 2.0 * error[i]);
        Ok(Some((ours, error)))
    }

    fn check_forward_merged(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        weight: &Tensor,
        error: &[f64],
    ) -> Result<()> {
        let x = self.tensors.get("x")?.tensor()?;
        let (inputs, values) = (x.to_f64(), weight.to_f64());
        let exact = Linear::new(&values, self.n, self.k).forward(&inputs, |_| None);
        let stored = self.get("y_merged")?.f64s()?;
        let Some(y) = case.offered(engine.matmul(&x, Weight::Dense(weight), Extras::default()))? else {
            return Ok(());
        };
        case.close("y_merged", &y.to_f64(), &stored, |i| {
            let (token, row) = (i / self.n * self.k, i % self.n * self.k);
            let weight = bounds::through_weight(&inputs[token..token + self.k], &error[row..row + self.k]);
            2.0 * (bounds::forward_packages(DType::F32, Factors::F32, &exact[i]) + weight)
        });
        Ok(())
    }

    /// All adapters active at once, as one product with stacked factors: `F_0 (x W^T + sum of (F_i / F_0) lora_i)`.
    fn check_active(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        row_scales: &[Option<Vec<f32>>],
    ) -> Result<()> {
        let x = self.tensors.get("x")?.tensor()?;
        let exact_scales = self.scales();
        let values =
            |s: &Option<Vec<Scale>>| s.as_ref().map(|s| s.iter().map(|s| s.value).collect::<Vec<f64>>());
        let stacked = self.stack(&exact_scales.iter().map(values).collect::<Vec<_>>());
        let scale: Vec<Scale> = (0..self.n).map(|row| combined(&exact_scales, row)).collect();
        let base = self.weight.to_f64();
        let linear = Linear::new(&base, self.n, self.k).with_scale(Some(&scale));
        let exact = linear.forward(&x.to_f64(), |_| Some(&stacked));
        let formula: Vec<f64> = exact.iter().map(|t| t.y).collect();
        let stored = self.get("y")?.f64s()?;
        case.close("y (formula)", &stored, &formula, |i| {
            bounds::forward_packages(DType::F32, Factors::F32, &exact[i])
        });

        let ours =
            |s: &Option<Vec<f32>>| s.as_ref().map(|s| s.iter().map(|&s| f64::from(s)).collect::<Vec<f64>>());
        let ours: Vec<_> = row_scales.iter().map(ours).collect();
        let stacked = self.stack(&ours);
        let lora_a = from_f64(&[stacked.rank, self.k], &stacked.a)?;
        let lora_b = from_f64(&[self.n, stacked.rank], &stacked.b)?;
        let row_scale: Vec<f32> = (0..self.n).map(|row| product(&ours, 0, row) as f32).collect();
        let adapters = [LowRank { lora_a, lora_b, scaling: 1.0 }];
        let extras = Extras { row_scale: Some(&row_scale), adapters: &adapters, ..Extras::default() };
        if let Some(y) = case.offered(engine.matmul(&x, Weight::Dense(&self.weight), extras))? {
            let bound = |i: usize| 2.0 * bounds::forward_packages(DType::F32, Factors::F32, &exact[i]);
            case.close("y", &y.to_f64(), &stored, bound);
        }
        Ok(())
    }

    /// All factors under each other, with scalings and `F_i / F_0` in `b`.
    fn stack(&self, scales: &[Option<Vec<f64>>]) -> Factor {
        let rank = self.adapters.iter().map(|p| p.factor.rank).sum();
        let a = self.adapters.iter().flat_map(|p| p.factor.a.iter().copied()).collect();
        let row = |row: usize| {
            self.adapters.iter().enumerate().flat_map(move |(i, part)| {
                let scale = part.factor.scaling * product(scales, i, row) / product(scales, 0, row);
                part.factor.b[row * part.factor.rank..][..part.factor.rank].iter().map(move |b| scale * b)
            })
        };
        Factor { a, b: (0..self.n).flat_map(row).collect(), rank, scaling: 1.0 }
    }
}

/// The product of the factors of a row from adapter `first` on.
fn product(scales: &[Option<Vec<f64>>], first: usize, row: usize) -> f64 {
    scales[first..].iter().flatten().map(|s| s[row]).product()
}

/// The product of all factors of a row. Each of them enters the result twice: in the row's factor, and in a quotient. Its
/// conditions add up, and `k` grows with the square because its root counts.
fn combined(scales: &[Option<Vec<Scale>>], row: usize) -> Scale {
    let all: Vec<Scale> = scales.iter().flatten().map(|s| s[row]).collect();
    Scale {
        value: all.iter().map(|s| s.value).product(),
        condition: 2.0 * all.iter().map(|s| s.condition).sum::<f64>(),
        rank: all.iter().map(|s| s.rank).max().unwrap_or(0),
        k: (2 * all.len()).pow(2) * all.iter().map(|s| s.k).max().unwrap_or(0),
    }
}
