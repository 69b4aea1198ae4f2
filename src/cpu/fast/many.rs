//! Any number of tokens: they are columns, sixteen or eight to a group, which meet six rows at a time in tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::{Branch, Inputs, read};
use crate::Element;
use crate::cpu::Weight;
use crate::simd::tile::{HEIGHT, WIDTH, Wide, multiply_add, with_height};
use crate::simd::{LANES, Simd, Vector};

/// Vectors of a row that are decoded at a time: with six rows, 12 KiB.
const DEPTH: usize = 64;

/// A matrix with a column per token, by lanes: the rows j, j + 8, ... lie together, for each j, and for each group of columns. It is cut
/// into parts of [`DEPTH`] times eight rows, so that what is multiplied at one time stays in a core's cache.
pub(super) struct Columns {
    tokens: usize,
    vectors: usize,
    values: Vec<Wide>,
}

/// Columns that are multiplied at a time.
#[derive(Clone, Copy)]
struct Group {
    first: usize,
    tokens: usize,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    /// Sixteen tokens of one lane, two vectors.
    Wide,
    /// Eight tokens: a vector of one lane, and one of the next.
    Narrow,
}

impl Kind {
    /// Pairs of vectors that hold one row of each lane.
    fn pairs(self) -> usize {
        match self {
            Kind::Wide => LANES,
            Kind::Narrow => LANES / 2,
        }
    }

    /// Where the sums, or values, of a lane and a token are: pair, vector, element.
    #[inline(always)]
    fn place(self, lane: usize, token: usize) -> [usize; 3] {
        match self {
            Kind::Wide => [lane, token / LANES, token % LANES],
            Kind::Narrow => [lane / 2, lane % 2, token],
        }
    }
}

/// The groups of a number of tokens: the last one is narrow if that is enough.
fn groups(tokens: usize) -> impl Iterator<Item = Group> + Clone {
    (0..tokens).step_by(WIDTH).map(move |first| {
        let tokens = WIDTH.min(tokens - first);
        Group { first, tokens, kind: if tokens > LANES { Kind::Wide } else { Kind::Narrow } }
    })
}

/// Pairs of vectors that hold one row of each lane and token.
fn pairs(tokens: usize) -> usize {
    groups(tokens).map(|group| group.kind.pairs()).sum()
}

impl Columns {
    /// `fill` writes values of a token from some row on, a multiple of 512.
    pub fn new(tokens: usize, len: usize, fill: impl Fn(usize, usize, &mut [f32]) + Sync) -> Self {
        let (vectors, pairs) = (len.div_ceil(LANES), pairs(tokens));
        let mut values = bytemuck::zeroed_vec::<Wide>(vectors * pairs);
        let parts = values.par_chunks_mut((DEPTH * pairs).max(1)).enumerate();
        parts.for_each(|(part, values)| {
            let (start, depth) = (part * DEPTH * LANES, values.len() / pairs);
            let mut row = [Vector::ZERO; DEPTH];
            let mut rest = values;
            for Group { first, tokens, kind } in groups(tokens) {
                let values;
                (values, rest) = rest.split_at_mut(kind.pairs() * depth);
                for token in 0..tokens {
                    let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut row);
                    let len = (len - start).min(depth * LANES);
                    fill(first + token, start, &mut floats[..len]);
                    floats[len..].fill(0.0);
                    for lane in 0..LANES {
                        let [pair, half, place] = kind.place(lane, token);
                        let to = &mut values[pair * depth..][..depth];
                        for (to, from) in to.iter_mut().zip(&row) {
                            to[half].0[place] = from.0[lane];
                        }
                    }
                }
            }
        });
        Self { tokens, vectors, values }
    }

    /// The groups of a part, with their values `[pairs, depth]`.
    #[inline(always)]
    fn part(&self, part: usize, pairs: usize) -> impl Iterator<Item = (Group, &[Wide])> {
        let depth = self.depth(part);
        let mut rest = &self.values[part * DEPTH * pairs..][..depth * pairs];
        groups(self.tokens).map(move |group| {
            let values;
            (values, rest) = rest.split_at(group.kind.pairs() * depth);
            (group, values)
        })
    }

    fn depth(&self, part: usize) -> usize {
        DEPTH.min(self.vectors - part * DEPTH)
    }
}

/// What a thread works with: lanes of sums, `[panels, groups, pairs, rows]`; and those of one group.
#[derive(Default)]
pub(super) struct Scratch {
    lanes: Vec<Wide>,
    group: Vec<Wide>,
}

/// The sums of some rows of a weight with all tokens, `[rows, tokens]`.
pub(super) fn dots<S: Simd, T: Element, A: Element>(
    simd: S,
    weight: &Weight<'_, T>,
    (rows, k): (Range<usize>, usize),
    x: &Columns,
    branches: &[Branch<'_, A>],
    scratch: &mut Scratch,
    sums: &mut [f32],
) {
    let pairs = pairs(x.tokens);
    scratch.lanes.clear();
    scratch.lanes.resize(rows.len() * pairs, [Vector::ZERO; 2]);
    add_products(simd, weight, (rows.clone(), k), x, None, pairs, scratch);
    for Branch { adapter, tokens, v } in branches {
        let Inputs::Many(v) = v else { unreachable!("many tokens") };
        let lora_b = Weight::Dense { data: adapter.lora_b, n: 0, k: adapter.rank };
        add_products(simd, &lora_b, (rows.clone(), adapter.rank), v, Some(tokens), pairs, scratch);
    }
    let panels = sums.chunks_mut(HEIGHT * x.tokens).zip(scratch.lanes.chunks(HEIGHT * pairs));
    panels.for_each(|(sums, lanes)| {
        simd.run(
            #[inline(always)]
            || sum_lanes(x.tokens, lanes, sums),
        );
    });
}

/// Adds the products of rows and columns to the lanes; with a list of tokens, only theirs.
fn add_products<S: Simd, T: Element>(
    simd: S,
    weight: &Weight<'_, T>,
    (rows, k): (Range<usize>, usize),
    x: &Columns,
    own: Option<&[usize]>,
    pairs: usize,
    Scratch { lanes, group: copy }: &mut Scratch,
) {
    let mut panel = [[Vector::ZERO; DEPTH]; HEIGHT];
    for part in 0..x.vectors.div_ceil(DEPTH) {
        let (start, depth) = (part * DEPTH * LANES, x.depth(part));
        let len = (k - start).min(depth * LANES);
        for (row, lanes) in rows.clone().step_by(HEIGHT).zip(lanes.chunks_mut(HEIGHT * pairs)) {
            let height = lanes.len() / pairs;
            for (row, weights) in (row..).zip(&mut panel[..height]) {
                let weights: &mut [f32] = bytemuck::cast_slice_mut(&mut weights[..depth]);
                simd.run(
                    #[inline(always)]
                    || read(simd, weight, row * k + start, &mut weights[..len]),
                );
                weights[len..].fill(0.0);
            }
            let mut rest = lanes;
            for (group, values) in x.part(part, pairs) {
                let sums;
                (sums, rest) = rest.split_at_mut(group.kind.pairs() * height);
                let Some(own) = own else {
                    multiply(simd, group.kind, &panel[..height], depth, values, sums);
                    continue;
                };
                let own = own.iter().filter_map(|token| token.checked_sub(group.first));
                let own = own.filter(|token| *token < group.tokens);
                if own.clone().count() == group.tokens {
                    multiply(simd, group.kind, &panel[..height], depth, values, sums);
                } else if own.clone().count() > 0 {
                    copy.clear();
                    copy.extend_from_slice(sums);
                    multiply(simd, group.kind, &panel[..height], depth, values, copy);
                    for token in own {
                        for lane in 0..LANES {
                            let [pair, half, place] = group.kind.place(lane, token);
                            for i in pair * height..(pair + 1) * height {
                                sums[i][half].0[place] = copy[i][half].0[place];
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The products of some rows and a group.
#[inline(always)]
fn multiply<S: Simd>(
    simd: S,
    kind: Kind,
    rows: &[[Vector; DEPTH]],
    depth: usize,
    values: &[Wide],
    sums: &mut [Wide],
) {
    with_height!(rows.len(), R => {
        let rows = rows.first_chunk::<R>().expect("as many rows");
        match kind {
            Kind::Wide => multiply_pairs::<_, R, LANES>(simd, rows, depth, values, sums),
            Kind::Narrow => multiply_pairs::<_, R, { LANES / 2 }>(simd, rows, depth, values, sums),
        }
    });
}

#[inline(never)]
fn multiply_pairs<S: Simd, const R: usize, const PAIRS: usize>(
    simd: S,
    rows: &[[Vector; DEPTH]; R],
    depth: usize,
    values: &[Wide],
    sums: &mut [Wide],
) {
    simd.run(
        #[inline(always)]
        || {
            let depth = depth.min(DEPTH);
            for (pair, sums) in sums.as_chunks_mut::<R>().0.iter_mut().take(PAIRS).enumerate() {
                let lane = |half: usize| if PAIRS == LANES { pair } else { 2 * pair + half } % LANES;
                multiply_add(
                    simd,
                    &values[pair * depth..][..depth],
                    #[inline(always)]
                    |r, i, half| rows[r][i].0[lane(half)],
                    sums,
                );
            }
        },
    );
}

/// Adds the lanes of a panel's sums to each other. To be inlined into what a `simd` runs.
#[inline(always)]
fn sum_lanes(tokens: usize, lanes: &[Wide], sums: &mut [f32]) {
    let height = sums.len() / tokens;
    let mut rest = lanes;
    for group in groups(tokens) {
        let lanes;
        (lanes, rest) = rest.split_at(group.kind.pairs() * height);
        for (r, sums) in sums.chunks_exact_mut(tokens).enumerate() {
            let sums = &mut sums[group.first..][..group.tokens];
            for (half, sums) in sums.chunks_mut(LANES).enumerate() {
                let lane = |lane: usize| {
                    let [pair, vector, _] = group.kind.place(lane, half * LANES);
                    lanes[pair * height + r][vector].0
                };
                let lanes: [[f32; LANES]; LANES] = std::array::from_fn(lane);
                let total: [f32; LANES] = std::array::from_fn(|t| Vector(lanes.map(|lane| lane[t])).sum());
                sums.copy_from_slice(&total[..sums.len()]);
            }
        }
    }
}
