//! The calls with addresses do what the calls with views do, bit for bit, and refuse what those refuse.

mod on_device;
mod products;

use half::{bf16, f16};
use lora_kernels::cuda::{
    AdapterTable, LowRank, expert_groups, expert_index, expert_matmul, lora_shrink, matmul, merge,
    nf4_quantize, raw,
};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix, block_count, packed_len};
use lora_kernels::{DType, Element, Result, cpu};
use lora_kernels_devices::{Buffer, Device};
use on_device::{Data, assert_refuses, assert_same_bits};
use products::{DeviceAbsmax, DeviceWeight, Factors, Problem};

fn address<T: bytemuck::Pod>(buffer: &Buffer<T>) -> u64 {
    buffer.view().address()
}

fn raw_weight<T: Element>(weight: &DeviceWeight<T>) -> raw::Weight<'_> {
    match weight {
        DeviceWeight::Dense(values) => raw::Weight::Dense(address(values)),
        DeviceWeight::Nf4 { packed, absmax, blocksize, codebook } => raw::Weight::Nf4(raw::Nf4 {
            packed: address(packed),
            absmax: match absmax {
                DeviceAbsmax::Plain(absmax) => raw::Absmax::Plain(address(absmax)),
                DeviceAbsmax::Nested { q, absmax, map, offset, blocksize } => raw::Absmax::Nested {
                    q: address(q),
                    absmax: address(absmax),
                    map: address(map),
                    offset: address(offset),
                    blocksize: *blocksize,
                },
            },
            blocksize: *blocksize,
            codebook,
        }),
    }
}

/// A problem's adapters in device memory, and room for their table.
struct RawAdapters<A> {
    factors: Vec<(Buffer<A>, Buffer<A>, usize, f32)>,
    k: usize,
    n: usize,
    table: Buffer<u8>,
}

impl<A: Element> RawAdapters<A> {
    fn new<T>(device: &Device, problem: &Problem<T, A>) -> Self {
        let adapters = problem.adapters.iter().flatten();
        let upload = |a: &products::Adapter<A>| {
            (device.upload(&a.lora_a), device.upload(&a.lora_b), a.rank, a.scaling)
        };
        let factors: Vec<_> = adapters.map(upload).collect();
        let table = device.alloc(raw::table_bytes(factors.len()));
        Self { factors, k: problem.k, n: problem.n, table }
    }

    /// None where there are no adapters.
    fn table(&self, device: &Device) -> Result<Option<raw::Adapters>> {
        let adapter = |(a, b, rank, scaling): &(Buffer<A>, Buffer<A>, usize, f32)| raw::Adapter {
            lora_a: address(a),
            lora_b: address(b),
            rank: *rank,
            scaling: *scaling,
        };
        let adapters: Vec<_> = self.factors.iter().map(adapter).collect();
        if adapters.is_empty() {
            return Ok(None);
        }
        // SAFETY: the buffers live until the results have been read.
        unsafe {
            raw::adapters(device.queue(), &adapters, A::DTYPE, self.k, &[self.n], address(&self.table))
                .map(Some)
        }
    }
}

/// The same product by addresses. `change` may spoil the operands.
fn run<T: Element, A: Element>(
    device: &Device,
    problem: &Problem<T, A>,
    change: impl Fn(&mut raw::Matmul<'_>),
) -> Result<Vec<T>> {
    let queue = device.queue();
    let shape = problem.shape();
    let (x, weight) = (device.upload(&problem.x), DeviceWeight::new(device, &problem.weight));
    let bias = problem.bias.as_ref().map(|bias| device.upload(bias));
    let row_scale = problem.row_scale.as_ref().map(|scale| device.upload(scale));
    let index = problem.index.as_ref().map(|index| device.upload(index));
    let factors = RawAdapters::new(device, problem);
    let adapters = factors.table(device)?;
    let y = device.alloc::<T>(problem.tokens * problem.n);
    let scratch = device.alloc::<u8>(raw::scratch(queue, &shape, adapters.as_ref())?);
    let address_of = |buffer: &Option<Buffer<f32>>| buffer.as_ref().map_or(0, address);
    let mut operands = raw::Matmul {
        x: address(&x),
        weight: raw_weight(&weight),
        bias: bias.as_ref().map_or(0, address),
        row_scale: address_of(&row_scale),
        adapters: adapters
            .as_ref()
            .map(|adapters| raw::Branch { adapters, index: index.as_ref().map_or(0, address) }),
        y: address(&y),
        scratch: address(&scratch),
    };
    change(&mut operands);
    // SAFETY: the buffers are as long as the shape says, and live until the results have been read.
    unsafe { raw::matmul(queue, &shape, &operands)? };
    Ok(y.download())
}

#[test]
fn products_are_those_of_views() {
    fn all<T: Element, A: Element>(device: &Device) {
        for (tokens, n, k) in [(1, 70, 192), (5, 33, 47), (20, 130, 64), (3, 64, 4224)] {
            let dense = Problem::<T, A>::dense(tokens, n, k);
            let nf4 = |nesting| dense.clone().in_4_bits(64, &Codebook::nf4(), nesting);
            let adapted = |problem: Problem<T, A>| problem.with_bias_and_scale().with_adapters(&[8, 0, 3]);
            for problem in [
                dense.clone(),
                nf4(Nesting::Plain).with_bias_and_scale(),
                adapted(dense.clone()),
                adapted(nf4(Nesting::Nested)),
                Problem { index: None, ..nf4(Nesting::Plain).with_adapters(&[5]) },
            ] {
                let what = format!("{} {} [{tokens}, {n}, {k}]", T::DTYPE, A::DTYPE);
                assert_same_bits(&run(device, &problem, |_| ()).unwrap(), &problem.run(device).y, &what);
            }
        }
    }
    for device in Device::for_each_target() {
        all::<f32, f32>(&device);
        all::<f16, f16>(&device);
        all::<f16, f32>(&device);
        all::<bf16, bf16>(&device);
        all::<bf16, f32>(&device);
    }
}

/// A mixture of experts: a stack of weights, rows that choose, and of every token an adapter with parts for all experts.
struct Mixture<T, A = T> {
    shape: expert_matmul::Shape,
    /// x, the stack, bias and scale.
    stack: Problem<T, A>,
    /// Adapters.
    rows: Problem<T, A>,
    expert: Vec<i32>,
    adapter: Vec<i32>,
}

impl<T: Element, A: Element> Mixture<T, A> {
    fn new([tokens, choices, experts]: [usize; 3], n: usize, k: usize, codes: bool) -> Self {
        let mut stack = Problem::<T, A>::dense(tokens, experts * n, k).with_bias_and_scale();
        if codes {
            stack = stack.in_4_bits(64, &Codebook::nf4(), Nesting::Nested);
        }
        let weight = stack.shape().weight;
        let ranks: Vec<_> = (0..2 * experts).map(|i| [8, 0, 3][i % 3]).collect();
        let rows = Problem { k, ..Problem::dense(tokens * choices, n, 0) }.with_adapters(&ranks);
        Self {
            shape: expert_matmul::Shape { tokens, choices, experts, n, k, dtype: T::DTYPE, weight },
            stack,
            rows,
            // Some rows have no expert, some tokens no adapter.
            expert: (0..tokens * choices).map(|i| (i * 5 % (experts + 1)) as i32 - 1).collect(),
            adapter: (0..tokens).map(|i| (i % 3) as i32 - 1).collect(),
        }
    }

    fn index_shape(&self) -> expert_index::Shape {
        let expert_matmul::Shape { tokens, choices, experts, .. } = self.shape;
        expert_index::Shape { tokens, choices, adapters: 2, experts }
    }

    /// Groups, index and y by views.
    fn run(&self, device: &Device) -> (Vec<i32>, Vec<i32>, Vec<T>) {
        let (queue, properties) = (device.queue(), device.queue().properties());
        let plan = expert_matmul::plan(&self.shape, properties).unwrap();
        let (x, weight) = (device.upload(&self.stack.x), DeviceWeight::new(device, &self.stack.weight));
        let bias = device.upload(self.stack.bias.as_ref().unwrap());
        let row_scale = device.upload(self.stack.row_scale.as_ref().unwrap());
        let (expert, adapter) = (device.upload(&self.expert), device.upload(&self.adapter));
        let sort = expert_groups::plan(&plan.groups_shape(), properties).unwrap();
        let (mut buffer, mut index) = (device.alloc(sort.len()), device.alloc(plan.rows));
        let groups = sort.run(queue, expert.view(), buffer.view_mut()).unwrap();
        let indices = expert_index::plan(&self.index_shape(), properties).unwrap();
        indices.run(queue, adapter.view(), expert.view(), index.view_mut()).unwrap();
        let factors = Factors::new(device, self.rows.adapters.as_ref().unwrap());
        let mut entries = device.alloc(AdapterTable::<A>::bytes(factors.count()));
        let table = factors.table(device, self.shape.k, self.shape.n, &mut entries).unwrap();
        let shrink = lora_shrink::plan(&table.shrink_shape(plan.rows, T::DTYPE), properties).unwrap();
        let shrink = shrink.with_choices(self.shape.choices).unwrap();
        let mut v = device.alloc(shrink.v_len());
        shrink.run(queue, x.view(), &table, Some(index.view()), v.view_mut()).unwrap();
        let extras = matmul::Extras {
            bias: Some(bias.view()),
            row_scale: Some(row_scale.view()),
            low_rank: Some(LowRank { adapters: &table, index: Some(index.view()), v: v.view() }),
            overlap: false,
        };
        let mut y = device.alloc(plan.rows * self.shape.n);
        plan.run(queue, x.view(), &weight.view(), &groups, &extras, y.view_mut()).unwrap();
        (buffer.download(), index.download(), y.download())
    }

    /// The same by addresses. `change` may spoil the operands.
    fn run_raw(
        &self,
        device: &Device,
        change: impl Fn(&mut raw::ExpertMatmul<'_>),
    ) -> Result<(Vec<i32>, Vec<i32>, Vec<T>)> {
        let (queue, rows) = (device.queue(), self.expert.len());
        let groups_shape = expert_groups::Shape { rows, experts: self.shape.experts };
        let (x, weight) = (device.upload(&self.stack.x), DeviceWeight::new(device, &self.stack.weight));
        let bias = device.upload(self.stack.bias.as_ref().unwrap());
        let row_scale = device.upload(self.stack.row_scale.as_ref().unwrap());
        let (expert, adapter) = (device.upload(&self.expert), device.upload(&self.adapter));
        let groups = device.alloc::<i32>(raw::expert_groups_bytes(queue, &groups_shape)? / 4);
        let index = device.alloc::<i32>(rows);
        let factors = RawAdapters::new(device, &self.rows);
        let adapters = factors.table(device)?.unwrap();
        let scratch = device.alloc::<u8>(raw::expert_scratch(queue, &self.shape, Some(&adapters))?);
        let y = device.alloc::<T>(rows * self.shape.n);
        let mut operands = raw::ExpertMatmul {
            x: address(&x),
            weight: raw_weight(&weight),
            groups: address(&groups),
            bias: address(&bias),
            row_scale: address(&row_scale),
            adapters: Some(raw::Branch { adapters: &adapters, index: address(&index) }),
            y: address(&y),
            scratch: address(&scratch),
        };
        change(&mut operands);
        // SAFETY: the buffers are as long as the shape says, and live until the results have been read.
        unsafe {
            raw::expert_groups(queue, &groups_shape, address(&expert), address(&groups))?;
            let (adapter, expert) = (address(&adapter), address(&expert));
            raw::expert_index(queue, &self.index_shape(), adapter, expert, address(&index))?;
            raw::expert_matmul(queue, &self.shape, &operands)?;
        }
        Ok((groups.download(), index.download(), y.download()))
    }
}

#[test]
fn mixtures_are_those_of_views() {
    fn all<T: Element, A: Element>(device: &Device) {
        for (sizes, n, k, codes) in
            [([3, 2, 4], 40, 128, true), ([1, 3, 2], 33, 47, false), ([30, 1, 2], 64, 64, true)]
        {
            let mixture = Mixture::<T, A>::new(sizes, n, k, codes);
            let (groups, index, y) = mixture.run_raw(device, |_| ()).unwrap();
            let wanted = mixture.run(device);
            let what = format!("{} {} {sizes:?} [{n}, {k}]", T::DTYPE, A::DTYPE);
            assert_eq!((groups, index), (wanted.0, wanted.1), "{what}");
            assert_same_bits(&y, &wanted.2, &what);
        }
    }
    for device in Device::for_each_target() {
        all::<f16, f16>(&device);
        all::<f16, f32>(&device);
        all::<bf16, bf16>(&device);
        all::<bf16, f32>(&device);
    }
}

#[test]
fn mixtures_that_do_not_fit_are_refused() {
    let device = Device::best();
    let mixture = Mixture::<bf16>::new([3, 2, 4], 32, 64, true);
    assert_refuses(mixture.run_raw(&device, |o| o.x = 0), "x");
    assert_refuses(mixture.run_raw(&device, |o| o.x += 2), "x");
    assert_refuses(mixture.run_raw(&device, |o| o.y = 0), "y");
    assert_refuses(mixture.run_raw(&device, |o| o.groups = 0), "groups");
    assert_refuses(mixture.run_raw(&device, |o| o.groups += 2), "groups");
    assert_refuses(mixture.run_raw(&device, |o| o.scratch = 0), "scratch");
    assert_refuses(mixture.run_raw(&device, |o| o.weight = raw::Weight::Dense(o.x)), "weight");
    assert_refuses(mixture.run_raw(&device, |o| o.bias += 1), "bias");

    let (queue, buffer) = (device.queue(), device.alloc::<i32>(64));
    let at = address(&buffer);
    let groups = |rows, experts, expert, groups| {
        // SAFETY: nothing that is refused is read.
        unsafe { raw::expert_groups(queue, &expert_groups::Shape { rows, experts }, expert, groups) }
    };
    assert_refuses(groups(4, 2, 0, at), "expert");
    assert_refuses(groups(4, 2, at, 0), "groups");
    assert_refuses(groups(usize::MAX, 2, at, at), "rows");
    assert_refuses(groups(4, usize::MAX, at, at), "experts");
    let index = |tokens, adapter, expert, index| {
        let shape = expert_index::Shape { tokens, choices: 2, adapters: 1, experts: 2 };
        // SAFETY: the same.
        unsafe { raw::expert_index(queue, &shape, adapter, expert, index) }
    };
    assert_refuses(index(2, 0, at, at), "adapter");
    assert_refuses(index(2, at, 0, at), "expert");
    assert_refuses(index(2, at, at, 0), "index");
    assert_refuses(index(usize::MAX, at, at, at), "tokens");
    let f32 = expert_matmul::Shape { dtype: DType::F32, ..mixture.shape };
    assert_refuses(raw::expert_scratch(queue, &f32, None), "dtype");
    // Adapters of another module.
    let Mixture { rows, .. } = Mixture::<bf16>::new([3, 2, 4], 48, 64, true);
    assert_refuses(Mixture { rows, ..mixture }.run_raw(&device, |_| ()), "adapters.n");
}

#[test]
fn codes_go_back_and_forth() {
    fn all<T: Element>(device: &Device) {
        let mut data = Data(7);
        for (numel, blocksize) in [(1, 64), (4099, 32), (8192, 4096)] {
            let x = data.normal::<T>(numel, 1.0);
            let codebook = Codebook::nf4();
            let want = Nf4Matrix::quantize(&x, [numel], blocksize, &codebook, Nesting::Plain).unwrap();
            let buffer = device.upload(&x);
            let (packed, absmax) =
                (device.alloc::<u8>(packed_len(numel)), device.alloc::<f32>(block_count(numel, blocksize)));
            let shape = nf4_quantize::Shape { numel, blocksize, dtype: T::DTYPE };
            let out = device.alloc::<T>(numel);
            let nf4 = raw::Nf4 {
                packed: address(&packed),
                absmax: raw::Absmax::Plain(address(&absmax)),
                blocksize,
                codebook: &codebook,
            };
            // SAFETY: the buffers are as long as the shape says, and live until the results have been read.
            unsafe {
                let (x, packed, absmax) = (address(&buffer), address(&packed), address(&absmax));
                raw::nf4_quantize(device.queue(), &shape, &codebook, x, packed, absmax).unwrap();
                raw::nf4_dequantize(device.queue(), &nf4, numel, T::DTYPE, address(&out)).unwrap();
            }
            assert_eq!(packed.download(), want.packed());
            assert_same_bits(&absmax.download(), &want.absmax().dequantize(), "absmax");
            assert_same_bits(&out.download(), &want.dequantize::<T>(), "elements");
        }
    }
    let device = Device::best();
    all::<f32>(&device);
    all::<f16>(&device);
    all::<bf16>(&device);
}

#[test]
fn merges_are_those_of_the_reference() {
    fn all<T: Element, A: Element>(device: &Device) {
        let (mut data, [n, k]) = (Data(9), [66, 40]);
        let weight = data.normal::<T>(n * k, 0.05);
        let scale: Vec<f32> = data.normal::<f32>(n, 0.1).iter().map(|x| 1.0 + x).collect();
        let adapter = on_device::Adapter::<A>::random(device, &mut data, [n, k], 5, 0.02);
        let view = adapter.view();
        let (lora_a, lora_b) = (view.lora_a.address(), view.lora_b.address());
        let raw_adapter = raw::Adapter { lora_a, lora_b, rank: view.rank, scaling: view.scaling };
        for row_scale in [None, Some(&scale[..])] {
            for direction in [merge::Direction::Merge, merge::Direction::Unmerge] {
                let (host, mut want) = ([adapter.host()], vec![T::from_f32(0.0); n * k]);
                let update = cpu::Update { adapters: &host, row_scale, fan_in_fan_out: false };
                match direction {
                    merge::Direction::Merge => cpu::merge(&weight, [n, k], &update, &mut want).unwrap(),
                    merge::Direction::Unmerge => cpu::unmerge(&weight, [n, k], &update, &mut want).unwrap(),
                }
                let shape = merge::Shape { n, k, fan_in_fan_out: false, dtype: T::DTYPE, direction };
                let (w, out) = (device.upload(&weight), device.alloc::<T>(n * k));
                let scale = row_scale.map(|scale| device.upload(scale));
                let scale_address = scale.as_ref().map_or(0, address);
                for to in [&out, &w] {
                    // SAFETY: the buffers are as long as the shape says, and live until the results have been read.
                    unsafe {
                        let (queue, adapters) = (device.queue(), [raw_adapter]);
                        raw::merge(
                            queue,
                            &shape,
                            address(&w),
                            &adapters,
                            A::DTYPE,
                            scale_address,
                            address(to),
                        )
                        .unwrap();
                    }
                    assert_same_bits(
                        &to.download(),
                        &want,
                        &format!("{} {} {direction:?}", T::DTYPE, A::DTYPE),
                    );
                }
            }
        }
    }
    let device = Device::best();
    all::<f32, f32>(&device);
    all::<f32, bf16>(&device);
    all::<f16, f16>(&device);
    all::<bf16, f32>(&device);
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = Device::best();
    let problem = Problem::<bf16>::nf4(3, 32, 64, 64).with_bias_and_scale().with_adapters(&[8, 4]);
    assert_refuses(run(&device, &problem, |o| o.x = 0), "x");
    assert_refuses(run(&device, &problem, |o| o.x += 2), "x");
    assert_refuses(run(&device, &problem, |o| o.y = 0), "y");
    assert_refuses(run(&device, &problem, |o| o.scratch = 0), "scratch");
    assert_refuses(run(&device, &problem, |o| o.weight = raw::Weight::Dense(o.x)), "weight");
    let spoil = |spoil: fn(&mut raw::Nf4<'_>)| {
        move |o: &mut raw::Matmul<'_>| {
            let raw::Weight::Nf4(nf4) = &mut o.weight else { panic!("a 4-bit weight") };
            spoil(nf4);
        }
    };
    assert_refuses(run(&device, &problem, spoil(|nf4| nf4.packed = 0)), "weight.packed");
    assert_refuses(run(&device, &problem, spoil(|nf4| nf4.absmax = raw::Absmax::Plain(0))), "weight.absmax");
    assert_refuses(run(&device, &problem, spoil(|nf4| nf4.blocksize = 0)), "weight.blocksize");
    assert_refuses(run(&device, &problem, spoil(|nf4| nf4.blocksize = 128)), "weight.blocksize");

    let queue = device.queue();
    let adapter = raw::Adapter { lora_a: 0, lora_b: 0, rank: 4, scaling: 1.0 };
    let table = device.alloc::<u8>(raw::table_bytes(1));
    let upload = |adapter: raw::Adapter, slices: &[usize], buffer: u64| {
        // SAFETY: nothing that is refused is read.
        unsafe { raw::adapters(queue, &[adapter], DType::F16, 64, slices, buffer) }
    };
    assert_refuses(upload(adapter, &[32], address(&table)), "adapters[0].factors");
    assert_refuses(upload(raw::Adapter { rank: 0, ..adapter }, &[32], 0), "buffer");
    assert_refuses(upload(raw::Adapter { rank: 0, ..adapter }, &[], address(&table)), "slices");
    let huge = raw::Adapter { rank: usize::MAX, ..adapter };
    assert_refuses(upload(huge, &[32], address(&table)), "adapters[0].rank");
    // f16 factors under bf16 activations.
    let none = upload(raw::Adapter { rank: 0, ..adapter }, &[32], address(&table)).unwrap();
    assert_refuses(raw::scratch(queue, &problem.shape(), Some(&none)), "adapters.dtype");
    let shape = matmul::Shape { dtype: DType::F32, ..problem.shape() };
    let operands = raw::Matmul {
        x: 0,
        weight: raw::Weight::Dense(0),
        bias: 0,
        row_scale: 0,
        adapters: Some(raw::Branch { adapters: &none, index: 0 }),
        y: 0,
        scratch: 0,
    };
    // SAFETY: the same.
    assert_refuses(unsafe { raw::matmul(queue, &shape, &operands) }, "adapters");
    let huge = merge::Shape {
        n: usize::MAX,
        k: 2,
        fan_in_fan_out: false,
        dtype: DType::F32,
        direction: merge::Direction::Merge,
    };
    // SAFETY: the same.
    assert_refuses(unsafe { raw::merge(queue, &huge, 0, &[], DType::F32, 0, 0) }, "n");
}
