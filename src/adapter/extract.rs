use faer::MatRef;

use super::{Lora, check_shape};
use crate::tensor::Data;
use crate::{DType, Element, Error, Result, Tensor};

/// The best update of a given rank, from one weight to another: of all `B A` of that rank none is nearer to the
/// difference, in the Frobenius norm and in the spectral norm (Eckart and Young 1936).
#[derive(Debug, Clone, PartialEq)]
pub struct Extraction {
    lora_a: Vec<f64>,
    lora_b: Vec<f64>,
    singular_values: Vec<f64>,
    /// `[out, in]`.
    shape: [usize; 2],
    rank: usize,
    fan_in_fan_out: bool,
}

/// Takes the singular value decomposition `tuned - base = U diag(σ) Vᵀ` in f64 and keeps the `rank` largest:
/// `lora_b = U sqrt(σ)`, `lora_a = sqrt(σ) Vᵀ`, with a scaling of 1.
///
/// The weights are `[out, in]`, or `[in, out]` with `fan_in_fan_out`; their dtypes may differ.
///
/// # Errors
/// [`Error::Argument`] when the weights are not matrices of one shape, `rank` exceeds their smaller side, or an element is
/// not finite.
pub fn extract(base: &Tensor, tuned: &Tensor, rank: usize, fan_in_fan_out: bool) -> Result<Extraction> {
    let &[rows, columns] = base.shape() else {
        return Err(Error::argument("base", "a matrix", format!("shape {:?}", base.shape())));
    };
    check_shape("tuned", tuned, base.shape())?;
    if rank > rows.min(columns) {
        return Err(Error::argument("rank", format!("at most {}", rows.min(columns)), rank));
    }
    let delta: Vec<f64> =
        tuned.to_f64().iter().zip(base.to_f64()).map(|(tuned, base)| tuned - base).collect();
    if let Some(i) = delta.iter().position(|d| !d.is_finite()) {
        let place = format!("tuned - base at [{}, {}]", i / columns, i % columns);
        return Err(Error::argument(place, "a finite number", delta[i]));
    }
    let delta = MatRef::from_row_major_slice(&delta, rows, columns);
    let delta = if fan_in_fan_out { delta.transpose() } else { delta };
    let svd = delta
        .thin_svd()
        .map_err(|e| Error::argument("tuned - base", "a convergent decomposition", format!("{e:?}")))?;
    let singular_values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let root: Vec<f64> = singular_values.iter().map(|s| s.sqrt()).collect();
    let (u, v) = (svd.U(), svd.V());
    Ok(Extraction {
        lora_a: (0..rank)
            .flat_map(|r| v.col(r).iter().map(move |v| (r, v)))
            .map(|(r, v)| root[r] * v)
            .collect(),
        lora_b: (0..u.nrows())
            .flat_map(|n| (0..rank).map(move |r| (n, r)))
            .map(|(n, r)| u[(n, r)] * root[r])
            .collect(),
        singular_values,
        shape: [u.nrows(), v.nrows()],
        rank,
        fan_in_fan_out,
    })
}

impl Extraction {
    /// `[rank, in]`, row-major.
    pub fn lora_a(&self) -> &[f64] {
        &self.lora_a
    }

    /// `[out, rank]`, row-major.
    pub fn lora_b(&self) -> &[f64] {
        &self.lora_b
    }

    /// All singular values of the difference, not only those kept, in descending order.
    pub fn singular_values(&self) -> &[f64] {
        &self.singular_values
    }

    /// `||tuned - base - B A||` in the Frobenius norm: what the adapter leaves out.
    pub fn frobenius_error(&self) -> f64 {
        // The smallest first, so that they are not lost against the largest.
        self.singular_values[self.rank..].iter().rev().map(|s| s * s).sum::<f64>().sqrt()
    }

    /// The same in the spectral norm: the largest singular value that is left out.
    pub fn spectral_error(&self) -> f64 {
        self.singular_values.get(self.rank).copied().unwrap_or(0.0)
    }

    /// The adapter, with its factors rounded to `dtype` and a scaling of 1 (in a configuration, `lora_alpha` = `r`).
    ///
    /// # Errors
    /// [`Error::Argument`] when a factor overflows `dtype`.
    pub fn lora(&self, dtype: DType) -> Result<Lora> {
        let [outputs, inputs] = self.shape;
        let lora_a = round("lora_a", [self.rank, inputs], &self.lora_a, dtype)?;
        let lora_b = round("lora_b", [outputs, self.rank], &self.lora_b, dtype)?;
        Ok(Lora::new(lora_a, lora_b, 1.0)?.with_fan_in_fan_out(self.fan_in_fan_out))
    }
}

fn round(argument: &str, shape: [usize; 2], values: &[f64], dtype: DType) -> Result<Tensor> {
    let data = match dtype {
        DType::F32 => Data::F32(values.iter().map(|&v| Element::from_f64(v)).collect()),
        DType::F16 => Data::F16(values.iter().map(|&v| Element::from_f64(v)).collect()),
        DType::BF16 => Data::BF16(values.iter().map(|&v| Element::from_f64(v)).collect()),
    };
    let rounded = Tensor::new(shape, data)?;
    match rounded.to_f32().iter().position(|v| !v.is_finite()) {
        None => Ok(rounded),
        Some(i) => Err(Error::argument(argument, format!("elements that fit in {dtype}"), values[i])),
    }
}
