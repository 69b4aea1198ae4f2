//! Tensor parallelism: what every rank has of a linear layer, its 4-bit weight and its adapters, from a checkpoint.
//!
//! A layer is cut along its outputs ([`Split::Outputs`], column-parallel: query, key, value, gate, up) or along its inputs
//! ([`Split::Inputs`], row-parallel: the layers after them), as Megatron-LM does (Shoeybi et al. 2019, arXiv:1909.08053):
//!
//! ```text
//! outputs:  y[.., N r / R .. N (r + 1) / R] = x W_rᵀ                       every rank has all of x
//! inputs:   y = Σ_r x[.., K r / R .. K (r + 1) / R] W_rᵀ                   an all-reduce of y
//! ```
//!
//! Adapters follow their layer in one of two ways ([`Factors`]): with one factor whole on every rank, and no exchange but
//! the layer's own; or with both factors cut, and an exchange of `v`, `[tokens, rank]` (S-LoRA, Sheng et al. 2023,
//! arXiv:2311.03285, section 6).
//!
//! ```
//! use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
//! use lora_kernels::parallel::{Shard, Split};
//!
//! let values: Vec<f32> = (0..8 * 256).map(|i| (i as f32).sin()).collect();
//! let weight = Nf4Matrix::quantize(&values, [8, 256], 64, &Codebook::nf4(), Nesting::Nested)?;
//! let second = Shard::new(Split::Inputs, 1, 2)?.nf4(&weight)?;
//! assert_eq!((second.weight.shape(), second.relative_error), (&[8, 128][..], 0.0));
//! assert_eq!(second.weight.dequantize::<f32>()[0], weight.dequantize::<f32>()[128]);
//! # Ok::<(), lora_kernels::Error>(())
//! ```

mod adapter;
mod nf4;

use std::ops::Range;

pub use adapter::{Exchange, Factors, LoraShard};
pub use nf4::Nf4Shard;

use crate::tensor::each_dtype;
use crate::{Element, Error, Result, Tensor};

/// Which side of a weight `[out, in]` the ranks share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// Rows of the weight: every rank has some of the outputs (column-parallel).
    Outputs,
    /// Columns of the weight: every rank has some of the inputs, and a part of the sum of every output (row-parallel).
    Inputs,
}

/// One rank's part of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    split: Split,
    rank: usize,
    ranks: usize,
}

impl Shard {
    /// The part of `rank`, counted from 0, of `ranks`.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no such rank.
    pub fn new(split: Split, rank: usize, ranks: usize) -> Result<Self> {
        match rank < ranks {
            true => Ok(Self { split, rank, ranks }),
            false => Err(Error::argument("rank", format!("less than {ranks}"), rank)),
        }
    }

    /// Which side is cut.
    pub fn split(&self) -> Split {
        self.split
    }

    /// The rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks share the layer.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The rank's part of `len`.
    fn part(&self, argument: &str, len: usize) -> Result<Range<usize>> {
        if !len.is_multiple_of(self.ranks) {
            return Err(Error::argument(argument, format!("a multiple of {} ranks", self.ranks), len));
        }
        let share = len / self.ranks;
        Ok(self.rank * share..(self.rank + 1) * share)
    }

    /// Rows and columns of a weight `[out, in]` that the rank has.
    fn ranges(&self, shape: &[usize]) -> Result<[Range<usize>; 2]> {
        let &[rows, columns] = shape else {
            return Err(Error::argument("weight", "a matrix [out, in]", format!("shape {shape:?}")));
        };
        Ok(match self.split {
            Split::Outputs => [self.part("weight's rows", rows)?, 0..columns],
            Split::Inputs => [0..rows, self.part("weight's columns", columns)?],
        })
    }

    /// The rank's part of a dense weight `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when the weight is no matrix, or the side that is cut is not a multiple of the ranks.
    pub fn dense(&self, weight: &Tensor) -> Result<Tensor> {
        let [rows, columns] = self.ranges(weight.shape())?;
        cut(weight, rows, columns)
    }

    /// The rank's part of what is added to or multiplied with outputs: a bias, or DoRA's row scale, `[out]`. With
    /// [`Split::Inputs`] every rank keeps all of it, and it is for the sum of all ranks: apply it after the all-reduce.
    ///
    /// DoRA's scale is that of the whole weight ([`Stack::row_scale`](crate::adapter::Stack::row_scale)): make it before
    /// the weight is cut.
    ///
    /// # Errors
    /// [`Error::Argument`] when the outputs are not a multiple of the ranks.
    pub fn of_outputs<T: Clone>(&self, values: &[T]) -> Result<Vec<T>> {
        Ok(match self.split {
            Split::Outputs => values[self.part("outputs", values.len())?].to_vec(),
            Split::Inputs => values.to_vec(),
        })
    }
}

/// A part of a matrix.
fn cut(matrix: &Tensor, rows: Range<usize>, columns: Range<usize>) -> Result<Tensor> {
    let shape = [rows.len(), columns.len()];
    let pitch = matrix.shape()[1];
    let data = each_dtype!(matrix.data(), values => {
        Element::into_data(rows.flat_map(|r| &values[r * pitch..][columns.clone()]).copied().collect())
    });
    Tensor::new(shape, data)
}
