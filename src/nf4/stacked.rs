//! Several quantised tensors as one.

use super::{Absmax, Nf4Matrix};
use crate::{Error, Result};

impl Nf4Matrix {
    /// The rows of all `parts`, one behind the other, as one matrix: query, key and value, gate and up, or the experts of a layer, each
    /// of which was quantised by itself, for one launch. The parts' first sizes add up, the others are the same.
    ///
    /// Every element decodes to the same bits as before: codes are copied, and so are plain scales. Of nested ones, which have an
    /// offset of their own in every part, the f32 values are taken: 4.5 bits per element in blocks of 64 then, instead of 4.127.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are no parts, when they differ in block size, codebook, type or the sizes of a row, or when one that is not the
    /// last ends inside a block.
    pub fn stacked(parts: &[&Self]) -> Result<Self> {
        let Some((first, rest)) = parts.split_first() else {
            return Err(Error::argument("parts", "at least one", 0));
        };
        for (i, part) in rest.iter().enumerate() {
            let differs = |what: &str, wanted: String, got: String| {
                Err(Error::argument(format!("parts[{}].{what}", i + 1), wanted, got))
            };
            if part.blocksize != first.blocksize {
                return differs("blocksize", first.blocksize.to_string(), part.blocksize.to_string());
            }
            if part.codebook != first.codebook {
                return differs("codebook", "that of the first part".into(), "another".into());
            }
            if part.dtype != first.dtype {
                return differs("dtype", first.dtype.to_string(), part.dtype.to_string());
            }
            if part.shape.is_empty() || part.shape.get(1..) != first.shape.get(1..) {
                let wanted = format!("[n, {:?}]", first.shape.get(1..).unwrap_or_default());
                return differs("shape", wanted, format!("{:?}", part.shape));
            }
        }
        for (i, part) in parts[..rest.len()].iter().enumerate() {
            if !part.numel.is_multiple_of(part.blocksize) {
                let wanted = format!("a multiple of {} elements", part.blocksize);
                return Err(Error::argument(format!("parts[{i}]"), wanted, part.numel));
            }
        }
        let mut shape = first.shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = parts.iter().map(|part| part.shape[0]).sum();
        }
        let packed = parts.iter().flat_map(|part| &part.packed).copied().collect();
        let absmax = match parts {
            [only] => only.absmax.clone(),
            _ => Absmax::Plain(parts.iter().flat_map(|part| part.absmax.dequantize().into_owned()).collect()),
        };
        Self::from_parts(shape, packed, absmax, first.blocksize, first.codebook.clone(), first.dtype)
    }
}

#[cfg(test)]
mod tests {
    use crate::nf4::{Codebook, Nesting, Nf4Matrix};
    use crate::{DType, Error};

    fn part(rows: usize, k: usize, blocksize: usize, nesting: Nesting) -> Nf4Matrix {
        let values: Vec<f32> = (0..rows * k).map(|i| ((i * 37 + rows) % 101) as f32 / 50.0 - 1.0).collect();
        Nf4Matrix::quantize(&values, [rows, k], blocksize, &Codebook::nf4(), nesting).unwrap()
    }

    #[test]
    fn every_element_keeps_its_bits() {
        for nestings in
            [[Nesting::Plain; 3], [Nesting::Nested; 3], [Nesting::Nested, Nesting::Plain, Nesting::Nested]]
        {
            // The last one may end inside a block.
            let rows = [8, 600, 3];
            let parts: Vec<_> =
                rows.iter().zip(nestings).map(|(&rows, nesting)| part(rows, 40, 64, nesting)).collect();
            let stacked = Nf4Matrix::stacked(&parts.iter().collect::<Vec<_>>()).unwrap();
            assert_eq!(stacked.shape(), [611, 40]);
            let wanted: Vec<f32> = parts.iter().flat_map(|part| part.dequantize::<f32>()).collect();
            assert_eq!(stacked.dequantize::<f32>(), wanted);
        }
        let one = part(5, 33, 64, Nesting::Nested);
        assert_eq!(Nf4Matrix::stacked(&[&one]).unwrap(), one);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused = |parts: &[&Nf4Matrix], named: &str| match Nf4Matrix::stacked(parts) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{other:?}"),
        };
        let plain = |rows, k, blocksize| part(rows, k, blocksize, Nesting::Plain);
        let good = plain(4, 64, 64);
        refused(&[], "parts");
        refused(&[&good, &plain(4, 64, 128)], "parts[1].blocksize");
        refused(&[&good, &good, &plain(2, 128, 64)], "parts[2].shape");
        refused(&[&plain(3, 33, 64), &plain(4, 33, 64)], "parts[0]");
        let quantize = |codebook: Codebook| {
            Nf4Matrix::quantize(&[half::f16::ONE; 64], [1, 64], 64, &codebook, Nesting::Plain).unwrap()
        };
        refused(&[&good, &quantize(Codebook::nf4())], "parts[1].dtype");
        refused(&[&quantize(Codebook::nf4()), &quantize(Codebook::fp4())], "parts[1].codebook");
        assert_eq!(good.dtype(), DType::F32);
    }
}
