//! What a merged weight has of the adapters that went into it: the sums of a [`MergeReport`].
//!
//! [`merge`](super::merge) and [`nf4_merge`](super::nf4_merge) write what they are told to. Whether that is worth keeping, above all in 4 bits, is
//! seen by comparing both weights, and decided on the host: a merge goes into buffers of its own, this call reads the weight and them,
//! and once the caller has waited for the sums, [`Plan::report`] and [`MergeReport::require`] say what is left. So the original is
//! there until the decision, and is what an unmerge without loss goes back to. It takes scales as they are stored at last, so it comes
//! after [`absmax_quantize`](super::absmax_quantize).
//!
//! `t`, the merged element before it is stored, is formed again in f32, bit for bit as [`merge`](super::merge) and
//! [`nf4_merge`](super::nf4_merge) form it; the wanted change is `t - W`. Sums are in f64, in an order that depends on the shape alone: two
//! launches, without atomics.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, find, read_only};
use super::deltas::{Deltas, Tiles, UpdateView, row_scale, rows_are_aligned};
use super::nf4::{AbsmaxView, Nf4View, Weight};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::adapter::MergeReport;
use crate::nf4::{block_count, check_blocksize, packed_len};
use crate::{DType, Element, Error, Result};

const FINISH: Kernel = Kernel::new::<Params>("merge_report", "merge_report_finish");

pub(super) const KERNELS: &[Kernel] = &[
    Kernel::new::<Params>("merge_report", "merge_report_sum_f32_f32"),
    Kernel::new::<Params>("merge_report", "merge_report_sum_f16_f16"),
    Kernel::new::<Params>("merge_report", "merge_report_sum_bf16_bf16"),
    Kernel::new::<Params>("merge_report", "merge_report_sum_nf4_f32"),
    Kernel::new::<Params>("merge_report", "merge_report_sum_nf4_f16"),
    Kernel::new::<Params>("merge_report", "merge_report_sum_nf4_bf16"),
    Kernel::new::<Params>("merge_report", "merge_report_sum_nf4_nf4"),
    FINISH,
];

const THREADS: u32 = 256;

/// `Params` of `merge_report.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    dense: u64,
    merged_dense: u64,
    weight: Weight,
    merged: Weight,
    row_scale: u64,
    tiles: u64,
    total: u64,
    rows: u32,
    columns: u32,
    transposed: u32,
    vectors: u32,
    merged_vectors: u32,
    column_tiles: u32,
    tile_count: u32,
    padding: u32,
    deltas: Deltas,
}

const _: () = assert!(size_of::<Params>() == 528);

/// What the kernels add, with `W` the weight, `D` the wanted change and `R` the realised one. [`Plan::report`] makes a [`MergeReport`]
/// of it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
pub struct Sums {
    /// `<W, W>`.
    pub weight: f64,
    /// `<D, D>`.
    pub wanted: f64,
    /// `<R, D>`.
    pub kept: f64,
    /// `<R - D, R - D>`.
    pub error: f64,
    /// Elements, or codes of a 4-bit weight, that are not what they would be without the adapters.
    pub changed: u64,
    /// Such bytes, those of scales included.
    pub changed_bytes: u64,
}

/// The types of both weights in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// Both have elements of this type.
    Dense(DType),
    /// The weight is 4-bit, the merged one dense.
    Nf4ToDense {
        /// Elements per block.
        blocksize: usize,
        /// Codes are rounded to this type when they are read: that of the quant_state, as PEFT does it.
        dtype: DType,
        /// The type of the merged weight.
        merged: DType,
    },
    /// Both are 4-bit, with the same codebook.
    Nf4 {
        /// Elements per block.
        blocksize: usize,
        /// As above, of both.
        dtype: DType,
        /// Scales per block of double quantisation; none where scales are plain.
        nested: Option<usize>,
    },
}

/// What is to be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Whether dense weights are stored `[k, n]` and not `[n, k]`. The factors are not.
    pub fan_in_fan_out: bool,
    /// The types of both weights in memory.
    pub storage: Storage,
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
    /// The kernels, in order.
    pub kernels: [Kernel; 2],
    /// Blocks of threads of the first, one for 64 x 128 elements; the second has one, and runs even where there are no elements.
    pub blocks: u32,
    across: u32,
}

/// Chooses the kernels and the grid.
///
/// # Errors
/// [`Error::Argument`] for a block size that the format does not know, `fan_in_fan_out` with a 4-bit weight, or sizes of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    dimension("n", shape.n)?;
    dimension("k", shape.k)?;
    let entry = match shape.storage {
        Storage::Dense(dtype) => format!("merge_report_sum_{dtype}_{dtype}"),
        Storage::Nf4ToDense { merged, .. } => format!("merge_report_sum_nf4_{merged}"),
        Storage::Nf4 { .. } => "merge_report_sum_nf4_nf4".to_owned(),
    };
    if let Storage::Nf4ToDense { blocksize, .. } | Storage::Nf4 { blocksize, .. } = shape.storage {
        check_blocksize("blocksize", blocksize)?;
        if shape.fan_in_fan_out {
            return Err(Error::argument("fan_in_fan_out", "false for a 4-bit weight", true));
        }
    }
    let (rows, columns) = shape.stored();
    let tiles = Tiles::over(rows, columns)?;
    let blocks = blocks("n * k", tiles.blocks.into())?;
    Ok(Plan(Details {
        shape: *shape,
        kernels: [find(KERNELS, &entry), FINISH],
        blocks,
        across: tiles.across,
    }))
}

impl Shape {
    /// Rows and columns as stored.
    fn stored(&self) -> (usize, usize) {
        if self.fan_in_fan_out { (self.k, self.n) } else { (self.n, self.k) }
    }
}

impl Plan {
    /// Bytes of scratch that a run wants.
    pub fn workspace_bytes(&self) -> usize {
        self.blocks as usize * size_of::<Sums>()
    }

    /// Compares a dense `merged` with `weight`, both `[n, k]` (`[k, n]` with `fan_in_fan_out`) and aligned to 16 bytes. `workspace` is
    /// [`Plan::workspace_bytes`] long; it and `sums` `[1]` are aligned to 8.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, more than [`MAX_DELTAS`](super::MAX_DELTAS) adapters or a scaling
    /// that is not finite; [`Error::Device`] when a launch fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        weight: View<'_, T>,
        merged: View<'_, T>,
        update: &UpdateView<'_, A>,
        workspace: ViewMut<'_, u8>,
        sums: ViewMut<'_, Sums>,
    ) -> Result<()> {
        let Shape { n, k, storage, .. } = self.shape;
        if storage != Storage::Dense(T::DTYPE) {
            return Err(Error::argument("weight", format!("{storage:?}"), T::DTYPE));
        }
        weight.check("weight", n * k, 16, queue.properties())?;
        let vectors = u32::from(rows_are_aligned(self.shape.stored().1, T::DTYPE));
        let params = Params { dense: weight.address(), vectors, ..Params::zeroed() };
        self.launch_dense(queue, params, merged, update, workspace, sums)
    }

    /// As [`Plan::run`], of a 4-bit weight that was merged into a dense one.
    ///
    /// # Errors
    /// As [`Plan::run`].
    pub fn run_nf4_dense<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        weight: &Nf4View<'_>,
        merged: View<'_, T>,
        update: &UpdateView<'_, A>,
        workspace: ViewMut<'_, u8>,
        sums: ViewMut<'_, Sums>,
    ) -> Result<()> {
        let Storage::Nf4ToDense { blocksize, dtype, merged: into } = self.shape.storage else {
            return Err(Error::argument("weight", format!("{:?}", self.shape.storage), "codes"));
        };
        if into != T::DTYPE {
            return Err(Error::argument("merged", into.name(), T::DTYPE));
        }
        let weight = self.codes("weight", weight, blocksize, dtype, queue)?;
        self.launch_dense(queue, Params { weight, ..Params::zeroed() }, merged, update, workspace, sums)
    }

    /// As [`Plan::run`], of a 4-bit weight that was merged into another one.
    ///
    /// # Errors
    /// As [`Plan::run`], and for codebooks, or kinds of scales, that are not the same.
    pub fn run_nf4<A: Element>(
        &self,
        queue: &dyn Queue,
        weight: &Nf4View<'_>,
        merged: &Nf4View<'_>,
        update: &UpdateView<'_, A>,
        workspace: ViewMut<'_, u8>,
        sums: ViewMut<'_, Sums>,
    ) -> Result<()> {
        let Storage::Nf4 { blocksize, dtype, nested } = self.shape.storage else {
            return Err(Error::argument("weight", format!("{:?}", self.shape.storage), "codes"));
        };
        for (argument, view) in [("weight", weight), ("merged", merged)] {
            let nesting = match &view.absmax {
                AbsmaxView::Plain(_) => None,
                AbsmaxView::Nested(nested) => Some(nested.blocksize),
            };
            if nesting != nested {
                let (wanted, got) = (format!("nested by {nested:?}"), format!("{nesting:?}"));
                return Err(Error::argument(format!("{argument}.absmax"), wanted, got));
            }
        }
        if merged.codebook != weight.codebook {
            return Err(Error::argument("merged.codebook", "that of the weight", "another"));
        }
        let weight = self.codes("weight", weight, blocksize, dtype, queue)?;
        let merged = self.codes("merged", merged, blocksize, dtype, queue)?;
        self.launch(queue, Params { weight, merged, ..Params::zeroed() }, update, workspace, sums)
    }

    /// The report of a run with these sums. Elements that are infinite or NaN make these so: [`MergeReport::require`] refuses that.
    pub fn report(&self, sums: &Sums) -> MergeReport {
        let elements = self.shape.n * self.shape.k;
        let bytes = match self.shape.storage {
            Storage::Dense(dtype) | Storage::Nf4ToDense { merged: dtype, .. } => elements * dtype.size(),
            Storage::Nf4 { blocksize, nested, .. } => {
                let scales = block_count(elements, blocksize);
                // An index each, their own scales, and the offset.
                let nested = nested.map(|blocksize| scales + 4 * block_count(scales, blocksize) + 4);
                packed_len(elements) + nested.unwrap_or(4 * scales)
            }
        };
        let Sums { weight, wanted, kept, error, changed, changed_bytes } = *sums;
        let (elements, bytes) = (elements as u64, bytes as u64);
        MergeReport { elements, changed, bytes, changed_bytes, weight, wanted, kept, error }
    }

    /// Checks a 4-bit weight, and gives what kernels are told of it.
    fn codes(
        &self,
        argument: &str,
        view: &Nf4View<'_>,
        blocksize: usize,
        dtype: DType,
        queue: &dyn Queue,
    ) -> Result<Weight> {
        if view.blocksize != blocksize {
            let wanted = blocksize.to_string();
            return Err(Error::argument(format!("{argument}.blocksize"), wanted, view.blocksize));
        }
        view.check(argument, self.shape.n * self.shape.k, queue.properties())?;
        Ok(Weight::new(view, dtype))
    }

    /// The weight is checked, and in `params`.
    fn launch_dense<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        params: Params,
        merged: View<'_, T>,
        update: &UpdateView<'_, A>,
        workspace: ViewMut<'_, u8>,
        sums: ViewMut<'_, Sums>,
    ) -> Result<()> {
        merged.check("merged", self.shape.n * self.shape.k, 16, queue.properties())?;
        let merged_vectors = u32::from(rows_are_aligned(self.shape.stored().1, T::DTYPE));
        let params = Params { merged_dense: merged.address(), merged_vectors, ..params };
        self.launch(queue, params, update, workspace, sums)
    }

    /// Both weights are checked, and in `params`.
    fn launch<A: Element>(
        &self,
        queue: &dyn Queue,
        params: Params,
        update: &UpdateView<'_, A>,
        workspace: ViewMut<'_, u8>,
        sums: ViewMut<'_, Sums>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { n, k, fan_in_fan_out, .. } = self.shape;
        let deltas = Deltas::new(update.adapters, [n, k], device)?;
        let row_scale = row_scale(update.row_scale, n, device)?;
        workspace.check("workspace", self.workspace_bytes(), 8, device)?;
        sums.check("sums", 1, 8, device)?;
        let (rows, columns) = self.shape.stored();
        let params = Params {
            row_scale,
            tiles: workspace.address(),
            total: sums.address(),
            rows: rows as u32,
            columns: columns as u32,
            transposed: u32::from(fan_in_fan_out),
            column_tiles: self.across,
            tile_count: self.blocks,
            deltas,
            ..params
        };
        for (kernel, blocks) in
            self.kernels.into_iter().zip([self.blocks, 1]).filter(|(_, blocks)| *blocks > 0)
        {
            let launch = Launch {
                kernel,
                grid: [blocks, 1, 1],
                block: [THREADS, 1, 1],
                shared_bytes: 0,
                params: bytemuck::bytes_of(&params),
                overlap: false,
            };
            // SAFETY: the views cover what the kernels read and write, as checked above and by the callers, and those that are
            // written are borrowed alone. The second launch reads what the first has written: a queue keeps their order.
            unsafe { queue.launch(&launch)? };
        }
        Ok(())
    }
}
