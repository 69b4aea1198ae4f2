//! The products in parallel, for whole models.
//!
//! Tokens are taken sixteen at a time, with zeros in the place of missing ones, and inputs in runs of a fixed length. So
//! every sum has one order, and a token's output does not depend on what else is in the batch.

use std::ops::Range;

use rayon::prelude::*;

use super::lora_shrink::branch_scale;
use super::matmul::{Shape, check};
use super::{LowRank, MatmulExtras, Weight};
use crate::nf4::check_len;
use crate::{Element, Result};

/// Tokens of a tile: two vectors of AVX2, which is what `gemm`'s kernel takes at once.
const LANES: usize = 16;
/// Rows of a weight that a task decodes at a time: a multiple of the rows that `gemm` takes at once (6 with AVX2; 4, 8 or
/// 12 elsewhere).
const PANEL: usize = 48;
/// Inputs that are summed at a time. No more than the depth at which `gemm` begins to cut by its own rules.
const DEPTH: usize = 512;
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
    let mut sums = gather(&tokens).times(n, |start, row| match weight {
        Weight::Dense { data, .. } => T::widen(&data[start..start + row.len()], row),
        Weight::Nf4(nf4) => nf4.decode_widened::<T>(start, row),
    });
    for (a, adapter) in extras.adapters.iter().enumerate() {
        let theirs = |&i: &usize| extras.adapter_index.map_or(0, |index| index[i]) == a as i32;
        let tokens: Vec<usize> = tokens.iter().copied().filter(theirs).collect();
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
    v.values.as_flattened_mut().iter_mut().for_each(|v| *v *= scaling);
    v.times(n, |start, row| rows(adapter.lora_b, start, row))
}

/// A matrix with a column per token: tiles of `depth` rows, each of `LANES` tokens.
struct Tiles {
    count: usize,
    depth: usize,
    values: Vec<[f32; LANES]>,
}

impl Tiles {
    /// `fill` writes the `depth` values of a token.
    fn new(tokens: &[usize], depth: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut tiles = Self::zeros(tokens.len().div_ceil(LANES), depth);
        let columns = tiles.values.par_chunks_mut(depth.max(1)).zip(tokens.par_chunks(LANES));
        columns.for_each_init(
            || vec![0.0; depth],
            |row, (tile, tokens)| {
                for (lane, &token) in tokens.iter().enumerate() {
                    fill(token, row);
                    for (values, &value) in tile.iter_mut().zip(&*row) {
                        values[lane] = value;
                    }
                }
            },
        );
        tiles
    }

    fn zeros(count: usize, depth: usize) -> Self {
        Self { count, depth, values: vec![[0.0; LANES]; count * depth] }
    }

    /// The product with `n` rows of a matrix as deep as this. `read` writes its values from a flat index on.
    fn times(&self, n: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut product = Self::zeros(self.count, n);
        if self.depth == 0 {
            return product;
        }
        let panels: Vec<_> = (0..n)
            .into_par_iter()
            .step_by(PANEL)
            .map(|first| (first, self.times_panel(first..n.min(first + PANEL), &read)))
            .collect();
        for (first, panel) in panels {
            let rows = panel.depth;
            for tile in 0..self.count {
                product.values[tile * n + first..][..rows]
                    .copy_from_slice(&panel.values[tile * rows..][..rows]);
            }
        }
        product
    }

    fn times_panel(&self, rows: Range<usize>, read: &impl Fn(usize, &mut [f32])) -> Self {
        let mut product = Self::zeros(self.count, rows.len());
        let mut panel = [0.0; PANEL * DEPTH];
        for k in (0..self.depth).step_by(DEPTH) {
            let depth = DEPTH.min(self.depth - k);
            let panel = &mut panel[..rows.len() * depth];
            for (n, row) in rows.clone().zip(panel.chunks_exact_mut(depth)) {
                read(n * self.depth + k, row);
            }
            let tiles = self.values.chunks_exact(self.depth);
            for (x, y) in tiles.zip(product.values.chunks_exact_mut(rows.len())) {
                multiply_add(&x[k..k + depth], panel, y);
            }
        }
        product
    }

    /// Adds column j of `other` to column `columns[j]`.
    fn add(&mut self, other: &Self, columns: &[usize]) {
        for row in 0..self.depth {
            for (from, &to) in columns.iter().enumerate() {
                let delta = other.values[from / LANES * self.depth + row][from % LANES];
                self.values[to / LANES * self.depth + row][to % LANES] += delta;
            }
        }
    }

    /// Writes each column as a row of `y`; `finish` makes the final f32 of row and value.
    fn write<T: Element>(&self, y: &mut [T], finish: impl Fn(usize, f32) -> f32 + Sync) {
        let tiles = y.par_chunks_mut(LANES * self.depth).zip(self.values.par_chunks(self.depth));
        tiles.for_each(|(y, tile)| {
            for (n, values) in tile.iter().enumerate() {
                for (row, &value) in y.chunks_exact_mut(self.depth).zip(values) {
                    row[n] = T::from_f32(finish(n, value));
                }
            }
        });
    }
}

/// `y[n] += Σ_k w[n, k] x[k]` for one tile, in the order of k.
fn multiply_add(x: &[[f32; LANES]], w: &[f32], y: &mut [[f32; LANES]]) {
    let (n, depth) = (y.len(), x.len());
    assert_eq!(w.len(), n * depth);
    // SAFETY: with these strides `gemm` reads LANES * depth values of `x` and depth * n of `w`, and writes LANES * n of
    // `y`, which is how long they are.
    unsafe {
        gemm::gemm(
            LANES,
            n,
            depth,
            y.as_mut_ptr().cast::<f32>(),
            LANES as isize,
            1,
            true,
            x.as_ptr().cast::<f32>(),
            LANES as isize,
            1,
            w.as_ptr(),
            depth as isize,
            1,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
