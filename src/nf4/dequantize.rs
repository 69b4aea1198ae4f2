//! Codes and absmax to elements.

use std::marker::PhantomData;

use rayon::prelude::*;

use super::{Codebook, TASK, block_count, check_blocksize, check_len, packed_len};
use crate::simd::{GROUP, GROUP_BYTES, Level, Portable, Simd, canonical, with_level};
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
    let level = Level::detect();
    tasks.for_each(|(task, out)| {
        with_level!(level, simd => {
            decode::<_, Narrow<T>>(simd, packed, &absmax, blocksize, codebook, task * TASK, out)
        });
    });
}

/// What elements are decoded to.
pub(super) trait Form {
    type Value: Copy;
    type Table<S: Simd>;
    fn table<S: Simd>(simd: S, codebook: &S::Codebook, absmax: f32) -> Self::Table<S>;
    fn group<S: Simd>(
        simd: S,
        table: &Self::Table<S>,
        codes: &[u8; GROUP_BYTES],
        out: &mut [Self::Value; GROUP],
    );
    /// The table in plain Rust.
    fn values(scaled: [f32; 16]) -> [Self::Value; 16];
}

/// Elements of type `T`.
pub(super) struct Narrow<T>(PhantomData<T>);

/// Elements of type `T`, widened.
pub(super) struct Wide<T>(PhantomData<T>);

impl<T: Element> Form for Narrow<T> {
    type Value = T;
    type Table<S: Simd> = S::Elements<T>;

    #[inline(always)]
    fn table<S: Simd>(simd: S, codebook: &S::Codebook, absmax: f32) -> Self::Table<S> {
        simd.elements(codebook, absmax)
    }

    #[inline(always)]
    fn group<S: Simd>(simd: S, table: &Self::Table<S>, codes: &[u8; GROUP_BYTES], out: &mut [T; GROUP]) {
        simd.decode_elements(table, codes, out);
    }

    fn values(scaled: [f32; 16]) -> [T; 16] {
        Portable.elements(&scaled, 1.0)
    }
}

impl<T: Element> Form for Wide<T> {
    type Value = f32;
    type Table<S: Simd> = S::Floats<T>;

    #[inline(always)]
    fn table<S: Simd>(simd: S, codebook: &S::Codebook, absmax: f32) -> Self::Table<S> {
        simd.floats::<T>(codebook, absmax)
    }

    #[inline(always)]
    fn group<S: Simd>(simd: S, table: &Self::Table<S>, codes: &[u8; GROUP_BYTES], out: &mut [f32; GROUP]) {
        let lanes = simd.decode_floats::<T>(table, codes);
        for (out, lanes) in out.as_chunks_mut().0.iter_mut().zip(lanes) {
            *out = simd.store(lanes).0;
        }
    }

    fn values(scaled: [f32; 16]) -> [f32; 16] {
        Portable.floats::<T>(&scaled, 1.0)
    }
}

/// The elements from `start` on, as many as `out` takes. They exist. To be inlined into what `simd` runs.
#[inline(always)]
pub(super) fn decode<S: Simd, F: Form>(
    simd: S,
    packed: &[u8],
    absmax: impl Fn(usize) -> f32,
    blocksize: usize,
    codebook: &Codebook,
    start: usize,
    out: &mut [F::Value],
) {
    let values = simd.codebook(codebook.values());
    let (mut at, mut rest) = (start, out);
    while !rest.is_empty() {
        let block = at / blocksize;
        let in_block = rest.len().min((block + 1) * blocksize - at);
        let (elements, tail) = rest.split_at_mut(in_block);
        let absmax = canonical(absmax(block));
        // Groups begin where a byte begins.
        let (single, elements) = elements.split_at_mut(at % 2);
        let (groups, last) = elements.as_chunks_mut();
        let codes = &packed[at.div_ceil(2)..];
        let (group_codes, last_codes) = codes.split_at(groups.len() * GROUP_BYTES);
        if !groups.is_empty() {
            let table = F::table(simd, &values, absmax);
            for (group, codes) in groups.iter_mut().zip(group_codes.as_chunks().0) {
                F::group(simd, &table, codes, group);
            }
        }
        if !single.is_empty() || !last.is_empty() {
            let values = F::values(codebook.values().map(|value| value * absmax));
            single.iter_mut().for_each(|single| *single = values[usize::from(packed[at / 2] & 15)]);
            for (pair, byte) in last.chunks_mut(2).zip(last_codes) {
                let codes = [byte >> 4, byte & 15].map(usize::from);
                pair.iter_mut().zip(codes).for_each(|(element, code)| *element = values[code]);
            }
        }
        (at, rest) = (at + in_block, tail);
    }
}
