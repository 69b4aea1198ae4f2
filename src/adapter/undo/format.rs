//! The bytes of a record.
//!
//! | bytes | |
//! |---|---|
//! | 8 | `LKUNDO`, the version 1, 0 |
//! | 16 | the digest of all that follows |
//! | 8 + 8 | rows, columns |
//! | 1 + 1 | the merged weight: 0 dense, 1 4-bit; its dtype: 0 f32, 1 f16, 2 bf16 |
//! | 1 + 1 | the same of the original; if that is 4-bit: |
//! | 4 + 64 + 1 + 1 | block size, codebook, the code beside the last of an odd number, 0 plain or 1 nested scales; if nested: |
//! | 4 + 4 + 1 | nested block size, offset, 0 or 1 for another map than bitsandbytes': |
//! | 0 or 1024 | that map |
//! | 4 per nested block | nested scales |
//! | 8, and 8 for each | factors of the DoRA adapters, `[adapters, out]` |
//! | 20 per 65536 elements | length of their piece, digest of the merged elements, digest of the original ones |
//! | | the pieces |
//!
//! All little-endian. A digest is the beginning of a SHA-256.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::adapter::Base;
use crate::nf4::{DYNAMIC_MAP, NestedAbsmax, block_count, check_blocksize};
use crate::{DType, Error, Result};

const MAGIC: [u8; 8] = *b"LKUNDO\x01\0";

/// Elements of a piece: a multiple of every block size.
pub const PIECE: usize = 1 << 16;

/// What a record says before its pieces.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    pub shape: [usize; 2],
    pub merged: Kind,
    pub original: Original,
    /// `[DoRA adapters, out]`.
    pub scales: Vec<f64>,
    pub pieces: Vec<Piece>,
}

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    pub nf4: bool,
    pub dtype: DType,
}

/// What is restored.
#[derive(Debug, Clone, PartialEq)]
pub enum Original {
    Dense(DType),
    Nf4(Nf4Original),
}

/// What all blocks of a 4-bit weight share.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Original {
    pub dtype: DType,
    pub blocksize: usize,
    pub codebook: [f32; 16],
    /// The code beside the last of an odd number.
    pub padding: u8,
    pub nested: Option<Nested>,
}

/// What all nested scales share.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    pub blocksize: usize,
    pub offset: f32,
    pub map: Box<[f32; 256]>,
    pub absmax: Vec<f32>,
}

/// One run of [`PIECE`] elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub length: u32,
    pub merged: [u8; 8],
    pub original: [u8; 8],
}

impl Kind {
    pub fn of(weight: Base<'_>) -> Self {
        Self { nf4: matches!(weight, Base::Nf4(_)), dtype: weight.dtype() }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.nf4 { "4-bit" } else { "dense" }, self.dtype)
    }
}

impl Nested {
    pub fn of(nested: &NestedAbsmax) -> Self {
        Self {
            blocksize: nested.blocksize(),
            offset: nested.offset(),
            map: Box::new(*nested.map()),
            absmax: nested.absmax().to_vec(),
        }
    }

    /// The scales that these indexes stand for.
    pub fn with_q(&self, q: Vec<u8>) -> Result<NestedAbsmax> {
        NestedAbsmax::from_parts(q, self.absmax.clone(), self.map.clone(), self.offset, self.blocksize)
    }
}

/// The first bytes of a SHA-256 over all parts.
pub fn digest<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    let mut digest = [0; N];
    digest.copy_from_slice(&hash.finalize()[..N]);
    digest
}

/// How many pieces a weight has.
pub fn piece_count([rows, columns]: [usize; 2]) -> usize {
    rows.saturating_mul(columns).div_ceil(PIECE)
}

impl Header {
    /// The record of these pieces.
    pub fn write(&self, pieces: &[Vec<u8>]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([0; 16]);
        self.shape.iter().for_each(|&size| out.extend((size as u64).to_le_bytes()));
        let kind = |nf4: bool, dtype: DType| [u8::from(nf4), dtype_code(dtype)];
        out.extend(kind(self.merged.nf4, self.merged.dtype));
        let floats = |out: &mut Vec<u8>, values: &[f32]| {
            values.iter().for_each(|value| out.extend(value.to_bits().to_le_bytes()));
        };
        match &self.original {
            Original::Dense(dtype) => out.extend(kind(false, *dtype)),
            Original::Nf4(Nf4Original { dtype, blocksize, codebook, padding, nested }) => {
                out.extend(kind(true, *dtype));
                out.extend((*blocksize as u32).to_le_bytes());
                floats(&mut out, codebook);
                out.extend([*padding, u8::from(nested.is_some())]);
                if let Some(Nested { blocksize, offset, map, absmax }) = nested {
                    out.extend((*blocksize as u32).to_le_bytes());
                    floats(&mut out, &[*offset]);
                    let same = map.iter().zip(&DYNAMIC_MAP).all(|(a, b)| a.to_bits() == b.to_bits());
                    out.push(u8::from(!same));
                    if !same {
                        floats(&mut out, &map[..]);
                    }
                    floats(&mut out, absmax);
                }
            }
        }
        out.extend((self.scales.len() as u64).to_le_bytes());
        self.scales.iter().for_each(|scale| out.extend(scale.to_bits().to_le_bytes()));
        for piece in &self.pieces {
            out.extend(piece.length.to_le_bytes());
            out.extend(piece.merged);
            out.extend(piece.original);
        }
        pieces.iter().for_each(|piece| out.extend(piece));
        let digest = digest::<16>(&[&out[24..]]);
        out[8..24].copy_from_slice(&digest);
        out
    }

    /// The header of a record, and where its pieces begin.
    pub fn read(record: &[u8]) -> Result<(Self, usize)> {
        let mut reader = Reader { rest: record };
        let magic = reader.array("magic")?;
        if magic != MAGIC {
            return Err(wrong("magic", "LKUNDO, version 1", String::from_utf8_lossy(&magic)));
        }
        let wanted: [u8; 16] = reader.array("digest")?;
        if digest(&[reader.rest]) != wanted {
            return Err(wrong("digest", "that of the bytes", "another"));
        }
        let shape = [reader.size("rows")?, reader.size("columns")?];
        if shape[0].checked_mul(shape[1]).is_none() {
            return Err(wrong("shape", "a product that fits in memory", format!("{shape:?}")));
        }
        let merged = reader.kind("merged")?;
        let Kind { nf4, dtype } = reader.kind("original")?;
        let original = if nf4 { Original::Nf4(reader.nf4(dtype, shape)?) } else { Original::Dense(dtype) };
        let count = reader.size("scales")?;
        let scales = reader.many("scales", count, f64::from_le_bytes)?;
        let pieces = reader.many("pieces", piece_count(shape), |bytes: [u8; 20]| {
            let (length, digests) = bytes.split_first_chunk().expect("20 bytes");
            let (merged, original) = digests.split_at(8);
            let [merged, original] = [merged, original].map(|d| d.try_into().expect("8 bytes"));
            Piece { length: u32::from_le_bytes(*length), merged, original }
        })?;
        let total: u64 = pieces.iter().map(|piece| u64::from(piece.length)).sum();
        if total != reader.rest.len() as u64 {
            return Err(wrong("pieces", format!("{total} bytes"), reader.rest.len()));
        }
        Ok((Self { shape, merged, original, scales, pieces }, record.len() - reader.rest.len()))
    }
}

/// Takes the parts of a record one after the other.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, what: &str, count: usize) -> Result<&'a [u8]> {
        let Some((bytes, rest)) = self.rest.split_at_checked(count) else {
            return Err(wrong(what, format!("{count} bytes"), self.rest.len()));
        };
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        Ok(self.bytes(what, N)?.try_into().expect("as many as asked for"))
    }

    /// So many values of `N` bytes; that they are there is known before room is made for them.
    fn many<const N: usize, V>(
        &mut self,
        what: &str,
        count: usize,
        value: impl Fn([u8; N]) -> V,
    ) -> Result<Vec<V>> {
        let bytes = self.bytes(what, count.saturating_mul(N))?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| value(*bytes)).collect())
    }

    fn size(&mut self, what: &str) -> Result<usize> {
        let size = u64::from_le_bytes(self.array(what)?);
        usize::try_from(size).map_err(|_| wrong(what, "a size that fits in memory", size))
    }

    fn flag(&mut self, what: &str) -> Result<bool> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(wrong(what, "0 or 1", other)),
        }
    }

    fn kind(&mut self, what: &str) -> Result<Kind> {
        let nf4 = self.flag(what)?;
        let [code] = self.array(what)?;
        match DType::ALL.get(usize::from(code)) {
            Some(&dtype) => Ok(Kind { nf4, dtype }),
            None => Err(wrong(what, "a dtype from 0 to 2", code)),
        }
    }

    fn blocksize(&mut self, what: &str) -> Result<usize> {
        let blocksize = u32::from_le_bytes(self.array(what)?) as usize;
        check_blocksize(what, blocksize).map_err(|error| error.within("undo record"))?;
        Ok(blocksize)
    }

    fn floats(&mut self, what: &str, count: usize) -> Result<Vec<f32>> {
        self.many(what, count, |bytes| f32::from_bits(u32::from_le_bytes(bytes)))
    }

    fn nf4(&mut self, dtype: DType, [rows, columns]: [usize; 2]) -> Result<Nf4Original> {
        let blocksize = self.blocksize("blocksize")?;
        let codebook = self.floats("codebook", 16)?.try_into().expect("16 values");
        let [padding] = self.array("padding")?;
        if padding > 15 {
            return Err(wrong("padding", "a code", padding));
        }
        let nested = match self.flag("nesting")? {
            false => None,
            true => {
                let nested_blocksize = self.blocksize("nested.blocksize")?;
                let offset = f32::from_bits(u32::from_le_bytes(self.array("nested.offset")?));
                let map = match self.flag("nested.map")? {
                    false => Box::new(DYNAMIC_MAP),
                    true => self.floats("nested.map", 256)?.try_into().expect("256 values"),
                };
                let blocks = block_count(block_count(rows * columns, blocksize), nested_blocksize);
                let absmax = self.floats("nested.absmax", blocks)?;
                Some(Nested { blocksize: nested_blocksize, offset, map, absmax })
            }
        };
        Ok(Nf4Original { dtype, blocksize, codebook, padding, nested })
    }
}

fn wrong(what: &str, wanted: impl Into<String>, got: impl ToString) -> Error {
    Error::format(format!("undo record: {what}"), wanted, got)
}

fn dtype_code(dtype: DType) -> u8 {
    DType::ALL.iter().position(|d| *d == dtype).expect("one of them") as u8
}
