//! Rounding to every float format of PTX, in every mode, from values that are exact or rounded to odd in f64.
//!
//! A sum or quotient that f64 cannot hold is first rounded to odd (the last bit tells that something was cut off);
//! rounding that to a format with at least two bits less gives the correctly rounded result of the exact value.

/// Rounding modes of PTX: `.rn`, `.rz`, `.rm`, `.rp`, and `.rna` (nearest, ties away from zero).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Nearest,
    Zero,
    Down,
    Up,
    Away,
}

/// The NaN that NVIDIA hardware returns.
pub(crate) const NAN32: f32 = f32::from_bits(0x7fff_ffff);

/// Replaces any NaN by the canonical one.
#[inline(always)]
pub(crate) fn canon(x: f32) -> f32 {
    // On the bits: of floats the compiler may take one NaN for another.
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { NAN32.to_bits() } else { bits })
}

/// Flushes a subnormal to zero of the same sign.
#[inline(always)]
pub(crate) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}

/// Sum of two f64 rounded to odd.
#[inline(always)]
pub(crate) fn odd_add(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let bb = sum - a;
    let error = (a - (sum - bb)) + (b - bb);
    odd(sum, error)
}

/// `value` was rounded to nearest and `error` has the sign of what was lost: rounds to odd instead.
#[inline(always)]
pub(crate) fn odd(value: f64, error: f64) -> f64 {
    let bits = value.to_bits();
    if error == 0.0 || !error.is_finite() || !value.is_finite() || value == 0.0 || bits & 1 == 1 {
        return value;
    }
    f64::from_bits(if (error > 0.0) == (value > 0.0) { bits + 1 } else { bits - 1 })
}

/// f64 in a direction, from the nearest one and the sign of the remainder.
pub(crate) fn directed(nearest: f64, error: f64, mode: Mode) -> f64 {
    if error == 0.0 || !error.is_finite() {
        return nearest;
    }
    match mode {
        Mode::Up if error > 0.0 => nearest.next_up(),
        Mode::Down if error < 0.0 => nearest.next_down(),
        Mode::Zero if nearest > 0.0 && error < 0.0 => nearest.next_down(),
        Mode::Zero if nearest < 0.0 && error > 0.0 => nearest.next_up(),
        _ => nearest,
    }
}

/// f64 (exact or odd) to f32.
#[inline(always)]
pub(crate) fn to_f32(x: f64, mode: Mode) -> f32 {
    match mode {
        Mode::Nearest => x as f32,
        _ => f32::from_bits(encode(x, F32, mode)),
    }
}

/// A binary float format: exponent and mantissa bits, and whether it has infinities (e4m3 has none).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    pub exponent: u32,
    pub mantissa: u32,
    pub infinity: bool,
}

pub(crate) const F32: Format = Format { exponent: 8, mantissa: 23, infinity: true };
pub(crate) const F16: Format = Format { exponent: 5, mantissa: 10, infinity: true };
pub(crate) const BF16: Format = Format { exponent: 8, mantissa: 7, infinity: true };
pub(crate) const E5M2: Format = Format { exponent: 5, mantissa: 2, infinity: true };
pub(crate) const E4M3: Format = Format { exponent: 4, mantissa: 3, infinity: false };

impl Format {
    /// All exponent and mantissa bits set: the canonical NaN of every format here.
    pub(crate) const fn nan(self) -> u32 {
        (1 << (self.exponent + self.mantissa)) - 1
    }

    /// First pattern above the largest finite one.
    const fn overflow(self) -> u32 {
        if self.infinity { ((1 << self.exponent) - 1) << self.mantissa } else { self.nan() }
    }
}

/// Bits of `x` (exact or odd) rounded to a format.
#[inline]
pub(crate) fn encode(x: f64, format: Format, mode: Mode) -> u32 {
    let bits = x.to_bits();
    let negative = bits >> 63 == 1;
    let sign = (negative as u32) << (format.exponent + format.mantissa);
    if x.is_nan() {
        return format.nan();
    }
    if x == 0.0 {
        return sign;
    }
    if x.is_infinite() {
        return sign | format.overflow();
    }
    let raw = (bits >> 52 & 0x7ff) as i32;
    let fraction = bits & ((1 << 52) - 1);
    // |x| = significand * 2^(power - 52)
    let (significand, power) = if raw == 0 { (fraction, -1022) } else { (fraction | 1 << 52, raw - 1023) };
    let bias = (1 << (format.exponent - 1)) - 1;
    let lowest = 1 - bias;
    // Subnormal f64 are far below every other format's range, so `power` is the true exponent wherever it matters.
    let exponent = power.max(lowest);
    let shift = (52 - format.mantissa as i32 + (exponent - power)).min(60) as u32;
    let (kept, rest, half) = (significand >> shift, significand & ((1 << shift) - 1), 1u64 << (shift - 1));
    let up = match mode {
        Mode::Nearest => rest > half || rest == half && kept & 1 == 1,
        Mode::Away => rest >= half,
        Mode::Zero => false,
        Mode::Down => rest != 0 && negative,
        Mode::Up => rest != 0 && !negative,
    };
    let kept = kept as u32 + up as u32;
    // A carry out of the mantissa moves into the exponent by itself, from subnormal to normal too.
    let magnitude = ((exponent - lowest) as u32 * (1 << format.mantissa)).saturating_add(kept);
    let limit = format.overflow();
    if magnitude < limit {
        return sign | magnitude;
    }
    let stays_finite = matches!((mode, negative), (Mode::Zero, _) | (Mode::Down, false) | (Mode::Up, true));
    sign | if stays_finite { limit - 1 } else { limit }
}

/// Value of a pattern of a format.
#[inline]
pub(crate) fn decode(bits: u32, format: Format) -> f64 {
    let magnitude = bits & format.nan();
    let negative = bits >> (format.exponent + format.mantissa) & 1 == 1;
    let top = magnitude >> format.mantissa;
    let fraction = magnitude & ((1 << format.mantissa) - 1);
    let bias = (1 << (format.exponent - 1)) - 1;
    let value = if magnitude > format.overflow() || magnitude == format.nan() {
        f64::NAN
    } else if format.infinity && magnitude == format.overflow() {
        f64::INFINITY
    } else if top == 0 {
        fraction as f64 * power_of_two(1 - bias - format.mantissa as i32)
    } else {
        (fraction | 1 << format.mantissa) as f64 * power_of_two(top as i32 - bias - format.mantissa as i32)
    };
    if negative { -value } else { value }
}

fn power_of_two(n: i32) -> f64 {
    f64::from_bits(((n + 1023) as u64) << 52)
}

/// Rounds to an integral value.
#[inline(always)]
pub(crate) fn integral(x: f64, mode: Mode) -> f64 {
    match mode {
        Mode::Nearest => x.round_ties_even(),
        Mode::Zero => x.trunc(),
        Mode::Down => x.floor(),
        Mode::Up => x.ceil(),
        Mode::Away => x.round(),
    }
}
