//! DoRA's scale on the device against f64, within what f32 sums in the kernel's order can lose.

mod on_device;

use half::{bf16, f16};
use lora_kernels::cuda::dora_scale::{Plan, Shape, Storage, plan};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element};
use lora_kernels_devices::{Buffer, Device};
use on_device::{Adapter, Data, Nf4Buffers, assert_refuses, elsewhere};

/// The scales of a row-major weight, and how far f32 may be from each.
///
/// With u = 2^-24: an element t = w + sum of s * delta is off by e <= sum over the adapters of (|s| r u |b| |a|) from the
/// products' chains and u |partial sum| from each addition. That moves the norm by the norm of e at most. Adding the squares
/// is a chain of 64 fused multiply-adds per lane and piece of 1024 columns, 4 levels of lanes, and the pieces: a relative
/// (68 + pieces) u on the sum, half of that on the root. Root and quotient round once each. All to first order, hence the
/// factor 1.01.
fn truth<A: Element>(
    weight: &[f64],
    [n, k]: [usize; 2],
    adapters: &[Adapter<A>],
    magnitude: &[f32],
) -> Vec<(f64, f64)> {
    let u = DType::F32.unit_roundoff();
    (0..n)
        .map(|row| {
            let (mut squares, mut errors) = (0.0, 0.0);
            for column in 0..k {
                let (mut t, mut error) = (weight[row * k + column], 0.0);
                for adapter in adapters {
                    let host = adapter.host();
                    let products = (0..host.rank).map(|r| {
                        host.lora_b[row * host.rank + r].to_f64() * host.lora_a[r * k + column].to_f64()
                    });
                    let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                    let scaling = f64::from(host.scaling);
                    t += scaling * sum;
                    error += scaling.abs() * host.rank as f64 * u * size + u * t.abs();
                }
                squares += t * t;
                errors += error * error;
            }
            let (scale, norm) = (f64::from(magnitude[row]) / squares.sqrt(), squares.sqrt());
            let pieces = k.div_ceil(1024) as f64;
            let relative = errors.sqrt() / norm + (68.0 + pieces) * u / 2.0 + 2.0 * u;
            (scale, scale.abs() * relative * 1.01)
        })
        .collect()
}

fn close(ours: &[f32], truth: &[(f64, f64)], what: &str) {
    assert_eq!(ours.len(), truth.len());
    for (row, (&our, &(scale, bound))) in ours.iter().zip(truth).enumerate() {
        let error = (f64::from(our) - scale).abs();
        assert!(error <= bound, "{what}: row {row} is {our}, not {scale}: off by {error}, {bound} allowed");
    }
}

/// The device's side of a run: scratch and result.
struct Run {
    workspace: Buffer<u8>,
    row_scale: Buffer<f32>,
}

impl Run {
    fn new(device: &Device, plan: &Plan) -> Self {
        Self { workspace: device.alloc(plan.workspace_bytes()), row_scale: device.alloc(plan.shape.n) }
    }
}

fn dense_is_right<T: Element, A: Element>(
    device: &Device,
    data: &mut Data,
    [n, k]: [usize; 2],
    ranks: &[usize],
) {
    let what = format!("{}/{} [{n}, {k}] ranks {ranks:?}", T::DTYPE, A::DTYPE);
    let (weight, magnitude) = (data.normal::<T>(n * k, 0.05), data.normal::<f32>(n, 1.0));
    let adapters: Vec<_> =
        ranks.iter().map(|&r| Adapter::<A>::random(device, data, [n, k], r, 0.02)).collect();
    let views: Vec<_> = adapters.iter().map(Adapter::view).collect();
    let shape = Shape { n, k, storage: Storage::Dense(T::DTYPE) };
    let plan = plan(&shape, device.queue().properties()).unwrap();
    let (device_weight, device_magnitude) = (device.upload(&weight), device.upload(&magnitude));
    let mut run = Run::new(device, &plan);
    plan.run(
        device.queue(),
        device_weight.view(),
        &views,
        device_magnitude.view(),
        run.workspace.view_mut(),
        run.row_scale.view_mut(),
    )
    .unwrap();
    let wide: Vec<f64> = weight.iter().map(|w| w.to_f64()).collect();
    close(&run.row_scale.download(), &truth(&wide, [n, k], &adapters, &magnitude), &what);
}

fn nf4_is_right<T: Element>(
    device: &Device,
    data: &mut Data,
    [n, k]: [usize; 2],
    blocksize: usize,
    nesting: Nesting,
) {
    let what = format!("NF4 of {} [{n}, {k}], blocks of {blocksize}, {nesting:?}", T::DTYPE);
    let values = data.normal::<T>(n * k, 0.05);
    let weight = Nf4Matrix::quantize(&values, [n, k], blocksize, &Codebook::nf4(), nesting).unwrap();
    let magnitude = data.normal::<f32>(n, 1.0);
    let adapters = [Adapter::<f32>::random(device, data, [n, k], 6, 0.02)];
    let storage = Storage::Nf4 { blocksize, dtype: T::DTYPE };
    let plan = plan(&Shape { n, k, storage }, device.queue().properties()).unwrap();
    let (buffers, device_magnitude) = (Nf4Buffers::upload(device, &weight), device.upload(&magnitude));
    let mut run = Run::new(device, &plan);
    plan.run_nf4(
        device.queue(),
        &buffers.view(),
        &[adapters[0].view()],
        device_magnitude.view(),
        run.workspace.view_mut(),
        run.row_scale.view_mut(),
    )
    .unwrap();
    let wide: Vec<f64> = weight.dequantize::<T>().iter().map(|w| w.to_f64()).collect();
    close(&run.row_scale.download(), &truth(&wide, [n, k], &adapters, &magnitude), &what);
}

const SIZES: [[usize; 2]; 9] =
    [[1, 1], [3, 5], [5, 8], [64, 128], [65, 136], [2, 1024], [70, 1032], [3, 2500], [257, 7]];

#[test]
fn any_shape_of_a_dense_weight() {
    for device in Device::for_each_target() {
        let mut data = Data(1);
        for size in SIZES {
            dense_is_right::<f32, f32>(&device, &mut data, size, &[4]);
            dense_is_right::<f16, f32>(&device, &mut data, size, &[17]);
            dense_is_right::<bf16, bf16>(&device, &mut data, size, &[4, 0, 20]);
        }
        dense_is_right::<f32, f32>(&device, &mut data, [9, 40], &[]);
    }
}

#[test]
fn any_shape_of_a_4_bit_weight() {
    for device in Device::for_each_target() {
        let mut data = Data(2);
        for (size, nesting) in
            SIZES.into_iter().flat_map(|size| [(size, Nesting::Plain), (size, Nesting::Nested)])
        {
            nf4_is_right::<bf16>(&device, &mut data, size, 64, nesting);
            nf4_is_right::<f16>(&device, &mut data, size, 32, nesting);
            nf4_is_right::<f32>(&device, &mut data, size, 4096, nesting);
        }
    }
}

/// A row's bits do not depend on the rows beside it.
#[test]
fn rows_are_independent() {
    let (device, mut data) = (Device::best(), Data(3));
    let (n, k) = (70, 1500);
    let (weight, magnitude) = (data.normal::<f32>(n * k, 0.05), data.normal::<f32>(n, 1.0));
    let scale = |first: usize, rows: usize| {
        let plan =
            plan(&Shape { n: rows, k, storage: Storage::Dense(DType::F32) }, device.queue().properties())
                .unwrap();
        let (w, m) =
            (device.upload(&weight[first * k..][..rows * k]), device.upload(&magnitude[first..][..rows]));
        let mut run = Run::new(&device, &plan);
        plan.run::<f32, f32>(
            device.queue(),
            w.view(),
            &[],
            m.view(),
            run.workspace.view_mut(),
            run.row_scale.view_mut(),
        )
        .unwrap();
        run.row_scale.download()
    };
    let all = scale(0, n);
    assert_eq!(scale(37, 2), all[37..39]);
    assert_eq!(scale(69, 1), all[69..]);
}

#[test]
fn a_row_of_zeros_has_an_infinite_scale() {
    let device = Device::best();
    let plan = plan(&Shape { n: 2, k: 16, storage: Storage::Dense(DType::F32) }, device.queue().properties())
        .unwrap();
    let (weight, magnitude) = (device.upload(&[0f32; 32]), device.upload(&[1f32, 0.0]));
    let mut run = Run::new(&device, &plan);
    plan.run::<f32, f32>(
        device.queue(),
        weight.view(),
        &[],
        magnitude.view(),
        run.workspace.view_mut(),
        run.row_scale.view_mut(),
    )
    .unwrap();
    let scale = run.row_scale.download();
    assert!(scale[0] == f32::INFINITY && scale[1].is_nan(), "{scale:?}");
}

#[test]
fn bad_arguments_are_named() {
    let (device, mut data) = (Device::best(), Data(4));
    let properties = device.queue().properties();
    let shape = Shape { n: 6, k: 8, storage: Storage::Dense(DType::F32) };
    assert_refuses(plan(&Shape { n: 1 << 31, ..shape }, properties), "n");
    assert_refuses(plan(&Shape { k: 1 << 31, ..shape }, properties), "k");
    let storage = Storage::Nf4 { blocksize: 33, dtype: DType::F32 };
    assert_refuses(plan(&Shape { storage, ..shape }, properties), "blocksize");
    let dense = plan(&shape, properties).unwrap();
    let storage = Storage::Nf4 { blocksize: 32, dtype: DType::F32 };
    let nf4 = plan(&Shape { storage, ..shape }, properties).unwrap();

    let adapter = Adapter::<f32>::random(&device, &mut data, [6, 8], 4, 1.0);
    let (good, weight, magnitude) = (adapter.view(), device.upload(&[1f32; 52]), device.upload(&[1f32; 7]));
    let (mut workspace, mut out) = (device.alloc::<u8>(32), device.upload(&[7f32; 7]));
    let mut run = |plan: &Plan, weight, adapters: &[_], magnitude, work, rows| {
        let (work, rows) = (workspace.slice_mut(work), out.slice_mut(..rows));
        plan.run::<f32, f32>(device.queue(), weight, adapters, magnitude, work, rows)
    };
    let (w, m) = (weight.slice(..48), magnitude.slice(..6));
    assert_refuses(run(&nf4, w, &[good], m, 0..24, 6), "weight");
    assert_refuses(run(&dense, weight.view(), &[good], m, 0..24, 6), "weight");
    assert_refuses(run(&dense, weight.slice(1..49), &[good], m, 0..24, 6), "weight");
    assert_refuses(run(&dense, w, &[good; 9], m, 0..24, 6), "adapters");
    let mut wide = good;
    wide.rank = 5;
    assert_refuses(run(&dense, w, &[wide], m, 0..24, 6), "adapters[0].lora_a");
    assert_refuses(run(&dense, w, &[good], magnitude.view(), 0..24, 6), "magnitude");
    assert_refuses(run(&dense, w, &[good], elsewhere(m), 0..24, 6), "magnitude");
    assert_refuses(run(&dense, w, &[good], m, 0..25, 6), "workspace");
    assert_refuses(run(&dense, w, &[good], m, 2..26, 6), "workspace");
    assert_refuses(run(&dense, w, &[good], m, 0..24, 7), "row_scale");

    let matrix = Nf4Matrix::quantize(&[1f32; 48], [6, 8], 64, &Codebook::nf4(), Nesting::Plain).unwrap();
    let buffers = Nf4Buffers::upload(&device, &matrix);
    let mut run_nf4 = |plan: &Plan| {
        let (work, rows) = (workspace.slice_mut(..24), out.slice_mut(..6));
        plan.run_nf4(device.queue(), &buffers.view(), &[good], m, work, rows)
    };
    assert_refuses(run_nf4(&dense), "weight");
    assert_refuses(run_nf4(&nf4), "weight.blocksize");
    assert_eq!(out.download(), [7.0; 7], "nothing was written");
}

/// The weight comes in once, in whole sectors.
#[test]
fn memory_is_touched_once() {
    let (device, mut data) = (Device::emulator(), Data(5));
    dense_is_right::<bf16, bf16>(&device, &mut data, [64, 1024], &[]);
    // The last launch is the short one; the device keeps counters of that alone.
    let finish = device.counters().unwrap();
    assert_eq!(finish.global_loads.distinct_sectors as usize * 32, 64 * 4 * 2);
}
