//! `v = scaling * x lora_a^T` against f64.

mod products;

use half::{bf16, f16};
use lora_kernels::cuda::{AdapterTable, lora_shrink};
use lora_kernels::{DType, Element, Error};
use lora_kernels_devices::Device;
use products::{Factors, Problem, same};

/// Runs it with the parts that the plan wants, or with one.
fn shrink<T: Element, A: Element>(
    device: &Device,
    problem: &Problem<T, A>,
    in_one_part: bool,
) -> (lora_shrink::Plan, Vec<f32>) {
    let factors = Factors::new(device, problem.adapters.as_ref().unwrap());
    let mut entries = device.alloc(AdapterTable::<A>::bytes(factors.count()));
    let table = factors.table(device, problem.k, problem.n, &mut entries).unwrap();
    let (x, index) = (device.upload(&problem.x), problem.index.as_ref().map(|index| device.upload(index)));
    let shape = table.shrink_shape(problem.tokens, T::DTYPE);
    let plan = lora_shrink::plan(&shape, device.queue().properties()).unwrap();
    let plan = if in_one_part { plan.in_one_part() } else { plan };
    let mut v = device.alloc(plan.v_len());
    let index = index.as_ref().map(|index| index.view());
    plan.run(device.queue(), x.view(), &table, index, v.view_mut()).unwrap();
    (plan, v.download())
}

/// The sum of v's parts, as those who read it add them: neighbours first.
fn sum(parts: usize, v: &[f32]) -> Vec<f32> {
    if parts == 1 {
        return v.to_vec();
    }
    let (low, high) = v.split_at(v.len() / 2);
    sum(parts / 2, low).iter().zip(sum(parts / 2, high)).map(|(low, high)| low + high).collect()
}

/// Products are exact. A term goes through the additions of its leaf, an instruction's for each 16 elements and each pair
/// of pieces of x and lora_a (at most 3 by 3), in each of which it meets 16 others and the sum so far; a step of a tensor
/// core may cut off what it shifts out instead of rounding it, which counts twice. Then come six additions of the tree and
/// the product with the scaling. Each is off by at most 2^-24 of the sum of magnitudes.
fn check<T: Element, A: Element>(problem: &Problem<T, A>, plan: &lora_shrink::Plan, v: &[f32]) {
    let pieces = match (T::DTYPE, A::DTYPE) {
        (DType::F32, _) => 9,
        (DType::F16, DType::F32) => 6,
        (_, DType::F32) => 3,
        _ => 1,
    };
    let leaf = problem.k.div_ceil(32).div_ceil(64) * 2 * pieces;
    let share = 1.01 * (2 * 17 * leaf + 6 + 1) as f64 * (-24f64).exp2();
    let (k, columns) = (problem.k, problem.max_rank().next_multiple_of(4));
    assert_eq!(v.len(), plan.parts * problem.tokens * columns);
    for (i, got) in sum(plan.parts, v).iter().enumerate() {
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
        let mut parts = Vec::new();
        for (tokens, k) in [
            (1, 256),
            (2, 1),
            (3, 33),
            (17, 96),
            (31, 100),
            (4, 2049),
            (65, 64),
            (133, 8),
            (300, 40),
            (40, 72),
            (5, 2104),
        ] {
            let problem = Problem::<T, A>::dense(tokens, 1, k).with_adapters(&RANKS);
            let (plan, v) = shrink(device, &problem, false);
            check(&problem, &plan, &v);
            let problem = Problem { index: None, ..Problem::<T, A>::dense(tokens, 1, k).with_adapters(&[6]) };
            let (plan, v) = shrink(device, &problem, false);
            check(&problem, &plan, &v);
            parts.push(plan.parts);
        }
        assert!([1, 2, 4, 8].iter().all(|wanted| parts.contains(wanted)), "{parts:?}");
    }
    let device = Device::best();
    all::<f32, f32>(&device);
    all::<f16, f16>(&device);
    all::<f16, f32>(&device);
    all::<bf16, bf16>(&device);
    all::<bf16, f32>(&device);
}

/// A token's v has the same bits in any number of parts, alone and among others.
#[test]
fn parts_and_neighbours_do_not_matter() {
    let device = Device::best();
    for k in [256, 2056, 77, 4096] {
        let problem = Problem::<bf16>::dense(40, 1, k).with_adapters(&[4, 16, 31]);
        let (_, whole) = shrink(&device, &problem, true);
        for tokens in [40, 12, 5] {
            let mut some = problem.clone();
            some.tokens = tokens;
            some.x.truncate(tokens * k);
            some.index.as_mut().unwrap().truncate(tokens);
            let (plan, v) = shrink(&device, &some, false);
            assert!(plan.parts > 1, "{plan:?}");
            assert!(same(&sum(plan.parts, &v), &whole[..tokens * 32]), "{plan:?}");
        }
        for token in 0..9 {
            let mut alone = problem.clone();
            alone.tokens = 1;
            alone.x = problem.x[token * k..(token + 1) * k].to_vec();
            alone.index = Some(vec![problem.index.as_ref().unwrap()[token]]);
            let (plan, v) = shrink(&device, &alone, false);
            assert!(same(&sum(plan.parts, &v), &whole[token * 32..(token + 1) * 32]));
        }
    }
}

#[test]
fn wrong_numbers_make_nan() {
    let mut problem = Problem::<bf16>::dense(11, 1, 64).with_adapters(&[4, 7]);
    let (_, right) = shrink(&Device::best(), &problem, true);
    for (token, adapter) in [(1, 2), (4, -2), (10, i32::MIN)] {
        problem.index.as_mut().unwrap()[token] = adapter;
    }
    let (_, v) = shrink(&Device::best(), &problem, true);
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
        let (plan, v) =
            shrink(&Device::best(), &Problem::<f16>::dense(tokens, 1, k).with_adapters(&[rank]), false);
        assert!(plan.kernel.is_none() && v.is_empty());
    }
    let (_, v) = shrink(&Device::best(), &Problem::<f16>::dense(3, 1, 0).with_adapters(&[4, 2]), true);
    assert!(v.iter().all(|&v| v == 0.0) && v.len() == 12);
}

/// What decides how fast it can be, counted: every lora_a is read once, in whole sectors, by blocks that fill the device or
/// that have less than 32 KiB each to read, and little else is.
#[test]
fn it_reads_every_adapter_once() {
    let k = 4096;
    for (tokens, adapters, rank, blocks) in
        [(1, 1, 16, 8), (1, 1, 64, 32), (8, 1, 64, 16), (8, 8, 16, 64), (32, 32, 16, 128), (16, 16, 64, 128)]
    {
        let mut problem = Problem::<bf16>::dense(tokens, 1, k).with_adapters(&vec![rank; adapters]);
        problem.index = Some((0..tokens).map(|token| (token % adapters) as i32).collect());
        let device = Device::emulator();
        let (plan, _) = shrink(&device, &problem, false);
        let counters = device.counters().unwrap();
        let (a, x) = ((adapters * rank * k * 2) as f64, (tokens * k * 2) as f64);
        let distinct = 32.0 * counters.global_loads.distinct_sectors as f64;
        // The index and the table are there too.
        assert!((a + x..1.01 * (a + x)).contains(&distinct), "{counters}");
        // x comes again for every 16 ranks, and a warp reads up to 32 numbers of adapters and an entry of the table.
        let (read, warps) = (32.0 * counters.global_loads.sectors as f64, 8.0 * counters.blocks as f64);
        assert!(read <= a + x * rank as f64 / 16.0 + warps * 6.0 * 32.0, "{counters}");
        assert!(plan.parts * rank / 16 * adapters.max(tokens / 8) >= blocks, "{plan:?}");
        assert!(counters.global_loads.sector_ratio() < 1.01, "{counters}");
        assert_eq!(counters.local_accesses, 0);
    }
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let properties = device.queue().properties();
    let shape = lora_shrink::Shape {
        tokens: 2,
        k: 16,
        max_rank: 4,
        slices: 1,
        dtype: DType::BF16,
        adapter_dtype: DType::BF16,
    };
    let refused = |shape: &lora_shrink::Shape, argument: &str| match lora_shrink::plan(shape, properties) {
        Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
        other => panic!("{other:?}"),
    };
    refused(&lora_shrink::Shape { max_rank: 257, ..shape }, "max_rank");
    refused(&lora_shrink::Shape { slices: 0, ..shape }, "slices");
    refused(&lora_shrink::Shape { slices: 17, ..shape }, "slices");
    refused(&lora_shrink::Shape { tokens: 1 << 31, ..shape }, "tokens");
    refused(&lora_shrink::Shape { k: usize::MAX, ..shape }, "k");
    refused(&lora_shrink::Shape { adapter_dtype: DType::F16, ..shape }, "adapters.dtype");

    let problem = Problem::<bf16>::dense(2, 8, 16).with_adapters(&[4]);
    let factors = Factors::new(&device, problem.adapters.as_ref().unwrap());
    let mut entries = device.alloc(AdapterTable::<bf16>::bytes(1));
    let table = factors.table(&device, 16, 8, &mut entries).unwrap();
    let plan = lora_shrink::plan(&shape, properties).unwrap().in_one_part();
    let elsewhere = Device::emulator();
    let (x, index) = (device.upload(&problem.x), device.upload(&[0, 0, 0]));
    let foreign = elsewhere.upload(&problem.x);
    let longer = device.upload(&[bf16::ONE; 33]);
    let mut v = device.alloc::<f32>(16);
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
    let other = |shape: lora_shrink::Shape| lora_shrink::plan(&shape, properties).unwrap().in_one_part();
    run(&other(lora_shrink::Shape { k: 8, ..shape }), x.slice(..16), None, 0..8, "adapters.k");
    run(&other(lora_shrink::Shape { max_rank: 6, ..shape }), x.view(), None, 0..12, "adapters.max_rank");
    run(&other(lora_shrink::Shape { slices: 2, ..shape }), x.view(), None, 0..16, "adapters.slices");
    run(&other(lora_shrink::Shape { adapter_dtype: DType::F32, ..shape }), x.view(), None, 0..8, "adapters");
}
