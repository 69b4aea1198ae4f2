//! Double quantisation on the device: bit for bit what the CPU reference stores, the offset included.

mod fixtures;
mod on_device;

use fixtures::{Fixture, text};
use half::bf16;
use lora_kernels::DType;
use lora_kernels::cuda::absmax_quantize::{NestedViewMut, plan};
use lora_kernels::cuda::{AbsmaxView, NestedView, Nf4View, Nf4ViewMut, nf4_dequantize, nf4_quantize};
use lora_kernels::nf4::{Codebook, DYNAMIC_MAP, NESTED_BLOCKSIZE, Nesting, Nf4Matrix, block_count, nest};
use lora_kernels_devices::Device;
use on_device::{Data, assert_refuses, assert_same_bits, elsewhere};

/// `skip` elements before the absmax and the codes shift their alignment.
fn same_as_reference(device: &Device, absmax: &[f32], skip: usize) {
    let what = format!("{} absmax, shifted by {skip}", absmax.len());
    let wanted = nest(absmax);
    let plan = plan(absmax.len(), device.queue().properties()).unwrap();
    let shifted: Vec<f32> = std::iter::repeat_n(1e4, skip).chain(absmax.iter().copied()).collect();
    let (input, map) = (device.upload(&shifted), device.upload(&DYNAMIC_MAP));
    let mut workspace = device.alloc::<u8>(plan.workspace_bytes());
    let (mut q, mut nested) =
        (device.upload(&vec![99u8; absmax.len() + skip]), device.alloc(wanted.absmax().len()));
    let mut offset = device.alloc(1);
    let out = NestedViewMut { q: q.slice_mut(skip..), absmax: nested.view_mut(), offset: offset.view_mut() };
    plan.run(device.queue(), input.slice(skip..), map.view(), workspace.view_mut(), out).unwrap();
    assert_same_bits(&offset.download(), &[wanted.offset()], &what);
    assert_same_bits(&nested.download(), wanted.absmax(), &what);
    let q = q.download();
    assert_eq!(&q[skip..], wanted.q(), "{what}");
    assert!(q[..skip].iter().all(|&q| q == 99), "{what}: what lies before");
}

fn random(data: &mut Data, count: usize) -> Vec<f32> {
    data.normal::<f32>(count, 0.02).iter().map(|x| x.abs() + 0.01).collect()
}

#[test]
fn any_count_is_quantised_as_on_the_cpu() {
    for device in Device::for_each_target() {
        let mut data = Data(1);
        for count in [0, 1, 2, 7, 8, 9, 255, 256, 257, 1023, 1025, 2049, 10_000, 65_535, 65_537, 140_001] {
            same_as_reference(&device, &random(&mut data, count), 0);
        }
    }
}

#[test]
fn views_that_are_not_aligned_are_read_and_written_right() {
    let (device, mut data) = (Device::best(), Data(2));
    for skip in 1..4 {
        same_as_reference(&device, &random(&mut data, 1500), skip);
    }
}

/// All equal (nested blocks of zeros), far outliers, denormals, numbers halfway between two values of the map, and NaN.
#[test]
fn special_absmax() {
    let (device, mut data) = (Device::best(), Data(3));
    same_as_reference(&device, &[0.25; 700], 0);
    same_as_reference(&device, &[0.0; 300], 0);
    let mut outlier = random(&mut data, 600);
    outlier[3] = 3e38;
    same_as_reference(&device, &outlier, 0);
    let tiny: Vec<f32> = (0..400).map(|i| f32::from_bits(i * 7)).collect();
    same_as_reference(&device, &tiny, 0);
    // Symmetric about zero, so that the mean is zero, and reaching 1, so that nothing is rescaled.
    let halfway = DYNAMIC_MAP.windows(2).map(|w| (w[0] + w[1]) * 0.5).take(254);
    let ties: Vec<f32> = halfway.flat_map(|t| [t, -t]).chain([1.0, -1.0]).collect();
    let interleaved: Vec<f32> = ties.chunks(254).flat_map(|c| [c, &[1.0, -1.0]].concat()).collect();
    assert_eq!(nest(&interleaved).offset(), 0.0);
    same_as_reference(&device, &interleaved, 0);
    let mut nan = random(&mut data, 300);
    nan[299] = f32::NAN;
    same_as_reference(&device, &nan, 0);
}

/// The order shows where a sum lies next to the middle of two f32: neighbours first, the ones together move it upwards; each by
/// itself is lost beside 2^53.
#[test]
fn the_mean_is_summed_in_its_order() {
    let absmax = [2f32.powi(53), 2f32.powi(29), 1.0, 1.0];
    assert_eq!(nest(&absmax).offset(), 2f32.powi(51).next_up());
    same_as_reference(&Device::best(), &absmax, 0);
}

#[test]
fn reference_absmax() {
    let device = Device::best();
    for name in ["plain", "ragged", "double_quant"] {
        let file = Fixture::open(&format!("nf4_blockwise/{name}"));
        for case in file.cases() {
            same_as_reference(&device, &file.get::<f32>(&format!("{}.absmax", text(case, "name"))), 0);
        }
    }
}

/// Quantise, double-quantise, dequantise, one after the other on the queue: the host sees nothing of it before the end.
#[test]
fn a_round_trip_stays_on_the_device() {
    let (device, mut data) = (Device::best(), Data(4));
    let (queue, properties) = (device.queue(), device.queue().properties());
    let (numel, blocksize, nf4) = (30_011, 64, Codebook::nf4());
    let blocks = block_count(numel, blocksize);
    let x = data.normal::<bf16>(numel, 0.05);
    let (input, map) = (device.upload(&x), device.upload(&DYNAMIC_MAP));
    let (mut packed, mut absmax) = (device.alloc(numel.div_ceil(2)), device.alloc::<f32>(blocks));
    let shape = nf4_quantize::Shape { numel, blocksize, dtype: DType::BF16 };
    let quantize = nf4_quantize::plan(&shape, &nf4, properties).unwrap();
    let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
    quantize.run(queue, input.view(), out).unwrap();

    let nest = plan(blocks, properties).unwrap();
    let mut workspace = device.alloc::<u8>(nest.workspace_bytes());
    let (mut q, mut outer) = (device.alloc(blocks), device.alloc(block_count(blocks, NESTED_BLOCKSIZE)));
    let mut offset = device.alloc(1);
    let out = NestedViewMut { q: q.view_mut(), absmax: outer.view_mut(), offset: offset.view_mut() };
    nest.run(queue, absmax.view(), map.view(), workspace.view_mut(), out).unwrap();

    let nested = NestedView {
        q: q.view(),
        absmax: outer.view(),
        map: map.view(),
        offset: offset.view(),
        blocksize: NESTED_BLOCKSIZE,
    };
    let weight =
        Nf4View { packed: packed.view(), absmax: AbsmaxView::Nested(nested), blocksize, codebook: &nf4 };
    let shape = nf4_dequantize::Shape { numel, blocksize, dtype: DType::BF16 };
    let mut back = device.alloc::<bf16>(numel);
    nf4_dequantize::plan(&shape, properties).unwrap().run(queue, &weight, back.view_mut()).unwrap();
    let reference = Nf4Matrix::quantize(&x, [numel], blocksize, &nf4, Nesting::Nested).unwrap();
    assert_same_bits(&back.download(), &reference.dequantize::<bf16>(), "the round trip");
}

#[test]
fn bad_arguments_are_named() {
    let device = Device::best();
    let count = 600;
    let plan = plan(count, device.queue().properties()).unwrap();
    let (absmax, map) = (device.upload(&vec![1.0f32; count]), device.upload(&DYNAMIC_MAP));
    let mut workspace = device.alloc::<u8>(plan.workspace_bytes() + 4);
    let (mut q, mut nested, mut offset) =
        (device.upload(&[7u8; 601]), device.upload(&[7f32; 4]), device.upload(&[7f32; 2]));
    let bytes = plan.workspace_bytes();
    let mut run = |absmax, map, work: std::ops::Range<usize>, lengths: [usize; 3]| {
        let out = NestedViewMut {
            q: q.slice_mut(..lengths[0]),
            absmax: nested.slice_mut(..lengths[1]),
            offset: offset.slice_mut(..lengths[2]),
        };
        plan.run(device.queue(), absmax, map, workspace.slice_mut(work), out)
    };
    let fits = [count, block_count(count, 256), 1];
    assert_refuses(run(absmax.slice(1..), map.view(), 0..bytes, fits), "absmax");
    assert_refuses(run(elsewhere(absmax.view()), map.view(), 0..bytes, fits), "absmax");
    assert_refuses(run(absmax.view(), map.slice(1..), 0..bytes, fits), "map");
    assert_refuses(run(absmax.view(), map.view(), 0..bytes - 1, fits), "workspace");
    assert_refuses(run(absmax.view(), map.view(), 4..bytes + 4, fits), "workspace");
    assert_refuses(run(absmax.view(), map.view(), 0..bytes, [count + 1, 3, 1]), "q");
    assert_refuses(run(absmax.view(), map.view(), 0..bytes, [count, 4, 1]), "nested");
    assert_refuses(run(absmax.view(), map.view(), 0..bytes, [count, 3, 2]), "offset");
    assert_eq!(
        (q.download(), nested.download(), offset.download()),
        (vec![7; 601], vec![7.0; 4], vec![7.0; 2])
    );
}
