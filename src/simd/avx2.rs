//! AVX2, FMA and F16C. A code is looked up by byte shuffles: one for each byte of what it stands for.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_GT_OQ, _MM_HINT_T0, _mm_prefetch, _mm256_cvtph_ps, _mm256_cvtps_ph,
};

use bytemuck::{must_cast, must_cast_ref};

use super::{GROUP, GROUP_BYTES, LANES, Search, Simd, Vector};
use crate::{DType, Element};

pulp::simd_type! {
    /// The proof that the machine has them, with their intrinsics.
    pub(crate) struct Avx2 {
        pub sse: "sse",
        pub sse2: "sse2",
        pub sse3: "sse3",
        pub ssse3: "ssse3",
        pub sse4_1: "sse4.1",
        pub sse4_2: "sse4.2",
        pub popcnt: "popcnt",
        pub avx: "avx",
        pub avx2: "avx2",
        pub bmi1: "bmi1",
        pub bmi2: "bmi2",
        pub fma: "fma",
        pub lzcnt: "lzcnt",
        pub f16c: "f16c",
    }
}

/// Sixteen values, as they are multiplied and as they are looked up.
#[derive(Clone, Copy)]
pub(crate) struct Values {
    /// In the order in which [`Avx2::planes`] takes them.
    arranged: [__m256; 2],
    planes: Planes,
}

/// Byte 0, 1, 2 and 3 of sixteen f32; in both halves of a vector, where a shuffle reads its own half.
type Planes = [__m256i; 4];

/// What the codes of a block stand for.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    planes: Planes,
    /// What looked-up values are multiplied by, in f32. (There the table is the codebook: to scale it would take as many instructions
    /// as to scale 64 weights.)
    scale: __m256,
}

impl Avx2 {
    pub fn detect() -> Option<Self> {
        Self::try_new()
    }

    /// The bytes of sixteen f32: 0-3 and 8-11, 4-7 and 12-15.
    #[inline(always)]
    fn planes(self, values: [__m256; 2]) -> Planes {
        let avx2 = self.avx2;
        const BY_BYTE: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
        let by_byte = must_cast([BY_BYTE; 2]);
        let a = avx2._mm256_shuffle_epi8(must_cast(values[0]), by_byte);
        let b = avx2._mm256_shuffle_epi8(must_cast(values[1]), by_byte);
        let [low, high] = [avx2._mm256_unpacklo_epi32(a, b), avx2._mm256_unpackhi_epi32(a, b)];
        [
            avx2._mm256_permute4x64_epi64::<0x88>(low),
            avx2._mm256_permute4x64_epi64::<0xdd>(low),
            avx2._mm256_permute4x64_epi64::<0x88>(high),
            avx2._mm256_permute4x64_epi64::<0xdd>(high),
        ]
    }

    /// The f32 whose upper halves are bf16 are rounded so that these are right; what is in the lower halves is not.
    #[inline(always)]
    fn round_to_bf16(self, values: __m256) -> __m256 {
        let avx2 = self.avx2;
        let bits: __m256i = must_cast(values);
        let odd = avx2._mm256_and_si256(avx2._mm256_srli_epi32::<16>(bits), must_cast([1u32; 8]));
        must_cast(avx2._mm256_add_epi32(avx2._mm256_add_epi32(bits, must_cast([0x7fffu32; 8])), odd))
    }

    #[inline(always)]
    fn to_f16(self, values: __m256) -> __m128i {
        // SAFETY: the machine has F16C, as `self` proves.
        unsafe { _mm256_cvtps_ph::<0>(values) }
    }

    #[inline(always)]
    fn of_f16(self, values: __m128i) -> __m256 {
        // SAFETY: the machine has F16C, as `self` proves.
        unsafe { _mm256_cvtph_ps(values) }
    }

    /// As f16, in the upper halves of f32.
    #[inline(always)]
    fn upper_f16(self, values: __m256) -> __m256 {
        must_cast(self.avx2._mm256_slli_epi32::<16>(self.avx2._mm256_cvtepu16_epi32(self.to_f16(values))))
    }

    #[inline(always)]
    fn scaled(self, codebook: &Values, absmax: f32) -> [__m256; 2] {
        let scale = must_cast([absmax; LANES]);
        let [a, b] = codebook.arranged;
        [self.avx._mm256_mul_ps(a, scale), self.avx._mm256_mul_ps(b, scale)]
    }

    /// One code in each byte: the first half has those of elements 0-3, 8-11, 16-19 and 24-27, the other what is between. (So they
    /// come into their order when the bytes of each are put together.)
    #[inline(always)]
    fn spread(self, codes: &[u8; GROUP_BYTES]) -> __m256i {
        let avx2 = self.avx2;
        const TWICE: [u8; 32] = [
            0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14,
            14, 15, 15,
        ];
        // (The intrinsic of a broadcast becomes a permutation.)
        let twice = avx2._mm256_shuffle_epi8(must_cast([*codes; 2]), must_cast(TWICE));
        let first = avx2._mm256_and_si256(avx2._mm256_srli_epi16::<4>(twice), must_cast([0x000fu16; 16]));
        let second = avx2._mm256_and_si256(twice, must_cast([0x0f00u16; 16]));
        avx2._mm256_or_si256(first, second)
    }

    /// Values of which bytes below `FIRST`, at most 2, are zero.
    #[inline(always)]
    fn look_up<const FIRST: usize>(self, planes: &Planes, codes: &[u8; GROUP_BYTES]) -> [__m256; 4] {
        let avx2 = self.avx2;
        let codes = self.spread(codes);
        let zero = must_cast([0u8; 32]);
        let a = if FIRST > 0 { zero } else { avx2._mm256_shuffle_epi8(planes[0], codes) };
        let b = if FIRST > 1 { zero } else { avx2._mm256_shuffle_epi8(planes[1], codes) };
        let c = avx2._mm256_shuffle_epi8(planes[2], codes);
        let d = avx2._mm256_shuffle_epi8(planes[3], codes);
        let [low0, low1] = [avx2._mm256_unpacklo_epi8(a, b), avx2._mm256_unpackhi_epi8(a, b)];
        let [high0, high1] = [avx2._mm256_unpacklo_epi8(c, d), avx2._mm256_unpackhi_epi8(c, d)];
        [
            must_cast(avx2._mm256_unpacklo_epi16(low0, high0)),
            must_cast(avx2._mm256_unpackhi_epi16(low0, high0)),
            must_cast(avx2._mm256_unpacklo_epi16(low1, high1)),
            must_cast(avx2._mm256_unpackhi_epi16(low1, high1)),
        ]
    }

    /// How many thresholds are below each of eight numbers.
    #[inline(always)]
    fn rank(self, levels: &[[f32; LANES]; 4], x: __m256) -> __m256i {
        let (avx, avx2) = (self.avx, self.avx2);
        let rank = self.deeper(must_cast([0u32; 8]), x, must_cast(levels[0]));
        let rank = self.deeper(rank, x, avx._mm256_permutevar_ps(must_cast(levels[1]), rank));
        let rank = self.deeper(rank, x, avx._mm256_permutevar_ps(must_cast(levels[2]), rank));
        self.deeper(rank, x, avx2._mm256_permutevar8x32_ps(must_cast(levels[3]), rank))
    }

    /// One bit more of a rank: whether the number is above a threshold.
    #[inline(always)]
    fn deeper(self, rank: __m256i, x: __m256, threshold: __m256) -> __m256i {
        let above = self.avx._mm256_cmp_ps::<_CMP_GT_OQ>(x, threshold);
        self.avx2._mm256_sub_epi32(self.avx2._mm256_add_epi32(rank, rank), must_cast(above))
    }
}

impl Simd for Avx2 {
    type Lanes = __m256;
    type Codebook = Values;
    type Floats<T: Element> = Table;
    type Elements<T: Element> = Table;

    #[inline(always)]
    fn run<R>(self, work: impl FnOnce() -> R) -> R {
        self.vectorize(work)
    }

    #[inline(always)]
    fn zero(self) -> Self::Lanes {
        self.avx._mm256_setzero_ps()
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Lanes {
        must_cast([value; LANES])
    }

    #[inline(always)]
    fn load(self, values: &Vector) -> Self::Lanes {
        must_cast(*values)
    }

    #[inline(always)]
    fn store(self, lanes: Self::Lanes) -> Vector {
        must_cast(lanes)
    }

    #[inline(always)]
    fn prefetch(self, byte: &u8) {
        // SAFETY: the machine has SSE, as `self` proves; and a prefetch changes nothing but caches.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(byte).cast()) }
    }

    #[inline(always)]
    fn widen<T: Element>(self, values: &[T; LANES]) -> Self::Lanes {
        match T::DTYPE {
            DType::F32 => must_cast::<[f32; LANES], _>(bytemuck::cast(*values)),
            DType::F16 => self.of_f16(bytemuck::cast(*values)),
            DType::BF16 => {
                let bits = self.avx2._mm256_cvtepu16_epi32(bytemuck::cast(*values));
                must_cast(self.avx2._mm256_slli_epi32::<16>(bits))
            }
        }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        self.fma._mm256_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    fn codebook(self, values: &[f32; 16]) -> Self::Codebook {
        let quad = |i: usize| [values[i], values[i + 1], values[i + 2], values[i + 3]];
        let arranged = [must_cast([quad(0), quad(8)]), must_cast([quad(4), quad(12)])];
        Values { arranged, planes: self.planes(arranged) }
    }

    #[inline(always)]
    fn floats<T: Element>(self, codebook: &Self::Codebook, absmax: f32) -> Self::Floats<T> {
        let planes = match T::DTYPE {
            DType::F32 => codebook.planes,
            DType::F16 => {
                let [a, b] = self.scaled(codebook, absmax);
                self.planes([self.of_f16(self.to_f16(a)), self.of_f16(self.to_f16(b))])
            }
            DType::BF16 => {
                let [a, b] = self.scaled(codebook, absmax);
                self.planes([self.round_to_bf16(a), self.round_to_bf16(b)])
            }
        };
        Table { planes, scale: must_cast([absmax; LANES]) }
    }

    /// Of 16-bit elements, each in the upper half of an f32.
    #[inline(always)]
    fn elements<T: Element>(self, codebook: &Self::Codebook, absmax: f32) -> Self::Elements<T> {
        if T::DTYPE != DType::F16 {
            return self.floats::<T>(codebook, absmax);
        }
        let [a, b] = self.scaled(codebook, absmax);
        let planes = self.planes([self.upper_f16(a), self.upper_f16(b)]);
        Table { planes, scale: must_cast([absmax; LANES]) }
    }

    #[inline(always)]
    fn decode_floats<T: Element>(
        self,
        table: &Self::Floats<T>,
        codes: &[u8; GROUP_BYTES],
    ) -> [Self::Lanes; GROUP / LANES] {
        match T::DTYPE {
            DType::F32 => {
                let mut values = self.look_up::<0>(&table.planes, codes);
                for values in &mut values {
                    *values = self.avx._mm256_mul_ps(*values, table.scale);
                }
                values
            }
            DType::F16 => self.look_up::<1>(&table.planes, codes),
            DType::BF16 => self.look_up::<2>(&table.planes, codes),
        }
    }

    #[inline(always)]
    fn decode_elements<T: Element>(
        self,
        table: &Self::Elements<T>,
        codes: &[u8; GROUP_BYTES],
        out: &mut [T; GROUP],
    ) {
        if T::DTYPE == DType::F32 {
            let floats: [[f32; LANES]; 4] = must_cast(self.decode_floats::<T>(table, codes));
            out.copy_from_slice(bytemuck::cast_slice(floats.as_flattened()));
            return;
        }
        let avx2 = self.avx2;
        let codes = self.spread(codes);
        let low = avx2._mm256_shuffle_epi8(table.planes[2], codes);
        let high = avx2._mm256_shuffle_epi8(table.planes[3], codes);
        let halves: [[u16; 16]; 2] = must_cast([
            avx2._mm256_permute4x64_epi64::<0xd8>(avx2._mm256_unpacklo_epi8(low, high)),
            avx2._mm256_permute4x64_epi64::<0xd8>(avx2._mm256_unpackhi_epi8(low, high)),
        ]);
        out.copy_from_slice(bytemuck::cast_slice(halves.as_flattened()));
    }

    #[inline(always)]
    fn ranks(self, search: &Search, x: &[f32; GROUP], lift: f32, inverse: f32) -> [u8; GROUP] {
        let avx2 = self.avx2;
        let (lift, inverse) = (must_cast([lift; LANES]), must_cast([inverse; LANES]));
        let x: &[[f32; LANES]; 4] = must_cast_ref(x);
        let mut ranks = [must_cast([0u32; 8]); 4];
        for (rank, x) in ranks.iter_mut().zip(x) {
            let x = self.avx._mm256_mul_ps(self.avx._mm256_mul_ps(must_cast(*x), lift), inverse);
            *rank = self.rank(&search.levels, x);
        }
        let [a, b, c, d] = ranks;
        let words = [avx2._mm256_packs_epi32(a, b), avx2._mm256_packs_epi32(c, d)];
        let bytes = avx2._mm256_packus_epi16(words[0], words[1]);
        must_cast(avx2._mm256_permutevar8x32_epi32(bytes, must_cast([0u32, 4, 1, 5, 2, 6, 3, 7])))
    }

    #[inline(always)]
    fn pack(self, search: &Search, ranks: &[u8; GROUP]) -> [u8; GROUP_BYTES] {
        let avx2 = self.avx2;
        let codes = avx2._mm256_shuffle_epi8(must_cast([search.codes; 2]), must_cast(*ranks));
        let pairs = avx2._mm256_maddubs_epi16(codes, must_cast([[16u8, 1]; 16]));
        let bytes = avx2._mm256_packus_epi16(pairs, pairs);
        let [packed, _]: [[u8; GROUP_BYTES]; 2] = must_cast(avx2._mm256_permute4x64_epi64::<0xd8>(bytes));
        packed
    }
}
