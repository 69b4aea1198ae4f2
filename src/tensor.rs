//! Host tensors as files hold them: a shape, and elements of one [`DType`], row-major.

use std::ops::Range;

use half::{bf16, f16};

use crate::{DType, Element, Error, Result};

/// A dense row-major tensor in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

/// The elements of a [`Tensor`].
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// f32 elements.
    F32(Vec<f32>),
    /// f16 elements.
    F16(Vec<f16>),
    /// bf16 elements.
    BF16(Vec<bf16>),
}

/// A dense row-major tensor in memory that somebody else owns: of an engine, or of a mapped file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TensorView<'a> {
    shape: &'a [usize],
    data: DataRef<'a>,
}

/// The elements of a [`TensorView`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DataRef<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// f16 elements.
    F16(&'a [f16]),
    /// bf16 elements.
    BF16(&'a [bf16]),
}

/// Elements of a [`Tensor`], or of somebody else's memory, to be changed in place.
#[derive(Debug, PartialEq)]
pub enum DataMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// f16 elements.
    F16(&'a mut [f16]),
    /// bf16 elements.
    BF16(&'a mut [bf16]),
}

/// Runs `$body` with `$slice` bound to the typed elements of a [`Data`], or of the other enum that is named.
macro_rules! each_dtype {
    ($kind:ident: $data:expr, $slice:ident => $body:expr) => {
        match $data {
            $crate::tensor::$kind::F32($slice) => $body,
            $crate::tensor::$kind::F16($slice) => $body,
            $crate::tensor::$kind::BF16($slice) => $body,
        }
    };
    ($data:expr, $slice:ident => $body:expr) => {
        $crate::tensor::each_dtype!(Data: $data, $slice => $body)
    };
}

pub(crate) use each_dtype;

macro_rules! from_slices {
    ($($type:ty, $dtype:ident;)*) => {$(
        impl<'a> From<&'a [$type]> for DataRef<'a> {
            fn from(elements: &'a [$type]) -> Self {
                DataRef::$dtype(elements)
            }
        }

        impl<'a> From<&'a mut [$type]> for DataMut<'a> {
            fn from(elements: &'a mut [$type]) -> Self {
                DataMut::$dtype(elements)
            }
        }
    )*};
}

from_slices! {
    f32, F32;
    f16, F16;
    bf16, BF16;
}

impl<'a> From<&'a mut Tensor> for DataMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        tensor.data_mut()
    }
}

impl<'a> DataRef<'a> {
    pub(crate) fn of<T: Element>(elements: &'a [T]) -> Self {
        match T::DTYPE {
            DType::F32 => DataRef::F32(bytemuck::cast_slice(elements)),
            DType::F16 => DataRef::F16(bytemuck::cast_slice(elements)),
            DType::BF16 => DataRef::BF16(bytemuck::cast_slice(elements)),
        }
    }
}

impl<'a> TensorView<'a> {
    /// Takes `data` as a tensor of `shape`.
    ///
    /// # Errors
    /// [`Error::Argument`] when the shape's product is not the number of elements (or overflows).
    pub fn new(shape: &'a [usize], data: impl Into<DataRef<'a>>) -> Result<Self> {
        let data = data.into();
        check_count(shape, each_dtype!(DataRef: data, v => v.len()))?;
        Ok(Self { shape, data })
    }

    /// Sizes of the dimensions, slowest first.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        match self.data {
            DataRef::F32(_) => DType::F32,
            DataRef::F16(_) => DType::F16,
            DataRef::BF16(_) => DType::BF16,
        }
    }

    /// The elements, row-major.
    pub fn data(&self) -> DataRef<'a> {
        self.data
    }

    /// The elements as `T`, when that is their type.
    pub fn as_slice<T: Element>(&self) -> Option<&'a [T]> {
        (T::DTYPE == self.dtype()).then(|| bytemuck::cast_slice(self.as_bytes()))
    }

    /// The elements as little-endian bytes.
    pub fn as_bytes(&self) -> &'a [u8] {
        each_dtype!(DataRef: self.data, v => bytemuck::cast_slice(v))
    }

    /// The elements widened to f32, exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        each_dtype!(DataRef: self.data, v => v.iter().map(|e| e.to_f32()).collect())
    }

    /// The elements widened to f64, exactly.
    pub fn to_f64(&self) -> Vec<f64> {
        each_dtype!(DataRef: self.data, v => v.iter().map(|e| e.to_f64()).collect())
    }
}

impl Data {
    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        match self {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
        }
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        each_dtype!(self, v => v.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements at these places, which exist.
    pub(crate) fn pick(&self, at: impl Iterator<Item = usize>) -> Self {
        match self {
            Data::F32(values) => Data::F32(at.map(|i| values[i]).collect()),
            Data::F16(values) => Data::F16(at.map(|i| values[i]).collect()),
            Data::BF16(values) => Data::BF16(at.map(|i| values[i]).collect()),
        }
    }
}

impl Tensor {
    /// Takes `data` as a tensor of `shape`.
    ///
    /// # Errors
    /// [`Error::Argument`] when the shape's product is not the number of elements (or overflows).
    pub fn new(shape: impl Into<Vec<usize>>, data: Data) -> Result<Self> {
        let shape = shape.into();
        check_count(&shape, data.len())?;
        Ok(Self { shape, data })
    }

    /// The same without a copy.
    pub fn view(&self) -> TensorView<'_> {
        let data = match &self.data {
            Data::F32(v) => DataRef::F32(v),
            Data::F16(v) => DataRef::F16(v),
            Data::BF16(v) => DataRef::BF16(v),
        };
        TensorView { shape: &self.shape, data }
    }

    /// Rounds f32 values to `dtype`.
    ///
    /// # Errors
    /// As [`Tensor::new`].
    pub fn from_f32(shape: impl Into<Vec<usize>>, values: &[f32], dtype: DType) -> Result<Self> {
        let data = match dtype {
            DType::F32 => Data::F32(values.to_vec()),
            DType::F16 => Data::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            DType::BF16 => Data::BF16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
        };
        Self::new(shape, data)
    }

    /// Sizes of the dimensions, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// The elements, row-major.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// Some rows: the elements of `rows` in the first dimension.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are no such rows, or no dimensions.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let Some((count, rest)) =
            self.shape.split_first().filter(|(n, _)| rows.start <= rows.end && rows.end <= **n)
        else {
            let wanted = format!("a range of the rows of {:?}", self.shape);
            return Err(Error::argument("rows", wanted, format!("{rows:?}")));
        };
        let columns = self.numel() / count.max(&1);
        let shape: Vec<usize> = [rows.len()].into_iter().chain(rest.iter().copied()).collect();
        let elements = rows.start * columns..rows.end * columns;
        let data = each_dtype!(&self.data, v => Element::into_data(v[elements].to_vec()));
        Self::new(shape, data)
    }

    /// The elements, row-major, to be changed in place.
    pub fn data_mut(&mut self) -> DataMut<'_> {
        match &mut self.data {
            Data::F32(v) => DataMut::F32(v),
            Data::F16(v) => DataMut::F16(v),
            Data::BF16(v) => DataMut::BF16(v),
        }
    }

    /// How many elements there are.
    pub fn numel(&self) -> usize {
        self.data.len()
    }

    /// The elements as `T`, when that is their type.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        self.view().as_slice()
    }

    /// The elements as little-endian bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.view().as_bytes()
    }

    /// The elements widened to f32, exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        self.view().to_f32()
    }

    /// The elements widened to f64, exactly.
    pub fn to_f64(&self) -> Vec<f64> {
        self.view().to_f64()
    }
}

/// Checks that there are as many elements as a shape has.
fn check_count(shape: &[usize], count: usize) -> Result<()> {
    match numel(shape) {
        Some(n) if n == count => Ok(()),
        _ => Err(Error::argument("data", format!("the elements of shape {shape:?}"), count)),
    }
}

/// The product of a shape, unless it overflows. Nor may the product of sizes that are not 0, with room for bytes: rows of no
/// rows have a size, too.
pub(crate) fn numel(shape: &[usize]) -> Option<usize> {
    let count = shape.iter().filter(|&&d| d > 0).try_fold(1usize, |n, &d| n.checked_mul(d))?;
    if count > usize::MAX >> 4 {
        return None;
    }
    Some(if shape.contains(&0) { 0 } else { count })
}
