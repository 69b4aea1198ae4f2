//! The original weight, guessed from the merged one, and how far off the guess is, coded.
//!
//! Whoever decodes has to make the same guess to the bit. So it is made of single IEEE operations on f32 in a fixed order,
//! which vector instructions do not change.

use super::coder::{Coder, Integers, Probability};
use crate::Element;
use crate::adapter::update::Sides;
use crate::adapter::{Base, Stack};
use crate::nf4::{self, Absmax, Codebook, NestedAbsmax, Nf4Matrix};

/// A merged weight and what was merged into it.
pub struct Predictor<'a> {
    pub merged: Base<'a>,
    sides: Sides<f32>,
    /// `[out]`.
    row_scale: Option<Vec<f32>>,
    fan_in_fan_out: bool,
    columns: usize,
}

/// A run of elements.
struct Guess {
    merged: Vec<f32>,
    delta: Vec<f32>,
    /// `(merged - delta) / row_scale`, 0 where that is not finite.
    original: Vec<f32>,
}

impl<'a> Predictor<'a> {
    pub fn new(stack: &Stack, merged: Base<'a>) -> Self {
        Self {
            merged,
            sides: stack.update.sides(|v| v as f32),
            row_scale: stack.row_scale().map(|scale| scale.iter().map(|&v| v as f32).collect()),
            fan_in_fan_out: stack.update.fan_in_fan_out,
            columns: stack.weight_shape()[1],
        }
    }

    fn guess(&self, start: usize, len: usize) -> Guess {
        let [mut merged, mut delta, mut original] = [(); 3].map(|()| vec![0.0; len]);
        self.merged.read(self.merged.dtype(), start, &mut merged);
        self.sides.run(start, &mut delta);
        for (i, (guess, (merged, delta))) in original.iter_mut().zip(merged.iter().zip(&delta)).enumerate() {
            *guess = merged - delta;
            if let Some(row_scale) = &self.row_scale {
                let (row, column) = ((start + i) / self.columns, (start + i) % self.columns);
                *guess /= row_scale[if self.fan_in_fan_out { column } else { row }];
            }
            if !guess.is_finite() {
                *guess = 0.0;
            }
        }
        Guess { merged, delta, original }
    }
}

/// Codes a run of elements of a dense original; a decoder fills them in.
pub fn code_dense<T: Element>(
    predictor: &Predictor<'_>,
    start: usize,
    elements: &mut [T],
    coder: &mut impl Coder,
) {
    let guess = predictor.guess(start, elements.len());
    let mut rounded = vec![T::from_bits(0); elements.len()];
    T::round(&guess.original, &mut rounded);
    // What the merge has rounded away is up to half a unit in the last place of the merged element: of one in a higher
    // binade than the original, several units of that.
    let mut models = [const { Integers::NEW }; 8];
    for (i, (element, rounded)) in elements.iter_mut().zip(rounded).enumerate() {
        let (near, order) = (rounded.to_f32(), rounded.order());
        let coarser = exponent(guess.merged[i]).max(exponent(guess.delta[i]) - 1) - exponent(near);
        let model = &mut models[(coarser + 1).clamp(0, 7) as usize];
        let off = model.code(coder, element.order().wrapping_sub(order), guess.original[i] < near);
        *element = T::from_order(order.wrapping_add(off));
    }
}

fn exponent(value: f32) -> i32 {
    (value.to_bits() >> 23 & 0xff) as i32
}

/// A run of whole blocks of a 4-bit original.
pub struct Blocks {
    /// One for each element.
    pub codes: Vec<u8>,
    /// Plain scales, one for each block; empty when they are nested.
    pub absmax: Vec<f32>,
    /// Indexes of nested scales, one for each block; empty when they are plain.
    pub q: Vec<u8>,
}

impl Blocks {
    /// Whole blocks of a matrix.
    pub fn of(matrix: &Nf4Matrix, start: usize, len: usize) -> Self {
        let blocks = start / matrix.blocksize()..(start + len).div_ceil(matrix.blocksize());
        let (absmax, q) = match matrix.absmax() {
            Absmax::Plain(absmax) => (absmax[blocks].to_vec(), Vec::new()),
            Absmax::Nested(nested) => (Vec::new(), nested.q()[blocks].to_vec()),
        };
        Self { codes: (start..start + len).map(|element| code(matrix, element)).collect(), absmax, q }
    }
}

/// What the blocks of a 4-bit original have in common.
pub struct Layout<'a> {
    blocksize: usize,
    /// All of it but the indexes.
    nested: Option<&'a NestedAbsmax>,
    coder: nf4::Coder,
    /// The codes by their values, ascending, and where each is among these.
    codes: [u8; 16],
    places: [u8; 16],
    values: [f32; 16],
    /// The place of the code that a number of some rank takes.
    place_of_rank: [u8; 16],
}

impl<'a> Layout<'a> {
    pub fn new(blocksize: usize, codebook: &Codebook, nested: Option<&'a NestedAbsmax>) -> Self {
        let value = |code: u8| codebook.values()[usize::from(code)];
        let mut codes: [u8; 16] = std::array::from_fn(|code| code as u8);
        codes.sort_by(|&a, &b| value(a).total_cmp(&value(b)));
        let mut places = [0; 16];
        codes.iter().zip(0..).for_each(|(&code, place)| places[usize::from(code)] = place);
        Self {
            blocksize,
            nested,
            coder: nf4::Coder::new(codebook),
            codes,
            places,
            values: codes.map(value),
            place_of_rank: codebook.codes().map(|code| places[usize::from(code)]),
        }
    }

    pub fn of(matrix: &'a Nf4Matrix) -> Self {
        let nested = match matrix.absmax() {
            Absmax::Plain(_) => None,
            Absmax::Nested(nested) => Some(nested),
        };
        Self::new(matrix.blocksize(), matrix.codebook(), nested)
    }

    /// Blocks for a decoder to fill in.
    pub fn zeros(&self, len: usize) -> Blocks {
        let (blocks, nested) = (len.div_ceil(self.blocksize), self.nested.is_some());
        let (absmax, q) = if nested { (0, blocks) } else { (blocks, 0) };
        Blocks { codes: vec![0; len], absmax: vec![0.0; absmax], q: vec![0; q] }
    }

    /// Codes blocks from element `start` on; a decoder fills them in.
    pub fn code(&self, predictor: &Predictor<'_>, start: usize, blocks: &mut Blocks, coder: &mut impl Coder) {
        let guess = predictor.guess(start, blocks.codes.len());
        let cells = predictor.cells(start, &guess);
        let (mut scales, mut codes) = (Scales::NEW, vec![[const { Integers::NEW }; 4]; 12]);
        let mut ranks = vec![0; self.blocksize];
        for (b, block) in blocks.codes.chunks_mut(self.blocksize).enumerate() {
            let (first, index) = (b * self.blocksize, start / self.blocksize + b);
            let range = first..first + block.len();
            let near = match predictor.merged {
                Base::Nf4(merged) if merged.blocksize() == self.blocksize => merged.absmax().get(index),
                _ => guess.original[range.clone()].iter().fold(0.0, |largest: f32, v| largest.max(v.abs())),
            };
            let absmax = match self.nested {
                None => {
                    scales.code(coder, &mut blocks.absmax[b], near);
                    blocks.absmax[b]
                }
                Some(nested) => {
                    scales.code_nested(coder, &mut blocks.q[b], nested.nearest(index, near));
                    nested.scale(index, blocks.q[b])
                }
            };
            let ranks = &mut ranks[..block.len()];
            self.coder.nearest(&guess.original[range.clone()], absmax, ranks);
            for ((i, code), &rank) in range.zip(block).zip(&*ranks) {
                let place = self.place_of_rank[usize::from(rank)];
                let (value, guess) = (self.values[usize::from(place)] * absmax, guess.original[i]);
                // The next best is the neighbour on the side of the guess.
                let below = guess < value;
                let next = if below { place.saturating_sub(1) } else { (place + 1).min(15) };
                let next = self.values[usize::from(next)] * absmax;
                let doubt = ((guess - value).abs() / (next - value).abs() * 24.0) as usize;
                let fits = cells.as_ref().map_or(0, |cells| {
                    let fits = |value: f32| usize::from(cells[i][0] <= value && value <= cells[i][1]);
                    2 * fits(value) + fits(next)
                });
                let off = (self.places[usize::from(*code & 15)].wrapping_sub(place).wrapping_add(8) & 15)
                    as i32
                    - 8;
                let off = codes[doubt.min(11)][fits].code(coder, off, below);
                *code = self.codes[usize::from(place.wrapping_add(off as u8) & 15)];
            }
        }
    }
}

impl Predictor<'_> {
    /// Of a 4-bit merged weight: which originals are nearest to the merged values, from where to where.
    fn cells(&self, start: usize, guess: &Guess) -> Option<Vec<[f32; 2]>> {
        let Base::Nf4(merged) = self.merged else { return None };
        let codebook = merged.codebook();
        // The rank of each code; those that no number takes have that of an equal value, or none.
        let mut rank_of = [0; 16];
        codebook.codes().iter().zip(0..).for_each(|(&code, rank)| rank_of[usize::from(code)] = rank);
        let bounds = rank_of.map(|rank: usize| {
            let above = if rank < 15 { codebook.thresholds()[rank] } else { f32::INFINITY };
            [if rank > 0 { codebook.thresholds()[rank - 1] } else { f32::NEG_INFINITY }, above]
        });
        let cells = guess.original.iter().enumerate().map(|(i, original)| {
            let at = start + i;
            let absmax = merged.absmax().get(at / merged.blocksize());
            // As far from the guess as the bounds are from the merged value, but for a row scale, which is near 1.
            let center = guess.merged[i];
            bounds[usize::from(code(merged, at))].map(|bound| original + (bound * absmax - center))
        });
        Some(cells.collect())
    }
}

/// The code of one element.
pub fn code(matrix: &Nf4Matrix, element: usize) -> u8 {
    matrix.packed()[element / 2] >> (4 * (1 - element % 2)) & 15
}

/// Models of scales.
struct Scales {
    /// Whether one has more than the upper half of its bits, which is what those of a bf16 weight have.
    fine: Probability,
    /// The upper half, or all of it.
    off: [Integers; 2],
}

impl Scales {
    const NEW: Self = Self { fine: Probability::EVEN, off: [const { Integers::NEW }; 2] };

    fn code(&mut self, coder: &mut impl Coder, scale: &mut f32, near: f32) {
        let coarse = f32::from_order(scale.order() >> 16 << 16);
        let fine = coder.bit(&mut self.fine, coarse.to_bits() != scale.to_bits());
        let shift = if fine { 0 } else { 16 };
        let order = |value: f32| value.order() >> shift;
        let off = self.off[usize::from(fine)].code(coder, order(*scale).wrapping_sub(order(near)), false);
        *scale = f32::from_order(order(near).wrapping_add(off) << shift);
    }

    fn code_nested(&mut self, coder: &mut impl Coder, q: &mut u8, near: u8) {
        let off = self.off[0].code(coder, i32::from(q.wrapping_sub(near) as i8), false);
        *q = near.wrapping_add(off as u8);
    }
}
