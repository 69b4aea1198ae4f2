//! The operations that the checks ask for, over host data, so that every device answers the same questions.

use lora_kernels::adapter::Adapter;
use lora_kernels::cpu::AdamWStep;
use lora_kernels::nf4::{Absmax, NestedAbsmax, Nf4Matrix};
use lora_kernels::{DType, Error, Result, Tensor};

/// A frozen weight `[n, k]`.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// Dense, of one element type.
    Dense(&'a Tensor),
    /// 4-bit; decoded to the type of the activations.
    Nf4(&'a Nf4Matrix),
}

/// One adapter's factors, as the low-rank products take them.
#[derive(Clone)]
pub struct LowRank {
    /// `[rank, k]`.
    pub lora_a: Tensor,
    /// `[n, rank]`.
    pub lora_b: Tensor,
    /// `delta = scaling * lora_b @ lora_a`.
    pub scaling: f64,
}

/// What a product adds to `x W^T`.
#[derive(Clone, Copy, Default)]
pub struct Extras<'a> {
    /// `[n]`, of the type of the activations.
    pub bias: Option<&'a Tensor>,
    /// `[n]`: `y = row_scale * (x W^T + ...) + bias`.
    pub row_scale: Option<&'a [f32]>,
    /// The adapters on this layer.
    pub adapters: &'a [LowRank],
    /// Which adapter each row of `x` uses, -1 for none. Absent: the first one for every row.
    pub adapter_index: Option<&'a [i32]>,
}

/// Adds a low-rank delta to a weight, or takes it away.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// `W' = row_scale (W + delta)`.
    Merge,
    /// `W = W' / row_scale - delta`.
    Unmerge,
}

/// What a product may be off by, besides f32 sums and one rounding at the end.
#[derive(Debug, Clone, Copy, Default)]
pub struct Slack {
    /// As a share of `|x| |W|^T`: how 4-bit weights are rounded before they are multiplied.
    pub weight: f64,
    /// As a share of `|x a^T| |b|^T`.
    pub low_rank: f64,
}

/// The gradients of one adapted layer, by the reference data's names: `dX`, `dA`, `dB`, `dm` of DoRA, `dE` of AdaLoRA.
#[derive(Default)]
pub struct Gradients(pub Vec<(&'static str, Vec<f64>)>);

impl Gradients {
    /// One of them.
    pub fn get(&self, name: &str) -> Option<&[f64]> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, values)| values.as_slice())
    }
}

/// A device. An operation that it lacks is an [`Error::Unsupported`].
pub trait Engine {
    /// What runs, for the user.
    fn name(&self) -> String;

    /// Whether this is the host, which also has the operations that no kernel does.
    fn on_host(&self) -> bool {
        false
    }

    /// Packed codes and absmax of the elements of `x`, in flat blocks of `blocksize`.
    fn nf4_quantize(&self, x: &Tensor, blocksize: usize) -> Result<(Vec<u8>, Vec<f32>)>;

    /// Double quantisation of `absmax`.
    fn absmax_quantize(&self, absmax: &[f32]) -> Result<NestedAbsmax>;

    /// The elements of `weight` as `dtype`.
    fn nf4_dequantize(&self, weight: &Nf4Matrix, dtype: DType) -> Result<Tensor>;

    /// `y = row_scale * (x W^T + low-rank) + bias`, `[m, n]` of the type of `x` `[m, k]`.
    fn matmul(&self, x: &Tensor, weight: Weight<'_>, extras: Extras<'_>) -> Result<Tensor>;

    /// What that product may be off by, against the weight decoded to the type of `x`.
    fn slack(&self, x: &Tensor, weight: Weight<'_>) -> Result<Slack> {
        let _ = (x, weight);
        Ok(Slack::default())
    }

    /// DoRA's `magnitude / ||W + delta||` of every row.
    fn dora_scale(&self, weight: Weight<'_>, lora: &LowRank, magnitude: &[f32]) -> Result<Vec<f32>>;

    /// Merges into a dense weight `[n, k]` (`[k, n]` where `fan_in_fan_out`), or out of it.
    fn merge(
        &self,
        direction: Direction,
        weight: &Tensor,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
        fan_in_fan_out: bool,
    ) -> Result<Tensor>;

    /// Decodes, merges (or unmerges) and quantises again, with the same blocksize and nesting.
    fn nf4_merge(
        &self,
        direction: Direction,
        weight: &Nf4Matrix,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
    ) -> Result<Nf4Matrix>;

    /// The gradients of a layer, from `x` `[m, k]` and the gradient `dy` `[m, n]` of its outputs, both of one type.
    fn gradients(&self, weight: Weight<'_>, adapter: &Adapter, x: &Tensor, dy: &Tensor) -> Result<Gradients> {
        let _ = (weight, adapter, x, dy);
        Err(Error::unsupported(self.name(), "the gradient of a layer"))
    }

    /// AdamW: the new parameter, first and second moment.
    fn adamw(
        &self,
        step: &AdamWStep,
        p: &[f32],
        gradient: &[f32],
        moments: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 3]> {
        let _ = (step, p, gradient, moments);
        Err(Error::unsupported(self.name(), "AdamW"))
    }

    /// AdaLoRA's importance: the new sensitivity and uncertainty.
    fn importance(
        &self,
        p: &[f32],
        gradient: &[f32],
        betas: [f64; 2],
        state: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 2]> {
        let _ = (p, gradient, betas, state);
        Err(Error::unsupported(self.name(), "AdaLoRA's importance"))
    }

    /// A matrix like `weight`, with other codes and scales; these are quantised where those of `weight` are.
    fn like(&self, weight: &Nf4Matrix, packed: Vec<u8>, absmax: Vec<f32>) -> Result<Nf4Matrix> {
        let absmax = match weight.absmax() {
            Absmax::Plain(_) => Absmax::Plain(absmax),
            Absmax::Nested(_) => Absmax::Nested(self.absmax_quantize(&absmax)?),
        };
        let codebook = weight.codebook().clone();
        Nf4Matrix::from_parts(weight.shape(), packed, absmax, weight.blocksize(), codebook, weight.dtype())
    }
}

/// Where the operations run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// The reference in Rust.
    #[default]
    Cpu,
    /// The compiled kernels, executed on the CPU with checks.
    Emulator,
    /// The compiled kernels on the first NVIDIA GPU.
    Cuda,
}

/// The GPU, or the CPU where there is none, with the reason why.
///
/// # Errors
/// What goes wrong on a GPU that is there.
pub fn open_best() -> Result<(Box<dyn Engine>, Option<String>)> {
    match open(Choice::Cuda) {
        Ok(engine) => Ok((engine, None)),
        Err(error @ Error::NoDevice { .. }) => Ok((open(Choice::Cpu)?, Some(error.to_string()))),
        Err(error) => Err(error),
    }
}

/// The engine of a choice.
///
/// # Errors
/// [`Error::NoDevice`] when there is no GPU.
pub fn open(choice: Choice) -> Result<Box<dyn Engine>> {
    match choice {
        Choice::Cpu => Ok(Box::new(super::cpu::Cpu)),
        Choice::Emulator => Ok(Box::new(super::device::Kernels::emulator())),
        Choice::Cuda => Ok(Box::new(super::device::Kernels::cuda()?)),
    }
}
