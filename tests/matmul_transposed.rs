//! `dX = dY W + u A` against f64, on every path that a plan can choose. What Hopper runs from 17 tokens on is in
//! `tests/prefill_transposed.rs`.

mod products;

use half::{bf16, f16};
use lora_kernels::cuda::matmul::{Rounding, Shape, WeightFormat};
use lora_kernels::cuda::{AdapterTable, LowRank, matmul_transposed};
use lora_kernels::nf4::{Absmax, BLOCKSIZES, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element, Error};
use lora_kernels_devices::{Device, Spec};
use products::transposed::{check, check_identity, check_tokens_apart, run, with_dy};
use products::{DeviceWeight, Factors, Problem, Weight, same};

/// Runs a check for every type of dY.
macro_rules! each_type {
    ($check:ident($($argument:expr),*)) => {
        $check::<f32>($($argument),*);
        $check::<f16>($($argument),*);
        $check::<bf16>($($argument),*);
    };
}

#[test]
fn any_number_of_tokens() {
    fn all<T: Element>(device: &Device) {
        for tokens in [1, 9, 16, 17, 65, 133] {
            check(&with_dy(Problem::<T>::nf4(tokens, 72, 160, 64)), device);
            check(&with_dy(Problem::<T>::dense(tokens, 72, 136)), device);
        }
    }
    for device in Device::for_each_target() {
        each_type!(all(&device));
    }
}

#[test]
fn any_n_and_k() {
    fn all<T: Element>(device: &Device) {
        for tokens in [1, 33] {
            for (n, k) in [
                (1, 1),
                (3, 33),
                (33, 3),
                (130, 31),
                (2049, 1),
                (65, 65),
                (31, 96),
                (8, 100),
                (128, 33),
                (1032, 5),
                (1057, 2),
                (8, 129),
                (32, 40),
                (64, 288),
                (200, 128),
            ] {
                check(&with_dy(Problem::<T>::nf4(tokens, n, k, 64)), device);
                check(&with_dy(Problem::<T>::dense(tokens, n, k)), device);
            }
        }
    }
    let device = Device::best();
    each_type!(all(&device));
}

#[test]
fn every_way_to_store_4_bits() {
    fn all<T: Element>(device: &Device) {
        let custom = Codebook::from_values(std::array::from_fn(|i| (i as f32 - 7.0) / 9.0)).unwrap();
        for codebook in [Codebook::nf4(), Codebook::fp4(), custom] {
            for nesting in [Nesting::Plain, Nesting::Nested] {
                for blocksize in BLOCKSIZES {
                    // Blocks straddle rows in all of them.
                    for (n, k) in [(72, 160), (35, 70)] {
                        let problem = Problem::<T>::dense(18, n, k);
                        check(&with_dy(problem.in_4_bits(blocksize, &codebook, nesting)), device);
                    }
                }
            }
        }
    }
    let device = Device::best();
    each_type!(all(&device));
}

#[test]
fn adapters() {
    fn all<T: Element, A: Element>(device: &Device) {
        const RANKS: [usize; 8] = [8, 0, 1, 3, 16, 17, 64, 256];
        for (tokens, n, k) in
            [(7, 64, 40), (7, 65, 40), (16, 64, 33), (21, 96, 160), (70, 33, 33), (133, 64, 64)]
        {
            let plain = Problem::<T, A>::dense(tokens, n, k);
            let problem = with_dy(plain.clone().with_adapters(&RANKS));
            check(&problem, device);
            check(&problem.in_4_bits(64, &Codebook::nf4(), Nesting::Nested), device);
            // One adapter for all tokens, without an index.
            check(&with_dy(Problem { index: None, ..plain.with_adapters(&[5]) }), device);
        }
    }
    let device = Device::best();
    all::<f32, f32>(&device);
    all::<f16, f16>(&device);
    all::<f16, f32>(&device);
    all::<bf16, bf16>(&device);
    all::<bf16, f32>(&device);
}

/// With dY the identity, a sum has one term that is not zero: dX is the weight, rounded to T.
#[test]
fn an_identity_gives_the_dequantised_weight_to_the_bit() {
    for device in Device::for_each_target() {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            check_identity::<f16>(&device, [72, 160], 64, nesting);
            check_identity::<bf16>(&device, [136, 96], 32, nesting);
            check_identity::<bf16>(&device, [37, 130], 32, nesting); // ragged
            check_identity::<f32>(&device, [33, 65], 64, nesting);
        }
    }
}

#[test]
fn a_token_depends_on_itself_alone() {
    let (device, sizes) = (Device::best(), [[5, 128, 64], [29, 96, 65], [70, 64, 160]]);
    each_type!(check_tokens_apart(&device, &sizes));
}

#[test]
fn split_sums_are_finished() {
    fn all<T: Element>(device: &Device) {
        for (tokens, n, k) in [(1, 4096, 32), (12, 2048, 32), (20, 1111, 33), (70, 1024, 64)] {
            let problem = with_dy(Problem::<T>::nf4(tokens, n, k, 64).with_adapters(&[3, 20]));
            let outcome = check(&problem, device);
            assert!(outcome.plan.splits > 1 && outcome.plan.finish.is_some(), "{:?}", outcome.plan);
            assert_eq!(outcome.plan.workspace_bytes, outcome.plan.splits * tokens * k * 4);
        }
    }
    let device = Device::best();
    each_type!(all(&device));
}

/// Tiles of every size, more of them than multiprocessors.
#[test]
fn every_tile() {
    fn all<T: Element>(device: &Device) {
        for (tokens, n, k, tile) in [
            (13, 96, 160, 16),
            (60, 72, 160, 64),
            (125, 96, 160, 128),
            (250, 72, 160, 128),
            (256, 160, 32, 128),
        ] {
            for problem in [Problem::<T>::nf4(tokens, n, k, 64), Problem::dense(tokens, n, k)] {
                let outcome = check(&with_dy(problem.with_adapters(&[20, 3])), device);
                assert_eq!(outcome.plan.tile.tokens, if T::DTYPE == DType::F32 { 64 } else { tile });
                assert_eq!(outcome.plan.splits, 1);
            }
        }
    }
    each_type!(all(&Device::emulator().with_multiprocessors(1)));
}

#[test]
fn nothing_to_do() {
    fn all<T: Element>(device: &Device) {
        for (tokens, k) in [(0, 5), (5, 0), (0, 0)] {
            let outcome = run(&with_dy(Problem::<T>::nf4(tokens, 64, k, 64)), device);
            assert!(outcome.plan.kernel.is_none() && outcome.dx.is_empty());
        }
        // A sum of nothing is zero.
        for problem in [Problem::<T>::nf4(20, 0, 32, 64), Problem::dense(3, 0, 8)] {
            assert!(run(&with_dy(problem), device).dx.iter().all(|dx| dx.to_f32().to_bits() == 0));
        }
        // Adapters of rank 0 add nothing.
        let plain = with_dy(Problem::<T>::nf4(20, 64, 64, 64));
        let empty = plain.clone().with_adapters(&[0, 0]);
        assert!(same(&run(&plain, device).dx, &run(&empty, device).dx));
    }
    let device = Device::best();
    each_type!(all(&device));
}

/// A block whose absmax is NaN makes the columns of dX that it lies in NaN, and no others.
#[test]
fn nan_blocks_do_not_leak() {
    fn all<T: Element>(device: &Device) {
        for (tokens, n, k, block) in [(20, 72, 192, 7), (3, 72, 192, 215), (20, 35, 200, 7)] {
            let mut problem = with_dy(Problem::<T>::nf4(tokens, n, k, 64));
            let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
            let Absmax::Plain(mut absmax) = nf4.absmax().clone() else { unreachable!() };
            let block = block.min(absmax.len() - 1);
            absmax[block] = f32::NAN;
            let first = block * 64;
            let columns: Vec<usize> = (first..(first + 64).min(n * k)).map(|i| i % k).collect();
            let packed = nf4.packed().to_vec();
            let nf4 =
                Nf4Matrix::from_parts([n, k], packed, Absmax::Plain(absmax), 64, Codebook::nf4(), DType::F32);
            problem.weight = Weight::Nf4(nf4.unwrap());
            let outcome = run(&problem, device);
            for (i, dx) in outcome.dx.iter().enumerate() {
                assert_eq!(dx.to_f32().is_nan(), columns.contains(&(i % k)), "{:?}: {i}", outcome.plan);
            }
        }
    }
    let device = Device::best();
    each_type!(all(&device));
}

#[test]
fn a_wrong_adapter_makes_its_token_nan_and_no_other() {
    fn all<T: Element>(device: &Device) {
        for (tokens, n) in [(4, 64), (20, 33)] {
            let right = with_dy(Problem::<T>::nf4(tokens, n, 96, 64).with_adapters(&[4, 12]));
            let mut wrong = right.clone();
            for (token, adapter) in [(0, 2), (2, -2), (3, i32::MAX)] {
                wrong.index.as_mut().unwrap()[token] = adapter;
            }
            let (right, wrong) = (run(&right, device), run(&wrong, device));
            for (token, (right, wrong)) in right.dx.chunks(96).zip(wrong.dx.chunks(96)).enumerate() {
                if [0, 2, 3].contains(&token) {
                    assert!(wrong.iter().all(|y| y.to_f32().is_nan()), "token {token}");
                } else {
                    assert!(same(right, wrong), "token {token}");
                }
            }
        }
    }
    let device = Device::best();
    each_type!(all(&device));
}

/// Rows of codes that are not whole pieces of 16 bytes, of which elements are: W is dequantised first, and that copy multiplied.
#[test]
fn two_passes() {
    fn all<T: Element>(device: &Device) {
        for (tokens, n, k) in [(20, 200, 40), (70, 136, 136), (133, 264, 72), (20, 2056, 24)] {
            let problem = with_dy(Problem::<T>::nf4(tokens, n, k, 64).with_adapters(&[20, 3]));
            let outcome = check(&problem, device);
            let plan = outcome.plan;
            assert!(plan.dequantize.is_some() && plan.vectors, "{plan:?}");
            assert_eq!(plan.rounding, Rounding::ToInput);
            let parts = if plan.splits > 1 { plan.splits * tokens * k * 4 } else { 0 };
            assert_eq!(plan.workspace_bytes, n * k * 2 + parts);

            let copy = problem.weight_values(Rounding::ToInput).into_iter().map(T::from_f32).collect();
            let of_copy = run(&Problem { weight: Weight::Dense(copy), ..problem }, device);
            assert!(same(&outcome.dx, &of_copy.dx), "{plan:?}");
        }
    }
    for device in Device::for_each_target() {
        all::<f16>(&device);
        all::<bf16>(&device);
    }
}

/// Hopper has PTX of its own. It computes the same bits, with the same kernel.
#[test]
fn both_targets_compute_the_same() {
    fn all<T: Element>(a100: &Device, h200: &Device) {
        for (tokens, n, k) in [(9, 64, 96), (70, 45, 33), (133, 72, 161)] {
            let dense = with_dy(Problem::<T>::dense(tokens, n, k).with_adapters(&[4, 17]));
            for problem in [dense.clone(), dense.in_4_bits(64, &Codebook::nf4(), Nesting::Nested)] {
                let (here, there) = (run(&problem, a100), run(&problem, h200));
                assert_eq!(*here.plan, *there.plan);
                assert!(same(&here.dx, &there.dx), "{:?}", here.plan);
            }
        }
    }
    let a100 = Device::emulator();
    let h200 = Device::emulate(Spec::h200()).with_multiprocessors(a100.queue().properties().sm_count);
    each_type!(all(&a100, &h200));
}

/// What decides how fast a kernel can be, counted: W is read once in whole sectors, no banks conflict,
/// the tensor cores multiply what the product has and no more, and instructions per weight are few.
#[test]
fn counts() {
    fn count<T: Element>(problem: Problem<T>, entry: &str, instructions: f64) {
        let (device, problem) = (Device::emulator().with_multiprocessors(1), with_dy(problem));
        let outcome = run(&problem, &device);
        let (plan, counters) = (outcome.plan, outcome.counters.unwrap());
        assert_eq!((plan.kernel.unwrap().entry, plan.splits), (entry, 1));
        assert_eq!(counters.local_accesses, 0);
        assert_eq!(counters.shared_loads.conflicts, 0, "{entry}: {counters}");
        assert_eq!(counters.shared_stores.conflicts, 0, "{entry}: {counters} {:?}", counters.conflict_lines);
        assert_eq!(counters.global_stores.sector_ratio(), 1.0, "{entry}: {counters}");
        let weight = match &problem.weight {
            Weight::Dense(_) => problem.n * problem.k * T::DTYPE.size(),
            Weight::Nf4(nf4) => nf4.packed().len() + nf4.absmax().len() * 4,
        };
        let wanted = (weight + problem.tokens * problem.n * T::DTYPE.size()) as f64;
        let moved = 32.0 * counters.global_loads.distinct_sectors as f64;
        assert!(moved >= wanted && moved <= 1.01 * wanted, "{entry} reads {moved} bytes, wanted {wanted}");
        let products = problem.tokens * problem.n * problem.k;
        assert_eq!(counters.matrix_ops, products as u64, "{entry}");
        let got = counters.total().threads as f64 / (problem.n * problem.k) as f64;
        assert!(got <= instructions, "{entry} takes {got:.2} instructions per weight, not {instructions}");
    }
    count(Problem::<bf16>::nf4(16, 1024, 256, 64), "matmul_transposed_nf4_bf16_t16", 8.0);
    count(Problem::<bf16>::nf4(64, 1024, 256, 64), "matmul_transposed_nf4_bf16_t64", 12.0);
    count(Problem::<f16>::nf4(128, 1024, 256, 64), "matmul_transposed_nf4_f16_t128", 18.0);
    count(Problem::<bf16>::dense(128, 1024, 128), "matmul_transposed_dense_bf16_t128", 12.0);
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let properties = device.queue().properties();
    let shape = Problem::<bf16>::nf4(3, 8, 64, 64).shape();
    let refused = |shape: &Shape, argument: &str| match matmul_transposed::plan(shape, properties) {
        Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
        other => panic!("{other:?}"),
    };
    refused(&Shape { tokens: 1 << 31, ..shape }, "tokens");
    refused(&Shape { n: usize::MAX, ..shape }, "n");
    refused(&Shape { k: 1 << 31, ..shape }, "k");
    refused(&Shape { tokens: 1 << 30, k: 1 << 30, ..shape }, "tokens * k");
    for blocksize in [0, 16, 48, 8192] {
        refused(&Shape { weight: WeightFormat::Nf4 { blocksize }, ..shape }, "weight.blocksize");
    }

    let elsewhere = Device::emulator();
    let (plan, queue) = (matmul_transposed::plan(&shape, properties).unwrap(), device.queue());
    let (dy, foreign) = (device.upload(&[bf16::ONE; 32]), elsewhere.upload(&[bf16::ONE; 32]));
    let nf4 = DeviceWeight::new(&device, &Problem::<bf16>::nf4(3, 8, 64, 64).weight);
    let other = DeviceWeight::new(&device, &Problem::<bf16>::nf4(3, 8, 64, 32).weight);
    let small = DeviceWeight::new(&device, &Problem::<bf16>::nf4(3, 7, 64, 64).weight);
    let dense = DeviceWeight::new(&device, &Problem::<bf16>::dense(3, 8, 64).weight);
    let factors = Problem::<bf16>::dense(3, 8, 64).with_adapters(&[4]).adapters.unwrap();
    let right = Factors::new(&device, &factors);
    let narrow =
        Factors::new(&device, &Problem::<bf16>::dense(3, 8, 32).with_adapters(&[4]).adapters.unwrap());
    let mut entries =
        [device.alloc(AdapterTable::<bf16>::bytes(1)), device.alloc(AdapterTable::<bf16>::bytes(1))];
    let [first, second] = &mut entries;
    let table = right.table(&device, 64, 8, first).unwrap();
    let other_k = narrow.table(&device, 32, 8, second).unwrap();
    let (v, index) = (device.upload(&[0.0f32; 16]), device.upload(&[0, 0, 0, 0]));
    let (mut dx, mut workspace) = (device.alloc::<bf16>(256), device.alloc::<u8>(4096));
    type Branch<'a> = Option<&'a LowRank<'a, bf16>>;
    let mut run = |dy,
                   weight: &DeviceWeight<bf16>,
                   branch: Branch<'_>,
                   at: std::ops::Range<usize>,
                   argument: &str| {
        let result =
            plan.run::<bf16, bf16>(queue, dy, &weight.view(), branch, dx.slice_mut(at), workspace.view_mut());
        match result {
            Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
            other => panic!("{argument}: {other:?}"),
        }
    };
    let good = dy.slice(..24);
    run(dy.slice(..23), &nf4, None, 0..192, "dy");
    run(dy.slice(1..25), &nf4, None, 0..192, "dy");
    run(foreign.slice(..24), &nf4, None, 0..192, "dy");
    run(good, &nf4, None, 0..191, "dx");
    run(good, &nf4, None, 1..193, "dx");
    run(good, &dense, None, 0..192, "weight");
    run(good, &other, None, 0..192, "weight.blocksize");
    run(good, &small, None, 0..192, "weight.packed");
    run(good, &nf4, Some(&LowRank { adapters: &table, index: None, v: v.slice(..11) }), 0..192, "v");
    run(
        good,
        &nf4,
        Some(&LowRank { adapters: &table, index: Some(index.view()), v: v.slice(..12) }),
        0..192,
        "adapter_index",
    );
    run(
        good,
        &nf4,
        Some(&LowRank { adapters: &other_k, index: None, v: v.slice(..12) }),
        0..192,
        "adapters.k",
    );
    let f16_plan = matmul_transposed::plan(&Shape { dtype: DType::F16, ..shape }, properties).unwrap();
    let result = f16_plan.run::<bf16, bf16>(
        queue,
        good,
        &nf4.view(),
        None,
        dx.slice_mut(0..192),
        workspace.view_mut(),
    );
    assert!(matches!(result, Err(Error::Argument { argument, .. }) if argument == "dy"));
}
