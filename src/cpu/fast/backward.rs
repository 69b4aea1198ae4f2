use std::ops::Range;

use faer::linalg::matmul::matmul as product;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::read;
use crate::cpu::lora_shrink::branch_scale;
use crate::cpu::matmul::check;
use crate::cpu::{LoraGradient, MatmulExtras, Weight};
use crate::nf4::check_len;
use crate::simd::tile::{HEIGHT, WIDTH, Wide, multiply_add, with_height};
use crate::simd::{Level, Simd, Vector, with_level};
use crate::{Element, Error, Result};

/// Tokens whose gradients are made at once, which bounds the buffers.
const PASS: usize = 256;
/// Rows or columns that one task makes.
const TASK: usize = 128;
/// Columns of the gradient of the inputs that one task makes, and rows of a weight that are multiplied at a time: sixteen columns of them
/// stay in the nearest cache.
const COLUMNS: usize = 128;
const DEPTH: usize = 256;
/// Rows from the one that is decoded to the one that is asked for.
const AHEAD: usize = 12;

/// The gradients of [`super::matmul`] with the same arguments: of the adapters' factors, as
/// [`cpu::lora_gradient`](crate::cpu::lora_gradient) gives them with v and u made again; and of `x`, if `dx` is asked for:
///
/// `dx[i, k] = round_T(Σ_n dy[i, n] w[n, k] + Σ_r u[i, r] A[r, k])`, the second sum where dropout lets `x[i, k]` stay.
///
/// `x` and `dx` are `[m, K]`, `dy` is `[m, N]`; `gradients` has one entry per adapter. The bias plays no part, and DoRA's scale is
/// taken out of `dy` before ([`cpu::dora_gradient`](crate::cpu::dora_gradient)). The same batch gives the same bits on the same kind of
/// CPU, whatever the number of threads; in another batch a token's `dx` may have other last bits, if it has an adapter.
///
/// # Errors
/// [`Error::Argument`] when a length or a rank does not fit, a 4-bit weight is not a matrix, a token's adapter does not exist, or
/// there is a `row_scale`. Nothing is written then.
pub fn backward<T: Element, A: Element>(
    [x, dy]: [&[T]; 2],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
    accumulate: bool,
    gradients: &mut [LoraGradient<'_>],
    dx: Option<&mut [T]>,
) -> Result<()> {
    let shape = check(x, m, weight, extras)?;
    let (n, k) = (shape.n, shape.k);
    if extras.row_scale.is_some() {
        return Err(Error::argument("row_scale", "none: dora_gradient takes it out of dy", "one"));
    }
    check_len("dy", shape.y_len, "elements", dy.len())?;
    check_len("gradients", extras.adapters.len(), "adapters", gradients.len())?;
    for (i, (gradient, adapter)) in gradients.iter().zip(extras.adapters).enumerate() {
        check_len(&format!("gradients[{i}].rank"), adapter.rank, "ranks", gradient.rank)?;
        check_len(
            &format!("gradients[{i}].lora_a"),
            adapter.lora_a.len(),
            "elements",
            gradient.lora_a.len(),
        )?;
        check_len(
            &format!("gradients[{i}].lora_b"),
            adapter.lora_b.len(),
            "elements",
            gradient.lora_b.len(),
        )?;
    }
    if let Some(dx) = &dx {
        check_len("dx", x.len(), "elements", dx.len())?;
    }

    let max_rank = extras.adapters.iter().map(|adapter| adapter.rank).max().unwrap_or(0);
    let mut u = vec![0.0; m * max_rank];
    for (a, (adapter, gradient)) in extras.adapters.iter().zip(gradients).enumerate() {
        if !accumulate {
            gradient.lora_a.fill(0.0);
            gradient.lora_b.fill(0.0);
        }
        let (rank, scale) = (adapter.rank, branch_scale(adapter, extras.dropout.as_ref()));
        if rank == 0 {
            continue;
        }
        let (lora_a, lora_b) = (widened(adapter.lora_a), widened(adapter.lora_b));
        let (lora_a, lora_b) = (matrix(&lora_a, rank, k), matrix(&lora_b, n, rank));
        for tokens in extras.tokens_of(a, 0..m).chunks(PASS) {
            let mut x = gather(x, k, tokens);
            if let Some(dropout) = extras.dropout {
                let rows = x.par_chunks_mut(k.max(1)).zip(tokens);
                rows.for_each(|(row, &i)| dropout.mask(i, 0.0, row));
            }
            let dy = gather(dy, n, tokens);
            let (x, dy) = (matrix(&x, tokens.len(), k), matrix(&dy, tokens.len(), n));
            let v = times(x, lora_a.transpose(), scale);
            let own = times(dy, lora_b, scale);
            for (own, &i) in own.chunks_exact(rank).zip(tokens) {
                u[i * max_rank..][..rank].copy_from_slice(own);
            }
            let (v, own) = (matrix(&v, tokens.len(), rank), matrix(&own, tokens.len(), rank));
            add_product(own.transpose(), x, gradient.lora_a);
            add_product(dy.transpose(), v, gradient.lora_b);
        }
    }
    if let Some(dx) = dx.filter(|dx| !dx.is_empty()) {
        for (pass, dx) in dx.chunks_mut(PASS * k).enumerate() {
            input_gradient(dy, pass * PASS, weight, extras, &u, [n, k, max_rank], dx);
        }
    }
    Ok(())
}

/// The gradients of the tokens from `first` on, as many as `dx` has rows.
fn input_gradient<T: Element, A: Element>(
    dy: &[T],
    first: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
    u: &[f32],
    [n, k, max_rank]: [usize; 3],
    dx: &mut [T],
) {
    let tokens = first..first + dx.len() / k;
    let dy = Parts::new(tokens.len(), n, |i, start, row| {
        T::widen(&dy[(first + i) * n + start..][..row.len()], row);
    });
    let branches = extras.adapters.iter().enumerate().filter(|(_, adapter)| adapter.rank > 0);
    let branches: Vec<_> = branches
        .map(|(a, adapter)| {
            let own = extras.tokens_of(a, tokens.clone());
            let u = Parts::new(own.len(), adapter.rank, |i, start, row| {
                row.copy_from_slice(&u[own[i] * max_rank + start..][..row.len()]);
            });
            (adapter, own, u)
        })
        .collect();
    let level = Level::detect();
    let panels: Vec<Vec<Wide>> = (0..k)
        .into_par_iter()
        .step_by(COLUMNS)
        .map_init(Vec::new, |panel, start| {
            let columns = start..k.min(start + COLUMNS);
            let mut sums = vec![[Vector::ZERO; 2]; tokens.len() * columns.len().div_ceil(WIDTH)];
            with_level!(level, simd => add_columns(simd, &dy, weight, k, columns.clone(), panel, &mut sums));
            for (adapter, own, u) in &branches {
                let mut branch = vec![[Vector::ZERO; 2]; own.len() * columns.len().div_ceil(WIDTH)];
                let lora_a = Weight::Dense { data: adapter.lora_a, n: adapter.rank, k };
                with_level!(level, simd => add_columns(simd, u, &lora_a, k, columns.clone(), panel, &mut branch));
                let branches = branch.chunks_exact_mut(own.len().max(1)).zip(sums.chunks_exact_mut(tokens.len()));
                for (group, (branch, sums)) in branches.enumerate() {
                    for (branch, &i) in branch.iter_mut().zip(own) {
                        let branch: &mut [f32] = bytemuck::cast_slice_mut(branch);
                        if let Some(dropout) = extras.dropout {
                            dropout.mask_from(i, start + group * WIDTH, 0.0, branch);
                        }
                        let sums: &mut [f32] = bytemuck::cast_slice_mut(&mut sums[i - first]);
                        sums.iter_mut().zip(branch).for_each(|(sum, branch)| *sum += *branch);
                    }
                }
            }
            sums
        })
        .collect();
    dx.par_chunks_mut(k).enumerate().for_each(|(i, dx)| {
        for (dx, panel) in dx.chunks_mut(COLUMNS).zip(&panels) {
            for (dx, sums) in dx.chunks_mut(WIDTH).zip(panel.chunks_exact(tokens.len())) {
                T::round(&bytemuck::cast_slice(&sums[i])[..dx.len()], dx);
            }
        }
    });
}

/// Rows in parts of [`DEPTH`] values: the first parts of all rows, then the second ones. So what is multiplied at one time lies together.
struct Parts {
    count: usize,
    len: usize,
    values: Vec<f32>,
}

impl Parts {
    /// `fill` writes values of a row from some place on.
    fn new(count: usize, len: usize, fill: impl Fn(usize, usize, &mut [f32]) + Sync) -> Self {
        let mut values = vec![0.0; count * len];
        let parts = values.par_chunks_mut((count * DEPTH).max(1)).enumerate();
        parts.for_each(|(part, rows)| {
            let rows = rows.chunks_mut(rows.len() / count).enumerate();
            rows.for_each(|(i, row)| fill(i, part * DEPTH, row));
        });
        Self { count, len, values }
    }

    #[inline(always)]
    fn row(&self, part: usize, i: usize) -> &[f32] {
        let depth = DEPTH.min(self.len - part * DEPTH);
        &self.values[part * DEPTH * self.count + i * depth..][..depth]
    }
}

/// Adds the product of rows, each `depth` long, and some columns of a weight `[depth, k]`, by groups of columns: `[groups, rows]`. To be
/// inlined into what `simd` runs.
#[inline(always)]
fn add_columns<S: Simd, T: Element>(
    simd: S,
    rows: &Parts,
    weight: &Weight<'_, T>,
    k: usize,
    columns: Range<usize>,
    panel: &mut Vec<Wide>,
    sums: &mut [Wide],
) {
    let groups = columns.len().div_ceil(WIDTH);
    let Parts { count, len: depth, .. } = *rows;
    panel.resize(groups * DEPTH, [Vector::ZERO; 2]);
    for (part, start) in (0..depth).step_by(DEPTH).enumerate() {
        let steps = DEPTH.min(depth - start);
        for step in 0..steps {
            let mut row = [[Vector::ZERO; 2]; COLUMNS / WIDTH];
            let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut row);
            let place = |row: usize| row * k + columns.start;
            let ahead = start + step + AHEAD;
            if ahead < depth {
                prefetch(simd, weight, place(ahead), columns.len());
            }
            read(simd, weight, place(start + step), &mut floats[..columns.len()]);
            for (row, panel) in row.iter().zip(panel.chunks_exact_mut(DEPTH)) {
                panel[step] = *row;
            }
        }
        for (panel, sums) in panel.chunks_exact(DEPTH).zip(sums.chunks_exact_mut(count.max(1))) {
            for (first, sums) in (0..count).step_by(HEIGHT).zip(sums.chunks_mut(HEIGHT)) {
                with_height!(sums.len(), R => {
                    let rows: [&[f32]; R] = std::array::from_fn(|r| rows.row(part, first + r));
                    multiply(simd, rows, &panel[..steps], sums.as_chunks_mut().0);
                });
            }
        }
    }
}

/// Asks for elements of a weight: pieces of rows are far from each other, and no machine guesses the next one.
#[inline(always)]
fn prefetch<S: Simd, T: Element>(simd: S, weight: &Weight<'_, T>, start: usize, len: usize) {
    let bytes = match weight {
        Weight::Dense { data, .. } => bytemuck::cast_slice(&data[start..start + len]),
        Weight::Nf4(nf4) => &nf4.packed()[start / 2..(start + len).div_ceil(2)],
    };
    const LINE: usize = 64;
    bytes.iter().step_by(LINE).chain(bytes.last()).for_each(|byte| simd.prefetch(byte));
}

#[inline(never)]
fn multiply<S: Simd, const R: usize>(simd: S, rows: [&[f32]; R], values: &[Wide], sums: &mut [[Wide; R]]) {
    simd.run(
        #[inline(always)]
        || {
            let rows = rows.map(|row| &row[..values.len()]);
            multiply_add(
                simd,
                values,
                #[inline(always)]
                |r, i, _| rows[r][i],
                &mut sums[0],
            );
        },
    );
}

/// Rows of a matrix, in f32.
fn gather<T: Element>(values: &[T], columns: usize, rows: &[usize]) -> Vec<f32> {
    let mut gathered = vec![0.0; rows.len() * columns];
    let to = gathered.par_chunks_mut(columns.max(1)).zip(rows);
    to.for_each(|(to, i)| T::widen(&values[i * columns..(i + 1) * columns], to));
    gathered
}

fn widened<A: Element>(values: &[A]) -> Vec<f32> {
    let mut wide = vec![0.0; values.len()];
    A::widen(values, &mut wide);
    wide
}

fn matrix(values: &[f32], rows: usize, columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(values, rows, columns)
}

/// `factor left right`, row-major.
fn times(left: MatRef<'_, f32>, right: MatRef<'_, f32>, factor: f32) -> Vec<f32> {
    let mut result = vec![0.0; left.nrows() * right.ncols()];
    let to = MatMut::from_row_major_slice_mut(&mut result, left.nrows(), right.ncols());
    to.par_row_chunks_mut(TASK).enumerate().for_each(|(i, to)| {
        let rows = left.subrows(i * TASK, to.nrows());
        product(to, Accum::Replace, rows, right, factor, Par::Seq);
    });
    result
}

/// `sum += left right`, row-major. The longer side of the sum is divided among tasks.
fn add_product(left: MatRef<'_, f32>, right: MatRef<'_, f32>, sum: &mut [f32]) {
    let sum = MatMut::from_row_major_slice_mut(sum, left.nrows(), right.ncols());
    if left.nrows() > right.ncols() {
        sum.par_row_chunks_mut(TASK).enumerate().for_each(|(i, sum)| {
            let rows = left.subrows(i * TASK, sum.nrows());
            product(sum, Accum::Add, rows, right, 1.0, Par::Seq);
        });
    } else {
        sum.par_col_chunks_mut(TASK).enumerate().for_each(|(i, sum)| {
            let columns = right.subcols(i * TASK, sum.ncols());
            product(sum, Accum::Add, left, columns, 1.0, Par::Seq);
        });
    }
}
