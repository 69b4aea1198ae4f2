//! Dot products of tokens with the rows of a matrix.
//!
//! An output has eight sums, one for each lane of a vector: lane j adds inputs j, j + 8, ... in turn, and the lanes are added at the end.
//! This is so for any number of tokens and threads, and so every bit is. What differs is where a row's decoded values stay: for few
//! tokens in registers, for more in the nearest cache, where rows and tokens meet in tiles.

use std::ops::Range;

use rayon::prelude::*;

use crate::Element;
use crate::nf4::Nf4Matrix;
use crate::simd::{GROUP, GROUP_BYTES, LANES, Level, Simd, Vector, canonical, with_level};

/// Rows of a task, at most.
const ROWS: usize = 32;
/// Rows that are decoded at a time, and vectors of them: 16 KiB.
const PANEL: usize = 8;
pub(super) const DEPTH: usize = 64;
/// Up to so many tokens a 4-bit weight is decoded to registers.
const FEW: usize = 4;

/// Rows of f32, padded with zeros to whole vectors, in parts of [`DEPTH`] vectors: the first parts of all rows, then the second ones. So
/// what is multiplied at one time lies together.
pub(super) struct Rows {
    count: usize,
    vectors: usize,
    values: Vec<Vector>,
}

impl Rows {
    /// `fill` writes values of a row from some place on, a multiple of 512.
    pub fn new(count: usize, len: usize, fill: impl Fn(usize, usize, &mut [f32]) + Sync) -> Self {
        let vectors = len.div_ceil(LANES);
        let mut values = bytemuck::zeroed_vec::<Vector>(count * vectors);
        let parts = values.par_chunks_mut((count * DEPTH).max(1)).enumerate();
        parts.for_each(|(part, rows)| {
            let start = part * DEPTH * LANES;
            for (i, row) in rows.chunks_mut(rows.len() / count).enumerate() {
                let len = (len - start).min(row.len() * LANES);
                fill(i, start, &mut floats(row)[..len]);
            }
        });
        Self { count, vectors, values }
    }

    /// A part of a row.
    #[inline(always)]
    pub fn part(&self, part: usize, row: usize) -> &[Vector] {
        let depth = DEPTH.min(self.vectors - part * DEPTH);
        &self.values[part * DEPTH * self.count + row * depth..][..depth]
    }
}

fn floats(vectors: &mut [Vector]) -> &mut [f32] {
    bytemuck::cast_slice_mut(vectors)
}

/// Some rows, by their numbers.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a> {
    pub rows: &'a Rows,
    pub numbers: &'a [usize],
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
    x: Tokens<'_>,
    [n, k]: [usize; 2],
    matrix: &M,
    further: &impl Further,
) -> Vec<f32> {
    let tokens = x.numbers.len();
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
                Some(nf4) if tokens <= FEW && k.is_multiple_of(GROUP) => {
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
    x: Tokens<'_>,
    scales: &mut Vec<f32>,
    lanes: &mut [Vector],
) {
    let blocksize = nf4.blocksize();
    let first_block = rows.start * k / blocksize;
    scales.clear();
    nf4.absmax().extend(first_block..(rows.end * k).div_ceil(blocksize), scales);
    scales.iter_mut().for_each(|scale| *scale = canonical(*scale));
    let blocks = Blocks {
        packed: nf4.packed(),
        scales,
        first_block,
        shift: blocksize.trailing_zeros(),
        codebook: simd.codebook(nf4.codebook().values()),
    };
    // Two groups of one block at a time, if they always are of one block.
    let pairs = blocksize > GROUP && k.is_multiple_of(2 * GROUP);
    let rows = (rows, k);
    match (x.numbers, pairs) {
        (&[a], true) => blocks.rows::<_, T, 4, 1, 2>(simd, rows, x.rows, [a], lanes),
        (&[a, b], true) => blocks.rows::<_, T, 4, 2, 2>(simd, rows, x.rows, [a, b], lanes),
        (&[a, b, c], true) => blocks.rows::<_, T, 2, 3, 2>(simd, rows, x.rows, [a, b, c], lanes),
        (&[a, b, c, d], true) => blocks.rows::<_, T, 2, 4, 2>(simd, rows, x.rows, [a, b, c, d], lanes),
        (&[a], false) => blocks.rows::<_, T, 4, 1, 1>(simd, rows, x.rows, [a], lanes),
        (&[a, b], false) => blocks.rows::<_, T, 4, 2, 1>(simd, rows, x.rows, [a, b], lanes),
        (&[a, b, c], false) => blocks.rows::<_, T, 2, 3, 1>(simd, rows, x.rows, [a, b, c], lanes),
        (&[a, b, c, d], false) => blocks.rows::<_, T, 2, 4, 1>(simd, rows, x.rows, [a, b, c, d], lanes),
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
    fn rows<S: Simd<Codebook = C>, T: Element, const R: usize, const X: usize, const G: usize>(
        &self,
        simd: S,
        (rows, k): (Range<usize>, usize),
        x: &Rows,
        tokens: [usize; X],
        lanes: &mut [Vector],
    ) {
        let (row_lanes, _) = lanes.as_chunks_mut::<X>();
        let (blocks, rest) = row_lanes.as_chunks_mut::<R>();
        for (row, lanes) in rows.clone().step_by(R).zip(blocks.iter_mut()) {
            self.block::<_, T, R, X, G>(simd, (row, k), x, tokens, lanes);
        }
        for (row, lanes) in (rows.end - rest.len()..).zip(rest.as_chunks_mut::<1>().0) {
            self.block::<_, T, 1, X, G>(simd, (row, k), x, tokens, lanes);
        }
    }

    /// The lanes of `R` rows with all tokens.
    #[expect(clippy::needless_range_loop, reason = "compilers unroll loops over numbers, and need to here")]
    #[inline(always)]
    fn block<S: Simd<Codebook = C>, T: Element, const R: usize, const X: usize, const G: usize>(
        &self,
        simd: S,
        (row, k): (usize, usize),
        x: &Rows,
        tokens: [usize; X],
        lanes: &mut [[Vector; X]; R],
    ) {
        const VECTORS: usize = GROUP / LANES;
        let mut sums = [[simd.zero(); X]; R];
        for part in 0..x.vectors.div_ceil(DEPTH) {
            let mut values = [&[][..]; X];
            for (values, token) in values.iter_mut().zip(tokens) {
                *values = x.part(part, token).as_chunks::<VECTORS>().0.as_chunks::<G>().0;
            }
            let (steps, begin) = (values[0].len(), part * DEPTH * LANES);
            let mut codes = [&[][..]; R];
            for (r, codes) in codes.iter_mut().enumerate() {
                let bytes = &self.packed[((row + r) * k + begin) / 2..][..steps * G * GROUP_BYTES];
                *codes = bytes.as_chunks::<GROUP_BYTES>().0.as_chunks::<G>().0;
            }
            for step in 0..steps {
                let mut tables = [simd.floats::<T>(&self.codebook, 0.0); R];
                for r in 0..R {
                    let start = (row + r) * k + begin + step * G * GROUP;
                    let scale = self.scales[(start >> self.shift) - self.first_block];
                    tables[r] = simd.floats::<T>(&self.codebook, scale);
                }
                // One row after the other: the sums of one are waited for while others are decoded.
                for group in 0..G {
                    for r in 0..R {
                        let weights = simd.decode_floats::<T>(&tables[r], &codes[r][step][group]);
                        for v in 0..VECTORS {
                            for t in 0..X {
                                let value = simd.load(&values[t][step][group][v]);
                                sums[r][t] = simd.mul_add(weights[v], value, sums[r][t]);
                            }
                        }
                    }
                }
            }
        }
        for (lanes, sums) in lanes.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            *lanes = simd.store(*sums);
        }
    }
}

/// Any number of tokens: panels of rows are decoded, and multiplied in tiles.
#[inline(always)]
fn many<S: Simd>(
    simd: S,
    matrix: &impl Matrix,
    k: usize,
    rows: Range<usize>,
    x: Tokens<'_>,
    lanes: &mut [Vector],
) {
    let tokens = x.numbers.len();
    let mut panel = [[Vector::ZERO; DEPTH]; PANEL];
    for first in (0..k).step_by(DEPTH * LANES) {
        let depth = (k - first).min(DEPTH * LANES);
        let (part, vectors) = (first / (DEPTH * LANES), depth.div_ceil(LANES));
        let panels = rows.clone().step_by(PANEL).zip(lanes.chunks_mut(PANEL * tokens));
        for (row, lanes) in panels {
            let panel = &mut panel[..lanes.len() / tokens];
            for (row, weights) in (row..).zip(&mut *panel) {
                let weights = floats(&mut weights[..vectors]);
                matrix.read(simd, row * k + first, &mut weights[..depth]);
                weights[depth..].fill(0.0);
            }
            for (t, numbers) in x.numbers.chunks(3).enumerate() {
                let tiles = panel.chunks(4).zip(lanes.chunks_mut(4 * tokens));
                for (weights, lanes) in tiles {
                    let lanes = &mut lanes[3 * t..];
                    match *numbers {
                        [a, b, c] => tile_of_rows(
                            simd,
                            weights,
                            [a, b, c].map(|i| x.rows.part(part, i)),
                            lanes,
                            tokens,
                        ),
                        [a, b] => {
                            tile_of_rows(simd, weights, [a, b].map(|i| x.rows.part(part, i)), lanes, tokens)
                        }
                        [a] => tile_of_rows(simd, weights, [a].map(|i| x.rows.part(part, i)), lanes, tokens),
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
