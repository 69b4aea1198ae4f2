//! The adapters that are added to a weight, as `kernels/include/delta.cuh` is told of them.

use bytemuck::{Pod, Zeroable};

use super::check::dimension;
use super::{AdapterView, Properties, View};
use crate::{DType, Element, Error, Result};

/// How many adapters one launch takes.
pub const MAX_DELTAS: usize = 8;

/// What a merge does to a weight of `n` outputs and `k` inputs: `row_scale * (W + sum of scaling * lora_b @ lora_a)`.
#[derive(Debug, Clone, Copy)]
pub struct UpdateView<'a, A> {
    /// Added in this order; at most [`MAX_DELTAS`].
    pub adapters: &'a [AdapterView<'a, A>],
    /// `[n]`: one factor per output, as [`dora_scale`](super::dora_scale) makes it.
    pub row_scale: Option<View<'a, f32>>,
}

/// `Delta` of `delta.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Delta {
    a: u64,
    b: u64,
    rank: u32,
    scaling: f32,
}

/// `Deltas` of `delta.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Deltas {
    item: [Delta; MAX_DELTAS],
    count: u32,
    dtype: u32,
}

const _: () = assert!(size_of::<Deltas>() == 200);

/// `DTypeCode` of `dtype.cuh`.
pub(super) const fn code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }
}

impl Deltas {
    /// Checks `adapters` against a weight of `n` outputs and `k` inputs.
    pub(super) fn new<A: Element>(
        adapters: &[AdapterView<'_, A>],
        [n, k]: [usize; 2],
        device: &Properties,
    ) -> Result<Self> {
        if adapters.len() > MAX_DELTAS {
            return Err(Error::argument("adapters", format!("at most {MAX_DELTAS}"), adapters.len()));
        }
        let mut deltas = Self { dtype: code(A::DTYPE), ..Self::zeroed() };
        for (i, adapter) in adapters.iter().enumerate() {
            let check = || {
                let rank = dimension("rank", adapter.rank)?;
                if !adapter.scaling.is_finite() {
                    return Err(Error::argument("scaling", "a finite number", adapter.scaling));
                }
                let align = size_of::<A>() as u64;
                adapter.lora_a.check("lora_a", adapter.rank * k, align, device)?;
                adapter.lora_b.check("lora_b", n * adapter.rank, align, device)?;
                Ok(rank)
            };
            let rank = check().map_err(|e: Error| e.within(format_args!("adapters[{i}]")))?;
            if rank == 0 {
                continue; // adds nothing
            }
            let (a, b) = (adapter.lora_a.address(), adapter.lora_b.address());
            deltas.item[deltas.count as usize] = Delta { a, b, rank, scaling: adapter.scaling };
            deltas.count += 1;
        }
        Ok(deltas)
    }
}

/// Checks a row scale, and gives its address; 0 without one.
pub(super) fn row_scale(row_scale: Option<View<'_, f32>>, n: usize, device: &Properties) -> Result<u64> {
    let Some(row_scale) = row_scale else { return Ok(0) };
    row_scale.check("row_scale", n, 4, device)?;
    Ok(row_scale.address())
}

/// Tiles of 64 x 128 over a stored weight: how many there are, and how many lie side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiles {
    pub(super) blocks: u32,
    pub(super) across: u32,
}

impl Tiles {
    pub(super) fn over(rows: usize, columns: usize) -> Result<Self> {
        let across = columns.div_ceil(128);
        let count = rows.div_ceil(64) as u64 * across as u64;
        Ok(Self { blocks: super::check::blocks("n * k", count)?, across: across as u32 })
    }
}

/// Whether the rows of a matrix begin at multiples of 16 bytes, given that the matrix does.
pub(super) fn rows_are_aligned(columns: usize, dtype: DType) -> bool {
    (columns * dtype.size()).is_multiple_of(16)
}
