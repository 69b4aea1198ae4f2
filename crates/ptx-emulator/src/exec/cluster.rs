//! What the blocks of a cluster share: the barrier, each other's memory; and what grids and warpgroups negotiate.

use super::clocks::{Released, lane_code};
use super::machine::{Flow, Machine};
use super::warp::{Wait, Warp};
use crate::fault::{FaultKind, Run, Trouble};
use crate::memory::{SHARED_WINDOW, WINDOW_MASK};
use crate::ops::lanes::WARP;
use crate::parse::ast::Space;
use crate::program::{ClusterMode, Fence, File, Reg};

/// Shared addresses of another block have its rank plus one above this bit.
const RANK_SHIFT: u32 = 24;

/// The space of an access to the cluster's memory that only meets the own block's.
#[inline(always)]
pub(super) fn narrow(space: Space, at: &[u64; WARP], m: u32) -> Space {
    if space == Space::Cluster && super::access::lanes(m).all(|lane| at[lane] >> RANK_SHIFT == 0) {
        return Space::Shared;
    }
    space
}

/// `barrier.cluster`
#[derive(Debug, Default)]
pub(super) struct ClusterBarrier {
    phase: u32,
    gathering: Released,
    done: Released,
    /// By warp: time before which its mbarriers were initialised for the others to see.
    inits: Vec<u32>,
}

impl Machine<'_> {
    pub(super) fn grid_control(&mut self, warp: &Warp, wait: bool, m: u32) {
        if m == 0 {
            return;
        }
        if wait {
            self.clocks.depend(warp.id);
        } else {
            self.early |= !self.clocks.depended(warp.id);
        }
    }

    pub(super) fn cluster_barrier(
        &mut self,
        warp: &mut Warp,
        at: usize,
        mode: ClusterMode,
        aligned: bool,
        m: u32,
    ) -> Run<Flow> {
        if m == 0 {
            return Ok(Flow::Next);
        }
        if aligned && m != warp.live {
            let message = format!(
                "lanes {m:#010x} of warp {} reach the cluster's barrier, lanes {:#010x} do not reach it with them",
                warp.index,
                warp.live & !m
            );
            return Err(Trouble::new(FaultKind::Divergence, message));
        }
        let wrong = |lanes: u32, what: &str| {
            let mut trouble = Trouble::new(FaultKind::Operand, what);
            trouble.lane = Some(lanes.trailing_zeros() as usize);
            Err(trouble)
        };
        match mode {
            ClusterMode::Arrive(release) => {
                if warp.cluster_owed & m != 0 {
                    return wrong(warp.cluster_owed & m, "a second arrival without a wait between");
                }
                if release {
                    let released = self.clocks.release(warp.id, m, warp.live);
                    self.cluster.gathering.join(&released);
                } else if let Some(released) = self.clocks.release_fence(warp.id) {
                    self.cluster.gathering.join(released);
                }
                warp.cluster_arrived |= m;
                warp.cluster_owed |= m;
                Ok(Flow::Next)
            }
            ClusterMode::Wait(acquire) => {
                if m & !warp.cluster_owed != 0 {
                    return wrong(m & !warp.cluster_owed, "a wait without an arrival before");
                }
                warp.cluster_owed &= !m;
                // Lanes whose arrival was of an earlier phase wait for nothing.
                let phase = self.cluster.phase - (warp.cluster_arrived & m == 0) as u32;
                warp.splits[at].pc += 1;
                warp.splits[at].wait = Wait::Cluster(phase, acquire);
                Ok(Flow::Again)
            }
        }
    }

    /// Ends the phase of the cluster's barrier if everybody has arrived. No warp may be running.
    fn complete_cluster(&mut self) {
        let missing = self.warps.iter().any(|w| w.live & !w.cluster_arrived != 0);
        if missing || self.warps.iter().all(|w| w.cluster_arrived == 0) {
            return;
        }
        self.cluster.phase += 1;
        self.cluster.done = std::mem::take(&mut self.cluster.gathering);
        self.cluster.inits.clone_from(&self.init_fences);
        self.warps.iter_mut().for_each(|w| w.cluster_arrived = 0);
    }

    /// Whether what a split waits for has happened; takes what was published to it.
    pub(super) fn poll(&mut self, w: usize) {
        for i in 0..self.warps[w].splits.len() {
            let ready = match self.warps[w].splits[i].wait {
                Wait::Cluster(phase, acquire) => {
                    self.complete_cluster();
                    let ready = self.cluster.phase > phase;
                    if ready {
                        self.warps[w].met_cluster = true;
                        let from = w * self.warps.len();
                        let to = from + self.cluster.inits.len();
                        self.known_inits[from..to].copy_from_slice(&self.cluster.inits);
                        if acquire {
                            self.clocks.acquire(w, &self.cluster.done);
                        }
                        self.stats.barriers += 1;
                    }
                    ready
                }
                Wait::Mbarrier { block, at, phase } => self.phase_ended(block, at, phase),
                Wait::Registers(n) => self.grant(w, n),
                _ => continue,
            };
            if ready {
                self.warps[w].splits[i].wait = Wait::Ready;
            }
        }
    }

    /// Block of the cluster and address in its shared memory, which the thread uses from now on.
    pub(super) fn place_of(
        &mut self,
        warp: &Warp,
        space: Space,
        address: u64,
        lane: usize,
    ) -> Run<(usize, usize)> {
        let (block, inside) = self.find_place(warp, space, address, lane)?;
        if block != warp.block {
            let now = self.clocks.now();
            let visitors = &mut self.shared[block].visitors;
            visitors.resize(self.clocks.warps(), 0);
            visitors[warp.id] = now;
        }
        Ok((block, inside))
    }

    /// The same for an arrival at an mbarrier, which is over once somebody has waited for it.
    pub(super) fn place_of_arrival(
        &mut self,
        warp: &Warp,
        space: Space,
        address: u64,
        lane: usize,
    ) -> Run<(usize, usize)> {
        let (block, inside) = self.find_place(warp, space, address, lane)?;
        if block != warp.block {
            // Before what the arrival publishes, which has the time of now.
            let (arrival, before) = ((warp.id, lane), self.clocks.now() - 1);
            self.shared[block].arrivals.insert(arrival, before);
        }
        Ok((block, inside))
    }

    fn find_place(&mut self, warp: &Warp, space: Space, address: u64, lane: usize) -> Run<(usize, usize)> {
        let inside = match space {
            Space::Shared => return Ok((warp.block, address as usize)),
            Space::Cluster => address,
            _ if address & WINDOW_MASK == SHARED_WINDOW => address & !WINDOW_MASK,
            _ => {
                let message = "the address is not one of shared memory";
                return Err(Trouble::at(FaultKind::OutOfBounds, lane, address, message));
            }
        };
        let rank = (inside >> RANK_SHIFT) as usize;
        if rank == 0 {
            return Ok((warp.block, inside as usize));
        }
        if rank > self.blocks.len() {
            let message = format!("the address is of no block of this cluster of {}", self.blocks.len());
            return Err(Trouble::at(FaultKind::OutOfBounds, lane, address, message));
        }
        self.check_visit(warp, rank - 1, lane, address)?;
        Ok((rank - 1, inside as usize & ((1 << RANK_SHIFT) - 1)))
    }

    /// Another block's memory may only be touched between its start and its end.
    fn check_visit(&self, warp: &Warp, block: usize, lane: usize, address: u64) -> Run<()> {
        if block == warp.block {
            return Ok(());
        }
        let range = block * self.warps_per_block..(block + 1) * self.warps_per_block;
        let known = self.clocks.of(warp.id);
        if !warp.met_cluster && known[range].iter().all(|&k| k <= self.began) {
            let message = "another block's shared memory is used before that block is known to have started";
            return Err(Trouble::at(FaultKind::SharedRace, lane, address, message));
        }
        if self.shared[block].ended {
            let message = "another block's shared memory is used after that block has ended";
            return Err(Trouble::at(FaultKind::UseAfterFree, lane, address, message));
        }
        Ok(())
    }

    /// Lanes by the block whose shared memory they access, with addresses inside of it.
    pub(super) fn by_block(
        &mut self,
        warp: &Warp,
        at: &[u64; WARP],
        m: u32,
    ) -> Run<Vec<(usize, u32, [u64; WARP])>> {
        let mut out: Vec<(usize, u32, [u64; WARP])> = Vec::new();
        for lane in super::access::lanes(m) {
            let (block, inside) = self.place_of(warp, Space::Cluster, at[lane], lane)?;
            let i = out.iter().position(|o| o.0 == block).unwrap_or_else(|| {
                out.push((block, 0, [0; WARP]));
                out.len() - 1
            });
            out[i].1 |= 1 << lane;
            out[i].2[lane] = inside as u64;
        }
        Ok(out)
    }

    /// All warps of a block have ended: nobody may need its memory any more.
    pub(super) fn end_block(&mut self, block: usize) -> Run<()> {
        let warps = block * self.warps_per_block..(block + 1) * self.warps_per_block;
        self.end_bulks(block)?;
        self.end_products(block)?;
        let shared = &mut self.shared[block];
        shared.ended = true;
        let visits = shared.visitors.iter().enumerate().map(|(visitor, &time)| (visitor, None, time));
        let arrivals = shared.arrivals.iter().map(|(&(visitor, lane), &time)| (visitor, Some(lane), time));
        for (visitor, lane, time) in visits.chain(arrivals) {
            let knows_lane =
                |w| lane.is_some_and(|lane| self.clocks.knows_lane(w, lane_code(visitor, lane), time));
            let seen = warps.clone().any(|w| self.clocks.of(w)[visitor] > time || knows_lane(w));
            if time > 0 && !seen {
                let message = format!(
                    "the block ends, but warp {visitor} of the cluster may still use its shared memory: no barrier orders the two"
                );
                return Err(Trouble::new(FaultKind::UseAfterFree, message));
            }
        }
        Ok(())
    }

    pub(super) fn map_address(
        &mut self,
        warp: &mut Warp,
        d: Reg,
        a: Reg,
        rank: u16,
        generic: bool,
        m: u32,
    ) -> Run<()> {
        for lane in super::access::lanes(m) {
            let address = read(warp, a, lane);
            let rank = warp.regs.r32[rank as usize][lane];
            if rank as usize >= self.blocks.len() {
                let message = format!("rank {rank} in a cluster of {} blocks", self.blocks.len());
                return Err(Trouble::at(FaultKind::Operand, lane, address, message));
            }
            if generic && address & WINDOW_MASK != SHARED_WINDOW {
                let message = "the address is not one of shared memory";
                return Err(Trouble::at(FaultKind::Operand, lane, address, message));
            }
            let inside = address & ((1 << RANK_SHIFT) - 1);
            let window = if generic { SHARED_WINDOW } else { 0 };
            write(warp, d, lane, window | (rank as u64 + 1) << RANK_SHIFT | inside);
        }
        Ok(())
    }

    pub(super) fn rank_of(&mut self, warp: &mut Warp, d: u16, a: Reg, generic: bool, m: u32) -> Run<()> {
        let space = if generic { Space::Generic } else { Space::Cluster };
        for lane in super::access::lanes(m) {
            let address = read(warp, a, lane);
            let inside = address & !WINDOW_MASK;
            if space == Space::Generic && address & WINDOW_MASK != SHARED_WINDOW {
                let message = "the address is not one of shared memory";
                return Err(Trouble::at(FaultKind::Operand, lane, address, message));
            }
            let rank = inside >> RANK_SHIFT;
            let rank = if rank == 0 { warp.block as u64 } else { rank - 1 };
            warp.regs.r32[d as usize][lane] = rank as u32;
        }
        Ok(())
    }

    pub(super) fn fence(&mut self, warp: &Warp, fence: Fence, m: u32) {
        if m == 0 {
            return;
        }
        match fence {
            Fence::Memory => self.clocks.fence(warp.id, m, warp.live),
            Fence::Async => {
                self.clocks.fence_proxy(warp.id);
                self.hand_over_barriers(warp, true);
            }
            Fence::BarrierInit => {
                self.init_fences[warp.id] = self.clocks.tick();
                self.hand_over_barriers(warp, false);
            }
            Fence::Other => {}
        }
    }

    /// `setmaxnreg`: the registers that warps give back are there for others of the block.
    pub(super) fn set_registers(
        &mut self,
        warp: &mut Warp,
        at: usize,
        n: u32,
        more: bool,
        m: u32,
    ) -> Run<Flow> {
        self.whole_warp(warp, m)?;
        let refuse = |message: String| Err(Trouble::new(FaultKind::Operand, message));
        let now = warp.registers;
        if now == 0 {
            return refuse("the kernel must say how many registers it starts with (.maxnreg, or .maxntid with .minnctapersm)".into());
        }
        if more && n < now || !more && n > now {
            return refuse(format!("{n} registers asked for, the warp has {now}"));
        }
        if !more {
            warp.registers = n;
            return Ok(Flow::Next);
        }
        warp.splits[at].pc += 1;
        warp.splits[at].wait = Wait::Registers(n);
        Ok(Flow::Again)
    }

    fn grant(&mut self, w: usize, n: u32) -> bool {
        let block = self.warps[w].block;
        let warps = block * self.warps_per_block..(block + 1) * self.warps_per_block;
        // A warp that ended keeps its own until the block ends.
        let used: u32 = warps.filter(|&o| o != w).map(|o| self.warps[o].registers).sum();
        let fits = (used + n) * WARP as u32 <= self.register_pool;
        if fits {
            self.warps[w].registers = n;
        }
        fits
    }
}

/// Value of a register in a lane.
pub(super) fn read(warp: &Warp, reg: Reg, lane: usize) -> u64 {
    match reg.file {
        File::R32 => warp.regs.r32[reg.row as usize][lane] as u64,
        _ => warp.regs.r64[reg.row as usize][lane],
    }
}

pub(super) fn write(warp: &mut Warp, reg: Reg, lane: usize, value: u64) {
    match reg.file {
        File::Pred => {
            let row = &mut warp.regs.pred[reg.row as usize];
            *row = *row & !(1 << lane) | ((value != 0) as u32) << lane;
        }
        File::R32 => warp.regs.r32[reg.row as usize][lane] = value as u32,
        File::R64 => warp.regs.r64[reg.row as usize][lane] = value,
    }
}
