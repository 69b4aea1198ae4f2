//! The floating-point types that tensors are stored in.

use std::fmt;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::tensor::Data;

/// A storage type for weights, activations and adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
}

impl DType {
    /// All of them, widest first.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The unit roundoff: a value rounded to nearest in this type is off by at most this share of itself.
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            DType::F32 => 1.0 / (1u64 << 24) as f64,
            DType::F16 => 1.0 / (1u64 << 11) as f64,
            DType::BF16 => 1.0 / (1u64 << 8) as f64,
        }
    }

    /// The largest finite value.
    pub const fn largest(self) -> f64 {
        match self {
            DType::F32 => f32::MAX as f64,
            DType::F16 => 65504.0,
            DType::BF16 => 255.0 * (1u128 << 120) as f64,
        }
    }

    /// The suffix of kernel entries and of our own messages: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that is one of [`DType`]: `f32`, [`half::f16`], [`half::bf16`].
pub trait Element: sealed::Sealed + bytemuck::Pod + Send + Sync + PartialEq + fmt::Debug + 'static {
    /// Which one.
    const DTYPE: DType;
    /// Widens, exactly.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even; NaN stays NaN.
    fn from_f32(value: f32) -> Self;
    /// Rounds to nearest in one step, ties to even.
    fn from_f64(value: f64) -> Self;
    /// Widens, exactly.
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }
    /// The bits, in the low end.
    fn bits(self) -> u32;
    /// The element of these bits; those that it has no room for are dropped.
    fn from_bits(bits: u32) -> Self;
    /// Its place among all elements of the type, from negative to positive; -0 comes before 0. What is not a number is at both
    /// ends.
    fn order(self) -> i32 {
        let bits = (self.bits() << (32 - 8 * size_of::<Self>())) as i32;
        let order = bits ^ ((bits >> 31) as u32 >> 1) as i32;
        order >> (32 - 8 * size_of::<Self>())
    }
    /// The element at a place; of places that no element has, the low bits count.
    fn from_order(order: i32) -> Self {
        Self::from_bits(order as u32 ^ ((order >> 31) as u32 >> (33 - 8 * size_of::<Self>())))
    }
    /// Widens a slice into one of the same length, exactly. Panics when the lengths differ.
    fn widen(from: &[Self], to: &mut [f32]);
    /// Rounds a slice into one of the same length, as [`Element::from_f32`]. Panics when the lengths differ.
    fn round(from: &[f32], to: &mut [Self]);
    /// The elements of a [`Tensor`](crate::Tensor).
    fn into_data(elements: Vec<Self>) -> Data;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $to:expr, $from32:expr, $from64:expr, $widen:expr, $round:expr) => {
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            fn to_f32(self) -> f32 {
                $to(self)
            }
            fn from_f32(value: f32) -> Self {
                $from32(value)
            }
            fn from_f64(value: f64) -> Self {
                $from64(value)
            }
            fn bits(self) -> u32 {
                u32::from(self.to_bits())
            }
            fn from_bits(bits: u32) -> Self {
                Self::from_bits(bits as _)
            }
            #[inline(always)]
            fn widen(from: &[Self], to: &mut [f32]) {
                $widen(from, to);
            }
            #[inline(always)]
            fn round(from: &[f32], to: &mut [Self]) {
                $round(from, to);
            }
            fn into_data(elements: Vec<Self>) -> Data {
                Data::$dtype(elements)
            }
        }
    };
}

element!(
    f32,
    F32,
    |v| v,
    |v| v,
    |v| v as f32,
    |from: &[f32], to: &mut [f32]| to.copy_from_slice(from),
    |from: &[f32], to: &mut [f32]| to.copy_from_slice(from)
);
element!(
    f16,
    F16,
    f16::to_f32,
    f16::from_f32,
    |v| f16::from_f32(round_to_odd(v)),
    |from: &[f16], to: &mut [f32]| from.convert_to_f32_slice(to),
    |from: &[f32], to: &mut [f16]| to.convert_from_f32_slice(from)
);
element!(
    bf16,
    BF16,
    bf16::to_f32,
    bf16::from_f32,
    |v| bf16::from_f32(round_to_odd(v)),
    |from: &[bf16], to: &mut [f32]| from.convert_to_f32_slice(to),
    round_to_bf16
);

/// `bf16::from_f32` of each element, without a branch, so that compilers vectorise it (six times as fast as `half`'s).
#[inline(always)]
fn round_to_bf16(from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len());
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits() as i32;
        let (nearest_even, quiet_nan) = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)), bits | 0x40_0000);
        let rounded = if from.is_nan() { quiet_nan } else { nearest_even };
        *to = bf16::from_bits((rounded >> 16) as u16);
    }
}

/// The f32 from which a second rounding, to 16 bits, gives what one rounding of `value` would: exact values stay, and all
/// others go to the neighbour whose last bit is 1 (Boldo and Melquiond 2008). `half` rounds f64 twice.
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || nearest.is_nan() {
        return nearest;
    }
    let beyond = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(beyond)) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_round_as_elements_do() {
        // Every exponent and sign, with mantissas about every sort of middle; and a stride over all bits.
        let low = [
            0, 1, 0x3fff_u32, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_7fff, 0x1_8000, 0x7f_7fff, 0x7f_8000,
            0x7f_ffff,
        ];
        let edges = (0..512u32).flat_map(|high| low.map(|low| high << 23 | low));
        let values: Vec<f32> =
            edges.chain((0..1 << 20).map(|i: u32| i.wrapping_mul(4099))).map(f32::from_bits).collect();
        let mut rounded = vec![bf16::ZERO; values.len()];
        <bf16 as Element>::round(&values, &mut rounded);
        for (value, rounded) in values.iter().zip(rounded) {
            assert_eq!(
                rounded.to_bits(),
                bf16::from_f32(*value).to_bits(),
                "{value:e} {:#x}",
                value.to_bits()
            );
        }
    }

    /// Values just beside the middle of two neighbours, closer to it than f32 can tell.
    #[test]
    fn f64_is_rounded_once() {
        let above = |unit: f64| 1.0 + unit + 2.0f64.powi(-40);
        let below = |unit: f64| 1.0 + 3.0 * unit - 2.0f64.powi(-40);
        for dtype in [DType::F16, DType::BF16] {
            let unit = dtype.unit_roundoff();
            let round = |v: f64| match dtype {
                DType::F16 => <f16 as Element>::from_f64(v).to_f64(),
                _ => <bf16 as Element>::from_f64(v).to_f64(),
            };
            for sign in [1.0, -1.0] {
                assert_eq!(round(sign * above(unit)), sign * (1.0 + 2.0 * unit), "{dtype}");
                assert_eq!(round(sign * below(unit)), sign * (1.0 + 2.0 * unit), "{dtype}");
                assert_eq!(round(sign * (1.0 + unit)), sign, "{dtype}: ties to even");
            }
        }
        assert_eq!(round_to_odd(1e300), f32::MAX);
        assert_eq!(<bf16 as Element>::from_f64(1e300), bf16::INFINITY);
        assert_eq!(<f16 as Element>::from_f64(f64::NEG_INFINITY), f16::NEG_INFINITY);
        assert_eq!(round_to_odd(-1e-300).to_bits(), (-0.0f32).to_bits() | 1);
        assert!(<f16 as Element>::from_f64(f64::NAN).is_nan());
    }
}
