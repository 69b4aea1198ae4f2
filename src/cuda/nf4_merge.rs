//! Adapters into a 4-bit weight in one pass: decode, add, and encode again or store as a dense type. Bit for bit what
//! [`cpu::nf4_merge`](crate::cpu::nf4_merge()) and [`cpu::nf4_merge_dense`](crate::cpu::nf4_merge_dense) do.
//!
//! Encoding again loses most of a small adapter: a change of less than half a step between two codes vanishes. A dense
//! target keeps it, [`nf4_requantize`](super::nf4_requantize) more of it than this, and [`merge_report`](super::merge_report) tells how much,
//! before the original is given up: the output is never the weight itself. The absmax comes out as f32; [`absmax_quantize`](super::absmax_quantize) makes 8 bits of it.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, find, read_only};
use super::deltas::{Deltas, Tiles, UpdateView, row_scale, rows_are_aligned};
use super::nf4::{Encoder, Nf4View, Nf4ViewMut, Output, Search, Weight};
use super::{Kernel, Launch, Properties, Queue, ViewMut};
use crate::nf4::{Codebook, check_blocksize};
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("nf4_merge", "nf4_merge_tiled_binned"),
    Kernel::new::<Params>("nf4_merge", "nf4_merge_tiled_counting"),
    Kernel::new::<Params>("nf4_merge", "nf4_merge_flat"),
    Kernel::new::<Params>("nf4_merge", "nf4_merge_f32"),
    Kernel::new::<Params>("nf4_merge", "nf4_merge_f16"),
    Kernel::new::<Params>("nf4_merge", "nf4_merge_bf16"),
];

const THREADS: u32 = 256;

/// Columns of a tile of weights; a block of 4-bit codes has to lie in one to be encoded from there.
const TILE_COLUMNS: usize = 128;

/// Elements of a flat tile.
const FLAT_TILE: usize = 4096;

/// `Params` of `nf4_merge.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    weight: Weight,
    output: Output,
    encoder: Encoder,
    dense: u64,
    row_scale: u64,
    rows: u32,
    columns: u32,
    column_tiles: u32,
    vectors: u32,
    deltas: Deltas,
}

const _: () = assert!(size_of::<Params>() == 464);

/// What becomes of the merged weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// It is encoded again, with the same block size and codebook.
    Nf4,
    /// It is stored as this type.
    Dense(DType),
}

/// What is to be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Elements per block.
    pub blocksize: usize,
    /// The weight is rounded to this type before anything is added: that of the quant_state, as PEFT does it.
    pub dtype: DType,
    /// What becomes of the merged weight.
    pub target: Target,
}

/// How the work is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Tiles of 64 x 128 weights that share the factors' elements.
    Tiled,
    /// 4096 weights in a row, each of which fetches its own factors' elements: for blocks that are longer than 128 or do
    /// not fit a row evenly. Several times slower.
    Flat,
}

/// What [`plan`] has chosen for one shape and codebook. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// How the work is cut.
    pub method: Method,
    /// How codes are found, where the target is 4-bit.
    pub search: Search,
    /// The kernel; none where the weight has no elements.
    pub kernel: Option<Kernel>,
    /// Blocks of threads.
    pub blocks: u32,
    across: u32,
}

/// Chooses the kernel and the grid for this codebook.
///
/// # Errors
/// [`Error::Argument`] for a block size that the format does not know, or sizes of 2^31 and above.
pub fn plan(shape: &Shape, codebook: &Codebook, _device: &Properties) -> Result<Plan> {
    check_blocksize("blocksize", shape.blocksize)?;
    dimension("n", shape.n)?;
    dimension("k", shape.k)?;
    let tiled = shape.blocksize <= TILE_COLUMNS && shape.k.is_multiple_of(shape.blocksize);
    let (method, search, entry) = match (shape.target, Search::of(codebook)) {
        (Target::Dense(dtype), search) => (Method::Tiled, search, format!("nf4_merge_{dtype}")),
        (Target::Nf4, search) if tiled => {
            (Method::Tiled, search, format!("nf4_merge_tiled_{}", search.name()))
        }
        (Target::Nf4, _) => (Method::Flat, Search::Counting, "nf4_merge_flat".to_owned()),
    };
    let tiles = Tiles::over(shape.n, shape.k)?;
    let blocks = match method {
        Method::Tiled => tiles.blocks,
        Method::Flat => blocks("n * k", (shape.n * shape.k).div_ceil(FLAT_TILE) as u64)?,
    };
    let kernel = (blocks > 0).then(|| find(KERNELS, &entry));
    Ok(Plan(Details { shape: *shape, method, search, kernel, blocks, across: tiles.across }))
}

impl Plan {
    /// Merges into the codes and absmax of `out`, for a plan whose target is [`Target::Nf4`].
    ///
    /// # Errors
    /// [`Error::Argument`] for another target, views that are not as the plan's shape says, a codebook that needs another
    /// kernel than the plan's, more than [`MAX_DELTAS`](super::MAX_DELTAS) adapters or a scaling that is not finite;
    /// [`Error::Device`] when the launch fails.
    pub fn run<A: Element>(
        &self,
        queue: &dyn Queue,
        weight: &Nf4View<'_>,
        update: &UpdateView<'_, A>,
        out: Nf4ViewMut<'_>,
    ) -> Result<()> {
        let Shape { n, k, blocksize, target, .. } = self.shape;
        if target != Target::Nf4 {
            return Err(Error::argument("out", format!("{target:?}"), "codes"));
        }
        if self.search == Search::Binned && Search::of(weight.codebook) != Search::Binned {
            return Err(Error::argument("weight.codebook", "one that is searched as the plan's", "another"));
        }
        out.check(n * k, blocksize, queue.properties())?;
        let output = Output::new(&out, n * k, blocksize);
        self.launch(
            queue,
            weight,
            update,
            Params { output, encoder: Encoder::new(weight.codebook), ..Params::zeroed() },
        )
    }

    /// Merges into `out` `[n, k]`, aligned to 16 bytes, for a plan whose target is [`Target::Dense`].
    ///
    /// # Errors
    /// As [`Plan::run`].
    pub fn run_dense<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        weight: &Nf4View<'_>,
        update: &UpdateView<'_, A>,
        out: ViewMut<'_, T>,
    ) -> Result<()> {
        let Shape { n, k, target, .. } = self.shape;
        if target != Target::Dense(T::DTYPE) {
            return Err(Error::argument("out", format!("{target:?}"), T::DTYPE));
        }
        out.check("out", n * k, 16, queue.properties())?;
        let vectors = u32::from(rows_are_aligned(k, T::DTYPE));
        self.launch(queue, weight, update, Params { dense: out.address(), vectors, ..Params::zeroed() })
    }

    /// The output is checked, and in `params`.
    fn launch<A: Element>(
        &self,
        queue: &dyn Queue,
        weight: &Nf4View<'_>,
        update: &UpdateView<'_, A>,
        params: Params,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { n, k, blocksize, dtype, .. } = self.shape;
        if weight.blocksize != blocksize {
            return Err(Error::argument("weight.blocksize", blocksize.to_string(), weight.blocksize));
        }
        weight.check("weight", n * k, device)?;
        let deltas = Deltas::new(update.adapters, [n, k], device)?;
        let row_scale = row_scale(update.row_scale, n, device)?;
        let Some(kernel) = self.kernel else { return Ok(()) };
        let params = Params {
            weight: Weight::new(weight, dtype),
            row_scale,
            rows: n as u32,
            columns: k as u32,
            column_tiles: self.across,
            deltas,
            ..params
        };
        let launch = Launch {
            kernel,
            grid: [self.blocks, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes, as checked above and by the callers, and what it writes
        // is borrowed alone.
        unsafe { queue.launch(&launch) }
    }
}
