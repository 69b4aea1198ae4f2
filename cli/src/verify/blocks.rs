//! What the families share about 4-bit blocks.

use anyhow::{Context, Result};
use lora_kernels::nf4::{Absmax, Codebook, DYNAMIC_MAP, NESTED_BLOCKSIZE, NestedAbsmax, Nf4Matrix};
use lora_kernels::{DType, Tensor};
use sha2::{Digest, Sha256};

use super::bounds;
use super::report::Case;
use crate::tensors::TensorFile;

/// Below this, a block counts as all zero: bitsandbytes divides by nothing smaller.
const ZERO: f64 = 1e-37;

/// The codes of `numel` elements: two per byte, the first in the high nibble.
pub fn codes(packed: &[u8], numel: usize) -> Vec<u8> {
    packed.iter().flat_map(|byte| [byte >> 4, byte & 15]).take(numel).collect()
}

/// sha256 of raw bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The matrix of `{prefix}packed` and its scales: `{prefix}qabsmax`, `{prefix}nested_absmax` and `{prefix}offset` where
/// `nested`, `{prefix}absmax` elsewhere.
pub fn matrix(
    tensors: &TensorFile,
    prefix: &str,
    nested: Option<&str>,
    shape: &[usize],
    blocksize: usize,
    dtype: DType,
) -> Result<Nf4Matrix> {
    let packed = tensors.get(&format!("{prefix}packed"))?.u8s()?.to_vec();
    let absmax = match nested {
        Some(nested) => Absmax::Nested(nested_absmax(tensors, nested)?),
        None => Absmax::Plain(tensors.get(&format!("{prefix}absmax"))?.f32s()?),
    };
    Nf4Matrix::from_parts(shape, packed, absmax, blocksize, Codebook::nf4(), dtype)
        .with_context(|| format!("`{prefix}packed` and its scales"))
}

/// The scales of `{prefix}qabsmax`, `{prefix}nested_absmax` and `{prefix}offset`.
pub fn nested_absmax(tensors: &TensorFile, prefix: &str) -> Result<NestedAbsmax> {
    let q = tensors.get(&format!("{prefix}qabsmax"))?.u8s()?.to_vec();
    let absmax = tensors.get(&format!("{prefix}nested_absmax"))?.f32s()?;
    let offset = tensors.get(&format!("{prefix}offset"))?.counting(1)?.f32s()?[0];
    NestedAbsmax::from_parts(q, absmax, Box::new(DYNAMIC_MAP), offset, NESTED_BLOCKSIZE)
        .with_context(|| format!("`{prefix}qabsmax`"))
}

/// Double quantisation of the same `absmax`, by us and as stored. The offset is a mean, whose last bits depend on the order
/// of the sum; a code that differs is right when it is also nearest within those bits.
pub fn check_nested(case: &mut Case, absmax: &[f32], ours: &NestedAbsmax, stored: &NestedAbsmax) {
    let exact: Vec<f64> = absmax.iter().map(|&a| f64::from(a)).collect();
    let no_error = vec![0.0; exact.len()];
    for (who, nested) in [("ours", ours), ("stored", stored)] {
        check_nested_codes(case, "qabsmax", who, nested, &exact, &no_error);
    }
    let same_offset = ours.offset().to_bits() == stored.offset().to_bits();
    if same_offset {
        // A nested block whose scales all equal the offset is stored in two ways that mean the same.
        let empty =
            |block: usize| f64::from(ours.absmax()[block]) < ZERO && f64::from(stored.absmax()[block]) < ZERO;
        // On a value halfway between two of the map torch takes the lower one, CUDA (and we) the even one.
        let tie = |i: usize| {
            let (low, high) = (ours.q()[i].min(stored.q()[i]), ours.q()[i].max(stored.q()[i]));
            let halfway = DYNAMIC_MAP[usize::from(low)].midpoint(DYNAMIC_MAP[usize::from(high)]);
            let (value, scale) = (absmax[i] - ours.offset(), stored.absmax()[i / ours.blocksize()]);
            high - low == 1 && (value / scale == halfway || value * scale.recip() == halfway)
        };
        let except = |i: usize| empty(i / ours.blocksize()) || tie(i);
        case.bits_except("qabsmax", 1, ours.q(), stored.q(), except);
        let bytes = |n: &NestedAbsmax| bytemuck::cast_slice::<f32, u8>(n.absmax()).to_vec();
        case.bits_except("nested_absmax", 4, &bytes(ours), &bytes(stored), empty);
    }
}

/// Every 8-bit code is that of the value of the map that is nearest to its scale; scales are known to within `error`.
fn check_nested_codes(
    case: &mut Case,
    what: &str,
    who: &str,
    nested: &NestedAbsmax,
    absmax: &[f64],
    error: &[f64],
) {
    let (n, largest) = (absmax.len(), largest(absmax));
    let mean = absmax.iter().sum::<f64>() / n as f64;
    let offset = f64::from(nested.offset());
    case.close(&format!("{what} ({who}: offset)"), &[offset], &[mean], |_| {
        bounds::mean(n, largest) + self::largest(error)
    });

    let centred: Vec<f64> = absmax.iter().map(|a| a - offset).collect();
    let rounding = bounds::single(largest + offset.abs());
    let scales: Vec<f64> = centred.chunks(nested.blocksize()).map(self::largest).collect();
    let stored: Vec<f64> = nested.absmax().iter().map(|&a| f64::from(a)).collect();
    case.close(&format!("{what} ({who}: nested_absmax)"), &stored, &scales, |b| {
        rounding + ZERO + self::largest(error.chunks(nested.blocksize()).nth(b).unwrap_or(&[]))
    });
    let map: Vec<f64> = nested.map().iter().map(|&v| f64::from(v)).collect();
    let tolerance = |i: usize| error[i] + rounding;
    check_nearest(
        case,
        &format!("{what} ({who})"),
        &map,
        nested.q(),
        &centred,
        |i| stored[i / nested.blocksize()],
        tolerance,
    );
}

/// `matrix` is a quantisation of `target`, whose elements are known to within `error`: each scale is the largest magnitude of
/// its block, each code that of the nearest value. Two such matrices may differ, and only where an element lies on a threshold.
pub fn check_quantised(
    case: &mut Case,
    what: &str,
    who: &str,
    matrix: &Nf4Matrix,
    target: &[f64],
    error: &[f64],
) {
    let blocksize = matrix.blocksize();
    let scales: Vec<f64> = target.chunks(blocksize).map(largest).collect();
    let scale_errors: Vec<f64> = error.chunks(blocksize).map(largest).collect();
    match matrix.absmax() {
        Absmax::Plain(absmax) => {
            let absmax: Vec<f64> = absmax.iter().map(|&a| f64::from(a)).collect();
            let bound = |b: usize| scale_errors[b] + bounds::single(scales[b]) + ZERO;
            case.close(&format!("{what} ({who}: absmax)"), &absmax, &scales, bound);
        }
        Absmax::Nested(nested) => check_nested_codes(case, what, who, nested, &scales, &scale_errors),
    }
    let values: Vec<f64> = matrix.codebook().values().iter().map(|&v| f64::from(v)).collect();
    let tolerance =
        |i: usize| error[i] + scale_errors[i / blocksize] + bounds::single(3.0 * scales[i / blocksize]);
    let codes = codes(matrix.packed(), target.len());
    check_nearest(
        case,
        &format!("{what} ({who})"),
        &values,
        &codes,
        target,
        |i| scales[i / blocksize],
        tolerance,
    );
}

/// Each `code[i]` is that of the value, of `values` ascending, for which `value * scale(i)` is nearest to `target[i]`; up to
/// `tolerance(i)` beyond the halfway points to its neighbours.
fn check_nearest(
    case: &mut Case,
    what: &str,
    values: &[f64],
    codes: &[u8],
    target: &[f64],
    scale: impl Fn(usize) -> f64,
    tolerance: impl Fn(usize) -> f64,
) {
    case.equal(what, codes.len(), target.len());
    let beyond = |i: usize| {
        let (code, scale) = (usize::from(codes[i]), scale(i));
        if scale < ZERO {
            return 0.0;
        }
        let halfway = |low: usize| scale * (values[low] + values[low + 1]) / 2.0;
        let below = if code == 0 { 0.0 } else { halfway(code - 1) - target[i] };
        let above = if code + 1 == values.len() { 0.0 } else { target[i] - halfway(code) };
        below.max(above).max(0.0)
    };
    let describe = |i: usize| format!("code {} for {:e} of at most {:e}", codes[i], target[i], scale(i));
    case.within(what, codes.len().min(target.len()), |i| (beyond(i), tolerance(i)), describe);
}

/// The elements' bytes are those that the sidecar's sha256 stands for.
pub fn check_sha256(case: &mut Case, what: &str, ours: &Tensor, wanted: &str) {
    case.equal(what, sha256(ours.as_bytes()).as_str(), wanted);
}

/// The largest magnitude.
fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, v| v.abs().max(largest))
}

#[cfg(test)]
mod tests {
    use super::super::report::Report;
    use super::*;

    #[test]
    fn either_code_of_a_tie() {
        // 134 is 11 below the mean: -0.55 of the largest, halfway between two values of the map.
        let absmax = [146.0, 125.0, 152.0, 132.0, 156.0, 134.0, 150.0, 165.0];
        let ours = lora_kernels::nf4::nest(&absmax);
        for (code, passes) in [(0x1f, true), (0x20, true), (0x1e, false), (0x21, false)] {
            let mut q = ours.q().to_vec();
            q[5] = code;
            let (map, offset) = (Box::new(DYNAMIC_MAP), ours.offset());
            let stored = NestedAbsmax::from_parts(q, ours.absmax().to_vec(), map, offset, NESTED_BLOCKSIZE);
            let mut report = Report::default();
            report.case("file", "case", |case| {
                check_nested(case, &absmax, &ours, &stored?);
                Ok(())
            });
            assert_eq!(report.is_good(), passes, "{code:#x}");
        }
    }
}
