//! Elements to codes and absmax.

use rayon::prelude::*;

use super::{BLOCKSIZES, Codebook, TASK, block_count, check_blocksize, check_len, packed_len};
use crate::simd::{GROUP, Level, Search, Simd, with_level};
use crate::{Element, Result};

/// The largest block: what a task widens at a time.
const RUN: usize = BLOCKSIZES[BLOCKSIZES.len() - 1];

/// Quantises `x`, flat, into `packed` (`ceil(n / 2)` bytes) and `absmax` (one f32 per block), by the rules of the
/// [module](super).
///
/// The codes are those of bitsandbytes' CUDA kernel in IEEE arithmetic. (Its builds take a reciprocal that may be an ulp
/// off: an f32 element within an ulp of a threshold may differ by one step.)
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when the block size is none, or a length does not fit `x`.
pub fn quantize<T: Element>(
    x: &[T],
    blocksize: usize,
    codebook: &Codebook,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    check_blocksize("blocksize", blocksize)?;
    check_len("packed", packed_len(x.len()), "bytes", packed.len())?;
    check_len("absmax", block_count(x.len(), blocksize), "blocks", absmax.len())?;
    let coder = Coder::new(codebook);
    x.par_chunks(TASK)
        .zip(packed.par_chunks_mut(TASK / 2))
        .zip(absmax.par_chunks_mut(TASK / blocksize))
        .for_each(|((x, packed), absmax)| coder.task(x, blocksize, packed, absmax));
    Ok(())
}

/// A codebook, prepared for whole blocks.
pub(crate) struct Coder {
    search: Search,
    zero_rank: u8,
    level: Level,
}

impl Coder {
    pub fn new(codebook: &Codebook) -> Self {
        Self::with_level(codebook, Level::detect())
    }

    fn with_level(codebook: &Codebook, level: Level) -> Self {
        let zero_rank = codebook.thresholds().iter().filter(|&&t| 0.0 > t).count() as u8;
        Self { search: Search::new(codebook.thresholds(), codebook.codes()), zero_rank, level }
    }

    /// Whole blocks, or the last of all.
    fn task<T: Element>(&self, x: &[T], blocksize: usize, packed: &mut [u8], absmax: &mut [f32]) {
        with_level!(self.level, simd => {
            let (mut wide, mut ranks) = ([0.0; RUN], [0; RUN]);
            let runs = x.chunks(RUN).zip(packed.chunks_mut(RUN / 2)).zip(absmax.chunks_mut(RUN / blocksize));
            for ((x, packed), absmax) in runs {
                let (wide, ranks) = (&mut wide[..x.len()], &mut ranks[..packed.len() * 2]);
                T::widen(x, wide);
                ranks[x.len()..].fill(self.zero_rank);
                let blocks = wide.chunks(blocksize).zip(ranks.chunks_mut(blocksize)).zip(absmax);
                for ((x, ranks), absmax) in blocks {
                    *absmax = largest_magnitude(x);
                    // The missing second of the last pair is not ours.
                    self.nearest_by(simd, x, *absmax, &mut ranks[..x.len()]);
                }
                self.pack_by(simd, ranks, packed);
            }
        });
    }

    /// Packs the codes of so many ranks as `packed` takes.
    pub fn pack(&self, ranks: &[u8], packed: &mut [u8]) {
        with_level!(self.level, simd => self.pack_by(simd, ranks, packed));
    }

    #[inline(always)]
    fn pack_by<S: Simd>(&self, simd: S, ranks: &[u8], packed: &mut [u8]) {
        let (groups, rest) = packed.as_chunks_mut();
        let (group_ranks, rest_ranks) = ranks.as_chunks();
        for (packed, ranks) in groups.iter_mut().zip(group_ranks) {
            *packed = simd.pack(&self.search, ranks);
        }
        if !rest.is_empty() {
            let mut last = [0; GROUP];
            last[..rest_ranks.len()].copy_from_slice(rest_ranks);
            rest.copy_from_slice(&simd.pack(&self.search, &last)[..rest.len()]);
        }
    }

    /// The rank of zero, which also fills the last byte of an odd number of elements.
    pub fn zero_rank(&self) -> u8 {
        self.zero_rank
    }

    /// Writes the ranks of the nearest values of a block that is stored with the scale `absmax`; that of zero when the
    /// scale is not above zero.
    pub fn nearest(&self, x: &[f32], absmax: f32, ranks: &mut [u8]) {
        with_level!(self.level, simd => self.nearest_by(simd, x, absmax, ranks));
    }

    #[inline(always)]
    fn nearest_by<S: Simd>(&self, simd: S, x: &[f32], absmax: f32, ranks: &mut [u8]) {
        if absmax > 0.0 {
            let (lift, inverse) = normaliser(absmax);
            let (groups, rest) = x.as_chunks();
            let (group_ranks, rest_ranks) = ranks.as_chunks_mut();
            for (ranks, x) in group_ranks.iter_mut().zip(groups) {
                *ranks = simd.ranks(&self.search, x, lift, inverse);
            }
            if !rest.is_empty() {
                let mut last = [0.0; GROUP];
                last[..rest.len()].copy_from_slice(rest);
                rest_ranks.copy_from_slice(&simd.ranks(&self.search, &last, lift, inverse)[..rest.len()]);
            }
        } else {
            ranks.fill(self.zero_rank);
        }
    }
}

/// `max |x|`, or NaN when an element is not finite.
#[inline(always)]
pub(crate) fn largest_magnitude(x: &[f32]) -> f32 {
    // The order of magnitudes is that of their bits, and what is not finite lies above all that is.
    const INFINITY: i32 = f32::INFINITY.to_bits() as i32;
    let largest = x.iter().map(|v| v.abs().to_bits() as i32).fold(0, i32::max);
    if largest < INFINITY { f32::from_bits(largest as u32) } else { f32::NAN }
}

/// `(lift, inverse)` such that `x * lift * inverse` is `x / absmax`: the lift is 1, but for denormals, whose reciprocal
/// would not be finite.
pub(super) fn normaliser(absmax: f32) -> (f32, f32) {
    let lift = if absmax < f32::MIN_POSITIVE { (1u128 << 64) as f32 } else { 1.0 };
    (lift, 1.0 / (absmax * lift))
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// Blocks of 32 with this absmax, and all of `x` that is not larger.
    fn check<T: Element>(level: Level, codebook: &Codebook, absmax: T, x: impl Iterator<Item = T>) {
        let x: Vec<T> = x.filter(|x| x.to_f32().abs() <= absmax.to_f32()).collect();
        let blocks: Vec<T> =
            x.chunks(31).flat_map(|x| std::iter::once(absmax).chain(x.iter().copied())).collect();
        let mut packed = vec![0; packed_len(blocks.len())];
        let mut scales = vec![0.0; block_count(blocks.len(), 32)];
        Coder::with_level(codebook, level).task(&blocks, 32, &mut packed, &mut scales);
        assert!(scales.iter().all(|scale| *scale == absmax.to_f32()), "{level:?} {absmax:?}");
        let (lift, inverse) = normaliser(absmax.to_f32());
        for (i, x) in blocks.iter().enumerate() {
            let code = (packed[i / 2] >> (4 - 4 * (i % 2))) & 15;
            assert_eq!(code, codebook.code(x.to_f32() * lift * inverse), "{level:?} {x:?} of {absmax:?}");
        }
    }

    /// Every bit pattern of 16 bits, and the f32 next to all thresholds, at every level.
    #[test]
    fn codes_are_those_of_the_rule() {
        for (level, codebook) in
            Level::all().into_iter().flat_map(|l| [Codebook::nf4(), Codebook::fp4()].map(|c| (l, c)))
        {
            for absmax in [1.0, 0.3701, 3e-39, 60000.0] {
                let patterns = 0..=u16::MAX;
                check(level, &codebook, bf16::from_f32(absmax), patterns.clone().map(bf16::from_bits));
                check(level, &codebook, f16::from_f32(absmax.max(1e-6)), patterns.map(f16::from_bits));
                let near = codebook.thresholds().iter().flat_map(|t| {
                    let middle = (t * absmax).to_bits();
                    (-40..40).map(move |step| f32::from_bits(middle.wrapping_add_signed(step)))
                });
                check(level, &codebook, absmax, near);
            }
        }
    }
}
