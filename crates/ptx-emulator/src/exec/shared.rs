//! Shared memory of one block: bytes, what each byte may be used for, and who touched it last.

use std::collections::BTreeMap;

use super::clocks::{Clocks, lane_code};
use crate::fault::{FaultKind, Run, Trouble};

/// State of a byte.
pub(crate) mod state {
    /// Belongs to no array.
    pub(crate) const OUTSIDE: u8 = 0;
    pub(crate) const UNWRITTEN: u8 = 1;
    pub(crate) const VALID: u8 = 2;
    /// Destination of an asynchronous copy that was not waited for.
    pub(crate) const ARRIVING: u8 = 3;
    /// Valid, and source of asynchronous work that was not waited for.
    pub(crate) const LEAVING: u8 = 4;
    /// Part of a live mbarrier.
    pub(crate) const BARRIER: u8 = 5;
}

/// Who accesses: warp in the cluster, and lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Who {
    pub warp: usize,
    pub lane: usize,
}

impl Who {
    fn code(self) -> u64 {
        (self.warp as u64) << 5 | self.lane as u64
    }
}

/// Last write of a granule of 4 bytes: time (32 bits), who (16), flags and byte mask (16).
#[derive(Clone, Copy, Default)]
struct Write(u64);

const SPLIT: u64 = 1 << 4;
const ATOMIC: u64 = 1 << 5;
/// Written by asynchronous work.
const ASYNC: u64 = 1 << 6;

/// Bytes that asynchronous reads are kept track of together.
pub(crate) const UNIT: usize = 16;

impl Write {
    fn new(time: u32, who: Who, flags: u64) -> Write {
        Write((time as u64) << 32 | who.code() << 16 | flags)
    }
    #[inline(always)]
    fn time(self) -> u32 {
        (self.0 >> 32) as u32
    }
    #[inline(always)]
    fn who(self) -> Who {
        Who { warp: (self.0 >> 21 & 0x7ff) as usize, lane: (self.0 >> 16 & 31) as usize }
    }
    /// Whether somebody else wrote some of these bytes and `known` does not cover it.
    #[inline(always)]
    fn clashes(self, bytes: u64, known: &[u32], me: Who) -> bool {
        self.0 & bytes != 0 && self.unordered(known, me)
    }
    /// Whether the lane that wrote has told `me` so itself.
    #[cold]
    fn told(self, clocks: &Clocks, me: Who) -> bool {
        let who = self.who();
        clocks.knows_lane(me.warp, lane_code(who.warp, who.lane), self.time())
    }
    #[inline(always)]
    fn unordered(self, known: &[u32], me: Who) -> bool {
        (self.0 >> 16 & 0xffff) != me.code() && known.get(self.who().warp).is_some_and(|&k| self.time() >= k)
    }
}

#[derive(Default)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    state: Vec<u8>,
    writes: Vec<Write>,
    /// Per byte, for granules that several threads write parts of.
    split: Vec<Write>,
    /// Per warp of the cluster and granule: time of the last read (28 bits) and which bytes (4); and the lanes that have
    /// read since they last met.
    reads: Vec<Vec<u32>>,
    readers: Vec<Vec<u32>>,
    /// Per unit: asynchronous readers that were not waited for.
    leaving: Vec<u16>,
    /// Per warp of the cluster and unit: time when an asynchronous read was waited for.
    async_reads: Vec<Vec<u32>>,
    /// Whether the block has ended.
    pub ended: bool,
    /// Per warp of another block: time of its last access.
    pub visitors: Vec<u32>,
    /// Per warp and lane of another block: time of its last arrival at a barrier here.
    pub arrivals: BTreeMap<(usize, usize), u32>,
}

impl Shared {
    /// A block begins: `valid` are the byte ranges of its arrays.
    pub(crate) fn restart(&mut self, len: usize, warps: usize, valid: &[(usize, usize)]) {
        let len = len.next_multiple_of(16);
        if self.bytes.len() < len {
            self.bytes.resize(len, 0);
            self.writes.resize(len / 4, Write::default());
            let rows = self.reads.iter_mut().chain(&mut self.readers);
            rows.filter(|r| !r.is_empty()).for_each(|r| r.resize(len / 4, 0));
        }
        if self.reads.len() < warps {
            self.reads.resize(warps, Vec::new());
            self.readers.resize(warps, Vec::new());
        }
        self.state.clear();
        self.state.resize(self.bytes.len(), state::OUTSIDE);
        for &(start, len) in valid {
            self.state[start..start + len].fill(state::UNWRITTEN);
        }
        self.leaving.fill(0);
        self.ended = false;
        self.visitors.clear();
        self.arrivals.clear();
    }

    /// Forgets all times, when the clock starts anew.
    pub(crate) fn forget(&mut self) {
        self.writes.fill(Write::default());
        self.split.fill(Write::default());
        self.reads.iter_mut().for_each(|r| r.fill(0));
        self.async_reads.iter_mut().for_each(|r| r.fill(0));
    }

    /// Checks that `n` bytes hold data, whoever wrote them.
    pub(crate) fn check_read(&self, at: usize, n: usize, lane: usize) -> Run<()> {
        let readable = |s: &[u8]| s.iter().all(|s| matches!(*s, state::VALID | state::LEAVING));
        if self.state.get(at..at + n).is_some_and(readable) {
            return Ok(());
        }
        Err(self.state_trouble(at, n, false, Who { warp: 0, lane }))
    }

    pub(crate) fn bytes(&self, at: usize, n: usize) -> &[u8] {
        &self.bytes[at..at + n]
    }

    pub(crate) fn set_state(&mut self, at: usize, n: usize, to: u8) {
        self.state[at..at + n].fill(to);
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.state[at..at + bytes.len()].fill(state::VALID);
    }

    #[cold]
    fn state_trouble(&self, at: usize, n: usize, write: bool, me: Who) -> Box<Trouble> {
        let what = if write { "write" } else { "read" };
        let bad = |s: u8| match s {
            state::VALID => false,
            state::LEAVING => write,
            state::UNWRITTEN => !write,
            _ => true,
        };
        let first = (at..at + n).find(|&i| self.state.get(i).is_none_or(|&s| bad(s))).unwrap_or(at);
        let (kind, why) = match self.state.get(first) {
            None | Some(&state::OUTSIDE) => (FaultKind::OutOfBounds, "outside of every shared array"),
            Some(&state::ARRIVING) => {
                (FaultKind::InFlight, "where an asynchronous copy that was not waited for will arrive")
            }
            Some(&state::LEAVING) => {
                (FaultKind::InFlight, "that asynchronous work which was not waited for still reads")
            }
            Some(&state::BARRIER) => (FaultKind::Operand, "that is an mbarrier"),
            _ => (FaultKind::UninitializedMemory, "that nobody wrote"),
        };
        Trouble::at(kind, me.lane, at as u64, format!("{what} of {n} bytes of shared memory {why}"))
    }

    #[cold]
    fn race(&self, at: usize, other: &str, mine: &str, me: Who) -> Box<Trouble> {
        let message = format!(
            "{mine} of shared memory at {at:#x}, which races with a {other}: no barrier orders the two"
        );
        Trouble::at(FaultKind::SharedRace, me.lane, at as u64, message)
    }

    /// Checks a read of `n` bytes (a multiple of 4 of them at multiples of 4, or fewer inside 4) and notes it.
    #[inline(always)]
    pub(crate) fn note_read<const N: usize>(
        &mut self,
        clocks: &Clocks,
        at: usize,
        used: u64,
        me: Who,
    ) -> Run<()> {
        let n = N;
        let valid = match self.state.get(at..at + N) {
            Some(s) if s == [state::VALID; N] => true,
            Some(s) => {
                let fine = |(i, &s): (usize, &u8)| {
                    matches!(s, state::VALID | state::LEAVING) || used >> i & 1 == 0 && s == state::UNWRITTEN
                };
                s.iter().enumerate().all(fine)
            }
            None => false,
        };
        if !valid {
            return Err(self.state_trouble(at, n, false, me));
        }
        let known = clocks.of(me.warp);
        let stamp = clocks.now() << 4;
        if self.reads[me.warp].len() < self.writes.len() {
            self.reads[me.warp].resize(self.writes.len(), 0);
            self.readers[me.warp].resize(self.writes.len(), 0);
        }
        let met = known[me.warp];
        for (granule, mask) in granules(at, n) {
            let write = self.writes[granule];
            if write.0 & SPLIT != 0 {
                self.check_split(clocks, granule, mask, me, "read", false)?;
            } else if write.clashes(mask, known, me) && !write.told(clocks, me) {
                return Err(self.race(granule * 4, &writer(write), "read", me));
            }
            let read = &mut self.reads[me.warp][granule];
            let readers = &mut self.readers[me.warp][granule];
            *readers = if *read >> 4 >= met { *readers } else { 0 } | 1 << me.lane;
            *read = if *read & !15 == stamp { *read | mask as u32 } else { stamp | mask as u32 };
        }
        Ok(())
    }

    #[cold]
    fn check_split(
        &self,
        clocks: &Clocks,
        granule: usize,
        mask: u64,
        me: Who,
        mine: &str,
        atomic: bool,
    ) -> Run<()> {
        for byte in (0..4).filter(|b| mask >> b & 1 == 1) {
            let write = self.split[granule * 4 + byte];
            let clashes = write.clashes(1 << byte, clocks.of(me.warp), me) && !write.told(clocks, me);
            if clashes && !(atomic && write.0 & ATOMIC != 0) {
                return Err(self.race(granule * 4 + byte, &writer(write), mine, me));
            }
        }
        Ok(())
    }

    /// Checks a write of `n` bytes and notes it.
    #[inline(always)]
    pub(crate) fn note_write<const N: usize>(
        &mut self,
        clocks: &Clocks,
        at: usize,
        atomic: bool,
        me: Who,
    ) -> Run<()> {
        let n = N;
        let open = self.state.get(at..at + N).is_some_and(|s| {
            s == [state::VALID; N] || s.iter().all(|&s| s == state::VALID || s == state::UNWRITTEN)
        });
        if !open {
            return Err(self.state_trouble(at, n, true, me));
        }
        self.stamp_write(clocks, at, n, atomic, me)?;
        self.state[at..at + n].fill(state::VALID);
        Ok(())
    }

    /// Checks an atomic: it reads and writes, and does not race with other atomics.
    pub(crate) fn note_atomic(&mut self, clocks: &Clocks, at: usize, n: usize, me: Who) -> Run<()> {
        let whole = |s: &[u8]| s.iter().all(|&s| s == state::VALID);
        let ready = self.state.get(at..at + n).is_some_and(whole);
        if !ready {
            return Err(self.state_trouble(at, n, false, me));
        }
        self.stamp_write(clocks, at, n, true, me)
    }

    /// The part of [`Shared::note_write`] that looks for races.
    #[inline(always)]
    pub(crate) fn stamp_write(
        &mut self,
        clocks: &Clocks,
        at: usize,
        n: usize,
        atomic: bool,
        me: Who,
    ) -> Run<()> {
        let known = clocks.of(me.warp);
        let flag = if atomic { ATOMIC } else { 0 };
        for (granule, mask) in granules(at, n) {
            let old = self.writes[granule];
            if old.0 & SPLIT != 0 {
                self.check_split(clocks, granule, mask, me, "write", atomic)?;
                self.write_split(granule, mask, Write::new(clocks.now(), me, mask | flag));
            } else if old.unordered(known, me) && old.0 & 15 != 0 && !(atomic && old.0 & ATOMIC != 0) {
                if old.0 & mask != 0 && !old.told(clocks, me) {
                    return Err(self.race(granule * 4, &writer(old), "write", me));
                }
                self.begin_split(granule, old);
                self.write_split(granule, mask, Write::new(clocks.now(), me, mask | flag));
            } else {
                self.writes[granule] = Write::new(clocks.now(), me, mask | flag);
            }
        }
        for (warp, row) in self.reads.iter().enumerate().take(clocks.warps()) {
            if row.is_empty() {
                continue;
            }
            for (granule, mask) in granules(at, n) {
                let read = row[granule];
                if read as u64 & mask == 0 || read >> 4 < known[warp] {
                    continue;
                }
                // Which lane has read which byte is not known: in the own warp, only whole granules tell.
                let readers = self.readers[warp][granule];
                let clashes = if warp == me.warp {
                    mask == 15 && readers & !(1 << me.lane) != 0
                } else {
                    !clocks.knows_lanes(me.warp, warp, readers, read >> 4)
                };
                if clashes {
                    let other = format!("read by warp {warp} of the cluster");
                    return Err(self.race(granule * 4, &other, "write", me));
                }
            }
        }
        if !self.async_reads.is_empty() {
            self.check_async_reads(clocks, at, n, me)?;
        }
        Ok(())
    }

    fn check_async_reads(&self, clocks: &Clocks, at: usize, n: usize, me: Who) -> Run<()> {
        let known = clocks.of(me.warp);
        for (warp, row) in self.async_reads.iter().enumerate().take(known.len()) {
            if warp == me.warp || row.is_empty() {
                continue;
            }
            for unit in at / UNIT..(at + n).div_ceil(UNIT) {
                let late = |&read: &u32| read >= known[warp] && !clocks.knows_any_lane(me.warp, warp, read);
                if row.get(unit).is_some_and(late) {
                    let other = format!("read by asynchronous work of warp {warp} of the cluster");
                    return Err(self.race(unit * UNIT, &other, "write", me));
                }
            }
        }
        Ok(())
    }

    /// Checks that asynchronous work of a thread may read or write these bytes (whole granules) from now on.
    pub(crate) fn check_async(&self, clocks: &Clocks, at: usize, n: usize, write: bool, me: Who) -> Run<()> {
        let known = clocks.of(me.warp);
        let fenced = clocks.fenced(me.warp);
        let open = self.state.get(at..at + n).is_some_and(|s| {
            s.iter().all(|&s| match s {
                state::VALID => true,
                state::LEAVING => !write,
                state::UNWRITTEN => write,
                _ => false,
            })
        });
        if !open {
            return Err(self.state_trouble(at, n, write, me));
        }
        let mine = if write { "asynchronous write" } else { "asynchronous read" };
        let check = |address: usize, last: Write, bytes: u64| {
            if last.clashes(bytes, known, me) && !last.told(clocks, me) {
                return Err(self.race(address, &writer(last), mine, me));
            }
            let handed = last.0 & bytes == 0
                || last.0 & ASYNC != 0
                || fenced.get(last.who().warp).is_none_or(|&f| last.time() < f);
            if handed {
                return Ok(());
            }
            let message = format!(
                "{mine} of shared memory at {address:#x}, after a {} that no fence.proxy.async hands over",
                writer(last)
            );
            Err(Trouble::at(FaultKind::MissingFence, me.lane, address as u64, message))
        };
        let mut checked = Write::default();
        for (granule, mask) in granules(at, n) {
            let last = self.writes[granule];
            if last.0 & SPLIT != 0 {
                for byte in 0..4 {
                    check(granule * 4 + byte, self.split[granule * 4 + byte], 1 << byte)?;
                }
            } else if last.0 != checked.0 {
                check(granule * 4, last, mask)?;
                checked = last;
            }
        }
        if write {
            for (warp, row) in self.reads.iter().enumerate().take(clocks.warps()) {
                if warp == me.warp || row.is_empty() {
                    continue;
                }
                for (granule, mask) in granules(at, n) {
                    let read = row[granule];
                    let readers = self.readers[warp][granule];
                    if read as u64 & mask != 0
                        && read >> 4 >= known[warp]
                        && !clocks.knows_lanes(me.warp, warp, readers, read >> 4)
                    {
                        let other = format!("read by warp {warp} of the cluster");
                        return Err(self.race(granule * 4, &other, mine, me));
                    }
                }
            }
            self.check_async_reads(clocks, at, n, me)?;
        }
        Ok(())
    }

    /// An asynchronous write is there: of an agent, at a time that the clock will pass.
    pub(crate) fn arrived(&mut self, at: usize, bytes: &[u8], agent: usize, time: u32) {
        self.put(at, bytes);
        for (granule, mask) in granules(at, bytes.len()) {
            self.writes[granule] = Write::new(time, Who { warp: agent, lane: 0 }, mask | ASYNC);
        }
    }

    /// Asynchronous work reads these bytes (whole units) from now on.
    pub(crate) fn leave(&mut self, at: usize, n: usize) {
        if self.leaving.len() < self.state.len() / UNIT {
            self.leaving.resize(self.state.len() / UNIT, 0);
        }
        self.leaving[at / UNIT..(at + n) / UNIT].iter_mut().for_each(|count| *count += 1);
        self.state[at..at + n].fill(state::LEAVING);
    }

    /// It has read them, and the warp knows it.
    pub(crate) fn left(&mut self, at: usize, n: usize, warp: usize, time: u32) {
        if self.async_reads.len() <= warp {
            self.async_reads.resize(warp + 1, Vec::new());
        }
        let units = self.state.len() / UNIT;
        if self.async_reads[warp].len() < units {
            self.async_reads[warp].resize(units, 0);
        }
        for unit in at / UNIT..(at + n) / UNIT {
            self.async_reads[warp][unit] = time;
            self.leaving[unit] -= 1;
            if self.leaving[unit] == 0 {
                self.state[unit * UNIT..(unit + 1) * UNIT].fill(state::VALID);
            }
        }
    }

    #[cold]
    fn begin_split(&mut self, granule: usize, old: Write) {
        if self.split.len() < self.writes.len() * 4 {
            self.split.resize(self.writes.len() * 4, Write::default());
        }
        for byte in 0..4 {
            let wrote = old.0 >> byte & 1 == 1;
            self.split[granule * 4 + byte] =
                if wrote { Write(old.0 & !15 | 1 << byte) } else { Write::default() };
        }
        self.writes[granule] = Write(SPLIT);
    }

    fn write_split(&mut self, granule: usize, mask: u64, write: Write) {
        for byte in (0..4).filter(|b| mask >> b & 1 == 1) {
            self.split[granule * 4 + byte] = Write(write.0 & !15 | 1 << byte);
        }
        // Once one thread writes the whole granule after the others, it is one write again.
        if mask == 15 {
            self.writes[granule] = write;
        }
    }

    #[inline(always)]
    pub(crate) fn get<const S: usize>(&self, at: usize) -> [u8; S] {
        let mut out = [0; S];
        out.copy_from_slice(&self.bytes[at..at + S]);
        out
    }

    #[inline(always)]
    pub(crate) fn set<const S: usize>(&mut self, at: usize, value: [u8; S]) {
        self.bytes[at..at + S].copy_from_slice(&value);
    }
}

fn writer(write: Write) -> String {
    if write.0 & ASYNC != 0 {
        return "write by an asynchronous copy".into();
    }
    format!("write by warp {} lane {} of the cluster", write.who().warp, write.who().lane)
}

/// Granules of 4 bytes that a range touches, with the bytes of each.
#[inline(always)]
fn granules(at: usize, n: usize) -> impl Iterator<Item = (usize, u64)> {
    let first = at / 4;
    let mask = if n >= 4 { 15 } else { ((1u64 << n) - 1) << (at % 4) };
    (0..n.div_ceil(4)).map(move |i| (first + i, mask))
}

/// Passes that the 32 banks of 4 bytes need beyond the fewest for the width of the access.
///
/// Accesses of 8 bytes go in two halves of a warp, of 16 bytes in four quarters; threads that read the same word share
/// it.
pub(crate) fn conflicts(addresses: &[u32; 32], mask: u32, size: usize) -> u64 {
    let phase = match size {
        16.. => 8,
        8 => 16,
        _ => 32,
    };
    let words = size.div_ceil(4);
    let mut extra = 0;
    for start in (0..32).step_by(phase) {
        let lanes = mask >> start & (u32::MAX >> (32 - phase));
        if lanes == 0 {
            continue;
        }
        extra += phase_conflicts(&addresses[start..start + phase], lanes, words);
    }
    extra
}

fn phase_conflicts(addresses: &[u32], lanes: u32, words: usize) -> u64 {
    // Words of one bank, in a list per bank threaded through `next`.
    let mut head = [u8::MAX; 32];
    let (mut next, mut seen, mut used) = ([0u8; 32], [0u32; 32], 0usize);
    let mut depth = [0u8; 32];
    for (i, &address) in addresses.iter().enumerate() {
        if lanes >> i & 1 == 0 {
            continue;
        }
        for w in 0..words {
            let word = address / 4 + w as u32;
            let bank = (word % 32) as usize;
            let mut at = head[bank];
            while at != u8::MAX && seen[at as usize] != word {
                at = next[at as usize];
            }
            if at == u8::MAX {
                (seen[used], next[used]) = (word, head[bank]);
                head[bank] = used as u8;
                used += 1;
                depth[bank] += 1;
            }
        }
    }
    depth.iter().max().copied().unwrap_or(1).max(1) as u64 - 1
}
