//! Copies that run beside the threads and are counted at an mbarrier or in groups: `cp.async.bulk`, tensor maps,
//! `st.async`. They complete as late as they may: when nothing else can go on, or when they are waited for.

use super::access::{addresses, lanes};
use super::cluster::read;
use super::machine::{GlobalRace, Machine};
use super::memory_ops::note_race;
use super::shared::{UNIT, Who, state};
use super::warp::{Copy, Wait, Warp};
use crate::fault::{FaultKind, Run, Trouble};
use crate::memory::{PARAM_WINDOW, WINDOW_MASK};
use crate::ops::lanes::Row;
use crate::ops::wgmma::swizzle;
use crate::program::{Address, Bulk, Reg};
use crate::tensor_map::{Layout, TensorMap};

/// Asynchronous work that is under way.
pub(super) enum Work {
    /// Bytes for shared memory.
    Load(Load),
    /// Bytes from shared to global memory.
    Store(Store),
    /// An arrival once these copies are done.
    Copies { warp: usize, pc: usize, copies: Vec<Copy>, barrier: (usize, usize) },
}

pub(super) struct Load {
    pc: usize,
    warp: usize,
    block: usize,
    at: usize,
    /// Address bits that are swizzled.
    swizzle: u32,
    data: Vec<u8>,
    /// Where the data came from: address, bytes, offset in the data.
    sources: Vec<(u64, usize, usize)>,
    /// Shared memory that it came from.
    shared: Option<(usize, usize)>,
    barrier: (usize, usize),
}

pub(super) struct Store {
    pc: usize,
    warp: usize,
    lane: usize,
    group: u32,
    block: usize,
    at: usize,
    data: Vec<u8>,
    /// Where the data goes: address, bytes, offset in the data.
    targets: Vec<(u64, usize, usize)>,
    /// Shared memory was read, and the thread knows.
    left: bool,
}

impl Work {
    pub(super) fn barrier(&self) -> Option<(usize, usize)> {
        match self {
            Work::Load(load) => Some(load.barrier),
            Work::Copies { barrier, .. } => Some(*barrier),
            Work::Store(_) => None,
        }
    }
}

/// Blocks that a multicast goes to.
fn blocks_of(mask: Option<u64>, own: usize) -> Vec<usize> {
    match mask {
        Some(mask) => (0..16).filter(|b| mask >> b & 1 == 1).collect(),
        None => vec![own],
    }
}

fn misaligned(lane: usize, address: u64, what: &str, to: u64) -> Box<Trouble> {
    let message = format!("{what} is not a multiple of {to}");
    Trouble::at(FaultKind::Misaligned, lane, address, message)
}

fn aligned(lane: usize, address: u64, what: &str, to: u64) -> Run<()> {
    if address.is_multiple_of(to) { Ok(()) } else { Err(misaligned(lane, address, what, to)) }
}

impl Machine<'_> {
    pub(super) fn bulk(&mut self, warp: &mut Warp, op: &Bulk, m: u32) -> Run<()> {
        for lane in lanes(m) {
            let of = |warp: &Warp, at: Address| addresses(warp, at)[lane];
            match op {
                Bulk::Load { dst, src, size, barrier, mask } => {
                    let (dst, src) = (of(warp, *dst), of(warp, *src));
                    let size = self.bulk_size(warp, *size, lane, src)?;
                    aligned(lane, dst, "the destination", 16)?;
                    aligned(lane, src, "the source", 16)?;
                    let mut data = vec![0; size];
                    self.fetch(warp, lane, src, &mut data)?;
                    self.count_bulk(size, src, true);
                    let sources = vec![(src, size, 0)];
                    let mask = mask.map(|r| read(warp, r, lane));
                    self.start_loads(warp, lane, dst, of(warp, *barrier), mask, 0, data, sources)?;
                }
                Bulk::Share { dst, src, size, barrier } => {
                    let (dst, src) = (of(warp, *dst), of(warp, *src));
                    let size = self.bulk_size(warp, *size, lane, src)?;
                    aligned(lane, dst, "the destination", 16)?;
                    aligned(lane, src, "the source", 16)?;
                    let (block, from) = (warp.block, src as usize);
                    self.shared[block].check_async(
                        &self.clocks,
                        from,
                        size,
                        false,
                        Who { warp: warp.id, lane },
                    )?;
                    let data = self.shared[block].bytes(from, size).to_vec();
                    self.shared[block].leave(from, size);
                    self.stats.async_bytes += size as u64;
                    let to = of(warp, *barrier);
                    self.start_loads(warp, lane, dst, to, None, 0, data, Vec::new())?;
                    if let Some(Work::Load(load)) = self.work.last_mut() {
                        load.shared = Some((block, from));
                    }
                }
                Bulk::Store { dst, src, size } => {
                    let (dst, src) = (of(warp, *dst), of(warp, *src));
                    let size = self.bulk_size(warp, *size, lane, src)?;
                    aligned(lane, dst, "the destination", 16)?;
                    aligned(lane, src, "the source", 16)?;
                    self.count_bulk(size, dst, false);
                    self.start_store(warp, lane, src as usize, size, 0, vec![(dst, size, 0)])?;
                }
                Bulk::TensorLoad { dst, map, at, barrier, mask } => {
                    let dst = of(warp, *dst);
                    aligned(lane, dst, "the destination", 128)?;
                    let map = self.tensor_map(warp, of(warp, *map), lane, at.len())?;
                    let pieces = map.pieces(&coordinates(warp, at, lane));
                    let mut data = map.filled();
                    for &(address, bytes, offset) in &pieces {
                        self.fetch(warp, lane, address, &mut data[offset..offset + bytes])?;
                        self.count_bulk(bytes, address, true);
                    }
                    let mask = mask.map(|r| read(warp, r, lane));
                    let bits = map.swizzle.bits();
                    self.start_loads(warp, lane, dst, of(warp, *barrier), mask, bits, data, pieces)?;
                }
                Bulk::TensorStore { map, at, src } => {
                    let src = of(warp, *src);
                    aligned(lane, src, "the source", 128)?;
                    let map = self.tensor_map(warp, of(warp, *map), lane, at.len())?;
                    let pieces = map.pieces(&coordinates(warp, at, lane));
                    for &(address, bytes, _) in &pieces {
                        self.count_bulk(bytes, address, false);
                    }
                    self.start_store(warp, lane, src as usize, map.bytes(), map.swizzle.bits(), pieces)?;
                }
                Bulk::Registers { dst, elem, regs, barrier } => {
                    let dst = of(warp, *dst);
                    aligned(lane, dst, "the destination", (regs.len() * *elem as usize) as u64)?;
                    let elem = *elem as usize;
                    let data: Vec<u8> = regs
                        .iter()
                        .flat_map(|&r| read(warp, r, lane).to_le_bytes()[..elem].to_vec())
                        .collect();
                    self.stats.async_bytes += data.len() as u64;
                    self.start_loads(warp, lane, dst, of(warp, *barrier), None, 0, data, Vec::new())?;
                }
                Bulk::PrefetchTensor { map, at } => {
                    let dims = (!at.is_empty()).then_some(at.len());
                    let map = self.decode_map(warp, of(warp, *map), lane)?;
                    if let Some(dims) = dims {
                        self.check_rank(&map, dims, lane)?;
                    }
                }
                Bulk::Prefetch { src, size } => {
                    let src = of(warp, *src);
                    let size = self.bulk_size(warp, *size, lane, src)?;
                    aligned(lane, src, "the source", 16)?;
                    if size > 0 {
                        self.global.find(src, size, lane, false)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn bulk_size(&self, warp: &Warp, size: Reg, lane: usize, address: u64) -> Run<usize> {
        let size = read(warp, size, lane);
        aligned(lane, size, "the size", 16).map_err(|mut e| {
            e.address = Some(address);
            e
        })?;
        Ok(size as usize)
    }

    /// Bytes of global memory as they are now.
    fn fetch(&self, warp: &Warp, lane: usize, address: u64, out: &mut [u8]) -> Run<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (a, offset) = self.global.find(address, out.len(), lane, false)?;
        if let Some(first) = (!a.is_init_range(offset, out.len())).then(|| a.first_uninit(offset, out.len()))
        {
            let at = offset + first.unwrap_or(0);
            let message = format!("an asynchronous copy of byte {at} of `{}`, which nobody wrote", a.label);
            return Err(Trouble::at(FaultKind::UninitializedMemory, lane, a.base + at as u64, message));
        }
        self.check_early(warp, a, offset, out.len(), lane, false)?;
        self.check_stores(address, out.len(), lane)?;
        a.bytes.copy_out(offset, out);
        a.touch_read(offset, out.len());
        Ok(())
    }

    fn count_bulk(&mut self, bytes: usize, address: u64, load: bool) {
        if bytes == 0 {
            return;
        }
        let (bytes, last) = (bytes as u64, address + bytes as u64 - 1);
        let traffic = if load { &mut self.stats.global_loads } else { &mut self.stats.global_stores };
        traffic.requests += 1;
        traffic.bytes += bytes;
        traffic.sectors += last / 32 - address / 32 + 1;
        traffic.ideal_sectors += bytes.div_ceil(32);
        self.stats.async_bytes += bytes;
    }

    /// Starts the copies to every block of a multicast.
    #[allow(clippy::too_many_arguments)]
    fn start_loads(
        &mut self,
        warp: &Warp,
        lane: usize,
        dst: u64,
        barrier: u64,
        mask: Option<u64>,
        swizzle: u32,
        data: Vec<u8>,
        sources: Vec<(u64, usize, usize)>,
    ) -> Run<()> {
        use crate::parse::ast::Space;
        aligned(lane, barrier, "the address of the mbarrier", 8)?;
        let (to, at) = self.place_of(warp, Space::Cluster, dst, lane)?;
        let (counter, counter_at) = self.place_of(warp, Space::Cluster, barrier, lane)?;
        if to != counter {
            let message = "destination and mbarrier are in different blocks";
            return Err(Trouble::at(FaultKind::Operand, lane, barrier, message));
        }
        for block in blocks_of(mask, to) {
            if block >= self.blocks.len() {
                let message = format!("a multicast to block {block} of a cluster of {}", self.blocks.len());
                return Err(Trouble::at(FaultKind::Operand, lane, dst, message));
            }
            // The address of a multicast is the same in every block.
            let at_block = (block as u64 + 1) << 24;
            let (block, at) = self.place_of(warp, Space::Cluster, at_block | at as u64, lane)?;
            self.check_counter(warp, block, counter_at, lane)?;
            let step = data.len().min(UNIT);
            for offset in (0..data.len()).step_by(step.max(1)) {
                let place = super::bulk::swizzle(at + offset, swizzle);
                let shared = &mut self.shared[block];
                shared.check_async(&self.clocks, place, step, true, Who { warp: warp.id, lane })?;
                shared.set_state(place, step, state::ARRIVING);
            }
            self.work.push(Work::Load(Load {
                pc: self.pc,
                warp: warp.id,
                block,
                at,
                swizzle,
                data: data.clone(),
                sources: sources.clone(),
                shared: None,
                barrier: (block, counter_at),
            }));
        }
        Ok(())
    }

    fn start_store(
        &mut self,
        warp: &Warp,
        lane: usize,
        at: usize,
        size: usize,
        bits: u32,
        targets: Vec<(u64, usize, usize)>,
    ) -> Run<()> {
        let me = Who { warp: warp.id, lane };
        let mut data = Vec::with_capacity(size);
        for offset in (0..size).step_by(UNIT) {
            let place = swizzle(at + offset, bits);
            let shared = &mut self.shared[warp.block];
            shared.check_async(&self.clocks, place, UNIT, false, me)?;
            data.extend(shared.bytes(place, UNIT));
        }
        for &(address, bytes, _) in &targets {
            let (a, offset) = self.global.find(address, bytes, lane, true)?;
            self.check_early(warp, a, offset, bytes, lane, true)?;
        }
        self.shared[warp.block].leave(at, size);
        self.work.push(Work::Store(Store {
            pc: self.pc,
            warp: warp.id,
            lane,
            group: warp.bulk_groups[lane],
            block: warp.block,
            at,
            data,
            targets,
            left: false,
        }));
        self.stores += 1;
        Ok(())
    }

    /// Reads of global memory that a bulk store of this cluster is still to write.
    pub(super) fn check_stores(&self, address: u64, size: usize, lane: usize) -> Run<()> {
        if self.stores == 0 {
            return Ok(());
        }
        let meets = |&(start, bytes, _): &(u64, usize, usize)| {
            address < start + bytes as u64 && start < address + size as u64
        };
        let hit = self.work.iter().any(|w| matches!(w, Work::Store(s) if s.targets.iter().any(meets)));
        if !hit {
            return Ok(());
        }
        let message = "access to global memory that a bulk store, which was not waited for, will write";
        Err(Trouble::at(FaultKind::InFlight, lane, address, message))
    }

    /// Completes the bulk stores of some lanes, but for the youngest groups.
    pub(super) fn wait_bulks(&mut self, warp: &Warp, pending: u32, only_read: bool, m: u32) -> Run<()> {
        let now = self.clocks.tick();
        let mut i = 0;
        while i < self.work.len() {
            let Work::Store(store) = &mut self.work[i] else {
                i += 1;
                continue;
            };
            let mine = store.warp == warp.id && m >> store.lane & 1 == 1;
            if !mine || store.group.saturating_add(pending) >= warp.bulk_groups[store.lane] {
                i += 1;
                continue;
            }
            if !store.left {
                store.left = true;
                self.shared[store.block].left(store.at, store.data.len(), warp.id, now - 1);
            }
            if only_read {
                i += 1;
            } else {
                self.finish_store(i)?;
            }
        }
        Ok(())
    }

    fn finish_store(&mut self, index: usize) -> Run<()> {
        let Work::Store(store) = self.work.remove(index) else { return Ok(()) };
        self.stores -= 1;
        let block = self.block_number(store.block);
        let (races, pc, index) = (&mut self.races, store.pc, store.warp % self.warps_per_block);
        let mut note = |lane: usize, address: u64, other: u32| {
            let blocks = (other.min(block), other.max(block));
            note_race(races, GlobalRace { address, blocks, pc, lane, warp: index, block });
        };
        for (address, bytes, offset) in store.targets {
            let (a, at) = self.global.find(address, bytes, store.lane, true)?;
            for granule in (0..bytes).step_by(4) {
                self.global.claim(a, at + granule, 4.min(bytes - granule), store.lane, block, &mut note);
            }
            a.bytes.copy_in(at, &store.data[offset..offset + bytes]);
            a.set_init_range(at, bytes);
            a.touch_written(at, bytes);
        }
        Ok(())
    }

    /// Completes some asynchronous work that may be waited for; whether there was any. Copies have no order: the youngest
    /// comes first.
    pub(super) fn complete_work(&mut self) -> Run<bool> {
        let waited = |barrier: Option<(usize, usize)>| {
            let Some((block, at)) = barrier else { return false };
            let splits = self.warps.iter().flat_map(|w| &w.splits);
            let waits =
                |w: Wait| matches!(w, Wait::Mbarrier { block: b, at: a, .. } if (b, a) == (block, at));
            splits.into_iter().any(|s| waits(s.wait))
        };
        let found = self
            .work
            .iter()
            .rposition(|w| waited(w.barrier()))
            .or_else(|| self.work.iter().rposition(|w| w.barrier().is_some()));
        let Some(index) = found else { return Ok(false) };
        match self.work.remove(index) {
            Work::Load(load) => self.finish_load(load)?,
            Work::Copies { warp, pc, copies, barrier } => {
                self.pc = pc;
                let block = warp / self.warps_per_block;
                let agent = self.clocks.warps() + block;
                let (time, released) = self.clocks.complete(agent);
                for copy in &copies {
                    let data = self.copied(copy)?;
                    self.shared[block].arrived(copy.dst as usize, &data[..copy.bytes as usize], agent, time);
                }
                self.count_down(barrier, 0, 1, &released)?;
            }
            Work::Store(_) => {}
        }
        Ok(true)
    }

    fn finish_load(&mut self, load: Load) -> Run<()> {
        self.pc = load.pc;
        let mut again = Vec::new();
        for &(address, bytes, offset) in &load.sources {
            let (a, at) = self.global.find(address, bytes, 0, false)?;
            again.resize(bytes, 0);
            a.bytes.copy_out(at, &mut again);
            if again != load.data[offset..offset + bytes] {
                let message = "the source of an asynchronous copy was changed before the copy was waited for";
                return Err(Trouble::at(FaultKind::InFlight, 0, address, message));
            }
        }
        let agent = self.clocks.warps() + load.warp / self.warps_per_block;
        let (time, released) = self.clocks.complete(agent);
        let shared = &mut self.shared[load.block];
        for (i, piece) in load.data.chunks(UNIT).enumerate() {
            shared.arrived(swizzle(load.at + i * UNIT, load.swizzle), piece, agent, time);
        }
        if let Some((block, at)) = load.shared {
            self.shared[block].left(at, load.data.len(), agent, time);
        }
        self.count_down(load.barrier, load.data.len() as i64, 0, &released)
    }

    /// A block ends: its copies must be done, and what it stores will be.
    pub(super) fn end_bulks(&mut self, block: usize) -> Run<()> {
        let mut i = 0;
        while i < self.work.len() {
            let (pc, message) = match &self.work[i] {
                Work::Load(l) if l.block == block => {
                    (l.pc, "the block ends before an asynchronous copy to its shared memory was waited for")
                }
                Work::Copies { barrier, pc, .. } if barrier.0 == block => {
                    (*pc, "the block ends before the arrival of its copies was waited for")
                }
                Work::Store(s) if s.block == block && !s.left => (
                    s.pc,
                    "the block ends before it has waited until a bulk store had read its shared memory",
                ),
                Work::Store(s) if s.block == block => {
                    self.finish_store(i)?;
                    continue;
                }
                _ => {
                    i += 1;
                    continue;
                }
            };
            self.pc = pc;
            return Err(Trouble::new(FaultKind::InFlight, message));
        }
        Ok(())
    }

    fn decode_map(&self, warp: &Warp, address: u64, lane: usize) -> Run<Layout> {
        aligned(lane, address, "the address of the tensor map", 64)?;
        let mut bytes = [0; TensorMap::BYTES];
        if address & WINDOW_MASK == PARAM_WINDOW {
            let start = (address & !WINDOW_MASK) as usize;
            let Some(found) = self.job.params.get(start..start + TensorMap::BYTES) else {
                let message = "the tensor map is not inside of the kernel's parameters";
                return Err(Trouble::at(FaultKind::OutOfBounds, lane, address, message));
            };
            bytes.copy_from_slice(found);
        } else {
            self.fetch(warp, lane, address, &mut bytes)?;
        }
        Layout::decode(&bytes).ok_or_else(|| {
            let message = "there is no tensor map of the emulator at this address";
            Trouble::at(FaultKind::Operand, lane, address, message)
        })
    }

    fn check_rank(&self, map: &Layout, dims: usize, lane: usize) -> Run<()> {
        if map.rank() == dims {
            return Ok(());
        }
        let message = format!("{dims} coordinates for a tensor map of {} dimensions", map.rank());
        Err(Trouble::at(FaultKind::Operand, lane, 0, message))
    }

    fn tensor_map(&self, warp: &Warp, address: u64, lane: usize, dims: usize) -> Run<Layout> {
        let map = self.decode_map(warp, address, lane)?;
        self.check_rank(&map, dims, lane)?;
        Ok(map)
    }
}

fn coordinates(warp: &Warp, at: &[Row], lane: usize) -> Vec<i64> {
    at.iter().map(|&row| warp.regs.r32[row as usize][lane] as i32 as i64).collect()
}
