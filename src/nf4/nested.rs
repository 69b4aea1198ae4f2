//! Double quantisation: absmax in 8 bits.

use std::borrow::Cow;
use std::ops::Range;

use super::dynamic_map::encode;
use super::quantize::largest_magnitude;
use super::{DYNAMIC_MAP, block_count, check_blocksize, check_len};
use crate::Result;

/// The block size of double quantisation, as bitsandbytes has it.
pub const NESTED_BLOCKSIZE: usize = 256;

/// The scales of a quantised tensor, one per block.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// As f32.
    Plain(Vec<f32>),
    /// Double quantised.
    Nested(NestedAbsmax),
}

/// Scales that are quantised themselves: `absmax[i] = map[q[i]] * nested[i / blocksize] + offset`, rounded twice.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedAbsmax {
    q: Vec<u8>,
    absmax: Vec<f32>,
    map: Box<[f32; 256]>,
    offset: f32,
    blocksize: usize,
}

impl Absmax {
    /// How many blocks there are.
    pub fn len(&self) -> usize {
        match self {
            Absmax::Plain(absmax) => absmax.len(),
            Absmax::Nested(nested) => nested.q.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The scale of one block. Panics when there is no such block.
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Absmax::Plain(absmax) => absmax[block],
            Absmax::Nested(nested) => nested.get(block),
        }
    }

    /// Appends the scales of some blocks, which exist.
    pub(crate) fn extend(&self, blocks: Range<usize>, scales: &mut Vec<f32>) {
        match self {
            Absmax::Plain(absmax) => scales.extend_from_slice(&absmax[blocks]),
            Absmax::Nested(nested) => scales.extend(blocks.map(|block| nested.get(block))),
        }
    }

    /// All scales, as f32.
    pub fn dequantize(&self) -> Cow<'_, [f32]> {
        match self {
            Absmax::Plain(absmax) => absmax.into(),
            Absmax::Nested(nested) => (0..nested.q.len()).map(|block| nested.get(block)).collect(),
        }
    }
}

impl NestedAbsmax {
    /// Takes the tensors of a checkpoint: `q` one byte per block, `absmax` one f32 per `blocksize` of these, the map that
    /// was stored with them, and the offset.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) when the block size is none, or `absmax` does not fit `q`.
    pub fn from_parts(
        q: Vec<u8>,
        absmax: Vec<f32>,
        map: Box<[f32; 256]>,
        offset: f32,
        blocksize: usize,
    ) -> Result<Self> {
        check_blocksize("nested.blocksize", blocksize)?;
        check_len("nested.absmax", block_count(q.len(), blocksize), "blocks", absmax.len())?;
        Ok(Self { q, absmax, map, offset, blocksize })
    }

    /// Indexes into the map, one per block of the tensor.
    pub fn q(&self) -> &[u8] {
        &self.q
    }

    /// One scale per block of [`q`](NestedAbsmax::q).
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// What `q` indexes.
    pub fn map(&self) -> &[f32; 256] {
        &self.map
    }

    /// What is added to every scale.
    pub fn offset(&self) -> f32 {
        self.offset
    }

    /// How many bytes of `q` share a scale.
    pub fn blocksize(&self) -> usize {
        self.blocksize
    }

    /// The scale of one block. Panics when there is no such block.
    pub(crate) fn get(&self, block: usize) -> f32 {
        self.scale(block, self.q[block])
    }

    /// The scale that a block would have with the index `q`.
    pub(crate) fn scale(&self, block: usize, q: u8) -> f32 {
        self.map[usize::from(q)] * self.absmax[block / self.blocksize] + self.offset
    }

    /// Other indexes, as many as these.
    pub(crate) fn with_q(self, q: Vec<u8>) -> Self {
        assert_eq!(q.len(), self.q.len());
        Self { q, ..self }
    }

    /// The nearest that these offset, map and nested scales have to other scales, as many as these. A nested scale becomes what
    /// [`nest_about`] takes when they exceed its range by more than a 32nd: to move 256 scales costs more than to cut one.
    pub(crate) fn nearest_to(&self, scales: &[f32]) -> Self {
        assert_eq!(scales.len(), self.q.len());
        let bound = |pick: fn(f32, f32) -> f32| self.map.iter().copied().fold(0.0, pick);
        let [lowest, highest] = [bound(f32::min), bound(f32::max)].map(|bound| bound * (1.0 + 1.0 / 32.0));
        let mut nested = Self { q: Vec::with_capacity(scales.len()), ..self.clone() };
        for (scales, nested_scale) in scales.chunks(self.blocksize).zip(&mut nested.absmax) {
            let centred: Vec<f32> = scales.iter().map(|scale| scale - self.offset).collect();
            let fits = |x: &f32| (lowest * *nested_scale..=highest * *nested_scale).contains(x);
            if !centred.iter().all(fits) {
                *nested_scale = largest_magnitude(&centred);
            }
            nested.q.extend(centred.iter().map(|x| self.nearest_index(*nested_scale, *x)));
        }
        nested
    }

    /// The index that comes nearest to a scale, in the place of a block.
    pub(crate) fn nearest(&self, block: usize, scale: f32) -> u8 {
        self.nearest_index(self.absmax[block / self.blocksize], scale - self.offset)
    }

    fn nearest_index(&self, nested_scale: f32, centred: f32) -> u8 {
        let missed = |q: &u8| (self.map[usize::from(*q)] * nested_scale - centred).abs();
        (0..=255).min_by(|a, b| missed(a).total_cmp(&missed(b))).expect("256 of them")
    }
}

/// Double quantises scales about their mean.
///
/// The mean is summed in f64, in an order that many threads can keep: lane j of 65536 adds values j, j + 65536, ... in
/// turn, then neighbouring lanes are added until one is left. One scale that is not finite makes the mean so, and with it
/// every element of the tensor NaN.
pub fn nest(absmax: &[f32]) -> NestedAbsmax {
    nest_about(absmax, (sum(absmax) / absmax.len().max(1) as f64) as f32)
}

/// Double quantises scales: minus `offset`, in blocks of 256, to the nearest value of [`DYNAMIC_MAP`]; halfway between two
/// of them, to the even index. A nested block whose scales all equal the offset stores 0, and 127, the index of 0.
///
/// (bitsandbytes' offset is the mean too, but in an order of f32 additions that differs between its backends.)
pub fn nest_about(absmax: &[f32], offset: f32) -> NestedAbsmax {
    let mut nested = NestedAbsmax {
        q: vec![0; absmax.len()],
        absmax: Vec::with_capacity(block_count(absmax.len(), NESTED_BLOCKSIZE)),
        map: Box::new(DYNAMIC_MAP),
        offset,
        blocksize: NESTED_BLOCKSIZE,
    };
    for (block, q) in absmax.chunks(NESTED_BLOCKSIZE).zip(nested.q.chunks_mut(NESTED_BLOCKSIZE)) {
        let centred: Vec<f32> = block.iter().map(|a| a - offset).collect();
        nested.absmax.push(encode(&DYNAMIC_MAP, &centred, q));
    }
    nested
}

/// The sum of `values`, in the order that [`nest`] tells of.
fn sum(values: &[f32]) -> f64 {
    let mut lanes = vec![0.0; values.len().next_power_of_two().min(1 << 16)];
    for (i, &value) in values.iter().enumerate() {
        let lane = i % lanes.len();
        lanes[lane] += f64::from(value);
    }
    while lanes.len() > 1 {
        lanes = lanes.chunks_exact(2).map(|pair| pair[0] + pair[1]).collect();
    }
    lanes[0]
}
