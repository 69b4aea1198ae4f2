//! Barriers of a block: `bar` and `barrier.cta`, whole or named, complete or partial.

use super::clocks::Released;
use super::machine::{Flow, Machine};
use super::warp::{Wait, Warp};
use crate::fault::{FaultKind, Run, Trouble};
use crate::program::{Bar, BarMode, File, Reg};

/// What waits for the result of `bar.red`.
#[derive(Clone, Copy, Debug)]
struct Reduction {
    warp: usize,
    mask: u32,
    mode: BarMode,
    dst: Reg,
}

/// One of the 16 barriers of a block.
#[derive(Clone, Debug, Default)]
pub(super) struct Barrier {
    /// Threads that arrived.
    arrived: u32,
    /// Threads that the first arrival asked for; None for the whole block.
    expected: Option<u32>,
    open: bool,
    waiting: Vec<usize>,
    released: Released,
    /// Threads whose predicate was true, and those that were asked.
    votes: u32,
    voters: u32,
    reductions: Vec<Reduction>,
}

impl Machine<'_> {
    pub(super) fn barrier(&mut self, warp: &mut Warp, at: usize, bar: &Bar, m: u32) -> Run<Flow> {
        if m == 0 {
            return Ok(Flow::Next);
        }
        if bar.aligned && m != warp.live {
            let message = format!(
                "lanes {m:#010x} of warp {} reach a barrier that lanes {:#010x} do not reach with them",
                warp.index,
                warp.live & !m
            );
            return Err(Trouble::new(FaultKind::Divergence, message));
        }
        let lane = m.trailing_zeros() as usize;
        let id = warp.regs.r32[bar.id as usize][lane];
        let count = bar.count.map(|row| warp.regs.r32[row as usize][lane]);
        if id >= 16 || count.is_some_and(|c| c == 0 || !c.is_multiple_of(32)) {
            let message =
                format!("barrier {id} for {count:?} threads: 16 barriers and multiples of 32 threads exist");
            return Err(Trouble::new(FaultKind::Operand, message));
        }
        let threads = if bar.aligned && count.is_some() { 32 } else { m.count_ones() };
        let released = self.clocks.release(warp.id, m, warp.live);
        let barrier = &mut self.barriers[warp.block][id as usize];
        if barrier.open && barrier.expected != count {
            let message = format!(
                "barrier {id} is used for {count:?} threads while another warp waits at it for {:?}",
                barrier.expected
            );
            return Err(Trouble::new(FaultKind::Operand, message));
        }
        barrier.open = true;
        barrier.expected = count;
        barrier.arrived += threads;
        barrier.released.join(&released);
        if let Some((row, negate)) = bar.a {
            let p = warp.regs.pred[row as usize] ^ if negate { !0 } else { 0 };
            barrier.votes += (p & m).count_ones();
            barrier.voters += m.count_ones();
            if let Some(dst) = bar.d {
                barrier.reductions.push(Reduction { warp: warp.id, mask: m, mode: bar.mode, dst });
            }
        }
        if bar.mode != BarMode::Arrive {
            barrier.waiting.push(warp.id);
            warp.splits[at].wait = Wait::Barrier(id);
        }
        warp.splits[at].pc += 1;
        self.complete(warp.block, id as usize, Some(warp))?;
        Ok(Flow::Again)
    }

    /// Lets the waiting warps go if all have arrived. `current` is the warp that runs now, outside of the table.
    fn complete(&mut self, block: usize, id: usize, mut current: Option<&mut Warp>) -> Run<()> {
        let base = block * self.warps_per_block;
        let live: u32 = (base..base + self.warps_per_block)
            .map(|w| match &current {
                Some(warp) if warp.id == w => warp.live.count_ones(),
                _ => self.warps[w].live.count_ones(),
            })
            .sum();
        let barrier = &mut self.barriers[block][id];
        let wanted = barrier.expected.unwrap_or(live);
        if !barrier.open || barrier.arrived < wanted {
            return Ok(());
        }
        if barrier.arrived > wanted {
            let message =
                format!("{} threads arrive at barrier {id}, which is for {wanted}", barrier.arrived);
            return Err(Trouble::new(FaultKind::Operand, message));
        }
        let barrier = std::mem::take(barrier);
        for reduction in &barrier.reductions {
            let value = match reduction.mode {
                BarMode::Popc => barrier.votes,
                BarMode::And => (barrier.votes == barrier.voters) as u32,
                _ => (barrier.votes > 0) as u32,
            };
            let warp = match &mut current {
                Some(warp) if warp.id == reduction.warp => &mut **warp,
                _ => &mut self.warps[reduction.warp],
            };
            let (row, mask) = (reduction.dst.row as usize, reduction.mask);
            if reduction.dst.file == File::Pred {
                let p = &mut warp.regs.pred[row];
                *p = *p & !mask | if value != 0 { mask } else { 0 };
            } else {
                super::access::lanes(mask).for_each(|lane| warp.regs.r32[row][lane] = value);
            }
        }
        self.stats.barriers += barrier.waiting.len() as u64;
        for &w in &barrier.waiting {
            self.clocks.acquire(w, &barrier.released);
            let warp = match &mut current {
                Some(warp) if warp.id == w => &mut **warp,
                _ => &mut self.warps[w],
            };
            for split in &mut warp.splits {
                if split.wait == Wait::Barrier(id as u32) {
                    split.wait = Wait::Ready;
                }
            }
        }
        Ok(())
    }

    /// A warp ended: barriers for the whole block wait for fewer threads now.
    pub(super) fn barriers_after_exit(&mut self, block: usize) {
        for id in 0..16 {
            if self.barriers[block][id].open && self.barriers[block][id].expected.is_none() {
                // Cannot have more arrivals than live threads, so there is nothing to report.
                let _ = self.complete(block, id, None);
            }
        }
    }

    /// For the report of a deadlock.
    pub(super) fn barrier_state(&self, block: usize, id: u32) -> String {
        let barrier = &self.barriers[block][id as usize];
        match barrier.expected {
            Some(n) => format!(", where {} of {n} threads arrived", barrier.arrived),
            None => format!(", where {} threads of the block arrived", barrier.arrived),
        }
    }
}
