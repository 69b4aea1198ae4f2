//! `v = scaling * x lora_a^T` against f64.

mod products;

use half::{bf16, f16};
use lora_kernels::cuda::{AdapterTable, lora_shrink};
use lora_kernels::{DType, Element, Error};
use lora_kernels_devices::Device;
use products::{Factors, Problem, same};

/// Runs it as `plan` says, or as the device would.
fn shrink<T: Element, A: Element>(device: &Device, problem: &Problem<T, A>) -> (lora_shrink::Plan, Vec<f32>) {
    let factors = Factors::new(device, problem.adapters.as_ref().unwrap());
    let mut entries = device.alloc(AdapterTable::<A>::bytes(factors.count()));
    let table = factors.table(device, problem.k, problem.n, &mut entries).unwrap();
    let (x, index) = (device.upload(&problem.x), problem.index.as_ref().map(|index| device.upload(index)));
    let shape = lora_shrink::Shape {
        tokens: problem.tokens,
        k: problem.k,
        max_rank: table.max_rank(),
        dtype: T::DTYPE,
        adapter_dtype: A::DTYPE,
    };
    let plan = lora_shrink::plan(&shape, device.queue().properties()).unwrap();
    let mut v = device.alloc(plan.v_len());
    let index = index.as_ref().map(|index| index.view());
    plan.run(device.queue(), x.view(), &table, index, v.view_mut()).unwrap();
    (plan, v.download())
}

/// A term goes through its product's fused addition, those of the later terms of its thread, five of the warp's tree and
/// seven of the block's, and the product with the scaling; each is off by at most 2^-24 of the sum of magnitudes.
fn check<T: Element, A: Element>(problem: &Problem<T, A>, plan: &lora_shrink::Plan, v: &[f32]) {
    let width = if plan.vectors { 16 / T::DTYPE.size() } else { 1 };
    let steps = problem.k.div_ceil(256 * width) * width + 5 + 7 + 1;
    let share = 1.01 * steps as f64 * (-24f64).exp2();
    let (k, columns) = (problem.k, problem.max_rank().next_multiple_of(4));
    for (i, got) in v.iter().enumerate() {
        let (token, r) = (i / columns, i % columns);
        let adapter = problem.index.as_ref().map_or(0, |index| index[token]);
        let adapter = usize::try_from(adapter).ok().map(|a| &problem.adapters.as_ref().unwrap()[a]);
        let Some(adapter) = adapter.filter(|adapter| r < adapter.rank) else {
            assert_eq!(got.to_bits(), 0, "v[{token}, {r}] has no row of lora_a");
            continue;
        };
        let terms = (0..k).map(|i| problem.x[token * k + i].to_f64() * adapter.lora_a[r * k + i].to_f64());
        let scaling = f64::from(adapter.scaling);
        let (value, magnitude) =
            terms.fold((0.0, 0.0), |(v, m), t| (v + scaling * t, m + (scaling * t).abs()));
        let error = (f64::from(*got) - value).abs();
        assert!(error <= share * magnitude, "{plan:?}: v[{token}, {r}] is {got}, wanted {value}");
    }
}

const RANKS: [usize; 9] = [8, 0, 1, 3, 16, 17, 64, 256, 5];

#[test]
fn any_shape_and_any_mix_of_ranks() {
    fn all<T: Element, A: Element>(device: &Device) {
        for (tokens, k) in [(1, 256), (2, 1), (3, 33), (17, 96), (31, 100), (4, 2049), (65, 64), (133, 8)] {
            let problem = Problem::<T, A>::dense(tokens, 1, k).with_adapters(&RANKS);
            let (plan, v) = shrink(device, &problem);
            check(&problem, &plan, &v);
            let problem = Problem { index: None, ..Problem::<T, A>::dense(tokens, 1, k).with_adapters(&[6]) };
            let (plan, v) = shrink(device, &problem);
            check(&problem, &plan, &v);
        }
    }
    // Few multiprocessors are filled by few tokens, which then take the large tile.
    for device in [Device::best(), Device::best().with_multiprocessors(8)] {
        all::<f32, f32>(&device);
        all::<f16, f16>(&device);
        all::<f16, f32>(&device);
        all::<bf16, bf16>(&device);
        all::<bf16, f32>(&device);
    }
}

/// A token's v has the same bits in both tiles, alone and among others.
#[test]
fn the_tile_does_not_matter() {
    for k in [256, 2056, 77] {
        let problem = Problem::<bf16>::dense(9, 1, k).with_adapters(&[4, 16, 31]);
        let small = shrink(&Device::best().with_multiprocessors(1000), &problem);
        let large = shrink(&Device::best().with_multiprocessors(1), &problem);
        assert_eq!((small.0.tile.tokens, large.0.tile.tokens), (1, 8));
        assert!(same(&small.1, &large.1));
        for token in 0..9 {
            let mut alone = problem.clone();
            alone.tokens = 1;
            alone.x = problem.x[token * k..(token + 1) * k].to_vec();
            alone.index = Some(vec![problem.index.as_ref().unwrap()[token]]);
            let (_, v) = shrink(&Device::best(), &alone);
            assert!(same(&v, &small.1[token * 32..(token + 1) * 32]));
        }
    }
}

#[test]
fn wrong_numbers_make_nan() {
    let mut problem = Problem::<bf16>::dense(11, 1, 64).with_adapters(&[4, 7]);
    let (_, right) = shrink(&Device::best(), &problem);
    for (token, adapter) in [(1, 2), (4, -2), (10, i32::MIN)] {
        problem.index.as_mut().unwrap()[token] = adapter;
    }
    let (_, v) = shrink(&Device::best(), &problem);
    for (token, (v, right)) in v.chunks(8).zip(right.chunks(8)).enumerate() {
        if [1, 4, 10].contains(&token) {
            assert!(v.iter().all(|v| v.is_nan()));
        } else {
            assert!(same(v, right));
        }
    }
}

#[test]
fn nothing_to_do() {
    for (tokens, k, rank) in [(0, 64, 4), (3, 64, 0), (0, 0, 0)] {
        let (plan, v) = shrink(&Device::best(), &Problem::<f16>::dense(tokens, 1, k).with_adapters(&[rank]));
        assert!(plan.kernel.is_none() && v.is_empty());
    }
    let (_, v) = shrink(&Device::best(), &Problem::<f16>::dense(3, 1, 0).with_adapters(&[4, 2]));
    assert!(v.iter().all(|&v| v == 0.0) && v.len() == 12);
}

/// x and lora_a are read once by a block, in whole sectors, and nothing else of size is.
#[test]
fn it_reads_whole_sectors() {
    let problem = Problem { index: None, ..Problem::<bf16>::dense(1, 1, 4096).with_adapters(&[16]) };
    let device = Device::emulator();
    let (plan, _) = shrink(&device, &problem);
    assert_eq!((plan.tile.tokens, plan.grid), (1, [1, 8, 1]));
    let counters = device.counters().unwrap();
    let (a, x) = (16 * 4096 * 2, 4096 * 2);
    // A block reads x once for its two rows of lora_a. 64 bytes are left for the table.
    let bytes = counters.global_loads.bytes;
    assert!((a + 8 * x..a + 8 * x + 8 * 256 * 64).contains(&bytes), "{bytes}");
    assert!(counters.global_loads.sector_ratio() < 1.01, "{counters}");
    assert_eq!(counters.shared_loads.conflicts + counters.shared_stores.conflicts, 0, "{counters}");
    assert_eq!(counters.local_accesses, 0);
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let properties = device.queue().properties();
    let shape =
        lora_shrink::Shape { tokens: 2, k: 16, max_rank: 4, dtype: DType::BF16, adapter_dtype: DType::BF16 };
    let refused = |shape: &lora_shrink::Shape, argument: &str| match lora_shrink::plan(shape, properties) {
        Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
        other => panic!("{other:?}"),
    };
    refused(&lora_shrink::Shape { max_rank: 257, ..shape }, "max_rank");
    refused(&lora_shrink::Shape { tokens: 1 << 31, ..shape }, "tokens");
    refused(&lora_shrink::Shape { k: usize::MAX, ..shape }, "k");
    refused(&lora_shrink::Shape { adapter_dtype: DType::F16, ..shape }, "adapters.dtype");

    let problem = Problem::<bf16>::dense(2, 8, 16).with_adapters(&[4]);
    let factors = Factors::new(&device, problem.adapters.as_ref().unwrap());
    let mut entries = device.alloc(AdapterTable::<bf16>::bytes(1));
    let table = factors.table(&device, 16, 8, &mut entries).unwrap();
    let plan = lora_shrink::plan(&shape, properties).unwrap();
    let elsewhere = Device::emulator();
    let (x, index) = (device.upload(&problem.x), device.upload(&[0, 0, 0]));
    let foreign = elsewhere.upload(&problem.x);
    let longer = device.upload(&[bf16::ONE; 33]);
    let mut v = device.alloc::<f32>(12);
    let queue = device.queue();
    let mut run =
        |plan: &lora_shrink::Plan, x, index, v_len: std::ops::Range<usize>, argument: &str| match plan.run(
            queue,
            x,
            &table,
            index,
            v.slice_mut(v_len),
        ) {
            Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
            other => panic!("{argument}: {other:?}"),
        };
    run(&plan, x.slice(..31), None, 0..8, "x");
    run(&plan, longer.slice(1..33), None, 0..8, "x");
    run(&plan, foreign.view(), None, 0..8, "x");
    run(&plan, x.view(), None, 0..7, "v");
    run(&plan, x.view(), None, 1..9, "v");
    run(&plan, x.view(), Some(index.view()), 0..8, "adapter_index");
    let other = |shape: lora_shrink::Shape| lora_shrink::plan(&shape, properties).unwrap();
    run(&other(lora_shrink::Shape { k: 8, ..shape }), x.slice(..16), None, 0..8, "adapters.k");
    run(&other(lora_shrink::Shape { max_rank: 6, ..shape }), x.view(), None, 0..12, "adapters.max_rank");
    run(&other(lora_shrink::Shape { adapter_dtype: DType::F32, ..shape }), x.view(), None, 0..8, "adapters");
}
