//! The layers against their formulas in f64, forward and backward.
//!
//! The formulas are sums of products, so the same formula of absolute values is the size of what is rounded: a result is off by at
//! most the number of roundings on the way to it, times the unit roundoff of f32, times that size, and one rounding to
//! its own type (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1).

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Module;
use lora_kernels::adapter::{Adapter, Lora};
use lora_kernels::nf4::Nesting;
use lora_kernels_candle::{AdapterIndex, LoraLinear, MultiLoraLinear, Nf4Weight, Weight};

const CPU: Device = Device::Cpu;
/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;
const TYPES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::BF16),
    (DType::BF16, DType::F32),
];

/// Numbers that look random, between -1 and 1, and are the same every time (splitmix64).
fn random(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let mut state = seed << 32;
    let mut number = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    let numbers: Vec<f64> = (0..shape.iter().product()).map(|_| number()).collect();
    Tensor::from_vec(numbers, shape, &CPU).unwrap().to_dtype(dtype).unwrap()
}

fn wide(tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::F64).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    wide(tensor).flatten_all().unwrap().to_vec1().unwrap()
}

fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1.0 / (1u64 << 11) as f64,
        DType::BF16 => 1.0 / (1u64 << 8) as f64,
        _ => U,
    }
}

/// Every element within `roundings` of f32 of this size, and one of its own type.
fn assert_close(what: &str, got: &Tensor, want: &Tensor, size: &Tensor, roundings: usize) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let unit = unit_roundoff(got.dtype());
    for (i, ((got, want), size)) in numbers(got).iter().zip(numbers(want)).zip(numbers(size)).enumerate() {
        let inside = roundings as f64 * U * size;
        let bound = inside + unit * (want.abs() + inside) + 2f64.powi(-25);
        assert!((got - want).abs() <= bound, "{what}[{i}]: {got}, not {want} +- {bound:e}");
    }
}

/// `x Wᵀ + s (x Aᵀ) Bᵀ + bias`.
fn formula(
    x: &Tensor,
    w: &Tensor,
    factors: Option<(&Tensor, &Tensor, f64)>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let mut y = x.broadcast_matmul(&w.t()?)?;
    if let Some((a, b, scaling)) = factors {
        y = (y + (x.broadcast_matmul(&a.t()?)?.broadcast_matmul(&b.t()?)? * scaling)?)?;
    }
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// A dense weight, or that in 4 bits; and its elements in f64 as activations of type `dtype` meet them.
fn weight(kind: &str, n: usize, k: usize, dtype: DType) -> (Weight, Tensor) {
    let dense = random(1, &[n, k], dtype);
    let nf4 = |nesting| {
        let nf4 = Nf4Weight::quantize(&dense, 64, nesting).unwrap();
        let decoded = wide(&nf4.dequantize(dtype).unwrap());
        (nf4.into(), decoded)
    };
    match kind {
        "dense" => (dense.clone().into(), wide(&dense)),
        "nf4" => nf4(Nesting::Plain),
        _ => nf4(Nesting::Nested),
    }
}

fn abs(tensors: [&Tensor; 5]) -> [Tensor; 5] {
    tensors.map(|t| t.abs().unwrap())
}

#[test]
fn outputs_of_every_type_and_weight() {
    // Rows that begin inside a byte and inside a block, and nothing that is a multiple of anything.
    for (n, k, rank, batch) in
        [(5, 7, 3, &[2, 3][..]), (33, 129, 8, &[4]), (64, 128, 1, &[1, 1]), (3, 64, 2, &[0, 2])]
    {
        for (dtype, factor_dtype) in TYPES {
            for kind in ["dense", "nf4", "nested"] {
                let what = format!("{kind} [{n}, {k}] rank {rank} {dtype:?} {factor_dtype:?}");
                let (weight, w) = weight(kind, n, k, dtype);
                let x = random(2, &[batch, &[k]].concat(), dtype);
                let bias = random(3, &[n], dtype);
                let (a, b) = (random(4, &[rank, k], factor_dtype), random(5, &[n, rank], factor_dtype));
                let scaling = 0.75;

                let [x64, b64, a64, bias64] = [&x, &b, &a, &bias].map(wide);
                let [xs, ws, bs, als, biases] = abs([&x64, &w, &b64, &a64, &bias64]);
                let plain = LoraLinear::new(weight, Some(bias)).unwrap();
                let y = plain.forward(&x).unwrap();
                let want = formula(&x64, &w, None, Some(&bias64)).unwrap();
                let size = formula(&xs, &ws, None, Some(&biases)).unwrap();
                assert_close(&what, &y, &want, &size, k + 2);

                let adapted = plain.with_factors(&a, &b, scaling).unwrap();
                let y = adapted.forward(&x).unwrap();
                let want = formula(&x64, &w, Some((&a64, &b64, scaling)), Some(&bias64)).unwrap();
                let size = formula(&xs, &ws, Some((&als, &bs, scaling)), Some(&biases)).unwrap();
                assert_close(&what, &y, &want, &size, k + rank + 4);
            }
        }
    }
}

#[test]
fn activations_may_lie_anyhow() {
    let (weight, w) = weight("nf4", 6, 10, DType::F32);
    let layer = LoraLinear::new(weight, None).unwrap();
    let whole = random(2, &[10, 4, 3], DType::F32);
    for x in [
        whole.permute((2, 1, 0)).unwrap(),
        random(3, &[7, 10], DType::F32).narrow(0, 2, 3).unwrap(),
        random(4, &[10], DType::F32).broadcast_as((2, 10)).unwrap(),
        random(5, &[10], DType::F32),
    ] {
        let y = layer.forward(&x).unwrap();
        let rows = wide(&x).reshape(((), 10)).unwrap();
        let want = formula(&rows, &w, None, None).unwrap().reshape(y.dims()).unwrap();
        let size = formula(&rows.abs().unwrap(), &w.abs().unwrap(), None, None).unwrap();
        assert_close("y", &y, &want, &size.reshape(y.dims()).unwrap(), 12);
    }
}

/// Gradients of `sum(y * g)` by autograd, for each of the variables.
fn gradients(y: &Tensor, g: &Tensor, of: &[&Var]) -> Vec<Tensor> {
    let grads = (y * g).unwrap().sum_all().unwrap().backward().unwrap();
    of.iter().map(|v| grads.get(v.as_tensor()).expect("a gradient").clone()).collect()
}

fn var(tensor: &Tensor) -> Var {
    Var::from_tensor(tensor).unwrap()
}

#[test]
fn gradients_of_every_type_and_weight() {
    for (n, k, rank, batch) in [(5, 7, 3, &[2, 3][..]), (33, 129, 8, &[4])] {
        for (dtype, factor_dtype) in TYPES {
            for kind in ["dense", "nf4", "nested"] {
                let what = format!("{kind} [{n}, {k}] rank {rank} {dtype:?} {factor_dtype:?}");
                let (weight, w) = weight(kind, n, k, dtype);
                let tokens: usize = batch.iter().product();
                let x = random(2, &[batch, &[k]].concat(), dtype);
                let g = random(6, &[batch, &[n]].concat(), dtype);
                let (a, b) = (random(4, &[rank, k], factor_dtype), random(5, &[n, rank], factor_dtype));
                let scaling = -1.25;

                let vars = [&x, &a, &b].map(var);
                let layer = LoraLinear::new(weight, None).unwrap();
                let layer = layer.with_factors(&vars[1], &vars[2], scaling).unwrap();
                let ours = gradients(&layer.forward(&vars[0]).unwrap(), &g, &vars.each_ref());

                let reference = |map: &dyn Fn(&Tensor) -> Tensor, scaling: f64| {
                    let vars = [&x, &a, &b].map(|t| var(&map(&wide(t))));
                    let y = formula(&vars[0], &map(&w), Some((&vars[1], &vars[2], scaling)), None).unwrap();
                    gradients(&y, &map(&wide(&g)), &vars.each_ref())
                };
                let want = reference(&Tensor::clone, scaling);
                let size = reference(&|t| t.abs().unwrap(), scaling.abs());
                // dX: sums of n and of n and rank terms; dA: of n and of tokens; dB: of k and of tokens. The sums over panels
                // of W are among them, scaling and addition are the rest.
                let roundings = [n + rank + 4, n + tokens + 3, k + tokens + 3];
                for (i, name) in ["dX", "dA", "dB"].into_iter().enumerate() {
                    assert_eq!(ours[i].dtype(), [dtype, factor_dtype, factor_dtype][i], "{what} {name}");
                    assert_close(&format!("{what} {name}"), &ours[i], &want[i], &size[i], roundings[i]);
                }
            }
        }
    }
}

#[test]
fn training_moves_the_factors_and_the_layer_sees_it() {
    let (weight, w) = weight("nested", 24, 40, DType::F32);
    let target = random(7, &[24, 40], DType::F64);
    let target = (&w + (target * 0.05).unwrap()).unwrap();
    let x = random(2, &[64, 40], DType::F32);
    let want = formula(&wide(&x), &target, None, None).unwrap().to_dtype(DType::F32).unwrap();
    let (a, b) = (var(&random(4, &[8, 40], DType::F32)), Var::zeros((24, 8), DType::F32, &CPU).unwrap());
    let layer = LoraLinear::new(weight, None).unwrap().with_factors(&a, &b, 2.0).unwrap();
    let loss = || (layer.forward(&x).unwrap() - &want).unwrap().sqr().unwrap().mean_all().unwrap();
    let value = |loss: &Tensor| loss.to_scalar::<f32>().unwrap();
    let mut losses = vec![value(&loss())];
    for _ in 0..50 {
        let now = loss();
        let grads = now.backward().unwrap();
        for v in [&a, &b] {
            let step = (grads.get(v.as_tensor()).unwrap() * 0.1).unwrap();
            v.set(&(v.as_tensor() - step).unwrap()).unwrap();
        }
        losses.push(value(&loss()));
    }
    assert!(losses[1] < losses[0], "{losses:?}");
    // The best adapter of rank 8 leaves what the other singular values of the difference hold: of a random 24 by 40, well
    // over a tenth and well under all.
    assert!(losses[50] < 0.8 * losses[0] && losses[50] > 0.1 * losses[0], "{losses:?}");
}

fn lora(seed: u64, rank: usize, n: usize, k: usize, dtype: DType) -> Adapter {
    let host = |t: Tensor| {
        let shape = t.dims().to_vec();
        let values: Vec<f32> = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let dtype = match dtype {
            DType::F16 => lora_kernels::DType::F16,
            DType::BF16 => lora_kernels::DType::BF16,
            _ => lora_kernels::DType::F32,
        };
        lora_kernels::Tensor::from_f32(shape, &values, dtype).unwrap()
    };
    let (a, b) = (random(seed, &[rank, k], dtype), random(seed + 1, &[n, rank], dtype));
    Lora::new(host(a), host(b), 0.5 + seed as f64 / 16.0).unwrap().into()
}

fn factors64(adapter: &Adapter) -> (Tensor, Tensor, f64) {
    let tensor = |t: &lora_kernels::Tensor| Tensor::from_vec(t.to_f64(), t.shape(), &CPU).unwrap();
    (tensor(adapter.lora_a()), tensor(adapter.lora_b()), adapter.scaling())
}

#[test]
fn every_token_has_its_own_adapter() {
    let (n, k) = (33, 70);
    for (dtype, factor_dtype) in TYPES {
        let adapters = [lora(10, 4, n, k, factor_dtype), lora(12, 9, n, k, factor_dtype)];
        // Number 1 of three does not adapt this module.
        let numbered = [Some(&adapters[0]), None, Some(&adapters[1])];
        for kind in ["dense", "nested"] {
            let (weight, w) = weight(kind, n, k, dtype);
            let index = AdapterIndex::new();
            let layer = MultiLoraLinear::new(weight, None, &numbered, dtype, &index).unwrap();
            let x = random(2, &[2, 4, k], dtype);
            let check = |of: &dyn Fn(usize, usize) -> i64| {
                let x = var(&x);
                let y = layer.forward(&x).unwrap();
                let g = random(6, &[2, 4, n], dtype);
                let dx = gradients(&y, &g, &[&x]).remove(0);
                for (sequence, token) in (0..8).map(|i| (i / 4, i % 4)) {
                    let what = format!("{kind} {dtype:?} {factor_dtype:?} token {sequence}, {token}");
                    let pick = |t: &Tensor| t.narrow(0, sequence, 1).unwrap().narrow(1, token, 1).unwrap();
                    let adapter = usize::try_from(of(sequence, token)).ok().and_then(|i| numbered[i]);
                    let factors = adapter.map(factors64);
                    let run = |map: &dyn Fn(&Tensor) -> Tensor| {
                        let x = var(&map(&wide(&pick(x.as_tensor()))));
                        let factors = factors.as_ref().map(|(a, b, s)| (map(a), map(b), *s));
                        let factors = factors.as_ref().map(|(a, b, s)| (a, b, *s));
                        let y = formula(&x, &map(&w), factors, None).unwrap();
                        let dx = gradients(&y, &map(&wide(&pick(&g))), &[&x]).remove(0);
                        (y, dx)
                    };
                    let (want, want_dx) = run(&Tensor::clone);
                    let (size, size_dx) = run(&|t| t.abs().unwrap());
                    assert_close(&what, &pick(&y), &want, &size, k + 9 + 4);
                    assert_close(&format!("{what} dX"), &pick(&dx), &want_dx, &size_dx, n + 9 + 6);
                }
            };
            check(&|_, _| -1);
            index.set(&Tensor::new(&[[2i64, -1, 0, 1], [0, 2, 2, 0]], &CPU).unwrap()).unwrap();
            check(&|s, t| [[2, -1, 0, 1], [0, 2, 2, 0]][s][t]);
            index.set(&Tensor::new(&[2i32, 0], &CPU).unwrap()).unwrap();
            check(&|s, _| [2, 0][s]);
            index.clear();
            check(&|_, _| -1);
        }
    }
}

/// The message of what must fail, without the backtrace that candle may put behind it.
fn error<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string().lines().next().unwrap_or_default().to_owned()
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let f32s = |shape: &[usize]| random(1, shape, DType::F32);
    let f16s = |shape: &[usize]| random(1, shape, DType::F16);
    let f64s = |shape: &[usize]| random(1, shape, DType::F64);
    let layer = || LoraLinear::new(f32s(&[4, 6]), None).unwrap();
    let message = error(LoraLinear::new(f32s(&[4, 6]), Some(f32s(&[6]))));
    assert_eq!(message, "bias: wanted shape [4], got [6]");
    assert_eq!(error(LoraLinear::new(f64s(&[4, 6]), None)), "weight: wanted f32, f16 or bf16, got f64");
    assert!(error(LoraLinear::new(f32s(&[4]), None)).contains("unexpected rank"));
    let message = error(layer().with_factors(&f32s(&[2, 5]), &f32s(&[4, 2]), 1.0));
    assert_eq!(message, "lora_a: wanted shape [rank, 6], got [2, 5]");
    let message = error(layer().with_factors(&f32s(&[2, 6]), &f32s(&[4, 3]), 1.0));
    assert_eq!(message, "lora_b: wanted shape [4, 2], got [4, 3]");
    let message = error(layer().with_factors(&f32s(&[2, 6]), &f16s(&[4, 2]), 1.0));
    assert_eq!(message, "lora_b: wanted f32, as lora_a, got f16");
    let message = error(layer().with_factors(&f32s(&[2, 6]), &f32s(&[4, 2]), f64::NAN));
    assert_eq!(message, "scaling: wanted a finite number, got NaN");
    assert_eq!(error(layer().forward(&f32s(&[3, 5]))), "x: wanted shape [.., 6], got [3, 5]");
    assert_eq!(error(layer().forward(&f16s(&[3, 6]))), "x: wanted f32, as weight and bias, got f16");
    let nf4 = || Nf4Weight::quantize(&f32s(&[4, 6]), 64, Nesting::Plain).unwrap();
    let quantized = LoraLinear::new(nf4(), None).unwrap();
    assert_eq!(error(quantized.forward(&f64s(&[3, 6]))), "x: wanted f32, f16 or bf16, got f64");
    let adapted = quantized.with_factors(&f16s(&[2, 6]), &f16s(&[4, 2]), 1.0).unwrap();
    assert_eq!(
        error(adapted.forward(&f32s(&[3, 6]))),
        "lora_a, lora_b: wanted the type of x, or f32, got another"
    );
    assert!(error(Nf4Weight::quantize(&f32s(&[4, 6]), 48, Nesting::Plain)).starts_with("blocksize: wanted"));
    assert!(
        error(Nf4Weight::quantize(&f32s(&[24]), 64, Nesting::Plain))
            .starts_with("matrix: wanted shape [out, in]")
    );
    assert_eq!(error(nf4().dequantize(DType::U8)), "dtype: wanted f32, f16 or bf16, got u8");

    let index = AdapterIndex::new();
    let adapter = lora(10, 2, 4, 6, DType::F32);
    let multi = MultiLoraLinear::new(nf4(), None, &[Some(&adapter)], DType::F32, &index).unwrap();
    assert_eq!(error(index.set(&f32s(&[3]))), "index: wanted i32 or i64, got f32");
    index.set(&Tensor::new(&[0i64, 1, -1], &CPU).unwrap()).unwrap();
    let message = error(multi.forward(&f32s(&[3, 6])));
    assert_eq!(message, "adapter_index[1]: wanted -1, or an index of 1 adapters, got 1");
    assert_eq!(error(multi.forward(&f32s(&[2, 6]))), "index: wanted shape [2], or [2], got [3]");
    assert_eq!(error(multi.forward(&f32s(&[2, 3, 6]))), "index: wanted shape [2, 3], or [2], got [3]");
}
