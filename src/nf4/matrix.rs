//! A quantised tensor.

use super::dequantize::{Form, Narrow, Wide, decode, decode_all};
use super::{Absmax, Codebook, block_count, check_blocksize, check_len, nest, packed_len, quantize};
use crate::simd::{Level, Simd, with_level};
use crate::tensor::{Tensor, each_dtype, numel};
use crate::{DType, Element, Error, Result};

/// Whether to quantise the scales too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Nesting {
    /// f32 scales: 4.5 bits per element in blocks of 64.
    Plain,
    /// Double quantisation: 4.127 bits per element in blocks of 64.
    Nested,
}

/// A tensor in 4-bit blocks, with the parts that a checkpoint holds. The parts fit each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Matrix {
    pub(super) shape: Vec<usize>,
    pub(super) numel: usize,
    pub(super) packed: Vec<u8>,
    pub(super) absmax: Absmax,
    pub(super) blocksize: usize,
    pub(super) codebook: Codebook,
    pub(super) dtype: DType,
}

impl Nf4Matrix {
    /// Takes the parts of a checkpoint. `dtype` is what the tensor was before (the quant_state's dtype).
    ///
    /// # Errors
    /// [`Error::Argument`] when the shape's product overflows, the block size is none, or a length does not fit.
    pub fn from_parts(
        shape: impl Into<Vec<usize>>,
        packed: Vec<u8>,
        absmax: Absmax,
        blocksize: usize,
        codebook: Codebook,
        dtype: DType,
    ) -> Result<Self> {
        let shape = shape.into();
        check_blocksize("blocksize", blocksize)?;
        let Some(numel) = numel(&shape) else {
            return Err(Error::argument("shape", "a product that fits in memory", format!("{shape:?}")));
        };
        check_len("packed", packed_len(numel), "bytes", packed.len())?;
        check_len("absmax", block_count(numel, blocksize), "blocks", absmax.len())?;
        Ok(Self { shape, numel, packed, absmax, blocksize, codebook, dtype })
    }

    /// Quantises the elements of a tensor of `shape`, row-major.
    ///
    /// # Errors
    /// [`Error::Argument`] when `data` is not of that shape, or the block size is none.
    pub fn quantize<T: Element>(
        data: &[T],
        shape: impl Into<Vec<usize>>,
        blocksize: usize,
        codebook: &Codebook,
        nesting: Nesting,
    ) -> Result<Self> {
        let shape = shape.into();
        check_blocksize("blocksize", blocksize)?;
        if numel(&shape) != Some(data.len()) {
            return Err(Error::argument("data", format!("the elements of shape {shape:?}"), data.len()));
        }
        let mut packed = vec![0; packed_len(data.len())];
        let mut absmax = vec![0.0; block_count(data.len(), blocksize)];
        quantize(data, blocksize, codebook, &mut packed, &mut absmax)?;
        let absmax = match nesting {
            Nesting::Plain => Absmax::Plain(absmax),
            Nesting::Nested => Absmax::Nested(nest(&absmax)),
        };
        Self::from_parts(shape, packed, absmax, blocksize, codebook.clone(), T::DTYPE)
    }

    /// Quantises a tensor.
    ///
    /// # Errors
    /// [`Error::Argument`] when the block size is none.
    pub fn quantize_tensor(
        tensor: &Tensor,
        blocksize: usize,
        codebook: &Codebook,
        nesting: Nesting,
    ) -> Result<Self> {
        each_dtype!(tensor.data(), data => Self::quantize(data, tensor.shape(), blocksize, codebook, nesting))
    }

    /// All elements, row-major.
    pub fn dequantize<T: Element>(&self) -> Vec<T> {
        let mut out = bytemuck::zeroed_vec(self.numel);
        self.decode_all(&mut out);
        out
    }

    /// All elements, row-major, into memory of the caller's.
    ///
    /// # Errors
    /// [`Error::Argument`] when `out` is not as long as the tensor.
    pub fn dequantize_into<T: Element>(&self, out: &mut [T]) -> Result<()> {
        check_len("out", self.numel, "elements", out.len())?;
        self.decode_all(out);
        Ok(())
    }

    fn decode_all<T: Element>(&self, out: &mut [T]) {
        decode_all(&self.packed, |block| self.absmax.get(block), self.blocksize, &self.codebook, out);
    }

    /// The tensor, in the type that it was quantised from.
    pub fn dequantize_tensor(&self) -> Tensor {
        let data = match self.dtype {
            DType::F32 => Element::into_data(self.dequantize::<f32>()),
            DType::F16 => Element::into_data(self.dequantize::<half::f16>()),
            DType::BF16 => Element::into_data(self.dequantize::<half::bf16>()),
        };
        Tensor::new(self.shape.clone(), data).expect("as many elements as the shape has")
    }

    /// The elements `start..start + out.len()` of the flattened tensor.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are fewer.
    pub fn decode<T: Element>(&self, start: usize, out: &mut [T]) -> Result<()> {
        if start.checked_add(out.len()).is_none_or(|end| end > self.numel) {
            let got = format!("{} from {start} on", out.len());
            return Err(Error::argument("out", format!("elements of {}", self.numel), got));
        }
        with_level!(Level::detect(), simd => self.decode_by::<_, Narrow<T>>(simd, start, out));
        Ok(())
    }

    /// [`Nf4Matrix::decode`], widened. The elements exist.
    pub(crate) fn decode_widened<T: Element>(&self, start: usize, out: &mut [f32]) {
        with_level!(Level::detect(), simd => self.decode_widened_by::<_, T>(simd, start, out));
    }

    /// The same, to be inlined into what `simd` runs.
    #[inline(always)]
    pub(crate) fn decode_widened_by<S: Simd, T: Element>(&self, simd: S, start: usize, out: &mut [f32]) {
        self.decode_by::<S, Wide<T>>(simd, start, out);
    }

    #[inline(always)]
    fn decode_by<S: Simd, F: Form>(&self, simd: S, start: usize, out: &mut [F::Value]) {
        let absmax = |block| self.absmax.get(block);
        decode::<S, F>(simd, &self.packed, absmax, self.blocksize, &self.codebook, start, out);
    }

    /// Sizes of the dimensions, slowest first; a linear layer's weight is `[out, in]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many elements there are.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// The codes, two per byte.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The scales.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Elements per scale.
    pub fn blocksize(&self) -> usize {
        self.blocksize
    }

    /// What the codes stand for.
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }

    /// The type that the tensor had before, and is given back as.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}
