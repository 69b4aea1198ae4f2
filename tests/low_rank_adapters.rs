//! Adapters of lower rank: reduced ones, first ones for a 4-bit base, and ranks within a budget.

mod fixtures;

use fixtures::Fixture;
use lora_kernels::adapter::{
    AdaLora, Adapter, Difference, Dora, EmbeddingLora, Initial, Lora, Quantisation, Rank, Ranks, Spectrum,
};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Error, Tensor};
use rand::{RngExt, SeedableRng};

fn tensor(shape: [usize; 2], seed: u64) -> Tensor {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| rng.random_range(-1.0..1.0f32)).collect();
    Tensor::from_f32(shape, &values, DType::F32).unwrap()
}

fn argument<T>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Argument { argument, .. }) => argument,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// One adapter of every kind, `[9, 20]`, and one whose rank is more than its smaller side.
fn kinds() -> Vec<(&'static str, Adapter)> {
    let lora = |rank: usize| Lora::new(tensor([rank, 20], 1), tensor([9, rank], 2), 0.7).unwrap();
    let adalora = AdaLora::new(tensor([6, 20], 3), tensor([6, 1], 4), tensor([9, 6], 5), 3.0, 8).unwrap();
    let bias = Tensor::from_f32([9], &[0.5; 9], DType::F32).unwrap();
    vec![
        ("LoRA", lora(6).into()),
        ("LoRA [in, out]", lora(6).with_fan_in_fan_out(true).into()),
        ("LoRA with a bias", lora(6).with_lora_bias(bias.clone()).unwrap().into()),
        ("more ranks than outputs", lora(14).into()),
        ("DoRA", Dora::new(lora(6), bias).unwrap().into()),
        ("AdaLoRA", adalora.into()),
        ("embedding", EmbeddingLora::new(tensor([6, 20], 1), tensor([9, 6], 2), 0.7).unwrap().into()),
    ]
}

/// The decomposition of the factors is that of their product, which is decomposed here as a difference of weights.
#[test]
fn reduced_adapters_are_the_nearest_of_their_rank() {
    for (name, adapter) in kinds() {
        let delta = adapter.delta().unwrap();
        let [rows, columns] = adapter.weight_shape();
        let rounded: Vec<f32> = delta.iter().map(|&v| v as f32).collect();
        let tuned = Tensor::from_f32([rows, columns], &rounded, DType::F32).unwrap();
        let zeros = Tensor::from_f32([rows, columns], &vec![0.0; rows * columns], DType::F32).unwrap();
        let difference =
            Difference::between(&zeros, &tuned).unwrap().with_fan_in_fan_out(adapter.fan_in_fan_out());
        let whole = norm(&delta);
        let parts = adapter.decompose(usize::MAX).unwrap();
        assert!((parts.norm() - whole).abs() <= 1e-13 * whole, "{name}");
        assert!(parts.frobenius_error() <= 1e-13 * whole, "{name}");
        for rank in [0, 1, 3, 6, 9] {
            let least = difference.extract(rank).unwrap().frobenius_error();
            let made = adapter.decompose(rank).unwrap();
            // The stored delta is rounded to f32, by less than a unit of each element.
            let rounding = DType::F32.unit_roundoff() * whole;
            assert!((made.frobenius_error() - least).abs() <= rounding, "{name}, rank {rank}");
            let reduced = adapter.reduced(rank, DType::F32).unwrap();
            assert_eq!(reduced.rank(), made.rank(), "{name}");
            assert_eq!(reduced.weight_shape(), adapter.weight_shape(), "{name}");
            let rest: Vec<f64> = delta.iter().zip(reduced.delta().unwrap()).map(|(d, r)| d - r).collect();
            // Each factor is rounded to f32: of B A, by two units of ||B|| ||A||, the sum of the singular values.
            let kept: f64 = made.singular_values().iter().sum();
            let factors = 2.1 * DType::F32.unit_roundoff() * kept;
            assert!((norm(&rest) - made.frobenius_error()).abs() <= factors, "{name}, rank {rank}");
        }
        // By energy: the smallest rank with it.
        let made = adapter.decompose(Rank::Energy(0.8)).unwrap();
        assert!(made.energy() >= 0.8 && made.clone().cut(made.rank() - 1).energy() < 0.8, "{name}");
        assert!(adapter.decompose(Rank::Energy(1.0)).unwrap().rank() <= 9.min(adapter.rank()), "{name}");
    }
}

#[test]
fn reduced_adapters_keep_what_is_not_of_low_rank() {
    for (name, adapter) in kinds() {
        let reduced = adapter.reduced(2, DType::BF16).unwrap();
        match (&adapter, &reduced) {
            (Adapter::Lora(before), Adapter::Lora(after)) => {
                assert_eq!(after.fan_in_fan_out(), before.fan_in_fan_out());
                let scaled = |lora: &Lora| -> Option<Vec<f32>> {
                    let bias = lora.lora_bias()?.to_f64();
                    Some(bias.iter().map(|b| (b * lora.scaling()) as f32).collect())
                };
                assert_eq!(scaled(after), scaled(before), "{name}");
            }
            (Adapter::Dora(before), Adapter::Dora(after)) => {
                assert_eq!(after.magnitude(), before.magnitude())
            }
            (Adapter::AdaLora(_), Adapter::Lora(_)) | (Adapter::Embedding(_), Adapter::Embedding(_)) => {}
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn adapters_that_do_nothing_are_reduced_to_nothing() {
    let zeros =
        |shape: [usize; 2]| Tensor::from_f32(shape, &vec![0.0; shape[0] * shape[1]], DType::F32).unwrap();
    for (lora_a, lora_b) in [
        (tensor([4, 20], 1), zeros([9, 4])),
        (zeros([4, 20]), tensor([9, 4], 1)),
        (zeros([0, 20]), zeros([9, 0])),
    ] {
        let adapter = Adapter::from(Lora::new(lora_a, lora_b, 2.0).unwrap());
        let made = adapter.decompose(Rank::Energy(1.0)).unwrap();
        assert_eq!((made.rank(), made.norm(), made.frobenius_error()), (0, 0.0, 0.0));
        let reduced = adapter.reduced(3, DType::F32).unwrap();
        assert!(reduced.delta().unwrap().iter().all(|d| *d == 0.0));
        assert_eq!(reduced.weight_shape(), [9, 20]);
    }
    let bad = Tensor::from_f32([1, 2], &[1.0, f32::NAN], DType::F32).unwrap();
    let adapter = Adapter::from(Lora::new(bad, tensor([3, 1], 1), 1.0).unwrap());
    assert_eq!(argument(adapter.decompose(1)), "adapter (its factor of columns)");
    assert_eq!(argument(adapter.decompose(Rank::Energy(2.0))), "energy");
}

fn real_weights() -> impl Iterator<Item = Tensor> {
    ["real_minilm/w0", "real_minilm/w1"].into_iter().map(|file| Fixture::open(file).tensor("weight"))
}

fn nf4(nesting: Nesting) -> Quantisation {
    Quantisation { blocksize: 64, codebook: Codebook::nf4(), nesting }
}

/// `||W - (base + B A)||`, element by element.
fn error_of(weight: &Tensor, initial: &Initial) -> f64 {
    let delta = Adapter::from(initial.lora.clone()).delta().unwrap();
    let base = initial.base.dequantize_tensor().to_f64();
    let rest = weight.to_f64().into_iter().zip(base).zip(delta).map(|((w, q), d)| w - (q + d));
    norm(&rest.collect::<Vec<f64>>())
}

#[test]
fn first_adapters_make_up_for_what_four_bits_lose() {
    for (weight, nesting) in real_weights().zip([Nesting::Nested, Nesting::Plain]) {
        let quantisation = nf4(nesting);
        let plain = Nf4Matrix::quantize_tensor(&weight, 64, &Codebook::nf4(), nesting).unwrap();
        let lost = Difference::between(&plain, &weight).unwrap().norm();
        let mut before = [f64::INFINITY; 2];
        for rank in [0, 4, 16, 64] {
            let pissa = Initial::pissa(&weight, rank, DType::F32, &quantisation).unwrap();
            let loftq = Initial::loftq(&weight, rank, 3, DType::F32, &quantisation).unwrap();
            for (made, before) in [&pissa, &loftq].into_iter().zip(&mut before) {
                assert_eq!(made.plain_error, lost);
                let error = error_of(&weight, made);
                assert!((made.error - error).abs() <= 1e-12 * error, "{} told, {error}", made.error);
                assert!(error < *before, "rank {rank}: {error} after {before}");
                assert!(
                    if rank == 0 { (error / lost - 1.0).abs() < 1e-12 } else { error < lost },
                    "rank {rank}: {error} of {lost}"
                );
                assert_eq!(made.lora.lora_a().shape()[0], rank);
                *before = error;
            }
        }
    }
}

/// The first iteration is the best approximation of what quantisation has lost; more of them never do worse.
#[test]
fn iterations_of_loftq() {
    for weight in real_weights() {
        let quantisation = nf4(Nesting::Plain);
        let errors: Vec<f64> = [1, 2, 5]
            .map(|n| Initial::loftq(&weight, 16, n, DType::F32, &quantisation).unwrap().error)
            .into();
        assert!(errors[1] < errors[0] && errors[2] <= errors[1], "{errors:?}");
        let plain = Nf4Matrix::quantize_tensor(&weight, 64, &Codebook::nf4(), Nesting::Plain).unwrap();
        let best = Difference::between(&plain, &weight).unwrap().extract(16).unwrap().frobenius_error();
        assert!((errors[0] / best - 1.0).abs() < 1e-6, "{} for {best}", errors[0]);
    }
}

#[test]
fn first_adapters_refuse_what_does_not_fit() {
    let weight = tensor([8, 64], 1);
    let quantisation = nf4(Nesting::Plain);
    assert_eq!(argument(Initial::pissa(&weight, 9, DType::F32, &quantisation)), "rank");
    assert_eq!(argument(Initial::loftq(&weight, 9, 1, DType::F32, &quantisation)), "rank");
    assert_eq!(argument(Initial::loftq(&weight, 1, 0, DType::F32, &quantisation)), "iterations");
    let odd = Quantisation { blocksize: 48, ..quantisation.clone() };
    assert_eq!(argument(Initial::pissa(&weight, 1, DType::F32, &odd)), "blocksize");
    let vector = Tensor::from_f32([4], &[1.0; 4], DType::F32).unwrap();
    assert_eq!(argument(Initial::pissa(&vector, 1, DType::F32, &quantisation)), "weight");
    let infinite = Tensor::from_f32([1, 2], &[1.0, f32::INFINITY], DType::F32).unwrap();
    assert_eq!(argument(Initial::pissa(&infinite, 1, DType::F32, &quantisation)), "weight at [0, 1]");
}

/// Against all ways to spend the budget on three small layers.
#[test]
fn budgets_are_spent_on_the_largest_gains() {
    let sigmas = [vec![5.0, 2.0, 1.0], vec![4.0, 3.9, 0.1], vec![9.0, 0.0]];
    let costs = [3, 3, 3];
    let layers: Vec<Spectrum> = sigmas
        .iter()
        .zip(costs)
        .map(|(singular_values, cost)| Spectrum { singular_values, complete: true, cost })
        .collect();
    let kept = |ranks: &[usize]| -> f64 {
        ranks.iter().zip(&sigmas).flat_map(|(r, s)| &s[..*r]).map(|s| s * s).sum()
    };
    for budget in 0..30u64 {
        let made = Ranks::within(budget, &layers);
        assert!(made.open.is_empty());
        let spent: usize = made.ranks.iter().zip(costs).map(|(r, c)| r * c).sum();
        assert!(spent as u64 <= budget);
        let best = (0..4 * 4 * 3)
            .map(|i| [i % 4, i / 4 % 4, i / 16])
            .filter(|r| r.iter().zip(costs).map(|(r, c)| r * c).sum::<usize>() as u64 <= budget)
            .map(|ranks| kept(&ranks))
            .fold(0.0, f64::max);
        assert_eq!(kept(&made.ranks), best, "budget {budget}: {:?}", made.ranks);
    }
    // A dear layer gives way to a cheap one, and one whose values are not all known asks for more.
    let cheap = Spectrum { singular_values: &[1.0, 1.0], complete: false, cost: 1 };
    let dear = Spectrum { singular_values: &[2.0], complete: true, cost: 10 };
    assert_eq!(Ranks::within(1, &[dear, cheap]), Ranks { ranks: vec![0, 1], open: vec![] });
    assert_eq!(Ranks::within(2, &[dear, cheap]), Ranks { ranks: vec![0, 2], open: vec![] });
    assert_eq!(Ranks::within(3, &[dear, cheap]), Ranks { ranks: vec![0, 2], open: vec![1] });
    assert_eq!(Ranks::within(0, &[]), Ranks { ranks: vec![], open: vec![] });
}
