//! What a merge loses, and what it takes to undo it: the tables of `Requantize` and `Undo` in the documentation.
//! `cargo run --release --example merge_loss` prints them; `-- --write` puts them in their place.
//!
//! The weights: a projection of all-MiniLM-L6-v2 with real activations, and normal numbers of spread 0.02 with normal inputs;
//! both in bf16, or quantised from it to NF4 in blocks of 64 with double quantisation. The adapters are normal factors of rank 16, scaled to
//! the ratio of norms that is asked for. Outputs are those of bf16 weights, summed in f64.

use std::fmt::Write;

use lora_kernels::adapter::{Adapter, Base, Lora, MergeReport, Requantize, Rounding, Scale, Stack, Undo};
use lora_kernels::formats::safetensors;
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Result, Tensor};

/// The tables, in the folder of this package.
const LOSS: &str = "src/adapter/merge_loss.md";
const UNDO: &str = "src/adapter/undo_size.md";

const RATIOS: [f64; 4] = [0.01, 0.03, 0.1, 0.3];
const RANK: usize = 16;

fn main() -> Result<()> {
    let (real, synthetic) = (Problem::real()?, Problem::synthetic(1024)?);
    let loss = loss_table(&[&real, &synthetic], &RATIOS)?;
    let undo = undo_table(&synthetic, &RATIOS)?;
    if std::env::args().any(|argument| argument == "--write") {
        for (name, table) in [(LOSS, &loss), (UNDO, &undo)] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
            std::fs::write(&path, table)
                .map_err(|source| lora_kernels::Error::Io { path: path.clone(), source })?;
        }
    }
    print!("{loss}\n{undo}");
    Ok(())
}

/// A weight with inputs for it.
pub struct Problem {
    name: &'static str,
    weight: Tensor,
    x: Tensor,
    normal: Normal,
}

impl Problem {
    /// A projection of all-MiniLM-L6-v2.
    pub fn real() -> Result<Self> {
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/real_minilm/w0.safetensors");
        let file = safetensors::File::open(data)?;
        Ok(Self { name: "real", weight: file.tensor("weight")?, x: file.tensor("x")?, normal: Normal(1) })
    }

    /// Normal numbers.
    pub fn synthetic(side: usize) -> Result<Self> {
        let mut normal = Normal(2);
        let weight = normal.tensor([side, side], 0.02)?;
        Ok(Self { name: "normal", x: normal.tensor([64, side], 1.0)?, weight, normal })
    }

    /// The weight in `dtype`.
    fn dense(&self, dtype: DType) -> Result<Tensor> {
        Tensor::from_f32(self.weight.shape(), &self.weight.to_f32(), dtype)
    }

    fn nf4(&self) -> Result<Nf4Matrix> {
        Nf4Matrix::quantize_tensor(&self.dense(DType::BF16)?, 64, &Codebook::nf4(), Nesting::Nested)
    }

    /// An adapter whose delta is so many times the weight.
    fn adapter<'a>(&self, base: impl Into<Base<'a>>, ratio: f64) -> Result<Adapter> {
        let (base, mut normal) = (base.into(), self.normal);
        let [n, k] = [base.shape()[0], base.shape()[1]];
        let (a, b) = (normal.tensor([RANK, k], 1.0)?, normal.tensor([n, RANK], 1.0)?);
        let whole = Adapter::from(Lora::new(a.clone(), b.clone(), 1.0)?);
        let whole = Stack::new(&[&whole], base)?.merge(base, DType::F32)?.report.relative_delta();
        Ok(Lora::new(a, b, ratio / whole)?.into())
    }

    /// The output error of a weight with adapters: `||x (W' + D' - W - D)ᵀ|| / ||x Dᵀ||`.
    fn output_error(
        &self,
        stack: &Stack,
        base: Base<'_>,
        merged: Base<'_>,
        beside: Option<&Adapter>,
    ) -> Result<f64> {
        let none = Lora::new(
            Tensor::from_f32([0, base.shape()[1]], &[], DType::F32)?,
            Tensor::from_f32([base.shape()[0], 0], &[], DType::F32)?,
            1.0,
        )?
        .into();
        let x = Tensor::from_f32(self.x.shape(), &self.x.to_f32(), DType::BF16)?;
        let without = Stack::new(&[&none], base)?.forward(&x, base, None)?;
        let wanted = stack.forward(&x, base, None)?;
        let got = Stack::new(&[beside.unwrap_or(&none)], merged)?.forward(&x, merged, None)?;
        let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        Ok((square(&got, &wanted) / square(&wanted, &without)).sqrt())
    }
}

/// One row per ratio and method, for each problem.
pub fn loss_table(problems: &[&Problem], ratios: &[f64]) -> Result<String> {
    let mut table = String::from(
        "| weight | delta / weight | merged into | retained gain | relative error | output error | bytes per weight |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for problem in problems {
        let base = problem.nf4()?;
        for &ratio in ratios {
            let adapter = problem.adapter(&base, ratio)?;
            let stack = Stack::new(&[&adapter], &base)?;
            let mut row = |what: &str,
                           report: &MergeReport,
                           merged: Base<'_>,
                           beside: Option<&Adapter>,
                           bytes: u64|
             -> Result<()> {
                let output = problem.output_error(&stack, (&base).into(), merged, beside)?;
                let (name, percent) = (problem.name, 100.0 * ratio);
                let (gain, error) = (report.retained_gain(), report.relative_error());
                let bytes = bytes as f64 / report.elements as f64;
                let _ = writeln!(
                    table,
                    "| {name} | {percent} % | {what} | {gain:.2} | {error:.2} | {output:.2} | {bytes:.2} |"
                );
                Ok(())
            };
            for (what, scale, rounding) in [
                ("NF4, `Largest`, `Nearest` (PEFT's way)", Scale::Largest, Rounding::Nearest),
                ("NF4, `LeastError`, `Nearest`", Scale::LeastError, Rounding::Nearest),
                ("NF4, `LeastError`, `Stochastic`", Scale::LeastError, Rounding::Stochastic { seed: 0 }),
                ("NF4, `LeastError`, `KeepGain`", Scale::LeastError, Rounding::KeepGain),
            ] {
                let merged = stack.merge(&base, Requantize { scale, rounding, min_gain: 0.0 }.forced())?;
                row(what, &merged.report, (&merged.weight).into(), None, merged.report.bytes)?;
            }
            let least = Requantize { scale: Scale::LeastError, ..Requantize::default() }.forced();
            let merged = stack.merge(&base, least)?;
            let remainder = Adapter::from(stack.remainder(&base, &merged.weight, RANK)?.lora(DType::BF16)?);
            let whole = Stack::new(&[&remainder], &merged.weight)?.merge(&merged.weight, DType::F32)?.weight;
            let report = compare(&base.dequantize_tensor(), &adapter.delta()?, &whole);
            let bytes =
                merged.report.bytes + 2 * (remainder.lora_a().numel() + remainder.lora_b().numel()) as u64;
            let what = "NF4, `LeastError`, `Nearest`, and a remainder of rank 16";
            row(what, &report, (&merged.weight).into(), Some(&remainder), bytes)?;
            let merged = stack.merge(&base, DType::BF16)?;
            row("bf16", &merged.report, (&merged.weight).into(), None, merged.report.bytes)?;
        }
    }
    Ok(table)
}

/// What a report says, of a weight that no merge has made.
fn compare(weight: &Tensor, delta: &[f64], merged: &Tensor) -> MergeReport {
    let mut report = MergeReport { elements: weight.numel() as u64, ..Default::default() };
    for ((w, d), m) in weight.to_f64().into_iter().zip(delta).zip(merged.to_f64()) {
        report.weight += w * w;
        report.wanted += d * d;
        report.kept += (m - w) * d;
        report.error += (m - w - d).powi(2);
    }
    report
}

/// Bytes of a record, per weight.
pub fn undo_table(problem: &Problem, ratios: &[f64]) -> Result<String> {
    let mut table = String::from("| original | merged into | a copy |");
    ratios.iter().for_each(|ratio| table += &format!(" {} % |", 100.0 * ratio));
    table += "\n|---|---|---|";
    ratios.iter().for_each(|_| table += "---|");
    table += "\n";
    let dense = DType::ALL.map(|dtype| problem.dense(dtype));
    let [f32, f16, bf16] =
        [dense[0].as_ref(), dense[1].as_ref(), dense[2].as_ref()].map(|d| d.expect("a matrix"));
    let nf4 = problem.nf4()?;
    let least = Requantize { scale: Scale::LeastError, ..Requantize::default() };
    let keep = Requantize { rounding: Rounding::KeepGain, ..least };
    let rows: [(&str, Base<'_>, &str, Aim); 9] = [
        ("f32", f32.into(), "f32", Aim::Dense(DType::F32)),
        ("f32", f32.into(), "bf16", Aim::Dense(DType::BF16)),
        ("f16", f16.into(), "f16", Aim::Dense(DType::F16)),
        ("bf16", bf16.into(), "bf16", Aim::Dense(DType::BF16)),
        ("bf16", bf16.into(), "f16", Aim::Dense(DType::F16)),
        ("NF4", (&nf4).into(), "bf16", Aim::Dense(DType::BF16)),
        ("NF4", (&nf4).into(), "NF4, PEFT's way", Aim::Nf4(Requantize::default())),
        ("NF4", (&nf4).into(), "NF4, `LeastError`, `Nearest`", Aim::Nf4(least)),
        ("NF4", (&nf4).into(), "NF4, `LeastError`, `KeepGain`", Aim::Nf4(keep)),
    ];
    for (original, base, what, target) in rows {
        let copy = match base {
            Base::Dense(tensor) => tensor.dtype().size() as f64,
            Base::Nf4(_) => nf4_bytes(&nf4),
        };
        let _ = write!(table, "| {original} | {what} | {copy:.2} |");
        for &ratio in ratios {
            let adapter = problem.adapter(base, ratio)?;
            let stack = Stack::new(&[&adapter], base)?;
            let undo = match target {
                Aim::Dense(dtype) => Undo::record(&[&adapter], base, &stack.merge(base, dtype)?.weight)?,
                Aim::Nf4(target) => {
                    Undo::record(&[&adapter], base, &stack.merge(base, target.forced())?.weight)?
                }
            };
            let bytes = undo.as_bytes().len() as f64 / problem.weight.numel() as f64;
            let _ = write!(table, " {bytes:.3} |");
        }
        table += "\n";
    }
    Ok(table)
}

/// A target of either kind.
#[derive(Clone, Copy)]
enum Aim {
    Dense(DType),
    Nf4(Requantize),
}

/// Bytes per weight of codes and scales.
fn nf4_bytes(matrix: &Nf4Matrix) -> f64 {
    let scales = matrix.absmax().len() as f64;
    (matrix.packed().len() as f64 + scales + 4.0 * (scales / 256.0).ceil()) / matrix.numel() as f64
}

/// Normal numbers that are the same everywhere but for the last bits of a logarithm.
#[derive(Clone, Copy)]
struct Normal(u64);

impl Normal {
    /// SplitMix64 (Steele et al. 2014), of (0, 1].
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller 1958.
    fn tensor(&mut self, shape: [usize; 2], spread: f64) -> Result<Tensor> {
        let mut one = || {
            let radius = (-2.0 * self.uniform().ln()).sqrt();
            (spread * radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()) as f32
        };
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| one()).collect();
        Tensor::from_f32(shape, &values, DType::F32)
    }
}
