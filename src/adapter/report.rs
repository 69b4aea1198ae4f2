use std::fmt;
use std::iter::Sum;
use std::ops::AddAssign;

use crate::{Error, Result};

/// What a merge has kept of its adapters, in sums that add up: those of a model are the sums of its layers'.
///
/// With the weight `W`, the wanted delta `D` (W plus D is the merged weight before it is rounded) and the realised one,
/// `R = W' - W`. A 4-bit weight counts as what it decodes to in its dtype.
///
/// Sums are in f64, of terms whose R and R - D are rounded to f32, in an order that does not depend on the number of threads: neither do
/// the bits, nor on the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MergeReport {
    /// Elements of the weight.
    pub elements: u64,
    /// Elements that are not stored as they would be without the adapters; of a 4-bit weight, codes.
    pub changed: u64,
    /// Bytes of the merged weight as it is stored, scales included.
    pub bytes: u64,
    /// Bytes that are not what they would be without the adapters.
    pub changed_bytes: u64,
    /// `<W, W>`.
    pub weight: f64,
    /// `<D, D>`.
    pub wanted: f64,
    /// `<R, D>`.
    pub kept: f64,
    /// `<R - D, R - D>`.
    pub error: f64,
}

impl MergeReport {
    /// `<R, D> / <D, D>`: the share of the wanted delta that the merged weight has. 1 is all; what rounding adds at
    /// random does not count. 1 when nothing is wanted.
    pub fn retained_gain(&self) -> f64 {
        if self.wanted == 0.0 { 1.0 } else { self.kept / self.wanted }
    }

    /// `|R - D| / |D|`: the expected error of an output, in units of what the adapters do to it, when inputs are white. 0
    /// is best, and 1 is what leaving the adapters out would give.
    pub fn relative_error(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { (self.error / self.wanted).sqrt() }
    }

    /// `|D| / |W|`.
    pub fn relative_delta(&self) -> f64 {
        if self.wanted == 0.0 { 0.0 } else { (self.wanted / self.weight).sqrt() }
    }

    /// The report, unless less of the adapters is left than `min_gain`, which 0.9 is a good value for.
    ///
    /// # Errors
    /// [`Error::AdapterLost`], naming the weight as `argument`, when [`MergeReport::retained_gain`] is below `min_gain`, or NaN.
    pub fn require(self, argument: &str, min_gain: f64) -> Result<Self> {
        match self.retained_gain() >= min_gain {
            true => Ok(self),
            false => {
                Err(Error::AdapterLost { argument: argument.to_owned(), wanted: min_gain, report: self })
            }
        }
    }

    /// The share of elements (of a 4-bit weight: codes) that the adapters have changed.
    pub fn changed_share(&self) -> f64 {
        share(self.changed, self.elements)
    }

    /// The share of bytes that the adapters have changed.
    pub fn changed_bytes_share(&self) -> f64 {
        share(self.changed_bytes, self.bytes)
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

impl AddAssign for MergeReport {
    fn add_assign(&mut self, other: Self) {
        self.elements += other.elements;
        self.changed += other.changed;
        self.bytes += other.bytes;
        self.changed_bytes += other.changed_bytes;
        self.weight += other.weight;
        self.wanted += other.wanted;
        self.kept += other.kept;
        self.error += other.error;
    }
}

impl Sum for MergeReport {
    fn sum<I: Iterator<Item = Self>>(reports: I) -> Self {
        reports.fold(Self::default(), |mut total, report| {
            total += report;
            total
        })
    }
}

/// `retained gain 0.98, relative error 0.163, 82.3 % of elements and 41.2 % of bytes changed`.
impl fmt::Display for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "retained gain {:.3}, relative error {:.3}, {:.1} % of elements and {:.1} % of bytes changed",
            self.retained_gain(),
            self.relative_error(),
            100.0 * self.changed_share(),
            100.0 * self.changed_bytes_share()
        )
    }
}
