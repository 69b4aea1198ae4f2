//! The file from which a merge is undone: a safetensors file with the records of all slabs, copies of what has been replaced, and
//! the model's `config.json`.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use lora_kernels::Tensor;
use lora_kernels::adapter::{Adapter, Base, Restored, Undo};
use lora_kernels::formats::bitsandbytes::{Parameter, Reader};
use lora_kernels::formats::safetensors::{Dtype, Entry, File, Layout};
use serde_json::{Map, Value};

use super::rewrite::{Slab, slab_rows, write_all_at};
use super::source::CONFIG;
use super::{Adapters, Change, Fate, Output, Rows, Source};

/// Before the name of a weight, and its first row, is what became of its rows.
const RECORD: &str = "undo/";
/// Before the name of a tensor that was replaced is what it was.
const COPY: &str = "copy/";

/// Writes the file for a merge of `adapters` into `source`, as it lies in `output`. It has its name when it is complete. Returns how
/// many bytes it has.
pub fn record(source: &Source, adapters: &Adapters, output: &Output, path: &Path) -> Result<u64> {
    let merged = Reader::open(output.path("")?)?;
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = write(source, adapters, &merged, &partial).with_context(|| partial.display().to_string());
    let written = written.and_then(|bytes| {
        fs::rename(&partial, path).with_context(|| path.display().to_string())?;
        Ok(bytes)
    });
    if written.is_err() {
        // The error that matters is the first one.
        let _ = fs::remove_file(&partial);
    }
    written
}

fn write(source: &Source, adapters: &Adapters, merged: &Reader<'static>, path: &Path) -> Result<u64> {
    let file = fs::File::create(path)?;
    let mut tensors = plan(source, adapters)?;
    // Room for the digits of sizes that are not known yet.
    let unknown = |(name, content): &(String, Content)| match content {
        Content::Record { .. } => (name.clone(), Dtype::U8, vec![1 << 40]),
        Content::Bytes { dtype, shape, .. } => (name.clone(), *dtype, shape.clone()),
    };
    let header = Layout::new(tensors.iter().map(unknown), 0)?.header().len();
    let (mut end, mut known) = (header as u64, Vec::new());
    for (name, content) in tensors.drain(..) {
        let (dtype, shape, bytes) = match content {
            Content::Bytes { dtype, shape, bytes } => (dtype, shape, bytes),
            Content::Record { weight, rows } => {
                let adapters = adapters.rows(&weight, rows.clone())?;
                let adapters: Vec<&Adapter> = adapters.iter().collect();
                let [original, merged] =
                    [source.reader(), merged].map(|reader| Stored::rows(reader, &weight, rows.clone()));
                let (original, merged) = (original?, merged?);
                let undo = Undo::record(&adapters, original.base(), merged.base())
                    .with_context(|| weight.clone())?;
                let bytes = undo.as_bytes().to_vec();
                (Dtype::U8, vec![bytes.len()], bytes)
            }
        };
        write_all_at(&file, end, &bytes)?;
        end += bytes.len() as u64;
        known.push((name, dtype, shape));
    }
    let layout = Layout::new(known, header)?;
    ensure!(layout.header().len() == header && layout.len() == end, "no room for its header");
    write_all_at(&file, 0, layout.header())?;
    file.sync_all()?;
    Ok(end)
}

/// What a tensor of the file holds.
enum Content {
    Bytes { dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8> },
    Record { weight: String, rows: Range<usize> },
}

fn plan(source: &Source, adapters: &Adapters) -> Result<Vec<(String, Content)>> {
    let config = serde_json::to_vec(source.config())?;
    let mut tensors = vec![(
        CONFIG.to_owned(),
        Content::Bytes { dtype: Dtype::U8, shape: vec![config.len()], bytes: config },
    )];
    for (name, parameter) in source.reader().parameters() {
        if adapters.has_bias(name) || adapters.replacement(name).is_some() {
            let raw = source.reader().raw(name)?;
            tensors.push((
                format!("{COPY}{name}"),
                Content::Bytes { dtype: raw.dtype, shape: raw.shape, bytes: raw.bytes },
            ));
        } else if !adapters.on(name).is_empty() {
            let whole = matches!(parameter, Parameter::Nf4 { .. }) || adapters.need_whole(name);
            let slab = if whole { Slab::Whole } else { Slab::Any };
            let (rows, step) = (parameter.shape()[0], slab_rows(parameter.shape(), 1, slab));
            for start in (0..rows).step_by(step) {
                let rows = start..(start + step).min(rows);
                tensors.push((
                    format!("{RECORD}{name}/{start}"),
                    Content::Record { weight: name.clone(), rows },
                ));
            }
        }
    }
    // What is dense says by an empty tensor what type it had.
    let dense = source.reader().parameters().iter().filter(|(name, _)| !adapters.on(name).is_empty());
    for (name, parameter) in dense {
        if let Parameter::Dense { dtype, .. } = parameter {
            tensors.push((
                format!("{DTYPE}{name}"),
                Content::Bytes { dtype: *dtype, shape: vec![0], bytes: Vec::new() },
            ));
        }
    }
    Ok(tensors)
}

/// Before the name of a weight is an empty tensor of its type.
const DTYPE: &str = "dtype/";

/// Rows of a weight in either form; of a 4-bit one, all.
enum Stored {
    Dense(Tensor),
    Nf4(Box<lora_kernels::nf4::Nf4Matrix>),
}

impl Stored {
    fn rows(reader: &Reader<'static>, name: &str, rows: Range<usize>) -> Result<Self> {
        Ok(match reader.parameters().get(name) {
            Some(Parameter::Nf4 { .. }) => Stored::Nf4(reader.nf4(name)?.into()),
            _ => Stored::Dense(reader.dense_rows(name, rows)?),
        })
    }

    fn base(&self) -> Base<'_> {
        match self {
            Stored::Dense(tensor) => tensor.into(),
            Stored::Nf4(matrix) => (&**matrix).into(),
        }
    }
}

/// Restores a model from such a file.
pub struct Restore<'a> {
    file: File<'static>,
    adapters: &'a Adapters,
    /// First rows of the records of each weight, in their order.
    records: BTreeMap<String, Vec<usize>>,
}

impl<'a> Restore<'a> {
    /// Opens the file.
    pub fn open(path: &Path, adapters: &'a Adapters) -> Result<Self> {
        let file = File::open(path)?;
        let mut records: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for name in file.entries().keys() {
            if let Some((weight, row)) = name.strip_prefix(RECORD).and_then(|record| record.rsplit_once('/'))
            {
                let row = row.parse().with_context(|| format!("{}: {name}", path.display()))?;
                records.entry(weight.to_owned()).or_default().push(row);
            }
        }
        records.values_mut().for_each(|rows| rows.sort_unstable());
        if let Some((weight, _)) = records.iter().find(|(weight, _)| adapters.on(weight).is_empty()) {
            anyhow::bail!("{}: wanted the adapters of the merge, got none for {weight}", path.display());
        }
        Ok(Self { file, adapters, records })
    }

    /// The model's `config.json`, as it was.
    pub fn config(&self) -> Result<Map<String, Value>> {
        let bytes = self.file.raw(CONFIG)?.bytes;
        serde_json::from_slice(&bytes).with_context(|| format!("{}: {CONFIG}", self.file.name()))
    }

    fn copy(&self, name: &str) -> Option<(String, &Entry)> {
        let copy = format!("{COPY}{name}");
        self.file.entries().get(&copy).map(|entry| (copy, entry))
    }
}

impl Change for Restore<'_> {
    fn fate(&self, name: &str, parameter: &Parameter) -> Result<Fate> {
        if let Some((_, entry)) = self.copy(name) {
            return Ok(Fate::Change(
                Parameter::Dense { dtype: entry.dtype, shape: entry.shape.clone() },
                Slab::Any,
            ));
        }
        let Some(starts) = self.records.get(name) else {
            ensure!(
                self.adapters.on(name).is_empty(),
                "{}: no record of it, though it has adapters",
                self.file.name()
            );
            return Ok(Fate::Keep);
        };
        Ok(match parameter {
            Parameter::Nf4 { .. } => Fate::Change(parameter.clone(), Slab::Whole),
            Parameter::Dense { shape, .. } => {
                let dtype = self.file.entry(&format!("{DTYPE}{name}"))?.dtype;
                let slab = starts.get(1).map_or(Slab::Whole, |second| Slab::Rows(*second));
                Fate::Change(Parameter::Dense { dtype, shape: shape.clone() }, slab)
            }
        })
    }

    fn rows(&self, source: &Source, name: &str, rows: Range<usize>) -> Result<Rows> {
        if let Some((copy, _)) = self.copy(name) {
            return Ok(Rows::Dense(self.file.tensor_rows(&copy, rows)?));
        }
        let undo = Undo::from_bytes(self.file.raw(&format!("{RECORD}{name}/{}", rows.start))?.bytes)?;
        let adapters = self.adapters.rows(name, rows.clone())?;
        let merged = Stored::rows(source.reader(), name, rows)?;
        Ok(match undo.restore(&adapters.iter().collect::<Vec<_>>(), merged.base())? {
            Restored::Dense(tensor) => Rows::Dense(tensor),
            Restored::Nf4(matrix) => Rows::Nf4(matrix.into()),
        })
    }
}
