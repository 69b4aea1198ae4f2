use faer::linalg::matmul::matmul as product;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::tiles::Tiles;
use crate::cpu::lora_shrink::branch_scale;
use crate::cpu::matmul::check;
use crate::cpu::{LoraGradient, MatmulExtras, Weight};
use crate::nf4::check_len;
use crate::{Element, Error, Result};

/// Tokens whose gradients are made at once, which bounds the buffers.
const PASS: usize = 512;
/// Rows or columns that one task makes.
const TASK: usize = 128;

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
    let tokens: Vec<usize> = (first..first + dx.len() / k).collect();
    let dy = Tiles::new(&tokens, n, |i, row| T::widen(&dy[i * n..(i + 1) * n], row));
    let mut sums = dy.times_transposed(k, |start, row| read(weight, start, row));
    for (a, adapter) in extras.adapters.iter().enumerate() {
        let tokens = extras.tokens_of(a, tokens.iter().copied());
        if adapter.rank == 0 || tokens.is_empty() {
            continue;
        }
        let u = Tiles::new(&tokens, adapter.rank, |i, row| {
            row.copy_from_slice(&u[i * max_rank..][..adapter.rank]);
        });
        let mut branch =
            u.times_transposed(k, |start, row| A::widen(&adapter.lora_a[start..start + row.len()], row));
        if let Some(dropout) = extras.dropout {
            branch.zero(|column, zero| {
                tokens.get(column).inspect(|i| dropout.for_each_dropped(**i, k, zero));
            });
        }
        let columns: Vec<usize> = tokens.iter().map(|i| i - first).collect();
        sums.add(&branch, &columns);
    }
    sums.write(dx, |_, sum| sum);
}

/// Elements of a weight from a flat index on, in `T` and then widened.
fn read<T: Element>(weight: &Weight<'_, T>, start: usize, row: &mut [f32]) {
    match weight {
        Weight::Dense { data, .. } => T::widen(&data[start..start + row.len()], row),
        Weight::Nf4(nf4) => nf4.decode_widened::<T>(start, row),
    }
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
