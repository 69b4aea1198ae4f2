//! `nf4_blockwise/`: quantise, dequantise, and double quantisation of flat blocks.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use lora_kernels::nf4::{Absmax, Codebook, DYNAMIC_MAP};
use lora_kernels::{DType, Tensor};

use super::blocks;
use super::engine::Engine;
use super::report::Case;
use super::{Family, dtype};
use crate::tensors::{Sidecar, Stored, TensorFile};

/// Checks the family.
pub fn check(family: &mut Family) {
    for pair in family.pairs("", |_| true) {
        if pair.tensors.has("nf4_code") {
            family.case(&pair.label, "codebooks", |case, _| check_codebooks(case, &pair.tensors));
            continue;
        }
        for (name, sidecar) in family.cases(&pair, "cases", "name", ".input") {
            family.case(&pair.label, &name, |case, engine| {
                Blocks::new(&name, &sidecar, &pair.tensors)?.check(case, engine)
            });
        }
    }
}

fn check_codebooks(case: &mut Case, tensors: &TensorFile) -> Result<()> {
    let nf4 = Codebook::nf4();
    let midpoints: Vec<f32> = DYNAMIC_MAP.windows(2).map(|w| w[0].midpoint(w[1])).collect();
    for (name, ours) in [
        ("nf4_code", &nf4.values()[..]),
        ("nf4_thresholds", nf4.thresholds()),
        ("dynamic_map_256", &DYNAMIC_MAP),
        ("dynamic_thresholds_255", &midpoints),
    ] {
        case.bits(name, 4, bytemuck::cast_slice(ours), tensors.get(name)?.bytes());
    }
    Ok(())
}

/// One case: a tensor, and what became of it.
struct Blocks<'a> {
    name: &'a str,
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    input: Tensor,
    blocksize: usize,
    /// Blocks for which bitsandbytes' backends disagree: their values are compared, not their bytes.
    informational: BTreeSet<usize>,
    /// Elements whose code depends on the last bit of a reciprocal.
    ambiguous: BTreeSet<usize>,
}

impl<'a> Blocks<'a> {
    fn new(name: &'a str, sidecar: &'a Sidecar, tensors: &'a TensorFile) -> Result<Self> {
        let input = tensors.get(&format!("{name}.input"))?.shaped(&sidecar.sizes("shape")?)?.tensor()?;
        let wanted = dtype(sidecar.text("dtype")?)?;
        ensure!(input.dtype() == wanted, "{name}.input: wanted {wanted}, got {}", input.dtype());
        let blocksize = sidecar.size("blocksize")?;
        let blocks = input.numel().div_ceil(blocksize.max(1));
        ensure!(blocks == sidecar.size("blocks")?, "{name}: wanted {blocks} blocks");
        let informational = match sidecar.has("informational_blocks") {
            true => sidecar.sizes("informational_blocks")?.into_iter().collect(),
            false => BTreeSet::new(),
        };
        let ambiguous: BTreeSet<usize> = match tensors.find(&format!("{name}.ambiguous_idx"))? {
            Some(indexes) => {
                indexes.integers()?.into_iter().map(usize::try_from).collect::<Result<_, _>>()?
            }
            None => BTreeSet::new(),
        };
        let listed = if sidecar.has("ambiguous") { sidecar.size("ambiguous")? } else { 0 };
        ensure!(
            ambiguous.len() == listed,
            "{name}.ambiguous_idx: wanted {listed} elements, got {}",
            ambiguous.len()
        );
        Ok(Self { name, sidecar, tensors, input, blocksize, informational, ambiguous })
    }

    fn get(&self, what: &str) -> Result<Stored> {
        self.tensors.of(self.name, what)
    }

    fn has(&self, what: &str) -> bool {
        self.tensors.has(&format!("{}.{what}", self.name))
    }

    fn check(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        self.check_quantize(case, engine)?;
        self.check_dequantize(case, engine)?;
        let nested = format!("{}.dq.", self.name);
        if self.tensors.names().any(|n| n.starts_with(&nested)) || self.sidecar.has("dq.dequant_sha256") {
            self.check_double_quantization(case, engine)?;
        }
        Ok(())
    }

    fn check_quantize(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let numel = self.input.numel();
        let stored = self.get("packed")?.counting(numel.div_ceil(2))?;
        let stored = stored.u8s()?;
        let stored_absmax = self.get("absmax")?.counting(numel.div_ceil(self.blocksize))?;
        let Some((packed, absmax)) = case.offered(engine.nf4_quantize(&self.input, self.blocksize))? else {
            return Ok(());
        };
        let informational = |element: usize| self.informational.contains(&(element / self.blocksize));
        let (ours, theirs) = (blocks::codes(&packed, numel), blocks::codes(stored, numel));
        case.bits_except("packed", 1, &ours, &theirs, |i| informational(i) || self.ambiguous.contains(&i));
        if numel % 2 == 1 {
            case.equal("padding", packed.last().map(|byte| byte & 15), Some(7));
        }
        let steps =
            self.ambiguous.iter().filter(|&&i| !informational(i)).map(|&i| ours[i].abs_diff(theirs[i]));
        if let Some(steps) = steps.max() {
            case.at_most("ambiguous", f64::from(steps), 1.0);
        }
        let bytes = bytemuck::cast_slice(&absmax);
        case.bits_except("absmax", 4, bytes, stored_absmax.bytes(), |b| self.informational.contains(&b));
        if !self.informational.is_empty() {
            self.check_informational(case, packed, absmax)?;
        }
        Ok(())
    }

    /// Blocks of zeros, denormals, or nearly overflowing: backends flush differently, by less than the block's absmax.
    fn check_informational(&self, case: &mut Case, packed: Vec<u8>, absmax: Vec<f32>) -> Result<()> {
        let matrix = lora_kernels::nf4::Nf4Matrix::from_parts(
            self.input.shape(),
            packed,
            Absmax::Plain(absmax),
            self.blocksize,
            Codebook::nf4(),
            DType::F32,
        )?;
        let (ours, theirs) = (matrix.dequantize_tensor().to_f64(), self.get("dequant")?.f64s()?);
        let (input, theirs) = (self.input.to_f64(), theirs);
        for &block in &self.informational {
            let range = block * self.blocksize..((block + 1) * self.blocksize).min(input.len());
            let largest = input[range.clone()].iter().fold(0.0f64, |m, v| v.abs().max(m));
            case.close("informational", &ours[range.clone()], &theirs[range], |_| largest);
        }
        Ok(())
    }

    fn check_dequantize(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let own = self.input.dtype();
        let prefix = format!("{}.", self.name);
        let matrix = blocks::matrix(self.tensors, &prefix, None, self.input.shape(), self.blocksize, own)?;
        let others =
            DType::ALL.map(|d| (format!("dequant_{d}"), d)).into_iter().filter(|(what, _)| self.has(what));
        for (what, dtype) in [("dequant".to_owned(), own)].into_iter().chain(others) {
            if let Some(ours) = case.offered(engine.nf4_dequantize(&matrix, dtype))? {
                case.bits(&what, dtype.size(), ours.as_bytes(), self.get(&what)?.bytes());
            }
        }
        Ok(())
    }

    fn check_double_quantization(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let absmax = self.get("absmax")?.f32s()?;
        let (prefix, dq) = (format!("{}.", self.name), format!("{}.dq.", self.name));
        let stored = blocks::nested_absmax(self.tensors, &dq)?;
        if let Some(ours) = case.offered(engine.absmax_quantize(&absmax))? {
            blocks::check_nested(case, &absmax, &ours, &stored);
        }
        let own = self.input.dtype();
        let shape = self.input.shape();
        let matrix = blocks::matrix(self.tensors, &prefix, Some(&dq), shape, self.blocksize, own)?;
        let restored = matrix.absmax().dequantize();
        case.bits(
            "dq.absmax_dequant",
            4,
            bytemuck::cast_slice(&restored),
            self.get("dq.absmax_dequant")?.bytes(),
        );
        let Some(ours) = case.offered(engine.nf4_dequantize(&matrix, own))? else { return Ok(()) };
        if self.sidecar.has("dq.dequant_sha256") {
            blocks::check_sha256(case, "dq.dequant", &ours, self.sidecar.text("dq.dequant_sha256")?);
        } else {
            case.bits("dq.dequant", own.size(), ours.as_bytes(), self.get("dq.dequant")?.bytes());
        }
        Ok(())
    }
}
