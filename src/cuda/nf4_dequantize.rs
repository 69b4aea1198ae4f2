//! 4-bit codes to f32, f16 or bf16: `round_T(value[code] * absmax)`, an f32 product and one rounding.
//!
//! Flat: rows have no meaning, and any number of elements will do. It reads 0.5 bytes per element and the absmax, and
//! writes the element: memory bandwidth is the limit.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, find, read_only};
use super::nf4::{Absmax, Nf4View, Values};
use super::{Kernel, Launch, Properties, Queue, ViewMut};
use crate::nf4::check_blocksize;
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("nf4_dequantize", "nf4_dequantize_f32"),
    Kernel::new::<Params>("nf4_dequantize", "nf4_dequantize_f16"),
    Kernel::new::<Params>("nf4_dequantize", "nf4_dequantize_bf16"),
];

const THREADS: u32 = 256;

/// Elements that a block of threads decodes.
const TILE: usize = 8192;

/// `Params` of `nf4_dequantize.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    packed: u64,
    out: u64,
    numel: u64,
    absmax: Absmax,
    codebook: Values,
    block_shift: u32,
    padding: u32,
}

const _: () = assert!(size_of::<Params>() == 144);

/// What is to be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many elements.
    pub numel: usize,
    /// Elements per block.
    pub blocksize: usize,
    /// The type to decode to.
    pub dtype: DType,
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
    /// The kernel; none where there are no elements.
    pub kernel: Option<Kernel>,
    /// Blocks of threads.
    pub blocks: u32,
}

/// Chooses the kernel and the grid.
///
/// # Errors
/// [`Error::Argument`] for a block size that the format does not know, or more than 2^44 elements.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    check_blocksize("blocksize", shape.blocksize)?;
    let kernel = (shape.numel > 0).then(|| find(KERNELS, &format!("nf4_dequantize_{}", shape.dtype)));
    Ok(Plan(Details { shape: *shape, kernel, blocks: blocks("numel", shape.numel.div_ceil(TILE) as u64)? }))
}

impl Plan {
    /// Decodes `weight` into `out` `[numel]`. Where `out` is aligned to 16 bytes, it is written in pieces of 16 bytes;
    /// elsewhere element by element.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, [`Error::Device`] when the launch fails.
    pub fn run<T: Element>(
        &self,
        queue: &dyn Queue,
        weight: &Nf4View<'_>,
        out: ViewMut<'_, T>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { numel, blocksize, dtype } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("out", dtype.name(), T::DTYPE));
        }
        if weight.blocksize != blocksize {
            return Err(Error::argument("weight.blocksize", blocksize.to_string(), weight.blocksize));
        }
        weight.check("weight", numel, device)?;
        out.check("out", numel, size_of::<T>() as u64, device)?;
        let Some(kernel) = self.kernel else { return Ok(()) };
        let params = Params {
            packed: weight.packed.address(),
            out: out.address(),
            numel: numel as u64,
            absmax: weight.absmax.params(),
            codebook: weight.values(),
            block_shift: weight.block_shift(),
            padding: 0,
        };
        let launch = Launch {
            kernel,
            grid: [self.blocks, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: false,
        };
        // SAFETY: the views cover what the kernel reads and writes, as checked above, and `out` is borrowed alone.
        unsafe { queue.launch(&launch) }
    }
}
