//! What a merge says of itself: against sums in f64, for every target and kind of adapter.

mod low_rank;

use half::{bf16, f16};
use lora_kernels::adapter::{
    Adapter, Base, Dora, Lora, MergeReport, Merged, Requantize, Rounding, Scale, Stack,
};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element, Error, Tensor};
use low_rank::{F32, Linear};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

struct Data(StdRng);

impl Data {
    fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    fn tensor(&mut self, shape: [usize; 2], spread: f32) -> Tensor {
        let values: Vec<f32> =
            (0..shape[0] * shape[1]).map(|_| spread * self.0.random_range(-1.0..1.0f32)).collect();
        Tensor::from_f32(shape, &values, DType::F32).unwrap()
    }

    fn lora(&mut self, [n, k]: [usize; 2], rank: usize, spread: f32, fan_in_fan_out: bool) -> Lora {
        let (a, b) = (self.tensor([rank, k], 1.0), self.tensor([n, rank], spread));
        Lora::new(a, b, 0.75).unwrap().with_fan_in_fan_out(fan_in_fan_out)
    }

    fn dora(&mut self, [n, k]: [usize; 2], rank: usize, spread: f32, fan_in_fan_out: bool) -> Dora {
        let lora = self.lora([n, k], rank, spread, fan_in_fan_out);
        let magnitude: Vec<f32> = (0..n).map(|_| self.0.random_range(3.0..6.0f32)).collect();
        Dora::new(lora, Tensor::from_f32([n], &magnitude, DType::F32).unwrap()).unwrap()
    }
}

/// Decoded in its dtype.
fn elements(base: Base<'_>) -> Vec<f64> {
    match base {
        Base::Dense(tensor) => tensor.to_f64(),
        Base::Nf4(nf4) => nf4.dequantize_tensor().to_f64(),
    }
}

/// The wanted delta in f64, of one adapter, and the magnitude of its terms.
fn wanted(adapter: &Adapter, weight: &[f64]) -> Vec<(f64, f64)> {
    let linear = Linear::new(adapter, adapter.scaling(), weight);
    let (n, k) = (linear.n, linear.k);
    let scales: Vec<f64> = (0..n).map(|n| linear.row_scale(n).0).collect();
    let delta = |n: usize, k: usize| {
        let (w, delta, scale) = (linear.weight[n * linear.k + k], linear.delta(n, k), scales[n]);
        ((scale - 1.0) * w + scale * delta.value, ((scale - 1.0) * w).abs() + scale * delta.magnitude)
    };
    match adapter.fan_in_fan_out() {
        true => (0..n * k).map(|i| delta(i % n, i / n)).collect(),
        false => (0..n * k).map(|i| delta(i / k, i % k)).collect(),
    }
}

/// Checks the sums of a report, when every element of the delta may have `roundings` of f32.
fn check(
    what: &str,
    report: &MergeReport,
    before: &[f64],
    after: &[f64],
    delta: &[(f64, f64)],
    roundings: f64,
) {
    let (mut sums, mut errors) = ([0.0; 4], [0.0; 4]);
    for ((w, m), (d, magnitude)) in before.iter().zip(after).zip(delta) {
        let (r, off) = (m - w, roundings * F32 * magnitude);
        let terms = [w * w, d * d, r * d, (r - d).powi(2)];
        // R is rounded to f32, and R - D again.
        let (off_r, off_missed) = (F32 * r.abs(), off + F32 * (2.0 * r.abs() + (r - d).abs()));
        let error = [
            0.0,
            (2.0 * d.abs() + off) * off,
            r.abs() * off + off_r * (d.abs() + off),
            (2.0 * (r - d).abs() + off_missed) * off_missed,
        ];
        for i in 0..4 {
            sums[i] += terms[i];
            // Sums in f64 have at most as many roundings as elements.
            errors[i] += error[i] + before.len() as f64 * f64::EPSILON * terms[i].abs();
        }
    }
    let got = [report.weight, report.wanted, report.kept, report.error];
    low_rank::assert_close(what, &got, sums.into_iter().zip(errors));
    assert_eq!(report.elements, before.len() as u64, "{what}");
}

fn dense<T: Element>() {
    let mut data = Data::new(1);
    for (shape, spread) in [([9, 23], 0.01), ([300, 511], 0.001), ([1, 1], 0.1)] {
        for fan_in_fan_out in [false, true] {
            let [n, k] = shape;
            let adapters: [Adapter; 2] = [
                data.lora(shape, 5, spread, fan_in_fan_out).into(),
                data.dora(shape, 5, spread, fan_in_fan_out).into(),
            ];
            let stored = if fan_in_fan_out { [k, n] } else { [n, k] };
            let weight = data.tensor(stored, 1.0);
            for adapter in adapters {
                for base in [DType::F32, T::DTYPE] {
                    let weight = Tensor::from_f32(stored, &weight.to_f32(), base).unwrap();
                    let stack = Stack::new(&[&adapter], &weight).unwrap();
                    let Merged { weight: merged, report } = stack.merge(&weight, T::DTYPE).unwrap();
                    let what = format!("{base} to {} {shape:?} {fan_in_fan_out}", T::DTYPE);
                    let before = weight.to_f64();
                    check(&what, &report, &before, &merged.to_f64(), &wanted(&adapter, &before), 11.0);
                    let unadapted = Tensor::from_f32(stored, &weight.to_f32(), T::DTYPE).unwrap();
                    let (old, new) = (unadapted.as_bytes(), merged.as_bytes());
                    let differ = |size: usize| {
                        old.chunks(size).zip(new.chunks(size)).filter(|(old, new)| old != new).count() as u64
                    };
                    assert_eq!(report.changed, differ(size_of::<T>()), "{what}");
                    assert_eq!((report.bytes, report.changed_bytes), (new.len() as u64, differ(1)), "{what}");
                    assert!(report.changed > 0 || shape == [1, 1], "{what}");
                }
            }
        }
    }
}

#[test]
fn dense_targets() {
    dense::<f32>();
    dense::<f16>();
    dense::<bf16>();
}

/// All combinations of scale and rounding.
fn requantizations() -> impl Iterator<Item = Requantize> {
    [Scale::Largest, Scale::LeastError].into_iter().flat_map(|scale| {
        [Rounding::Nearest, Rounding::Stochastic { seed: 7 }, Rounding::KeepGain]
            .map(|rounding| Requantize { scale, rounding, ..Requantize::default() }.forced())
    })
}

fn nf4(data: &mut Data, shape: [usize; 2], blocksize: usize, nesting: Nesting, dtype: DType) -> Nf4Matrix {
    let weight = Tensor::from_f32(shape, &data.tensor(shape, 1.0).to_f32(), dtype).unwrap();
    Nf4Matrix::quantize_tensor(&weight, blocksize, &Codebook::nf4(), nesting).unwrap()
}

#[test]
fn targets_of_4_bits() {
    let mut data = Data::new(2);
    for (shape, blocksize) in [([9, 23], 64), ([70, 1000], 128), ([33, 64], 32)] {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            for dtype in DType::ALL {
                let base = nf4(&mut data, shape, blocksize, nesting, dtype);
                let adapter = Adapter::from(data.lora(shape, 3, 0.1, false));
                let stack = Stack::new(&[&adapter], &base).unwrap();
                let (before, what) = (elements((&base).into()), format!("{shape:?} {nesting:?} {dtype}"));
                let delta = wanted(&adapter, &before);
                for requantize in requantizations() {
                    let Merged { weight: merged, report } = stack.merge(&base, requantize).unwrap();
                    let what = format!("{what} {requantize:?}");
                    check(&what, &report, &before, &elements((&merged).into()), &delta, 9.0);
                    let code = |m: &Nf4Matrix, i: usize| (m.packed()[i / 2] >> (4 * (1 - i % 2))) & 15;
                    let changed = (0..base.numel()).filter(|&i| code(&base, i) != code(&merged, i)).count();
                    assert_eq!(report.changed, changed as u64, "{what}");
                    let (old, new) = (stored(&base), stored(&merged));
                    let differ = old.iter().zip(&new).filter(|(old, new)| old != new).count();
                    assert_eq!(
                        (report.bytes, report.changed_bytes),
                        (new.len() as u64, differ as u64),
                        "{what}"
                    );
                }
                let dense = stack.merge(&base, DType::BF16).unwrap();
                check(&what, &dense.report, &before, &dense.weight.to_f64(), &delta, 9.0);
            }
        }
    }
}

/// What a checkpoint holds of a matrix, without the tables.
fn stored(matrix: &Nf4Matrix) -> Vec<u8> {
    let mut bytes = matrix.packed().to_vec();
    match matrix.absmax() {
        lora_kernels::nf4::Absmax::Plain(absmax) => bytes.extend_from_slice(bytemuck::cast_slice(absmax)),
        lora_kernels::nf4::Absmax::Nested(nested) => {
            bytes.extend_from_slice(nested.q());
            bytes.extend_from_slice(bytemuck::cast_slice(nested.absmax()));
            bytes.extend_from_slice(bytemuck::bytes_of(&nested.offset()));
        }
    }
    bytes
}

/// Weights and reports have the same bits for any number of threads.
#[test]
fn threads_do_not_matter() {
    let mut data = Data::new(3);
    let shape = [300, 1111];
    let base = nf4(&mut data, shape, 64, Nesting::Nested, DType::BF16);
    let dense = data.tensor(shape, 1.0);
    let adapter = Adapter::from(data.dora(shape, 8, 0.02, false));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let stack = Stack::new(&[&adapter], &base).unwrap();
            let nf4: Vec<_> = requantizations().map(|r| stack.merge(&base, r).unwrap()).collect();
            (nf4, stack.merge(&dense, DType::BF16).unwrap())
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

/// The report of a model is the sum of its layers'.
#[test]
fn reports_add_up() {
    let mut data = Data::new(4);
    let mut layer = |spread: f32| {
        let (weight, adapter) = (data.tensor([20, 30], 1.0), data.lora([20, 30], 2, spread, false).into());
        let merged = Stack::new(&[&adapter], &weight).unwrap().merge(&weight, DType::BF16).unwrap();
        (weight.to_f64(), merged, wanted(&adapter, &weight.to_f64()))
    };
    let layers = [layer(0.1), layer(0.001)];
    let total: MergeReport = layers.iter().map(|(_, merged, _)| merged.report).sum();
    let before: Vec<f64> = layers.iter().flat_map(|(before, ..)| before.clone()).collect();
    let after: Vec<f64> = layers.iter().flat_map(|(_, merged, _)| merged.weight.to_f64()).collect();
    let delta: Vec<(f64, f64)> = layers.iter().flat_map(|(.., delta)| delta.clone()).collect();
    check("total", &total, &before, &after, &delta, 9.0);
    assert_eq!(total.bytes, 2 * 1200);
    let error = |report: &MergeReport| report.error;
    assert_eq!(total.error, layers.iter().map(|(_, merged, _)| error(&merged.report)).sum::<f64>());
}

/// A merge into 4 bits that leaves less of the adapter than is asked for comes back as an error with the figures.
#[test]
fn what_would_be_lost_is_refused() {
    let mut data = Data::new(5);
    let base = nf4(&mut data, [64, 128], 64, Nesting::Nested, DType::BF16);
    let (faint, strong) =
        (data.lora([64, 128], 4, 0.002, false).into(), data.lora([64, 128], 4, 0.3, false).into());
    let (faint, strong) = (Stack::new(&[&faint], &base).unwrap(), Stack::new(&[&strong], &base).unwrap());
    let plain = Requantize::default();
    let lost = faint.merge(&base, plain).unwrap_err();
    let forced = faint.merge(&base, plain.forced()).unwrap().report;
    let Error::AdapterLost { argument, wanted, report } = &lost else { panic!("{lost}") };
    assert_eq!((argument.as_str(), *wanted, *report), ("weight", 0.9, forced));
    assert!(report.retained_gain() < 0.9, "{report}");
    for text in ["0.9", "retained gain 0.", "relative error 1.", "16 bits", "remainder", "forced"] {
        assert!(lost.to_string().contains(text), "{lost}");
    }
    assert!(strong.merge(&base, plain).unwrap().report.retained_gain() > 0.9);
    // The threshold is the least gain that passes.
    let at = |min_gain| faint.merge(&base, Requantize { min_gain, ..plain });
    assert!(at(forced.retained_gain()).is_ok());
    assert!(at(forced.retained_gain().next_up()).is_err());
    // 16 bits are never refused, and so is not what wants nothing.
    assert!(faint.merge(&base, DType::BF16).unwrap().report.retained_gain() < 0.9);
    let nothing = Lora::new(data.tensor([0, 128], 1.0), data.tensor([64, 0], 1.0), 1.0).unwrap().into();
    let report = Stack::new(&[&nothing], &base).unwrap().merge(&base, plain).unwrap().report;
    assert_eq!((report.retained_gain(), report.relative_delta(), report.wanted), (1.0, 0.0, 0.0));
    let nan = at(f64::NAN).unwrap_err();
    assert!(matches!(&nan, Error::Argument { argument, .. } if argument == "target.min_gain"), "{nan}");
    let dense = faint.merge(&base.dequantize_tensor(), plain).unwrap_err();
    assert!(matches!(&dense, Error::Argument { argument, .. } if argument == "weight"), "{dense}");
}
