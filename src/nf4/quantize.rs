//! Elements to codes and absmax.

use rayon::prelude::*;

use super::{BLOCKSIZES, Codebook, TASK, block_count, check_blocksize, check_len, packed_len};
use crate::{Element, Result};

/// The largest block: what a task widens at a time.
const GROUP: usize = BLOCKSIZES[BLOCKSIZES.len() - 1];

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
pub(crate) struct Coder<'a> {
    thresholds: &'a [f32; 15],
    /// From the ranks of two elements (how many thresholds each is above) to the byte of their codes.
    bytes: [u8; 256],
    zero_rank: u8,
}

impl<'a> Coder<'a> {
    pub fn new(codebook: &'a Codebook) -> Self {
        let codes = codebook.codes();
        let bytes = std::array::from_fn(|ranks| (codes[ranks >> 4] << 4) | codes[ranks & 15]);
        let zero_rank = codebook.thresholds().iter().filter(|&&t| 0.0 > t).count() as u8;
        Self { thresholds: codebook.thresholds(), bytes, zero_rank }
    }

    fn task<T: Element>(&self, x: &[T], blocksize: usize, packed: &mut [u8], absmax: &mut [f32]) {
        let (mut wide, mut ranks) = ([0.0; GROUP], [0; GROUP]);
        let groups =
            x.chunks(GROUP).zip(packed.chunks_mut(GROUP / 2)).zip(absmax.chunks_mut(GROUP / blocksize));
        for ((x, packed), absmax) in groups {
            let (wide, ranks) = (&mut wide[..x.len()], &mut ranks[..packed.len() * 2]);
            T::widen(x, wide);
            ranks[x.len()..].fill(self.zero_rank);
            let blocks = wide.chunks(blocksize).zip(ranks.chunks_mut(blocksize)).zip(absmax);
            for ((x, ranks), absmax) in blocks {
                *absmax = self.block(x, ranks);
            }
            self.pack(ranks, packed);
        }
    }

    /// Packs the codes of so many ranks as `packed` takes.
    pub fn pack(&self, ranks: &[u8], packed: &mut [u8]) {
        for (byte, [first, second]) in packed.iter_mut().zip(ranks.as_chunks().0) {
            *byte = self.bytes[usize::from((first << 4) | second)];
        }
    }

    /// The rank of zero, which also fills the last byte of an odd number of elements.
    pub fn zero_rank(&self) -> u8 {
        self.zero_rank
    }

    /// How many thresholds each lane is above; all lanes side by side, which compilers make vectors of.
    #[inline(always)]
    fn ranks<const LANES: usize>(&self, x: [f32; LANES]) -> [u8; LANES] {
        let mut ranks = [0i32; LANES];
        for t in self.thresholds {
            for (rank, x) in ranks.iter_mut().zip(&x) {
                *rank += i32::from(x > t);
            }
        }
        ranks.map(|rank| rank as u8)
    }

    /// Writes the rank of each element of one block, and returns its absmax.
    fn block(&self, x: &[f32], ranks: &mut [u8]) -> f32 {
        let absmax = largest_magnitude(x);
        self.nearest(x, absmax, &mut ranks[..x.len()]); // the missing second of the last pair is not ours
        absmax
    }

    /// Writes the ranks of the nearest values of a block that is stored with the scale `absmax`; that of zero when the
    /// scale is not above zero.
    #[inline(always)]
    pub fn nearest(&self, x: &[f32], absmax: f32, ranks: &mut [u8]) {
        if absmax > 0.0 {
            let (lift, inverse) = normaliser(absmax);
            let (lanes, rest) = x.as_chunks::<16>();
            let (rank_lanes, rank_rest) = ranks.as_chunks_mut();
            for (ranks, x) in rank_lanes.iter_mut().zip(lanes) {
                *ranks = self.ranks(x.map(|x| x * lift * inverse));
            }
            for (rank, x) in rank_rest.iter_mut().zip(rest) {
                [*rank] = self.ranks([x * lift * inverse]);
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
