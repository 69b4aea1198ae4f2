//! `multi_adapter/`: one product in which every token has its own adapter, or none.

use anyhow::{Context, Result, ensure};
use lora_kernels::nf4::{BLOCKSIZES, Nf4Matrix, block_count};
use lora_kernels::{DType, Tensor};

use super::bounds::Factors;
use super::engine::{Engine, Extras, LowRank, Weight};
use super::layer::{cast, decoded};
use super::outputs::{self, Ours, Source};
use super::report::Case;
use super::truth::{Factor, Linear, Output};
use super::{Family, blocks};
use crate::tensors::{Sidecar, TensorFile};

/// Checks the family.
pub fn check(family: &mut Family) {
    for pair in family.pairs("", |_| true) {
        let patterns = family.need(&pair.label, pair.sidecar.texts("patterns")).unwrap_or_default();
        let Some(mix) = family.need(&pair.label, Mix::open(&pair.sidecar, &pair.tensors)) else { continue };
        let listed = |name: &&str| patterns.iter().any(|p| p == name);
        for orphan in
            pair.tensors.names().filter_map(|n| n.strip_suffix(".adapter_idx")).filter(|n| !listed(n))
        {
            family.case(&pair.label, orphan, |_, _| anyhow::bail!("the sidecar lists no such pattern"));
        }
        family.case(&pair.label, "adapters", |case, _| mix.check_scaling(case));
        for pattern in &patterns {
            family.case(&pair.label, pattern, |case, engine| mix.check_pattern(case, engine, pattern));
        }
    }
}

/// A layer, its adapters, and a batch.
struct Mix<'a> {
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    n: usize,
    k: usize,
    weight: Tensor,
    x: Tensor,
    adapters: Vec<LowRank>,
}

impl<'a> Mix<'a> {
    fn open(sidecar: &'a Sidecar, tensors: &'a TensorFile) -> Result<Self> {
        let (n, k, tokens) = (sidecar.size("N")?, sidecar.size("K")?, sidecar.size("T")?);
        let weight = tensors.get("weight")?.shaped(&[n, k])?.tensor()?;
        let x = tensors.get("x")?.shaped(&[tokens, k])?.tensor()?;
        let adapter = |(i, entry): (usize, Sidecar)| -> Result<LowRank> {
            let (id, rank) = (entry.size("id")?, entry.size("r")?);
            ensure!(id == i, "adapters[{i}]: wanted id {i}, got {id}");
            let lora_a = tensors.get(&format!("ad{id}.lora_A"))?.shaped(&[rank, k])?.tensor()?;
            let lora_b = tensors.get(&format!("ad{id}.lora_B"))?.shaped(&[n, rank])?.tensor()?;
            Ok(LowRank { lora_a, lora_b, scaling: entry.number("scaling")? })
        };
        let adapters =
            sidecar.list("adapters")?.into_iter().enumerate().map(adapter).collect::<Result<_>>()?;
        Ok(Self { sidecar, tensors, n, k, weight, x, adapters })
    }

    fn check_scaling(&self, case: &mut Case) -> Result<()> {
        for (adapter, entry) in self.adapters.iter().zip(self.sidecar.list("adapters")?) {
            let (alpha, rank) = (entry.number("lora_alpha")?, entry.number("r")?);
            let scaling = if entry.flag("use_rslora")? { alpha / rank.sqrt() } else { alpha / rank };
            case.close("scaling", &[scaling], &[adapter.scaling], |_| 1e-15 * scaling.abs());
        }
        Ok(())
    }

    fn check_pattern(&self, case: &mut Case, engine: &dyn Engine, pattern: &str) -> Result<()> {
        let get = |what: &str| self.tensors.of(pattern, what);
        let index = get("adapter_idx")?.counting(self.x.shape()[0])?.integers()?;
        let index: Vec<i32> = index.into_iter().map(i32::try_from).collect::<Result<_, _>>()?;
        let known = |i: &&i32| usize::try_from(**i).map_or(**i == -1, |i| i < self.adapters.len());
        ensure!(
            index.iter().all(|i| known(&i)),
            "{pattern}.adapter_idx: {index:?} of {} adapters",
            self.adapters.len()
        );

        let dense = self.weight.to_f64();
        let exact = self.truth(&dense, &self.x, &self.adapters, &index);
        let ours =
            self.forward(case, engine, Weight::Dense(&self.weight), &self.x, &self.adapters, &index)?;
        outputs::compare(case, &exact, &ours, &get("y_f32")?, Source::Packages(Factors::F32))?;
        outputs::compare(case, &exact, &ours, &get("y_f64")?, Source::Truth)?;
        self.check_bf16(case, engine, pattern, &index)?;
        if let Some(stored) = self.tensors.find_of(pattern, "nf4.y_f64")? {
            let weight = self.nf4()?;
            let exact = self.truth(&decoded(&weight, DType::F32).to_f64(), &self.x, &self.adapters, &index);
            let ours = self.forward(case, engine, Weight::Nf4(&weight), &self.x, &self.adapters, &index)?;
            outputs::compare(case, &exact, &ours, &stored, Source::Truth)?;
        }
        Ok(())
    }

    /// The 4-bit weight. Its blocksize is not stored: it is 64, or whatever else gives as many blocks as there are.
    fn nf4(&self) -> Result<Nf4Matrix> {
        let (numel, blocks) = (self.n * self.k, self.tensors.get("nf4.absmax")?.f32s()?.len());
        let fits = |blocksize: &usize| block_count(numel, *blocksize) == blocks;
        let blocksize = [64].into_iter().chain(BLOCKSIZES).find(fits);
        let blocksize =
            blocksize.with_context(|| format!("nf4.absmax: {blocks} blocks of {numel} elements"))?;
        blocks::matrix(self.tensors, "nf4.", None, &[self.n, self.k], blocksize, DType::F32).context("nf4")
    }

    /// Weight, adapters and inputs in bf16.
    fn check_bf16(&self, case: &mut Case, engine: &dyn Engine, pattern: &str, index: &[i32]) -> Result<()> {
        let get = |what: &str| self.tensors.of(pattern, what);
        let bf16 = |t: &Tensor| cast(t, DType::BF16);
        let (weight, x) = (bf16(&self.weight)?, bf16(&self.x)?);
        let rounded = |l: &LowRank| {
            Ok(LowRank { lora_a: bf16(&l.lora_a)?, lora_b: bf16(&l.lora_b)?, scaling: l.scaling })
        };
        let adapters = self.adapters.iter().map(rounded).collect::<Result<Vec<_>>>()?;
        let exact = self.truth(&weight.to_f64(), &x, &adapters, index);
        let ours = self.forward(case, engine, Weight::Dense(&weight), &x, &adapters, index)?;
        outputs::compare(case, &exact, &ours, &get("y_bf16")?, Source::Packages(Factors::Stored))?;
        outputs::compare(case, &exact, &ours, &get("y_bf16_truth")?, Source::Truth)
    }

    fn truth(&self, weight: &[f64], x: &Tensor, adapters: &[LowRank], index: &[i32]) -> Vec<Output> {
        let factor = |l: &LowRank| Factor {
            a: l.lora_a.to_f64(),
            b: l.lora_b.to_f64(),
            rank: l.lora_a.shape()[0],
            scaling: l.scaling,
        };
        let factors: Vec<Factor> = adapters.iter().map(factor).collect();
        let linear = Linear::new(weight, self.n, self.k);
        linear.forward(&x.to_f64(), |token| usize::try_from(index[token]).ok().map(|i| &factors[i]))
    }

    fn forward(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        weight: Weight<'_>,
        x: &Tensor,
        adapters: &[LowRank],
        index: &[i32],
    ) -> Result<Ours> {
        let extras = Extras { adapters, adapter_index: Some(index), ..Extras::default() };
        let y = case.offered(engine.matmul(x, weight, extras))?.map(|y| y.to_f64());
        Ok(Ours { y, dtype: x.dtype(), slack: engine.slack(x, weight)? })
    }
}
