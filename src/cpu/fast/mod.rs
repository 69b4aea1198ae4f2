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
use dot::{Further, Matrix, Rows, dots};

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
    let gather = |i: usize, row: &mut [f32]| T::widen(&x[i * k..(i + 1) * k], row);
    let rows = Rows::new(tokens, k, |i, row| gather(first + i, row));
    let branches = extras.adapters.iter().enumerate().filter(|(_, adapter)| adapter.rank > 0);
    let branches = branches.filter_map(|(a, adapter)| {
        let tokens = extras.tokens_of(a, first..first + tokens);
        if tokens.is_empty() {
            return None;
        }
        let dropped = extras.dropout.map(|dropout| {
            Rows::new(tokens.len(), k, |i, row| {
                gather(tokens[i], row);
                dropout.mask(tokens[i], 0.0, row);
            })
        });
        let x: Vec<&[Vector]> = match &dropped {
            Some(dropped) => (0..tokens.len()).map(|i| dropped.row(i)).collect(),
            None => tokens.iter().map(|i| rows.row(i - first)).collect(),
        };
        let lora_a = Dense(adapter.lora_a);
        let shrunk = dots(level, &x, [adapter.rank, k], &lora_a, &());
        let scaling = branch_scale(adapter, extras.dropout.as_ref());
        let v = Rows::new(tokens.len(), adapter.rank, |i, row| {
            let sums = shrunk.iter().skip(i).step_by(tokens.len());
            row.iter_mut().zip(sums).for_each(|(v, sum)| *v = scaling * sum);
        });
        Some(Branch { adapter, tokens: tokens.iter().map(|i| i - first).collect(), v })
    });
    let branches = Branches { tokens, branches: branches.collect() };
    let x: Vec<&[Vector]> = (0..tokens).map(|i| rows.row(i)).collect();
    let sums = dots(level, &x, [n, k], weight, &branches);
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
                    for (b, v) in row.iter().zip(v.row(i)) {
                        sum = simd.mul_add(simd.load(b), simd.load(v), sum);
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
            Weight::Nf4(nf4) => simd.run(#[inline(always)] || nf4.decode_widened_by::<_, T>(simd, start, elements)),
        }
    }
}

impl<T, A> MatmulExtras<'_, T, A> {
    /// Those of the tokens that have the adapter `a`.
    fn tokens_of(&self, a: usize, tokens: impl Iterator<Item = usize>) -> Vec<usize> {
        tokens.filter(|&i| self.adapter_index.map_or(0, |index| index[i]) == a as i32).collect()
    }
}
