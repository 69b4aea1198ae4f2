//! The dequantise kernel: bit for bit what bitsandbytes and the CPU reference yield, on any shape and alignment.

mod fixtures;
mod on_device;

use fixtures::{Fixture, size, text};
use half::{bf16, f16};
use lora_kernels::cuda::nf4_dequantize::{Shape, plan};
use lora_kernels::cuda::{AbsmaxView, Nf4View};
use lora_kernels::nf4::{
    Absmax, BLOCKSIZES, Codebook, DYNAMIC_MAP, NestedAbsmax, Nf4Matrix, block_count, packed_len,
};
use lora_kernels::{DType, Element};
use lora_kernels_devices::Device;
use on_device::{Data, Nf4Buffers, assert_refuses, assert_same_bits, elsewhere};

fn dequantize<T: Element>(device: &Device, matrix: &Nf4Matrix) -> Vec<T> {
    let shape = Shape { numel: matrix.numel(), blocksize: matrix.blocksize(), dtype: T::DTYPE };
    let plan = plan(&shape, device.queue().properties()).unwrap();
    let weight = Nf4Buffers::upload(device, matrix);
    let mut out = device.alloc::<T>(matrix.numel());
    plan.run(device.queue(), &weight.view(), out.view_mut()).unwrap();
    out.download()
}

fn same_as_reference(device: &Device, matrix: &Nf4Matrix, what: &str) {
    assert_same_bits(&dequantize::<f32>(device, matrix), &matrix.dequantize(), what);
    assert_same_bits(&dequantize::<f16>(device, matrix), &matrix.dequantize(), what);
    assert_same_bits(&dequantize::<bf16>(device, matrix), &matrix.dequantize(), what);
}

/// Random codes with absmax of all sizes and kinds: ordinary, negative, denormal, huge, zero, infinite, NaN.
fn absmax(data: &mut Data, blocks: usize) -> Vec<f32> {
    let special = [0.0, -0.0, 1e-40, -1e-45, 3e38, 65520.0, f32::INFINITY, f32::NAN];
    let mut absmax = data.normal::<f32>(blocks, 1.0);
    for (absmax, special) in absmax.iter_mut().step_by(3).zip(special.iter().cycle()) {
        *absmax = *special;
    }
    absmax
}

fn nested(data: &mut Data, blocks: usize) -> Absmax {
    let (q, outer) = (data.bytes(blocks), data.normal(block_count(blocks, 256), 0.1));
    Absmax::Nested(NestedAbsmax::from_parts(q, outer, Box::new(DYNAMIC_MAP), 0.3, 256).unwrap())
}

/// Sizes at the edges of bytes, pieces of eight, groups, tiles.
const NUMELS: [usize; 14] = [1, 2, 7, 8, 9, 31, 255, 256, 1023, 1024, 1025, 8191, 8193, 20001];

fn any_size(device: &Device) {
    let mut data = Data(1);
    for numel in NUMELS {
        for blocksize in BLOCKSIZES {
            let blocks = block_count(numel, blocksize);
            for absmax in [Absmax::Plain(absmax(&mut data, blocks)), nested(&mut data, blocks)] {
                let (packed, nf4) = (data.bytes(packed_len(numel)), Codebook::nf4());
                let matrix =
                    Nf4Matrix::from_parts([numel], packed, absmax, blocksize, nf4, DType::F32).unwrap();
                same_as_reference(device, &matrix, &format!("{numel} elements in blocks of {blocksize}"));
            }
        }
    }
}

#[test]
fn any_size_and_block_is_decoded_as_on_the_cpu() {
    Device::for_each_target().iter().for_each(any_size);
}

#[test]
fn any_codebook_is_decoded() {
    let (device, mut data) = (Device::best(), Data(2));
    let custom = Codebook::from_values(std::array::from_fn(|code| (code as f32 - 9.3) * 1.7)).unwrap();
    for codebook in [Codebook::fp4(), custom] {
        let (packed, absmax) = ((0..=255).collect(), Absmax::Plain(data.normal(8, 1.0)));
        let matrix = Nf4Matrix::from_parts([512], packed, absmax, 64, codebook, DType::F32).unwrap();
        same_as_reference(&device, &matrix, "every byte");
    }
}

#[test]
fn stored_codes_become_what_bitsandbytes_makes_of_them() {
    let device = Device::best();
    for name in ["plain", "ragged", "special", "double_quant"] {
        let file = Fixture::open(&format!("nf4_blockwise/{name}"));
        for case in file.cases() {
            let key = |part: &str| format!("{}.{part}", text(case, "name"));
            let matrix = Nf4Matrix::from_parts(
                file.shape(&key("input")),
                file.get(&key("packed")),
                Absmax::Plain(file.get(&key("absmax"))),
                size(case, "blocksize"),
                Codebook::nf4(),
                file.dtype(&key("input")),
            );
            let matrix = matrix.unwrap();
            match matrix.dtype() {
                DType::F32 => assert_same_bits(
                    &dequantize::<f32>(&device, &matrix),
                    &file.get(&key("dequant")),
                    &key(""),
                ),
                DType::F16 => assert_same_bits(
                    &dequantize::<f16>(&device, &matrix),
                    &file.get(&key("dequant")),
                    &key(""),
                ),
                DType::BF16 => assert_same_bits(
                    &dequantize::<bf16>(&device, &matrix),
                    &file.get(&key("dequant")),
                    &key(""),
                ),
            }
        }
    }
}

#[test]
fn an_output_that_is_not_aligned_is_written_right() {
    let (device, mut data) = (Device::best(), Data(3));
    let numel = 5000;
    let absmax = Absmax::Plain(data.normal(block_count(numel, 64), 1.0));
    let packed = data.bytes(packed_len(numel));
    let matrix = Nf4Matrix::from_parts([numel], packed, absmax, 64, Codebook::nf4(), DType::BF16).unwrap();
    let plan =
        plan(&Shape { numel, blocksize: 64, dtype: DType::BF16 }, device.queue().properties()).unwrap();
    let weight = Nf4Buffers::upload(&device, &matrix);
    let mut out = device.upload(&vec![bf16::NEG_ONE; numel + 2]);
    plan.run(device.queue(), &weight.view(), out.slice_mut(1..=numel)).unwrap();
    let out = out.download();
    assert_same_bits(&out[1..=numel], &matrix.dequantize(), "the elements");
    assert_eq!([out[0], out[numel + 1]], [bf16::NEG_ONE; 2], "what lies beside");
}

#[test]
fn nothing_runs_for_no_elements() {
    let device = Device::best();
    let plan =
        plan(&Shape { numel: 0, blocksize: 64, dtype: DType::F32 }, device.queue().properties()).unwrap();
    assert_eq!(plan.kernel, None);
    let (packed, absmax, mut out) =
        (device.upload::<u8>(&[]), device.upload::<f32>(&[]), device.upload::<f32>(&[]));
    let codebook = Codebook::nf4();
    let absmax = AbsmaxView::Plain(absmax.view());
    let weight = Nf4View { packed: packed.view(), absmax, blocksize: 64, codebook: &codebook };
    plan.run(device.queue(), &weight, out.view_mut()).unwrap();
}

#[test]
fn bad_arguments_are_named() {
    let (device, mut data) = (Device::best(), Data(4));
    let properties = device.queue().properties();
    let shape = Shape { numel: 1000, blocksize: 64, dtype: DType::F32 };
    for blocksize in [0, 16, 48, 8192] {
        assert_refuses(plan(&Shape { blocksize, ..shape }, properties), "blocksize");
    }
    let absmax = nested(&mut data, 16);
    let matrix =
        Nf4Matrix::from_parts([1000], data.bytes(500), absmax, 64, Codebook::nf4(), DType::F32).unwrap();
    let buffers = Nf4Buffers::upload(&device, &matrix);
    let (weight, plan) = (buffers.view(), plan(&shape, properties).unwrap());
    let AbsmaxView::Nested(nested) = weight.absmax else { unreachable!() };
    let mut out = device.upload(&[7.0f32; 1001]);
    let mut refuses = |weight: Nf4View<'_>, argument: &str| {
        assert_refuses(plan.run(device.queue(), &weight, out.slice_mut(..1000)), argument);
    };
    let shorter = device.upload(&[0u8; 499]);
    refuses(Nf4View { packed: shorter.view(), ..weight }, "weight.packed");
    let shifted = device.upload(&[0u8; 508]);
    refuses(Nf4View { packed: shifted.slice(8..), ..weight }, "weight.packed");
    refuses(Nf4View { packed: elsewhere(weight.packed), ..weight }, "weight.packed");
    refuses(Nf4View { blocksize: 128, ..weight }, "weight.blocksize");
    let floats = device.upload(&[0f32; 15]);
    refuses(Nf4View { absmax: AbsmaxView::Plain(floats.view()), ..weight }, "weight.absmax");
    let mut refuses_nested = |change: &dyn Fn(&mut lora_kernels::cuda::NestedView<'_>), argument: &str| {
        let mut nested = nested;
        change(&mut nested);
        refuses(Nf4View { absmax: AbsmaxView::Nested(nested), ..weight }, argument);
    };
    refuses_nested(&|n| n.q = elsewhere(n.q), "weight.absmax.q");
    refuses_nested(&|n| n.blocksize = 8, "weight.absmax.absmax");
    refuses_nested(&|n| n.blocksize = 3, "weight.absmax.blocksize");
    refuses_nested(&|n| n.map = n.absmax, "weight.absmax.map");
    refuses_nested(&|n| n.offset = n.map, "weight.absmax.offset");
    assert_refuses(plan.run(device.queue(), &weight, out.view_mut()), "out");
    let mut halves = device.upload(&[f16::ZERO; 1000]);
    assert_refuses(plan.run(device.queue(), &weight, halves.view_mut()), "out");
    assert_eq!(out.download(), [7.0; 1001], "nothing was written");
}

/// 0.5 bytes and a 64th of an absmax come in for every element, and the element goes out: each sector once, and whole.
#[test]
fn memory_is_touched_once() {
    let device = Device::emulator();
    let mut data = Data(5);
    let numel = 1 << 16;
    let absmax = Absmax::Plain(data.normal(numel / 64, 1.0));
    let matrix =
        Nf4Matrix::from_parts([numel], data.bytes(numel / 2), absmax, 64, Codebook::nf4(), DType::BF16)
            .unwrap();
    for dtype in DType::ALL {
        match dtype {
            DType::F32 => drop(dequantize::<f32>(&device, &matrix)),
            DType::F16 => drop(dequantize::<f16>(&device, &matrix)),
            DType::BF16 => drop(dequantize::<bf16>(&device, &matrix)),
        }
        let counters = device.counters().unwrap();
        assert_eq!(
            counters.global_loads.distinct_sectors as usize * 32,
            numel / 2 + numel / 64 * 4,
            "{dtype}"
        );
        assert_eq!(counters.global_stores.sectors as usize * 32, numel * dtype.size(), "{dtype}");
        assert_eq!(counters.global_loads.sector_ratio(), 1.0, "{dtype}");
        assert_eq!((counters.local_accesses, counters.shared_loads.requests), (0, 0), "{dtype}");
        let per_weight = counters.total().threads as f64 / numel as f64;
        assert!(per_weight < 10.0, "{per_weight} PTX instructions per weight of {dtype}");
    }
}
