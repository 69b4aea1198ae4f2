//! The products of blocks of four warps that [`matmul`](mod@super::matmul) and [`matmul_transposed`](mod@super::matmul_transposed)
//! have: their tiles, and what these take by a model.

use super::Properties;
use super::matmul::{Tile, WeightFormat};
use super::prefill::Side;
use super::rounds::{self, Cost, Machine, Work};

/// Threads of a block, its outputs, and the elements of a sum that it takes at a time.
pub(super) const THREADS: u32 = 128;
const OUTPUTS: usize = 128;
const STEP: usize = 64;

/// What runs a shape in the least time by the model.
pub(super) struct Choice {
    pub tile: Tile,
    /// Blocks that share a sum.
    pub splits: usize,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// What it takes, with the clock of an A100 or, on Hopper, of an H200.
    pub nanoseconds: f64,
}

/// How a tile of W is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    pub codes: bool,
    /// Rows in pieces of 16 bytes.
    pub vectors: bool,
}

impl Format {
    pub(super) fn new(weight: WeightFormat, vectors: bool) -> Self {
        Self { codes: weight != WeightFormat::Dense, vectors }
    }
}

/// For `tokens` by `outputs` sums of `length` products.
pub(super) fn choose(
    tokens: usize,
    outputs: usize,
    length: usize,
    format: Format,
    side: Side,
    device: &Properties,
) -> Choice {
    let multiprocessors = device.sm_count.max(1) as usize;
    let work = Work {
        tokens,
        columns: outputs.div_ceil(OUTPUTS),
        outputs,
        slices: length.div_ceil(STEP),
        weight_bytes: weight_bytes(outputs, length, format.codes),
    };
    let (bytes, clock) = if device.capability == (9, 0) { (BYTES_H200, 1.755) } else { (BYTES, 1.41) };
    let machine = Machine {
        multiprocessors,
        bytes: bytes * multiprocessors as f64,
        finish: FINISH * clock,
        sums: bytes / 8.0 * multiprocessors as f64,
    };
    let costs: Vec<Cost> =
        issues(format, side).iter().map(|&(tokens, issue)| cost(tokens, issue, format, device)).collect();
    let (cost, splits, clocks) = rounds::fastest(&work, &machine, &costs);
    Choice { splits, nanoseconds: clocks / clock, ..with_tile(cost.tokens, format) }
}

/// A tile of so many tokens, without splits.
pub(super) fn with_tile(tokens: usize, format: Format) -> Choice {
    Choice {
        tile: Tile { tokens, rows: OUTPUTS, step: STEP },
        splits: 1,
        shared_bytes: shared_bytes(tokens, format),
        nanoseconds: 0.0,
    }
}

/// What a stage and the end hold is spelled out in `multiply_block` of block_product.cuh.
fn shared_bytes(tokens: usize, format: Format) -> u32 {
    let pipeline = stages(format) * (tokens * STEP * 2 + OUTPUTS * row_bytes(format));
    let staging = tokens * (OUTPUTS + 4) * size_of::<f32>();
    pipeline.max(staging) as u32
}

/// Slices that shared memory holds, of which one is multiplied while the others come.
fn stages(format: Format) -> usize {
    match format {
        Format { vectors: false, .. } => 1,
        Format { codes: true, .. } => 4,
        Format { codes: false, .. } => 3,
    }
}

/// Bytes of a row of a tile of W.
fn row_bytes(format: Format) -> usize {
    if format.codes && format.vectors { STEP / 2 } else { STEP * 2 }
}

/// Whether a multiprocessor has room for two blocks; one takes a KiB besides.
fn two_fit(shared_bytes: u32, device: &Properties) -> bool {
    2 * (shared_bytes + 1024) <= device.max_shared_bytes + 1024
}

fn weight_bytes(outputs: usize, length: usize, codes: bool) -> u64 {
    let numel = outputs as u64 * length as u64;
    if codes { numel / 2 + numel / 16 } else { numel * 2 }
}

/// What a slice of 128 outputs by 64 takes in clocks, of the schedulers (`issue`), of the tensor cores (eight for each token) or of L2, whichever
/// is the longest.
///
/// Three things in this are assumed. Instructions take half as long again as their number: so it was with the prototypes of `prefill`, that
/// have two warps for each scheduler as well as two blocks here have (510 clocks for 340, see `kernels/SASS.md`). A block that
/// has a multiprocessor for itself, with one warp for each scheduler, decodes while none of its products is under way. And a slice takes
/// [`LATENCY`] from memory, so that a block gets no more in that time than the slices that are on their way together.
fn cost(tokens: usize, issue: u32, format: Format, device: &Properties) -> Cost {
    let (issue, tensor) = (1.5 * f64::from(issue), (8 * tokens) as f64);
    let l2 = (tokens * STEP * 2 + OUTPUTS * row_bytes(format)) as f64 / L2_BYTES;
    let both = issue.max(tensor).max(l2);
    let alone = if format.codes { (issue + tensor).max(l2) } else { both };
    let memory = LATENCY / (stages(format) - 1).max(1) as f64;
    let (both, alone) = (both.max(memory / 2.0), alone.max(memory));
    Cost {
        tokens,
        start: 0.0, // the same for all
        alone,
        shared: if two_fit(shared_bytes(tokens, format), device) { both } else { alone },
        end: 18.0 * tokens as f64, // instructions that the emulator counts besides the loop
    }
}

/// Bytes that memory delivers to a multiprocessor of an A100 in a clock: 1.555 TB/s for 108 at 1.41 GHz; and to one of an H200: copies of
/// 4.3 TB/s for 132 at 1.755 GHz.
const BYTES: f64 = 10.2;
const BYTES_H200: f64 = 18.6;

/// Clocks from asking memory for something to having it, while much is asked for. Without load an A100 needs 466 (arXiv:2402.13499);
/// twice that is assumed.
const LATENCY: f64 = 932.0;

/// What its L2 delivers to each: 5120 bytes in a clock for 108 (NVIDIA A100 Tensor Core GPU Architecture, 2020).
const L2_BYTES: f64 = 47.0;

/// What the launch costs that adds the parts of split sums, in nanoseconds, as assumed in [`prefill`](super::prefill). Besides, parts
/// are written and read, eight bytes each.
const FINISH: f64 = 2500.0;

/// Clocks that the schedulers need for a slice's instructions, by tokens of the tile: `issue` of `kernels/SASS.md`, for 8192 weights. Of
/// rows that are not whole pieces, what the emulator counts.
fn issues(format: Format, side: Side) -> &'static [(usize, u32)] {
    match (side, format.codes, format.vectors) {
        (Side::Rows, true, true) => &[(128, 611), (64, 495), (32, 434), (16, 408)],
        (Side::Rows, false, true) => &[(128, 281), (64, 180), (32, 130), (16, 106)],
        (Side::Columns, true, true) => &[(128, 627), (64, 509), (16, 389)],
        (Side::Columns, false, true) => &[(128, 297), (64, 197), (16, 114)],
        (_, true, false) => &[(64, 2369)],
        (_, false, false) => &[(64, 2308)],
    }
}
