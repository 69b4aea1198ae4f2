//! Counting while a worker runs; the table comes out in the end.

use crate::counters::{Counters, Issued, SharedTraffic, Traffic};
use crate::memory::SECTOR;
use crate::program::Kernel;

#[derive(Clone, Debug, Default)]
pub(crate) struct Stats {
    pub blocks: u64,
    /// By pc.
    pub issued: Vec<Issued>,
    pub conflicts: Vec<u64>,
    pub global_loads: Traffic,
    pub global_stores: Traffic,
    pub shared_loads: SharedTraffic,
    pub shared_stores: SharedTraffic,
    pub async_bytes: u64,
    pub matrix_ops: u64,
    pub barriers: u64,
    pub atomics: u64,
    pub local_accesses: u64,
}

impl Stats {
    pub(crate) fn new(len: usize) -> Stats {
        Stats { issued: vec![Issued::default(); len], conflicts: vec![0; len], ..Stats::default() }
    }

    pub(crate) fn counters(&self, kernel: &Kernel, files: &[(u32, String)]) -> Counters {
        let mut out = Counters {
            blocks: self.blocks,
            global_loads: self.global_loads,
            global_stores: self.global_stores,
            shared_loads: self.shared_loads,
            shared_stores: self.shared_stores,
            async_bytes: self.async_bytes,
            matrix_ops: self.matrix_ops,
            barriers: self.barriers,
            atomics: self.atomics,
            local_accesses: self.local_accesses,
            ..Counters::default()
        };
        for ((info, &n), &conflicts) in kernel.info.iter().zip(&self.issued).zip(&self.conflicts) {
            let Some(class) = info.class.filter(|_| n.warps > 0) else { continue };
            *out.instructions.entry(class).or_default() += n;
            let line = info.loc.map(|l| (file_name(files, l.file).to_string(), l.line));
            if let Some(line) = line {
                *out.lines.entry(line.clone()).or_default() += n;
                if conflicts > 0 {
                    *out.conflict_lines.entry(line).or_default() += conflicts;
                }
            }
        }
        out
    }
}

pub(crate) fn file_name(files: &[(u32, String)], number: u32) -> &str {
    files.iter().find(|f| f.0 == number).map_or("?", |f| f.1.as_str())
}

/// Adds one warp access of `size` bytes per lane to the traffic.
pub(crate) fn count_sectors(traffic: &mut Traffic, addresses: &[u64; 32], mask: u32, size: usize) {
    let lanes = mask.count_ones() as u64;
    traffic.requests += 1;
    traffic.bytes += lanes * size as u64;
    let mut starts = [0u64; 32];
    let mut n = 0;
    let mut sorted = true;
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        sorted &= n == 0 || starts[n - 1] <= addresses[lane];
        starts[n] = addresses[lane];
        n += 1;
    }
    if !sorted {
        starts[..n].sort_unstable();
    }
    // Sectors and distinct bytes of ranges in ascending order.
    let (mut sectors, mut bytes) = (0, 0);
    let (mut last_sector, mut end) = (u64::MAX, 0u64);
    for &start in &starts[..n] {
        let (mut first, last) = (start / SECTOR as u64, (start + size as u64 - 1) / SECTOR as u64);
        if first == last_sector {
            first += 1;
        }
        if first <= last {
            sectors += last - first + 1;
            last_sector = last;
        }
        let from = start.max(end);
        end = start + size as u64;
        bytes += end.saturating_sub(from);
    }
    traffic.sectors += sectors;
    traffic.ideal_sectors += bytes.div_ceil(SECTOR as u64);
}
