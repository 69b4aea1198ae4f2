//! `lora_shrink` and `lora_expand` on the CPU: an adapter per token, of any rank.

mod fixtures;
mod low_rank;

use fixtures::{Fixture, size};
use half::{bf16, f16};
use lora_kernels::cpu::{self, Accumulate, LowRank, MatmulExtras, Weight};
use lora_kernels::{Element, Error};
use low_rank::{BF16, F32, assert_close};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// All that a batch needs, in host memory.
struct Batch<T, A> {
    x: Vec<T>,
    y: Vec<T>,
    index: Vec<i32>,
    n: usize,
    k: usize,
    adapters: Vec<Owned<A>>,
}

struct Owned<A> {
    a: Vec<A>,
    b: Vec<A>,
    rank: usize,
    scaling: f32,
}

impl<A> Owned<A> {
    fn low_rank(&self) -> LowRank<'_, A> {
        LowRank { lora_a: &self.a, lora_b: &self.b, rank: self.rank, scaling: self.scaling }
    }
}

impl<T: Element, A: Element> Batch<T, A> {
    fn adapters(&self) -> Vec<LowRank<'_, A>> {
        self.adapters.iter().map(Owned::low_rank).collect()
    }

    fn max_rank(&self) -> usize {
        self.adapters.iter().map(|o| o.rank).max().unwrap_or(0)
    }

    fn shrink(&self) -> Vec<f32> {
        let m = self.index.len();
        // What is there before must not matter.
        let mut v = vec![f32::NAN; m * self.max_rank()];
        let (adapters, index) = (self.adapters(), Some(self.index.as_slice()));
        cpu::lora_shrink(&self.x, [m, self.k], &adapters, index, None, self.max_rank(), &mut v).unwrap();
        v
    }

    fn expand(&self, v: &[f32]) -> Vec<T> {
        let mut y = self.y.clone();
        let (adapters, index) = (self.adapters(), Some(self.index.as_slice()));
        let shape = [self.index.len(), self.n];
        cpu::lora_expand(v, self.max_rank(), &adapters, index, shape, &mut y).unwrap();
        y
    }

    fn run(&self) -> Vec<T> {
        self.expand(&self.shrink())
    }

    /// `y + s (x Aᵀ) Bᵀ` of token `i` in f64, with the magnitude of the low-rank part.
    fn truth(&self, i: usize) -> Vec<(f64, f64)> {
        let y = self.y[i * self.n..][..self.n].iter().map(|y| y.to_f64());
        let Ok(adapter) = usize::try_from(self.index[i]) else { return y.map(|y| (y, 0.0)).collect() };
        let Owned { a, b, rank, scaling } = &self.adapters[adapter];
        let x: Vec<f64> = self.x[i * self.k..][..self.k].iter().map(|x| x.to_f64()).collect();
        let v: Vec<(f64, f64)> = (0..*rank)
            .map(|r| {
                let terms = x.iter().zip(&a[r * self.k..]).map(|(x, a)| x * a.to_f64() * f64::from(*scaling));
                terms.fold((0.0, 0.0), |(sum, magnitude), term| (sum + term, magnitude + term.abs()))
            })
            .collect();
        y.enumerate()
            .map(|(n, y)| {
                v.iter().zip(&b[n * rank..(n + 1) * rank]).fold((y, 0.0), |(sum, magnitude), (v, b)| {
                    (sum + v.0 * b.to_f64(), magnitude + v.1 * b.to_f64().abs())
                })
            })
            .collect()
    }

    /// Sums over K and over the rank in f32, each product rounded, the scale; then y is added and rounded to `T`.
    fn check(&self, what: &str) {
        let y: Vec<f64> = self.run().iter().map(|y| y.to_f64()).collect();
        for i in 0..self.index.len() {
            let rank = usize::try_from(self.index[i]).map_or(0, |adapter| self.adapters[adapter].rank);
            let roundings = (self.k + rank + 3) as f64 * F32;
            let unit = T::DTYPE.unit_roundoff();
            let bound = self.truth(i).into_iter().map(|(y, magnitude)| {
                let error = roundings * magnitude + F32 * y.abs();
                (y, unit * (y.abs() + error) + error)
            });
            assert_close(&format!("{what} token {i}"), &y[i * self.n..][..self.n], bound);
        }
    }
}

const RANKS: [usize; 22] =
    [16, 0, 1, 256, 2, 3, 129, 5, 7, 8, 128, 12, 17, 24, 31, 32, 127, 33, 48, 64, 100, 96];

/// Tokens in shuffled order, some without an adapter, over adapters of every rank in `RANKS`.
fn mixed<T: Element, A: Element>(scaling: impl Fn(usize) -> f32) -> Batch<T, A> {
    let mut rng = StdRng::seed_from_u64(7);
    let (n, k) = (37, 51);
    fn fill<E: Element>(rng: &mut StdRng, len: usize) -> Vec<E> {
        (0..len).map(|_| E::from_f32(rng.random_range(-1.0..1.0))).collect()
    }
    let mut index: Vec<i32> = (-1..RANKS.len() as i32).flat_map(|adapter| [adapter; 2]).collect();
    index.shuffle(&mut rng);
    let adapters = RANKS
        .iter()
        .enumerate()
        .map(|(i, &rank)| Owned {
            a: fill(&mut rng, rank * k),
            b: fill(&mut rng, n * rank),
            rank,
            scaling: scaling(i),
        })
        .collect();
    let m = index.len();
    Batch { x: fill(&mut rng, m * k), y: fill(&mut rng, m * n), index, n, k, adapters }
}

fn bits<T: Element>(values: &[T]) -> &[u8] {
    bytemuck::cast_slice(values)
}

#[test]
fn mixed_ranks_in_one_batch() {
    let scaling = |i: usize| 0.25 + i as f32 / 3.0;
    mixed::<f32, f32>(scaling).check("f32");
    mixed::<f16, f32>(scaling).check("f16, f32");
    mixed::<bf16, f32>(scaling).check("bf16, f32");
    mixed::<f16, f16>(scaling).check("f16");
    mixed::<bf16, bf16>(scaling).check("bf16");
}

#[test]
fn tokens_do_not_touch_each_other() {
    let batch = mixed::<bf16, f32>(|i| 1.0 + i as f32);
    let (v, y, m) = (batch.shrink(), batch.run(), batch.index.len());
    let rows = |values: &[bf16], i: usize| values[i * batch.n..(i + 1) * batch.n].to_vec();
    for i in 0..m {
        let rank = usize::try_from(batch.index[i]).map_or(0, |adapter| RANKS[adapter]);
        assert!(
            v[i * 256 + rank..(i + 1) * 256].iter().all(|v| v.to_bits() == 0),
            "zeros behind rank {rank}"
        );
        if rank == 0 {
            assert_eq!(bits(&rows(&y, i)), bits(&rows(&batch.y, i)), "token {i} keeps its bits");
        } else {
            assert_ne!(
                bits(&rows(&y, i)),
                bits(&rows(&batch.y, i)),
                "token {i} has an adapter of rank {rank}"
            );
        }
    }

    let mut order: Vec<usize> = (0..m).collect();
    order.shuffle(&mut StdRng::seed_from_u64(8));
    let permuted = Batch {
        x: order.iter().flat_map(|&i| batch.x[i * batch.k..(i + 1) * batch.k].to_vec()).collect(),
        y: order.iter().flat_map(|&i| rows(&batch.y, i)).collect(),
        index: order.iter().map(|&i| batch.index[i]).collect(),
        adapters: mixed::<bf16, f32>(|i| 1.0 + i as f32).adapters,
        ..batch
    };
    let expected: Vec<bf16> = order.iter().flat_map(|&i| rows(&y, i)).collect();
    assert_eq!(bits(&permuted.run()), bits(&expected));
}

#[test]
fn a_scaling_of_zero_changes_no_bit() {
    let batch = mixed::<f32, f32>(|_| 0.0);
    assert_eq!(bits(&batch.run()), bits(&batch.y));
}

/// PEFT's mixed batches: what the base gives, then shrink and expand.
#[test]
fn mixed_batches_are_pefts() {
    let mut patterns = 0;
    for file in ["mix", "single_token", "unsorted_big"] {
        let file = Fixture::open(&format!("multi_adapter/{file}"));
        let [n, k] = ["N", "K"].map(|key| size(&file.json, key));
        for pattern in file.json["patterns"].as_array().unwrap() {
            let key = |part: &str| format!("{}.{part}", pattern.as_str().unwrap());
            let index = file.get::<i32>(&key("adapter_idx"));
            check_pattern::<f32>(&file, [n, k], &index, &file.get(&key("y_f64")), F32);
            let truth: Vec<f64> = file.get::<f32>(&key("y_bf16_truth")).into_iter().map(f64::from).collect();
            check_pattern::<bf16>(&file, [n, k], &index, &truth, BF16);
            patterns += 1;
        }
    }
    assert_eq!(patterns, 9);
}

/// `truth` is in f64, or stored in f32.
fn check_pattern<T: Element>(file: &Fixture, [n, k]: [usize; 2], index: &[i32], truth: &[f64], unit: f64) {
    let load = |name: &str| file.get::<f32>(name).into_iter().map(T::from_f32).collect::<Vec<T>>();
    let adapters = file.json["adapters"].as_array().unwrap().iter().map(|adapter| {
        let id = size(adapter, "id");
        Owned {
            a: load(&format!("ad{id}.lora_A")),
            b: load(&format!("ad{id}.lora_B")),
            rank: size(adapter, "r"),
            scaling: adapter["scaling"].as_f64().unwrap() as f32,
        }
    });
    let (x, weight, m) = (load("x"), load("weight"), index.len());
    let mut base = vec![T::from_f32(0.0); m * n];
    let dense = Weight::Dense { data: &weight, n, k };
    cpu::matmul::<T, T>(&x, m, &dense, &MatmulExtras::default(), Accumulate::F32, &mut base).unwrap();
    let batch = Batch { x, y: base, index: index.to_vec(), n, k, adapters: adapters.collect() };
    let y = batch.run();
    for i in 0..m {
        let row = i * n..(i + 1) * n;
        let got: Vec<f64> = y[row.clone()].iter().map(|y| y.to_f64()).collect();
        let terms = batch.truth(i);
        // The base's product of K terms and its rounding; shrink's and expand's sums; the scaling, which is a f32; y; and
        // a truth that is stored in f32.
        let bound = (0..n).map(|j| {
            let product = (0..k)
                .map(|k_| (batch.x[i * k + k_].to_f64() * weight[j * k + k_].to_f64()).abs())
                .sum::<f64>();
            let (base, truth) = (batch.y[i * n + j].to_f64(), truth[i * n + j]);
            let sums = F32 * ((k + 1) as f64 * product + (k + 261) as f64 * terms[j].1);
            (truth, (sums + unit * (base.abs() + truth.abs())) * (1.0 + 2.0 * unit) + F32 * truth.abs())
        });
        assert_close(&format!("token {i}"), &got, bound);
    }
}

fn refused(result: Result<(), Error>, argument: &str) {
    match result {
        Err(Error::Argument { argument: got, .. }) => assert_eq!(got, argument),
        other => panic!("{other:?}, and not {argument} refused"),
    }
}

#[test]
fn misfits_are_refused_and_nothing_is_written() {
    let (a, b, x) = ([1.0f32; 6], [1.0f32; 8], [1.0f32; 9]);
    let adapter = LowRank { lora_a: &a, lora_b: &b, rank: 2, scaling: 1.0 };
    let none: Option<&[i32]> = None;
    let mut v = [7.0f32; 6];
    let mut shrink = |x: &[f32], adapter: LowRank<'_, f32>, index, columns, len: usize| {
        let result = cpu::lora_shrink(x, [3, 3], &[adapter], index, None, columns, &mut v[..len]);
        assert_eq!(v, [7.0; 6]);
        result
    };
    refused(shrink(&x[..8], adapter, none, 2, 6), "x");
    refused(shrink(&x, adapter, none, 2, 5), "v");
    refused(shrink(&x, LowRank { lora_a: &a[..5], ..adapter }, none, 2, 6), "adapters[0].lora_a");
    refused(shrink(&x, adapter, none, 1, 3), "adapters[0].rank");
    refused(shrink(&x, adapter, Some(&[0, -1]), 2, 6), "adapter_index");
    refused(shrink(&x, adapter, Some(&[0, -1, 1]), 2, 6), "adapter_index[2]");
    refused(shrink(&x, adapter, Some(&[0, -2, 0]), 2, 6), "adapter_index[1]");

    let (v, mut y) = ([1.0f32; 6], [7.0f32; 12]);
    let mut expand = |v: &[f32], adapter: LowRank<'_, f32>, index, columns, len: usize| {
        let result = cpu::lora_expand(v, columns, &[adapter], index, [3, 4], &mut y[..len]);
        assert_eq!(y, [7.0; 12]);
        result
    };
    refused(expand(&v[..5], adapter, none, 2, 12), "v");
    refused(expand(&v, adapter, none, 2, 11), "y");
    refused(expand(&v, LowRank { lora_b: &b[..7], ..adapter }, none, 2, 12), "adapters[0].lora_b");
    refused(expand(&v[..3], adapter, none, 1, 12), "adapters[0].rank");
    refused(expand(&v, adapter, Some(&[0, 0, i32::MAX]), 2, 12), "adapter_index[2]");

    // Nothing to do is fine.
    cpu::lora_shrink::<f32, f32>(&[], [0, 3], &[adapter], none, None, 2, &mut []).unwrap();
    cpu::lora_expand::<f32, f32>(&[], 2, &[adapter], none, [0, 4], &mut []).unwrap();
    cpu::lora_expand::<f32, f32>(&v, 2, &[], none, [3, 4], &mut y).unwrap();
    assert_eq!(y, [7.0; 12]);
}
