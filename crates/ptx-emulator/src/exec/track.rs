//! Values that were never written: followed through moves and arithmetic, reported where they matter.

use super::warp::Warp;
use crate::fault::{FaultKind, Run, Trouble};
use crate::program::{ALWAYS, File, Info, Inst, Kernel, Op, Reg, Undefined};

/// Number of a register over the three files.
pub(crate) fn number(kernel: &Kernel, reg: Reg) -> usize {
    match reg.file {
        File::Pred => reg.row as usize,
        File::R32 => kernel.preds + reg.row as usize,
        File::R64 => kernel.preds + kernel.rows32 + reg.row as usize,
    }
}

fn uninitialised(lanes: u32, what: &str) -> Box<Trouble> {
    let lane = lanes.trailing_zeros() as usize;
    let mut trouble = Trouble::new(FaultKind::UninitializedRegister, what);
    trouble.lane = Some(lane);
    trouble
}

/// Before an instruction runs for the lanes `m`: are its sources written, and will its destinations be?
pub(crate) fn track(
    kernel: &Kernel,
    warp: &mut Warp,
    inst: &Inst,
    info: &Info,
    m: u32,
    mask: u32,
) -> Run<()> {
    if inst.guard != ALWAYS {
        let unknown = mask & !warp.init[inst.guard as usize];
        if unknown != 0 {
            return Err(uninitialised(unknown, "the guard predicate was never written"));
        }
    }
    let ready = match (info.undefined, &inst.op) {
        (Undefined::Select, Op::Alu(_, args)) => {
            let file = info.defs.first().map_or(File::R32, |d| d.file);
            let of = |row| warp.init[number(kernel, Reg { file, row, bits: 32 })];
            let p = warp.regs.pred[args.c as usize];
            warp.init[args.c as usize] & (p & of(args.a) | !p & of(args.b))
        }
        (Undefined::Accumulate, Op::Wgmma(op)) => {
            let add = warp.regs.pred[op.scale_d as usize] ^ if op.negate { !0 } else { 0 };
            let matters = |u: &&Reg| add != 0 || !info.defs.contains(u);
            info.uses.iter().filter(matters).fold(!0, |all, &u| all & warp.init[number(kernel, u)])
        }
        _ => info.uses.iter().fold(!0, |all, &u| all & warp.init[number(kernel, u)]),
    };
    let forbids = matches!(info.undefined, Undefined::Forbid | Undefined::Accumulate);
    if forbids && m & !ready != 0 {
        let lane = (m & !ready).trailing_zeros();
        let culprit = info.uses.iter().find(|&&u| warp.init[number(kernel, u)] >> lane & 1 == 0);
        let name = culprit.map_or(String::new(), |u| format!(" ({} bits)", u.bits));
        return Err(uninitialised(m & !ready, &format!("a source register was never written{name}")));
    }
    for &d in &info.defs {
        let slot = &mut warp.init[number(kernel, d)];
        *slot = *slot & !m | ready & m;
    }
    if forbids {
        for &d in &info.defs {
            warp.init[number(kernel, d)] |= m;
        }
    }
    Ok(())
}

/// Lanes in which a register was never written, if registers are tracked.
pub(crate) fn tainted(kernel: &Kernel, warp: &Warp, regs: &[Option<Reg>]) -> u32 {
    if warp.init.is_empty() {
        return 0;
    }
    regs.iter().flatten().fold(0, |all, &r| all | !warp.init[number(kernel, r)])
}
