//! The products in parallel, for whole models.
//!
//! They run with AVX2, FMA and F16C where the machine has these, and in plain Rust elsewhere. 4-bit weights stay packed: few tokens
//! multiply values as they are decoded, more of them panels that stay in a core's cache. A sum of inputs has one order, whatever else is
//! in the batch.

mod backward;
mod dot;
mod tiles;

use std::ops::Range;

use rayon::prelude::*;

use super::lora_shrink::branch_scale;
use super::matmul::{Shape, check};
use super::{LowRank, MatmulExtras, Weight};
use crate::nf4::{Nf4Matrix, check_len};
use crate::simd::{LANES, Level, Simd, Vector};
use crate::{Element, Result};
pub use backward::backward;
use dot::{DEPTH, Further, Matrix, Rows, Tokens, dots};

/// Tokens of one pass over a weight: its decoding is spread over them, and they stay in a core's cache, 512 inputs at a time.
const PASS: usize = 128;

/// What [`cpu::matmul`](super::matmul()) computes, in f32. The bits depend on the CPU's vector instructions, and on nothing
/// else: a token has the same output in every batch.
///
/// # Errors
/// As there.
pub fn matmul<T: Element, A: Element>(
    x: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
    y: &mut [T],
) -> Result<()> {
    matmul_by(Level::detect(), x, m, weight, extras, y)
}

fn matmul_by<T: Element, A: Element>(
    level: Level,
    x: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
    y: &mut [T],
) -> Result<()> {
    let shape = check(x, m, weight, extras)?;
    check_len("y", shape.y_len, "elements", y.len())?;
    if shape.y_len > 0 {
        for (pass, y) in y.chunks_mut(PASS * shape.n).enumerate() {
            run_pass(level, x, pass * PASS, weight, extras, shape, y);
        }
    }
    Ok(())
}

/// The tokens from `first` on, as many as `y` has rows.
fn run_pass<T: Element, A: Element>(
    level: Level,
    x: &[T],
    first: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
    Shape { n, k, .. }: Shape,
    y: &mut [T],
) {
    let tokens = y.len() / n;
    let gather = |i: usize, start: usize, row: &mut [f32]| T::widen(&x[i * k + start..][..row.len()], row);
    let rows = Rows::new(tokens, k, |i, start, row| gather(first + i, start, row));
    let branches = extras.adapters.iter().enumerate().filter(|(_, adapter)| adapter.rank > 0);
    let branches = branches.filter_map(|(a, adapter)| {
        let tokens = extras.tokens_of(a, first..first + tokens);
        if tokens.is_empty() {
            return None;
        }
        let dropped = extras.dropout.map(|dropout| {
            Rows::new(tokens.len(), k, |i, start, row| {
                gather(tokens[i], start, row);
                dropout.mask_from(tokens[i], start, 0.0, row);
            })
        });
        let own: Vec<usize> = tokens.iter().map(|i| i - first).collect();
        let all: Vec<usize> = (0..tokens.len()).collect();
        let x = match &dropped {
            Some(dropped) => Tokens { rows: dropped, numbers: &all },
            None => Tokens { rows: &rows, numbers: &own },
        };
        let shrunk = dots(level, x, [adapter.rank, k], &Dense(adapter.lora_a), &());
        let scaling = branch_scale(adapter, extras.dropout.as_ref());
        let v = Rows::new(tokens.len(), adapter.rank, |i, start, row| {
            let sums = shrunk.iter().skip(start * tokens.len() + i).step_by(tokens.len());
            row.iter_mut().zip(sums).for_each(|(v, sum)| *v = scaling * sum);
        });
        Some(Branch { adapter, tokens: own, v })
    });
    let branches = Branches { tokens, branches: branches.collect() };
    let numbers: Vec<usize> = (0..tokens).collect();
    let sums = dots(level, Tokens { rows: &rows, numbers: &numbers }, [n, k], weight, &branches);
    y.par_chunks_mut(n).enumerate().for_each(|(i, y)| {
        let sums = sums.iter().skip(i).step_by(tokens).enumerate();
        for (y, (n, sum)) in y.iter_mut().zip(sums) {
            let scaled = extras.row_scale.map_or(*sum, |row_scale| row_scale[n] * sum);
            *y = T::from_f32(extras.bias.map_or(scaled, |bias| scaled + bias[n].to_f32()));
        }
    });
}

/// The low-rank branches of a pass.
struct Branches<'a, A> {
    /// Of the pass.
    tokens: usize,
    branches: Vec<Branch<'a, A>>,
}

/// `v Bᵀ` of one adapter's tokens.
struct Branch<'a, A> {
    adapter: &'a LowRank<'a, A>,
    /// Which of the pass these are.
    tokens: Vec<usize>,
    /// `scaling · x Aᵀ`.
    v: Rows,
}

impl<A: Element> Further for Branches<'_, A> {
    #[inline(always)]
    fn add<S: Simd>(&self, simd: S, rows: Range<usize>, lanes: &mut [Vector]) {
        let mut row = Vec::new();
        for Branch { adapter, tokens, v } in &self.branches {
            row.resize(adapter.rank.div_ceil(LANES), Vector::ZERO);
            for (n, lanes) in rows.clone().zip(lanes.chunks_exact_mut(self.tokens)) {
                let lora_b = &adapter.lora_b[n * adapter.rank..][..adapter.rank];
                let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut row);
                A::widen(lora_b, &mut floats[..adapter.rank]);
                floats[adapter.rank..].fill(0.0);
                for (i, &token) in tokens.iter().enumerate() {
                    let mut sum = simd.load(&lanes[token]);
                    for (part, b) in row.chunks(DEPTH).enumerate() {
                        for (b, v) in b.iter().zip(v.part(part, i)) {
                            sum = simd.mul_add(simd.load(b), simd.load(v), sum);
                        }
                    }
                    lanes[token] = simd.store(sum);
                }
            }
        }
    }
}

/// A matrix of elements.
struct Dense<'a, A>(&'a [A]);

impl<A: Element> Matrix for Dense<'_, A> {
    type Element = A;

    fn blocks(&self) -> Option<&Nf4Matrix> {
        None
    }

    #[inline(always)]
    fn read<S: Simd>(&self, _: S, start: usize, elements: &mut [f32]) {
        A::widen(&self.0[start..start + elements.len()], elements);
    }
}

impl<T: Element> Matrix for Weight<'_, T> {
    type Element = T;

    fn blocks(&self) -> Option<&Nf4Matrix> {
        match self {
            Weight::Dense { .. } => None,
            Weight::Nf4(nf4) => Some(nf4),
        }
    }

    #[inline(always)]
    fn read<S: Simd>(&self, simd: S, start: usize, elements: &mut [f32]) {
        match self {
            Weight::Dense { data, .. } => T::widen(&data[start..start + elements.len()], elements),
            Weight::Nf4(nf4) => simd.run(
                #[inline(always)]
                || nf4.decode_widened_by::<_, T>(simd, start, elements),
            ),
        }
    }
}

impl<T, A> MatmulExtras<'_, T, A> {
    /// Those of the tokens that have the adapter `a`.
    fn tokens_of(&self, a: usize, tokens: impl Iterator<Item = usize>) -> Vec<usize> {
        tokens.filter(|&i| self.adapter_index.map_or(0, |index| index[i]) == a as i32).collect()
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::DType;
    use crate::cpu::truth;
    use crate::nf4::{Codebook, Nesting};

    /// Numbers in [-1, 1), by place.
    fn values<T: Element>(count: usize, seed: usize) -> Vec<T> {
        let value = |i: usize| (i * 7919 + seed * 104_729) % 4096;
        (0..count).map(|i| T::from_f32(value(i) as f32 / 2048.0 - 1.0)).collect()
    }

    /// A product with an adapter for every other token, at one level.
    fn product<T: Element>(
        level: Level,
        [m, n, k]: [usize; 3],
        blocksize: usize,
        nesting: Nesting,
    ) -> Vec<T> {
        let rank = 9;
        let (x, dense): (Vec<T>, Vec<T>) = (values(m * k, 1), values(n * k, 2));
        let nf4 = Nf4Matrix::quantize(&dense, [n, k], blocksize, &Codebook::nf4(), nesting).unwrap();
        let (lora_a, lora_b): (Vec<T>, Vec<T>) = (values(rank * k, 3), values(n * rank, 4));
        let adapters = [LowRank { lora_a: &lora_a, lora_b: &lora_b, rank, scaling: 0.3 }];
        let index: Vec<i32> = (0..m).map(|i| -((i % 2) as i32)).collect();
        let extras =
            MatmulExtras { adapters: &adapters, adapter_index: Some(&index), ..MatmulExtras::default() };
        let weight = Weight::Nf4(&nf4);
        let mut y = vec![T::from_f32(f32::NAN); m * n];
        matmul_by(level, &x, m, &weight, &extras, &mut y).unwrap();
        // As many roundings as tests/cpu_matmul.rs counts.
        let sum = |terms: usize| 1 + terms.div_ceil(8) + 3;
        let c = (sum(k) + 2 + sum(rank)) as f64 * DType::F32.unit_roundoff();
        for (i, (y, truth)) in y.iter().zip(truth(&x, m, &weight, &extras).unwrap()).enumerate() {
            let sum = c / (1.0 - c) * truth.magnitude;
            let bound = sum + T::DTYPE.unit_roundoff() * (truth.value.abs() + sum) + 2f64.powi(-24);
            let off = (y.to_f64() - truth.value).abs();
            assert!(off <= bound, "{level:?} {m} {n} {k} {blocksize} {} y[{i}]: off by {off:e}", T::DTYPE);
        }
        y
    }

    /// Tokens of a batch have the bits that they have alone.
    fn check<T: Element>(level: Level, n: usize, k: usize, blocksize: usize, nesting: Nesting) {
        let most = product::<T>(level, [33, n, k], blocksize, nesting);
        for m in 0..=9 {
            assert_eq!(product::<T>(level, [m, n, k], blocksize, nesting), most[..m * n], "{level:?} {m}");
        }
    }

    #[test]
    fn every_level_is_within_the_bound_and_deterministic() {
        // Whole steps of one block or two, parts of 512, rows that begin within a block, a byte, and half a byte.
        let shapes = [(13, 64), (9, 96), (5, 1088), (3, 512), (21, 160), (7, 33), (6, 515), (2, 70), (1, 1)];
        for (i, (level, (n, k))) in Level::all().into_iter().flat_map(|l| shapes.map(|s| (l, s))).enumerate()
        {
            for blocksize in [32, 64, 4096] {
                let nesting = if i % 2 == 0 { Nesting::Plain } else { Nesting::Nested };
                check::<f32>(level, n, k, blocksize, nesting);
                check::<bf16>(level, n, k, blocksize, nesting);
                check::<f16>(level, n, k, blocksize, nesting);
            }
        }
    }

    /// A block whose scale is no number makes its own outputs NaN, and no others.
    #[test]
    fn a_scale_that_is_no_number_stays_in_its_row() {
        let mut dense: Vec<bf16> = values(5 * 128, 2);
        dense[2 * 128 + 70] = bf16::INFINITY;
        let nf4 = Nf4Matrix::quantize(&dense, [5, 128], 64, &Codebook::nf4(), Nesting::Plain).unwrap();
        for (level, m) in Level::all().into_iter().flat_map(|l| [1, 2, 7].map(|m| (l, m))) {
            let mut y = vec![bf16::ZERO; m * 5];
            let none = MatmulExtras::<bf16>::default();
            matmul_by(level, &values(m * 128, 1), m, &Weight::Nf4(&nf4), &none, &mut y).unwrap();
            for (i, y) in y.iter().enumerate() {
                assert_eq!(y.is_nan(), i % 5 == 2, "{level:?} {m} {i}");
            }
        }
    }
}
