//! Rows for registers, constants, special registers and scratch; and how operands become rows.

use std::collections::HashMap;

use super::mods::Ty;
use super::{Lower, Lowered};
use crate::LoadError;
use crate::ops::lanes::Row;
use crate::parse::ast::{Operand, Space};
use crate::parse::type_size;
use crate::program::{Address, Const, File, LaneMask, Reg, Special};

/// What a name stands for.
#[derive(Clone, Debug)]
pub(super) enum Name {
    Reg(Reg),
    Label(usize),
    Targets(Vec<String>),
    /// Offset in the parameter block.
    Param(u64),
    /// Local memory; `.param` variables of functions too.
    Local(u64),
    Shared(u64),
    Dynamic,
    Global(usize),
}

/// Allocates rows.
#[derive(Default)]
pub(super) struct Registers {
    next: [usize; 3],
    consts: HashMap<(File, Const), Row>,
    specials: HashMap<Special, Reg>,
    temps: [Vec<Row>; 3],
    temps_used: [usize; 3],
    overflow: bool,
}

fn index(file: File) -> usize {
    match file {
        File::Pred => 0,
        File::R32 => 1,
        File::R64 => 2,
    }
}

pub(super) fn predicate(row: Row) -> Reg {
    Reg { file: File::Pred, row, bits: 1 }
}

impl Registers {
    pub(super) fn fresh(&mut self, file: File) -> Row {
        let next = &mut self.next[index(file)];
        if file == File::Pred && *next == 0 {
            // Rows 0 and 1 are `ALWAYS` and `CARRY`.
            *next = 2;
        }
        let row = *next;
        *next += 1;
        self.overflow |= row > Row::MAX as usize;
        row as Row
    }

    pub(super) fn overflow(&self) -> bool {
        self.overflow
    }

    fn file_of(bits: u8) -> File {
        match bits {
            1 => File::Pred,
            64 => File::R64,
            _ => File::R32,
        }
    }

    /// A scratch row that lives until the next PTX instruction.
    pub(super) fn temp(&mut self, bits: u8) -> Reg {
        let file = Self::file_of(bits);
        let i = index(file);
        if self.temps_used[i] == self.temps[i].len() {
            let row = self.fresh(file);
            self.temps[i].push(row);
        }
        self.temps_used[i] += 1;
        Reg { file, row: self.temps[i][self.temps_used[i] - 1], bits }
    }

    pub(super) fn release_temps(&mut self) {
        self.temps_used = [0; 3];
    }

    pub(super) fn is_temp(&self, reg: Reg) -> bool {
        self.temps[index(reg.file)].contains(&reg.row)
    }

    pub(super) fn constant(&mut self, file: File, value: Const) -> Row {
        if let Some(&row) = self.consts.get(&(file, value)) {
            return row;
        }
        let row = self.fresh(file);
        self.consts.insert((file, value), row);
        row
    }

    fn special(&mut self, special: Special, file: File) -> Reg {
        if let Some(&reg) = self.specials.get(&special) {
            return reg;
        }
        let reg = Reg { file, row: self.fresh(file), bits: if file == File::Pred { 1 } else { 32 } };
        self.specials.insert(special, reg);
        reg
    }

    pub(super) fn count32(&self) -> usize {
        self.next[1]
    }

    pub(super) fn count64(&self) -> usize {
        self.next[2]
    }

    pub(super) fn count_pred(&self) -> usize {
        self.next[0].max(2)
    }

    pub(super) fn consts(&self) -> Vec<(Reg, Const)> {
        let mut out: Vec<_> = self
            .consts
            .iter()
            .map(|(&(file, value), &row)| {
                (Reg { file, row, bits: if file == File::R64 { 64 } else { 32 } }, value)
            })
            .collect();
        out.sort_by_key(|(reg, _)| (index(reg.file), reg.row));
        out
    }

    pub(super) fn specials(&self) -> Vec<(Reg, Special)> {
        let mut out: Vec<_> = self.specials.iter().map(|(&special, &reg)| (reg, special)).collect();
        out.sort_by_key(|(reg, _)| (index(reg.file), reg.row));
        out
    }
}

fn special(name: &str) -> Option<Special> {
    let axis = |suffix: &str| match suffix {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    let (base, suffix) = name.rsplit_once('.').unwrap_or((name, ""));
    Some(match (base, suffix) {
        ("%tid", s) => Special::Tid(axis(s)?),
        ("%ntid", s) => Special::Ntid(axis(s)?),
        ("%ctaid", s) => Special::Ctaid(axis(s)?),
        ("%nctaid", s) => Special::Nctaid(axis(s)?),
        ("%clusterid", s) => Special::ClusterId(axis(s)?),
        ("%nclusterid", s) => Special::ClusterCount(axis(s)?),
        ("%cluster_ctaid", s) => Special::ClusterCtaid(axis(s)?),
        ("%cluster_nctaid", s) => Special::ClusterNctaid(axis(s)?),
        ("%cluster_ctarank", "") => Special::ClusterCtarank,
        ("%cluster_nctarank", "") => Special::ClusterNctarank,
        ("%is_explicit_cluster", "") => Special::ExplicitCluster,
        ("%laneid", "") => Special::LaneId,
        ("%warpid", "") => Special::WarpId,
        ("%nwarpid", "") => Special::WarpCount,
        ("%smid", "") => Special::SmId,
        ("%nsmid", "") => Special::SmCount,
        ("%gridid", "") => Special::GridId,
        ("%lanemask_eq", "") => Special::LaneMask(LaneMask::Eq),
        ("%lanemask_lt", "") => Special::LaneMask(LaneMask::Lt),
        ("%lanemask_le", "") => Special::LaneMask(LaneMask::Le),
        ("%lanemask_gt", "") => Special::LaneMask(LaneMask::Gt),
        ("%lanemask_ge", "") => Special::LaneMask(LaneMask::Ge),
        ("%dynamic_smem_size", "") => Special::DynamicShared,
        ("%total_smem_size", "") => Special::TotalShared,
        ("%aggr_smem_size", "") => Special::AggregateShared,
        (b, "") if b.starts_with("%envreg") => Special::EnvReg,
        _ => return None,
    })
}

impl Lower<'_> {
    pub(super) fn bad<T>(&self, message: &str) -> Lowered<T> {
        Err(LoadError::syntax(self.line, &format!("{message}: `{}`", self.text)))
    }

    pub(super) fn registers(&mut self, ty: &str, name: &str, count: Option<u32>) -> Lowered<()> {
        let bits = if ty == ".pred" { 1 } else { type_size(ty).unwrap_or(4) * 8 } as u8;
        if bits == 128 {
            return Err(LoadError::unsupported(self.line, ".reg .b128"));
        }
        let file = Registers::file_of(bits);
        let mut declare = |name: &str| {
            let row = self.regs.fresh(file);
            self.declare(name, Name::Reg(Reg { file, row, bits }));
        };
        match count {
            None => declare(name),
            Some(n) => (0..n).for_each(|i| declare(&format!("{name}{i}"))),
        }
        if self.regs.overflow() { self.bad("more than 65536 registers of one width") } else { Ok(()) }
    }

    pub(super) fn find(&self, name: &str) -> Option<&Name> {
        self.scopes.iter().rev().find_map(|s| s.get(name))
    }

    /// What a name is, module variables included.
    pub(super) fn resolve(&mut self, name: &str) -> Lowered<Name> {
        if let Some(found) = self.find(name) {
            return Ok(found.clone());
        }
        match self.ptx.vars.iter().position(|v| v.name == name) {
            Some(i) => {
                let var = &self.ptx.vars[i];
                Ok(match var.space {
                    Space::Shared => self.shared_variable(var),
                    _ => Name::Global(i),
                })
            }
            None => self.bad(&format!("`{name}` is not declared")),
        }
    }

    /// A register by its name, special registers included.
    fn register(&mut self, name: &str) -> Lowered<Reg> {
        match self.find(name) {
            Some(Name::Reg(reg)) => return Ok(*reg),
            Some(_) => return self.bad(&format!("`{name}` is not a register")),
            None => {}
        }
        match special(name) {
            Some(s @ Special::ExplicitCluster) => Ok(self.regs.special(s, File::Pred)),
            Some(s) => Ok(self.regs.special(s, File::R32)),
            None => self.bad(&format!("`{name}` is not a register")),
        }
    }

    fn value(&mut self, op: &Operand, ty: Ty) -> Lowered<Option<Const>> {
        let mask = u64::MAX >> (64 - ty.bits().min(64) as u32);
        Ok(Some(match op {
            Operand::Int(v) => Const::Value(match ty {
                // An integer literal where a float is wanted gives its value.
                Ty::F32 => (*v as f32).to_bits() as u64,
                Ty::F64 => (*v as f64).to_bits(),
                _ => *v as u64 & mask,
            }),
            Operand::F32(bits) => Const::Value(match ty {
                Ty::F64 => (f32::from_bits(*bits) as f64).to_bits(),
                _ => *bits as u64,
            }),
            Operand::F64(bits) => Const::Value(match ty {
                Ty::F32 => (f64::from_bits(*bits) as f32).to_bits() as u64,
                _ => *bits,
            }),
            Operand::Memory { base, offset, .. } => match &**base {
                Operand::Word(name) => self.symbol(name, *offset)?,
                _ => return Ok(None),
            },
            Operand::Word(name) => match self.find(name) {
                Some(Name::Reg(_)) => return Ok(None),
                _ if special(name).is_some() => return Ok(None),
                _ if name == "WARP_SZ" => Const::Value(32),
                _ => self.symbol(name, 0)?,
            },
            _ => return Ok(None),
        }))
    }

    /// Address of a variable in its own space.
    fn symbol(&mut self, name: &str, offset: i64) -> Lowered<Const> {
        Ok(match self.resolve(name)? {
            Name::Param(at) | Name::Local(at) | Name::Shared(at) => {
                Const::Value(at.wrapping_add(offset as u64))
            }
            Name::Dynamic => Const::Dynamic(offset as u64),
            Name::Global(i) => Const::Global(i, offset as u64),
            _ => return self.bad(&format!("`{name}` has no address")),
        })
    }

    fn check(&self, reg: Reg, ty: Ty) -> Lowered<()> {
        let wanted = ty.bits();
        let fits = match reg.file {
            File::Pred => wanted == 1,
            File::R64 => wanted == 64,
            // 8 and 16-bit values sit zero-extended in 32-bit rows; PTX allows no other mixture.
            File::R32 => wanted <= 32 && wanted > 1 && (reg.bits == wanted || wanted < 32 && reg.bits <= 32),
        };
        if fits { Ok(()) } else { self.bad(&format!("a {}-bit register where {ty:?} is wanted", reg.bits)) }
    }

    /// A source operand of a type, as a register.
    pub(super) fn source(&mut self, op: &Operand, ty: Ty) -> Lowered<Reg> {
        let file = Registers::file_of(ty.bits());
        if ty == Ty::Pred {
            return Ok(predicate(self.predicate(op)?));
        }
        if let Some(value) = self.value(op, ty)? {
            return Ok(Reg { file, row: self.regs.constant(file, value), bits: ty.bits() });
        }
        let Operand::Word(name) = op else {
            return self.bad("an operand of a kind that does not belong here");
        };
        let reg = self.register(name)?;
        self.check(reg, ty)?;
        self.uses.push(reg);
        Ok(reg)
    }

    pub(super) fn src(&mut self, op: &Operand, ty: Ty) -> Lowered<Row> {
        Ok(self.source(op, ty)?.row)
    }

    /// A register of any width (loads, stores and conversions allow wider ones than their type).
    pub(super) fn any_source(&mut self, op: &Operand, ty: Ty) -> Lowered<Reg> {
        if let Operand::Word(name) = op
            && matches!(self.find(name), Some(Name::Reg(_)))
        {
            let reg = self.register(name)?;
            if reg.file == File::Pred || reg.bits < ty.bits() {
                return self.bad(&format!("a {}-bit register where {ty:?} is wanted", reg.bits));
            }
            self.uses.push(reg);
            return Ok(reg);
        }
        self.source(op, ty)
    }

    /// A predicate operand that is not negated.
    pub(super) fn predicate(&mut self, op: &Operand) -> Lowered<Row> {
        let Operand::Word(name) = op else {
            return self.bad("a predicate is wanted");
        };
        let reg = self.register(name)?;
        self.check(reg, Ty::Pred)?;
        self.uses.push(reg);
        Ok(reg.row)
    }

    /// A predicate operand, and whether it is negated.
    pub(super) fn signed_predicate(&mut self, op: &Operand) -> Lowered<(Row, bool)> {
        match op {
            Operand::Not(p) => Ok((self.predicate(p)?, true)),
            p => Ok((self.predicate(p)?, false)),
        }
    }

    /// A destination register of any width that holds the type; None for `_`.
    pub(super) fn any_dest(&mut self, op: &Operand, ty: Ty) -> Lowered<Option<Reg>> {
        let Operand::Word(name) = op else {
            return self.bad("a destination register is wanted");
        };
        if name == "_" {
            return Ok(None);
        }
        let reg = match self.find(name) {
            Some(Name::Reg(reg)) => *reg,
            _ => return self.bad(&format!("`{name}` is not a register")),
        };
        if (reg.file == File::Pred) != (ty == Ty::Pred) || reg.bits < ty.bits() {
            return self.bad(&format!("a {}-bit register where {ty:?} is wanted", reg.bits));
        }
        self.defs.push(reg);
        Ok(Some(reg))
    }

    pub(super) fn dest(&mut self, op: &Operand, ty: Ty) -> Lowered<Reg> {
        let reg = match self.any_dest(op, ty)? {
            Some(reg) => reg,
            None => self.temp_dest(ty),
        };
        self.check(reg, ty)?;
        Ok(reg)
    }

    pub(super) fn dst(&mut self, op: &Operand, ty: Ty) -> Lowered<Row> {
        Ok(self.dest(op, ty)?.row)
    }

    /// A scratch row as the destination of the next step.
    pub(super) fn temp_dest(&mut self, ty: Ty) -> Reg {
        let reg = self.regs.temp(ty.bits());
        self.defs.push(reg);
        reg
    }

    /// The row of a 32-bit constant.
    pub(super) fn constant(&mut self, value: u32) -> Row {
        self.regs.constant(File::R32, Const::Value(value as u64))
    }

    /// `[register + offset]` or `[variable + offset]`.
    pub(super) fn address(&mut self, op: &Operand, space: Space) -> Lowered<Address> {
        let Operand::Memory { base, offset, .. } = op else {
            return self.bad("an address is wanted");
        };
        match &**base {
            Operand::Word(name) if matches!(self.find(name), Some(Name::Reg(_))) => {
                let reg = self.register(name)?;
                if reg.bits < 32 {
                    return self.bad("an address register of 32 or 64 bits is wanted");
                }
                self.uses.push(reg);
                Ok(Address { row: reg.row, wide: reg.file == File::R64, offset: *offset })
            }
            Operand::Word(name) => {
                let value = match (self.symbol(name, *offset)?, space) {
                    (Const::Value(at), Space::Generic) => Const::Value(self.generic(name, at)?),
                    (value, _) => value,
                };
                Ok(Address { row: self.regs.constant(File::R64, value), wide: true, offset: 0 })
            }
            Operand::Int(at) => {
                let row = self.regs.constant(File::R64, Const::Value(*at as u64));
                Ok(Address { row, wide: true, offset: *offset })
            }
            _ => self.bad("an address is wanted"),
        }
    }

    fn generic(&mut self, name: &str, at: u64) -> Lowered<u64> {
        Ok(match self.resolve(name)? {
            Name::Shared(_) | Name::Dynamic => at | crate::memory::SHARED_WINDOW,
            Name::Local(_) => at | crate::memory::LOCAL_WINDOW,
            Name::Param(_) => at | crate::memory::PARAM_WINDOW,
            _ => at,
        })
    }

    /// Exactly so many operands.
    pub(super) fn arity(&self, ops: &[Operand], n: usize) -> Lowered<()> {
        if ops.len() == n {
            Ok(())
        } else {
            self.bad(&format!("{n} operands are wanted, {} given", ops.len()))
        }
    }
}
