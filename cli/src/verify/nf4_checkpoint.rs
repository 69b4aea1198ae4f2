//! `nf4_checkpoint/`: checkpoints that transformers and bitsandbytes wrote, and what their layers put out.

use anyhow::{Context, Result, ensure};
use lora_kernels::DType;
use lora_kernels::formats::bitsandbytes::{self, Checkpoint};
use lora_kernels::nf4::{Absmax, Codebook, DYNAMIC_MAP, Nf4Matrix};

use super::engine::Engine;
use super::layer::{Layer, cast};
use super::report::Case;
use super::{Family, blocks, dtype, outputs};
use crate::tensors::{Sidecar, TensorFile};

/// Checks the family.
pub fn check(family: &mut Family) {
    let mut checked = Vec::new();
    for pair in family.pairs("", |stem| stem.ends_with(".io")) {
        let label = pair.label.trim_end_matches(".io").to_owned();
        let stem = label.rsplit('/').next().unwrap_or(&label).to_owned();
        let (folder, file) = (family.at(&stem), family.at(&format!("{stem}.safetensors")));
        let path = if folder.is_dir() { folder } else { file };
        checked.push(stem);
        let Some(checkpoint) = family.need(&label, bitsandbytes::load(&path).map_err(Into::into)) else {
            continue;
        };
        for (name, sidecar) in family.cases(&pair, "cases", "name", ".x") {
            family.case(&label, &name, |case, engine| {
                Module::new(&name, &sidecar, &pair.tensors, &checkpoint)?.check(case, engine)
            });
        }
    }
    unmatched(family, &checked);
}

/// A checkpoint without its `.io` files has nothing that it could be compared with.
fn unmatched(family: &mut Family, checked: &[String]) {
    let files = family.names("").into_iter();
    let stems = files.filter_map(|n| match family.at(&n).is_dir() {
        true => Some(n),
        false => Some(n.strip_suffix(".safetensors")?.to_owned()).filter(|s| !s.ends_with(".io")),
    });
    for stem in stems.filter(|s| !checked.contains(s)).collect::<Vec<_>>() {
        family.case(&family.label(&stem), "", |_, _| anyhow::bail!("{stem}.io.safetensors is not there"));
    }
}

/// One quantised layer of a checkpoint.
struct Module<'a> {
    name: &'a str,
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    weight: &'a Nf4Matrix,
    layer: Layer,
}

impl<'a> Module<'a> {
    fn new(
        name: &'a str,
        sidecar: &'a Sidecar,
        tensors: &'a TensorFile,
        checkpoint: &'a Checkpoint,
    ) -> Result<Self> {
        let weight = format!("{name}.weight");
        let weight =
            checkpoint.nf4.get(&weight).with_context(|| format!("the checkpoint has no 4-bit `{weight}`"))?;
        let bias = checkpoint.dense.get(&format!("{name}.bias")).cloned();
        ensure!(bias.is_some() == sidecar.flag("bias")?, "{name}.bias: the sidecar says otherwise");
        let layer = Layer::new(weight.clone().into(), bias);
        Ok(Self { name, sidecar, tensors, weight, layer })
    }

    fn check(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let sidecar = self.sidecar;
        let state = dtype(sidecar.text("quant_state_dtype")?)?;
        case.equal("shape", self.weight.shape(), &[sidecar.size("N")?, sidecar.size("K")?][..]);
        case.equal("blocksize", self.weight.blocksize(), sidecar.size("blocksize")?);
        case.equal("dtype", self.weight.dtype(), state);
        case.equal("quant_map", self.weight.codebook(), &Codebook::nf4());
        if let Absmax::Nested(nested) = self.weight.absmax() {
            let map = bytemuck::cast_slice(nested.map());
            case.bits("nested_quant_map", 4, map, bytemuck::cast_slice(&DYNAMIC_MAP));
        }
        case.equal("nested", matches!(self.weight.absmax(), Absmax::Nested(_)), sidecar.flag("nested")?);
        for (what, key, dtype) in [
            ("dequant_f32", "dequant_f32_sha256", DType::F32),
            ("dequant_bf16", "dequant_bf16_sha256", DType::BF16),
            ("dequant", "dequant_in_quant_state_dtype_sha256", state),
        ] {
            if let Some(ours) = case.offered(engine.nf4_dequantize(self.weight, dtype))? {
                blocks::check_sha256(case, what, &ours, sidecar.text(key)?);
            }
        }
        self.check_original(case, engine)?;
        self.check_forward(case, engine)
    }

    /// Quantising the original gives the codes of the checkpoint. Only the first rows of some are there.
    fn check_original(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let original = self.tensors.get(&format!("{}.original_weight", self.name))?.tensor()?;
        let blocksize = self.weight.blocksize();
        let whole = original.numel() == self.weight.numel();
        let Some((packed, absmax)) = case.offered(engine.nf4_quantize(&original, blocksize))? else {
            return Ok(());
        };
        let numel = if whole { original.numel() } else { original.numel() / blocksize * blocksize };
        let stored = blocks::codes(self.weight.packed(), numel);
        case.bits("packed", 1, &blocks::codes(&packed, numel), &stored);
        match self.weight.absmax() {
            Absmax::Plain(stored) => {
                let blocks = numel.div_ceil(blocksize);
                let (ours, stored) =
                    (bytemuck::cast_slice(&absmax[..blocks]), bytemuck::cast_slice(&stored[..blocks]));
                case.bits("absmax", 4, ours, stored);
            }
            Absmax::Nested(stored) if whole => {
                if let Some(ours) = case.offered(engine.absmax_quantize(&absmax))? {
                    blocks::check_nested(case, &absmax, &ours, stored);
                }
            }
            Absmax::Nested(_) => {}
        }
        Ok(())
    }

    fn check_forward(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let get = |what: &str| self.tensors.of(self.name, what);
        let x = get("x")?.shaped(&[self.sidecar.size("T")?, self.sidecar.size("K")?])?.tensor()?;
        outputs::check(case, engine, &self.layer, &x, &get("y_f32")?, Some(&get("y_f64")?))?;
        let (layer, x) = (self.layer.in_dtype(DType::BF16)?, cast(&x, DType::BF16)?);
        outputs::check(case, engine, &layer, &x, &get("y_bf16")?, Some(&get("y_bf16_truth_f64")?))
    }
}
