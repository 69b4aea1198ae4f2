//! Eight f32 at a time, and 32 codes: by AVX2 where the machine has it, and in plain Rust elsewhere.
//!
//! An operation is written once, over [`Simd`], and run by [`Level::detect`]. Decoded weights and codes are the same bits with all
//! of them; sums of products may differ, as not every machine has fused multiply-adds.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod portable;
pub(crate) mod tile;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
pub(crate) use portable::Portable;

use crate::Element;

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;
/// Codes that are taken at a time. Every block size is a multiple of it.
pub(crate) const GROUP: usize = 32;
/// Bytes that these lie in.
pub(crate) const GROUP_BYTES: usize = GROUP / 2;

/// A set of instructions. The value is the proof that the machine has them.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Eight f32.
    type Lanes: Copy;
    /// A codebook.
    type Codebook: Copy + Send + Sync;
    /// What the codes of a block stand for, in f32.
    type Floats<T: Element>: Copy;
    /// What the codes of a block stand for, in `T`.
    type Elements<T: Element>: Copy;

    /// Runs `work` with these instructions. What it calls has to be inlined into it.
    fn run<R>(self, work: impl FnOnce() -> R) -> R;

    fn zero(self) -> Self::Lanes;
    /// The same number in all lanes.
    fn splat(self, value: f32) -> Self::Lanes;
    fn load(self, values: &Vector) -> Self::Lanes;
    fn store(self, lanes: Self::Lanes) -> Vector;
    /// Asks for what will be read soon.
    fn prefetch(self, byte: &u8);
    /// Elements, widened.
    fn widen<T: Element>(self, values: &[T; LANES]) -> Self::Lanes;
    /// `a b + c`; fused where that is an instruction.
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;

    fn codebook(self, values: &[f32; 16]) -> Self::Codebook;
    /// `round_T(value * absmax)` of each value, widened. A NaN has to be [`canonical`].
    fn floats<T: Element>(self, codebook: &Self::Codebook, absmax: f32) -> Self::Floats<T>;
    /// The same in `T`.
    fn elements<T: Element>(self, codebook: &Self::Codebook, absmax: f32) -> Self::Elements<T>;
    /// The elements of 32 codes, in their order.
    fn decode_floats<T: Element>(
        self,
        table: &Self::Floats<T>,
        codes: &[u8; GROUP_BYTES],
    ) -> [Self::Lanes; GROUP / LANES];
    /// The same in `T`.
    fn decode_elements<T: Element>(
        self,
        table: &Self::Elements<T>,
        codes: &[u8; GROUP_BYTES],
        out: &mut [T; GROUP],
    );

    /// How many thresholds are below each `x * lift * inverse`, no `x` being NaN.
    fn ranks(self, search: &Search, x: &[f32; GROUP], lift: f32, inverse: f32) -> [u8; GROUP];
    /// The codes of these ranks, two in a byte.
    fn pack(self, search: &Search, ranks: &[u8; GROUP]) -> [u8; GROUP_BYTES];
}

/// Fifteen thresholds that ascend, as they are searched, and the code of each rank.
#[derive(Debug)]
pub(crate) struct Search {
    pub thresholds: [f32; 15],
    /// The middle one, the middle ones of its sides, and so on: what a search by halves looks at, by the rank so far.
    pub levels: [[f32; LANES]; 4],
    pub codes: [u8; 16],
}

impl Search {
    pub fn new(thresholds: &[f32; 15], codes: &[u8; 16]) -> Self {
        // Halves of a vector may be looked up on their own, so short levels repeat.
        let level =
            |count: usize| std::array::from_fn(|i| thresholds[8 / count - 1 + 16 / count * (i % count)]);
        Self { thresholds: *thresholds, levels: [1, 2, 4, 8].map(level), codes: *codes }
    }
}

/// A scale as [`Simd::floats`] and [`Simd::elements`] want it: bf16 are rounded by additions, which other bits of a NaN would overflow.
#[inline(always)]
pub(crate) fn canonical(absmax: f32) -> f32 {
    if absmax.is_nan() { f32::NAN } else { absmax }
}

/// Eight f32 in memory.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Vector(pub [f32; LANES]);

impl Vector {
    pub const ZERO: Self = Self([0.0; LANES]);

    /// The sum of the lanes, in the one order that all have.
    #[inline(always)]
    pub fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

/// The sets of instructions that an operation may run with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Level {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
}

impl Level {
    /// The fastest that the machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = Avx2::detect() {
            return Level::Avx2(avx2);
        }
        Level::Portable(Portable)
    }

    /// All that the machine has.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        let mut all = vec![Level::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        all.extend(Avx2::detect().map(Level::Avx2));
        all
    }
}

/// Runs `$body` with `$simd` bound to the instructions of a [`Level`], and compiled for them.
macro_rules! with_level {
    ($level:expr, $simd:ident => $body:expr) => {
        match $level {
            $crate::simd::Level::Portable($simd) => $body,
            #[cfg(target_arch = "x86_64")]
            $crate::simd::Level::Avx2($simd) => $crate::simd::Simd::run(
                $simd,
                #[inline(always)]
                || $body,
            ),
        }
    };
}
pub(crate) use with_level;

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::nf4::Codebook;

    /// NF4, FP4, and sixteen values in no order of which some are equal.
    fn codebooks() -> [Codebook; 3] {
        let mixed = std::array::from_fn(|i| ((i * 7 % 16) as f32 - 6.5).clamp(-5.0, 4.0) * 0.37);
        [Codebook::nf4(), Codebook::fp4(), Codebook::from_values(mixed).unwrap()]
    }

    fn same<T: Element>(a: T, b: T) -> bool {
        a.bits() == b.bits() || (a.to_f32().is_nan() && b.to_f32().is_nan())
    }

    fn decodes<S: Simd, T: Element>(simd: S) {
        let scales = [1.0, 0.0, -0.0, 0.037, -3.3, 1e-41, 3e-39, 1.2e-7, 6e4, 7e4, 3.3e38, f32::MAX];
        let scales =
            scales.into_iter().chain([f32::INFINITY, f32::NAN, f32::from_bits(0x7fff_ffff), -f32::NAN]);
        for (codebook, scale) in
            codebooks().iter().flat_map(|c| scales.clone().map(move |s| (c, canonical(s))))
        {
            let prepared = simd.codebook(codebook.values());
            let (floats, elements) =
                (simd.floats::<T>(&prepared, scale), simd.elements::<T>(&prepared, scale));
            for first in 0..=255u8 {
                let codes: [u8; GROUP_BYTES] =
                    std::array::from_fn(|i| first.wrapping_add((i as u8).wrapping_mul(37)));
                let mut narrow = [T::from_f32(7.0); GROUP];
                simd.decode_elements(&elements, &codes, &mut narrow);
                let wide = simd.decode_floats::<T>(&floats, &codes).map(|lanes| simd.store(lanes).0);
                for (i, (narrow, wide)) in narrow.iter().zip(wide.as_flattened()).enumerate() {
                    let code = (codes[i / 2] >> (4 - 4 * (i % 2))) & 15;
                    let wanted = T::from_f32(codebook.values()[usize::from(code)] * scale);
                    assert!(same(*narrow, wanted), "{scale:e} {code}: {narrow:?}, not {wanted:?}");
                    assert!(same(*wide, wanted.to_f32()), "{scale:e} {code}: {wide:?}, not {wanted:?}");
                }
            }
        }
    }

    #[test]
    fn every_level_decodes_to_the_same_bits() {
        for level in Level::all() {
            with_level!(level, simd => {
                decodes::<_, f32>(simd);
                decodes::<_, f16>(simd);
                decodes::<_, bf16>(simd);
            });
        }
    }

    #[test]
    fn every_level_finds_the_same_ranks_and_packs_their_codes() {
        for (level, codebook) in Level::all().into_iter().flat_map(|l| codebooks().map(|c| (l, c))) {
            let search = Search::new(codebook.thresholds(), codebook.codes());
            let near = codebook.thresholds().iter().flat_map(|t| [t.next_down(), *t, t.next_up()]);
            let x: Vec<f32> = near.chain([0.0, -0.0, 1e-45, -1e-45, -1.0, 1.0, f32::MAX, f32::MIN]).collect();
            // Each of them in every place.
            for shift in 0..x.len() {
                let x: [f32; GROUP] = std::array::from_fn(|i| x[(shift + i) % x.len()]);
                for (lift, inverse) in [(1.0, 1.0), (0.25, 4.0)] {
                    let (ranks, packed) = with_level!(level, simd => {
                        let ranks = simd.ranks(&search, &x, lift, inverse);
                        (ranks, simd.pack(&search, &ranks))
                    });
                    for (i, x) in x.iter().enumerate() {
                        let rank = codebook.thresholds().iter().filter(|t| x * lift * inverse > **t).count();
                        assert_eq!(usize::from(ranks[i]), rank, "{level:?} {x:e}");
                        let code = (packed[i / 2] >> (4 - 4 * (i % 2))) & 15;
                        assert_eq!(code, codebook.codes()[rank], "{level:?} {x:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn lanes_multiply_and_add() {
        for level in Level::all() {
            let (a, b) = (Vector([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), Vector([0.5; LANES]));
            let sum = with_level!(level, simd => {
                let c = simd.mul_add(simd.load(&a), simd.load(&b), simd.zero());
                simd.store(simd.mul_add(simd.load(&b), simd.load(&b), c))
            });
            assert_eq!(sum.0, a.0.map(|a| a * 0.5 + 0.25), "{level:?}");
            assert_eq!(sum.sum(), 20.0);
        }
    }
}
