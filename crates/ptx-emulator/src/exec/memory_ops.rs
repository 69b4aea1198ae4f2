//! Loads, stores, atomics: from registers to the right memory.

use super::access::{self, addresses, lanes};
use super::machine::{GlobalRace, Machine};
use super::shared::Who;
use super::stats::count_sectors;
use super::warp::Warp;
use crate::fault::{FaultKind, Run, Trouble};
use crate::memory::{Allocation, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_MASK};
use crate::ops::lanes::WARP;
use crate::parse::ast::Space;
use crate::program::{AtomOp, File, MemOp};

/// Picks the function for the bytes of one lane.
macro_rules! by_size {
    ($size:expr, $s:ident => $e:expr) => {
        match $size {
            1 => {
                const $s: usize = 1;
                $e
            }
            2 => {
                const $s: usize = 2;
                $e
            }
            4 => {
                const $s: usize = 4;
                $e
            }
            8 => {
                const $s: usize = 8;
                $e
            }
            16 => {
                const $s: usize = 16;
                $e
            }
            _ => {
                const $s: usize = 32;
                $e
            }
        }
    };
}

/// Lanes of a generic access by the space that their addresses are in, with the addresses in that space.
fn split_generic(at: &[u64; WARP], mask: u32) -> Vec<(Space, u32, [u64; WARP])> {
    let space_of = |a: u64| match a & WINDOW_MASK {
        SHARED_WINDOW => Space::Cluster,
        LOCAL_WINDOW => Space::Local,
        PARAM_WINDOW => Space::Param,
        _ => Space::Global,
    };
    let mut out: Vec<(Space, u32, [u64; WARP])> = Vec::new();
    for lane in lanes(mask) {
        let space = space_of(at[lane]);
        let local = if space == Space::Global { at[lane] } else { at[lane] & !WINDOW_MASK };
        let i = out.iter().position(|o| o.0 == space).unwrap_or_else(|| {
            out.push((space, 0, [0; WARP]));
            out.len() - 1
        });
        out[i].1 |= 1 << lane;
        out[i].2[lane] = local;
    }
    out
}

impl Machine<'_> {
    pub(super) fn load(&mut self, warp: &mut Warp, op: &MemOp, m: u32) -> Run<()> {
        if m == 0 {
            return Ok(());
        }
        let at = addresses(warp, op.address);
        if op.space == Space::Generic {
            for (space, mask, at) in split_generic(&at, m) {
                self.load_from(warp, op, space, &at, mask)?;
            }
            return Ok(());
        }
        self.load_from(warp, op, op.space, &at, m)
    }

    #[inline(always)]
    fn load_from(&mut self, warp: &mut Warp, op: &MemOp, space: Space, at: &[u64; WARP], m: u32) -> Run<()> {
        let size = op.elem as usize * op.regs.len();
        let space = super::cluster::narrow(space, at, m);
        by_size!(size, S => {
            let mut data = [[0u8; S]; WARP];
            match space {
                Space::Global | Space::Const | Space::Generic => {
                    self.check_access(warp, at, m, S, false)?;
                    self.global.load(&mut self.stats, at, m, op.used, &mut data)?;
                }
                Space::Shared => {
                    let shared = &mut self.shared[warp.block];
                    access::load_shared(shared, &self.clocks, warp.id, at, m, op, &mut data)?;
                    access::count_shared(&mut self.stats, self.pc, at, m, S, false);
                }
                Space::Cluster => {
                    for (block, m, at) in self.by_block(warp, at, m)? {
                        let shared = &mut self.shared[block];
                        access::load_shared(shared, &self.clocks, warp.id, &at, m, op, &mut data)?;
                        access::count_shared(&mut self.stats, self.pc, &at, m, S, false);
                    }
                }
                Space::Local => {
                    access::load_local(warp, at, m, op.used, &mut data)?;
                    self.stats.local_accesses += m.count_ones() as u64;
                }
                Space::Param => self.load_param(at, m, &mut data)?,
            }
            access::scatter(warp, op, m, &data);
        });
        Ok(())
    }

    /// Global memory that other grids or asynchronous work may be using.
    #[inline(always)]
    fn check_access(&self, warp: &Warp, at: &[u64; WARP], m: u32, size: usize, write: bool) -> Run<()> {
        if self.stores == 0 && self.clocks.depended(warp.id) {
            return Ok(());
        }
        for lane in lanes(m) {
            self.check_stores(at[lane], size, lane)?;
            // What is out of bounds is reported by the access itself.
            if let Some(a) = self.job.memory.find(at[lane])
                && let Some(offset) = a.offset(at[lane], size)
            {
                self.check_early(warp, a, offset, size, lane, write)?;
            }
        }
        Ok(())
    }

    /// Before it waits for them, a grid may not touch what the grids before it write, nor write what they read.
    #[inline(always)]
    pub(super) fn check_early(
        &self,
        warp: &Warp,
        a: &Allocation,
        offset: usize,
        size: usize,
        lane: usize,
        write: bool,
    ) -> Run<()> {
        if self.clocks.depended(warp.id) || !a.earlier(offset, size, write) {
            return Ok(());
        }
        let message = format!(
            "{} of byte {offset} of `{}`, which the launch before may still {}: griddepcontrol.wait is missing before it",
            if write { "write" } else { "read" },
            a.label,
            if write { "read or write" } else { "write" },
        );
        Err(Trouble::at(FaultKind::EarlyAccess, lane, a.base + offset as u64, message))
    }

    fn load_param<const S: usize>(&self, at: &[u64; WARP], m: u32, out: &mut [[u8; S]; WARP]) -> Run<()> {
        access::check_aligned(at, m, S)?;
        let params = self.job.params;
        for lane in lanes(m) {
            let start = at[lane] as usize;
            let Some(bytes) = params.get(start..start.saturating_add(S)) else {
                let message =
                    format!("read of {S} bytes behind the {} bytes of kernel parameters", params.len());
                return Err(Trouble::at(FaultKind::OutOfBounds, lane, at[lane], message));
            };
            out[lane].copy_from_slice(bytes);
        }
        Ok(())
    }

    pub(super) fn store(&mut self, warp: &mut Warp, op: &MemOp, m: u32) -> Run<()> {
        if m == 0 {
            return Ok(());
        }
        let at = addresses(warp, op.address);
        if op.space == Space::Generic {
            for (space, mask, at) in split_generic(&at, m) {
                self.store_to(warp, op, space, &at, mask)?;
            }
            return Ok(());
        }
        self.store_to(warp, op, op.space, &at, m)
    }

    #[inline(always)]
    fn store_to(&mut self, warp: &mut Warp, op: &MemOp, space: Space, at: &[u64; WARP], m: u32) -> Run<()> {
        let size = op.elem as usize * op.regs.len();
        let space = super::cluster::narrow(space, at, m);
        by_size!(size, S => {
            let data = access::gather::<S>(warp, op, m);
            match space {
                Space::Global | Space::Generic => {
                    self.check_access(warp, at, m, S, true)?;
                    let block = self.block_number(warp.block);
                    let (races, pc, index) = (&mut self.races, self.pc, warp.index);
                    let mut note = |lane: usize, address: u64, other: u32| {
                        note_race(races, GlobalRace {
                            address,
                            blocks: (other.min(block), other.max(block)),
                            pc,
                            lane,
                            warp: index,
                            block,
                        });
                    };
                    self.global.store(&mut self.stats, at, m, &data, &mut note, block)?;
                }
                Space::Shared => {
                    let shared = &mut self.shared[warp.block];
                    access::store_shared(shared, &self.clocks, warp.id, at, m, op, &data)?;
                    access::count_shared(&mut self.stats, self.pc, at, m, S, true);
                }
                Space::Cluster => {
                    for (block, m, at) in self.by_block(warp, at, m)? {
                        let shared = &mut self.shared[block];
                        access::store_shared(shared, &self.clocks, warp.id, &at, m, op, &data)?;
                        access::count_shared(&mut self.stats, self.pc, &at, m, S, true);
                    }
                }
                Space::Local => {
                    let tainted = super::track::tainted(&self.job.entry.kernel, warp, &op.regs);
                    access::store_local(warp, at, m, tainted, &data)?;
                    self.stats.local_accesses += m.count_ones() as u64;
                }
                Space::Const | Space::Param => {
                    let lane = m.trailing_zeros() as usize;
                    let message = "a store to constant memory or kernel parameters";
                    return Err(Trouble::at(FaultKind::ReadOnly, lane, at[lane], message));
                }
            }
        });
        Ok(())
    }

    pub(super) fn atomic(&mut self, warp: &mut Warp, op: &AtomOp, m: u32) -> Run<()> {
        if m == 0 {
            return Ok(());
        }
        let at = addresses(warp, op.address);
        let size = op.size as usize;
        access::check_aligned(&at, m, size)?;
        let groups = if op.space == Space::Generic { split_generic(&at, m) } else { vec![(op.space, m, at)] };
        self.stats.atomics += m.count_ones() as u64;
        for (space, mask, at) in groups {
            for lane in lanes(mask) {
                let value = |reg: crate::program::Reg| match reg.file {
                    File::R32 => warp.regs.r32[reg.row as usize][lane] as u64,
                    _ => warp.regs.r64[reg.row as usize][lane],
                };
                let (a, b) = (value(op.a), op.b.map_or(0, value));
                let old = match space {
                    Space::Global | Space::Generic => {
                        self.check_access(warp, &at, 1 << lane, size, true)?;
                        self.atomic_global(op, at[lane], a, b, lane)?
                    }
                    Space::Shared | Space::Cluster => {
                        let (block, offset) = self.place_of(warp, space, at[lane], lane)?;
                        let shared = &mut self.shared[block];
                        let me = Who { warp: warp.id, lane };
                        // Reads too: what it adds to must be there.
                        shared.note_atomic(&self.clocks, offset, size, me)?;
                        let mut old = [0; 8];
                        old[..size].copy_from_slice(shared.bytes(offset, size));
                        let old = u64::from_le_bytes(old);
                        shared.put(offset, &(op.op)(old, a, b).to_le_bytes()[..size]);
                        old
                    }
                    _ => {
                        let message = "an atomic on memory that is not global or shared";
                        return Err(Trouble::at(FaultKind::Operand, lane, at[lane], message));
                    }
                };
                if let Some(d) = op.dst {
                    match d.file {
                        File::R32 => warp.regs.r32[d.row as usize][lane] = old as u32,
                        _ => warp.regs.r64[d.row as usize][lane] = old,
                    }
                }
            }
            if matches!(space, Space::Global | Space::Generic) && op.dst.is_some() {
                count_sectors(&mut self.stats.global_loads, &at, mask, size);
            }
        }
        Ok(())
    }

    fn atomic_global(&self, op: &AtomOp, address: u64, a: u64, b: u64, lane: usize) -> Run<u64> {
        let size = op.size as usize;
        let (allocation, offset) = self.global.find(address, size, lane, true)?;
        self.global.check_init(allocation, offset, size, !0, lane)?;
        let shift = (offset & 7) * 8;
        let keep = u64::MAX >> (64 - size * 8);
        let old = allocation.bytes.update(offset & !7, |word| {
            let new = (op.op)(word >> shift & keep, a, b) & keep;
            word & !(keep << shift) | new << shift
        });
        allocation.touch_written(offset, size);
        Ok(old >> shift & keep)
    }
}

/// Keeps the races of the lowest address: that set does not depend on the order of the blocks.
pub(super) fn note_race(races: &mut Vec<GlobalRace>, race: GlobalRace) {
    match races.first() {
        Some(first) if first.address < race.address => {}
        Some(first) if first.address == race.address => races.push(race),
        _ => {
            races.clear();
            races.push(race);
        }
    }
}
