//! Modules: PTX, loaded.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::exec::{GlobalRace, Job, Place};
use crate::fault::{Fault, FaultKind, LoadError, Source};
use crate::lower::lower;
use crate::parse::ast::{Loc, Ptx};
use crate::parse::parse;
use crate::program::Entry;

/// A module of PTX, ready to run. Clones share it.
#[derive(Clone)]
pub struct Module {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    identity: usize,
    ptx: Ptx,
    entries: Vec<Entry>,
}

static NEXT: AtomicUsize = AtomicUsize::new(0);

impl Module {
    /// Loads PTX text. Every instruction of every entry must be known; the error names the first that is not, and its
    /// line. `name` is only for messages.
    pub fn parse(name: &str, ptx: &str) -> Result<Module, LoadError> {
        let named = |mut e: LoadError| {
            e.module = name.to_string();
            e
        };
        let mut parsed = parse(ptx).map_err(named)?;
        let entries = lower(&parsed).map_err(named)?;
        // The bodies are programs now.
        parsed.funcs.clear();
        let identity = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Module { inner: Arc::new(Inner { name: name.to_string(), identity, ptx: parsed, entries }) })
    }

    /// The name given to [`Module::parse`].
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// `.target` of the module, such as `sm_80`.
    pub fn target(&self) -> &str {
        &self.inner.ptx.target
    }

    /// Its kernels, in the order of the text.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.inner.entries.iter()
    }

    /// A kernel by name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.inner.entries.iter().find(|e| e.name == name)
    }

    pub(crate) fn identity(&self) -> usize {
        self.inner.identity
    }

    pub(crate) fn ptx(&self) -> &Ptx {
        &self.inner.ptx
    }

    fn source(&self, loc: Loc) -> Source {
        let file = |n: u32| crate::exec::stats::file_name(&self.inner.ptx.files, n).to_string();
        let inlined_at = (loc.at_line > 0).then(|| (file(loc.at_file), loc.at_line));
        Source { file: file(loc.file), line: loc.line, inlined_at }
    }

    /// Says where a trouble happened.
    pub(crate) fn fault(&self, job: &Job, place: Place) -> Box<Fault> {
        let info = place.pc.map(|pc| &job.entry.kernel.info[pc]);
        let lane = place.trouble.lane.or((place.mask != 0).then(|| place.mask.trailing_zeros() as usize));
        Box::new(Fault {
            kind: place.trouble.kind,
            module: self.inner.name.clone(),
            kernel: job.entry.name.clone(),
            source_line: info.and_then(|i| i.loc).map(|l| self.source(l)),
            ptx_line: info.map_or(0, |i| i.line),
            instruction: info.map_or(String::new(), |i| i.text.to_string()),
            block: Some(block_index(job, place.block)),
            thread: lane.map(|lane| thread_index(job, place.warp * 32 + lane)),
            address: place.trouble.address,
            message: place.trouble.message,
        })
    }

    /// Of all races between blocks, the one at the lowest address.
    pub(crate) fn race_fault(&self, job: &Job, mut races: Vec<GlobalRace>) -> Option<Box<Fault>> {
        let lowest = races.iter().map(|r| r.address).min()?;
        races.retain(|r| r.address == lowest);
        let mut blocks: Vec<u32> = races.iter().flat_map(|r| [r.blocks.0, r.blocks.1]).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let race = races.iter().min_by_key(|r| (r.block, r.pc, r.lane))?;
        let info = &job.entry.kernel.info[race.pc];
        Some(Box::new(Fault {
            kind: FaultKind::GlobalRace,
            module: self.inner.name.clone(),
            kernel: job.entry.name.clone(),
            source_line: info.loc.map(|l| self.source(l)),
            ptx_line: info.line,
            instruction: info.text.to_string(),
            block: Some(block_index(job, race.block)),
            thread: Some(thread_index(job, race.warp * 32 + race.lane)),
            address: Some(lowest),
            message: format!(
                "blocks {:?} and {:?} both write the bytes at this address, {}",
                block_index(job, blocks[0]),
                block_index(job, blocks[1]),
                job.memory.nearest(lowest)
            ),
        }))
    }
}

fn block_index(job: &Job, number: u32) -> [u32; 3] {
    let [x, y, _] = job.launch.grid;
    [number % x, number / x % y, number / (x * y)]
}

fn thread_index(job: &Job, number: usize) -> [u32; 3] {
    let [x, y, _] = job.launch.block;
    let n = number as u32;
    [n % x, n / x % y, n / (x * y)]
}
