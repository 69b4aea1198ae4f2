//! `y = row_scale ⊙ (x Wᵀ + v Bᵀ) + bias`: the product of a linear layer, with W dense or in 4 bits, the low-rank branch of
//! every token's adapter, DoRA's scale and the bias in one go.
//!
//! [`plan`] chooses among five kernels and says what it chose:
//!
//! | kernel | for | how |
//! |---|---|---|
//! | `decode` | on Hopper, 4-bit W, 16-bit x, up to 16 tokens, k a multiple of 64, blocks of 64 or more | tensor cores; codes are looked up in pairs, absmax scales the sums; a block stays on its multiprocessor, where four warps fetch W for eight that multiply |
//! | `skinny` | the same elsewhere | the same sums, with a block for each tile |
//! | `matvec` | up to 8 tokens of all else; f32 x with any number of tokens | f32 products |
//! | `prefill` | on Hopper, 16-bit x from 17 tokens on, rows of whole 16 bytes | products of warpgroups; codes are decoded to the registers that these read |
//! | `matmul` | the rest: 16-bit x from 9 tokens on | tensor cores, tiles of 128 outputs |
//!
//! `prefill` has run in the emulator only. Its design, without what followed (`benches/results`, *prefill*), was timed on an
//! H200 as prototypes: from 256 tokens on 0.76 to 1.03 times the speed of cuBLAS with a 16-bit weight (a dense W 0.81 to 1.06),
//! and faster than dequantising and cuBLAS at every shape. The tile and the number of splits follow from those times; in `matmul` from the
//! instructions of `kernels/SASS.md`, as clocks of an A100. Of all tiles by all splits a plan has what takes least by that model.
//!
//! Where it takes less by that model, there are two passes: W in 4 bits is dequantised to the workspace and then multiplied as a dense one
//! (`Plan::dequantize`). That is so where rows of codes are not whole pieces of 16 bytes but rows of elements are (k a multiple of 8, not of
//! 32), and for some W of few rows on devices that are not Hopper, whose small tiles would decode it again and again. In all other
//! plans no copy of W is made.
//!
//! `decode` leaves its sums in the workspace where there are adapters, and `decode_finish` adds their branch. Where few rows of W
//! would leave multiprocessors idle, the blocks of a cluster share its sums over k and add them in shared memory.
//!
//! Sums over k are f32, in an order that the plan fixes: the same plan gives the same bits, and a token's outputs do not
//! depend on the other tokens. Where a grid would leave much of the device idle, blocks share a sum (`Plan::splits()`); but for
//! those of `decode` they leave their parts in the workspace, and a second kernel adds those in their order. What W is rounded to before it is multiplied
//! is `Plan::rounding()`. At the end comes one fused multiply-add with `row_scale` and `bias`, and one rounding to y's type.
//!
//! `v Bᵀ` has exact products in `decode`, `skinny`, `matvec` and `matmul`, of bf16 that v and B are cut into, and f32 sums. In `prefill`, v
//! and B are taken as sums of two bf16 (an f16 or bf16 B is one exactly), which errs by less than 2⁻¹⁴ of `|v| |B|`: an eighth
//! of the rounding of an f16 y, a 64th of a bf16 one.

use bytemuck::{Pod, Zeroable};

use super::adapter_table::LowRankParams;
use super::block_product::{self, Format};
use super::check::{blocks, dimension, find, read_only};
use super::nf4::{Absmax, Values};
use super::prefill::{self, PrefillParams, Side};
use super::{
    Kernel, Launch, LowRank, Nf4View, Properties, Queue, Target, View, ViewMut, dropout, nf4_dequantize,
    two_passes,
};
use crate::nf4::check_blocksize;
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    matvec("matvec_nf4_f32_t1"),
    matvec("matvec_nf4_f32_t4"),
    matvec("matvec_nf4_f32_t8"),
    matvec("matvec_nf4_f32_t1_ragged"),
    matvec("matvec_nf4_f32_t4_ragged"),
    matvec("matvec_nf4_f16_t1"),
    matvec("matvec_nf4_f16_t4"),
    matvec("matvec_nf4_f16_t8"),
    matvec("matvec_nf4_f16_t1_ragged"),
    matvec("matvec_nf4_f16_t4_ragged"),
    matvec("matvec_nf4_bf16_t1"),
    matvec("matvec_nf4_bf16_t4"),
    matvec("matvec_nf4_bf16_t8"),
    matvec("matvec_nf4_bf16_t1_ragged"),
    matvec("matvec_nf4_bf16_t4_ragged"),
    matvec("matvec_dense_f32_t1"),
    matvec("matvec_dense_f32_t4"),
    matvec("matvec_dense_f32_t8"),
    matvec("matvec_dense_f32_t1_ragged"),
    matvec("matvec_dense_f32_t4_ragged"),
    matvec("matvec_dense_f16_t1"),
    matvec("matvec_dense_f16_t4"),
    matvec("matvec_dense_f16_t8"),
    matvec("matvec_dense_f16_t1_ragged"),
    matvec("matvec_dense_f16_t4_ragged"),
    matvec("matvec_dense_bf16_t1"),
    matvec("matvec_dense_bf16_t4"),
    matvec("matvec_dense_bf16_t8"),
    matvec("matvec_dense_bf16_t1_ragged"),
    matvec("matvec_dense_bf16_t4_ragged"),
    matmul("matmul_nf4_f16_t16"),
    matmul("matmul_nf4_f16_t32"),
    matmul("matmul_nf4_f16_t64"),
    matmul("matmul_nf4_f16_t128"),
    matmul("matmul_nf4_f16_t64_ragged"),
    matmul("matmul_nf4_bf16_t16"),
    matmul("matmul_nf4_bf16_t32"),
    matmul("matmul_nf4_bf16_t64"),
    matmul("matmul_nf4_bf16_t128"),
    matmul("matmul_nf4_bf16_t64_ragged"),
    matmul("matmul_dense_f16_t16"),
    matmul("matmul_dense_f16_t32"),
    matmul("matmul_dense_f16_t64"),
    matmul("matmul_dense_f16_t128"),
    matmul("matmul_dense_f16_t64_ragged"),
    matmul("matmul_dense_bf16_t16"),
    matmul("matmul_dense_bf16_t32"),
    matmul("matmul_dense_bf16_t64"),
    matmul("matmul_dense_bf16_t128"),
    matmul("matmul_dense_bf16_t64_ragged"),
    skinny("skinny_nf4_f16_t8"),
    skinny("skinny_nf4_f16_t16"),
    skinny("skinny_nf4_bf16_t8"),
    skinny("skinny_nf4_bf16_t16"),
    prefill("prefill_nf4_f16_t64"),
    prefill("prefill_nf4_f16_t128"),
    prefill("prefill_nf4_f16_t256"),
    prefill("prefill_nf4_bf16_t64"),
    prefill("prefill_nf4_bf16_t128"),
    prefill("prefill_nf4_bf16_t256"),
    prefill("prefill_dense_f16_t64"),
    prefill("prefill_dense_f16_t128"),
    prefill("prefill_dense_f16_t256"),
    prefill("prefill_dense_bf16_t64"),
    prefill("prefill_dense_bf16_t128"),
    prefill("prefill_dense_bf16_t256"),
    decode("decode_nf4_f16_t8"),
    decode("decode_nf4_f16_t16"),
    decode("decode_nf4_bf16_t8"),
    decode("decode_nf4_bf16_t16"),
    decode("decode_nf4_f16_t8_split").in_clusters(),
    decode("decode_nf4_f16_t16_split").in_clusters(),
    decode("decode_nf4_bf16_t8_split").in_clusters(),
    decode("decode_nf4_bf16_t16_split").in_clusters(),
    decode("decode_finish_f16_t8"),
    decode("decode_finish_f16_t16"),
    decode("decode_finish_bf16_t8"),
    decode("decode_finish_bf16_t16"),
    matmul("matmul_finish_f32"),
    matmul("matmul_finish_f16"),
    matmul("matmul_finish_bf16"),
];

const fn matvec(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("matvec", entry)
}

const fn matmul(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("matmul", entry)
}

const fn prefill(entry: &'static str) -> Kernel {
    Kernel::new::<PrefillParams>("prefill", entry)
}

const fn decode(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("decode", entry)
}

const fn skinny(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("skinny", entry)
}

/// Elements of k that one step of a kernel takes.
const MATVEC_STEP: usize = 1024;
const SKINNY_STEP: usize = 512;
const DECODE_STEP: usize = 1024;

/// Elements of k that `skinny` and `decode` scale at a time.
const SLICE: usize = 64;

/// Threads of `matmul_finish`, one output each.
pub(super) const FINISH_THREADS: usize = 128;

/// Blocks that a cluster of `decode` has at most, as on any device.
const MOST_BLOCKS: usize = 8;

/// Threads of `decode_finish`, and the rows of W that a block of it has.
const DECODE_FINISH: (u32, usize) = (256, 64);

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightFormat {
    /// Elements of x's type.
    Dense,
    /// 4-bit codes.
    Nf4 {
        /// Elements per block.
        blocksize: usize,
    },
}

impl WeightFormat {
    /// Whether rows of k elements, and of x of type `dtype`, can be read in pieces of 16 bytes.
    pub(super) const fn has_vectors(self, k: usize, dtype: DType) -> bool {
        k.is_multiple_of(match self {
            WeightFormat::Nf4 { .. } => 32,
            WeightFormat::Dense => 16 / dtype.size(),
        })
    }

    /// Whether rows of k elements are codes in slices with one absmax each, for `skinny` and `decode`.
    pub(super) const fn has_one_absmax(self, k: usize) -> bool {
        matches!(self, WeightFormat::Nf4 { blocksize: SLICE.. }) && k.is_multiple_of(SLICE)
    }
}

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of x and y.
    pub tokens: usize,
    /// Rows of W, columns of y.
    pub n: usize,
    /// Columns of x and W.
    pub k: usize,
    /// The type of x, y, the bias and a dense W.
    pub dtype: DType,
    /// How W is stored.
    pub weight: WeightFormat,
}

/// A block's share of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// Tokens.
    pub tokens: usize,
    /// Rows of W.
    pub rows: usize,
    /// Elements of k at a time.
    pub step: usize,
}

/// What a weight is when it is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// The stored number. Of codes: `value * absmax` in f32, one rounding.
    Exact,
    /// Codes: `value * absmax` in f32, rounded to x's type: what [`nf4_dequantize`] gives.
    ToInput,
    /// Codes: `value` rounded to f16, `* absmax` in f32, rounded to x's type. Off by at most 2⁻¹¹ of the weight (and, of a value
    /// below 2⁻¹⁴ of the codebook's largest, 2⁻²⁵ of that) before the last rounding.
    Half,
    /// Codes: `value` rounded to x's type; the sum of each 64 products is then multiplied by absmax in f32.
    Value,
}

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// What makes a 16-bit copy of a 4-bit W, in the workspace, which the kernel multiplies then: two passes, where these take less by the
    /// model. The copy has what [`nf4_dequantize`] gives.
    pub dequantize: Option<nf4_dequantize::Plan>,
    /// The kernel; none where y has no elements.
    pub kernel: Option<Kernel>,
    /// The kernel that adds the parts of split sums or, with `decode`, which adds them itself, the low-rank branch where there is one.
    pub finish: Option<Kernel>,
    /// Share of one block.
    pub tile: Tile,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Blocks that share a sum over k. Above 1, a second kernel adds their parts; those of `decode` are added by the first block of
    /// their cluster.
    pub splits: usize,
    /// What W is rounded to.
    pub rounding: Rounding,
    /// Whether rows of x and W are read in pieces of 16 bytes. Otherwise ("ragged": k is not a multiple of 32 for codes, of
    /// the elements in 16 bytes for dense W) x is read element by element, and W in pieces that are not aligned to its rows.
    pub vectors: bool,
    /// Device memory that [`Plan::run`] wants to be lent.
    pub workspace_bytes: usize,
}

/// The weight, `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a, T> {
    /// Elements, aligned to 16 bytes.
    Dense(View<'a, T>),
    /// 4-bit codes of the flattened matrix; blocks may begin in one row and end in the next.
    Nf4(Nf4View<'a>),
}

/// What a product may have besides x and W. The default is nothing.
#[derive(Debug)]
pub struct Extras<'a, T, A = T> {
    /// `[n]`, added at the end (not scaled by `row_scale`).
    pub bias: Option<View<'a, T>>,
    /// `[n]`: DoRA's `magnitude / norm`.
    pub row_scale: Option<View<'a, f32>>,
    /// The adapters and what [`lora_shrink`](super::lora_shrink) made of x.
    pub low_rank: Option<LowRank<'a, A>>,
    /// The product may start while the work before it in the queue still runs (`decode`: programmatic dependent launch; for
    /// the other kernels nothing changes). W and its absmax are then read early: they must not be what that work, or work
    /// before it that also overlaps, writes. Everything else is waited for.
    pub overlap: bool,
}

impl<T, A> Default for Extras<'_, T, A> {
    fn default() -> Self {
        Self { bias: None, row_scale: None, low_rank: None, overlap: false }
    }
}

/// `Params` of `product.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Params {
    pub x: u64,
    pub weight: WeightParams,
    pub branch: LowRankParams,
    pub output: Output,
    pub tokens: u32,
    pub n: u32,
    pub k: u32,
    pub splits: u32,
}

/// `Weight` of `product.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct WeightParams {
    pub data: u64,
    absmax: Absmax,
    codebook: Values,
    block_shift: u32,
    padding: u32,
}

impl WeightParams {
    /// Elements, from this address on.
    pub(super) fn dense(data: u64) -> Self {
        Self { data, ..Self::zeroed() }
    }
}

/// `Output` of `epilogue.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Output {
    pub y: u64,
    pub bias: u64,
    pub row_scale: u64,
    pub partial: u64,
}

const _: () = assert!(size_of::<Params>() == 224);

/// Chooses the kernel, its tile, the grid and the number of splits.
///
/// # Errors
/// [`Error::Argument`] for a block size that the format does not know, or sizes or a grid of 2^31 and above.
pub fn plan(shape: &Shape, device: &Properties) -> Result<Plan> {
    let Shape { tokens, n, k, dtype, weight } = *shape;
    dimension("tokens", tokens)?;
    dimension("n", n)?;
    dimension("k", k)?;
    if let WeightFormat::Nf4 { blocksize } = weight {
        check_blocksize("weight.blocksize", blocksize)?;
    }
    let hopper = Target::for_capability(device.capability)? == Target::Compute90a;
    let (mut choice, mut operand) = (Choice::new(shape, hopper, device), *shape);
    // Where `prefill` reads codes, a copy never took less when both were measured (`benches/results`, *prefill*).
    if let Some(one) = choice.nanoseconds.filter(|_| choice.name != "prefill") {
        let copy = two_passes::of_copy(shape);
        let of_copy = Choice::new(&copy, hopper, device);
        if of_copy.nanoseconds.is_some_and(|two| two_passes::take_less(shape, device, one, two)) {
            (choice, operand) = (Choice { rounding: Rounding::ToInput, ..of_copy }, copy);
        }
    }
    let dequantize = if operand == *shape { None } else { Some(two_passes::plan(shape, device)?) };
    let Choice { name, tile, threads, shared_bytes, rounding, grid, .. } = choice;

    let tiles = tokens.div_ceil(tile.tokens) as u64 * n.div_ceil(tile.rows) as u64;
    let splits = match grid {
        Grid::Units { splits } | Grid::Rows { splits } | Grid::Tiles { splits: Some(splits) } => splits,
        Grid::Tiles { splits: None } => splits(tiles, k.div_ceil(tile.step), u64::from(device.sm_count)),
    };
    let kind = if operand.weight == WeightFormat::Dense { "dense" } else { "nf4" };
    let vectors = operand.weight.has_vectors(k, dtype);
    let variant = match grid {
        Grid::Rows { splits: 2.. } => "_split",
        _ if !vectors => "_ragged",
        _ => "",
    };
    let entry = format!("{name}_{kind}_{dtype}_t{}{variant}", tile.tokens);
    let parts = match grid {
        // `decode` needs it for products with adapters.
        Grid::Rows { .. } => tokens * n * size_of::<f32>(),
        _ if splits > 1 => splits * tokens * n * size_of::<f32>(),
        _ => 0,
    };
    Ok(Plan(Details {
        shape: *shape,
        kernel: (tiles > 0).then(|| find(KERNELS, &entry)),
        finish: match grid {
            Grid::Rows { .. } if tiles > 0 => {
                Some(find(KERNELS, &format!("decode_finish_{dtype}_t{}", tile.tokens)))
            }
            _ => (splits > 1).then(|| find(KERNELS, &format!("matmul_finish_{dtype}"))),
        },
        tile,
        grid: match grid {
            Grid::Tiles { .. } => [blocks("tokens * n", tiles)?, splits as u32, 1],
            Grid::Units { .. } => [blocks("tokens * n", tiles * splits as u64)?.min(device.sm_count), 1, 1],
            Grid::Rows { .. } => [blocks("n", tiles)?.min(device.sm_count / splits as u32), splits as u32, 1],
        },
        threads,
        shared_bytes,
        splits,
        rounding,
        vectors,
        workspace_bytes: parts + if dequantize.is_some() { two_passes::bytes(shape) } else { 0 },
        dequantize,
    }))
}

/// What the kernels have to say to a plan.
pub(super) struct Choice {
    pub name: &'static str,
    pub tile: Tile,
    pub threads: u32,
    pub shared_bytes: u32,
    pub rounding: Rounding,
    grid: Grid,
    /// What it takes by the model, where there is one.
    nanoseconds: Option<f64>,
}

/// How blocks find their work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grid {
    /// One for every tile and split: so many splits, or as many as make a block for each multiprocessor.
    Tiles { splits: Option<usize> },
    /// No more than the device runs at once. They go through all tiles and splits.
    Units { splits: usize },
    /// No more than the device runs at once. They go through all tiles of rows; or `splits` of them, a cluster, have one.
    Rows { splits: usize },
}

impl Choice {
    fn new(shape: &Shape, hopper: bool, device: &Properties) -> Self {
        let Shape { tokens, k, dtype, weight, .. } = *shape;
        let (vectors, one_absmax) = (weight.has_vectors(k, dtype), weight.has_one_absmax(k));
        if dtype == DType::F32 || k == 0 {
            Self::matvec(shape, vectors)
        } else if tokens <= 16 && one_absmax {
            if hopper { Self::decode(shape, device) } else { Self::skinny(tokens) }
        } else if tokens <= 8 {
            Self::matvec(shape, vectors)
        } else if tokens > 16 && vectors && hopper {
            Self::prefill(shape, device)
        } else {
            Self::matmul(shape, vectors, device)
        }
    }

    fn decode(shape: &Shape, device: &Properties) -> Self {
        const ROWS: usize = 16;
        // Clusters fit into groups of multiprocessors with a common path to each other, mostly 16 or 18: powers of two, without a rest.
        let (tiles, steps) = (shape.n.div_ceil(ROWS).max(1), shape.k.div_ceil(DECODE_STEP));
        let room = device.sm_count as usize / MOST_BLOCKS * MOST_BLOCKS;
        let splits = [8, 4, 2, 1].into_iter().find(|&splits| splits * tiles <= room && splits < 2 * steps);
        let splits = splits.unwrap_or(1);
        // What a stage and the rest hold is spelled out in `Layout` of decode.cu.
        let (tokens, slices, stages) = if shape.tokens <= 8 { (8, 64, 3) } else { (16, 32, 6) };
        let stage = ROWS * (slices * (SLICE / 2) + 32 + slices * 4 + 16);
        let (table, sums) = (32 << 10, tokens * ROWS * 4);
        // Of eight warps for four tiles, twice; or of eight warps, and of the other blocks.
        let sums = if splits == 1 { 2 * 8 * 4 * sums } else { (8 + MOST_BLOCKS - 1) * sums + 8 };
        Self {
            name: "decode",
            tile: Tile { tokens, rows: ROWS, step: DECODE_STEP },
            threads: 384,
            shared_bytes: (table + stages * (stage + 16) + sums) as u32,
            rounding: Rounding::Value,
            grid: Grid::Rows { splits },
            nanoseconds: None,
        }
    }

    /// For so many tokens, up to 16.
    pub(super) fn skinny(tokens: usize) -> Self {
        let tokens = if tokens <= 8 { 8 } else { 16 };
        Self {
            name: "skinny",
            tile: Tile { tokens, rows: 32, step: SKINNY_STEP },
            threads: 256,
            // 32 KiB of pairs, and six stages of 512 by 32 codes.
            shared_bytes: 80 << 10,
            rounding: Rounding::Value,
            grid: Grid::Tiles { splits: None },
            nanoseconds: None,
        }
    }

    fn matvec(shape: &Shape, vectors: bool) -> Self {
        let tokens = match shape.tokens {
            0..=1 => 1,
            5.. if vectors => 8,
            _ => 4,
        };
        Self {
            name: "matvec",
            tile: Tile { tokens, rows: 32, step: MATVEC_STEP },
            threads: 256,
            shared_bytes: 0,
            rounding: Rounding::Exact,
            grid: Grid::Tiles { splits: None },
            nanoseconds: None,
        }
    }

    fn matmul(shape: &Shape, vectors: bool, device: &Properties) -> Self {
        let Shape { tokens, n, k, weight, .. } = *shape;
        let format = Format::new(weight, vectors);
        Self::of_blocks(block_product::choose(tokens, n, k, format, Side::Rows, device), weight)
    }

    /// `matmul` with tiles of so many tokens.
    pub(super) fn matmul_with(tokens: usize, weight: WeightFormat, vectors: bool) -> Self {
        Self::of_blocks(block_product::with_tile(tokens, Format::new(weight, vectors)), weight)
    }

    fn of_blocks(choice: block_product::Choice, weight: WeightFormat) -> Self {
        Self {
            name: "matmul",
            tile: choice.tile,
            threads: block_product::THREADS,
            shared_bytes: choice.shared_bytes,
            rounding: if weight == WeightFormat::Dense { Rounding::Exact } else { Rounding::ToInput },
            grid: Grid::Tiles { splits: Some(choice.splits) },
            nanoseconds: Some(choice.nanoseconds),
        }
    }

    fn prefill(shape: &Shape, device: &Properties) -> Self {
        let Shape { tokens, n, k, weight, .. } = *shape;
        let codes = weight != WeightFormat::Dense;
        let prefill::Choice { tile, splits, shared_bytes, nanoseconds } =
            prefill::choose(tokens, n, k, codes, device);
        Self {
            name: "prefill",
            tile,
            threads: prefill::THREADS,
            shared_bytes,
            rounding: if codes { Rounding::Half } else { Rounding::Exact },
            grid: Grid::Units { splits },
            nanoseconds: Some(nanoseconds),
        }
    }
}

/// Blocks that share a sum of `steps` steps, so that `tiles` tiles make up to `blocks` blocks. None is without steps.
pub(super) fn splits(tiles: u64, steps: usize, blocks: u64) -> usize {
    let most = (blocks.checked_div(tiles).unwrap_or(1) as usize).clamp(1, steps.max(1));
    steps.div_ceil(steps.div_ceil(most).max(1)).max(1)
}

impl Plan {
    /// Computes `y` `[tokens, n]` from `x` `[tokens, k]`; both, and a dense W, are aligned to 16 bytes. `workspace` has
    /// `Plan::workspace_bytes()` or more, aligned to 16; what it holds does not matter, before or after.
    ///
    /// # Errors
    /// [`Error::Argument`] for views or adapters that are not as the plan's shape says, [`Error::Device`] when a launch
    /// fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        x: View<'_, T>,
        weight: &Weight<'_, T>,
        extras: &Extras<'_, T, A>,
        y: ViewMut<'_, T>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { tokens, n, k, dtype, .. } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("x", dtype.name(), T::DTYPE));
        }
        x.check("x", tokens * k, 16, device)?;
        y.check("y", tokens * n, 16, device)?;
        workspace.check_at_least("workspace", self.workspace_bytes, 16, device)?;
        let copy_bytes = if self.dequantize.is_some() { two_passes::bytes(&self.shape) } else { 0 };
        let decode = self.kernel.is_some_and(|kernel| kernel.module == "decode");
        let in_parts = if decode { extras.low_rank.is_some() } else { self.splits > 1 };
        let mut params = Params {
            x: x.address(),
            weight: weight_params(&self.shape, weight, device)?,
            branch: match &extras.low_rank {
                Some(branch) => branch.params(dtype, tokens, n, device)?,
                None => LowRankParams::zeroed(),
            },
            output: Output {
                y: y.address(),
                bias: optional("bias", &extras.bias, n, device)?,
                row_scale: optional("row_scale", &extras.row_scale, n, device)?,
                partial: if in_parts { workspace.address() + copy_bytes as u64 } else { 0 },
            },
            tokens: tokens as u32,
            n: n as u32,
            k: k as u32,
            splits: self.splits as u32,
        };
        let Some(kernel) = self.kernel else { return Ok(()) };
        let mut operand = self.shape;
        if let Some(dequantize) = &self.dequantize {
            operand = two_passes::of_copy(&operand);
            params.weight = two_passes::run(dequantize, queue, weight, &workspace)?;
        }
        let prefill;
        let launch = Launch {
            kernel,
            grid: self.grid,
            block: [self.threads, 1, 1],
            shared_bytes: self.shared_bytes,
            params: if kernel.module == "prefill" {
                let dropout = dropout::Params::zeroed();
                prefill = PrefillParams::new(queue, &operand, &self.tile, Side::Rows, params, dropout)?;
                bytemuck::bytes_of(&prefill)
            } else {
                bytemuck::bytes_of(&params)
            },
            overlap: decode && extras.overlap,
        };
        // SAFETY: the views cover what the kernel reads and writes: all were checked above, the adapters' factors when
        // their table was made; they are borrowed, so they live until the caller lets go of them.
        unsafe { queue.launch(&launch)? };
        let Some(kernel) = self.finish.filter(|_| in_parts) else { return Ok(()) };
        let (threads, tiles) = if decode {
            (DECODE_FINISH.0, n.div_ceil(DECODE_FINISH.1))
        } else {
            (FINISH_THREADS as u32, (tokens * n).div_ceil(FINISH_THREADS))
        };
        let finish = Launch {
            kernel,
            grid: [blocks("tokens * n", tiles as u64)?, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            // `decode_finish` waits before it reads anything.
            overlap: decode,
        };
        // SAFETY: as above; the workspace has room for the parts of all splits, which the first kernel has written.
        unsafe { queue.launch(&finish) }
    }
}

/// The address of a row vector that may be absent.
pub(super) fn optional<T: Element>(
    argument: &str,
    view: &Option<View<'_, T>>,
    n: usize,
    device: &Properties,
) -> Result<u64> {
    let Some(view) = view else { return Ok(0) };
    view.check(argument, n, size_of::<T>() as u64, device)?;
    Ok(view.address())
}

/// Checks W of a product of `shape` and says where it is.
pub(super) fn weight_params<T: Element>(
    shape: &Shape,
    weight: &Weight<'_, T>,
    device: &Properties,
) -> Result<WeightParams> {
    let numel = shape.n * shape.k;
    match (weight, shape.weight) {
        (Weight::Dense(data), WeightFormat::Dense) => {
            data.check("weight", numel, 16, device)?;
            Ok(WeightParams::dense(data.address()))
        }
        (Weight::Nf4(nf4), WeightFormat::Nf4 { blocksize }) => {
            if nf4.blocksize != blocksize {
                return Err(Error::argument("weight.blocksize", blocksize.to_string(), nf4.blocksize));
            }
            nf4.check("weight", numel, device)?;
            Ok(WeightParams {
                data: nf4.packed.address(),
                absmax: nf4.absmax.params(),
                codebook: nf4.values(),
                block_shift: nf4.block_shift(),
                padding: 0,
            })
        }
        (Weight::Dense(_), WeightFormat::Nf4 { .. }) => {
            Err(Error::argument("weight", "4-bit codes", "dense"))
        }
        (Weight::Nf4(_), WeightFormat::Dense) => Err(Error::argument("weight", "dense", "4-bit codes")),
    }
}
