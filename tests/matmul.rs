//! The fused product against f64, on every path that a plan can choose.

mod fixtures;
mod products;

use std::ops::Range;

use fixtures::{Fixture, size};
use half::{bf16, f16};
use lora_kernels::cuda::matmul::{self, Extras, Rounding, WeightFormat};
use lora_kernels::cuda::{AdapterTable, LowRank};
use lora_kernels::nf4::{Absmax, BLOCKSIZES, Codebook, DYNAMIC_MAP, NestedAbsmax, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element, Error};
use lora_kernels_devices::{Device, Spec};
use products::{Adapter, DeviceWeight, Factors, Numbers, Problem, Weight, same};

const TOKENS: [usize; 22] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 31, 33, 64, 65, 133];

/// The device at hand, or an emulated one where Hopper's own kernels would take the place of those that are meant.
fn not_hopper() -> Device {
    let best = Device::best();
    if best.queue().properties().capability == (9, 0) { Device::emulator() } else { best }
}

/// Runs a check for every type of x.
macro_rules! each_type {
    ($check:ident($($argument:expr),*)) => {
        $check::<f32>($($argument),*);
        $check::<f16>($($argument),*);
        $check::<bf16>($($argument),*);
    };
}

#[test]
fn any_number_of_tokens() {
    fn check<T: Element>(device: &Device) {
        for tokens in TOKENS {
            Problem::<T>::nf4(tokens, 65, 192, 64).run_and_check(device);
            Problem::<T>::dense(tokens, 65, 96).run_and_check(device);
        }
    }
    let device = Device::best();
    each_type!(check(&device));
}

#[test]
fn any_n_and_k() {
    fn check<T: Element>(device: &Device) {
        for tokens in [1, 3, 12, 33] {
            for (n, k) in [
                (1, 1),
                (3, 33),
                (33, 3),
                (130, 31),
                (1, 2049),
                (65, 65),
                (31, 96),
                (7, 100),
                (33, 128),
                (5, 1032),
                (2, 1057),
                (129, 8),
                (40, 32),
            ] {
                Problem::<T>::nf4(tokens, n, k, 64).run_and_check(device);
                Problem::<T>::dense(tokens, n, k).run_and_check(device);
            }
        }
    }
    let device = Device::best();
    each_type!(check(&device));
}

#[test]
fn every_way_to_store_4_bits() {
    fn check<T: Element>(device: &Device) {
        let custom = Codebook::from_values(std::array::from_fn(|i| (i as f32 - 7.0) / 9.0)).unwrap();
        for codebook in [Codebook::nf4(), Codebook::fp4(), custom] {
            for nesting in [Nesting::Plain, Nesting::Nested] {
                for blocksize in BLOCKSIZES {
                    // One kernel after the other: skinny, matvec (ragged), matmul, matmul (ragged).
                    for (tokens, k) in [(2, 128), (3, 72), (20, 160), (18, 70)] {
                        let problem = Problem::<T>::dense(tokens, 35, k);
                        problem.in_4_bits(blocksize, &codebook, nesting).run_and_check(device);
                    }
                }
            }
        }
    }
    let device = Device::best();
    each_type!(check(&device));
}

#[test]
fn adapters_scale_and_bias() {
    fn check<T: Element, A: Element>(device: &Device) {
        const RANKS: [usize; 8] = [8, 0, 1, 3, 16, 17, 64, 256];
        for (tokens, n, k) in
            [(1, 33, 128), (7, 40, 64), (7, 40, 65), (16, 33, 64), (21, 140, 96), (70, 33, 33)]
        {
            let plain = Problem::<T, A>::dense(tokens, n, k).with_bias_and_scale();
            let problem = plain.clone().with_adapters(&RANKS);
            problem.run_and_check(device);
            let nf4 = problem.in_4_bits(64, &Codebook::nf4(), Nesting::Nested);
            nf4.run_and_check(device);
            // One adapter for all tokens, without an index.
            let one = Problem { index: None, ..plain.with_adapters(&[5]) };
            one.run_and_check(device);
        }
    }
    let device = Device::best();
    check::<f32, f32>(&device);
    check::<f16, f16>(&device);
    check::<f16, f32>(&device);
    check::<bf16, bf16>(&device);
    check::<bf16, f32>(&device);
}

/// With x the identity, a sum has one term that is not zero: y is the weight as it is multiplied, rounded to T.
#[test]
fn an_identity_gives_the_dequantised_weight_to_the_bit() {
    fn check<T: Element>(
        device: &Device,
        tokens: usize,
        n: usize,
        k: usize,
        blocksize: usize,
        nesting: Nesting,
    ) {
        let mut problem = Problem::<T>::dense(tokens, n, k).in_4_bits(blocksize, &Codebook::nf4(), nesting);
        for first in (0..k).step_by(tokens) {
            problem.x.fill(T::from_f32(0.0));
            let ones = tokens.min(k - first);
            (0..ones).for_each(|i| problem.x[i * k + first + i] = T::from_f32(1.0));
            let outcome = problem.run(device);
            assert_ne!(outcome.plan.rounding, Rounding::Value);
            let weight = problem.weight_values(outcome.plan.rounding);
            for i in 0..ones {
                let column: Vec<T> = (0..n).map(|n| T::from_f32(weight[n * k + first + i])).collect();
                assert!(
                    same(&outcome.y[i * n..(i + 1) * n], &column),
                    "{:?}: column {}",
                    outcome.plan,
                    first + i
                );
            }
        }
    }
    let device = Device::best();
    for nesting in [Nesting::Plain, Nesting::Nested] {
        check::<f16>(&device, 128, 70, 128, 64, nesting);
        check::<bf16>(&device, 128, 70, 128, 64, nesting);
        check::<bf16>(&device, 32, 130, 96, 32, nesting);
        check::<bf16>(&device, 37, 30, 37, 32, nesting); // ragged
        check::<f32>(&device, 8, 33, 33, 64, nesting);
        check::<f32>(&device, 32, 33, 64, 64, nesting);
        check::<f16>(&device, 8, 33, 65, 64, nesting);
        check::<bf16>(&device, 4, 33, 32, 32, nesting);
    }
}

/// `skinny` multiplies with rounded codebook values, and scales the sum in f32: two roundings, both known.
#[test]
fn skinny_rounds_as_it_says() {
    fn check<T: Element>(device: &Device) {
        let (n, k) = (40, 192);
        for tokens in [8, 16] {
            let mut problem = Problem::<T>::nf4(tokens, n, k, 64);
            problem.x.fill(T::from_f32(0.0));
            (0..tokens).for_each(|i| problem.x[i * k + 11 * i] = T::from_f32(1.0));
            let outcome = problem.run(device);
            assert_eq!(
                (outcome.plan.rounding, outcome.plan.kernel.unwrap().module),
                (Rounding::Value, "skinny")
            );
            let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
            for i in 0..tokens {
                for n_ in 0..n {
                    let at = n_ * k + 11 * i;
                    let code = nf4.packed()[at / 2] >> (4 * (1 - at % 2)) & 15;
                    let value = T::from_f32(nf4.codebook().values()[usize::from(code)]).to_f32();
                    let wanted = T::from_f32(value * nf4.absmax().get(at / 64));
                    assert_eq!(outcome.y[i * n + n_], wanted, "column {}, row {n_}", 11 * i);
                }
            }
        }
    }
    let device = not_hopper();
    check::<f16>(&device);
    check::<bf16>(&device);
}

/// The same bits twice, and for a token the same bits whatever the others are: not numbers, other adapters, or not there.
#[test]
fn a_token_depends_on_itself_alone() {
    fn check<T: Element>(device: &Device) {
        for (tokens, n, k) in [(5, 33, 128), (5, 33, 70), (13, 40, 64), (29, 65, 96), (70, 40, 65)] {
            let problem = Problem::<T>::nf4(tokens, n, k, 64).with_adapters(&[4, 9]).with_bias_and_scale();
            let outcome = problem.run(device);
            assert!(same(&outcome.y, &problem.run(device).y), "{:?}: another run, other bits", outcome.plan);
            for kept in [0, tokens / 2, tokens - 1] {
                let mut other = problem.clone();
                let mut numbers = Numbers::new(9);
                for token in (0..tokens).filter(|&token| token != kept) {
                    other.index.as_mut().unwrap()[token] = numbers.below(4) as i32 - 1;
                    for x in &mut other.x[token * k..(token + 1) * k] {
                        *x = T::from_f32([f32::NAN, f32::INFINITY, 1e30, 0.0][numbers.below(4)]);
                    }
                }
                let y = other.run(device).y;
                let row = kept * n..(kept + 1) * n;
                assert!(same(&outcome.y[row.clone()], &y[row]), "{:?}: token {kept}", outcome.plan);
            }
        }
    }
    let device = Device::best();
    each_type!(check(&device));
}

/// From 1 to 16 tokens `skinny`, and from 1 to 8 `matvec`, give a token the same bits.
#[test]
fn decoding_does_not_depend_on_the_batch() {
    fn check<T: Element>(device: &Device, k: usize, most: usize) {
        let all = Problem::<T>::nf4(most, 70, k, 64).with_adapters(&[16, 2]);
        let y = all.run(device).y;
        for tokens in 1..most {
            let mut some = all.clone();
            some.tokens = tokens;
            some.x.truncate(tokens * k);
            some.index.as_mut().unwrap().truncate(tokens);
            let outcome = some.run(device);
            assert!(same(&outcome.y, &y[..tokens * 70]), "{:?}", outcome.plan);
        }
    }
    let device = Device::best();
    check::<bf16>(&device, 1088, 16);
    check::<f16>(&device, 1030, 8);
    check::<f32>(&device, 1030, 8);
}

#[test]
fn split_sums_are_finished() {
    fn check<T: Element>(device: &Device) {
        for (tokens, n, k) in
            [(1, 33, 4096), (1, 5, 4001), (6, 40, 4096), (12, 40, 2048), (20, 40, 2048), (17, 33, 1111)]
        {
            let problem = Problem::<T>::nf4(tokens, n, k, 64).with_bias_and_scale().with_adapters(&[3, 20]);
            let outcome = problem.run_and_check(device);
            assert!(outcome.plan.splits > 1 && outcome.plan.finish.is_some(), "{:?}", outcome.plan);
            assert_eq!(outcome.plan.workspace_bytes, outcome.plan.splits * tokens * n * 4);
        }
    }
    let device = not_hopper();
    each_type!(check(&device));
}

#[test]
fn nothing_to_do() {
    fn check<T: Element>(device: &Device) {
        for (tokens, n) in [(0, 5), (5, 0), (0, 0)] {
            let outcome = Problem::<T>::nf4(tokens, n, 64, 64).run(device);
            assert!(outcome.plan.kernel.is_none() && outcome.y.is_empty());
        }
        // A sum of nothing is zero: y is the bias.
        for tokens in [1, 7, 20] {
            let nf4 = Problem::<T>::nf4(tokens, 9, 0, 64).with_bias_and_scale();
            let dense = Problem::<T>::dense(tokens, 9, 0).with_bias_and_scale();
            for problem in [nf4, dense] {
                let outcome = problem.run(device);
                let bias = problem.bias.as_ref().unwrap();
                assert!(outcome.y.chunks(9).all(|row| same(row, bias)), "{:?}", outcome.plan);
            }
        }
        // Adapters of rank 0 add nothing.
        for tokens in [3, 20] {
            let plain = Problem::<T>::nf4(tokens, 33, 64, 64);
            let empty = plain.clone().with_adapters(&[0, 0]);
            assert!(same(&plain.run(device).y, &empty.run(device).y));
        }
    }
    let device = Device::best();
    each_type!(check(&device));
}

#[test]
fn a_wrong_adapter_makes_its_token_nan_and_no_other() {
    fn check<T: Element>(device: &Device) {
        for (tokens, k) in [(4, 128), (4, 70), (20, 96), (20, 33)] {
            let right = Problem::<T>::nf4(tokens, 40, k, 64).with_adapters(&[4, 12]);
            let mut wrong = right.clone();
            for (token, adapter) in [(0, 2), (2, -2), (3, i32::MAX)] {
                wrong.index.as_mut().unwrap()[token] = adapter;
            }
            let (right, wrong) = (right.run(device), wrong.run(device));
            for (token, (right, wrong)) in right.y.chunks(40).zip(wrong.y.chunks(40)).enumerate() {
                if [0, 2, 3].contains(&token) {
                    assert!(wrong.iter().all(|y| y.to_f32().is_nan()), "token {token}");
                } else {
                    assert!(same(right, wrong), "token {token}");
                }
            }
        }
    }
    let device = Device::best();
    each_type!(check(&device));
}

/// A block whose absmax is NaN makes the outputs of its rows NaN, and no others.
#[test]
fn nan_blocks_do_not_leak() {
    fn check<T: Element>(device: &Device) {
        for (tokens, k, block) in
            [(2, 128, 7), (2, 100, 0), (2, 96, 0), (2, 100, 7), (20, 96, 0), (20, 96, 7), (20, 50, 7)]
        {
            let n = 35;
            let mut problem = Problem::<T>::nf4(tokens, n, k, 64);
            let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
            let Absmax::Plain(mut absmax) = nf4.absmax().clone() else { unreachable!() };
            absmax[block] = f32::NAN;
            let rows = block * 64 / k..=(block * 64 + 63) / k;
            let nf4 = Nf4Matrix::from_parts(
                [n, k],
                nf4.packed().to_vec(),
                Absmax::Plain(absmax),
                64,
                Codebook::nf4(),
                DType::F32,
            );
            problem.weight = Weight::Nf4(nf4.unwrap());
            let outcome = problem.run(device);
            for (i, y) in outcome.y.iter().enumerate() {
                assert_eq!(y.to_f32().is_nan(), rows.contains(&(i % n)), "{:?}: row {}", outcome.plan, i % n);
            }
        }
    }
    let device = Device::best();
    each_type!(check(&device));
}

/// The device as one that needs no splits, and that a few outputs fill.
fn small(device: &Device) -> Device {
    device.with_multiprocessors(1)
}

/// Tiles of every size, more of them than multiprocessors.
#[test]
fn every_tile() {
    fn check<T: Element>(device: &Device) {
        for (tokens, n, k, tile) in [
            (13, 129, 96, 16),
            (30, 140, 64, 32),
            (60, 129, 96, 64),
            (125, 129, 96, 128),
            (250, 140, 64, 128),
            (256, 30, 160, 128),
        ] {
            for problem in [Problem::<T>::nf4(tokens, n, k, 64), Problem::dense(tokens, n, k)] {
                let outcome = problem.with_bias_and_scale().with_adapters(&[20, 3]).run_and_check(device);
                assert_eq!(outcome.plan.tile.tokens, if T::DTYPE == DType::F32 { 8 } else { tile });
            }
        }
    }
    each_type!(check(&small(&not_hopper())));
}

/// Rows of codes that are not whole pieces of 16 bytes, of which elements are: W is dequantised first, and that copy multiplied.
#[test]
fn two_passes() {
    fn check<T: Element>(device: &Device) {
        for (tokens, n, k) in [(20, 33, 200), (70, 130, 136), (133, 40, 264), (20, 24, 2056)] {
            let problem = Problem::<T>::nf4(tokens, n, k, 64).with_bias_and_scale().with_adapters(&[20, 3]);
            let outcome = problem.run_and_check(device);
            let plan = outcome.plan;
            assert!(plan.dequantize.is_some() && plan.vectors, "{plan:?}");
            assert_eq!(plan.rounding, Rounding::ToInput);
            let parts = if plan.splits > 1 { plan.splits * tokens * n * 4 } else { 0 };
            assert_eq!(plan.workspace_bytes, n * k * 2 + parts);

            let copy = problem.weight_values(Rounding::ToInput).into_iter().map(T::from_f32).collect();
            let of_copy = Problem { weight: Weight::Dense(copy), ..problem }.run(device);
            assert_eq!(of_copy.plan.dequantize, None);
            assert!(same(&outcome.y, &of_copy.y), "{plan:?}");
        }
    }
    for device in Device::for_each_target() {
        check::<f16>(&device);
        check::<bf16>(&device);
    }
}

/// Hopper has PTX of its own. It computes the same bits.
#[test]
fn both_targets_compute_the_same() {
    fn check<T: Element>(a100: &Device, h200: &Device) {
        for (tokens, k) in
            // Hopper has kernels of its own: up to 16 tokens for rows of whole slices of 64, from 17 on for rows of 16 bytes.
            [(1, 96), (3, 70), (8, 160), (9, 32), (14, 96), (16, 96), (24, 33), (70, 41), (133, 33)]
        {
            let dense = Problem::<T>::dense(tokens, 45, k).with_adapters(&[4, 17]).with_bias_and_scale();
            let nf4 = dense.clone().in_4_bits(64, &Codebook::nf4(), Nesting::Nested);
            for problem in [dense, nf4] {
                let (here, there) = (problem.run(a100), problem.run(h200));
                assert_eq!(*here.plan, *there.plan);
                assert!(same(&here.y, &there.y), "{:?}", here.plan);
            }
        }
    }
    let a100 = Device::emulator();
    let h200 = Device::emulate(Spec::h200()).with_multiprocessors(a100.queue().properties().sm_count);
    each_type!(check(&a100, &h200));
    each_type!(check(&small(&a100), &small(&h200)));
}

/// What decides how fast a kernel can be, counted: the bytes of W are read once and in whole sectors, no banks conflict,
/// and instructions per weight leave room to read at the speed of memory.
#[test]
fn counts() {
    fn count<T: Element>(problem: Problem<T>, entry: &str, instructions: f64) {
        let (device, weights) = (small(&Device::emulator()), (problem.n * problem.k) as f64);
        let outcome = problem.run(&device);
        let (plan, counters) = (outcome.plan, outcome.counters.unwrap());
        assert_eq!((plan.kernel.unwrap().entry, plan.splits), (entry, 1));
        assert_eq!(counters.local_accesses, 0);
        assert_eq!(counters.shared_loads.conflicts, 0, "{entry}: {counters}");
        // The last sums of `matvec` are written by the lanes that have them.
        let spare = if plan.kernel.unwrap().module == "matvec" { counters.blocks * 64 } else { 0 };
        assert!(counters.shared_stores.conflicts <= spare, "{entry}: {counters}");
        assert_eq!(counters.global_stores.sector_ratio(), 1.0, "{entry}: {counters}");

        // W and its absmax, x, y, all once: nothing else comes from memory, but for the corners of sectors.
        let size = T::DTYPE.size();
        let weight = match &problem.weight {
            Weight::Dense(_) => problem.n * problem.k * size,
            Weight::Nf4(nf4) => nf4.packed().len() + nf4.absmax().len() * 4,
        };
        let wanted = (weight + problem.tokens * problem.k * size) as f64;
        let moved = 32.0 * counters.global_loads.distinct_sectors as f64;
        assert!(moved >= wanted && moved <= 1.01 * wanted, "{entry} reads {moved} bytes, wanted {wanted}");

        let got = counters.total().threads as f64 / weights;
        assert!(got <= instructions, "{entry} takes {got:.2} instructions per weight, not {instructions}");
    }
    // PTX counts register moves that are no instructions of the machine: about a sixth.
    count(Problem::<bf16>::nf4(1, 64, 8192, 64), "skinny_nf4_bf16_t8", 5.0);
    count(Problem::<f16>::nf4(8, 64, 8192, 64), "skinny_nf4_f16_t8", 5.0);
    count(Problem::<bf16>::nf4(16, 64, 8192, 64), "skinny_nf4_bf16_t16", 6.5);
    count(Problem::<f32>::nf4(1, 64, 8192, 64), "matvec_nf4_f32_t1", 7.0);
    count(Problem::<f32>::nf4(8, 64, 8192, 64), "matvec_nf4_f32_t8", 16.0);
    count(Problem::<bf16>::dense(1, 64, 8192), "matvec_dense_bf16_t1", 7.0);
    count(Problem::<bf16>::dense(8, 64, 8192), "matvec_dense_bf16_t8", 17.0);
    count(Problem::<bf16>::nf4(24, 256, 1024, 64), "matmul_nf4_bf16_t32", 9.0);
    count(Problem::<bf16>::nf4(64, 128, 2048, 64), "matmul_nf4_bf16_t64", 11.0);
    count(Problem::<f16>::nf4(128, 256, 1024, 64), "matmul_nf4_f16_t128", 17.0);
    count(Problem::<bf16>::dense(64, 128, 1024), "matmul_dense_bf16_t64", 5.0);
}

fn problem_of<T: Element, A: Element>(x: &[f32], n: usize, k: usize, weight: Weight<T>) -> Problem<T, A> {
    let x: Vec<T> = x.iter().map(|&v| T::from_f32(v)).collect();
    let tokens = x.len() / k;
    Problem { tokens, n, k, x, weight, bias: None, row_scale: None, adapters: None, index: None }
}

fn adapter_of<A: Element>(a: Vec<f32>, b: Vec<f32>, rank: usize, scaling: f64) -> Adapter<A> {
    let round = |v: Vec<f32>| v.into_iter().map(A::from_f32).collect();
    Adapter { lora_a: round(a), lora_b: round(b), rank, scaling: scaling as f32 }
}

/// Compares y with somebody else's f64. `spare` is what our own inputs are off by, as a share of the magnitudes.
fn compare<T: Element, A: Element>(problem: &Problem<T, A>, device: &Device, theirs: &[f64], spare: f64) {
    let outcome = problem.run_and_check(device);
    let truth = problem.truth(outcome.plan.rounding);
    assert_eq!(theirs.len(), outcome.y.len());
    for ((y, truth), theirs) in outcome.y.iter().zip(&truth).zip(theirs) {
        let bound = problem.bound(&outcome.plan, truth) + spare * truth.magnitude;
        assert!((y.to_f64() - theirs).abs() <= bound, "{y:?}, wanted {theirs} +- {bound:e}");
    }
}

/// A 4-bit base with LoRA, rsLoRA or DoRA, as PEFT and bitsandbytes compute it.
#[test]
fn qlora_fixtures() {
    let device = Device::best();
    for name in ["nodq_bs64_f32", "dq_bs64_bf16", "dora_bs64_f32"] {
        let file = Fixture::open(&format!("qlora/{name}"));
        let (n, k, blocksize) = (size(&file.json, "N"), size(&file.json, "K"), size(&file.json, "blocksize"));
        let absmax = if file.has("base.qabsmax") {
            let nested = NestedAbsmax::from_parts(
                file.get("base.qabsmax"),
                file.get("base.nested_absmax"),
                DYNAMIC_MAP.into(),
                file.get::<f32>("base.offset")[0],
                256,
            );
            Absmax::Nested(nested.unwrap())
        } else {
            Absmax::Plain(file.get("base.absmax"))
        };
        let nf4 = Nf4Matrix::from_parts(
            [n, k],
            file.get("base.packed"),
            absmax,
            blocksize,
            Codebook::nf4(),
            DType::F32,
        )
        .unwrap();
        let rank = size(&file.json["lora"], "r");
        let scaling = file.json["scaling"].as_f64().unwrap();
        let adapter = adapter_of::<f32>(file.get("lora_A"), file.get("lora_B"), rank, scaling);
        let row_scale = file.has("magnitude").then(|| {
            let (weight, magnitude) = (nf4.dequantize::<f32>(), file.get::<f32>("magnitude"));
            let row_scale = |row: usize| {
                let norm = (0..k).map(|i| {
                    let terms = (0..rank).map(|r| {
                        f64::from(adapter.lora_b[row * rank + r]) * f64::from(adapter.lora_a[r * k + i])
                    });
                    (f64::from(weight[row * k + i]) + scaling * terms.sum::<f64>()).powi(2)
                });
                (f64::from(magnitude[row]) / norm.sum::<f64>().sqrt()) as f32
            };
            (0..n).map(row_scale).collect::<Vec<_>>()
        });
        for tokens in [1, 2, 3, 7, 16, 33] {
            let x = file.get::<f32>(&format!("T{tokens}.x"));
            let bias = file.has("bias").then(|| file.get::<f32>("bias"));
            let mut problem = problem_of::<f32, f32>(&x, n, k, Weight::Nf4(nf4.clone()));
            (problem.bias, problem.row_scale) = (bias.clone(), row_scale.clone());
            problem.adapters = Some(vec![adapter.clone()]);
            // row_scale is rounded to f32 here.
            compare(&problem, &device, &file.get(&format!("T{tokens}.y_f64")), (-24f64).exp2());

            let mut problem = problem_of::<bf16, f32>(&x, n, k, Weight::Nf4(nf4.clone()));
            problem.bias = bias.map(|bias| bias.into_iter().map(bf16::from_f32).collect());
            problem.row_scale = row_scale.clone();
            problem.adapters = Some(vec![adapter.clone()]);
            problem.run_and_check(&device);
        }
    }
}

/// A batch in which every token has its own adapter, as PEFT computes it.
#[test]
fn multi_adapter_fixtures() {
    let device = Device::best();
    for name in ["mix", "single_token", "unsorted_big"] {
        let file = Fixture::open(&format!("multi_adapter/{name}"));
        let (n, k) = (size(&file.json, "N"), size(&file.json, "K"));
        let (x, weight) = (file.get::<f32>("x"), file.get::<f32>("weight"));
        let adapters = file.json["adapters"].as_array().unwrap().iter().map(|adapter| {
            let (id, scaling) = (size(adapter, "id"), adapter["scaling"].as_f64().unwrap());
            let (a, b) = (file.get(&format!("ad{id}.lora_A")), file.get(&format!("ad{id}.lora_B")));
            (a, b, size(adapter, "r"), scaling)
        });
        let adapters: Vec<(Vec<f32>, Vec<f32>, usize, f64)> = adapters.collect();
        let full =
            adapters.iter().map(|(a, b, r, s)| adapter_of(a.clone(), b.clone(), *r, *s)).collect::<Vec<_>>();
        let half =
            adapters.iter().map(|(a, b, r, s)| adapter_of(a.clone(), b.clone(), *r, *s)).collect::<Vec<_>>();
        for pattern in file.json["patterns"].as_array().unwrap() {
            let pattern = pattern.as_str().unwrap();
            let mut problem = problem_of::<f32, f32>(&x, n, k, Weight::Dense(weight.clone()));
            problem.adapters = Some(full.clone());
            problem.index = Some(file.get(&format!("{pattern}.adapter_idx")));
            // Their scaling is f64.
            let spare = (-24f64).exp2();
            compare(&problem, &device, &file.get(&format!("{pattern}.y_f64")), spare);

            let rounded = weight.iter().map(|&w| bf16::from_f32(w)).collect();
            let mut rounded = problem_of::<bf16, bf16>(&x, n, k, Weight::Dense(rounded));
            (rounded.adapters, rounded.index) = (Some(half.clone()), problem.index.clone());
            let truth = file.get::<f32>(&format!("{pattern}.y_bf16_truth"));
            compare(&rounded, &device, &truth.into_iter().map(f64::from).collect::<Vec<_>>(), 2.0 * spare);

            let over_nf4 = format!("{pattern}.nf4.y_f64");
            if file.has(&over_nf4) {
                let absmax = Absmax::Plain(file.get("nf4.absmax"));
                let packed = file.get("nf4.packed");
                let nf4 = Nf4Matrix::from_parts([n, k], packed, absmax, 64, Codebook::nf4(), DType::F32);
                problem.weight = Weight::Nf4(nf4.unwrap());
                compare(&problem, &device, &file.get(&over_nf4), spare);
            }
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let properties = device.queue().properties();
    let shape = Problem::<bf16>::nf4(3, 8, 64, 64).shape();
    let refused = |shape: &matmul::Shape, argument: &str| match matmul::plan(shape, properties) {
        Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
        other => panic!("{other:?}"),
    };
    refused(&matmul::Shape { tokens: 1 << 31, ..shape }, "tokens");
    refused(&matmul::Shape { n: usize::MAX, ..shape }, "n");
    refused(&matmul::Shape { k: 1 << 31, ..shape }, "k");
    refused(&matmul::Shape { tokens: 1 << 30, n: 1 << 30, ..shape }, "tokens * n");
    for blocksize in [0, 16, 48, 8192] {
        refused(&matmul::Shape { weight: WeightFormat::Nf4 { blocksize }, ..shape }, "weight.blocksize");
    }

    let elsewhere = Device::emulator();
    let (plan, queue) = (matmul::plan(&shape, properties).unwrap(), device.queue());
    let (x, foreign) = (device.upload(&[bf16::ONE; 200]), elsewhere.upload(&[bf16::ONE; 200]));
    let nf4 = DeviceWeight::new(&device, &Problem::<bf16>::nf4(3, 8, 64, 64).weight);
    let other = DeviceWeight::new(&device, &Problem::<bf16>::nf4(3, 8, 64, 32).weight);
    let small = DeviceWeight::new(&device, &Problem::<bf16>::nf4(3, 7, 64, 64).weight);
    let dense = DeviceWeight::new(&device, &Problem::<bf16>::dense(3, 8, 64).weight);
    let (floats, eight) = (device.upload(&[1.0f32; 16]), device.upload(&[bf16::ONE; 9]));
    let (mut y, mut workspace) = (device.alloc::<bf16>(30), device.alloc::<u8>(4096));
    let mut run =
        |plan: &matmul::Plan, x, weight: &DeviceWeight<bf16>, extras, y_at: Range<usize>, argument: &str| {
            match plan.run::<bf16, bf16>(
                queue,
                x,
                &weight.view(),
                &extras,
                y.slice_mut(y_at),
                workspace.view_mut(),
            ) {
                Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
                other => panic!("{argument}: {other:?}"),
            }
        };
    let (good, none) = (x.slice(..192), Extras::default);
    run(&plan, x.slice(..191), &nf4, none(), 0..24, "x");
    run(&plan, x.slice(1..193), &nf4, none(), 0..24, "x");
    run(&plan, foreign.slice(..192), &nf4, none(), 0..24, "x");
    run(&plan, good, &nf4, none(), 0..23, "y");
    run(&plan, good, &nf4, none(), 1..25, "y");
    run(&plan, good, &dense, none(), 0..24, "weight");
    run(&plan, good, &other, none(), 0..24, "weight.blocksize");
    run(&plan, good, &small, none(), 0..24, "weight.packed");
    run(&plan, good, &nf4, Extras { bias: Some(eight.view()), ..none() }, 0..24, "bias");
    run(&plan, good, &nf4, Extras { row_scale: Some(floats.slice(..7)), ..none() }, 0..24, "row_scale");
    let dense_plan =
        matmul::plan(&matmul::Shape { weight: WeightFormat::Dense, ..shape }, properties).unwrap();
    run(&dense_plan, good, &nf4, none(), 0..24, "weight");
    let f16_plan = matmul::plan(&matmul::Shape { dtype: DType::F16, ..shape }, properties).unwrap();
    run(&f16_plan, good, &nf4, none(), 0..24, "x");

    let factors = Problem::<bf16>::dense(3, 8, 64).with_adapters(&[4]).adapters.unwrap();
    let (right, wrong) = (Factors::new(&device, &factors), factors[0].lora_a.len());
    assert_eq!(wrong, 256);
    let mut entries = device.alloc(AdapterTable::<bf16>::bytes(1));
    let table = right.table(&device, 64, 8, &mut entries).unwrap();
    let (v, index) = (device.upload(&[0.0f32; 16]), device.upload(&[0, 0, 0, 0]));
    let branch = |v, index| Extras { low_rank: Some(LowRank { adapters: &table, index, v }), ..none() };
    run(&plan, good, &nf4, branch(v.slice(..11), None), 0..24, "v");
    run(&plan, good, &nf4, branch(v.slice(1..13), None), 0..24, "v");
    run(&plan, good, &nf4, branch(v.slice(..12), Some(index.view())), 0..24, "adapter_index");

    // A plan with splits wants its workspace.
    let big = Problem::<bf16>::nf4(1, 8, 4096, 64);
    let plan = big.plan(&device);
    assert!(plan.workspace_bytes > 0);
    let (x, weight) = (device.upload(&big.x), DeviceWeight::new(&device, &big.weight));
    let (mut y, mut workspace) = (device.alloc(8), device.alloc::<u8>(plan.workspace_bytes));
    let workspace = workspace.slice_mut(1..);
    let result =
        plan.run::<bf16, bf16>(queue, x.view(), &weight.view(), &Extras::default(), y.view_mut(), workspace);
    assert!(matches!(result, Err(Error::Argument { argument, .. }) if argument == "workspace"));
}
