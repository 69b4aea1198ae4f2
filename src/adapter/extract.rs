use super::svd::{Decomposition, Matrix, Rank, Svd, round};
use super::{Adapter, Base, Lora};
use crate::{DType, Error, Result};

/// Elements that are read at a time.
const RUN: usize = 256;

/// What training has changed: one weight less another. Neither is copied; 4-bit blocks are dequantised to their dtype.
///
/// ```
/// use lora_kernels::adapter::Difference;
/// use lora_kernels::{DType, Tensor};
///
/// let base = Tensor::from_f32([2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], DType::F32)?;
/// let tuned = Tensor::from_f32([2, 3], &[2.0, 2.0, 4.0, 6.0, 5.0, 8.0], DType::F32)?;
/// let extraction = Difference::between(&base, &tuned)?.extract(1)?;
/// assert!(extraction.frobenius_error() < 1e-12);
/// let lora = extraction.lora(DType::F32)?;
/// assert_eq!((lora.lora_a().shape(), lora.lora_b().shape()), (&[1, 3][..], &[2, 1][..]));
/// # Ok::<(), lora_kernels::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Difference<'a> {
    base: Option<Base<'a>>,
    tuned: Base<'a>,
    rows: usize,
    columns: usize,
    norm: f64,
    fan_in_fan_out: bool,
    method: Decomposition,
}

impl<'a> Difference<'a> {
    /// `tuned - base`, of weights `[out, in]` whose types may differ. Both are read once.
    ///
    /// # Errors
    /// [`Error::Argument`] when the weights are not matrices of one shape, or an element is not finite.
    pub fn between(base: impl Into<Base<'a>>, tuned: impl Into<Base<'a>>) -> Result<Self> {
        Self::new(Some(base.into()), tuned.into())
    }

    /// The weight itself.
    pub(super) fn from_zero(weight: impl Into<Base<'a>>) -> Result<Self> {
        Self::new(None, weight.into())
    }

    fn new(base: Option<Base<'a>>, tuned: Base<'a>) -> Result<Self> {
        let (whole, place) = base.map_or((tuned, "weight"), |base| (base, "base"));
        let &[rows, columns] = whole.shape() else {
            return Err(Error::argument(place, "a matrix", format!("shape {:?}", whole.shape())));
        };
        tuned.check_shape("tuned", [rows, columns])?;
        let difference = Self {
            base,
            tuned,
            rows,
            columns,
            norm: 0.0,
            fan_in_fan_out: false,
            method: Decomposition::default(),
        };
        let place = base.map_or("weight", |_| "tuned - base");
        let norm = difference.with_matrix(|matrix| matrix.norm()).map_err(|([row, column], value)| {
            Error::argument(format!("{place} at [{row}, {column}]"), "a finite number", value)
        })?;
        Ok(Self { norm, ..difference })
    }

    /// For weights that are stored `[in, out]`.
    pub fn with_fan_in_fan_out(self, fan_in_fan_out: bool) -> Self {
        Self { fan_in_fan_out, ..self }
    }

    /// With another way to compute singular values.
    pub fn with_decomposition(self, method: Decomposition) -> Self {
        Self { method, ..self }
    }

    /// `||tuned - base||` in the Frobenius norm; 0 where nothing has changed.
    pub fn norm(&self) -> f64 {
        self.norm
    }

    /// The best update of this rank: of all `B A` of that rank none is nearer to the difference, in the Frobenius norm and in the
    /// spectral norm (Eckart and Young 1936). Of `tuned - base = U diag(σ) Vᵀ` it keeps the largest σ: `lora_b = U sqrt(σ)`,
    /// `lora_a = sqrt(σ) Vᵀ`, with a scaling of 1.
    ///
    /// By subspace iteration ([`Decomposition`]) it is the best one as far as the iteration has come. Where singular values fall
    /// off slowly that may be a little less; [`Extraction::frobenius_error`] is that of the update as it is.
    ///
    /// # Errors
    /// [`Error::Argument`] when the rank exceeds the smaller side, or the energy is not a share.
    pub fn extract(&self, rank: impl Into<Rank>) -> Result<Extraction> {
        let svd = self.with_matrix(|matrix| matrix.svd(rank.into(), self.method, self.norm))?;
        Ok(Extraction::new(svd, self.fan_in_fan_out))
    }

    /// `||tuned - base - delta||` in the Frobenius norm: what an adapter, with its factors rounded as they are, leaves out.
    ///
    /// # Errors
    /// [`Error::Argument`] when the adapter belongs to a weight of another shape.
    pub fn rest(&self, adapter: &Adapter) -> Result<f64> {
        let wanted = adapter.weight_shape();
        if [self.rows, self.columns] != wanted {
            let got = format!("one for {wanted:?}");
            return Err(Error::argument("adapter", format!("one for {:?}", [self.rows, self.columns]), got));
        }
        let (left, right) = super::update::Update::of(adapter).sides(|v| v).into_factors();
        Ok(self.with_matrix(|matrix| matrix.rest(&left, &right, adapter.rank())))
    }

    /// Runs `f` on the difference.
    fn with_matrix<R>(&self, f: impl FnOnce(&Matrix<'_>) -> R) -> R {
        let read = |row: usize, column: usize, out: &mut [f64]| {
            let (mut base, mut tuned) = ([0.0; RUN], [0.0; RUN]);
            for (i, out) in out.chunks_mut(RUN).enumerate() {
                let (start, n) = (row * self.columns + column + i * RUN, out.len());
                if let Some(b) = self.base {
                    b.read(b.dtype(), start, &mut base[..n]);
                }
                self.tuned.read(self.tuned.dtype(), start, &mut tuned[..n]);
                for ((out, base), tuned) in out.iter_mut().zip(base).zip(tuned) {
                    *out = f64::from(tuned) - f64::from(base);
                }
            }
        };
        f(&Matrix { rows: self.rows, columns: self.columns, read: &read })
    }
}

/// An update of low rank, in f64, and what it leaves out: see [`Difference::extract`] and [`Adapter::decompose`].
#[derive(Debug, Clone, PartialEq)]
pub struct Extraction {
    pub(super) svd: Svd,
    pub(super) fan_in_fan_out: bool,
}

impl Extraction {
    /// Of a weight that is stored `[in, out]`, or not.
    pub(super) fn new(svd: Svd, fan_in_fan_out: bool) -> Self {
        Self { svd, fan_in_fan_out }
    }

    /// How many singular values are kept.
    pub fn rank(&self) -> usize {
        self.svd.rank
    }

    /// `lora_a` `[rank, in]` and `lora_b` `[out, rank]`, row-major. Each has the square roots of the singular values.
    pub fn factors(&self) -> (Vec<f64>, Vec<f64>) {
        self.svd.factors(self.fan_in_fan_out)
    }

    /// The singular values of the difference in descending order: those kept, and after a decomposition in full
    /// ([`Extraction::is_complete`]) or a [`Extraction::cut`] also others.
    pub fn singular_values(&self) -> &[f64] {
        &self.svd.sigma
    }

    /// Whether all singular values are known.
    pub fn is_complete(&self) -> bool {
        self.svd.complete
    }

    /// Keeps no more than the `rank` largest singular values.
    pub fn cut(mut self, rank: usize) -> Self {
        self.svd.cut(rank);
        self
    }

    /// `||tuned - base||` in the Frobenius norm.
    pub fn norm(&self) -> f64 {
        self.svd.norm
    }

    /// `||tuned - base - B A||` in the Frobenius norm: what the update leaves out.
    pub fn frobenius_error(&self) -> f64 {
        self.svd.error()
    }

    /// The same in the spectral norm: the largest singular value that is left out, if that is known.
    pub fn spectral_error(&self) -> Option<f64> {
        let next = self.svd.sigma.get(self.svd.rank).copied();
        next.or_else(|| self.svd.complete.then_some(0.0))
    }

    /// The share of `||tuned - base||²` that is kept; 1 where nothing has changed.
    pub fn energy(&self) -> f64 {
        match self.svd.norm {
            0.0 => 1.0,
            norm => 1.0 - (self.svd.error() / norm).powi(2),
        }
    }

    /// The adapter, with its factors rounded to `dtype` and a scaling of 1 (in a configuration, `lora_alpha` = `r`).
    ///
    /// # Errors
    /// [`Error::Argument`] when a factor overflows `dtype`.
    pub fn lora(&self, dtype: DType) -> Result<Lora> {
        let (lora_a, lora_b) = self.factors();
        let (inputs, outputs) = match self.fan_in_fan_out {
            true => (self.svd.rows, self.svd.columns),
            false => (self.svd.columns, self.svd.rows),
        };
        let lora_a = round("lora_a", [self.svd.rank, inputs], &lora_a, dtype)?;
        let lora_b = round("lora_b", [outputs, self.svd.rank], &lora_b, dtype)?;
        Ok(Lora::new(lora_a, lora_b, 1.0)?.with_fan_in_fan_out(self.fan_in_fan_out))
    }
}
