//! f32, f16 or bf16 to 4-bit codes and the absmax of every block, by the rules of [`nf4`](crate::nf4).
//!
//! Flat: rows have no meaning, and any number of elements will do. It reads the elements once and writes 0.5 bytes for
//! each, and the absmax: memory bandwidth is the limit. [`absmax_quantize`](super::absmax_quantize) makes 8 bits of the
//! absmax afterwards.

use bytemuck::{Pod, Zeroable};

use super::check::{find, read_only};
use super::nf4::{Encoder, Nf4ViewMut, Output, Search};
use super::{Kernel, Launch, Properties, Queue, View};
use crate::nf4::{Codebook, check_blocksize};
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("nf4_quantize", "nf4_quantize_f32_binned"),
    Kernel::new::<Params>("nf4_quantize", "nf4_quantize_f32_counting"),
    Kernel::new::<Params>("nf4_quantize", "nf4_quantize_f16_binned"),
    Kernel::new::<Params>("nf4_quantize", "nf4_quantize_f16_counting"),
    Kernel::new::<Params>("nf4_quantize", "nf4_quantize_bf16_binned"),
    Kernel::new::<Params>("nf4_quantize", "nf4_quantize_bf16_counting"),
];

const THREADS: u32 = 256;

/// Elements that a block of threads encodes at a time.
const TILE: usize = 4096;

/// Blocks of threads that an SM has room for, by `__launch_bounds__`.
const RESIDENT: usize = 4;

/// `Params` of `nf4_quantize.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    x: u64,
    output: Output,
    encoder: Encoder,
}

const _: () = assert!(size_of::<Params>() == 112);

/// What is to be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many elements.
    pub numel: usize,
    /// Elements per block: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// The type of the elements.
    pub dtype: DType,
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
    /// How codes are found.
    pub search: Search,
    /// The kernel; none where there are no elements.
    pub kernel: Option<Kernel>,
    /// Blocks of threads; they walk over tiles of 4096 elements.
    pub blocks: u32,
    encoder: Encoder,
}

/// Chooses the kernel and the grid for this codebook.
///
/// # Errors
/// [`Error::Argument`] for a block size that the format does not know.
pub fn plan(shape: &Shape, codebook: &Codebook, device: &Properties) -> Result<Plan> {
    check_blocksize("blocksize", shape.blocksize)?;
    let search = Search::of(codebook);
    let entry = format!("nf4_quantize_{}_{}", shape.dtype, search.name());
    let tiles = shape.numel.div_ceil(TILE);
    Ok(Plan(Details {
        shape: *shape,
        search,
        kernel: (tiles > 0).then(|| find(KERNELS, &entry)),
        blocks: tiles.min(device.sm_count as usize * RESIDENT) as u32,
        encoder: Encoder::new(codebook),
    }))
}

impl Plan {
    /// Encodes `x` `[numel]`. Where `x` is aligned to 16 bytes, it is read in pieces of 16 bytes; elsewhere element by
    /// element.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, [`Error::Device`] when the launch fails.
    pub fn run<T: Element>(&self, queue: &dyn Queue, x: View<'_, T>, out: Nf4ViewMut<'_>) -> Result<()> {
        let device = queue.properties();
        let Shape { numel, blocksize, dtype } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("x", dtype.name(), T::DTYPE));
        }
        x.check("x", numel, size_of::<T>() as u64, device)?;
        out.check(numel, blocksize, device)?;
        let Some(kernel) = self.kernel else { return Ok(()) };
        let params =
            Params { x: x.address(), output: Output::new(&out, numel, blocksize), encoder: self.encoder };
        let launch = Launch {
            kernel,
            grid: [self.blocks, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes, as checked above, and those of `out` are borrowed alone.
        unsafe { queue.launch(&launch) }
    }
}
