//! The step of AdamW on a device: the reference's bits.

mod products;

use half::{bf16, f16};
use lora_kernels::cpu::{self, AdamW, MOMENT_BLOCKSIZE, MomentsMut};
use lora_kernels::cuda::adamw::{self, Moments, Status, TensorTable, TensorView};
use lora_kernels::{Element, Error};
use lora_kernels_devices::{Buffer, Device};
use products::{Numbers, same};

/// Lengths of tensors: pieces of 2048 and blocks of 256 that are whole, and that are not.
const LENGTHS: [usize; 8] = [1, 4096, 0, 255, 257, 2048, 5000, 8];

/// One tensor on both sides.
#[derive(Clone)]
struct Tensor<T> {
    parameter: Vec<T>,
    gradient: Vec<f32>,
    f32s: [Vec<f32>; 2],
    codes: [Vec<u8>; 2],
    scales: [Vec<f32>; 2],
}

impl<T: Element> Tensor<T> {
    fn new(seed: u64, len: usize) -> Self {
        let mut numbers = Numbers::new(seed);
        let blocks = len.div_ceil(MOMENT_BLOCKSIZE);
        Self {
            parameter: numbers.many(len),
            // Elements of different sizes, and zeros.
            gradient: (0..len).map(|i| numbers.number() * [1.0, 1e-3, 0.0, 30.0][i % 4]).collect(),
            f32s: [vec![0.0; len], vec![0.0; len]],
            codes: [vec![127; len], vec![0; len]],
            scales: [vec![0.0; blocks], vec![0.0; blocks]],
        }
    }

    /// The reference's step.
    fn step(&mut self, step: &cpu::AdamWStep, scale: f32, blockwise: bool) {
        let ([m, v], [m_codes, v_codes], [m_absmax, v_absmax]) =
            (&mut self.f32s, &mut self.codes, &mut self.scales);
        let moments = match blockwise {
            true => MomentsMut::Blockwise { m: m_codes, m_absmax, v: v_codes, v_absmax },
            false => MomentsMut::F32 { m, v },
        };
        cpu::adamw(step, scale, &mut self.parameter, &self.gradient, moments).unwrap();
    }
}

struct OnDevice<T> {
    parameter: Buffer<T>,
    gradient: Buffer<f32>,
    f32s: [Buffer<f32>; 2],
    codes: [Buffer<u8>; 2],
    scales: [Buffer<f32>; 2],
}

impl<T: Element> OnDevice<T> {
    fn new(device: &Device, tensor: &Tensor<T>) -> Self {
        Self {
            parameter: device.upload(&tensor.parameter),
            gradient: device.upload(&tensor.gradient),
            f32s: tensor.f32s.each_ref().map(|moment| device.upload(moment)),
            codes: tensor.codes.each_ref().map(|moment| device.upload(moment)),
            scales: tensor.scales.each_ref().map(|scales| device.upload(scales)),
        }
    }

    fn view(&mut self, blockwise: bool) -> TensorView<'_, T> {
        let ([m, v], [m_codes, v_codes], [m_absmax, v_absmax]) =
            (&mut self.f32s, &mut self.codes, &mut self.scales);
        TensorView {
            parameter: self.parameter.view_mut(),
            gradient: self.gradient.view(),
            moments: match blockwise {
                true => Moments::Blockwise {
                    m: m_codes.view_mut(),
                    m_absmax: m_absmax.view_mut(),
                    v: v_codes.view_mut(),
                    v_absmax: v_absmax.view_mut(),
                },
                false => Moments::F32 { m: m.view_mut(), v: v.view_mut() },
            },
        }
    }

    fn assert_is(&self, tensor: &Tensor<T>, blockwise: bool) {
        assert!(same(&self.parameter.download(), &tensor.parameter));
        for i in 0..2 {
            if blockwise {
                assert_eq!(self.codes[i].download(), tensor.codes[i]);
                assert!(same(&self.scales[i].download(), &tensor.scales[i]));
            } else {
                assert!(same(&self.f32s[i].download(), &tensor.f32s[i]));
            }
        }
    }
}

/// Steps of all tensors, each with new gradients, clipped at `max_norm`.
fn check<T: Element>(device: &Device, blockwise: bool, max_norm: Option<f32>) {
    let (queue, properties) = (device.queue(), device.queue().properties());
    let adamw = AdamW { weight_decay: 0.1, ..AdamW::default() };
    let mut tensors: Vec<_> = (0..).zip(LENGTHS).map(|(seed, len)| Tensor::<T>::new(seed, len)).collect();
    for number in 1..4 {
        let mut buffers: Vec<_> = tensors.iter().map(|tensor| OnDevice::new(device, tensor)).collect();
        let mut table = device.alloc(TensorTable::bytes(tensors.len()));
        let mut status = device.alloc::<Status>(1);
        let step = adamw.step(0.01, number).unwrap();
        let views = buffers.iter_mut().map(|buffers| buffers.view(blockwise)).collect();
        let mut all = TensorTable::upload(queue, views, table.view_mut()).unwrap();
        let plan = adamw::plan(&all.shape(), properties).unwrap();
        let mut scale = 1.0;
        if let Some(max_norm) = max_norm {
            let mut workspace = device.alloc(plan.workspace_bytes);
            plan.norm(queue, &all, max_norm, workspace.view_mut(), status.view_mut()).unwrap();
            let gradients: Vec<_> = tensors.iter().map(|tensor| &tensor.gradient[..]).collect();
            let wanted = cpu::gradient_norm(&gradients);
            let got = status.download()[0];
            // Both sums are f64: they may round to neighbours.
            assert!(
                (got.norm - wanted.norm).abs() <= wanted.norm * f32::EPSILON,
                "{got:?}, wanted {wanted:?}"
            );
            assert_eq!((got.scale, got.not_finite), ((max_norm / (got.norm + 1e-6)).min(1.0), -1));
            scale = got.scale;
        }
        plan.step(queue, &step, &mut all, max_norm.map(|_| status.view()), true).unwrap();
        for (tensor, buffers) in tensors.iter_mut().zip(&buffers) {
            tensor.step(&step, scale, blockwise);
            buffers.assert_is(tensor, blockwise);
            tensor.gradient = Numbers::new(number).many(tensor.gradient.len());
        }
    }
}

#[test]
fn steps_have_the_references_bits() {
    for device in Device::for_each_target() {
        for blockwise in [false, true] {
            check::<f32>(&device, blockwise, None);
            check::<f16>(&device, blockwise, None);
            check::<bf16>(&device, blockwise, None);
        }
    }
}

#[test]
fn gradients_are_clipped() {
    let device = Device::best();
    for blockwise in [false, true] {
        check::<f32>(&device, blockwise, Some(0.5));
        check::<bf16>(&device, blockwise, Some(f32::INFINITY));
    }
}

/// A gradient that is not finite is named, and the step left out: every bit stays.
#[test]
fn a_step_with_a_broken_gradient_is_left_out() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    for blockwise in [false, true] {
        for (broken, value) in [(1, f32::NAN), (4, f32::INFINITY), (6, f32::NEG_INFINITY)] {
            let mut tensors: Vec<_> =
                (0..).zip(LENGTHS).map(|(seed, len)| Tensor::<bf16>::new(seed, len)).collect();
            let last = LENGTHS[broken] - 1;
            tensors[broken].gradient[last] = value;
            let mut buffers: Vec<_> = tensors.iter().map(|tensor| OnDevice::new(&device, tensor)).collect();
            let mut table = device.alloc(TensorTable::bytes(tensors.len()));
            let mut status = device.alloc::<Status>(1);
            let step = AdamW::default().step(0.01, 1).unwrap();
            let views = buffers.iter_mut().map(|buffers| buffers.view(blockwise)).collect();
            let mut all = TensorTable::upload(queue, views, table.view_mut()).unwrap();
            let plan = adamw::plan(&all.shape(), properties).unwrap();
            let mut workspace = device.alloc(plan.workspace_bytes);
            plan.norm(queue, &all, 1.0, workspace.view_mut(), status.view_mut()).unwrap();
            assert_eq!(status.download()[0].not_finite, broken as i32);
            plan.step(queue, &step, &mut all, Some(status.view()), true).unwrap();
            for (tensor, buffers) in tensors.iter().zip(&buffers) {
                buffers.assert_is(tensor, blockwise);
            }
        }
    }
}

#[test]
fn nothing_to_do() {
    let device = Device::best();
    let (queue, mut table) = (device.queue(), device.alloc(TensorTable::bytes(0)));
    let mut all = TensorTable::upload::<f32>(queue, Vec::new(), table.view_mut()).unwrap();
    let plan = adamw::plan(&all.shape(), queue.properties()).unwrap();
    let (mut status, mut workspace) = (device.alloc::<Status>(1), device.alloc(plan.workspace_bytes));
    plan.norm(queue, &all, 1.0, workspace.view_mut(), status.view_mut()).unwrap();
    assert_eq!(status.download()[0], Status { norm: 0.0, scale: 1.0, not_finite: -1, padding: 0 });
    plan.step(queue, &AdamW::default().step(0.1, 1).unwrap(), &mut all, None, false).unwrap();
}

/// Every sector of the state is read and written, and no other. (A lane's eight f32 are two accesses of half a sector each.)
#[test]
fn counts() {
    let device = Device::emulator();
    for (blockwise, state) in [(false, 16), (true, 4)] {
        let len = 1 << 14;
        let mut buffers = OnDevice::new(&device, &Tensor::<bf16>::new(1, len));
        let mut table = device.alloc(TensorTable::bytes(1));
        let mut all =
            TensorTable::upload(device.queue(), vec![buffers.view(blockwise)], table.view_mut()).unwrap();
        let plan = adamw::plan(&all.shape(), device.queue().properties()).unwrap();
        plan.step(device.queue(), &AdamW::default().step(0.1, 1).unwrap(), &mut all, None, false).unwrap();
        let counters = device.counters().unwrap();
        assert_eq!(counters.local_accesses, 0);
        // Parameter and moments both ways, the gradient in, and little else (scales, maps, the table).
        let scales = if blockwise { 2 * 4 * len / 256 } else { 0 };
        let read = (len * (2 + 4) + len * state / 2 + scales) as f64;
        let written = (len * 2 + len * state / 2 + scales) as f64;
        let moved = [counters.global_loads, counters.global_stores]
            .map(|traffic| 32.0 * traffic.distinct_sectors as f64);
        assert!(moved[0] >= read && moved[0] <= read + 2.0 * 2048.0 + 512.0, "{counters}");
        assert_eq!(moved[1], written, "{counters}");
        // In whole sectors, but for the two scales of a warp's moments: four bytes each.
        let asked = 32.0 * counters.global_stores.sectors as f64;
        assert!(asked <= written + if blockwise { (2 * len / 256 * 28) as f64 } else { 0.0 }, "{counters}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let elsewhere = Device::emulator();
    let new = |device: &Device| OnDevice::new(device, &Tensor::<f32>::new(1, 300));
    let (mut one, mut two, mut foreign) = (new(&device), new(&device), new(&elsewhere));
    let mut table = device.alloc(TensorTable::bytes(2) + 16);
    let end = TensorTable::bytes(2);
    let mut refused = |tensors: Vec<TensorView<'_, f32>>, bytes: std::ops::Range<usize>, argument: &str| {
        match TensorTable::upload(queue, tensors, table.slice_mut(bytes)) {
            Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
            other => panic!("{argument}: {other:?}"),
        }
    };
    refused(vec![one.view(false), two.view(false)], 0..end - 1, "buffer");
    refused(vec![one.view(false), two.view(false)], 1..end + 1, "buffer");
    refused(vec![one.view(false), two.view(true)], 0..end, "tensors[1].moments");
    refused(vec![one.view(true), two.view(false)], 0..end, "tensors[1].moments");
    refused(vec![foreign.view(false)], 0..end, "tensors[0].parameter");
    let (short, short_codes) = (device.upload(&[0.0f32; 299]), device.upload(&[0u8; 299]));
    let (mut f32s, mut codes) =
        ([device.upload(&[0.0f32; 299]), device.upload(&[0.0f32; 1])], [device.upload(&[0u8; 299])]);
    drop(short_codes);
    refused(vec![TensorView { gradient: short.view(), ..one.view(false) }], 0..end, "tensors[0].gradient");
    let [m, scales] = &mut f32s;
    let mut view = one.view(false);
    if let Moments::F32 { m: moment, .. } = &mut view.moments {
        *moment = m.view_mut();
    }
    refused(vec![view], 0..end, "tensors[0].moments.m");
    let mut view = one.view(true);
    if let Moments::Blockwise { v, .. } = &mut view.moments {
        *v = codes[0].view_mut();
    }
    refused(vec![view], 0..end, "tensors[0].moments.v");
    let mut view = one.view(true);
    if let Moments::Blockwise { v_absmax, .. } = &mut view.moments {
        *v_absmax = scales.view_mut();
    }
    refused(vec![view], 0..end, "tensors[0].moments.v_absmax");

    let mut all = TensorTable::upload(queue, vec![one.view(false)], table.view_mut()).unwrap();
    let plan = adamw::plan(&all.shape(), properties).unwrap();
    let (mut workspace, mut status) = (device.alloc(plan.workspace_bytes), device.alloc::<Status>(2));
    let named = |result: lora_kernels::Result<()>| match result {
        Err(Error::Argument { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    for max_norm in [0.0, -1.0, f32::NAN] {
        let result = plan.norm(queue, &all, max_norm, workspace.view_mut(), status.slice_mut(..1));
        assert_eq!(named(result), "max_norm");
    }
    let result = plan.norm(queue, &all, 1.0, workspace.slice_mut(1..), status.slice_mut(..1));
    assert_eq!(named(result), "workspace");
    assert_eq!(named(plan.norm(queue, &all, 1.0, workspace.view_mut(), status.view_mut())), "status");
    let step = AdamW::default().step(0.1, 1).unwrap();
    assert_eq!(named(plan.step(queue, &step, &mut all, Some(status.view()), false)), "status");
    let other = adamw::plan(&adamw::Shape { tensors: 2, ..all.shape() }, properties).unwrap();
    assert_eq!(named(other.step(queue, &step, &mut all, None, false)), "tensors");
}
