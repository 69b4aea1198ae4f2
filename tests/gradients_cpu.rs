//! Gradients on the CPU: against f64, against differences of the loss, against PEFT; mixed batches against separate ones.

mod fixtures;
mod training;

use fixtures::{Fixture, size};
use half::{bf16, f16};
use lora_kernels::cpu::{self, Accumulate, LoraBatch, LoraGradient, LowRank, MatmulExtras, Vectors, Weight};
use lora_kernels::{DType, Element, Error};
use proptest::prelude::*;
use training::{Batch, Outcome, Owned, Sum, assert_close, roundings, widened};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn within_the_bound(
        shape in [0usize..20, 0usize..50, 0usize..70],
        ranks in prop::collection::vec(0usize..20, 0..5),
        mixed: bool,
        dropout in prop::option::of(0f32..0.9),
        seed: u64,
    ) {
        let batch = Batch::<f32, f32>::random(shape, &ranks, mixed, dropout, seed);
        batch.check("f32", &batch.run(None));
        let batch = Batch::<bf16, f32>::random(shape, &ranks, mixed, dropout, seed);
        batch.check("bf16, f32 factors", &batch.run(None));
        let batch = Batch::<f16, f16>::random(shape, &ranks, mixed, dropout, seed);
        batch.check("f16", &batch.run(None));
    }

    /// The formulas themselves: the loss `Σ dY ⊙ y` is linear in every single number, so its difference is its derivative.
    #[test]
    fn differences_of_the_loss(
        shape in [0usize..5, 1usize..8, 1usize..9],
        ranks in prop::collection::vec(0usize..5, 1..4),
        mixed: bool,
        dropout in prop::option::of(0f32..0.9),
        seed: u64,
    ) {
        let batch = Batch::<f32, f32>::random(shape, &ranks, mixed, dropout, seed);
        let truth = batch.truth();
        let check = |what: &str, truth: Sum, change: &dyn Fn(&mut Batch<f32, f32>, f32)| {
            let [mut up, mut down] = [batch.clone(), batch.clone()];
            change(&mut up, 0.5);
            change(&mut down, -0.5);
            let ((up, magnitude), (down, _)) = (loss(&up), loss(&down));
            // Some hundreds of f64 roundings, and one of f32 where a number was changed.
            let bound = (1e-12 + 4.0 * DType::F32.unit_roundoff()) * (1.0 + magnitude);
            let off = (up - down - truth.value).abs();
            prop_assert!(off <= bound, "{what}: {} {truth:?} {off:e} {bound:e}", up - down);
            Ok(())
        };
        for (a, [da, db]) in truth.gradients.iter().enumerate() {
            for (i, truth) in da.iter().enumerate() {
                check("dA", *truth, &|batch, by| batch.adapters[a].a[i] += by)?;
            }
            for (i, truth) in db.iter().enumerate() {
                check("dB", *truth, &|batch, by| batch.adapters[a].b[i] += by)?;
            }
        }
        for (i, truth) in truth.dx.iter().enumerate() {
            check("dX", *truth, &|batch, by| batch.x[i] += by)?;
        }
    }

    #[test]
    fn a_mixed_batch_is_its_parts(
        shape in [0usize..30, 0usize..20, 0usize..30],
        ranks in prop::collection::vec(0usize..9, 1..5),
        dropout in prop::option::of(0f32..0.9),
        seed: u64,
    ) {
        let batch = Batch::<f32, f32>::random(shape, &ranks, true, dropout, seed);
        let together = batch.run(None);
        for adapter in 0..ranks.len() as i32 {
            let mut alone = batch.clone();
            for index in alone.index.as_mut().unwrap().iter_mut().filter(|index| **index != adapter) {
                *index = -1;
            }
            let adapter = adapter as usize;
            prop_assert_eq!(bits(&together.gradients[adapter]), bits(&alone.run(None).gradients[adapter]));
            if dropout.is_none() {
                // Its tokens as a batch of their own.
                let tokens = batch.index.as_ref().unwrap().iter().enumerate().filter(|(_, a)| **a == adapter as i32);
                let tokens: Vec<usize> = tokens.map(|(i, _)| i).collect();
                let [_, n, k] = shape;
                let rows = |values: &[f32], columns: usize| -> Vec<f32> {
                    tokens.iter().flat_map(|i| values[i * columns..][..columns].to_vec()).collect()
                };
                let own = Batch {
                    shape: [tokens.len(), n, k],
                    x: rows(&batch.x, k),
                    dy: rows(&batch.dy, n),
                    adapters: vec![batch.adapters[adapter].clone()],
                    index: None,
                    dropout: None,
                };
                prop_assert_eq!(bits(&together.gradients[adapter]), bits(&own.run(None).gradients[0]));
            }
        }
    }
}

fn bits(gradients: &[Vec<f32>; 2]) -> Vec<u32> {
    gradients.iter().flatten().map(|g| g.to_bits()).collect()
}

/// `Σ dY ⊙ y` of the low-rank branch in f64, and the sum of its magnitudes.
fn loss(batch: &Batch<f32, f32>) -> (f64, f64) {
    let [m, n, k] = batch.shape;
    let adapters = batch.low_ranks();
    let weight = vec![0.0; n * k];
    let weight = Weight::Dense { data: &weight, n, k };
    let extras = MatmulExtras {
        adapters: &adapters,
        adapter_index: batch.index.as_deref(),
        dropout: batch.dropout,
        ..MatmulExtras::default()
    };
    let y = cpu::truth(&batch.x, m, &weight, &extras).unwrap();
    let terms =
        y.iter().zip(&batch.dy).map(|(y, dy)| (y.value * f64::from(*dy), y.magnitude * f64::from(dy.abs())));
    terms.fold((0.0, 0.0), |(sum, magnitude), term| (sum + term.0, magnitude + term.1))
}

/// A second batch is added to the first, bit for bit as one addition; rank 0 and no tokens are nothing.
#[test]
fn accumulation() {
    let batch = Batch::<f32, f32>::random([7, 5, 9], &[3, 0, 1], true, Some(0.3), 5);
    let (fresh, added) = (batch.run(None), batch.run(Some(0.75)));
    for (fresh, added) in fresh.gradients.iter().flatten().zip(added.gradients.iter().flatten()) {
        for (fresh, added) in fresh.iter().zip(added) {
            assert_eq!(*added, 0.75 + fresh);
        }
    }
    let none = Batch::<f32, f32>::random([0, 5, 9], &[3], false, None, 5).run(None);
    assert_eq!(none.gradients, [[vec![0.0; 27], vec![0.0; 15]]]);
}

/// Real PEFT over bitsandbytes: the gradients that it gave are within the roundings of f32 from ours, in f32 and in bf16.
#[test]
fn as_peft() {
    for name in ["lora_a", "lora_b"] {
        let file = Fixture::open(&format!("train_step/{name}"));
        let (m, n, k) = (size(&file.json, "T"), size(&file.json, "N"), size(&file.json, "K"));
        let rank = size(&file.json, "r");
        fn batch<T: Element, A: Element>(file: &Fixture, shape: [usize; 3], rank: usize) -> Batch<T, A> {
            let values = |name: &str| file.get::<f32>(name);
            Batch {
                shape,
                x: training::round_to(&values("x")),
                dy: training::round_to(&values("dY")),
                adapters: vec![Owned {
                    a: training::round_to(&values("lora_A")),
                    b: training::round_to(&values("lora_B")),
                    rank,
                    scaling: file.json["scaling"].as_f64().unwrap() as f32,
                }],
                index: None,
                dropout: None,
            }
        }
        let exact = batch::<f32, f32>(&file, [m, n, k], rank);
        let (got, truth) = (exact.run(None), exact.truth());
        exact.check(name, &got);
        for (i, (part, count)) in [("dA", n + m + 5), ("dB", k + m + 5)].into_iter().enumerate() {
            // The file's f64 is the formula: sums of f64 in another order.
            let wanted = file.get::<f64>(&format!("f64.{part}"));
            assert_close(
                part,
                &wanted,
                &truth.gradients[0][i],
                roundings(count) * 2f64.powi(-28),
                DType::F32,
            );
            assert_close(
                part,
                &widened(&file.get::<f32>(&format!("f32.{part}"))),
                &truth.gradients[0][i],
                roundings(count),
                DType::F32,
            );
        }
        // Activations in bf16 and factors in f32; then all in bf16, where our gradients stay f32.
        let mixed = batch::<bf16, f32>(&file, [m, n, k], rank);
        mixed.check(name, &mixed.run(None));
        let all = batch::<bf16, bf16>(&file, [m, n, k], rank);
        all.check(name, &all.run(None));
    }
}

/// DoRA over a dense base, with a bias, against PEFT's autograd.
#[test]
fn dora() {
    let file = Fixture::open("train_step/dora");
    let [m, k] = file.shape("x").try_into().unwrap();
    let [n, rank] = file.shape("lora_B").try_into().unwrap();
    let get = |name: &str| file.get::<f32>(name);
    let (x, dy, a, b, weight) = (get("x"), get("dY"), get("lora_A"), get("lora_B"), get("weight"));
    let scaling = file.json["scaling"].as_f64().unwrap() as f32;
    let adapter = LowRank { lora_a: &a[..], lora_b: &b[..], rank, scaling };
    let dense = Weight::Dense { data: &weight[..], n, k };
    let mut inverse_norm = vec![0.0; n];
    cpu::dora_scale(&dense, &adapter, &vec![1.0; n], &mut inverse_norm).unwrap();
    let row_scale: Vec<f32> = get("magnitude").iter().zip(&inverse_norm).map(|(m, i)| m * i).collect();
    let extras = MatmulExtras { adapters: &[adapter], ..MatmulExtras::default() };
    let mut z = vec![0.0f32; m * n];
    cpu::matmul(&x, m, &dense, &extras, Accumulate::F32, &mut z).unwrap();

    let (mut dz, mut dm) = (dy.clone(), vec![f32::NAN; n]);
    cpu::dora_gradient(&mut dz, &z, [m, n], &row_scale, &inverse_norm, false, &mut dm).unwrap();
    let batch = Batch::<f32, f32> {
        shape: [m, n, k],
        x: x.clone(),
        dy: dz.clone(),
        adapters: vec![Owned { a: a.clone(), b: b.clone(), rank, scaling }],
        index: None,
        dropout: None,
    };
    let got = batch.run(None);

    // `dz` has three roundings: of the inverse norm, of the scale, and its own.
    let truth = batch.truth();
    for (part, got, truth, count) in [
        ("dA", &got.gradients[0][0], &truth.gradients[0][0], n + m + 8),
        ("dB", &got.gradients[0][1], &truth.gradients[0][1], k + m + 8),
    ] {
        let wanted: Vec<Sum> = file
            .get::<f64>(&format!("f64.{part}"))
            .into_iter()
            .zip(truth)
            .map(|(value, truth)| Sum { value, ..*truth })
            .collect();
        assert_close(part, &widened(got), &wanted, roundings(count), DType::F32);
    }
    let z_truth = cpu::truth(&x, m, &dense, &extras).unwrap();
    let wanted = file.get::<f64>("f64.dm").into_iter().enumerate().map(|(n_, value)| {
        let magnitude =
            (0..m).map(|i| f64::from(dy[i * n + n_].abs()) * z_truth[i * n + n_].magnitude).sum::<f64>();
        Sum { value, magnitude: magnitude * f64::from(inverse_norm[n_]) }
    });
    let wanted: Vec<Sum> = wanted.collect();
    assert_close("dm", &widened(&dm), &wanted, roundings(k + rank + 4 + m + 4), DType::F32);

    let before = dm.clone();
    dz.copy_from_slice(&dy);
    cpu::dora_gradient(&mut dz, &z, [m, n], &row_scale, &inverse_norm, true, &mut dm).unwrap();
    assert!(dm.iter().zip(before).all(|(dm, before)| *dm == before + before));
    assert_eq!(dz, batch.dy);
}

/// AdaLoRA against PEFT's autograd.
#[test]
fn adalora() {
    let file = Fixture::open("train_step/adalora");
    let [m, k] = file.shape("x").try_into().unwrap();
    let [n, rank] = file.shape("lora_B").try_into().unwrap();
    let get = |name: &str| file.get::<f32>(name);
    let (a, e) = (get("lora_A"), get("lora_E"));
    let number = |name: &str| file.json[name].as_f64().unwrap();
    let scaling = (number("scaling") / (number("ranknum") + 1e-5)) as f32;
    let mut folded = vec![f32::NAN; rank * k];
    cpu::adalora_fold(&a, &e, [rank, k], &mut folded).unwrap();
    let batch = Batch::<f32, f32> {
        shape: [m, n, k],
        x: get("x"),
        dy: get("dY"),
        adapters: vec![Owned { a: folded, b: get("lora_B"), rank, scaling }],
        index: None,
        dropout: None,
    };
    let truth = batch.truth();
    let Outcome { gradients, .. } = batch.run(None);
    let [mut da, db] = gradients.into_iter().next().unwrap();
    let mut de = vec![f32::NAN; rank];
    cpu::adalora_gradient(&mut da, &a, &e, [rank, k], &mut de).unwrap();

    // The scale has two roundings (the file's is f64), and A ⊙ E one.
    let [truth_a, truth_b] = &truth.gradients[0];
    let wanted = |part: &str, magnitude: &dyn Fn(usize) -> f64| -> Vec<Sum> {
        let values = file.get::<f64>(&format!("f64.{part}")).into_iter().enumerate();
        values.map(|(i, value)| Sum { value, magnitude: magnitude(i) }).collect()
    };
    let size_a = |i: usize| truth_a[i].magnitude * f64::from(e[i / k].abs());
    let size_e =
        |r: usize| (r * k..(r + 1) * k).map(|i| truth_a[i].magnitude * f64::from(a[i].abs())).sum::<f64>();
    assert_close("dA", &widened(&da), &wanted("dA", &size_a), roundings(n + m + 9), DType::F32);
    assert_close(
        "dB",
        &widened(&db),
        &wanted("dB", &|i| truth_b[i].magnitude),
        roundings(k + m + 9),
        DType::F32,
    );
    assert_close("dE", &widened(&de), &wanted("dE", &size_e), roundings(n + m + k + 9), DType::F32);
}

/// The penalty is the norm, its gradient its derivative; rows and columns are the same problem.
#[test]
fn orthogonality() {
    let (rank, length) = (4, 7);
    let rows: Vec<f32> = (0..rank * length).map(|i| ((i * 37 % 19) as f32 - 9.0) / 13.0).collect();
    let columns: Vec<f32> = (0..rank * length).map(|i| rows[i % rank * length + i / rank]).collect();
    let norm = |rows: &[f64]| {
        let dot = |i: usize, j: usize| {
            (0..length).map(|l| rows[i * length + l] * rows[j * length + l]).sum::<f64>()
        };
        let pairs = (0..rank * rank).map(|ij| (ij / rank, ij % rank));
        pairs.map(|(i, j)| (dot(i, j) - f64::from(u8::from(i == j))).powi(2)).sum::<f64>().sqrt()
    };
    let mut gradient = vec![1.0; rank * length];
    let got = cpu::orthogonality(&rows, [rank, length], Vectors::Rows, 0.25, &mut gradient).unwrap();
    let rows64 = widened(&rows);
    assert!((got - norm(&rows64)).abs() <= 1e-14 * got);
    for i in 0..rank * length {
        let at = |by: f64| {
            let mut rows = rows64.clone();
            rows[i] += by;
            norm(&rows)
        };
        // A central difference of h = 1e-5: a truncation of h^2, a rounding of 1e-16 / h.
        let derivative = (at(1e-5) - at(-1e-5)) / 2e-5;
        let bound = 1e-9 + 2.0 * DType::F32.unit_roundoff() * (1.0 + derivative.abs());
        let off = (f64::from(gradient[i]) - 1.0 - 0.25 * derivative).abs();
        assert!(off <= bound, "{i}: {} {derivative} {off:e}", gradient[i]);
    }
    let mut transposed = vec![1.0; rank * length];
    let same = cpu::orthogonality(&columns, [length, rank], Vectors::Columns, 0.25, &mut transposed).unwrap();
    assert_eq!(same, got);
    assert!((0..rank * length).all(|i| transposed[i] == gradient[i % rank * length + i / rank]));

    // Orthonormal rows: a norm of 0, whose gradient is 0. Rank 0: nothing.
    let mut gradient = vec![3.0; 4];
    let identity = [1.0f32, 0.0, 0.0, 1.0];
    assert_eq!(cpu::orthogonality(&identity, [2, 2], Vectors::Rows, 1.0, &mut gradient).unwrap(), 0.0);
    assert_eq!(gradient, [3.0; 4]);
    assert_eq!(cpu::orthogonality::<f32>(&[], [0, 9], Vectors::Rows, 1.0, &mut []).unwrap(), 0.0);
}

/// Every argument that does not fit is named, and nothing is written.
#[test]
fn bad_arguments() {
    fn refused<R: std::fmt::Debug>(argument: &str, result: Result<R, Error>) {
        let Err(Error::Argument { argument: got, .. }) = result else { panic!("{argument}: {result:?}") };
        assert_eq!(got, argument);
    }
    let (a, b, x, dy) = ([1.0f32; 10], [1.0f32; 6], [1.0f32; 20], [1.0f32; 12]);
    let (m, n, k) = (4, 3, 5);
    let adapter = LowRank { lora_a: &a[..], lora_b: &b[..], rank: 2, scaling: 1.0 };
    let short = LowRank { lora_b: &b[..5], lora_a: &a[..9], ..adapter };

    let mut u = [7.0; 8];
    let mut shrink = |dy: &[f32], m: usize, adapter, index: Option<&[i32]>, max_rank: usize, len: usize| {
        cpu::lora_shrink_transposed(dy, [m, n], &[adapter], index, None, max_rank, &mut u[..len])
    };
    refused("dy", shrink(&dy[1..], m, adapter, None, 2, 8));
    refused("dy", shrink(&dy, usize::MAX, adapter, None, 2, 8));
    refused("u", shrink(&dy, m, adapter, None, 2, 7));
    refused("adapters[0].lora_b", shrink(&dy, m, short, None, 2, 8));
    refused("adapters[0].rank", shrink(&dy, m, adapter, None, 1, 4));
    refused("adapter_index", shrink(&dy, m, adapter, Some(&[0]), 2, 8));
    refused("adapter_index[3]", shrink(&dy, m, adapter, Some(&[0, -1, 0, 1]), 2, 8));
    assert_eq!(u, [7.0; 8]);

    let mut dx = [7.0f32; 20];
    let mut expand = |u: &[f32], adapter, index: Option<&[i32]>, max_rank: usize, len: usize| {
        cpu::lora_expand_transposed(u, max_rank, &[adapter], index, None, [m, k], &mut dx[..len])
    };
    refused("u", expand(&u[1..], adapter, None, 2, 20));
    refused("dx", expand(&u, adapter, None, 2, 19));
    refused("adapters[0].lora_a", expand(&u, short, None, 2, 20));
    refused("adapters[0].rank", expand(&u[..4], adapter, None, 1, 20));
    refused("adapter_index[0]", expand(&u, adapter, Some(&[-2, 0, 0, 0]), 2, 20));
    assert_eq!(dx, [7.0; 20]);

    let batch = LoraBatch {
        shape: [m, n, k],
        x: &x[..],
        dy: &dy[..],
        v: &u[..],
        u: &u[..],
        max_rank: 2,
        adapter_index: None,
        dropout: None,
    };
    let (mut da, mut db) = ([7.0; 10], [7.0; 6]);
    let mut gradient = |batch: LoraBatch<'_, f32>, rank: usize, cut: [usize; 2]| {
        let (lora_a, lora_b) = (&mut da[cut[0]..], &mut db[cut[1]..]);
        cpu::lora_gradient(&batch, true, &mut [LoraGradient { lora_a, lora_b, rank }])
    };
    refused("x", gradient(LoraBatch { x: &x[1..], ..batch }, 2, [0, 0]));
    refused("dy", gradient(LoraBatch { dy: &dy[1..], ..batch }, 2, [0, 0]));
    refused("v", gradient(LoraBatch { v: &u[1..], ..batch }, 2, [0, 0]));
    refused("u", gradient(LoraBatch { u: &u[1..], ..batch }, 2, [0, 0]));
    refused("x", gradient(LoraBatch { shape: [usize::MAX, n, k], ..batch }, 2, [0, 0]));
    refused(
        "adapter_index[1]",
        gradient(LoraBatch { adapter_index: Some(&[0, 1, 0, 0]), ..batch }, 2, [0, 0]),
    );
    refused("gradients[0].lora_a", gradient(batch, 2, [1, 0]));
    refused("gradients[0].lora_b", gradient(batch, 2, [0, 1]));
    refused("gradients[0].lora_a", gradient(batch, usize::MAX, [0, 0]));
    refused(
        "gradients[0].rank",
        gradient(LoraBatch { max_rank: 1, v: &u[..4], u: &u[..4], ..batch }, 2, [0, 0]),
    );
    assert_eq!((da, db), ([7.0; 10], [7.0; 6]));

    let mut dz = dy;
    let mut dm = [7.0; 3];
    let mut dora = |z: &[f32], scale: &[f32], norm: &[f32], len: usize| {
        cpu::dora_gradient(&mut dz, z, [m, n], scale, norm, false, &mut dm[..len])
    };
    refused("z", dora(&dy[1..], &b[..3], &b[..3], 3));
    refused("row_scale", dora(&dy, &b[..2], &b[..3], 3));
    refused("inverse_norm", dora(&dy, &b[..3], &b[..4], 3));
    refused("dm", dora(&dy, &b[..3], &b[..3], 2));
    refused("dy", cpu::dora_gradient(&mut dz, &dy, [m, 4], &b, &b, false, &mut dm));
    assert_eq!((dz, dm), (dy, [7.0; 3]));

    let (mut da, mut de) = ([7.0; 10], [7.0; 2]);
    refused("lora_e", cpu::adalora_fold(&a, &b[..3], [2, k], &mut da));
    refused("lora_a", cpu::adalora_fold(&a[1..], &b[..2], [2, k], &mut da));
    refused("folded", cpu::adalora_fold(&a, &b[..2], [2, k], &mut da[1..]));
    refused("gradient", cpu::adalora_gradient(&mut da[1..], &a, &b[..2], [2, k], &mut de));
    refused("lora_a", cpu::adalora_gradient(&mut da, &a[1..], &b[..2], [2, k], &mut de));
    refused("lora_e", cpu::adalora_gradient(&mut da, &a, &b, [2, k], &mut de));
    refused("de", cpu::adalora_gradient(&mut da, &a, &b[..2], [2, k], &mut de[1..]));
    refused("factor", cpu::orthogonality(&a[1..], [2, k], Vectors::Rows, 1.0, &mut da));
    refused("gradient", cpu::orthogonality(&a, [2, k], Vectors::Rows, 1.0, &mut da[1..]));
    assert_eq!((da, de), ([7.0; 10], [7.0; 2]));
}
