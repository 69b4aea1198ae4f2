//! Instructions beyond arithmetic: what the warp does together, and the dispatch to the rest.

use super::access::{addresses, lanes};
use super::machine::{Flow, Machine};
use super::shared::{Who, conflicts};
use super::warp::{Wait, Warp};
use crate::fault::{FaultKind, Run, Trouble};
use crate::ops::lanes::{Row, WARP};
use crate::program::{File, Inst, MatrixMove, Op, Reduce, Reg, Shfl, ShflMode, VoteMode};

impl Machine<'_> {
    /// Everything but arithmetic and branches.
    pub(super) fn execute(&mut self, warp: &mut Warp, at: usize, inst: &Inst, m: u32) -> Run<Flow> {
        match &inst.op {
            Op::Alu(..) | Op::Branch { .. } | Op::Nop => {}
            Op::GridControl(wait) => self.grid_control(warp, *wait, m),
            Op::Cluster { mode, aligned } => {
                if *aligned && Self::wait_for_leavers(warp, at, m) {
                    return Ok(Flow::Again);
                }
                return self.cluster_barrier(warp, at, *mode, *aligned, m);
            }
            Op::MapAddress { d, a, rank, generic } => self.map_address(warp, *d, *a, *rank, *generic, m)?,
            Op::RankOf { d, a, generic } => self.rank_of(warp, *d, *a, *generic, m)?,
            Op::Fence(fence) => self.fence(warp, *fence, m),
            Op::Mbarrier(op) => return self.mbarrier(warp, at, op, m),
            Op::Bulk(op) => self.bulk(warp, op, m)?,
            Op::BulkCommit => lanes(m).for_each(|l| warp.bulk_groups[l] += 1),
            Op::BulkWait { pending, read } => self.wait_bulks(warp, *pending, *read, m)?,
            Op::SetMaxRegisters(n, more) => return self.set_registers(warp, at, *n, *more, m),
            Op::Wgmma(op) => self.wgmma(warp, op, m)?,
            Op::WgmmaFence => self.fence_products(warp, m)?,
            Op::WgmmaCommit => {
                self.whole_warp(warp, m)?;
                warp.product_group += 1;
            }
            Op::WgmmaWait(n) => self.wait_products(warp, *n, m)?,
            Op::Load(op) => self.load(warp, op, m)?,
            Op::Store(op) => self.store(warp, op, m)?,
            Op::Atomic(op) => self.atomic(warp, op, m)?,
            Op::Switch { index, targets } => return self.switch(warp, at, *index, targets, m),
            Op::Exit => {
                if m == 0 {
                    return Ok(Flow::Next);
                }
                self.early |= !self.clocks.depended(warp.id);
                if warp.exit(at, m) {
                    return Ok(Flow::Again);
                }
                warp.splits[at].pc += 1;
                return Ok(Flow::Again);
            }
            Op::Trap(what) => {
                if m != 0 {
                    let mut trouble = Trouble::new(FaultKind::Trap, *what);
                    trouble.lane = Some(m.trailing_zeros() as usize);
                    return Err(trouble);
                }
            }
            Op::Clock { d } => {
                let now = warp.steps;
                match d.file {
                    File::R32 => lanes(m).for_each(|l| warp.regs.r32[d.row as usize][l] = now as u32),
                    _ => lanes(m).for_each(|l| warp.regs.r64[d.row as usize][l] = now),
                }
            }
            Op::ActiveMask { d } => lanes(m).for_each(|l| warp.regs.r32[*d as usize][l] = m),
            Op::Shfl(_)
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Redux { .. }
            | Op::Elect { .. }
            | Op::SyncWarp { .. } => {
                if m == 0 {
                    return Ok(Flow::Next);
                }
                if !self.together(warp, inst, m)? {
                    // Lanes switched off by the guard go on alone.
                    let rest = warp.splits[at].mask & !m;
                    if rest != 0 {
                        let frame = warp.splits[at].frame;
                        let pc = warp.splits[at].pc + 1;
                        warp.splits[at].mask = m;
                        warp.splits.push(super::warp::Split { pc, mask: rest, frame, wait: Wait::Ready });
                    }
                    warp.splits[at].wait = Wait::Lanes;
                    return Ok(Flow::Again);
                }
                self.run_together(warp, inst, m)?;
            }
            Op::Bar(bar) => {
                if bar.aligned && Self::wait_for_leavers(warp, at, m) {
                    return Ok(Flow::Again);
                }
                return self.barrier(warp, at, bar, m);
            }
            Op::CpAsync(op) => self.issue_copy(warp, op, m)?,
            Op::CpCommit => lanes(m).for_each(|l| warp.groups[l] += 1),
            Op::CpWait(n) => self.wait_copies(warp, *n, m)?,
            Op::LoadMatrix(op) => self.load_matrix(warp, op, m)?,
            Op::StoreMatrix(op) => self.store_matrix(warp, op, m)?,
            Op::Mma(op) => {
                self.whole_warp(warp, m)?;
                op.run(&mut warp.regs);
                self.stats.matrix_ops += op.ops();
            }
        }
        Ok(Flow::Next)
    }

    fn switch(&mut self, warp: &mut Warp, at: usize, index: Row, targets: &[u32], m: u32) -> Run<Flow> {
        if m == 0 {
            return Ok(Flow::Next);
        }
        let split = warp.splits[at];
        let row = warp.regs.r32[index as usize];
        let target = |lane: usize| targets.get(row[lane] as usize).copied();
        if let Some(lane) = lanes(m).find(|&l| target(l).is_none()) {
            let message = format!("index {} into a table of {} branch targets", row[lane], targets.len());
            return Err(Trouble::at(FaultKind::Operand, lane, row[lane] as u64, message));
        }
        let first = target(m.trailing_zeros() as usize).unwrap_or(0);
        let same = lanes(m).filter(|&l| target(l) == Some(first)).fold(0, |all, l| all | 1 << l);
        if same == split.mask {
            return Ok(Flow::Jump(first));
        }
        // One target leaves; what stays comes back to this instruction, under the same frame.
        let meet = self.job.entry.kernel.reconverge[self.pc];
        warp.diverge(at, same, first, split.pc, meet);
        Ok(Flow::Again)
    }

    /// Whether an instruction for the whole warp must wait, because lanes that are elsewhere may still leave.
    pub(super) fn wait_for_leavers(warp: &mut Warp, at: usize, m: u32) -> bool {
        let wait =
            m != warp.live && m != 0 && warp.splits.iter().filter(|s| s.wait == Wait::Ready).count() > 1;
        if wait {
            warp.splits[at].wait = Wait::Lanes;
        }
        wait
    }

    /// Instructions that all lanes of the warp must execute at once.
    pub(super) fn whole_warp(&self, warp: &Warp, m: u32) -> Run<()> {
        if m == u32::MAX {
            return Ok(());
        }
        let message =
            format!("lanes {m:#010x} execute it without the others ({:#010x} have exited)", !warp.live);
        Err(Trouble::new(FaultKind::Divergence, message))
    }

    fn members_row(op: &Op) -> Option<Row> {
        Some(match op {
            Op::Shfl(s) => s.members,
            Op::Vote { members, .. }
            | Op::Match { members, .. }
            | Op::Redux { members, .. }
            | Op::Elect { members, .. }
            | Op::SyncWarp { members } => *members,
            _ => return None,
        })
    }

    /// Whether all lanes that the members' masks name are among `m`.
    fn together(&self, warp: &Warp, inst: &Inst, m: u32) -> Run<bool> {
        let row = &warp.regs.r32[Self::members_row(&inst.op).unwrap_or_default() as usize];
        let mut wanted = 0;
        for lane in lanes(m) {
            if row[lane] >> lane & 1 == 0 {
                let message = format!("the lane is not in its own member mask {:#010x}", row[lane]);
                let mut trouble = Trouble::new(FaultKind::Operand, message);
                trouble.lane = Some(lane);
                return Err(trouble);
            }
            wanted |= row[lane];
        }
        Ok(wanted & warp.live & !m == 0)
    }

    /// Splits that wait for each other at one instruction (or, for `bar.warp.sync`, at any of them) go on together.
    pub(super) fn join_waiting(&mut self, warp: &mut Warp) -> Run<bool> {
        let job = self.job;
        let code = &job.entry.kernel.code;
        let waiting: Vec<usize> =
            (0..warp.splits.len()).filter(|&i| warp.splits[i].wait == Wait::Lanes).collect();
        for &first in &waiting {
            let pc = warp.splits[first].pc as usize;
            if Self::members_row(&code[pc].op).is_none() {
                // For the whole warp: nobody else can leave any more, so this is its turn.
                warp.splits[first].wait = Wait::Ready;
                return Ok(true);
            }
            let sync = matches!(code[pc].op, Op::SyncWarp { .. });
            let group: Vec<usize> = waiting
                .iter()
                .copied()
                .filter(|&i| {
                    let other = warp.splits[i].pc as usize;
                    other == pc || sync && matches!(code[other].op, Op::SyncWarp { .. })
                })
                .collect();
            let mask = group.iter().fold(0, |all, &i| all | warp.splits[i].mask);
            self.pc = pc;
            if !self.together(warp, &code[pc], mask)? {
                continue;
            }
            self.run_together(warp, &code[pc], mask)?;
            for &i in &group {
                warp.splits[i].pc += 1;
                warp.splits[i].wait = Wait::Ready;
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// The effect of an instruction whose lanes are all here.
    fn run_together(&mut self, warp: &mut Warp, inst: &Inst, m: u32) -> Run<()> {
        match &inst.op {
            Op::Shfl(op) => shuffle(warp, op, m)?,
            Op::Vote { mode, d, a, negate, members } => vote(warp, *mode, *d, (*a, *negate), *members, m),
            Op::Match { all, d, p, a, members } => match_lanes(warp, *all, *d, *p, *a, *members, m),
            Op::Redux { op, d, a, members } => {
                for (group, mask) in groups(warp, *members, m) {
                    let a = &warp.regs.r32[*a as usize];
                    let value = lanes(mask).map(|l| a[l]).reduce(|x, y| reduce(*op, x, y)).unwrap_or(0);
                    debug_assert_ne!(group, 0);
                    lanes(mask).for_each(|l| warp.regs.r32[*d as usize][l] = value);
                }
            }
            Op::Elect { d, p, members } => {
                for (_, mask) in groups(warp, *members, m) {
                    let leader = mask.trailing_zeros();
                    if let Some(d) = d {
                        lanes(mask).for_each(|l| warp.regs.r32[*d as usize][l] = leader);
                    }
                    let row = &mut warp.regs.pred[*p as usize];
                    *row = *row & !mask | 1 << leader;
                }
            }
            Op::SyncWarp { .. } => self.clocks.sync_warp(warp.id),
            _ => {}
        }
        Ok(())
    }

    /// Row addresses of the matrices, checked; lane `8 * i + r` gives row `r` of matrix `i`.
    fn matrix_rows(&mut self, warp: &Warp, op: &MatrixMove, store: bool) -> Run<[u64; WARP]> {
        let at = addresses(warp, op.address);
        let used = u32::MAX >> (32 - 8 * op.regs.len());
        super::access::check_aligned(&at, used, 16)?;
        let words: [u32; WARP] = std::array::from_fn(|i| at[i] as u32);
        let extra = conflicts(&words, used, 16);
        let traffic = if store { &mut self.stats.shared_stores } else { &mut self.stats.shared_loads };
        traffic.requests += op.regs.len() as u64;
        traffic.bytes += 128 * op.regs.len() as u64;
        traffic.conflicts += extra;
        self.stats.conflicts[self.pc] += extra;
        Ok(at)
    }

    fn load_matrix(&mut self, warp: &mut Warp, op: &MatrixMove, m: u32) -> Run<()> {
        self.whole_warp(warp, m)?;
        let at = self.matrix_rows(warp, op, false)?;
        let shared = &mut self.shared[warp.block];
        for (i, &row) in op.regs.iter().enumerate() {
            let mut rows = [[0u8; 16]; 8];
            for (r, bytes) in rows.iter_mut().enumerate() {
                let (lane, offset) = (8 * i + r, at[8 * i + r] as usize);
                shared.note_read::<16>(&self.clocks, offset, !0, Who { warp: warp.id, lane })?;
                *bytes = shared.get(offset);
            }
            let element =
                |r: usize, c: usize| u16::from_le_bytes([rows[r][2 * c], rows[r][2 * c + 1]]) as u32;
            for lane in 0..WARP {
                let (group, t) = (lane / 4, lane % 4);
                warp.regs.r32[row as usize][lane] = if op.transposed {
                    element(2 * t, group) | element(2 * t + 1, group) << 16
                } else {
                    element(group, 2 * t) | element(group, 2 * t + 1) << 16
                };
            }
        }
        Ok(())
    }

    fn store_matrix(&mut self, warp: &mut Warp, op: &MatrixMove, m: u32) -> Run<()> {
        self.whole_warp(warp, m)?;
        let at = self.matrix_rows(warp, op, true)?;
        let shared = &mut self.shared[warp.block];
        for (i, &row) in op.regs.iter().enumerate() {
            let mut rows = [[0u8; 16]; 8];
            for lane in 0..WARP {
                let (group, t) = (lane / 4, lane % 4);
                let word = warp.regs.r32[row as usize][lane];
                for (j, half) in [word as u16, (word >> 16) as u16].into_iter().enumerate() {
                    let (r, c) = if op.transposed { (2 * t + j, group) } else { (group, 2 * t + j) };
                    rows[r][2 * c..2 * c + 2].copy_from_slice(&half.to_le_bytes());
                }
            }
            for (r, bytes) in rows.iter().enumerate() {
                let (lane, offset) = (8 * i + r, at[8 * i + r] as usize);
                shared.note_write::<16>(&self.clocks, offset, false, Who { warp: warp.id, lane })?;
                shared.set(offset, *bytes);
            }
        }
        Ok(())
    }
}

/// The lanes of `m` by their member mask.
fn groups(warp: &Warp, members: Row, m: u32) -> Vec<(u32, u32)> {
    let row = &warp.regs.r32[members as usize];
    let mut out: Vec<(u32, u32)> = Vec::new();
    for lane in lanes(m) {
        match out.iter_mut().find(|g| g.0 == row[lane]) {
            Some(group) => group.1 |= 1 << lane,
            None => out.push((row[lane], 1 << lane)),
        }
    }
    out
}

fn reduce(op: Reduce, a: u32, b: u32) -> u32 {
    match op {
        Reduce::Add => a.wrapping_add(b),
        Reduce::MinU => a.min(b),
        Reduce::MaxU => a.max(b),
        Reduce::MinS => (a as i32).min(b as i32) as u32,
        Reduce::MaxS => (a as i32).max(b as i32) as u32,
        Reduce::And => a & b,
        Reduce::Or => a | b,
        Reduce::Xor => a ^ b,
    }
}

/// `shfl.sync`, as the pseudo-code of the PTX manual has it.
fn shuffle(warp: &mut Warp, op: &Shfl, m: u32) -> Run<()> {
    let a = warp.regs.r32[op.a as usize];
    let (b, c) = (warp.regs.r32[op.b as usize], warp.regs.r32[op.c as usize]);
    let mut valid = 0u32;
    let mut out = [0u32; WARP];
    for lane in lanes(m) {
        let (bval, cval) = ((b[lane] & 31) as i32, c[lane] & 31);
        let segment = c[lane] >> 8 & 31;
        let max = ((lane as u32 & segment) | (cval & !segment)) as i32;
        let min = (lane as u32 & segment) as i32;
        let (j, inside) = match op.mode {
            ShflMode::Up => {
                let j = lane as i32 - bval;
                (j, j >= max)
            }
            ShflMode::Down => {
                let j = lane as i32 + bval;
                (j, j <= max)
            }
            ShflMode::Bfly => {
                let j = lane as i32 ^ bval;
                (j, j <= max)
            }
            ShflMode::Idx => {
                let j = min | (bval & !(segment as i32));
                (j, j <= max)
            }
        };
        let from = if inside { j as usize } else { lane };
        if m >> from & 1 == 0 {
            let message = format!("it reads lane {from}, which does not take part");
            let mut trouble = Trouble::new(FaultKind::Operand, message);
            trouble.lane = Some(lane);
            return Err(trouble);
        }
        valid |= (inside as u32) << lane;
        out[lane] = a[from];
    }
    let d = &mut warp.regs.r32[op.d as usize];
    lanes(m).for_each(|lane| d[lane] = out[lane]);
    if let Some(p) = op.p {
        let row = &mut warp.regs.pred[p as usize];
        *row = *row & !m | valid;
    }
    Ok(())
}

fn vote(warp: &mut Warp, mode: VoteMode, d: Reg, (a, negate): (Row, bool), members: Row, m: u32) {
    let p = warp.regs.pred[a as usize] ^ if negate { !0 } else { 0 };
    for (_, mask) in groups(warp, members, m) {
        let hits = p & mask;
        let value = match mode {
            VoteMode::All => hits == mask,
            VoteMode::Any => hits != 0,
            VoteMode::Uni => hits == 0 || hits == mask,
            VoteMode::Ballot => {
                lanes(mask).for_each(|l| warp.regs.r32[d.row as usize][l] = hits);
                continue;
            }
        };
        let row = &mut warp.regs.pred[d.row as usize];
        *row = *row & !mask | if value { mask } else { 0 };
    }
}

fn match_lanes(warp: &mut Warp, all: bool, d: Row, p: Option<Row>, a: Reg, members: Row, m: u32) {
    let value = |warp: &Warp, lane: usize| match a.file {
        File::R32 => warp.regs.r32[a.row as usize][lane] as u64,
        _ => warp.regs.r64[a.row as usize][lane],
    };
    let mut out = [0u32; WARP];
    let mut equal = 0;
    for (_, mask) in groups(warp, members, m) {
        for lane in lanes(mask) {
            let mine = value(warp, lane);
            let same = lanes(mask).filter(|&l| value(warp, l) == mine).fold(0, |all, l| all | 1 << l);
            out[lane] = if all && same != mask { 0 } else { same };
            equal |= ((same == mask) as u32) << lane;
        }
    }
    lanes(m).for_each(|l| warp.regs.r32[d as usize][l] = out[l]);
    if let Some(p) = p {
        let row = &mut warp.regs.pred[p as usize];
        *row = *row & !m | equal;
    }
}
