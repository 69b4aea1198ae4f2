//! Merging a [`Stack`] into a weight, panel by panel, and taking it out again.

use half::{bf16, f16};
use rayon::prelude::*;

use super::update::{Sides, Update};
use super::{Base, Stack, check_shape};
use crate::nf4::{Absmax, Nf4Matrix, block_count, nest, packed_len, quantize};
use crate::tensor::Data;
use crate::{DType, Element, Error, Result, Tensor};

impl Stack {
    /// `W' = row_scale ⊙ W + B' A'` in `dtype`, in the layout of the weight: sums in f32, one rounding.
    ///
    /// A 4-bit base is dequantised to its dtype first, as PEFT does; merging it into a 16-bit `dtype` loses far less than
    /// [`Stack::merge_nf4`] does. Merging into 16 bits loses too: of a delta of a thousandth of the weight most is
    /// rounded away in bf16.
    ///
    /// # Errors
    /// [`Error::Argument`] when the shape does not fit, or a merged element is not finite: the adapter or the weight holds
    /// an infinity or a NaN, or the sum overflows `dtype`.
    pub fn merge<'a>(&self, weight: impl Into<Base<'a>>, dtype: DType) -> Result<Tensor> {
        self.dense("weight", weight.into(), dtype, Direction::Merge)
    }

    /// `W = (W' - B' A') / row_scale` in `dtype`: PEFT's unmerge, with the row scale as it was when the stack was made.
    ///
    /// This does not restore what the merge has rounded away. In f32 the weight comes back within an ulp or so of the
    /// merged one; in bf16 some 8 to 15 % of the weights do not come back bit for bit when the delta is a tenth of them.
    /// To restore every bit, keep the weight.
    ///
    /// # Errors
    /// As [`Stack::merge`]. An output with a magnitude of 0 cannot be unmerged.
    pub fn unmerge<'a>(&self, merged: impl Into<Base<'a>>, dtype: DType) -> Result<Tensor> {
        self.dense("merged", merged.into(), dtype, Direction::Unmerge)
    }

    /// Dequantises `weight` to its dtype, merges in f32, and quantises the sum again, with the same block size, codebook
    /// and double quantisation. The dtype stays (PEFT makes it f32 under LoRA; the bytes are the same).
    ///
    /// The result is off by some 9 % of its norm, like any 4-bit weight: the adapter's effect may drown in it.
    ///
    /// # Errors
    /// As [`Stack::merge`].
    pub fn merge_nf4(&self, weight: &Nf4Matrix) -> Result<Nf4Matrix> {
        self.nf4("weight", weight, Direction::Merge)
    }

    /// The same for [`Stack::unmerge`]. It restores neither codes nor scales: what comes back has been quantised three times.
    ///
    /// # Errors
    /// As [`Stack::unmerge`].
    pub fn unmerge_nf4(&self, merged: &Nf4Matrix) -> Result<Nf4Matrix> {
        self.nf4("merged", merged, Direction::Unmerge)
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

    fn dense(&self, argument: &str, weight: Base<'_>, dtype: DType, direction: Direction) -> Result<Tensor> {
        weight.check_shape(argument, self.weight_shape())?;
        let change = Change::new(self, weight, direction);
        let data = match dtype {
            DType::F32 => change.dense::<f32>(),
            DType::F16 => change.dense::<f16>(),
            DType::BF16 => change.dense::<bf16>(),
        };
        Tensor::new(self.weight_shape(), data.map_err(|i| self.refuse(argument, i, dtype))?)
    }

    fn nf4(&self, argument: &str, weight: &Nf4Matrix, direction: Direction) -> Result<Nf4Matrix> {
        Base::Nf4(weight).check_shape(argument, self.weight_shape())?;
        let change = Change::new(self, weight.into(), direction);
        let (packed, absmax) = change.nf4(weight).map_err(|i| self.refuse(argument, i, DType::F32))?;
        let absmax = match weight.absmax() {
            Absmax::Plain(_) => Absmax::Plain(absmax),
            Absmax::Nested(_) => Absmax::Nested(nest(&absmax)),
        };
        let (blocksize, codebook) = (weight.blocksize(), weight.codebook().clone());
        Nf4Matrix::from_parts(self.weight_shape(), packed, absmax, blocksize, codebook, weight.dtype())
    }

    fn refuse(&self, argument: &str, element: usize, dtype: DType) -> Error {
        let columns = self.weight_shape()[1];
        let place = format!("{argument}[{}, {}], adapted", element / columns, element % columns);
        Error::argument(place, format!("a finite {dtype}"), "infinity or NaN")
    }
}

/// Which way to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Merge,
    Unmerge,
}

/// A stack in f32, on the way into a weight or out of it.
struct Change<'a> {
    weight: Base<'a>,
    update: &'a Update,
    sides: Sides<f32>,
    row_scale: Option<Vec<f32>>,
    direction: Direction,
}

impl<'a> Change<'a> {
    fn new(stack: &'a Stack, weight: Base<'a>, direction: Direction) -> Self {
        let narrow = |v: f64| v as f32;
        let row_scale = stack.row_scale.as_ref().map(|scale| scale.iter().copied().map(narrow).collect());
        Self { weight, update: &stack.update, sides: stack.update.sides(narrow), row_scale, direction }
    }

    /// The changed weight, or its first element that is not finite.
    fn dense<T: Element>(&self) -> Result<Data, usize> {
        let [rows, columns] = self.update.shape();
        let panel = self.update.panel_rows(1) * columns;
        let mut out = bytemuck::zeroed_vec::<T>(rows * columns);
        let not_finite = out
            .par_chunks_mut(panel.max(1))
            .enumerate()
            .map_init(Vec::new, |sum, (i, out)| {
                self.panel(i * panel, out.len(), sum);
                T::round(sum, out);
                T::widen(out, sum);
                not_finite(sum).map(|at| i * panel + at)
            })
            .flatten()
            .min();
        not_finite.map_or(Ok(T::into_data(out)), Err)
    }

    /// Codes and scales of the changed weight, or its first element that is not finite.
    fn nf4(&self, weight: &Nf4Matrix) -> Result<(Vec<u8>, Vec<f32>), usize> {
        let columns = self.update.shape()[1];
        let (numel, blocksize) = (weight.numel(), weight.blocksize());
        // So many rows fill whole blocks.
        let step = blocksize >> columns.trailing_zeros().min(blocksize.trailing_zeros());
        let panel = (self.update.panel_rows(step) * columns).max(blocksize);
        let mut packed = vec![0; packed_len(numel)];
        let mut absmax = vec![0.0; block_count(numel, blocksize)];
        let not_finite = packed
            .par_chunks_mut(panel / 2)
            .zip(absmax.par_chunks_mut(panel / blocksize))
            .enumerate()
            .map_init(Vec::new, |sum, (i, (packed, absmax))| {
                self.panel(i * panel, panel.min(numel - i * panel), sum);
                quantize(sum, blocksize, weight.codebook(), packed, absmax).expect("whole blocks");
                not_finite(sum).map(|at| i * panel + at)
            })
            .flatten()
            .min();
        not_finite.map_or(Ok((packed, absmax)), Err)
    }

    /// Writes `len` changed elements, of whole rows from element `start` on, to `sum`.
    fn panel(&self, start: usize, len: usize, sum: &mut Vec<f32>) {
        let row = start / self.update.shape()[1];
        sum.resize(len, 0.0);
        self.weight.read(self.weight.dtype(), start, sum);
        match self.direction {
            Direction::Merge => {
                self.scale(row, sum, |w, scale| w * scale);
                self.sides.add_product(row, 1.0, sum);
            }
            Direction::Unmerge => {
                self.sides.add_product(row, -1.0, sum);
                self.scale(row, sum, |w, scale| w / scale);
            }
        }
    }

    /// Applies the row scale to whole rows, from `row` on.
    fn scale(&self, row: usize, panel: &mut [f32], apply: impl Fn(f32, f32) -> f32) {
        let Some(row_scale) = &self.row_scale else { return };
        for (i, weights) in panel.chunks_mut(self.update.shape()[1]).enumerate() {
            match self.update.fan_in_fan_out {
                true => weights.iter_mut().zip(row_scale).for_each(|(w, &scale)| *w = apply(*w, scale)),
                false => weights.iter_mut().for_each(|w| *w = apply(*w, row_scale[row + i])),
            }
        }
    }
}

/// The first element that is infinite or NaN.
fn not_finite(values: &[f32]) -> Option<usize> {
    // Bits of magnitudes are ordered as the magnitudes are; the maximum needs no branch.
    let largest = values.iter().fold(0, |largest: u32, v| largest.max(v.abs().to_bits()));
    if f32::from_bits(largest).is_finite() { None } else { values.iter().position(|v| !v.is_finite()) }
}
