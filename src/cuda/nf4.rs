//! 4-bit matrices in device memory, and what `kernels/include/{nf4,encode}.cuh` are told of them.

use bytemuck::{Pod, Zeroable};

use super::deltas::code;
use super::{Properties, View, ViewMut};
use crate::nf4::{Codebook, block_count, check_blocksize, packed_len};
use crate::{DType, Error, Result};

/// A 4-bit matrix in the layout of files: flattened row-major, blocks of `blocksize` elements, two codes per byte, the
/// first in the high nibble.
#[derive(Debug, Clone, Copy)]
pub struct Nf4View<'a> {
    /// `[ceil(numel / 2)]`, aligned to 16 bytes.
    pub packed: View<'a, u8>,
    /// The scale of every block.
    pub absmax: AbsmaxView<'a>,
    /// Elements per block: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// What the codes stand for.
    pub codebook: &'a Codebook,
}

/// The scales of a 4-bit matrix' blocks.
#[derive(Debug, Clone, Copy)]
pub enum AbsmaxView<'a> {
    /// `[blocks]`, as f32.
    Plain(View<'a, f32>),
    /// Double quantised.
    Nested(NestedView<'a>),
}

/// Double-quantised scales: `map[q[i]] * absmax[i / blocksize] + offset`, rounded twice.
#[derive(Debug, Clone, Copy)]
pub struct NestedView<'a> {
    /// `[blocks]`: indexes into `map`.
    pub q: View<'a, u8>,
    /// `[ceil(blocks / blocksize)]`.
    pub absmax: View<'a, f32>,
    /// `[256]`.
    pub map: View<'a, f32>,
    /// `[1]`: on the device, as [`absmax_quantize`](super::absmax_quantize) makes it there.
    pub offset: View<'a, f32>,
    /// Elements of `q` per element of `absmax`: a power of two; 256 in every known file.
    pub blocksize: usize,
}

/// `Codebook` of `nf4.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Values([f32; 16]);

/// `Absmax` of `nf4.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Absmax {
    plain: u64,
    q: u64,
    nested: u64,
    map: u64,
    offset: u64,
    nested_shift: u32,
    padding: u32,
}

/// `Encoder` of `encode.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(super) struct Encoder {
    thresholds: [f32; 15],
    zero: u32,
    codes: u64,
}

/// `Nf4Weight` of `nf4.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Weight {
    packed: u64,
    absmax: Absmax,
    codebook: Values,
    block_shift: u32,
    dtype: u32,
}

/// `FlatOutput` of `flat.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Output {
    packed: u64,
    absmax: u64,
    numel: u64,
    block_shift: u32,
    padding: u32,
}

const _: () = assert!(size_of::<Values>() == 64 && size_of::<Absmax>() == 48 && size_of::<Encoder>() == 72);
const _: () = assert!(size_of::<Weight>() == 128 && size_of::<Output>() == 32);

impl Weight {
    /// A weight that is rounded to `dtype` when it is read.
    pub(super) fn new(weight: &Nf4View<'_>, dtype: DType) -> Self {
        Self {
            packed: weight.packed.address(),
            absmax: weight.absmax.params(),
            codebook: weight.values(),
            block_shift: weight.block_shift(),
            dtype: code(dtype),
        }
    }
}

impl Output {
    pub(super) fn new(out: &Nf4ViewMut<'_>, numel: usize, blocksize: usize) -> Self {
        Self {
            packed: out.packed.address(),
            absmax: out.absmax.address(),
            numel: numel as u64,
            block_shift: blocksize.trailing_zeros(),
            padding: 0,
        }
    }
}

impl Nf4View<'_> {
    /// Checks that this holds `numel` elements in the memory of `device`.
    pub(super) fn check(&self, argument: &str, numel: usize, device: &Properties) -> Result<()> {
        let check = || {
            check_blocksize("blocksize", self.blocksize)?;
            check_packed("packed", &self.packed, numel, device)?;
            self.absmax.check(block_count(numel, self.blocksize), device)
        };
        check().map_err(|e| e.within(argument))
    }

    /// The values of the codes, as kernels take them.
    pub(super) fn values(&self) -> Values {
        Values(*self.codebook.values())
    }

    /// log2 of the blocksize.
    pub(super) fn block_shift(&self) -> u32 {
        self.blocksize.trailing_zeros()
    }
}

impl AbsmaxView<'_> {
    /// Checks that these are the scales of `blocks` blocks, in the memory of `device`.
    pub(super) fn check(&self, blocks: usize, device: &Properties) -> Result<()> {
        let nested = match self {
            AbsmaxView::Plain(absmax) => return absmax.check("absmax", blocks, 4, device),
            AbsmaxView::Nested(nested) => nested,
        };
        let check = || {
            if !nested.blocksize.is_power_of_two() {
                return Err(Error::argument("blocksize", "a power of two", nested.blocksize));
            }
            nested.q.check("q", blocks, 1, device)?;
            nested.absmax.check("absmax", block_count(blocks, nested.blocksize), 4, device)?;
            nested.map.check("map", 256, 4, device)?;
            nested.offset.check("offset", 1, 4, device)
        };
        check().map_err(|e| e.within("absmax"))
    }

    /// As kernels take them.
    pub(super) fn params(&self) -> Absmax {
        match self {
            AbsmaxView::Plain(absmax) => Absmax { plain: absmax.address(), ..Absmax::zeroed() },
            AbsmaxView::Nested(nested) => Absmax {
                q: nested.q.address(),
                nested: nested.absmax.address(),
                map: nested.map.address(),
                offset: nested.offset.address(),
                nested_shift: nested.blocksize.trailing_zeros(),
                ..Absmax::zeroed()
            },
        }
    }
}

/// Checks the packed codes of `numel` elements, which kernels move in pieces of 16 bytes.
fn check_packed(argument: &str, packed: &View<'_, u8>, numel: usize, device: &Properties) -> Result<()> {
    packed.check(argument, packed_len(numel), 16, device)
}

/// Codes and scales to be written: the 4-bit form of `numel` elements.
#[derive(Debug)]
pub struct Nf4ViewMut<'a> {
    /// `[ceil(numel / 2)]`, aligned to 16 bytes.
    pub packed: ViewMut<'a, u8>,
    /// `[ceil(numel / blocksize)]`.
    pub absmax: ViewMut<'a, f32>,
}

impl Nf4ViewMut<'_> {
    /// Checks that there is room for `numel` elements, in the memory of `device`.
    pub(super) fn check(&self, numel: usize, blocksize: usize, device: &Properties) -> Result<()> {
        check_packed("packed", &self.packed.as_view(), numel, device)?;
        self.absmax.check("absmax", block_count(numel, blocksize), 4, device)
    }
}

/// How kernels find an element's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Search {
    /// One table load and one comparison. For codebooks whose codes ascend with their values, and that have no two
    /// thresholds in one of 63 bins over [-1, 1]: NF4.
    Binned,
    /// Fifteen comparisons. For all others, and about a third of the speed: FP4.
    Counting,
}

impl Search {
    /// The faster one that `codebook` allows.
    pub fn of(codebook: &Codebook) -> Self {
        let ascending = codebook.codes().iter().zip(0..).all(|(&code, rank)| code == rank);
        let bins = codebook.thresholds().map(bin);
        if ascending && bins.is_sorted_by(|a, b| a < b) { Search::Binned } else { Search::Counting }
    }

    /// As entries name it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Search::Binned => "binned",
            Search::Counting => "counting",
        }
    }
}

/// `BinnedSearch::bin` of `encode.cuh`.
fn bin(x: f32) -> u32 {
    x.mul_add(31.0, 8_388_639.0).to_bits()
}

impl Encoder {
    pub(super) fn new(codebook: &Codebook) -> Self {
        let codes = codebook.codes().iter().rev().fold(0, |codes, &code| codes << 4 | u64::from(code));
        Self { thresholds: *codebook.thresholds(), zero: u32::from(codebook.code(0.0)) * 0x1111_1111, codes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nf4_is_searched_by_bins_and_fp4_by_counting() {
        assert_eq!(Search::of(&Codebook::nf4()), Search::Binned);
        assert_eq!(Search::of(&Codebook::fp4()), Search::Counting);
        let descending = std::array::from_fn(|code| -(code as f32));
        let crowded = std::array::from_fn(|code| if code == 15 { 1.0 } else { code as f32 / 100.0 });
        for values in [descending, crowded] {
            let codebook = Codebook::from_values(values).unwrap();
            assert_eq!(Search::of(&codebook), Search::Counting, "{values:?}");
        }
    }

    #[test]
    fn the_encoder_names_codes_by_rank() {
        let nf4 = Encoder::new(&Codebook::nf4());
        assert_eq!((nf4.codes, nf4.zero), (0xfedc_ba98_7654_3210, 0x7777_7777));
        let fp4 = Encoder::new(&Codebook::fp4());
        assert_eq!((fp4.codes, fp4.zero), (0x3254_7610_89ef_cdab, 0));
    }
}
