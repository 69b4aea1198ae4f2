//! Reference data: safetensors files and their JSON sidecars, looked up by name. Every error names the file and the tensor
//! or key, so that nothing that is missing goes unnoticed.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use lora_kernels::Tensor;
use lora_kernels::formats::safetensors::{Dtype, File, Raw};
use serde_json::Value;

/// The tensors of one safetensors file.
pub struct TensorFile(File<'static>);

/// One tensor of a file.
pub struct Stored {
    file: String,
    name: String,
    /// Where the name goes on after the case that the tensor belongs to.
    label: usize,
    raw: Raw,
}

impl TensorFile {
    /// Opens `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self(File::open(path)?))
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.entries().keys().map(String::as_str)
    }

    /// Whether there is a tensor called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.0.entries().contains_key(name)
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Result<Stored> {
        Ok(Stored { file: self.0.name().to_owned(), name: name.to_owned(), label: 0, raw: self.0.raw(name)? })
    }

    /// The tensor `what` of a case: `{case}.{what}`.
    pub fn of(&self, case: &str, what: &str) -> Result<Stored> {
        Ok(Stored { label: case.len() + 1, ..self.get(&format!("{case}.{what}"))? })
    }

    /// The tensor `what` of a case, if there is one.
    pub fn find_of(&self, case: &str, what: &str) -> Result<Option<Stored>> {
        self.has(&format!("{case}.{what}")).then(|| self.of(case, what)).transpose()
    }

    /// The tensor called `name`, if there is one.
    pub fn find(&self, name: &str) -> Result<Option<Stored>> {
        self.has(name).then(|| self.get(name)).transpose()
    }
}

impl Stored {
    /// What it is, without the case that it belongs to: `y_f32` of `model.layers.0.mlp.up_proj.y_f32`.
    pub fn name(&self) -> &str {
        &self.name[self.label..]
    }

    fn place(&self) -> String {
        format!("{}: {}", self.file, self.name)
    }

    /// Sizes of the dimensions, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.raw.shape
    }

    /// How far a value may be rounded when it is stored here, as a share of it.
    pub fn unit_roundoff(&self) -> f64 {
        match self.raw.dtype {
            Dtype::F32 => 2f64.powi(-24),
            Dtype::F16 => 2f64.powi(-11),
            Dtype::BF16 => 2f64.powi(-8),
            _ => 2f64.powi(-53),
        }
    }

    /// The elements, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.raw.bytes
    }

    fn len(&self) -> usize {
        self.raw.shape.iter().product()
    }

    fn numbers<const N: usize, T>(&self, read: impl Fn([u8; N]) -> T) -> Vec<T> {
        self.raw.bytes.as_chunks().0.iter().map(|&b| read(b)).collect()
    }

    fn wrong_dtype<T>(&self, wanted: &str) -> Result<T> {
        bail!("{}: wanted {wanted}, got {}", self.place(), self.raw.dtype)
    }

    /// This tensor, when it has `shape`.
    pub fn shaped(self, shape: &[usize]) -> Result<Self> {
        ensure!(
            self.raw.shape == shape,
            "{}: wanted shape {shape:?}, got {:?}",
            self.place(),
            self.raw.shape
        );
        Ok(self)
    }

    /// This tensor, when it has `len` elements.
    pub fn counting(self, len: usize) -> Result<Self> {
        ensure!(self.len() == len, "{}: wanted {len} elements, got shape {:?}", self.place(), self.raw.shape);
        Ok(self)
    }

    /// The elements of a u8 tensor.
    pub fn u8s(&self) -> Result<&[u8]> {
        if self.raw.dtype == Dtype::U8 { Ok(&self.raw.bytes) } else { self.wrong_dtype("U8") }
    }

    /// The elements of an f32 tensor.
    pub fn f32s(&self) -> Result<Vec<f32>> {
        if self.raw.dtype == Dtype::F32 {
            Ok(self.numbers(f32::from_le_bytes))
        } else {
            self.wrong_dtype("F32")
        }
    }

    /// The elements of any floating-point tensor, widened to f64.
    pub fn f64s(&self) -> Result<Vec<f64>> {
        if self.raw.dtype == Dtype::F64 {
            Ok(self.numbers(f64::from_le_bytes))
        } else {
            Ok(self.tensor()?.to_f64())
        }
    }

    /// The elements of an i32 or i64 tensor.
    pub fn integers(&self) -> Result<Vec<i64>> {
        match self.raw.dtype {
            Dtype::I64 => Ok(self.numbers(i64::from_le_bytes)),
            Dtype::I32 => Ok(self.numbers(|b| i64::from(i32::from_le_bytes(b)))),
            _ => self.wrong_dtype("I32 or I64"),
        }
    }

    /// An f32, f16 or bf16 tensor.
    pub fn tensor(&self) -> Result<Tensor> {
        use half::{bf16, f16};
        use lora_kernels::tensor::Data;
        let data = match self.raw.dtype {
            Dtype::F32 => Data::F32(self.numbers(f32::from_le_bytes)),
            Dtype::F16 => Data::F16(self.numbers(f16::from_le_bytes)),
            Dtype::BF16 => Data::BF16(self.numbers(bf16::from_le_bytes)),
            _ => return self.wrong_dtype("F32, F16 or BF16"),
        };
        Ok(Tensor::new(self.shape(), data)?)
    }
}

/// A JSON file, or an object inside it.
#[derive(Clone)]
pub struct Sidecar {
    place: String,
    value: Value,
}

impl Sidecar {
    /// Reads `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let text = lora_kernels::formats::read(path).with_context(|| format!("{place}: cannot be read"))?;
        let value = serde_json::from_slice(&text).with_context(|| format!("{place}: not JSON"))?;
        Ok(Self { place, value })
    }

    /// Whether there is a value at `key` that is not null.
    pub fn has(&self, key: &str) -> bool {
        self.value.get(key).is_some_and(|v| !v.is_null())
    }

    fn get<'a, T>(&'a self, key: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<T> {
        let value = self.value.get(key).with_context(|| format!("{}: no key `{key}`", self.place))?;
        read(value).with_context(|| format!("{}: `{key}`: wanted {wanted}, got {value}", self.place))
    }

    /// The string at `key`.
    pub fn text(&self, key: &str) -> Result<&str> {
        self.get(key, "a string", Value::as_str)
    }

    /// The number at `key`.
    pub fn number(&self, key: &str) -> Result<f64> {
        self.get(key, "a number", Value::as_f64)
    }

    /// The size at `key`.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.get(key, "a size", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// The sizes at `key`.
    pub fn sizes(&self, key: &str) -> Result<Vec<usize>> {
        let sizes = |v: &Value| v.as_array()?.iter().map(|n| usize::try_from(n.as_u64()?).ok()).collect();
        self.get(key, "an array of sizes", sizes)
    }

    /// The strings at `key`.
    pub fn texts(&self, key: &str) -> Result<Vec<String>> {
        let texts = |v: &Value| v.as_array()?.iter().map(|n| Some(n.as_str()?.to_owned())).collect();
        self.get(key, "an array of strings", texts)
    }

    /// The booleans at `key`.
    pub fn flags(&self, key: &str) -> Result<Vec<bool>> {
        let flags = |v: &Value| v.as_array()?.iter().map(Value::as_bool).collect();
        self.get(key, "an array of true and false", flags)
    }

    /// The boolean at `key`.
    pub fn flag(&self, key: &str) -> Result<bool> {
        self.get(key, "true or false", Value::as_bool)
    }

    /// The object at `key`.
    pub fn object(&self, key: &str) -> Result<Self> {
        let value = self.get(key, "an object", |v| v.is_object().then_some(v))?;
        Ok(Self { place: format!("{}: {key}", self.place), value: value.clone() })
    }

    /// The elements of the array at `key`.
    pub fn list(&self, key: &str) -> Result<Vec<Self>> {
        let values = self.get(key, "an array", Value::as_array)?;
        let element =
            |(i, v): (usize, &Value)| Self { place: format!("{}: {key}[{i}]", self.place), value: v.clone() };
        Ok(values.iter().enumerate().map(element).collect())
    }
}
