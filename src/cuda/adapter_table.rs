//! The adapters that one launch chooses from, on the device.

use bytemuck::{Pod, Zeroable};

use super::check::dimension;
use super::{Properties, Queue, View, ViewMut};
use crate::{DType, Element, Error, Result};

/// The largest rank that the kernels take.
pub const MAX_RANK: usize = 256;

/// One adapter of an [`AdapterTable`]: `delta = scaling * lora_b @ lora_a`.
#[derive(Debug, Clone, Copy)]
pub struct AdapterView<'a, A> {
    /// `[rank, k]`, row-major, aligned to 16 bytes.
    pub lora_a: View<'a, A>,
    /// `[n, rank]`, row-major, aligned to 16 bytes.
    pub lora_b: View<'a, A>,
    /// At most [`MAX_RANK`]; 0 is an adapter that does nothing.
    pub rank: usize,
    /// The factor of the product: `alpha / rank` for LoRA, `alpha / sqrt(rank)` for rsLoRA.
    pub scaling: f32,
}

/// What a kernel reads of one adapter (`struct Adapter` of `kernels/include/adapter.cuh`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Entry {
    a: u64,
    b: u64,
    rank: u32,
    scaling: f32,
    first_row: u32,
    rows: u32,
}

/// `struct Adapters` of `kernels/include/adapter.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Adapters {
    entries: u64,
    index: u64,
    count: u32,
    pitch: u16,
    slices: u16,
}

/// The most slices that a table's outputs may have.
pub const MAX_SLICES: usize = 16;

/// Adapters of one module (the same k and n; ranks may differ), in a device buffer that the caller lends. A token picks
/// one by its number; see [`LowRank`].
///
/// The outputs of a packed module (query, key and value; gate and up) are slices, and an adapter has factors for each of
/// them: see [`upload_slices`](AdapterTable::upload_slices). All slices take the same launches.
///
/// The table is made once, not per token: it uploads [`AdapterTable::bytes`] bytes.
#[derive(Debug)]
pub struct AdapterTable<'a, A> {
    entries: View<'a, u8>,
    ranks: Vec<usize>,
    slices: Vec<usize>,
    k: usize,
    adapters: std::marker::PhantomData<View<'a, A>>,
}

impl<'a, A: Element> AdapterTable<'a, A> {
    /// The size of the buffer for `count` views of adapters: one for each adapter and slice.
    pub const fn bytes(count: usize) -> usize {
        count * size_of::<Entry>()
    }

    /// Checks `adapters`, all of a module with `k` inputs and `n` outputs, and uploads what the kernels need to know
    /// of them into `buffer`: [`AdapterTable::bytes`] bytes or more, aligned to 16.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank above [`MAX_RANK`], factors of another size, alignment or device, a scaling that
    /// is not finite, or a buffer that is too small. [`Error::Device`] when the upload fails.
    pub fn upload(
        queue: &dyn Queue,
        adapters: &[AdapterView<'a, A>],
        k: usize,
        n: usize,
        buffer: ViewMut<'a, u8>,
    ) -> Result<Self> {
        Self::upload_slices(queue, adapters, k, &[n], buffer)
    }

    /// As [`upload`](AdapterTable::upload) for a module whose outputs are `slices`, one behind the other: slice `s` has
    /// `slices[s]` of them, and adapter `i` has the view `adapters[i * slices.len() + s]` for it, with a `lora_b` of that many
    /// rows. A view of rank 0 leaves its slice alone.
    ///
    /// # Errors
    /// As [`upload`](AdapterTable::upload), and for no slices, more than [`MAX_SLICES`], or a number of views that is not a
    /// multiple of theirs.
    pub fn upload_slices(
        queue: &dyn Queue,
        adapters: &[AdapterView<'a, A>],
        k: usize,
        slices: &[usize],
        buffer: ViewMut<'a, u8>,
    ) -> Result<Self> {
        let device = queue.properties();
        dimension("k", k)?;
        if slices.is_empty() || slices.len() > MAX_SLICES {
            return Err(Error::argument("slices", format!("1 to {MAX_SLICES}"), slices.len()));
        }
        let n = slices.iter().fold(0, |sum: usize, &rows| sum.saturating_add(rows));
        dimension("n", n)?;
        dimension("adapters", adapters.len())?;
        if !adapters.len().is_multiple_of(slices.len()) {
            let wanted = format!("a multiple of {} views, one for each slice", slices.len());
            return Err(Error::argument("adapters", wanted, adapters.len()));
        }
        buffer.check_at_least("buffer", Self::bytes(adapters.len()), 16, device)?;
        let mut entries = Vec::with_capacity(adapters.len());
        for (i, adapters) in adapters.chunks(slices.len()).enumerate() {
            let mut first_row = 0;
            for (s, (adapter, &rows)) in adapters.iter().zip(slices).enumerate() {
                entries.push(adapter.entry(i * slices.len() + s, k, first_row, rows, device)?);
                first_row += rows;
            }
        }
        // SAFETY: the buffer has room for the entries, as checked above.
        unsafe { queue.upload(buffer.address(), bytemuck::cast_slice(&entries))? };
        let ranks = adapters.iter().map(|adapter| adapter.rank).collect();
        let slices = slices.to_vec();
        Ok(Self { entries: buffer.into_view(), ranks, slices, k, adapters: std::marker::PhantomData })
    }

    /// How many adapters there are.
    pub fn len(&self) -> usize {
        self.ranks.len() / self.slices.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// The rank of every view: of an adapter's slices one after the other, then of the next adapter's.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Inputs of the module.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Outputs of the module.
    pub fn n(&self) -> usize {
        self.slices.iter().sum()
    }

    /// Outputs of each slice.
    pub fn slices(&self) -> &[usize] {
        &self.slices
    }

    /// Columns of `v`, the product of [`lora_shrink`](super::lora_shrink): for each slice the largest rank, rounded up to a
    /// multiple of 4.
    pub fn v_columns(&self) -> usize {
        v_columns(self.max_rank()) * self.slices.len()
    }

    /// What [`lora_shrink::plan`](super::lora_shrink::plan) is to be asked for `tokens` rows of x of type `dtype`.
    pub fn shrink_shape(&self, tokens: usize, dtype: DType) -> super::lora_shrink::Shape {
        super::lora_shrink::Shape {
            tokens,
            k: self.k,
            max_rank: self.max_rank(),
            slices: self.slices.len(),
            dtype,
            adapter_dtype: A::DTYPE,
        }
    }

    /// What [`lora_shrink::plan_transposed`](super::lora_shrink::plan_transposed) is to be asked for `tokens` rows of dY of type
    /// `dtype`.
    pub fn shrink_transposed_shape(&self, tokens: usize, dtype: DType) -> super::lora_shrink::Shape {
        super::lora_shrink::Shape { k: self.n(), ..self.shrink_shape(tokens, dtype) }
    }

    /// The largest rank, 0 without adapters.
    pub fn max_rank(&self) -> usize {
        self.ranks.iter().copied().max().unwrap_or(0)
    }

    /// What a launch over `tokens` tokens takes, with the tokens' own choice or adapter 0 for all.
    pub(super) fn choose(
        &self,
        index: Option<View<'_, i32>>,
        tokens: usize,
        device: &Properties,
    ) -> Result<Adapters> {
        self.entries.check_at_least("adapters", 0, 16, device)?;
        match index {
            Some(index) => index.check("adapter_index", tokens, 4, device)?,
            None if self.is_empty() => {
                return Err(Error::argument(
                    "adapters",
                    "at least one, or an adapter_index of -1 for all tokens",
                    0,
                ));
            }
            None => {}
        }
        Ok(Adapters {
            entries: self.entries.address(),
            index: index.map_or(0, |index| index.address()),
            count: self.len() as u32,
            pitch: v_columns(self.max_rank()) as u16,
            slices: self.slices.len() as u16,
        })
    }
}

impl<A: Element> AdapterView<'_, A> {
    fn entry(&self, i: usize, k: usize, first_row: usize, rows: usize, device: &Properties) -> Result<Entry> {
        if self.rank > MAX_RANK {
            return Err(Error::argument(
                format!("adapters[{i}].rank"),
                format!("at most {MAX_RANK}"),
                self.rank,
            ));
        }
        if !self.scaling.is_finite() {
            return Err(Error::argument(format!("adapters[{i}].scaling"), "a finite number", self.scaling));
        }
        self.lora_a.check(&format!("adapters[{i}].lora_a"), self.rank * k, 16, device)?;
        self.lora_b.check(&format!("adapters[{i}].lora_b"), rows * self.rank, 16, device)?;
        let (a, b) = (self.lora_a.address(), self.lora_b.address());
        Ok(Entry {
            a,
            b,
            rank: self.rank as u32,
            scaling: self.scaling,
            first_row: first_row as u32,
            rows: rows as u32,
        })
    }
}

/// The low-rank branch of a product: `v lora_b^T`, added to `x w^T`.
#[derive(Debug)]
pub struct LowRank<'a, A> {
    /// The adapters.
    pub adapters: &'a AdapterTable<'a, A>,
    /// Which adapter every token uses: `[tokens]`, -1 for none. Without it all use adapter 0. A token with any other
    /// number that is not an adapter's gets NaN in all its outputs; [`check_adapter_index`] finds such numbers on the host.
    pub index: Option<View<'a, i32>>,
    /// What [`lora_shrink`](super::lora_shrink) made of the same adapters, index and x:
    /// `[parts, tokens, adapters.v_columns()]` with its plan's 1, 2, 4 or 8 parts, aligned to 16 bytes.
    pub v: View<'a, f32>,
}

/// `struct LowRank` of `kernels/include/epilogue.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct LowRankParams {
    v: u64,
    adapters: Adapters,
    b_is_f32: u32,
    parts: u32,
}

impl<A: Element> LowRank<'_, A> {
    /// Checks the branch of a product of type `dtype` with `n` outputs.
    pub(super) fn params(
        &self,
        dtype: DType,
        tokens: usize,
        n: usize,
        device: &Properties,
    ) -> Result<LowRankParams> {
        if self.adapters.n() != n {
            return Err(Error::argument("adapters.n", n.to_string(), self.adapters.n()));
        }
        self.checked(dtype, tokens, device)
    }

    /// The same for the product with the transposed weight, `[n, k]`: u takes the place of v.
    pub(super) fn transposed_params(
        &self,
        dtype: DType,
        [tokens, n, k]: [usize; 3],
        device: &Properties,
    ) -> Result<LowRankParams> {
        if self.adapters.k() != k {
            return Err(Error::argument("adapters.k", k.to_string(), self.adapters.k()));
        }
        self.params(dtype, tokens, n, device)
    }

    fn checked(&self, dtype: DType, tokens: usize, device: &Properties) -> Result<LowRankParams> {
        check_adapter_dtype(A::DTYPE, dtype)?;
        let v_len = tokens * self.adapters.v_columns();
        let parts = self.v.len().checked_div(v_len).filter(|parts| [1, 2, 4, 8].contains(parts)).unwrap_or(1);
        self.v.check("v", parts * v_len, 16, device)?;
        let adapters = self.adapters.choose(self.index, tokens, device)?;
        Ok(LowRankParams {
            v: self.v.address(),
            adapters,
            b_is_f32: u32::from(A::DTYPE == DType::F32),
            parts: parts as u32,
        })
    }
}

/// Columns of `v` for adapters of rank up to `max_rank`.
pub(super) const fn v_columns(max_rank: usize) -> usize {
    max_rank.next_multiple_of(4)
}

/// Checks a host copy of an adapter index against a table of `count` adapters.
///
/// # Errors
/// [`Error::Argument`] naming the first token whose number is neither an adapter's nor -1.
pub fn check_adapter_index(index: &[i32], count: usize) -> Result<()> {
    let wrong = |&adapter: &i32| adapter != -1 && usize::try_from(adapter).map_or(true, |a| a >= count);
    match index.iter().position(wrong) {
        Some(i) => {
            let wanted = format!("-1 or an adapter's number, below {count}");
            Err(Error::argument(format!("adapter_index[{i}]"), wanted, index[i]))
        }
        None => Ok(()),
    }
}

/// The element types of adapters that can stand beside activations of type `x`: the same, or f32.
pub(super) fn check_adapter_dtype(adapter: DType, x: DType) -> Result<()> {
    if adapter == x || adapter == DType::F32 {
        return Ok(());
    }
    Err(Error::argument("adapters.dtype", format!("{x} (as x) or f32"), adapter))
}
