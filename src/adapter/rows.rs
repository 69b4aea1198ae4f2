//! The part of an adapter that concerns some rows of the weight.

use std::ops::Range;

use super::{AdaLora, Adapter, Dora, EmbeddingLora, Lora};
use crate::tensor::{Data, each_dtype};
use crate::{Element, Error, Result, Tensor};

impl Adapter {
    /// The adapter of some rows of the weight as it is stored, so that a weight can be adapted in parts: those of outputs, with
    /// their part of magnitude and bias, or of inputs with [`Adapter::fan_in_fan_out`].
    ///
    /// # Errors
    /// [`Error::Argument`] when there are no such rows, or for a DoRA with `fan_in_fan_out`: its norms are sums over all rows.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let count = self.weight_shape()[0];
        if rows.start > rows.end || rows.end > count {
            return Err(Error::argument("rows", format!("a range of {count}"), format!("{rows:?}")));
        }
        // Factors of (outputs, inputs): one of them stays.
        let (outputs, inputs) = match self.fan_in_fan_out() {
            true => (0..self.out_features(), rows),
            false => (rows, 0..self.in_features()),
        };
        let lora_a = columns(self.lora_a(), inputs.clone());
        let vector = |tensor: &Tensor| cut(tensor, 1, outputs.clone(), 0..1);
        let lora_b = cut(self.lora_b(), self.rank(), outputs.clone(), 0..self.rank());
        let lora = |whole: &Lora| {
            let lora = Lora::new(lora_a.clone(), lora_b.clone(), whole.scaling())?
                .with_fan_in_fan_out(whole.fan_in_fan_out());
            match whole.lora_bias() {
                Some(bias) => lora.with_lora_bias(vector(bias)),
                None => Ok(lora),
            }
        };
        match self {
            Adapter::Lora(whole) => lora(whole).map(Adapter::from),
            Adapter::Dora(whole) if whole.lora().fan_in_fan_out() && inputs.len() < count => Err(
                Error::argument("rows", "all rows, under DoRA with fan_in_fan_out", format!("{inputs:?}")),
            ),
            Adapter::Dora(whole) => {
                Dora::new(lora(whole.lora())?, vector(whole.magnitude())).map(Adapter::from)
            }
            Adapter::AdaLora(whole) => {
                AdaLora::new(lora_a, whole.lora_e().clone(), lora_b, whole.alpha(), whole.init_r())
                    .map(|part| part.with_fan_in_fan_out(whole.fan_in_fan_out()).into())
            }
            Adapter::Embedding(whole) => {
                EmbeddingLora::new(lora_a, lora_b, whole.scaling()).map(Adapter::from)
            }
        }
    }
}

/// Columns of a matrix.
fn columns(matrix: &Tensor, columns: Range<usize>) -> Tensor {
    let &[rows, width] = matrix.shape() else { unreachable!("factors are matrices") };
    if columns == (0..width) { matrix.clone() } else { cut(matrix, width, 0..rows, columns) }
}

/// Rows and columns of a tensor that is `width` wide; a vector stays one.
fn cut(tensor: &Tensor, width: usize, rows: Range<usize>, columns: Range<usize>) -> Tensor {
    fn pick<T: Element>(from: &[T], width: usize, rows: Range<usize>, columns: Range<usize>) -> Data {
        T::into_data(rows.flat_map(|row| &from[row * width..][columns.clone()]).copied().collect())
    }
    let shape = [rows.len(), columns.len()];
    let shape = &shape[..tensor.shape().len()];
    let data = each_dtype!(tensor.data(), from => pick(from, width, rows, columns));
    Tensor::new(shape, data).expect("as many elements as were picked")
}
