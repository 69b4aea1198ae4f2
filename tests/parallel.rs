//! Shards of layers: ranks that are simulated here, one after the other, give what the whole layer gives.

use half::bf16;
use lora_kernels::adapter::{AdaLora, Adapter, Lora, Stack};
use lora_kernels::cpu::{self, Accumulate, MatmulExtras, Weight};
use lora_kernels::nf4::{Absmax, BLOCKSIZES, Codebook, Nesting, Nf4Matrix};
use lora_kernels::parallel::{Exchange, Factors, LoraShard, Shard, Split};
use lora_kernels::{DType, Error, Tensor};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..len).map(|_| random.random_range(-1.0..1.0)).collect()
}

fn nf4(shape: [usize; 2], blocksize: usize, nesting: Nesting) -> Nf4Matrix {
    let values = random(shape[0] * shape[1], shape[1] as u64);
    Nf4Matrix::quantize(&values, shape, blocksize, &Codebook::nf4(), nesting).unwrap()
}

/// What the part of a matrix should hold.
fn part(values: &[f32], columns: usize, shard: Shard) -> Vec<f32> {
    let rows = values.len() / columns;
    let share = |len: usize| shard.rank() * (len / shard.ranks())..(shard.rank() + 1) * (len / shard.ranks());
    match shard.split() {
        Split::Outputs => values[share(rows).start * columns..share(rows).end * columns].to_vec(),
        Split::Inputs => values.chunks(columns).flat_map(|row| &row[share(columns)]).copied().collect(),
    }
}

proptest! {
    /// Every part decodes to the bits of the whole, unless it says that it was quantised again.
    #[test]
    fn parts_of_4_bits(
        units in (1usize..5, 1usize..9),
        (ranks, unit) in (1usize..5, prop::sample::select(vec![1usize, 2, 8, 16, 32, 64, 96])),
        blocksize in prop::sample::select(BLOCKSIZES.to_vec()),
        (nested, by_outputs) in (any::<bool>(), any::<bool>()),
    ) {
        let nesting = if nested { Nesting::Nested } else { Nesting::Plain };
        let split = if by_outputs { Split::Outputs } else { Split::Inputs };
        let [rows, columns] = if by_outputs { [units.0 * ranks, units.1 * unit] } else { [units.0, units.1 * unit * ranks] };
        let whole = nf4([rows, columns], blocksize, nesting);
        let values = whole.dequantize::<f32>();
        for rank in 0..ranks {
            let shard = Shard::new(split, rank, ranks).unwrap();
            let got = shard.nf4(&whole).unwrap();
            let wanted = part(&values, columns, shard);
            let exact = wanted.len().is_multiple_of(32) && (by_outputs || columns.is_multiple_of(32) && (columns / ranks).is_multiple_of(32));
            if exact {
                prop_assert_eq!(got.relative_error, 0.0);
            }
            let decoded = got.weight.dequantize::<f32>();
            if got.relative_error == 0.0 {
                prop_assert_eq!(decoded, wanted);
            } else {
                // A block of the part has elements of two blocks of the whole: each is off by half of NF4's widest step (0.152 of
                // the largest magnitude, which double quantisation may have off by another share).
                let largest = values.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
                let bound = if nested { 0.3 } else { 0.153 } * largest;
                prop_assert!(decoded.iter().zip(&wanted).all(|(a, b)| (a - b).abs() <= bound));
            }
        }
    }
}

/// Real shapes keep their blocks, and with whole nested blocks their 4.127 bits.
#[test]
fn usual_shapes_lose_nothing() {
    let whole = nf4([512, 512], 64, Nesting::Nested);
    for (split, blocks_stay) in [(Split::Outputs, true), (Split::Inputs, false)] {
        let part = Shard::new(split, 1, 2).unwrap().nf4(&whole).unwrap();
        assert_eq!((part.relative_error, part.weight.blocksize()), (0.0, 64));
        assert_eq!(matches!(part.weight.absmax(), Absmax::Nested(_)), blocks_stay);
    }
    // 96 columns of each rank, in blocks of 64: shorter ones, with the same scales.
    let part = Shard::new(Split::Inputs, 0, 2).unwrap().nf4(&nf4([4, 192], 64, Nesting::Plain)).unwrap();
    assert_eq!((part.relative_error, part.weight.blocksize()), (0.0, 32));
    // 20 columns of each rank: no block is as short.
    let part = Shard::new(Split::Inputs, 0, 2).unwrap().nf4(&nf4([4, 40], 64, Nesting::Plain)).unwrap();
    assert!(part.relative_error > 0.0 && part.relative_error < 0.2);
}

fn adapter(rank: usize, [n, k]: [usize; 2], adalora: bool) -> Adapter {
    let tensor = |shape: [usize; 2], seed| {
        Tensor::from_f32(shape, &random(shape[0] * shape[1], seed), DType::F32).unwrap()
    };
    let (a, b) = (tensor([rank, k], 1), tensor([n, rank], 2));
    match adalora {
        true => AdaLora::new(a, tensor([rank, 1], 3), b, 8.0, rank).unwrap().into(),
        false => Lora::new(a, b, 0.75).unwrap().into(),
    }
}

/// `v = scaling * x lora_aᵀ`, in f64.
fn shrink(x: &[f32], lora: &LoraShard) -> Vec<f64> {
    let (a, k) = (lora.lora_a.to_f64(), lora.lora_a.shape()[1]);
    let dot = |x: &[f32], a: &[f64]| x.iter().zip(a).map(|(x, a)| f64::from(*x) * a).sum::<f64>();
    x.chunks(k).flat_map(|x| a.chunks(k).map(move |a| lora.scaling * dot(x, a))).collect()
}

/// A layer of two ranks or more, each with its part of x and y: as an engine would, with sums in the place of NCCL.
fn forward(
    x: &[f32],
    m: usize,
    weight: &Nf4Matrix,
    adapter: &Adapter,
    split: Split,
    ranks: usize,
    factors: Factors,
) -> Vec<f64> {
    let [n, k] = [weight.shape()[0], weight.shape()[1]];
    let shards: Vec<_> = (0..ranks).map(|rank| Shard::new(split, rank, ranks).unwrap()).collect();
    let inputs: Vec<Vec<f32>> = shards
        .iter()
        .map(|&shard| if split == Split::Inputs { part(x, k, shard) } else { x.to_vec() })
        .collect();
    let parts: Vec<_> = shards.iter().map(|shard| shard.adapter(adapter, factors).unwrap()).collect();

    let own: Vec<Vec<f64>> = inputs.iter().zip(&parts).map(|(x, part)| shrink(x, part)).collect();
    let rank = adapter.rank();
    let exchanged = |r: usize| match parts[r].exchange {
        Exchange::None => own[r].clone(),
        Exchange::AllReduce => (0..m * rank).map(|i| own.iter().map(|v| v[i]).sum()).collect(),
        Exchange::AllGather => (0..m)
            .flat_map(|i| own.iter().flat_map(move |v| v[i * rank / ranks..(i + 1) * rank / ranks].to_vec()))
            .collect(),
    };

    let mut y = vec![0.0; m * n];
    for (r, shard) in shards.iter().enumerate() {
        let weight = shard.nf4(weight).unwrap();
        assert_eq!(weight.relative_error, 0.0);
        let width = weight.weight.shape()[0];
        let mut own = vec![0.0f32; m * width];
        let extras = MatmulExtras::<f32>::default();
        cpu::matmul(&inputs[r], m, &Weight::Nf4(&weight.weight), &extras, Accumulate::F64, &mut own).unwrap();
        let (v, b, first) =
            (exchanged(r), parts[r].lora_b.to_f64(), if split == Split::Outputs { r * width } else { 0 });
        for i in 0..m {
            for j in 0..width {
                y[i * n + first + j] += f64::from(own[i * width + j]);
            }
            for (j, b) in parts[r].outputs.clone().zip(b.chunks(rank)) {
                y[i * n + first + j] +=
                    v[i * rank..(i + 1) * rank].iter().zip(b).map(|(v, b)| v * b).sum::<f64>();
            }
        }
    }
    y
}

#[test]
fn ranks_give_what_the_layer_gives() {
    let (m, n, k) = (3, 64, 256);
    let weight = nf4([n, k], 64, Nesting::Nested);
    let x = random(m * k, 9);
    for adalora in [false, true] {
        let adapter = adapter(8, [n, k], adalora);
        let x_tensor = Tensor::from_f32([m, k], &x, DType::F32).unwrap();
        let whole = Stack::new(&[&adapter], &weight).unwrap().forward(&x_tensor, &weight, None).unwrap();
        for split in [Split::Outputs, Split::Inputs] {
            for factors in [Factors::OneWhole, Factors::BothCut] {
                for ranks in [1, 2, 4] {
                    let y = forward(&x, m, &weight, &adapter, split, ranks, factors);
                    // A rank's y, no larger than k, is rounded to f32; so is every element of AdaLoRA's A * E, which meets k inputs and
                    // `rank` columns of B. None of them is above 1.
                    let bound = (-24f64).exp2() * (k * (ranks + adapter.rank())) as f64;
                    for (y, wanted) in y.iter().zip(&whole) {
                        assert!((y - wanted).abs() <= bound, "{split:?} {factors:?} {ranks}: {y} {wanted}");
                    }
                }
            }
        }
    }
}

#[test]
fn dense_weights_and_outputs() {
    let values = random(6 * 4, 1);
    let weight = Tensor::from_f32([6, 4], &values, DType::BF16).unwrap();
    let rounded: Vec<f32> = values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
    for (split, ranks) in [(Split::Outputs, 3), (Split::Inputs, 2)] {
        for rank in 0..ranks {
            let shard = Shard::new(split, rank, ranks).unwrap();
            let got = shard.dense(&weight).unwrap();
            assert_eq!((got.to_f32(), got.dtype()), (part(&rounded, 4, shard), DType::BF16));
        }
    }
    let bias = [1, 2, 3, 4, 5, 6];
    assert_eq!(Shard::new(Split::Outputs, 1, 3).unwrap().of_outputs(&bias).unwrap(), [3, 4]);
    assert_eq!(Shard::new(Split::Inputs, 1, 3).unwrap().of_outputs(&bias).unwrap(), bias);
}

#[test]
fn what_is_wrong_is_named() {
    let refused = |error: Error, argument: &str| {
        assert!(matches!(&error, Error::Argument { argument: name, .. } if name == argument), "{error}");
    };
    refused(Shard::new(Split::Outputs, 2, 2).unwrap_err(), "rank");
    refused(Shard::new(Split::Outputs, 0, 0).unwrap_err(), "rank");
    let third = |split| Shard::new(split, 0, 3).unwrap();
    let weight = nf4([4, 64], 64, Nesting::Plain);
    refused(third(Split::Outputs).nf4(&weight).unwrap_err(), "weight's rows");
    refused(third(Split::Inputs).nf4(&weight).unwrap_err(), "weight's columns");
    let dense = Tensor::from_f32([4], &[0.0; 4], DType::F32).unwrap();
    refused(third(Split::Inputs).dense(&dense).unwrap_err(), "weight");
    refused(third(Split::Outputs).of_outputs(&[0; 4]).unwrap_err(), "outputs");
    let adapter = adapter(4, [6, 9], false);
    refused(third(Split::Outputs).adapter(&adapter, Factors::BothCut).unwrap_err(), "rank");
    refused(
        Shard::new(Split::Outputs, 0, 4).unwrap().adapter(&adapter, Factors::OneWhole).unwrap_err(),
        "lora_b's rows",
    );
    refused(
        Shard::new(Split::Inputs, 0, 2).unwrap().adapter(&adapter, Factors::OneWhole).unwrap_err(),
        "lora_a's columns",
    );
}
