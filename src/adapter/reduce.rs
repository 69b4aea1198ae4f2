use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use super::svd::{Rank, Svd, by_rank, check_share, thin_svd};
use super::update::Update;
use super::{Adapter, Dora, EmbeddingLora, Extraction, Lora};
use crate::tensor::Tensor;
use crate::{DType, Error, Result};

impl Adapter {
    /// The singular value decomposition of [`Adapter::delta`], and the best update of a smaller rank, in f64. AdaLoRA's diagonal and
    /// the scaling are in it. The delta itself is not computed: with `B = Q S` and `Aᵀ = P T` (each the thin decomposition of
    /// a factor), `B A` has the singular values of `S Tᵀ`, `[rank, rank]`.
    ///
    /// A rank above the adapter's own leaves it as it is.
    ///
    /// # Errors
    /// [`Error::Argument`] when an element is not finite, or the energy is not a share.
    pub fn decompose(&self, rank: impl Into<Rank>) -> Result<Extraction> {
        let rank = check_share(rank.into())?;
        let update = Update::of(self);
        let [rows, columns] = update.shape();
        let (left, right) = update.sides(|v| v).into_factors();
        for (side, name) in [(&left, "rows"), (&right, "columns")] {
            if let Some(v) = side.iter().find(|v| !v.is_finite()) {
                return Err(Error::argument(format!("adapter (its factor of {name})"), "finite numbers", v));
            }
        }
        let factor = |values: &[f64], length: usize| {
            thin_svd(MatRef::from_row_major_slice(values, self.rank(), length).transpose())
        };
        let ((q, s, u), (p, t, v)) = (factor(&left, rows)?, factor(&right, columns)?);
        // diag(s) uᵀ v diag(t), where u and v have a row per rank.
        let mut core = product(u.transpose(), v.as_ref());
        for (j, t) in t.iter().enumerate() {
            for (i, s) in s.iter().enumerate() {
                core[(i, j)] *= s * t;
            }
        }
        let (left, sigma, right) = thin_svd(core.as_ref())?;
        let (left, right) = (product(q.as_ref(), left.as_ref()), product(p.as_ref(), right.as_ref()));
        let norm = sigma.iter().rev().map(|s| s * s).sum::<f64>().sqrt();
        let mut svd = Svd {
            left: by_rank(&left, sigma.len()),
            right: by_rank(&right, sigma.len()),
            rank: sigma.len(),
            sigma,
            rows,
            columns,
            complete: true,
            norm,
            beyond: 0.0,
        };
        svd.cut_to(rank);
        Ok(Extraction { svd, fan_in_fan_out: self.fan_in_fan_out() })
    }

    /// The adapter brought to a smaller rank: the nearest one, with its factors in `dtype` and a scaling of 1. AdaLoRA becomes LoRA. Of
    /// DoRA the direction is reduced, and the magnitude stays; PEFT's `lora_bias` keeps its product with the old scaling.
    ///
    /// What it leaves out of the delta is [`Extraction::frobenius_error`] of [`Adapter::decompose`].
    ///
    /// # Errors
    /// As [`Adapter::decompose`], and when a factor overflows `dtype`.
    pub fn reduced(&self, rank: impl Into<Rank>, dtype: DType) -> Result<Adapter> {
        let lora = self.decompose(rank)?.lora(dtype)?;
        match self {
            Adapter::Lora(whole) => match whole.lora_bias() {
                None => Ok(lora.into()),
                Some(bias) => Ok(lora.with_lora_bias(scaled(bias, whole)?)?.into()),
            },
            Adapter::AdaLora(_) => Ok(lora.into()),
            Adapter::Dora(whole) => Ok(Dora::new(lora, whole.magnitude().clone())?.into()),
            Adapter::Embedding(_) => {
                let (lora_a, lora_b) = (lora.lora_a().clone(), lora.lora_b().clone());
                Ok(EmbeddingLora::new(lora_a, lora_b, lora.scaling())?.into())
            }
        }
    }
}

/// `lora_bias` times the scaling.
fn scaled(bias: &Tensor, lora: &Lora) -> Result<Tensor> {
    let values: Vec<f64> = bias.to_f64().iter().map(|b| lora.scaling() * b).collect();
    super::svd::round("lora_bias", bias.shape(), &values, bias.dtype())
}

fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut product = Mat::zeros(a.nrows(), b.ncols());
    matmul(product.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    product
}
