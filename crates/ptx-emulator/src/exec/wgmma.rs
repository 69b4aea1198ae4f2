//! `wgmma`: products of a warpgroup that run beside its threads, until the group that they were committed to is waited
//! for. Each of the four warps computes its own rows; results are in the registers at once, but nobody may look.

use super::machine::Machine;
use super::shared::{UNIT, Who};
use super::warp::{Product, Warp};
use crate::fault::{FaultKind, Run, Trouble};
use crate::ops::wgmma::{Descriptor, K, Left, M, Wgmma};
use crate::program::{File, Info};

/// Warps of a warpgroup.
const GROUP: usize = 4;

/// What the warps of a warpgroup must have in common: instruction, descriptors, whether to accumulate.
pub(super) type Step = (usize, u64, u64, bool);

impl Machine<'_> {
    /// An instruction touches registers that some product uses.
    pub(super) fn touch_product(&self, warp: &mut Warp, info: &Info, m: u32) -> Run<()> {
        if m == 0 {
            return Ok(());
        }
        for reg in info.uses.iter().chain(&info.defs).filter(|r| r.file == File::R32) {
            if warp.busy[reg.row as usize] > 0 {
                let message = "a register of a wgmma that was not waited for";
                return Err(Trouble::new(FaultKind::InFlight, message));
            }
            warp.dirty[reg.row as usize] = true;
        }
        Ok(())
    }

    pub(super) fn wgmma(&mut self, warp: &mut Warp, op: &Wgmma, m: u32) -> Run<()> {
        self.whole_warp(warp, m)?;
        if warp.index / GROUP * GROUP + GROUP > self.warps_per_block {
            let message = "the block has no four warps for a warpgroup here";
            return Err(Trouble::new(FaultKind::Divergence, message));
        }
        let b = uniform(&warp.regs.r64[op.b as usize])?;
        let a = match op.a {
            Left::Shared(row) => uniform(&warp.regs.r64[row as usize])?,
            Left::Registers(_) => 0,
        };
        let add = warp.regs.pred[op.scale_d as usize] ^ if op.negate { !0 } else { 0 };
        if add != 0 && add != !0 {
            return Err(Trouble::new(FaultKind::Operand, "scale-d differs between lanes"));
        }
        self.step_together(warp, (self.pc, a, b, add != 0))?;
        self.check_registers(warp, op)?;

        let (mut units, left) = match &op.a {
            Left::Registers(rows) => (Vec::new(), op.fragment(&warp.regs, rows)),
            Left::Shared(_) => {
                let first = warp.index % GROUP * M;
                let desc = descriptor(a)?;
                let units = Wgmma::units(desc, op.transpose_a, first, M);
                let bytes = self.operand(warp, &units)?;
                (units, op.lines(&bytes, op.transpose_a, M, op.negate_a))
            }
        };
        let of_b = Wgmma::units(descriptor(b)?, op.transpose_b, 0, op.n);
        let bytes = self.operand(warp, &of_b)?;
        let right = op.lines(&bytes, op.transpose_b, op.n, op.negate_b);
        units.extend(of_b);
        for &unit in &units {
            self.shared[warp.block].leave(unit, UNIT);
        }
        op.run(&mut warp.regs, &left, &right, add != 0);
        self.stats.matrix_ops += op.ops();

        let mut rows = op.d.clone();
        if let Left::Registers(a) = &op.a {
            rows.extend(a);
        }
        rows.iter().for_each(|&r| warp.busy[r as usize] += 1);
        let group = warp.product_group;
        warp.products.push(Product { group, rows, accumulators: op.d.len(), units });
        Ok(())
    }

    /// The four warps of a warpgroup must execute the same products.
    fn step_together(&mut self, warp: &mut Warp, step: Step) -> Run<()> {
        let group =
            warp.id / self.warps_per_block * self.warps_per_block.div_ceil(GROUP) + warp.index / GROUP;
        if self.steps.len() <= group {
            self.steps.resize(group + 1, Vec::new());
        }
        let steps = &mut self.steps[group];
        match steps.get(warp.product_count) {
            None => steps.push(step),
            Some(other) if *other == step => {}
            Some(other) => {
                let info = &self.job.entry.kernel.info[other.0];
                let message = format!(
                    "the warps of the warpgroup differ: another one executed the product of PTX line {} here, \
                     with descriptors {:#x} and {:#x}",
                    info.line, other.1, other.2
                );
                return Err(Trouble::new(FaultKind::Divergence, message));
            }
        }
        warp.product_count += 1;
        Ok(())
    }

    fn check_registers(&self, warp: &Warp, op: &Wgmma) -> Run<()> {
        let left: &[_] = match &op.a {
            Left::Registers(a) => a,
            Left::Shared(_) => &[],
        };
        if op.d.iter().chain(left).any(|&r| warp.dirty[r as usize]) {
            let message = "a register of this wgmma was accessed after the last wgmma.fence";
            return Err(Trouble::new(FaultKind::MissingFence, message));
        }
        // Products may follow each other on the same accumulators, of the same shape; nothing else may be shared.
        for product in &warp.products {
            let (sums, fragment) = product.rows.split_at(product.accumulators);
            let same = sums == op.d;
            let shares = |rows: &[u16], with: &[u16]| rows.iter().any(|r| with.contains(r));
            if !same && shares(&op.d, sums) || shares(&op.d, fragment) || shares(left, sums) {
                let message = "a register of this wgmma is in use by another that was not waited for";
                return Err(Trouble::new(FaultKind::InFlight, message));
            }
        }
        Ok(())
    }

    fn operand(&mut self, warp: &Warp, units: &[usize]) -> Run<Vec<[u8; UNIT]>> {
        let shared = &self.shared[warp.block];
        let me = Who { warp: warp.id, lane: 0 };
        units
            .iter()
            .map(|&at| {
                shared.check_async(&self.clocks, at, UNIT, false, me)?;
                Ok(shared.get::<UNIT>(at))
            })
            .collect()
    }

    /// `wgmma.fence`
    pub(super) fn fence_products(&mut self, warp: &mut Warp, m: u32) -> Run<()> {
        self.whole_warp(warp, m)?;
        warp.dirty.fill(false);
        Ok(())
    }

    /// Ends the products of all but the youngest groups.
    pub(super) fn wait_products(&mut self, warp: &mut Warp, pending: u32, m: u32) -> Run<()> {
        self.whole_warp(warp, m)?;
        // The lanes meet here; what they have loaded for earlier products has come.
        self.clocks.sync_warp(warp.id);
        let now = self.clocks.tick();
        let due = |p: &Product| p.group.saturating_add(pending) < warp.product_group;
        let done = warp.products.iter().take_while(|p| due(p)).count();
        for product in warp.products.drain(..done) {
            product.rows.iter().for_each(|&r| warp.busy[r as usize] -= 1);
            for unit in product.units {
                self.shared[warp.block].left(unit, UNIT, warp.id, now - 1);
            }
        }
        Ok(())
    }

    pub(super) fn end_products(&mut self, block: usize) -> Run<()> {
        let warps = &self.warps[block * self.warps_per_block..(block + 1) * self.warps_per_block];
        for group in warps.chunks(GROUP) {
            if let Some(warp) = group.iter().find(|w| !w.products.is_empty()) {
                let message = format!("warp {} ends before it has waited for its wgmma", warp.index);
                return Err(Trouble::new(FaultKind::InFlight, message));
            }
            let counts: Vec<usize> = group.iter().map(|w| w.product_count).collect();
            if counts.iter().any(|c| *c != counts[0]) {
                let message = format!(
                    "the warps of the warpgroup from {} on have executed {counts:?} products of wgmma",
                    group[0].index
                );
                return Err(Trouble::new(FaultKind::Divergence, message));
            }
        }
        Ok(())
    }
}

fn uniform(row: &[u64; 32]) -> Run<u64> {
    if row.iter().all(|v| *v == row[0]) {
        return Ok(row[0]);
    }
    Err(Trouble::new(FaultKind::Operand, "the descriptor of a matrix differs between lanes"))
}

fn descriptor(bits: u64) -> Run<Descriptor> {
    let desc = Descriptor::new(bits);
    match desc.trouble() {
        Some(message) => Err(Trouble::new(FaultKind::Operand, message)),
        None => Ok(desc),
    }
}

const _: () = assert!(K * 2 == 2 * UNIT);
