//! What a launch did, in numbers that are exact and repeat.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;

use crate::Source;

/// Classes that instructions are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Class {
    /// Integer arithmetic, logic, shifts, permutes.
    Integer,
    /// f32 arithmetic.
    Float,
    /// f16 and bf16 arithmetic.
    Half,
    /// f64 arithmetic.
    Double,
    /// `ex2`, `rcp`, `rsqrt`, `sin`, `tanh` and the like.
    Special,
    /// Conversions.
    Convert,
    /// Moves, packing, address conversions.
    Move,
    /// Comparisons, selections, predicate logic.
    Predicate,
    /// Branches, calls and exits.
    Branch,
    /// Loads, all spaces.
    Load,
    /// Stores, all spaces.
    Store,
    /// Atomics and reductions to memory.
    Atomic,
    /// Shuffles, votes, matches, warp reductions.
    Warp,
    /// `mma`, `wgmma`, `ldmatrix`, `stmatrix`.
    Matrix,
    /// Asynchronous copies and their groups.
    Async,
    /// Barriers, fences, waits.
    Barrier,
    /// Everything else.
    Other,
}

/// Every class, in the order of the table.
pub const CLASSES: [Class; 17] = [
    Class::Integer,
    Class::Float,
    Class::Half,
    Class::Double,
    Class::Special,
    Class::Convert,
    Class::Move,
    Class::Predicate,
    Class::Branch,
    Class::Load,
    Class::Store,
    Class::Atomic,
    Class::Warp,
    Class::Matrix,
    Class::Async,
    Class::Barrier,
    Class::Other,
];

/// Instructions issued for warps, and executed by threads (those switched off by a predicate do not count).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Issued {
    /// Per warp.
    pub warps: u64,
    /// Per thread.
    pub threads: u64,
}

impl AddAssign for Issued {
    fn add_assign(&mut self, other: Issued) {
        self.warps += other.warps;
        self.threads += other.threads;
    }
}

/// Traffic between threads and one memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Warp instructions.
    pub requests: u64,
    /// Bytes that threads asked for; the same byte twice counts twice.
    pub bytes: u64,
    /// 32-byte sectors asked for, each once per instruction.
    pub sectors: u64,
    /// Sectors that the same instructions need at least: distinct bytes over 32, rounded up.
    pub ideal_sectors: u64,
    /// Distinct sectors over the whole launch: what a perfect cache would move.
    pub distinct_sectors: u64,
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Traffic) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.sectors += other.sectors;
        self.ideal_sectors += other.ideal_sectors;
        self.distinct_sectors += other.distinct_sectors;
    }
}

impl Traffic {
    /// Sectors asked for over the fewest possible; 1.0 is perfect.
    pub fn sector_ratio(&self) -> f64 {
        if self.ideal_sectors == 0 { 1.0 } else { self.sectors as f64 / self.ideal_sectors as f64 }
    }
}

/// Shared memory accesses of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedTraffic {
    /// Warp instructions (each matrix of `ldmatrix` is one).
    pub requests: u64,
    /// Bytes that threads asked for.
    pub bytes: u64,
    /// Passes through the banks beyond the fewest that the access width allows: the bank conflicts.
    pub conflicts: u64,
}

impl AddAssign for SharedTraffic {
    fn add_assign(&mut self, other: SharedTraffic) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.conflicts += other.conflicts;
    }
}

/// Counts of one launch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counters {
    /// Blocks executed.
    pub blocks: u64,
    /// Instructions by class.
    pub instructions: BTreeMap<Class, Issued>,
    /// Instructions by source line, where `-lineinfo` tells it.
    pub lines: BTreeMap<(String, u32), Issued>,
    /// Bank conflicts by source line.
    pub conflict_lines: BTreeMap<(String, u32), u64>,
    /// Loads from global memory, `cp.async` and bulk copies included.
    pub global_loads: Traffic,
    /// Stores to global memory, reductions excluded.
    pub global_stores: Traffic,
    /// Loads from shared memory, `ldmatrix` included.
    pub shared_loads: SharedTraffic,
    /// Stores to shared memory, `stmatrix` included; asynchronous copies excluded.
    pub shared_stores: SharedTraffic,
    /// Bytes moved by `cp.async` and bulk copies.
    pub async_bytes: u64,
    /// Multiply-adds of matrix instructions.
    pub matrix_ops: u64,
    /// Completed waits at block barriers, per warp.
    pub barriers: u64,
    /// Atomic operations of threads, on global and shared memory.
    pub atomics: u64,
    /// Loads and stores of threads to local memory (spills and indexed arrays).
    pub local_accesses: u64,
}

impl Counters {
    /// All instructions together.
    pub fn total(&self) -> Issued {
        let mut total = Issued::default();
        self.instructions.values().for_each(|&i| total += i);
        total
    }

    /// Instructions of one class.
    pub fn class(&self, class: Class) -> Issued {
        self.instructions.get(&class).copied().unwrap_or_default()
    }

    /// Source lines by instructions of threads, hottest first.
    pub fn hot_lines(&self) -> Vec<(Source, Issued)> {
        let mut lines: Vec<_> = self
            .lines
            .iter()
            .map(|((file, line), &n)| (Source { file: file.clone(), line: *line, inlined_at: None }, n))
            .collect();
        lines.sort_by_key(|(_, n)| std::cmp::Reverse(n.threads));
        lines
    }

    pub(crate) fn merge(&mut self, other: &Counters) {
        self.blocks += other.blocks;
        for (class, &n) in &other.instructions {
            *self.instructions.entry(*class).or_default() += n;
        }
        for (line, &n) in &other.lines {
            *self.lines.entry(line.clone()).or_default() += n;
        }
        for (line, &n) in &other.conflict_lines {
            *self.conflict_lines.entry(line.clone()).or_default() += n;
        }
        self.global_loads += other.global_loads;
        self.global_stores += other.global_stores;
        self.shared_loads += other.shared_loads;
        self.shared_stores += other.shared_stores;
        self.async_bytes += other.async_bytes;
        self.matrix_ops += other.matrix_ops;
        self.barriers += other.barriers;
        self.atomics += other.atomics;
        self.local_accesses += other.local_accesses;
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total();
        writeln!(f, "{:<18}{:>16}{:>18}", "instructions", "warps", "threads")?;
        for class in CLASSES {
            let n = self.class(class);
            if n.warps > 0 {
                writeln!(f, "  {:<16}{:>16}{:>18}", format!("{class:?}").to_lowercase(), n.warps, n.threads)?;
            }
        }
        writeln!(f, "  {:<16}{:>16}{:>18}", "all", total.warps, total.threads)?;
        writeln!(
            f,
            "{:<18}{:>12}{:>16}{:>12}{:>12}{:>12}",
            "global", "requests", "bytes", "sectors", "ideal", "distinct"
        )?;
        for (name, t) in [("loads", &self.global_loads), ("stores", &self.global_stores)] {
            writeln!(
                f,
                "  {:<16}{:>12}{:>16}{:>12}{:>12}{:>12}",
                name, t.requests, t.bytes, t.sectors, t.ideal_sectors, t.distinct_sectors
            )?;
        }
        writeln!(f, "{:<18}{:>12}{:>16}{:>12}", "shared", "requests", "bytes", "conflicts")?;
        for (name, t) in [("loads", &self.shared_loads), ("stores", &self.shared_stores)] {
            writeln!(f, "  {:<16}{:>12}{:>16}{:>12}", name, t.requests, t.bytes, t.conflicts)?;
        }
        for (name, n) in [
            ("blocks", self.blocks),
            ("async bytes", self.async_bytes),
            ("matrix ops", self.matrix_ops),
            ("barriers", self.barriers),
            ("atomics", self.atomics),
            ("local accesses", self.local_accesses),
        ] {
            writeln!(f, "{name:<18}{n:>16}")?;
        }
        Ok(())
    }
}
