//! bitsandbytes' 4-bit format: NF4, FP4, and any other table of sixteen values.
//!
//! A tensor is flattened row-major and cut into blocks of `blocksize` elements; rows have no meaning, and the last block
//! may be short. A block is stored as its largest magnitude (`absmax`, f32) and one 4-bit code per element; two elements
//! share a byte, the first in the high nibble. With an odd number of elements the last low nibble is the code of zero.
//!
//! Double quantisation stores absmax itself in 8 bits ([`NestedAbsmax`]).
//!
//! | block | absmax | codes | decodes to |
//! |---|---|---|---|
//! | ordinary | `max |x|` | nearest value to `x * (1 / absmax)`, ties to the lower one | within half a step |
//! | all zero | 0 | that of zero | zeros |
//! | denormal | `max |x|` | as above (both are first multiplied by 2^64) | within half a step |
//! | NaN or infinity in it | NaN (0x7fc00000) | that of zero | NaN |

mod codebook;
mod dequantize;
mod dynamic_map;
mod matrix;
mod nested;
mod quantize;
mod stacked;

pub use codebook::{Codebook, QuantType};
pub use dequantize::dequantize;
pub use dynamic_map::{DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP};
pub(crate) use dynamic_map::{decode, encode};
pub use matrix::{Nesting, Nf4Matrix};
pub use nested::{Absmax, NESTED_BLOCKSIZE, NestedAbsmax, nest, nest_about};
pub use quantize::quantize;
pub(crate) use quantize::{Coder, largest_magnitude};

use crate::{Error, Result};

/// The block sizes that the format knows.
pub const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Elements that one parallel task works on: a multiple of every block size.
const TASK: usize = 1 << 16;

/// Bytes of packed codes of `numel` elements.
pub const fn packed_len(numel: usize) -> usize {
    numel.div_ceil(2)
}

/// Blocks of `numel` elements.
pub const fn block_count(numel: usize, blocksize: usize) -> usize {
    numel.div_ceil(blocksize)
}

/// Checks that `blocksize` is one of [`BLOCKSIZES`].
///
/// # Errors
/// [`Error::Argument`] naming `argument`.
pub fn check_blocksize(argument: &str, blocksize: usize) -> Result<()> {
    if BLOCKSIZES.contains(&blocksize) {
        return Ok(());
    }
    Err(Error::argument(argument, "a power of two from 32 to 4096", blocksize))
}

/// Checks the length of a slice.
pub(crate) fn check_len(argument: &str, wanted: usize, unit: &str, got: usize) -> Result<()> {
    if wanted == got { Ok(()) } else { Err(Error::argument(argument, format!("{wanted} {unit}"), got)) }
}
