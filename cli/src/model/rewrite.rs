//! From a source to an output, slab by slab.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result, bail, ensure};
use indicatif::ProgressBar;
use lora_kernels::Tensor;
use lora_kernels::formats::bitsandbytes::{Parameter, QuantState, companions, tensors_of};
use lora_kernels::formats::safetensors::{Dtype, Layout};
use lora_kernels::nf4::{Absmax, Codebook, Nf4Matrix, QuantType, block_count, nest};
use serde_json::{Value, json};

use super::source::{INDEX, Source, file_name};
use super::{Output, Summary};

/// Elements of a slab: large enough that a call costs nothing, small enough that several are cheap to hold.
const SLAB: usize = 1 << 22;

/// What a command does to a model.
pub trait Change: Sync {
    /// What becomes of a parameter.
    fn fate(&self, name: &str, parameter: &Parameter) -> Result<Fate>;

    /// The changed rows of a parameter. They begin at a block of 4-bit weights, old and new.
    fn rows(&self, source: &Source, name: &str, rows: Range<usize>) -> Result<Rows>;

    /// Called once for each changed parameter, when all its rows have been written.
    fn done(&self, _name: &str) -> Result<()> {
        Ok(())
    }
}

/// What becomes of a parameter.
pub enum Fate {
    /// Its tensors stay as they are.
    Keep,
    /// It becomes another one of the same shape.
    Change(Parameter, Slab),
}

/// How much of a parameter is changed at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slab {
    /// As many rows as are convenient.
    Any,
    /// So many rows.
    Rows(usize),
    /// All rows.
    Whole,
}

/// New rows.
pub enum Rows {
    /// Of a dense parameter.
    Dense(Tensor),
    /// Of a 4-bit weight, with plain scales; they are quantised when all are known, if they have to be. A whole weight may come
    /// with its own quantised scales.
    Nf4(Box<Nf4Matrix>),
}

/// Writes the model as `change` has it, without a `config.json`, and carries over the other files. Returns the bytes read and
/// written.
pub fn rewrite(
    source: &Source,
    output: &Output,
    change: &dyn Change,
    summary: &mut Summary,
) -> Result<[u64; 2]> {
    let (carried, left) = source.others()?;
    carried.iter().try_for_each(|inside| output.carry(source.folder(), inside))?;
    let names = |paths: &[PathBuf]| paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
    if !left.is_empty() {
        summary.say(format!("not carried over, as they hold weights: {}", names(&left).join(", ")));
    }
    summary.field("left_out", names(&left));

    let mut work = Work::plan(source, output, change)?;
    let read: u64 =
        source.reader().files().iter().flat_map(|file| file.entries().values()).map(|e| e.size()).sum();
    summary.bar().set_length(read);
    work.run(summary.bar())?;
    let mut shards = Vec::new();
    for file in work.files.drain(..) {
        shards.push(file.finish()?);
    }
    let written = shards.iter().map(|(_, layout)| layout.len()).sum();
    if let Some(index) = source.index()? {
        output.write(INDEX, (index_text(index, &shards) + "\n").as_bytes())?;
    }
    Ok([read, written])
}

/// The index of the new shards. What else it said is kept.
fn index_text(mut index: Value, shards: &[(String, Layout)]) -> String {
    let sizes = shards.iter().map(|(_, layout)| layout.len() - layout.header().len() as u64);
    index["metadata"]["total_size"] = json!(sizes.sum::<u64>());
    let tensors = shards.iter().flat_map(|(name, layout)| layout.tensors().map(move |tensor| (tensor, name)));
    index["weight_map"] = tensors.map(|(tensor, name)| (tensor.to_owned(), json!(name))).collect();
    format!("{index:#}")
}

/// A file that is being written.
struct Shard {
    name: String,
    path: PathBuf,
    file: File,
    /// Held while bytes are written: threads that wait for a file in the kernel may do so spinning.
    writing: Mutex<()>,
    /// In the order in which they will lie.
    tensors: Vec<(String, Dtype, Vec<usize>)>,
    layout: Layout,
    /// Texts that lie at the end, as their lengths are known last.
    texts: Mutex<Vec<(String, Vec<u8>)>>,
}

/// A parameter that changes.
struct Changed<'a> {
    name: &'a str,
    shard: usize,
    columns: usize,
    whole: bool,
    /// Slabs that are not done.
    left: AtomicUsize,
    /// Of a parameter that will be a 4-bit weight.
    target: Option<(QuantState, Mutex<Absmax>)>,
}

/// One step of a worker.
enum Piece<'a> {
    /// Bytes of a tensor that stays.
    Copy { shard: usize, tensor: &'a str, bytes: Range<u64> },
    /// Rows of a parameter that changes, and how much of the input that is.
    Change { changed: usize, rows: Range<usize>, bytes: u64 },
}

/// Everything that is to be done.
struct Work<'a> {
    source: &'a Source,
    change: &'a dyn Change,
    files: Vec<Shard>,
    changed: Vec<Changed<'a>>,
    pieces: Vec<Piece<'a>>,
    /// Held while a parameter is changed as a whole, so that only one of them is in memory.
    whole: Mutex<()>,
}

impl<'a> Work<'a> {
    fn plan(source: &'a Source, output: &Output, change: &'a dyn Change) -> Result<Self> {
        let mut work = Self {
            source,
            change,
            files: Vec::new(),
            changed: Vec::new(),
            pieces: Vec::new(),
            whole: Mutex::default(),
        };
        for (shard, file) in source.reader().files().iter().enumerate() {
            let mut tensors = Vec::new();
            for (name, parameter) in source.reader().parameters() {
                if file.entries().contains_key(name) {
                    let planned = work.parameter(shard, name, parameter, &mut tensors);
                    planned.with_context(|| name.clone())?;
                }
            }
            work.files.push(Shard::create(file_name(file.name()), output, tensors)?);
        }
        Ok(work)
    }

    /// Plans a parameter; adds the tensors that it will have.
    fn parameter(
        &mut self,
        shard: usize,
        name: &'a str,
        parameter: &Parameter,
        tensors: &mut Vec<(String, Dtype, Vec<usize>)>,
    ) -> Result<()> {
        let reader = self.source.reader();
        let (target, slab) = match self.change.fate(name, parameter)? {
            Fate::Keep => {
                for tensor in reader.tensors(name)? {
                    let entry = reader.entry(tensor)?;
                    tensors.push((tensor.to_owned(), entry.dtype, entry.shape.clone()));
                    let step = 2 * SLAB as u64;
                    for start in (0..entry.size()).step_by(step as usize) {
                        let bytes = start..(start + step).min(entry.size());
                        self.pieces.push(Piece::Copy { shard, tensor, bytes });
                    }
                }
                return Ok(());
            }
            Fate::Change(target, slab) => (target, slab),
        };
        let shape = target.shape().to_vec();
        ensure!(shape == parameter.shape(), "wanted shape {:?}, got {shape:?}", parameter.shape());
        let count = shape.first().map_or(1, |count| *count);
        let columns: usize = shape.iter().skip(1).product();
        let blocksize = |parameter: &Parameter| match parameter {
            Parameter::Nf4 { state, .. } => state.blocksize,
            Parameter::Dense { .. } => 1,
        };
        let blocksize = blocksize(parameter).max(blocksize(&target));
        let whole = slab == Slab::Whole;
        let slab = slab_rows(&shape, blocksize, slab);
        let (changed, slabs) = (self.changed.len(), count.div_ceil(slab));
        let bytes: u64 =
            reader.tensors(name)?.into_iter().map(|t| reader.entry(t).map_or(0, |e| e.size())).sum();
        for start in (0..count).step_by(slab) {
            let rows = start..(start + slab).min(count);
            let bytes = bytes * rows.len() as u64 / count as u64;
            self.pieces.push(Piece::Change { changed, rows, bytes });
        }
        let target = match target {
            Parameter::Dense { dtype, .. } => {
                tensors.push((name.to_owned(), dtype, shape));
                None
            }
            Parameter::Nf4 { state, storage } => {
                tensors.extend(tensors_of(name, &state, storage)?);
                // Not touched before its slabs are, and dropped when they are done.
                let absmax = Absmax::Plain(vec![0.0; block_count(state.numel(), state.blocksize)]);
                Some((state, Mutex::new(absmax)))
            }
        };
        let left = AtomicUsize::new(slabs);
        self.changed.push(Changed { name, shard, columns, whole, left, target });
        Ok(())
    }

    /// Does all pieces. One thread more than there are processors: while it reads or writes, they compute.
    fn run(&self, bar: &ProgressBar) -> Result<()> {
        keep_memory();
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let worker = || {
            while let Some(piece) = self.pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if failed.load(Ordering::Relaxed) {
                    break;
                }
                if let Err(error) = self.piece(piece) {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
                bar.inc(match piece {
                    Piece::Copy { bytes, .. } => bytes.end - bytes.start,
                    Piece::Change { bytes, .. } => *bytes,
                });
            }
            Ok(())
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from) + 1;
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
        })
    }

    fn piece(&self, piece: &Piece) -> Result<()> {
        match piece {
            Piece::Copy { shard, tensor, bytes } => {
                let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
                self.source.reader().read_part(tensor, bytes.start, &mut buffer)?;
                self.files[*shard].write(tensor, bytes.start, buffer)
            }
            Piece::Change { changed, rows, .. } => {
                let changed = &self.changed[*changed];
                let _alone = changed.whole.then(|| lock(&self.whole));
                let done = self.rows(changed, rows.clone());
                done.with_context(|| format!("{}, from row {} on", changed.name, rows.start))
            }
        }
    }

    fn rows(&self, changed: &Changed, rows: Range<usize>) -> Result<()> {
        let (shard, start) = (&self.files[changed.shard], rows.start * changed.columns);
        match (self.change.rows(self.source, changed.name, rows)?, &changed.target) {
            (Rows::Dense(tensor), None) => {
                shard.write(changed.name, (start * tensor.dtype().size()) as u64, tensor.as_bytes())?;
            }
            (Rows::Nf4(matrix), Some((state, scales))) => {
                shard.write(changed.name, start as u64 / 2, matrix.packed())?;
                let first = start / state.blocksize;
                let absmax = matrix.absmax().dequantize();
                if let Some(i) = absmax.iter().position(|scale| !scale.is_finite()) {
                    let block = (first + i) * state.blocksize;
                    bail!(
                        "wanted finite numbers, got others among elements {block}..{}",
                        block + state.blocksize
                    );
                }
                match (matrix.absmax(), &mut *lock(scales)) {
                    (Absmax::Plain(part), Absmax::Plain(all)) => {
                        all[first..first + part.len()].copy_from_slice(part)
                    }
                    (nested, all) => *all = nested.clone(),
                }
            }
            _ => unreachable!("rows are of the kind that was planned"),
        }
        if changed.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            if let Some((state, scales)) = &changed.target {
                let scales = match std::mem::replace(&mut *lock(scales), Absmax::Plain(Vec::new())) {
                    Absmax::Plain(absmax) if state.nested.is_some() => Absmax::Nested(nest(&absmax)),
                    scales => scales,
                };
                shard.write_scales(changed.name, state, &scales)?;
            }
            self.change.done(changed.name)?;
        }
        Ok(())
    }
}

/// glibc gives large pieces of memory back to the system as soon as they are free, and gets them again page by page: that is a third
/// of a merge's time. Once it has freed one of almost 32 MiB it keeps those that are smaller.
fn keep_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity((32 << 20) - (1 << 16))));
}

/// Rows of a slab of a parameter, 1 or more. They fill whole blocks.
pub fn slab_rows(shape: &[usize], blocksize: usize, slab: Slab) -> usize {
    let columns: usize = shape.iter().skip(1).product();
    match slab {
        Slab::Rows(rows) => rows.max(1),
        Slab::Whole => shape.first().map_or(1, |count| *count).max(1),
        Slab::Any => {
            // Sizes of blocks are powers of two.
            let step = blocksize >> columns.trailing_zeros().min(blocksize.trailing_zeros());
            (SLAB / columns.max(1)).next_multiple_of(step).max(step)
        }
    }
}

impl Shard {
    /// Lays out the file, and opens it.
    fn create(name: &str, output: &Output, mut tensors: Vec<(String, Dtype, Vec<usize>)>) -> Result<Self> {
        tensors.sort_by_key(|(name, dtype, _)| (is_text(name), std::cmp::Reverse(*dtype)));
        let texts = tensors.iter().filter(|(name, ..)| is_text(name)).count();
        let layout = Layout::new(tensors.iter().cloned(), 0)?;
        // Room for the digits of the texts' lengths and places, when these are known.
        let layout = Layout::new(tensors.iter().cloned(), layout.header().len() + 16 * texts)?;
        let path = output.path(name)?;
        let file = File::create_new(&path).with_context(|| path.display().to_string())?;
        Ok(Self {
            name: name.to_owned(),
            path,
            file,
            tensors,
            layout,
            writing: Mutex::default(),
            texts: Mutex::default(),
        })
    }

    /// Writes bytes of a tensor, from `offset` within it on. Texts are kept until the end.
    fn write<'b>(&self, tensor: &str, offset: u64, bytes: impl Into<Cow<'b, [u8]>>) -> Result<()> {
        let bytes = bytes.into();
        if is_text(tensor) {
            lock(&self.texts).push((tensor.to_owned(), bytes.into_owned()));
            return Ok(());
        }
        let range = self.layout.range(tensor).expect("it was laid out");
        let _one = lock(&self.writing);
        write_all_at(&self.file, range.start + offset, &bytes)
            .with_context(|| self.path.display().to_string())
    }

    /// Writes all that a 4-bit weight has besides its codes.
    fn write_scales(&self, weight: &str, state: &QuantState, absmax: &Absmax) -> Result<()> {
        let mut state = state.clone();
        if let (Some(state), Absmax::Nested(nested)) = (&mut state.nested, absmax) {
            state.offset = nested.offset();
        }
        for (tensor, raw) in companions(weight, &state, &codebook(state.quant_type), absmax)? {
            self.write(&tensor, 0, raw.bytes)?;
        }
        Ok(())
    }

    /// Writes the texts and, last of all, the header, and brings the file to the disk. Returns its name and its layout.
    fn finish(mut self) -> Result<(String, Layout)> {
        let texts = self.texts.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        for (text, bytes) in &texts {
            let place = self.tensors.iter_mut().find(|(name, ..)| name == text).expect("it was laid out");
            place.2 = vec![bytes.len()];
        }
        let layout = Layout::new(self.tensors, self.layout.header().len())?;
        ensure!(
            layout.header().len() == self.layout.header().len(),
            "{}: no room for its header",
            self.path.display()
        );
        let write = || {
            for (text, bytes) in &texts {
                write_all_at(&self.file, layout.range(text).expect("it was laid out").start, bytes)?;
            }
            write_all_at(&self.file, 0, layout.header())?;
            self.file.sync_all()
        };
        write().with_context(|| self.path.display().to_string())?;
        Ok((self.name, layout))
    }
}

/// Whether a tensor is the JSON text of a 4-bit weight.
fn is_text(tensor: &str) -> bool {
    tensor.contains(".quant_state.")
}

/// The table of a quantisation type that can be written.
fn codebook(quant_type: QuantType) -> Codebook {
    if quant_type == QuantType::Fp4 { Codebook::fp4() } else { Codebook::nf4() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Writes at a place, wherever other threads write.
#[cfg(unix)]
pub fn write_all_at(file: &File, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Writes at a place, wherever other threads write.
#[cfg(windows)]
pub fn write_all_at(file: &File, mut offset: u64, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, offset)? {
            0 => return Err(std::io::ErrorKind::WriteZero.into()),
            written => (offset, bytes) = (offset + written as u64, &bytes[written..]),
        }
    }
    Ok(())
}
