//! `y = row_scale ⊙ (x Wᵀ + v Bᵀ) + bias`, with `v = scaling · x Aᵀ` of each token's adapter.

use std::ops::{Add, Mul};

use super::Dropout;
use crate::nf4::{Nf4Matrix, check_len};
use crate::{Element, Error, Result};

/// The weight of a linear layer, `[N, K]` = `[out, in]`, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a, T> {
    /// Elements of the activations' type.
    Dense {
        /// `n * k` elements.
        data: &'a [T],
        /// Outputs.
        n: usize,
        /// Inputs.
        k: usize,
    },
    /// 4-bit blocks; it stands for `nf4.dequantize::<T>()`, which is never made whole.
    Nf4(&'a Nf4Matrix),
}

/// One adapter's factors: `delta = scaling * lora_b @ lora_a`.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a, A> {
    /// `[rank, K]`.
    pub lora_a: &'a [A],
    /// `[N, rank]`.
    pub lora_b: &'a [A],
    /// May be 0.
    pub rank: usize,
    /// What multiplies the product.
    pub scaling: f32,
}

/// What a product may have besides `x` and `weight`. The default is nothing.
#[derive(Debug, Clone, Copy)]
pub struct MatmulExtras<'a, T, A = T> {
    /// `[N]`, added at the end (not scaled by `row_scale`).
    pub bias: Option<&'a [T]>,
    /// `[N]`: DoRA's `magnitude / norm`.
    pub row_scale: Option<&'a [f32]>,
    /// The adapters to choose from.
    pub adapters: &'a [LowRank<'a, A>],
    /// `[M]`: each token's adapter, -1 for none. Without it every token has the first adapter, if there is one.
    pub adapter_index: Option<&'a [i32]>,
    /// Of the inputs of adapters, in training.
    pub dropout: Option<Dropout>,
}

impl<T, A> Default for MatmulExtras<'_, T, A> {
    fn default() -> Self {
        Self { bias: None, row_scale: None, adapters: &[], adapter_index: None, dropout: None }
    }
}

/// The type that sums are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accumulate {
    /// f32, in the order of k, every product rounded.
    F32,
    /// f64.
    F64,
}

/// One output in f64, and the measure of what rounding can do to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truth {
    /// The output, not rounded.
    pub value: f64,
    /// The same sum over magnitudes: `|row_scale| (|x|·|w| + |scaling| (|x|·|A|ᵀ)·|b|) + |bias|`. A sum of `c` roundings in
    /// a type of unit roundoff `eps` is off by at most about `c * eps * magnitude`.
    pub magnitude: f64,
}

/// The product for `m` tokens: `x` is `[m, K]`, `y` is `[m, N]`, both row-major.
///
/// `y[i, n] = round_T(row_scale[n] * (Σ_k x[i, k] w[n, k] + Σ_r v[i, r] B[n, r]) + bias[n])`, where
/// `v[i, r] = scaling * Σ_k x[i, k] A[r, k]`, with A, B and scaling of the adapter of token `i`
/// (LoRA, arXiv:2106.09685; `row_scale` from DoRA, arXiv:2402.09353). With dropout v is that of [`super::lora_shrink`].
///
/// # Errors
/// [`Error::Argument`] when a length does not fit, a 4-bit weight is not a matrix, or a token's adapter does not exist. `y`
/// is not written then.
pub fn matmul<T: Element, A: Element>(
    x: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
    accumulate: Accumulate,
    y: &mut [T],
) -> Result<()> {
    let shape = check(x, m, weight, extras)?;
    check_len("y", shape.y_len, "elements", y.len())?;
    let weight = |n: usize, row: &mut [T]| weight.row(n, shape.k, row);
    match accumulate {
        Accumulate::F32 => {
            product::<T, A, f32>(x, weight, extras, shape, |v| v, |i, sum| y[i] = T::from_f32(sum))
        }
        Accumulate::F64 => {
            product::<T, A, f64>(x, weight, extras, shape, |v| v, |i, sum| y[i] = T::from_f64(sum))
        }
    }
    Ok(())
}

/// What [`matmul`] rounds, in f64, row-major `[m, N]`.
///
/// # Errors
/// As [`matmul`].
pub fn truth<T: Element, A: Element>(
    x: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
) -> Result<Vec<Truth>> {
    let shape = check(x, m, weight, extras)?;
    let mut truth = vec![Truth { value: 0.0, magnitude: 0.0 }; shape.y_len];
    let weight = |n: usize, row: &mut [T]| weight.row(n, shape.k, row);
    product::<T, A, f64>(x, weight, extras, shape, |v| v, |i, sum| truth[i].value = sum);
    product::<T, A, f64>(x, weight, extras, shape, f64::abs, |i, sum| truth[i].magnitude = sum);
    Ok(truth)
}

/// A type to sum in.
pub(super) trait Real: Copy + Add<Output = Self> + Mul<Output = Self> {
    const ZERO: Self;
    fn of(value: f32) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    fn of(value: f32) -> Self {
        value
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    fn of(value: f32) -> Self {
        value.into()
    }
}

/// The formula. Every number goes through `map` (itself, or its magnitude); `weight` reads a row of W, outputs go to `write`, by
/// flat index.
pub(super) fn product<T: Element, A: Element, R: Real>(
    x: &[T],
    weight: impl Fn(usize, &mut [T]),
    extras: &MatmulExtras<'_, T, A>,
    Shape { m, n, k, .. }: Shape,
    map: impl Fn(R) -> R,
    mut write: impl FnMut(usize, R),
) {
    if m == 0 || n == 0 {
        return; // the other sizes may be anything then
    }
    let real = |value: f32| map(R::of(value));
    let dot = |a: &[R], b: &[R]| a.iter().zip(b).fold(R::ZERO, |sum, (&a, &b)| sum + a * b);
    let x: Vec<R> = x.iter().map(|v| real(v.to_f32())).collect();
    let token = |i: usize| &x[i * k..(i + 1) * k];

    let shrunk: Vec<Vec<R>> = (0..m)
        .map(|i| {
            let Some(adapter) = extras.adapter(i) else { return Vec::new() };
            let a: Vec<R> = adapter.lora_a.iter().map(|v| real(v.to_f32())).collect();
            let mut scaling = real(adapter.scaling);
            let mut x = token(i).to_vec();
            if let Some(dropout) = extras.dropout {
                scaling = scaling * real(dropout.scale());
                dropout.mask(i, R::ZERO, &mut x);
            }
            (0..adapter.rank).map(|r| scaling * dot(&x, &a[r * k..(r + 1) * k])).collect()
        })
        .collect();

    let mut row = vec![T::from_f32(0.0); k];
    for n_ in 0..n {
        weight(n_, &mut row);
        let w: Vec<R> = row.iter().map(|v| real(v.to_f32())).collect();
        for (i, v) in shrunk.iter().enumerate() {
            let mut sum = dot(token(i), &w);
            if let Some(adapter) = extras.adapter(i) {
                let b = &adapter.lora_b[n_ * adapter.rank..(n_ + 1) * adapter.rank];
                let b: Vec<R> = b.iter().map(|v| real(v.to_f32())).collect();
                sum = sum + dot(v, &b);
            }
            if let Some(row_scale) = extras.row_scale {
                sum = real(row_scale[n_]) * sum;
            }
            if let Some(bias) = extras.bias {
                sum = sum + real(bias[n_].to_f32());
            }
            write(i * n + n_, sum);
        }
    }
}

impl<T: Element> Weight<'_, T> {
    /// `(N, K)`.
    ///
    /// # Errors
    /// [`Error::Argument`] when a 4-bit weight is not a matrix, or a dense one has another length.
    pub fn shape(&self) -> Result<(usize, usize)> {
        match *self {
            Weight::Dense { data, n, k } => {
                check_len("weight", checked("weight", n, k)?, "elements", data.len())?;
                Ok((n, k))
            }
            Weight::Nf4(nf4) => match *nf4.shape() {
                [n, k] => Ok((n, k)),
                _ => Err(Error::argument("weight.shape", "[N, K]", format!("{:?}", nf4.shape()))),
            },
        }
    }

    /// Row `n`, in `T`. It exists.
    pub(super) fn row(&self, n: usize, k: usize, row: &mut [T]) {
        match self {
            Weight::Dense { data, .. } => row.copy_from_slice(&data[n * k..(n + 1) * k]),
            Weight::Nf4(nf4) => nf4.decode(n * k, row).expect("a row of the matrix"),
        }
    }
}

impl<T, A> MatmulExtras<'_, T, A> {
    /// The adapter of token `i`, which has been checked.
    pub(super) fn adapter(&self, i: usize) -> Option<&LowRank<'_, A>> {
        adapter_of(self.adapters, self.adapter_index, i)
    }
}

/// The adapter of token `i`: without an index, the first one. The index has been checked.
pub(super) fn adapter_of<'a, A>(
    adapters: &'a [LowRank<'a, A>],
    index: Option<&[i32]>,
    i: usize,
) -> Option<&'a LowRank<'a, A>> {
    let index = index.map_or(0, |index| index[i]);
    usize::try_from(index).ok().and_then(|index| adapters.get(index))
}

/// The sizes of a product that has been checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub y_len: usize,
}

/// Checks everything but `y`.
pub(super) fn check<T: Element, A: Element>(
    x: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
) -> Result<Shape> {
    let (n, k) = weight.shape()?;
    check_len("x", checked("x", m, k)?, "elements", x.len())?;
    if let Some(bias) = extras.bias {
        check_len("bias", n, "elements", bias.len())?;
    }
    if let Some(row_scale) = extras.row_scale {
        check_len("row_scale", n, "elements", row_scale.len())?;
    }
    check_adapters(extras, m, n, k)?;
    Ok(Shape { m, n, k, y_len: checked("y", m, n)? })
}

/// Checks the adapters, and the index of `m` tokens.
pub(super) fn check_adapters<T, A>(
    extras: &MatmulExtras<'_, T, A>,
    m: usize,
    n: usize,
    k: usize,
) -> Result<()> {
    for (i, adapter) in extras.adapters.iter().enumerate() {
        check_lora_a(&format!("adapters[{i}]"), adapter, k)?;
        check_lora_b(&format!("adapters[{i}]"), adapter, n)?;
    }
    check_adapter_index(extras.adapter_index, m, extras.adapters.len())
}

/// Checks that `lora_a` is `[rank, k]`.
pub(super) fn check_lora_a<A>(name: &str, adapter: &LowRank<'_, A>, k: usize) -> Result<()> {
    let argument = format!("{name}.lora_a");
    check_len(&argument, checked(&argument, adapter.rank, k)?, "elements", adapter.lora_a.len())
}

/// Checks that `lora_b` is `[n, rank]`.
pub(super) fn check_lora_b<A>(name: &str, adapter: &LowRank<'_, A>, n: usize) -> Result<()> {
    let argument = format!("{name}.lora_b");
    check_len(&argument, checked(&argument, n, adapter.rank)?, "elements", adapter.lora_b.len())
}

/// Checks that a row of `v` has room for the adapter.
pub(super) fn check_rank<A>(name: &str, adapter: &LowRank<'_, A>, max_rank: usize) -> Result<()> {
    match adapter.rank <= max_rank {
        true => Ok(()),
        false => Err(Error::argument(format!("{name}.rank"), format!("at most {max_rank}"), adapter.rank)),
    }
}

/// Checks that each of `m` tokens has an adapter that exists, or none (-1).
pub(super) fn check_adapter_index(index: Option<&[i32]>, m: usize, count: usize) -> Result<()> {
    let Some(index) = index else { return Ok(()) };
    check_len("adapter_index", m, "tokens", index.len())?;
    let exists = |&a: &i32| a == -1 || usize::try_from(a).is_ok_and(|a| a < count);
    match index.iter().position(|a| !exists(a)) {
        None => Ok(()),
        Some(i) => {
            let wanted = format!("-1, or an index of {count} adapters");
            Err(Error::argument(format!("adapter_index[{i}]"), wanted, index[i]))
        }
    }
}

/// `rows * columns`, unless it overflows.
pub(super) fn checked(argument: &str, rows: usize, columns: usize) -> Result<usize> {
    rows.checked_mul(columns).ok_or_else(|| {
        Error::argument(argument, "a size that fits in memory", format!("[{rows}, {columns}]"))
    })
}
