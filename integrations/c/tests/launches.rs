//! The calls on device memory, in the emulator or on a GPU: what they compute is what the calls on host memory do.

use std::ffi::{CStr, c_void};
use std::ptr::null_mut;

use lora_kernels::Result;
use lora_kernels::cuda::{EncodedMap, Launch, Properties, Queue, TensorMap};
use lora_kernels_c::*;
use lora_kernels_devices::{Buffer, Device};

/// A device's queue that can be owned.
struct Owned(Device);

// SAFETY: it is the device's queue.
unsafe impl Queue for Owned {
    fn properties(&self) -> &Properties {
        self.0.queue().properties()
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.queue().launch(launch) }
    }

    unsafe fn upload(&self, destination: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.queue().upload(destination, bytes) }
    }

    fn encode(&self, map: &TensorMap<'_>) -> Result<EncodedMap> {
        self.0.queue().encode(map)
    }
}

fn message() -> String {
    // SAFETY: the message lives until the next failure.
    unsafe { CStr::from_ptr(lk_last_error()) }.to_str().unwrap().to_owned()
}

#[track_caller]
fn ok(status: LkStatus) {
    assert_eq!(status, LkStatus::Ok, "{}", message());
}

fn at<T: bytemuck::Pod>(buffer: &Buffer<T>) -> u64 {
    buffer.view().address()
}

/// Numbers that look random, between -1 and 1.
fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| number()).collect()
}

const TOKENS: usize = 5;
const N: usize = 24;
const K: usize = 128;
const RANK: usize = 4;

#[test]
fn a_layer_from_codes_to_outputs() {
    let device = Device::best();
    let queue = LkQueue::new(Owned(device.clone()));
    let (w, x, bias) = (numbers(1, N * K), numbers(2, TOKENS * K), numbers(3, N));
    let (a, b) = (numbers(4, RANK * K), numbers(5, N * RANK));
    let index = [0, -1, 0, 0, -1];

    // On the host.
    let mut nf4 = null_mut();
    let mut want = vec![0.0f32; TOKENS * N];
    let adapter = LkAdapter {
        lora_a: a.as_ptr().cast(),
        lora_b: b.as_ptr().cast(),
        magnitude: std::ptr::null(),
        rank: RANK,
        scaling: 0.5,
    };
    // SAFETY: pointers to arrays of these sizes.
    unsafe {
        ok(lk_nf4_quantize(w.as_ptr().cast(), LK_F32, N, K, 64, false, &mut nf4));
        ok(lk_matmul(&LkMatmul {
            tokens: TOKENS,
            dtype: LK_F32,
            adapter_dtype: LK_F32,
            weight: LkWeight { n: N, k: K, dense: std::ptr::null(), nf4 },
            x: x.as_ptr().cast(),
            bias: bias.as_ptr().cast(),
            row_scale: std::ptr::null(),
            adapters: &adapter,
            adapter_count: 1,
            adapter_index: index.as_ptr(),
            y: want.as_mut_ptr().cast(),
        }));
    }

    // On the device.
    let (dw, dx, dbias) = (device.upload(&w), device.upload(&x), device.upload(&bias));
    let (da, db, dindex) = (device.upload(&a), device.upload(&b), device.upload(&index));
    let (packed, absmax) = (device.alloc::<u8>(N * K / 2), device.alloc::<f32>(N * K / 64));
    let (decoded, y) = (device.alloc::<f32>(N * K), device.alloc::<f32>(TOKENS * N));
    let table = device.alloc::<u8>(lk_cuda_adapters_bytes(1));
    let cuda_adapter = LkCudaAdapter { lora_a: at(&da), lora_b: at(&db), rank: RANK, scaling: 0.5 };
    let cuda_nf4 = LkCudaNf4 {
        packed: at(&packed),
        absmax: at(&absmax),
        nested_q: 0,
        nested_absmax: 0,
        nested_map: 0,
        nested_offset: 0,
        nested_blocksize: 0,
        blocksize: 64,
        codebook: std::ptr::null(),
    };
    let mut adapters = null_mut();
    let mut operands = LkCudaMatmul {
        tokens: TOKENS,
        n: N,
        k: K,
        dtype: LK_F32,
        x: at(&dx),
        dense: 0,
        nf4: &cuda_nf4,
        bias: at(&dbias),
        row_scale: 0,
        adapters: std::ptr::null(),
        adapter_index: at(&dindex),
        y: at(&y),
        scratch: 0,
    };
    let mut bytes = 0;
    // SAFETY: the buffers have these sizes, and live until the results have been read.
    unsafe {
        ok(lk_cuda_nf4_quantize(&queue, at(&dw), LK_F32, N * K, 64, at(&packed), at(&absmax)));
        ok(lk_cuda_nf4_dequantize(&queue, &cuda_nf4, N * K, LK_F32, at(&decoded)));
        let slices = [N];
        let slices = slices.as_ptr();
        ok(lk_cuda_adapters_new(&queue, &cuda_adapter, 1, LK_F32, K, slices, 1, at(&table), &mut adapters));
        operands.adapters = adapters;
        ok(lk_cuda_matmul_scratch(&queue, &operands, &mut bytes));
    }
    let scratch = device.alloc::<u8>(bytes);
    operands.scratch = at(&scratch);
    // SAFETY: as above.
    unsafe { ok(lk_cuda_matmul(&queue, &operands)) };

    // The same codes; and both products are sums of K, then RANK products in f32, with four roundings more: within twice that many
    // unit roundoffs of the sum of magnitudes of each other.
    let mut host = vec![0.0f32; N * K];
    // SAFETY: an array of that size, and a handle that is not used any more.
    unsafe {
        ok(lk_nf4_dequantize(nf4, LK_F32, host.as_mut_ptr().cast(), N * K));
        lk_nf4_free(nf4);
        lk_cuda_adapters_free(adapters);
    }
    assert_eq!(decoded.download(), host);
    for (i, (got, want)) in y.download().iter().zip(&want).enumerate() {
        let (token, row) = (i / N, i % N);
        let dot = |p: &[f32], q: &[f32]| p.iter().zip(q).map(|(p, q)| f64::from((p * q).abs())).sum::<f64>();
        let token_x = &x[token * K..][..K];
        let mut size = dot(token_x, &host[row * K..][..K]) + f64::from(bias[row].abs());
        for r in 0..RANK {
            size += 0.5 * dot(token_x, &a[r * K..][..K]) * f64::from(b[row * RANK + r].abs());
        }
        let bound = 2.0 * (K + RANK + 4) as f64 * (-24f64).exp2() * size;
        assert!(
            (f64::from(*got) - f64::from(*want)).abs() <= bound,
            "y[{i}]: {got}, not {want} +- {bound:e}"
        );
    }

    // A merge, and back.
    let merged = device.alloc::<f32>(N * K);
    let back = device.alloc::<f32>(N * K);
    let mut want = vec![0.0f32; N * K];
    // SAFETY: as above.
    unsafe {
        let adapter_at = &raw const cuda_adapter;
        let (from, to) = (at(&dw), at(&merged));
        ok(lk_cuda_merge(&queue, N, K, LK_F32, from, adapter_at, 1, LK_F32, 0, false, to));
        ok(lk_cuda_merge(&queue, N, K, LK_F32, to, adapter_at, 1, LK_F32, 0, true, at(&back)));
        let weight = LkWeight { n: N, k: K, dense: w.as_ptr().cast(), nf4: std::ptr::null() };
        let to: *mut c_void = want.as_mut_ptr().cast();
        ok(lk_merge(&weight, LK_F32, &adapter, 1, LK_F32, LK_F32, to, null_mut()));
    }
    for ((got, want), (back, w)) in merged.download().iter().zip(&want).zip(back.download().iter().zip(&w)) {
        // RANK products of magnitude up to 1, halved, and the sum: fewer than 16 roundings of at most 4.
        let bound = 16.0 * 4.0 * (-24f32).exp2();
        assert!(
            (got - want).abs() <= bound && (back - w).abs() <= bound,
            "{got}, not {want}; {back}, not {w}"
        );
    }
}

/// A mixture of experts over small whole numbers, whose sums are exact, with an adapter for every expert.
#[test]
fn rows_meet_their_experts() {
    const EXPERTS: usize = 3;
    const CHOICES: usize = 2;
    const ROWS: usize = TOKENS * CHOICES;
    const NONE: usize = EXPERTS;
    let device = Device::best();
    let queue = LkQueue::new(Owned(device.clone()));
    let whole = |seed: u32, count: usize| -> Vec<f32> {
        numbers(seed, count).iter().map(|x| (1.5 * x).round()).collect()
    };
    let bf16 =
        |values: &[f32]| -> Vec<half::bf16> { values.iter().map(|&x| half::bf16::from_f32(x)).collect() };
    let (k, w, x) = (32, whole(1, EXPERTS * N * 32), whole(2, TOKENS * 32));
    let (a, b, bias) = (whole(3, EXPERTS * k), whole(4, EXPERTS * N), whole(5, EXPERTS * N));
    let expert: Vec<i32> = (0..ROWS as i32).map(|i| i * 5 % 4 - 1).collect();
    let adapter: Vec<i32> = (0..TOKENS as i32).map(|i| i % 2 - 1).collect();

    let (dw, dx, da, db, dbias) = (
        device.upload(&bf16(&w)),
        device.upload(&bf16(&x)),
        device.upload(&bf16(&a)),
        device.upload(&bf16(&b)),
        device.upload(&bf16(&bias)),
    );
    let (dexpert, dadapter) = (device.upload(&expert), device.upload(&adapter));
    let (index, y) = (device.alloc::<i32>(ROWS), device.alloc::<half::bf16>(ROWS * N));
    let factors: Vec<_> = (0..EXPERTS as u64)
        .map(|e| LkCudaAdapter {
            lora_a: at(&da) + e * 2 * k as u64,
            lora_b: at(&db) + e * 2 * N as u64,
            rank: 1,
            scaling: 1.0,
        })
        .collect();
    let table = device.alloc::<u8>(lk_cuda_adapters_bytes(EXPERTS));
    let (mut adapters, mut bytes, slices) = (null_mut(), 0, [N]);
    let mut operands = LkCudaExpertMatmul {
        tokens: TOKENS,
        choices: CHOICES,
        experts: EXPERTS,
        n: N,
        k,
        dtype: LK_BF16,
        x: at(&dx),
        dense: at(&dw),
        nf4: std::ptr::null(),
        groups: 0,
        bias: at(&dbias),
        row_scale: 0,
        adapters: std::ptr::null(),
        adapter_index: at(&index),
        y: at(&y),
        scratch: 0,
    };
    // SAFETY: the buffers have these sizes, and live until the results have been read.
    unsafe {
        ok(lk_cuda_expert_groups_bytes(&queue, ROWS, EXPERTS, &mut bytes));
        let groups = device.alloc::<u8>(bytes);
        operands.groups = at(&groups);
        ok(lk_cuda_expert_groups(&queue, ROWS, EXPERTS, at(&dexpert), at(&groups)));
        let (adapter, expert) = (at(&dadapter), at(&dexpert));
        ok(lk_cuda_expert_index(&queue, TOKENS, CHOICES, 1, EXPERTS, adapter, expert, at(&index)));
        let (factors, slices, table) = (factors.as_ptr(), slices.as_ptr(), at(&table));
        ok(lk_cuda_adapters_new(&queue, factors, EXPERTS, LK_BF16, k, slices, 1, table, &mut adapters));
        operands.adapters = adapters;
        ok(lk_cuda_expert_matmul_scratch(&queue, &operands, &mut bytes));
        let scratch = device.alloc::<u8>(bytes);
        operands.scratch = at(&scratch);
        ok(lk_cuda_expert_matmul(&queue, &operands));
        lk_cuda_adapters_free(adapters);
    }
    let dot = |p: &[f32], q: &[f32]| p.iter().zip(q).map(|(p, q)| p * q).sum::<f32>();
    for (i, got) in y.download().iter().enumerate() {
        let (row, n) = (i / N, i % N);
        let e = usize::try_from(expert[row]).unwrap_or(NONE);
        let x = &x[row / CHOICES * k..][..k];
        let want = match (e, adapter[row / CHOICES]) {
            (NONE, _) => 0.0,
            (e, -1) => dot(x, &w[(e * N + n) * k..][..k]) + bias[e * N + n],
            (e, _) => {
                dot(x, &w[(e * N + n) * k..][..k]) + dot(x, &a[e * k..][..k]) * b[e * N + n] + bias[e * N + n]
            }
        };
        assert!(want.abs() <= 256.0, "a whole number of bf16");
        assert_eq!(got.to_f32(), want, "row {row}, output {n}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = Device::best();
    let queue = LkQueue::new(Owned(device.clone()));
    let buffer = device.alloc::<u8>(4096);
    let address = at(&buffer);
    let refused = |status: LkStatus, wanted: &str| {
        assert_eq!(status, LkStatus::Argument, "{wanted}");
        assert_eq!(message(), wanted);
    };
    // SAFETY: nothing that is refused is read.
    unsafe {
        let status = lk_cuda_nf4_quantize(&queue, 0, LK_F32, 64, 64, address, address);
        refused(status, "x: wanted an address, got 0");
        let status = lk_cuda_nf4_quantize(&queue, address, 9, 64, 64, address, address);
        refused(status, "dtype: wanted LK_F32, LK_F16 or LK_BF16, got 9");
        let status = lk_cuda_nf4_dequantize(&queue, std::ptr::null(), 64, LK_F32, address);
        refused(status, "nf4: wanted a pointer, got NULL");
        let status = lk_cuda_matmul(&queue, std::ptr::null());
        refused(status, "operands: wanted a pointer, got NULL");
        let adapter = LkCudaAdapter { lora_a: 0, lora_b: 0, rank: 1, scaling: 1.0 };
        let (slices, mut adapters) = ([8], null_mut());
        let status =
            lk_cuda_adapters_new(&queue, &adapter, 1, LK_F32, 8, slices.as_ptr(), 1, address, &mut adapters);
        refused(status, "adapters[0].factors: wanted an address, got 0");
        assert!(adapters.is_null());
        let status = lk_cuda_merge(&queue, 8, 8, LK_F32, 0, &adapter, 0, LK_F32, 0, false, address);
        refused(status, "weight: wanted an address, got 0");

        let mut bytes = 0;
        let status = lk_cuda_expert_groups_bytes(&queue, 4, 5000, &mut bytes);
        refused(status, "experts: wanted at most 4094, got 5000");
        let status = lk_cuda_expert_groups_bytes(&queue, 4, 2, null_mut());
        refused(status, "bytes: wanted a pointer, got NULL");
        refused(lk_cuda_expert_groups(&queue, 4, 2, 0, address), "expert: wanted an address, got 0");
        let status = lk_cuda_expert_index(&queue, 2, 2, 1, 2, address, address, 0);
        refused(status, "index: wanted an address, got 0");
        refused(lk_cuda_expert_matmul(&queue, std::ptr::null()), "operands: wanted a pointer, got NULL");
        let nf4 = LkCudaNf4 {
            packed: address,
            absmax: address,
            nested_q: 0,
            nested_absmax: 0,
            nested_map: 0,
            nested_offset: 0,
            nested_blocksize: 0,
            blocksize: 64,
            codebook: std::ptr::null(),
        };
        let right = LkCudaExpertMatmul {
            tokens: 2,
            choices: 2,
            experts: 2,
            n: 8,
            k: 64,
            dtype: LK_F16,
            x: address,
            dense: 0,
            nf4: &nf4,
            groups: address,
            bias: 0,
            row_scale: 0,
            adapters: std::ptr::null(),
            adapter_index: 0,
            y: address,
            scratch: 0,
        };
        let status = lk_cuda_expert_matmul(&queue, &LkCudaExpertMatmul { groups: 0, ..right });
        refused(status, "groups: wanted an address, got 0");
        let status = lk_cuda_expert_matmul(&queue, &LkCudaExpertMatmul { dense: 64, ..right });
        refused(status, "operands.dense: wanted 0 beside nf4, got 64");
        let status =
            lk_cuda_expert_matmul_scratch(&queue, &LkCudaExpertMatmul { dtype: LK_F32, ..right }, &mut bytes);
        refused(status, "dtype: wanted f16 or bf16, got f32");
    }
}
