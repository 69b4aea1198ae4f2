//! Merging a [`Stack`] into a weight, panel by panel, and taking it out again.

use half::{bf16, f16};
use rayon::prelude::*;

use super::product::{Product, STRIP};
use super::requantize::Requantize;
use super::update::{Update, panel_len};
use super::{Base, MergeReport, Stack, check_shape};
use crate::nf4::{Nf4Matrix, check_len};
use crate::simd::with_level;
use crate::tensor::{DataMut, DataRef, TensorView, each_dtype};
use crate::{DType, Element, Error, Result, Tensor};

/// What [`Stack::merge`] gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged<W> {
    /// The weight with the adapters in it.
    pub weight: W,
    /// What it has kept of them.
    pub report: MergeReport,
}

/// What [`Stack::unmerge`] gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Unmerged<W> {
    /// The weight without the adapters, but for what the merge has rounded away.
    pub weight: W,
    /// How many of its elements are a guess: the merged weight could have come from another value of the type as well, or
    /// from none of those nearby. All of a 4-bit weight, whose scales are gone.
    pub undetermined: u64,
}

/// What a weight is merged into: elements of a [`DType`], or 4-bit blocks by the rules of a [`Requantize`].
pub trait Target: Pass<<Self as Target>::Weight> {
    /// [`Tensor`] or [`Nf4Matrix`].
    type Weight;
}

impl Target for DType {
    type Weight = Tensor;
}

impl Target for Requantize {
    type Weight = Nf4Matrix;
}

/// How a target is reached. Not exported: there are no other targets.
pub trait Pass<W> {
    fn merge(self, weight: Base<'_>, change: &Change<'_>) -> Result<Merged<W>>;
    fn unmerge(self, merged: Base<'_>, change: &Change<'_>) -> Result<Unmerged<W>>;
}

impl Stack {
    /// `W' = row_scale ⊙ W + B' A'`, in the layout of the weight: sums in f32, one rounding; and a report of what that
    /// rounding has left of the adapters. All adapters go in at once, panel by panel: no delta is made whole.
    ///
    /// * Into a [`DType`]: dense elements. A 4-bit base is dequantised to its dtype first, as PEFT does. Even 16 bits lose:
    ///   of a delta of a thousandth of the weight most is rounded away in bf16.
    /// * Into 4 bits, by a [`Requantize`], which a 4-bit base needs: the sum is quantised again, with the same
    ///   block size, codebook and double quantisation. This is where adapters get lost, so a merge that retains less than
    ///   [`Requantize::min_gain`] is refused.
    ///
    /// [`Undo`](super::Undo) records how the original comes back, bit for bit.
    ///
    /// # Errors
    /// [`Error::Argument`] when the shape does not fit, the target is 4-bit and the weight is not, or a merged element is
    /// not finite (the adapter or the weight holds an infinity or a NaN, or the sum overflows the type).
    /// [`Error::AdapterLost`], with the report, when too little would be left of the adapters.
    pub fn merge<'a, T: Target>(&self, weight: impl Into<Base<'a>>, target: T) -> Result<Merged<T::Weight>> {
        let weight = weight.into();
        weight.check_shape("weight", self.weight_shape())?;
        target.merge(weight, &Change::new("weight", self))
    }

    /// `W = (W' - B' A') / row_scale`: PEFT's unmerge, with the row scale as it was when the stack was made.
    ///
    /// This does not restore what the merge has rounded away, and says of how many elements that is so
    /// ([`Unmerged::undetermined`]): in bf16 it is a tenth of them when the delta is a tenth of the weight.
    /// [`Undo`](super::Undo) restores every bit.
    ///
    /// # Errors
    /// [`Error::Argument`] as [`Stack::merge`]. An output with a magnitude of 0 cannot be unmerged.
    pub fn unmerge<'a, T: Target>(
        &self,
        merged: impl Into<Base<'a>>,
        target: T,
    ) -> Result<Unmerged<T::Weight>> {
        let merged = merged.into();
        merged.check_shape("merged", self.weight_shape())?;
        target.unmerge(merged, &Change::new("merged", self))
    }

    /// [`Stack::merge`] without memory of its own: into the caller's, of the shape of the weight. The bits are the same.
    ///
    /// The `report` is made where one is given, which costs time.
    ///
    /// # Errors
    /// As [`Stack::merge`], or when `merged` has another length. Nothing is written then.
    pub fn merge_into<'a, 'b>(
        &self,
        weight: impl Into<Base<'a>>,
        merged: impl Into<DataMut<'b>>,
        report: Option<&mut MergeReport>,
    ) -> Result<()> {
        let (weight, change) = (weight.into(), Change::new("weight", self));
        weight.check_shape("weight", self.weight_shape())?;
        each_dtype!(DataMut: merged.into(), merged => {
            change.write(Direction::Merge, Some(weight), ("merged", merged), report)
        })
    }

    /// [`Stack::merge`] in place: into the memory of a dense weight. The bits are the same.
    ///
    /// The original is gone with it: where it may be wanted back, to the bit or after a look at what is left of the adapters, keep it,
    /// or make an [`Undo`](super::Undo) of both. The `report` is made where one is given, which costs time.
    ///
    /// # Errors
    /// As [`Stack::merge`], or when `weight` has another length. Nothing is written then: magnitudes are read first, and where they
    /// do not tell that all will be finite, the merge is tried out.
    pub fn merge_in_place<'a>(
        &self,
        weight: impl Into<DataMut<'a>>,
        report: Option<&mut MergeReport>,
    ) -> Result<()> {
        let change = Change::new("weight", self);
        each_dtype!(DataMut: weight.into(), weight => {
            change.write(Direction::Merge, None, ("weight", weight), report)
        })
    }

    /// [`Stack::unmerge`] into the caller's memory, without a count of what is undetermined. The bits are the same.
    ///
    /// # Errors
    /// As [`Stack::unmerge`], or when `weight` has another length. Nothing is written then.
    pub fn unmerge_into<'a, 'b>(
        &self,
        merged: impl Into<Base<'a>>,
        weight: impl Into<DataMut<'b>>,
    ) -> Result<()> {
        let (merged, change) = (merged.into(), Change::new("merged", self));
        merged.check_shape("merged", self.weight_shape())?;
        each_dtype!(DataMut: weight.into(), weight => {
            change.write(Direction::Unmerge, Some(merged), ("weight", weight), None)
        })
    }

    /// [`Stack::unmerge`] in place, without a count of what is undetermined. The bits are the same.
    ///
    /// # Errors
    /// As [`Stack::unmerge`], or when `merged` has another length. Nothing is written then.
    pub fn unmerge_in_place<'a>(&self, merged: impl Into<DataMut<'a>>) -> Result<()> {
        let change = Change::new("merged", self);
        each_dtype!(DataMut: merged.into(), merged => {
            change.write(Direction::Unmerge, None, ("merged", merged), None)
        })
    }

    /// The merged weight's bias: `bias + Σ scaling * lora_bias`, in `dtype`. None when there is neither.
    ///
    /// # Errors
    /// [`Error::Argument`] when the shape is not `[out]`, or a sum is not finite.
    pub fn merge_bias(&self, bias: Option<&Tensor>, dtype: DType) -> Result<Option<Tensor>> {
        self.bias_sum("bias", bias, dtype, 1.0)
    }

    /// The bias before the merge, up to rounding; zeros where there was none.
    ///
    /// # Errors
    /// As [`Stack::merge_bias`].
    pub fn unmerge_bias(&self, merged: Option<&Tensor>, dtype: DType) -> Result<Option<Tensor>> {
        self.bias_sum("merged", merged, dtype, -1.0)
    }

    fn bias_sum(
        &self,
        argument: &str,
        bias: Option<&Tensor>,
        dtype: DType,
        sign: f64,
    ) -> Result<Option<Tensor>> {
        let outputs = self.update.outputs;
        if let Some(bias) = bias {
            check_shape(argument, bias, &[outputs])?;
        }
        if bias.is_none() && self.bias.is_none() {
            return Ok(None);
        }
        let mut sum = bias.map_or(vec![0.0; outputs], Tensor::to_f32);
        for (sum, b) in sum.iter_mut().zip(self.bias.iter().flatten()) {
            *sum += (sign * b) as f32;
        }
        let sum = Tensor::from_f32([outputs], &sum, dtype)?;
        match not_finite(&sum.to_f32()) {
            None => Ok(Some(sum)),
            Some(n) => {
                Err(Error::argument(format!("{argument}[{n}], adapted"), "a finite number", sum.to_f32()[n]))
            }
        }
    }
}

impl Pass<Tensor> for DType {
    fn merge(self, weight: Base<'_>, change: &Change<'_>) -> Result<Merged<Tensor>> {
        match self {
            DType::F32 => change.merge::<f32>(weight),
            DType::F16 => change.merge::<f16>(weight),
            DType::BF16 => change.merge::<bf16>(weight),
        }
    }

    fn unmerge(self, merged: Base<'_>, change: &Change<'_>) -> Result<Unmerged<Tensor>> {
        match self {
            DType::F32 => change.unmerge::<f32>(merged),
            DType::F16 => change.unmerge::<f16>(merged),
            DType::BF16 => change.unmerge::<bf16>(merged),
        }
    }
}

/// A stack in f32, on the way into a weight or out of it.
pub struct Change<'a> {
    argument: &'static str,
    update: &'a Update,
    product: Product,
    row_scale: Option<RowScale>,
}

/// DoRA's factors, `[out]`.
struct RowScale {
    factor: Vec<f32>,
    /// `factor - 1`, rounded once.
    excess: Vec<f32>,
}

/// Which way to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Merge,
    Unmerge,
}

/// Elements of a run: a multiple of every block size.
pub(super) const RUN: usize = 1 << 12;

/// Elements of a weight on their way, in f32.
#[derive(Default)]
pub(super) struct Panel {
    /// `B' A'` of whole rows, of which the rest is a run.
    product: Vec<f32>,
    /// As they are read.
    pub weight: Vec<f32>,
    /// In a merge, the wanted delta; in an unmerge, `B' A'`.
    pub delta: Vec<f32>,
    /// What is to be stored.
    pub sum: Vec<f32>,
}

/// A part of a row of a dense weight.
struct Strip<'a, T> {
    /// The first of the weight's elements.
    first: usize,
    /// Before, in f32.
    weight: &'a [f32],
    /// In a merge, the wanted delta; in an unmerge, `B' A'`.
    delta: &'a [f32],
    /// As it is stored.
    out: &'a [T],
    /// The same in f32.
    stored: &'a [f32],
}

impl<'a> Change<'a> {
    fn new(argument: &'static str, stack: &'a Stack) -> Self {
        let row_scale = stack.row_scale.as_ref().map(|scale| RowScale {
            factor: scale.iter().map(|&v| v as f32).collect(),
            excess: scale.iter().map(|&v| (v - 1.0) as f32).collect(),
        });
        Self { argument, update: &stack.update, product: Product::new(&stack.update), row_scale }
    }

    /// Elements of a panel: whole rows, and whole blocks of `blocksize`.
    pub(super) fn panel_len(&self, blocksize: usize) -> usize {
        panel_len(self.update.shape()[1], blocksize)
    }

    /// Reads `len` elements of whole rows from element `start` on, merges or unmerges them, and hands them to `each` in runs of
    /// `run` elements, with where each begins. Short runs stay in the nearest cache from one step to the next.
    pub(super) fn runs(
        &self,
        direction: Direction,
        weight: &Nf4Matrix,
        [start, len, run]: [usize; 3],
        panel: &mut Panel,
        mut each: impl FnMut(usize, &mut Panel) -> Result<()>,
    ) -> Result<()> {
        panel.product.resize(len, 0.0);
        self.product.rows(start / self.update.shape()[1].max(1), &mut panel.product);
        for at in (0..len).step_by(run) {
            let (first, n) = (start + at, run.min(len - at));
            panel.weight.resize(n, 0.0);
            panel.delta.clear();
            panel.delta.extend_from_slice(&panel.product[at..at + n]);
            panel.sum.resize(n, 0.0);
            Base::Nf4(weight).read(weight.dtype(), first, &mut panel.weight);
            let Panel { weight, delta, sum, .. } = panel;
            vectorised(|| self.combine(direction, first, weight, delta, sum));
            each(first, panel)?;
        }
        Ok(())
    }

    /// Merges or unmerges the whole rows of a dense weight from element `start` on, which are those of `source`, or what `out` has
    /// before. With `LOOK` every strip of `out` is shown to `look`; its first error by place is given.
    fn strips<T: Element, const LOOK: bool>(
        &self,
        direction: Direction,
        source: Option<Base<'_>>,
        (start, out): (usize, &mut [T]),
        mut look: impl FnMut(&Strip<'_, T>) -> Result<()>,
    ) -> Result<()> {
        let [mut read, mut rounded] = [[0.0; STRIP]; 2];
        let (mut error, mut error_at) = (Ok(()), usize::MAX);
        let same = source.and_then(|source| match source {
            Base::Dense(tensor) => tensor.as_slice::<f32>(),
            Base::Nf4(_) => None,
        });
        let row = start / self.update.shape()[1].max(1);
        with_level!(self.product.level, simd => {
            self.product.strips(simd, row, out, #[inline(always)] |at, out, delta| {
                let first = start + at;
                if !LOOK && source.is_none() && self.row_scale.is_none() && T::DTYPE == DType::F32 {
                    // Nothing has to be kept of what is there.
                    let sum: &mut [f32] = bytemuck::cast_slice_mut(out);
                    let sign = if direction == Direction::Merge { 1.0 } else { -1.0 };
                    sum.iter_mut().zip(delta).for_each(|(sum, delta)| *sum += sign * *delta);
                    return;
                }
                let read = &mut read[..out.len()];
                let weight = match (source, same) {
                    (_, Some(elements)) => &elements[first..first + out.len()],
                    (Some(source), None) => {
                        source.read(source.dtype(), first, read);
                        &*read
                    }
                    (None, None) => {
                        T::widen(out, read);
                        &*read
                    }
                };
                let rounded = &mut rounded[..out.len()];
                if T::DTYPE == DType::F32 {
                    self.combine(direction, first, weight, delta, bytemuck::cast_slice_mut(out));
                } else {
                    self.combine(direction, first, weight, delta, rounded);
                    T::round(rounded, out);
                }
                if LOOK {
                    let stored = if T::DTYPE == DType::F32 {
                        bytemuck::cast_slice(out)
                    } else {
                        T::widen(out, rounded);
                        &*rounded
                    };
                    if let Err(e) = look(&Strip { first, weight, delta, out, stored })
                        && first < error_at
                    {
                        (error, error_at) = (Err(e), first);
                    }
                }
            });
        });
        error
    }

    /// What is to be stored of elements from `first` on: the `sum` of `weight` and `delta`. In a merge, `delta` is made the wanted one.
    #[inline(always)]
    fn combine(
        &self,
        direction: Direction,
        first: usize,
        weight: &[f32],
        delta: &mut [f32],
        sum: &mut [f32],
    ) {
        match direction {
            Direction::Merge => {
                self.apply(first, weight, delta, sum);
                if let Some(RowScale { excess, .. }) = &self.row_scale {
                    self.scale(first, excess, delta, |i, d, excess| d + weight[i] * excess);
                }
            }
            Direction::Unmerge => {
                sum.iter_mut().zip(weight).zip(delta).for_each(|((sum, w), d)| *sum = *w - *d);
                if let Some(RowScale { factor, .. }) = &self.row_scale {
                    self.scale(first, factor, sum, |_, w, factor| w / factor);
                }
            }
        }
    }

    /// `row_scale ⊙ W + B' A'`, of elements from `start` on.
    #[inline(always)]
    fn apply(&self, start: usize, weight: &[f32], delta: &[f32], sum: &mut [f32]) {
        match &self.row_scale {
            None => sum.iter_mut().zip(weight).zip(delta).for_each(|((sum, w), d)| *sum = w + d),
            Some(RowScale { factor, .. }) => {
                sum.copy_from_slice(weight);
                self.scale(start, factor, sum, |i, w, factor| w * factor + delta[i]);
            }
        }
    }

    /// Makes each element from `start` on what `change` makes of its index, itself and its output's factor.
    #[inline(always)]
    fn scale(
        &self,
        start: usize,
        factor: &[f32],
        elements: &mut [f32],
        change: impl Fn(usize, f32, f32) -> f32,
    ) {
        let columns = self.update.shape()[1];
        let mut at = 0;
        while at < elements.len() {
            let (row, column) = ((start + at) / columns, (start + at) % columns);
            let end = elements.len().min(at + columns - column);
            for (i, v) in (at..end).zip(&mut elements[at..end]) {
                let output = if self.update.fan_in_fan_out { column + i - at } else { row };
                *v = change(i, *v, factor[output]);
            }
            at = end;
        }
    }

    fn merge<T: Element>(&self, weight: Base<'_>) -> Result<Merged<Tensor>> {
        let (shape, mut out) = (self.update.shape(), self.zeros::<T>());
        let report = self.pass(Direction::Merge, Some(weight), &mut out, [true, true])?;
        Ok(Merged { weight: Tensor::new(shape, T::into_data(out))?, report })
    }

    /// Writes all elements, and says what they have kept if there has to be a `report`; `check` refuses those that are not finite.
    fn pass<T: Element>(
        &self,
        direction: Direction,
        source: Option<Base<'_>>,
        out: &mut [T],
        [report, check]: [bool; 2],
    ) -> Result<MergeReport> {
        let reports = self.panels(out, |start, out| {
            if !report && !check {
                self.strips::<T, false>(direction, source, (start, out), |_| Ok(()))?;
                return Ok(MergeReport::default());
            }
            let (mut sums, mut before) = (MergeReport::default(), Vec::new());
            self.strips::<T, true>(direction, source, (start, out), |strip| {
                if report {
                    before.resize(strip.out.len(), T::from_bits(0));
                    T::round(strip.weight, &mut before);
                    count_changes(&before, strip.out, &mut sums);
                    sums += gains(strip.weight, strip.delta, strip.stored);
                }
                if check { self.check_finite(strip.first, strip.stored, T::DTYPE) } else { Ok(()) }
            })?;
            Ok(sums)
        })?;
        Ok(reports.into_iter().sum())
    }

    /// [`Change::pass`] into memory that somebody else owns: nothing is written unless all elements are finite.
    fn write<T: Element>(
        &self,
        direction: Direction,
        source: Option<Base<'_>>,
        (argument, out): (&str, &mut [T]),
        report: Option<&mut MergeReport>,
    ) -> Result<()> {
        let shape = self.update.shape();
        check_len(argument, shape.iter().product(), "elements", out.len())?;
        let weight = match source {
            Some(weight) => weight,
            None => Base::Dense(TensorView::new(&shape, DataRef::of(out))?),
        };
        if !self.stays_finite::<T>(direction, weight) {
            self.try_out::<T>(direction, weight)?;
        }
        let sums = self.pass(direction, source, out, [report.is_some(), false])?;
        if let Some(report) = report {
            *report = sums;
        }
        Ok(())
    }

    /// Whether the largest magnitudes tell that all elements will be finite. Otherwise they may be, too.
    fn stays_finite<T: Element>(&self, direction: Direction, weight: Base<'_>) -> bool {
        let (dtype, weight, delta) = (weight.dtype(), f64::from(weight.largest()), self.product.bound());
        let factors = || self.row_scale.iter().flat_map(|scale| &scale.factor).map(|v| f64::from(v.abs()));
        let sum = match direction {
            Direction::Merge => weight * factors().fold(1.0, f64::max) + delta,
            Direction::Unmerge => (weight + delta) / factors().fold(1.0, f64::min),
        };
        // Roundings do not make twice as much of it. (4-bit weights have been rounded already, maybe to f16.)
        let limit = T::DTYPE.largest().min(dtype.largest()) / 2.0;
        weight <= limit && sum <= limit
    }

    /// Refuses elements that would not be finite.
    fn try_out<T: Element>(&self, direction: Direction, weight: Base<'_>) -> Result<()> {
        let (numel, len): (usize, _) = (self.update.shape().iter().product(), self.dense_len());
        let panels: Vec<usize> = (0..numel).step_by(len).collect();
        let check = |out: &mut Vec<T>, start: usize| {
            out.resize(len.min(numel - start), T::from_bits(0));
            self.strips::<T, true>(direction, Some(weight), (start, out), |strip| {
                self.check_finite(strip.first, strip.stored, T::DTYPE)
            })
        };
        let results: Vec<Result<()>> = panels.into_par_iter().map_init(Vec::new, check).collect();
        results.into_iter().collect()
    }

    fn unmerge<T: Element>(&self, merged: Base<'_>) -> Result<Unmerged<Tensor>> {
        let (shape, mut out) = (self.update.shape(), self.zeros::<T>());
        let undetermined = self.panels(&mut out, |start, out| {
            let mut undetermined = 0;
            self.strips::<T, true>(Direction::Unmerge, Some(merged), (start, out), |strip| {
                self.check_finite(strip.first, strip.stored, T::DTYPE)?;
                undetermined += self.undetermined(merged, strip);
                Ok(())
            })?;
            Ok(undetermined)
        })?;
        let undetermined = undetermined.into_iter().sum();
        Ok(Unmerged { weight: Tensor::new(shape, T::into_data(out))?, undetermined })
    }

    /// How many unmerged elements do not merge to what is in the panel's weight, or have a neighbour that does as well.
    fn undetermined<T: Element>(&self, merged: Base<'_>, strip: &Strip<'_, T>) -> u64 {
        let Base::Dense(merged) = merged else { return strip.out.len() as u64 };
        let len = strip.out.len();
        let (mut neighbours, mut doubtful) = (vec![T::from_bits(0); len], vec![false; len]);
        let [mut widened, mut again] = [vec![0.0; len], vec![0.0; len]];
        for step in [-1, 0, 1] {
            let shifted = strip.out.iter().map(|v| T::from_order(v.order().saturating_add(step)));
            neighbours.iter_mut().zip(shifted).for_each(|(to, v)| *to = v);
            T::widen(&neighbours, &mut widened);
            vectorised(|| self.apply(strip.first, &widened, strip.delta, &mut again));
            round_to(merged.dtype(), &mut again);
            for ((doubtful, merged), again) in doubtful.iter_mut().zip(strip.weight).zip(&again) {
                *doubtful |= (merged == again) != (step == 0);
            }
        }
        doubtful.into_iter().map(u64::from).sum()
    }

    fn zeros<T: Element>(&self) -> Vec<T> {
        bytemuck::zeroed_vec(self.update.shape().iter().product())
    }

    /// Elements of a panel of a dense weight: whole rows, enough of them to read the factors' columns once for many.
    fn dense_len(&self) -> usize {
        (self.update.panel_rows(32) * self.update.shape()[1]).max(1)
    }

    /// Has `pass` write all elements of a dense weight: it is given where a panel begins, and the panel. Returns
    /// what it says of each panel, in order, or the error of the first panel that has one.
    fn panels<T: Element, R: Send>(
        &self,
        out: &mut [T],
        pass: impl Fn(usize, &mut [T]) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let len = self.dense_len();
        let panels = out.par_chunks_mut(len).enumerate();
        let results: Vec<Result<R>> = panels.map(|(panel, out)| pass(panel * len, out)).collect();
        results.into_iter().collect()
    }

    /// Refuses infinities and NaN in the elements from `start` on, which are to be stored as `dtype`.
    pub(super) fn check_finite(&self, start: usize, values: &[f32], dtype: DType) -> Result<()> {
        let Some(i) = not_finite(values) else { return Ok(()) };
        let (columns, element) = (self.update.shape()[1], start + i);
        let place = format!("{}[{}, {}], adapted", self.argument, element / columns, element % columns);
        Err(Error::argument(place, format!("a finite {dtype}"), values[i]))
    }
}

impl Panel {
    /// The report of a merge whose stored elements, widened, are in `sum` now; but for what is counted.
    pub fn report(&self) -> MergeReport {
        gains(&self.weight, &self.delta, &self.sum)
    }
}

/// The report of elements that are `merged` now, but for what is counted.
fn gains(weight: &[f32], delta: &[f32], merged: &[f32]) -> MergeReport {
    let mut sums = Sums::default();
    let (weights, weight_rest) = weight.as_chunks();
    let (deltas, delta_rest) = delta.as_chunks();
    let (mergeds, merged_rest) = merged.as_chunks();
    sums.add(weights, deltas, mergeds);
    if !weight_rest.is_empty() {
        // Zeros add nothing.
        let fill = |rest: &[f32]| std::array::from_fn(|lane| rest.get(lane).copied().unwrap_or_default());
        sums.add_scalar(&fill(weight_rest), &fill(delta_rest), &fill(merged_rest));
    }
    let [weight, wanted, kept, error] = sums.0.map(|lanes| lanes.iter().sum());
    MergeReport { weight, wanted, kept, error, elements: merged.len() as u64, ..Default::default() }
}

/// `<W, W>`, `<D, D>`, `<R, D>` and `<R - D, R - D>`, in eight lanes each.
///
/// R and R - D are rounded to f32, so that f64 holds their products exactly: it makes no difference whether these are fused with the
/// sums, and the bits are the same on every machine.
#[derive(Default)]
struct Sums([[f64; 8]; 4]);

impl Sums {
    fn add(&mut self, weight: &[[f32; 8]], delta: &[[f32; 8]], merged: &[[f32; 8]]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            return simd.vectorize(AddV3 { simd, sums: self, weight, delta, merged });
        }
        for ((weight, delta), merged) in weight.iter().zip(delta).zip(merged) {
            self.add_scalar(weight, delta, merged);
        }
    }

    fn add_scalar(&mut self, weight: &[f32; 8], delta: &[f32; 8], merged: &[f32; 8]) {
        for lane in 0..8 {
            let (w, d) = (weight[lane], delta[lane]);
            let realised = merged[lane] - w;
            let missed = realised - d;
            for (sum, [x, y]) in self.0.iter_mut().zip([[w, w], [d, d], [realised, d], [missed, missed]]) {
                sum[lane] += f64::from(x) * f64::from(y);
            }
        }
    }
}

/// [`Sums::add_scalar`] of many, with AVX2, which compilers do not find by themselves.
#[cfg(target_arch = "x86_64")]
struct AddV3<'a> {
    simd: pulp::x86::V3,
    sums: &'a mut Sums,
    weight: &'a [[f32; 8]],
    delta: &'a [[f32; 8]],
    merged: &'a [[f32; 8]],
}

#[cfg(target_arch = "x86_64")]
impl pulp::NullaryFnOnce for AddV3<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        use pulp::{cast, f32x4, f32x8, f64x4};
        let Self { simd, sums, weight, delta, merged } = self;
        let wide = |x: f32x8| -> [f64x4; 2] {
            let halves: [f32x4; 2] = cast(x);
            halves.map(|half| simd.convert_f32x4_to_f64x4(half))
        };
        let add = |sum: &mut [f64x4; 2], x: [f64x4; 2], y: [f64x4; 2]| {
            *sum = [simd.mul_add_f64x4(x[0], y[0], sum[0]), simd.mul_add_f64x4(x[1], y[1], sum[1])];
        };
        let mut lanes: [[f64x4; 2]; 4] = cast(sums.0);
        for ((weight, delta), merged) in weight.iter().zip(delta).zip(merged) {
            let [w, d, m]: [f32x8; 3] = [cast(*weight), cast(*delta), cast(*merged)];
            let realised = simd.sub_f32x8(m, w);
            let missed = simd.sub_f32x8(realised, d);
            let [w, d, realised, missed] = [wide(w), wide(d), wide(realised), wide(missed)];
            add(&mut lanes[0], w, w);
            add(&mut lanes[1], d, d);
            add(&mut lanes[2], realised, d);
            add(&mut lanes[3], missed, missed);
        }
        sums.0 = pulp::cast(lanes);
    }
}

/// Runs `work` with the vector instructions that the machine has. The bits are the same with all of them: nothing is
/// reordered, and no product is fused with a sum.
pub(super) fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Counts the elements and the bytes that differ.
#[inline(always)]
fn count_changes<T: Element>(before: &[T], after: &[T], report: &mut MergeReport) {
    // In u32, which makes vectors, of as many as it can count.
    const RUN: usize = 1 << 20;
    for (before, after) in before.chunks(RUN).zip(after.chunks(RUN)) {
        let (mut changed, mut bytes) = (0u32, 0u32);
        for (before, after) in before.iter().zip(after) {
            let differ = before.bits() ^ after.bits();
            changed += u32::from(differ != 0);
            for byte in 0..size_of::<T>() {
                bytes += u32::from((differ >> (8 * byte)) & 0xff != 0);
            }
        }
        report.changed += u64::from(changed);
        report.changed_bytes += u64::from(bytes);
    }
    report.bytes += size_of_val(after) as u64;
}

/// Rounds values to those of `dtype`.
pub(super) fn round_to(dtype: DType, values: &mut [f32]) {
    fn round<T: Element>(values: &mut [f32]) {
        const RUN: usize = 256;
        let mut rounded = [T::from_bits(0); RUN];
        for values in values.chunks_mut(RUN) {
            let rounded = &mut rounded[..values.len()];
            T::round(values, rounded);
            T::widen(rounded, values);
        }
    }
    match dtype {
        DType::F32 => {}
        DType::F16 => round::<f16>(values),
        DType::BF16 => round::<bf16>(values),
    }
}

/// The first element that is infinite or NaN.
#[inline(always)]
fn not_finite(values: &[f32]) -> Option<usize> {
    // Bits of magnitudes are ordered as the magnitudes are; the maximum needs no branch.
    let largest = values.iter().fold(0, |largest: u32, v| largest.max(v.abs().to_bits()));
    if f32::from_bits(largest).is_finite() { None } else { values.iter().position(|v| !v.is_finite()) }
}
