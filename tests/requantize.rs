//! Scales and roundings of a merge into 4 bits: each does what it is documented to do.

use lora_kernels::adapter::{Adapter, Lora, Rank, Requantize, Rounding, Scale, Stack};
use lora_kernels::nf4::{Absmax, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Error, Tensor};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SHAPE: [usize; 2] = [96, 200];

struct Data(StdRng);

impl Data {
    fn tensor(&mut self, shape: [usize; 2], spread: f32) -> Tensor {
        let mut one = || (0..12).map(|_| self.0.random_range(-0.5..0.5f32)).sum::<f32>();
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| spread * one()).collect();
        Tensor::from_f32(shape, &values, DType::F32).unwrap()
    }

    fn base(&mut self, codebook: &Codebook, nesting: Nesting) -> Nf4Matrix {
        let weight = Tensor::from_f32(SHAPE, &self.tensor(SHAPE, 0.02).to_f32(), DType::BF16).unwrap();
        Nf4Matrix::quantize_tensor(&weight, 64, codebook, nesting).unwrap()
    }

    /// A delta of about so many times the weight.
    fn adapter(&mut self, ratio: f32, rank: usize) -> Adapter {
        let (a, b) = (self.tensor([rank, SHAPE[1]], 1.0), self.tensor([SHAPE[0], rank], 1.0));
        Lora::new(a, b, f64::from(0.02 * ratio) / (rank as f64).sqrt()).unwrap().into()
    }
}

fn requantize(scale: Scale, rounding: Rounding) -> Requantize {
    Requantize { scale, rounding, ..Requantize::default() }.forced()
}

/// In f32, before anything is stored.
fn wanted(stack: &Stack, base: &Nf4Matrix) -> Vec<f64> {
    stack.merge(base, DType::F32).unwrap().weight.to_f64()
}

fn decoded(matrix: &Nf4Matrix) -> Vec<f64> {
    matrix.dequantize::<f32>().into_iter().map(f64::from).collect()
}

fn code(matrix: &Nf4Matrix, i: usize) -> usize {
    usize::from((matrix.packed()[i / 2] >> (4 * (1 - i % 2))) & 15)
}

/// The values of a block's codes, ascending.
fn values(matrix: &Nf4Matrix, block: usize) -> Vec<f64> {
    let absmax = matrix.absmax().get(block);
    let mut values = matrix.codebook().values().map(|value| f64::from(value * absmax)).to_vec();
    values.sort_by(f64::total_cmp);
    values
}

/// Without a delta nothing changes: not a code, not a scale, nor a scale's scale.
#[test]
fn the_least_error_is_none_without_a_delta() {
    let mut data = Data(StdRng::seed_from_u64(1));
    let nothing = Lora::new(data.tensor([0, SHAPE[1]], 1.0), data.tensor([SHAPE[0], 0], 1.0), 1.0).unwrap();
    for codebook in [Codebook::nf4(), Codebook::fp4()] {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            let base = data.base(&codebook, nesting);
            let stack = Stack::new(&[&nothing.clone().into()], &base).unwrap();
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 3 }, Rounding::KeepGain] {
                // bf16 hides the codes' values, so in f32.
                let base = Nf4Matrix::from_parts(
                    SHAPE,
                    base.packed().to_vec(),
                    base.absmax().clone(),
                    64,
                    codebook.clone(),
                    DType::F32,
                )
                .unwrap();
                let merged = stack.merge(&base, requantize(Scale::LeastError, rounding)).unwrap();
                assert!(decoded(&merged.weight) == decoded(&base), "{nesting:?} {rounding:?}");
                assert_eq!(merged.weight.absmax(), base.absmax(), "{nesting:?} {rounding:?}");
                assert_eq!(merged.report.error, 0.0);
            }
        }
    }
}

/// Of plain scales each has at most the error of the block's largest magnitude; nested ones have less of it in all.
#[test]
fn the_least_error_is_less() {
    let mut data = Data(StdRng::seed_from_u64(2));
    for ratio in [0.01, 0.1, 1.0] {
        let adapter = data.adapter(ratio, 4);
        for nesting in [Nesting::Plain, Nesting::Nested] {
            let base = data.base(&Codebook::nf4(), nesting);
            let stack = Stack::new(&[&adapter], &base).unwrap();
            let wanted = wanted(&stack, &base);
            let errors = |scale: Scale| -> Vec<f64> {
                let merged =
                    decoded(&stack.merge(&base, requantize(scale, Rounding::Nearest)).unwrap().weight);
                let squares: Vec<f64> = wanted.iter().zip(&merged).map(|(w, m)| (w - m).powi(2)).collect();
                squares.chunks(64).map(|block| block.iter().sum()).collect()
            };
            let (least, largest) = (errors(Scale::LeastError), errors(Scale::Largest));
            assert!(least.iter().sum::<f64>() < largest.iter().sum(), "{ratio} {nesting:?}");
            if nesting == Nesting::Plain {
                // In f32 the squares have an error of their own.
                assert!(least.iter().zip(&largest).all(|(least, largest)| *least <= largest * 1.00001));
            }
        }
    }
}

/// Nested scales keep their offset, and their scales too unless one is exceeded.
#[test]
fn nested_scales_are_searched_as_they_are_stored() {
    let mut data = Data(StdRng::seed_from_u64(3));
    let base = data.base(&Codebook::nf4(), Nesting::Nested);
    let nested = |matrix: &Nf4Matrix| match matrix.absmax() {
        Absmax::Nested(nested) => nested.clone(),
        Absmax::Plain(_) => panic!("plain"),
    };
    for (ratio, same) in [(0.001, true), (2.0, false)] {
        let stack = Stack::new(&[&data.adapter(ratio, 4)], &base).unwrap();
        let merged = stack.merge(&base, requantize(Scale::LeastError, Rounding::Nearest)).unwrap().weight;
        let (before, after) = (nested(&base), nested(&merged));
        assert_eq!(before.offset().to_bits(), after.offset().to_bits());
        assert_eq!(before.absmax() == after.absmax(), same, "{ratio}");
    }
}

/// An element becomes one of its two neighbours, and on average itself; the seed alone decides which.
#[test]
fn stochastic_rounding_has_no_bias() {
    let mut data = Data(StdRng::seed_from_u64(4));
    let adapter = data.adapter(0.05, 4);
    for nesting in [Nesting::Plain, Nesting::Nested] {
        let base = data.base(&Codebook::nf4(), nesting);
        let stack = Stack::new(&[&adapter], &base).unwrap();
        let wanted = wanted(&stack, &base);
        let merge = |seed| {
            stack.merge(&base, requantize(Scale::Largest, Rounding::Stochastic { seed })).unwrap().weight
        };
        assert!(merge(5) == merge(5));
        assert!(merge(5) != merge(6));
        let trials = 150;
        let mut sums = vec![0.0; wanted.len()];
        for seed in 0..trials {
            let merged = merge(seed);
            for (i, (sum, (value, wanted))) in
                sums.iter_mut().zip(decoded(&merged).iter().zip(&wanted)).enumerate()
            {
                let values = values(&merged, i / 64);
                let above = values.partition_point(|value| value < wanted).min(15);
                let below = above.saturating_sub(1);
                let near = |neighbour: usize| (value - values[neighbour]).abs() <= 1e-6 * values[15];
                assert!(near(above) || near(below), "{value} for {wanted} in {values:?}");
                *sum += value;
            }
        }
        let scales = merge(0);
        let mut squares = 0.0;
        for (i, (sum, wanted)) in sums.iter().zip(&wanted).enumerate() {
            let values = values(&scales, i / 64);
            // Beyond the values there is nothing to take a mean of: nested scales may be too small by half a step of theirs.
            let wanted = wanted.clamp(values[0], values[15]);
            let above = values.partition_point(|value| *value < wanted).clamp(1, 15);
            let step = values[above] - values[above - 1];
            let share = (wanted - values[above - 1]) / step;
            let (count, spread) = (f64::from(trials as u32), share * (1.0 - share));
            // Of steps up, in all trials together. By Bernstein's inequality a sum of so many of variance `spread` is off by more than this
            // with a probability of 2 exp(-l): 1e-12, times 19200 elements.
            let l = 28.3f64;
            let bound = l / 3.0 + (l * l / 9.0 + 2.0 * l * count * spread).sqrt();
            let off = (sum - count * wanted) / (step + 1e-6 * values[15]);
            assert!(off.abs() <= bound, "{i}: {off} steps of {count}, {bound} at most");
            squares += off * off / (count * spread + 1e-6);
        }
        assert!(squares < 1.1 * wanted.len() as f64, "{squares}");
    }
}

/// The delta is retained up to half of one step, by steps of one code along it.
#[test]
fn the_gain_is_kept() {
    let mut data = Data(StdRng::seed_from_u64(5));
    for codebook in [Codebook::nf4(), Codebook::fp4()] {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            for ratio in [0.003, 0.03, 0.3] {
                let base = data.base(&codebook, nesting);
                let stack = Stack::new(&[&data.adapter(ratio, 4)], &base).unwrap();
                let merge = |rounding| stack.merge(&base, requantize(Scale::LeastError, rounding)).unwrap();
                let (nearest, kept) = (merge(Rounding::Nearest), merge(Rounding::KeepGain));
                let what = format!("{nesting:?} {ratio} {:?}", codebook.quant_type());
                assert!(nearest.report.retained_gain() < 0.999, "{what}");
                let wanted = wanted(&stack, &base);
                let before = base.dequantize_tensor().to_f64();
                let mut largest = 0.0f64;
                for (i, (w, before)) in wanted.iter().zip(&before).enumerate() {
                    let values = values(&kept.weight, i / 64);
                    let place = |matrix: &Nf4Matrix| {
                        let value = f64::from(
                            matrix.codebook().values()[code(matrix, i)] * matrix.absmax().get(i / 64),
                        );
                        values.iter().position(|v| *v == value).unwrap()
                    };
                    let (from, to) = (place(&nearest.weight), place(&kept.weight));
                    let steps = values.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
                    largest = largest.max(steps * (w - before).abs());
                    if from != to {
                        assert_eq!(values[to] > values[from], w > before, "{what}");
                        let between = values[from.min(to)..=from.max(to)].iter();
                        let distinct = between.zip(&values[from.min(to) + 1..=from.max(to)]);
                        assert_eq!(distinct.filter(|(a, b)| a != b).count(), 1, "{what}");
                    }
                }
                // Half of the last step; and what bf16 does to decoded values, which the choice does not look at.
                let bf16 =
                    before.iter().zip(&wanted).map(|(b, w)| (w - b).abs() * w.abs() / 256.0).sum::<f64>();
                let missing = (kept.report.wanted - kept.report.kept).abs();
                assert!(missing <= 0.5 * largest + bf16, "{what}: {missing:e}");
            }
        }
    }
}

/// With a rank that suffices the remainder is all that the merged weight lacks; with less it is the best one.
#[test]
fn a_remainder_makes_up_for_the_merge() {
    let mut data = Data(StdRng::seed_from_u64(6));
    let base = data.base(&Codebook::nf4(), Nesting::Nested);
    let stack = Stack::new(&[&data.adapter(0.03, 3), &data.adapter(0.03, 2)], &base).unwrap();
    // Nothing has been merged: the remainder is the delta.
    let whole = stack.remainder(&base, &base, 5).unwrap();
    let (norm, delta) = (whole.norm(), stack.merge(&base, DType::F32).unwrap().report);
    assert!((norm - delta.wanted.sqrt()).abs() < 1e-5 * norm);
    assert!(whole.frobenius_error() < 1e-7 * norm);
    assert_eq!(stack.remainder(&base, &base, Rank::Energy(0.9999999)).unwrap().rank(), 5);

    let merged = stack.merge(&base, requantize(Scale::Largest, Rounding::Nearest)).unwrap();
    let wanted = wanted(&stack, &base);
    let after = merged.weight.dequantize_tensor().to_f64();
    let lacks: f64 = wanted.iter().zip(&after).map(|(w, m)| (w - m).powi(2)).sum();
    let mut last = lacks.sqrt();
    for rank in [1, 2, 5, 20] {
        let remainder = stack.remainder(&base, &merged.weight, rank).unwrap();
        assert!((remainder.norm() - lacks.sqrt()).abs() < 1e-5 * remainder.norm());
        let adapter = Adapter::from(remainder.lora(DType::F32).unwrap());
        let beside = adapter.delta().unwrap();
        let rest = wanted.iter().zip(&after).zip(&beside).map(|((w, m), d)| (w - m - d).powi(2)).sum::<f64>();
        // f32 factors, and the wanted weight in f32.
        assert!((rest.sqrt() - remainder.frobenius_error()).abs() < 1e-5 * remainder.norm());
        assert!(rest.sqrt() < last, "rank {rank}");
        last = rest.sqrt();
    }
    let refused = stack.remainder(&base, &data.tensor([200, 96], 1.0), 1).unwrap_err();
    assert!(matches!(&refused, Error::Argument { argument, .. } if argument == "merged"), "{refused}");
    let refused = stack.remainder(&base, &merged.weight, 97).unwrap_err();
    assert!(matches!(&refused, Error::Argument { argument, .. } if argument == "rank"), "{refused}");
}
