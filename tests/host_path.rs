//! What a call costs the host: the plan, the checks and the packing of arguments, up to the driver. A queue that does nothing
//! stands in for the driver. A decoding engine makes hundreds of calls per token, so each has a budget.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use half::bf16;
use lora_kernels::cuda::matmul::{self, Extras, Weight, WeightFormat};
use lora_kernels::cuda::{
    AbsmaxView, AdapterTable, AdapterView, EncodedMap, Launch, LowRank, MemoryId, NestedView, Nf4View,
    Nf4ViewMut, Properties, Queue, TensorMap, UpdateView, View, ViewMut, dora_scale, expert_groups,
    expert_matmul, lora_expand, lora_shrink, merge, nf4_dequantize, nf4_merge, nf4_quantize,
};
use lora_kernels::nf4::Codebook;
use lora_kernels::{DType, Result};

/// For one call that launches what an operation needs, planned anew.
const BUDGET: Duration = Duration::from_micros(3);

const N: usize = 4096;
const K: usize = 14336;
const BLOCKS: usize = N * K / 64;

/// Counts launches.
struct Nowhere {
    properties: Properties,
    launches: AtomicUsize,
}

// SAFETY: nothing is run, so nothing is read or written.
unsafe impl Queue for Nowhere {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        black_box(launch);
        self.launches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    unsafe fn upload(&self, _destination: u64, bytes: &[u8]) -> Result<()> {
        black_box(bytes);
        Ok(())
    }

    fn encode(&self, map: &TensorMap<'_>) -> Result<EncodedMap> {
        map.check()?;
        Ok(EncodedMap([0; 16]))
    }
}

/// Memory that is not there, of any length.
struct Memory(MemoryId);

impl Memory {
    fn read<T: bytemuck::Pod>(&self, len: usize) -> View<'_, T> {
        // SAFETY: no one reads it: launches go nowhere.
        unsafe { View::from_raw(1 << 40, len, self.0) }
    }

    fn write<T: bytemuck::Pod>(&self, len: usize) -> ViewMut<'_, T> {
        // SAFETY: no one writes it.
        unsafe { ViewMut::from_raw(1 << 41, len, self.0) }
    }
}

/// The time of one call: the least of many batches, as anything above it is the machine's other work.
fn time(queue: &Nowhere, name: &str, launches: usize, call: impl Fn()) {
    const CALLS: u32 = 200;
    let before = queue.launches.load(Ordering::Relaxed);
    call();
    assert_eq!(queue.launches.load(Ordering::Relaxed) - before, launches, "launches of {name}");
    let batch = |_| {
        let start = Instant::now();
        (0..CALLS).for_each(|_| call());
        start.elapsed() / CALLS
    };
    let took = (0..100).map(batch).min().expect("batches");
    let headroom = 100.0 - 100.0 * took.as_secs_f64() / BUDGET.as_secs_f64();
    println!("{name:<40} {:>5} ns, {headroom:.0} % of the budget left", took.as_nanos());
    assert!(took < BUDGET, "{name} takes {took:?} on the host, more than {BUDGET:?}");
}

#[test]
fn every_call_is_within_its_budget() {
    let memory = Memory(MemoryId(1));
    let properties =
        Properties { capability: (9, 0), sm_count: 132, max_shared_bytes: 232_448, memory: memory.0 };
    let queue = Nowhere { properties, launches: AtomicUsize::new(0) };
    let codebook = Codebook::nf4();
    let nested = NestedView {
        q: memory.read(BLOCKS),
        absmax: memory.read(BLOCKS / 256),
        map: memory.read(256),
        offset: memory.read(1),
        blocksize: 256,
    };
    let codes = Nf4View {
        packed: memory.read(N * K / 2),
        absmax: AbsmaxView::Nested(nested),
        blocksize: 64,
        codebook: &codebook,
    };

    let adapters: Vec<_> = (0..64)
        .map(|i| {
            let rank = 8 << (i % 4);
            AdapterView::<bf16> {
                lora_a: memory.read(rank * K),
                lora_b: memory.read(N * rank),
                rank,
                scaling: 2.0,
            }
        })
        .collect();
    let buffer = memory.write(AdapterTable::<bf16>::bytes(adapters.len()));
    let table = AdapterTable::upload(&queue, &adapters, K, N, buffer).unwrap();
    let v_len = |tokens: usize| tokens * table.v_columns();

    for tokens in [1, 16, 64] {
        let index = Some(memory.read::<i32>(tokens));
        let shrink = || {
            let shape = table.shrink_shape(tokens, DType::BF16);
            let plan = lora_shrink::plan(&shape, &queue.properties).unwrap();
            plan.run(&queue, memory.read::<bf16>(tokens * K), &table, index, memory.write(plan.v_len()))
                .unwrap();
        };
        time(&queue, &format!("lora_shrink of {tokens} tokens"), 1, shrink);
        for (name, format, weight) in [
            ("4-bit", WeightFormat::Nf4 { blocksize: 64 }, Weight::Nf4(codes)),
            ("dense", WeightFormat::Dense, Weight::Dense(memory.read::<bf16>(N * K))),
        ] {
            let shape = matmul::Shape { tokens, n: N, k: K, dtype: DType::BF16, weight: format };
            let plan = matmul::plan(&shape, &queue.properties).unwrap();
            let launches = 1 + usize::from(plan.finish.is_some());
            time(&queue, &format!("{name} matmul of {tokens} tokens"), launches, || {
                let plan = matmul::plan(&shape, &queue.properties).unwrap();
                let extras = Extras {
                    bias: Some(memory.read(N)),
                    row_scale: Some(memory.read(N)),
                    low_rank: Some(LowRank { adapters: &table, index, v: memory.read(v_len(tokens)) }),
                    overlap: false,
                };
                let workspace = memory.write(plan.workspace_bytes);
                plan.run(
                    &queue,
                    memory.read(tokens * K),
                    &weight,
                    &extras,
                    memory.write(tokens * N),
                    workspace,
                )
                .unwrap();
            });
        }
        time(&queue, &format!("4-bit expert_matmul of {tokens} tokens"), 2, || {
            let shape = expert_matmul::Shape {
                tokens,
                choices: 2,
                experts: 8,
                n: N / 8,
                k: K,
                dtype: DType::BF16,
                weight: WeightFormat::Nf4 { blocksize: 64 },
            };
            let plan = expert_matmul::plan(&shape, &queue.properties).unwrap();
            let sort = expert_groups::plan(&plan.groups_shape(), &queue.properties).unwrap();
            let groups = sort.run(&queue, memory.read(plan.rows), memory.write(sort.len())).unwrap();
            let (x, y) = (memory.read(tokens * K), memory.write(plan.rows * N / 8));
            plan.run::<bf16, bf16>(&queue, x, &Weight::Nf4(codes), &groups, &Extras::default(), y).unwrap();
        });
        time(&queue, &format!("lora_expand of {tokens} tokens"), 1, || {
            let shape = lora_expand::Shape { tokens, n: N, dtype: DType::BF16, adapter_dtype: DType::BF16 };
            let plan = lora_expand::plan(&shape, &queue.properties).unwrap();
            let branch = LowRank { adapters: &table, index, v: memory.read(v_len(tokens)) };
            plan.run(&queue, &branch, memory.write::<bf16>(tokens * N)).unwrap();
        });
    }

    let update = UpdateView { adapters: &adapters[..8], row_scale: Some(memory.read(N)) };
    time(&queue, "merge of 8 adapters", 1, || {
        let shape = merge::Shape {
            n: N,
            k: K,
            fan_in_fan_out: false,
            dtype: DType::BF16,
            direction: merge::Direction::Merge,
        };
        let plan = merge::plan(&shape, &queue.properties).unwrap();
        plan.run(&queue, memory.read::<bf16>(N * K), &update, memory.write(N * K)).unwrap();
    });
    time(&queue, "nf4_merge of 8 adapters", 1, || {
        let target = nf4_merge::Target::Nf4;
        let shape = nf4_merge::Shape { n: N, k: K, blocksize: 64, dtype: DType::BF16, target };
        let plan = nf4_merge::plan(&shape, &codebook, &queue.properties).unwrap();
        let out = Nf4ViewMut { packed: memory.write(N * K / 2), absmax: memory.write(BLOCKS) };
        plan.run(&queue, &codes, &update, out).unwrap();
    });
    time(&queue, "dora_scale of 8 adapters", 2, || {
        let storage = dora_scale::Storage::Nf4 { blocksize: 64, dtype: DType::BF16 };
        let plan = dora_scale::plan(&dora_scale::Shape { n: N, k: K, storage }, &queue.properties).unwrap();
        let workspace = memory.write(plan.workspace_bytes());
        plan.run_nf4(&queue, &codes, &adapters[..8], memory.read(N), workspace, memory.write(N)).unwrap();
    });
    time(&queue, "nf4_quantize", 1, || {
        let shape = nf4_quantize::Shape { numel: N * K, blocksize: 64, dtype: DType::BF16 };
        let plan = nf4_quantize::plan(&shape, &codebook, &queue.properties).unwrap();
        let out = Nf4ViewMut { packed: memory.write(N * K / 2), absmax: memory.write(BLOCKS) };
        plan.run(&queue, memory.read::<bf16>(N * K), out).unwrap();
    });
    time(&queue, "nf4_dequantize", 1, || {
        let shape = nf4_dequantize::Shape { numel: N * K, blocksize: 64, dtype: DType::BF16 };
        let plan = nf4_dequantize::plan(&shape, &queue.properties).unwrap();
        plan.run(&queue, &codes, memory.write::<bf16>(N * K)).unwrap();
    });
}
