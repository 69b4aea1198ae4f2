//! Every operation can be recorded in a CUDA graph: recording runs nothing, and every replay gives the bits of a plain call. On
//! the emulator a list of launches stands in for the graph.

mod on_device;

use std::cell::RefCell;
use std::fmt::Debug;

use bytemuck::Pod;
use half::bf16;
use lora_kernels::DType;
use lora_kernels::cuda::absmax_quantize::{self, NestedViewMut};
use lora_kernels::cuda::matmul::{self, Extras, Weight, WeightFormat};
use lora_kernels::cuda::{
    AdapterTable, LowRank, Nf4ViewMut, UpdateView, dora_scale, expert_groups, expert_matmul, lora_expand,
    lora_shrink, matmul_transposed, merge, nf4_dequantize, nf4_merge, nf4_quantize,
};
use lora_kernels::nf4::{Codebook, DYNAMIC_MAP, Nesting, Nf4Matrix, block_count, packed_len};
use lora_kernels_devices::{Buffer, Device};
use on_device::{Adapter, Data, Nf4Buffers};

const N: usize = 96;
const K: usize = 256;
const BLOCKSIZE: usize = 64;

/// Asserts that `call`, recorded and replayed twice, makes of `before` what it makes of it at once.
fn replays<T: Pod + PartialEq + Debug>(
    device: &Device,
    what: &str,
    before: &[T],
    call: impl Fn(&mut Buffer<T>),
) {
    let mut out = device.upload(before);
    call(&mut out);
    let expected = out.download();
    assert_ne!(expected, before, "{what} does nothing");
    out.write(before);
    let graph = device.capture(|| call(&mut out));
    assert_eq!(out.download(), before, "{what} ran while it was recorded");
    for replay in 0..2 {
        out.write(before);
        // SAFETY: `out` and what the call reads are alive, and nobody borrows `out`.
        unsafe { graph.launch() };
        assert_eq!(out.download(), expected, "{what}, replay {replay}");
    }
}

fn weights(data: &mut Data) -> (Vec<bf16>, Nf4Matrix) {
    weights_of(data, [N, K])
}

fn weights_of(data: &mut Data, shape: [usize; 2]) -> (Vec<bf16>, Nf4Matrix) {
    let dense = data.normal::<bf16>(shape[0] * shape[1], 0.05);
    let nf4 = Nf4Matrix::quantize(&dense, shape, BLOCKSIZE, &Codebook::nf4(), Nesting::Nested).unwrap();
    (dense, nf4)
}

#[test]
fn formats() {
    for device in Device::for_each_target() {
        let mut data = Data(1);
        let (queue, properties, nf4) = (device.queue(), device.queue().properties(), Codebook::nf4());
        let (dense, matrix) = weights(&mut data);
        let (numel, blocks) = (N * K, block_count(N * K, BLOCKSIZE));
        let x = device.upload(&dense);

        let shape = nf4_quantize::Shape { numel, blocksize: BLOCKSIZE, dtype: DType::BF16 };
        let quantize = nf4_quantize::plan(&shape, &nf4, properties).unwrap();
        let absmax = RefCell::new(device.alloc(blocks));
        replays(&device, "nf4_quantize, codes", &vec![0u8; packed_len(numel)], |packed| {
            let mut absmax = absmax.borrow_mut();
            let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
            quantize.run(queue, x.view(), out).unwrap();
        });
        let packed = RefCell::new(device.alloc(packed_len(numel)));
        replays(&device, "nf4_quantize, absmax", &vec![0f32; blocks], |absmax| {
            let mut packed = packed.borrow_mut();
            let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
            quantize.run(queue, x.view(), out).unwrap();
        });

        let nest = absmax_quantize::plan(blocks, properties).unwrap();
        let map = device.upload(&DYNAMIC_MAP);
        let workspace = RefCell::new(device.alloc(nest.workspace_bytes()));
        let scratch = RefCell::new((device.alloc(blocks.div_ceil(256)), device.alloc(1)));
        let absmax = absmax.into_inner();
        replays(&device, "absmax_quantize", &vec![0u8; blocks], |q| {
            let (nested, offset) = &mut *scratch.borrow_mut();
            let out = NestedViewMut { q: q.view_mut(), absmax: nested.view_mut(), offset: offset.view_mut() };
            nest.run(queue, absmax.view(), map.view(), workspace.borrow_mut().view_mut(), out).unwrap();
        });

        let shape = nf4_dequantize::Shape { numel, blocksize: BLOCKSIZE, dtype: DType::BF16 };
        let dequantize = nf4_dequantize::plan(&shape, properties).unwrap();
        let buffers = Nf4Buffers::upload(&device, &matrix);
        replays(&device, "nf4_dequantize", &vec![bf16::ONE; numel], |out| {
            dequantize.run(queue, &buffers.view(), out.view_mut()).unwrap();
        });
    }
}

#[test]
fn merges() {
    for device in Device::for_each_target() {
        let mut data = Data(2);
        let (queue, properties) = (device.queue(), device.queue().properties());
        let (dense, matrix) = weights(&mut data);
        let adapters = [Adapter::<bf16>::random(&device, &mut data, [N, K], 8, 0.02)];
        let views = [adapters[0].view()];
        let update = UpdateView { adapters: &views, row_scale: None };
        let (weight, buffers) = (device.upload(&dense), Nf4Buffers::upload(&device, &matrix));

        let shape = merge::Shape {
            n: N,
            k: K,
            fan_in_fan_out: false,
            dtype: DType::BF16,
            direction: merge::Direction::Merge,
        };
        let plan = merge::plan(&shape, properties).unwrap();
        replays(&device, "merge", &vec![bf16::ONE; N * K], |out| {
            plan.run(queue, weight.view(), &update, out.view_mut()).unwrap();
        });
        replays(&device, "merge in place", &dense, |out| {
            plan.run_in_place(queue, out.view_mut(), &update).unwrap();
        });

        let shape =
            |target| nf4_merge::Shape { n: N, k: K, blocksize: BLOCKSIZE, dtype: DType::BF16, target };
        let plan = nf4_merge::plan(&shape(nf4_merge::Target::Nf4), matrix.codebook(), properties).unwrap();
        let absmax = RefCell::new(device.alloc(block_count(N * K, BLOCKSIZE)));
        replays(&device, "nf4_merge", &vec![0u8; packed_len(N * K)], |packed| {
            let mut absmax = absmax.borrow_mut();
            let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
            plan.run(queue, &buffers.view(), &update, out).unwrap();
        });
        let target = nf4_merge::Target::Dense(DType::BF16);
        let plan = nf4_merge::plan(&shape(target), matrix.codebook(), properties).unwrap();
        replays(&device, "nf4_merge to a dense weight", &vec![bf16::ONE; N * K], |out| {
            plan.run_dense(queue, &buffers.view(), &update, out.view_mut()).unwrap();
        });

        let magnitude = device.upload(&data.normal::<f32>(N, 1.0));
        let shape = dora_scale::Shape { n: N, k: K, storage: dora_scale::Storage::Dense(DType::BF16) };
        let plan = dora_scale::plan(&shape, properties).unwrap();
        let workspace = RefCell::new(device.alloc(plan.workspace_bytes()));
        replays(&device, "dora_scale", &[0f32; N], |row_scale| {
            let workspace = &mut *workspace.borrow_mut();
            let (workspace, out) = (workspace.view_mut(), row_scale.view_mut());
            plan.run(queue, weight.view(), &views, magnitude.view(), workspace, out).unwrap();
        });
    }
}

/// Every kernel that a plan chooses for these numbers of tokens, with split sums too, and adapters in the same graph.
#[test]
fn products() {
    for device in Device::for_each_target() {
        products_of(&device, [96, 256], &[1, 2, 7, 12, 20, 40, 70]);
        assert!(products_of(&device, [40, 1024], &[20]) > 0, "no plan has split its sum");
        // In two passes.
        products_of(&device, [200, 200], &[20]);
        // The largest tiles.
        products_of(&device.with_multiprocessors(1), [160, 128], &[100, 200]);
    }
}

/// Returns how many plans have split a sum. The gradients by x are recorded, too.
fn products_of(device: &Device, [n, k]: [usize; 2], tokens: &[usize]) -> usize {
    let mut data = Data(3);
    let (queue, properties) = (device.queue(), device.queue().properties());
    let (dense, matrix) = weights_of(&mut data, [n, k]);
    let (weight, buffers) = (device.upload(&dense), Nf4Buffers::upload(device, &matrix));
    let adapters = [4, 16].map(|rank| Adapter::<bf16>::random(device, &mut data, [n, k], rank, 0.02));
    let views = adapters.each_ref().map(Adapter::view);
    let mut entries = device.alloc(AdapterTable::<bf16>::bytes(views.len()));
    let table = AdapterTable::upload(queue, &views, k, n, entries.view_mut()).unwrap();
    let mut splits = 0;
    for &tokens in tokens {
        let x = device.upload(&data.normal::<bf16>(tokens * k, 1.0));
        let index: Vec<i32> = (0..tokens as i32).map(|i| (i + 1) % 3 - 1).collect();
        let index = device.upload(&index);
        let shrink = lora_shrink::plan(&table.shrink_shape(tokens, DType::BF16), properties).unwrap();
        let v = RefCell::new(device.alloc(shrink.v_len()));
        let dy = device.upload(&data.normal::<bf16>(tokens * n, 1.0));
        let shape = table.shrink_transposed_shape(tokens, DType::BF16);
        let shrink_transposed = lora_shrink::plan_transposed(&shape, properties).unwrap();
        let u = RefCell::new(device.alloc(shrink_transposed.v_len()));
        for (format, weight) in [
            (WeightFormat::Nf4 { blocksize: BLOCKSIZE }, Weight::Nf4(buffers.view())),
            (WeightFormat::Dense, Weight::Dense(weight.view())),
        ] {
            let shape = matmul::Shape { tokens, n, k, dtype: DType::BF16, weight: format };
            let plan = matmul::plan(&shape, properties).unwrap();
            splits += usize::from(plan.splits > 1);
            let workspace = RefCell::new(device.alloc(plan.workspace_bytes));
            let what = format!("{:?} of {tokens} tokens", plan.kernel);
            replays(device, &what, &vec![bf16::ONE; tokens * n], |y| {
                shrink.run(queue, x.view(), &table, Some(index.view()), v.borrow_mut().view_mut()).unwrap();
                let v = v.borrow();
                let low_rank = LowRank { adapters: &table, index: Some(index.view()), v: v.view() };
                let extras = Extras { low_rank: Some(low_rank), overlap: true, ..Extras::default() };
                let workspace = &mut *workspace.borrow_mut();
                plan.run(queue, x.view(), &weight, &extras, y.view_mut(), workspace.view_mut()).unwrap();
            });

            let plan = matmul_transposed::plan(&shape, properties).unwrap();
            let workspace = RefCell::new(device.alloc(plan.workspace_bytes));
            let what = format!("{:?} of {tokens} tokens", plan.kernel);
            replays(device, &what, &vec![bf16::ONE; tokens * k], |dx| {
                let index = || Some(index.view());
                shrink_transposed.run(queue, dy.view(), &table, index(), u.borrow_mut().view_mut()).unwrap();
                let u = u.borrow();
                let low_rank = LowRank { adapters: &table, index: index(), v: u.view() };
                let workspace = &mut *workspace.borrow_mut();
                plan.run(queue, dy.view(), &weight, Some(&low_rank), dx.view_mut(), workspace.view_mut())
                    .unwrap();
            });
        }
        let shape = lora_expand::Shape { tokens, n, dtype: DType::BF16, adapter_dtype: DType::BF16 };
        let expand = lora_expand::plan(&shape, properties).unwrap();
        let v = v.into_inner();
        replays(device, "lora_expand", &data.normal::<bf16>(tokens * n, 1.0), |y| {
            let branch = LowRank { adapters: &table, index: Some(index.view()), v: v.view() };
            expand.run(queue, &branch, y.view_mut()).unwrap();
        });
    }
    splits
}

/// The router may choose others before every replay.
#[test]
fn experts() {
    for device in Device::for_each_target() {
        let mut data = Data(4);
        let (queue, properties) = (device.queue(), device.queue().properties());
        let (_, matrix) = weights(&mut data);
        let buffers = Nf4Buffers::upload(&device, &matrix);
        let (tokens, choices, experts) = (5, 2, 4);
        let shape = expert_matmul::Shape {
            tokens,
            choices,
            experts,
            n: N / experts,
            k: K,
            dtype: DType::BF16,
            weight: WeightFormat::Nf4 { blocksize: BLOCKSIZE },
        };
        let plan = expert_matmul::plan(&shape, properties).unwrap();
        let sort = expert_groups::plan(&plan.groups_shape(), properties).unwrap();
        let x = device.upload(&data.normal::<bf16>(tokens * K, 1.0));
        let mut expert = device.upload(&[0, 3, 1, 0, 3, 2, 0, 3, -1, 1]);
        let groups = RefCell::new(device.alloc(sort.len()));
        let weight = Weight::Nf4(buffers.view());
        let layer = |expert: &Buffer<i32>, y: &mut Buffer<bf16>| {
            let mut groups = groups.borrow_mut();
            let groups = sort.run(queue, expert.view(), groups.view_mut()).unwrap();
            plan.run::<_, bf16>(queue, x.view(), &weight, &groups, &Extras::default(), y.view_mut()).unwrap();
        };
        let before = vec![bf16::ONE; tokens * choices * N / experts];
        replays(&device, "expert_matmul", &before, |y| layer(&expert, y));

        let mut y = device.upload(&before);
        let graph = device.capture(|| layer(&expert, &mut y));
        expert.write(&[2, 2, 2, 1, -1, -1, 0, 0, 0, 3]);
        // SAFETY: all that the call reads and writes is alive, and nobody borrows `y`.
        unsafe { graph.launch() };
        let replayed = y.download();
        layer(&expert, &mut y);
        assert_eq!(replayed, y.download());
    }
}
