//! The product that Hopper runs for up to 16 tokens and codes in whole slices, against f64. The rest of `matmul` is in
//! `tests/matmul.rs`.

mod products;

use half::{bf16, f16};
use lora_kernels::cuda::matmul::{Extras, Rounding, Shape, WeightFormat, plan};
use lora_kernels::nf4::{Absmax, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element};
use lora_kernels_devices::{Device, Spec};
use products::{DeviceWeight, Numbers, Outcome, Problem, Weight, same};

/// The GPU if it is a Hopper, else an emulated one.
fn hopper() -> Device {
    let best = Device::best();
    if best.queue().properties().capability == (9, 0) { best } else { Device::emulate(Spec::h200()) }
}

/// A Hopper of few multiprocessors: blocks go from tile to tile.
fn small(multiprocessors: u32) -> Device {
    hopper().with_multiprocessors(multiprocessors)
}

/// Runs a check for both types of x.
macro_rules! each_type {
    ($check:ident($($argument:expr),*)) => {
        $check::<f16>($($argument),*);
        $check::<bf16>($($argument),*);
    };
}

fn check<T: Element, A: Element>(problem: &Problem<T, A>, device: &Device) -> Outcome<T> {
    let outcome = problem.run_and_check(device);
    assert_eq!(outcome.plan.kernel.unwrap().module, "decode", "{:?}", outcome.plan);
    outcome
}

#[test]
fn any_number_of_tokens() {
    fn run<T: Element>(device: &Device) {
        for tokens in 1..=16 {
            check(&Problem::<T>::nf4(tokens, 35, 192, 64), device);
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

/// Rows that end inside a tile, and k that ends anywhere in a piece, its halves, or a warp's part of those.
#[test]
fn any_n_and_any_k_of_whole_slices() {
    fn run<T: Element>(device: &Device) {
        for (tokens, n, k) in [
            (1, 1, 64),
            (3, 17, 128),
            (16, 15, 320),
            (1, 33, 2048),
            (9, 16, 2048 + 64),
            (2, 5, 4096 - 64),
            (8, 7, 4096),
            (1, 3, 4096 + 192),
            (11, 2, 8192 + 2048 + 256),
        ] {
            check(&Problem::<T>::nf4(tokens, n, k, 64), device);
        }
    }
    let device = small(1);
    each_type!(run(&device));
}

#[test]
fn every_way_to_store_4_bits() {
    fn run<T: Element>(device: &Device) {
        let custom = Codebook::from_values(std::array::from_fn(|i| (i as f32 - 7.0) / 9.0)).unwrap();
        for codebook in [Codebook::nf4(), Codebook::fp4(), custom] {
            for nesting in [Nesting::Plain, Nesting::Nested] {
                // Blocks as long as a slice, or longer than a row.
                for blocksize in [64, 128, 256, 512, 1024, 2048, 4096] {
                    let problem = Problem::<T>::dense(2, 19, 320);
                    check(&problem.in_4_bits(blocksize, &codebook, nesting), device);
                }
            }
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

#[test]
fn adapters_scale_and_bias() {
    fn run<T: Element, A: Element>(device: &Device) {
        const RANKS: [usize; 8] = [8, 0, 1, 3, 16, 17, 64, 256];
        for (tokens, n, k) in [(1, 33, 128), (7, 130, 64), (16, 40, 192)] {
            let plain = Problem::<T, A>::dense(tokens, n, k).with_bias_and_scale();
            let plain = plain.in_4_bits(64, &Codebook::nf4(), Nesting::Plain);
            check(&plain, device);
            check(&plain.clone().with_adapters(&RANKS), device);
            // One adapter for all tokens, without an index.
            check(&Problem { index: None, ..plain.with_adapters(&[5]) }, device);
        }
    }
    let device = hopper();
    run::<f16, f16>(&device);
    run::<f16, f32>(&device);
    run::<bf16, bf16>(&device);
    run::<bf16, f32>(&device);
}

/// More tiles than blocks, more than take turns with a piece, and more stages than there are places for.
#[test]
fn blocks_go_from_tile_to_tile() {
    fn run<T: Element>(device: &Device) {
        for (tokens, n, k) in [(1, 300, 320), (8, 160, 4096 + 64), (13, 300, 2048 + 64), (16, 129, 64)] {
            let problem = Problem::<T>::nf4(tokens, n, k, 64).with_bias_and_scale();
            let outcome = check(&problem, device);
            assert_eq!((outcome.plan.splits, outcome.plan.grid), (1, [2, 1, 1]), "{:?}", outcome.plan);
            check(&problem.with_adapters(&[20, 3]), device);
        }
    }
    each_type!(run(&small(2)));
}

/// Clusters of two, four and eight; rows that end inside a tile, and k that ends anywhere in a block's pieces, parts of those, or
/// warps' slices. Of eight blocks for five steps, three have nothing to add. The adapters' kernel finishes whole sums.
#[test]
fn blocks_of_a_cluster_share_sums() {
    fn run<T: Element>(device: &Device, splits: u32) {
        let most = 8 / splits as usize * 16;
        for (tokens, n, k) in [
            (1, most, 8192),
            (8, most - 1, 1024 * (splits as usize - 1) + 64),
            (3, most - 15, 4096 * splits as usize + 1024 + 64),
            (16, most - 7, 2048 * splits as usize + 320),
            (13, most, 1024 * (splits as usize / 2 + 1)),
        ] {
            let problem = Problem::<T>::nf4(tokens, n, k, 64).with_bias_and_scale();
            let plan = check(&problem, device).plan;
            let tiles = n.div_ceil(16) as u32;
            assert_eq!((plan.splits, plan.grid), (splits as usize, [tiles, splits, 1]), "{plan:?}");
            assert_eq!(plan.workspace_bytes, tokens * n * 4);
            if k < 4096 {
                check(&problem.with_adapters(&[3, 20]), device);
            }
        }
    }
    let device = small(8);
    for splits in [2, 4, 8] {
        each_type!(run(&device, splits));
    }
}

/// What the splits are: the device is filled from 512 rows on, with no cluster beyond what it holds at once and no second wave.
#[test]
fn few_rows_are_split() {
    let device = Device::emulate(Spec::h200());
    for (n, k, grid) in [
        (512, 4096, [32, 4, 1]),
        (512, 14336, [32, 4, 1]),
        (528, 4096, [33, 2, 1]),
        (896, 896, [56, 1, 1]),
        (1024, 2048, [64, 2, 1]),
        (1024, 14336, [64, 2, 1]),
        (1040, 14336, [65, 1, 1]),
        (256, 4096, [16, 4, 1]),
        (256, 5120, [16, 8, 1]),
        (2048, 4096, [128, 1, 1]),
        (4096, 4096, [132, 1, 1]),
    ] {
        for tokens in [1, 16] {
            let weight = WeightFormat::Nf4 { blocksize: 64 };
            let shape = Shape { tokens, n, k, dtype: DType::BF16, weight };
            let plan = plan(&shape, device.queue().properties()).unwrap();
            assert_eq!((plan.kernel.unwrap().module, plan.grid), ("decode", grid), "{n} x {k}");
        }
    }
}

/// With x the identity, a sum has one term that is not zero: y is the weight as it is multiplied, which takes two roundings.
#[test]
fn an_identity_gives_the_weight_to_the_bit() {
    fn run<T: Element>(device: &Device, tokens: usize, blocksize: usize, nesting: Nesting) {
        let (n, k) = (40, 4096 + 128);
        let mut problem = Problem::<T>::dense(tokens, n, k).in_4_bits(blocksize, &Codebook::nf4(), nesting);
        for first in [0, 1000, 2040, 4090, k - tokens] {
            problem.x.fill(T::from_f32(0.0));
            (0..tokens).for_each(|i| problem.x[i * k + first + i] = T::from_f32(1.0));
            let outcome = problem.run(device);
            assert_eq!(outcome.plan.rounding, Rounding::Value);
            let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
            for i in 0..tokens {
                for row in 0..n {
                    let at = row * k + first + i;
                    let code = nf4.packed()[at / 2] >> (4 * (1 - at % 2)) & 15;
                    let value = T::from_f32(nf4.codebook().values()[usize::from(code)]).to_f32();
                    let wanted = T::from_f32(value * nf4.absmax().get(at / blocksize));
                    assert_eq!(outcome.y[i * n + row], wanted, "column {}, row {row}", first + i);
                }
            }
        }
    }
    let device = hopper();
    for nesting in [Nesting::Plain, Nesting::Nested] {
        run::<f16>(&device, 8, 64, nesting);
        run::<bf16>(&device, 16, 128, nesting);
    }
}

/// The same bits twice, and for a token the same bits whatever the others are: not numbers, other adapters, or not there.
#[test]
fn a_token_depends_on_itself_alone() {
    fn run<T: Element>(device: &Device) {
        for (tokens, n, k) in [(5, 33, 4096 + 64), (13, 40, 64)] {
            let problem = Problem::<T>::nf4(tokens, n, k, 64).with_adapters(&[4, 9]).with_bias_and_scale();
            let outcome = problem.run(device);
            assert!(same(&outcome.y, &problem.run(device).y), "{:?}: another run, other bits", outcome.plan);
            for kept in [0, tokens - 1] {
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
    let device = small(2);
    each_type!(run(&device));
}

/// From 1 to 16 tokens, one has the same bits, in whole sums and in split ones.
#[test]
fn it_does_not_depend_on_the_batch() {
    fn run<T: Element>(device: &Device, splits: usize) {
        let (n, k) = (35, 8192 + 2048 + 192);
        let all = Problem::<T>::nf4(16, n, k, 64).with_adapters(&[16, 2]);
        let y = all.run(device).y;
        for tokens in [1, 7, 8, 9, 15] {
            let mut some = all.clone();
            some.tokens = tokens;
            some.x.truncate(tokens * k);
            some.index.as_mut().unwrap().truncate(tokens);
            let outcome = some.run(device);
            assert_eq!(outcome.plan.splits, splits);
            assert!(same(&outcome.y, &y[..tokens * n]), "{:?}", outcome.plan);
        }
    }
    // Two clusters of eight blocks would fit, three do not.
    for (multiprocessors, splits) in [(2, 1), (16, 4), (24, 8)] {
        run::<f16>(&small(multiprocessors), splits);
        run::<bf16>(&small(multiprocessors), splits);
    }
}

#[test]
fn a_wrong_adapter_makes_its_token_nan_and_no_other() {
    fn run<T: Element>(device: &Device) {
        let right = Problem::<T>::nf4(6, 40, 128, 64).with_adapters(&[4, 12]);
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
    let device = hopper();
    each_type!(run(&device));
}

/// A block whose absmax is NaN makes the outputs of its rows NaN, and no others.
#[test]
fn nan_blocks_do_not_leak() {
    fn run<T: Element>(device: &Device) {
        for (k, block) in [(128, 7), (192, 104), (64, 34)] {
            let n = 35;
            let mut problem = Problem::<T>::nf4(2, n, k, 64);
            let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
            let Absmax::Plain(mut absmax) = nf4.absmax().clone() else { unreachable!() };
            absmax[block] = f32::NAN;
            let broken = block * 64 / k;
            let (packed, codebook) = (nf4.packed().to_vec(), Codebook::nf4());
            let nf4 = Nf4Matrix::from_parts([n, k], packed, Absmax::Plain(absmax), 64, codebook, DType::F32);
            problem.weight = Weight::Nf4(nf4.unwrap());
            let outcome = problem.run(device);
            for (i, y) in outcome.y.iter().enumerate() {
                assert_eq!(y.to_f32().is_nan(), i % n == broken, "{:?}: row {}", outcome.plan, i % n);
            }
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

/// A layer's product may start while the one before it runs, and takes its output as x all the same.
#[test]
fn layers_overlap() {
    fn run<T: Element>(device: &Device) {
        for tokens in [3, 16] {
            let [first, second] = [256, 40].map(|n| Problem::<T>::nf4(tokens, n, 256, 64));
            let [plan, next_plan] = [&first, &second].map(|problem| problem.plan(device));
            let [weight, next_weight] =
                [&first, &second].map(|problem| DeviceWeight::new(device, &problem.weight));
            let x = device.upload(&first.x);
            let [mut between, mut y] = [256, 40].map(|n| device.alloc::<T>(tokens * n));
            let mut workspace = device.alloc::<u8>(plan.workspace_bytes.max(next_plan.workspace_bytes));
            let extras = Extras::<T> { overlap: true, ..Extras::default() };
            let queue = device.queue();
            plan.run(queue, x.view(), &weight.view(), &extras, between.view_mut(), workspace.view_mut())
                .unwrap();
            next_plan
                .run(queue, between.view(), &next_weight.view(), &extras, y.view_mut(), workspace.view_mut())
                .unwrap();
            let outcome = Problem { x: between.download(), ..second }.run_and_check(device);
            assert!(same(&y.download(), &outcome.y));
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

/// What decides how fast it can be, counted: W and absmax are read once and in whole sectors, no banks conflict, and there is
/// room in the instructions.
#[test]
fn counts() {
    fn count<T: Element>(tokens: usize, n: usize, entry: &str, instructions: f64) {
        let device = Device::emulate(Spec::h200()).with_multiprocessors(8);
        let problem = Problem::<T>::nf4(tokens, n, 4096, 64);
        let outcome = problem.run(&device);
        let (plan, counters) = (outcome.plan, outcome.counters.unwrap());
        assert_eq!(plan.kernel.unwrap().entry, entry);
        assert_eq!(counters.local_accesses, 0);
        assert_eq!(counters.shared_loads.conflicts, 0, "{entry}: {counters}");
        assert_eq!(counters.shared_stores.conflicts, 0, "{entry}: {counters}");
        assert_eq!(counters.global_stores.sector_ratio(), 1.0, "{entry}: {counters}");

        // W and its absmax, x, all once.
        let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
        let wanted = (nf4.packed().len() + nf4.absmax().len() * 4 + tokens * problem.k * 2) as f64;
        let moved = 32.0 * counters.global_loads.distinct_sectors as f64;
        assert!(moved >= wanted && moved <= 1.01 * wanted, "{entry} reads {moved} bytes, wanted {wanted}");

        let got = counters.total().threads as f64 / (problem.n * problem.k) as f64;
        assert!(got <= instructions, "{entry} takes {got:.2} instructions per weight, not {instructions}");
    }
    // PTX counts register moves that are no instructions of the machine, and waits as often as they are tried.
    count::<bf16>(1, 512, "decode_nf4_bf16_t8", 4.0);
    count::<f16>(8, 512, "decode_nf4_f16_t8", 4.0);
    count::<bf16>(16, 512, "decode_nf4_bf16_t16", 5.5);
    // A block has a quarter of a stage: most of what it does is to make the table, which it does while W is on its way.
    count::<bf16>(1, 32, "decode_nf4_bf16_t8_split", 10.5);
    count::<bf16>(16, 32, "decode_nf4_bf16_t16_split", 12.0);
}
