//! The merge kernel: bit for bit what the CPU reference writes, for any shape, direction and adapters.

mod on_device;

use half::{bf16, f16};
use lora_kernels::adapter::{Lora, Restored, Undo};
use lora_kernels::cuda::merge::{Direction, Shape, plan};
use lora_kernels::cuda::{AdapterView, MAX_DELTAS, UpdateView};
use lora_kernels::{DType, Element, Tensor, cpu};
use lora_kernels_devices::Device;
use on_device::{Adapter, Data, assert_refuses, assert_same_bits, elsewhere};

struct Case<'a> {
    size: [usize; 2],
    ranks: &'a [usize],
    row_scale: bool,
    fan_in_fan_out: bool,
}

fn same_as_reference<T: Element, A: Element>(device: &Device, data: &mut Data, case: &Case<'_>) {
    let Case { size: [n, k], ranks, row_scale, fan_in_fan_out } = *case;
    let what = format!("{}/{} [{n}, {k}] ranks {ranks:?}, {row_scale}, {fan_in_fan_out}", T::DTYPE, A::DTYPE);
    let weight = data.normal::<T>(n * k, 0.05);
    let adapters: Vec<_> =
        ranks.iter().map(|&rank| Adapter::<A>::random(device, data, [n, k], rank, 0.02)).collect();
    let scale: Vec<f32> = data.normal::<f32>(n, 0.1).iter().map(|x| 1.0 + x).collect();
    let (hosts, views): (Vec<_>, Vec<_>) = adapters.iter().map(|a| (a.host(), a.view())).unzip();
    let (device_weight, device_scale) = (device.upload(&weight), device.upload(&scale));
    let update = UpdateView { adapters: &views, row_scale: row_scale.then(|| device_scale.view()) };
    let reference =
        cpu::Update { adapters: &hosts, row_scale: row_scale.then_some(&scale[..]), fan_in_fan_out };

    for direction in [Direction::Merge, Direction::Unmerge] {
        let mut wanted = vec![T::from_f32(0.0); n * k];
        match direction {
            Direction::Merge => cpu::merge(&weight, [n, k], &reference, &mut wanted).unwrap(),
            Direction::Unmerge => cpu::unmerge(&weight, [n, k], &reference, &mut wanted).unwrap(),
        }
        let shape = Shape { n, k, fan_in_fan_out, dtype: T::DTYPE, direction };
        let plan = plan(&shape, device.queue().properties()).unwrap();
        let mut out = device.alloc::<T>(n * k);
        plan.run(device.queue(), device_weight.view(), &update, out.view_mut()).unwrap();
        assert_same_bits(&out.download(), &wanted, &format!("{what} {direction:?}"));
        let mut in_place = device.upload(&weight);
        plan.run_in_place(device.queue(), in_place.view_mut(), &update).unwrap();
        assert_same_bits(&in_place.download(), &wanted, &format!("{what} {direction:?} in place"));
    }
}

/// Sizes below, at and above those of a thread's piece and of a tile, with rows that are aligned and rows that are not.
const SIZES: [[usize; 2]; 9] =
    [[1, 1], [3, 5], [5, 8], [64, 128], [65, 136], [63, 127], [130, 264], [1, 300], [257, 7]];

fn shapes<T: Element, A: Element>(device: &Device, seed: u64) {
    let mut data = Data(seed);
    for size in SIZES {
        for fan_in_fan_out in [false, true] {
            for row_scale in [false, true] {
                same_as_reference::<T, A>(
                    device,
                    &mut data,
                    &Case { size, ranks: &[5], row_scale, fan_in_fan_out },
                );
            }
        }
    }
}

#[test]
fn any_shape_of_f32() {
    for device in Device::for_each_target() {
        shapes::<f32, f32>(&device, 1);
    }
}

#[test]
fn any_shape_of_f16() {
    for device in Device::for_each_target() {
        shapes::<f16, f16>(&device, 2);
        shapes::<f16, f32>(&device, 3);
    }
}

#[test]
fn any_shape_of_bf16() {
    for device in Device::for_each_target() {
        shapes::<bf16, bf16>(&device, 4);
        shapes::<bf16, f32>(&device, 5);
    }
}

#[test]
fn any_ranks_and_any_number_of_adapters() {
    let (device, mut data) = (Device::best(), Data(6));
    let eight = [1, 2, 3, 16, 17, 0, 8, 4];
    assert_eq!(eight.len(), MAX_DELTAS);
    for ranks in
        [&[][..], &[0], &[1], &[15], &[16], &[17], &[64], &[200], &[0, 0], &[0, 3], &[16, 16], &eight]
    {
        for row_scale in [false, true] {
            let case = Case { size: [70, 72], ranks, row_scale, fan_in_fan_out: false };
            same_as_reference::<bf16, f32>(&device, &mut data, &case);
        }
    }
}

#[test]
fn an_empty_weight_is_merged() {
    let (device, mut data) = (Device::best(), Data(7));
    for size in [[0, 8], [8, 0]] {
        same_as_reference::<f32, f32>(
            &device,
            &mut data,
            &Case { size, ranks: &[2], row_scale: true, fan_in_fan_out: false },
        );
    }
}

#[test]
fn bad_arguments_are_named() {
    let (device, mut data) = (Device::best(), Data(8));
    let properties = device.queue().properties();
    let shape = Shape { n: 6, k: 8, fan_in_fan_out: false, dtype: DType::F32, direction: Direction::Merge };
    assert_refuses(plan(&Shape { n: 1 << 31, ..shape }, properties), "n");
    assert_refuses(plan(&Shape { k: 1 << 31, ..shape }, properties), "k");
    let plan = plan(&shape, properties).unwrap();
    let adapter = Adapter::<f32>::random(&device, &mut data, [6, 8], 4, 1.0);
    let (good, weight, scale) = (adapter.view(), device.upload(&[1.0f32; 52]), device.upload(&[1.0f32; 7]));
    let mut out = device.upload(&[7.0f32; 52]);
    let mut run = |weight, adapters: &[_], row_scale, range| {
        plan.run::<f32, f32>(
            device.queue(),
            weight,
            &UpdateView { adapters, row_scale },
            out.slice_mut(range),
        )
    };
    assert_refuses(run(weight.slice(..47), &[good], None, 0..48), "weight");
    assert_refuses(run(weight.slice(1..49), &[good], None, 0..48), "weight");
    assert_refuses(run(elsewhere(weight.slice(..48)), &[good], None, 0..48), "weight");
    assert_refuses(run(weight.slice(..48), &[good], None, 0..49), "out");
    assert_refuses(run(weight.slice(..48), &[good], None, 1..49), "out");
    assert_refuses(run(weight.slice(..48), &[good], Some(scale.view()), 0..48), "row_scale");
    assert_refuses(run(weight.slice(..48), &[good; MAX_DELTAS + 1], None, 0..48), "adapters");
    let mut refuses = |change: &dyn Fn(&mut lora_kernels::cuda::AdapterView<'_, f32>), argument: &str| {
        let mut bad = good;
        change(&mut bad);
        assert_refuses(run(weight.slice(..48), &[good, bad], None, 0..48), argument);
    };
    refuses(&|a| a.rank = 5, "adapters[1].lora_a");
    refuses(&|a| a.lora_b = a.lora_a, "adapters[1].lora_b");
    refuses(&|a| a.lora_a = elsewhere(a.lora_a), "adapters[1].lora_a");
    refuses(&|a| a.scaling = f32::NAN, "adapters[1].scaling");
    let halves = device.upload(&[f16::ONE; 48]);
    let mut half_out = device.upload(&[f16::ONE; 48]);
    let update = UpdateView { adapters: &[good], row_scale: None };
    assert_refuses(plan.run(device.queue(), halves.view(), &update, half_out.view_mut()), "weight");
    assert_eq!(out.download(), [7.0; 52], "nothing was written");
}

/// Every weight comes in and goes out once, in whole sectors; the factors are read once per tile; and the products' loop
/// meets no bank conflict.
#[test]
fn memory_is_touched_once() {
    let (device, mut data) = (Device::emulator(), Data(9));
    let (n, k, rank) = (256, 512, 16);
    let adapter = Adapter::<bf16>::random(&device, &mut data, [n, k], rank, 0.1);
    let shape = Shape { n, k, fan_in_fan_out: false, dtype: DType::BF16, direction: Direction::Merge };
    let plan = plan(&shape, device.queue().properties()).unwrap();
    let weight = device.upload(&data.normal::<bf16>(n * k, 1.0));
    let mut out = device.alloc::<bf16>(n * k);
    let update = UpdateView { adapters: &[adapter.view()], row_scale: None };
    plan.run(device.queue(), weight.view(), &update, out.view_mut()).unwrap();
    let counters = device.counters().unwrap();
    let (weights, factors) = (n * k * 2, rank * (n + k) * 2);
    assert_eq!(counters.global_loads.distinct_sectors as usize * 32, weights + factors);
    assert_eq!(counters.global_stores.sectors as usize * 32, weights);
    let tiles = (n / 64) * (k / 128);
    assert_eq!(counters.global_loads.bytes as usize, weights + tiles * rank * (64 + 128) * 2);
    assert_eq!(counters.shared_loads.conflicts, 0);
    assert_eq!(counters.local_accesses, 0);
}

/// A record from the host undoes what a kernel has merged, to the bit.
#[test]
fn what_a_kernel_has_merged_is_undone() {
    let (device, mut data) = (Device::best(), Data(10));
    let (n, k, rank) = (70, 72, 3);
    let (lora_a, lora_b) = (data.normal::<f32>(rank * k, 1.0), data.normal::<f32>(n * rank, 0.02));
    let elements = data.normal::<bf16>(n * k, 0.05);
    let weight = Tensor::from_f32([n, k], &bf16_to_f32(&elements), DType::BF16).unwrap();
    let tensor = |shape, values: &[f32]| Tensor::from_f32(shape, values, DType::F32).unwrap();
    let lora = Lora::new(tensor([rank, k], &lora_a), tensor([n, rank], &lora_b), 0.5).unwrap().into();

    let (device_a, device_b) = (device.upload(&lora_a), device.upload(&lora_b));
    let view = AdapterView { lora_a: device_a.view(), lora_b: device_b.view(), rank, scaling: 0.5 };
    let shape = Shape { n, k, fan_in_fan_out: false, dtype: DType::BF16, direction: Direction::Merge };
    let plan = plan(&shape, device.queue().properties()).unwrap();
    let mut in_place = device.upload(&elements);
    let update = UpdateView { adapters: &[view], row_scale: None };
    plan.run_in_place(device.queue(), in_place.view_mut(), &update).unwrap();
    let merged = Tensor::from_f32([n, k], &bf16_to_f32(&in_place.download()), DType::BF16).unwrap();
    assert_ne!(merged, weight);
    let undo = Undo::record(&[&lora], &weight, &merged).unwrap();
    assert_eq!(undo.restore(&[&lora], &merged).unwrap(), Restored::Dense(weight));
    assert!(undo.as_bytes().len() < n * k / 4, "{} bytes", undo.as_bytes().len());
}

fn bf16_to_f32(elements: &[bf16]) -> Vec<f32> {
    elements.iter().map(|v| v.to_f32()).collect()
}
