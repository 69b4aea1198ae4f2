use half::{bf16, f16};
use rayon::prelude::*;

use super::merge::vectorised;
use super::update::PANEL;
use crate::nf4::Nf4Matrix;
use crate::tensor::{TensorView, each_dtype};
use crate::{DType, Element, Error, Result, Tensor};

/// The weight that an adapter sits on.
#[derive(Debug, Clone, Copy)]
pub enum Base<'a> {
    /// f32, f16 or bf16 elements.
    Dense(TensorView<'a>),
    /// 4-bit blocks.
    Nf4(&'a Nf4Matrix),
}

impl<'a> From<&'a Tensor> for Base<'a> {
    fn from(weight: &'a Tensor) -> Self {
        Base::Dense(weight.view())
    }
}

impl<'a> From<TensorView<'a>> for Base<'a> {
    fn from(weight: TensorView<'a>) -> Self {
        Base::Dense(weight)
    }
}

impl<'a> From<&'a Nf4Matrix> for Base<'a> {
    fn from(weight: &'a Nf4Matrix) -> Self {
        Base::Nf4(weight)
    }
}

impl Base<'_> {
    /// The shape as it is stored.
    pub fn shape(&self) -> &[usize] {
        match self {
            Base::Dense(tensor) => tensor.shape(),
            Base::Nf4(nf4) => nf4.shape(),
        }
    }

    /// The type of the elements; of 4-bit blocks, what they were quantised from.
    pub fn dtype(&self) -> DType {
        match self {
            Base::Dense(tensor) => tensor.dtype(),
            Base::Nf4(nf4) => nf4.dtype(),
        }
    }

    /// What no element's magnitude exceeds; NaN or an infinity where an element is.
    pub(super) fn largest(&self) -> f32 {
        /// Bits of magnitudes are ordered as the magnitudes are; NaN comes last.
        fn largest<T: Element>(elements: &[T]) -> T {
            let magnitude = u32::MAX >> (33 - 8 * size_of::<T>());
            let bits = |elements: &[T]| {
                vectorised(|| elements.iter().fold(0, |largest, v| (v.bits() & magnitude).max(largest)))
            };
            T::from_bits(elements.par_chunks(PANEL).map(bits).max().unwrap_or_default())
        }
        match self {
            Base::Dense(tensor) => each_dtype!(DataRef: tensor.data(), v => largest(v).to_f32()),
            Base::Nf4(nf4) => {
                let scales: Vec<f32> = (0..nf4.absmax().len()).map(|i| nf4.absmax().get(i)).collect();
                largest(&scales) * largest(nf4.codebook().values())
            }
        }
    }

    pub(super) fn check_shape(&self, argument: &str, shape: [usize; 2]) -> Result<()> {
        match self.shape() == shape {
            true => Ok(()),
            false => {
                Err(Error::argument(argument, format!("shape {shape:?}"), format!("{:?}", self.shape())))
            }
        }
    }

    /// Writes the elements from `start` on, which exist; 4-bit blocks are dequantised to `dtype`.
    pub(super) fn read(&self, dtype: DType, start: usize, out: &mut [f32]) {
        match (self, dtype) {
            (Base::Dense(tensor), _) => {
                each_dtype!(DataRef: tensor.data(), v => Element::widen(&v[start..start + out.len()], out))
            }
            (Base::Nf4(nf4), DType::F32) => nf4.decode_widened::<f32>(start, out),
            (Base::Nf4(nf4), DType::F16) => nf4.decode_widened::<f16>(start, out),
            (Base::Nf4(nf4), DType::BF16) => nf4.decode_widened::<bf16>(start, out),
        }
    }
}
