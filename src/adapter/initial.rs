use rayon::prelude::*;

use super::extract::Difference;
use super::update::{PANEL, Update};
use super::{Adapter, Lora};
use crate::nf4::{Codebook, Nesting, Nf4Matrix};
use crate::{DType, Error, Result, Tensor};

/// A 4-bit base and the adapter that its training begins with, which together are nearer to the weight than the base is by itself.
/// Both ways leave a base that is not the plainly quantised weight: it has to be saved with the adapter.
///
/// In PEFT's configuration of such an adapter `init_lora_weights` is `true` (not `"pissa"` or `"loftq"`, which would change the
/// base once more when it is loaded) and `lora_alpha` is `r`: the scaling is 1. [`Config::lora`](crate::formats::peft::Config::lora)
/// says just that.
#[derive(Debug, Clone, PartialEq)]
pub struct Initial {
    /// The base.
    pub base: Nf4Matrix,
    /// The adapter, with a scaling of 1.
    pub lora: Lora,
    /// `||W - Q(W)||` in the Frobenius norm: of the plainly quantised weight.
    pub plain_error: f64,
    /// `||W - (base + B A)||`, with factors as they are rounded and the base dequantised to its dtype, which is that of the weight.
    pub error: f64,
}

/// How a weight is quantised.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantisation {
    /// Elements per scale.
    pub blocksize: usize,
    /// NF4, FP4 or another table.
    pub codebook: Codebook,
    /// Whether the scales are quantised too.
    pub nesting: Nesting,
}

impl Quantisation {
    /// Of f32 values, which stand for a weight of `dtype`.
    fn of(&self, values: &[f32], like: &Tensor) -> Result<Nf4Matrix> {
        let q = Nf4Matrix::quantize(values, like.shape(), self.blocksize, &self.codebook, self.nesting)?;
        let (packed, absmax) = (q.packed().to_vec(), q.absmax().clone());
        Nf4Matrix::from_parts(
            like.shape(),
            packed,
            absmax,
            self.blocksize,
            self.codebook.clone(),
            like.dtype(),
        )
    }
}

impl Initial {
    /// PiSSA (Meng, Wang and Zhang 2024, arXiv:2404.02948): the principal part of the weight goes into the adapter, and only the rest is
    /// quantised. `W ≈ B A` of the given rank, base `= Q(W - B A)`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `weight` is not a matrix or not finite, the rank exceeds its smaller side, the block size is none, or a
    /// factor overflows `dtype`.
    pub fn pissa(weight: &Tensor, rank: usize, dtype: DType, quantisation: &Quantisation) -> Result<Self> {
        let plain = quantisation.of(&weight.to_f32(), weight)?;
        let lora = Difference::from_zero(weight)?.extract(rank)?.lora(dtype)?;
        let base = quantisation.of(&without(weight, &lora)?, weight)?;
        let error = Difference::between(&base, weight)?.rest(&lora.clone().into())?;
        Ok(Self { base, lora, plain_error: Difference::between(&plain, weight)?.norm(), error })
    }

    /// LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1): from `B A = 0` on, `iterations` times, base `= Q(W - B A)` and
    /// `B A =` the best approximation of `W - base`. The errors need not fall from one to the next: the best one is returned.
    ///
    /// # Errors
    /// As [`Initial::pissa`], and when there is to be no iteration.
    pub fn loftq(
        weight: &Tensor,
        rank: usize,
        iterations: usize,
        dtype: DType,
        quantisation: &Quantisation,
    ) -> Result<Self> {
        let mut values = weight.to_f32();
        let mut best: Option<Self> = None;
        for _ in 0..iterations {
            let base = quantisation.of(&values, weight)?;
            let difference = Difference::between(&base, weight)?;
            let lora = difference.extract(rank)?.lora(dtype)?;
            let error = difference.rest(&lora.clone().into())?;
            values = without(weight, &lora)?;
            let plain_error = best.as_ref().map_or(difference.norm(), |first| first.plain_error);
            match &mut best {
                Some(best) if best.error <= error => {}
                best => *best = Some(Self { base, lora, plain_error, error }),
            }
        }
        best.ok_or_else(|| Error::argument("iterations", "1 or more", iterations))
    }
}

/// `weight - B A`, each element rounded once to f32.
fn without(weight: &Tensor, lora: &Lora) -> Result<Vec<f32>> {
    let update = Update::of(&Adapter::from(lora.clone()));
    let [_, columns] = update.shape();
    let (sides, rows, mut rest) = (update.sides(|v| v), update.panel_rows(1), weight.to_f32());
    rest.par_chunks_mut((rows * columns).max(1)).enumerate().for_each_init(
        || Vec::with_capacity(PANEL),
        |delta, (i, rest)| {
            delta.clear();
            delta.resize(rest.len(), 0.0);
            sides.add_product(i * rows, delta);
            rest.iter_mut().zip(delta).for_each(|(w, d)| *w = (f64::from(*w) - *d) as f32);
        },
    );
    Ok(rest)
}
