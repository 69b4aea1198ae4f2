//! The quantise kernel: bit for bit what the CPU reference stores, which is checked against bitsandbytes elsewhere.

mod fixtures;
mod on_device;

use fixtures::{Fixture, size, text};
use half::{bf16, f16};
use lora_kernels::cuda::nf4_quantize::{Shape, plan};
use lora_kernels::cuda::{Nf4ViewMut, Search};
use lora_kernels::nf4::{self, BLOCKSIZES, Codebook, block_count, packed_len};
use lora_kernels::{DType, Element};
use lora_kernels_devices::Device;
use on_device::{Data, assert_refuses, assert_same_bits, elsewhere};

/// Codes and absmax from the device and from the reference agree. `skip` elements before `x` shift its alignment.
fn same_as_reference<T: Element>(
    device: &Device,
    x: &[T],
    blocksize: usize,
    codebook: &Codebook,
    skip: usize,
) {
    let what = format!("{} elements of {} in blocks of {blocksize}, shifted by {skip}", x.len(), T::DTYPE);
    let mut wanted = (vec![0; packed_len(x.len())], vec![0.0; block_count(x.len(), blocksize)]);
    nf4::quantize(x, blocksize, codebook, &mut wanted.0, &mut wanted.1).unwrap();
    let shape = Shape { numel: x.len(), blocksize, dtype: T::DTYPE };
    let plan = plan(&shape, codebook, device.queue().properties()).unwrap();
    let shifted: Vec<T> = std::iter::repeat_n(T::from_f32(1e4), skip).chain(x.iter().copied()).collect();
    let buffer = device.upload(&shifted);
    let (mut packed, mut absmax) = (device.alloc::<u8>(wanted.0.len()), device.alloc::<f32>(wanted.1.len()));
    let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
    plan.run(device.queue(), buffer.slice(skip..), out).unwrap();
    assert_same_bits(&absmax.download(), &wanted.1, &what);
    let codes = packed.download();
    let wrong = codes.iter().zip(&wanted.0).position(|(our, their)| our != their);
    assert_eq!(wrong.map(|byte| (byte, codes[byte], wanted.0[byte])), None, "{what}");
}

/// Sizes at the edges of bytes, pieces of eight, chunks, tiles, and beyond what the blocks of threads take in one turn.
const NUMELS: [usize; 12] = [1, 2, 7, 8, 9, 255, 257, 511, 4095, 4096, 4097, 13001];

fn any_size<T: Element>(device: &Device) {
    let mut data = Data(1);
    for numel in NUMELS {
        for blocksize in BLOCKSIZES {
            same_as_reference(device, &data.normal::<T>(numel, 0.05), blocksize, &Codebook::nf4(), 0);
        }
    }
}

#[test]
fn any_size_and_block_of_f32() {
    Device::for_each_target().iter().for_each(any_size::<f32>);
}

#[test]
fn any_size_and_block_of_f16() {
    Device::for_each_target().iter().for_each(any_size::<f16>);
}

#[test]
fn any_size_and_block_of_bf16() {
    Device::for_each_target().iter().for_each(any_size::<bf16>);
}

/// More tiles than blocks of threads, so that these walk.
#[test]
fn blocks_of_threads_walk_over_tiles() {
    let (device, mut data) = (Device::best(), Data(2));
    let properties = device.queue().properties();
    let numel = 4096 * (properties.sm_count as usize * 5 * 2 + 3) + 77;
    let few =
        plan(&Shape { numel, blocksize: 2048, dtype: DType::BF16 }, &Codebook::nf4(), properties).unwrap();
    assert!((few.blocks as usize) < numel / 4096);
    same_as_reference(&device, &data.normal::<bf16>(numel, 1.0), 2048, &Codebook::nf4(), 0);
}

#[test]
fn x_that_is_not_aligned_is_read_right() {
    let (device, mut data) = (Device::best(), Data(3));
    for skip in 1..4 {
        same_as_reference(&device, &data.normal::<f32>(5001, 1.0), 64, &Codebook::nf4(), skip);
        same_as_reference(&device, &data.normal::<bf16>(5001, 1.0), 1024, &Codebook::nf4(), skip);
    }
}

/// Blocks of zeros (of either sign), denormals, huge numbers, NaN, infinities, and with numbers exactly on thresholds.
#[test]
fn special_blocks() {
    let (device, mut data) = (Device::best(), Data(4));
    let nf4 = Codebook::nf4();
    let mut x = vec![0.0f32; 64];
    x.extend([-0.0; 64]);
    for scale in [1e-45, 1e-41, 2e-38, 1e-30, 1.0, 1e30, 3e38] {
        x.extend(data.normal::<f32>(64, 0.1).iter().map(|v| v * scale));
    }
    for thresholds in [1.0, 0.5, 3.0] {
        x.extend(
            nf4.thresholds()
                .iter()
                .flat_map(|t| [t.next_down(), *t, t.next_up(), -t])
                .map(|t| t * thresholds),
        );
        x.extend([thresholds, -thresholds, 0.0, -0.0]);
    }
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut block = data.normal::<f32>(64, 1.0);
        block[17] = odd;
        x.extend(block);
    }
    x.extend(data.normal::<f32>(5, 1e-39));
    for blocksize in [64, 256, 512, 4096] {
        for codebook in [&nf4, &Codebook::fp4()] {
            same_as_reference(&device, &x, blocksize, codebook, 0);
            let halves: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
            same_as_reference(&device, &halves, blocksize, codebook, 0);
            let brains: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
            same_as_reference(&device, &brains, blocksize, codebook, 0);
        }
    }
}

/// A tail of one element in a byte with no second one: its low nibble is the code of zero, also beside a NaN.
#[test]
fn the_missing_nibble_is_zero() {
    let device = Device::best();
    for x in [[0.5f32], [f32::NAN]] {
        same_as_reference(&device, &x, 64, &Codebook::nf4(), 0);
        same_as_reference(&device, &x, 64, &Codebook::fp4(), 0);
    }
}

#[test]
fn any_codebook() {
    let (device, mut data) = (Device::best(), Data(5));
    let shuffled =
        Codebook::from_values(std::array::from_fn(|code| ((code * 7 % 16) as f32 - 6.0) / 9.0)).unwrap();
    let crowded =
        Codebook::from_values(std::array::from_fn(|code| (code as f32 / 15.0).powi(6) * 2.0 - 1.0)).unwrap();
    let even = Codebook::from_values(std::array::from_fn(|code| code as f32 / 7.5 - 1.0)).unwrap();
    assert_eq!(
        [&shuffled, &crowded, &even].map(Search::of),
        [Search::Counting, Search::Counting, Search::Binned]
    );
    for codebook in [shuffled, crowded, even, Codebook::fp4()] {
        same_as_reference(&device, &data.normal::<f32>(3001, 1.0), 128, &codebook, 0);
    }
}

/// Real inputs of bitsandbytes' reference data, with its own special rows.
#[test]
fn reference_inputs() {
    let device = Device::best();
    for name in ["plain", "ragged", "special", "double_quant"] {
        let file = Fixture::open(&format!("nf4_blockwise/{name}"));
        for case in file.cases() {
            let (input, blocksize) =
                (file.tensor(&format!("{}.input", text(case, "name"))), size(case, "blocksize"));
            let nf4 = Codebook::nf4();
            match input.dtype() {
                DType::F32 => {
                    same_as_reference(&device, input.as_slice::<f32>().unwrap(), blocksize, &nf4, 0)
                }
                DType::F16 => {
                    same_as_reference(&device, input.as_slice::<f16>().unwrap(), blocksize, &nf4, 0)
                }
                DType::BF16 => {
                    same_as_reference(&device, input.as_slice::<bf16>().unwrap(), blocksize, &nf4, 0)
                }
            }
        }
    }
}

#[test]
fn bad_arguments_are_named() {
    let device = Device::best();
    let (properties, nf4) = (device.queue().properties(), Codebook::nf4());
    let shape = Shape { numel: 1000, blocksize: 64, dtype: DType::F32 };
    for blocksize in [0, 16, 48, 8192] {
        assert_refuses(plan(&Shape { blocksize, ..shape }, &nf4, properties), "blocksize");
    }
    let plan = plan(&shape, &nf4, properties).unwrap();
    let x = device.upload(&[1.0f32; 1001]);
    let (mut packed, mut absmax) = (device.upload(&[9u8; 516]), device.upload(&[9.0f32; 17]));
    let mut run = |x, packed_range: std::ops::Range<usize>, blocks: usize| {
        let out = Nf4ViewMut { packed: packed.slice_mut(packed_range), absmax: absmax.slice_mut(..blocks) };
        plan.run::<f32>(device.queue(), x, out)
    };
    assert_refuses(run(x.view(), 0..500, 16), "x");
    assert_refuses(run(elsewhere(x.slice(1..)), 0..500, 16), "x");
    assert_refuses(run(x.slice(1..), 0..501, 16), "packed");
    assert_refuses(run(x.slice(1..), 8..508, 16), "packed");
    assert_refuses(run(x.slice(1..), 0..500, 17), "absmax");
    let halves = device.upload(&[f16::ONE; 1000]);
    let out = Nf4ViewMut { packed: packed.slice_mut(..500), absmax: absmax.slice_mut(..16) };
    assert_refuses(plan.run(device.queue(), halves.view(), out), "x");
    assert_eq!((packed.download(), absmax.download()), (vec![9; 516], vec![9.0; 17]), "nothing was written");
}

/// Elements, bytes and blocks beyond what 32 bits can count; compared in full.
#[test]
#[ignore = "wants 12 GB of memory on a GPU, and on the host"]
fn more_than_2_to_the_32_elements() {
    let (device, mut data) = (Device::cuda().unwrap(), Data(7));
    let pattern = data.normal::<bf16>(1_000_003, 1.0);
    let x: Vec<bf16> = pattern.iter().copied().cycle().take((1 << 32) + 4099).collect();
    same_as_reference(&device, &x, 64, &Codebook::nf4(), 0);
}

/// Every element comes in once, 0.5 bytes and a 64th of an absmax go out, and the table is read without conflicts.
#[test]
fn memory_is_touched_once() {
    let (device, mut data) = (Device::emulator(), Data(6));
    let numel = 1 << 17;
    same_as_reference(&device, &data.normal::<bf16>(numel, 1.0), 64, &Codebook::nf4(), 0);
    let counters = device.counters().unwrap();
    assert_eq!(counters.global_loads.sectors as usize * 32, numel * 2);
    assert_eq!(counters.global_stores.distinct_sectors as usize * 32, numel / 2 + numel / 64 * 4);
    assert_eq!((counters.shared_loads.conflicts, counters.shared_stores.conflicts), (0, 0));
    assert_eq!(counters.local_accesses, 0);
}
