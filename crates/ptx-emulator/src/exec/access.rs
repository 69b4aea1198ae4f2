//! Loads and stores of a warp in each state space.

use super::clocks::Clocks;
use super::shared::{Shared, Who, conflicts};
use super::stats::{Stats, count_sectors};
use super::warp::Warp;
use crate::fault::{FaultKind, Run, Trouble};
use crate::memory::{Allocation, Memory};
use crate::ops::lanes::WARP;
use crate::program::{Address, File, LOCAL_BASE, MemOp, Reg};

/// Lanes of a mask.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        (rest != 0).then(|| {
            let lane = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            lane
        })
    })
}

/// Addresses of all lanes.
#[inline(always)]
pub(crate) fn addresses(warp: &Warp, at: Address) -> [u64; WARP] {
    let mut out = [0; WARP];
    if at.wide {
        let row = &warp.regs.r64[at.row as usize];
        for i in 0..WARP {
            out[i] = row[i].wrapping_add(at.offset as u64);
        }
    } else {
        let row = &warp.regs.r32[at.row as usize];
        for i in 0..WARP {
            out[i] = row[i].wrapping_add(at.offset as u32) as u64;
        }
    }
    out
}

/// Every lane's address must be a multiple of the access size.
#[inline(always)]
pub(crate) fn check_aligned(addresses: &[u64; WARP], mask: u32, size: usize) -> Run<()> {
    let low = if mask == u32::MAX {
        addresses.iter().fold(0, |all, a| all | a)
    } else {
        lanes(mask).fold(0, |all, lane| all | addresses[lane])
    };
    if low & (size as u64 - 1) == 0 { Ok(()) } else { Err(misaligned(addresses, mask, size)) }
}

#[cold]
fn misaligned(addresses: &[u64; WARP], mask: u32, size: usize) -> Box<Trouble> {
    let lane = lanes(mask).find(|&l| addresses[l] & (size as u64 - 1) != 0).unwrap_or(0);
    let message = format!("the address is not a multiple of the {size} bytes that are accessed");
    Trouble::at(FaultKind::Misaligned, lane, addresses[lane], message)
}

/// Addresses that follow each other in lane order, all lanes active.
#[inline(always)]
fn contiguous(addresses: &[u64; WARP], mask: u32, size: usize) -> bool {
    if mask != u32::MAX {
        return false;
    }
    let mut off = 0;
    for i in 0..WARP {
        off |= addresses[i] ^ addresses[0].wrapping_add((i * size) as u64);
    }
    off == 0
}

/// Global memory as one block sees it.
pub(crate) struct Global<'a> {
    pub memory: &'a Memory,
    /// Number of the launch, for the owners of written bytes.
    pub launch: u32,
    /// More than one block: writes can race.
    pub many: bool,
}

impl<'a> Global<'a> {
    #[cold]
    pub(crate) fn outside(&self, address: u64, size: usize, lane: usize, write: bool) -> Box<Trouble> {
        let what = if write { "write" } else { "read" };
        match self.memory.freed(address) {
            Some(label) => {
                let message = format!("{what} of {size} bytes in `{label}`, which was freed");
                Trouble::at(FaultKind::UseAfterFree, lane, address, message)
            }
            None => {
                let message = format!("{what} of {size} bytes, {}", self.memory.nearest(address));
                Trouble::at(FaultKind::OutOfBounds, lane, address, message)
            }
        }
    }

    #[cold]
    fn uninitialised(
        &self,
        a: &Allocation,
        offset: usize,
        size: usize,
        used: u64,
        lane: usize,
    ) -> Box<Trouble> {
        let first = (0..size).find(|&i| used >> i & 1 == 1 && !a.is_init(offset + i, 1)).unwrap_or(0);
        let at = a.base + (offset + first) as u64;
        let message = format!("read of byte {} of `{}`, which nobody wrote", offset + first, a.label);
        Trouble::at(FaultKind::UninitializedMemory, lane, at, message)
    }

    /// The allocation that holds an access, and the offset in it.
    #[inline(always)]
    pub(crate) fn find(
        &self,
        address: u64,
        size: usize,
        lane: usize,
        write: bool,
    ) -> Run<(&'a Allocation, usize)> {
        let found = self.memory.find(address).and_then(|a| a.offset(address, size).map(|o| (a, o)));
        match found {
            Some((a, _)) if write && a.read_only => {
                let message = format!("write of {size} bytes to the constant `{}`", a.label);
                Err(Trouble::at(FaultKind::ReadOnly, lane, address, message))
            }
            Some(found) => Ok(found),
            None => Err(self.outside(address, size, lane, write)),
        }
    }

    /// Checks that what a read uses was written.
    #[inline(always)]
    pub(crate) fn check_init(
        &self,
        a: &Allocation,
        offset: usize,
        size: usize,
        used: u64,
        lane: usize,
    ) -> Run<()> {
        let ready = a.is_init(offset, size)
            || used != !0 && (0..size).all(|i| used >> i & 1 == 0 || a.is_init(offset + i, 1));
        if ready { Ok(()) } else { Err(self.uninitialised(a, offset, size, used, lane)) }
    }

    #[inline(always)]
    pub(crate) fn load<const S: usize>(
        &self,
        stats: &mut Stats,
        at: &[u64; WARP],
        mask: u32,
        used: u64,
        out: &mut [[u8; S]; WARP],
    ) -> Run<()> {
        check_aligned(at, mask, S)?;
        if contiguous(at, mask, S)
            && let Some(a) = self.memory.find(at[0])
            && let Some(offset) = a.offset(at[0], S * WARP)
            && (used == !0 && a.is_init_range(offset, S * WARP))
        {
            for (i, slot) in out.iter_mut().enumerate() {
                *slot = load_piece(a, offset + i * S);
            }
            count_contiguous(&mut stats.global_loads, at[0], S);
            a.touch_read(offset, S * WARP);
            return Ok(());
        }
        for lane in lanes(mask) {
            let (a, offset) = self.find(at[lane], S, lane, false)?;
            self.check_init(a, offset, S, used, lane)?;
            out[lane] = load_piece(a, offset);
            a.touch_read(offset, S);
        }
        count_sectors(&mut stats.global_loads, at, mask, S);
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn store<const S: usize>(
        &self,
        stats: &mut Stats,
        at: &[u64; WARP],
        mask: u32,
        data: &[[u8; S]; WARP],
        races: &mut dyn FnMut(usize, u64, u32),
        block: u32,
    ) -> Run<()> {
        check_aligned(at, mask, S)?;
        for lane in lanes(mask) {
            let (a, offset) = self.find(at[lane], S, lane, true)?;
            self.claim(a, offset, S, lane, block, races);
            store_piece(a, offset, &data[lane]);
            a.set_init(offset, S);
            a.touch_written(offset, S);
        }
        count_sectors(&mut stats.global_stores, at, mask, S);
        Ok(())
    }

    /// Notes the block as the writer; another block that wrote the same bytes makes a race.
    #[inline(always)]
    pub(crate) fn claim(
        &self,
        a: &Allocation,
        offset: usize,
        size: usize,
        lane: usize,
        block: u32,
        races: &mut dyn FnMut(usize, u64, u32),
    ) {
        if !self.many {
            return;
        }
        let (first, bytes) = (offset / 4, if size >= 4 { 15 } else { ((1 << size) - 1) << (offset % 4) });
        for granule in first..first + size.div_ceil(4) {
            if let Some(other) = a.claim(granule, bytes, self.launch, block) {
                races(lane, a.base + granule as u64 * 4, other);
            }
        }
    }
}

/// A piece of up to 16 bytes in one go, larger ones in two.
#[inline(always)]
fn load_piece<const S: usize>(a: &Allocation, offset: usize) -> [u8; S] {
    if S <= 16 {
        return a.bytes.load(offset);
    }
    let mut out = [0; S];
    for at in (0..S).step_by(16) {
        out[at..at + 16].copy_from_slice(&a.bytes.load::<16>(offset + at));
    }
    out
}

#[inline(always)]
fn store_piece<const S: usize>(a: &Allocation, offset: usize, data: &[u8; S]) {
    if S <= 16 {
        return a.bytes.store(offset, *data);
    }
    for at in (0..S).step_by(16) {
        a.bytes.store::<16>(offset + at, data[at..at + 16].try_into().unwrap_or_default());
    }
}

#[inline(always)]
fn count_contiguous(traffic: &mut crate::counters::Traffic, first: u64, size: usize) {
    let bytes = (size * WARP) as u64;
    traffic.requests += 1;
    traffic.bytes += bytes;
    traffic.sectors += (first + bytes - 1) / 32 - first / 32 + 1;
    traffic.ideal_sectors += bytes.div_ceil(32);
}

/// Shared memory of a block, accessed by a warp.
#[inline(always)]
pub(crate) fn load_shared<const S: usize>(
    shared: &mut Shared,
    clocks: &Clocks,
    warp: usize,
    at: &[u64; WARP],
    mask: u32,
    op: &MemOp,
    out: &mut [[u8; S]; WARP],
) -> Run<()> {
    check_aligned(at, mask, S)?;
    for lane in lanes(mask) {
        let offset = at[lane] as usize;
        if !op.strong {
            shared.note_read::<S>(clocks, offset, op.used, Who { warp, lane })?;
        } else {
            shared.check_read(offset, S, lane)?;
        }
        out[lane] = shared.get(offset);
    }
    Ok(())
}

#[inline(always)]
pub(crate) fn store_shared<const S: usize>(
    shared: &mut Shared,
    clocks: &Clocks,
    warp: usize,
    at: &[u64; WARP],
    mask: u32,
    op: &MemOp,
    data: &[[u8; S]; WARP],
) -> Run<()> {
    check_aligned(at, mask, S)?;
    for lane in lanes(mask) {
        let offset = at[lane] as usize;
        shared.note_write::<S>(clocks, offset, op.strong, Who { warp, lane })?;
        shared.set(offset, data[lane]);
    }
    Ok(())
}

/// Counts a shared access of a warp, with its bank conflicts.
pub(crate) fn count_shared(
    stats: &mut Stats,
    pc: usize,
    at: &[u64; WARP],
    mask: u32,
    size: usize,
    store: bool,
) {
    let mut words = [0u32; WARP];
    for i in 0..WARP {
        words[i] = at[i] as u32;
    }
    let extra = if contiguous(at, mask, size) && size >= 4 { 0 } else { conflicts(&words, mask, size) };
    let traffic = if store { &mut stats.shared_stores } else { &mut stats.shared_loads };
    traffic.requests += 1;
    traffic.bytes += (mask.count_ones() as usize * size) as u64;
    traffic.conflicts += extra;
    stats.conflicts[pc] += extra;
}

/// Local memory: each lane has its own.
pub(crate) fn local_range(warp: &Warp, address: u64, size: usize, lane: usize) -> Run<usize> {
    let len = warp.local.len() / WARP;
    let offset = (address as usize).wrapping_sub(LOCAL_BASE);
    if offset < len && size <= len - offset {
        return Ok(lane * len + offset);
    }
    let message = format!("access of {size} bytes outside of the {len} bytes of local memory");
    Err(Trouble::at(FaultKind::OutOfBounds, lane, address, message))
}

pub(crate) fn load_local<const S: usize>(
    warp: &Warp,
    at: &[u64; WARP],
    mask: u32,
    used: u64,
    out: &mut [[u8; S]; WARP],
) -> Run<()> {
    check_aligned(at, mask, S)?;
    for lane in lanes(mask) {
        let start = local_range(warp, at[lane], S, lane)?;
        let bad = (0..S).find(|&i| used >> i & 1 == 1 && warp.local_init[start + i] == 0);
        if let Some(i) = bad {
            let message = "read of local memory that was not written";
            return Err(Trouble::at(FaultKind::UninitializedMemory, lane, at[lane] + i as u64, message));
        }
        out[lane].copy_from_slice(&warp.local[start..start + S]);
    }
    Ok(())
}

/// `tainted` lanes store values that were never written themselves.
pub(crate) fn store_local<const S: usize>(
    warp: &mut Warp,
    at: &[u64; WARP],
    mask: u32,
    tainted: u32,
    data: &[[u8; S]; WARP],
) -> Run<()> {
    check_aligned(at, mask, S)?;
    for lane in lanes(mask) {
        let start = local_range(warp, at[lane], S, lane)?;
        warp.local[start..start + S].copy_from_slice(&data[lane]);
        warp.local_init[start..start + S].fill((tainted >> lane & 1 == 0) as u8);
    }
    Ok(())
}

/// Spreads loaded bytes over the destination registers.
#[inline(always)]
pub(crate) fn scatter<const S: usize>(warp: &mut Warp, op: &MemOp, mask: u32, data: &[[u8; S]; WARP]) {
    let elem = op.elem as usize;
    for (k, reg) in op.regs.iter().enumerate() {
        let Some(reg) = reg else { continue };
        match (elem, reg.file) {
            (4, File::R32) => put32(warp, *reg, mask, |lane| read_u32(&data[lane], k * 4)),
            (8, File::R64) => put64(warp, *reg, mask, |lane| read_u64(&data[lane], k * 8)),
            (_, File::R32) => {
                let keep = u32::MAX >> (32 - reg.bits as u32);
                put32(warp, *reg, mask, |lane| {
                    read_small(&data[lane], k * elem, elem, op.signed) as u32 & keep
                })
            }
            (4, _) => put64(warp, *reg, mask, |lane| {
                let v = read_u32(&data[lane], k * 4);
                if op.signed { v as i32 as i64 as u64 } else { v as u64 }
            }),
            _ => put64(warp, *reg, mask, |lane| read_small(&data[lane], k * elem, elem, op.signed) as u64),
        }
    }
}

#[inline(always)]
fn put32(warp: &mut Warp, reg: Reg, mask: u32, f: impl Fn(usize) -> u32) {
    let row = &mut warp.regs.r32[reg.row as usize];
    if mask == u32::MAX {
        (0..WARP).for_each(|lane| row[lane] = f(lane));
    } else {
        lanes(mask).for_each(|lane| row[lane] = f(lane));
    }
}

#[inline(always)]
fn put64(warp: &mut Warp, reg: Reg, mask: u32, f: impl Fn(usize) -> u64) {
    let row = &mut warp.regs.r64[reg.row as usize];
    if mask == u32::MAX {
        (0..WARP).for_each(|lane| row[lane] = f(lane));
    } else {
        lanes(mask).for_each(|lane| row[lane] = f(lane));
    }
}

#[inline(always)]
fn read_u32<const S: usize>(bytes: &[u8; S], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default())
}

#[inline(always)]
fn read_u64<const S: usize>(bytes: &[u8; S], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
}

/// One or two bytes, extended to 64 bits.
#[inline(always)]
fn read_small<const S: usize>(bytes: &[u8; S], at: usize, elem: usize, signed: bool) -> i64 {
    match (elem, signed) {
        (1, false) => bytes[at] as i64,
        (1, true) => bytes[at] as i8 as i64,
        (_, false) => u16::from_le_bytes([bytes[at], bytes[at + 1]]) as i64,
        (_, true) => i16::from_le_bytes([bytes[at], bytes[at + 1]]) as i64,
    }
}

/// Collects the bytes that a store writes.
#[inline(always)]
pub(crate) fn gather<const S: usize>(warp: &Warp, op: &MemOp, mask: u32) -> [[u8; S]; WARP] {
    let mut out = [[0; S]; WARP];
    let elem = op.elem as usize;
    for (k, reg) in op.regs.iter().enumerate() {
        let Some(reg) = reg else { continue };
        for lane in lanes(mask) {
            let value = match reg.file {
                File::R32 => warp.regs.r32[reg.row as usize][lane] as u64,
                _ => warp.regs.r64[reg.row as usize][lane],
            };
            out[lane][k * elem..(k + 1) * elem].copy_from_slice(&value.to_le_bytes()[..elem]);
        }
    }
    out
}
