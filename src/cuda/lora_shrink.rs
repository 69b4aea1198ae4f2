//! `v[m] = scaling * x[m] lora_a^T` in f32, with an adapter per token: the first half of the low-rank branch.
//!
//! `v` is `[tokens, v_columns]` with `v_columns` the largest rank, rounded up to a multiple of 4. Row m holds the product
//! with token m's own adapter in its first `rank` columns and zeros behind them: all zeros for a token without an adapter
//! (-1), all NaN for a number that is not an adapter's. Products and sums are f32, `scaling` comes last. The order of the
//! sum depends on k alone, so a token's bits do not depend on what is beside it.

use bytemuck::{Pod, Zeroable};

use super::adapter_table::{Adapters, MAX_RANK, check_adapter_dtype, v_columns};
use super::check::{blocks, dimension, find, read_only};
use super::{AdapterTable, Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("lora_shrink", "lora_shrink_f32_f32_t1"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_f32_f32_t8"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_f16_f16_t1"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_f16_f16_t8"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_f16_f32_t1"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_f16_f32_t8"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_bf16_bf16_t1"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_bf16_bf16_t8"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_bf16_f32_t1"),
    Kernel::new::<Params>("lora_shrink", "lora_shrink_bf16_f32_t8"),
];

const THREADS: u32 = 256;

/// Tokens and rows of lora_a that one block takes.
const TILES: [Tile; 2] = [Tile { tokens: 1, ranks: 2 }, Tile { tokens: 8, ranks: 4 }];

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of x.
    pub tokens: usize,
    /// Columns of x and of every lora_a.
    pub k: usize,
    /// The largest rank of the adapters.
    pub max_rank: usize,
    /// The type of x.
    pub dtype: DType,
    /// The type of the adapters: that of x, or f32.
    pub adapter_dtype: DType,
}

/// A block's share of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// Tokens.
    pub tokens: u32,
    /// Rows of lora_a.
    pub ranks: u32,
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
    /// The kernel; none where v has no elements.
    pub kernel: Option<Kernel>,
    /// Share of one block.
    pub tile: Tile,
    /// Blocks.
    pub grid: [u32; 3],
    /// Whether rows are read in pieces of 16 bytes: k is a multiple of the elements in one. Else element by element.
    pub vectors: bool,
}

/// `Params` of `lora_shrink.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    x: u64,
    v: u64,
    adapters: Adapters,
    tokens: u32,
    k: u32,
    vectors: u32,
    padding: u32,
}

/// Chooses the kernel and the grid.
///
/// # Errors
/// [`Error::Argument`] for a rank above [`MAX_RANK`], an adapter type that does not go with x, or sizes of 2^31 and above.
pub fn plan(shape: &Shape, device: &Properties) -> Result<Plan> {
    dimension("tokens", shape.tokens)?;
    dimension("k", shape.k)?;
    check_adapter_dtype(shape.adapter_dtype, shape.dtype)?;
    if shape.max_rank > MAX_RANK {
        return Err(Error::argument("max_rank", format!("at most {MAX_RANK}"), shape.max_rank));
    }
    let grid = |tile: Tile| {
        [shape.tokens.div_ceil(tile.tokens as usize), v_columns(shape.max_rank).div_ceil(tile.ranks as usize)]
    };
    // The large tile reads x and lora_a less often, where there are enough of them to fill half of the device.
    let large = grid(TILES[1]).iter().product::<usize>() >= device.sm_count as usize / 2;
    let tile = TILES[usize::from(large)];
    let [x, y] = grid(tile);
    let entry = format!("lora_shrink_{}_{}_t{}", shape.dtype, shape.adapter_dtype, tile.tokens);
    Ok(Plan(Details {
        shape: *shape,
        kernel: (x > 0 && y > 0).then(|| find(KERNELS, &entry)),
        tile,
        grid: [blocks("tokens", x as u64)?, y as u32, 1],
        vectors: shape.k.is_multiple_of(16 / shape.dtype.size()),
    }))
}

impl Plan {
    /// Elements of v.
    pub fn v_len(&self) -> usize {
        self.shape.tokens * v_columns(self.shape.max_rank)
    }

    /// Computes `v` `[tokens, v_columns]` from `x` `[tokens, k]`, both aligned to 16 bytes. `index` `[tokens]` names every
    /// token's adapter (-1: none); without it all use adapter 0.
    ///
    /// # Errors
    /// [`Error::Argument`] for views or adapters that are not as the plan's shape says, [`Error::Device`] when the launch
    /// fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        x: View<'_, T>,
        adapters: &AdapterTable<'_, A>,
        index: Option<View<'_, i32>>,
        v: ViewMut<'_, f32>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { tokens, k, max_rank, dtype, adapter_dtype } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("x", dtype.name(), T::DTYPE));
        }
        if A::DTYPE != adapter_dtype {
            return Err(Error::argument("adapters", adapter_dtype.name(), A::DTYPE));
        }
        if adapters.k() != k {
            return Err(Error::argument("adapters.k", k.to_string(), adapters.k()));
        }
        if adapters.max_rank() != max_rank {
            return Err(Error::argument("adapters.max_rank", max_rank.to_string(), adapters.max_rank()));
        }
        x.check("x", tokens * k, 16, device)?;
        v.check("v", self.v_len(), 16, device)?;
        let adapters = adapters.choose(index, tokens, device)?;
        let Some(kernel) = self.kernel else { return Ok(()) };
        let params = Params {
            x: x.address(),
            v: v.address(),
            adapters,
            tokens: tokens as u32,
            k: k as u32,
            vectors: u32::from(self.vectors),
            padding: 0,
        };
        let launch = Launch {
            kernel,
            grid: self.grid,
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes: x, v, the index and the table were checked above, the
        // factors when the table was made; they are borrowed, so they live until the caller lets go of them.
        unsafe { queue.launch(&launch) }
    }
}
