//! Codes and absmax to elements.

use rayon::prelude::*;

use super::{Codebook, TASK, block_count, check_blocksize, check_len, packed_len};
use crate::{Element, Result};

/// Dequantises into `out`, flat: `round_T(value[code] * absmax)`, an f32 product and one rounding to nearest even, as
/// bitsandbytes does. `packed` is `ceil(n / 2)` bytes, `absmax` one f32 per block.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when the block size is none, or a length does not fit `out`.
pub fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    blocksize: usize,
    codebook: &Codebook,
    out: &mut [T],
) -> Result<()> {
    check_blocksize("blocksize", blocksize)?;
    check_len("packed", packed_len(out.len()), "bytes", packed.len())?;
    check_len("absmax", block_count(out.len(), blocksize), "blocks", absmax.len())?;
    decode_all(packed, |block| absmax[block], blocksize, codebook, out);
    Ok(())
}

/// All elements, in parallel. The lengths fit.
pub(super) fn decode_all<T: Element>(
    packed: &[u8],
    absmax: impl Fn(usize) -> f32 + Sync,
    blocksize: usize,
    codebook: &Codebook,
    out: &mut [T],
) {
    let tasks = out.par_chunks_mut(TASK).enumerate();
    tasks.for_each(|(task, out)| decode(packed, &absmax, blocksize, codebook, task * TASK, out, rounded));
}

/// The elements from `start` on, as many as `out` takes. They exist. `convert` makes the sixteen values of a block what
/// they are in `out`.
pub(super) fn decode<V: Copy>(
    packed: &[u8],
    absmax: impl Fn(usize) -> f32,
    blocksize: usize,
    codebook: &Codebook,
    start: usize,
    out: &mut [V],
    convert: impl Fn([f32; 16]) -> [V; 16],
) {
    let (mut at, mut rest) = (start, out);
    while !rest.is_empty() {
        let block = at / blocksize;
        let absmax = absmax(block);
        let values = convert(codebook.values().map(|value| value * absmax));
        let in_block = rest.len().min((block + 1) * blocksize - at);
        let (elements, tail) = rest.split_at_mut(in_block);
        unpack(packed, at, &values, elements);
        (at, rest) = (at + in_block, tail);
    }
}

/// Rounds a block's values.
pub(super) fn rounded<T: Element>(values: [f32; 16]) -> [T; 16] {
    let mut rounded = [T::from_f32(0.0); 16];
    T::round(&values, &mut rounded);
    rounded
}

/// Looks up the codes from element `start` on.
fn unpack<T: Copy>(packed: &[u8], start: usize, values: &[T; 16], mut out: &mut [T]) {
    let high = |byte: u8| values[usize::from(byte >> 4)];
    let low = |byte: u8| values[usize::from(byte & 15)];
    let mut packed = &packed[start / 2..];
    if start % 2 == 1 {
        let Some((first, rest)) = out.split_first_mut() else { return };
        *first = low(packed[0]);
        (packed, out) = (&packed[1..], rest);
    }
    let mut pairs = out.chunks_exact_mut(2);
    let mut bytes = packed.iter();
    for (pair, &byte) in pairs.by_ref().zip(bytes.by_ref()) {
        pair[0] = high(byte);
        pair[1] = low(byte);
    }
    if let ([last], Some(&byte)) = (pairs.into_remainder(), bytes.next()) {
        *last = high(byte);
    }
}
