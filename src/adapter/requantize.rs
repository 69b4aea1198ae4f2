//! Quantising a merged weight again, without losing what has been merged into it.

use rayon::prelude::*;

use super::merge::{Change, Direction, Merged, Panel, Pass, RUN, Unmerged, round_to, vectorised};
use super::{Base, MergeReport};
use crate::nf4::{
    Absmax, Codebook, Coder, NestedAbsmax, Nf4Matrix, block_count, largest_magnitude, nest, packed_len,
};
use crate::{DType, Error, Result};

/// How a merged weight is quantised again, and how much of the adapters has to be left.
///
/// The elements of a 4-bit weight lie on the values of its codes. Rounding to the nearest one swallows every delta below
/// half a step: of a delta of 3 % of the weight PEFT's way leaves 4 %, with a warning that says nothing of it. What to do
/// instead:
///
/// * Merge into 16 bits, when there is room for that; or do not merge: a fused low-rank branch costs little.
/// * [`Rounding::KeepGain`] with [`Scale::LeastError`], when it has to be 4 bits and nothing else. The delta is retained in
///   full. Where it is a tenth of the weight or more, the error is that of PEFT's way or less; where it is smaller, the error is
///   larger than the delta, as 4 bits have no room for it.
/// * [`Rounding::Stochastic`], when every single element has to be right on average. Its noise is up to twice that.
/// * A remainder beside the weight ([`Stack::remainder`](super::Stack::remainder)), when several adapters have been merged and a
///   small one may stay.
///
/// `bytes per weight` counts codes, scales, and a remainder in bf16. The output error is `‖x (W' - W - D)ᵀ‖ / ‖x Dᵀ‖`, for
/// real activations and for normal ones. The table is printed by `cargo run --release --example merge_loss`.
///
#[doc = include_str!("merge_loss.md")]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Requantize {
    /// Which absmax a block is stored with.
    pub scale: Scale,
    /// Which code an element takes.
    pub rounding: Rounding,
    /// The least [`MergeReport::retained_gain`]; a merge that is left with less is refused. 0.9 by default.
    pub min_gain: f64,
}

/// Which absmax a block is stored with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scale {
    /// Its largest magnitude, as when a weight is quantised for the first time. Nested scales are quantised anew.
    Largest,
    /// The one with the least squared error, of the one that the block has had (with it, what the adapters do not touch
    /// stays as it is), the largest magnitude, and shares of it. Nested scales are tried as they are stored, with the offset
    /// and the scales that they have had.
    LeastError,
}

/// Which code an element takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// That of the nearest value.
    Nearest,
    /// That of one of the two nearest values, at random, with the element as its mean. So every element's delta is retained
    /// on average, at the cost of noise.
    Stochastic {
        /// An element's code depends on this number and its place alone. Weights of a model should have different ones.
        seed: u64,
    },
    /// That of the nearest value; then, in every 65536 elements or a few more, codes take a step along the wanted delta until
    /// that is retained: those first where it adds the least to the error for what it gains.
    KeepGain,
}

impl Default for Requantize {
    /// What PEFT does, with a threshold: the largest magnitude, the nearest value.
    fn default() -> Self {
        Self { scale: Scale::Largest, rounding: Rounding::Nearest, min_gain: 0.9 }
    }
}

impl Requantize {
    /// The same, whatever is lost. Weights that are not all numbers are refused none the less.
    pub fn forced(self) -> Self {
        Self { min_gain: f64::NEG_INFINITY, ..self }
    }
}

impl Pass<Nf4Matrix> for Requantize {
    fn merge(self, weight: Base<'_>, change: &Change<'_>) -> Result<Merged<Nf4Matrix>> {
        if self.min_gain.is_nan() {
            return Err(Error::argument("target.min_gain", "a number", self.min_gain));
        }
        let quantizer = Quantizer {
            change,
            requantize: self,
            weight: nf4("weight", weight)?,
            direction: Direction::Merge,
        };
        let (weight, report) = quantizer.run()?;
        Ok(Merged { weight, report: report.require("weight", self.min_gain)? })
    }

    fn unmerge(self, merged: Base<'_>, change: &Change<'_>) -> Result<Unmerged<Nf4Matrix>> {
        let quantizer = Quantizer {
            change,
            requantize: self,
            weight: nf4("merged", merged)?,
            direction: Direction::Unmerge,
        };
        let (weight, _) = quantizer.run()?;
        Ok(Unmerged { undetermined: weight.numel() as u64, weight })
    }
}

fn nf4<'a>(argument: &str, weight: Base<'a>) -> Result<&'a Nf4Matrix> {
    match weight {
        Base::Nf4(nf4) => Ok(nf4),
        Base::Dense(tensor) => {
            Err(Error::argument(argument, "a 4-bit weight, as the target is", tensor.dtype()))
        }
    }
}

/// A weight on its way to codes and scales.
struct Quantizer<'a> {
    change: &'a Change<'a>,
    requantize: Requantize,
    weight: &'a Nf4Matrix,
    direction: Direction,
}

/// Scales that are to be stored, and how.
enum Scales {
    Plain,
    Nested(NestedAbsmax),
}

impl Quantizer<'_> {
    fn run(&self) -> Result<(Nf4Matrix, MergeReport)> {
        let weight = self.weight;
        let (numel, blocksize, old) = (weight.numel(), weight.blocksize(), weight.absmax());
        let mut absmax = vec![0.0; block_count(numel, blocksize)];
        let (scales, mut q) = match old {
            Absmax::Plain(_) => (Scales::Plain, Vec::new()),
            Absmax::Nested(nested) => {
                // Scales are quantised together, so they have to be known first.
                self.scales(&mut absmax)?;
                let nested = match self.requantize.scale {
                    Scale::Largest => nest(&absmax),
                    Scale::LeastError => nested.nearest_to(&absmax),
                };
                let q = nested.q().to_vec();
                (Scales::Nested(nested), q)
            }
        };
        let mut packed = vec![0; packed_len(numel)];
        let panel = self.change.panel_len(blocksize);
        // There are as many of these as of blocks, or none.
        let q_panel = if q.is_empty() { 0 } else { panel / blocksize };
        let mut q_panels: Vec<&mut [u8]> = match q_panel {
            0 => (0..numel.div_ceil(panel)).map(|_| &mut [][..]).collect(),
            _ => q.chunks_mut(q_panel).collect(),
        };
        let reports: Vec<Result<MergeReport>> = packed
            .par_chunks_mut(panel / 2)
            .zip(absmax.par_chunks_mut(panel / blocksize))
            .zip(q_panels.par_iter_mut())
            .enumerate()
            .map_init(Scratch::default, |scratch, (i, ((packed, absmax), q))| {
                let (start, mut report) = (i * panel, MergeReport::default());
                let whole = [start, panel.min(numel - start), self.run_len(panel)];
                let Scratch { panel, ranks, stored } = scratch;
                self.change.runs(self.direction, self.weight, whole, panel, |first, panel| {
                    self.change.check_finite(first, &panel.sum, DType::F32)?;
                    let (at, len) = (first - start, panel.sum.len());
                    let packed = &mut packed[at / 2..(at + len).div_ceil(2)];
                    let blocks = at / blocksize..(at + len).div_ceil(blocksize);
                    let q = if q.is_empty() { &mut [][..] } else { &mut q[blocks.clone()] };
                    let absmax = &mut absmax[blocks];
                    report += self.codes(first, &scales, (panel, ranks, stored), packed, absmax, q)?;
                    Ok(())
                })?;
                Ok(report)
            })
            .collect();
        let mut report: MergeReport = reports.into_iter().sum::<Result<_>>()?;
        let absmax = match scales {
            Scales::Plain => Absmax::Plain(absmax),
            Scales::Nested(nested) => Absmax::Nested(nested.with_q(q)),
        };
        count_scales(old, &absmax, &mut report);
        let (shape, codebook) = (weight.shape(), weight.codebook().clone());
        Ok((Nf4Matrix::from_parts(shape, packed, absmax, blocksize, codebook, weight.dtype())?, report))
    }

    /// The scale that each block should have, before it is quantised itself.
    fn scales(&self, absmax: &mut [f32]) -> Result<()> {
        let (blocksize, numel) = (self.weight.blocksize(), self.weight.numel());
        let panel = self.change.panel_len(blocksize);
        absmax
            .par_chunks_mut(panel / blocksize)
            .enumerate()
            .map_init(Panel::default, |scratch, (i, absmax)| {
                let start = i * panel;
                let grid = Grid::new(self.weight.codebook());
                let whole = [start, panel.min(numel - start), RUN];
                self.change.runs(self.direction, self.weight, whole, scratch, |first, panel| {
                    self.change.check_finite(first, &panel.sum, DType::F32)?;
                    let absmax = &mut absmax[(first - start) / blocksize..];
                    for (b, (block, absmax)) in panel.sum.chunks(blocksize).zip(absmax).enumerate() {
                        *absmax = self.scale(&grid, first / blocksize + b, block);
                    }
                    Ok(())
                })
            })
            .collect::<Vec<_>>()
            .into_iter()
            .collect()
    }

    /// How many elements are rounded together, in panels of so many.
    fn run_len(&self, panel: usize) -> usize {
        if self.requantize.rounding == Rounding::KeepGain { panel } else { RUN }
    }

    /// The scale for a block of values.
    fn scale(&self, grid: &Grid, index: usize, block: &[f32]) -> f32 {
        let largest = largest_magnitude(block);
        match self.requantize.scale {
            Scale::Largest => largest,
            Scale::LeastError => grid.least_error(block, self.weight.absmax().get(index), largest),
        }
    }

    /// Codes and scales of a run, and its report.
    fn codes(
        &self,
        start: usize,
        scales: &Scales,
        (panel, ranks, stored): (&mut Panel, &mut Vec<u8>, &mut Vec<f32>),
        packed: &mut [u8],
        absmax: &mut [f32],
        q: &mut [u8],
    ) -> Result<MergeReport> {
        let blocksize = self.weight.blocksize();
        let grid = Grid::new(self.weight.codebook());
        ranks.clear();
        ranks.resize(2 * packed.len(), grid.coder.zero_rank());
        stored.clear();
        let blocks = panel.sum.chunks(blocksize).zip(ranks.chunks_mut(blocksize)).zip(absmax).enumerate();
        for (b, ((block, ranks), absmax)) in blocks {
            let (index, ranks) = (start / blocksize + b, &mut ranks[..block.len()]);
            match scales {
                Scales::Plain => {
                    *absmax = self.scale(&grid, index, block);
                    stored.push(*absmax);
                }
                Scales::Nested(nested) if self.requantize.scale == Scale::LeastError => {
                    (q[b], *absmax) = grid.least_error_nested(block, nested, index);
                    stored.push(*absmax);
                }
                Scales::Nested(nested) => {
                    stored.push(nested.get(index));
                    // bitsandbytes takes the codes before it quantises the scale.
                    if self.requantize.rounding != Rounding::Nearest {
                        *absmax = nested.get(index);
                    }
                }
            }
            vectorised(|| grid.coder.nearest(block, *absmax, ranks));
        }
        let numel = panel.sum.len();
        match self.requantize.rounding {
            Rounding::Nearest => {}
            Rounding::Stochastic { seed } => {
                grid.stochastic(seed, start, &panel.sum, blocksize, stored, ranks)
            }
            Rounding::KeepGain => {
                let (elements, bits) = (
                    [&panel.sum[..], &panel.delta, &panel.weight],
                    gain_bits(self.change.panel_len(blocksize)),
                );
                grid.compensate(elements, bits, blocksize, stored, ranks);
            }
        }
        grid.coder.pack(ranks, packed);
        // What is stored, as it decodes.
        for ((sum, ranks), absmax) in
            panel.sum.chunks_mut(blocksize).zip(ranks[..numel].chunks(blocksize)).zip(&*stored)
        {
            let mut values = grid.values.map(|value| value * absmax);
            round_to(self.weight.dtype(), &mut values);
            sum.iter_mut().zip(ranks).for_each(|(sum, &rank)| *sum = values[usize::from(rank & 15)]);
        }
        self.change.check_finite(start, &panel.sum, self.weight.dtype())?;
        let old = &self.weight.packed()[start / 2..start / 2 + packed.len()];
        let mut report = panel.report();
        vectorised(|| count_codes(&old[..numel / 2], packed, &mut report));
        if let (1, [.., old], [.., new]) = (numel % 2, old, packed) {
            // One code, and what is beside it.
            report.changed += u64::from((*old ^ *new) >> 4 != 0);
            report.changed_bytes += u64::from(old != new);
        }
        report.bytes += old.len() as u64;
        Ok(report)
    }
}

/// What a thread works with.
#[derive(Default)]
struct Scratch {
    panel: Panel,
    /// Of each element's code, among the values in ascending order.
    ranks: Vec<u8>,
    /// The scales as they decode.
    stored: Vec<f32>,
}

/// The values of a codebook in ascending order.
pub(crate) struct Grid {
    pub coder: Coder,
    pub values: [f32; 16],
}

/// Candidates for a block's scale, as shares of its largest magnitude.
pub(crate) const SHARES: [f32; 12] = [1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.83, 0.8, 1.02, 1.05];

impl Grid {
    pub fn new(codebook: &Codebook) -> Self {
        let values = codebook.codes().map(|code| codebook.values()[usize::from(code)]);
        Self { coder: Coder::new(codebook), values }
    }

    /// The squared error of a block that is stored with this scale, and the scale that would suit its codes best.
    fn try_scale(&self, block: &[f32], absmax: f32, ranks: &mut [u8]) -> (f64, f32) {
        /// Side by side, then added pairwise: the order in which a warp adds them.
        const LANES: usize = 32;
        self.coder.nearest(block, absmax, ranks);
        let [mut error, mut product, mut norm] = [[0.0f64; LANES]; 3];
        for (block, ranks) in block.chunks(LANES).zip(ranks.chunks(LANES)) {
            for (lane, (&x, &rank)) in block.iter().zip(ranks).enumerate() {
                let value = self.values[usize::from(rank & 15)];
                let (missed, value) = (f64::from(x - value * absmax), f64::from(value));
                error[lane] += missed * missed;
                product[lane] += f64::from(x) * value;
                norm[lane] += value * value;
            }
        }
        let sum = |mut lanes: [f64; LANES]| {
            for step in [16, 8, 4, 2, 1] {
                (0..step).for_each(|lane| lanes[lane] += lanes[lane + step]);
            }
            lanes[0]
        };
        (sum(error), (sum(product) / sum(norm)) as f32)
    }

    /// The scale with the least error: of the one before, shares of the largest magnitude, and what suits the codes of the
    /// best of these.
    pub fn least_error(&self, block: &[f32], before: f32, largest: f32) -> f32 {
        let mut ranks = [0; 4096];
        let ranks = &mut ranks[..block.len()];
        let (mut best, mut best_error, mut refined) = (before, f64::INFINITY, before);
        let mut attempt = |absmax: f32| {
            if absmax > 0.0 && absmax.is_finite() {
                let (error, better) = self.try_scale(block, absmax, ranks);
                if error < best_error {
                    (best, best_error, refined) = (absmax, error, better);
                }
            }
            refined
        };
        let mut refined = attempt(before);
        for share in SHARES {
            refined = attempt(share * largest);
        }
        for _ in 0..3 {
            refined = attempt(refined);
        }
        if best_error.is_finite() { best } else { largest }
    }

    /// The index of a nested scale with the least error, about the one that is nearest to the wanted scale; and the scale.
    fn least_error_nested(&self, block: &[f32], nested: &NestedAbsmax, index: usize) -> (u8, f32) {
        let mut ranks = [0; 4096];
        let q = nested.q()[index];
        let candidates = [q, q.saturating_sub(1), q.saturating_add(1)].map(|q| (q, nested.scale(index, q)));
        let mut tried = candidates.map(|(q, absmax)| {
            let error = match absmax > 0.0 {
                true => self.try_scale(block, absmax, &mut ranks[..block.len()]).0,
                false => block.iter().map(|&x| f64::from(x) * f64::from(x)).sum(),
            };
            (error, q, absmax)
        });
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
        (tried[0].1, tried[0].2)
    }

    /// Moves codes to the other neighbour of an element, as often as that makes the element their mean.
    pub fn stochastic(
        &self,
        seed: u64,
        start: usize,
        sum: &[f32],
        blocksize: usize,
        scales: &[f32],
        ranks: &mut [u8],
    ) {
        for (i, (x, rank)) in sum.iter().zip(ranks).enumerate() {
            let absmax = scales[i / blocksize];
            let missed = x - self.values[usize::from(*rank)] * absmax;
            let Some((other, step)) = self.step(*rank, missed, absmax) else { continue };
            if uniform(seed, (start + i) as u64) * step < missed.abs() {
                *rank = other;
            }
        }
    }

    /// Moves codes along the delta until the whole panel retains it. Sums are of integers, multiples of a unit that leaves room for
    /// a panel of [`gain_bits`]: they do not depend on an order.
    pub fn compensate(
        &self,
        [wanted, delta, weight]: [&[f32]; 3],
        gain_bits: u32,
        blocksize: usize,
        scales: &[f32],
        ranks: &mut [u8],
    ) {
        /// As many as a non-negative f32 has exponents and four bits of its mantissa.
        const BINS: usize = 1 << 12;
        struct Step {
            place: usize,
            to: u8,
            gain: f64,
            /// Of the price: squared error per gain.
            bin: usize,
        }
        // Of each element what is missing of the delta, and what a step along it gains.
        let (mut missing, mut steps) = (Vec::with_capacity(wanted.len()), Vec::with_capacity(wanted.len()));
        for (i, ((&x, &d), &w)) in wanted.iter().zip(delta).zip(weight).enumerate() {
            let absmax = scales[i / blocksize];
            let stored = self.values[usize::from(ranks[i])] * absmax;
            missing.push(f64::from(d) * f64::from(d - (stored - w)));
            let Some((to, step)) = self.step(ranks[i], d, absmax) else { continue };
            let along = 2.0 * (x - stored);
            let price = (step - if d > 0.0 { along } else { -along }) / d.abs();
            let bin = if price > 0.0 { (price.to_bits() >> 19) as usize } else { 0 };
            steps.push(Step { place: i, to, gain: f64::from(step) * f64::from(d.abs()), bin });
        }
        let terms = missing.iter().map(|v| v.abs()).chain(steps.iter().map(|step| step.gain));
        let top = terms.fold(0, |top, v| top.max(v.to_bits()));
        if top == 0 {
            return;
        }
        let unit = f64::from_bits((2045 + u64::from(gain_bits) - (top >> 52)) << 52);
        let integer = |v: f64| (v * unit).round_ties_even() as i64;
        let missing = missing.into_iter().map(integer).fold(0, i64::wrapping_add);
        let mut gains = vec![0i64; BINS];
        for Step { gain, bin, .. } in &steps {
            gains[*bin] = gains[*bin].wrapping_add(integer(*gain));
        }
        if missing <= 0 {
            return;
        }
        // Whatever is cheaper, and of one price the first.
        let mut below = 0i64;
        let last = gains.iter().position(|gain| {
            let enough = below.wrapping_add(*gain) >= missing;
            below = if enough { below } else { below.wrapping_add(*gain) };
            enough
        });
        let (last, mut rest) = (last.unwrap_or(BINS), missing.wrapping_sub(below));
        for Step { place, to, gain, bin } in steps.into_iter().filter(|step| step.bin <= last) {
            let gain = if bin == last { integer(gain) } else { 0 };
            if bin < last || gain != 0 && rest.wrapping_mul(2) > gain {
                ranks[place] = to;
            }
            rest = rest.wrapping_sub(gain);
        }
    }

    /// The next rank whose value lies in a direction, and how far it is.
    fn step(&self, rank: u8, direction: f32, absmax: f32) -> Option<(u8, f32)> {
        let from = usize::from(rank);
        let to = if direction > 0.0 {
            (from + 1..16).find(|&to| self.values[to] > self.values[from])
        } else if direction < 0.0 {
            (0..from).rev().find(|&to| self.values[to] < self.values[from])
        } else {
            None
        };
        let step = (self.values[to?] - self.values[from]).abs() * absmax;
        (step > 0.0).then_some((to? as u8, step))
    }
}

/// Bits of a gain as an integer, of which a panel of so many elements is added.
pub(crate) fn gain_bits(panel: usize) -> u32 {
    61 - panel.next_power_of_two().trailing_zeros()
}

/// A number of [0, 1) that depends on its arguments alone (SplitMix64, Steele et al. 2014).
fn uniform(seed: u64, index: u64) -> f32 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
}

/// Counts the bytes and the codes in them that differ.
#[inline(always)]
fn count_codes(old: &[u8], new: &[u8], report: &mut MergeReport) {
    // In bytes, which makes vectors, of as many as they can count.
    for (old, new) in old.chunks(127).zip(new.chunks(127)) {
        let (mut codes, mut bytes) = (0u8, 0u8);
        for (old, new) in old.iter().zip(new) {
            let differ = old ^ new;
            codes += u8::from(differ & 0xf0 != 0) + u8::from(differ & 0x0f != 0);
            bytes += u8::from(differ != 0);
        }
        report.changed += u64::from(codes);
        report.changed_bytes += u64::from(bytes);
    }
}

/// Counts the bytes of the scales, and those that differ.
fn count_scales(old: &Absmax, new: &Absmax, report: &mut MergeReport) {
    let mut count = |old: &[u8], new: &[u8]| {
        report.bytes += new.len() as u64;
        report.changed_bytes += old.iter().zip(new).filter(|(old, new)| old != new).count() as u64;
    };
    match (old, new) {
        (Absmax::Plain(old), Absmax::Plain(new)) => {
            count(bytemuck::cast_slice(old), bytemuck::cast_slice(new))
        }
        (Absmax::Nested(old), Absmax::Nested(new)) => {
            count(old.q(), new.q());
            count(bytemuck::cast_slice(old.absmax()), bytemuck::cast_slice(new.absmax()));
            count(bytemuck::bytes_of(&old.offset()), bytemuck::bytes_of(&new.offset()));
        }
        _ => unreachable!("scales stay nested or plain"),
    }
}
