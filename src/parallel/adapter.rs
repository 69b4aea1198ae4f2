//! Parts of an adapter.

use std::ops::Range;

use super::{Shard, Split, cut};
use crate::adapter::Adapter;
use crate::{DType, Error, Result, Tensor};

/// How the factors of an adapter are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Factors {
    /// The factor beside the side that is cut is cut with it; the other one is whole on every rank. `v` needs no exchange.
    OneWhole,
    /// Both are cut, `1 / ranks` of the adapter on each; `v` is exchanged (S-LoRA).
    BothCut,
}

/// What has to be done with `v = scaling * x lora_aᵀ` of a rank before it is multiplied with `lora_b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Exchange {
    /// Nothing.
    None,
    /// The ranks' columns of v are put beside each other.
    AllGather,
    /// The ranks' v are added.
    AllReduce,
}

/// A rank's part of an adapter: `v = scaling * x lora_aᵀ` with the rank's x, [`exchange`](LoraShard::exchange) of v, and
/// `y[.., outputs] += v lora_bᵀ` with the rank's y, before the layer's own all-reduce.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraShard {
    /// `[rank or its part, in or its part]`.
    pub lora_a: Tensor,
    /// `[outputs.len(), rank]`.
    pub lora_b: Tensor,
    /// What multiplies the product.
    pub scaling: f64,
    /// What happens to v.
    pub exchange: Exchange,
    /// Columns of the rank's y that are added to.
    pub outputs: Range<usize>,
}

impl Shard {
    /// The rank's part of an adapter of a layer. AdaLoRA's diagonal goes into `lora_a`, which is f32 then. DoRA's direction
    /// is cut as LoRA is; its row scale is [`Shard::of_outputs`]'s, and a `lora_bias`, times the scaling, a bias like the layer's.
    ///
    /// # Errors
    /// [`Error::Argument`] when a side that is cut is not a multiple of the ranks; of embeddings and weights that are stored
    /// `[in, out]`.
    pub fn adapter(&self, adapter: &Adapter, factors: Factors) -> Result<LoraShard> {
        if adapter.fan_in_fan_out() {
            return Err(Error::argument("adapter.fan_in_fan_out", "false", true));
        }
        let lora_a = match adapter {
            Adapter::AdaLora(adalora) => with_diagonal(adalora.lora_a(), adalora.lora_e())?,
            _ => adapter.lora_a().clone(),
        };
        let (rank, inputs, outputs) = (adapter.rank(), adapter.in_features(), adapter.out_features());
        let (rows, columns) = match (self.split, factors) {
            (Split::Inputs, _) => (0..rank, self.part("lora_a's columns", inputs)?),
            (Split::Outputs, Factors::OneWhole) => (0..rank, 0..inputs),
            (Split::Outputs, Factors::BothCut) => (self.part("rank", rank)?, 0..inputs),
        };
        let own_outputs = match (self.split, factors) {
            (Split::Inputs, Factors::OneWhole) => 0..outputs,
            _ => self.part("lora_b's rows", outputs)?,
        };
        Ok(LoraShard {
            lora_a: cut(&lora_a, rows, columns)?,
            lora_b: cut(adapter.lora_b(), own_outputs.clone(), 0..rank)?,
            scaling: adapter.scaling(),
            exchange: match (self.split, factors) {
                (_, Factors::OneWhole) => Exchange::None,
                (Split::Outputs, Factors::BothCut) => Exchange::AllGather,
                (Split::Inputs, Factors::BothCut) => Exchange::AllReduce,
            },
            outputs: if self.split == Split::Outputs { 0..own_outputs.len() } else { own_outputs },
        })
    }
}

/// `lora_a` with its rows times `lora_e`.
fn with_diagonal(lora_a: &Tensor, lora_e: &Tensor) -> Result<Tensor> {
    let (mut values, k) = (lora_a.to_f32(), lora_a.shape()[1]);
    for (row, e) in values.chunks_mut(k.max(1)).zip(lora_e.to_f32()) {
        row.iter_mut().for_each(|a| *a *= e);
    }
    Tensor::from_f32(lora_a.shape(), &values, DType::F32)
}
