//! The backward pass and the step: how long the kernels take at Llama-3-8B's projections, 4096 tokens and rank 16, bf16 activations
//! over a 4-bit base (and dX over a dense one) with an f32 adapter. `cargo bench --bench training -- dx` runs a part.
//!
//! Without a GPU the same code runs once on toy sizes, in the emulator, and its times mean nothing.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use lora_kernels::DType;
use lora_kernels::cpu::{AdamW, Dropout};
use lora_kernels::cuda::adamw::{self, Moments, Status, TensorTable, TensorView};
use lora_kernels::cuda::lora_gradient::{self, Batch};
use lora_kernels::cuda::matmul::{Shape, Weight, WeightFormat};
use lora_kernels::cuda::{
    AbsmaxView, AdapterTable, AdapterView, GradientTable, GradientView, LowRank, Nf4View, lora_shrink,
    matmul_transposed,
};
use lora_kernels::nf4::Codebook;
use lora_kernels_devices::{Buffer, Device};

/// Outputs and inputs.
const PROJECTIONS: [(&str, usize, usize); 4] =
    [("q,o", 4096, 4096), ("k,v", 1024, 4096), ("gate,up", 14336, 4096), ("down", 4096, 14336)];
const TOY: [(&str, usize, usize); 1] = [("toy", 64, 128)];
const BLOCKSIZE: usize = 64;

/// Numbers that are nothing special.
fn values(len: usize) -> impl Iterator<Item = f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
}

/// The GPU, with real sizes; or the emulator, with toy ones.
fn device() -> (Device, &'static [(&'static str, usize, usize)], usize, usize) {
    match Device::cuda() {
        Ok(device) if std::env::var("LORA_KERNELS_DEVICE").as_deref() != Ok("emulator") => {
            (device, &PROJECTIONS, 4096, 16)
        }
        _ => (Device::emulator(), &TOY, 24, 4),
    }
}

fn backward(criterion: &mut Criterion) {
    let (device, projections, tokens, rank) = device();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let halves =
        |len: usize| -> Buffer<bf16> { device.upload(&values(len).map(bf16::from_f32).collect::<Vec<_>>()) };
    let floats = |len: usize| -> Buffer<f32> { device.upload(&values(len).collect::<Vec<_>>()) };
    for &(name, n, k) in projections {
        let mut group = criterion.benchmark_group(format!("training/{name}"));
        group.throughput(Throughput::Elements(2 * (tokens * n * k) as u64));
        let (x, dy) = (halves(tokens * k), halves(tokens * n));
        let packed: Buffer<u8> =
            device.upload(&values(n * k / 2).map(|v| v.to_bits() as u8).collect::<Vec<_>>());
        let (absmax, codebook) = (floats(n * k / BLOCKSIZE), Codebook::nf4());
        let absmax = AbsmaxView::Plain(absmax.view());
        let weight =
            Weight::Nf4(Nf4View { packed: packed.view(), absmax, blocksize: BLOCKSIZE, codebook: &codebook });
        let (lora_a, lora_b) = (floats(rank * k), floats(n * rank));
        let adapter = AdapterView { lora_a: lora_a.view(), lora_b: lora_b.view(), rank, scaling: 2.0 };
        let mut entries = device.alloc(AdapterTable::<f32>::bytes(1));
        let table = AdapterTable::upload(queue, &[adapter], k, n, entries.view_mut()).unwrap();
        let dropout = Dropout::new(0.05, 1, 2).unwrap();

        let forward = lora_shrink::plan(&table.shrink_shape(tokens, DType::BF16), properties).unwrap();
        let mut v = device.alloc::<f32>(forward.v_len());
        forward.run(queue, x.view(), &table, None, v.view_mut()).unwrap();
        let shape = table.shrink_transposed_shape(tokens, DType::BF16);
        let transposed = lora_shrink::plan_transposed(&shape, properties).unwrap();
        let mut u = device.alloc::<f32>(transposed.v_len());
        let mut time = |id: &str, work: &mut dyn FnMut()| {
            group.bench_function(BenchmarkId::new(id, tokens), |bencher| {
                bencher.iter_custom(|calls| device.time(|| (0..calls).for_each(|_| work())));
            });
        };
        time("u", &mut || transposed.run(queue, dy.view(), &table, None, u.view_mut()).unwrap());

        let format = WeightFormat::Nf4 { blocksize: BLOCKSIZE };
        let shape = Shape { tokens, n, k, dtype: DType::BF16, weight: format };
        let plan = matmul_transposed::plan(&shape, properties).unwrap();
        let mut workspace = device.alloc::<u8>(plan.workspace_bytes);
        let mut dx = device.alloc::<bf16>(tokens * k);
        let branch = LowRank { adapters: &table, index: None, v: u.view() };
        for (id, branch, plan) in [
            ("dx", None, plan),
            ("dx+lora", Some(&branch), plan),
            ("dx+dropout", Some(&branch), plan.with_dropout(dropout)),
        ] {
            time(id, &mut || {
                let scratch = workspace.view_mut();
                plan.run::<bf16, f32>(queue, dy.view(), &weight, branch, dx.view_mut(), scratch).unwrap();
            });
        }

        let dense = halves(n * k);
        let shape = Shape { weight: WeightFormat::Dense, ..shape };
        let plan = matmul_transposed::plan(&shape, properties).unwrap();
        let mut scratch = device.alloc::<u8>(plan.workspace_bytes);
        time("dx of dense", &mut || {
            let (weight, scratch) = (Weight::Dense(dense.view()), scratch.view_mut());
            plan.run::<bf16, f32>(queue, dy.view(), &weight, None, dx.view_mut(), scratch).unwrap();
        });

        let (mut da, mut db) = (floats(rank * k), floats(n * rank));
        let mut buffer = device.alloc(GradientTable::bytes(1));
        let view = GradientView { lora_a: da.view_mut(), lora_b: db.view_mut(), rank };
        let mut gradients = GradientTable::upload(queue, vec![view], k, n, buffer.view_mut()).unwrap();
        let plan = lora_gradient::plan(&gradients.shape(tokens, DType::BF16), properties).unwrap();
        let mut workspace = device.alloc::<u8>(plan.workspace_bytes);
        let batch = Batch { x: x.view(), dy: dy.view(), v: v.view(), u: u.view(), index: None };
        for (id, plan) in [("dA,dB", plan), ("dA,dB+dropout", plan.with_dropout(dropout))] {
            time(id, &mut || plan.run(queue, &batch, true, &mut gradients, workspace.view_mut()).unwrap());
        }
        group.finish();
    }
}

/// All adapters of a model: 32 layers of seven projections.
fn step(criterion: &mut Criterion) {
    let (device, projections, _, rank) = device();
    let (queue, layers) = (device.queue(), if projections.len() > 1 { 32 } else { 1 });
    let lengths: Vec<usize> =
        (0..layers).flat_map(|_| projections.iter().flat_map(|&(_, n, k)| [n * rank, rank * k])).collect();
    let mut group = criterion.benchmark_group("training/adamw");
    group.throughput(Throughput::Elements(lengths.iter().sum::<usize>() as u64));
    for blockwise in [false, true] {
        let zeros = |len: usize| device.upload(&vec![0.0f32; len]);
        let mut parameters: Vec<_> =
            lengths.iter().map(|&len| [zeros(len), zeros(len), zeros(len), zeros(len)]).collect();
        let mut codes: Vec<_> = lengths
            .iter()
            .map(|&len| {
                (
                    [device.upload(&vec![127u8; len]), device.upload(&vec![0u8; len])],
                    [zeros(len.div_ceil(256)), zeros(len.div_ceil(256))],
                )
            })
            .collect();
        let views =
            parameters.iter_mut().zip(&mut codes).map(|([p, g, m, v], ([mc, vc], [ma, va]))| TensorView {
                parameter: p.view_mut(),
                gradient: g.view(),
                moments: match blockwise {
                    true => Moments::Blockwise {
                        m: mc.view_mut(),
                        m_absmax: ma.view_mut(),
                        v: vc.view_mut(),
                        v_absmax: va.view_mut(),
                    },
                    false => Moments::F32 { m: m.view_mut(), v: v.view_mut() },
                },
            });
        let views = views.collect();
        let mut buffer = device.alloc(TensorTable::bytes(lengths.len()));
        let mut tensors = TensorTable::upload(queue, views, buffer.view_mut()).unwrap();
        let plan = adamw::plan(&tensors.shape(), queue.properties()).unwrap();
        let (mut workspace, mut status) =
            (device.alloc::<u8>(plan.workspace_bytes), device.alloc::<Status>(1));
        let factors = AdamW::default().step(1e-4, 1).unwrap();
        let mut work = || {
            plan.norm(queue, &tensors, 1.0, workspace.view_mut(), status.view_mut()).unwrap();
            plan.step(queue, &factors, &mut tensors, Some(status.view()), true).unwrap();
        };
        group.bench_function(if blockwise { "8bit" } else { "f32" }, |bencher| {
            bencher.iter_custom(|calls| device.time(|| (0..calls).for_each(|_| work())));
        });
    }
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
}

criterion_group! {
    name = training;
    config = config();
    targets = backward, step
}
criterion_main!(training);
