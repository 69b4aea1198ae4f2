//! The read-modify-write functions of `atom` and `red`.

use super::half::{Bf16, F16, Half};
use super::round::canon;

/// New value from the old one and the operands, all zero-extended.
pub(crate) type AtomicOp = fn(old: u64, a: u64, b: u64) -> u64;

fn pair<H: Half>(old: u64, a: u64, f: impl Fn(H, H) -> H) -> u64 {
    let half = |v: u64, shift: u32| H::of((v >> shift) as u16);
    let (low, high) = (f(half(old, 0), half(a, 0)), f(half(old, 16), half(a, 16)));
    low.bits() as u64 | (high.bits() as u64) << 16
}

fn one<H: Half>(old: u64, a: u64, f: impl Fn(H, H) -> H) -> u64 {
    f(H::of(old as u16), H::of(a as u16)).bits() as u64
}

fn add_f32(old: u64, a: u64) -> u64 {
    canon(f32::from_bits(old as u32) + f32::from_bits(a as u32)).to_bits() as u64
}

/// The function for an operation and a type, both as written in PTX.
pub(crate) fn lookup(op: &str, ty: &str) -> Option<AtomicOp> {
    Some(match (op, ty) {
        ("add", "u32" | "s32") => |old, a, _| (old as u32).wrapping_add(a as u32) as u64,
        ("add", "u64" | "s64") => |old, a, _| old.wrapping_add(a),
        ("add", "f32") => |old, a, _| add_f32(old, a),
        ("add", "f64") => |old, a, _| (f64::from_bits(old) + f64::from_bits(a)).to_bits(),
        ("add", "f16") => |old, a, _| one::<F16>(old, a, |x, y| x.add(y)),
        ("add", "bf16") => |old, a, _| one::<Bf16>(old, a, |x, y| x.add(y)),
        ("add", "f16x2") => |old, a, _| pair::<F16>(old, a, |x, y| x.add(y)),
        ("add", "bf16x2") => |old, a, _| pair::<Bf16>(old, a, |x, y| x.add(y)),
        ("min", "u32") => |old, a, _| (old as u32).min(a as u32) as u64,
        ("max", "u32") => |old, a, _| (old as u32).max(a as u32) as u64,
        ("min", "s32") => |old, a, _| (old as i32).min(a as i32) as u32 as u64,
        ("max", "s32") => |old, a, _| (old as i32).max(a as i32) as u32 as u64,
        ("min", "u64") => |old, a, _| old.min(a),
        ("max", "u64") => |old, a, _| old.max(a),
        ("min", "s64") => |old, a, _| (old as i64).min(a as i64) as u64,
        ("max", "s64") => |old, a, _| (old as i64).max(a as i64) as u64,
        ("and", _) => |old, a, _| old & a,
        ("or", _) => |old, a, _| old | a,
        ("xor", _) => |old, a, _| old ^ a,
        ("exch", _) => |_, a, _| a,
        ("cas", _) => |old, a, b| if old == a { b } else { old },
        ("inc", "u32") => |old, a, _| if old >= a { 0 } else { old + 1 },
        ("dec", "u32") => |old, a, _| if old == 0 || old > a { a } else { old - 1 },
        _ => return None,
    })
}
