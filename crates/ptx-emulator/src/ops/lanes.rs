//! Registers of a warp, and the loops over its 32 lanes.
//!
//! A register file is an array of rows, one per register, each row 32 lanes wide. Narrow types live zero-extended in
//! 32-bit rows; predicates are one bit per lane. Constants and special registers are rows too, filled before the warp
//! starts, so that an instruction never asks what kind of operand it has.

/// Lanes of a warp.
pub(crate) const WARP: usize = 32;

/// Index of a row in the file of its width.
pub(crate) type Row = u16;

/// The registers of one warp.
#[derive(Clone, Default)]
pub(crate) struct Regs {
    pub r32: Vec<[u32; WARP]>,
    pub r64: Vec<[u64; WARP]>,
    pub pred: Vec<u32>,
}

/// Operands of an arithmetic instruction: destination, sources, and one immediate whose meaning the operation knows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Args {
    pub d: Row,
    pub a: Row,
    pub b: Row,
    pub c: Row,
    pub x: u32,
}

/// One arithmetic operation over the lanes of a mask.
///
/// It is an unsafe type only because some of them need CPU features; [`pick!`] hands those out after asking the CPU.
pub(crate) type AluFn = unsafe fn(&mut Regs, &Args, u32);

/// A value of one lane: how it is kept in its register file.
pub(crate) trait Lane: Copy {
    type Raw: Copy + Default;
    fn rows(regs: &Regs) -> &[[Self::Raw; WARP]];
    fn rows_mut(regs: &mut Regs) -> &mut [[Self::Raw; WARP]];
    fn get(raw: Self::Raw) -> Self;
    fn put(self) -> Self::Raw;
}

macro_rules! lane {
    ($($ty:ty: $raw:ty, $rows:ident, $get:expr, $put:expr;)*) => {$(
        impl Lane for $ty {
            type Raw = $raw;
            #[inline(always)]
            fn rows(regs: &Regs) -> &[[$raw; WARP]] {
                &regs.$rows
            }
            #[inline(always)]
            fn rows_mut(regs: &mut Regs) -> &mut [[$raw; WARP]] {
                &mut regs.$rows
            }
            #[inline(always)]
            fn get(raw: $raw) -> Self {
                let get: fn($raw) -> $ty = $get;
                get(raw)
            }
            #[inline(always)]
            fn put(self) -> $raw {
                let put: fn($ty) -> $raw = $put;
                put(self)
            }
        }
    )*};
}

lane! {
    u8: u32, r32, |r| r as u8, |v| v as u32;
    i8: u32, r32, |r| r as i8, |v| v as u8 as u32;
    u16: u32, r32, |r| r as u16, |v| v as u32;
    i16: u32, r32, |r| r as i16, |v| v as u16 as u32;
    u32: u32, r32, |r| r, |v| v;
    i32: u32, r32, |r| r as i32, |v| v as u32;
    f32: u32, r32, |r| f32::from_bits(r), |v| v.to_bits();
    u64: u64, r64, |r| r, |v| v;
    i64: u64, r64, |r| r as i64, |v| v as u64;
    f64: u64, r64, |r| f64::from_bits(r), |v| v.to_bits();
}

#[inline(always)]
fn write<D: Lane>(regs: &mut Regs, row: Row, mask: u32, f: impl Fn(usize) -> D) {
    let out = &mut D::rows_mut(regs)[row as usize];
    if mask == u32::MAX {
        for (lane, slot) in out.iter_mut().enumerate() {
            *slot = f(lane).put();
        }
    } else {
        let mut rest = mask;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            out[lane] = f(lane).put();
        }
    }
}

#[inline(always)]
pub(crate) fn map1<D: Lane, A: Lane>(regs: &mut Regs, x: &Args, mask: u32, f: impl Fn(A) -> D) {
    let a = A::rows(regs)[x.a as usize];
    write(regs, x.d, mask, |i| f(A::get(a[i])));
}

#[inline(always)]
pub(crate) fn map2<D: Lane, A: Lane, B: Lane>(regs: &mut Regs, x: &Args, mask: u32, f: impl Fn(A, B) -> D) {
    let a = A::rows(regs)[x.a as usize];
    let b = B::rows(regs)[x.b as usize];
    write(regs, x.d, mask, |i| f(A::get(a[i]), B::get(b[i])));
}

#[inline(always)]
pub(crate) fn map3<D: Lane, A: Lane, B: Lane, C: Lane>(
    regs: &mut Regs,
    x: &Args,
    mask: u32,
    f: impl Fn(A, B, C) -> D,
) {
    let a = A::rows(regs)[x.a as usize];
    let b = B::rows(regs)[x.b as usize];
    let c = C::rows(regs)[x.c as usize];
    write(regs, x.d, mask, |i| f(A::get(a[i]), B::get(b[i]), C::get(c[i])));
}

/// Predicate from a comparison of two rows.
#[inline(always)]
pub(crate) fn test2<A: Lane, B: Lane>(regs: &mut Regs, x: &Args, mask: u32, f: impl Fn(A, B) -> bool) {
    let a = A::rows(regs)[x.a as usize];
    let b = B::rows(regs)[x.b as usize];
    let mut hits = 0u32;
    for i in 0..WARP {
        hits |= (f(A::get(a[i]), B::get(b[i])) as u32) << i;
    }
    let p = &mut regs.pred[x.d as usize];
    *p = *p & !mask | hits & mask;
}

/// Whether the wide versions of the lane loops may run.
pub(crate) fn wide_cpu() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Compiles the inlined function `$body` twice, for any CPU and for AVX2 with FMA, and picks one for this machine.
macro_rules! pick {
    ($body:path) => {{
        fn plain(regs: &mut $crate::ops::lanes::Regs, x: &$crate::ops::lanes::Args, mask: u32) {
            $body(regs, x, mask)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn wide(regs: &mut $crate::ops::lanes::Regs, x: &$crate::ops::lanes::Args, mask: u32) {
            $body(regs, x, mask)
        }
        #[cfg(not(target_arch = "x86_64"))]
        use plain as wide;
        let chosen: $crate::ops::lanes::AluFn = if $crate::ops::lanes::wide_cpu() { wide } else { plain };
        chosen
    }};
}

/// `alu!(D <- A, B; |a, b| expression)`: an [`AluFn`] that maps the sources of every lane to the destination.
macro_rules! alu {
    ($d:ty, $a:ty; |$pa:pat_param| $e:expr) => {{
        #[inline(always)]
        fn body(regs: &mut $crate::ops::lanes::Regs, x: &$crate::ops::lanes::Args, mask: u32) {
            $crate::ops::lanes::map1::<$d, $a>(
                regs,
                x,
                mask,
                #[inline(always)]
                |$pa| $e,
            )
        }
        $crate::ops::lanes::pick!(body)
    }};
    ($d:ty, $a:ty, $b:ty; |$pa:pat_param, $pb:pat_param| $e:expr) => {{
        #[inline(always)]
        fn body(regs: &mut $crate::ops::lanes::Regs, x: &$crate::ops::lanes::Args, mask: u32) {
            $crate::ops::lanes::map2::<$d, $a, $b>(
                regs,
                x,
                mask,
                #[inline(always)]
                |$pa, $pb| $e,
            )
        }
        $crate::ops::lanes::pick!(body)
    }};
    ($d:ty, $a:ty, $b:ty, $c:ty; |$pa:pat_param, $pb:pat_param, $pc:pat_param| $e:expr) => {{
        #[inline(always)]
        fn body(regs: &mut $crate::ops::lanes::Regs, x: &$crate::ops::lanes::Args, mask: u32) {
            $crate::ops::lanes::map3::<$d, $a, $b, $c>(
                regs,
                x,
                mask,
                #[inline(always)]
                |$pa, $pb, $pc| $e,
            )
        }
        $crate::ops::lanes::pick!(body)
    }};
}

/// `test!(A; |a, b| condition)`: an [`AluFn`] that writes a predicate.
macro_rules! test {
    ($a:ty; |$pa:pat_param, $pb:pat_param| $e:expr) => {{
        #[inline(always)]
        fn body(regs: &mut $crate::ops::lanes::Regs, x: &$crate::ops::lanes::Args, mask: u32) {
            $crate::ops::lanes::test2::<$a, $a>(
                regs,
                x,
                mask,
                #[inline(always)]
                |$pa, $pb| $e,
            )
        }
        $crate::ops::lanes::pick!(body)
    }};
}

pub(crate) use {alu, pick, test};
