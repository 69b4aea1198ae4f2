//! The kernels that bring a merged weight to 4 bits again: bit for bit what the CPU reference writes, for any shape, block, codebook, scale and
//! rounding.

mod on_device;

use half::{bf16, f16};
use lora_kernels::adapter::Rounding;
use lora_kernels::cuda::nf4_requantize::{Plan, Shape, plan};
use lora_kernels::cuda::{AbsmaxView, Nf4View};
use lora_kernels::nf4::{Absmax, Codebook, Nesting, Nf4Matrix, block_count, nest, packed_len};
use lora_kernels::{DType, Element, Tensor, cpu};
use lora_kernels_devices::Device;
use on_device::{Data, Nf4Buffers, assert_refuses, assert_same_bits, elsewhere};

struct Case {
    size: [usize; 2],
    blocksize: usize,
    codebook: Codebook,
    nesting: Nesting,
    /// The delta, of the weight.
    share: f32,
}

impl Case {
    fn new(size: [usize; 2], blocksize: usize) -> Self {
        Self { size, blocksize, codebook: Codebook::nf4(), nesting: Nesting::Plain, share: 0.03 }
    }
}

const ROUNDINGS: [Rounding; 3] = [Rounding::Nearest, Rounding::Stochastic { seed: 77 }, Rounding::KeepGain];

/// Searches the scales, has them nested where the weight's are, and encodes by them in each way.
fn same_as_reference<T: Element>(device: &Device, data: &mut Data, case: &Case) {
    let Case { size: [n, k], blocksize, ref codebook, nesting, share } = *case;
    let what = format!("[{n}, {k}] in {}, blocks of {blocksize}, {nesting:?}", T::DTYPE);
    let spread = 0.05;
    let elements = Tensor::from_f32([n, k], &data.normal::<f32>(n * k, spread), T::DTYPE).unwrap();
    let before = Nf4Matrix::quantize_tensor(&elements, blocksize, codebook, nesting).unwrap();
    let delta = data.normal::<f32>(n * k, spread * share);
    let old = before.dequantize_tensor().to_f32();
    let wanted: Vec<f32> = old.iter().zip(&delta).map(|(w, d)| w + d).collect();
    let (queue, buffers, device_wanted) =
        (device.queue(), Nf4Buffers::upload(device, &before), device.upload(&wanted));

    let mut scales = vec![0.0; block_count(n * k, blocksize)];
    cpu::nf4_requantize_scales(&before, &wanted, &mut scales).unwrap();
    let mut absmax = device.alloc::<f32>(scales.len());
    let shape = Shape { n, k, blocksize, dtype: T::DTYPE, rounding: Rounding::Nearest };
    let first = plan(&shape, queue.properties()).unwrap();
    first.run_scales(queue, &buffers.view(), device_wanted.view(), absmax.view_mut()).unwrap();
    assert_same_bits(&absmax.download(), &scales, &what);

    let stored =
        if nesting == Nesting::Nested { Absmax::Nested(nest(&scales)) } else { Absmax::Plain(scales) };
    let shell = Nf4Matrix::from_parts(
        [n, k],
        before.packed().to_vec(),
        stored.clone(),
        blocksize,
        codebook.clone(),
        T::DTYPE,
    );
    let shell = Nf4Buffers::upload(device, &shell.unwrap());
    for rounding in ROUNDINGS {
        let mut codes = vec![0; packed_len(n * k)];
        cpu::nf4_requantize(&before, &wanted, &stored, rounding, &mut codes).unwrap();
        let plan = plan(&Shape { rounding, ..shape }, queue.properties()).unwrap();
        let mut packed = device.alloc::<u8>(codes.len());
        plan.run_codes(queue, &buffers.view(), device_wanted.view(), shell.view().absmax, packed.view_mut())
            .unwrap();
        assert_eq!(packed.download(), codes, "{what}, {rounding:?}");
    }
}

/// Blocks over many rows, tails of blocks and of pieces, several panels.
#[test]
fn any_shape_and_block() {
    for device in Device::for_each_target() {
        let mut data = Data(1);
        for size in [[1, 1], [7, 37], [33, 96], [65, 129], [3, 8192]] {
            for blocksize in [32, 64, 4096] {
                same_as_reference::<bf16>(&device, &mut data, &Case::new(size, blocksize));
            }
        }
    }
}

#[test]
fn several_panels() {
    let (device, mut data) = (Device::best(), Data(2));
    for (size, blocksize) in [([150, 1000], 64), ([2, 70_000], 128)] {
        same_as_reference::<bf16>(&device, &mut data, &Case::new(size, blocksize));
    }
}

#[test]
fn any_type_codebook_nesting_and_delta() {
    let (device, mut data) = (Device::best(), Data(3));
    for codebook in [Codebook::nf4(), Codebook::fp4()] {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            for share in [0.0, 1e-4, 0.3, 100.0] {
                let case = Case { codebook: codebook.clone(), nesting, share, ..Case::new([40, 130], 64) };
                same_as_reference::<f32>(&device, &mut data, &case);
                same_as_reference::<f16>(&device, &mut data, &case);
            }
        }
    }
}

/// Blocks of zeros, of denormals, of huge numbers, and with infinities: whatever comes out, it is the reference's for blocks that are finite.
#[test]
fn blocks_at_the_ends_of_the_range() {
    let device = Device::best();
    let (n, k, queue) = (6, 64, device.queue());
    let mut data = Data(4);
    let before =
        Nf4Matrix::quantize(&data.normal::<f32>(n * k, 1.0), [n, k], 64, &Codebook::nf4(), Nesting::Plain)
            .unwrap();
    let mut wanted = data.normal::<f32>(n * k, 1.0);
    for (row, size) in [0.0, 1e-40, 1e-30, 1e30, 1.0].into_iter().enumerate() {
        wanted[row * k..][..k].iter_mut().for_each(|x| *x *= size);
    }
    let (buffers, device_wanted) = (Nf4Buffers::upload(&device, &before), device.upload(&wanted));
    let mut scales = vec![0.0; n];
    cpu::nf4_requantize_scales(&before, &wanted, &mut scales).unwrap();
    let shape = Shape { n, k, blocksize: 64, dtype: DType::F32, rounding: Rounding::Nearest };
    let mut absmax = device.alloc::<f32>(n);
    plan(&shape, queue.properties())
        .unwrap()
        .run_scales(queue, &buffers.view(), device_wanted.view(), absmax.view_mut())
        .unwrap();
    assert_same_bits(&absmax.download(), &scales, "scales");
    let stored = Absmax::Plain(scales);
    for rounding in ROUNDINGS {
        let mut codes = vec![0; n * k / 2];
        cpu::nf4_requantize(&before, &wanted, &stored, rounding, &mut codes).unwrap();
        let mut packed = device.alloc::<u8>(codes.len());
        let plan = plan(&Shape { rounding, ..shape }, queue.properties()).unwrap();
        plan.run_codes(
            queue,
            &buffers.view(),
            device_wanted.view(),
            AbsmaxView::Plain(absmax.view()),
            packed.view_mut(),
        )
        .unwrap();
        assert_eq!(packed.download(), codes, "{rounding:?}");
    }
    // An element that is not finite leaves its block a NaN.
    wanted[70] = f32::INFINITY;
    let device_wanted = device.upload(&wanted);
    plan(&shape, queue.properties())
        .unwrap()
        .run_scales(queue, &buffers.view(), device_wanted.view(), absmax.view_mut())
        .unwrap();
    assert!(absmax.download()[1].is_nan());
}

/// Slabs of whole panels give the bits of the whole.
#[test]
fn slabs_make_no_difference() {
    let (device, mut data) = (Device::best(), Data(5));
    let (n, k, queue) = (96, 1024, device.queue());
    let before =
        Nf4Matrix::quantize(&data.normal::<f32>(n * k, 0.05), [n, k], 64, &Codebook::nf4(), Nesting::Plain)
            .unwrap();
    let wanted: Vec<f32> =
        before.dequantize::<f32>().iter().zip(data.normal::<f32>(n * k, 0.002)).map(|(w, d)| w + d).collect();
    let (mut whole, mut parts) = (vec![0; n * k / 2], Vec::new());
    cpu::nf4_requantize(&before, &wanted, before.absmax(), Rounding::KeepGain, &mut whole).unwrap();
    let (buffers, device_wanted) = (Nf4Buffers::upload(&device, &before), device.upload(&wanted));
    let view = buffers.view();
    let AbsmaxView::Plain(_) = view.absmax else { unreachable!() };
    let on_device::AbsmaxBuffers::Plain(absmax) = &buffers.absmax else { unreachable!() };
    for rows in [0..64, 64..96] {
        let (elements, len) = (rows.start * k..rows.end * k, rows.len() * k);
        let shape =
            Shape { n: rows.len(), k, blocksize: 64, dtype: DType::F32, rounding: Rounding::KeepGain };
        let plan = plan(&shape, queue.properties()).unwrap();
        assert_eq!(plan.panel_rows, 64);
        let part = AbsmaxView::Plain(absmax.slice(elements.start / 64..elements.end / 64));
        let slab = Nf4View {
            packed: buffers.packed.slice(elements.start / 2..elements.end / 2),
            absmax: part,
            ..view
        };
        let mut packed = device.alloc::<u8>(len / 2);
        plan.run_codes(queue, &slab, device_wanted.slice(elements), part, packed.view_mut()).unwrap();
        parts.extend(packed.download());
    }
    assert_eq!(parts, whole);
}

#[test]
fn an_empty_weight_is_encoded() {
    let (device, mut data) = (Device::best(), Data(6));
    for size in [[0, 8], [8, 0]] {
        same_as_reference::<f32>(&device, &mut data, &Case::new(size, 64));
    }
}

#[test]
fn bad_arguments_are_named() {
    let (device, mut data) = (Device::best(), Data(7));
    let (queue, properties) = (device.queue(), device.queue().properties());
    let shape = Shape { n: 4, k: 64, blocksize: 64, dtype: DType::F32, rounding: Rounding::Nearest };
    assert_refuses(plan(&Shape { blocksize: 65, ..shape }, properties), "blocksize");
    assert_refuses(plan(&Shape { n: 1 << 31, ..shape }, properties), "n");
    assert_refuses(plan(&Shape { k: 1 << 31, ..shape }, properties), "k");
    let plan = plan(&shape, properties).unwrap();
    let elements = data.normal::<f32>(256, 1.0);
    let matrix = |blocksize| {
        Nf4Matrix::quantize(&elements, [4, 64], blocksize, &Codebook::nf4(), Nesting::Plain).unwrap()
    };
    let (buffers, other) =
        (Nf4Buffers::upload(&device, &matrix(64)), Nf4Buffers::upload(&device, &matrix(32)));
    let wanted = device.upload(&data.normal::<f32>(260, 1.0));
    let (mut absmax, mut packed) = (device.upload(&[7.0f32; 5]), device.upload(&[7u8; 144]));
    let mut scales = |view: &Nf4View<'_>, from, len| {
        let plan: &Plan = &plan;
        plan.run_scales(queue, view, from, absmax.slice_mut(..len))
    };
    assert_refuses(scales(&other.view(), wanted.slice(..256), 4), "before.blocksize");
    assert_refuses(scales(&buffers.view(), wanted.slice(..255), 4), "wanted");
    assert_refuses(scales(&buffers.view(), wanted.slice(1..257), 4), "wanted");
    assert_refuses(scales(&buffers.view(), elsewhere(wanted.slice(..256)), 4), "wanted");
    assert_refuses(scales(&buffers.view(), wanted.slice(..256), 5), "absmax");
    let mut broken = buffers.view();
    broken.packed = other.packed.slice(..127);
    assert_refuses(scales(&broken, wanted.slice(..256), 4), "before.packed");
    let known = device.upload(&[1.0f32; 5]);
    let mut codes = |len, range| {
        let absmax = AbsmaxView::Plain(known.slice(..len));
        plan.run_codes(queue, &buffers.view(), wanted.slice(..256), absmax, packed.slice_mut(range))
    };
    assert_refuses(codes(3, 0..128), "absmax");
    assert_refuses(codes(4, 0..127), "packed");
    assert_refuses(codes(4, 8..136), "packed");
    assert_eq!((absmax.download(), packed.download()), (vec![7.0; 5], vec![7; 144]));
}
