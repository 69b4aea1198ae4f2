//! `cvt`: between integers and floats of every width, in every rounding mode.

use super::float::{After, modes};
use super::integer::by_type;
use super::mods::{Mods, Ty};
use super::{Lower, Lowered};
use crate::counters::Class;
use crate::ops::half::{Bf16, F16, Half, Two};
use crate::ops::lanes::{AluFn, Args, Row, alu};
use crate::ops::round::{self, Mode, canon, encode, odd, to_f32};
use crate::parse::ast::Operand;
use crate::program::Reg;

/// Integer to integer: extends by the type of the source, cuts to that of the destination.
fn int_to_int(to: Ty, from: Ty) -> Option<AluFn> {
    macro_rules! from {
        ($s:ty) => {
            by_type!(to, D in [U8 => u8, S8 => i8, U16 => u16, S16 => i16, U32 => u32, S32 => i32, U64 => u64, S64 => i64],
                alu!(D, $s; |a| a as D))
        };
    }
    match from {
        Ty::U8 => from!(u8),
        Ty::S8 => from!(i8),
        Ty::U16 => from!(u16),
        Ty::S16 => from!(i16),
        Ty::U32 => from!(u32),
        Ty::S32 => from!(i32),
        Ty::U64 => from!(u64),
        Ty::S64 => from!(i64),
        _ => None,
    }
}

/// The same, clamped to the range of the destination.
fn int_to_int_sat(to: Ty, from: Ty) -> Option<AluFn> {
    macro_rules! from {
        ($s:ty) => {
            by_type!(to, D in [U8 => u8, S8 => i8, U16 => u16, S16 => i16, U32 => u32, S32 => i32, U64 => u64, S64 => i64],
                alu!(D, $s; |a| (a as i128).clamp(D::MIN as i128, D::MAX as i128) as D))
        };
    }
    match from {
        Ty::U8 => from!(u8),
        Ty::S8 => from!(i8),
        Ty::U16 => from!(u16),
        Ty::S16 => from!(i16),
        Ty::U32 => from!(u32),
        Ty::S32 => from!(i32),
        Ty::U64 => from!(u64),
        Ty::S64 => from!(i64),
        _ => None,
    }
}

/// Integral float to integer, clamped; NaN gives 0, but the lowest value where 64 bits are on either side.
fn float_to_int(to: Ty, from: Ty) -> Option<AluFn> {
    match from {
        Ty::F32 => match to {
            Ty::S64 => Some(alu!(i64, f32; |a| if a.is_nan() { i64::MIN } else { a as i64 })),
            Ty::U64 => Some(alu!(u64, f32; |a| if a.is_nan() { 1 << 63 } else { a as u64 })),
            _ => by_type!(to, D in [U8 => u8, S8 => i8, U16 => u16, S16 => i16, U32 => u32, S32 => i32],
                alu!(D, f32; |a| a as D)),
        },
        Ty::F64 => {
            by_type!(to, D in [U8 => u8, S8 => i8, U16 => u16, S16 => i16, U32 => u32, S32 => i32, U64 => u64, S64 => i64],
                alu!(D, f64; |a| if a.is_nan() { (1 as D) << (D::BITS - 1) } else { a as D }))
        }
        _ => None,
    }
}

/// An integer as f64 rounded to odd.
fn odd_int(a: i128) -> f64 {
    let value = a as f64;
    odd(value, (a - value as i128) as f64)
}

fn int_to_float(to: Ty, from: Ty, mode: Mode) -> Option<AluFn> {
    macro_rules! from {
        ($s:ty) => {
            match (to, mode) {
                (Ty::F32, Mode::Nearest) => Some(alu!(f32, $s; |a| a as f32)),
                (Ty::F32, _) => Some(modes!(mode, R, alu!(f32, $s; |a| to_f32(odd_int(a as i128), R)))),
                (Ty::F64, Mode::Nearest) => Some(alu!(f64, $s; |a| a as f64)),
                (Ty::F64, _) => Some(modes!(mode, R, alu!(f64, $s; |a| {
                    let v = a as f64;
                    round::directed(v, (a as i128 - v as i128) as f64, R)
                }))),
                (Ty::F16, _) => {
                    Some(modes!(mode, R, alu!(u16, $s; |a| encode(odd_int(a as i128), round::F16, R) as u16)))
                }
                (Ty::Bf16, _) => {
                    Some(modes!(mode, R, alu!(u16, $s; |a| encode(odd_int(a as i128), round::BF16, R) as u16)))
                }
                _ => None,
            }
        };
    }
    match from {
        Ty::U8 => from!(u8),
        Ty::S8 => from!(i8),
        Ty::U16 => from!(u16),
        Ty::S16 => from!(i16),
        Ty::U32 => from!(u32),
        Ty::S32 => from!(i32),
        Ty::U64 => from!(u64),
        Ty::S64 => from!(i64),
        _ => None,
    }
}

/// Nearest-even rounding to bf16 in bits, which every quantiser does for every element.
#[inline(always)]
fn bf16_nearest(a: f32) -> u16 {
    let bits = a.to_bits();
    if a.is_nan() { 0x7fff } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

/// The format of a float type, for the generic roundings.
macro_rules! float_to_float {
    ($to:expr, $s:ty, $mode:expr) => {
        match ($to, $mode) {
            (Ty::F32, _) => Some(modes!($mode, R, alu!(f32, $s; |a| canon(to_f32(a.f64(), R))))),
            (Ty::F64, _) => Some(alu!(f64, $s; |a| crate::ops::float::canon64(a.f64()))),
            (Ty::F16, _) => Some(modes!($mode, R, alu!(u16, $s; |a| encode(a.f64(), round::F16, R) as u16))),
            (Ty::Bf16, _) => Some(modes!($mode, R, alu!(u16, $s; |a| encode(a.f64(), round::BF16, R) as u16))),
            _ => None,
        }
    };
}

/// Any float as f64, so that one macro serves them all.
trait Widen {
    fn f64(self) -> f64;
}
impl Widen for f32 {
    #[inline(always)]
    fn f64(self) -> f64 {
        self as f64
    }
}
impl Widen for f64 {
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
}

fn float_to_float(to: Ty, from: Ty, mode: Mode) -> Option<AluFn> {
    match (to, from) {
        (Ty::F32, Ty::F32) => Some(alu!(f32, f32; |a| canon(a))),
        (Ty::F32, Ty::F16) => Some(alu!(f32, F16; |a| canon(Half::f32(a)))),
        (Ty::F32, Ty::Bf16) => Some(alu!(f32, Bf16; |a| canon(Half::f32(a)))),
        (Ty::Bf16, Ty::F32) if mode == Mode::Nearest => Some(alu!(u16, f32; |a| bf16_nearest(a))),
        (Ty::F64, Ty::F64) => Some(alu!(f64, f64; |a| a)),
        (Ty::F16, Ty::F16) | (Ty::Bf16, Ty::Bf16) => Some(alu!(u16, u16; |a| a)),
        (_, Ty::F32) => float_to_float!(to, f32, mode),
        (_, Ty::F64) => float_to_float!(to, f64, mode),
        (_, Ty::F16) => float_to_float!(to, F16, mode),
        (_, Ty::Bf16) => float_to_float!(to, Bf16, mode),
        _ => None,
    }
}

/// f32 to f8 bits, saturating to the largest finite value; NaN stays.
fn to_f8(a: f32, format: round::Format) -> u32 {
    let bits = encode(a as f64, format, Mode::Nearest);
    let limit = if format.infinity { 0x7b } else { 0x7e };
    if !a.is_nan() && bits & 0x7f > limit { bits & 0x80 | limit } else { bits }
}

impl Lower<'_> {
    /// `cvt`; false if it is another instruction.
    pub(super) fn convert(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        if m.base != "cvt" {
            return Ok(false);
        }
        self.class = Some(Class::Convert);
        if m.take("pack") {
            self.convert_pack(m, ops)?;
            return Ok(true);
        }
        let integral = m.integer_rounding();
        let mode = m.rounding();
        let (ftz, saturate, relu) = (m.take("ftz"), m.take("sat"), m.take("relu"));
        let finite = m.take("satfinite");
        let (to, from) = (m.need_ty()?, m.need_ty()?);
        if matches!(to, Ty::F16x2 | Ty::Bf16x2 | Ty::E4m3x2 | Ty::E5m2x2)
            || from == Ty::E4m3x2
            || from == Ty::E5m2x2
        {
            self.convert_pair(m, ops, to, from, mode.unwrap_or(Mode::Nearest), relu, finite)?;
            return Ok(true);
        }
        self.arity(ops, 2)?;
        if finite && to != Ty::Tf32 {
            return Err(m.unsupported());
        }
        if to == Ty::Tf32 {
            self.convert_tf32(ops, mode, relu, finite)?;
            return Ok(true);
        }
        let flush_source = ftz && from == Ty::F32;
        let unsupported = || crate::LoadError::unsupported(m.line, m.opcode);
        match (to.is_float(), from.is_float()) {
            (false, false) => {
                let f = if saturate { int_to_int_sat(to, from) } else { int_to_int(to, from) };
                let a = self.any_source(&ops[1], from)?;
                self.convert_step(f.ok_or_else(unsupported)?, a, &ops[0], to, from)?;
            }
            (false, true) => self.convert_to_int(m, ops, to, from, integral, flush_source)?,
            (true, false) => {
                let f = int_to_float(to, from, mode.unwrap_or(Mode::Nearest)).ok_or_else(unsupported)?;
                let after = After { saturate, relu, ..After::default() };
                let a = self.any_source(&ops[1], from)?;
                let a = self.narrowed(a, from);
                let d = self.before(&ops[0], to, after)?;
                self.alu(f, Args { d: d.row, a, ..Args::default() });
                self.after(&ops[0], to, after, d)?;
            }
            (true, true) => {
                let f = match integral {
                    Some(mode) if to == from => match Self::round_integral_fn(to, mode) {
                        Some(f) => Some(f),
                        None => Self::half_integral_fn(to, mode),
                    },
                    Some(_) => None,
                    None => float_to_float(to, from, mode.unwrap_or(Mode::Nearest)),
                };
                let after = After { flush: ftz && to == Ty::F32, saturate, relu };
                let a = self.float_src(&ops[1], from, flush_source)?;
                let d = self.before(&ops[0], to, after)?;
                self.alu(f.ok_or_else(unsupported)?, Args { d: d.row, a, ..Args::default() });
                self.after(&ops[0], to, after, d)?;
            }
        }
        Ok(true)
    }

    fn half_integral_fn(ty: Ty, mode: Mode) -> Option<AluFn> {
        match ty {
            Ty::F16 => Some(modes!(mode, R, alu!(F16, F16; |a| a.map(|v| round::integral(v, R))))),
            Ty::Bf16 => Some(modes!(mode, R, alu!(Bf16, Bf16; |a| a.map(|v| round::integral(v, R))))),
            _ => None,
        }
    }

    /// A source in a 64-bit row for a narrower integer type: cut first.
    fn narrowed(&mut self, a: Reg, from: Ty) -> Row {
        if a.file == crate::program::File::R64 && from.bits() < 64 {
            let t = self.temp_dest(Ty::U32);
            self.alu(alu!(u32, u64; |a| a as u32), Args { d: t.row, a: a.row, ..Args::default() });
            self.uses.push(t);
            return t.row;
        }
        a.row
    }

    /// A conversion to an integer, sign- or zero-extended to the register it goes to, if that is wider.
    fn convert_step(&mut self, f: AluFn, a: Reg, to: &Operand, ty: Ty, from: Ty) -> Lowered<()> {
        let a = self.narrowed(a, from);
        let uses = std::mem::take(&mut self.uses);
        let Some(d) = self.any_dest(to, ty)? else { return self.bad("a destination is wanted") };
        self.defs.clear();
        self.uses = uses;
        if d.bits == ty.bits() {
            self.defs.push(d);
            self.alu(f, Args { d: d.row, a, ..Args::default() });
            return Ok(());
        }
        let t = self.temp_dest(ty);
        self.alu(f, Args { d: t.row, a, ..Args::default() });
        let wide = match (d.bits, ty.signed()) {
            (16, true) => Ty::S16,
            (16, false) => Ty::U16,
            (32, true) => Ty::S32,
            (32, false) => Ty::U32,
            (_, true) => Ty::S64,
            (_, false) => Ty::U64,
        };
        let Some(extend) = int_to_int(wide, ty) else { return self.bad("no such extension") };
        self.uses.push(t);
        self.defs.push(d);
        self.alu(extend, Args { d: d.row, a: t.row, ..Args::default() });
        Ok(())
    }

    fn convert_to_int(
        &mut self,
        m: &Mods,
        ops: &[Operand],
        to: Ty,
        from: Ty,
        integral: Option<Mode>,
        flush: bool,
    ) -> Lowered<()> {
        let mut row = self.float_src(&ops[1], from, flush)?;
        let mut from = from;
        if matches!(from, Ty::F16 | Ty::Bf16) {
            let t = self.temp_dest(Ty::F32);
            let Some(f) = float_to_float(Ty::F32, from, Mode::Nearest) else { return Err(m.unsupported()) };
            self.alu(f, Args { d: t.row, a: row, ..Args::default() });
            self.uses.push(t);
            (row, from) = (t.row, Ty::F32);
        }
        let Some(mode) = integral else { return Err(m.unsupported()) };
        if mode != Mode::Zero {
            let t = self.temp_dest(from);
            let Some(f) = Self::round_integral_fn(from, mode) else { return Err(m.unsupported()) };
            self.alu(f, Args { d: t.row, a: row, ..Args::default() });
            self.uses.push(t);
            row = t.row;
        }
        let Some(f) = float_to_int(to, from) else { return Err(m.unsupported()) };
        let source = Reg { file: crate::program::File::R32, row, bits: 32 };
        self.convert_step(f, source, &ops[0], to, from)
    }

    /// To tf32: `.rna` rounds ties away, `.rn` to even, `.rz` cuts.
    fn convert_tf32(&mut self, ops: &[Operand], mode: Option<Mode>, relu: bool, finite: bool) -> Lowered<()> {
        const TF32: round::Format = round::Format { exponent: 8, mantissa: 10, infinity: true };
        if finite {
            return self.bad("`.satfinite` to tf32 is not supported");
        }
        let mode = mode.unwrap_or(Mode::Away);
        let f = modes!(
            mode,
            R,
            alu!(f32, f32; |a| {
                if a.is_nan() { canon(a) } else { f32::from_bits(encode(a as f64, TF32, R) << 13) }
            })
        );
        let after = After { relu, ..After::default() };
        let a = self.src(&ops[1], Ty::F32)?;
        let d = self.before(&ops[0], Ty::F32, after)?;
        self.alu(f, Args { d: d.row, a, ..Args::default() });
        self.after(&ops[0], Ty::F32, after, d)
    }

    /// `cvt.rn.bf16x2.f32 d, a, b`: `a` goes to the high half. Also to and from pairs of f8.
    #[allow(clippy::too_many_arguments)]
    fn convert_pair(
        &mut self,
        m: &Mods,
        ops: &[Operand],
        to: Ty,
        from: Ty,
        mode: Mode,
        relu: bool,
        finite: bool,
    ) -> Lowered<()> {
        let after = After { relu, ..After::default() };
        let f = match (to, from) {
            (Ty::Bf16x2, Ty::F32) if mode == Mode::Nearest => {
                alu!(u32, f32, f32; |a, b| (bf16_nearest(a) as u32) << 16 | bf16_nearest(b) as u32)
            }
            (Ty::Bf16x2, Ty::F32) => modes!(
                mode,
                R,
                alu!(u32, f32, f32; |a, b| {
                    encode(a as f64, round::BF16, R) << 16 | encode(b as f64, round::BF16, R)
                })
            ),
            (Ty::F16x2, Ty::F32) => modes!(
                mode,
                R,
                alu!(u32, f32, f32; |a, b| {
                    encode(a as f64, round::F16, R) << 16 | encode(b as f64, round::F16, R)
                })
            ),
            (Ty::E4m3x2, Ty::F32) => {
                alu!(u16, f32, f32; |a, b| (to_f8(a, round::E4M3) << 8 | to_f8(b, round::E4M3)) as u16)
            }
            (Ty::E5m2x2, Ty::F32) => {
                alu!(u16, f32, f32; |a, b| (to_f8(a, round::E5M2) << 8 | to_f8(b, round::E5M2)) as u16)
            }
            (Ty::F16x2, Ty::E4m3x2) => {
                return self.alu1(
                    alu!(Two<F16>, u16; |a| Two(
                        F16::round(round::decode(a as u32 & 0xff, round::E4M3)),
                        F16::round(round::decode(a as u32 >> 8, round::E4M3)),
                    )),
                    ops,
                    Ty::B32,
                    Ty::B16,
                );
            }
            (Ty::F16x2, Ty::E5m2x2) => {
                return self.alu1(
                    alu!(Two<F16>, u16; |a| Two(
                        F16::round(round::decode(a as u32 & 0xff, round::E5M2)),
                        F16::round(round::decode(a as u32 >> 8, round::E5M2)),
                    )),
                    ops,
                    Ty::B32,
                    Ty::B16,
                );
            }
            _ => return Err(m.unsupported()),
        };
        if finite != matches!(to, Ty::E4m3x2 | Ty::E5m2x2) || relu && finite {
            return Err(m.unsupported());
        }
        self.arity(ops, 3)?;
        let (a, b) = (self.src(&ops[1], Ty::F32)?, self.src(&ops[2], Ty::F32)?);
        let d = self.before(&ops[0], to, after)?;
        self.alu(f, Args { d: d.row, a, b, ..Args::default() });
        self.after(&ops[0], to, after, d)
    }

    /// `cvt.pack.sat.s16/u16.s32`: two clamped values in one register.
    fn convert_pack(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        m.take("sat");
        let (to, from) = (m.need_ty()?, m.need_ty()?);
        let clamp = match (to, from) {
            (Ty::S16, Ty::S32) => alu!(u32, i32, i32; |a, b| {
                let c = |v: i32| v.clamp(-32768, 32767) as u16 as u32;
                c(a) << 16 | c(b)
            }),
            (Ty::U16, Ty::S32) => alu!(u32, i32, i32; |a, b| {
                let c = |v: i32| v.clamp(0, 65535) as u32;
                c(a) << 16 | c(b)
            }),
            _ => return Err(m.unsupported()),
        };
        self.alu2(clamp, ops, Ty::U32, Ty::S32, Ty::S32)
    }
}
