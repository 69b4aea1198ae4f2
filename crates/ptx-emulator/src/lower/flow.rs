//! Control flow of a program: where branches meet again, which registers may be read before they are written, and how
//! many are live at once.

use crate::ops::wgmma::Left;
use crate::program::{ALWAYS, FLIGHT, File, JOIN, Kernel, NEVER, Op, Reg, TRACK, Undefined};

/// Basic blocks: code ranges and successors. The last index stands for the exit of the program.
struct Graph {
    starts: Vec<usize>,
    ends: Vec<usize>,
    successors: Vec<Vec<usize>>,
    predecessors: Vec<Vec<usize>>,
}

impl Graph {
    fn exit(&self) -> usize {
        self.starts.len()
    }

    fn new(kernel: &Kernel) -> Graph {
        let code = &kernel.code;
        let mut leader = vec![false; code.len() + 1];
        leader[0] = true;
        for (pc, inst) in code.iter().enumerate() {
            match &inst.op {
                Op::Branch { target, .. } => {
                    leader[*target as usize] = true;
                    leader[pc + 1] = true;
                }
                Op::Switch { targets, .. } => {
                    targets.iter().for_each(|&t| leader[t as usize] = true);
                    leader[pc + 1] = true;
                }
                Op::Exit | Op::Trap(_) => leader[pc + 1] = true,
                _ => {}
            }
        }
        let starts: Vec<usize> = (0..code.len()).filter(|&pc| leader[pc]).collect();
        let ends: Vec<usize> = starts.iter().skip(1).copied().chain([code.len()]).collect();
        let mut of = vec![starts.len(); code.len() + 1];
        for (block, (&start, &end)) in starts.iter().zip(&ends).enumerate() {
            of[start..end].fill(block);
        }
        let exit = starts.len();
        let mut successors = vec![Vec::new(); exit + 1];
        for block in 0..exit {
            let last = &code[ends[block] - 1];
            let next = of[ends[block]];
            let falls = last.guard != ALWAYS;
            let out = &mut successors[block];
            match &last.op {
                Op::Branch { target, .. } => {
                    out.push(of[*target as usize]);
                    if falls {
                        out.push(next);
                    }
                }
                Op::Switch { targets, .. } => {
                    out.extend(targets.iter().map(|&t| of[t as usize]));
                    if falls {
                        out.push(next);
                    }
                }
                Op::Exit | Op::Trap(_) => {
                    out.push(exit);
                    if falls {
                        out.push(next);
                    }
                }
                _ => out.push(next),
            }
            out.sort_unstable();
            out.dedup();
        }
        let mut predecessors = vec![Vec::new(); exit + 1];
        for (block, out) in successors.iter().enumerate() {
            out.iter().for_each(|&s| predecessors[s].push(block));
        }
        Graph { starts, ends, successors, predecessors }
    }

    /// Immediate post-dominator of every block, by the method of Cooper, Harvey and Kennedy on the reversed graph.
    fn post_dominators(&self) -> Vec<Option<usize>> {
        let exit = self.exit();
        let mut order = Vec::new();
        let mut number = vec![usize::MAX; exit + 1];
        let mut stack = vec![(exit, 0)];
        let mut seen = vec![false; exit + 1];
        seen[exit] = true;
        while let Some((block, next)) = stack.pop() {
            if let Some(&p) = self.predecessors[block].get(next) {
                stack.push((block, next + 1));
                if !seen[p] {
                    seen[p] = true;
                    stack.push((p, 0));
                }
            } else {
                number[block] = order.len();
                order.push(block);
            }
        }
        let mut parent: Vec<Option<usize>> = vec![None; exit + 1];
        parent[exit] = Some(exit);
        let mut changed = true;
        while changed {
            changed = false;
            for &block in order.iter().rev().skip(1) {
                let mut new = None;
                for &s in &self.successors[block] {
                    if parent[s].is_none() {
                        continue;
                    }
                    new = Some(match new {
                        None => s,
                        Some(other) => {
                            let (mut a, mut b): (usize, usize) = (s, other);
                            while a != b {
                                while number[a] < number[b] {
                                    a = parent[a].unwrap_or(exit);
                                }
                                while number[b] < number[a] {
                                    b = parent[b].unwrap_or(exit);
                                }
                            }
                            a
                        }
                    });
                }
                if parent[block] != new {
                    parent[block] = new;
                    changed = true;
                }
            }
        }
        parent
    }
}

/// A set of registers.
#[derive(Clone, PartialEq)]
struct Set(Vec<u64>);

impl Set {
    fn new(len: usize, full: bool) -> Set {
        Set(vec![if full { !0 } else { 0 }; len.div_ceil(64)])
    }
    fn has(&self, i: usize) -> bool {
        self.0[i / 64] >> (i % 64) & 1 == 1
    }
    fn put(&mut self, i: usize, on: bool) {
        let bit = 1 << (i % 64);
        self.0[i / 64] = if on { self.0[i / 64] | bit } else { self.0[i / 64] & !bit };
    }
}

/// Numbers the registers of all three files.
struct Numbers {
    preds: usize,
    rows32: usize,
    all: usize,
}

impl Numbers {
    fn of(&self, reg: Reg) -> usize {
        match reg.file {
            File::Pred => reg.row as usize,
            File::R32 => self.preds + reg.row as usize,
            File::R64 => self.preds + self.rows32 + reg.row as usize,
        }
    }
}

/// Fills in reconvergence points and flags; returns the most 32-bit registers that are live at once.
pub(super) fn analyse(kernel: &mut Kernel) -> u32 {
    let graph = Graph::new(kernel);
    let parents = graph.post_dominators();
    for (block, parent) in parents.iter().enumerate().take(graph.exit()) {
        let last = graph.ends[block] - 1;
        if matches!(kernel.code[last].op, Op::Branch { .. } | Op::Switch { .. }) {
            let meet = parent.filter(|&p| p < graph.exit()).map(|p| graph.starts[p]);
            // Lanes that only have to leave need not wait for the others.
            let meet = meet.filter(|&pc| {
                let inst = &kernel.code[pc];
                !(matches!(inst.op, Op::Exit) && inst.guard == ALWAYS)
            });
            kernel.reconverge[last] = meet.map_or(NEVER, |pc| pc as u32);
            if let Some(pc) = meet
                && graph.successors[block].len() > 1
            {
                kernel.code[pc].flags |= JOIN;
            }
        }
    }
    let preds = kernel.preds;
    let numbers = Numbers { preds, rows32: kernel.rows32, all: preds + kernel.rows32 + kernel.rows64 };
    mark_uninitialised(kernel, &graph, &numbers);
    mark_products(kernel);
    live_registers(kernel, &graph, &numbers)
}

/// Flags every instruction beside `wgmma` that touches a register of one.
fn mark_products(kernel: &mut Kernel) {
    let mut used = vec![false; kernel.rows32];
    for inst in &kernel.code {
        match &inst.op {
            Op::Wgmma(op) => {
                kernel.asynchronous = true;
                let left = match &op.a {
                    Left::Registers(a) => a.as_slice(),
                    Left::Shared(_) => &[],
                };
                op.d.iter().chain(left).for_each(|&row| used[row as usize] = true);
            }
            Op::Bulk(_) | Op::Mbarrier(_) => kernel.asynchronous = true,
            _ => {}
        }
    }
    for (inst, info) in kernel.code.iter_mut().zip(&kernel.info) {
        let of_product = |r: &Reg| r.file == File::R32 && used[r.row as usize];
        if !matches!(inst.op, Op::Wgmma(_)) && info.uses.iter().chain(&info.defs).any(of_product) {
            inst.flags |= FLIGHT;
        }
    }
}

/// Flags every instruction that touches a register which some path leaves unwritten before a use.
fn mark_uninitialised(kernel: &mut Kernel, graph: &Graph, numbers: &Numbers) {
    let exit = graph.exit();
    let mut entry = Set::new(numbers.all, false);
    entry.put(ALWAYS as usize, true);
    kernel.consts.iter().for_each(|(reg, _)| entry.put(numbers.of(*reg), true));
    kernel.specials.iter().for_each(|(reg, _)| entry.put(numbers.of(*reg), true));
    let mut out: Vec<Set> = vec![Set::new(numbers.all, true); exit + 1];
    let input = |out: &[Set], block: usize| {
        let mut set = if block == 0 { entry.clone() } else { Set::new(numbers.all, true) };
        for &p in &graph.predecessors[block] {
            set.0.iter_mut().zip(&out[p].0).for_each(|(a, b)| *a &= b);
        }
        set
    };
    let step = |kernel: &Kernel, set: &mut Set, pc: usize| {
        let info = &kernel.info[pc];
        let forbids = matches!(info.undefined, Undefined::Forbid | Undefined::Accumulate);
        let ready = forbids || info.uses.iter().all(|u| set.has(numbers.of(*u)));
        let always = kernel.code[pc].guard == ALWAYS;
        for d in &info.defs {
            let i = numbers.of(*d);
            if always || !ready {
                // A guarded write leaves what was there in the other lanes, and taints where its sources do.
                set.put(i, ready && (always || set.has(i)));
            }
        }
    };
    let mut changed = true;
    while changed {
        changed = false;
        for block in 0..exit {
            let mut set = input(&out, block);
            (graph.starts[block]..graph.ends[block]).for_each(|pc| step(kernel, &mut set, pc));
            if set != out[block] {
                out[block] = set;
                changed = true;
            }
        }
    }
    let mut suspects = Set::new(numbers.all, false);
    let mut flagged = vec![false; kernel.code.len()];
    for block in 0..exit {
        let mut set = input(&out, block);
        let range = graph.starts[block]..graph.ends[block];
        for (pc, flag) in range.clone().zip(&mut flagged[range]) {
            for &u in &kernel.info[pc].uses {
                if !set.has(numbers.of(u)) {
                    suspects.put(numbers.of(u), true);
                    *flag = true;
                }
            }
            step(kernel, &mut set, pc);
        }
    }
    kernel.suspects = (0..numbers.all).filter(|&i| suspects.has(i)).collect();
    for (pc, inst) in kernel.code.iter_mut().enumerate() {
        let info = &kernel.info[pc];
        if flagged[pc] || info.defs.iter().chain(&info.uses).any(|r| suspects.has(numbers.of(*r))) {
            inst.flags |= TRACK;
        }
    }
}

/// The most 32-bit registers that hold a value needed later, anywhere in the program. Predicates do not count.
fn live_registers(kernel: &Kernel, graph: &Graph, numbers: &Numbers) -> u32 {
    let constant: std::collections::HashSet<usize> = kernel
        .consts
        .iter()
        .map(|c| c.0)
        .chain(kernel.specials.iter().map(|s| s.0))
        .map(|r| numbers.of(r))
        .collect();
    let weight = |i: usize| {
        if i < numbers.preds || constant.contains(&i) {
            0
        } else if i < numbers.preds + numbers.rows32 {
            1
        } else {
            2
        }
    };
    let exit = graph.exit();
    let mut live_in = vec![Set::new(numbers.all, false); exit + 1];
    let mut most = 0;
    for last_round in [false, true] {
        let mut changed = true;
        while changed {
            changed = false;
            for block in (0..exit).rev() {
                let mut set = Set::new(numbers.all, false);
                for &s in &graph.successors[block] {
                    set.0.iter_mut().zip(&live_in[s].0).for_each(|(a, b)| *a |= b);
                }
                let mut now: u32 =
                    if last_round { (0..numbers.all).filter(|&i| set.has(i)).map(weight).sum() } else { 0 };
                for pc in (graph.starts[block]..graph.ends[block]).rev() {
                    let info = &kernel.info[pc];
                    let mut put = |i: usize, on: bool| {
                        if set.has(i) != on {
                            set.put(i, on);
                            now = if on { now + weight(i) } else { now.saturating_sub(weight(i)) };
                        }
                    };
                    if kernel.code[pc].guard == ALWAYS {
                        info.defs.iter().for_each(|d| put(numbers.of(*d), false));
                    }
                    info.uses.iter().for_each(|u| put(numbers.of(*u), true));
                    most = most.max(now);
                }
                if set != live_in[block] {
                    live_in[block] = set;
                    changed = true;
                }
            }
        }
    }
    most
}
