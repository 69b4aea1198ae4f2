//! The JSON text beside each weight.

use std::fmt;

use serde_json::Value;

use crate::formats::json;
use crate::nf4::{Absmax, BLOCKSIZES, Nf4Matrix, QuantType};
use crate::tensor::numel;
use crate::{DType, Error, Result};

/// What bitsandbytes keeps of a weight besides its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// NF4 or FP4. The decoding goes by the stored `quant_map`, which should be that table.
    pub quant_type: QuantType,
    /// Elements per scale.
    pub blocksize: usize,
    /// The type that the weight had before it was quantised.
    pub dtype: DType,
    /// The weight's shape; `[out, in]` for a linear layer.
    pub shape: Vec<usize>,
    /// Double quantisation, where there is.
    pub nested: Option<NestedState>,
}

/// Double quantisation's part of a [`QuantState`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NestedState {
    /// How many scales share a scale.
    pub blocksize: usize,
    /// What is added to every scale. It is stored nowhere else.
    pub offset: f32,
}

/// Names of the quantisation types.
pub(super) const QUANT_TYPES: [(&str, QuantType); 2] = [("nf4", QuantType::Nf4), ("fp4", QuantType::Fp4)];

/// Names of the dtypes, as torch has them.
pub(super) const DTYPES: [(&str, DType); 3] =
    [("float32", DType::F32), ("float16", DType::F16), ("bfloat16", DType::BF16)];

const KEYS: [&str; 4] = ["quant_type", "blocksize", "dtype", "shape"];
const NESTED_KEYS: [&str; 3] = ["nested_blocksize", "nested_dtype", "nested_offset"];

impl QuantState {
    /// Reads the JSON text. `place` is the tensor that holds it.
    pub(super) fn parse(place: &str, text: &[u8]) -> Result<Self> {
        let fields = json::object(place, text)?;
        if let Some(key) =
            fields.keys().find(|k| !KEYS.contains(&k.as_str()) && !NESTED_KEYS.contains(&k.as_str()))
        {
            return Err(Error::format(place, "the keys of a quant_state", key));
        }
        let field = |key: &'static str| Field { place: format!("{place}: {key}"), value: fields.get(key) };
        let nested = if NESTED_KEYS.iter().any(|key| fields.contains_key(*key)) {
            field("nested_dtype").name(&[("float32", ())])?;
            let (blocksize, offset) = (field("nested_blocksize").blocksize()?, field("nested_offset").f32()?);
            Some(NestedState { blocksize, offset })
        } else {
            None
        };
        Ok(Self {
            quant_type: field("quant_type").name(&QUANT_TYPES)?,
            blocksize: field("blocksize").blocksize()?,
            dtype: field("dtype").name(&DTYPES)?,
            shape: field("shape").shape()?,
            nested,
        })
    }

    /// What belongs to a matrix.
    pub(super) fn of(matrix: &Nf4Matrix) -> Self {
        let nested = match matrix.absmax() {
            Absmax::Plain(_) => None,
            Absmax::Nested(nested) => {
                Some(NestedState { blocksize: nested.blocksize(), offset: nested.offset() })
            }
        };
        Self {
            quant_type: matrix.codebook().quant_type(),
            blocksize: matrix.blocksize(),
            dtype: matrix.dtype(),
            shape: matrix.shape().to_vec(),
            nested,
        }
    }

    /// How many elements the weight has.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The JSON text, with the spaces that Python puts there.
impl fmt::Display for QuantState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (quant_type, dtype) = (name(&QUANT_TYPES, self.quant_type), name(&DTYPES, self.dtype));
        write!(f, r#"{{"quant_type": "{quant_type}", "blocksize": {}, "dtype": "{dtype}""#, self.blocksize)?;
        write!(f, r#", "shape": {:?}"#, self.shape)?;
        if let Some(NestedState { blocksize, offset }) = self.nested {
            write!(f, r#", "nested_blocksize": {blocksize}, "nested_dtype": "float32""#)?;
            // As JSON prints it: of two numerals as short, Python takes the even one, and Rust's own formatting does not.
            write!(f, r#", "nested_offset": {}"#, Value::from(f64::from(offset)))?;
        }
        f.write_str("}")
    }
}

/// The name of a value in one of the tables.
pub(super) fn name<T: PartialEq>(table: &[(&'static str, T)], value: T) -> &'static str {
    table.iter().find(|(_, known)| *known == value).map_or("custom", |(name, _)| name)
}

/// A value of the object, and what to call it.
struct Field<'a> {
    place: String,
    value: Option<&'a Value>,
}

impl Field<'_> {
    fn wrong(&self, wanted: impl Into<String>) -> Error {
        Error::format(&self.place, wanted, self.value.map_or("none".to_owned(), json::short))
    }

    fn name<T: Copy>(&self, table: &[(&str, T)]) -> Result<T> {
        let known = table.iter().find(|(name, _)| self.value.and_then(Value::as_str) == Some(name));
        let names: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
        known.map(|(_, value)| *value).ok_or_else(|| self.wrong(names.join(" or ")))
    }

    fn blocksize(&self) -> Result<usize> {
        let size = self.value.and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let known = size.filter(|n| BLOCKSIZES.contains(n));
        known.ok_or_else(|| self.wrong("a power of two from 32 to 4096"))
    }

    fn f32(&self) -> Result<f32> {
        let number = self.value.and_then(Value::as_f64).map(|n| n as f32);
        number.filter(|n| n.is_finite()).ok_or_else(|| self.wrong("a finite number"))
    }

    fn shape(&self) -> Result<Vec<usize>> {
        let shape = json::sizes(&self.place, self.value.unwrap_or(&Value::Null))?;
        if shape.is_empty() || shape.contains(&0) || numel(&shape).is_none() {
            return Err(self.wrong("sizes above 0 whose product fits in memory"));
        }
        Ok(shape)
    }
}
