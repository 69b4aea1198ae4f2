//! The products in parallel, for whole models.
//!
//! They run with AVX2, FMA and F16C where the machine has these, and in plain Rust elsewhere. 4-bit weights stay packed: few tokens
//! multiply values as they are decoded, more of them panels that stay in a core's cache.
//!
//! An output has eight sums, one for each lane of a vector: lane j adds inputs j, j + 8, ... in turn, and the lanes are added at the end.
//! This is so for any number of tokens and threads, and so every bit is.

mod backward;
mod few;
mod many;

use rayon::prelude::*;

use super::lora_shrink::branch_scale;
use super::matmul::{Shape, check};
use super::{LowRank, MatmulExtras, Weight};
use crate::nf4::check_len;
use crate::simd::tile::HEIGHT;
use crate::simd::{Level, Simd, with_level};
use crate::{Element, Result};
pub use backward::backward;
use few::Rows;
use many::Columns;

/// Tokens of one pass over a weight: its decoding is spread over them, and they stay in a core's cache, 512 inputs at a time.
const PASS: usize = 128;
/// Rows of a task, at most: a multiple of what is multiplied at a time.
const ROWS: usize = 36;
/// Rows of the result that are written at a time.
const WRITTEN: usize = 8;

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
    let few = few::are(tokens, k);
    let inputs = Inputs::new(few, tokens, k, |i, start, row| gather(first + i, start, row));
    let branches = extras.adapters.iter().enumerate().filter(|(_, adapter)| adapter.rank > 0);
    let branches = branches.filter_map(|(a, adapter)| {
        let own = extras.tokens_of(a, first..first + tokens);
        if own.is_empty() {
            return None;
        }
        let masked = (extras.dropout.is_some() || own.len() < tokens).then(|| {
            Inputs::new(few::are(own.len(), k), own.len(), k, |i, start, row| {
                gather(own[i], start, row);
                if let Some(dropout) = extras.dropout {
                    dropout.mask_from(own[i], start, 0.0, row);
                }
            })
        });
        let lora_a = Weight::Dense { data: adapter.lora_a, n: adapter.rank, k };
        let shrunk = dots::<A, A>(
            level,
            masked.as_ref().unwrap_or(&inputs),
            own.len(),
            (&lora_a, [adapter.rank, k]),
            &[],
        );
        let scaling = branch_scale(adapter, extras.dropout.as_ref());
        let own: Vec<usize> = own.iter().map(|i| i - first).collect();
        let write = |i: usize, start: usize, row: &mut [f32]| {
            let sums = shrunk.iter().skip(start * own.len() + i).step_by(own.len());
            row.iter_mut().zip(sums).for_each(|(v, sum)| *v = scaling * sum);
        };
        let v = if few {
            Inputs::new(few, own.len(), adapter.rank, write)
        } else {
            Inputs::new(few, tokens, adapter.rank, |i, start, row| match own.binary_search(&i) {
                Ok(i) => write(i, start, row),
                Err(_) => row.fill(0.0),
            })
        };
        Some(Branch { adapter, tokens: own, v })
    });
    let branches: Vec<_> = branches.collect();
    let sums = dots(level, &inputs, tokens, (weight, [n, k]), &branches);
    let written = y.par_chunks_mut(WRITTEN * n).enumerate();
    written.for_each(|(i, y)| {
        for (n_, sums) in sums.chunks_exact(tokens).enumerate() {
            for (sum, y) in sums[i * WRITTEN..].iter().zip(y.chunks_exact_mut(n)) {
                let scaled = extras.row_scale.map_or(*sum, |row_scale| row_scale[n_] * sum);
                y[n_] = T::from_f32(extras.bias.map_or(scaled, |bias| scaled + bias[n_].to_f32()));
            }
        }
    });
}

/// The tokens of a product, as they are multiplied.
enum Inputs {
    Few(Rows),
    Many(Columns),
}

impl Inputs {
    /// `fill` writes values of a token from some place on.
    fn new(few: bool, tokens: usize, len: usize, fill: impl Fn(usize, usize, &mut [f32]) + Sync) -> Self {
        match few {
            true => Inputs::Few(Rows::new(tokens, len, |i, row| fill(i, 0, row))),
            false => Inputs::Many(Columns::new(tokens, len, fill)),
        }
    }
}

/// `v Bᵀ` of the tokens that have an adapter.
struct Branch<'a, A> {
    adapter: &'a LowRank<'a, A>,
    /// Which of the pass these are.
    tokens: Vec<usize>,
    /// `scaling · x Aᵀ`: of few tokens these only, else of all tokens, with zeros in the place of others.
    v: Inputs,
}

/// The sums of a weight's rows with the tokens, `[n, tokens]`, and of what `branches`, with tokens in the same form, add to them.
fn dots<T: Element, A: Element>(
    level: Level,
    x: &Inputs,
    tokens: usize,
    (weight, [n, k]): (&Weight<'_, T>, [usize; 2]),
    branches: &[Branch<'_, A>],
) -> Vec<f32> {
    let mut sums = vec![0.0; n * tokens];
    // Some tasks for each thread.
    let rows = n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(HEIGHT).clamp(HEIGHT, ROWS);
    let tasks = sums.par_chunks_mut((rows * tokens).max(1)).enumerate();
    tasks.for_each_init(<(few::Scratch, many::Scratch)>::default, |(few, many), (i, sums)| {
        let rows = i * rows..i * rows + sums.len() / tokens;
        with_level!(level, simd => match x {
            Inputs::Few(x) => few::dots(simd, weight, (rows, k), x, branches, few, sums),
            Inputs::Many(x) => many::dots(simd, weight, (rows, k), x, branches, many, sums),
        });
    });
    sums
}

/// Writes elements of a weight from a flat index on, widened. To be inlined into what `simd` runs.
#[inline(always)]
fn read<S: Simd, T: Element>(simd: S, weight: &Weight<'_, T>, start: usize, elements: &mut [f32]) {
    match weight {
        Weight::Dense { data, .. } => T::widen(&data[start..start + elements.len()], elements),
        Weight::Nf4(nf4) => nf4.decode_widened_by::<_, T>(simd, start, elements),
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
    use crate::nf4::{Codebook, Nesting, Nf4Matrix};

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
