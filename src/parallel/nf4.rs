//! Parts of a 4-bit weight.

use super::Shard;
use crate::nf4::{Absmax, BLOCKSIZES, NestedAbsmax, Nesting, Nf4Matrix};
use crate::{Error, Result};

/// A rank's part of a 4-bit weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Shard {
    /// The part, a 4-bit matrix of its own.
    pub weight: Nf4Matrix,
    /// `||part - what it was||` over `||what it was||`, in the Frobenius norm: 0 unless blocks had to be quantised again.
    pub relative_error: f64,
}

impl Shard {
    /// The rank's part of a 4-bit weight `[out, in]`.
    ///
    /// A part has the elements of the weight to the bit wherever the part's rows begin and end at multiples of 32 in the
    /// flattened weight: blocks that the cut goes through become shorter ones with the same scale (the largest
    /// block size that fits). Else it is quantised again, with the block size as it was, and the error is given.
    ///
    /// Double quantised scales stay so where a part consists of whole nested blocks; else they become f32, which is
    /// exact, and takes up to half a bit per element in blocks of 64.
    ///
    /// # Errors
    /// [`Error::Argument`] when the weight is no matrix, or the side that is cut is not a multiple of the ranks.
    pub fn nf4(&self, weight: &Nf4Matrix) -> Result<Nf4Shard> {
        let [rows, columns] = self.ranges(weight.shape())?;
        let (pitch, blocksize) = (weight.shape()[1], weight.blocksize());
        let shape = [rows.len(), columns.len()];
        // Runs of neighbouring elements: a single one where whole rows are kept.
        let (starts, length): (Vec<usize>, usize) = match columns.len() == pitch {
            true => (vec![rows.start * pitch], rows.len() * pitch),
            false => (rows.map(|r| r * pitch + columns.start).collect(), columns.len()),
        };
        // The last run of the weight may be as long as it likes.
        let whole = |start: usize| start + length == weight.numel() && starts.len() == 1;
        let fits = |size: usize| {
            starts
                .iter()
                .all(|start| start.is_multiple_of(size) && (whole(*start) || length.is_multiple_of(size)))
        };
        let sizes = BLOCKSIZES.iter().rev().copied().filter(|size| *size <= blocksize);
        if let Some(size) = sizes.into_iter().find(|&size| fits(size)) {
            let packed =
                starts.iter().flat_map(|start| &weight.packed()[start / 2..(start + length).div_ceil(2)]);
            let blocks = || {
                starts
                    .iter()
                    .flat_map(|start| (0..length.div_ceil(size)).map(move |i| (start + i * size) / blocksize))
            };
            let absmax = match weight.absmax() {
                Absmax::Nested(nested) if size == blocksize && starts.len() == 1 => {
                    part_of_nested(nested, starts[0] / blocksize, length.div_ceil(size))
                }
                _ => None,
            };
            let absmax = match absmax {
                Some(nested) => Absmax::Nested(nested?),
                None => Absmax::Plain(blocks().map(|block| weight.absmax().get(block)).collect()),
            };
            let packed = packed.copied().collect();
            let part = Nf4Matrix::from_parts(
                shape,
                packed,
                absmax,
                size,
                weight.codebook().clone(),
                weight.dtype(),
            )?;
            return Ok(Nf4Shard { weight: part, relative_error: 0.0 });
        }

        let mut values = vec![0.0f32; starts.len() * length];
        for (start, run) in starts.iter().zip(values.chunks_mut(length.max(1))) {
            weight.decode(*start, run)?;
        }
        let nesting = match weight.absmax() {
            Absmax::Plain(_) => Nesting::Plain,
            Absmax::Nested(_) => Nesting::Nested,
        };
        let part = Nf4Matrix::quantize(&values, shape, blocksize, weight.codebook(), nesting)?;
        let (packed, absmax) = (part.packed().to_vec(), part.absmax().clone());
        let part = Nf4Matrix::from_parts(
            shape,
            packed,
            absmax,
            blocksize,
            weight.codebook().clone(),
            weight.dtype(),
        )?;
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let again = part.dequantize::<f32>();
        let error = square(&mut again.iter().zip(&values).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let norm = square(&mut values.iter().map(|v| f64::from(*v)));
        let relative_error = if error == 0.0 { 0.0 } else { error / norm };
        match relative_error.is_finite() {
            true => Ok(Nf4Shard { weight: part, relative_error }),
            false => {
                Err(Error::argument("weight", "finite elements where blocks are quantised again", "others"))
            }
        }
    }
}

/// Scales `first .. first + count`, if the nested blocks that they lie in begin with them.
fn part_of_nested(nested: &NestedAbsmax, first: usize, count: usize) -> Option<Result<NestedAbsmax>> {
    let size = nested.blocksize();
    first.is_multiple_of(size).then(|| {
        let scales = nested.absmax()[first / size..(first + count).div_ceil(size)].to_vec();
        let q = nested.q()[first..first + count].to_vec();
        NestedAbsmax::from_parts(q, scales, Box::new(*nested.map()), nested.offset(), size)
    })
}
