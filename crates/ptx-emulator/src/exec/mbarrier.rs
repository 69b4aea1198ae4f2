//! Barriers in shared memory that count arrivals and bytes: `mbarrier`.

use super::access::{addresses, check_aligned, lanes};
use super::bulk::Work;
use super::clocks::{Released, lane_code};
use super::cluster::{read, write};
use super::machine::{Flow, Machine};
use super::shared::{Who, state};
use super::warp::{Wait, Warp};
use crate::fault::{FaultKind, Run, Trouble};
use crate::program::{MbarrierMode, MbarrierOp};

/// Counts of arrivals and of bytes are below this.
const LIMIT: i64 = 1 << 20;

pub(super) struct Mbarrier {
    /// Arrivals of a phase.
    expected: u32,
    pending: u32,
    /// Bytes that are still to come.
    bytes: i64,
    phase: u32,
    /// Published by the arrivals of this phase, and of the one before.
    gathering: Released,
    done: Released,
    /// Who initialised it, and when.
    init: (Who, u32),
    /// A fence has made the initialisation known to asynchronous work.
    handed: bool,
}

impl Mbarrier {
    /// Ends the phase if everything has come.
    fn settle(&mut self) {
        if self.pending == 0 && self.bytes == 0 {
            self.phase += 1;
            self.pending = self.expected;
            self.done = std::mem::take(&mut self.gathering);
        }
    }

    fn expect(&mut self, bytes: i64) -> Result<(), String> {
        self.bytes += bytes;
        if self.bytes.abs() < LIMIT {
            return Ok(());
        }
        Err(format!("{} bytes are pending at the mbarrier; its count ends at {}", self.bytes, LIMIT - 1))
    }
}

impl Machine<'_> {
    pub(super) fn mbarrier(&mut self, warp: &mut Warp, at: usize, op: &MbarrierOp, m: u32) -> Run<Flow> {
        if m == 0 {
            return Ok(Flow::Next);
        }
        let address = addresses(warp, op.address);
        check_aligned(&address, m, 8)?;
        if let MbarrierMode::Wait { suspends, parity } = op.mode {
            return self.mbarrier_wait(warp, at, op, &address, suspends, parity, m);
        }
        let releases = op.ordered && matches!(op.mode, MbarrierMode::Arrive { .. });
        let released = if releases {
            Some(self.clocks.release(warp.id, m, warp.live))
        } else {
            self.clocks.release_fence(warp.id).cloned()
        };
        for lane in lanes(m) {
            let (block, place) = if releases {
                self.place_of_arrival(warp, op.space, address[lane], lane)?
            } else {
                self.place_of(warp, op.space, address[lane], lane)?
            };
            let value = op.a.map(|reg| read(warp, reg, lane) as u32);
            let me = Who { warp: warp.id, lane };
            if op.mode == MbarrierMode::Init {
                self.init_mbarrier(block, place, value.unwrap_or(0), me)?;
                continue;
            }
            if block != warp.block && op.d.is_some() {
                let message = "an arrival at a barrier of another block returns no state";
                return Err(Trouble::at(FaultKind::Operand, lane, address[lane], message));
            }
            let barrier = self.find_mbarrier(warp, block, place, lane)?;
            let refuse = |message: String| Err(Trouble::at(FaultKind::Operand, lane, address[lane], message));
            match op.mode {
                MbarrierMode::Arrive { expect, drop, no_complete } => {
                    let count = if expect { 1 } else { value.unwrap_or(1) };
                    if expect && let Err(message) = barrier.expect(value.unwrap_or(0) as i64) {
                        return refuse(message);
                    }
                    if count > barrier.pending || count == 0 {
                        let pending = barrier.pending;
                        return refuse(format!(
                            "{count} arrivals at an mbarrier that waits for {pending} more"
                        ));
                    }
                    if no_complete && count == barrier.pending {
                        return refuse("the arrival would complete the phase".into());
                    }
                    let token = barrier.phase;
                    barrier.pending -= count;
                    barrier.expected -= if drop { count } else { 0 };
                    if let Some(released) = &released {
                        barrier.gathering.join(released);
                    }
                    barrier.settle();
                    if let Some(d) = op.d {
                        write(warp, d, lane, token as u64);
                    }
                }
                MbarrierMode::ExpectTx | MbarrierMode::CompleteTx => {
                    let bytes = value.unwrap_or(0) as i64;
                    let sign = if op.mode == MbarrierMode::ExpectTx { 1 } else { -1 };
                    if let Err(message) = barrier.expect(sign * bytes) {
                        return refuse(message);
                    }
                    if sign < 0 {
                        barrier.settle();
                    }
                }
                MbarrierMode::Inval => {
                    self.mbarriers[block].remove(&place);
                    self.shared[block].set_state(place, 8, state::UNWRITTEN);
                    let pending = self.work.iter().any(|w| w.barrier() == Some((block, place)));
                    if pending {
                        return refuse(
                            "the mbarrier ends while asynchronous work will still arrive at it".into(),
                        );
                    }
                }
                MbarrierMode::CopiesArrive(noinc) => {
                    if !noinc {
                        barrier.pending += 1;
                    }
                    let of_lane = |c: &super::warp::Copy| c.lane as usize == lane;
                    let copies = warp.copies.extract_if(.., |c| of_lane(c)).collect();
                    let pc = self.pc;
                    self.work.push(Work::Copies { warp: warp.id, pc, copies, barrier: (block, place) });
                }
                MbarrierMode::Init | MbarrierMode::Wait { .. } => {}
            }
        }
        Ok(Flow::Next)
    }

    fn init_mbarrier(&mut self, block: usize, at: usize, count: u32, me: Who) -> Run<()> {
        let refuse = |message: String| Err(Trouble::at(FaultKind::Operand, me.lane, at as u64, message));
        if count == 0 || count as i64 >= LIMIT {
            return refuse(format!("an mbarrier for {count} arrivals; 1 to {} are possible", LIMIT - 1));
        }
        if self.mbarriers[block].contains_key(&at) {
            return refuse("an mbarrier is initialised where there is one already".into());
        }
        let shared = &mut self.shared[block];
        shared.note_write::<8>(&self.clocks, at, false, me)?;
        shared.set_state(at, 8, state::BARRIER);
        let barrier = Mbarrier {
            expected: count,
            pending: count,
            bytes: 0,
            phase: 0,
            gathering: Released::default(),
            done: Released::default(),
            init: (me, self.clocks.now()),
            handed: false,
        };
        self.mbarriers[block].insert(at, barrier);
        Ok(())
    }

    /// The barrier at an address, which the thread must know to be initialised.
    fn find_mbarrier(&mut self, warp: &Warp, block: usize, at: usize, lane: usize) -> Run<&mut Mbarrier> {
        let known = self.clocks.of(warp.id);
        let inits = &self.known_inits[warp.id * self.clocks.warps()..];
        let Some(barrier) = self.mbarriers[block].get_mut(&at) else {
            let message = "there is no mbarrier at this address";
            return Err(Trouble::at(FaultKind::Operand, lane, at as u64, message));
        };
        let (who, time) = barrier.init;
        let same = who == (Who { warp: warp.id, lane });
        let told = known[who.warp] > time || inits[who.warp] > time;
        if !same && !told && !self.clocks.knows_lane(warp.id, lane_code(who.warp, who.lane), time) {
            let message = format!(
                "the mbarrier is used before its initialisation by warp {} of the cluster is known to be done",
                who.warp
            );
            return Err(Trouble::at(FaultKind::SharedRace, lane, at as u64, message));
        }
        Ok(barrier)
    }

    #[allow(clippy::too_many_arguments)]
    fn mbarrier_wait(
        &mut self,
        warp: &mut Warp,
        at: usize,
        op: &MbarrierOp,
        address: &[u64; 32],
        suspends: bool,
        parity: bool,
        m: u32,
    ) -> Run<Flow> {
        let (mut done, mut missing) = (0, None);
        for lane in lanes(m) {
            let (block, place) = self.place_of(warp, op.space, address[lane], lane)?;
            if block != warp.block {
                let message = "only barriers of the own block can be waited for";
                return Err(Trouble::at(FaultKind::Operand, lane, address[lane], message));
            }
            let value = op.a.map_or(0, |reg| read(warp, reg, lane));
            let barrier = self.find_mbarrier(warp, block, place, lane)?;
            let phase = barrier.phase;
            let ended = if parity {
                phase as u64 & 1 != value & 1
            } else if value == phase as u64 {
                false
            } else if value + 1 == phase as u64 {
                true
            } else {
                let message = format!("a state of phase {value}, when the mbarrier is in phase {phase}");
                return Err(Trouble::at(FaultKind::Operand, lane, address[lane], message));
            };
            if ended {
                done |= 1u32 << lane;
                if op.ordered {
                    let released = std::mem::take(&mut barrier.done);
                    self.clocks.acquire(warp.id, &released);
                    if let Some(barrier) = self.mbarriers[block].get_mut(&place) {
                        barrier.done = released;
                    }
                }
            } else if missing.is_none() {
                missing = Some((block, place, phase));
            }
        }
        if let Some(what @ (block, place, phase)) = missing {
            // The first wait says no, as it may: the program must ask again. The next one suspends the thread.
            if suspends && warp.denied == Some(what) {
                warp.splits[at].wait = Wait::Mbarrier { block, at: place, phase };
                return Ok(Flow::Again);
            }
            warp.denied = Some(what);
            self.yields = true;
        }
        if let Some(d) = op.d {
            let row = &mut warp.regs.pred[d.row as usize];
            *row = *row & !m | done;
        }
        warp.splits[at].pc += 1;
        Ok(Flow::Again)
    }

    pub(super) fn phase_ended(&self, block: usize, at: usize, phase: u32) -> bool {
        self.mbarriers[block].get(&at).is_none_or(|b| b.phase != phase)
    }

    /// A proxy fence, or a fence of initialisations: asynchronous work may use the barriers that the warp knows of, or
    /// those that it initialised.
    pub(super) fn hand_over_barriers(&mut self, warp: &Warp, all: bool) {
        let known = self.clocks.of(warp.id);
        for barrier in self.mbarriers.iter_mut().flat_map(|b| b.values_mut()) {
            let (who, time) = barrier.init;
            barrier.handed |= who.warp == warp.id || all && known[who.warp] > time;
        }
    }

    /// Checks that asynchronous work of a thread may count its bytes at a barrier.
    pub(super) fn check_counter(&mut self, warp: &Warp, block: usize, at: usize, lane: usize) -> Run<()> {
        if self.find_mbarrier(warp, block, at, lane)?.handed {
            return Ok(());
        }
        let message = "asynchronous work is to arrive at an mbarrier whose initialisation was not handed over: \
                       fence.mbarrier_init or fence.proxy.async is missing";
        Err(Trouble::at(FaultKind::MissingFence, lane, at as u64, message))
    }

    /// Asynchronous work is done: bytes, or an arrival, are counted.
    pub(super) fn count_down(
        &mut self,
        (block, at): (usize, usize),
        bytes: i64,
        arrivals: u32,
        released: &Released,
    ) -> Run<()> {
        let Some(barrier) = self.mbarriers[block].get_mut(&at) else {
            let message = "asynchronous work arrives at an mbarrier that is no more";
            return Err(Trouble::new(FaultKind::Operand, message));
        };
        barrier.gathering.join(released);
        if barrier.pending < arrivals {
            let message = "more arrivals of copies at an mbarrier than it waits for";
            return Err(Trouble::new(FaultKind::Operand, message));
        }
        barrier.pending -= arrivals;
        barrier.expect(-bytes).map_err(|message| Trouble::new(FaultKind::Operand, message))?;
        barrier.settle();
        Ok(())
    }

    /// For the report of a deadlock.
    pub(super) fn mbarrier_state(&self, block: usize, at: usize) -> String {
        match self.mbarriers[block].get(&at) {
            Some(b) => format!(
                ", in phase {}, which {} arrivals and {} bytes are missing to end",
                b.phase, b.pending, b.bytes
            ),
            None => ", which is no more".into(),
        }
    }
}
