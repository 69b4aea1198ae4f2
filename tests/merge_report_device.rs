//! The kernels that compare a merged weight with what was wanted: the sums of the CPU reference, and the bytes that differ.

mod on_device;

use half::{bf16, f16};
use lora_kernels::adapter::MergeReport;
use lora_kernels::cuda::merge_report::{Plan, Shape, Storage, Sums, plan};
use lora_kernels::cuda::{MAX_DELTAS, Nf4ViewMut, UpdateView, nf4_merge};
use lora_kernels::nf4::{Absmax, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element, Error, Tensor, cpu};
use lora_kernels_devices::{Buffer, Device};
use on_device::{Adapter, Data, Nf4Buffers, assert_refuses, elsewhere};

struct Case<'a> {
    size: [usize; 2],
    ranks: &'a [usize],
    row_scale: bool,
    fan_in_fan_out: bool,
}

/// Adapters on both sides, and the row scale.
struct Inputs<A> {
    adapters: Vec<Adapter<A>>,
    scale: Option<(Vec<f32>, Buffer<f32>)>,
    fan_in_fan_out: bool,
}

impl<A: Element> Inputs<A> {
    fn new(device: &Device, data: &mut Data, case: &Case<'_>) -> Self {
        let Case { size, ranks, row_scale, fan_in_fan_out } = *case;
        let adapters = ranks.iter().map(|&rank| Adapter::random(device, data, size, rank, 0.02)).collect();
        let scale: Vec<f32> = data.normal::<f32>(size[0], 0.1).iter().map(|x| 1.0 + x).collect();
        let buffer = device.upload(&scale);
        Self { adapters, scale: row_scale.then_some((scale, buffer)), fan_in_fan_out }
    }

    /// Hands out the update as the device has it.
    fn on_device(&self, run: impl FnOnce(&UpdateView<'_, A>)) {
        let views: Vec<_> = self.adapters.iter().map(Adapter::view).collect();
        run(&UpdateView {
            adapters: &views,
            row_scale: self.scale.as_ref().map(|(_, buffer)| buffer.view()),
        });
    }

    /// Hands out the update as the reference has it.
    fn on_host(&self, run: impl FnOnce(&cpu::Update<'_, A>)) {
        let hosts: Vec<_> = self.adapters.iter().map(Adapter::host).collect();
        let row_scale = self.scale.as_ref().map(|(scale, _)| &scale[..]);
        run(&cpu::Update { adapters: &hosts, row_scale, fan_in_fan_out: self.fan_in_fan_out });
    }
}

fn widened<T: Element>(elements: &[T]) -> Vec<f32> {
    elements.iter().map(|v| v.to_f32()).collect()
}

/// How many pieces of `size` bytes differ.
fn differing(old: &[u8], new: &[u8], size: usize) -> u64 {
    old.chunks(size).zip(new.chunks(size)).filter(|(old, new)| old != new).count() as u64
}

/// Both add terms that f64 holds but for a rounding or two, and round every partial sum: as many as elements on one side, no more on the other.
fn assert_sums(what: &str, got: &MergeReport, wanted: &MergeReport) {
    let unit = (wanted.elements as f64 + 8.0) * f64::EPSILON;
    // Of the products of R and D, by Cauchy and Schwarz.
    let kept = (wanted.error.sqrt() + wanted.wanted.sqrt()) * wanted.wanted.sqrt();
    for (name, got, wanted, terms) in [
        ("weight", got.weight, wanted.weight, wanted.weight),
        ("wanted", got.wanted, wanted.wanted, wanted.wanted),
        ("kept", got.kept, wanted.kept, kept),
        ("error", got.error, wanted.error, wanted.error),
    ] {
        assert!((got - wanted).abs() <= unit * terms, "{what}: {name} is {got:e}, not {wanted:e}");
    }
    assert_eq!(
        (got.elements, got.changed, got.bytes, got.changed_bytes),
        (wanted.elements, wanted.changed, wanted.bytes, wanted.changed_bytes),
        "{what}"
    );
}

fn run_twice(
    device: &Device,
    plan: &Plan,
    mut run: impl FnMut(&Plan, &mut Buffer<u8>, &mut Buffer<Sums>),
) -> MergeReport {
    let [first, again] = [(); 2].map(|()| {
        let (mut workspace, mut sums) = (device.alloc(plan.workspace_bytes()), device.alloc(1));
        run(plan, &mut workspace, &mut sums);
        sums.download()[0]
    });
    assert_eq!(bytemuck::bytes_of(&first), bytemuck::bytes_of(&again));
    plan.report(&first)
}

fn dense<T: Element, A: Element>(device: &Device, data: &mut Data, case: &Case<'_>) {
    let [n, k] = case.size;
    let what = format!("{} [{n}, {k}] {:?} {} {}", T::DTYPE, case.ranks, case.row_scale, case.fan_in_fan_out);
    let inputs = Inputs::<A>::new(device, data, case);
    let weight = data.normal::<T>(n * k, 0.05);
    let (before, mut sum, mut merged) = (widened(&weight), vec![0.0; n * k], vec![T::from_f32(0.0); n * k]);
    inputs.on_host(|update| {
        cpu::merge(&before, [n, k], update, &mut sum).unwrap();
        cpu::merge(&weight, [n, k], update, &mut merged).unwrap();
    });
    let mut wanted = cpu::merge_report(&before, &sum, &widened(&merged)).unwrap();
    let (old, new) = (bytemuck::cast_slice(&weight), bytemuck::cast_slice(&merged));
    wanted.changed = differing(old, new, size_of::<T>());
    (wanted.bytes, wanted.changed_bytes) = (new.len() as u64, differing(old, new, 1));

    let shape = Shape { n, k, fan_in_fan_out: case.fan_in_fan_out, storage: Storage::Dense(T::DTYPE) };
    let plan = plan(&shape, device.queue().properties()).unwrap();
    let (weight, merged) = (device.upload(&weight), device.upload(&merged));
    let got = run_twice(device, &plan, |plan, workspace, sums| {
        inputs.on_device(|update| {
            plan.run(
                device.queue(),
                weight.view(),
                merged.view(),
                update,
                workspace.view_mut(),
                sums.view_mut(),
            )
            .unwrap();
        });
    });
    assert_sums(&what, &got, &wanted);
}

/// Below, at and above the sizes of a thread's piece and of a tile; rows that are aligned and rows that are not.
const SIZES: [[usize; 2]; 7] = [[1, 1], [3, 5], [64, 128], [65, 136], [63, 127], [130, 264], [257, 7]];

#[test]
fn dense_weights() {
    for device in Device::for_each_target() {
        let mut data = Data(1);
        for (i, size) in SIZES.into_iter().enumerate() {
            for fan_in_fan_out in [false, true] {
                let case = Case { size, ranks: &[5], row_scale: i % 2 == 0, fan_in_fan_out };
                dense::<f32, f32>(&device, &mut data, &case);
                dense::<f16, f32>(&device, &mut data, &case);
                dense::<bf16, bf16>(&device, &mut data, &case);
            }
        }
        for ranks in [&[][..], &[0], &[17, 4, 0, 32]] {
            dense::<bf16, f32>(
                &device,
                &mut data,
                &Case { size: [70, 72], ranks, row_scale: true, fan_in_fan_out: false },
            );
        }
    }
}

/// A weight's tensors as a file has them.
fn stored(matrix: &Nf4Matrix) -> Vec<u8> {
    let scales = match matrix.absmax() {
        Absmax::Plain(absmax) => bytemuck::cast_slice(absmax).to_vec(),
        Absmax::Nested(nested) => {
            [nested.q(), bytemuck::cast_slice(nested.absmax()), bytemuck::bytes_of(&nested.offset())].concat()
        }
    };
    [matrix.packed(), &scales[..]].concat()
}

fn nf4<T: Element, A: Element>(
    device: &Device,
    data: &mut Data,
    case: &Case<'_>,
    blocksize: usize,
    nesting: Nesting,
    codebook: &Codebook,
) {
    let [n, k] = case.size;
    let what = format!("[{n}, {k}] in blocks of {blocksize}, {nesting:?}, {}", T::DTYPE);
    let inputs = Inputs::<A>::new(device, data, case);
    let elements = Tensor::from_f32([n, k], &data.normal::<f32>(n * k, 0.05), T::DTYPE).unwrap();
    let weight = Nf4Matrix::quantize_tensor(&elements, blocksize, codebook, nesting).unwrap();
    let (before, mut sum, mut dense) =
        (weight.dequantize_tensor().to_f32(), vec![0.0; n * k], vec![T::from_f32(0.0); n * k]);
    inputs.on_host(|update| {
        cpu::nf4_merge_dense(&weight, update, &mut sum).unwrap();
        cpu::nf4_merge_dense(&weight, update, &mut dense).unwrap();
    });
    let device_weight = Nf4Buffers::upload(device, &weight);

    // To 4 bits, with scales that are quantised again.
    let again = Tensor::from_f32([n, k], &sum, DType::F32).unwrap();
    let again = Nf4Matrix::quantize_tensor(&again, blocksize, codebook, nesting).unwrap();
    let merged = Nf4Matrix::from_parts(
        [n, k],
        again.packed().to_vec(),
        again.absmax().clone(),
        blocksize,
        codebook.clone(),
        T::DTYPE,
    )
    .unwrap();
    let mut wanted = cpu::merge_report(&before, &sum, &merged.dequantize_tensor().to_f32()).unwrap();
    let code = |matrix: &Nf4Matrix, i: usize| (matrix.packed()[i / 2] >> (4 * (1 - i % 2))) & 15;
    wanted.changed = (0..n * k).filter(|&i| code(&weight, i) != code(&merged, i)).count() as u64;
    let (old, new) = (stored(&weight), stored(&merged));
    (wanted.bytes, wanted.changed_bytes) = (new.len() as u64, differing(&old, &new, 1));
    let nested = matches!(nesting, Nesting::Nested).then_some(256);
    let shape =
        Shape { n, k, fan_in_fan_out: false, storage: Storage::Nf4 { blocksize, dtype: T::DTYPE, nested } };
    let to_nf4 = plan(&shape, device.queue().properties()).unwrap();
    let device_merged = Nf4Buffers::upload(device, &merged);
    let got = run_twice(device, &to_nf4, |plan, workspace, sums| {
        inputs.on_device(|update| {
            let (queue, weight, merged) = (device.queue(), device_weight.view(), device_merged.view());
            plan.run_nf4(queue, &weight, &merged, update, workspace.view_mut(), sums.view_mut()).unwrap();
        });
    });
    assert_sums(&what, &got, &wanted);

    // To elements.
    let mut wanted = cpu::merge_report(&before, &sum, &widened(&dense)).unwrap();
    let unadapted: Vec<T> = before.iter().map(|v| T::from_f32(*v)).collect();
    let (old, new) = (bytemuck::cast_slice(&unadapted), bytemuck::cast_slice(&dense));
    wanted.changed = differing(old, new, size_of::<T>());
    (wanted.bytes, wanted.changed_bytes) = (new.len() as u64, differing(old, new, 1));
    let storage = Storage::Nf4ToDense { blocksize, dtype: T::DTYPE, merged: T::DTYPE };
    let to_dense = plan(&Shape { storage, ..shape }, device.queue().properties()).unwrap();
    let device_dense = device.upload(&dense);
    let got = run_twice(device, &to_dense, |plan, workspace, sums| {
        inputs.on_device(|update| {
            let (queue, weight, merged) = (device.queue(), device_weight.view(), device_dense.view());
            plan.run_nf4_dense(queue, &weight, merged, update, workspace.view_mut(), sums.view_mut())
                .unwrap();
        });
    });
    assert_sums(&format!("{what} to elements"), &got, &wanted);
}

#[test]
fn weights_in_4_bits() {
    for device in Device::for_each_target() {
        let mut data = Data(2);
        for (i, size) in [[1, 1], [7, 37], [64, 128], [66, 256], [9, 1], [130, 264]].into_iter().enumerate() {
            for blocksize in [32, 64, 4096] {
                let case = Case { size, ranks: &[5], row_scale: i % 2 == 0, fan_in_fan_out: false };
                let nesting = if blocksize == 64 { Nesting::Nested } else { Nesting::Plain };
                nf4::<bf16, bf16>(&device, &mut data, &case, blocksize, nesting, &Codebook::nf4());
            }
        }
        let case = Case { size: [40, 520], ranks: &[17, 0, 3], row_scale: false, fan_in_fan_out: false };
        nf4::<f32, f32>(&device, &mut data, &case, 32, Nesting::Nested, &Codebook::fp4());
        nf4::<f16, f32>(&device, &mut data, &case, 64, Nesting::Plain, &Codebook::fp4());
    }
}

/// The whole way of an engine: a merge into buffers of its own, the sums, and the decision; what was lost is refused, and the original is
/// as it was.
#[test]
fn what_would_be_lost_is_refused() {
    let (device, mut data) = (Device::best(), Data(3));
    let (n, k, queue) = (64, 256, device.queue());
    let weight =
        Nf4Matrix::quantize(&data.normal::<f32>(n * k, 0.05), [n, k], 64, &Codebook::nf4(), Nesting::Plain)
            .unwrap();
    let original = Nf4Buffers::upload(&device, &weight);
    let dtype = DType::F32;
    for (size, kept) in [(0.001, false), (0.05, true)] {
        let adapter = Adapter::<f32>::random(&device, &mut data, [n, k], 4, size);
        let views = [adapter.view()];
        let update = UpdateView { adapters: &views, row_scale: None };
        let (mut packed, mut absmax) = (device.alloc::<u8>(n * k / 2), device.alloc::<f32>(n * k / 64));
        let shape = nf4_merge::Shape { n, k, blocksize: 64, dtype, target: nf4_merge::Target::Nf4 };
        let merge = nf4_merge::plan(&shape, weight.codebook(), queue.properties()).unwrap();
        let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
        merge.run(queue, &original.view(), &update, out).unwrap();
        let mut merged = original.view();
        (merged.packed, merged.absmax) =
            (packed.view(), lora_kernels::cuda::AbsmaxView::Plain(absmax.view()));

        let storage = Storage::Nf4 { blocksize: 64, dtype, nested: None };
        let plan = plan(&Shape { n, k, fan_in_fan_out: false, storage }, queue.properties()).unwrap();
        let (mut workspace, mut sums) = (device.alloc(plan.workspace_bytes()), device.alloc(1));
        plan.run_nf4(queue, &original.view(), &merged, &update, workspace.view_mut(), sums.view_mut())
            .unwrap();
        let report = plan.report(&sums.download()[0]);
        match report.require("weight", 0.9) {
            Ok(same) => assert!(kept && same == report, "{report}"),
            Err(Error::AdapterLost { argument, wanted, report: same }) => {
                assert!(!kept && (argument.as_str(), wanted, same) == ("weight", 0.9, report), "{report}");
            }
            Err(other) => panic!("{other}"),
        }
        assert_eq!(original.packed.download(), weight.packed());
    }
    // Sums that are not finite are never enough.
    let broken = MergeReport { elements: 1, wanted: f64::NAN, kept: f64::NAN, ..MergeReport::default() };
    assert!(broken.require("weight", f64::NEG_INFINITY).is_err());
}

#[test]
fn nothing_is_compared() {
    let device = Device::best();
    for size in [[0, 8], [8, 0]] {
        dense::<f32, f32>(
            &device,
            &mut Data(4),
            &Case { size, ranks: &[2], row_scale: true, fan_in_fan_out: false },
        );
    }
}

#[test]
fn bad_arguments_are_named() {
    let (device, mut data) = (Device::best(), Data(5));
    let (queue, properties) = (device.queue(), device.queue().properties());
    let shape = Shape { n: 6, k: 8, fan_in_fan_out: false, storage: Storage::Dense(DType::F32) };
    let nf4 = Storage::Nf4 { blocksize: 32, dtype: DType::F32, nested: None };
    let to_f16 = Storage::Nf4ToDense { blocksize: 32, dtype: DType::F32, merged: DType::F16 };
    assert_refuses(plan(&Shape { n: 1 << 31, ..shape }, properties), "n");
    assert_refuses(plan(&Shape { k: 1 << 31, ..shape }, properties), "k");
    assert_refuses(
        plan(&Shape { fan_in_fan_out: true, storage: nf4, ..shape }, properties),
        "fan_in_fan_out",
    );
    let odd = Storage::Nf4 { blocksize: 33, dtype: DType::F32, nested: None };
    assert_refuses(plan(&Shape { storage: odd, ..shape }, properties), "blocksize");
    let [dense, to_f16, nf4] =
        [shape.storage, to_f16, nf4].map(|storage| plan(&Shape { storage, ..shape }, properties).unwrap());

    let adapter = Adapter::<f32>::random(&device, &mut data, [6, 8], 4, 1.0);
    let (good, floats) = (adapter.view(), device.upload(&[1.0f32; 52]));
    let (mut workspace, mut sums) = (device.upload(&[7u8; 56]), device.upload(&[Sums::default(); 2]));
    let mut run = |weight, merged, adapters: &[_], row_scale, scratch, total| {
        let update = UpdateView { adapters, row_scale };
        dense.run::<f32, f32>(
            queue,
            weight,
            merged,
            &update,
            workspace.slice_mut(scratch),
            sums.slice_mut(total),
        )
    };
    let whole = || floats.slice(..48);
    assert_refuses(run(floats.slice(..47), whole(), &[good], None, 0..48, 0..1), "weight");
    assert_refuses(run(floats.slice(1..49), whole(), &[good], None, 0..48, 0..1), "weight");
    assert_refuses(run(elsewhere(whole()), whole(), &[good], None, 0..48, 0..1), "weight");
    assert_refuses(run(whole(), floats.slice(..49), &[good], None, 0..48, 0..1), "merged");
    assert_refuses(run(whole(), floats.slice(1..49), &[good], None, 0..48, 0..1), "merged");
    assert_refuses(run(whole(), whole(), &[good; MAX_DELTAS + 1], None, 0..48, 0..1), "adapters");
    assert_refuses(run(whole(), whole(), &[good], Some(floats.slice(..7)), 0..48, 0..1), "row_scale");
    assert_refuses(run(whole(), whole(), &[good], None, 0..47, 0..1), "workspace");
    assert_refuses(run(whole(), whole(), &[good], None, 4..52, 0..1), "workspace");
    assert_refuses(run(whole(), whole(), &[good], None, 0..48, 0..2), "sums");

    let matrix = |nesting, codebook: &Codebook, blocksize| {
        let values = [1.0f32; 48];
        Nf4Buffers::upload(
            &device,
            &Nf4Matrix::quantize(&values, [6, 8], blocksize, codebook, nesting).unwrap(),
        )
    };
    let weight = matrix(Nesting::Plain, &Codebook::nf4(), 32);
    let halves = device.upload(&[f16::ONE; 48]);
    let update = UpdateView { adapters: &[good], row_scale: None };
    let scratch = || (device.alloc::<u8>(48), device.alloc::<Sums>(1));
    let compare = |plan: &Plan, weight: &Nf4Buffers, merged: &Nf4Buffers| {
        let (mut workspace, mut sums) = scratch();
        plan.run_nf4(queue, &weight.view(), &merged.view(), &update, workspace.view_mut(), sums.view_mut())
    };
    compare(&nf4, &weight, &weight).unwrap();
    assert_refuses(compare(&dense, &weight, &weight), "weight");
    assert_refuses(compare(&to_f16, &weight, &weight), "weight");
    assert_refuses(compare(&nf4, &weight, &matrix(Nesting::Plain, &Codebook::fp4(), 32)), "merged.codebook");
    assert_refuses(compare(&nf4, &weight, &matrix(Nesting::Plain, &Codebook::nf4(), 64)), "merged.blocksize");
    assert_refuses(compare(&nf4, &matrix(Nesting::Plain, &Codebook::nf4(), 64), &weight), "weight.blocksize");
    assert_refuses(compare(&nf4, &weight, &matrix(Nesting::Nested, &Codebook::nf4(), 32)), "merged.absmax");
    assert_refuses(compare(&nf4, &matrix(Nesting::Nested, &Codebook::nf4(), 32), &weight), "weight.absmax");
    let (mut workspace, mut sums) = (device.alloc::<u8>(48), device.alloc::<Sums>(1));
    let mut to_elements = |plan: &Plan, range| {
        plan.run_nf4_dense(
            queue,
            &weight.view(),
            halves.slice(range),
            &update,
            workspace.view_mut(),
            sums.view_mut(),
        )
    };
    to_elements(&to_f16, 0..48).unwrap();
    assert_refuses(to_elements(&to_f16, 0..47), "merged");
    assert_refuses(to_elements(&dense, 0..48), "weight");
    let (mut workspace, mut sums) = (device.alloc::<u8>(48), device.alloc::<Sums>(1));
    let wrong =
        to_f16.run_nf4_dense(queue, &weight.view(), whole(), &update, workspace.view_mut(), sums.view_mut());
    assert_refuses(wrong, "merged");
}

/// Both weights and the factors come in once, and little goes out.
#[test]
fn memory_is_touched_once() {
    let (device, mut data) = (Device::emulator(), Data(6));
    let (n, k, rank) = (128, 512, 16);
    let adapter = Adapter::<bf16>::random(&device, &mut data, [n, k], rank, 0.1);
    let [weight, merged] = [(); 2].map(|()| device.upload(&data.normal::<bf16>(n * k, 1.0)));
    let shape = Shape { n, k, fan_in_fan_out: false, storage: Storage::Dense(DType::BF16) };
    let plan = plan(&shape, device.queue().properties()).unwrap();
    let (mut workspace, mut sums) = (device.alloc(plan.workspace_bytes()), device.alloc(1));
    let views = [adapter.view()];
    let update = UpdateView { adapters: &views, row_scale: None };
    plan.run(device.queue(), weight.view(), merged.view(), &update, workspace.view_mut(), sums.view_mut())
        .unwrap();
    // Of the last launch, which adds the tiles.
    let counters = device.counters().unwrap();
    let tiles = (n / 64) * (k / 128);
    assert_eq!(plan.workspace_bytes(), tiles * 48);
    assert_eq!(counters.global_loads.distinct_sectors as usize * 32, tiles * 48);
    assert_eq!(counters.global_stores.bytes, 48);
    assert_eq!(counters.local_accesses, 0);
}
