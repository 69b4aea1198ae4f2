//! Integer arithmetic, logic, shifts and comparisons.

use super::mods::{Mods, Ty};
use super::{Lower, Lowered};
use crate::counters::Class;
use crate::ops::integer::{PrmtMode, bfe, bfi, bfind, dp4a, lop3, prmt, prmt_mode, shf};
use crate::ops::lanes::{AluFn, Args, alu, pick, test};
use crate::parse::ast::Operand;
use crate::program::{CARRY, Op, Undefined};

/// `by_type!(ty, T in [A => a, B => b], expression of T)`: the expression for the Rust type of a PTX type.
macro_rules! by_type {
    ($ty:expr, $t:ident in [$($variant:ident => $rust:ty),*], $e:expr) => {
        match $ty {
            $(Ty::$variant => {
                type $t = $rust;
                Some($e)
            })*
            _ => None,
        }
    };
}
pub(super) use by_type;

/// Integers of all widths, as the macros below need them.
trait Wide: Sized {
    fn high(self, b: Self) -> Self;
}

macro_rules! wide {
    ($($t:ty: $w:ty),*) => {$(
        impl Wide for $t {
            #[inline(always)]
            fn high(self, b: Self) -> Self {
                ((self as $w * b as $w) >> <$t>::BITS) as $t
            }
        }
    )*};
}
wide!(u16: u32, i16: i32, u32: u64, i32: i64, u64: u128, i64: i128);

macro_rules! all_ints {
    ($ty:expr, $t:ident, $e:expr) => {
        by_type!($ty, $t in [U16 => u16, U32 => u32, U64 => u64, S16 => i16, S32 => i32, S64 => i64], $e)
    };
}

/// Both halves of a packed pair of 16-bit integers.
#[inline(always)]
fn pairwise(a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
    f(a as u16, b as u16) as u32 | (f((a >> 16) as u16, (b >> 16) as u16) as u32) << 16
}

fn binary(op: &str, ty: Ty) -> Option<AluFn> {
    match op {
        "add" => by_type!(ty.plain(), T in [U16 => u16, U32 => u32, U64 => u64], alu!(T, T, T; |a, b| a.wrapping_add(b)))
            .or_else(|| {
                by_type!(ty, T in [U16x2 => u32, S16x2 => u32],
                    alu!(T, T, T; |a, b| pairwise(a, b, |x, y| x.wrapping_add(y))))
            }),
        "sub" => by_type!(ty.plain(), T in [U16 => u16, U32 => u32, U64 => u64], alu!(T, T, T; |a, b| a.wrapping_sub(b))),
        "mul.lo" => {
            by_type!(ty.plain(), T in [U16 => u16, U32 => u32, U64 => u64], alu!(T, T, T; |a, b| a.wrapping_mul(b)))
        }
        "mul.hi" => all_ints!(ty, T, alu!(T, T, T; |a, b| a.high(b))),
        "mul.wide" => match ty {
            Ty::U16 => Some(alu!(u32, u16, u16; |a, b| a as u32 * b as u32)),
            Ty::S16 => Some(alu!(i32, i16, i16; |a, b| a as i32 * b as i32)),
            Ty::U32 => Some(alu!(u64, u32, u32; |a, b| a as u64 * b as u64)),
            Ty::S32 => Some(alu!(i64, i32, i32; |a, b| a as i64 * b as i64)),
            _ => None,
        },
        // By zero PTX leaves the quotient open; NVIDIA returns all ones, and the dividend as remainder.
        "div" => all_ints!(ty, T, alu!(T, T, T; |a, b| if b == 0 { !0 } else { a.wrapping_div(b) })),
        "rem" => all_ints!(ty, T, alu!(T, T, T; |a, b| if b == 0 { a } else { a.wrapping_rem(b) })),
        "min" => all_ints!(ty, T, alu!(T, T, T; |a, b| a.min(b))).or_else(|| match ty {
            Ty::U16x2 => Some(alu!(u32, u32, u32; |a, b| pairwise(a, b, |x, y| x.min(y)))),
            Ty::S16x2 => Some(alu!(u32, u32, u32; |a, b| pairwise(a, b, |x, y| (x as i16).min(y as i16) as u16))),
            _ => None,
        }),
        "max" => all_ints!(ty, T, alu!(T, T, T; |a, b| a.max(b))).or_else(|| match ty {
            Ty::U16x2 => Some(alu!(u32, u32, u32; |a, b| pairwise(a, b, |x, y| x.max(y)))),
            Ty::S16x2 => Some(alu!(u32, u32, u32; |a, b| pairwise(a, b, |x, y| (x as i16).max(y as i16) as u16))),
            _ => None,
        }),
        "add.sat" => by_type!(ty, T in [S32 => i32], alu!(T, T, T; |a, b| a.saturating_add(b))),
        "sub.sat" => by_type!(ty, T in [S32 => i32], alu!(T, T, T; |a, b| a.saturating_sub(b))),
        "and" => by_type!(ty, T in [B16 => u16, B32 => u32, B64 => u64], alu!(T, T, T; |a, b| a & b)),
        "or" => by_type!(ty, T in [B16 => u16, B32 => u32, B64 => u64], alu!(T, T, T; |a, b| a | b)),
        "xor" => by_type!(ty, T in [B16 => u16, B32 => u32, B64 => u64], alu!(T, T, T; |a, b| a ^ b)),
        // Shift amounts are 32 bits wide and clamp to the width.
        "shl" => by_type!(ty, T in [B16 => u16, B32 => u32, B64 => u64],
            alu!(T, T, u32; |a, n| if n < T::BITS { a << n } else { 0 })),
        "shr" => by_type!(ty.plain(), T in [U16 => u16, U32 => u32, U64 => u64],
            alu!(T, T, u32; |a, n| if n < T::BITS { a >> n } else { 0 }))
        .filter(|_| !ty.signed())
        .or_else(|| {
            by_type!(ty, T in [S16 => i16, S32 => i32, S64 => i64], alu!(T, T, u32; |a, n| a >> n.min(T::BITS - 1)))
        }),
        _ => None,
    }
}

fn unary(op: &str, ty: Ty) -> Option<AluFn> {
    match op {
        "neg" => by_type!(ty, T in [S16 => i16, S32 => i32, S64 => i64], alu!(T, T; |a| a.wrapping_neg())),
        "abs" => by_type!(ty, T in [S16 => i16, S32 => i32, S64 => i64], alu!(T, T; |a| a.wrapping_abs())),
        "not" => by_type!(ty, T in [B16 => u16, B32 => u32, B64 => u64], alu!(T, T; |a| !a)),
        "cnot" => by_type!(ty, T in [B16 => u16, B32 => u32, B64 => u64], alu!(T, T; |a| (a == 0) as T)),
        "brev" => by_type!(ty, T in [B32 => u32, B64 => u64], alu!(T, T; |a| a.reverse_bits())),
        "popc" => by_type!(ty, T in [B32 => u32, B64 => u64], alu!(u32, T; |a| a.count_ones())),
        "clz" => by_type!(ty, T in [B32 => u32, B64 => u64], alu!(u32, T; |a| a.leading_zeros())),
        "bfind" => match ty {
            Ty::U32 => Some(alu!(u32, u32; |a| bfind(a as u64, 32, false, false))),
            Ty::S32 => Some(alu!(u32, u32; |a| bfind(a as u64, 32, true, false))),
            Ty::U64 => Some(alu!(u32, u64; |a| bfind(a, 64, false, false))),
            Ty::S64 => Some(alu!(u32, u64; |a| bfind(a, 64, true, false))),
            _ => None,
        },
        "bfind.shiftamt" => match ty {
            Ty::U32 => Some(alu!(u32, u32; |a| bfind(a as u64, 32, false, true))),
            Ty::S32 => Some(alu!(u32, u32; |a| bfind(a as u64, 32, true, true))),
            Ty::U64 => Some(alu!(u32, u64; |a| bfind(a, 64, false, true))),
            Ty::S64 => Some(alu!(u32, u64; |a| bfind(a, 64, true, true))),
            _ => None,
        },
        _ => None,
    }
}

fn ternary(op: &str, ty: Ty) -> Option<AluFn> {
    match op {
        "mad.lo" => by_type!(ty.plain(), T in [U16 => u16, U32 => u32, U64 => u64],
            alu!(T, T, T, T; |a, b, c| a.wrapping_mul(b).wrapping_add(c))),
        "mad.hi" => all_ints!(ty, T, alu!(T, T, T, T; |a, b, c| a.high(b).wrapping_add(c))),
        "mad.wide" => match ty {
            Ty::U16 => Some(alu!(u32, u16, u16, u32; |a, b, c| (a as u32 * b as u32).wrapping_add(c))),
            Ty::S16 => Some(alu!(i32, i16, i16, i32; |a, b, c| (a as i32 * b as i32).wrapping_add(c))),
            Ty::U32 => Some(alu!(u64, u32, u32, u64; |a, b, c| (a as u64 * b as u64).wrapping_add(c))),
            Ty::S32 => Some(alu!(i64, i32, i32, i64; |a, b, c| (a as i64 * b as i64).wrapping_add(c))),
            _ => None,
        },
        "sad" => by_type!(ty, T in [U16 => u16, U32 => u32, U64 => u64],
            alu!(T, T, T, T; |a, b, c| c.wrapping_add(a.abs_diff(b))))
        .or_else(|| {
            by_type!(ty, T in [S16 => i16, S32 => i32, S64 => i64],
                alu!(T, T, T, T; |a, b, c| c.wrapping_add(a.abs_diff(b) as T)))
        }),
        _ => None,
    }
}

fn comparison(op: &str, ty: Ty) -> Option<AluFn> {
    if matches!(op, "lo" | "ls" | "hi" | "hs") {
        let signed = match op {
            "lo" => "lt",
            "ls" => "le",
            "hi" => "gt",
            _ => "ge",
        };
        return comparison(signed, ty.plain());
    }
    let ty = if matches!(ty, Ty::B16 | Ty::B32 | Ty::B64) { ty.plain() } else { ty };
    match op {
        "eq" => by_type!(ty.plain(), T in [U16 => u16, U32 => u32, U64 => u64], test!(T; |a, b| a == b)),
        "ne" => by_type!(ty.plain(), T in [U16 => u16, U32 => u32, U64 => u64], test!(T; |a, b| a != b)),
        "lt" => all_ints!(ty, T, test!(T; |a, b| a < b)),
        "le" => all_ints!(ty, T, test!(T; |a, b| a <= b)),
        "gt" => all_ints!(ty, T, test!(T; |a, b| a > b)),
        "ge" => all_ints!(ty, T, test!(T; |a, b| a >= b)),
        _ => None,
    }
}

impl Lower<'_> {
    pub(super) fn alu(&mut self, f: AluFn, args: Args) {
        self.emit_as(Op::Alu(f, args), Undefined::Propagate);
    }

    fn needed(&self, f: Option<AluFn>) -> Lowered<AluFn> {
        f.map_or_else(|| self.bad("no such form"), Ok)
    }

    pub(super) fn alu2(&mut self, f: AluFn, ops: &[Operand], d: Ty, a: Ty, b: Ty) -> Lowered<()> {
        self.arity(ops, 3)?;
        let args = Args {
            a: self.src(&ops[1], a)?,
            b: self.src(&ops[2], b)?,
            d: self.dst(&ops[0], d)?,
            ..Args::default()
        };
        self.alu(f, args);
        Ok(())
    }

    pub(super) fn alu1(&mut self, f: AluFn, ops: &[Operand], d: Ty, a: Ty) -> Lowered<()> {
        self.arity(ops, 2)?;
        let args = Args { a: self.src(&ops[1], a)?, d: self.dst(&ops[0], d)?, ..Args::default() };
        self.alu(f, args);
        Ok(())
    }

    pub(super) fn alu3(&mut self, f: AluFn, ops: &[Operand], d: Ty, [a, b, c]: [Ty; 3]) -> Lowered<()> {
        self.arity(ops, 4)?;
        let args = Args {
            a: self.src(&ops[1], a)?,
            b: self.src(&ops[2], b)?,
            c: self.src(&ops[3], c)?,
            d: self.dst(&ops[0], d)?,
            x: 0,
        };
        self.alu(f, args);
        Ok(())
    }

    /// Integer instructions; false if this is none.
    pub(super) fn integer(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        self.class = Some(Class::Integer);
        match m.base {
            "add" | "sub" | "min" | "max" | "div" | "rem" | "mul" | "mad" | "neg" | "abs" | "mul24"
            | "mad24" | "sad" => {
                // Float types are for another family: look before anything is taken.
                let float = m.opcode.rsplit('.').next().and_then(Ty::parse).is_some_and(Ty::is_float);
                if float {
                    return Ok(false);
                }
                self.integer_arithmetic(m, ops)?;
            }
            "addc" | "subc" | "madc" => self.carry(m, ops)?,
            "and" | "or" | "xor" | "not" if m.opcode.ends_with(".pred") => {
                m.need_ty()?;
                self.predicate_logic(m.base, ops)?;
            }
            "and" | "or" | "xor" => {
                let ty = m.need_ty()?;
                let f = self.needed(binary(m.base, ty))?;
                self.alu2(f, ops, ty, ty, ty)?;
            }
            "shl" | "shr" => {
                let ty = m.need_ty()?;
                let ty = if m.base == "shl" { bits_of(ty) } else { ty };
                let f = self.needed(binary(m.base, ty))?;
                self.alu2(f, ops, ty, ty, Ty::U32)?;
            }
            "not" | "cnot" | "brev" => {
                let ty = m.need_ty()?;
                let f = self.needed(unary(m.base, ty))?;
                self.alu1(f, ops, ty, ty)?;
            }
            "popc" | "clz" => {
                let ty = m.need_ty()?;
                let f = self.needed(unary(m.base, ty))?;
                self.alu1(f, ops, Ty::U32, ty)?;
            }
            "bfind" => {
                let name = if m.take("shiftamt") { "bfind.shiftamt" } else { "bfind" };
                let ty = m.need_ty()?;
                let f = self.needed(unary(name, ty))?;
                self.alu1(f, ops, Ty::U32, ty)?;
            }
            "bfe" => {
                let ty = m.need_ty()?;
                let f = match ty {
                    Ty::U32 => alu!(u32, u32, u32, u32; |a, p, l| bfe(a as u64, p, l, 32, false) as u32),
                    Ty::S32 => alu!(u32, u32, u32, u32; |a, p, l| bfe(a as u64, p, l, 32, true) as u32),
                    Ty::U64 => alu!(u64, u64, u32, u32; |a, p, l| bfe(a, p, l, 64, false)),
                    Ty::S64 => alu!(u64, u64, u32, u32; |a, p, l| bfe(a, p, l, 64, true)),
                    _ => return Err(m.unsupported()),
                };
                self.alu3(f, ops, ty, [ty, Ty::U32, Ty::U32])?;
            }
            "bfi" => self.bit_insert(m, ops)?,
            "prmt" => self.permute(m, ops)?,
            "lop3" => self.lop3(m, ops)?,
            "shf" => {
                let f = match (m.one_of(&["l", "r"]), m.one_of(&["wrap", "clamp"])) {
                    (Some("l"), Some("wrap")) => alu!(u32, u32, u32, u32; |a, b, n| shf(a, b, n, true, true)),
                    (Some("l"), Some("clamp")) => {
                        alu!(u32, u32, u32, u32; |a, b, n| shf(a, b, n, true, false))
                    }
                    (Some("r"), Some("wrap")) => {
                        alu!(u32, u32, u32, u32; |a, b, n| shf(a, b, n, false, true))
                    }
                    (Some("r"), Some("clamp")) => {
                        alu!(u32, u32, u32, u32; |a, b, n| shf(a, b, n, false, false))
                    }
                    _ => return Err(m.unsupported()),
                };
                let ty = m.need_ty()?;
                self.alu3(f, ops, ty, [ty, ty, Ty::U32])?;
            }
            "dp4a" => {
                let (a, b) = (m.need_ty()?, m.need_ty()?);
                let f = match (a.signed(), b.signed()) {
                    (true, true) => alu!(u32, u32, u32, u32; |a, b, c| dp4a(a, b, c, true, true)),
                    (true, false) => alu!(u32, u32, u32, u32; |a, b, c| dp4a(a, b, c, true, false)),
                    (false, true) => alu!(u32, u32, u32, u32; |a, b, c| dp4a(a, b, c, false, true)),
                    (false, false) => alu!(u32, u32, u32, u32; |a, b, c| dp4a(a, b, c, false, false)),
                };
                self.alu3(f, ops, Ty::U32, [Ty::U32; 3])?;
            }
            "setp" | "set" => return self.compare_integers(m, ops),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn integer_arithmetic(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        if m.take("cc") {
            return self.carry_out(m, ops);
        }
        let part = m.one_of(&["lo", "hi", "wide"]);
        let (sat, relu) = (m.take("sat"), m.take("relu"));
        let ty = m.need_ty()?;
        let base = m.base.trim_end_matches("24");
        let name = match (part, sat) {
            (Some(part), false) => format!("{base}.{part}"),
            (None, true) => format!("{base}.sat"),
            (None, false) => base.to_string(),
            _ => return Err(m.unsupported()),
        };
        if relu || base != m.base {
            return Err(m.unsupported());
        }
        let wide = if part == Some("wide") { double_width(ty) } else { ty };
        if let Some(f) = binary(&name, ty) {
            self.alu2(f, ops, wide, ty, ty)
        } else if let Some(f) = ternary(&name, ty) {
            self.alu3(f, ops, wide, [ty, ty, wide])
        } else if let Some(f) = unary(&name, ty) {
            self.alu1(f, ops, ty, ty)
        } else {
            Err(m.unsupported())
        }
    }

    fn bit_insert(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.arity(ops, 5)?;
        let ty = m.need_ty()?;
        // Position and length share one row: the length is a step of its own.
        let packed = {
            let (a, b) = (self.src(&ops[3], Ty::U32)?, self.src(&ops[4], Ty::U32)?);
            let d = self.temp_dest(Ty::U32).row;
            self.alu(
                alu!(u32, u32, u32; |pos, len| (pos & 0xff) | (len & 0xff) << 8),
                Args { d, a, b, ..Args::default() },
            );
            d
        };
        self.uses.push(crate::program::Reg { file: crate::program::File::R32, row: packed, bits: 32 });
        let f = match ty {
            Ty::B32 => {
                alu!(u32, u32, u32, u32; |a, b, p| bfi(a as u64, b as u64, p & 0xff, p >> 8, 32) as u32)
            }
            Ty::B64 => alu!(u64, u64, u64, u32; |a, b, p| bfi(a, b, p & 0xff, p >> 8, 64)),
            _ => return Err(m.unsupported()),
        };
        let args = Args {
            a: self.src(&ops[1], ty)?,
            b: self.src(&ops[2], ty)?,
            c: packed,
            d: self.dst(&ops[0], ty)?,
            x: 0,
        };
        self.alu(f, args);
        Ok(())
    }

    fn permute(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        let ty = m.need_ty()?;
        let f = match m.one_of(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]) {
            None => alu!(u32, u32, u32, u32; |a, b, s| prmt(a, b, s)),
            Some("f4e") => alu!(u32, u32, u32, u32; |a, b, s| prmt_mode(a, b, s, PrmtMode::F4e)),
            Some("b4e") => alu!(u32, u32, u32, u32; |a, b, s| prmt_mode(a, b, s, PrmtMode::B4e)),
            Some("rc8") => alu!(u32, u32, u32, u32; |a, b, s| prmt_mode(a, b, s, PrmtMode::Rc8)),
            Some("ecl") => alu!(u32, u32, u32, u32; |a, b, s| prmt_mode(a, b, s, PrmtMode::Ecl)),
            Some("ecr") => alu!(u32, u32, u32, u32; |a, b, s| prmt_mode(a, b, s, PrmtMode::Ecr)),
            Some(_) => alu!(u32, u32, u32, u32; |a, b, s| prmt_mode(a, b, s, PrmtMode::Rc16)),
        };
        self.alu3(f, ops, ty, [ty, ty, Ty::U32])
    }

    fn lop3(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.arity(ops, 5)?;
        let ty = m.need_ty()?;
        let Operand::Int(table) = ops[4] else {
            return self.bad("a table known at load is wanted");
        };
        #[inline(always)]
        fn body(regs: &mut crate::ops::lanes::Regs, x: &Args, mask: u32) {
            let table = x.x;
            crate::ops::lanes::map3::<u32, u32, u32, u32>(regs, x, mask, |a, b, c| lop3(a, b, c, table))
        }
        let args = Args {
            a: self.src(&ops[1], ty)?,
            b: self.src(&ops[2], ty)?,
            c: self.src(&ops[3], ty)?,
            d: self.dst(&ops[0], ty)?,
            x: table as u32 & 0xff,
        };
        // The common tables get loops of their own.
        let f = match args.x {
            0x80 => alu!(u32, u32, u32, u32; |a, b, c| a & b & c),
            0xfe => alu!(u32, u32, u32, u32; |a, b, c| a | b | c),
            0x96 => alu!(u32, u32, u32, u32; |a, b, c| a ^ b ^ c),
            0xea => alu!(u32, u32, u32, u32; |a, b, c| (a & b) | c),
            0xe2 => alu!(u32, u32, u32, u32; |a, b, c| (a & b) | (c & !b)),
            0xf8 => alu!(u32, u32, u32, u32; |a, b, c| a | (b & c)),
            0x6a => alu!(u32, u32, u32, u32; |a, b, c| (a & b) ^ c),
            _ => pick!(body),
        };
        self.alu(f, args);
        Ok(())
    }

    fn carry_out(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        let part = m.one_of(&["lo", "hi"]);
        let ty = m.need_ty()?.plain();
        match (m.base, part) {
            ("add" | "sub", None) => {
                self.arity(ops, 3)?;
                self.add_with_carry(m, [&ops[1], &ops[2]], &ops[0], ty, m.base == "sub", false, true)
            }
            ("mad", Some(part)) => self.multiply_carry(m, ops, ty, part, false, true),
            _ => Err(m.unsupported()),
        }
    }

    fn carry(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        let cc = m.take("cc");
        let part = m.one_of(&["lo", "hi"]);
        let ty = m.need_ty()?.plain();
        match (m.base, part) {
            ("addc" | "subc", None) => {
                self.arity(ops, 3)?;
                self.add_with_carry(m, [&ops[1], &ops[2]], &ops[0], ty, m.base == "subc", true, cc)
            }
            ("madc", Some(part)) => self.multiply_carry(m, ops, ty, part, true, cc),
            _ => Err(m.unsupported()),
        }
    }

    fn multiply_carry(
        &mut self,
        m: &mut Mods,
        ops: &[Operand],
        ty: Ty,
        part: &str,
        carry_in: bool,
        cc: bool,
    ) -> Lowered<()> {
        self.arity(ops, 4)?;
        let f = self.needed(binary(&format!("mul.{part}"), ty))?;
        let (a, b) = (self.src(&ops[1], ty)?, self.src(&ops[2], ty)?);
        let product = self.temp_dest(ty);
        self.alu(f, Args { d: product.row, a, b, ..Args::default() });
        let c = self.src(&ops[3], ty)?;
        self.uses.push(product);
        self.sum(m, [product.row, c], &ops[0], ty, false, carry_in, cc)
    }

    #[allow(clippy::too_many_arguments)]
    fn add_with_carry(
        &mut self,
        m: &Mods,
        [a, b]: [&Operand; 2],
        d: &Operand,
        ty: Ty,
        subtract: bool,
        carry_in: bool,
        cc: bool,
    ) -> Lowered<()> {
        let rows = [self.src(a, ty)?, self.src(b, ty)?];
        self.sum(m, rows, d, ty, subtract, carry_in, cc)
    }

    /// `d = a ± b ± carry`; the carry (or borrow) goes to its predicate row if `cc`.
    #[allow(clippy::too_many_arguments)]
    fn sum(
        &mut self,
        m: &Mods,
        [a, b]: [u16; 2],
        d: &Operand,
        ty: Ty,
        subtract: bool,
        carry_in: bool,
        cc: bool,
    ) -> Lowered<()> {
        if self.guard.0 != crate::program::ALWAYS && cc {
            return self.bad("a guarded instruction that sets the carry");
        }
        macro_rules! with_carry {
            ($t:ty, $wide:ty) => {{
                #[inline(always)]
                fn body(regs: &mut crate::ops::lanes::Regs, x: &Args, mask: u32) {
                    use crate::ops::lanes::Lane;
                    let (subtract, use_carry, cc) = (x.x & 1 != 0, x.x & 2 != 0, x.x & 4 != 0);
                    let a = <$t>::rows(regs)[x.a as usize];
                    let b = <$t>::rows(regs)[x.b as usize];
                    let carry = if use_carry { regs.pred[CARRY as usize] } else { 0 };
                    let mut out = 0u32;
                    let d = &mut <$t>::rows_mut(regs)[x.d as usize];
                    for i in 0..32 {
                        let c = (carry >> i & 1) as $wide;
                        let (a, b) = (a[i] as $wide, b[i] as $wide);
                        let sum = if subtract { a.wrapping_sub(b).wrapping_sub(c) } else { a + b + c };
                        out |= ((sum >> <$t>::BITS & 1) as u32) << i;
                        if mask >> i & 1 == 1 {
                            d[i] = sum as $t;
                        }
                    }
                    if cc {
                        let p = &mut regs.pred[CARRY as usize];
                        *p = *p & !mask | out & mask;
                    }
                }
                pick!(body)
            }};
        }
        let f = match ty {
            Ty::U32 => with_carry!(u32, u64),
            Ty::U64 => with_carry!(u64, u128),
            _ => return Err(m.unsupported()),
        };
        let d = self.dst(d, ty)?;
        let x = subtract as u32 | (carry_in as u32) << 1 | (cc as u32) << 2;
        self.alu(f, Args { d, a, b, c: 0, x });
        Ok(())
    }

    fn compare_integers(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        let last = m.opcode.rsplit('.').next().and_then(Ty::parse);
        let Some(ty) = last.filter(|t| !t.is_float()) else { return Ok(false) };
        self.class = Some(Class::Predicate);
        let Some(name) = m.one_of(&["eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"]) else {
            return Err(m.unsupported());
        };
        let f = self.needed(comparison(name, ty))?;
        self.compare(m, ops, f, ty, false)?;
        Ok(true)
    }
}

/// The untyped type of the same width.
fn bits_of(ty: Ty) -> Ty {
    match ty.bits() {
        16 => Ty::B16,
        64 => Ty::B64,
        _ => Ty::B32,
    }
}

fn double_width(ty: Ty) -> Ty {
    match ty {
        Ty::U16 => Ty::U32,
        Ty::S16 => Ty::S32,
        Ty::U32 => Ty::U64,
        _ => Ty::S64,
    }
}
