//! Plain Rust, which compilers make vectors of.

use super::{GROUP, GROUP_BYTES, LANES, Search, Simd, Vector};
use crate::Element;

/// No more than what every machine has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type Lanes = [f32; LANES];
    type Codebook = [f32; 16];
    type Floats<T: Element> = [f32; 16];
    type Elements<T: Element> = [T; 16];

    #[inline(always)]
    fn run<R>(self, work: impl FnOnce() -> R) -> R {
        work()
    }

    #[inline(always)]
    fn zero(self) -> Self::Lanes {
        [0.0; LANES]
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Lanes {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &Vector) -> Self::Lanes {
        values.0
    }

    #[inline(always)]
    fn store(self, lanes: Self::Lanes) -> Vector {
        Vector(lanes)
    }

    #[inline(always)]
    fn prefetch(self, _: &u8) {}

    #[inline(always)]
    fn widen<T: Element>(self, values: &[T; LANES]) -> Self::Lanes {
        values.map(T::to_f32)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|lane| match cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            true => a[lane].mul_add(b[lane], c[lane]),
            false => a[lane] * b[lane] + c[lane],
        })
    }

    fn codebook(self, values: &[f32; 16]) -> Self::Codebook {
        *values
    }

    #[inline(always)]
    fn floats<T: Element>(self, codebook: &Self::Codebook, absmax: f32) -> Self::Floats<T> {
        let mut floats = [0.0; 16];
        T::widen(&self.elements::<T>(codebook, absmax), &mut floats);
        floats
    }

    #[inline(always)]
    fn elements<T: Element>(self, codebook: &Self::Codebook, absmax: f32) -> Self::Elements<T> {
        let mut elements = [T::from_bits(0); 16];
        T::round(&codebook.map(|value| value * absmax), &mut elements);
        elements
    }

    #[inline(always)]
    fn decode_floats<T: Element>(
        self,
        table: &Self::Floats<T>,
        codes: &[u8; GROUP_BYTES],
    ) -> [Self::Lanes; GROUP / LANES] {
        let mut lanes = [[0.0; LANES]; GROUP / LANES];
        look_up(table, codes, lanes.as_flattened_mut());
        lanes
    }

    #[inline(always)]
    fn decode_elements<T: Element>(
        self,
        table: &Self::Elements<T>,
        codes: &[u8; GROUP_BYTES],
        out: &mut [T; GROUP],
    ) {
        look_up(table, codes, out);
    }

    #[inline(always)]
    fn ranks(self, search: &Search, x: &[f32; GROUP], lift: f32, inverse: f32) -> [u8; GROUP] {
        let x = x.map(|x| x * lift * inverse);
        let mut ranks = [0i32; GROUP];
        for t in search.thresholds {
            for (rank, x) in ranks.iter_mut().zip(&x) {
                *rank += i32::from(*x > t);
            }
        }
        ranks.map(|rank| rank as u8)
    }

    #[inline(always)]
    fn pack(self, search: &Search, ranks: &[u8; GROUP]) -> [u8; GROUP_BYTES] {
        let code = |i: usize| search.codes[usize::from(ranks[i] & 15)];
        std::array::from_fn(|i| (code(2 * i) << 4) | code(2 * i + 1))
    }
}

#[inline(always)]
fn look_up<V: Copy>(table: &[V; 16], codes: &[u8; GROUP_BYTES], out: &mut [V]) {
    for (pair, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
    }
}
