//! `svd/`: the adapter of a given rank that is nearest to a change of weights.

use anyhow::{Context, Result, ensure};
use lora_kernels::adapter::{Decomposition, Difference, Extraction};
use lora_kernels::{DType, Tensor};

use super::report::Case;
use super::truth::{Factor, delta, singular_values};
use super::{Family, bounds};
use crate::tensors::{Sidecar, TensorFile};

/// Checks the family.
pub fn check(family: &mut Family) {
    if !family.engine.on_host() {
        return family.skip_all("extraction runs on the CPU only");
    }
    for pair in family.pairs("", |_| true) {
        for (name, sidecar) in family.cases(&pair, "cases", "name", ".W") {
            family.case(&pair.label, &name, |case, _| {
                Change::open(&name, &sidecar, &pair.tensors)?.check(case)
            });
        }
    }
}

/// A weight before and after.
struct Change<'a> {
    name: &'a str,
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    base: Tensor,
    tuned: Tensor,
    rows: usize,
    columns: usize,
    /// Of the difference, in descending order, as stored.
    singular_values: Vec<f64>,
}

impl<'a> Change<'a> {
    fn open(name: &'a str, sidecar: &'a Sidecar, tensors: &'a TensorFile) -> Result<Self> {
        let shape = sidecar.sizes("shape")?;
        let [rows, columns] = shape[..] else {
            anyhow::bail!("shape: wanted [rows, columns], got {shape:?}")
        };
        let base = tensors.of(name, "W")?.shaped(&shape)?.tensor()?;
        let tuned = tensors.of(name, "W_prime")?.shaped(&shape)?.tensor()?;
        let singular_values = tensors.of(name, "singular_values_f64")?.counting(rows.min(columns))?.f64s()?;
        Ok(Self { name, sidecar, tensors, base, tuned, rows, columns, singular_values })
    }

    fn changed(&self) -> Result<Difference<'_>> {
        Ok(Difference::between(&self.base, &self.tuned)?)
    }

    fn difference(&self) -> Vec<f64> {
        self.tuned.to_f64().iter().zip(self.base.to_f64()).map(|(tuned, base)| tuned - base).collect()
    }

    /// What a backward stable decomposition may be off by, in the Frobenius norm.
    fn bound(&self) -> f64 {
        bounds::decomposition(self.rows, self.columns, self.singular_values.first().copied().unwrap_or(0.0))
    }

    fn check(&self, case: &mut Case) -> Result<()> {
        let difference = self.difference();
        let formula = singular_values(&difference, self.rows, self.columns);
        case.close("singular_values_f64 (formula)", &self.singular_values, &formula, |_| self.bound());
        let fro = norm(&difference);
        case.close("delta_fro", &[self.sidecar.number("delta_fro")?], &[fro], |_| self.bound());
        let ranks = self.sidecar.list("ranks")?;
        ensure!(!ranks.is_empty(), "ranks: wanted at least one");
        for entry in &ranks {
            self.check_rank(case, entry, &difference, fro)?;
        }
        self.check_best(case, &difference)
    }

    fn check_rank(&self, case: &mut Case, entry: &Sidecar, difference: &[f64], fro: f64) -> Result<()> {
        let rank = entry.size("r")?;
        let stored = |key: &str| entry.number(key);
        let sigma = |i: usize| self.singular_values.get(i).copied().unwrap_or(0.0);
        let mut close = |what: &str, got: f64, want: f64, bound: f64| {
            case.close(&format!("{what} (rank {rank})"), &[got], &[want], |_| bound);
        };
        let (err_fro, err_spectral) = (stored("err_fro")?, stored("err_spectral")?);
        close("sigma_r", stored("sigma_r")?, rank.checked_sub(1).map_or(0.0, sigma), self.bound());
        close("sigma_r_plus_1", stored("sigma_r_plus_1")?, sigma(rank), self.bound());
        let energy = if fro == 0.0 { 1.0 } else { 1.0 - (err_fro / fro).powi(2) };
        close("energy_kept", stored("energy_kept")?, energy, 4.0 * self.bound() / fro.max(f64::MIN_POSITIVE));

        // Of subspace iteration, which stops where the squared error would change by less than 2e-7 of it, 1e-6 is asked.
        let randomised =
            self.changed()?.with_decomposition(Decomposition::Randomised { seed: 0 }).extract(rank)?;
        let settled = 1e-6 * err_fro + self.bound();
        close("err_fro, randomised", randomised.frobenius_error(), err_fro, settled);
        close(
            "residual, randomised",
            norm(&subtract(difference, &self.product(&randomised))),
            err_fro,
            settled,
        );

        let ours = self.changed()?.with_decomposition(Decomposition::Full).extract(rank)?;
        close("err_fro", ours.frobenius_error(), err_fro, self.bound());
        let spectral_error = ours.spectral_error().context("all singular values are known")?;
        close("err_spectral", spectral_error, err_spectral, self.bound());
        let left = subtract(difference, &self.product(&ours));
        close("residual", norm(&left), err_fro, self.bound());
        let spectral = singular_values(&left, self.rows, self.columns).first().copied().unwrap_or(0.0);
        close("residual", spectral, err_spectral, self.bound());

        // The factors rounded to f32: each product is off by two roundings.
        let lora = ours.lora(DType::F32)?;
        let factor =
            Factor { a: lora.lora_a().to_f64(), b: lora.lora_b().to_f64(), rank, scaling: lora.scaling() };
        let (values, sizes): (Vec<f64>, Vec<f64>) =
            delta(&factor, self.rows, self.columns).into_iter().unzip();
        let rounding = bounds::single(2.01 * norm(&sizes));
        close("residual f32", norm(&subtract(difference, &values)), err_fro, self.bound() + rounding);
        case.close("singular_values_f64", ours.singular_values(), &self.singular_values, |_| self.bound());
        Ok(())
    }

    /// The best approximation itself: as near as any, and ours where there is only one.
    fn check_best(&self, case: &mut Case, difference: &[f64]) -> Result<()> {
        let rank = self.sidecar.size("best_rank_delta_r")?;
        let name = format!("best_rank{rank}_delta_f64");
        let best = self.tensors.of(self.name, &name)?.shaped(&[self.rows, self.columns])?.f64s()?;
        let left: f64 = self.singular_values.iter().skip(rank).map(|s| s * s).sum();
        case.close(
            &format!("{name} (residual)"),
            &[norm(&subtract(difference, &best))],
            &[left.sqrt()],
            |_| self.bound(),
        );
        if self.sidecar.flag("best_rank_delta_unique")? {
            let sigma = |i: usize| self.singular_values.get(i).copied().unwrap_or(0.0);
            let last = rank.checked_sub(1).context("best_rank_delta_r: wanted at least 1")?;
            let gap = sigma(last) - sigma(rank);
            let ours = self.product(&self.changed()?.extract(rank)?);
            case.close(&name, &ours, &best, |_| bounds::truncation(self.bound(), sigma(0), gap));
        }
        Ok(())
    }

    fn product(&self, extraction: &Extraction) -> Vec<f64> {
        let (a, b) = extraction.factors();
        delta(&Factor { a, b, rank: extraction.rank(), scaling: 1.0 }, self.rows, self.columns)
            .into_iter()
            .map(|d| d.0)
            .collect()
    }
}

fn subtract(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}
