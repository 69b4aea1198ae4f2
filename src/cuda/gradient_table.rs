//! Where the gradients of adapters go, on the device.

use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

use super::adapter_table::{MAX_RANK, MAX_SLICES};
use super::check::dimension;
use super::{Properties, Queue, View, ViewMut, lora_gradient};
use crate::{DType, Error, Result};

/// The gradients of one adapter of a [`GradientTable`]. They are f32, whatever the factors are.
#[derive(Debug)]
pub struct GradientView<'a> {
    /// `[rank, k]`, row-major.
    pub lora_a: ViewMut<'a, f32>,
    /// `[n, rank]`, row-major.
    pub lora_b: ViewMut<'a, f32>,
    /// That of the adapter, at most [`MAX_RANK`]; may be 0.
    pub rank: usize,
}

/// `Gradient` of `lora_gradient.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Entry {
    a: u64,
    b: u64,
    rank: u32,
    first_row: u32,
    rows: u32,
    padding: u32,
}

/// The gradients of the adapters of one module, in the order of its [`AdapterTable`](super::AdapterTable), in a device buffer
/// that the caller lends. It is made once, and uploads [`GradientTable::bytes`] bytes.
#[derive(Debug)]
pub struct GradientTable<'a> {
    entries: View<'a, u8>,
    ranks: Vec<usize>,
    slices: Vec<usize>,
    k: usize,
    gradients: PhantomData<&'a mut f32>,
}

impl<'a> GradientTable<'a> {
    /// The size of the buffer for `count` views of gradients: one for each adapter and slice.
    pub const fn bytes(count: usize) -> usize {
        count * size_of::<Entry>()
    }

    /// Checks `gradients`, all of a module with `k` inputs and `n` outputs, and uploads where they are into `buffer`:
    /// [`GradientTable::bytes`] bytes or more, aligned to 16.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank above [`MAX_RANK`], gradients of another size, alignment or device, or a buffer that is too
    /// small. [`Error::Device`] when the upload fails.
    pub fn upload(
        queue: &dyn Queue,
        gradients: Vec<GradientView<'a>>,
        k: usize,
        n: usize,
        buffer: ViewMut<'a, u8>,
    ) -> Result<Self> {
        Self::upload_slices(queue, gradients, k, &[n], buffer)
    }

    /// As [`upload`](GradientTable::upload) for a module whose outputs are `slices`; see
    /// [`AdapterTable::upload_slices`](super::AdapterTable::upload_slices).
    ///
    /// # Errors
    /// As there, and for no slices, more than [`MAX_SLICES`], or a number of views that is not a multiple of theirs.
    pub fn upload_slices(
        queue: &dyn Queue,
        gradients: Vec<GradientView<'a>>,
        k: usize,
        slices: &[usize],
        buffer: ViewMut<'a, u8>,
    ) -> Result<Self> {
        let device = queue.properties();
        dimension("k", k)?;
        if slices.is_empty() || slices.len() > MAX_SLICES {
            return Err(Error::argument("slices", format!("1 to {MAX_SLICES}"), slices.len()));
        }
        dimension("n", slices.iter().fold(0, |sum: usize, &rows| sum.saturating_add(rows)))?;
        dimension("gradients", gradients.len())?;
        if !gradients.len().is_multiple_of(slices.len()) {
            let wanted = format!("a multiple of {} views, one for each slice", slices.len());
            return Err(Error::argument("gradients", wanted, gradients.len()));
        }
        buffer.check_at_least("buffer", Self::bytes(gradients.len()), 16, device)?;
        let mut entries = Vec::with_capacity(gradients.len());
        for (i, gradient) in gradients.iter().enumerate() {
            let s = i % slices.len();
            let first_row = slices[..s].iter().sum::<usize>();
            entries.push(gradient.entry(i, k, [first_row, slices[s]], device)?);
        }
        // SAFETY: the buffer has room for the entries, as checked above.
        unsafe { queue.upload(buffer.address(), bytemuck::cast_slice(&entries))? };
        let ranks = gradients.iter().map(|gradient| gradient.rank).collect();
        let slices = slices.to_vec();
        Ok(Self { entries: buffer.into_view(), ranks, slices, k, gradients: PhantomData })
    }

    /// How many adapters there are.
    pub fn len(&self) -> usize {
        self.ranks.len() / self.slices.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// What [`lora_gradient::plan`] is to be asked for `tokens` rows of x and dY of type `dtype`.
    pub fn shape(&self, tokens: usize, dtype: DType) -> lora_gradient::Shape {
        lora_gradient::Shape {
            tokens,
            n: self.slices.iter().sum(),
            k: self.k,
            adapters: self.len(),
            slices: self.slices.len(),
            widest_slice: self.slices.iter().copied().max().unwrap_or(0),
            max_rank: self.ranks.iter().copied().max().unwrap_or(0),
            dtype,
        }
    }

    /// The address of the entries, which are in the memory of `device`.
    pub(super) fn address(&self, device: &Properties) -> Result<u64> {
        self.entries.check_at_least("gradients", 0, 16, device)?;
        Ok(self.entries.address())
    }

    /// Whether every slice begins at a multiple of eight outputs.
    pub(super) fn slices_are_aligned(&self) -> bool {
        self.slices.iter().all(|rows| rows.is_multiple_of(8))
    }
}

impl GradientView<'_> {
    fn entry(&self, i: usize, k: usize, [first_row, rows]: [usize; 2], device: &Properties) -> Result<Entry> {
        let name = |field: &str| format!("gradients[{i}].{field}");
        if self.rank > MAX_RANK {
            return Err(Error::argument(name("rank"), format!("at most {MAX_RANK}"), self.rank));
        }
        self.lora_a.check(&name("lora_a"), self.rank * k, 4, device)?;
        self.lora_b.check(&name("lora_b"), rows * self.rank, 4, device)?;
        Ok(Entry {
            a: self.lora_a.address(),
            b: self.lora_b.address(),
            rank: self.rank as u32,
            first_row: first_row as u32,
            rows: rows as u32,
            padding: 0,
        })
    }
}
