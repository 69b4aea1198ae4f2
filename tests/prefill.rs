//! The product of warpgroups that Hopper runs from 17 tokens on, against f64. The rest of `matmul` is in `tests/matmul.rs`.

mod products;

use half::{bf16, f16};
use lora_kernels::cuda::matmul::{self, Extras, Rounding, Shape, WeightFormat};
use lora_kernels::cuda::{AdapterTable, LowRank, Properties};
use lora_kernels::nf4::{Absmax, BLOCKSIZES, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element};
use lora_kernels_devices::{Device, Spec};
use products::{DeviceWeight, Factors, Numbers, Outcome, Problem, Weight, same};

/// The GPU if it is a Hopper, else an emulated one.
fn hopper() -> Device {
    let best = Device::best();
    if best.queue().properties().capability == (9, 0) { best } else { Device::emulate(Spec::h200()) }
}

/// A Hopper that a few tiles fill: no splits, and blocks go from tile to tile.
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
    assert_eq!(outcome.plan.kernel.unwrap().module, "prefill", "{:?}", outcome.plan);
    outcome
}

#[test]
fn any_number_of_tokens() {
    fn run<T: Element>(device: &Device) {
        for tokens in [17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200] {
            check(&Problem::<T>::nf4(tokens, 65, 192, 64), device);
            check(&Problem::<T>::dense(tokens, 65, 96), device);
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

#[test]
fn any_n_and_k_of_whole_pieces() {
    fn run<T: Element>(device: &Device) {
        for (tokens, n, k) in
            [(17, 1, 32), (40, 7, 96), (66, 8, 1056), (20, 129, 64), (70, 264, 160), (33, 130, 32)]
        {
            check(&Problem::<T>::nf4(tokens, n, k, 64), device);
        }
        for (tokens, n, k) in
            [(17, 1, 8), (40, 7, 72), (66, 8, 1032), (20, 129, 64), (70, 264, 104), (33, 130, 16)]
        {
            check(&Problem::<T>::dense(tokens, n, k), device);
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

#[test]
fn every_way_to_store_4_bits() {
    fn run<T: Element>(device: &Device) {
        // Values that f16 does not reach without their unit.
        let custom = Codebook::from_values(std::array::from_fn(|i| (i as f32 - 7.0) * 3e5)).unwrap();
        for codebook in [Codebook::nf4(), Codebook::fp4(), custom] {
            for nesting in [Nesting::Plain, Nesting::Nested] {
                for blocksize in BLOCKSIZES {
                    // Blocks straddle rows, and slices.
                    let problem = Problem::<T>::dense(20, 35, 160);
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
        for (tokens, n, k) in [(21, 140, 96), (70, 33, 64), (133, 40, 32)] {
            let plain = Problem::<T, A>::dense(tokens, n, k).with_bias_and_scale();
            let problem = plain.clone().with_adapters(&RANKS);
            check(&problem, device);
            check(&problem.in_4_bits(64, &Codebook::nf4(), Nesting::Nested), device);
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

/// A packed module: its outputs are slices that have adapters of their own.
#[test]
fn adapters_of_slices() {
    const SLICES: [usize; 3] = [130, 41, 129];
    fn run<T: Element>(device: &Device) {
        let (tokens, n, k) = (70, SLICES.iter().sum(), 64);
        let problem = Problem::<T>::nf4(tokens, n, k, 64).with_bias_and_scale();
        let (problem, parts) = problem.with_adapters_of_slices(SLICES);

        let (x, weight) = (device.upload(&problem.x), DeviceWeight::new(device, &problem.weight));
        let bias = device.upload(problem.bias.as_ref().unwrap());
        let row_scale = device.upload(problem.row_scale.as_ref().unwrap());
        let index = device.upload(problem.index.as_ref().unwrap());
        let factors = Factors::new(device, &parts);
        let mut entries = device.alloc(AdapterTable::<T>::bytes(parts.len()));
        let (queue, views) = (device.queue(), factors.views());
        let adapters = AdapterTable::upload_slices(queue, &views, k, &SLICES, entries.view_mut()).unwrap();
        let v = problem.shrink(device, &adapters, &x, Some(&index)).unwrap();
        let low_rank = LowRank { adapters: &adapters, index: Some(index.view()), v: v.view() };
        let extras = Extras {
            bias: Some(bias.view()),
            row_scale: Some(row_scale.view()),
            low_rank: Some(low_rank),
            ..Extras::default()
        };
        let plan = problem.plan(device);
        let (mut y, mut workspace) = (device.alloc(tokens * n), device.alloc(plan.workspace_bytes));
        plan.run(queue, x.view(), &weight.view(), &extras, y.view_mut(), workspace.view_mut()).unwrap();
        problem.check(&Outcome { plan, y: y.download(), counters: None });
    }
    let device = hopper();
    each_type!(run(&device));
}

/// Tiles of every size, more of them than blocks: pipelines and barriers go on from one tile to the next.
#[test]
fn blocks_go_from_tile_to_tile() {
    fn run<T: Element>() {
        for (tokens, n, k, tile, blocks) in
            [(40, 700, 320, 64, 2), (64, 1300, 32, 64, 2), (100, 500, 448, 128, 2), (500, 130, 2080, 256, 1)]
        {
            for problem in [Problem::<T>::nf4(tokens, n, k, 64), Problem::dense(tokens, n, k)] {
                let problem = problem.with_bias_and_scale().with_adapters(&[20, 3]);
                let plan = check(&problem, &small(blocks)).plan;
                assert_eq!((plan.tile.tokens, plan.splits, plan.grid), (tile, 1, [blocks, 1, 1]), "{plan:?}");
            }
        }
    }
    run::<f16>();
    run::<bf16>();
}

#[test]
fn split_sums_are_finished() {
    fn run<T: Element>(device: &Device) {
        for (tokens, n, k) in [(20, 40, 2048), (100, 130, 1056), (65, 260, 4096)] {
            for problem in [Problem::<T>::nf4(tokens, n, k, 64), Problem::dense(tokens, n, k)] {
                let outcome = check(&problem.with_bias_and_scale().with_adapters(&[3, 20]), device);
                assert!(outcome.plan.splits > 1 && outcome.plan.finish.is_some(), "{:?}", outcome.plan);
                assert_eq!(outcome.plan.workspace_bytes, outcome.plan.splits * tokens * n * 4);
            }
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

/// With x the identity, a sum has one term that is not zero: y is the weight as it is multiplied.
#[test]
fn an_identity_gives_the_weight_to_the_bit() {
    fn run<T: Element>(
        device: &Device,
        tokens: usize,
        n: usize,
        k: usize,
        blocksize: usize,
        nesting: Nesting,
    ) {
        let mut problem = Problem::<T>::dense(tokens, n, k).in_4_bits(blocksize, &Codebook::nf4(), nesting);
        let weight = problem.weight_values(Rounding::Half);
        for first in (0..k).step_by(tokens) {
            problem.x.fill(T::from_f32(0.0));
            let ones = tokens.min(k - first);
            (0..ones).for_each(|i| problem.x[i * k + first + i] = T::from_f32(1.0));
            let outcome = problem.run(device);
            assert_eq!(outcome.plan.rounding, Rounding::Half);
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
    let device = hopper();
    for nesting in [Nesting::Plain, Nesting::Nested] {
        run::<f16>(&device, 128, 70, 128, 64, nesting);
        run::<bf16>(&device, 64, 130, 96, 32, nesting);
        run::<bf16>(&small(1), 256, 128, 640, 128, nesting);
    }
}

/// The same bits twice, and for a token the same bits whatever the others are: not numbers, other adapters, or not there.
#[test]
fn a_token_depends_on_itself_alone() {
    fn run<T: Element>(device: &Device) {
        for (tokens, n, k) in [(29, 65, 96), (70, 40, 128), (130, 8, 64)] {
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
    let device = hopper();
    each_type!(run(&device));
}

/// An adapter that is not numbers reaches the tokens that use it, and no others.
#[test]
fn a_broken_adapter_stays_with_its_tokens() {
    fn run<T: Element>(device: &Device) {
        let right = Problem::<T>::nf4(40, 24, 64, 64).with_adapters(&[4, 12]);
        let mut broken = right.clone();
        broken.adapters.as_mut().unwrap()[1].lora_b.fill(T::from_f32(f32::NAN));
        let (right, y) = (right.run(device).y, broken.run(device).y);
        for (token, (right, y)) in right.chunks(24).zip(y.chunks(24)).enumerate() {
            if broken.index.as_ref().unwrap()[token] == 1 {
                assert!(y.iter().all(|y| y.to_f32().is_nan()), "token {token}");
            } else {
                assert!(same(right, y), "token {token}");
            }
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

#[test]
fn a_wrong_adapter_makes_its_token_nan_and_no_other() {
    fn run<T: Element>(device: &Device) {
        let right = Problem::<T>::nf4(70, 40, 96, 64).with_adapters(&[4, 12]);
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
        for (k, block) in [(96, 0), (96, 7), (160, 3), (32, 2)] {
            let n = 35;
            let mut problem = Problem::<T>::nf4(20, n, k, 64);
            let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
            let Absmax::Plain(mut absmax) = nf4.absmax().clone() else { unreachable!() };
            absmax[block] = f32::NAN;
            let rows = block * 64 / k..=(block * 64 + 63) / k;
            let (packed, codebook) = (nf4.packed().to_vec(), Codebook::nf4());
            let nf4 = Nf4Matrix::from_parts([n, k], packed, Absmax::Plain(absmax), 64, codebook, DType::F32);
            problem.weight = Weight::Nf4(nf4.unwrap());
            let outcome = problem.run(device);
            for (i, y) in outcome.y.iter().enumerate() {
                assert_eq!(y.to_f32().is_nan(), rows.contains(&(i % n)), "{:?}: row {}", outcome.plan, i % n);
            }
        }
    }
    let device = hopper();
    each_type!(run(&device));
}

/// What decides how fast the kernel can be, counted over a tile of 256 tokens: no bank conflicts, whole sectors to y, x and W
/// copied once, and few instructions beside the products.
#[test]
fn counts() {
    for (problem, entry, most) in [
        (Problem::<bf16>::nf4(256, 128, 4096, 64), "prefill_nf4_bf16_t256", 10.0),
        (Problem::<bf16>::dense(256, 128, 8704), "prefill_dense_bf16_t256", 3.0),
    ] {
        let outcome = problem.run(&Device::emulate(Spec { sm_count: 1, ..Spec::h200() }));
        let (plan, counters) = (outcome.plan, outcome.counters.unwrap());
        assert_eq!(plan.kernel.unwrap().entry, entry);
        assert_eq!(
            (counters.shared_loads.conflicts, counters.shared_stores.conflicts),
            (0, 0),
            "{entry}: {counters}"
        );
        assert_eq!(counters.local_accesses, 0);
        assert_eq!(counters.global_stores.sector_ratio(), 1.0, "{entry}: {counters}");
        // x and W are copied by the unit for it, once each.
        let weight = if entry.contains("nf4") { 4 } else { 16 };
        let copied = problem.k * (problem.tokens * 16 + problem.n * weight) / 8;
        assert_eq!(counters.async_bytes as usize, copied, "{entry}");
        let per_weight = counters.total().threads as f64 / (problem.n * problem.k) as f64;
        assert!(per_weight < most, "{entry} takes {per_weight:.2} instructions per weight");
    }
}

/// Of more tiles: W is copied once for each tile of tokens, x once for each of rows.
#[test]
fn tiles_are_copied_once_for_each_neighbour() {
    for (problem, weight) in
        [(Problem::<bf16>::nf4(512, 384, 256, 64), 4), (Problem::dense(512, 384, 256), 16)]
    {
        let outcome = problem.run(&Device::emulate(Spec { sm_count: 1, ..Spec::h200() }));
        let (tile, counters) = (outcome.plan.tile, outcome.counters.unwrap());
        let copies = [problem.tokens / tile.tokens, problem.n / tile.rows];
        assert!(copies[0] > 1 && outcome.plan.splits == 1, "{:?}", outcome.plan);
        let copied = problem.k * (copies[0] * problem.n * weight + copies[1] * problem.tokens * 16) / 8;
        assert_eq!(counters.async_bytes as usize, copied);
        // And multiplied once.
        assert_eq!(counters.matrix_ops as usize, problem.tokens * problem.n * problem.k);
    }
}

/// An adapter of rank r is two products of r more (v is a sum of two bf16). Instructions grow, too; they are a third of what the tensor
/// cores take (`kernels/SASS.md`). Together that is less than r / k and 3 %.
#[test]
fn an_adapter_costs_little() {
    let device = Device::emulate(Spec { sm_count: 1, ..Spec::h200() });
    let plain = Problem::<bf16>::nf4(256, 128, 4096, 64);
    let adapted = Problem { index: None, ..plain.clone().with_adapters(&[16]) };
    let [plain_counts, counts] = [&plain, &adapted].map(|problem| problem.run(&device).counters.unwrap());
    assert_eq!(counts.matrix_ops - plain_counts.matrix_ops, 2 * 256 * 128 * 16);
    let more = |count: u64, plain: u64| count as f64 / plain as f64 - 1.0;
    let products = more(counts.matrix_ops, plain_counts.matrix_ops);
    let instructions = more(counts.total().threads, plain_counts.total().threads);
    assert!(products + instructions / 3.0 <= 0.03 + 16.0 / 4096.0, "{products}, {instructions}");
}

/// Where the prototypes were timed, a plan without splits names the tile that was fastest, or one within a tenth of it.
#[test]
fn plans_follow_what_was_measured() {
    let text = std::fs::read_to_string("benches/results/2026-11-27-nvidia-h200-prefill.json").unwrap();
    let measured: serde_json::Value = serde_json::from_str(&text).unwrap();
    let time = |m: u64, n: u64, k: u64, kernel: &str| {
        let rows = measured["rows"].as_array().unwrap().iter();
        let mut rows = rows.filter(|row| row["run"] == "prototypes" && row["kernel"] == kernel);
        rows.find(|row| (&row["m"], &row["n"], &row["k"]) == (&m.into(), &n.into(), &k.into()))
            .map(|row| row["us"].as_f64().unwrap())
    };
    let properties = Properties { sm_count: 132, capability: (9, 0), ..*hopper().queue().properties() };
    let mut compared = 0;
    for (n, k) in [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)] {
        for tokens in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
            for (weight, names) in [
                (WeightFormat::Nf4 { blocksize: 64 }, ["hmul_t64", "hmul_t128", "hmul_t256_j4"]),
                (WeightFormat::Dense, ["dense_t64", "dense_t128", "dense_t256"]),
            ] {
                let shape = Shape { tokens, n, k, dtype: DType::BF16, weight };
                let plan = matmul::plan(&shape, &properties).unwrap();
                if plan.splits > 1 {
                    continue;
                }
                let times = names.map(|name| time(tokens as u64, n as u64, k as u64, name));
                let chosen = times[plan.tile.tokens.ilog2() as usize - 6].expect("it was measured");
                let best = times.into_iter().flatten().fold(f64::INFINITY, f64::min);
                assert!(chosen <= 1.1 * best, "{chosen} us, {best} us would do: {plan:?}");
                compared += 1;
            }
        }
    }
    assert!(compared > 40, "{compared}");
}

/// Splits never make more work than one round of the device.
#[test]
fn splits_are_for_what_does_not_fill_the_device() {
    let properties = Properties { sm_count: 132, capability: (9, 0), ..*hopper().queue().properties() };
    for weight in [WeightFormat::Nf4 { blocksize: 64 }, WeightFormat::Dense] {
        for tokens in 17..2048 {
            let shape = Shape { tokens, n: 4096, k: 4096, dtype: DType::BF16, weight };
            let plan = matmul::plan(&shape, &properties).unwrap();
            let tiles = tokens.div_ceil(plan.tile.tokens) * 4096usize.div_ceil(plan.tile.rows);
            assert!(plan.splits == 1 || tiles * plan.splits <= 132, "{plan:?}");
            assert_eq!(plan.grid[0] as usize, (tiles * plan.splits).min(132), "{plan:?}");
        }
    }
}
