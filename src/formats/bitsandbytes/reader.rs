//! Reading, one tensor at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};

use super::layout::{ABSMAX, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, is_companion, layout};
use super::quant_state::NestedState;
use super::{CONFIG, Checkpoint, INDEX, MODEL, QuantState, Storage, config};
use crate::formats::json;
use crate::formats::safetensors::{Dtype, Entry, File, Raw, float, part};
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
        let state = self.state(name)?;
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

    /// Rows of a tensor that is not quantised: the elements of `rows` in its first dimension.
    ///
    /// # Errors
    /// As [`Reader::dense`]; [`Error::Argument`] when there are no such rows.
    pub fn dense_rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        self.dense_file(name)?.tensor_rows(name, rows)
    }

    /// Rows of a 4-bit weight, as a weight of their own. Its scales are plain: what [`NestedAbsmax`] yields for these blocks.
    ///
    /// # Errors
    /// As [`Reader::nf4`]; [`Error::Argument`] when there are no such rows, or the first one begins within a block.
    pub fn nf4_rows(&self, name: &str, rows: Range<usize>) -> Result<Nf4Matrix> {
        let state = self.state(name)?;
        let (shape, columns) = part(&state.shape, &rows)?;
        let (start, numel) = (rows.start * columns, rows.len() * columns);
        if !start.is_multiple_of(state.blocksize) {
            let wanted = format!("a start at a multiple of {} elements", state.blocksize);
            return Err(Error::argument("rows", wanted, format!("{rows:?} of {:?}", state.shape)));
        }
        let mut packed = vec![0; packed_len(numel)];
        self.file(name)?.read_part(name, (start / 2) as u64, &mut packed)?;
        let first = start / state.blocksize;
        let absmax = self.scales(name, state, first..first + block_count(numel, state.blocksize))?;
        let codebook = self.codebook(name, state.quant_type)?;
        Nf4Matrix::from_parts(shape, packed, Absmax::Plain(absmax), state.blocksize, codebook, state.dtype)
    }

    /// What the header says of one of these tensors.
    ///
    /// # Errors
    /// [`Error::Format`] when there is none of that name.
    pub fn entry(&self, tensor: &str) -> Result<&Entry> {
        self.file(tensor)?.entry(tensor)
    }

    /// Reads bytes of one of them, as [`File::read_part`].
    ///
    /// # Errors
    /// As [`File::read_part`].
    pub fn read_part(&self, tensor: &str, offset: u64, into: &mut [u8]) -> Result<()> {
        self.file(tensor)?.read_part(tensor, offset, into)
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> &[File<'a>] {
        &self.files
    }

    /// The names of all tensors that a parameter consists of: its own, and those that describe a 4-bit weight.
    ///
    /// # Errors
    /// [`Error::Argument`] when `name` is no parameter.
    pub fn tensors(&self, name: &str) -> Result<Vec<&str>> {
        match self.parameters.get_key_value(name) {
            None => Err(Error::argument("name", "a parameter", name)),
            Some((name, Parameter::Dense { .. })) => Ok(vec![name]),
            Some((name, Parameter::Nf4 { .. })) => {
                let of = |tensor: &str| {
                    tensor.strip_prefix(name).is_some_and(|end| end.is_empty() || is_companion(end))
                };
                Ok(self
                    .places
                    .range(name.clone()..)
                    .map(|(tensor, _)| tensor.as_str())
                    .take_while(|t| t.starts_with(name))
                    .filter(|t| of(t))
                    .collect())
            }
        }
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

    fn state(&self, name: &str) -> Result<&QuantState> {
        match self.parameters.get(name) {
            Some(Parameter::Nf4 { state, .. }) => Ok(state),
            _ => Err(Error::argument("name", "a 4-bit weight", name)),
        }
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

    /// The scales of some blocks.
    fn scales(&self, name: &str, state: &QuantState, blocks: Range<usize>) -> Result<Vec<f32>> {
        let key = format!("{name}{ABSMAX}");
        let Some(nested) = state.nested else { return self.finite_rows(&key, blocks) };
        let mut q = vec![0; blocks.len()];
        self.file(&key)?.read_part(&key, blocks.start as u64, &mut q)?;
        let outer = blocks.start / nested.blocksize;
        let absmax = self.magnitudes(name, outer..block_count(blocks.end, nested.blocksize))?;
        let map = self.finite(name, NESTED_QUANT_MAP)?;
        let scale = |(block, q): (usize, u8)| {
            map[usize::from(q)] * absmax[block / nested.blocksize - outer] + nested.offset
        };
        Ok(blocks.zip(q).map(scale).collect())
    }

    /// Scales of scales.
    fn magnitudes(&self, name: &str, blocks: Range<usize>) -> Result<Vec<f32>> {
        let key = format!("{name}{NESTED_ABSMAX}");
        let absmax = self.finite_rows(&key, blocks.clone())?;
        match absmax.iter().position(|scale| *scale < 0.0) {
            None => Ok(absmax),
            Some(i) => {
                let got = format!("{} at {}", absmax[i], blocks.start + i);
                Err(Error::format(self.file(&key)?.place(&key), "magnitudes", got))
            }
        }
    }

    fn nested(&self, name: &str, state: NestedState) -> Result<NestedAbsmax> {
        let key = format!("{name}{ABSMAX}");
        let q = self.file(&key)?.raw(&key)?.bytes;
        let absmax = self.magnitudes(name, 0..block_count(q.len(), state.blocksize))?;
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
        let all = 0..self.file(&key)?.entry(&key)?.shape[0];
        self.finite_rows(&key, all)
    }

    /// A part of one.
    fn finite_rows(&self, key: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let (file, start) = (self.file(key)?, rows.start);
        let values = file.tensor_rows(key, rows)?.as_slice::<f32>().expect("its type was checked").to_vec();
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(i) => Err(Error::format(
                file.place(key),
                "finite values",
                format!("{} at {}", values[i], start + i),
            )),
        }
    }
}

/// Opens a file, or all shards of an index.
fn open_files(path: &Path) -> Result<Vec<File<'static>>> {
    if path.extension().is_none_or(|extension| extension != "json") {
        return Ok(vec![File::open(path)?]);
    }
    let place = path.display().to_string();
    let index = json::object(&place, &crate::formats::read(path)?)?;
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
