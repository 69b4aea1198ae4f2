//! One batch in training: what the CPU makes of it, the same in f64, and how far apart they may be.

#![allow(dead_code, reason = "no test needs all of it")]

use lora_kernels::cpu::{self, Dropout, LoraBatch, LoraGradient, LowRank};
use lora_kernels::{DType, Element};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A number in f64, and the same sum over magnitudes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sum {
    pub value: f64,
    pub magnitude: f64,
}

impl Sum {
    fn add(&mut self, factors: [Sum; 2]) {
        self.value += factors[0].value * factors[1].value;
        self.magnitude += factors[0].magnitude * factors[1].magnitude;
    }

    fn of(value: impl Element) -> Self {
        let value = value.to_f64();
        Self { value, magnitude: value.abs() }
    }
}

/// How far a term is off after `count` roundings of f32, as a share of itself (Higham, Accuracy and Stability of Numerical
/// Algorithms, lemma 3.1).
pub fn roundings(count: usize) -> f64 {
    let c = count as f64 * DType::F32.unit_roundoff();
    c / (1.0 - c)
}

/// Asserts that each number is within `share` of its magnitude, before a rounding to `dtype`.
pub fn assert_close(what: &str, got: &[f64], truth: &[Sum], share: f64, dtype: DType) {
    assert_eq!(got.len(), truth.len(), "{what}: length");
    let smallest = match dtype {
        DType::F16 => 2f64.powi(-24),
        DType::F32 | DType::BF16 => 2f64.powi(-133),
    };
    for (i, (got, truth)) in got.iter().zip(truth).enumerate() {
        let sum = share * truth.magnitude;
        let rounding = if dtype == DType::F32 { 0.0 } else { dtype.unit_roundoff() };
        let bound = sum + rounding * (truth.value.abs() + sum) + smallest;
        let off = (got - truth.value).abs();
        // Written so that NaN fails.
        assert!(off <= bound, "{what}[{i}]: {got:e}, not {truth:?}: off by {off:e} of {bound:e}");
    }
}

pub fn widened<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| value.to_f64()).collect()
}

pub fn round_to<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::from_f32(value)).collect()
}

/// An adapter that owns its factors.
#[derive(Debug, Clone)]
pub struct Owned<A> {
    pub a: Vec<A>,
    pub b: Vec<A>,
    pub rank: usize,
    pub scaling: f32,
}

impl<A> Owned<A> {
    pub fn low_rank(&self) -> LowRank<'_, A> {
        LowRank { lora_a: &self.a, lora_b: &self.b, rank: self.rank, scaling: self.scaling }
    }
}

/// Tokens of a layer with adapters, and the gradient of its outputs.
#[derive(Debug, Clone)]
pub struct Batch<T, A> {
    /// `[m, n, k]`.
    pub shape: [usize; 3],
    pub x: Vec<T>,
    pub dy: Vec<T>,
    pub adapters: Vec<Owned<A>>,
    pub index: Option<Vec<i32>>,
    pub dropout: Option<Dropout>,
}

/// What comes out of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome<F, X> {
    /// `[m, max_rank]`.
    pub v: Vec<F>,
    /// `[m, max_rank]`.
    pub u: Vec<F>,
    /// dA and dB of each adapter.
    pub gradients: Vec<[Vec<F>; 2]>,
    /// `[m, k]`, what adapters add to the gradient of `x`.
    pub dx: Vec<X>,
}

impl<T: Element, A: Element> Batch<T, A> {
    /// Random numbers; `mixed`: each token has an adapter of its own, or none.
    pub fn random(shape: [usize; 3], ranks: &[usize], mixed: bool, dropout: Option<f32>, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut values =
            |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let [m, n, k] = shape;
        let (x, dy) = (round_to(&values(m * k)), round_to(&values(m * n)));
        let adapters = ranks.iter().map(|&rank| Owned {
            a: round_to(&values(rank * k)),
            b: round_to(&values(n * rank)),
            rank,
            scaling: values(1)[0],
        });
        let adapters = adapters.collect();
        let count = ranks.len() as i32;
        let index = mixed.then(|| (0..m).map(|_| rng.random_range(-1..count)).collect());
        let dropout = dropout.map(|p| Dropout::new(p, seed, seed ^ 3).unwrap());
        Self { shape, x, dy, adapters, index, dropout }
    }

    pub fn max_rank(&self) -> usize {
        self.adapters.iter().map(|adapter| adapter.rank).max().unwrap_or(0)
    }

    pub fn low_ranks(&self) -> Vec<LowRank<'_, A>> {
        self.adapters.iter().map(Owned::low_rank).collect()
    }

    pub fn adapter(&self, i: usize) -> Option<(usize, &Owned<A>)> {
        let index = self.index.as_ref().map_or(0, |index| index[i]);
        let index = usize::try_from(index).ok()?;
        Some((index, self.adapters.get(index)?))
    }

    /// By the CPU's operations. Gradients start as `before`, and are added to it if there is one.
    pub fn run(&self, before: Option<f32>) -> Outcome<f32, T> {
        let ([m, n, k], max_rank, adapters) = (self.shape, self.max_rank(), self.low_ranks());
        let (index, dropout) = (self.index.as_deref(), self.dropout.as_ref());
        // What is there before must not matter.
        let mut v = vec![f32::NAN; m * max_rank];
        let mut u = v.clone();
        cpu::lora_shrink(&self.x, [m, k], &adapters, index, dropout, max_rank, &mut v).unwrap();
        cpu::lora_shrink_transposed(&self.dy, [m, n], &adapters, index, dropout, max_rank, &mut u).unwrap();
        let before_or_nan = before.unwrap_or(f32::NAN);
        let mut gradients: Vec<[Vec<f32>; 2]> = self
            .adapters
            .iter()
            .map(|a| [vec![before_or_nan; a.rank * k], vec![before_or_nan; n * a.rank]])
            .collect();
        let mut views: Vec<LoraGradient<'_>> = gradients
            .iter_mut()
            .zip(&self.adapters)
            .map(|([lora_a, lora_b], a)| LoraGradient { lora_a, lora_b, rank: a.rank })
            .collect();
        let batch = LoraBatch {
            shape: self.shape,
            x: &self.x,
            dy: &self.dy,
            v: &v,
            u: &u,
            max_rank,
            adapter_index: index,
            dropout: self.dropout,
        };
        cpu::lora_gradient(&batch, before.is_some(), &mut views).unwrap();
        let mut dx = vec![T::from_f32(0.0); m * k];
        cpu::lora_expand_transposed(&u, max_rank, &adapters, index, dropout, [m, k], &mut dx).unwrap();
        Outcome { v, u, gradients, dx }
    }

    /// The formulas in f64.
    pub fn truth(&self) -> Outcome<Sum, Sum> {
        let ([m, n, k], max_rank) = (self.shape, self.max_rank());
        let zeros = |count: usize| vec![Sum::default(); count];
        let mut truth = Outcome {
            v: zeros(m * max_rank),
            u: zeros(m * max_rank),
            gradients: self.adapters.iter().map(|a| [zeros(a.rank * k), zeros(n * a.rank)]).collect(),
            dx: zeros(m * k),
        };
        for i in 0..m {
            let Some((index, adapter)) = self.adapter(i) else { continue };
            let Owned { a, b, rank, .. } = adapter;
            let scale = adapter.scaling.to_f64() * self.dropout.map_or(1.0, |d| d.scale().to_f64());
            let keeps = |k_: usize| self.dropout.is_none_or(|dropout| dropout.keeps(i, k_));
            let (v, u) = (&mut truth.v[i * max_rank..][..*rank], &mut truth.u[i * max_rank..][..*rank]);
            let [da, db] = &mut truth.gradients[index];
            for r in 0..*rank {
                for k_ in (0..k).filter(|k_| keeps(*k_)) {
                    v[r].add([Sum::of(self.x[i * k + k_]), Sum::of(a[r * k + k_])]);
                }
                for n_ in 0..n {
                    u[r].add([Sum::of(self.dy[i * n + n_]), Sum::of(b[n_ * rank + r])]);
                }
                for sum in [&mut v[r], &mut u[r]] {
                    sum.value *= scale;
                    sum.magnitude *= scale.abs();
                }
                for k_ in (0..k).filter(|k_| keeps(*k_)) {
                    da[r * k + k_].add([u[r], Sum::of(self.x[i * k + k_])]);
                    truth.dx[i * k + k_].add([u[r], Sum::of(a[r * k + k_])]);
                }
                for n_ in 0..n {
                    db[n_ * rank + r].add([Sum::of(self.dy[i * n + n_]), v[r]]);
                }
            }
        }
        truth
    }

    /// Asserts that an outcome is within what its roundings can do. Sums have any order, so this is also for kernels: `u` takes
    /// a product and an addition per output, and two for its scale; the gradient of A another product, an addition per
    /// token, and one onto what was there.
    pub fn check(&self, what: &str, got: &Outcome<f32, T>) {
        let ([m, n, k], truth) = (self.shape, self.truth());
        let f32s = |name: &str, got: &[f32], truth: &[Sum], count: usize| {
            assert_close(&format!("{what} {name}"), &widened(got), truth, roundings(count), DType::F32);
        };
        f32s("v", &got.v, &truth.v, k + 3);
        f32s("u", &got.u, &truth.u, n + 3);
        for (a, (got, truth)) in got.gradients.iter().zip(&truth.gradients).enumerate() {
            f32s(&format!("dA of {a}"), &got[0], &truth[0], n + m + 5);
            f32s(&format!("dB of {a}"), &got[1], &truth[1], k + m + 5);
        }
        let share = roundings(n + self.max_rank() + 5);
        assert_close(&format!("{what} dX"), &widened(&got.dx), &truth.dx, share, T::DTYPE);
    }
}
