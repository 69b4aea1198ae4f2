use std::ops::{AddAssign, Mul, Range};

use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::{Adapter, Base};
use crate::{DType, Error, Result};

/// Elements of a weight that one task works on: they and their sums stay in a core's cache.
pub(super) const PANEL: usize = 1 << 16;

/// `delta = B A` in f64, with the scaling in B.
#[derive(Debug, Clone)]
pub(super) struct Update {
    pub outputs: usize,
    pub inputs: usize,
    pub fan_in_fan_out: bool,
    /// `[rank, inputs]`.
    pub a: Vec<f64>,
    /// `[rank, outputs]`: transposed, so that ranks can be appended.
    pub b: Vec<f64>,
}

impl Update {
    /// Of the shape that `adapter` has, with rank 0.
    pub fn empty(adapter: &Adapter) -> Self {
        let (outputs, inputs) = (adapter.out_features(), adapter.in_features());
        Self { outputs, inputs, fan_in_fan_out: adapter.fan_in_fan_out(), a: Vec::new(), b: Vec::new() }
    }

    /// The adapter's delta (for DoRA, that of its direction).
    pub fn of(adapter: &Adapter) -> Self {
        let mut update = Self::unscaled(adapter);
        update.b.iter_mut().for_each(|b| *b *= adapter.scaling());
        update
    }

    /// The same without the scaling.
    pub fn unscaled(adapter: &Adapter) -> Self {
        let mut update = Self::empty(adapter);
        update.a = adapter.lora_a().to_f64();
        if let Adapter::AdaLora(adalora) = adapter {
            for (row, e) in update.a.chunks_mut(update.inputs.max(1)).zip(adalora.lora_e().to_f64()) {
                row.iter_mut().for_each(|a| *a *= e);
            }
        }
        let (rank, b) = (adapter.rank(), adapter.lora_b().to_f64());
        update.b = vec![0.0; b.len()];
        for (n, row) in b.chunks(rank.max(1)).enumerate() {
            row.iter().enumerate().for_each(|(r, &b)| update.b[r * update.outputs + n] = b);
        }
        update
    }

    /// Appends the ranks of `other`, which has the same shape.
    pub fn append(&mut self, other: &Self) {
        self.a.extend(&other.a);
        self.b.extend(&other.b);
    }

    /// Scales each output's delta.
    pub fn scale(&mut self, row_scale: &[f64]) {
        for (i, b) in self.b.iter_mut().enumerate() {
            *b *= row_scale[i % row_scale.len()];
        }
    }

    /// Of the weight as it is stored.
    pub fn shape(&self) -> [usize; 2] {
        if self.fan_in_fan_out { [self.inputs, self.outputs] } else { [self.outputs, self.inputs] }
    }

    /// Rows of a panel: a multiple of `step`, [`PANEL`] elements or few more.
    pub fn panel_rows(&self, step: usize) -> usize {
        panel_rows(self.shape()[1], step)
    }

    /// The factors in `R`, by the sides of the stored weight.
    pub fn sides<R>(&self, narrow: impl Fn(f64) -> R) -> Sides<R> {
        let narrow = |values: &[f64]| values.iter().map(|&v| narrow(v)).collect();
        let (left, right) = if self.fan_in_fan_out { (&self.a, &self.b) } else { (&self.b, &self.a) };
        Sides { left: narrow(left), right: narrow(right), shape: self.shape() }
    }

    /// In the layout of the weight, row-major.
    pub fn delta(&self) -> Result<Vec<f64>> {
        let [rows, columns] = self.shape();
        let (sides, panel_rows) = (self.sides(|v| v), self.panel_rows(1));
        let mut delta = zeros("delta", rows, columns)?;
        delta.par_chunks_mut((panel_rows * columns).max(1)).enumerate().for_each(|(i, panel)| {
            sides.product(i * panel_rows, panel);
        });
        Ok(delta)
    }

    /// `||W + delta||` of each output, over the inputs. The base, which has this shape, is read once.
    pub fn norms(&self, base: Base<'_>) -> Vec<f64> {
        let [rows, columns] = self.shape();
        let (sides, panel_rows) = (self.sides(|v| v), self.panel_rows(1));
        let squares: Vec<Vec<f64>> = panels(rows, panel_rows)
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|panel| {
                let mut sum = read(base, base.dtype(), panel.clone(), columns);
                sides.add_product(panel.start, &mut sum);
                sum.iter_mut().for_each(|v| *v *= *v);
                if self.fan_in_fan_out { sum_rows(&sum, columns) } else { sum_columns(&sum, panel.len()) }
            })
            .collect();
        let squares =
            if self.fan_in_fan_out { sum_rows(&squares.concat(), columns) } else { squares.concat() };
        squares.into_iter().map(f64::sqrt).collect()
    }
}

fn panel_rows(columns: usize, step: usize) -> usize {
    (PANEL / columns.max(1)).next_multiple_of(step).max(step)
}

/// Elements of a panel of rows of a length: whole rows, and whole blocks of `blocksize`, a power of two.
pub(crate) fn panel_len(columns: usize, blocksize: usize) -> usize {
    // So many rows fill whole blocks.
    let step = blocksize >> columns.trailing_zeros().min(blocksize.trailing_zeros());
    (panel_rows(columns, step) * columns).max(blocksize)
}

/// The two sides of a stored weight's update: `left`ᵀ `right`.
pub(super) struct Sides<R> {
    /// `[rank, rows]`.
    left: Vec<R>,
    /// `[rank, columns]`.
    right: Vec<R>,
    shape: [usize; 2],
}

impl<R: RealField> Sides<R> {
    /// `[rank, rows]` and `[rank, columns]`.
    pub fn into_factors(self) -> (Vec<R>, Vec<R>) {
        (self.left, self.right)
    }

    /// Writes the delta of whole rows, from `row` on.
    pub fn product(&self, row: usize, panel: &mut [R]) {
        if self.right.is_empty() {
            panel.fill(R::zero_impl());
        }
        self.multiply(row, Accum::Replace, panel);
    }

    /// Adds the delta of whole rows, from `row` on.
    pub fn add_product(&self, row: usize, panel: &mut [R]) {
        self.multiply(row, Accum::Add, panel);
    }

    fn multiply(&self, row: usize, accum: Accum, panel: &mut [R]) {
        let [rows, columns] = self.shape;
        if panel.is_empty() || self.right.is_empty() {
            return;
        }
        let rank = self.right.len() / columns;
        let left = MatRef::from_row_major_slice(&self.left, rank, rows);
        let right = MatRef::from_row_major_slice(&self.right, rank, columns);
        let count = panel.len() / columns;
        let panel = MatMut::from_row_major_slice_mut(panel, count, columns);
        matmul(panel, accum, left.subcols(row, count).transpose(), right, R::one_impl(), Par::Seq);
    }
}

impl<R: Copy + Default + Mul<Output = R> + AddAssign> Sides<R> {
    /// Writes the delta of elements from `start` on: the rounded products of ascending ranks, added one by one. These bits
    /// do not depend on the machine, nor on where a run begins.
    pub fn run(&self, start: usize, out: &mut [R]) {
        /// Sums that stay in registers.
        const TILE: usize = 32;
        let [rows, columns] = self.shape;
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let (row, column) = (at / columns, at % columns);
            let count = (columns - column).min(rest.len());
            let (run, tail) = rest.split_at_mut(count);
            let left: Vec<R> = self.left.iter().skip(row).step_by(rows).copied().collect();
            for (t, tile) in run.chunks_mut(TILE).enumerate() {
                let mut sums = [R::default(); TILE];
                for (left, right) in left.iter().zip(self.right.chunks(columns)) {
                    let right = &right[column + t * TILE..][..tile.len()];
                    sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += *left * *right);
                }
                tile.copy_from_slice(&sums[..tile.len()]);
            }
            (at, rest) = (at + count, tail);
        }
    }
}

/// Ranges of `rows` rows, `panel_rows` at a time.
pub(super) fn panels(rows: usize, panel_rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(panel_rows).map(move |row| row..rows.min(row + panel_rows))
}

/// `[rows, columns]` zeros. Factors of rank 0 can ask for any size.
pub(super) fn zeros(argument: &str, rows: usize, columns: usize) -> Result<Vec<f64>> {
    let mut zeros = Vec::new();
    let len = rows.checked_mul(columns).filter(|&len| zeros.try_reserve_exact(len).is_ok());
    let Some(len) = len else {
        return Err(Error::argument(argument, "a size that fits in memory", format!("[{rows}, {columns}]")));
    };
    zeros.resize(len, 0.0);
    Ok(zeros)
}

/// Rows of a base; 4-bit blocks are dequantised to `dtype`.
pub(super) fn read(base: Base<'_>, dtype: DType, rows: Range<usize>, columns: usize) -> Vec<f64> {
    let mut narrow = vec![0.0; rows.len() * columns];
    base.read(dtype, rows.start * columns, &mut narrow);
    narrow.into_iter().map(f64::from).collect()
}

fn sum_rows(values: &[f64], columns: usize) -> Vec<f64> {
    let mut sums = vec![0.0; columns];
    for row in values.chunks(columns.max(1)) {
        sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    }
    sums
}

fn sum_columns(values: &[f64], rows: usize) -> Vec<f64> {
    let columns = values.len() / rows;
    (0..rows).map(|row| values[row * columns..(row + 1) * columns].iter().sum()).collect()
}
