use super::extract::Extraction;
use super::svd::{Decomposition, Matrix, Rank};
use super::{Base, Stack};
use crate::{Error, Result};

impl Stack {
    /// What a merged weight lacks, as an adapter to run beside it: the best approximation of
    /// `row_scale ⊙ W + B' A' - W'` of a rank, or of the smallest rank that keeps a share of its energy.
    ///
    /// This is the low-rank compensation of LoftQ (Li et al. 2023, arXiv:2310.08659), for a merge. The remainder is
    /// computed tile by tile, as often as the decomposition needs it, and never made whole unless the weight is small
    /// ([`Decomposition::Auto`]).
    ///
    /// Where the merge has left the codes as they were, the remainder is the adapters' own delta. So with a rank of theirs or
    /// more nothing is gained over not merging; a lower rank holds what matters of several adapters.
    ///
    /// # Errors
    /// [`Error::Argument`] when a shape does not fit, the remainder is not finite, the rank exceeds the smaller side, or the
    /// energy is not a share.
    pub fn remainder<'a, 'b>(
        &self,
        weight: impl Into<Base<'a>>,
        merged: impl Into<Base<'b>>,
        rank: impl Into<Rank>,
    ) -> Result<Extraction> {
        let (weight, merged) = (weight.into(), merged.into());
        let [rows, columns] = self.weight_shape();
        weight.check_shape("weight", [rows, columns])?;
        merged.check_shape("merged", [rows, columns])?;
        let (sides, fan_in_fan_out) = (self.update.sides(|v| v), self.update.fan_in_fan_out);
        let read = |row: usize, column: usize, out: &mut [f64]| {
            /// Elements that are read at a time.
            const RUN: usize = 256;
            let (mut before, mut after) = ([0.0; RUN], [0.0; RUN]);
            sides.run(row * columns + column, out);
            for (i, out) in out.chunks_mut(RUN).enumerate() {
                let (column, n) = (column + i * RUN, out.len());
                weight.read(weight.dtype(), row * columns + column, &mut before[..n]);
                merged.read(merged.dtype(), row * columns + column, &mut after[..n]);
                for (j, out) in out.iter_mut().enumerate() {
                    let output = if fan_in_fan_out { column + j } else { row };
                    let scale = self.row_scale.as_ref().map_or(1.0, |scale| scale[output]);
                    *out += scale * f64::from(before[j]) - f64::from(after[j]);
                }
            }
        };
        let matrix = Matrix { rows, columns, read: &read };
        let norm = matrix.norm().map_err(|([row, column], value)| {
            Error::argument(format!("remainder[{row}, {column}]"), "a finite number", value)
        })?;
        Ok(Extraction::new(matrix.svd(rank.into(), Decomposition::Auto, norm)?, fan_in_fan_out))
    }
}
