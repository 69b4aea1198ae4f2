//! `dX = dY W + u A` by the products of warpgroups that Hopper runs from 17 tokens on, against f64. The rest of
//! `matmul_transposed` is in `tests/matmul_transposed.rs`.

mod products;

use half::{bf16, f16};
use lora_kernels::cpu::Dropout;
use lora_kernels::cuda::matmul::Rounding;
use lora_kernels::cuda::{AdapterTable, LowRank, matmul_transposed};
use lora_kernels::nf4::{Absmax, BLOCKSIZES, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element};
use lora_kernels_devices::{Device, Spec};
use products::transposed::{self, Outcome, check_identity, check_tokens_apart, check_with, run, u, with_dy};
use products::{DeviceWeight, Factors, Problem, Weight, same};

/// The GPU if it is a Hopper, else an emulated one.
fn hopper() -> Device {
    let best = Device::best();
    if best.queue().properties().capability == (9, 0) { best } else { Device::emulate(Spec::h200()) }
}

/// Runs a check for both types of dY.
macro_rules! each_type {
    ($check:ident($($argument:expr),*)) => {
        $check::<f16>($($argument),*);
        $check::<bf16>($($argument),*);
    };
}

fn check<T: Element, A: Element>(problem: &Problem<T, A>, device: &Device) -> Outcome<T> {
    let outcome = transposed::check(problem, device);
    assert_eq!(outcome.plan.kernel.unwrap().module, "prefill_transposed", "{:?}", outcome.plan);
    outcome
}

#[test]
fn any_number_of_tokens() {
    fn all<T: Element>(device: &Device) {
        for tokens in [17, 31, 32, 33, 64, 65, 128, 129, 200] {
            check(&with_dy(Problem::<T>::nf4(tokens, 72, 160, 64)), device);
            check(&with_dy(Problem::<T>::dense(tokens, 72, 136)), device);
        }
    }
    let device = hopper();
    each_type!(all(&device));
}

#[test]
fn any_n_and_k_of_whole_pieces() {
    fn all<T: Element>(device: &Device) {
        for (tokens, n, k) in
            [(17, 8, 32), (40, 96, 64), (66, 1032, 32), (20, 64, 128), (33, 136, 288), (20, 16, 416)]
        {
            check(&with_dy(Problem::<T>::nf4(tokens, n, k, 64)), device);
        }
        for (tokens, n, k) in
            [(17, 8, 8), (40, 72, 64), (66, 1032, 72), (20, 64, 128), (33, 136, 280), (20, 16, 200)]
        {
            check(&with_dy(Problem::<T>::dense(tokens, n, k)), device);
        }
    }
    let device = hopper();
    each_type!(all(&device));
}

#[test]
fn every_way_to_store_4_bits() {
    fn all<T: Element>(device: &Device) {
        // Values that f16 does not reach without their unit.
        let custom = Codebook::from_values(std::array::from_fn(|i| (i as f32 - 7.0) * 3e5)).unwrap();
        for codebook in [Codebook::nf4(), Codebook::fp4(), custom] {
            for nesting in [Nesting::Plain, Nesting::Nested] {
                for blocksize in BLOCKSIZES {
                    // Blocks straddle rows.
                    let problem = Problem::<T>::dense(20, 72, 160);
                    check(&with_dy(problem.in_4_bits(blocksize, &codebook, nesting)), device);
                }
            }
        }
    }
    let device = hopper();
    each_type!(all(&device));
}

#[test]
fn adapters() {
    fn all<T: Element, A: Element>(device: &Device) {
        const RANKS: [usize; 8] = [8, 0, 1, 3, 16, 17, 64, 130];
        for (tokens, n, k) in [(21, 96, 160), (70, 32, 32), (133, 40, 64)] {
            let plain = Problem::<T, A>::dense(tokens, n, k);
            let problem = with_dy(plain.clone().with_adapters(&RANKS));
            check(&problem, device);
            check(&problem.in_4_bits(64, &Codebook::nf4(), Nesting::Nested), device);
            // One adapter for all tokens, without an index.
            check(&with_dy(Problem { index: None, ..plain.with_adapters(&[5]) }), device);
        }
    }
    let device = hopper();
    all::<f16, f16>(&device);
    all::<f16, f32>(&device);
    all::<bf16, bf16>(&device);
    all::<bf16, f32>(&device);
}

/// Dropout takes of the branch what it took of x, and leaves the rest of dX alone.
#[test]
fn the_branch_is_masked() {
    fn all<T: Element>(device: &Device) {
        let dropout = Dropout::new(0.4, 99, 5).unwrap().with_first_token(1000);
        for (tokens, n, k) in [(20, 64, 160), (130, 24, 96)] {
            let problem = with_dy(Problem::<T>::dense(tokens, n, k).with_adapters(&[5, 16]));
            for problem in [problem.clone().in_4_bits(64, &Codebook::nf4(), Nesting::Plain), problem] {
                let masked = check_with(&problem, device, Some(dropout));
                assert_eq!(masked.plan.kernel.unwrap().module, "prefill_transposed");
                // Where all is dropped, it is the product without a branch.
                let dropped = |i: &usize| !dropout.keeps(i / k, i % k);
                let base = run(&Problem { adapters: None, index: None, ..problem.clone() }, device).dx;
                let differs =
                    (0..tokens * k).filter(dropped).find(|&i| masked.dx[i].to_f32() != base[i].to_f32());
                assert_eq!(differs, None);
            }
        }
    }
    let device = hopper();
    each_type!(all(&device));
}

/// A packed module's outputs are slices that have adapters of their own.
#[test]
fn adapters_of_slices() {
    const SLICES: [usize; 3] = [40, 8, 24];
    fn all<T: Element>(device: &Device) {
        let (tokens, n, k) = (70, SLICES.iter().sum(), 160);
        let (problem, parts) = Problem::<T>::nf4(tokens, n, k, 64).with_adapters_of_slices(SLICES);
        let problem = with_dy(problem);

        // u in the order of slices.
        let (all, columns, pitch) = (u(&problem, None), problem.max_rank().next_multiple_of(4), 72);
        let mut of_slices = vec![0.0; tokens * SLICES.len() * pitch];
        for (token, &adapter) in problem.index.as_ref().unwrap().iter().enumerate() {
            let mut first = 0;
            for slice in (0..SLICES.len()).filter(|_| adapter >= 0) {
                let rank = parts[adapter as usize * SLICES.len() + slice].rank;
                of_slices[(token * SLICES.len() + slice) * pitch..][..rank]
                    .copy_from_slice(&all[token * columns + first..][..rank]);
                first += rank;
            }
        }

        let (dy, weight) = (device.upload(&problem.x), DeviceWeight::new(device, &problem.weight));
        let (index, v) = (device.upload(problem.index.as_ref().unwrap()), device.upload(&of_slices));
        let factors = Factors::new(device, &parts);
        let mut entries = device.alloc(AdapterTable::<T>::bytes(parts.len()));
        let (queue, views) = (device.queue(), factors.views());
        let adapters = AdapterTable::upload_slices(queue, &views, k, &SLICES, entries.view_mut()).unwrap();
        let branch = LowRank { adapters: &adapters, index: Some(index.view()), v: v.view() };
        let plan = transposed::plan(&problem, device);
        let (mut dx, mut workspace) = (device.alloc(tokens * k), device.alloc(plan.workspace_bytes));
        plan.run(queue, dy.view(), &weight.view(), Some(&branch), dx.view_mut(), workspace.view_mut())
            .unwrap();
        assert_eq!(plan.kernel.unwrap().module, "prefill_transposed");
        transposed::compare(&problem, &Outcome { plan, dx: dx.download(), counters: None }, None);
    }
    let device = hopper();
    each_type!(all(&device));
}

/// Tiles of every size, more of them than blocks: pipelines and barriers go on from one tile to the next, with a branch before
/// each.
#[test]
fn blocks_go_from_tile_to_tile() {
    fn all<T: Element>() {
        for (tokens, n, k, tile, blocks) in
            [(40, 320, 704, 64, 2), (64, 32, 1312, 64, 2), (100, 448, 512, 128, 2), (500, 2080, 160, 256, 1)]
        {
            for problem in [Problem::<T>::nf4(tokens, n, k, 64), Problem::dense(tokens, n, k)] {
                let problem = with_dy(problem.with_adapters(&[20, 3]));
                let plan = check(&problem, &hopper().with_multiprocessors(blocks)).plan;
                assert_eq!((plan.tile.tokens, plan.splits, plan.grid), (tile, 1, [blocks, 1, 1]), "{plan:?}");
            }
        }
    }
    all::<f16>();
    all::<bf16>();
}

#[test]
fn split_sums_are_finished() {
    fn all<T: Element>(device: &Device) {
        for (tokens, n, k) in [(20, 2048, 64), (100, 1056, 160), (65, 2048, 288)] {
            for problem in [Problem::<T>::nf4(tokens, n, k, 64), Problem::dense(tokens, n, k)] {
                let outcome = check(&with_dy(problem.with_adapters(&[3, 20])), device);
                assert!(outcome.plan.splits > 1 && outcome.plan.finish.is_some(), "{:?}", outcome.plan);
                assert_eq!(outcome.plan.workspace_bytes, outcome.plan.splits * tokens * k * 4);
            }
        }
    }
    let device = hopper();
    each_type!(all(&device));
}

/// With dY the identity, a sum has one term that is not zero: dX is the weight as it is multiplied.
#[test]
fn an_identity_gives_the_weight_to_the_bit() {
    fn all<T: Element>(device: &Device, n: usize, k: usize, blocksize: usize, nesting: Nesting) {
        let plan = check_identity::<T>(device, [n, k], blocksize, nesting);
        assert_eq!(plan.rounding, Rounding::Half);
    }
    let device = hopper();
    for nesting in [Nesting::Plain, Nesting::Nested] {
        all::<f16>(&device, 72, 160, 64, nesting);
        all::<bf16>(&device, 136, 96, 32, nesting);
        all::<bf16>(&device.with_multiprocessors(1), 256, 128, 128, nesting);
    }
}

#[test]
fn a_token_depends_on_itself_alone() {
    let (device, sizes) = (hopper(), [[29, 96, 64], [70, 64, 160], [130, 64, 32]]);
    each_type!(check_tokens_apart(&device, &sizes));
}

/// A column of an adapter that is not a number reaches that column of the tokens that use it, and nothing else.
#[test]
fn a_broken_adapter_stays_with_its_tokens() {
    fn all<T: Element>(device: &Device) {
        for column in [0, 33, 159] {
            let right = with_dy(Problem::<T>::nf4(40, 64, 160, 64).with_adapters(&[4, 12]));
            let mut broken = right.clone();
            broken.adapters.as_mut().unwrap()[1].lora_a[7 * 160 + column] = T::from_f32(f32::NAN);
            let (right, dx) = (run(&right, device).dx, run(&broken, device).dx);
            for (i, (right, dx)) in right.iter().zip(&dx).enumerate() {
                if broken.index.as_ref().unwrap()[i / 160] == 1 && i % 160 == column {
                    assert!(dx.to_f32().is_nan(), "{i}");
                } else {
                    assert_eq!(right.to_f32().to_bits(), dx.to_f32().to_bits(), "{i}");
                }
            }
        }
    }
    let device = hopper();
    each_type!(all(&device));
}

#[test]
fn a_wrong_adapter_makes_its_token_nan_and_no_other() {
    fn all<T: Element>(device: &Device) {
        let dropout = Dropout::new(0.5, 7, 0).unwrap();
        let right = with_dy(Problem::<T>::nf4(70, 40, 96, 64).with_adapters(&[4, 12]));
        let mut wrong = right.clone();
        for (token, adapter) in [(0, 2), (2, -2), (3, i32::MAX)] {
            wrong.index.as_mut().unwrap()[token] = adapter;
        }
        let run = |problem| transposed::run_with(problem, device, Some(dropout));
        let (right, wrong) = (run(&right), run(&wrong));
        for (token, (right, wrong)) in right.dx.chunks(96).zip(wrong.dx.chunks(96)).enumerate() {
            if [0, 2, 3].contains(&token) {
                assert!(wrong.iter().all(|dx| dx.to_f32().is_nan()), "token {token}");
            } else {
                assert!(same(right, wrong), "token {token}");
            }
        }
    }
    let device = hopper();
    each_type!(all(&device));
}

/// A block whose absmax is NaN makes the columns of dX that it lies in NaN, and no others.
#[test]
fn nan_blocks_do_not_leak() {
    fn all<T: Element>(device: &Device) {
        for (n, k, block) in [(72, 192, 7), (72, 192, 215), (40, 160, 99), (8, 32, 0)] {
            let mut problem = with_dy(Problem::<T>::nf4(20, n, k, 64));
            let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
            let Absmax::Plain(mut absmax) = nf4.absmax().clone() else { unreachable!() };
            absmax[block] = f32::NAN;
            let columns: Vec<usize> = (block * 64..(block * 64 + 64).min(n * k)).map(|i| i % k).collect();
            let (packed, codebook) = (nf4.packed().to_vec(), Codebook::nf4());
            let nf4 = Nf4Matrix::from_parts([n, k], packed, Absmax::Plain(absmax), 64, codebook, DType::F32);
            problem.weight = Weight::Nf4(nf4.unwrap());
            let outcome = run(&problem, device);
            for (i, dx) in outcome.dx.iter().enumerate() {
                assert_eq!(dx.to_f32().is_nan(), columns.contains(&(i % k)), "{:?}: {i}", outcome.plan);
            }
        }
    }
    let device = hopper();
    each_type!(all(&device));
}

/// What decides how fast the kernel can be, counted over a tile of 256 tokens: no bank conflicts, whole sectors to dX, dY and W
/// copied once, and few instructions beside the products.
#[test]
fn counts() {
    let device = Device::emulate(Spec { sm_count: 1, ..Spec::h200() });
    for (problem, entry, most) in [
        (Problem::<bf16>::nf4(256, 4096, 128, 64), "prefill_transposed_nf4_bf16_t256", 11.0),
        (Problem::<bf16>::dense(256, 8704, 128), "prefill_transposed_dense_bf16_t256", 3.0),
    ] {
        let problem = with_dy(problem);
        let outcome = run(&problem, &device);
        let (plan, counters) = (outcome.plan, outcome.counters.unwrap());
        assert_eq!((plan.kernel.unwrap().entry, plan.splits), (entry, 1));
        let conflicts = (counters.shared_loads.conflicts, counters.shared_stores.conflicts);
        assert_eq!(conflicts, (0, 0), "{entry}: {counters} {:?}", counters.conflict_lines);
        assert_eq!(counters.local_accesses, 0);
        assert_eq!(counters.global_stores.sector_ratio(), 1.0, "{entry}: {counters}");
        assert_eq!(counters.matrix_ops as usize, problem.tokens * problem.n * problem.k, "{entry}");
        // dY and W are copied by the unit for it, once each.
        let weight = if entry.contains("nf4") { 4 } else { 16 };
        let copied = problem.n * (problem.tokens * 16 + problem.k * weight) / 8;
        assert_eq!(counters.async_bytes as usize, copied, "{entry}");
        let per_weight = counters.total().threads as f64 / (problem.n * problem.k) as f64;
        assert!(per_weight < most, "{entry} takes {per_weight:.2} instructions per weight");
    }
}

/// A product and its gradient multiply the same weight, and so do neighbouring numbers of tokens.
#[test]
fn plans_are_those_of_the_forward_product() {
    let device = hopper();
    let properties = device.queue().properties();
    for tokens in [1, 16, 17, 64, 65, 300, 4096] {
        for problem in [Problem::<bf16>::nf4(1, 8, 32, 64), Problem::dense(1, 8, 32)] {
            let shape = lora_kernels::cuda::matmul::Shape { tokens, n: 4096, k: 4096, ..problem.shape() };
            let forward = lora_kernels::cuda::matmul::plan(&shape, properties).unwrap();
            let plan = matmul_transposed::plan(&shape, properties).unwrap();
            if tokens > 16 {
                assert_eq!((plan.tile, plan.splits, plan.grid), (forward.tile, forward.splits, forward.grid));
                assert_eq!((plan.rounding, plan.threads), (forward.rounding, forward.threads));
                assert_eq!(plan.shared_bytes, forward.shared_bytes);
            } else {
                assert_eq!(plan.kernel.unwrap().module, "matmul_transposed");
            }
        }
    }
}
