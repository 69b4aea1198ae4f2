//! The container: a JSON header that names tensors, then their bytes (<https://huggingface.co/docs/safetensors>).
//!
//! [`File`] reads the header, checks it against the length of the file, and then reads one tensor at a time: a model larger
//! than memory can be walked through. [`Layout`] is the way back: where each tensor of a new file goes. Files are read, not mapped,
//! so that one that shrinks meanwhile gives an error.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value, json};

pub use ::safetensors::Dtype;

use super::json;
use crate::tensor::Data;
use crate::{DType, Error, Result, Tensor};

/// The longest header that is read: the bound of the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// An open file, or one in memory.
#[derive(Debug)]
pub struct File<'a> {
    name: String,
    source: Source<'a>,
    entries: BTreeMap<String, Entry>,
}

/// What a header says about one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The type of the elements.
    pub dtype: Dtype,
    /// Sizes of the dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Where the bytes are, from the start of the file.
    bytes: Range<u64>,
}

impl Entry {
    /// How many bytes the elements take.
    pub fn size(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }
}

#[derive(Debug)]
enum Source<'a> {
    Memory(&'a [u8]),
    Disk { path: PathBuf, file: std::fs::File },
}

/// A tensor of any dtype, as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raw {
    /// The type of the elements.
    pub dtype: Dtype,
    /// Sizes of the dimensions, slowest first.
    pub shape: Vec<usize>,
    /// The elements, little-endian, row-major.
    pub bytes: Vec<u8>,
}

impl File<'static> {
    /// Opens the file at `path` and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read; [`Error::Format`] when the header contradicts itself or the file's length.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.to_owned(), source };
        super::check_file(path)?;
        let file = std::fs::File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let source = Source::Disk { path: path.to_owned(), file };
        Self::with_source(path.display().to_string(), source, length)
    }
}

impl<'a> File<'a> {
    /// Reads a file that is in memory; `name` stands for it in errors.
    ///
    /// # Errors
    /// [`Error::Format`] as [`File::open`].
    pub fn parse(name: impl Into<String>, bytes: &'a [u8]) -> Result<Self> {
        Self::with_source(name.into(), Source::Memory(bytes), bytes.len() as u64)
    }

    fn with_source(name: String, source: Source<'a>, length: u64) -> Result<Self> {
        let short =
            || Error::format(&name, "8 bytes of header length and a header", format!("{length} bytes"));
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(short());
        }
        source.read_at(0, &mut prefix)?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > (length - 8).min(MAX_HEADER) {
            let wanted = format!("a header of at most {} bytes", (length - 8).min(MAX_HEADER));
            return Err(Error::format(&name, wanted, header_length));
        }
        let mut header = vec![0; header_length as usize];
        source.read_at(8, &mut header)?;
        let entries = parse_header(&name, &header, 8 + header_length..length)?;
        Ok(Self { name, source, entries })
    }

    /// The path, or the name given to [`File::parse`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the header lists, by tensor name.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The elements of a tensor, as bytes.
    ///
    /// # Errors
    /// [`Error::Format`] when the file has no tensor of that name; [`Error::Io`] when it cannot be read any more.
    pub fn raw(&self, tensor: &str) -> Result<Raw> {
        let entry = self.entry(tensor)?;
        let bytes = self.elements_at(entry, 0, entry.size() as usize)?;
        Ok(Raw { dtype: entry.dtype, shape: entry.shape.clone(), bytes })
    }

    /// A floating-point tensor.
    ///
    /// # Errors
    /// As [`File::raw`], and [`Error::Unsupported`] when the dtype is none of [`DType`].
    pub fn tensor(&self, tensor: &str) -> Result<Tensor> {
        let entry = self.entry(tensor)?;
        self.tensor_rows(tensor, 0..entry.shape.first().map_or(1, |rows| *rows))
    }

    /// The header's line for a tensor.
    ///
    /// # Errors
    /// [`Error::Format`] when there is none.
    pub fn entry(&self, tensor: &str) -> Result<&Entry> {
        self.entries
            .get(tensor)
            .ok_or_else(|| Error::format(&self.name, format!("a tensor {tensor}"), "none"))
    }

    /// The tensor's name in errors.
    pub(crate) fn place(&self, tensor: &str) -> String {
        format!("{}: {tensor}", self.name)
    }

    /// Reads bytes of a tensor, from `offset` within it on, as many as `into` takes. Threads may read at the same time.
    ///
    /// # Errors
    /// As [`File::raw`]; [`Error::Argument`] when the tensor has fewer bytes.
    pub fn read_part(&self, tensor: &str, offset: u64, into: &mut [u8]) -> Result<()> {
        let entry = self.entry(tensor)?;
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > entry.size()) {
            let got = format!("{} from {offset} on", into.len());
            return Err(Error::argument("into", format!("bytes of the {} of {tensor}", entry.size()), got));
        }
        self.source.read_at(entry.bytes.start + offset, into)
    }

    /// Rows of a floating-point tensor: the elements of `rows` in its first dimension.
    ///
    /// # Errors
    /// As [`File::tensor`]; [`Error::Argument`] when the tensor has no such rows.
    pub fn tensor_rows(&self, tensor: &str, rows: Range<usize>) -> Result<Tensor> {
        let entry = self.entry(tensor)?;
        let (shape, columns) = part(&entry.shape, &rows)?;
        let (start, count) = (rows.start * columns, rows.len() * columns);
        let data = match float(entry.dtype) {
            Some(DType::F32) => Data::F32(self.elements_at::<f32>(entry, start, count)?),
            Some(DType::F16) => Data::F16(self.elements_at::<f16>(entry, start, count)?),
            Some(DType::BF16) => Data::BF16(self.elements_at::<bf16>(entry, start, count)?),
            None => return Err(Error::unsupported(self.place(tensor), format!("the dtype {}", entry.dtype))),
        };
        Tensor::new(shape, data)
    }

    /// Elements of a tensor, which has them.
    fn elements_at<T: bytemuck::Pod>(&self, entry: &Entry, start: usize, count: usize) -> Result<Vec<T>> {
        // The header was checked against the length of the file, so this is never more than the file holds.
        let mut elements = bytemuck::zeroed_vec(count);
        let offset = entry.bytes.start + (start * size_of::<T>()) as u64;
        self.source.read_at(offset, bytemuck::cast_slice_mut(&mut elements))?;
        Ok(elements)
    }
}

/// The shape of some rows, and the elements of each. A scalar is one row.
///
/// # Errors
/// [`Error::Argument`] when there are no such rows.
pub(super) fn part(shape: &[usize], rows: &Range<usize>) -> Result<(Vec<usize>, usize)> {
    let (count, rest) = shape.split_first().map_or((1, shape), |(count, rest)| (*count, rest));
    if rows.start > rows.end || rows.end > count {
        return Err(Error::argument(
            "rows",
            format!("a range of the {count} of {shape:?}"),
            format!("{rows:?}"),
        ));
    }
    let shape = shape.first().map(|_| rows.len()).into_iter().chain(rest.iter().copied()).collect();
    Ok((shape, rest.iter().product()))
}

impl Source<'_> {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        match self {
            Source::Memory(bytes) => {
                let start = offset as usize;
                into.copy_from_slice(&bytes[start..start + into.len()]);
                Ok(())
            }
            Source::Disk { path, file } => {
                read_exact_at(file, offset, into).map_err(|source| Error::Io { path: path.clone(), source })
            }
        }
    }
}

/// Reads at a place, wherever other threads read.
#[cfg(unix)]
fn read_exact_at(file: &std::fs::File, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, offset)
}

/// Reads at a place, wherever other threads read.
#[cfg(windows)]
fn read_exact_at(file: &std::fs::File, mut offset: u64, mut into: &mut [u8]) -> std::io::Result<()> {
    while !into.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, into, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => (offset, into) = (offset + read as u64, &mut into[read..]),
        }
    }
    Ok(())
}

/// The [`DType`] of this name, if it is one.
pub(crate) fn float(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Checks every tensor's shape against its bytes, and that together they fill `data` (from the start of the file) exactly.
fn parse_header(file: &str, header: &[u8], data: Range<u64>) -> Result<BTreeMap<String, Entry>> {
    let mut entries = BTreeMap::new();
    for (name, value) in json::object(file, header)? {
        if name != "__metadata__" {
            let entry = parse_entry(&format!("{file}: {name}"), &value, &data)?;
            entries.insert(name, entry);
        }
    }
    let mut by_offset: Vec<(&String, &Entry)> = entries.iter().collect();
    by_offset.sort_by_key(|(_, entry)| (entry.bytes.start, entry.bytes.end));
    let mut end = data.start;
    for (name, entry) in by_offset {
        if entry.bytes.start != end {
            let place = format!("{file}: {name}: data_offsets");
            return Err(Error::format(
                place,
                format!("to begin at {}", end - data.start),
                entry.bytes.start - data.start,
            ));
        }
        end = entry.bytes.end;
    }
    if end != data.end {
        let wanted = format!("{} bytes of tensors", end - data.start);
        return Err(Error::format(file, wanted, data.end - data.start));
    }
    Ok(entries)
}

fn parse_entry(place: &str, value: &Value, data: &Range<u64>) -> Result<Entry> {
    let fields = value.as_object().ok_or_else(|| Error::format(place, "an object", json::kind(value)))?;
    let field =
        |key: &str| fields.get(key).ok_or_else(|| Error::format(place, format!("the key {key}"), "none"));
    if let Some(key) = fields.keys().find(|k| !["dtype", "shape", "data_offsets"].contains(&k.as_str())) {
        return Err(Error::format(place, "the keys dtype, shape, data_offsets", key));
    }
    let dtype: Dtype = serde_json::from_value(field("dtype")?.clone()).map_err(|_| {
        Error::format(format!("{place}: dtype"), "a safetensors dtype", json::short(&fields["dtype"]))
    })?;
    let shape = json::sizes(&format!("{place}: shape"), field("shape")?)?;
    let offsets = json::sizes(&format!("{place}: data_offsets"), field("data_offsets")?)?;
    let length = data.end - data.start;
    let bytes = match offsets[..] {
        [start, end] if start <= end && end as u64 <= length => {
            data.start + start as u64..data.start + end as u64
        }
        _ => {
            let wanted = format!("a range of the {length} bytes of tensors");
            return Err(Error::format(
                format!("{place}: data_offsets"),
                wanted,
                json::short(&fields["data_offsets"]),
            ));
        }
    };
    let entry = Entry { dtype, shape, bytes };
    if byte_size(dtype, &entry.shape) != Some(entry.size()) {
        let wanted = format!("the {} bytes of its data_offsets", entry.size());
        return Err(Error::format(format!("{place}: shape"), wanted, format!("{dtype} {:?}", entry.shape)));
    }
    Ok(entry)
}

/// Bytes of a tensor; `None` when they overflow or end within a byte.
fn byte_size(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let bits = crate::tensor::numel(shape)?.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits as u64 / 8)
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Item<'a> {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: std::borrow::Cow<'a, [u8]>,
}

impl<'a> Item<'a> {
    pub(crate) fn new(
        dtype: Dtype,
        shape: impl Into<Vec<usize>>,
        bytes: impl Into<std::borrow::Cow<'a, [u8]>>,
    ) -> Self {
        Self { dtype, shape: shape.into(), bytes: bytes.into() }
    }
}

impl<'a> From<&'a Tensor> for Item<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        let dtype = match tensor.dtype() {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
        };
        Self::new(dtype, tensor.shape(), tensor.as_bytes())
    }
}

impl From<Raw> for Item<'_> {
    fn from(raw: Raw) -> Self {
        Self::new(raw.dtype, raw.shape, raw.bytes)
    }
}

impl<'a> From<&'a Raw> for Item<'a> {
    fn from(raw: &'a Raw) -> Self {
        Self::new(raw.dtype, &raw.shape[..], &raw.bytes[..])
    }
}

/// A file to be written: its header, and where its tensors go. So a file can be written piece by piece, in any order, by several
/// threads, and without ever being in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    header: Vec<u8>,
    ranges: BTreeMap<String, Range<u64>>,
    len: u64,
}

impl Layout {
    /// Lays tensors (name, dtype, shape) one behind the other, in this order. The reference implementation sorts by dtype, widest
    /// first, and then by name; readers take any order.
    ///
    /// The header is filled up with spaces to `min_header` bytes, so that it can be laid out before the last word about a tensor at
    /// the end is known.
    ///
    /// # Errors
    /// [`Error::Argument`] when a name comes twice, or a tensor's size overflows or ends within a byte.
    pub fn new(
        tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
        min_header: usize,
    ) -> Result<Self> {
        let (mut fields, mut ranges, mut end) = (Map::new(), BTreeMap::new(), 0u64);
        fields.insert("__metadata__".into(), json!({ "format": "pt" }));
        for (name, dtype, shape) in tensors {
            let start = end;
            let size = byte_size(dtype, &shape).and_then(|size| start.checked_add(size));
            end = size.ok_or_else(|| {
                Error::argument(
                    format!("tensors[{name:?}]"),
                    "whole bytes that can be counted",
                    format!("{dtype} {shape:?}"),
                )
            })?;
            let entry = json!({ "dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, end] });
            if fields.insert(name.clone(), entry).is_some() {
                return Err(Error::argument("tensors", format!("one tensor {name}"), "two"));
            }
            ranges.insert(name, start..end);
        }
        let mut text = Value::Object(fields).to_string().into_bytes();
        // The data starts at a multiple of eight bytes.
        text.resize(text.len().max(min_header.saturating_sub(8)).next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        let data = header.len() as u64;
        ranges.values_mut().for_each(|range| *range = data + range.start..data + range.end);
        Ok(Self { header, ranges, len: data + end })
    }

    /// What the file begins with.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// The tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.ranges.keys().map(String::as_str)
    }

    /// Where the bytes of a tensor go, from the start of the file.
    pub fn range(&self, tensor: &str) -> Option<Range<u64>> {
        self.ranges.get(tensor).cloned()
    }

    /// How long the file will be. (It is never empty.)
    #[expect(clippy::len_without_is_empty, reason = "a file has a header")]
    pub fn len(&self) -> u64 {
        self.len
    }
}

/// Writes the file in the order of the reference implementation: by dtype, widest first, then by name.
pub(crate) fn write(mut to: impl Write, items: &BTreeMap<String, Item>) -> std::io::Result<()> {
    let mut order: Vec<(&String, &Item)> = items.iter().collect();
    order.sort_by_key(|(_, item)| Reverse(item.dtype));
    let tensors = order.iter().map(|(name, item)| ((*name).clone(), item.dtype, item.shape.clone()));
    let layout = Layout::new(tensors, 0).map_err(std::io::Error::other)?;
    to.write_all(layout.header())?;
    order.iter().try_for_each(|(_, item)| to.write_all(&item.bytes))
}

/// Replaces the file at `path` as a whole: a reader sees the old one or the new one, never half of it.
pub(crate) fn replace(path: &Path, fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let filled = std::fs::File::create(&partial).and_then(|file| {
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        fill(&mut writer)?;
        writer.flush()
    });
    filled.and_then(|()| std::fs::rename(&partial, path)).map_err(|source| {
        // The error that matters is the first one.
        let _ = std::fs::remove_file(&partial);
        Error::Io { path: path.to_owned(), source }
    })
}
