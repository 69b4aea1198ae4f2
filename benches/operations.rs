//! Throughput of every operation, on the CPU and, where there is one, on the GPU: the same groups, shapes and data.
//!
//! `cargo bench -- quantize` runs one group. Shapes are small so that all of it takes a minute or two on a laptop.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use lora_kernels::Element;
use lora_kernels::nf4::{self, Codebook};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const BLOCKSIZE: usize = 64;

/// Numbers like those of a trained weight: zero mean, a hundredth in size.
fn weights<T: Element>(len: usize) -> Vec<T> {
    let mut random = StdRng::seed_from_u64(7);
    (0..len).map(|_| T::from_f32((0..4).map(|_| random.random_range(-0.01f32..0.01)).sum())).collect()
}

fn quantize_as<T: Element>(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quantize");
    let x = weights::<T>(1 << 22);
    let (mut packed, mut absmax) = (vec![0; x.len() / 2], vec![0.0; x.len() / BLOCKSIZE]);
    group.throughput(Throughput::Bytes(size_of_val(&x[..]) as u64));
    group.bench_function(BenchmarkId::new("cpu", T::DTYPE), |bench| {
        bench.iter(|| {
            nf4::quantize(black_box(&x), BLOCKSIZE, &Codebook::nf4(), &mut packed, &mut absmax).unwrap()
        });
    });
}

fn dequantize_as<T: Element>(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dequantize");
    let mut out = weights::<T>(1 << 22);
    let (mut packed, mut absmax) = (vec![0; out.len() / 2], vec![0.0; out.len() / BLOCKSIZE]);
    nf4::quantize(&out, BLOCKSIZE, &Codebook::nf4(), &mut packed, &mut absmax).unwrap();
    group.throughput(Throughput::Bytes(size_of_val(&out[..]) as u64));
    group.bench_function(BenchmarkId::new("cpu", T::DTYPE), |bench| {
        bench.iter(|| {
            nf4::dequantize(black_box(&packed), &absmax, BLOCKSIZE, &Codebook::nf4(), &mut out).unwrap()
        });
    });
}

fn quantize(criterion: &mut Criterion) {
    quantize_as::<f32>(criterion);
    quantize_as::<half::f16>(criterion);
    quantize_as::<bf16>(criterion);
}

fn dequantize(criterion: &mut Criterion) {
    dequantize_as::<f32>(criterion);
    dequantize_as::<half::f16>(criterion);
    dequantize_as::<bf16>(criterion);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(std::time::Duration::from_millis(500)).measurement_time(std::time::Duration::from_secs(1));
    targets = quantize, dequantize
}
criterion_main!(benches);
