//! `mma.sync`: fragment layouts and the products.
//!
//! Products are exact and summed in f64 together with the accumulator, then rounded once. Tensor cores truncate
//! partial sums at times, so a test that also runs on a GPU must bound the error, not compare bits.

use super::half::{Bf16, F16, Half};
use super::lanes::{Regs, Row, WARP, wide_cpu};
use super::round;

/// Element type of a multiplicand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Elem {
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
}

impl Elem {
    pub(crate) fn bits(self) -> usize {
        match self {
            Elem::F16 | Elem::Bf16 => 16,
            Elem::Tf32 => 32,
            _ => 8,
        }
    }

    /// Value of an element that sits in the low bits.
    pub(crate) fn value(self, bits: u32) -> f64 {
        match self {
            Elem::F16 => F16(bits as u16).f64(),
            Elem::Bf16 => Bf16(bits as u16).f64(),
            // The unit ignores the 13 low bits.
            Elem::Tf32 => f32::from_bits(bits & 0xffff_e000) as f64,
            Elem::E4m3 => round::decode(bits & 0xff, round::E4M3),
            Elem::E5m2 => round::decode(bits & 0xff, round::E5M2),
            Elem::S8 => bits as u8 as i8 as f64,
            Elem::U8 => bits as u8 as f64,
        }
    }
}

/// Type of accumulator and result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acc {
    F32,
    F16,
    /// With saturation if true.
    S32(bool),
}

/// `mma.sync.m16n8k*`
#[derive(Clone, Debug)]
pub(crate) struct Mma {
    pub k: usize,
    pub a_type: Elem,
    pub b_type: Elem,
    pub acc: Acc,
    pub d: Vec<Row>,
    pub a: Vec<Row>,
    pub b: Vec<Row>,
    pub c: Vec<Row>,
}

pub(crate) const M: usize = 16;
pub(crate) const N: usize = 8;
const K: usize = 32;

type Sums = [[f64; N]; M];

#[inline(always)]
fn products(a: &[[f64; K]; M], b: &[[f64; N]; K], k: usize, sums: &mut Sums) {
    for (row, sum) in a.iter().zip(sums.iter_mut()) {
        let mut acc = *sum;
        for (&x, y) in row[..k].iter().zip(b) {
            for n in 0..N {
                // Products of the types here are exact in f64, so fused or not is the same.
                acc[n] += x * y[n];
            }
        }
        *sum = acc;
    }
}

/// Hands every element of a fragment to `put(register, lane, element, elements per register, value)`.
#[inline(always)]
fn spread(elem: Elem, rows: &[Row], regs: &Regs, mut put: impl FnMut(usize, usize, usize, usize, f64)) {
    macro_rules! each {
        ($per:expr, |$word:ident, $i:ident| $value:expr) => {
            for (r, &row) in rows.iter().enumerate() {
                for (lane, &$word) in regs.r32[row as usize].iter().enumerate() {
                    for $i in 0..$per {
                        put(r, lane, $i, $per, $value);
                    }
                }
            }
        };
    }
    match elem {
        Elem::Bf16 => each!(2, |w, i| f32::from_bits(if i == 0 { w << 16 } else { w & 0xffff_0000 }) as f64),
        Elem::F16 => each!(2, |w, i| Half::f32(F16((w >> (16 * i)) as u16)) as f64),
        Elem::Tf32 => each!(1, |w, _i| Elem::Tf32.value(w)),
        _ => each!(4, |w, i| elem.value(w >> (8 * i))),
    }
}

impl Mma {
    /// Multiply-adds of one instruction.
    pub(crate) fn ops(&self) -> u64 {
        (M * N * self.k) as u64
    }

    pub(crate) fn run(&self, regs: &mut Regs) {
        #[cfg(target_arch = "x86_64")]
        if wide_cpu() {
            // SAFETY: the CPU has AVX2 and FMA.
            return unsafe { self.run_wide(regs) };
        }
        self.run_plain(regs);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn run_wide(&self, regs: &mut Regs) {
        self.run_plain(regs);
    }

    #[inline(always)]
    fn run_plain(&self, regs: &mut Regs) {
        let mut a = [[0.0; K]; M];
        let mut b = [[0.0; N]; K];
        spread(self.a_type, &self.a, regs, |r, lane, i, per, value| {
            a[lane / 4 + r % 2 * 8][lane % 4 * per + i + r / 2 * 4 * per] = value;
        });
        spread(self.b_type, &self.b, regs, |r, lane, i, per, value| {
            b[lane % 4 * per + i + r * 4 * per][lane / 4] = value;
        });
        let mut sums = self.accumulators(regs);
        products(&a, &b, self.k, &mut sums);
        self.results(regs, &sums);
    }

    /// Row and column of accumulator element `i` of a lane.
    fn place(lane: usize, i: usize) -> (usize, usize) {
        (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2)
    }

    fn accumulators(&self, regs: &Regs) -> Sums {
        let mut sums = [[0.0; N]; M];
        for lane in 0..WARP {
            for i in 0..4 {
                let word = |r: usize| regs.r32[self.c[r] as usize][lane];
                let (m, n) = Self::place(lane, i);
                sums[m][n] = match self.acc {
                    Acc::F32 => f32::from_bits(word(i)) as f64,
                    Acc::F16 => F16((word(i / 2) >> (i % 2 * 16)) as u16).f64(),
                    Acc::S32(_) => word(i) as i32 as f64,
                };
            }
        }
        sums
    }

    fn results(&self, regs: &mut Regs, sums: &Sums) {
        for lane in 0..WARP {
            let sum = |i: usize| {
                let (m, n) = Self::place(lane, i);
                sums[m][n]
            };
            match self.acc {
                Acc::F16 => {
                    for (r, &row) in self.d.iter().enumerate() {
                        let half = |i| F16::round(sum(i)).0 as u32;
                        regs.r32[row as usize][lane] = half(2 * r) | half(2 * r + 1) << 16;
                    }
                }
                _ => {
                    for (i, &row) in self.d.iter().enumerate() {
                        regs.r32[row as usize][lane] = match self.acc {
                            Acc::S32(true) => sum(i) as i32 as u32,
                            Acc::S32(false) => sum(i) as i64 as u32,
                            _ => round::canon(sum(i) as f32).to_bits(),
                        };
                    }
                }
            }
        }
    }
}
