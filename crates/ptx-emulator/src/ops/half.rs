//! f16 and bf16 as lane values, alone and packed in pairs, with one rounding per operation.

use super::lanes::Regs;
use super::lanes::{Lane, WARP};
use super::round::{self, Format, Mode};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct F16(pub u16);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bf16(pub u16);

/// A 16-bit float.
pub(crate) trait Half: Copy {
    const FORMAT: Format;
    fn of(bits: u16) -> Self;
    fn bits(self) -> u16;
    /// Exact.
    fn f32(self) -> f32;

    fn f64(self) -> f64 {
        self.f32() as f64
    }
    fn nan() -> Self {
        Self::of(Self::FORMAT.nan() as u16)
    }
    fn is_nan(self) -> bool {
        self.f32().is_nan()
    }
    /// From a value that is exact or rounded to odd.
    fn round(x: f64) -> Self {
        Self::of(round::encode(x, Self::FORMAT, Mode::Nearest) as u16)
    }
    fn flush(self) -> Self {
        let exponent = ((1u32 << Self::FORMAT.exponent) - 1) << Self::FORMAT.mantissa;
        if self.bits() as u32 & exponent == 0 { Self::of(self.bits() & 0x8000) } else { self }
    }
    fn add(self, b: Self) -> Self {
        Self::round(round::odd_add(self.f64(), b.f64()))
    }
    fn sub(self, b: Self) -> Self {
        Self::round(round::odd_add(self.f64(), -b.f64()))
    }
    fn mul(self, b: Self) -> Self {
        Self::round(self.f64() * b.f64())
    }
    fn fma(self, b: Self, c: Self) -> Self {
        Self::round(round::odd_add(self.f64() * b.f64(), c.f64()))
    }
    fn neg(self) -> Self {
        Self::of(self.bits() ^ 0x8000)
    }
    fn abs(self) -> Self {
        Self::of(self.bits() & 0x7fff)
    }
    /// `NaN` operands lose, -0 is below +0.
    fn min(self, b: Self) -> Self {
        match (self.is_nan(), b.is_nan()) {
            (true, true) => Self::nan(),
            (true, false) => b,
            (false, true) => self,
            _ if key(self) <= key(b) => self,
            _ => b,
        }
    }
    fn max(self, b: Self) -> Self {
        match (self.is_nan(), b.is_nan()) {
            (true, true) => Self::nan(),
            (true, false) => b,
            (false, true) => self,
            _ if key(self) >= key(b) => self,
            _ => b,
        }
    }
    /// The `.NaN` forms: a NaN wins.
    fn min_nan(self, b: Self) -> Self {
        if self.is_nan() || b.is_nan() { Self::nan() } else { self.min(b) }
    }
    fn max_nan(self, b: Self) -> Self {
        if self.is_nan() || b.is_nan() { Self::nan() } else { self.max(b) }
    }
    /// `.relu`: negative to +0, NaN to canonical NaN.
    fn relu(self) -> Self {
        if self.is_nan() {
            Self::nan()
        } else if self.bits() & 0x8000 != 0 {
            Self::of(0)
        } else {
            self
        }
    }
    /// `.sat`: clamped to [0, 1], NaN to +0.
    fn sat(self) -> Self {
        let v = self.f32();
        if v > 1.0 {
            Self::round(1.0)
        } else if v > 0.0 {
            self
        } else {
            Self::of(0)
        }
    }
    fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self::round(f(self.f64()))
    }
}

/// Orders -0 below +0.
fn key<H: Half>(h: H) -> i32 {
    let bits = h.bits() as i32;
    if bits & 0x8000 != 0 { -(bits & 0x7fff) - 1 } else { bits }
}

impl Half for F16 {
    const FORMAT: Format = round::F16;
    fn of(bits: u16) -> Self {
        F16(bits)
    }
    fn bits(self) -> u16 {
        self.0
    }
    #[inline(always)]
    fn f32(self) -> f32 {
        let h = self.0 as u32;
        let (sign, rest) = ((h & 0x8000) << 16, h & 0x7fff);
        // The scaling by 2^112 makes subnormals normal and is exact.
        let scaled = f32::from_bits(rest << 13) * f32::from_bits(0x7780_0000);
        let value = if rest > 0x7c00 {
            round::NAN32
        } else if rest == 0x7c00 {
            f32::INFINITY
        } else {
            scaled
        };
        f32::from_bits(value.to_bits() | sign)
    }
}

impl Half for Bf16 {
    const FORMAT: Format = round::BF16;
    fn of(bits: u16) -> Self {
        Bf16(bits)
    }
    fn bits(self) -> u16 {
        self.0
    }
    #[inline(always)]
    fn f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
}

/// Two of them in one 32-bit register; element 0 is the low half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Two<H>(pub H, pub H);

impl<H: Half> Two<H> {
    #[inline(always)]
    pub(crate) fn map(self, f: impl Fn(H) -> H) -> Self {
        Two(f(self.0), f(self.1))
    }
    #[inline(always)]
    pub(crate) fn zip(self, b: Self, f: impl Fn(H, H) -> H) -> Self {
        Two(f(self.0, b.0), f(self.1, b.1))
    }
    #[inline(always)]
    pub(crate) fn zip3(self, b: Self, c: Self, f: impl Fn(H, H, H) -> H) -> Self {
        Two(f(self.0, b.0, c.0), f(self.1, b.1, c.1))
    }
}

macro_rules! rows32 {
    () => {
        type Raw = u32;
        #[inline(always)]
        fn rows(regs: &Regs) -> &[[u32; WARP]] {
            &regs.r32
        }
        #[inline(always)]
        fn rows_mut(regs: &mut Regs) -> &mut [[u32; WARP]] {
            &mut regs.r32
        }
    };
}

impl Lane for F16 {
    rows32!();
    #[inline(always)]
    fn get(raw: u32) -> Self {
        F16(raw as u16)
    }
    #[inline(always)]
    fn put(self) -> u32 {
        self.0 as u32
    }
}

impl Lane for Bf16 {
    rows32!();
    #[inline(always)]
    fn get(raw: u32) -> Self {
        Bf16(raw as u16)
    }
    #[inline(always)]
    fn put(self) -> u32 {
        self.0 as u32
    }
}

impl<H: Half> Lane for Two<H> {
    rows32!();
    #[inline(always)]
    fn get(raw: u32) -> Self {
        Two(H::of(raw as u16), H::of((raw >> 16) as u16))
    }
    #[inline(always)]
    fn put(self) -> u32 {
        self.0.bits() as u32 | (self.1.bits() as u32) << 16
    }
}
