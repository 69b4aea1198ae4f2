//! Few tokens: weights are multiplied where they are decoded, in registers.

use std::ops::Range;

use super::{Branch, Inputs};
use crate::Element;
use crate::cpu::Weight;
use crate::simd::{GROUP, GROUP_BYTES, LANES, Simd, Vector, canonical};

/// Whether these are few: rows have to be whole groups, too.
pub(super) fn are(tokens: usize, k: usize) -> bool {
    tokens <= 4 && k.is_multiple_of(GROUP)
}

/// Rows of f32, padded with zeros to whole vectors.
pub(super) struct Rows {
    vectors: usize,
    values: Vec<Vector>,
}

impl Rows {
    /// `fill` writes the values of a row.
    pub fn new(count: usize, len: usize, fill: impl Fn(usize, &mut [f32])) -> Self {
        let vectors = len.div_ceil(LANES);
        let mut values = bytemuck::zeroed_vec::<Vector>(count * vectors);
        for (i, row) in values.chunks_mut(vectors.max(1)).enumerate() {
            fill(i, &mut bytemuck::cast_slice_mut(row)[..len]);
        }
        Self { vectors, values }
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &[Vector] {
        &self.values[i * self.vectors..][..self.vectors]
    }
}

/// What a thread works with.
#[derive(Default)]
pub(super) struct Scratch {
    lanes: Vec<Vector>,
    scales: Vec<f32>,
}

/// The sums of some rows of a weight with all tokens, `[rows, tokens]`. To be inlined into what `simd` runs.
#[inline(always)]
pub(super) fn dots<S: Simd, T: Element, A: Element>(
    simd: S,
    weight: &Weight<'_, T>,
    (rows, k): (Range<usize>, usize),
    x: &Rows,
    branches: &[Branch<'_, A>],
    Scratch { lanes, scales }: &mut Scratch,
    sums: &mut [f32],
) {
    let tokens = sums.len() / rows.len();
    lanes.clear();
    lanes.resize(sums.len(), Vector::ZERO);
    match weight {
        Weight::Dense { data, .. } => {
            products(simd, &Elements(data), (rows.clone(), k), true, x, tokens, lanes)
        }
        Weight::Nf4(nf4) => {
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
                element: std::marker::PhantomData::<T>,
            };
            // Two groups of one block at a time, if they always are of one block.
            products(simd, &blocks, (rows.clone(), k), blocksize > GROUP, x, tokens, lanes);
        }
    }
    for branch in branches {
        add_branch(simd, branch, rows.clone(), tokens, lanes);
    }
    sums.iter_mut().zip(&*lanes).for_each(|(sum, lanes)| *sum = lanes.sum());
}

/// Weights that are read by groups of 32.
trait Source<S: Simd> {
    type Group;
    /// What neighbouring groups have in common.
    type Shared: Copy;
    fn groups(&self, start: usize, count: usize) -> &[Self::Group];
    fn shared(&self, simd: S, start: usize) -> Self::Shared;
    fn weights(&self, simd: S, shared: &Self::Shared, group: &Self::Group) -> [S::Lanes; GROUP / LANES];
}

struct Elements<'a, T>(&'a [T]);

impl<S: Simd, T: Element> Source<S> for Elements<'_, T> {
    type Group = [[T; LANES]; GROUP / LANES];
    type Shared = ();

    #[inline(always)]
    fn groups(&self, start: usize, count: usize) -> &[Self::Group] {
        self.0[start..][..count * GROUP].as_chunks().0.as_chunks().0
    }

    #[inline(always)]
    fn shared(&self, _: S, _: usize) {}

    #[inline(always)]
    fn weights(&self, simd: S, (): &(), group: &Self::Group) -> [S::Lanes; GROUP / LANES] {
        let mut weights = [simd.zero(); GROUP / LANES];
        for (weights, elements) in weights.iter_mut().zip(group) {
            *weights = simd.widen(elements);
        }
        weights
    }
}

/// The codes of a matrix, and the scales of some rows.
struct Blocks<'a, C, T> {
    packed: &'a [u8],
    scales: &'a [f32],
    first_block: usize,
    shift: u32,
    codebook: C,
    /// What is decoded to.
    element: std::marker::PhantomData<T>,
}

impl<S: Simd, T: Element> Source<S> for Blocks<'_, S::Codebook, T> {
    type Group = [u8; GROUP_BYTES];
    type Shared = S::Floats<T>;

    #[inline(always)]
    fn groups(&self, start: usize, count: usize) -> &[Self::Group] {
        self.packed[start / 2..][..count * GROUP_BYTES].as_chunks().0
    }

    #[inline(always)]
    fn shared(&self, simd: S, start: usize) -> Self::Shared {
        simd.floats::<T>(&self.codebook, self.scales[(start >> self.shift) - self.first_block])
    }

    #[inline(always)]
    fn weights(&self, simd: S, shared: &Self::Shared, group: &Self::Group) -> [S::Lanes; GROUP / LANES] {
        simd.decode_floats::<T>(shared, group)
    }
}

#[inline(always)]
fn products<S: Simd, W: Source<S>>(
    simd: S,
    source: &W,
    rows: (Range<usize>, usize),
    by_twos: bool,
    x: &Rows,
    tokens: usize,
    lanes: &mut [Vector],
) {
    match (tokens, by_twos && rows.1.is_multiple_of(2 * GROUP)) {
        (1, true) => by_rows::<_, _, 4, 1, 2>(simd, source, rows, x, lanes),
        (2, true) => by_rows::<_, _, 4, 2, 2>(simd, source, rows, x, lanes),
        (3, true) => by_rows::<_, _, 2, 3, 2>(simd, source, rows, x, lanes),
        (4, true) => by_rows::<_, _, 2, 4, 2>(simd, source, rows, x, lanes),
        (1, false) => by_rows::<_, _, 4, 1, 1>(simd, source, rows, x, lanes),
        (2, false) => by_rows::<_, _, 4, 2, 1>(simd, source, rows, x, lanes),
        (3, false) => by_rows::<_, _, 2, 3, 1>(simd, source, rows, x, lanes),
        (4, false) => by_rows::<_, _, 2, 4, 1>(simd, source, rows, x, lanes),
        _ => unreachable!("few tokens"),
    }
}

/// `R` rows at a time, which keep the units of multiplication busy, and `G` groups of each.
#[inline(always)]
fn by_rows<S: Simd, W: Source<S>, const R: usize, const X: usize, const G: usize>(
    simd: S,
    source: &W,
    (rows, k): (Range<usize>, usize),
    x: &Rows,
    lanes: &mut [Vector],
) {
    let (row_lanes, _) = lanes.as_chunks_mut::<X>();
    let (blocks, rest) = row_lanes.as_chunks_mut::<R>();
    for (row, lanes) in rows.clone().step_by(R).zip(blocks.iter_mut()) {
        some_rows::<_, _, R, X, G>(simd, source, (row, k), x, lanes);
    }
    for (row, lanes) in (rows.end - rest.len()..).zip(rest.as_chunks_mut::<1>().0) {
        some_rows::<_, _, 1, X, G>(simd, source, (row, k), x, lanes);
    }
}

/// The lanes of `R` rows with all tokens.
#[expect(clippy::needless_range_loop, reason = "compilers unroll loops over numbers, and need to here")]
#[inline(always)]
fn some_rows<S: Simd, W: Source<S>, const R: usize, const X: usize, const G: usize>(
    simd: S,
    source: &W,
    (row, k): (usize, usize),
    x: &Rows,
    lanes: &mut [[Vector; X]; R],
) {
    const VECTORS: usize = GROUP / LANES;
    let mut sums = [[simd.zero(); X]; R];
    let steps = k / (G * GROUP);
    let mut values = [&[][..]; X];
    for (token, values) in values.iter_mut().enumerate() {
        *values = &x.row(token).as_chunks::<VECTORS>().0.as_chunks::<G>().0[..steps];
    }
    let mut groups = [&[][..]; R];
    for (r, groups) in groups.iter_mut().enumerate() {
        *groups = &source.groups((row + r) * k, steps * G).as_chunks::<G>().0[..steps];
    }
    for step in 0..steps {
        let mut shared = [source.shared(simd, row * k + step * G * GROUP); R];
        for r in 1..R {
            shared[r] = source.shared(simd, (row + r) * k + step * G * GROUP);
        }
        // One row after the other: the sums of one are waited for while others are decoded.
        for group in 0..G {
            for r in 0..R {
                let weights = source.weights(simd, &shared[r], &groups[r][step][group]);
                for v in 0..VECTORS {
                    for t in 0..X {
                        let value = simd.load(&values[t][step][group][v]);
                        sums[r][t] = simd.mul_add(weights[v], value, sums[r][t]);
                    }
                }
            }
        }
    }
    for (lanes, sums) in lanes.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
        *lanes = simd.store(*sums);
    }
}

/// Adds `v Bᵀ` of the tokens that have an adapter to their lanes.
#[inline(always)]
fn add_branch<S: Simd, A: Element>(
    simd: S,
    Branch { adapter, tokens: own, v }: &Branch<'_, A>,
    rows: Range<usize>,
    tokens: usize,
    lanes: &mut [Vector],
) {
    let Inputs::Few(v) = v else { unreachable!("few tokens") };
    let rank = adapter.rank;
    let mut row = vec![Vector::ZERO; rank.div_ceil(LANES)];
    for (n, lanes) in rows.zip(lanes.chunks_exact_mut(tokens)) {
        A::widen(&adapter.lora_b[n * rank..][..rank], &mut bytemuck::cast_slice_mut(&mut row)[..rank]);
        for (i, &token) in own.iter().enumerate() {
            let mut sum = simd.load(&lanes[token]);
            for (b, v) in row.iter().zip(v.row(i)) {
                sum = simd.mul_add(simd.load(b), simd.load(v), sum);
            }
            lanes[token] = simd.store(sum);
        }
    }
}
