//! Dot products of tokens with the rows of a matrix.
//!
//! An output has eight sums, one for each lane of a vector: lane j adds inputs j, j + 8, ... in turn, and the lanes are added at the end.
//! This is so for any number of tokens and threads, and so every bit is. What differs is where a row's decoded values stay: for few
//! tokens in registers, for more in the nearest cache, where rows and tokens meet in tiles.

use std::ops::Range;

use rayon::prelude::*;

use crate::Element;
use crate::nf4::Nf4Matrix;
use crate::simd::{GROUP, GROUP_BYTES, LANES, Level, Simd, Vector, with_level};

/// Rows of a task, at most.
const ROWS: usize = 32;
/// Rows that are decoded at a time, and vectors of them: 16 KiB.
const PANEL: usize = 8;
const DEPTH: usize = 64;
/// Up to so many tokens a 4-bit weight is decoded to registers.
const FEW: usize = 4;

/// Rows of f32, padded with zeros to whole vectors.
pub(super) struct Rows {
    vectors: usize,
    values: Vec<Vector>,
}

impl Rows {
    /// `fill` writes the `len` values of a row.
    pub fn new(count: usize, len: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let vectors = len.div_ceil(LANES);
        let mut values = bytemuck::zeroed_vec::<Vector>(count * vectors);
        let rows = values.par_chunks_mut(vectors.max(1)).enumerate();
        rows.for_each(|(i, row)| fill(i, &mut floats(row)[..len]));
        Self { vectors, values }
    }

    pub fn row(&self, i: usize) -> &[Vector] {
        &self.values[i * self.vectors..][..self.vectors]
    }
}

fn floats(vectors: &mut [Vector]) -> &mut [f32] {
    bytemuck::cast_slice_mut(vectors)
}

/// A matrix that is read in parts.
pub(super) trait Matrix: Sync {
    /// The type that 4-bit blocks are decoded to.
    type Element: Element;
    /// The 4-bit blocks that it consists of.
    fn blocks(&self) -> Option<&Nf4Matrix>;
    /// Writes elements from a flat index on, widened. To be inlined into what `simd` runs.
    fn read<S: Simd>(&self, simd: S, start: usize, elements: &mut [f32]);
}

/// More to add to the lanes of some rows, `[rows, tokens]`, before these are added to each other.
pub(super) trait Further: Sync {
    /// To be inlined into what `simd` runs.
    fn add<S: Simd>(&self, simd: S, rows: Range<usize>, lanes: &mut [Vector]);
}

/// Nothing.
impl Further for () {
    fn add<S: Simd>(&self, _: S, _: Range<usize>, _: &mut [Vector]) {}
}

/// What a thread works with.
#[derive(Default)]
struct Scratch {
    lanes: Vec<Vector>,
    scales: Vec<f32>,
}

/// The sums of `n` rows of a matrix, each `k` long, with tokens: `[n, tokens]`.
pub(super) fn dots<M: Matrix>(
    level: Level,
    x: &[&[Vector]],
    [n, k]: [usize; 2],
    matrix: &M,
    further: &impl Further,
) -> Vec<f32> {
    let tokens = x.len();
    let mut sums = vec![0.0; n * tokens];
    // Some tasks for each thread, of whole panels.
    let rows = n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(PANEL).clamp(PANEL, ROWS);
    let tasks = sums.par_chunks_mut((rows * tokens).max(1)).enumerate();
    tasks.for_each_init(Scratch::default, |Scratch { lanes, scales }, (i, sums)| {
        let rows = i * rows..i * rows + sums.len() / tokens;
        lanes.clear();
        lanes.resize(sums.len(), Vector::ZERO);
        with_level!(level, simd => {
            match matrix.blocks() {
                Some(nf4) if tokens <= FEW && k % GROUP == 0 => {
                    few::<_, M::Element>(simd, nf4, k, rows.clone(), x, scales, lanes);
                }
                _ => many(simd, matrix, k, rows.clone(), x, lanes),
            }
            further.add(simd, rows, lanes);
            sums.iter_mut().zip(&*lanes).for_each(|(sum, lanes)| *sum = lanes.sum());
        });
    });
    sums
}

/// Few tokens: decoded values are used where they are made. Rows are whole groups.
#[inline(always)]
fn few<S: Simd, T: Element>(
    simd: S,
    nf4: &Nf4Matrix,
    k: usize,
    rows: Range<usize>,
    x: &[&[Vector]],
    scales: &mut Vec<f32>,
    lanes: &mut [Vector],
) {
    let blocksize = nf4.blocksize();
    let first_block = rows.start * k / blocksize;
    scales.clear();
    nf4.absmax().extend(first_block..(rows.end * k).div_ceil(blocksize), scales);
    let blocks = Blocks {
        packed: nf4.packed(),
        scales,
        first_block,
        shift: blocksize.trailing_zeros(),
        codebook: simd.codebook(nf4.codebook().values()),
    };
    // Two groups of one block at a time, if they always are of one block.
    let pairs = blocksize > GROUP && k % (2 * GROUP) == 0;
    match (x, pairs) {
        (&[a], true) => blocks.rows::<T, 4, 1, 2>(simd, k, rows, [a], lanes),
        (&[a, b], true) => blocks.rows::<T, 4, 2, 2>(simd, k, rows, [a, b], lanes),
        (&[a, b, c], true) => blocks.rows::<T, 2, 3, 2>(simd, k, rows, [a, b, c], lanes),
        (&[a, b, c, d], true) => blocks.rows::<T, 2, 4, 2>(simd, k, rows, [a, b, c, d], lanes),
        (&[a], false) => blocks.rows::<T, 4, 1, 1>(simd, k, rows, [a], lanes),
        (&[a, b], false) => blocks.rows::<T, 4, 2, 1>(simd, k, rows, [a, b], lanes),
        (&[a, b, c], false) => blocks.rows::<T, 2, 3, 1>(simd, k, rows, [a, b, c], lanes),
        (&[a, b, c, d], false) => blocks.rows::<T, 2, 4, 1>(simd, k, rows, [a, b, c, d], lanes),
        _ => unreachable!("few tokens"),
    }
}

/// The codes of a matrix, and the scales of some rows.
struct Blocks<'a, C> {
    packed: &'a [u8],
    scales: &'a [f32],
    first_block: usize,
    shift: u32,
    codebook: C,
}

impl<C> Blocks<'_, C> {
    /// `R` rows at a time, which keep the units of multiplication busy, and `G` groups of each.
    #[inline(always)]
    fn rows<T: Element, const R: usize, const X: usize, const G: usize>(
        &self,
        simd: impl Simd<Codebook = C>,
        k: usize,
        rows: Range<usize>,
        x: [&[Vector]; X],
        lanes: &mut [Vector],
    ) {
        let (row_lanes, _) = lanes.as_chunks_mut::<X>();
        let (blocks, rest) = row_lanes.as_chunks_mut::<R>();
        for (row, lanes) in rows.clone().step_by(R).zip(blocks.iter_mut()) {
            *lanes = self.block::<_, T, R, X, G>(simd, k, row, x);
        }
        for (row, lanes) in (rows.end - rest.len()..).zip(rest) {
            [*lanes] = self.block::<_, T, 1, X, G>(simd, k, row, x);
        }
    }

    /// The lanes of `R` rows with all tokens.
    #[inline(always)]
    fn block<S: Simd<Codebook = C>, T: Element, const R: usize, const X: usize, const G: usize>(
        &self,
        simd: S,
        k: usize,
        row: usize,
        x: [&[Vector]; X],
    ) -> [[Vector; X]; R] {
        const VECTORS: usize = GROUP / LANES;
        let mut sums = [[simd.zero(); X]; R];
        let steps = k / (G * GROUP);
        let x = x.map(|x| &x.as_chunks::<VECTORS>().0.as_chunks::<G>().0[..steps]);
        for step in 0..steps {
            for (r, sums) in sums.iter_mut().enumerate() {
                let start = (row + r) * k + step * G * GROUP;
                let scale = self.scales[(start >> self.shift) - self.first_block];
                let table = simd.floats::<T>(&self.codebook, scale);
                let (codes, _) = self.packed[start / 2..][..G * GROUP_BYTES].as_chunks::<GROUP_BYTES>();
                for (group, codes) in codes.iter().enumerate() {
                    let weights = simd.decode_floats::<T>(&table, codes);
                    for (v, weight) in weights.into_iter().enumerate() {
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum = simd.mul_add(weight, simd.load(&x[step][group][v]), *sum);
                        }
                    }
                }
            }
        }
        let mut lanes = [[Vector::ZERO; X]; R];
        for (lanes, sums) in lanes.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            *lanes = simd.store(*sums);
        }
        lanes
    }
}

/// Any number of tokens: panels of rows are decoded, and multiplied in tiles.
#[inline(always)]
fn many<S: Simd>(
    simd: S,
    matrix: &impl Matrix,
    k: usize,
    rows: Range<usize>,
    x: &[&[Vector]],
    lanes: &mut [Vector],
) {
    let tokens = x.len();
    let mut panel = [[Vector::ZERO; DEPTH]; PANEL];
    for first in (0..k).step_by(DEPTH * LANES) {
        let depth = (k - first).min(DEPTH * LANES);
        let (from, vectors) = (first / LANES, depth.div_ceil(LANES));
        let panels = rows.clone().step_by(PANEL).zip(lanes.chunks_mut(PANEL * tokens));
        for (row, lanes) in panels {
            let panel = &mut panel[..lanes.len() / tokens];
            for (row, weights) in (row..).zip(&mut *panel) {
                let weights = floats(&mut weights[..vectors]);
                matrix.read(simd, row * k + first, &mut weights[..depth]);
                weights[depth..].fill(0.0);
            }
            for (t, x) in x.chunks(3).enumerate() {
                let tiles = panel.chunks(4).zip(lanes.chunks_mut(4 * tokens));
                for (weights, lanes) in tiles {
                    let lanes = &mut lanes[3 * t..];
                    match *x {
                        [a, b, c] => tile_of_rows(simd, weights, [a, b, c].map(|x| &x[from..][..vectors]), lanes, tokens),
                        [a, b] => tile_of_rows(simd, weights, [a, b].map(|x| &x[from..][..vectors]), lanes, tokens),
                        [a] => tile_of_rows(simd, weights, [a].map(|x| &x[from..][..vectors]), lanes, tokens),
                        _ => unreachable!("one to three tokens"),
                    }
                }
            }
        }
    }
}

/// The rows of a tile, four or what is left of them, with its tokens.
#[inline(always)]
fn tile_of_rows<S: Simd, const X: usize>(
    simd: S,
    weights: &[[Vector; DEPTH]],
    x: [&[Vector]; X],
    lanes: &mut [Vector],
    stride: usize,
) {
    if let [a, b, c, d] = weights {
        tile(simd, [a, b, c, d], x, lanes, stride);
    } else {
        for (weights, lanes) in weights.iter().zip(lanes.chunks_mut(stride)) {
            tile(simd, [weights], x, lanes, stride);
        }
    }
}

/// Adds `w x` to the lanes of each row and token: those of a row are `stride` after those of the one before. Twelve sums, and what they
/// are made of, fit into sixteen registers.
#[inline(always)]
fn tile<S: Simd, const R: usize, const X: usize>(
    simd: S,
    weights: [&[Vector; DEPTH]; R],
    x: [&[Vector]; X],
    lanes: &mut [Vector],
    stride: usize,
) {
    let vectors = x[0].len().min(DEPTH);
    let x = x.map(|x| &x[..vectors]);
    let mut sums = [[simd.zero(); X]; R];
    for (sums, lanes) in sums.iter_mut().zip(lanes.chunks(stride)) {
        for (sum, lanes) in sums.iter_mut().zip(lanes) {
            *sum = simd.load(lanes);
        }
    }
    for i in 0..vectors {
        let mut values = [simd.zero(); X];
        for (value, x) in values.iter_mut().zip(x) {
            *value = simd.load(&x[i]);
        }
        for (sums, weights) in sums.iter_mut().zip(weights) {
            let weight = simd.load(&weights[i]);
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = simd.mul_add(weight, value, *sum);
            }
        }
    }
    for (sums, lanes) in sums.into_iter().zip(lanes.chunks_mut(stride)) {
        for (sum, lanes) in sums.into_iter().zip(lanes) {
            *lanes = simd.store(sum);
        }
    }
}
