//! How far a correct result may be from the reference data.
//!
//! Write `u` for the unit roundoff of f32 (2^-24) and `u_T` for that of the output type. Rounding `v` once is off by at most
//! `u |v|`. A sum of `n` products in f32, in any order, is off by at most `n u` times the sum of the absolute products
//! (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1). Rounding errors of real data do not all point
//! the same way: the error stays below `8 sqrt(n) u` times that sum except with a probability of less than `2 n e^-32`
//! (Higham and Mary 2019, theorem 2.4, with lambda = 8). [`accumulation`] is the smaller of the two.
//!
//! Everything else counts the roundings that an implementation does, in the order in which it does them. Where the reference
//! data are themselves the output of f32 or bf16 code, its bound and ours add up. No constant was fitted to a measured error.

use lora_kernels::DType;
use lora_kernels::cpu::AdamW;

use super::engine::Slack;
use super::truth::{Merged, Output, Scale};

/// Unit roundoff of f32.
const U: f64 = DType::F32.unit_roundoff();
/// Unit roundoff of f64.
const U64: f64 = 1.0 / (1u64 << 53) as f64;

/// The error of a sum of `n` products in f32, as a share of the sum of their absolute values.
pub fn accumulation(n: usize) -> f64 {
    U * (n as f64).min(8.0 * (n as f64).sqrt())
}

/// `error`, and then one rounding of `value` to `dtype`.
pub fn rounded(dtype: DType, value: f64, error: f64) -> f64 {
    let smallest_step = match dtype {
        DType::F16 => 2f64.powi(-25),
        DType::F32 | DType::BF16 => 2f64.powi(-134),
    };
    error + dtype.unit_roundoff() * (value.abs() + error) + smallest_step
}

/// The relative error of DoRA's factor `m / ||V||`, `V = W + s B A`, in f32. Every element of `V` takes the sum of `rank`
/// products, a scaling and an addition: relative to `||V||` that is the row's condition times its error. The norm is a sum
/// of `k` squares (half of its relative error after the root), a root and a division.
pub fn scale_error(s: &Scale) -> f64 {
    if s.rank == 0 && s.k == 0 {
        return 0.0;
    }
    s.condition * accumulation(s.rank + 3) + accumulation(s.k) / 2.0 + 3.0 * U
}

/// The same when `V` is stored in `dtype`: three roundings of `V` (`B A`, its scaling, the sum), one of the norm, one of the
/// quotient.
fn scale_error_stored(dtype: DType, s: &Scale) -> f64 {
    if s.rank == 0 && s.k == 0 {
        return 0.0;
    }
    scale_error(s) + dtype.unit_roundoff() * (3.0 * s.condition + 2.0)
}

/// PEFT writes DoRA as `base + (f - 1) base + f lora`: the two terms with `base` are rounded at this size, not at `f`.
fn spread(s: &Scale) -> f64 {
    1.0 + (s.value - 1.0).abs()
}

/// A forward pass with f32 accumulation, before it is rounded to its output type. Per element: the base product has `k`
/// terms, the low-rank products `k` and then `rank`; a handful of single roundings (scaling, sums, bias, row factor) is
/// counted into the number of terms.
fn forward_f32(t: &Output) -> f64 {
    let base = accumulation(t.k + 6) * (t.base_size + t.bias + t.adapter_bias);
    let lora = accumulation(t.k + t.rank + 8) * t.lora_size;
    spread(&t.scale) * (base + lora)
        + scale_error(&t.scale) * t.scale.value.abs() * (t.base.abs() + t.lora_size)
}

/// Our forward pass in `dtype`: f32 inside, one rounding at the end, one of a bias that is the sum of two, and what the device says
/// of its operands.
pub fn forward(dtype: DType, slack: Slack, t: &Output) -> f64 {
    let operands = t.scale.value.abs() * (slack.weight * t.base_size + slack.low_rank * t.shrunk_size);
    let bias = if t.adapter_bias > 0.0 { dtype.unit_roundoff() * (t.bias + t.adapter_bias) } else { 0.0 };
    rounded(dtype, t.y, forward_f32(t) + bias + operands * (1.0 + dtype.unit_roundoff()))
}

/// One element of AdamW's step number `step` in f64, from `[p, g, m, v]`: the new `[p, m, v]`, each with what f32 may be off by.
///
/// `m` has five roundings (of each factor, each product and the sum), `v` six. The quotient inherits that of `m` and half of that
/// of `v`; on the way there are a root, two quotients, the correction, epsilon and its sum; then the step's size and its product.
/// The decay, its product and the difference come last. A ten-thousandth stands for higher orders.
pub fn adamw(adamw: &AdamW, lr: f64, step: u64, [p, g, m, v]: [f64; 4]) -> [(f64, f64); 3] {
    let (u, tiny, t) = (U * 1.0001, 2f64.powi(-140), step as i32);
    let (old, new) = (adamw.beta1 * m, (1.0 - adamw.beta1) * g);
    let (m, m_error) = (old + new, 5.0 * u * (old.abs() + new.abs()));
    let v = adamw.beta2 * v + (1.0 - adamw.beta2) * g * g;
    let denominator = (v / (1.0 - adamw.beta2.powi(t))).sqrt() + adamw.epsilon;
    let step_size = lr / (1.0 - adamw.beta1.powi(t));
    let (kept, moved) = ((1.0 - lr * adamw.weight_decay) * p, step_size * m / denominator);
    let p_error = 3.0 * u * kept.abs() + step_size * m_error / denominator + 13.0 * u * moved.abs();
    [(kept - moved, p_error + tiny), (m, m_error + tiny), (v, 6.0 * u * v + tiny)]
}

/// How PEFT holds an adapter's factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factors {
    /// In f32, whatever the base is; also where there is no adapter.
    F32,
    /// In the type of the base.
    Stored,
    /// In the type of the base, with AdaLoRA's diagonal between them.
    StoredDiagonal,
}

/// PEFT's and bitsandbytes' forward pass in `dtype`. Where it is not f32, the base output is stored in `dtype` before and
/// after the bias. f32 factors give an f32 output, which may be cast before it is added. Others store every intermediate
/// tensor: the shrunk activations, the output, its product with the scale, and the sum; AdaLoRA also `A E`, the divisor
/// and the quotient. They store DoRA's factor, too.
pub fn forward_packages(dtype: DType, factors: Factors, t: &Output) -> f64 {
    let f32_error = forward_f32(t);
    if dtype == DType::F32 {
        return rounded(dtype, t.y, f32_error);
    }
    let output = t.lora.abs() + t.adapter_bias;
    let lora = match factors {
        Factors::F32 => output,
        Factors::Stored => t.shrunk_size + 3.0 * output,
        Factors::StoredDiagonal => t.lora_size + t.shrunk_size + 5.0 * output,
    };
    let scale = match factors {
        Factors::F32 => 0.0,
        _ => (scale_error_stored(dtype, &t.scale) - scale_error(&t.scale)) * t.scale.value.abs(),
    };
    let stored = dtype.unit_roundoff() * spread(&t.scale) * (2.0 * (t.base.abs() + t.bias) + lora);
    rounded(
        dtype,
        t.y,
        (f32_error + stored + scale * (t.base.abs() + t.lora.abs())) * (1.0 + 8.0 * dtype.unit_roundoff()),
    )
}

/// The same forward pass in f64, by somebody else, and stored with this unit roundoff.
pub fn forward_stored(unit_roundoff: f64, t: &Output) -> f64 {
    forward_f32(t) * (U64 / U) + (U64 + unit_roundoff) * t.y.abs()
}

/// `x W'^T` where each element of `W'` is off by at most `weight_error` (`[n, k]`): what that adds to an output.
pub fn through_weight(x: &[f64], weight_error: &[f64]) -> f64 {
    x.iter().zip(weight_error).map(|(x, e)| x.abs() * e).sum()
}

/// A merge or unmerge with f32 inside, before it is rounded to the weight's type.
pub fn merge_f32(t: &Merged) -> f64 {
    accumulation(t.rank + 4) * t.delta_size + 4.0 * U * (t.size + t.w.abs()) + scale_error(&t.scale) * t.size
}

/// Our merge or unmerge of a weight of `dtype`: f32 inside, one rounding at the end.
pub fn merge(dtype: DType, t: &Merged) -> f64 {
    rounded(dtype, t.w, merge_f32(t))
}

/// PEFT's merge or unmerge in `dtype` where delta and DoRA's factor are stored in it. Delta is rounded once; with AdaLoRA's
/// diagonal, `A E`, its product with B and with alpha, the divisor and the quotient are.
pub fn merge_packages(dtype: DType, factors: Factors, t: &Merged) -> f64 {
    let error = merge_f32(t);
    if dtype == DType::F32 {
        return rounded(dtype, t.w, error);
    }
    let delta_roundings = if factors == Factors::StoredDiagonal { 5.0 } else { 1.0 };
    let stored = dtype.unit_roundoff() * (delta_roundings * t.delta_size + t.size);
    rounded(dtype, t.w, error + stored + scale_error_stored(dtype, &t.scale) * t.size)
}

/// `scaling * b @ a` in f32: the sum of `rank` products, the scale, and the product with it.
pub fn delta(rank: usize, delta_size: f64) -> f64 {
    accumulation(rank + 2) * delta_size
}

/// The mean of `n` values of at most `largest`, summed in f32 in any order.
pub fn mean(n: usize, largest: f64) -> f64 {
    accumulation(n + 1) * largest
}

/// One rounding to f32 of a value of this size.
pub fn single(value: f64) -> f64 {
    U * value.abs()
}

/// A singular value decomposition of `[rows, columns]` in f64: backward stable, the sum of all its rotations or reflections
/// changes the matrix by a small multiple of its dimensions times `u64 largest`; singular values, residuals and their norms
/// move by no more than that (Weyl).
pub fn decomposition(rows: usize, columns: usize, largest: f64) -> f64 {
    8.0 * (rows + columns) as f64 * U64 * largest
}

/// The best approximation of a matrix that is off by `error`, where `gap` separates the singular values that are kept from
/// the others: the subspaces turn by `error / gap` (Wedin), and carry values up to `largest` with them.
pub fn truncation(error: f64, largest: f64, gap: f64) -> f64 {
    2.0 * error * (1.0 + 2.0 * largest / gap)
}
