//! Adapters: the parameters that a file holds, the scale that its configuration gives them, and what they do to a weight.
//!
//! Each kind is a type of its own, checked when it is made; [`Adapter`] is any one of them. [`Stack`] is one or several on
//! a weight: it runs them, merges them and takes them out again. [`Difference`] makes one from two weights.
//!
//! | kind | what it does to W, `[out, in]` |
//! |---|---|
//! | [`Lora`] | `W + scaling * lora_b @ lora_a` |
//! | [`Dora`] | `magnitude / ||W + delta|| * (W + delta)`, row by row |
//! | [`AdaLora`] | `W + scaling * lora_b @ (lora_a * lora_e)` |
//! | [`EmbeddingLora`] | `W + scaling * (lora_b @ lora_a)^T`, of a table `[vocab, dim]` |
//!
//! Elements that are infinite or NaN are not looked for: they go through a forward pass as through any product, and make a
//! merge fail before anything is returned.
//!
//! ```
//! use lora_kernels::adapter::{Adapter, Lora, Scaling, Stack};
//! use lora_kernels::{DType, Tensor};
//!
//! let weight = Tensor::from_f32([2, 2], &[1.0, 2.0, 3.0, 4.0], DType::F32)?;
//! let lora_a = Tensor::from_f32([1, 2], &[0.5, -0.5], DType::F32)?;
//! let lora_b = Tensor::from_f32([2, 1], &[1.0, 2.0], DType::F32)?;
//! let adapter = Adapter::from(Lora::new(lora_a, lora_b, Scaling::Lora.factor(4.0, 1))?);
//!
//! let stack = Stack::new(&[&adapter], &weight)?;
//! let x = Tensor::from_f32([2], &[1.0, 1.0], DType::F32)?;
//! assert_eq!(stack.forward(&x, &weight, None)?, [3.0, 7.0]);
//! let merged = stack.merge(&weight, DType::F32)?;
//! assert_eq!(merged.weight.to_f32(), [3.0, 0.0, 7.0, 0.0]);
//! assert_eq!(merged.report.retained_gain(), 1.0);
//! assert_eq!(stack.unmerge(&merged.weight, DType::F32)?.weight, weight);
//! # Ok::<(), lora_kernels::Error>(())
//! ```

mod adalora;
mod base;
mod combine;
mod dora;
mod embedding;
mod extract;
mod initial;
mod lora;
mod merge;
mod product;
mod ranks;
mod reduce;
mod remainder;
mod report;
mod requantize;
mod rows;
mod stack;
mod svd;
mod undo;
mod update;

pub use adalora::AdaLora;
pub use base::Base;
pub use combine::Combination;
pub use dora::Dora;
pub use embedding::EmbeddingLora;
pub use extract::{Difference, Extraction};
pub use initial::{Initial, Quantisation};
pub use lora::{Lora, Scaling};
pub use merge::{Merged, Target, Unmerged};
pub use ranks::{Ranks, Spectrum};
pub use report::MergeReport;
pub(crate) use requantize::{Grid, SHARES, gain_bits};
pub use requantize::{Requantize, Rounding, Scale};
pub use stack::Stack;
pub use svd::{Decomposition, Rank};
pub use undo::{Restored, Undo};
pub(crate) use update::panel_len;

use crate::tensor::DataMut;
use crate::{Error, Result, Tensor};

/// One adapted module, by kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Adapter {
    /// LoRA and rsLoRA (they differ in how [`Lora::scaling`] came about).
    Lora(Lora),
    /// DoRA: LoRA with a trained magnitude per output.
    Dora(Dora),
    /// AdaLoRA: `P Λ Q` with pruned ranks.
    AdaLora(AdaLora),
    /// LoRA on an embedding table.
    Embedding(EmbeddingLora),
}

impl Adapter {
    /// Rows of `lora_a`; 0 is a valid rank, with a delta of zero.
    pub fn rank(&self) -> usize {
        self.lora_a().shape()[0]
    }

    /// Columns of `lora_a`: the inputs of the module (the vocabulary of an embedding).
    pub fn in_features(&self) -> usize {
        self.lora_a().shape()[1]
    }

    /// Rows of `lora_b`: the outputs of the module (the width of an embedding).
    pub fn out_features(&self) -> usize {
        self.lora_b().shape()[0]
    }

    /// What `lora_b @ lora_a` (AdaLoRA: `lora_b @ (lora_a * lora_e)`) is multiplied by.
    pub fn scaling(&self) -> f64 {
        match self {
            Adapter::Lora(lora) => lora.scaling(),
            Adapter::Dora(dora) => dora.lora().scaling(),
            Adapter::AdaLora(adalora) => adalora.scaling(),
            Adapter::Embedding(embedding) => embedding.scaling(),
        }
    }

    /// Whether the base weight is stored `[in, out]` (GPT-2's Conv1D, embeddings); the factors never are.
    pub fn fan_in_fan_out(&self) -> bool {
        match self {
            Adapter::Lora(lora) => lora.fan_in_fan_out(),
            Adapter::Dora(dora) => dora.lora().fan_in_fan_out(),
            Adapter::AdaLora(adalora) => adalora.fan_in_fan_out(),
            Adapter::Embedding(_) => true,
        }
    }

    /// The base weight's shape as it is stored: `[out, in]`, or `[in, out]` with [`Adapter::fan_in_fan_out`].
    pub fn weight_shape(&self) -> [usize; 2] {
        match (self.out_features(), self.in_features()) {
            (n, k) if self.fan_in_fan_out() => [k, n],
            (n, k) => [n, k],
        }
    }

    /// `scaling * lora_b @ lora_a` in f64, of [`Adapter::weight_shape`], row-major: what PEFT calls the delta weight. DoRA's
    /// is that of its direction.
    ///
    /// # Errors
    /// [`Error::Argument`] when it does not fit in memory.
    pub fn delta(&self) -> Result<Vec<f64>> {
        update::Update::of(self).delta()
    }

    /// `||W + delta||` of each output, over the inputs. The base fits.
    pub(crate) fn norms(&self, base: Base<'_>) -> Vec<f64> {
        update::Update::of(self).norms(base)
    }

    /// What is trained, by PEFT's names: `lora_A`, `lora_E` of AdaLoRA, `lora_B`, `lora_B.bias`, `lora_magnitude_vector` of DoRA
    /// (`lora_embedding_A` and `lora_embedding_B` of an embedding).
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor)> {
        let named = |a, b| vec![(a, self.lora_a()), (b, self.lora_b())];
        let mut parameters = match self {
            Adapter::Embedding(_) => named("lora_embedding_A", "lora_embedding_B"),
            _ => named("lora_A", "lora_B"),
        };
        match self {
            Adapter::Lora(lora) => parameters.extend(lora.lora_bias().map(|bias| ("lora_B.bias", bias))),
            Adapter::Dora(dora) => parameters.push(("lora_magnitude_vector", dora.magnitude())),
            Adapter::AdaLora(adalora) => parameters.insert(1, ("lora_E", adalora.lora_e())),
            Adapter::Embedding(_) => {}
        }
        parameters
    }

    /// The same, to be changed in place.
    pub fn parameters_mut(&mut self) -> Vec<(&'static str, DataMut<'_>)> {
        let mut parameters = match self {
            Adapter::Lora(lora) => lora.parameters_mut(),
            Adapter::Dora(dora) => dora.parameters_mut(),
            Adapter::AdaLora(adalora) => adalora.parameters_mut(),
            Adapter::Embedding(embedding) => embedding.parameters_mut(),
        };
        parameters.drain(..).map(|(name, tensor)| (name, tensor.data_mut())).collect()
    }

    /// `[rank, in]`.
    pub fn lora_a(&self) -> &Tensor {
        match self {
            Adapter::Lora(lora) => lora.lora_a(),
            Adapter::Dora(dora) => dora.lora().lora_a(),
            Adapter::AdaLora(adalora) => adalora.lora_a(),
            Adapter::Embedding(embedding) => embedding.lora_a(),
        }
    }

    /// `[out, rank]`.
    pub fn lora_b(&self) -> &Tensor {
        match self {
            Adapter::Lora(lora) => lora.lora_b(),
            Adapter::Dora(dora) => dora.lora().lora_b(),
            Adapter::AdaLora(adalora) => adalora.lora_b(),
            Adapter::Embedding(embedding) => embedding.lora_b(),
        }
    }
}

impl From<Lora> for Adapter {
    fn from(lora: Lora) -> Self {
        Adapter::Lora(lora)
    }
}

impl From<Dora> for Adapter {
    fn from(dora: Dora) -> Self {
        Adapter::Dora(dora)
    }
}

impl From<AdaLora> for Adapter {
    fn from(adalora: AdaLora) -> Self {
        Adapter::AdaLora(adalora)
    }
}

impl From<EmbeddingLora> for Adapter {
    fn from(embedding: EmbeddingLora) -> Self {
        Adapter::Embedding(embedding)
    }
}

/// Checks that `lora_a` is `[rank, in]` and `lora_b` is `[out, rank]`.
fn check_factors(lora_a: &Tensor, lora_b: &Tensor) -> Result<()> {
    let (a, b) = (lora_a.shape(), lora_b.shape());
    if a.len() != 2 {
        return Err(Error::argument("lora_a", "shape [rank, in]", format!("{a:?}")));
    }
    if b.len() != 2 || b[1] != a[0] {
        return Err(Error::argument(
            "lora_b",
            format!("shape [out, {}] (lora_a has that many rows)", a[0]),
            format!("{b:?}"),
        ));
    }
    Ok(())
}

/// Checks that `tensor` has exactly `shape`.
fn check_shape(argument: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    match tensor.shape() == shape {
        true => Ok(()),
        false => Err(Error::argument(argument, format!("shape {shape:?}"), format!("{:?}", tensor.shape()))),
    }
}

/// Checks that a number of the configuration is one.
fn check_finite(argument: &str, value: f64) -> Result<()> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(Error::argument(argument, "a finite number", value)),
    }
}
