//! Records from which a merge is undone to the bit.

mod coder;
mod format;
mod predict;

use half::{bf16, f16};
use rayon::prelude::*;

use self::coder::{Decoder, Encoder};
use self::format::{Header, Kind, Nested, Nf4Original, Original, PIECE, Piece, digest, piece_count};
use self::predict::{Blocks, Layout, Predictor, code_dense};
use super::{Adapter, Base, Stack};
use crate::nf4::{Absmax, Codebook, Nf4Matrix, block_count};
use crate::tensor::each_dtype;
use crate::{DType, Element, Error, Result, Tensor};

/// What turns a merged weight back into the original one, bit for bit: a dense weight of any dtype, or codes and scales of
/// a 4-bit one.
///
/// It holds what the merged weight and the adapters do not tell: integers between the original's bit patterns and a prediction
/// from the merged weight minus the delta, entropy coded. In bytes per weight, by the size of the delta against the weight
/// (printed by `cargo run --release --example merge_loss`; a normal weight of `[1024, 1024]`, rank 16):
///
#[doc = include_str!("../undo_size.md")]
///
/// It does not matter how the merge was done: by [`Stack::merge`], by a kernel, by PEFT; a merge that is nothing but a sum of
/// the weight and the delta makes the record short, any other one makes it long. When merges follow one another, each has its
/// own record, and the last is undone first: a record knows its merged weight by a digest and refuses every other.
///
/// The prediction is a fixed sequence of IEEE operations: a record can be used on another machine. The factors of DoRA,
/// which need the original, are in it.
///
/// ```
/// use lora_kernels::adapter::{Adapter, Lora, Restored, Stack, Undo};
/// use lora_kernels::{DType, Tensor};
///
/// let weight = Tensor::from_f32([2, 2], &[1.0, 2.0, 3.0, 0.1], DType::BF16)?;
/// let lora_a = Tensor::from_f32([1, 2], &[0.3, -0.7], DType::F32)?;
/// let lora_b = Tensor::from_f32([2, 1], &[0.9, 2.1], DType::F32)?;
/// let adapter = Adapter::from(Lora::new(lora_a, lora_b, 1.0)?);
///
/// let merged = Stack::new(&[&adapter], &weight)?.merge(&weight, DType::BF16)?.weight;
/// let undo = Undo::record(&[&adapter], &weight, &merged)?;
///
/// let undo = Undo::from_bytes(undo.as_bytes().to_vec())?; // to a file and back
/// assert_eq!(undo.restore(&[&adapter], &merged)?, Restored::Dense(weight));
/// # Ok::<(), lora_kernels::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Undo {
    header: Header,
    /// The whole record.
    bytes: Vec<u8>,
    /// Where its pieces begin.
    pieces: usize,
}

impl PartialEq for Undo {
    fn eq(&self, other: &Self) -> bool {
        // The header is read from these.
        self.bytes == other.bytes
    }
}

/// A weight as it was before a merge.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there are few of them, beside the weights that they hold")]
pub enum Restored {
    /// Elements.
    Dense(Tensor),
    /// 4-bit blocks.
    Nf4(Nf4Matrix),
}

impl Undo {
    /// Records how `original` comes back from `merged`, into which `adapters` were merged together, in this order.
    ///
    /// # Errors
    /// [`Error::Argument`] as [`Stack::new`], and when `merged` has another shape.
    pub fn record<'a, 'b>(
        adapters: &[&Adapter],
        original: impl Into<Base<'a>>,
        merged: impl Into<Base<'b>>,
    ) -> Result<Self> {
        let (original, merged) = (original.into(), merged.into());
        let stack = Stack::new(adapters, original)?;
        merged.check_shape("merged", stack.weight_shape())?;
        let predictor = Predictor::new(&stack, merged);
        let numel: usize = stack.weight_shape().iter().product();
        let piece = |i: usize| {
            let (start, len) = (i * PIECE, PIECE.min(numel - i * PIECE));
            let mut encoder = Encoder::new();
            match original {
                Base::Dense(tensor) => each_dtype!(DataRef: tensor.data(), elements => {
                    code_dense(&predictor, start, &mut elements[start..start + len].to_vec(), &mut encoder);
                }),
                Base::Nf4(matrix) => {
                    let mut blocks = Blocks::of(matrix, start, len);
                    Layout::of(matrix).code(&predictor, start, &mut blocks, &mut encoder);
                }
            }
            let bytes = encoder.finish();
            let (merged, original) = (digest_of_merged(merged, start, len), digest_of(original, start, len));
            (Piece { length: bytes.len() as u32, merged, original }, bytes)
        };
        let pieces = 0..piece_count(stack.weight_shape());
        let coded: Vec<(Piece, Vec<u8>)> = pieces.into_par_iter().map(piece).collect();
        let (pieces, bytes): (Vec<_>, Vec<_>) = coded.into_iter().unzip();
        let header = Header {
            shape: stack.weight_shape(),
            merged: Kind::of(merged),
            original: original_of(original),
            scales: stack.scales,
            pieces,
        };
        Self::from_bytes(header.write(&bytes))
    }

    /// The record, to be stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes a record that was stored.
    ///
    /// # Errors
    /// [`Error::Format`] when the bytes are not those of a record: each is covered by a digest.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<Self> {
        let bytes = bytes.into();
        let (header, pieces) = Header::read(&bytes)?;
        Ok(Self { header, bytes, pieces })
    }

    /// The shape of the weight.
    pub fn shape(&self) -> [usize; 2] {
        self.header.shape
    }

    /// The original weight, bit for bit.
    ///
    /// # Errors
    /// [`Error::Argument`] when `merged` is not the weight that was recorded (a bit is enough), the adapters do not fit it,
    /// or they are not those that were recorded; [`Error::Format`] when the record is damaged in a way that its
    /// digest does not show.
    pub fn restore<'a>(&self, adapters: &[&Adapter], merged: impl Into<Base<'a>>) -> Result<Restored> {
        let (merged, header) = (merged.into(), &self.header);
        merged.check_shape("merged", header.shape)?;
        if Kind::of(merged) != header.merged {
            return Err(Error::argument("merged", header.merged.to_string(), Kind::of(merged)));
        }
        let stack = Stack::with_scales(adapters, header.shape, &header.scales)?;
        let predictor = Predictor::new(&stack, merged);
        match &header.original {
            Original::Dense(DType::F32) => self.dense::<f32>(&predictor),
            Original::Dense(DType::F16) => self.dense::<f16>(&predictor),
            Original::Dense(DType::BF16) => self.dense::<bf16>(&predictor),
            Original::Nf4(original) => self.nf4(original, &predictor),
        }
    }

    fn numel(&self) -> usize {
        self.header.shape.iter().product()
    }

    /// The pieces, each with its bytes.
    fn pieces(&self) -> Vec<(Piece, &[u8])> {
        let mut rest = &self.bytes[self.pieces..];
        self.header
            .pieces
            .iter()
            .map(|&piece| {
                let (bytes, after) = rest.split_at(piece.length as usize);
                rest = after;
                (piece, bytes)
            })
            .collect()
    }

    fn dense<T: Element>(&self, predictor: &Predictor<'_>) -> Result<Restored> {
        let mut out = bytemuck::zeroed_vec::<T>(self.numel());
        let pieces = out.par_chunks_mut(PIECE).zip(self.pieces()).enumerate();
        pieces.try_for_each(|(i, (out, (piece, bytes)))| {
            check_merged(predictor.merged, i * PIECE, out.len(), &piece)?;
            let mut decoder = Decoder::new(bytes);
            code_dense(predictor, i * PIECE, out, &mut decoder);
            check_original(&digest(&[bytemuck::cast_slice(out)]), &piece, &decoder)
        })?;
        Ok(Restored::Dense(Tensor::new(self.header.shape, T::into_data(out))?))
    }

    fn nf4(&self, original: &Nf4Original, predictor: &Predictor<'_>) -> Result<Restored> {
        let Nf4Original { dtype, blocksize, codebook, padding, nested } = original;
        let (numel, codebook) = (self.numel(), Codebook::from_values(*codebook)?);
        let nested = nested.as_ref().map(|nested| nested.with_q(vec![0; block_count(numel, *blocksize)]));
        let nested = nested.transpose()?;
        let layout = Layout::new(*blocksize, &codebook, nested.as_ref());
        let pieces: Vec<(Vec<u8>, Blocks)> = self
            .pieces()
            .into_par_iter()
            .enumerate()
            .map(|(i, (piece, bytes))| {
                let (start, len) = (i * PIECE, PIECE.min(numel - i * PIECE));
                check_merged(predictor.merged, start, len, &piece)?;
                let mut decoder = Decoder::new(bytes);
                let mut blocks = layout.zeros(len);
                layout.code(predictor, start, &mut blocks, &mut decoder);
                let packed: Vec<u8> =
                    blocks.codes.chunks(2).map(|c| c[0] << 4 | c.get(1).unwrap_or(padding)).collect();
                let scales: &[u8] =
                    if nested.is_some() { &blocks.q } else { bytemuck::cast_slice(&blocks.absmax) };
                check_original(&digest(&[&packed, scales]), &piece, &decoder)?;
                Ok((packed, blocks))
            })
            .collect::<Result<_>>()?;
        let packed = pieces.iter().flat_map(|(packed, _)| packed).copied().collect();
        let absmax = match &original.nested {
            None => Absmax::Plain(pieces.iter().flat_map(|(_, blocks)| &blocks.absmax).copied().collect()),
            Some(nested) => {
                let q = pieces.iter().flat_map(|(_, blocks)| &blocks.q).copied().collect();
                Absmax::Nested(nested.with_q(q)?)
            }
        };
        let matrix = Nf4Matrix::from_parts(self.header.shape, packed, absmax, *blocksize, codebook, *dtype)?;
        Ok(Restored::Nf4(matrix))
    }
}

/// How a weight is stored, and what a record keeps of it besides its pieces.
fn original_of(original: Base<'_>) -> Original {
    let matrix = match original {
        Base::Dense(tensor) => return Original::Dense(tensor.dtype()),
        Base::Nf4(matrix) => matrix,
    };
    Original::Nf4(Nf4Original {
        dtype: matrix.dtype(),
        blocksize: matrix.blocksize(),
        codebook: *matrix.codebook().values(),
        padding: if matrix.numel() % 2 == 1 { matrix.packed()[matrix.numel() / 2] & 15 } else { 0 },
        nested: match matrix.absmax() {
            Absmax::Plain(_) => None,
            Absmax::Nested(nested) => Some(Nested::of(nested)),
        },
    })
}

/// Of the elements of a dense weight, or of the codes and scales of a 4-bit one.
fn digest_of(weight: Base<'_>, start: usize, len: usize) -> [u8; 8] {
    match weight {
        Base::Dense(tensor) => {
            let size = tensor.dtype().size();
            digest(&[&tensor.as_bytes()[start * size..(start + len) * size]])
        }
        Base::Nf4(matrix) => {
            let packed = &matrix.packed()[start / 2..(start + len).div_ceil(2)];
            let blocks = start / matrix.blocksize()..(start + len).div_ceil(matrix.blocksize());
            match matrix.absmax() {
                Absmax::Plain(absmax) => digest(&[packed, bytemuck::cast_slice(&absmax[blocks])]),
                Absmax::Nested(nested) => digest(&[packed, &nested.q()[blocks]]),
            }
        }
    }
}

/// The same, and of all else that a 4-bit weight needs to be decoded.
fn digest_of_merged(merged: Base<'_>, start: usize, len: usize) -> [u8; 8] {
    let elements = digest_of(merged, start, len);
    let Base::Nf4(matrix) = merged else { return elements };
    let mut shared = vec![matrix.blocksize() as f32];
    shared.extend(matrix.codebook().values());
    if let Absmax::Nested(nested) = matrix.absmax() {
        let span = matrix.blocksize() * nested.blocksize();
        shared.extend(&nested.absmax()[start / span..(start + len).div_ceil(span)]);
        shared.extend([nested.blocksize() as f32, nested.offset()]);
        shared.extend(nested.map());
    }
    digest(&[&elements, bytemuck::cast_slice(&shared)])
}

/// Checks that a run of elements is what was recorded.
fn check_merged(merged: Base<'_>, start: usize, len: usize, piece: &Piece) -> Result<()> {
    match digest_of_merged(merged, start, len) == piece.merged {
        true => Ok(()),
        false => {
            let argument = format!("merged, elements {start} to {}", start + len - 1);
            Err(Error::argument(argument, "the weight that was recorded", "another"))
        }
    }
}

/// Checks that what has been restored is what was recorded.
fn check_original(digest: &[u8; 8], piece: &Piece, decoder: &Decoder<'_>) -> Result<()> {
    match *digest == piece.original && decoder.is_done() {
        true => Ok(()),
        false => Err(Error::argument("adapters", "those that were recorded, in their order", "others")),
    }
}
