use half::{bf16, f16};

use crate::nf4::Nf4Matrix;
use crate::tensor::each_dtype;
use crate::{DType, Element, Error, Result, Tensor};

/// The weight that an adapter sits on.
#[derive(Debug, Clone, Copy)]
pub enum Base<'a> {
    /// f32, f16 or bf16 elements.
    Dense(&'a Tensor),
    /// 4-bit blocks.
    Nf4(&'a Nf4Matrix),
}

impl<'a> From<&'a Tensor> for Base<'a> {
    fn from(weight: &'a Tensor) -> Self {
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
                each_dtype!(tensor.data(), v => Element::widen(&v[start..start + out.len()], out))
            }
            (Base::Nf4(nf4), DType::F32) => nf4.decode_widened::<f32>(start, out),
            (Base::Nf4(nf4), DType::F16) => nf4.decode_widened::<f16>(start, out),
            (Base::Nf4(nf4), DType::BF16) => nf4.decode_widened::<bf16>(start, out),
        }
    }
}
