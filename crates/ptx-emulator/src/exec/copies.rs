//! `cp.async`: copies that complete as late as they may, when their thread waits for them.

use super::access::{addresses, check_aligned, lanes};
use super::bulk::Work;
use super::machine::Machine;
use super::shared::{Who, state};
use super::stats::count_sectors;
use super::warp::{Copy, Warp};
use crate::fault::{FaultKind, Run, Trouble};
use crate::program::CpAsync;

impl Machine<'_> {
    /// The destination becomes unusable; the data will come when the thread waits.
    pub(super) fn issue_copy(&mut self, warp: &mut Warp, op: &CpAsync, m: u32) -> Run<()> {
        if m == 0 {
            return Ok(());
        }
        let (dst, src) = (addresses(warp, op.dst), addresses(warp, op.src));
        let size = op.bytes as usize;
        check_aligned(&dst, m, size)?;
        check_aligned(&src, m, size)?;
        let mut reading = 0;
        for lane in lanes(m) {
            let mut read = op.src_bytes.map_or(size as u32, |row| warp.regs.r32[row as usize][lane]) as usize;
            if read > size {
                let message = format!("src-size {read} is above cp-size {size}");
                return Err(Trouble::at(FaultKind::Operand, lane, dst[lane], message));
            }
            if op.ignore.is_some_and(|p| warp.regs.pred[p as usize] >> lane & 1 == 1) {
                read = 0;
            }
            let mut snapshot = [0; 16];
            if read > 0 {
                let (a, offset) = self.global.find(src[lane], read, lane, false)?;
                self.check_early(warp, a, offset, read, lane, false)?;
                let whole = if read == size { !0 } else { (1u64 << read) - 1 };
                self.global.check_init(a, offset, read, whole, lane)?;
                a.bytes.copy_out(offset, &mut snapshot[..read]);
                a.touch_read(offset, read);
                reading |= 1 << lane;
            }
            let at = dst[lane] as usize;
            let me = Who { warp: warp.id, lane };
            let shared = &mut self.shared[warp.block];
            match size {
                4 => shared.note_write::<4>(&self.clocks, at, false, me)?,
                8 => shared.note_write::<8>(&self.clocks, at, false, me)?,
                _ => shared.note_write::<16>(&self.clocks, at, false, me)?,
            }
            shared.set_state(at, size, state::ARRIVING);
            warp.copies.push(Copy {
                lane: lane as u8,
                bytes: op.bytes,
                read: read as u8,
                group: warp.groups[lane],
                dst: at as u32,
                src: src[lane],
                snapshot,
            });
        }
        self.stats.async_bytes += m.count_ones() as u64 * size as u64;
        if reading != 0 {
            count_sectors(&mut self.stats.global_loads, &src, reading, size);
        }
        Ok(())
    }

    /// Completes the groups of the lanes that may not be pending any more.
    pub(super) fn wait_copies(&mut self, warp: &mut Warp, pending: Option<u32>, m: u32) -> Run<()> {
        let groups = warp.groups;
        let due = |copy: &Copy| {
            let lane = copy.lane as usize;
            let due = match pending {
                None => true,
                // The youngest `n` committed groups and the open one may stay.
                Some(n) => copy.group.saturating_add(n) < groups[lane],
            };
            m >> lane & 1 == 1 && due
        };
        let mut copies: Vec<Copy> = warp.copies.extract_if(.., |copy| due(copy)).collect();
        for work in &mut self.work {
            if let Work::Copies { warp: of, copies: others, .. } = work
                && *of == warp.id
            {
                copies.extend(others.extract_if(.., |copy| due(copy)));
            }
        }
        copies.iter().try_for_each(|copy| self.finish_copy(warp.block, warp.id, copy))
    }

    pub(super) fn finish_copy(&mut self, block: usize, warp: usize, copy: &Copy) -> Run<()> {
        let data = self.copied(copy)?;
        let (lane, at, size) = (copy.lane as usize, copy.dst as usize, copy.bytes as usize);
        let shared = &mut self.shared[block];
        shared.put(at, &data[..size]);
        shared.stamp_write(&self.clocks, at, size, false, Who { warp, lane })
    }

    /// What a copy brings; its source must still be what it was.
    pub(super) fn copied(&self, copy: &Copy) -> Run<[u8; 16]> {
        let (lane, read) = (copy.lane as usize, copy.read as usize);
        let mut data = [0; 16];
        if read > 0 {
            let (a, offset) = self.global.find(copy.src, read, lane, false)?;
            a.bytes.copy_out(offset, &mut data[..read]);
            if data != copy.snapshot {
                let message = "the source of an asynchronous copy was changed before the copy was waited for";
                return Err(Trouble::at(FaultKind::InFlight, lane, copy.src, message));
            }
        }
        Ok(data)
    }
}
