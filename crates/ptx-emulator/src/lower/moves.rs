//! Moves, packing, selection, predicates, and conversion of addresses between spaces.

use super::mods::{Mods, Ty};
use super::{Lower, Lowered};
use crate::counters::Class;
use crate::memory::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_MASK};
use crate::ops::lanes::{AluFn, Args, Lane, Regs, Row, alu};
use crate::parse::ast::Operand;
use crate::program::{ALWAYS, File, Op, Reg, Undefined};

macro_rules! by_shift {
    ($d:ty, $a:ty) => {{
        #[inline(always)]
        fn body(regs: &mut Regs, x: &Args, mask: u32) {
            let shift = x.x;
            crate::ops::lanes::map1::<$d, $a>(regs, x, mask, |a| (a >> shift) as $d)
        }
        crate::ops::lanes::pick!(body)
    }};
}

macro_rules! in_window {
    ($window:expr) => {
        crate::ops::lanes::test!(u64; |a, _| a & WINDOW_MASK == $window)
    };
}

/// `d = p ? a : b`, the predicate in row `c`.
fn select<T: Lane>(regs: &mut Regs, x: &Args, mask: u32) {
    let p = regs.pred[x.c as usize];
    let a = T::rows(regs)[x.a as usize];
    let b = T::rows(regs)[x.b as usize];
    let d = &mut T::rows_mut(regs)[x.d as usize];
    for i in 0..32 {
        if mask >> i & 1 == 1 {
            d[i] = if p >> i & 1 == 1 { a[i] } else { b[i] };
        }
    }
}

/// `set` to all ones or to a value: `d = p ? x : 0`.
fn set_value(regs: &mut Regs, x: &Args, mask: u32) {
    let p = regs.pred[x.a as usize];
    let d = &mut regs.r32[x.d as usize];
    for (i, d) in d.iter_mut().enumerate() {
        if mask >> i & 1 == 1 {
            *d = if p >> i & 1 == 1 { x.x } else { 0 };
        }
    }
}

/// Predicate logic: `d = (a ^ nots) op (b ^ nots)`; `x` holds operation and negations.
fn logic(regs: &mut Regs, x: &Args, mask: u32) {
    let flip = |bit: u32| if x.x >> bit & 1 == 1 { u32::MAX } else { 0 };
    let (a, b) = (regs.pred[x.a as usize] ^ flip(8), regs.pred[x.b as usize] ^ flip(9));
    let value = match x.x & 3 {
        0 => a & b,
        1 => a | b,
        _ => a ^ b,
    };
    let d = &mut regs.pred[x.d as usize];
    *d = *d & !mask | value & mask;
}

fn logic_code(op: &str) -> u32 {
    match op {
        "and" => 0,
        "or" => 1,
        _ => 2,
    }
}

/// Moves a register to one of another width, cutting or zero-extending.
pub(super) fn resize(from: File, to: File, bits: u8) -> AluFn {
    match (from, to, bits) {
        (File::R32, File::R32, 8) => alu!(u8, u8; |a| a),
        (File::R32, File::R32, 16) => alu!(u16, u16; |a| a),
        (File::R32, File::R32, _) => alu!(u32, u32; |a| a),
        (File::R64, File::R64, _) => alu!(u64, u64; |a| a),
        (File::R64, _, 8) => alu!(u8, u64; |a| a as u8),
        (File::R64, _, 16) => alu!(u16, u64; |a| a as u16),
        (File::R64, ..) => alu!(u32, u64; |a| a as u32),
        _ => alu!(u64, u32; |a| a as u64),
    }
}

impl Lower<'_> {
    /// Moves and selections; false if this is none.
    pub(super) fn moves(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        self.class = Some(Class::Move);
        match m.base {
            "mov" => self.mov(m, ops)?,
            "selp" => {
                self.class = Some(Class::Predicate);
                self.arity(ops, 4)?;
                let ty = m.need_ty()?;
                let (a, b) = (self.src(&ops[1], ty)?, self.src(&ops[2], ty)?);
                let (c, negated) = self.signed_predicate(&ops[3])?;
                let (a, b) = if negated { (b, a) } else { (a, b) };
                let d = self.dst(&ops[0], ty)?;
                let f: AluFn = if ty.bits() == 64 { select::<u64> } else { select::<u32> };
                self.emit_as(Op::Alu(f, Args { d, a, b, c, x: 0 }), Undefined::Select);
            }
            "slct" => {
                self.class = Some(Class::Predicate);
                let ftz = m.take("ftz");
                let (ty, by) = (m.need_ty()?, m.need_ty()?);
                self.arity(ops, 4)?;
                if ftz {
                    return Err(m.unsupported());
                }
                let f = match (ty.bits(), by) {
                    (64, Ty::S32) => alu!(u64, u64, u64, i32; |a, b, c| if c >= 0 { a } else { b }),
                    (_, Ty::S32) => alu!(u32, u32, u32, i32; |a, b, c| if c >= 0 { a } else { b }),
                    (64, Ty::F32) => alu!(u64, u64, u64, f32; |a, b, c| if c >= 0.0 { a } else { b }),
                    (_, Ty::F32) => alu!(u32, u32, u32, f32; |a, b, c| if c >= 0.0 { a } else { b }),
                    _ => return Err(m.unsupported()),
                };
                self.alu3(f, ops, ty, [ty, ty, by])?;
            }
            "cvta" => self.convert_address(m, ops)?,
            "isspacep" => {
                self.class = Some(Class::Predicate);
                self.arity(ops, 2)?;
                let space = m.one_of(&[
                    "global",
                    "shared",
                    "shared::cta",
                    "shared::cluster",
                    "local",
                    "const",
                    "param",
                ]);
                let a = self.src(&ops[1], Ty::U64)?;
                let d = self.dst(&ops[0], Ty::Pred)?;
                let f = match space {
                    Some("shared" | "shared::cta" | "shared::cluster") => in_window!(SHARED_WINDOW),
                    Some("local") => in_window!(LOCAL_WINDOW),
                    Some("param") => in_window!(PARAM_WINDOW),
                    Some("global") => crate::ops::lanes::test!(u64; |a, _| a & WINDOW_MASK > PARAM_WINDOW),
                    _ => return Err(m.unsupported()),
                };
                self.alu(f, Args { d, a, b: a, ..Args::default() });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn mov(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.arity(ops, 2)?;
        let ty = m.need_ty()?;
        if ty == Ty::Pred {
            let (a, negate) = match ops[1] {
                Operand::Int(v) => (ALWAYS, v == 0),
                _ => self.signed_predicate(&ops[1])?,
            };
            let d = self.dst(&ops[0], ty)?;
            self.alu(logic, Args { d, a, b: a, c: 0, x: if negate { 0x300 } else { 0 } });
            return Ok(());
        }
        match (&ops[0], &ops[1]) {
            (Operand::Vector(parts), Operand::Vector(from)) if parts.len() == from.len() => {
                return self.bad("a move from vector to vector");
            }
            (Operand::Vector(parts), from) => return self.unpack(parts, from, ty),
            (to, Operand::Vector(parts)) => return self.pack(to, parts, ty),
            _ => {}
        }
        if let (Ty::U32, Operand::Word(name)) | (Ty::U64, Operand::Word(name)) = (ty.plain(), &ops[1])
            && let Some(wide) = clock(name)
        {
            let d = self.dest(&ops[0], if wide { Ty::U64 } else { Ty::U32 })?;
            self.emit(Op::Clock { d });
            return Ok(());
        }
        let a = self.any_source(&ops[1], ty)?;
        // Special registers are 32 bits wide, and `mov.u64` of some is allowed.
        let d = self.dest(&ops[0], ty)?;
        let f = resize(a.file, d.file, d.bits);
        self.alu(f, Args { d: d.row, a: a.row, ..Args::default() });
        Ok(())
    }

    /// One register from 2 or 4 narrower ones.
    fn pack(&mut self, to: &Operand, parts: &[Operand], ty: Ty) -> Lowered<()> {
        let part = part_type(ty, parts.len());
        let Some(part) = part else { return self.bad("a vector of another length is wanted") };
        let mut rows = Vec::new();
        for p in parts {
            rows.push(self.any_source(p, part)?);
        }
        let wanted = self.uses.split_off(0);
        let join = |low: Reg, bits: u8| -> AluFn {
            debug_assert_ne!(low.file, File::Pred);
            match bits {
                8 => alu!(u32, u8, u8; |a, b| a as u32 | (b as u32) << 8),
                16 => alu!(u32, u16, u16; |a, b| a as u32 | (b as u32) << 16),
                _ => alu!(u64, u32, u32; |a, b| a as u64 | (b as u64) << 32),
            }
        };
        let mut bits = part.bits();
        while rows.len() > 1 {
            let mut next = Vec::new();
            let last = rows.len() == 2;
            for pair in rows.chunks(2) {
                self.uses.extend(pair.iter().filter(|r| wanted.contains(r) || self.regs.is_temp(**r)));
                let d = if last {
                    self.dest(to, ty)?
                } else {
                    self.temp_dest(if bits == 32 { Ty::U64 } else { Ty::U32 })
                };
                let f = join(pair[0], bits);
                self.alu(f, Args { d: d.row, a: pair[0].row, b: pair[1].row, ..Args::default() });
                next.push(Reg { bits: bits * 2, ..d });
            }
            rows = next;
            bits *= 2;
        }
        Ok(())
    }

    /// 2 or 4 registers from one wider one.
    fn unpack(&mut self, parts: &[Operand], from: &Operand, ty: Ty) -> Lowered<()> {
        let Some(part) = part_type(ty, parts.len()) else {
            return self.bad("a vector of another length is wanted");
        };
        let source = self.any_source(from, ty)?;
        let uses = std::mem::take(&mut self.uses);
        // A part may be the source itself: then the source is read through a copy.
        let aliased = parts[..parts.len() - 1].iter().any(|p| p == from);
        let source = if aliased {
            self.uses = uses.clone();
            let copy = self.temp_dest(ty);
            let f = resize(source.file, copy.file, copy.bits);
            self.alu(f, Args { d: copy.row, a: source.row, ..Args::default() });
            copy
        } else {
            source
        };
        for (i, p) in parts.iter().enumerate() {
            self.uses = if aliased { vec![source] } else { uses.clone() };
            let Some(d) = self.any_dest(p, part)? else {
                self.uses.clear();
                continue;
            };
            if d.bits != part.bits() {
                return self.bad("a register of the width of one part is wanted");
            }
            let f = match (ty.bits(), part.bits()) {
                (64, 32) => by_shift!(u32, u64),
                (64, 16) => by_shift!(u16, u64),
                (64, 8) => by_shift!(u8, u64),
                (32, 16) => by_shift!(u16, u32),
                _ => by_shift!(u8, u32),
            };
            let x = i as u32 * part.bits() as u32;
            self.alu(f, Args { d: d.row, a: source.row, b: 0, c: 0, x });
        }
        Ok(())
    }

    fn convert_address(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.arity(ops, 2)?;
        let to = m.take("to");
        let space = m.one_of(&[
            "global",
            "const",
            "shared",
            "shared::cta",
            "shared::cluster",
            "local",
            "param",
            "param::entry",
        ]);
        let ty = m.need_ty()?;
        let window = match space {
            Some("shared" | "shared::cta" | "shared::cluster") => SHARED_WINDOW,
            Some("local") => LOCAL_WINDOW,
            Some("param" | "param::entry") => PARAM_WINDOW,
            Some(_) => 0,
            None => return Err(m.unsupported()),
        };
        let a = self.source(&ops[1], ty)?;
        let d = self.dst(&ops[0], ty)?;
        let f = match (window, to) {
            (0, _) => alu!(u64, u64; |a| a),
            (SHARED_WINDOW, true) => alu!(u64, u64; |a| a.wrapping_sub(SHARED_WINDOW)),
            (SHARED_WINDOW, false) => alu!(u64, u64; |a| a.wrapping_add(SHARED_WINDOW)),
            (LOCAL_WINDOW, true) => alu!(u64, u64; |a| a.wrapping_sub(LOCAL_WINDOW)),
            (LOCAL_WINDOW, false) => alu!(u64, u64; |a| a.wrapping_add(LOCAL_WINDOW)),
            (_, true) => alu!(u64, u64; |a| a.wrapping_sub(PARAM_WINDOW)),
            (_, false) => alu!(u64, u64; |a| a.wrapping_add(PARAM_WINDOW)),
        };
        self.alu(f, Args { d, a: a.row, ..Args::default() });
        Ok(())
    }

    pub(super) fn predicate_logic(&mut self, op: &str, ops: &[Operand]) -> Lowered<()> {
        self.class = Some(Class::Predicate);
        self.arity(ops, if op == "not" { 2 } else { 3 })?;
        let (a, not_a) = self.signed_predicate(&ops[1])?;
        let (b, not_b, code) = if op == "not" {
            (a, !not_a, 0)
        } else {
            let (b, not_b) = self.signed_predicate(&ops[2])?;
            (b, not_b, logic_code(op))
        };
        let not_a = if op == "not" { !not_a } else { not_a };
        let d = self.dst(&ops[0], Ty::Pred)?;
        let x = code | (not_a as u32) << 8 | (not_b as u32) << 9;
        self.alu(logic, Args { d, a, b, c: 0, x });
        Ok(())
    }

    /// `setp` and `set`: comparison `f` on a type, then the optional logic with a third predicate, then the result.
    pub(super) fn compare(
        &mut self,
        m: &mut Mods,
        ops: &[Operand],
        f: AluFn,
        ty: Ty,
        ftz: bool,
    ) -> Lowered<()> {
        let with = m.one_of(&["and", "or", "xor"]);
        let ftz = ftz || m.take("ftz");
        let set_type = if m.base == "set" { Some(m.need_ty()?) } else { None };
        m.need_ty()?;
        self.arity(ops, 3 + with.is_some() as usize)?;
        let (a, b) = (self.float_src(&ops[1], ty, ftz)?, self.float_src(&ops[2], ty, ftz)?);
        let (dest, second) = match &ops[0] {
            Operand::Pair(p, q) => (&**p, Some(&**q)),
            p => (p, None),
        };
        if let (None, None, None) = (with, second, set_type) {
            let d = self.dst(dest, Ty::Pred)?;
            self.alu(f, Args { d, a, b, ..Args::default() });
            return Ok(());
        }
        let t = self.temp_dest(Ty::Pred);
        self.alu(f, Args { d: t.row, a, b, ..Args::default() });
        let (c, not_c, code) = match with {
            Some(op) => {
                let (c, not_c) = self.signed_predicate(&ops[3])?;
                (c, not_c, logic_code(op))
            }
            None => (t.row, false, 0),
        };
        let third = std::mem::take(&mut self.uses);
        let step = |this: &mut Self, d: Row, not_t: bool| {
            this.uses.extend(third.iter());
            this.uses.push(t);
            // Without a third predicate both operands are `t`.
            let not_c = if with.is_some() { not_c } else { not_t };
            let x = code | (not_t as u32) << 8 | (not_c as u32) << 9;
            this.alu(logic, Args { d, a: t.row, b: c, c: 0, x });
        };
        if let Some(set_type) = set_type {
            let result = self.temp_dest(Ty::Pred);
            step(self, result.row, false);
            self.uses.push(result);
            let one = match set_type {
                Ty::F32 => 1f32.to_bits(),
                Ty::F16 => 0x3c00,
                Ty::Bf16 => 0x3f80,
                Ty::U16 | Ty::S16 => 0xffff,
                Ty::U32 | Ty::S32 => u32::MAX,
                _ => return Err(m.unsupported()),
            };
            let d = self.dst(dest, set_type)?;
            self.alu(set_value, Args { d, a: result.row, b: 0, c: 0, x: one });
            return Ok(());
        }
        if let Some(second) = second {
            // The first result may not overwrite what the second still reads.
            let q = self.temp_dest(Ty::Pred);
            step(self, q.row, true);
            if !matches!(dest, Operand::Word(w) if w == "_") {
                let d = self.dst(dest, Ty::Pred)?;
                step(self, d, false);
            }
            if !matches!(second, Operand::Word(w) if w == "_") {
                self.uses.push(q);
                let d = self.dst(second, Ty::Pred)?;
                self.alu(logic, Args { d, a: q.row, b: q.row, c: 0, x: 0 });
            }
            return Ok(());
        }
        let d = self.dst(dest, Ty::Pred)?;
        step(self, d, false);
        Ok(())
    }
}

fn clock(name: &str) -> Option<bool> {
    match name {
        "%clock" | "%clock_hi" | "%globaltimer_lo" | "%globaltimer_hi" => Some(false),
        "%clock64" | "%globaltimer" => Some(true),
        _ => None,
    }
}

fn part_type(ty: Ty, parts: usize) -> Option<Ty> {
    match ty.bits() as usize / parts {
        8 if parts > 1 => Some(Ty::B8),
        16 if parts > 1 => Some(Ty::B16),
        32 if parts > 1 => Some(Ty::B32),
        _ => None,
    }
}
