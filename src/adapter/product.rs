//! `B' A'` in f32, tile by tile, where a weight is merged.

use bytemuck::cast_slice_mut;

use super::update::Update;
use crate::simd::tile::{HEIGHT, WIDTH, Wide, multiply_add, with_height};
use crate::simd::{Level, Simd, Vector, with_level};

/// The factors of a stored weight's update, in the order in which tiles read them.
///
/// An element is `fma(left, right, sum)` for ascending ranks, from 0 on: which tile it is in makes no difference to its bits. (Where
/// machines have no fused multiply-add, products are rounded.)
pub(super) struct Product {
    pub level: Level,
    shape: [usize; 2],
    rank: usize,
    /// `[rows, rank]`.
    left: Vec<f32>,
    /// `[columns / 16, rank]`, with zeros beyond the last column.
    right: Vec<Wide>,
}

/// Columns of a strip, at most.
pub(super) const STRIP: usize = 256;

impl Product {
    pub fn new(update: &Update) -> Self {
        let shape @ [rows, columns] = update.shape();
        // Without elements there is nothing to multiply.
        let rank = if rows * columns == 0 { 0 } else { update.a.len() / update.inputs };
        let (left, right) =
            if update.fan_in_fan_out { (&update.a, &update.b) } else { (&update.b, &update.a) };
        let mut factors = vec![0.0; rows * rank];
        for (row, factors) in factors.chunks_mut(rank.max(1)).enumerate() {
            factors.iter_mut().enumerate().for_each(|(r, to)| *to = left[r * rows + row] as f32);
        }
        let mut packed = vec![[Vector::ZERO; 2]; columns.div_ceil(WIDTH) * rank];
        for (r, row) in right.chunks(columns.max(1)).take(rank).enumerate() {
            for (group, values) in row.chunks(WIDTH).enumerate() {
                let lanes: &mut [f32] = cast_slice_mut(&mut packed[group * rank + r]);
                lanes.iter_mut().zip(values).for_each(|(lane, &value)| *lane = value as f32);
            }
        }
        Self { level: Level::detect(), shape, rank, left: factors, right: packed }
    }

    /// What no element's magnitude exceeds, but for roundings; NaN or an infinity where a factor is.
    pub fn bound(&self) -> f64 {
        let mut largest = vec![[0.0f32; 2]; self.rank];
        // NaN comes before infinity comes before numbers.
        let raise = |largest: &mut f32, v: f32| {
            *largest = f32::from_bits(largest.to_bits().max(v.abs().to_bits()));
        };
        for row in self.left.chunks(self.rank.max(1)) {
            largest.iter_mut().zip(row).for_each(|(largest, &v)| raise(&mut largest[0], v));
        }
        for group in self.right.chunks(self.rank.max(1)) {
            for (largest, values) in largest.iter_mut().zip(group) {
                values.iter().flat_map(|vector| vector.0).for_each(|v| raise(&mut largest[1], v));
            }
        }
        largest.iter().map(|[left, right]| f64::from(*left) * f64::from(*right)).sum()
    }

    /// Columns whose part of the factors stays in a core's cache from one row to the next: 128 KiB of it.
    fn block_columns(&self) -> usize {
        ((1 << 15) / self.rank.max(1)).next_multiple_of(STRIP)
    }

    /// The delta of whole rows from `row` on, as many as `out`, `[rows, columns]`, has: in strips, each of a part of a row. `each`
    /// is given where a strip begins in `out`, and its delta. The instructions are those of the [`Level`].
    #[inline(always)]
    pub fn strips<S: Simd, T>(
        &self,
        simd: S,
        row: usize,
        out: &mut [T],
        mut each: impl FnMut(usize, &mut [T], &mut [f32]),
    ) {
        let (rank, columns, block) = (self.rank, self.shape[1], self.block_columns());
        let mut tile = [[Vector::ZERO; 2]; HEIGHT * STRIP / WIDTH];
        for block in (0..columns).step_by(block).map(|column| column..columns.min(column + block)) {
            for (i, out) in out.chunks_mut(HEIGHT * columns).enumerate() {
                let (rows, first) = (out.len() / columns, i * HEIGHT);
                let left = |r: usize| &self.left[(row + first + r) * rank..][..rank];
                for column in block.clone().step_by(STRIP) {
                    let width = STRIP.min(block.end - column);
                    let groups = width.div_ceil(WIDTH);
                    let tile = &mut tile[..rows * groups];
                    with_height!(rows, R => {
                        let left: [&[f32]; R] = std::array::from_fn(left);
                        for group in 0..groups {
                            let right = &self.right[(column / WIDTH + group) * rank..][..rank];
                            let mut sums = [[Vector::ZERO; 2]; R];
                            multiply_add(simd, right, #[inline(always)] |r, i, _| left[r][i], &mut sums);
                            sums.iter().enumerate().for_each(|(r, sums)| tile[r * groups + group] = *sums);
                        }
                    });
                    let rows = out.chunks_mut(columns).zip(tile.chunks_mut(groups));
                    for (r, (out, delta)) in rows.enumerate() {
                        let delta: &mut [f32] = cast_slice_mut(delta);
                        let start = (first + r) * columns + column;
                        each(start, &mut out[column..column + width], &mut delta[..width]);
                    }
                }
            }
        }
    }

    /// Writes the delta of whole rows, from `row` on.
    pub fn rows(&self, row: usize, out: &mut [f32]) {
        with_level!(self.level, simd => {
            self.strips(simd, row, out, #[inline(always)] |_, out, delta| out.copy_from_slice(delta));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tile has the bits of the definition, wherever it begins, at every level.
    #[test]
    fn tiles_are_the_definition() {
        for (outputs, inputs, rank) in [(1, 1, 1), (5, 33, 3), (9, 16, 0), (6, 700, 17), (0, 4, 2), (4, 0, 2)]
        {
            for (fan_in_fan_out, level) in
                [false, true].into_iter().flat_map(|f| Level::all().into_iter().map(move |level| (f, level)))
            {
                let numbers = |n: usize, seed: usize| -> Vec<f64> {
                    (0..n).map(|i| f64::from(((i * 37 + seed) % 101) as f32 / 64.0 - 0.7)).collect()
                };
                let (a, b) = (numbers(rank * inputs, 1), numbers(rank * outputs, 2));
                let update = Update { outputs, inputs, fan_in_fan_out, a, b };
                let product = Product { level, ..Product::new(&update) };
                let [rows, columns] = update.shape();
                let mut got = vec![f32::NAN; rows * columns];
                product.rows(0, &mut got);
                let (left, right) = match fan_in_fan_out {
                    true => (&update.a, &update.b),
                    false => (&update.b, &update.a),
                };
                for (i, got) in got.iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let wanted = (0..rank).fold(0.0f32, |sum, r| {
                        let (x, y) = (left[r * rows + row] as f32, right[r * columns + column] as f32);
                        match level {
                            Level::Portable(_)
                                if !cfg!(target_feature = "fma") && !cfg!(target_arch = "aarch64") =>
                            {
                                sum + x * y
                            }
                            _ => x.mul_add(y, sum),
                        }
                    });
                    assert_eq!(
                        got.to_bits(),
                        wanted.to_bits(),
                        "{level:?} [{rows}, {columns}] rank {rank}, {i}"
                    );
                }
            }
        }
    }
}
