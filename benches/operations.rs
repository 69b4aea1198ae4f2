//! Throughput of the operations: the same groups and data on the CPU and, where there is one, on the GPU.
//!
//! `cargo bench -- quantize/cpu` runs a part. With LORA_KERNELS_DEVICE=emulator the kernels run there, at the CPU's shapes:
//! `cargo bench -- --test` then shows that every benchmark works, and times mean nothing.

mod engines;

use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

use engines::{CHOICES, EXPERTS, Engine, Problem, RANK};

/// Tokens: from one sequence that is decoded to a small batch.
const TOKENS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Hands each engine and shape to `measure`, with a name like `cpu/1024x1024`.
fn each(
    criterion: &mut Criterion,
    group: &str,
    measure: impl Fn(&mut Group<'_>, &dyn Engine, &Problem, &str),
) {
    let mut group = criterion.benchmark_group(group);
    for engine in engines::all() {
        for &[n, k] in engine.shapes() {
            let name = format!("{}/{n}x{k}", engine.name());
            measure(&mut group, &*engine, &Problem::new(n, k), &name);
        }
    }
    group.finish();
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Times what `prepare` hands to it, calls in a row, with one wait for the device at the end.
fn time(
    group: &mut Group<'_>,
    engine: &dyn Engine,
    id: BenchmarkId,
    prepare: impl Fn(&mut dyn FnMut(&mut dyn FnMut())),
) {
    group.bench_function(id, |bencher| {
        prepare(&mut |call| {
            bencher.iter_custom(|calls| {
                engine.synchronize();
                let start = Instant::now();
                (0..calls).for_each(|_| call());
                engine.synchronize();
                start.elapsed()
            });
        });
    });
}

/// Bytes of 16-bit elements, and of their codes and scales.
fn dense_and_nf4_bytes(problem: &Problem) -> Throughput {
    let dense = 2 * problem.n * problem.k;
    Throughput::Bytes((dense + problem.plain.packed().len() + 4 * problem.plain.absmax().len()) as u64)
}

fn quantize(criterion: &mut Criterion) {
    each(criterion, "quantize", |group, engine, problem, name| {
        group.throughput(dense_and_nf4_bytes(problem));
        time(group, engine, BenchmarkId::new(name, "bf16"), |timer| engine.quantize(problem, timer));
    });
}

fn dequantize(criterion: &mut Criterion) {
    each(criterion, "dequantize", |group, engine, problem, name| {
        group.throughput(dense_and_nf4_bytes(problem));
        time(group, engine, BenchmarkId::new(name, "bf16"), |timer| engine.dequantize(problem, timer));
    });
}

/// `x Wᵀ` with W double quantised: bf16, and as many weights a second as there are.
fn matmul(criterion: &mut Criterion) {
    each(criterion, "matmul", |group, engine, problem, name| {
        group.throughput(Throughput::Elements((problem.n * problem.k) as u64));
        for m in TOKENS {
            let id = BenchmarkId::new(name, format!("M={m}"));
            time(group, engine, id, |timer| engine.matmul(problem, m, 0, timer));
        }
    });
}

/// The same with adapters of rank 16: one for all tokens, and one for each.
fn lora(criterion: &mut Criterion) {
    each(criterion, "lora", |group, engine, problem, name| {
        group.throughput(Throughput::Elements((problem.n * problem.k) as u64));
        for (m, adapters) in [(1, 1), (16, 1), (16, 16)] {
            let id = BenchmarkId::new(name, format!("M={m},r={RANK},adapters={adapters}"));
            time(group, engine, id, |timer| engine.matmul(problem, m, adapters, timer));
        }
    });
}

/// W as a stack of eight experts, of which each token has two.
fn experts(criterion: &mut Criterion) {
    each(criterion, "experts", |group, engine, problem, name| {
        group.throughput(Throughput::Elements((problem.n * problem.k) as u64));
        for m in [1, 16, 64] {
            let id = BenchmarkId::new(name, format!("M={m},experts={EXPERTS},choices={CHOICES}"));
            time(group, engine, id, |timer| engine.experts(problem, m, timer));
        }
    });
}

/// One adapter of rank 16 into the weight.
fn merge(criterion: &mut Criterion) {
    each(criterion, "merge", |group, engine, problem, name| {
        group.throughput(Throughput::Elements((problem.n * problem.k) as u64));
        time(group, engine, BenchmarkId::new(name, "bf16"), |timer| engine.merge(problem, timer));
        time(group, engine, BenchmarkId::new(name, "nf4"), |timer| engine.nf4_merge(problem, timer));
        time(group, engine, BenchmarkId::new(name, "nf4 again"), |timer| {
            engine.nf4_requantize(problem, timer)
        });
        time(group, engine, BenchmarkId::new(name, "report"), |timer| engine.merge_report(problem, timer));
    });
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
}

criterion_group! {
    name = operations;
    config = config();
    targets = quantize, dequantize, matmul, lora, experts, merge
}
criterion_main!(operations);
