//! A merged weight to 4-bit codes again, without losing what was merged into it: the scales and roundings of
//! [`Requantize`](crate::adapter::Requantize). Bit for bit what [`cpu::nf4_requantize_scales`](crate::cpu::nf4_requantize_scales) and
//! [`cpu::nf4_requantize`](crate::cpu::nf4_requantize()) do.
//!
//! [`nf4_merge`](super::nf4_merge) encodes on its way, by the largest magnitude and to the nearest value. For anything else it writes the merged
//! elements as f32, and these calls go on from there: [`Plan::run_scales`] searches plain scales, which
//! [`absmax_quantize`](super::absmax_quantize) may make nested ones of; then [`Plan::run_codes`] encodes by the scales that will be stored. As
//! blocks and panels are rounded by themselves, a large weight can be taken in slabs of rows, so that there is no f32 copy of the whole:
//! rows that are a multiple of [`Details::panel_rows`] give the bits of the whole, but that a seed counts from the slab's first element.
//! [`merge_report`](super::merge_report) tells what is left.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, find, read_only};
use super::nf4::{Absmax, AbsmaxView, Encoder, Nf4View, Weight};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::adapter::{Grid, Rounding, SHARES, gain_bits, panel_len};
use crate::nf4::{block_count, check_blocksize, packed_len};
use crate::{DType, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("nf4_requantize", "nf4_requantize_scale"),
    Kernel::new::<Params>("nf4_requantize", "nf4_requantize_codes"),
    Kernel::new::<Params>("nf4_requantize", "nf4_requantize_gain"),
];

const THREADS: u32 = 256;
const GAIN_THREADS: u32 = 512;

/// Blocks of weights that a block of threads searches the scales of: one a warp.
const SCALES: usize = 8;

/// Elements that a block of threads encodes.
const TILE: usize = 2048;

/// `Params` of `nf4_requantize.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    before: Weight,
    wanted: u64,
    absmax: Absmax,
    scales: u64,
    packed: u64,
    encoder: Encoder,
    values: [f32; 16],
    shares: [f32; 12],
    numel: u64,
    seed: u64,
    panel: u64,
    stochastic: u32,
    gain_bits: u32,
}

const _: () = assert!(size_of::<Params>() == 416);

/// What is to be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Elements per block.
    pub blocksize: usize,
    /// The weight before the merge is rounded to this type: that of the quant_state.
    pub dtype: DType,
    /// Which code an element takes.
    pub rounding: Rounding,
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
    /// The kernels for scales and for codes; none where the weight has no elements.
    pub kernels: Option<[Kernel; 2]>,
    /// Blocks of threads of each.
    pub blocks: [u32; 2],
    /// Rows that are rounded together by [`Rounding::KeepGain`].
    pub panel_rows: usize,
    panel: usize,
}

/// Chooses the kernels and the grids.
///
/// # Errors
/// [`Error::Argument`] for a block size that the format does not know, or sizes of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    let Shape { n, k, blocksize, rounding, .. } = *shape;
    check_blocksize("blocksize", blocksize)?;
    dimension("n", n)?;
    dimension("k", k)?;
    let (numel, panel) = (n * k, panel_len(k, blocksize));
    let (entry, per_block) = match rounding {
        Rounding::KeepGain => ("nf4_requantize_gain", panel),
        Rounding::Nearest | Rounding::Stochastic { .. } => ("nf4_requantize_codes", TILE),
    };
    let scales = block_count(numel, blocksize).div_ceil(SCALES);
    let kernels = ["nf4_requantize_scale", entry].map(|entry| find(KERNELS, entry));
    Ok(Plan(Details {
        shape: *shape,
        kernels: (numel > 0).then_some(kernels),
        blocks: [blocks("n * k", scales as u64)?, blocks("n * k", numel.div_ceil(per_block) as u64)?],
        panel_rows: panel.div_ceil(k.max(1)),
        panel,
    }))
}

impl Plan {
    /// Writes the scale with the least squared error of each block of `wanted` `[n, k]`, aligned to 16 bytes, to `absmax`
    /// `[ceil(n * k / blocksize)]`. `before` is the weight before the merge, whose own scales are tried too.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says; [`Error::Device`] when the launch fails.
    pub fn run_scales(
        &self,
        queue: &dyn Queue,
        before: &Nf4View<'_>,
        wanted: View<'_, f32>,
        absmax: ViewMut<'_, f32>,
    ) -> Result<()> {
        let params = self.params(queue, before, wanted)?;
        absmax.check("absmax", block_count(wanted.len(), self.shape.blocksize), 4, queue.properties())?;
        self.launch(queue, 0, THREADS, &Params { scales: absmax.address(), ..params })
    }

    /// Writes the codes of `wanted` `[n, k]`, aligned to 16 bytes, by the scales `absmax` that they will be decoded with, to `packed`
    /// `[ceil(n * k / 2)]`, aligned to 16 bytes. The delta that [`Rounding::KeepGain`] keeps is `wanted - before`.
    ///
    /// # Errors
    /// As [`Plan::run_scales`].
    pub fn run_codes(
        &self,
        queue: &dyn Queue,
        before: &Nf4View<'_>,
        wanted: View<'_, f32>,
        absmax: AbsmaxView<'_>,
        packed: ViewMut<'_, u8>,
    ) -> Result<()> {
        let params = self.params(queue, before, wanted)?;
        let device = queue.properties();
        absmax.check(block_count(wanted.len(), self.shape.blocksize), device)?;
        packed.check("packed", packed_len(wanted.len()), 16, device)?;
        let threads = if self.shape.rounding == Rounding::KeepGain { GAIN_THREADS } else { THREADS };
        self.launch(
            queue,
            1,
            threads,
            &Params { absmax: absmax.params(), packed: packed.address(), ..params },
        )
    }

    /// Checks what both calls read.
    fn params(&self, queue: &dyn Queue, before: &Nf4View<'_>, wanted: View<'_, f32>) -> Result<Params> {
        let Shape { n, k, blocksize, dtype, rounding } = self.shape;
        if before.blocksize != blocksize {
            return Err(Error::argument("before.blocksize", blocksize.to_string(), before.blocksize));
        }
        before.check("before", n * k, queue.properties())?;
        wanted.check("wanted", n * k, 16, queue.properties())?;
        let (seed, stochastic) = match rounding {
            Rounding::Stochastic { seed } => (seed, 1),
            Rounding::Nearest | Rounding::KeepGain => (0, 0),
        };
        Ok(Params {
            before: Weight::new(before, dtype),
            wanted: wanted.address(),
            encoder: Encoder::new(before.codebook),
            values: Grid::new(before.codebook).values,
            shares: SHARES,
            numel: (n * k) as u64,
            seed,
            panel: self.panel as u64,
            stochastic,
            gain_bits: gain_bits(self.panel),
            ..Params::zeroed()
        })
    }

    /// The views are checked, and in `params`.
    fn launch(&self, queue: &dyn Queue, which: usize, threads: u32, params: &Params) -> Result<()> {
        let Some(kernels) = self.kernels else { return Ok(()) };
        let launch = Launch {
            kernel: kernels[which],
            grid: [self.blocks[which], 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(params),
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes, as checked by the callers, and what it writes is borrowed alone.
        unsafe { queue.launch(&launch) }
    }
}
