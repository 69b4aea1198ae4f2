//! The products of warpgroups that [`matmul`](mod@super::matmul) and [`matmul_transposed`](mod@super::matmul_transposed) have on
//! Hopper: their tiles, and what they are told.

use bytemuck::{Pod, Zeroable};

use super::matmul::{Params, Shape, Tile, WeightFormat};
use super::rounds::{self, Cost, Machine, Work};
use super::{EncodedMap, Properties, Queue, Swizzle, TensorMap, dropout};
use crate::Result;

/// Threads of a block.
pub(super) const THREADS: u32 = 384;

/// Outputs of a block, and elements of a sum that it takes at a time.
const OUTPUTS: usize = 128;
const STEP: usize = 64;

/// What W's outputs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Its rows; sums are over its columns.
    Rows,
    /// Its columns; sums are over its rows.
    Columns,
}

/// `PrefillParams` of `prefill.cuh`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct PrefillParams {
    x: EncodedMap,
    w: EncodedMap,
    product: Params,
    dropout: dropout::Params,
    padding: [u64; 1],
}

impl PrefillParams {
    /// `shape` is that of the product with W's rows, `product` that of this one.
    pub(super) fn new(
        queue: &dyn Queue,
        shape: &Shape,
        tile: &Tile,
        side: Side,
        product: Params,
        dropout: dropout::Params,
    ) -> Result<Self> {
        let Shape { tokens, n, k, weight, .. } = *shape;
        let matrix = |address, [rows, columns]: [usize; 2], element_bytes, box_dims: [u32; 2], swizzle| {
            queue.encode(&TensorMap {
                address,
                element_bytes,
                dims: &[columns as u64, rows as u64],
                strides: &[(columns * element_bytes) as u64],
                box_dims: &box_dims,
                swizzle,
            })
        };
        let (outputs, step) = (OUTPUTS as u32, STEP as u32);
        let x = matrix(
            product.x,
            [tokens, product.k as usize],
            2,
            [step, tile.tokens as u32],
            Swizzle::Bytes128,
        )?;
        let (elements, codes, data) = ([n, k], [n, k / 2], product.weight.data);
        let w = match (weight, side) {
            (WeightFormat::Dense, Side::Rows) => {
                matrix(data, elements, 2, [step, outputs], Swizzle::Bytes128)?
            }
            (WeightFormat::Dense, Side::Columns) => {
                matrix(data, elements, 2, [outputs / 2, step], Swizzle::Bytes128)?
            }
            (WeightFormat::Nf4 { .. }, Side::Rows) => {
                matrix(data, codes, 1, [step / 2, outputs], Swizzle::Bytes32)?
            }
            (WeightFormat::Nf4 { .. }, Side::Columns) => {
                matrix(data, codes, 1, [outputs / 2, step], Swizzle::Bytes64)?
            }
        };
        Ok(Self { x, w, product, dropout, padding: [0] })
    }
}

/// What runs a shape in the least time by the table.
pub(super) struct Choice {
    pub tile: Tile,
    /// Blocks that share a sum.
    pub splits: usize,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// What it takes, on an H200.
    pub nanoseconds: f64,
}

/// For `tokens` by `outputs` sums of `length` products.
pub(super) fn choose(
    tokens: usize,
    outputs: usize,
    length: usize,
    codes: bool,
    device: &Properties,
) -> Choice {
    let work = Work {
        tokens,
        columns: outputs.div_ceil(OUTPUTS),
        outputs,
        slices: length.div_ceil(STEP),
        weight_bytes: 0, // what was measured had to read them
    };
    let machine = Machine {
        multiprocessors: device.sm_count.max(1) as usize,
        bytes: f64::INFINITY,
        finish: FINISH,
        sums: SUMS,
    };
    let (cost, splits, nanoseconds) = rounds::fastest(&work, &machine, if codes { &NF4 } else { &DENSE });
    // What a stage and the rest hold is spelled out in `Layout` of prefill.cuh.
    let stages = match cost.tokens {
        64 => 8,
        128 => 6,
        _ => 4,
    };
    let stage = cost.tokens * STEP * 2 + OUTPUTS * if codes { STEP / 2 + 8 } else { STEP * 2 };
    let table = if codes { 64 << 10 } else { 0 };
    Choice {
        tile: Tile { tokens: cost.tokens, rows: OUTPUTS, step: STEP },
        splits,
        shared_bytes: (stages * (stage + 16) + table + 8 * 1024 + cost.tokens * 4) as u32,
        nanoseconds,
    }
}

/// What a tile takes on an H200, in nanoseconds: a launch with one for every block, but for its slices, and 64 elements of the sum. (By rows.
/// That columns take as long is assumed: their loops have as many instructions, see `kernels/SASS.md`.)
const fn measured(tokens: usize, start: u32, slice: u32) -> Cost {
    Cost { tokens, start: start as f64, alone: slice as f64, shared: slice as f64, end: 0.0 }
}

/// Lines through the times of `hmul_t64`, `hmul_t128`, `hmul_t256_j4` at 256 tokens and 4096 rows, k = 4096 and 14336, in
/// `benches/results/2026-11-27-nvidia-h200-prefill.json`.
const NF4: [Cost; 3] = [measured(64, 4600, 289), measured(128, 5300, 372), measured(256, 6800, 571)];

/// The same through `dense_t64`, `dense_t128`, `dense_t256`.
const DENSE: [Cost; 3] = [measured(64, 1800, 258), measured(128, 4500, 291), measured(256, 5500, 574)];

/// What splits cost besides, in nanoseconds: measured were sums shared by two blocks of a cluster, 2 to 3 microseconds. Here
/// a second kernel adds them; that it takes as long, and moves 500 sums in a nanosecond, is assumed.
const FINISH: f64 = 2500.0;
const SUMS: f64 = 500.0;
