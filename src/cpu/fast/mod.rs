//! The products in parallel, for whole models.
//!
//! Tokens are taken sixteen at a time, with zeros in the place of missing ones, and inputs in runs of a fixed length. So
//! every sum has one order, and a token's output does not depend on what else is in the batch.

mod backward;
mod tiles;

use super::lora_shrink::branch_scale;
use super::matmul::{Shape, check};
use super::{LowRank, MatmulExtras, Weight};
use crate::nf4::check_len;
use crate::{Element, Result};
pub use backward::backward;
use tiles::Tiles;

/// Tokens of one pass over a weight: its decoding is spread over them, and buffers are bounded by them.
const PASS: usize = 512;

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
    let shape = check(x, m, weight, extras)?;
    check_len("y", shape.y_len, "elements", y.len())?;
    if shape.y_len > 0 {
        for (pass, y) in y.chunks_mut(PASS * shape.n).enumerate() {
            run_pass(x, pass * PASS, weight, extras, shape, y);
        }
    }
    Ok(())
}

/// The tokens from `first` on, as many as `y` has rows.
fn run_pass<T: Element, A: Element>(
    x: &[T],
    first: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
    Shape { n, k, .. }: Shape,
    y: &mut [T],
) {
    let tokens: Vec<usize> = (first..first + y.len() / n).collect();
    let gather = |tokens: &[usize]| Tiles::new(tokens, k, |i, row| T::widen(&x[i * k..(i + 1) * k], row));
    let mut sums = gather(&tokens).times(n, |start, row| weight.read(start, row));
    for (a, adapter) in extras.adapters.iter().enumerate() {
        let tokens = extras.tokens_of(a, tokens.iter().copied());
        if !tokens.is_empty() {
            let columns: Vec<usize> = tokens.iter().map(|i| i - first).collect();
            let x = Tiles::new(&tokens, k, |i, row| {
                T::widen(&x[i * k..(i + 1) * k], row);
                extras.dropout.inspect(|dropout| dropout.mask(i, 0.0, row));
            });
            sums.add(&low_rank(&x, adapter, branch_scale(adapter, extras.dropout.as_ref()), n), &columns);
        }
    }
    sums.write(y, |n, sum| {
        let scaled = extras.row_scale.map_or(sum, |row_scale| row_scale[n] * sum);
        extras.bias.map_or(scaled, |bias| scaled + bias[n].to_f32())
    });
}

/// `(scaling · x Aᵀ) Bᵀ`, for tokens of one adapter.
fn low_rank<A: Element>(x: &Tiles, adapter: &LowRank<'_, A>, scaling: f32, n: usize) -> Tiles {
    let rows = |matrix: &[A], start: usize, row: &mut [f32]| A::widen(&matrix[start..start + row.len()], row);
    let mut v = x.times(adapter.rank, |start, row| rows(adapter.lora_a, start, row));
    v.scale(scaling);
    v.times(n, |start, row| rows(adapter.lora_b, start, row))
}

impl<T: Element> Weight<'_, T> {
    /// Elements from a flat index on, in `T` and then widened.
    fn read(&self, start: usize, row: &mut [f32]) {
        match self {
            Weight::Dense { data, .. } => T::widen(&data[start..start + row.len()], row),
            Weight::Nf4(nf4) => nf4.decode_widened::<T>(start, row),
        }
    }
}

impl<T, A> MatmulExtras<'_, T, A> {
    /// Those of the tokens that have the adapter `a`.
    fn tokens_of(&self, a: usize, tokens: impl Iterator<Item = usize>) -> Vec<usize> {
        tokens.filter(|&i| self.adapter_index.map_or(0, |index| index[i]) == a as i32).collect()
    }
}
