//! Merging a [`Stack`] into a weight, panel by panel, and taking it out again.

use half::{bf16, f16};
use rayon::prelude::*;

use super::requantize::Requantize;
use super::update::{Sides, Update, panel_len};
use super::{Base, MergeReport, Stack, check_shape};
use crate::nf4::Nf4Matrix;
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
    fn merge(self, change: &Change<'_>) -> Result<Merged<W>>;
    fn unmerge(self, change: &Change<'_>) -> Result<Unmerged<W>>;
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
        target.merge(&Change::new("weight", self, weight.into())?)
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
        target.unmerge(&Change::new("merged", self, merged.into())?)
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
    fn merge(self, change: &Change<'_>) -> Result<Merged<Tensor>> {
        match self {
            DType::F32 => change.merge_dense::<f32>(),
            DType::F16 => change.merge_dense::<f16>(),
            DType::BF16 => change.merge_dense::<bf16>(),
        }
    }

    fn unmerge(self, change: &Change<'_>) -> Result<Unmerged<Tensor>> {
        match self {
            DType::F32 => change.unmerge_dense::<f32>(),
            DType::F16 => change.unmerge_dense::<f16>(),
            DType::BF16 => change.unmerge_dense::<bf16>(),
        }
    }
}

/// A stack in f32, on the way into a weight or out of it.
pub struct Change<'a> {
    argument: &'static str,
    pub(super) weight: Base<'a>,
    update: &'a Update,
    sides: Sides<f32>,
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

impl<'a> Change<'a> {
    fn new(argument: &'static str, stack: &'a Stack, weight: Base<'a>) -> Result<Self> {
        weight.check_shape(argument, stack.weight_shape())?;
        let row_scale = stack.row_scale.as_ref().map(|scale| RowScale {
            factor: scale.iter().map(|&v| v as f32).collect(),
            excess: scale.iter().map(|&v| (v - 1.0) as f32).collect(),
        });
        Ok(Self {
            argument,
            weight,
            update: &stack.update,
            sides: stack.update.sides(|v| v as f32),
            row_scale,
        })
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
        [start, len, run]: [usize; 3],
        panel: &mut Panel,
        mut each: impl FnMut(usize, &mut Panel) -> Result<()>,
    ) -> Result<()> {
        panel.product.resize(len, 0.0);
        self.sides.product(start / self.update.shape()[1].max(1), &mut panel.product);
        for at in (0..len).step_by(run) {
            let (first, n) = (start + at, run.min(len - at));
            let Panel { product, weight, delta, sum } = panel;
            weight.resize(n, 0.0);
            sum.resize(n, 0.0);
            delta.clear();
            delta.extend_from_slice(&product[at..at + n]);
            self.weight.read(self.weight.dtype(), first, weight);
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
            each(first, panel)?;
        }
        Ok(())
    }

    /// `row_scale ⊙ W + B' A'`, of elements from `start` on.
    fn apply(&self, start: usize, weight: &[f32], delta: &[f32], sum: &mut [f32]) {
        match &self.row_scale {
            None => {
                vectorised(|| sum.iter_mut().zip(weight).zip(delta).for_each(|((sum, w), d)| *sum = w + d))
            }
            Some(RowScale { factor, .. }) => {
                sum.copy_from_slice(weight);
                self.scale(start, factor, sum, |i, w, factor| w * factor + delta[i]);
            }
        }
    }

    /// Makes each element from `start` on what `change` makes of its index, itself and its output's factor.
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

    fn merge_dense<T: Element>(&self) -> Result<Merged<Tensor>> {
        let (weight, reports) = self.dense::<T, _>(|start, out, panel, before| {
            let mut report = MergeReport::default();
            self.runs(Direction::Merge, [start, out.len(), RUN], panel, |first, panel| {
                let out = &mut out[first - start..][..panel.sum.len()];
                let same = match self.weight {
                    Base::Dense(tensor) => tensor.as_slice().map(|all| &all[first..first + out.len()]),
                    Base::Nf4(_) => None,
                };
                let before = same.unwrap_or_else(|| {
                    before.resize(out.len(), T::from_bits(0));
                    T::round(&panel.weight, before);
                    before
                });
                vectorised(|| {
                    T::round(&panel.sum, out);
                    T::widen(out, &mut panel.sum);
                    count_changes(before, out, &mut report);
                });
                report += panel.report();
                self.check_finite(first, &panel.sum, T::DTYPE)
            })?;
            Ok(report)
        })?;
        Ok(Merged { weight, report: reports.into_iter().sum() })
    }

    fn unmerge_dense<T: Element>(&self) -> Result<Unmerged<Tensor>> {
        let (weight, undetermined) = self.dense::<T, _>(|start, out, panel, neighbours| {
            let mut undetermined = 0;
            self.runs(Direction::Unmerge, [start, out.len(), RUN], panel, |first, panel| {
                let out = &mut out[first - start..][..panel.sum.len()];
                T::round(&panel.sum, out);
                T::widen(out, &mut panel.sum);
                self.check_finite(first, &panel.sum, T::DTYPE)?;
                undetermined += self.undetermined(first, out, panel, neighbours);
                Ok(())
            })?;
            Ok(undetermined)
        })?;
        Ok(Unmerged { weight, undetermined: undetermined.into_iter().sum() })
    }

    /// How many unmerged elements do not merge to what is in the panel's weight, or have a neighbour that does as well.
    fn undetermined<T: Element>(
        &self,
        start: usize,
        unmerged: &[T],
        Panel { weight, delta, sum, .. }: &mut Panel,
        neighbours: &mut Vec<T>,
    ) -> u64 {
        let Base::Dense(merged) = self.weight else { return unmerged.len() as u64 };
        let mut widened = vec![0.0; unmerged.len()];
        let mut doubtful = vec![false; unmerged.len()];
        for step in [-1, 0, 1] {
            neighbours.clear();
            neighbours.extend(unmerged.iter().map(|v| T::from_order(v.order().saturating_add(step))));
            T::widen(neighbours, &mut widened);
            self.apply(start, &widened, delta, sum);
            round_to(merged.dtype(), sum);
            for ((doubtful, merged), again) in doubtful.iter_mut().zip(&*weight).zip(&*sum) {
                *doubtful |= (merged == again) != (step == 0);
            }
        }
        doubtful.into_iter().map(u64::from).sum()
    }

    /// Has `pass` write all elements of a dense weight: it is given where a panel begins, the panel, and scratch. Returns
    /// what it says of each panel, in order, or the error of the first panel that has one.
    fn dense<T: Element, R: Send>(
        &self,
        pass: impl Fn(usize, &mut [T], &mut Panel, &mut Vec<T>) -> Result<R> + Sync,
    ) -> Result<(Tensor, Vec<R>)> {
        let [rows, columns] = self.update.shape();
        let len = self.panel_len(1);
        let mut out = bytemuck::zeroed_vec::<T>(rows * columns);
        let results: Vec<Result<R>> = out
            .par_chunks_mut(len)
            .enumerate()
            .map_init(Default::default, |(panel, scratch), (i, out)| pass(i * len, out, panel, scratch))
            .collect();
        let results = results.into_iter().collect::<Result<_>>()?;
        Ok((Tensor::new([rows, columns], T::into_data(out))?, results))
    }

    /// Refuses infinities and NaN in the elements from `start` on, which are to be stored as `dtype`.
    pub(super) fn check_finite(&self, start: usize, values: &[f32], dtype: DType) -> Result<()> {
        let Some(i) = vectorised(|| not_finite(values)) else { return Ok(()) };
        let (columns, element) = (self.update.shape()[1], start + i);
        let place = format!("{}[{}, {}], adapted", self.argument, element / columns, element % columns);
        Err(Error::argument(place, format!("a finite {dtype}"), values[i]))
    }
}

impl Panel {
    /// The report of a merge whose stored elements, widened, are in `sum` now; but for what is counted.
    pub fn report(&self) -> MergeReport {
        let mut sums = Sums::default();
        let (weight, weight_rest) = self.weight.as_chunks();
        let (delta, delta_rest) = self.delta.as_chunks();
        let (merged, merged_rest) = self.sum.as_chunks();
        sums.add(weight, delta, merged);
        if !weight_rest.is_empty() {
            // Zeros add nothing.
            let fill = |rest: &[f32]| std::array::from_fn(|lane| rest.get(lane).copied().unwrap_or_default());
            sums.add_scalar(&fill(weight_rest), &fill(delta_rest), &fill(merged_rest));
        }
        let [weight, wanted, kept, error] = sums.0.map(|lanes| lanes.iter().sum());
        MergeReport { weight, wanted, kept, error, elements: self.sum.len() as u64, ..Default::default() }
    }
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
