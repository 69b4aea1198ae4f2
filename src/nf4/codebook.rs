//! The sixteen values that a 4-bit code stands for, and the rule that picks one.

use crate::{Error, Result};

/// NF4 (Dettmers et al. 2023, arXiv:2305.14314), with the literals of bitsandbytes.
#[expect(clippy::excessive_precision, reason = "as they are written there")]
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// bitsandbytes' FP4: bit 3 is the sign, bits 0 to 2 pick a magnitude. Not ascending, and zero is there twice.
const FP4: [f32; 16] = {
    let magnitude = [0.0, 0.005_208_333_5, 0.666_666_7, 1.0, 0.333_333_34, 0.5, 0.166_666_67, 0.25];
    let mut values = [0.0; 16];
    let mut code = 0;
    while code < 8 {
        values[code] = magnitude[code];
        values[8 + code] = -magnitude[code];
        code += 1;
    }
    values
};

/// The magnitudes above which bitsandbytes' FP4 takes the next larger value. Some are literals with few digits, and not
/// the midpoints.
const FP4_THRESHOLDS: [f32; 7] =
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];

/// Which table a [`Codebook`] holds, as bitsandbytes' `quant_type` tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// `nf4`.
    Nf4,
    /// `fp4`.
    Fp4,
    /// Any other sixteen values.
    Custom,
}

/// Sixteen values and fifteen thresholds: `value = values[code]`, and a number `x` takes the code
/// `codes[how many thresholds t have x > t]`. So a number that lies on a threshold takes the lower value.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    values: [f32; 16],
    thresholds: [f32; 15],
    codes: [u8; 16],
}

impl Codebook {
    /// NF4, the default of QLoRA.
    pub fn nf4() -> Self {
        Self::nearest(NF4)
    }

    /// FP4 as bitsandbytes' CUDA kernels have it: the sign is that of `x < 0`, and a magnitude on a threshold takes the
    /// smaller one.
    pub fn fp4() -> Self {
        Self::nearest(FP4).with_fp4_thresholds()
    }

    /// Any sixteen values, in any order: a number takes the code of the nearest one, by f32 midpoints. Of equal values
    /// only the lowest code is ever taken. The NF4 and FP4 tables give [`Codebook::nf4`] and the rule of
    /// [`Codebook::fp4`].
    ///
    /// # Errors
    /// [`Error::Argument`] when a value is not finite.
    pub fn from_values(values: [f32; 16]) -> Result<Self> {
        if let Some(code) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::argument(format!("values[{code}]"), "a finite number", values[code]));
        }
        let codebook = Self::nearest(values);
        Ok(match codebook.quant_type() {
            QuantType::Fp4 => codebook.with_fp4_thresholds(),
            QuantType::Nf4 | QuantType::Custom => codebook,
        })
    }

    /// The rule of nearest values, which must be finite.
    fn nearest(values: [f32; 16]) -> Self {
        let mut codes: [u8; 16] = std::array::from_fn(|code| code as u8);
        let value = |code: u8| values[usize::from(code)] + 0.0; // makes minus zero zero
        codes.sort_by(|&a, &b| value(a).total_cmp(&value(b)));
        let sorted = codes.map(value);
        for rank in 1..16 {
            if sorted[rank] == sorted[rank - 1] {
                codes[rank] = codes[rank - 1];
            }
        }
        Self { values, thresholds: std::array::from_fn(|i| sorted[i].midpoint(sorted[i + 1])), codes }
    }

    /// Mirrors the thresholds of magnitudes. `x > t` must hold on the mirrored threshold itself (the smaller magnitude is
    /// the larger value there), so these are the next f32 below; and code 8, minus zero, is for all that is below zero.
    fn with_fp4_thresholds(mut self) -> Self {
        for (i, t) in FP4_THRESHOLDS.into_iter().enumerate() {
            self.thresholds[8 + i] = t;
            self.thresholds[6 - i] = (-t).next_down();
        }
        self.thresholds[7] = 0.0f32.next_down();
        self.codes = [11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3];
        self
    }

    /// What each code stands for, before it is multiplied by the block's absmax.
    pub fn values(&self) -> &[f32; 16] {
        &self.values
    }

    /// The thresholds, ascending.
    pub fn thresholds(&self) -> &[f32; 15] {
        &self.thresholds
    }

    /// The code that a number above 0, 1, ... 15 thresholds takes. For NF4, the numbers themselves.
    pub fn codes(&self) -> &[u8; 16] {
        &self.codes
    }

    /// The code of `x`, an element divided by its block's absmax.
    pub fn code(&self, x: f32) -> u8 {
        self.codes[self.thresholds.iter().filter(|&&t| x > t).count()]
    }

    /// Which table this is. Zeros of either sign are equal: bitsandbytes writes FP4's minus zero as zero.
    pub fn quant_type(&self) -> QuantType {
        match self.values {
            NF4 => QuantType::Nf4,
            FP4 => QuantType::Fp4,
            _ => QuantType::Custom,
        }
    }
}
