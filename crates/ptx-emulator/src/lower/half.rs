//! f16 and bf16 arithmetic, single and in pairs.

// The lint takes `a < b || a > b` for `a != b`, which differs on NaN.
#![allow(clippy::double_comparisons)]

use super::float::{After, COMPARISONS, float_comparison};
use super::mods::{Mods, Ty};
use super::{Lower, Lowered};
use crate::counters::Class;
use crate::ops::half::{Bf16, F16, Half, Two};
use crate::ops::lanes::{AluFn, Args, alu, test};
use crate::parse::ast::Operand;

/// One function of halves as an instruction on each of the four types.
macro_rules! all_halves {
    ($ty:expr, |$($v:ident),+| $e:expr) => {
        match $ty {
            Ty::F16 => Some(all_halves!(@one F16, |$($v),+| $e)),
            Ty::Bf16 => Some(all_halves!(@one Bf16, |$($v),+| $e)),
            Ty::F16x2 => Some(all_halves!(@two F16, |$($v),+| $e)),
            Ty::Bf16x2 => Some(all_halves!(@two Bf16, |$($v),+| $e)),
            _ => None,
        }
    };
    (@one $t:ty, |$a:ident| $e:expr) => { alu!($t, $t; |$a| $e) };
    (@one $t:ty, |$a:ident, $b:ident| $e:expr) => { alu!($t, $t, $t; |$a, $b| $e) };
    (@one $t:ty, |$a:ident, $b:ident, $c:ident| $e:expr) => { alu!($t, $t, $t, $t; |$a, $b, $c| $e) };
    (@two $t:ty, |$a:ident| $e:expr) => { alu!(Two<$t>, Two<$t>; |x| x.map(|$a| $e)) };
    (@two $t:ty, |$a:ident, $b:ident| $e:expr) => { alu!(Two<$t>, Two<$t>, Two<$t>; |x, y| x.zip(y, |$a, $b| $e)) };
    (@two $t:ty, |$a:ident, $b:ident, $c:ident| $e:expr) => {
        alu!(Two<$t>, Two<$t>, Two<$t>, Two<$t>; |x, y, z| x.zip3(y, z, |$a, $b, $c| $e))
    };
}

/// `min`/`max` of magnitudes with the product of the signs.
fn xorsign<H: Half>(a: H, b: H, f: impl Fn(H, H) -> H) -> H {
    let value = f(a.abs(), b.abs());
    H::of(value.bits() & 0x7fff | (a.bits() ^ b.bits()) & 0x8000)
}

fn unary(op: &str, ty: Ty) -> Option<AluFn> {
    match op {
        "neg" => all_halves!(ty, |a| a.neg()),
        "abs" => all_halves!(ty, |a| a.abs()),
        "ex2" => all_halves!(ty, |a| a.map(f64::exp2)),
        "tanh" => all_halves!(ty, |a| a.map(f64::tanh)),
        _ => None,
    }
}

fn binary(op: &str, ty: Ty) -> Option<AluFn> {
    match op {
        "add" => all_halves!(ty, |a, b| a.add(b)),
        "sub" => all_halves!(ty, |a, b| a.sub(b)),
        "mul" => all_halves!(ty, |a, b| a.mul(b)),
        "min" => all_halves!(ty, |a, b| a.min(b)),
        "max" => all_halves!(ty, |a, b| a.max(b)),
        "min.NaN" => all_halves!(ty, |a, b| a.min_nan(b)),
        "max.NaN" => all_halves!(ty, |a, b| a.max_nan(b)),
        "min.xorsign" => all_halves!(ty, |a, b| xorsign(a, b, Half::min)),
        "max.xorsign" => all_halves!(ty, |a, b| xorsign(a, b, Half::max)),
        "min.NaN.xorsign" => all_halves!(ty, |a, b| xorsign(a, b, Half::min_nan)),
        "max.NaN.xorsign" => all_halves!(ty, |a, b| xorsign(a, b, Half::max_nan)),
        _ => None,
    }
}

impl Lower<'_> {
    pub(super) fn half_flush_fn(ty: Ty) -> AluFn {
        all_halves!(ty, |a| a.flush()).unwrap_or_else(|| alu!(u32, u32; |a| a))
    }

    pub(super) fn half_saturate_fn(ty: Ty) -> AluFn {
        all_halves!(ty, |a| a.sat()).unwrap_or_else(|| alu!(u32, u32; |a| a))
    }

    pub(super) fn half_relu_fn(ty: Ty) -> AluFn {
        all_halves!(ty, |a| a.relu()).unwrap_or_else(|| alu!(u32, u32; |a| a))
    }

    /// f16 and bf16 instructions; false if this is none.
    pub(super) fn half(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        let last = m.opcode.rsplit('.').next().and_then(Ty::parse);
        let Some(ty @ (Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2)) = last else { return Ok(false) };
        self.class = Some(Class::Half);
        match m.base {
            "add" | "sub" | "mul" | "min" | "max" | "fma" | "neg" | "abs" | "ex2" | "tanh" => {}
            "setp" | "set" => {
                self.compare_halves(m, ops, ty)?;
                return Ok(true);
            }
            _ => return Ok(false),
        }
        if matches!(m.base, "ex2" | "tanh") && !m.take("approx") {
            return Err(m.unsupported());
        }
        m.take("rn");
        let mut name = m.base.to_string();
        if m.take("NaN") {
            name += ".NaN";
        }
        if m.take("xorsign") {
            m.take("abs");
            name += ".xorsign";
        }
        let ftz = m.take("ftz");
        let after = After { flush: ftz, saturate: m.take("sat"), relu: m.take("relu") };
        m.need_ty()?;
        let mut rows = [0; 3];
        let count = ops.len().saturating_sub(1).min(3);
        for (row, op) in rows.iter_mut().zip(&ops[1..]) {
            *row = self.float_src(op, ty, ftz)?;
        }
        let f = match count {
            1 => unary(&name, ty),
            2 => binary(&name, ty),
            _ if name == "fma" => all_halves!(ty, |a, b, c| a.fma(b, c)),
            _ => None,
        };
        let f = f.ok_or_else(|| m.unsupported())?;
        self.arity(ops, count + 1)?;
        let d = self.before(&ops[0], ty, after)?;
        self.alu(f, Args { d: d.row, a: rows[0], b: rows[1], c: rows[2], x: 0 });
        self.after(&ops[0], ty, after, d)?;
        Ok(true)
    }

    fn compare_halves(&mut self, m: &mut Mods, ops: &[Operand], ty: Ty) -> Lowered<()> {
        self.class = Some(Class::Predicate);
        let ftz = m.take("ftz");
        let Some(name) = m.one_of(&COMPARISONS) else { return Err(m.unsupported()) };
        match ty {
            Ty::F16 | Ty::Bf16 => {
                let f = match ty {
                    Ty::F16 => float_comparison!(name, F16, |v| v.f32()),
                    _ => float_comparison!(name, Bf16, |v| v.f32()),
                };
                let f = f.ok_or_else(|| m.unsupported())?;
                self.compare(m, ops, f, ty, ftz)
            }
            _ => {
                let (low, high) = match ty {
                    Ty::F16x2 => (
                        float_comparison!(name, Two<F16>, |v| v.0.f32()),
                        float_comparison!(name, Two<F16>, |v| v.1.f32()),
                    ),
                    _ => (
                        float_comparison!(name, Two<Bf16>, |v| v.0.f32()),
                        float_comparison!(name, Two<Bf16>, |v| v.1.f32()),
                    ),
                };
                self.compare_pairs(m, ops, [low, high], ty, ftz)
            }
        }
    }

    /// `setp.f16x2 p|q` compares low halves to `p`, high ones to `q`; `set.f16x2` packs the two results.
    fn compare_pairs(
        &mut self,
        m: &mut Mods,
        ops: &[Operand],
        f: [Option<AluFn>; 2],
        ty: Ty,
        ftz: bool,
    ) -> Lowered<()> {
        let set_type = if m.base == "set" { Some(m.need_ty()?) } else { None };
        m.need_ty()?;
        self.arity(ops, 3)?;
        let (a, b) = (self.float_src(&ops[1], ty, ftz)?, self.float_src(&ops[2], ty, ftz)?);
        let sources = std::mem::take(&mut self.uses);
        let mut rows = [0; 2];
        let dests = match (&ops[0], set_type) {
            (Operand::Pair(p, q), None) => Some([&**p, &**q]),
            (_, Some(_)) => None,
            _ => return self.bad("two predicates `p|q` are wanted"),
        };
        let mut results = Vec::new();
        for (i, f) in f.into_iter().enumerate() {
            self.uses = sources.clone();
            let d = match dests {
                Some(dests) => self.dest(dests[i], Ty::Pred)?,
                None => self.temp_dest(Ty::Pred),
            };
            rows[i] = d.row;
            results.push(d);
            let f = f.ok_or_else(|| m.unsupported())?;
            self.alu(f, Args { d: d.row, a, b, ..Args::default() });
        }
        let Some(set_type) = set_type else { return Ok(()) };
        // Pack: all ones or 1.0 in each half.
        let one = match set_type {
            Ty::F16 | Ty::F16x2 => 0x3c00,
            Ty::Bf16 | Ty::Bf16x2 => 0x3f80,
            _ => 0xffff,
        };
        self.uses = results;
        let d = self.dst(&ops[0], Ty::B32)?;
        self.pack_predicates(d, rows, one);
        Ok(())
    }

    fn pack_predicates(&mut self, d: u16, rows: [u16; 2], one: u32) {
        fn body(regs: &mut crate::ops::lanes::Regs, x: &Args, mask: u32) {
            let (p, q) = (regs.pred[x.a as usize], regs.pred[x.b as usize]);
            for lane in (0..32).filter(|l| mask >> l & 1 == 1) {
                let pick = |p: u32| if p >> lane & 1 == 1 { x.x } else { 0 };
                regs.r32[x.d as usize][lane] = pick(p) | pick(q) << 16;
            }
        }
        self.alu(body, Args { d, a: rows[0], b: rows[1], c: 0, x: one });
    }
}
