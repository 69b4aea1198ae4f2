//! What products of f32 are made of: twelve sums, six rows of two vectors, that stay in registers while factors and vectors are read.

use super::{LANES, Simd, Vector};

/// Rows of a tile: so many sums, and what they are made of, fit into sixteen registers.
pub(crate) const HEIGHT: usize = 6;
/// Columns of a tile.
pub(crate) const WIDTH: usize = 2 * LANES;

/// The columns of a row.
pub(crate) type Wide = [Vector; 2];

/// `sums[r] += factor(r, i, half) * values[i][half]`, in the order of i. To be inlined into what `simd` runs.
#[expect(clippy::needless_range_loop, reason = "compilers unroll loops over numbers, and need to here")]
#[inline(always)]
pub(crate) fn multiply_add<S: Simd, const R: usize>(
    simd: S,
    values: &[Wide],
    factor: impl Fn(usize, usize, usize) -> f32,
    sums: &mut [Wide; R],
) {
    let mut kept = [[simd.zero(); 2]; R];
    for r in 0..R {
        for half in 0..2 {
            kept[r][half] = simd.load(&sums[r][half]);
        }
    }
    for (i, values) in values.iter().enumerate() {
        let values = [simd.load(&values[0]), simd.load(&values[1])];
        for r in 0..R {
            for half in 0..2 {
                kept[r][half] = simd.mul_add(simd.splat(factor(r, i, half)), values[half], kept[r][half]);
            }
        }
    }
    for r in 0..R {
        for half in 0..2 {
            sums[r][half] = simd.store(kept[r][half]);
        }
    }
}

/// Runs `$body` with the constant `$height` equal to a number of rows from 1 to [`HEIGHT`].
macro_rules! with_height {
    ($rows:expr, $height:ident => $body:expr) => {
        match $rows {
            1 => {
                const $height: usize = 1;
                $body
            }
            2 => {
                const $height: usize = 2;
                $body
            }
            3 => {
                const $height: usize = 3;
                $body
            }
            4 => {
                const $height: usize = 4;
                $body
            }
            5 => {
                const $height: usize = 5;
                $body
            }
            6 => {
                const $height: usize = 6;
                $body
            }
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}
pub(crate) use with_height;
