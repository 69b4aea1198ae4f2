//! The scheduler: which warp runs, and the loop that executes its instructions.

use super::access::Global;
use super::barrier::Barrier;
use super::bulk::Work;
use super::clocks::Clocks;
use super::cluster::ClusterBarrier;
use super::mbarrier::Mbarrier;
use super::shared::Shared;
use super::stats::Stats;
use super::warp::{Split, Wait, Warp};
use super::wgmma::Step;
use crate::fault::{FaultKind, Run, Trouble};
use crate::gpu::{Launch, Spec};
use crate::memory::Memory;
use crate::ops::lanes::WARP;
use crate::program::{Const, Entry, FLIGHT, File, JOIN, LaneMask, Op, Reg, Special, TRACK};
use std::collections::HashMap;

/// What all workers of a launch share.
pub(crate) struct Job<'a> {
    pub entry: &'a Entry,
    pub memory: &'a Memory,
    pub spec: &'a Spec,
    pub launch: &'a Launch,
    pub params: &'a [u8],
    /// Addresses of the module's variables.
    pub globals: &'a [u64],
    pub number: u32,
    /// May have started before the grid before it ended.
    pub overlap: bool,
}

/// Two blocks wrote the same bytes.
#[derive(Clone, Debug)]
pub(crate) struct GlobalRace {
    pub address: u64,
    pub blocks: (u32, u32),
    pub pc: usize,
    pub lane: usize,
    pub warp: usize,
    /// Block that noticed.
    pub block: u32,
}

/// Where a trouble happened.
pub(crate) struct Place {
    pub trouble: Box<Trouble>,
    pub pc: Option<usize>,
    pub block: u32,
    pub warp: usize,
    pub mask: u32,
}

/// Executes clusters, one after the other.
pub(crate) struct Machine<'a> {
    pub job: &'a Job<'a>,
    pub global: Global<'a>,
    pub stats: Stats,
    pub races: Vec<GlobalRace>,
    pub(super) shared: Vec<Shared>,
    pub(super) barriers: Vec<[Barrier; 16]>,
    pub(super) clocks: Clocks,
    pub(super) warps: Vec<Warp>,
    /// Index of the cluster's first block in the grid, by rank.
    pub(super) blocks: Vec<[u32; 3]>,
    pub(super) warps_per_block: usize,
    /// The instruction that runs, for faults.
    pub(super) pc: usize,
    pub(super) cluster: ClusterBarrier,
    /// By block: mbarriers by their address.
    pub(super) mbarriers: Vec<HashMap<usize, Mbarrier>>,
    /// Asynchronous work under way, oldest first; so much of it are stores.
    pub(super) work: Vec<Work>,
    pub(super) stores: usize,
    /// By warpgroup: the products that its warps execute.
    pub(super) steps: Vec<Vec<Step>>,
    /// By warp: time of its last fence of mbarrier initialisations; and what each warp knows of these.
    pub(super) init_fences: Vec<u32>,
    pub(super) known_inits: Vec<u32>,
    /// When the cluster began.
    pub(super) began: u32,
    /// 32-bit registers for the warps of a block, where the kernel says what it starts with.
    pub(super) register_pool: u32,
    /// The running warp has nothing to do for now.
    pub(super) yields: bool,
    /// Some warp let the next grid start, or ended, before it knew that the grid before had ended.
    pub early: bool,
}

/// Instructions that a warp executes before others get their turn.
const TURN: u32 = 20_000;
/// Rounds in which warps only ask whether something has happened, until that is taken for a deadlock.
const POLLS: u32 = 10_000;

/// What becomes of the split that ran an instruction.
pub(super) enum Flow {
    Next,
    Jump(u32),
    /// The split changed or is gone: look again.
    Again,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(job: &'a Job<'a>) -> Machine<'a> {
        let kernel = &job.entry.kernel;
        let [x, y, z] = job.launch.block;
        let threads = (x * y * z) as usize;
        let per_cluster = job.launch.cluster.iter().product::<u32>() as usize;
        let warps_per_block = threads.div_ceil(WARP);
        let mut machine = Machine {
            job,
            global: Global {
                memory: job.memory,
                launch: job.number,
                many: job.launch.grid.iter().map(|&n| n as u64).product::<u64>() > 1,
            },
            stats: Stats::new(kernel.code.len()),
            races: Vec::new(),
            shared: (0..per_cluster).map(|_| Shared::default()).collect(),
            barriers: (0..per_cluster).map(|_| Default::default()).collect(),
            clocks: Clocks::new(),
            warps: (0..per_cluster * warps_per_block).map(|_| Warp::default()).collect(),
            blocks: vec![[0; 3]; per_cluster],
            warps_per_block,
            pc: 0,
            cluster: ClusterBarrier::default(),
            mbarriers: (0..per_cluster).map(|_| HashMap::new()).collect(),
            work: Vec::new(),
            stores: 0,
            steps: Vec::new(),
            init_fences: Vec::new(),
            known_inits: Vec::new(),
            began: 0,
            register_pool: job.spec.registers / job.entry.min_blocks.unwrap_or(1).max(1),
            yields: false,
            early: false,
        };
        machine.prepare();
        machine
    }

    /// Rows that are the same for all blocks.
    fn prepare(&mut self) {
        let kernel = &self.job.entry.kernel;
        let per_block = self.warps_per_block;
        for (id, warp) in self.warps.iter_mut().enumerate() {
            warp.id = id;
            warp.block = id / per_block;
            warp.index = id % per_block;
            warp.regs.r32 = vec![[0; WARP]; kernel.rows32];
            warp.regs.r64 = vec![[0; WARP]; kernel.rows64];
            warp.regs.pred = vec![0; kernel.preds];
            for &(reg, value) in &kernel.consts {
                let value = match value {
                    Const::Value(v) => v,
                    Const::Global(i, offset) => self.job.globals[i].wrapping_add(offset),
                    Const::Dynamic(offset) => (kernel.dynamic_base as u64).wrapping_add(offset),
                };
                fill(warp, reg, |_| value);
            }
        }
    }

    /// Starts the blocks of a cluster.
    fn begin(&mut self, first: [u32; 3]) {
        let kernel = &self.job.entry.kernel;
        let launch = self.job.launch;
        let [cx, cy, _] = launch.cluster;
        let per_cluster = self.blocks.len();
        for (rank, block) in self.blocks.iter_mut().enumerate() {
            let r = rank as u32;
            *block = [first[0] + r % cx, first[1] + r / cx % cy, first[2] + r / (cx * cy)];
        }
        let dynamic = launch.dynamic_shared as usize;
        let mut valid: Vec<(usize, usize)> = kernel.shared.iter().map(|s| (s.1, s.2)).collect();
        valid.push((kernel.dynamic_base, dynamic));
        let len = valid.iter().map(|v| v.0 + v.1).max().unwrap_or(0);
        let warps = self.warps.len();
        let (asynchronous, depended) = (kernel.asynchronous, !self.job.overlap);
        if !self.clocks.restart(warps, per_cluster, asynchronous, depended) {
            self.shared.iter_mut().for_each(Shared::forget);
            self.clocks.reset();
            self.clocks.restart(warps, per_cluster, asynchronous, depended);
        }
        self.began = self.clocks.now();
        self.cluster = ClusterBarrier::default();
        self.mbarriers.iter_mut().for_each(HashMap::clear);
        self.steps.iter_mut().for_each(Vec::clear);
        self.init_fences.clear();
        self.init_fences.resize(warps, 0);
        self.known_inits.clear();
        self.known_inits.resize(warps * warps, 0);
        let registers = starting_registers(self.job, self.warps_per_block);
        for shared in &mut self.shared {
            shared.restart(len, warps, &valid);
        }
        for barriers in &mut self.barriers {
            *barriers = Default::default();
        }
        let threads = launch.block.iter().product::<u32>() as usize;
        let (blocks, per_block) = (&self.blocks, self.warps_per_block);
        for warp in &mut self.warps {
            let lanes = (threads - warp.index * WARP).min(WARP) as u32;
            warp.restart(kernel, u32::MAX >> (32 - lanes));
            warp.registers = registers;
            let block = blocks[warp.block];
            let context = (warp.index, warp.block, per_block);
            for &(reg, special) in &kernel.specials {
                let value = |lane: usize| special_value(special, lane, context, block, self.job, per_cluster);
                if reg.file == File::Pred {
                    warp.regs.pred[reg.row as usize] = if value(0) != 0 { !0 } else { 0 };
                } else {
                    fill(warp, reg, |lane| value(lane) as u64);
                }
            }
            warp.regs.pred[0] = !0;
            if !kernel.suspects.is_empty() {
                warp.init.clear();
                warp.init.resize(kernel.preds + kernel.rows32 + kernel.rows64, !0);
                kernel.suspects.iter().for_each(|&i| warp.init[i] = 0);
            }
        }
        self.stats.blocks += per_cluster as u64;
    }

    /// Runs the cluster whose first block has this index.
    pub(crate) fn run_cluster(&mut self, first: [u32; 3]) -> Result<(), Place> {
        self.begin(first);
        let mut idle_rounds = 0;
        loop {
            let (mut running, mut progress, mut polls) = (false, false, false);
            for w in 0..self.warps.len() {
                if self.warps[w].done() {
                    continue;
                }
                running = true;
                self.poll(w);
                progress |= self.turn(w)?;
                polls |= std::mem::take(&mut self.yields);
            }
            if !running {
                return Ok(());
            }
            idle_rounds = if progress { 0 } else { idle_rounds + 1 };
            if idle_rounds > 0 && !self.advance()? && !(polls && idle_rounds < POLLS) {
                return Err(self.deadlock());
            }
        }
    }

    /// Completes asynchronous work that somebody waits for; false if there is none.
    fn advance(&mut self) -> Result<bool, Place> {
        self.complete_work().map_err(|trouble| self.place(trouble, 0, 0))
    }

    fn place(&self, trouble: Box<Trouble>, w: usize, mask: u32) -> Place {
        let block = self.block_number(w / self.warps_per_block);
        Place { trouble, pc: Some(self.pc), block, warp: w % self.warps_per_block, mask }
    }

    /// Index of a block of the cluster in the whole grid.
    pub(super) fn block_number(&self, rank: usize) -> u32 {
        let [x, y, z] = self.blocks[rank];
        let [gx, gy, _] = self.job.launch.grid;
        x + gx * (y + gy * z)
    }

    fn deadlock(&self) -> Place {
        let mut lines = Vec::new();
        for warp in &self.warps {
            for split in &warp.splits {
                let info = &self.job.entry.kernel.info[split.pc as usize];
                let info = match split.wait {
                    // A split at a barrier has already stepped over it.
                    Wait::Barrier(_) | Wait::Cluster(..) | Wait::Registers(_) => {
                        &self.job.entry.kernel.info[split.pc as usize - 1]
                    }
                    _ => info,
                };
                let what = match split.wait {
                    Wait::Ready => "is ready".to_string(),
                    Wait::Lanes => "waits for other lanes of the warp".to_string(),
                    Wait::Barrier(id) => {
                        format!("waits at barrier {id}{}", self.barrier_state(warp.block, id))
                    }
                    Wait::Cluster(..) => "waits at the barrier of the cluster".to_string(),
                    Wait::Mbarrier { block, at, .. } => {
                        format!("waits for the mbarrier at {at:#x}{}", self.mbarrier_state(block, at))
                    }
                    Wait::Registers(n) => format!("waits for {n} registers per thread"),
                };
                let source = info.loc.map_or(String::new(), |l| format!(", source line {}", l.line));
                lines.push(format!(
                    "block {:?} warp {} lanes {:#010x} {what} (PTX line {}{source}: {})",
                    self.blocks[warp.block], warp.index, split.mask, info.line, info.text
                ));
            }
        }
        let shown = lines.len().min(20);
        let mut message = format!("no warp can go on:\n    {}", lines[..shown].join("\n    "));
        if lines.len() > shown {
            message += &format!("\n    and {} more", lines.len() - shown);
        }
        let w = self.warps.iter().position(|w| !w.done()).unwrap_or(0);
        let mut place = self.place(Trouble::new(FaultKind::Deadlock, message), w, 0);
        place.pc = self.warps[w].splits.first().map(|s| match s.wait {
            Wait::Barrier(_) | Wait::Cluster(..) | Wait::Registers(_) => s.pc as usize - 1,
            _ => s.pc as usize,
        });
        place
    }

    /// Lets a warp run until it waits, ends, or its turn is over; whether it did anything.
    fn turn(&mut self, w: usize) -> Result<bool, Place> {
        let mut warp = std::mem::take(&mut self.warps[w]);
        let mut budget = TURN;
        let mut progress = false;
        let result = loop {
            let ready = warp.splits.iter().position(|s| s.wait == Wait::Ready);
            let step = match ready {
                _ if budget == 0 => break Ok(()),
                Some(at) => self.run_split(&mut warp, at, &mut budget),
                None => match self.join_waiting(&mut warp) {
                    Ok(true) => Ok(()),
                    Ok(false) => break Ok(()),
                    Err(e) => Err(e),
                },
            };
            if let Err(trouble) = step {
                let mask = warp.splits.first().map_or(0, |s| s.mask);
                break Err((trouble, mask));
            }
            if self.yields {
                break Ok(());
            }
            progress = true;
        };
        let steps = warp.steps;
        let ended = warp.done();
        let block = warp.block;
        self.warps[w] = warp;
        if steps > self.job.spec.max_warp_instructions {
            let message =
                format!("a warp executed more than {} instructions", self.job.spec.max_warp_instructions);
            return Err(self.place(Trouble::new(FaultKind::Timeout, message), w, 0));
        }
        if ended {
            self.barriers_after_exit(block);
            let of_block = &self.warps[block * self.warps_per_block..(block + 1) * self.warps_per_block];
            if result.is_ok()
                && of_block.iter().all(Warp::done)
                && let Err(trouble) = self.end_block(block)
            {
                return Err(self.place(trouble, w, 0));
            }
        }
        match result {
            Ok(()) => Ok(progress || ended),
            Err((trouble, mask)) => Err(self.place(trouble, w, mask)),
        }
    }

    /// Runs one split until it stops being the same split.
    fn run_split(&mut self, warp: &mut Warp, at: usize, budget: &mut u32) -> Run<()> {
        let job = self.job;
        let kernel = &job.entry.kernel;
        let (code, Split { mut pc, mask, .. }) = (&kernel.code[..], warp.splits[at]);
        loop {
            let inst = &code[pc as usize];
            self.pc = pc as usize;
            if inst.flags & JOIN != 0 && warp.meets(at, pc) {
                warp.arrive(at);
                return Ok(());
            }
            let m = mask & (warp.regs.pred[inst.guard as usize] ^ inst.negate);
            let issued = &mut self.stats.issued[pc as usize];
            issued.warps += 1;
            issued.threads += m.count_ones() as u64;
            *budget = budget.saturating_sub(1);
            warp.steps += 1;
            if inst.flags & TRACK != 0 {
                warp.splits[at].pc = pc;
                super::track::track(kernel, warp, inst, &kernel.info[pc as usize], m, mask)?;
            }
            if inst.flags & FLIGHT != 0 {
                self.touch_product(warp, &kernel.info[pc as usize], m)?;
            }
            let flow = match &inst.op {
                Op::Alu(f, args) => {
                    if m != 0 {
                        // SAFETY: functions that need CPU features were only chosen where the CPU has them.
                        unsafe { f(&mut warp.regs, args, m) };
                    }
                    Flow::Next
                }
                Op::Branch { target, .. } => {
                    if m == mask {
                        Flow::Jump(*target)
                    } else if m == 0 {
                        Flow::Next
                    } else {
                        warp.diverge(at, m, *target, pc + 1, kernel.reconverge[pc as usize]);
                        return Ok(());
                    }
                }
                _ => {
                    warp.splits[at].pc = pc;
                    self.execute(warp, at, inst, m)?
                }
            };
            match flow {
                Flow::Next => pc += 1,
                Flow::Jump(to) => pc = to,
                Flow::Again => return Ok(()),
            }
            if *budget == 0 {
                warp.splits[at].pc = pc;
                return Ok(());
            }
        }
    }
}

/// Registers per thread of a kernel that uses `setmaxnreg`: what it declares, or all that its blocks leave; 0 if unknown.
fn starting_registers(job: &Job, warps: usize) -> u32 {
    let entry = job.entry;
    if let Some(n) = entry.max_registers {
        return n;
    }
    if entry.max_threads.is_none() && entry.required_threads.is_none() {
        return 0;
    }
    let Some(blocks) = entry.min_blocks.filter(|&n| n > 0) else { return 0 };
    (job.spec.registers / blocks / (warps * WARP) as u32 / 8 * 8).min(255)
}

/// Sets every lane of a row.
fn fill(warp: &mut Warp, reg: Reg, f: impl Fn(usize) -> u64) {
    match reg.file {
        File::R32 => warp.regs.r32[reg.row as usize] = std::array::from_fn(|lane| f(lane) as u32),
        File::R64 => warp.regs.r64[reg.row as usize] = std::array::from_fn(f),
        File::Pred => {}
    }
}

/// `(index, rank, per_block)`: warp in its block, block in its cluster, warps of a block.
fn special_value(
    special: Special,
    lane: usize,
    (index, rank, per_block): (usize, usize, usize),
    block: [u32; 3],
    job: &Job,
    per_cluster: usize,
) -> u32 {
    let launch = job.launch;
    let thread = (index * WARP + lane) as u32;
    let [bx, by, _] = launch.block;
    let [cx, cy, _] = launch.cluster;
    let in_cluster = |axis: u8, r: u32| match axis {
        0 => r % cx,
        1 => r / cx % cy,
        _ => r / (cx * cy),
    };
    let total = job.entry.static_shared as u32 + launch.dynamic_shared;
    match special {
        Special::Tid(0) => thread % bx,
        Special::Tid(1) => thread / bx % by,
        Special::Tid(_) => thread / (bx * by),
        Special::Ntid(i) => launch.block[i as usize],
        Special::Ctaid(i) => block[i as usize],
        Special::Nctaid(i) => launch.grid[i as usize],
        Special::LaneId => lane as u32,
        Special::WarpId => index as u32,
        Special::WarpCount => per_block as u32,
        Special::SmId => (block[0] + block[1] + block[2]) % job.spec.sm_count.max(1),
        Special::SmCount => job.spec.sm_count,
        Special::GridId => job.number,
        Special::LaneMask(which) => {
            let bit = 1u32 << lane;
            match which {
                LaneMask::Eq => bit,
                LaneMask::Lt => bit - 1,
                LaneMask::Le => bit | (bit - 1),
                LaneMask::Gt => !(bit | (bit - 1)),
                LaneMask::Ge => !(bit - 1),
            }
        }
        Special::ClusterId(i) => block[i as usize] / launch.cluster[i as usize],
        Special::ClusterCount(i) => launch.grid[i as usize] / launch.cluster[i as usize],
        Special::ClusterCtaid(i) => in_cluster(i, rank as u32),
        Special::ClusterNctaid(i) => launch.cluster[i as usize],
        Special::ClusterCtarank => rank as u32,
        Special::ClusterNctarank => per_cluster as u32,
        Special::ExplicitCluster => (per_cluster > 1) as u32,
        Special::DynamicShared => launch.dynamic_shared,
        Special::TotalShared | Special::AggregateShared => total,
        Special::EnvReg => 0,
    }
}
