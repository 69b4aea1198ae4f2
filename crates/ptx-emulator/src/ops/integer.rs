//! Integer operations that Rust has no operator for, as PTX defines them.

/// `prmt.b32` in its default mode.
#[inline(always)]
pub(crate) fn prmt(a: u32, b: u32, selector: u32) -> u32 {
    let pool = a as u64 | (b as u64) << 32;
    let mut out = 0;
    for i in 0..4 {
        let nibble = selector >> (4 * i) & 15;
        let byte = (pool >> (8 * (nibble & 7))) as u8;
        let byte = if nibble & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
        out |= (byte as u32) << (8 * i);
    }
    out
}

/// The other modes of `prmt`: bytes picked by the two low bits of the selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrmtMode {
    F4e,
    B4e,
    Rc8,
    Ecl,
    Ecr,
    Rc16,
}

pub(crate) fn prmt_mode(a: u32, b: u32, selector: u32, mode: PrmtMode) -> u32 {
    let s = (selector & 3) as usize;
    let pick: [usize; 4] = match mode {
        PrmtMode::F4e => [s, s + 1, s + 2, s + 3],
        PrmtMode::B4e => [s, (s + 7) % 8, (s + 6) % 8, (s + 5) % 8],
        PrmtMode::Rc8 => [s; 4],
        PrmtMode::Ecl => [s, s.max(1), s.max(2), 3],
        PrmtMode::Ecr => [0, s.min(1), s.min(2), s],
        PrmtMode::Rc16 => [s % 2 * 2, s % 2 * 2 + 1, s % 2 * 2, s % 2 * 2 + 1],
    };
    let pool = a as u64 | (b as u64) << 32;
    (0..4).fold(0, |out, i| out | ((pool >> (8 * pick[i])) as u8 as u32) << (8 * i))
}

/// `lop3.b32`: any function of three bits, given by its truth table.
#[inline(always)]
pub(crate) fn lop3(a: u32, b: u32, c: u32, table: u32) -> u32 {
    let mut out = 0;
    for i in 0..8 {
        let pick = |v: u32, bit: u32| if i >> bit & 1 == 1 { v } else { !v };
        let keep = if table >> i & 1 == 1 { u32::MAX } else { 0 };
        out |= keep & pick(a, 2) & pick(b, 1) & pick(c, 0);
    }
    out
}

/// `bfe`: `len` bits from `pos`, sign-extended from the last bit taken if `signed`.
#[inline(always)]
pub(crate) fn bfe(a: u64, pos: u32, len: u32, width: u32, signed: bool) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let msb = width - 1;
    let sign = if !signed || len == 0 { 0 } else { a >> (pos + len - 1).min(msb) & 1 };
    let fill = if sign == 1 { u64::MAX } else { 0 };
    let taken = if pos > msb { 0 } else { (a & (u64::MAX >> (63 - msb))) >> pos };
    let kept = len.min(width.saturating_sub(pos));
    let mask = if kept == 0 { 0 } else { u64::MAX >> (64 - kept) };
    taken & mask | fill & !mask
}

/// `bfi`: the low `len` bits of `a` inserted in `b` at `pos`.
#[inline(always)]
pub(crate) fn bfi(a: u64, b: u64, pos: u32, len: u32, width: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    if len == 0 || pos >= width {
        return b;
    }
    let mask = (u64::MAX >> (64 - len.min(64))) << pos;
    b & !mask | a << pos & mask
}

/// `bfind`: position of the highest bit that is set (for negative signed values: clear), or all ones.
pub(crate) fn bfind(a: u64, width: u32, signed: bool, shift_amount: bool) -> u32 {
    let value = if signed && a >> (width - 1) & 1 == 1 { !a & (u64::MAX >> (64 - width)) } else { a };
    if value == 0 {
        return u32::MAX;
    }
    let position = 63 - value.leading_zeros();
    if shift_amount { width - 1 - position } else { position }
}

/// `dp4a`: products of the bytes of two words, added to `c`.
pub(crate) fn dp4a(a: u32, b: u32, c: u32, a_signed: bool, b_signed: bool) -> u32 {
    let byte = |v: u32, i: u32, signed: bool| {
        let byte = (v >> (8 * i)) as u8;
        if signed { byte as i8 as i32 } else { byte as i32 }
    };
    (0..4).fold(c, |sum, i| sum.wrapping_add((byte(a, i, a_signed) * byte(b, i, b_signed)) as u32))
}

/// `shf`: the funnel shift of `b:a`; `wrap` takes the amount modulo 32, else it is clamped to 32.
#[inline(always)]
pub(crate) fn shf(a: u32, b: u32, amount: u32, left: bool, wrap: bool) -> u32 {
    let n = if wrap { amount & 31 } else { amount.min(32) };
    let both = a as u64 | (b as u64) << 32;
    if left { ((both << n) >> 32) as u32 } else { (both >> n) as u32 }
}
