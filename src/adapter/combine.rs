use super::svd::{Rank, round};
use super::update::Update;
use super::{Adapter, EmbeddingLora, Lora};
use crate::{DType, Error, Result};

/// How several adapters of one module become one, after PEFT's `add_weighted_adapter`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Combination {
    /// `lora_a = Σ sign(w s) sqrt|w s| A`, `lora_b = Σ sqrt|w s| B`, with weights `w` and scalings `s`: all have one rank, and so
    /// has the result. This is not the sum of the deltas: with two adapters half of its terms are products of one's `B`
    /// with the other's `A`. PEFT's default.
    Linear,
    /// `lora_a = [w s A; ...]`, `lora_b = [B, ...]`: exactly the weighted sum of the deltas. The rank is the sum of all ranks.
    Cat,
    /// The best approximation of that sum. (PEFT applies the scalings twice here.)
    Svd(Rank),
}

impl Combination {
    /// The combination of adapters with weights: factors in `dtype`, a scaling of 1 (in a configuration, `lora_alpha` = `r`).
    ///
    /// Sums are in f64, and rounded once; for [`Combination::Svd`], of f32 factors. AdaLoRA's diagonal is multiplied
    /// into its `lora_a`, and the result is LoRA. Of `lora_bias` it is the weighted sum.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no adapter, shapes, kinds or (for [`Combination::Linear`]) ranks differ, a weight is not
    /// finite, or a factor overflows `dtype`; as [`Adapter::reduced`] for [`Combination::Svd`]. [`Error::Unsupported`] for
    /// DoRA, which does more than add.
    pub fn of(self, adapters: &[(&Adapter, f64)], dtype: DType) -> Result<Adapter> {
        let Some(&(first, _)) = adapters.first() else {
            return Err(Error::argument("adapters", "at least one", "none"));
        };
        for (i, (adapter, weight)) in adapters.iter().enumerate() {
            self.check(i, adapter, *weight, first)?;
        }
        if let Combination::Svd(rank) = self {
            return Combination::Cat.of(adapters, DType::F32)?.reduced(rank, dtype);
        }
        let (inputs, outputs) = (first.in_features(), first.out_features());
        // [rank, in] and [rank, out], of one adapter after the other.
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for (i, (adapter, weight)) in adapters.iter().enumerate() {
            let scale = weight * adapter.scaling();
            let [left, right] = match self {
                Combination::Linear => [scale.signum() * scale.abs().sqrt(), scale.abs().sqrt()],
                _ => [scale, 1.0],
            };
            let update = Update::unscaled(adapter);
            let terms = [(&mut a, update.a, left), (&mut b, update.b, right)];
            for (sum, term, factor) in terms {
                let term = term.into_iter().map(|v| factor * v);
                match self {
                    Combination::Linear if i > 0 => sum.iter_mut().zip(term).for_each(|(sum, v)| *sum += v),
                    _ => sum.extend(term),
                }
            }
        }
        let rank = match self {
            Combination::Linear => first.rank(),
            _ => adapters.iter().map(|(adapter, _)| adapter.rank()).sum(),
        };
        let b: Vec<f64> = (0..outputs).flat_map(|n| b.iter().skip(n).step_by(outputs)).copied().collect();
        let lora_a = round("lora_a", [rank, inputs], &a, dtype)?;
        let lora_b = round("lora_b", [outputs, rank], &b, dtype)?;
        if let Adapter::Embedding(_) = first {
            return Ok(EmbeddingLora::new(lora_a, lora_b, 1.0)?.into());
        }
        let lora = Lora::new(lora_a, lora_b, 1.0)?.with_fan_in_fan_out(first.fan_in_fan_out());
        Ok(match bias(adapters) {
            None => lora.into(),
            Some(bias) => lora.with_lora_bias(round("lora_bias", [outputs], &bias, dtype)?)?.into(),
        })
    }

    fn check(self, i: usize, adapter: &Adapter, weight: f64, first: &Adapter) -> Result<()> {
        let differs = |what: &str, wanted: String, got: String| match wanted == got {
            true => Ok(()),
            false => {
                let wanted = format!("{wanted}, as adapters[0] has");
                Err(Error::argument(format!("adapters[{i}].{what}"), wanted, got))
            }
        };
        if let Adapter::Dora(_) = adapter {
            return Err(Error::unsupported(format!("adapters[{i}]"), "a combination of DoRA"));
        }
        super::check_finite(&format!("adapters[{i}], its weight"), weight)?;
        let of = |what: fn(&Adapter) -> String| (what(first), what(adapter));
        let shape = of(|adapter| format!("[{}, {}]", adapter.out_features(), adapter.in_features()));
        let layout = of(|adapter| adapter.fan_in_fan_out().to_string());
        let table = of(|adapter| matches!(adapter, Adapter::Embedding(_)).to_string());
        let rank = of(|adapter| adapter.rank().to_string());
        differs("shape", shape.0, shape.1)?;
        differs("fan_in_fan_out", layout.0, layout.1)?;
        differs("is_embedding", table.0, table.1)?;
        match self {
            Combination::Linear => differs("rank", rank.0, rank.1),
            _ => Ok(()),
        }
    }
}

/// `Σ w s lora_bias`; none when no adapter has one.
fn bias(adapters: &[(&Adapter, f64)]) -> Option<Vec<f64>> {
    let mut sum: Option<Vec<f64>> = None;
    for (adapter, weight) in adapters {
        let Adapter::Lora(lora) = adapter else { continue };
        let Some(bias) = lora.lora_bias() else { continue };
        let sum = sum.get_or_insert_with(|| vec![0.0; adapter.out_features()]);
        for (sum, b) in sum.iter_mut().zip(bias.to_f64()) {
            *sum += weight * lora.scaling() * b;
        }
    }
    sum
}
