//! `real_minilm/`: linear layers of a published model, with real activations.

use anyhow::{Context, Result};
use lora_kernels::nf4::Nf4Matrix;
use lora_kernels::{DType, Tensor};

use super::engine::Engine;
use super::layer::{Frozen, Layer, cast};
use super::report::Case;
use super::{Family, blocks, dtype, outputs};
use crate::tensors::{Sidecar, TensorFile};

/// Checks the family.
pub fn check(family: &mut Family) {
    for pair in family.pairs("", |_| true) {
        let name = pair.sidecar.text("module").unwrap_or("").to_owned();
        let opened = Module::open(&pair.sidecar, &pair.tensors);
        let Some(module) = family.need(&pair.label, opened) else { continue };
        family
            .case(&pair.label, &format!("{name} 4-bit"), |case, engine| module.check_quantize(case, engine));
        family.case(&pair.label, &name, |case, engine| module.check_forward(case, engine));
    }
}

struct Module<'a> {
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    weight: Tensor,
    plain: Nf4Matrix,
    nested: Nf4Matrix,
}

impl<'a> Module<'a> {
    fn open(sidecar: &'a Sidecar, tensors: &'a TensorFile) -> Result<Self> {
        let shape = sidecar.sizes("shape")?;
        let weight = tensors.get("weight")?.shaped(&shape)?.tensor()?;
        let (blocksize, dtype) = (sidecar.size("blocksize")?, dtype(sidecar.text("stored_dtype")?)?);
        anyhow::ensure!(weight.dtype() == dtype, "weight: wanted {dtype}, got {}", weight.dtype());
        let plain = blocks::matrix(tensors, "", None, &shape, blocksize, dtype)?;
        let nested = blocks::matrix(tensors, "", Some("dq."), &shape, blocksize, dtype)?;
        Ok(Self { sidecar, tensors, weight, plain, nested })
    }

    fn check_quantize(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        if let Some((packed, absmax)) =
            case.offered(engine.nf4_quantize(&self.weight, self.plain.blocksize()))?
        {
            case.bits("packed", 1, &packed, self.plain.packed());
            case.bits("absmax", 4, bytemuck::cast_slice(&absmax), self.tensors.get("absmax")?.bytes());
        }
        let absmax = self.tensors.get("absmax")?.f32s()?;
        if let Some(ours) = case.offered(engine.absmax_quantize(&absmax))? {
            blocks::check_nested(case, &absmax, &ours, &blocks::nested_absmax(self.tensors, "dq.")?);
        }
        let restored = self.nested.absmax().dequantize();
        let stored = self.tensors.get("dq.absmax_dequant")?;
        case.bits("dq.absmax_dequant", 4, bytemuck::cast_slice(&restored), stored.bytes());
        self.check_decoded(case, engine, "", &self.plain)?;
        self.check_decoded(case, engine, "dq.", &self.nested)
    }

    fn check_decoded(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        prefix: &str,
        weight: &Nf4Matrix,
    ) -> Result<()> {
        for dtype in DType::ALL {
            let what = format!("{prefix}dequant_{dtype}");
            let Some(ours) = case.offered(engine.nf4_dequantize(weight, dtype))? else { continue };
            blocks::check_sha256(case, &what, &ours, self.sidecar.object("sha256")?.text(&what)?);
            if dtype == DType::F32 {
                self.check_rows(case, &format!("{prefix}dequant_rows_"), &ours)?;
            }
        }
        Ok(())
    }

    /// `dequant_rows_0_4` holds the rows 0 up to 4.
    fn check_rows(&self, case: &mut Case, prefix: &str, ours: &Tensor) -> Result<()> {
        let row = ours.shape()[1] * ours.dtype().size();
        for name in self.tensors.names().filter(|n| n.starts_with(prefix)) {
            let range = name[prefix.len()..].split_once('_').context("rows FROM_TO")?;
            let (from, to): (usize, usize) = (range.0.parse()?, range.1.parse()?);
            let rows = ours.as_bytes().get(from * row..to * row).context("rows of the weight")?;
            case.bits(
                &format!("rows {from}..{to}"),
                ours.dtype().size(),
                rows,
                self.tensors.get(name)?.bytes(),
            );
        }
        Ok(())
    }

    fn check_forward(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let get = |name: &str| self.tensors.get(name);
        let x = get("x")?.tensor()?;
        let bias = get("bias")?.shaped(&self.weight.shape()[..1])?.tensor()?;
        let dense = Layer::new(Frozen::Dense(cast(&self.weight, DType::F32)?), Some(bias));
        let (plain, nested) = (dense.over(self.plain.clone().into()), dense.over(self.nested.clone().into()));
        outputs::check(case, engine, &dense, &x, &get("y_original_f32")?, None)?;
        outputs::check_truth(case, engine, &plain, &x, &get("y_nf4_f64")?)?;
        outputs::check(case, engine, &nested, &x, &get("y_linear4bit_dq_f32")?, Some(&get("y_nf4_dq_f64")?))?;
        let x = cast(&x, DType::BF16)?;
        outputs::check(case, engine, &nested.in_dtype(DType::BF16)?, &x, &get("y_linear4bit_dq_bf16")?, None)
    }
}
