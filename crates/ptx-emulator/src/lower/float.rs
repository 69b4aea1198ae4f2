//! f32 and f64 arithmetic and comparisons.

// The lint takes `a < b || a > b` for `a != b`, which differs on NaN.
#![allow(clippy::double_comparisons)]

use super::mods::{Mods, Ty};
use super::{Lower, Lowered};
use crate::counters::Class;
use crate::ops::float::{self, through64};
use crate::ops::lanes::{AluFn, Args, Row, alu, test};
use crate::ops::round::{Mode, canon, flush, integral};
use crate::parse::ast::Operand;
use crate::program::Reg;

/// The expression once per rounding mode, with the mode as a constant.
macro_rules! modes {
    ($mode:expr, $m:ident, $e:expr) => {
        match $mode {
            Mode::Nearest => {
                const $m: Mode = Mode::Nearest;
                $e
            }
            Mode::Zero => {
                const $m: Mode = Mode::Zero;
                $e
            }
            Mode::Down => {
                const $m: Mode = Mode::Down;
                $e
            }
            Mode::Up => {
                const $m: Mode = Mode::Up;
                $e
            }
            Mode::Away => {
                const $m: Mode = Mode::Away;
                $e
            }
        }
    };
}
pub(super) use modes;

/// What is done to a result before it reaches its register.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct After {
    pub flush: bool,
    pub saturate: bool,
    pub relu: bool,
}

impl After {
    fn any(self) -> bool {
        self.flush || self.saturate || self.relu
    }
}

fn binary32(op: &str, mode: Mode) -> Option<AluFn> {
    Some(match op {
        "add" => modes!(mode, R, alu!(f32, f32, f32; |a, b| float::add(a, b, R))),
        "sub" => modes!(mode, R, alu!(f32, f32, f32; |a, b| float::sub(a, b, R))),
        "mul" => modes!(mode, R, alu!(f32, f32, f32; |a, b| float::mul(a, b, R))),
        "div" => modes!(mode, R, alu!(f32, f32, f32; |a, b| float::div(a, b, R))),
        _ => return None,
    })
}

fn binary64(op: &str, mode: Mode) -> Option<AluFn> {
    Some(match (op, mode) {
        ("add", Mode::Nearest) => alu!(f64, f64, f64; |a, b| float::canon64(a + b)),
        ("sub", Mode::Nearest) => alu!(f64, f64, f64; |a, b| float::canon64(a - b)),
        ("mul", Mode::Nearest) => alu!(f64, f64, f64; |a, b| float::canon64(a * b)),
        ("div", Mode::Nearest) => alu!(f64, f64, f64; |a, b| float::canon64(a / b)),
        ("add", _) => modes!(mode, R, alu!(f64, f64, f64; |a, b| float::add64(a, b, R))),
        ("sub", _) => modes!(mode, R, alu!(f64, f64, f64; |a, b| float::add64(a, -b, R))),
        ("mul", _) => modes!(mode, R, alu!(f64, f64, f64; |a, b| float::mul64(a, b, R))),
        ("div", _) => modes!(mode, R, alu!(f64, f64, f64; |a, b| float::div64(a, b, R))),
        _ => return None,
    })
}

/// Approximations of f32, rounded from f64.
fn approximation(op: &str) -> Option<AluFn> {
    Some(match op {
        "rcp" => alu!(f32, f32; |a| float::div(1.0, a, Mode::Nearest)),
        "sqrt" => alu!(f32, f32; |a| float::sqrt(a, Mode::Nearest)),
        "rsqrt" => alu!(f32, f32; |a| through64(a, |x| 1.0 / x.sqrt())),
        "sin" => alu!(f32, f32; |a| through64(a, f64::sin)),
        "cos" => alu!(f32, f32; |a| through64(a, f64::cos)),
        "lg2" => alu!(f32, f32; |a| through64(a, f64::log2)),
        "ex2" => alu!(f32, f32; |a| through64(a, f64::exp2)),
        "tanh" => alu!(f32, f32; |a| through64(a, f64::tanh)),
        _ => return None,
    })
}

/// Ordered comparisons are false with a NaN, the `u` forms true.
#[rustfmt::skip] // it moves the nested macro's brace further right each time
macro_rules! float_comparison {
    ($op:expr, $t:ty, |$v:ident| $key:expr) => {{
        macro_rules! on {
            (|$pa:ident, $pb:ident| $e:expr) => {
                test!($t; |a, b| {
                    let ($pa, $pb) = ({ let $v = a; $key }, { let $v = b; $key });
                    $e
                })
            };
        }
        #[allow(clippy::neg_cmp_op_on_partial_ord, clippy::nonminimal_bool)]
        let found: Option<AluFn> = Some(match $op {
            "eq" => on!(|a, b| a == b),
            "ne" => on!(|a, b| a < b || a > b),
            "lt" => on!(|a, b| a < b),
            "le" => on!(|a, b| a <= b),
            "gt" => on!(|a, b| a > b),
            "ge" => on!(|a, b| a >= b),
            "equ" => on!(|a, b| !(a < b || a > b)),
            "neu" => on!(|a, b| a != b),
            "ltu" => on!(|a, b| !(a >= b)),
            "leu" => on!(|a, b| !(a > b)),
            "gtu" => on!(|a, b| !(a <= b)),
            "geu" => on!(|a, b| !(a < b)),
            "num" => on!(|a, b| !a.is_nan() && !b.is_nan()),
            "nan" => on!(|a, b| a.is_nan() || b.is_nan()),
            _ => unreachable!("the names above are all there are"),
        });
        found
    }};
}
pub(super) use float_comparison;

pub(super) const COMPARISONS: [&str; 14] =
    ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"];

impl Lower<'_> {
    /// A float source, flushed first if `ftz`.
    pub(super) fn float_src(&mut self, op: &Operand, ty: Ty, ftz: bool) -> Lowered<Row> {
        let reg = self.source(op, ty)?;
        if !ftz || ty == Ty::F64 {
            return Ok(reg.row);
        }
        let others = std::mem::take(&mut self.uses);
        // Only the register fetched last belongs to the flush.
        let flushed = self.temp_dest(ty);
        let (mine, kept): (Vec<_>, Vec<_>) = others.into_iter().partition(|r| *r == reg);
        self.uses = mine;
        self.alu(Self::flush_fn(ty), Args { d: flushed.row, a: reg.row, ..Args::default() });
        self.uses = kept;
        self.uses.push(flushed);
        Ok(flushed.row)
    }

    /// Result row for a main step, which [`Lower::after`] finishes.
    pub(super) fn before(&mut self, op: &Operand, ty: Ty, after: After) -> Lowered<Reg> {
        if after.any() { Ok(self.temp_dest(ty)) } else { self.dest(op, ty) }
    }

    /// Flush, saturate and relu of the result in `reg`, the last of them into the destination.
    pub(super) fn after(&mut self, op: &Operand, ty: Ty, after: After, reg: Reg) -> Lowered<()> {
        let mut steps = Vec::new();
        if after.flush {
            steps.push(Self::flush_fn(ty));
        }
        if after.saturate {
            steps.push(Self::saturate_fn(ty));
        }
        if after.relu {
            steps.push(Self::relu_fn(ty));
        }
        let (mut at, count) = (reg, steps.len());
        for (i, f) in steps.into_iter().enumerate() {
            self.uses.push(at);
            let d = if i + 1 == count { self.dest(op, ty)? } else { self.temp_dest(ty) };
            self.alu(f, Args { d: d.row, a: at.row, ..Args::default() });
            at = d;
        }
        Ok(())
    }

    fn flush_fn(ty: Ty) -> AluFn {
        match ty {
            Ty::F32 => alu!(f32, f32; |a| flush(a)),
            Ty::F64 => alu!(f64, f64; |a| a),
            _ => Self::half_flush_fn(ty),
        }
    }

    fn saturate_fn(ty: Ty) -> AluFn {
        match ty {
            Ty::F32 => alu!(f32, f32; |a| float::saturate(a)),
            Ty::F64 => alu!(f64, f64; |a| if a > 0.0 { a.min(1.0) } else { 0.0 }),
            _ => Self::half_saturate_fn(ty),
        }
    }

    fn relu_fn(ty: Ty) -> AluFn {
        match ty {
            Ty::F32 => alu!(f32, f32; |a| float::or_nan(a, a, float::max(a, 0.0))),
            Ty::F64 => alu!(f64, f64; |a| float::max64(a, 0.0)),
            _ => Self::half_relu_fn(ty),
        }
    }

    /// f32 and f64 instructions; false if this is none.
    pub(super) fn float(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        let last = m.opcode.rsplit('.').next().and_then(Ty::parse);
        let Some(ty @ (Ty::F32 | Ty::F64)) = last else { return Ok(false) };
        self.class = Some(if ty == Ty::F32 { Class::Float } else { Class::Double });
        match m.base {
            "add" | "sub" | "mul" | "div" => self.float_binary(m, ops)?,
            "fma" | "mad" => self.float_fma(m, ops)?,
            "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => {
                self.float_special(m, ops)?
            }
            "min" | "max" => self.float_minmax(m, ops)?,
            "abs" | "neg" => {
                let ftz = m.take("ftz");
                m.need_ty()?;
                let f = match (m.base, ty) {
                    ("abs", Ty::F32) => alu!(f32, f32; |a| a.abs()),
                    ("abs", _) => alu!(f64, f64; |a| a.abs()),
                    (_, Ty::F32) => alu!(f32, f32; |a| -a),
                    _ => alu!(f64, f64; |a| -a),
                };
                self.arity(ops, 2)?;
                let a = self.float_src(&ops[1], ty, ftz)?;
                let d = self.dst(&ops[0], ty)?;
                self.alu(f, Args { d, a, ..Args::default() });
            }
            "copysign" => {
                m.need_ty()?;
                let f = match ty {
                    Ty::F32 => alu!(f32, f32, f32; |a, b| b.copysign(a)),
                    _ => alu!(f64, f64, f64; |a, b| b.copysign(a)),
                };
                self.alu2(f, ops, ty, ty, ty)?;
            }
            "testp" => self.float_test(m, ops)?,
            "setp" | "set" => {
                self.class = Some(Class::Predicate);
                let ftz = m.take("ftz");
                let Some(name) = m.one_of(&COMPARISONS) else { return Err(m.unsupported()) };
                let f = match ty {
                    Ty::F32 => float_comparison!(name, f32, |v| v),
                    _ => float_comparison!(name, f64, |v| v),
                };
                let f = f.ok_or_else(|| m.unsupported())?;
                self.compare(m, ops, f, ty, ftz)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn float_binary(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.arity(ops, 3)?;
        let approximate = m.base == "div" && (m.take("approx") | m.take("full"));
        let approx = approximate && m.opcode.contains(".approx");
        let mode = m.rounding().unwrap_or(Mode::Nearest);
        let (ftz, saturate) = (m.take("ftz"), m.take("sat"));
        let ty = m.need_ty()?;
        let f = match ty {
            Ty::F32 if approx => Some(alu!(f32, f32, f32; |a, b| float::div_approx(a, b))),
            Ty::F32 => binary32(m.base, mode),
            _ => binary64(m.base, mode),
        }
        .ok_or_else(|| m.unsupported())?;
        let after = After { flush: ftz && ty == Ty::F32, saturate, relu: false };
        let (a, b) = (self.float_src(&ops[1], ty, ftz)?, self.float_src(&ops[2], ty, ftz)?);
        let d = self.before(&ops[0], ty, after)?;
        self.alu(f, Args { d: d.row, a, b, ..Args::default() });
        self.after(&ops[0], ty, after, d)
    }

    fn float_fma(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.arity(ops, 4)?;
        let mode = m.rounding().unwrap_or(Mode::Nearest);
        let (ftz, saturate) = (m.take("ftz"), m.take("sat"));
        let ty = m.need_ty()?;
        let f = match (ty, mode) {
            (Ty::F32, _) => modes!(mode, R, alu!(f32, f32, f32, f32; |a, b, c| float::fma(a, b, c, R))),
            (_, Mode::Nearest) => alu!(f64, f64, f64, f64; |a, b, c| float::canon64(a.mul_add(b, c))),
            _ => return Err(m.unsupported()),
        };
        let after = After { flush: ftz && ty == Ty::F32, saturate, relu: false };
        let a = self.float_src(&ops[1], ty, ftz)?;
        let b = self.float_src(&ops[2], ty, ftz)?;
        let c = self.float_src(&ops[3], ty, ftz)?;
        let d = self.before(&ops[0], ty, after)?;
        self.alu(f, Args { d: d.row, a, b, c, x: 0 });
        self.after(&ops[0], ty, after, d)
    }

    fn float_special(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.arity(ops, 2)?;
        let approx = m.take("approx");
        let mode = m.rounding().unwrap_or(Mode::Nearest);
        let ftz = m.take("ftz");
        let ty = m.need_ty()?;
        if ty == Ty::F32 {
            self.class = Some(Class::Special);
        }
        let f = match (ty, m.base) {
            (Ty::F32, "rcp") if !approx => modes!(mode, R, alu!(f32, f32; |a| float::div(1.0, a, R))),
            (Ty::F32, "sqrt") if !approx => modes!(mode, R, alu!(f32, f32; |a| float::sqrt(a, R))),
            (Ty::F32, _) if approx => approximation(m.base).ok_or_else(|| m.unsupported())?,
            (Ty::F64, "rcp") => modes!(mode, R, alu!(f64, f64; |a| float::div64(1.0, a, R))),
            (Ty::F64, "sqrt") => modes!(mode, R, alu!(f64, f64; |a| float::sqrt64(a, R))),
            (Ty::F64, "rsqrt") if approx => alu!(f64, f64; |a| float::canon64(1.0 / a.sqrt())),
            _ => return Err(m.unsupported()),
        };
        // These units read subnormals as zero unless the result would be lost otherwise; only `.ftz` makes it sure.
        let after = After { flush: ftz && ty == Ty::F32, ..After::default() };
        let a = self.float_src(&ops[1], ty, ftz)?;
        let d = self.before(&ops[0], ty, after)?;
        self.alu(f, Args { d: d.row, a, ..Args::default() });
        self.after(&ops[0], ty, after, d)
    }

    fn float_minmax(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.arity(ops, 3)?;
        let (ftz, nan, xorsign) = (m.take("ftz"), m.take("NaN"), m.take("xorsign"));
        if xorsign && !m.take("abs") {
            return Err(m.unsupported());
        }
        let ty = m.need_ty()?;
        let f = match (ty, m.base, nan, xorsign) {
            (Ty::F32, "min", false, false) => alu!(f32, f32, f32; |a, b| float::min(a, b)),
            (Ty::F32, "max", false, false) => alu!(f32, f32, f32; |a, b| float::max(a, b)),
            (Ty::F32, "min", true, false) => {
                alu!(f32, f32, f32; |a, b| float::or_nan(a, b, float::min(a, b)))
            }
            (Ty::F32, "max", true, false) => {
                alu!(f32, f32, f32; |a, b| float::or_nan(a, b, float::max(a, b)))
            }
            (Ty::F32, "min", false, true) => alu!(f32, f32, f32; |a, b| float::xorsign(a, b, float::min)),
            (Ty::F32, "max", false, true) => alu!(f32, f32, f32; |a, b| float::xorsign(a, b, float::max)),
            (Ty::F32, "min", ..) => {
                alu!(f32, f32, f32; |a, b| float::or_nan(a, b, float::xorsign(a, b, float::min)))
            }
            (Ty::F32, ..) => {
                alu!(f32, f32, f32; |a, b| float::or_nan(a, b, float::xorsign(a, b, float::max)))
            }
            (_, "min", false, false) => alu!(f64, f64, f64; |a, b| float::min64(a, b)),
            (_, "max", false, false) => alu!(f64, f64, f64; |a, b| float::max64(a, b)),
            _ => return Err(m.unsupported()),
        };
        let (a, b) = (self.float_src(&ops[1], ty, ftz)?, self.float_src(&ops[2], ty, ftz)?);
        let d = self.dst(&ops[0], ty)?;
        self.alu(f, Args { d, a, b, ..Args::default() });
        Ok(())
    }

    fn float_test(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.class = Some(Class::Predicate);
        self.arity(ops, 2)?;
        let what = m.one_of(&["finite", "infinite", "number", "notanumber", "normal", "subnormal"]);
        let ty = m.need_ty()?;
        macro_rules! on {
            ($t:ty) => {
                match what {
                    Some("finite") => test!($t; |a, _| a.is_finite()),
                    Some("infinite") => test!($t; |a, _| a.is_infinite()),
                    Some("number") => test!($t; |a, _| !a.is_nan()),
                    Some("notanumber") => test!($t; |a, _| a.is_nan()),
                    Some("normal") => test!($t; |a, _| a.is_normal()),
                    Some("subnormal") => test!($t; |a, _| a.is_subnormal()),
                    _ => return Err(m.unsupported()),
                }
            };
        }
        let f = if ty == Ty::F32 { on!(f32) } else { on!(f64) };
        let a = self.src(&ops[1], ty)?;
        let d = self.dst(&ops[0], Ty::Pred)?;
        self.alu(f, Args { d, a, b: a, ..Args::default() });
        Ok(())
    }

    /// `cvt.rni.f32.f32` and its like.
    pub(super) fn round_integral_fn(ty: Ty, mode: Mode) -> Option<AluFn> {
        Some(match ty {
            Ty::F32 => modes!(mode, R, alu!(f32, f32; |a| canon(integral(a as f64, R) as f32))),
            Ty::F64 => modes!(mode, R, alu!(f64, f64; |a| float::canon64(integral(a, R)))),
            _ => return None,
        })
    }
}
