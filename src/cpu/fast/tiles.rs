use std::ops::Range;

use rayon::prelude::*;

use crate::Element;

/// Tokens of a tile: two vectors of AVX2, which is what `gemm`'s kernel takes at once.
const LANES: usize = 16;
/// Columns of a weight that a task decodes at a time, a multiple of the rows that `gemm` takes at once (6 with AVX2; 4, 8 or 12
/// elsewhere); and rows of it, no more than the depth at which `gemm` begins to cut by its own rules.
const COLUMNS: usize = 96;
const RUN: usize = 256;

/// A matrix with a column per token: tiles of `depth` rows, each of `LANES` tokens.
pub(super) struct Tiles {
    count: usize,
    depth: usize,
    values: Vec<[f32; LANES]>,
}

impl Tiles {
    /// `fill` writes the `depth` values of a token.
    pub fn new(tokens: &[usize], depth: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
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

    /// The product with the rows of a matrix `[depth, n]`: each value of a token times a row, added up. `read` writes its values
    /// from a flat index on.
    pub fn times_transposed(&self, n: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut product = Self::zeros(self.count, n);
        let panels: Vec<_> = (0..n)
            .into_par_iter()
            .step_by(COLUMNS)
            .map(|first| (first, self.times_transposed_panel(first..n.min(first + COLUMNS), n, &read)))
            .collect();
        for (first, panel) in panels {
            product.put(first, &panel);
        }
        product
    }

    fn times_transposed_panel(
        &self,
        columns: Range<usize>,
        n: usize,
        read: &impl Fn(usize, &mut [f32]),
    ) -> Self {
        let width = columns.len();
        let mut product = Self::zeros(self.count, width);
        let mut panel = vec![0.0; width * RUN.min(self.depth)];
        for k in (0..self.depth).step_by(RUN) {
            let depth = RUN.min(self.depth - k);
            let panel = &mut panel[..width * depth];
            for (k, row) in (k..k + depth).zip(panel.chunks_exact_mut(width)) {
                read(k * n + columns.start, row);
            }
            let tiles = self.values.chunks_exact(self.depth);
            for (x, y) in tiles.zip(product.values.chunks_exact_mut(width)) {
                multiply_add(&x[k..k + depth], panel, y);
            }
        }
        product
    }

    /// Takes rows of the product, from `first` on.
    fn put(&mut self, first: usize, panel: &Self) {
        for tile in 0..self.count {
            self.values[tile * self.depth + first..][..panel.depth]
                .copy_from_slice(&panel.values[tile * panel.depth..][..panel.depth]);
        }
    }

    /// Puts 0 in the rows of a column that `list` calls its second argument with.
    pub fn zero(&mut self, list: impl Fn(usize, &mut dyn FnMut(usize)) + Sync) {
        self.values.par_chunks_mut(self.depth.max(1)).enumerate().for_each(|(tile, values)| {
            (0..LANES).for_each(|lane| list(tile * LANES + lane, &mut |row| values[row][lane] = 0.0));
        });
    }

    /// Adds column j of `other` to column `columns[j]`.
    pub fn add(&mut self, other: &Self, columns: &[usize]) {
        for row in 0..self.depth {
            for (from, &to) in columns.iter().enumerate() {
                let delta = other.values[from / LANES * self.depth + row][from % LANES];
                self.values[to / LANES * self.depth + row][to % LANES] += delta;
            }
        }
    }

    /// Writes each column as a row of `y`; `finish` makes the final f32 of row and value.
    pub fn write<T: Element>(&self, y: &mut [T], finish: impl Fn(usize, f32) -> f32 + Sync) {
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

/// `y[n] += Σ_k w[n, k] x[k]` for one tile, in the order of k; `w` is `[k, n]`.
fn multiply_add(x: &[[f32; LANES]], w: &[f32], y: &mut [[f32; LANES]]) {
    let (n, depth) = (y.len(), x.len());
    assert_eq!(w.len(), n * depth);
    // SAFETY: with these strides (1 and LANES, 1 and n) `gemm` reads LANES * depth values of `x` and depth * n of `w`, and writes LANES * n of
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
            1,
            n as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
