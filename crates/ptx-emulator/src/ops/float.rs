//! f32 and f64 arithmetic as PTX defines it. The approximations (`.approx`, `.full`) are rounded from an f64 result, so
//! they are at least as close to the true value as PTX promises for the hardware.

use super::round::{Mode, canon, directed, odd, odd_add, to_f32};

/// NaN of f64 results.
#[inline(always)]
pub(crate) fn canon64(x: f64) -> f64 {
    let bits = x.to_bits();
    f64::from_bits(if bits << 1 > 0x7ff << 53 { u64::MAX >> 1 } else { bits })
}

/// Sum of two f64 (each exact), rounded once to f32 in a mode.
fn sum32(a: f64, b: f64, mode: Mode) -> f32 {
    let sum = odd_add(a, b);
    if sum == 0.0 && mode == Mode::Down && a.is_sign_negative() != b.is_sign_negative() {
        return -0.0;
    }
    canon(to_f32(sum, mode))
}

#[inline(always)]
pub(crate) fn add(a: f32, b: f32, mode: Mode) -> f32 {
    if mode == Mode::Nearest { canon(a + b) } else { sum32(a as f64, b as f64, mode) }
}

#[inline(always)]
pub(crate) fn sub(a: f32, b: f32, mode: Mode) -> f32 {
    if mode == Mode::Nearest { canon(a - b) } else { sum32(a as f64, -(b as f64), mode) }
}

#[inline(always)]
pub(crate) fn mul(a: f32, b: f32, mode: Mode) -> f32 {
    if mode == Mode::Nearest { canon(a * b) } else { canon(to_f32(a as f64 * b as f64, mode)) }
}

#[inline(always)]
pub(crate) fn fma(a: f32, b: f32, c: f32, mode: Mode) -> f32 {
    if mode == Mode::Nearest { canon(a.mul_add(b, c)) } else { sum32(a as f64 * b as f64, c as f64, mode) }
}

#[inline(always)]
pub(crate) fn div(a: f32, b: f32, mode: Mode) -> f32 {
    if mode == Mode::Nearest {
        return canon(a / b);
    }
    let (a, b) = (a as f64, b as f64);
    let q = a / b;
    // The remainder has the sign of what the quotient lost, times that of the divisor.
    let rest = (-q).mul_add(b, a);
    canon(to_f32(odd(q, if b < 0.0 { -rest } else { rest }), mode))
}

/// `div.approx`: zero (or NaN for an infinite dividend) when the divisor is above 2^126.
#[inline(always)]
pub(crate) fn div_approx(a: f32, b: f32) -> f32 {
    let huge = b.is_finite() && b.abs() > f32::from_bits(253 << 23);
    canon(if huge { if a.is_infinite() { f32::NAN } else { a * 0.0 * b.signum() } } else { a / b })
}

#[inline(always)]
pub(crate) fn sqrt(a: f32, mode: Mode) -> f32 {
    if mode == Mode::Nearest {
        return canon(a.sqrt());
    }
    let x = a as f64;
    let root = x.sqrt();
    canon(to_f32(odd(root, (-root).mul_add(root, x)), mode))
}

#[inline(always)]
pub(crate) fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        canon(b)
    } else if b.is_nan() || a < b || a == b && a.is_sign_negative() {
        a
    } else {
        b
    }
}

#[inline(always)]
pub(crate) fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        canon(b)
    } else if b.is_nan() || a > b || a == b && a.is_sign_positive() {
        a
    } else {
        b
    }
}

/// The `.NaN` form of `min` or `max`.
#[inline(always)]
pub(crate) fn or_nan(a: f32, b: f32, value: f32) -> f32 {
    if a.is_nan() || b.is_nan() { canon(f32::NAN) } else { value }
}

/// `.xorsign.abs`: `f` of the magnitudes, with the product of the signs.
#[inline(always)]
pub(crate) fn xorsign(a: f32, b: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let sign = (a.to_bits() ^ b.to_bits()) & 0x8000_0000;
    f32::from_bits(f(a.abs(), b.abs()).to_bits() & 0x7fff_ffff | sign)
}

#[inline(always)]
pub(crate) fn saturate(x: f32) -> f32 {
    if x >= 1.0 {
        1.0
    } else if x > 0.0 {
        x
    } else {
        0.0
    }
}

/// f64 operations in every mode; only `fma` is limited to nearest.
pub(crate) fn add64(a: f64, b: f64, mode: Mode) -> f64 {
    let sum = a + b;
    if sum == 0.0 && mode == Mode::Down && a.is_sign_negative() != b.is_sign_negative() {
        return -0.0;
    }
    let bb = sum - a;
    canon64(directed(sum, (a - (sum - bb)) + (b - bb), mode))
}

pub(crate) fn mul64(a: f64, b: f64, mode: Mode) -> f64 {
    let product = a * b;
    canon64(directed(product, a.mul_add(b, -product), mode))
}

pub(crate) fn div64(a: f64, b: f64, mode: Mode) -> f64 {
    let q = a / b;
    let rest = (-q).mul_add(b, a);
    canon64(directed(q, if b < 0.0 { -rest } else { rest }, mode))
}

pub(crate) fn sqrt64(a: f64, mode: Mode) -> f64 {
    let root = a.sqrt();
    canon64(directed(root, (-root).mul_add(root, a), mode))
}

#[inline(always)]
pub(crate) fn min64(a: f64, b: f64) -> f64 {
    if a.is_nan() {
        canon64(b)
    } else if b.is_nan() || a < b || a == b && a.is_sign_negative() {
        a
    } else {
        b
    }
}

#[inline(always)]
pub(crate) fn max64(a: f64, b: f64) -> f64 {
    if a.is_nan() {
        canon64(b)
    } else if b.is_nan() || a > b || a == b && a.is_sign_positive() {
        a
    } else {
        b
    }
}

/// A function of f64 rounded to f32.
#[inline(always)]
pub(crate) fn through64(x: f32, f: impl Fn(f64) -> f64) -> f32 {
    canon(f(x as f64) as f32)
}
