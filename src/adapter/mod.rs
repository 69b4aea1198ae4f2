//! Adapters: the parameters that a file holds, and the scale that its configuration gives them.

use crate::Tensor;

/// One adapted module, by kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Adapter {
    /// LoRA and rsLoRA (they differ in how `scaling` came about).
    Lora(Lora),
    /// DoRA: LoRA with a trained magnitude per output.
    Dora(Dora),
    /// AdaLoRA: `P Λ Q` with pruned ranks.
    AdaLora(AdaLora),
    /// LoRA on an embedding table.
    Embedding(EmbeddingLora),
}

/// `delta = scaling * lora_b @ lora_a` (Hu et al. 2021, arXiv:2106.09685).
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// `[rank, in]`.
    pub lora_a: Tensor,
    /// `[out, rank]`.
    pub lora_b: Tensor,
    /// `[out]`, added as `scaling * bias` (PEFT's `lora_bias`).
    pub lora_bias: Option<Tensor>,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA, with this module's own alpha and rank.
    pub scaling: f64,
    /// Whether the base weight is stored `[in, out]` (GPT-2's Conv1D); the factors never are.
    pub fan_in_fan_out: bool,
}

/// `W' = magnitude / ||W + delta||_row * (W + delta)` (Liu et al. 2024, arXiv:2402.09353).
#[derive(Debug, Clone, PartialEq)]
pub struct Dora {
    /// The direction's update.
    pub lora: Lora,
    /// `[out]`.
    pub magnitude: Tensor,
}

/// `delta = lora_b @ (lora_a * lora_e) * alpha / (init_r + 1e-5)` (Zhang et al. 2023, arXiv:2303.10512; PEFT's scale).
#[derive(Debug, Clone, PartialEq)]
pub struct AdaLora {
    /// `[rank, in]`.
    pub lora_a: Tensor,
    /// `[rank, 1]`, the diagonal.
    pub lora_e: Tensor,
    /// `[out, rank]`.
    pub lora_b: Tensor,
    /// `alpha` of the configuration.
    pub alpha: f64,
    /// The rank that training began with; it stays in the scale after pruning.
    pub init_r: usize,
    /// As in [`Lora`].
    pub fan_in_fan_out: bool,
}

/// `delta = scaling * (lora_b @ lora_a)^T`, of shape `[vocab, dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingLora {
    /// `[rank, vocab]`.
    pub lora_a: Tensor,
    /// `[dim, rank]`.
    pub lora_b: Tensor,
    /// As in [`Lora`].
    pub scaling: f64,
}
