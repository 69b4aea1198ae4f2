//! The formulas of adapters in f64, in plain loops, with the magnitudes that bounds on rounding need.

#![allow(dead_code, reason = "no test needs all of it")]

use lora_kernels::adapter::Adapter;

/// Unit roundoff of f32.
pub const F32: f64 = 1.0 / (1u64 << 24) as f64;
/// Unit roundoff of bf16.
pub const BF16: f64 = 1.0 / (1u64 << 8) as f64;
/// Unit roundoff of f64.
pub const F64: f64 = f64::EPSILON / 2.0;

/// A number, and the same sum over magnitudes: with `c` roundings of unit `u` on the way, a computed value is off by at
/// most about `c u magnitude`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    pub value: f64,
    pub magnitude: f64,
}

impl Sum {
    pub fn add(&mut self, term: f64) {
        self.value += term;
        self.magnitude += term.abs();
    }

    pub fn scaled(self, factor: f64) -> Self {
        Self { value: self.value * factor, magnitude: self.magnitude * factor.abs() }
    }
}

/// One adapted linear layer, all in f64.
pub struct Linear {
    pub n: usize,
    pub k: usize,
    pub rank: usize,
    /// `[N, K]`, whatever the layout of the stored weight.
    pub weight: Vec<f64>,
    /// `[rank, K]`, AdaLoRA's diagonal multiplied in.
    pub a: Vec<f64>,
    /// `[N, rank]`.
    pub b: Vec<f64>,
    pub scaling: f64,
    pub magnitude: Option<Vec<f64>>,
    /// `[N]`, zeros for none.
    pub bias: Vec<f64>,
    /// `[N]`, not scaled; zeros for none.
    pub lora_bias: Vec<f64>,
}

impl Linear {
    /// `weight` in the layout that the adapter's base has.
    pub fn new(adapter: &Adapter, scaling: f64, weight: &[f64]) -> Self {
        let (n, k, rank) = (adapter.out_features(), adapter.in_features(), adapter.rank());
        let place = |n_: usize, k_: usize| if adapter.fan_in_fan_out() { k_ * n + n_ } else { n_ * k + k_ };
        let mut a = adapter.lora_a().to_f64();
        if let Adapter::AdaLora(adalora) = adapter {
            let e = adalora.lora_e().to_f64();
            a.iter_mut().enumerate().for_each(|(i, a)| *a *= e[i / k]);
        }
        let magnitude = match adapter {
            Adapter::Dora(dora) => Some(dora.magnitude().to_f64()),
            _ => None,
        };
        let lora_bias = match adapter {
            Adapter::Lora(lora) => lora.lora_bias().map(|b| b.to_f64()),
            _ => None,
        };
        Self {
            n,
            k,
            rank,
            weight: (0..n * k).map(|i| weight[place(i / k, i % k)]).collect(),
            a,
            b: adapter.lora_b().to_f64(),
            scaling,
            magnitude,
            bias: vec![0.0; n],
            lora_bias: lora_bias.unwrap_or(vec![0.0; n]),
        }
    }

    pub fn delta(&self, n: usize, k: usize) -> Sum {
        let mut sum = Sum::default();
        for r in 0..self.rank {
            sum.add(self.b[n * self.rank + r] * self.a[r * self.k + k]);
        }
        sum.scaled(self.scaling)
    }

    /// `W + delta`.
    pub fn direction(&self, n: usize, k: usize) -> Sum {
        let mut sum = self.delta(n, k);
        sum.add(self.weight[n * self.k + k]);
        sum
    }

    /// DoRA's factor and its relative error, when the direction has `rank + 3` roundings of f32 and the norm is a sum of
    /// f32 squares.
    pub fn row_scale(&self, n: usize) -> (f64, f64) {
        let Some(magnitude) = &self.magnitude else { return (1.0, 0.0) };
        let direction = (0..self.k).map(|k| self.direction(n, k));
        let (squares, magnitudes) = direction.fold((0.0, 0.0), |(squares, magnitudes), sum| {
            (squares + sum.value.powi(2), magnitudes + sum.magnitude.powi(2))
        });
        let norm = squares.sqrt();
        let error = (self.rank as f64 + 3.0) * magnitudes.sqrt() / norm + self.k as f64 / 2.0 + 3.0;
        (magnitude[n] / norm, error * F32)
    }

    pub fn merged(&self, n: usize, k: usize) -> Sum {
        self.direction(n, k).scaled(self.row_scale(n).0)
    }

    /// All of `row_scale ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + bias + s lora_bias` for one token.
    pub fn forward(&self, x: &[f64]) -> Vec<Sum> {
        let v: Vec<Sum> = (0..self.rank)
            .map(|r| {
                let mut sum = Sum::default();
                (0..self.k).for_each(|k| sum.add(x[k] * self.a[r * self.k + k]));
                sum.scaled(self.scaling)
            })
            .collect();
        (0..self.n)
            .map(|n| {
                let mut sum = Sum::default();
                (0..self.k).for_each(|k| sum.add(x[k] * self.weight[n * self.k + k]));
                for (r, v) in v.iter().enumerate() {
                    let term = v.scaled(self.b[n * self.rank + r]);
                    sum.value += term.value;
                    sum.magnitude += term.magnitude;
                }
                let mut sum = sum.scaled(self.row_scale(n).0);
                sum.add(self.bias[n]);
                sum.add(self.scaling * self.lora_bias[n]);
                sum
            })
            .collect()
    }
}

/// Checks each number against a truth and the error that it may have.
pub fn assert_close(what: &str, got: &[f64], truth: impl IntoIterator<Item = (f64, f64)>) {
    let truth: Vec<(f64, f64)> = truth.into_iter().collect();
    assert_eq!(got.len(), truth.len(), "{what}: length");
    for (i, (got, (truth, tolerance))) in got.iter().zip(truth).enumerate() {
        // Written so that NaN fails.
        assert!(
            (got - truth).abs() <= tolerance,
            "{what}[{i}]: {got} against {truth}, off by {:e} of {tolerance:e}",
            (got - truth).abs()
        );
    }
}
