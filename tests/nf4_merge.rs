//! The 4-bit merge kernels: bit for bit what the CPU reference writes, for any shape, block and target.

mod on_device;

use half::{bf16, f16};
use lora_kernels::cuda::nf4_merge::{Method, Plan, Shape, Target, plan};
use lora_kernels::cuda::{Nf4ViewMut, Search, UpdateView};
use lora_kernels::nf4::{Absmax, BLOCKSIZES, Codebook, Nesting, Nf4Matrix, block_count, packed_len};
use lora_kernels::{DType, Element, cpu};
use lora_kernels_devices::Device;
use on_device::{Adapter, Data, Nf4Buffers, assert_refuses, assert_same_bits};

struct Case<'a> {
    size: [usize; 2],
    blocksize: usize,
    codebook: Codebook,
    nesting: Nesting,
    /// Of the quant_state.
    dtype: DType,
    ranks: &'a [usize],
    row_scale: bool,
}

impl Case<'_> {
    fn plain([n, k]: [usize; 2], blocksize: usize) -> Self {
        let (codebook, nesting) = (Codebook::nf4(), Nesting::Plain);
        Self { size: [n, k], blocksize, codebook, nesting, dtype: DType::BF16, ranks: &[5], row_scale: false }
    }

    fn weight(&self, data: &mut Data) -> Nf4Matrix {
        let [n, k] = self.size;
        let (shape, blocksize, codebook) = (vec![n, k], self.blocksize, &self.codebook);
        match self.dtype {
            DType::F32 => Nf4Matrix::quantize(
                &data.normal::<f32>(n * k, 0.05),
                shape,
                blocksize,
                codebook,
                self.nesting,
            ),
            DType::F16 => Nf4Matrix::quantize(
                &data.normal::<f16>(n * k, 0.05),
                shape,
                blocksize,
                codebook,
                self.nesting,
            ),
            DType::BF16 => Nf4Matrix::quantize(
                &data.normal::<bf16>(n * k, 0.05),
                shape,
                blocksize,
                codebook,
                self.nesting,
            ),
        }
        .unwrap()
    }
}

/// Both targets; gives the plan of the 4-bit one.
fn same_as_reference<T: Element, A: Element>(device: &Device, data: &mut Data, case: &Case<'_>) -> Plan {
    let [n, k] = case.size;
    let what = format!("[{n}, {k}] in {}, blocks of {}, ranks {:?}", case.dtype, case.blocksize, case.ranks);
    let weight = case.weight(data);
    let adapters: Vec<_> =
        case.ranks.iter().map(|&r| Adapter::<A>::random(device, data, [n, k], r, 0.02)).collect();
    let scale: Vec<f32> = data.normal::<f32>(n, 0.1).iter().map(|x| 1.0 + x).collect();
    let (hosts, views): (Vec<_>, Vec<_>) = adapters.iter().map(|a| (a.host(), a.view())).unzip();
    let row_scale = case.row_scale.then_some(&scale[..]);
    let reference = cpu::Update { adapters: &hosts, row_scale, fan_in_fan_out: false };
    let (buffers, device_scale) = (Nf4Buffers::upload(device, &weight), device.upload(&scale));
    let update = UpdateView { adapters: &views, row_scale: case.row_scale.then(|| device_scale.view()) };
    let shape = Shape { n, k, blocksize: case.blocksize, dtype: case.dtype, target: Target::Nf4 };
    let properties = device.queue().properties();

    let mut wanted = (vec![0; packed_len(n * k)], vec![0.0; block_count(n * k, case.blocksize)]);
    cpu::nf4_merge(&weight, &reference, &mut wanted.0, &mut wanted.1).unwrap();
    let to_nf4 = plan(&shape, weight.codebook(), properties).unwrap();
    let (mut packed, mut absmax) = (device.alloc(wanted.0.len()), device.alloc(wanted.1.len()));
    let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
    to_nf4.run(device.queue(), &buffers.view(), &update, out).unwrap();
    assert_same_bits(&absmax.download(), &wanted.1, &what);
    assert_eq!(packed.download(), wanted.0, "{what}");

    let mut wanted = vec![T::from_f32(0.0); n * k];
    cpu::nf4_merge_dense(&weight, &reference, &mut wanted).unwrap();
    let dense =
        plan(&Shape { target: Target::Dense(T::DTYPE), ..shape }, weight.codebook(), properties).unwrap();
    let mut out = device.alloc::<T>(n * k);
    dense.run_dense(device.queue(), &buffers.view(), &update, out.view_mut()).unwrap();
    assert_same_bits(&out.download(), &wanted, &format!("{what} to {}", T::DTYPE));
    to_nf4
}

fn tiled(device: &Device) {
    let mut data = Data(1);
    for size in [[1, 128], [3, 384], [64, 128], [66, 256], [130, 640]] {
        for blocksize in [32, 64, 128] {
            let plan = same_as_reference::<bf16, bf16>(device, &mut data, &Case::plain(size, blocksize));
            assert_eq!((plan.method, plan.search), (Method::Tiled, Search::Binned));
        }
    }
    let plan = same_as_reference::<f32, f32>(device, &mut data, &Case::plain([5, 96], 32));
    assert_eq!(plan.method, Method::Tiled);
}

#[test]
fn blocks_that_fit_a_row_are_merged_in_tiles() {
    Device::for_each_target().iter().for_each(tiled);
}

/// Rows of odd length, shorter than a piece, blocks over many rows, tails.
fn flat(device: &Device) {
    let mut data = Data(2);
    for size in [[1, 1], [9, 1], [7, 37], [33, 96], [100, 44], [65, 129]] {
        for blocksize in [64, 256, 4096] {
            let plan = same_as_reference::<f16, f32>(device, &mut data, &Case::plain(size, blocksize));
            assert_eq!((plan.method, plan.search), (Method::Flat, Search::Counting));
        }
    }
    for blocksize in BLOCKSIZES.into_iter().filter(|&b| b > 128) {
        let plan = same_as_reference::<f32, bf16>(device, &mut data, &Case::plain([3, 8192], blocksize));
        assert_eq!(plan.method, Method::Flat);
    }
}

#[test]
fn other_blocks_are_merged_flat() {
    Device::for_each_target().iter().for_each(flat);
}

#[test]
fn any_weight_dtype_nesting_codebook_and_adapters() {
    let (device, mut data) = (Device::best(), Data(3));
    for dtype in DType::ALL {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            for (size, ranks) in [([20, 192], &[][..]), ([20, 192], &[17, 4, 0, 32]), ([20, 90], &[3, 0, 18])]
            {
                let codebook = if ranks.len() == 3 { Codebook::nf4() } else { Codebook::fp4() };
                let case = Case { size, blocksize: 64, codebook, nesting, dtype, ranks, row_scale: true };
                same_as_reference::<bf16, f32>(&device, &mut data, &case);
            }
        }
    }
}

/// Merging nothing gives back the codes that were there, where every block still has its largest code.
#[test]
fn without_adapters_codes_stay() {
    let (device, mut data) = (Device::best(), Data(4));
    let case = Case { dtype: DType::F32, ranks: &[], ..Case::plain([8, 128], 64) };
    let weight = case.weight(&mut data);
    let buffers = Nf4Buffers::upload(&device, &weight);
    let shape = Shape { n: 8, k: 128, blocksize: 64, dtype: DType::F32, target: Target::Nf4 };
    let plan = plan(&shape, weight.codebook(), device.queue().properties()).unwrap();
    let (mut packed, mut absmax) = (device.alloc(512), device.alloc(16));
    let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
    plan.run::<f32>(device.queue(), &buffers.view(), &UpdateView { adapters: &[], row_scale: None }, out)
        .unwrap();
    assert_eq!(packed.download(), weight.packed());
    let Absmax::Plain(wanted) = weight.absmax() else { unreachable!() };
    assert_eq!(&absmax.download(), wanted);
}

#[test]
fn bad_arguments_are_named() {
    let (device, mut data) = (Device::best(), Data(5));
    let properties = device.queue().properties();
    let case = Case::plain([4, 64], 64);
    let weight = case.weight(&mut data);
    let shape = Shape { n: 4, k: 64, blocksize: 64, dtype: DType::BF16, target: Target::Nf4 };
    let nf4 = Codebook::nf4();
    assert_refuses(plan(&Shape { blocksize: 65, ..shape }, &nf4, properties), "blocksize");
    assert_refuses(plan(&Shape { n: 1 << 31, ..shape }, &nf4, properties), "n");
    assert_refuses(plan(&Shape { k: 1 << 31, ..shape }, &nf4, properties), "k");
    let to_nf4 = plan(&shape, &nf4, properties).unwrap();
    let to_f32 = plan(&Shape { target: Target::Dense(DType::F32), ..shape }, &nf4, properties).unwrap();

    let buffers = Nf4Buffers::upload(&device, &weight);
    let adapter = Adapter::<f32>::random(&device, &mut data, [4, 64], 2, 1.0);
    let adapters = [adapter.view()];
    let (update, scale) = (UpdateView { adapters: &adapters, row_scale: None }, device.upload(&[1f32; 5]));
    let (mut packed, mut absmax, mut dense) =
        (device.upload(&[7u8; 144]), device.upload(&[7f32; 5]), device.upload(&[7f32; 260]));
    let mut run =
        |plan: &Plan, weight, update: &UpdateView<'_, f32>, range: std::ops::Range<usize>, blocks| {
            let out = Nf4ViewMut { packed: packed.slice_mut(range), absmax: absmax.slice_mut(..blocks) };
            plan.run(device.queue(), weight, update, out)
        };
    let view = buffers.view();
    assert_refuses(run(&to_f32, &view, &update, 0..128, 4), "out");
    assert_refuses(run(&to_nf4, &view, &update, 0..129, 4), "packed");
    assert_refuses(run(&to_nf4, &view, &update, 8..136, 4), "packed");
    assert_refuses(run(&to_nf4, &view, &update, 0..128, 5), "absmax");
    let scaled = UpdateView { row_scale: Some(scale.view()), ..update };
    assert_refuses(run(&to_nf4, &view, &scaled, 0..128, 4), "row_scale");
    let mut other = buffers.view();
    other.blocksize = 32;
    assert_refuses(run(&to_nf4, &other, &update, 0..128, 4), "weight.blocksize");
    let fp4 = Codebook::fp4();
    let mut other = buffers.view();
    other.codebook = &fp4;
    assert_refuses(run(&to_nf4, &other, &update, 0..128, 4), "weight.codebook");
    let mut wide = adapter.view();
    wide.rank = 3;
    assert_refuses(
        run(&to_nf4, &view, &UpdateView { adapters: &[wide], ..update }, 0..128, 4),
        "adapters[0].lora_a",
    );

    let mut run_dense =
        |plan: &Plan, range| plan.run_dense(device.queue(), &view, &update, dense.slice_mut(range));
    assert_refuses(run_dense(&to_nf4, 0..256), "out");
    assert_refuses(run_dense(&to_f32, 0..255), "out");
    assert_refuses(run_dense(&to_f32, 1..257), "out");
    assert_eq!(
        (packed.download(), absmax.download(), dense.download()),
        (vec![7; 144], vec![7.0; 5], vec![7.0; 260])
    );
}

/// Codes and absmax come in once and go out once; the factors are read once per tile; no bank conflict.
#[test]
fn memory_is_touched_once() {
    let (device, mut data) = (Device::emulator(), Data(6));
    let (n, k, rank) = (128, 512, 16);
    let weight = Case::plain([n, k], 64).weight(&mut data);
    let buffers = Nf4Buffers::upload(&device, &weight);
    let adapter = Adapter::<bf16>::random(&device, &mut data, [n, k], rank, 0.1);
    let shape = Shape { n, k, blocksize: 64, dtype: DType::BF16, target: Target::Nf4 };
    let plan = plan(&shape, weight.codebook(), device.queue().properties()).unwrap();
    let (mut packed, mut absmax) = (device.alloc(n * k / 2), device.alloc(n * k / 64));
    let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
    let update = UpdateView { adapters: &[adapter.view()], row_scale: None };
    plan.run(device.queue(), &buffers.view(), &update, out).unwrap();
    let counters = device.counters().unwrap();
    let weights = n * k / 2 + n * k / 64 * 4;
    assert_eq!(counters.global_loads.distinct_sectors as usize * 32, weights + rank * (n + k) * 2);
    assert_eq!(counters.global_stores.distinct_sectors as usize * 32, weights);
    assert_eq!(counters.shared_loads.conflicts, 0);
    assert_eq!(counters.local_accesses, 0);
}
