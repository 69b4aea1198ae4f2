//! Adapters of packed modules: factors of their own for every slice of the outputs.

mod products;

use half::{bf16, f16};
use lora_kernels::cuda::matmul::Extras;
use lora_kernels::cuda::{AdapterTable, AdapterView, LowRank, lora_expand, lora_shrink};
use lora_kernels::nf4::{Codebook, Nesting};
use lora_kernels::{DType, Element, Error};
use lora_kernels_devices::{Buffer, Device, Spec};
use products::{Adapter, DeviceWeight, Factors, Numbers, Outcome, Problem, expand_shape, same};

/// Outputs of the slices: none begins or ends with a tile.
const SLICES: [usize; 3] = [33, 170, 26];
const N: usize = 33 + 170 + 26;
/// Ranks of every adapter's slices.
const RANKS: [[usize; 3]; 3] = [[4, 16, 3], [0, 40, 8], [17, 0, 64]];
const SCALING: f32 = 0.75;

/// A problem whose adapters are block-diagonal, so that its truth is that of the slices, and the slices' factors, of one
/// adapter after the other.
fn packed<T: Element, A: Element>(tokens: usize, k: usize) -> (Problem<T, A>, Vec<Adapter<A>>) {
    let ranks = RANKS.map(|ranks| ranks.iter().sum::<usize>());
    let mut problem = Problem::<T, A>::dense(tokens, N, k).with_adapters(&ranks);
    let mut slices = Vec::new();
    for (adapter, ranks) in problem.adapters.as_mut().unwrap().iter_mut().zip(RANKS) {
        adapter.scaling = SCALING;
        let (mut row, mut column) = (0, 0);
        for (rows, rank) in SLICES.into_iter().zip(ranks) {
            let lora_a = adapter.lora_a[column * k..(column + rank) * k].to_vec();
            let mut lora_b = Vec::new();
            for b in adapter.lora_b[row * adapter.rank..(row + rows) * adapter.rank].chunks_mut(adapter.rank)
            {
                lora_b.extend_from_slice(&b[column..column + rank]);
                b[..column].fill(A::from_f32(0.0));
                b[column + rank..].fill(A::from_f32(0.0));
            }
            slices.push(Adapter { lora_a, lora_b, rank, scaling: SCALING });
            (row, column) = (row + rows, column + rank);
        }
    }
    (problem, slices)
}

/// `v` as one part, and what expand makes of `y` with it.
fn shrink_and_expand<T: Element, A: Element>(
    device: &Device,
    problem: &Problem<T, A>,
    table: &AdapterTable<'_, A>,
    y: &[T],
) -> (Vec<f32>, Vec<T>) {
    let (queue, properties) = (device.queue(), device.queue().properties());
    let (x, index) = (device.upload(&problem.x), problem.index.as_ref().map(|index| device.upload(index)));
    let index = || index.as_ref().map(Buffer::view);
    let plan = lora_shrink::plan(&table.shrink_shape(problem.tokens, T::DTYPE), properties).unwrap();
    let mut parts = device.alloc(plan.v_len());
    plan.run(queue, x.view(), table, index(), parts.view_mut()).unwrap();
    let plan = plan.in_one_part();
    let mut v = device.alloc(plan.v_len());
    plan.run(queue, x.view(), table, index(), v.view_mut()).unwrap();
    let plan = lora_expand::plan(&expand_shape::<T, A>(problem.tokens, table.n()), properties).unwrap();
    let outputs = [v.view(), parts.view()].map(|v| {
        let mut y = device.upload(y);
        plan.run(queue, &LowRank { adapters: table, index: index(), v }, y.view_mut()).unwrap();
        y.download()
    });
    assert!(same(&outputs[0], &outputs[1]), "the number of parts does not matter");
    let [y, _] = outputs;
    (v.download(), y)
}

/// One launch over all slices gives each what a launch over it alone would, to the bit.
#[test]
fn a_slice_is_as_if_it_were_alone() {
    fn check<T: Element, A: Element>(device: &Device) {
        for (tokens, k) in [(1, 128), (9, 33), (40, 264)] {
            let (problem, slices) = packed::<T, A>(tokens, k);
            let y: Vec<T> = Numbers::new(3).many(tokens * N);
            let factors = Factors::new(device, &slices);
            let mut entries = device.alloc(AdapterTable::<A>::bytes(slices.len()));
            let views = factors.views();
            let entries = entries.view_mut();
            let table = AdapterTable::upload_slices(device.queue(), &views, k, &SLICES, entries).unwrap();
            assert_eq!((table.len(), table.n(), table.v_columns()), (3, N, 3 * 64));
            let (v, got) = shrink_and_expand(device, &problem, &table, &y);

            let mut first = 0;
            for (s, rows) in SLICES.into_iter().enumerate() {
                let column = |y: &[T]| -> Vec<T> {
                    y.chunks(N).flat_map(|y| y[first..first + rows].iter().copied()).collect()
                };
                let views: Vec<AdapterView<'_, A>> = views.iter().skip(s).step_by(3).copied().collect();
                let mut entries = device.alloc(AdapterTable::<A>::bytes(3));
                let alone =
                    AdapterTable::upload(device.queue(), &views, k, rows, entries.view_mut()).unwrap();
                let (v_alone, y_alone) = shrink_and_expand(device, &problem, &alone, &column(&y));
                assert!(same(&column(&got), &y_alone), "slice {s} of {tokens} tokens");
                let pitch = alone.v_columns();
                for (v, alone) in v.chunks(3 * 64).zip(v_alone.chunks(pitch)) {
                    assert!(same(&v[s * 64..s * 64 + pitch], alone), "v of slice {s}");
                    assert!(v[s * 64 + pitch..(s + 1) * 64].iter().all(|v| v.to_bits() == 0));
                }
                first += rows;
            }
        }
    }
    let device = Device::best();
    check::<f32, f32>(&device);
    check::<f16, f16>(&device);
    check::<bf16, f32>(&device);
    check::<bf16, bf16>(&device);
}

/// The fused product with slices, on every kernel, against f64.
#[test]
fn products_take_slices() {
    fn check<T: Element, A: Element>(device: &Device, tokens: usize, k: usize, nf4: bool) -> &'static str {
        let (problem, slices) = packed::<T, A>(tokens, k);
        let mut problem = problem.with_bias_and_scale();
        if nf4 {
            problem = problem.in_4_bits(64, &Codebook::nf4(), Nesting::Plain);
        }
        let plan = problem.plan(device);
        let factors = Factors::new(device, &slices);
        let mut entries = device.alloc(AdapterTable::<A>::bytes(slices.len()));
        let views = factors.views();
        let table =
            AdapterTable::upload_slices(device.queue(), &views, k, &SLICES, entries.view_mut()).unwrap();
        let (x, index) = (device.upload(&problem.x), device.upload(problem.index.as_ref().unwrap()));
        let v = problem.shrink(device, &table, &x, Some(&index)).unwrap();
        let weight = DeviceWeight::new(device, &problem.weight);
        let bias = device.upload(problem.bias.as_ref().unwrap());
        let row_scale = device.upload(problem.row_scale.as_ref().unwrap());
        let extras = Extras {
            bias: Some(bias.view()),
            row_scale: Some(row_scale.view()),
            low_rank: Some(LowRank { adapters: &table, index: Some(index.view()), v: v.view() }),
            ..Extras::default()
        };
        let mut y = device.alloc(tokens * N);
        let mut workspace = device.alloc(plan.workspace_bytes);
        plan.run(device.queue(), x.view(), &weight.view(), &extras, y.view_mut(), workspace.view_mut())
            .unwrap();
        let outcome = Outcome { plan, y: y.download(), counters: None };
        problem.check(&outcome);
        outcome.plan.kernel.unwrap().module
    }
    let (a100, h200) = (Device::emulator(), Device::emulate(Spec::h200()));
    let mut modules = vec![
        check::<bf16, bf16>(&a100, 3, 128, true),
        check::<f16, f32>(&a100, 13, 192, true),
        check::<f32, f32>(&a100, 5, 70, true),
        check::<bf16, bf16>(&a100, 1, 96, false),
        check::<f16, f16>(&a100, 40, 96, false),
        check::<bf16, f32>(&a100, 20, 96, true),
        check::<bf16, bf16>(&a100, 20, 1100, false),
        check::<bf16, bf16>(&h200, 9, 128, true),
        check::<bf16, bf16>(&h200, 40, 128, true),
        check::<f16, f32>(&h200, 70, 96, false),
    ];
    modules.sort_unstable();
    modules.dedup();
    assert_eq!(modules, ["decode", "matmul", "matvec", "prefill", "skinny"]);
}

/// A batch without adapters reads the index, and writes zeros for v; nothing else.
#[test]
fn tokens_without_adapters_cost_nothing() {
    let device = Device::emulator();
    let (mut problem, slices) = packed::<bf16, bf16>(40, 256);
    problem.index = Some(vec![-1; 40]);
    let factors = Factors::new(&device, &slices);
    let mut entries = device.alloc(AdapterTable::<bf16>::bytes(slices.len()));
    let views = factors.views();
    let table =
        AdapterTable::upload_slices(device.queue(), &views, 256, &SLICES, entries.view_mut()).unwrap();
    let idle = |what: &str| {
        let counters = device.counters().unwrap();
        assert_eq!(counters.matrix_ops, 0, "{what}: {counters}");
        assert!(counters.global_loads.distinct_sectors <= 5, "{what}: {counters}");
    };
    let (queue, properties) = (device.queue(), device.queue().properties());
    let (x, index) = (device.upload(&problem.x), device.upload(problem.index.as_ref().unwrap()));
    let plan = lora_shrink::plan(&table.shrink_shape(40, DType::BF16), properties).unwrap();
    let mut v = device.alloc(plan.v_len());
    plan.run(queue, x.view(), &table, Some(index.view()), v.view_mut()).unwrap();
    idle("shrink");
    assert!(v.download().iter().all(|v: &f32| v.to_bits() == 0));
    let before: Vec<bf16> = Numbers::new(3).many(40 * N);
    let mut y = device.upload(&before);
    let plan = lora_expand::plan(&expand_shape::<bf16, bf16>(40, N), properties).unwrap();
    let branch = LowRank { adapters: &table, index: Some(index.view()), v: v.view() };
    plan.run(queue, &branch, y.view_mut()).unwrap();
    idle("expand");
    assert_eq!(device.counters().unwrap().global_stores.bytes, 0);
    assert!(same(&before, &y.download()));
}

/// Few adapters make few groups of tokens, and get few blocks.
#[test]
fn one_adapter_takes_few_blocks() {
    let device = Device::emulator();
    let problem = Problem { index: None, ..Problem::<bf16>::dense(32, 256, 64).with_adapters(&[16]) };
    let factors = Factors::new(&device, problem.adapters.as_ref().unwrap());
    let mut entries = device.alloc(AdapterTable::<bf16>::bytes(1));
    let table = factors.table(&device, 64, 256, &mut entries).unwrap();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let x = device.upload(&problem.x);
    let plan = lora_shrink::plan(&table.shrink_shape(32, DType::BF16), properties).unwrap();
    let mut v = device.alloc(plan.v_len());
    plan.run(queue, x.view(), &table, None, v.view_mut()).unwrap();
    assert_eq!((plan.slots, device.counters().unwrap().blocks), (32, 5 * plan.parts as u64));
    let plan = lora_expand::plan(&expand_shape::<bf16, bf16>(32, 256), properties).unwrap();
    let mut y = device.upload(&[bf16::ONE; 32 * 256]);
    plan.run(queue, &LowRank { adapters: &table, index: None, v: v.view() }, y.view_mut()).unwrap();
    assert_eq!((plan.slots, device.counters().unwrap().blocks), (32, 5 * 2));
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let factors = device.upload(&[bf16::ONE; 96]);
    let mut buffer = device.alloc(AdapterTable::<bf16>::bytes(8));
    let view = |rows: usize| AdapterView {
        lora_a: factors.slice(..16),
        lora_b: factors.slice(..rows * 2),
        rank: 2,
        scaling: 1.0,
    };
    let mut refused = |adapters: &[AdapterView<'_, bf16>], slices: &[usize], argument: &str, got: &str| {
        match AdapterTable::upload_slices(device.queue(), adapters, 8, slices, buffer.view_mut()) {
            Err(Error::Argument { argument: named, got: came, .. }) => {
                assert_eq!((named.as_str(), came.as_str()), (argument, got));
            }
            other => panic!("{argument}: {:?}", other.map(drop)),
        }
    };
    refused(&[view(5)], &[], "slices", "0");
    refused(&[view(5)], &[1; 17], "slices", "17");
    refused(&[view(5), view(7), view(5)], &[5, 7], "adapters", "3");
    refused(&[view(5), view(7), view(7), view(5)], &[5, 7], "adapters[2].lora_b", "14");
    refused(&[view(5), view(7)], &[1 << 30, 1 << 30], "n", &(1usize << 31).to_string());
    let mut buffer = device.alloc(AdapterTable::<bf16>::bytes(4));
    let views = [view(5), view(7), view(5), view(7)];
    let table = AdapterTable::upload_slices(device.queue(), &views, 8, &[5, 7], buffer.view_mut()).unwrap();
    assert_eq!((table.len(), table.slices(), table.ranks()), (2, &[5, 7][..], &[2; 4][..]));
}
