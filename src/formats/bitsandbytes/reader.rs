//! Reading, one tensor at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use super::layout::{ABSMAX, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, layout};
use super::quant_state::NestedState;
use super::{CONFIG, Checkpoint, INDEX, MODEL, QuantState, Storage, config};
use crate::formats::json;
use crate::formats::safetensors::{Dtype, File, Raw, float};
use crate::nf4::{Absmax, Codebook, NestedAbsmax, Nf4Matrix, QuantType, block_count, packed_len};
use crate::{Error, Result, Tensor};

/// An open checkpoint: what it holds is known and checked, the tensors are read when they are asked for.
#[derive(Debug)]
pub struct Reader<'a> {
    files: Vec<File<'a>>,
    /// Which of the files has a tensor.
    places: BTreeMap<String, usize>,
    parameters: BTreeMap<String, Parameter>,
    config: Option<Map<String, Value>>,
}

/// What a checkpoint says about one parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum Parameter {
    /// A 4-bit weight.
    Nf4 {
        /// Its quant_state.
        state: QuantState,
        /// The type that its codes are stored as.
        storage: Storage,
    },
    /// A tensor that is not quantised.
    Dense {
        /// The type of its elements.
        dtype: Dtype,
        /// Sizes of its dimensions, slowest first.
        shape: Vec<usize>,
    },
}

impl Parameter {
    /// Sizes of the dimensions, slowest first; of a 4-bit weight those that it has unpacked.
    pub fn shape(&self) -> &[usize] {
        match self {
            Parameter::Nf4 { state, .. } => &state.shape,
            Parameter::Dense { shape, .. } => shape,
        }
    }
}

impl Reader<'static> {
    /// Opens a checkpoint: a `.safetensors` file, a `.safetensors.index.json` with its shards beside it, or a model's folder
    /// with either. In a folder `config.json` is read too.
    ///
    /// # Errors
    /// [`Error::Io`] when a file is not there. [`Error::Format`], naming file, tensor and key, when a header, an index, a
    /// quant_state or `config.json` contradicts itself or another, or a weight lacks a tensor. [`Error::Unsupported`] for
    /// other quantisations.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Self::new(open_files(path)?, None);
        }
        let single = path.join(MODEL);
        let files = open_files(&if single.exists() { single } else { path.join(INDEX) })?;
        let config = path.join(CONFIG);
        let config = if config.exists() { Some(config::read(&config)?) } else { None };
        Self::new(files, config)
    }
}

impl<'a> Reader<'a> {
    /// Opens a `.safetensors` file that is in memory; `name` stands for it in errors.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn parse(name: &str, bytes: &'a [u8]) -> Result<Self> {
        Self::new(vec![File::parse(name, bytes)?], None)
    }

    fn new(files: Vec<File<'a>>, config: Option<Map<String, Value>>) -> Result<Self> {
        // No name is in two files: each file has the tensors that the index says, and no others.
        let names = |(i, file): (usize, &File)| {
            file.entries().keys().map(|name| (name.clone(), i)).collect::<Vec<_>>()
        };
        let places: BTreeMap<String, usize> = files.iter().enumerate().flat_map(names).collect();
        let layout = layout(places.keys(), |name| files[places[name]].place(name))?;
        let mut reader = Self { files, places, parameters: BTreeMap::new(), config };
        for (name, quant_state) in layout {
            let parameter = match quant_state {
                Some((key, quant_type)) => reader.weight(&name, &key, quant_type)?,
                None => {
                    let entry = reader.file(&name)?.entry(&name)?;
                    Parameter::Dense { dtype: entry.dtype, shape: entry.shape.clone() }
                }
            };
            reader.parameters.insert(name, parameter);
        }
        if let Some(config) = &reader.config {
            config::check(config, &reader.parameters)?;
        }
        Ok(reader)
    }

    /// All parameters, by name. The tensors that describe a 4-bit weight are part of it.
    pub fn parameters(&self) -> &BTreeMap<String, Parameter> {
        &self.parameters
    }

    /// The model's `config.json`, where one lay beside.
    pub fn config(&self) -> Option<&Map<String, Value>> {
        self.config.as_ref()
    }

    /// Reads a 4-bit weight.
    ///
    /// # Errors
    /// [`Error::Argument`] when `name` is none; [`Error::Format`] when a scale or a table of values is not finite, or
    /// `quant_map` belongs to the other quantisation type; [`Error::Io`].
    pub fn nf4(&self, name: &str) -> Result<Nf4Matrix> {
        let Some(Parameter::Nf4 { state, .. }) = self.parameters.get(name) else {
            return Err(Error::argument("name", "a 4-bit weight", name));
        };
        let packed = self.file(name)?.raw(name)?.bytes;
        let absmax = match state.nested {
            None => Absmax::Plain(self.finite(name, ABSMAX)?),
            Some(nested) => Absmax::Nested(self.nested(name, nested)?),
        };
        let codebook = self.codebook(name, state.quant_type)?;
        Nf4Matrix::from_parts(state.shape.clone(), packed, absmax, state.blocksize, codebook, state.dtype)
    }

    /// Reads a tensor that is not quantised.
    ///
    /// # Errors
    /// [`Error::Argument`] when `name` is none; [`Error::Unsupported`] when its dtype is not one of [`crate::DType`] (then
    /// [`Reader::raw`] reads it); [`Error::Io`].
    pub fn dense(&self, name: &str) -> Result<Tensor> {
        self.dense_file(name)?.tensor(name)
    }

    /// Reads a tensor that is not quantised, of any type, as bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] when `name` is none; [`Error::Io`].
    pub fn raw(&self, name: &str) -> Result<Raw> {
        self.dense_file(name)?.raw(name)
    }

    /// Reads everything.
    ///
    /// # Errors
    /// As [`Reader::nf4`].
    pub fn load(self) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint { storage: self.storage(), ..Checkpoint::default() };
        for (name, parameter) in &self.parameters {
            match parameter {
                Parameter::Nf4 { .. } => {
                    checkpoint.nf4.insert(name.clone(), self.nf4(name)?);
                }
                Parameter::Dense { dtype, .. } if float(*dtype).is_some() => {
                    checkpoint.dense.insert(name.clone(), self.dense(name)?);
                }
                Parameter::Dense { .. } => {
                    checkpoint.raw.insert(name.clone(), self.raw(name)?);
                }
            }
        }
        Ok(Checkpoint { config: self.config, ..checkpoint })
    }

    /// The type that the codes of the first weight are stored as.
    fn storage(&self) -> Storage {
        let storage = self.parameters.values().find_map(|parameter| match parameter {
            Parameter::Nf4 { storage, .. } => Some(*storage),
            Parameter::Dense { .. } => None,
        });
        storage.unwrap_or_default()
    }

    /// The file that has a tensor.
    fn file(&self, tensor: &str) -> Result<&File<'a>> {
        let place = self.places.get(tensor).map(|i| &self.files[*i]);
        place.ok_or_else(|| {
            Error::format(self.files.first().map_or("", File::name), format!("a tensor {tensor}"), "none")
        })
    }

    fn dense_file(&self, name: &str) -> Result<&File<'a>> {
        match self.parameters.get(name) {
            Some(Parameter::Dense { .. }) => self.file(name),
            _ => Err(Error::argument("name", "a tensor that is not quantised", name)),
        }
    }

    /// Checks a 4-bit weight's tensors against its quant_state, before any of them is read.
    fn weight(&self, name: &str, key: &str, quant_type: QuantType) -> Result<Parameter> {
        let place = self.file(key)?.place(key);
        let state = QuantState::parse(&place, &self.checked(key, &[Dtype::U8], None)?.raw(key)?.bytes)?;
        if state.quant_type != quant_type {
            return Err(Error::format(
                place,
                "the quant_type of the tensor's name",
                format!("{:?}", state.quant_type),
            ));
        }
        let storage = self.packed(name, &state)?;
        let blocks = block_count(state.numel(), state.blocksize);
        let absmax = if state.nested.is_some() { Dtype::U8 } else { Dtype::F32 };
        self.checked(&format!("{name}{ABSMAX}"), &[absmax], Some(blocks))?;
        self.checked(&format!("{name}{QUANT_MAP}"), &[Dtype::F32], Some(16))?;
        let (nested_absmax, map) = (format!("{name}{NESTED_ABSMAX}"), format!("{name}{NESTED_QUANT_MAP}"));
        if let Some(nested) = state.nested {
            self.checked(&nested_absmax, &[Dtype::F32], Some(block_count(blocks, nested.blocksize)))?;
            self.checked(&map, &[Dtype::F32], Some(256))?;
        } else if let Some(extra) = [nested_absmax, map].iter().find(|extra| self.places.contains_key(*extra))
        {
            let place = self.file(extra)?.place(extra);
            return Err(Error::format(
                place,
                "nothing, as the quant_state has no nested_blocksize",
                "a tensor",
            ));
        }
        Ok(Parameter::Nf4 { state, storage })
    }

    /// Checks the codes' bytes: one column of any storage type.
    fn packed(&self, name: &str, state: &QuantState) -> Result<Storage> {
        let file = self.file(name)?;
        let entry = file.entry(name)?;
        let wrong = |wanted: String| {
            Err(Error::format(file.place(name), wanted, format!("{} {:?}", entry.dtype, entry.shape)))
        };
        let Some(storage) = Storage::from_dtype(entry.dtype) else {
            return wrong("codes stored as U8, BF16, F16 or F32".into());
        };
        let bytes = packed_len(state.numel());
        if entry.size() != bytes as u64 || entry.shape != [bytes / storage.size(), 1] {
            return wrong(format!("one column of {bytes} bytes, for shape {:?}", state.shape));
        }
        Ok(storage)
    }

    /// Checks the type of a one-dimensional tensor, and its length where that is given.
    fn checked(&self, name: &str, dtypes: &[Dtype], length: Option<usize>) -> Result<&File<'a>> {
        let file = self.file(name)?;
        let entry = file.entry(name)?;
        let fits = matches!(entry.shape[..], [n] if length.is_none_or(|length| length == n));
        if dtypes.contains(&entry.dtype) && fits {
            return Ok(file);
        }
        let length = length.map_or("any length".to_owned(), |n| n.to_string());
        let wanted = format!("{} [{length}]", dtypes[0]);
        Err(Error::format(file.place(name), wanted, format!("{} {:?}", entry.dtype, entry.shape)))
    }

    fn nested(&self, name: &str, state: NestedState) -> Result<NestedAbsmax> {
        let key = format!("{name}{ABSMAX}");
        let q = self.file(&key)?.raw(&key)?.bytes;
        let absmax = self.finite(name, NESTED_ABSMAX)?;
        if let Some(i) = absmax.iter().position(|scale| *scale < 0.0) {
            let key = format!("{name}{NESTED_ABSMAX}");
            return Err(Error::format(
                self.file(&key)?.place(&key),
                "magnitudes",
                format!("{} at {i}", absmax[i]),
            ));
        }
        let map = self.finite(name, NESTED_QUANT_MAP)?;
        let map = map.into_boxed_slice().try_into().expect("its length was checked");
        NestedAbsmax::from_parts(q, absmax, map, state.offset, state.blocksize)
    }

    /// The stored table: it is what the codes were made with.
    fn codebook(&self, name: &str, quant_type: QuantType) -> Result<Codebook> {
        let values = self.finite(name, QUANT_MAP)?;
        let codebook = Codebook::from_values(values.try_into().expect("its length was checked"))?;
        match codebook.quant_type() {
            QuantType::Custom => Ok(codebook),
            same if same == quant_type => Ok(codebook),
            other => {
                let key = format!("{name}{QUANT_MAP}");
                let wanted = format!("the values of {quant_type:?}");
                Err(Error::format(self.file(&key)?.place(&key), wanted, format!("those of {other:?}")))
            }
        }
    }

    /// A companion of f32 values, none of them NaN or infinite.
    fn finite(&self, name: &str, suffix: &str) -> Result<Vec<f32>> {
        let key = format!("{name}{suffix}");
        let file = self.file(&key)?;
        let values = file.tensor(&key)?.as_slice::<f32>().expect("its type was checked").to_vec();
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(i) => Err(Error::format(file.place(&key), "finite values", format!("{} at {i}", values[i]))),
        }
    }
}

/// Opens a file, or all shards of an index.
fn open_files(path: &Path) -> Result<Vec<File<'static>>> {
    if path.extension().is_none_or(|extension| extension != "json") {
        return Ok(vec![File::open(path)?]);
    }
    let place = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let index = json::object(&place, &bytes)?;
    let place = format!("{place}: weight_map");
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::format(&place, "an object from tensors to files", "none"))?;
    let mut shards: BTreeMap<&str, BTreeSet<&String>> = BTreeMap::new();
    for (tensor, shard) in map {
        let name =
            shard.as_str().filter(|name| Path::new(name).file_name().is_some_and(|file| file == *name));
        let name = name.ok_or_else(|| {
            Error::format(
                format!("{place}: {tensor}"),
                "the name of a file beside the index",
                json::short(shard),
            )
        })?;
        shards.entry(name).or_default().insert(tensor);
    }
    let open = |(shard, tensors): (&str, BTreeSet<&String>)| {
        let file = File::open(path.with_file_name(shard))?;
        tensors.iter().try_for_each(|tensor| file.entry(tensor).map(drop))?;
        match file.entries().keys().find(|tensor| !tensors.contains(*tensor)) {
            None => Ok(file),
            Some(tensor) => Err(Error::format(&place, format!("{tensor}, as it is in {shard}"), "none")),
        }
    };
    shards.into_iter().map(open).collect()
}
