//! Extraction of an adapter from two weights against the best that any factors of that rank can reach.

mod fixtures;

use fixtures::{Fixture, size, text};
use lora_kernels::adapter::{Adapter, Decomposition, Difference, Extraction, Rank};
use lora_kernels::{DType, Error, Tensor};
use rand::{RngExt, SeedableRng};

fn frobenius(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// The largest singular value of `[rows, columns]`: `||M v|| / ||v||` for v in the range of `(MᵀM)^(2^24)`, where only what
/// belongs to the largest ones is left.
fn spectral(matrix: &[f64], columns: usize) -> f64 {
    let column =
        |values: &[f64], j: usize| values.iter().skip(j).step_by(columns).copied().collect::<Vec<f64>>();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    // MᵀM is symmetric, so that its rows are its columns.
    let gram = |values: &[f64]| {
        let by_column: Vec<Vec<f64>> = (0..columns).map(|j| column(values, j)).collect();
        let product: Vec<f64> = by_column.iter().flat_map(|a| by_column.iter().map(|b| dot(a, b))).collect();
        let norm = frobenius(&product).max(f64::MIN_POSITIVE);
        product.into_iter().map(|v| v / norm).collect::<Vec<f64>>()
    };
    let power = (0..25).fold(matrix.to_vec(), |power, _| gram(&power));
    let v = power.chunks(columns).max_by(|a, b| dot(a, a).total_cmp(&dot(b, b))).unwrap();
    let image: Vec<f64> = matrix.chunks(columns).map(|row| dot(row, v)).collect();
    if frobenius(v) == 0.0 { 0.0 } else { frobenius(&image) / frobenius(v) }
}

/// `delta - B A`.
fn rest(delta: &[f64], a: &[f64], b: &[f64], [n, k]: [usize; 2]) -> Vec<f64> {
    let rank = b.len() / n;
    let product = |i: usize| (0..rank).map(|r| b[i / k * rank + r] * a[r * k + i % k]).sum::<f64>();
    delta.iter().enumerate().map(|(i, d)| d - product(i)).collect()
}

/// Every way to compute it.
const METHODS: [Decomposition; 3] =
    [Decomposition::Full, Decomposition::Randomised { seed: 0 }, Decomposition::Randomised { seed: 0x5eed }];

fn extract(base: &Tensor, tuned: &Tensor, rank: impl Into<Rank>) -> Result<Extraction, Error> {
    Difference::between(base, tuned)?.extract(rank)
}

/// Runs `check` on each case: weights, their difference, its shape and the JSON.
fn each_case(check: impl Fn(&str, &Tensor, &Tensor, &[f64], [usize; 2], &Fixture, &serde_json::Value)) {
    let file = Fixture::open("svd/svd");
    for case in file.cases() {
        let name = text(case, "name");
        let (base, tuned) = (file.tensor(&format!("{name}.W")), file.tensor(&format!("{name}.W_prime")));
        let delta: Vec<f64> = tuned.to_f64().iter().zip(base.to_f64()).map(|(t, b)| t - b).collect();
        check(name, &base, &tuned, &delta, [base.shape()[0], base.shape()[1]], &file, case);
    }
    assert_eq!(file.cases().len(), 7);
}

/// Eckart and Young: what is left out is what must be left out, by 1e-6 of the difference and far less.
#[test]
fn errors_are_the_smallest_possible() {
    each_case(|name, base, tuned, delta, shape, _, case| {
        let whole = frobenius(delta);
        for rank in case["ranks"].as_array().unwrap() {
            let (r, number) = (size(rank, "r"), |key: &str| rank[key].as_f64().unwrap());
            for method in METHODS {
                let difference = Difference::between(base, tuned).unwrap().with_decomposition(method);
                let made = difference.extract(r).unwrap();
                let (a, b) = made.factors();
                let rest = rest(delta, &a, &b, shape);
                // Subspace iteration minimises the Frobenius error; the spectral one is bounded by it.
                let spectral = (method == Decomposition::Full)
                    .then(|| [spectral(&rest, shape[1]), made.spectral_error().unwrap()]);
                let pairs = [frobenius(&rest), made.frobenius_error()]
                    .map(|got| ("Frobenius", got, number("err_fro")))
                    .into_iter()
                    .chain(
                        spectral.into_iter().flatten().map(|got| ("spectral", got, number("err_spectral"))),
                    );
                for (what, got, least) in pairs {
                    let off = (got - least).abs();
                    assert!(
                        off <= 1e-6 * least + 1e-13 * whole,
                        "{name}, rank {r}, {method:?}, {what}: {got:e} against {least:e}"
                    );
                }
            }
        }
    });
}

#[test]
fn singular_values_are_torchs() {
    each_case(|name, base, tuned, _, shape, file, _| {
        let made = extract(base, tuned, shape[0].min(shape[1])).unwrap();
        let wanted = file.get::<f64>(&format!("{name}.singular_values_f64"));
        assert_eq!(made.singular_values().len(), wanted.len());
        for (got, wanted_value) in made.singular_values().iter().zip(&wanted) {
            // A backward stable decomposition is off by some eps times the largest one.
            assert!(
                (got - wanted_value).abs() <= 1e-13 * wanted[0],
                "{name}: {got:e} against {wanted_value:e}"
            );
        }
        assert_eq!(made.spectral_error(), Some(0.0));
        assert_eq!(made.frobenius_error(), 0.0);
    });
}

/// Where the best matrix is unique, ours is it; and each factor carries half of the singular values.
#[test]
fn the_best_matrix_with_balanced_factors() {
    each_case(|name, base, tuned, delta, [n, k], file, case| {
        let r = size(case, "best_rank_delta_r");
        let made = extract(base, tuned, r).unwrap();
        let (a, b) = made.factors();
        for (i, sigma) in made.singular_values()[..r].iter().enumerate() {
            let row = frobenius(&a[i * k..(i + 1) * k]);
            let column: Vec<f64> = b.iter().skip(i).step_by(r).copied().collect();
            let slack = 1e-13 * made.singular_values()[0].sqrt();
            assert!((row - sigma.sqrt()).abs() <= slack, "{name}: row {i} of A has norm {row}");
            assert!((frobenius(&column) - sigma.sqrt()).abs() <= slack, "{name}: column {i} of B");
        }
        if case["best_rank_delta_unique"].as_bool().unwrap() {
            let best = file.get::<f64>(&format!("{name}.best_rank8_delta_f64"));
            let off = frobenius(&rest(&best, &a, &b, [n, k]));
            assert!(off <= 1e-11 * frobenius(delta), "{name}: off by {off:e}");
        }
    });
}

/// Rounded factors cost what rounding costs: each of the two by its unit.
#[test]
fn adapters_in_every_dtype() {
    each_case(|name, base, tuned, delta, shape, _, _| {
        let r = shape[0].min(shape[1]).min(8);
        let made = extract(base, tuned, r).unwrap();
        for dtype in DType::ALL {
            let lora = Adapter::from(made.lora(dtype).unwrap());
            assert_eq!((lora.rank(), lora.scaling()), (r, 1.0));
            let rest: Vec<f64> = delta.iter().zip(lora.delta().unwrap()).map(|(d, ours)| d - ours).collect();
            // Of B A, off in norm by at most 2 units of ||B|| ||A|| = the kept singular values' sum; f16's steps are fixed
            // below its normal numbers.
            let kept: f64 = made.singular_values()[..r].iter().sum();
            let tiny =
                if dtype == DType::F16 { 2.0f64.powi(-25) * ((shape[0] + shape[1]) * r) as f64 } else { 0.0 };
            let norm = made.singular_values()[0].sqrt();
            let bound = made.frobenius_error() + 2.1 * dtype.unit_roundoff() * kept + tiny * (norm + tiny);
            let got = frobenius(&rest);
            assert!(got <= bound + 1e-13 * kept, "{name} {dtype}: {got:e} of {bound:e}");
        }
    });
}

#[test]
fn a_transposed_weight_gives_the_same_adapter_on_it() {
    each_case(|name, base, tuned, delta, [n, k], _, _| {
        let transposed = |tensor: &Tensor| {
            let values = tensor.to_f32();
            let values: Vec<f32> = (0..n * k).map(|i| values[i % n * k + i / n]).collect();
            Tensor::from_f32([k, n], &values, DType::F32).unwrap()
        };
        let (base, tuned) = (transposed(base), transposed(tuned));
        let difference = Difference::between(&base, &tuned).unwrap().with_fan_in_fan_out(true);
        let made = difference.extract(8.min(n).min(k)).unwrap();
        let (a, b) = made.factors();
        let off = frobenius(&rest(delta, &a, &b, [n, k]));
        let least = made.frobenius_error();
        assert!(
            (off - least).abs() <= 1e-6 * least + 1e-13 * frobenius(delta),
            "{name}: {off:e} for {least:e}"
        );
        let adapter = Adapter::from(made.lora(DType::F32).unwrap());
        assert_eq!(adapter.weight_shape(), [k, n]);
        assert!(adapter.fan_in_fan_out());
    });
}

#[test]
fn misfits_are_refused() {
    let matrix = |shape: &[usize], value: f32| {
        Tensor::from_f32(shape, &vec![value; shape.iter().product()], DType::F32).unwrap()
    };
    let weight = matrix(&[4, 3], 1.0);
    let argument = |result: Result<_, Error>| match result {
        Err(Error::Argument { argument, .. }) => argument,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    };
    assert_eq!(argument(extract(&matrix(&[12], 1.0), &matrix(&[12], 1.0), 1)), "base");
    assert_eq!(argument(extract(&weight, &matrix(&[3, 4], 1.0), 1)), "tuned");
    assert_eq!(argument(extract(&weight, &weight, 4)), "rank");
    for share in [-0.1, 1.1, f64::NAN] {
        assert_eq!(argument(extract(&weight, &weight, Rank::Energy(share))), "energy");
    }
    assert_eq!(argument(extract(&weight, &matrix(&[4, 3], f32::NAN), 1)), "tuned - base at [0, 0]");
    // Factors of 316 and the like fit in f16; of 1e10, not.
    assert!(extract(&weight, &matrix(&[4, 3], 1e5), 1).unwrap().lora(DType::F16).is_ok());
    let huge = extract(&weight, &matrix(&[4, 3], 1e20), 1).unwrap();
    assert_eq!(argument(huge.lora(DType::F16).map(|_| huge.clone())), "lora_a");
    // A rank of 0, and no elements.
    assert_eq!(
        extract(&weight, &matrix(&[4, 3], 2.0), 0).unwrap().lora(DType::F32).unwrap().lora_a().shape(),
        [0, 3]
    );
    assert_eq!(extract(&matrix(&[0, 3], 0.0), &matrix(&[0, 3], 0.0), 0).unwrap().frobenius_error(), 0.0);
}

/// Normal enough numbers of a fixed seed.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    (0..len).map(|_| (0..4).map(|_| rng.random_range(-0.5..0.5f32)).sum()).collect()
}

/// A weight, and what training of a few strong directions in some noise makes of it.
fn trained([n, k]: [usize; 2], strong: usize) -> [Tensor; 2] {
    let (base, u, v, rest) = (noise(n * k, 1), noise(n * strong, 2), noise(k * strong, 3), noise(n * k, 4));
    let direction = |n: usize, k: usize| -> f32 {
        (0..strong).map(|r| u[n * strong + r] * v[k * strong + r] / (1 + r) as f32).sum()
    };
    let tuned: Vec<f32> =
        (0..n * k).map(|i| base[i] + 0.3 * direction(i / k, i % k) + 0.02 * rest[i]).collect();
    [base, tuned].map(|values| Tensor::from_f32([n, k], &values, DType::BF16).unwrap())
}

/// Sides that no tile fits, wide and tall; the rank that was trained, fewer, and more than that.
#[test]
fn subspace_iteration_comes_as_near_as_the_whole_decomposition() {
    for shape in [[300, 577], [577, 300]] {
        let [base, tuned] = trained(shape, 12);
        let difference = Difference::between(&base, &tuned).unwrap();
        let full = difference.with_decomposition(Decomposition::Full).extract(40).unwrap();
        for (rank, far) in [(1, 1e-6), (5, 1e-6), (12, 1e-6), (40, 1e-4)] {
            let made =
                difference.with_decomposition(Decomposition::Randomised { seed: 9 }).extract(rank).unwrap();
            let least = full.clone().cut(rank).frobenius_error();
            let off = made.frobenius_error() / least - 1.0;
            assert!((-1e-12..far).contains(&off), "{shape:?}, rank {rank}: {off:e}");
            // As told, of the smaller ranks that it has, and of the factors themselves.
            let smaller = made.clone().cut(rank / 2);
            let lora = Adapter::from(smaller.lora(DType::F32).unwrap());
            let rest = difference.rest(&lora).unwrap();
            assert!((rest / smaller.frobenius_error() - 1.0).abs() < 1e-6, "{rest} of rank {}", rank / 2);
        }
    }
}

/// The same bits on any number of threads, for every way.
#[test]
fn threads_do_not_change_a_bit() {
    let [base, tuned] = trained([300, 577], 8);
    for method in METHODS {
        for rank in [Rank::Number(8), Rank::Energy(0.8)] {
            let extract = || {
                let difference = Difference::between(&base, &tuned).unwrap();
                difference.with_decomposition(method).extract(rank).unwrap()
            };
            let on = |threads: usize| {
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(extract)
            };
            let one = on(1);
            assert_eq!(one, on(2), "{method:?}");
            assert_eq!(one, on(5), "{method:?}");
        }
    }
}

/// The smallest rank with the share of energy that was asked for.
#[test]
fn ranks_by_energy() {
    let [base, tuned] = trained([300, 577], 12);
    let difference = Difference::between(&base, &tuned).unwrap();
    let all = difference.with_decomposition(Decomposition::Full).extract(300).unwrap();
    for method in METHODS {
        for share in [0.0, 0.5, 0.9, 0.97, 1.0] {
            let made = difference.with_decomposition(method).extract(Rank::Energy(share)).unwrap();
            let energy = |rank: usize| all.clone().cut(rank).energy();
            assert!(made.energy() >= share - 1e-12, "{method:?}, {share}: {}", made.energy());
            let rank = made.rank();
            assert!(rank == 0 || energy(rank - 1) < share, "{method:?}, {share}: rank {rank} is too large");
        }
    }
    let unchanged = Difference::between(&base, &base).unwrap();
    for method in METHODS {
        let made = unchanged.with_decomposition(method).extract(Rank::Energy(1.0)).unwrap();
        assert_eq!((made.rank(), made.frobenius_error(), made.energy()), (0, 0.0, 1.0));
    }
}
