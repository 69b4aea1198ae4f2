//! Instructions that a warp executes together: shuffles, votes, matrices.

use super::memory::take_space;
use super::mods::{Mods, Ty};
use super::{Lower, Lowered};
use crate::counters::Class;
use crate::ops::lanes::Row;
use crate::ops::matrix::{Acc, Elem, Mma};
use crate::parse::ast::{Operand, Space};
use crate::program::{MatrixMove, Op, Reduce, Shfl, ShflMode, VoteMode};

impl Lower<'_> {
    /// Warp-wide instructions; false if this is none.
    pub(super) fn warp(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        self.class = Some(Class::Warp);
        match m.base {
            "shfl" => self.shuffle(m, ops)?,
            "vote" => self.vote(m, ops)?,
            "match" => self.match_lanes(m, ops)?,
            "redux" => {
                m.take("sync");
                let name = m.one_of(&["add", "min", "max", "and", "or", "xor"]);
                let ty = m.need_ty()?;
                let op = match (name, ty) {
                    (Some("add"), Ty::U32 | Ty::S32) => Reduce::Add,
                    (Some("min"), Ty::U32) => Reduce::MinU,
                    (Some("max"), Ty::U32) => Reduce::MaxU,
                    (Some("min"), Ty::S32) => Reduce::MinS,
                    (Some("max"), Ty::S32) => Reduce::MaxS,
                    (Some("and"), _) => Reduce::And,
                    (Some("or"), _) => Reduce::Or,
                    (Some("xor"), _) => Reduce::Xor,
                    _ => return Err(m.unsupported()),
                };
                self.arity(ops, 3)?;
                let (a, members) = (self.src(&ops[1], ty)?, self.src(&ops[2], Ty::B32)?);
                let d = self.dst(&ops[0], ty)?;
                self.emit(Op::Redux { op, d, a, members });
            }
            "activemask" => {
                m.need_ty()?;
                let d = self.dst(&ops[0], Ty::B32)?;
                self.emit(Op::ActiveMask { d });
            }
            "elect" => {
                m.take("sync");
                let Operand::Pair(d, p) = &ops[0] else { return self.bad("`d|p` is wanted") };
                let members = self.src(&ops[1], Ty::B32)?;
                let d = self.any_dest(d, Ty::B32)?.map(|r| r.row);
                let p = self.dst(p, Ty::Pred)?;
                self.emit(Op::Elect { d, p, members });
            }
            "ldmatrix" | "stmatrix" => self.move_matrix(m, ops)?,
            "mma" => self.mma(m, ops)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn shuffle(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        if !m.take("sync") {
            return Err(m.unsupported());
        }
        let mode = match m.one_of(&["up", "down", "bfly", "idx"]) {
            Some("up") => ShflMode::Up,
            Some("down") => ShflMode::Down,
            Some("bfly") => ShflMode::Bfly,
            Some(_) => ShflMode::Idx,
            None => return Err(m.unsupported()),
        };
        m.need_ty()?;
        self.arity(ops, 5)?;
        let a = self.src(&ops[1], Ty::B32)?;
        let (b, c) = (self.src(&ops[2], Ty::U32)?, self.src(&ops[3], Ty::U32)?);
        let members = self.src(&ops[4], Ty::B32)?;
        let (d, p) = match &ops[0] {
            Operand::Pair(d, p) => (self.dst(d, Ty::B32)?, Some(self.dst(p, Ty::Pred)?)),
            d => (self.dst(d, Ty::B32)?, None),
        };
        self.emit(Op::Shfl(Box::new(Shfl { mode, d, p, a, b, c, members })));
        Ok(())
    }

    fn vote(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        if !m.take("sync") {
            return Err(m.unsupported());
        }
        let mode = match m.one_of(&["all", "any", "uni", "ballot"]) {
            Some("all") => VoteMode::All,
            Some("any") => VoteMode::Any,
            Some("uni") => VoteMode::Uni,
            Some(_) => VoteMode::Ballot,
            None => return Err(m.unsupported()),
        };
        let ty = m.need_ty()?;
        self.arity(ops, 3)?;
        let (a, negate) = self.signed_predicate(&ops[1])?;
        let members = self.src(&ops[2], Ty::B32)?;
        let d = self.dest(&ops[0], ty)?;
        self.emit(Op::Vote { mode, d, a, negate, members });
        Ok(())
    }

    fn match_lanes(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        let all = m.one_of(&["any", "all"]) == Some("all");
        m.take("sync");
        let ty = m.need_ty()?;
        self.arity(ops, 3)?;
        let (a, members) = (self.source(&ops[1], ty)?, self.src(&ops[2], Ty::B32)?);
        let (d, p) = match &ops[0] {
            Operand::Pair(d, p) => (self.dst(d, Ty::B32)?, Some(self.dst(p, Ty::Pred)?)),
            d => (self.dst(d, Ty::B32)?, None),
        };
        self.emit(Op::Match { all, d, p, a, members });
        Ok(())
    }

    /// `{a, b, c, d}` or one register, as rows.
    pub(super) fn rows(&mut self, op: &Operand, ty: Ty, dest: bool) -> Lowered<Vec<Row>> {
        let parts = match op {
            Operand::Vector(parts) => parts.as_slice(),
            one => std::slice::from_ref(one),
        };
        let mut rows = Vec::new();
        for p in parts {
            rows.push(if dest { self.dst(p, ty)? } else { self.src(p, ty)? });
        }
        Ok(rows)
    }

    fn move_matrix(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.class = Some(Class::Matrix);
        let aligned = m.take("sync") && m.take("aligned") && m.take("m8n8");
        let count = match m.one_of(&["x1", "x2", "x4"]) {
            Some("x1") => 1,
            Some("x2") => 2,
            Some(_) => 4,
            None => return Err(m.unsupported()),
        };
        let transposed = m.take("trans");
        let space = take_space(m);
        if !aligned || !matches!(space, Space::Shared) || m.need_ty()? != Ty::B16 {
            return Err(m.unsupported());
        }
        self.arity(ops, 2)?;
        let load = m.base == "ldmatrix";
        let (address, data) = if load { (&ops[1], &ops[0]) } else { (&ops[0], &ops[1]) };
        let address = self.address(address, space)?;
        let regs = self.rows(data, Ty::B32, load)?;
        if regs.len() != count {
            return self.bad("a vector of another length is wanted");
        }
        let op = Box::new(MatrixMove { address, transposed, regs });
        self.emit(if load { Op::LoadMatrix(op) } else { Op::StoreMatrix(op) });
        Ok(())
    }

    fn mma(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.class = Some(Class::Matrix);
        let fixed = m.take("sync") && m.take("aligned") && m.take("row") && m.take("col");
        let k = match m.one_of(&["m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"]) {
            Some("m16n8k4") => 4,
            Some("m16n8k8") => 8,
            Some("m16n8k16") => 16,
            Some(_) => 32,
            None => return Err(m.unsupported()),
        };
        let saturate = m.take("satfinite");
        let names: Vec<&str> = m.opcode.rsplit('.').take(4).collect();
        let (d_type, a_type, b_type, c_type) = match names.as_slice() {
            [c, b, a, d] => (*d, *a, *b, *c),
            _ => return Err(m.unsupported()),
        };
        for name in [d_type, a_type, b_type, c_type] {
            m.take(name);
        }
        let elem = |name: &str| {
            Some(match name {
                "f16" => Elem::F16,
                "bf16" => Elem::Bf16,
                "tf32" => Elem::Tf32,
                "e4m3" => Elem::E4m3,
                "e5m2" => Elem::E5m2,
                "s8" => Elem::S8,
                "u8" => Elem::U8,
                _ => return None,
            })
        };
        let (Some(a_type), Some(b_type)) = (elem(a_type), elem(b_type)) else { return Err(m.unsupported()) };
        let acc = match (d_type, c_type) {
            ("f32", "f32") => Acc::F32,
            ("f16", "f16") => Acc::F16,
            ("s32", "s32") => Acc::S32(saturate),
            _ => return Err(m.unsupported()),
        };
        let legal = match a_type {
            Elem::F16 => matches!(k, 8 | 16),
            Elem::Bf16 => matches!(k, 8 | 16) && acc == Acc::F32,
            Elem::Tf32 => matches!(k, 4 | 8) && acc == Acc::F32,
            Elem::E4m3 | Elem::E5m2 => matches!(k, 16 | 32) && acc == Acc::F32,
            Elem::S8 | Elem::U8 => matches!(k, 16 | 32) && matches!(acc, Acc::S32(_)),
        };
        let integer = |e: Elem| matches!(e, Elem::S8 | Elem::U8);
        let same = a_type == b_type
            || a_type.bits() == 8 && b_type.bits() == 8 && integer(a_type) == integer(b_type);
        if !fixed || !legal || !same || saturate && !matches!(acc, Acc::S32(_)) {
            return Err(m.unsupported());
        }
        self.arity(ops, 4)?;
        let sum = if acc == Acc::F32 { Ty::F32 } else { Ty::B32 };
        let a = self.rows(&ops[1], Ty::B32, false)?;
        let b = self.rows(&ops[2], Ty::B32, false)?;
        let c = self.rows(&ops[3], sum, false)?;
        let d = self.rows(&ops[0], sum, true)?;
        let (words, sums) = (k * a_type.bits() / 64, if acc == Acc::F16 { 2 } else { 4 });
        if a.len() != words || b.len() * 2 != words || c.len() != sums || d.len() != sums {
            return self.bad("fragments of another length are wanted");
        }
        self.emit(Op::Mma(Box::new(Mma { k, a_type, b_type, acc, d, a, b, c })));
        Ok(())
    }
}
