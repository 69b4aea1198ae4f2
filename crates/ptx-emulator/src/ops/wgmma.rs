//! `wgmma.mma_async`: descriptors of matrices in shared memory, and the products of one warp of the four.
//!
//! A warp computes 16 of the 64 rows; nothing in that needs the other three.

use super::half::{F16, Half};
use super::lanes::{Regs, Row, wide_cpu};
use super::matrix::{Acc, Elem};
use super::round;

/// The left operand: a fragment, or the row of a descriptor.
#[derive(Clone, Debug)]
pub(crate) enum Left {
    Registers(Vec<Row>),
    Shared(Row),
}

/// `wgmma.mma_async.m64nNk16`
#[derive(Clone, Debug)]
pub(crate) struct Wgmma {
    pub n: usize,
    pub elem: Elem,
    pub acc: Acc,
    /// Accumulators.
    pub d: Vec<Row>,
    pub a: Left,
    pub b: Row,
    /// Whether to add to the accumulators, and whether the predicate is negated.
    pub scale_d: Row,
    pub negate: bool,
    pub negate_a: bool,
    pub negate_b: bool,
    /// The matrix lies with its M or N index fastest, not K.
    pub transpose_a: bool,
    pub transpose_b: bool,
}

pub(crate) const K: usize = 16;
/// Rows of one warp.
pub(crate) const M: usize = 16;

/// Layout of a matrix in shared memory, from its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    start: usize,
    leading: usize,
    stride: usize,
    base_offset: u32,
    /// Address bits that are swizzled: 0 for none, 1 to 3 for 32, 64 and 128 bytes.
    swizzle: u32,
}

/// The 16-byte units of a tile are permuted: bits 4 and up of an address are flipped by the bits from 7 on.
pub(crate) fn swizzle(address: usize, bits: u32) -> usize {
    address ^ (address >> 3 & ((1 << bits) - 1) << 4)
}

impl Descriptor {
    pub(crate) fn new(bits: u64) -> Descriptor {
        let field = |shift: u32| ((bits >> shift & 0x3fff) as usize) << 4;
        let swizzle = match bits >> 62 {
            0 => 0,
            1 => 3,
            2 => 2,
            _ => 1,
        };
        Descriptor {
            start: field(0),
            leading: field(16),
            stride: field(32),
            base_offset: (bits >> 49 & 7) as u32,
            swizzle,
        }
    }

    /// What is wrong with it, if anything.
    pub(crate) fn trouble(&self) -> Option<String> {
        if self.base_offset != 0 {
            return Some(format!(
                "a matrix descriptor with base offset {}; only 0 is supported",
                self.base_offset
            ));
        }
        let pattern = 128usize << self.swizzle;
        if self.swizzle > 0 && self.start & (pattern - 1) & !127 != 0 {
            return Some(format!(
                "the matrix starts at {:#x}, inside of the {pattern}-byte pattern of its swizzle",
                self.start
            ));
        }
        None
    }

    /// Address of the 16 bytes that hold 8 elements: of row `line` from K index `8 * unit` on, or, transposed, of K index
    /// `line` from row `8 * unit` on.
    pub(crate) fn unit(&self, transposed: bool, line: usize, unit: usize) -> usize {
        // Bytes between lines of a pattern of 8.
        let wide = 16usize << self.swizzle;
        let per_pattern = 1usize << self.swizzle;
        let inner = line % 8 * wide;
        let at = match (transposed, self.swizzle) {
            (false, 0) => line / 8 * self.stride + inner + unit * self.leading,
            (false, _) => line / 8 * self.stride + inner + unit * 16,
            (true, 0) => unit * self.stride + inner + line / 8 * self.leading,
            (true, _) => {
                unit / per_pattern * self.leading + unit % per_pattern * 16 + inner + line / 8 * self.stride
            }
        };
        swizzle(self.start + at, self.swizzle)
    }
}

/// A row or column of 16 elements along K.
pub(crate) type Line = [f64; K];

fn value(elem: Elem, bits: u16) -> f64 {
    match elem {
        Elem::Bf16 => f32::from_bits((bits as u32) << 16) as f64,
        _ => Half::f32(F16(bits)) as f64,
    }
}

impl Wgmma {
    /// Multiply-adds of one warp.
    pub(crate) fn ops(&self) -> u64 {
        (M * self.n * K) as u64
    }

    /// Units of 16 bytes of a matrix with so many rows, in the order that [`Wgmma::lines`] wants them.
    pub(crate) fn units(desc: Descriptor, transposed: bool, first: usize, rows: usize) -> Vec<usize> {
        if transposed {
            (0..K).flat_map(|k| (first / 8..(first + rows) / 8).map(move |u| desc.unit(true, k, u))).collect()
        } else {
            (first..first + rows).flat_map(|r| (0..2).map(move |u| desc.unit(false, r, u))).collect()
        }
    }

    /// Rows along K from their units.
    pub(crate) fn lines(&self, units: &[[u8; 16]], transposed: bool, rows: usize, negate: bool) -> Vec<Line> {
        let mut lines = vec![[0.0; K]; rows];
        let sign = if negate { -1.0 } else { 1.0 };
        for (i, unit) in units.iter().enumerate() {
            for (j, b) in unit.chunks_exact(2).enumerate() {
                let v = value(self.elem, u16::from_le_bytes([b[0], b[1]])) * sign;
                if transposed {
                    lines[i % (rows / 8) * 8 + j][i / (rows / 8)] = v;
                } else {
                    lines[i / 2][i % 2 * 8 + j] = v;
                }
            }
        }
        lines
    }

    /// The left operand from registers: the fragment of `mma.m16n8k16`.
    pub(crate) fn fragment(&self, regs: &Regs, rows: &[Row]) -> Vec<Line> {
        let mut lines = vec![[0.0; K]; M];
        let sign = if self.negate_a { -1.0 } else { 1.0 };
        for (r, &row) in rows.iter().enumerate() {
            for (lane, word) in regs.r32[row as usize].iter().enumerate() {
                for i in 0..2 {
                    let v = value(self.elem, (word >> (16 * i)) as u16) * sign;
                    lines[lane / 4 + r % 2 * 8][lane % 4 * 2 + i + r / 2 * 8] = v;
                }
            }
        }
        lines
    }

    /// Adds the products to the accumulators, or starts them anew.
    pub(crate) fn run(&self, regs: &mut Regs, a: &[Line], b: &[Line], add: bool) {
        #[cfg(target_arch = "x86_64")]
        if wide_cpu() {
            // SAFETY: the CPU has AVX2 and FMA.
            return unsafe { self.run_wide(regs, a, b, add) };
        }
        self.run_plain(regs, a, b, add);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn run_wide(&self, regs: &mut Regs, a: &[Line], b: &[Line], add: bool) {
        self.run_plain(regs, a, b, add);
    }

    #[inline(always)]
    fn run_plain(&self, regs: &mut Regs, a: &[Line], b: &[Line], add: bool) {
        for (block, columns) in b.chunks_exact(8).enumerate() {
            let mut by_k = [[0.0; 8]; K];
            for (n, column) in columns.iter().enumerate() {
                for k in 0..K {
                    by_k[k][n] = column[k];
                }
            }
            let mut sums = [[0.0; 8]; M];
            if add {
                self.load(regs, block, &mut sums);
            }
            for (row, sum) in a.iter().zip(sums.iter_mut()) {
                let mut acc = *sum;
                for (&x, y) in row.iter().zip(&by_k) {
                    for n in 0..8 {
                        acc[n] += x * y[n];
                    }
                }
                *sum = acc;
            }
            self.store(regs, block, &sums);
        }
    }

    /// Row and column inside of a block of 8 columns, of element `i` of a lane.
    fn place(lane: usize, i: usize) -> (usize, usize) {
        (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2)
    }

    #[inline(always)]
    fn load(&self, regs: &Regs, block: usize, sums: &mut [[f64; 8]; M]) {
        for i in 0..4 {
            let half = self.acc == Acc::F16;
            let row = if half { self.d[2 * block + i / 2] } else { self.d[4 * block + i] };
            for (lane, &word) in regs.r32[row as usize].iter().enumerate() {
                let (m, n) = Self::place(lane, i);
                sums[m][n] =
                    if half { F16((word >> (i % 2 * 16)) as u16).f64() } else { f32::from_bits(word) as f64 };
            }
        }
    }

    #[inline(always)]
    fn store(&self, regs: &mut Regs, block: usize, sums: &[[f64; 8]; M]) {
        let sum = |lane: usize, i: usize| {
            let (m, n) = Self::place(lane, i);
            sums[m][n]
        };
        if self.acc == Acc::F16 {
            for r in 0..2 {
                let row = &mut regs.r32[self.d[2 * block + r] as usize];
                for (lane, word) in row.iter_mut().enumerate() {
                    let half = |i| F16::round(sum(lane, i)).0 as u32;
                    *word = half(2 * r) | half(2 * r + 1) << 16;
                }
            }
        } else {
            for i in 0..4 {
                let row = &mut regs.r32[self.d[4 * block + i] as usize];
                for (lane, word) in row.iter_mut().enumerate() {
                    *word = round::canon(sum(lane, i) as f32).to_bits();
                }
            }
        }
    }
}
