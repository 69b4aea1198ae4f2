//! `qlora/`: adapters over 4-bit weights, and merging into them.

use anyhow::{Result, ensure};
use lora_kernels::adapter::{Adapter, Dora, Lora};
use lora_kernels::nf4::{Absmax, Nf4Matrix};
use lora_kernels::{DType, Tensor};

use super::engine::{Direction, Engine};
use super::layer::{Layer, cast};
use super::report::Case;
use super::{Family, blocks, bounds, dtype, outputs};
use crate::tensors::{Sidecar, Stored, TensorFile};

/// Checks the family.
pub fn check(family: &mut Family) {
    for pair in family.pairs("", |_| true) {
        let opened = Module::open(&pair.sidecar, &pair.tensors);
        let Some(module) = family.need(&pair.label, opened) else { continue };
        family.case(&pair.label, "base", |case, engine| module.check_base(case, engine));
        let mut batches: Vec<&str> = pair.tensors.names().filter_map(|n| n.strip_suffix(".x")).collect();
        batches.sort_by_key(|batch| pair.tensors.of(batch, "x").map_or(0, |x| x.shape().iter().product()));
        for batch in &batches {
            family.case(&pair.label, batch, |case, engine| module.check_batch(case, engine, batch));
        }
        if batches.is_empty() {
            family.case(&pair.label, "x", |_, _| anyhow::bail!("there is no `T*.x`"));
        }
        family.case(&pair.label, "merged", |case, engine| module.check_merged(case, engine, &batches));
        family.case(&pair.label, "unmerged", |case, engine| module.check_unmerged(case, engine));
    }
}

/// One 4-bit layer with its adapter.
struct Module<'a> {
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    base: Nf4Matrix,
    layer: Layer,
}

impl<'a> Module<'a> {
    fn open(sidecar: &'a Sidecar, tensors: &'a TensorFile) -> Result<Self> {
        let (n, k) = (sidecar.size("N")?, sidecar.size("K")?);
        let config = sidecar.object("lora")?;
        let rank = config.size("r")?;
        let scaling = sidecar.number("scaling")?;
        let lora_a = tensors.get("lora_A")?.shaped(&[rank, k])?.tensor()?;
        let lora_b = tensors.get("lora_B")?.shaped(&[n, rank])?.tensor()?;
        let lora = Lora::new(lora_a, lora_b, scaling)?;
        let flag = |key: &str| Ok::<_, anyhow::Error>(config.has(key) && config.flag(key)?);
        let magnitude = tensors.find("magnitude")?.map(|m| m.shaped(&[n])?.tensor()).transpose()?;
        ensure!(magnitude.is_some() == flag("use_dora")?, "magnitude: `lora.use_dora` says otherwise");
        let adapter: Adapter = match magnitude {
            Some(magnitude) => Dora::new(lora, magnitude)?.into(),
            None => lora.into(),
        };
        let bias = tensors.find("bias")?.map(|b| b.shaped(&[n])?.tensor()).transpose()?;
        ensure!(bias.is_some() == sidecar.flag("bias")?, "bias: the sidecar says otherwise");
        let state = dtype(sidecar.text("quant_state_dtype")?)?;
        let base = Self::read_matrix(sidecar, tensors, "base.", state)?;
        let layer = Layer::new(base.clone().into(), bias).with_adapter(&adapter, DType::F32)?;
        Ok(Self { sidecar, tensors, base, layer })
    }

    fn read_matrix(sidecar: &Sidecar, tensors: &TensorFile, prefix: &str, dtype: DType) -> Result<Nf4Matrix> {
        let nested = sidecar.flag("double_quant")?.then_some(prefix);
        let shape = [sidecar.size("N")?, sidecar.size("K")?];
        blocks::matrix(tensors, prefix, nested, &shape, sidecar.size("blocksize")?, dtype)
    }

    fn matrix(&self, prefix: &str) -> Result<Nf4Matrix> {
        let state = dtype(self.sidecar.text(&format!("{prefix}quant_state_dtype").replace('.', "_"))?)?;
        Self::read_matrix(self.sidecar, self.tensors, prefix, state)
    }

    fn get(&self, name: &str) -> Result<Stored> {
        self.tensors.get(name)
    }

    /// The scales and the decoded bytes of a stored matrix.
    fn check_decoded(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        prefix: &str,
        matrix: &Nf4Matrix,
        hashes: &[(&str, DType)],
    ) -> Result<()> {
        let restored = matrix.absmax().dequantize();
        case.bits(
            "absmax",
            4,
            bytemuck::cast_slice(&restored),
            self.get(&format!("{prefix}absmax"))?.bytes(),
        );
        for (what, dtype) in hashes {
            let (name, hashes) = (format!("{prefix}{what}"), self.sidecar.object("sha256")?);
            let Some(ours) = case.offered(engine.nf4_dequantize(matrix, *dtype))? else { continue };
            blocks::check_sha256(case, what, &ours, hashes.text(&name)?);
            if let Some(stored) = self.tensors.find(&name)? {
                case.bits(what, dtype.size(), ours.as_bytes(), stored.bytes());
            }
        }
        Ok(())
    }

    fn check_base(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let hashes = [("dequant_f32", DType::F32), ("dequant_in_quant_state_dtype", self.base.dtype())];
        self.check_decoded(case, engine, "base.", &self.base, &hashes)?;
        self.check_quantized(case, engine)?;
        self.check_scaling(case)?;
        let (n, k) = self.layer.shape();
        let factor = self.layer.factor();
        let exact = super::truth::delta(factor, n, k);
        let formula: Vec<f64> = exact.iter().map(|d| d.0).collect();
        let bound = |i: usize| bounds::delta(factor.rank, exact[i].1);
        case.close("delta (formula)", &self.get("delta")?.shaped(&[n, k])?.f64s()?, &formula, bound);
        let zero = Tensor::from_f32([n, k], &vec![0.0; n * k], DType::F32)?;
        let ours = engine.merge(Direction::Merge, &zero, self.layer.low_rank(), None, false);
        if let Some(ours) = case.offered(ours)? {
            case.close("delta", &ours.to_f64(), &formula, bound);
        }
        Ok(())
    }

    fn check_quantized(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let original = self.get("weight_before_quantisation")?.shaped(self.base.shape())?.tensor()?;
        case.equal("dtype", original.dtype(), self.base.dtype());
        let Some((packed, absmax)) = case.offered(engine.nf4_quantize(&original, self.base.blocksize()))?
        else {
            return Ok(());
        };
        case.bits("packed", 1, &packed, self.base.packed());
        match self.base.absmax() {
            Absmax::Plain(stored) => {
                case.bits("absmax", 4, bytemuck::cast_slice(&absmax), bytemuck::cast_slice(stored));
            }
            Absmax::Nested(stored) => {
                if let Some(ours) = case.offered(engine.absmax_quantize(&absmax))? {
                    blocks::check_nested(case, &absmax, &ours, stored);
                }
            }
        }
        Ok(())
    }

    /// The scale that the configuration gives is the one that the sidecar names.
    fn check_scaling(&self, case: &mut Case) -> Result<()> {
        let config = self.sidecar.object("lora")?;
        let (rank, alpha) = (config.number("r")?, config.number("lora_alpha")?);
        let rslora = config.has("use_rslora") && config.flag("use_rslora")?;
        let scaling = if rslora { alpha / rank.sqrt() } else { alpha / rank };
        case.close("scaling", &[scaling], &[self.sidecar.number("scaling")?], |_| 1e-15 * scaling.abs());
        Ok(())
    }

    fn check_batch(&self, case: &mut Case, engine: &dyn Engine, batch: &str) -> Result<()> {
        let get = |what: &str| self.tensors.of(batch, what);
        let x = get("x")?.tensor()?;
        outputs::check(case, engine, &self.layer, &x, &get("y_f32")?, Some(&get("y_f64")?))?;
        let (layer, x) = (self.layer.in_dtype(DType::BF16)?, cast(&x, DType::BF16)?);
        outputs::check(case, engine, &layer, &x, &get("y_bf16")?, None)
    }

    /// The weight is decoded to the quant_state's type, merged in f32, and quantised again; for DoRA it is rounded to that
    /// type before, as PEFT does.
    fn check_merged(&self, case: &mut Case, engine: &dyn Engine, batches: &[&str]) -> Result<()> {
        let stored = self.matrix("merged.")?;
        self.check_decoded(case, engine, "merged.", &stored, &[("dequant", stored.dtype())])?;
        let exact = self.layer.merged(self.base.dtype());
        let target: Vec<f64> = exact.iter().map(|t| t.w).collect();
        let error: Vec<f64> = exact.iter().map(|t| bounds::merge(stored.dtype(), t)).collect();
        blocks::check_quantised(case, "packed", "stored", &stored, &target, &error);
        if let Some(ours) = self.nf4_merge(case, engine, Direction::Merge, &self.base)? {
            blocks::check_quantised(case, "packed", "ours", &ours, &target, &error);
        }
        let layer = self.layer.over(stored.into()).without_adapter();
        for batch in batches {
            if let Some(y) = self.tensors.find_of(&format!("merged.{batch}"), "y_f32")? {
                let x = self.get(&format!("{batch}.x"))?.tensor()?;
                outputs::check(case, engine, &layer, &x, &y, None)?;
            }
        }
        Ok(())
    }

    fn check_unmerged(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let (merged, stored) = (self.matrix("merged.")?, self.matrix("unmerged.")?);
        self.check_decoded(case, engine, "unmerged.", &stored, &[("dequant", stored.dtype())])?;
        let weight = super::layer::decoded(&merged, merged.dtype()).to_f64();
        let exact = self.layer.unmerged(&weight);
        let target: Vec<f64> = exact.iter().map(|t| t.w).collect();
        let error: Vec<f64> = exact.iter().map(|t| bounds::merge(stored.dtype(), t)).collect();
        blocks::check_quantised(case, "packed", "stored", &stored, &target, &error);
        if let Some(ours) = self.nf4_merge(case, engine, Direction::Unmerge, &merged)? {
            blocks::check_quantised(case, "packed", "ours", &ours, &target, &error);
        }
        Ok(())
    }

    fn nf4_merge(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        direction: Direction,
        weight: &Nf4Matrix,
    ) -> Result<Option<Nf4Matrix>> {
        let Some(scale) = self.layer.row_scale(case, engine)? else { return Ok(None) };
        case.offered(engine.nf4_merge(direction, weight, self.layer.low_rank(), scale.as_deref()))
    }
}
