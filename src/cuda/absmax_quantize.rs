//! Double quantisation: the f32 absmax of a 4-bit matrix to 8 bits, by the rules of [`nf4::nest`](crate::nf4::nest).
//!
//! The absmax are a 64th of the elements or less, so this is short; two launches, as their mean is needed first.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, read_only};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::Result;
use crate::nf4::{NESTED_BLOCKSIZE, block_count};

const SUM: Kernel = Kernel::new::<Params>("absmax_quantize", "absmax_quantize_sum");
const ENCODE: Kernel = Kernel::new::<Params>("absmax_quantize", "absmax_quantize_encode");

pub(super) const KERNELS: &[Kernel] = &[SUM, ENCODE];

const SUM_THREADS: usize = 1024;
const MAX_SUM_BLOCKS: usize = 64;
const ENCODE_THREADS: usize = 256;

/// `Params` of `absmax_quantize.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    absmax: u64,
    map: u64,
    sums: u64,
    q: u64,
    nested: u64,
    offset: u64,
    count: u64,
    sum_blocks: u32,
    padding: u32,
}

const _: () = assert!(size_of::<Params>() == 64);

/// What [`plan`] has chosen for one count. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// How many absmax there are.
    pub count: usize,
    /// The kernels, in order.
    pub kernels: [Kernel; 2],
    /// Blocks of threads of each.
    pub blocks: [u32; 2],
}

/// What is written: the double-quantised scales, in blocks of [`NESTED_BLOCKSIZE`].
#[derive(Debug)]
pub struct NestedViewMut<'a> {
    /// `[count]`.
    pub q: ViewMut<'a, u8>,
    /// `[ceil(count / 256)]`.
    pub absmax: ViewMut<'a, f32>,
    /// `[1]`: the mean.
    pub offset: ViewMut<'a, f32>,
}

/// Chooses the grids for `count` absmax.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for more than 2^42 absmax.
pub fn plan(count: usize, _device: &Properties) -> Result<Plan> {
    let nested_blocks = block_count(count, NESTED_BLOCKSIZE);
    Ok(Plan(Details {
        count,
        kernels: [SUM, ENCODE],
        blocks: [
            count.div_ceil(SUM_THREADS).clamp(1, MAX_SUM_BLOCKS) as u32,
            blocks("count", nested_blocks.div_ceil(ENCODE_THREADS / 32).max(1) as u64)?,
        ],
    }))
}

impl Plan {
    /// Bytes of scratch that [`Plan::run`] wants.
    pub fn workspace_bytes(&self) -> usize {
        self.blocks[0] as usize * size_of::<f64>()
    }

    /// Quantises `absmax` `[count]` to indexes into `map` `[256]`, ascending values
    /// ([`DYNAMIC_MAP`](crate::nf4::DYNAMIC_MAP)). `workspace` is `Plan::workspace_bytes()` long and aligned to 8.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for views of the wrong length, alignment or device, [`Error::Device`](crate::Error::Device) when a launch fails.
    pub fn run(
        &self,
        queue: &dyn Queue,
        absmax: View<'_, f32>,
        map: View<'_, f32>,
        workspace: ViewMut<'_, u8>,
        out: NestedViewMut<'_>,
    ) -> Result<()> {
        let device = queue.properties();
        absmax.check("absmax", self.count, 4, device)?;
        map.check("map", 256, 4, device)?;
        workspace.check("workspace", self.workspace_bytes(), 8, device)?;
        out.q.check("q", self.count, 1, device)?;
        out.absmax.check("nested", block_count(self.count, NESTED_BLOCKSIZE), 4, device)?;
        out.offset.check("offset", 1, 4, device)?;
        let params = Params {
            absmax: absmax.address(),
            map: map.address(),
            sums: workspace.address(),
            q: out.q.address(),
            nested: out.absmax.address(),
            offset: out.offset.address(),
            count: self.count as u64,
            sum_blocks: self.blocks[0],
            padding: 0,
        };
        for (kernel, (blocks, threads)) in
            self.kernels.into_iter().zip(self.blocks.into_iter().zip([SUM_THREADS, ENCODE_THREADS]))
        {
            let launch = Launch {
                kernel,
                grid: [blocks, 1, 1],
                block: [threads as u32, 1, 1],
                shared_bytes: 0,
                params: bytemuck::bytes_of(&params),
                overlap: false,
            };
            // SAFETY: the views cover what the kernels read and write, as checked above, and those that are written are
            // borrowed alone. The second launch reads what the first has written: a queue keeps their order.
            unsafe { queue.launch(&launch)? };
        }
        Ok(())
    }
}
