//! Weighted combinations of adapters against their formulas in f64.

mod low_rank;

use lora_kernels::adapter::{AdaLora, Adapter, Combination, Difference, Dora, EmbeddingLora, Lora, Rank};
use lora_kernels::{DType, Error, Tensor};
use low_rank::{F64, assert_close};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SHAPE: [usize; 2] = [13, 29];

struct Data(StdRng);

impl Data {
    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let len = shape.iter().product();
        let values: Vec<f32> = (0..len).map(|_| self.0.random_range(-1.0..1.0)).collect();
        Tensor::from_f32(shape, &values, DType::F32).unwrap()
    }

    fn lora(&mut self, rank: usize, scaling: f64) -> Lora {
        let [n, k] = SHAPE;
        Lora::new(self.tensor(&[rank, k]), self.tensor(&[n, rank]), scaling).unwrap()
    }

    /// Of each kind that adds, with weights of both signs.
    fn adapters(&mut self, ranks: [usize; 3]) -> Vec<(Adapter, f64)> {
        let [n, k] = SHAPE;
        let (a, e, b) =
            (self.tensor(&[ranks[2], k]), self.tensor(&[ranks[2], 1]), self.tensor(&[n, ranks[2]]));
        let with_bias = self.lora(ranks[1], 0.5).with_lora_bias(self.tensor(&[n])).unwrap();
        vec![
            (self.lora(ranks[0], 2.0).into(), 0.7),
            (with_bias.into(), -1.3),
            (AdaLora::new(a, e, b, 8.0, 6).unwrap().into(), 0.25),
        ]
    }
}

fn refs(adapters: &[(Adapter, f64)]) -> Vec<(&Adapter, f64)> {
    adapters.iter().map(|(adapter, weight)| (adapter, *weight)).collect()
}

/// The factors in f64, with AdaLoRA's diagonal in the first.
fn factors(adapter: &Adapter) -> (Vec<f64>, Vec<f64>) {
    let (mut a, b) = (adapter.lora_a().to_f64(), adapter.lora_b().to_f64());
    if let Adapter::AdaLora(adalora) = adapter {
        let e = adalora.lora_e().to_f64();
        a.iter_mut().enumerate().for_each(|(i, a)| *a *= e[i / adapter.in_features()]);
    }
    (a, b)
}

/// `B A` with the magnitudes of its terms; each factor may have been rounded once, after so many roundings of f64.
fn product(a: &[f64], b: &[f64], rank: usize, dtype: DType, roundings: f64) -> Vec<(f64, f64)> {
    let [n, k] = SHAPE;
    let unit = 2.0 * dtype.unit_roundoff() + roundings * F64;
    (0..n * k)
        .map(|i| {
            let terms = (0..rank).map(|r| b[i / k * rank + r] * a[r * k + i % k]);
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, m), term| (sum + term, m + term.abs()));
            (sum, (unit + unit * unit) * magnitude)
        })
        .collect()
}

/// `Σ w delta`, and the error of one rounding of each factor.
fn weighted_sum(adapters: &[(Adapter, f64)], dtype: DType) -> Vec<(f64, f64)> {
    let mut sum = vec![(0.0, 0.0); SHAPE[0] * SHAPE[1]];
    for (adapter, weight) in adapters {
        let (mut a, b) = factors(adapter);
        a.iter_mut().for_each(|a| *a *= weight * adapter.scaling());
        for (sum, (value, error)) in sum.iter_mut().zip(product(&a, &b, adapter.rank(), dtype, 40.0)) {
            *sum = (sum.0 + value, sum.1 + error);
        }
    }
    sum
}

fn lora(adapter: &Adapter) -> &Lora {
    let Adapter::Lora(lora) = adapter else { panic!("not LoRA") };
    lora
}

#[test]
fn cat_is_the_sum_of_the_deltas() {
    let adapters = Data(StdRng::seed_from_u64(1)).adapters([3, 5, 2]);
    for dtype in [DType::F32, DType::BF16] {
        let combined = Combination::Cat.of(&refs(&adapters), dtype).unwrap();
        assert_eq!((combined.rank(), combined.scaling(), combined.lora_a().dtype()), (10, 1.0, dtype));
        assert_close("cat", &combined.delta().unwrap(), weighted_sum(&adapters, dtype));
        let bias = lora(&adapters[1].0).lora_bias().unwrap().to_f64().into_iter().map(|b| -1.3 * 0.5 * b);
        let unit = dtype.unit_roundoff() + 4.0 * F64;
        let got = lora(&combined).lora_bias().unwrap().to_f64();
        assert_close("bias", &got, bias.map(|b| (b, unit * b.abs())));
    }
}

/// `lora_a` and `lora_b` are weighted on their own, and the sign is in one of them.
#[test]
fn linear_is_pefts() {
    let adapters = Data(StdRng::seed_from_u64(2)).adapters([4, 4, 4]);
    let combined = Combination::Linear.of(&refs(&adapters), DType::F32).unwrap();
    let (mut a, mut b) = (vec![0.0; 4 * SHAPE[1]], vec![0.0; 4 * SHAPE[0]]);
    for (adapter, weight) in &adapters {
        let scale: f64 = weight * adapter.scaling();
        let (theirs_a, theirs_b) = factors(adapter);
        a.iter_mut().zip(theirs_a).for_each(|(sum, a)| *sum += scale.signum() * scale.abs().sqrt() * a);
        b.iter_mut().zip(theirs_b).for_each(|(sum, b)| *sum += scale.abs().sqrt() * b);
    }
    assert_eq!((combined.rank(), combined.scaling()), (4, 1.0));
    assert_close("linear", &combined.delta().unwrap(), product(&a, &b, 4, DType::F32, 40.0));

    // One adapter with the weight -1 is that adapter, negated.
    let (alone, _) = &adapters[0];
    let negated = Combination::Linear.of(&[(alone, -1.0)], DType::F32).unwrap();
    let wanted = weighted_sum(&[(alone.clone(), -1.0)], DType::F32);
    assert_close("negated", &negated.delta().unwrap(), wanted);
}

/// As near to the sum as any adapter of that rank is (Eckart and Young): what is left out are the smaller singular values.
#[test]
fn svd_is_the_best_of_its_rank() {
    let adapters = Data(StdRng::seed_from_u64(3)).adapters([3, 5, 2]);
    let sum: Vec<f64> = weighted_sum(&adapters, DType::F32).iter().map(|(sum, _)| *sum).collect();
    let narrow: Vec<f32> = sum.iter().map(|v| *v as f32).collect();
    let dense = Tensor::from_f32(SHAPE, &narrow, DType::F32).unwrap();
    let zeros = Tensor::from_f32(SHAPE, &[0.0; 13 * 29], DType::F32).unwrap();
    let best = Difference::between(&zeros, &dense).unwrap();
    for rank in [1, 4, 9, 10, 13] {
        let combined = Combination::Svd(Rank::Number(rank)).of(&refs(&adapters), DType::F32).unwrap();
        assert_eq!(combined.rank(), rank.min(10));
        let left_out: f64 =
            sum.iter().zip(combined.delta().unwrap()).map(|(s, d)| (s - d).powi(2)).sum::<f64>().sqrt();
        let wanted = best.extract(rank).unwrap().frobenius_error();
        // Roundings to f32 of the factors that are concatenated, of those that come out, and of the dense sum.
        assert!((left_out - wanted).abs() < 1e-6 * best.norm(), "{rank}: {left_out} {wanted}");
    }
    assert!(
        lora(&Combination::Svd(Rank::Number(2)).of(&refs(&adapters), DType::F32).unwrap())
            .lora_bias()
            .is_some()
    );
}

#[test]
fn tables_stay_tables() {
    let mut data = Data(StdRng::seed_from_u64(4));
    let mut table = |rank| {
        Adapter::from(EmbeddingLora::new(data.tensor(&[rank, 29]), data.tensor(&[13, rank]), 0.5).unwrap())
    };
    let adapters = [(table(2), 1.0), (table(3), 2.0)];
    for combination in [Combination::Cat, Combination::Svd(Rank::Number(5))] {
        let combined = combination.of(&refs(&adapters), DType::F32).unwrap();
        assert!(matches!(combined, Adapter::Embedding(_)));
        assert_eq!((combined.rank(), combined.weight_shape()), (5, [29, 13]));
    }
}

#[test]
fn misfits_are_named() {
    let mut data = Data(StdRng::seed_from_u64(5));
    let good: Adapter = data.lora(2, 1.0).into();
    let refused = |combination: Combination, other: &Adapter, weight: f64, wanted: &str| {
        let error = combination.of(&[(&good, 1.0), (other, weight)], DType::F16).unwrap_err();
        assert!(error.to_string().starts_with(wanted), "{error}");
    };
    refused(Combination::Linear, &data.lora(3, 1.0).into(), 1.0, "adapters[1].rank: wanted 2");
    let turned = data.lora(2, 1.0).with_fan_in_fan_out(true).into();
    refused(Combination::Cat, &turned, 1.0, "adapters[1].fan_in_fan_out: wanted false");
    let narrow = Lora::new(data.tensor(&[2, 28]), data.tensor(&[13, 2]), 1.0).unwrap().into();
    refused(Combination::Cat, &narrow, 1.0, "adapters[1].shape: wanted [13, 29]");
    refused(Combination::Cat, &good, f64::NAN, "adapters[1], its weight: wanted a finite number");
    refused(Combination::Cat, &good, 1e9, "lora_a: wanted elements that fit in f16");
    let dora = Dora::new(data.lora(2, 1.0), data.tensor(&[13])).unwrap().into();
    refused(Combination::Cat, &dora, 1.0, "adapters[1]: a combination of DoRA is not supported");
    let none = Combination::Cat.of(&[], DType::F32).unwrap_err();
    assert!(matches!(&none, Error::Argument { argument, .. } if argument == "adapters"), "{none}");
}
