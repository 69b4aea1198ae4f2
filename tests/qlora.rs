//! Adapters on a 4-bit base against PEFT over bitsandbytes: forward, merge into 4 bits and back, merge into a dense weight.

mod fixtures;
mod low_rank;

use fixtures::{Fixture, size, text};
use lora_kernels::adapter::{Adapter, Dora, Lora, Requantize, Stack};
use lora_kernels::nf4::{Absmax, Codebook, DYNAMIC_MAP, NestedAbsmax, Nesting, Nf4Matrix};
use lora_kernels::{DType, Tensor};
use low_rank::{BF16, F32, F64, Linear, Sum, assert_close};

const TOKENS: [usize; 6] = [1, 2, 3, 7, 16, 33];

struct Case {
    name: &'static str,
    file: Fixture,
    n: usize,
    k: usize,
    nested: bool,
    dtype: DType,
    adapter: Adapter,
    scaling: f64,
    bias: Option<Tensor>,
}

impl Case {
    fn open(name: &'static str) -> Self {
        let file = Fixture::open(&format!("qlora/{name}"));
        let scaling = file.json["scaling"].as_f64().unwrap();
        let lora = Lora::new(file.tensor("lora_A"), file.tensor("lora_B"), scaling).unwrap();
        let adapter = match file.has("magnitude") {
            true => Dora::new(lora, file.tensor("magnitude")).unwrap().into(),
            false => lora.into(),
        };
        Self {
            name,
            n: size(&file.json, "N"),
            k: size(&file.json, "K"),
            nested: file.json["double_quant"].as_bool().unwrap(),
            dtype: dtype(text(&file.json, "quant_state_dtype")),
            adapter,
            scaling,
            bias: file.has("bias").then(|| file.tensor("bias")),
            file,
        }
    }

    /// The matrix that PEFT stored under `part` (`base`, `merged`, `unmerged`).
    fn matrix(&self, part: &str, dtype: DType) -> Nf4Matrix {
        let get_f32 = |tensor: &str| self.file.get::<f32>(&format!("{part}.{tensor}"));
        let absmax = match self.nested {
            false => Absmax::Plain(get_f32("absmax")),
            true => {
                let q = self.file.get::<u8>(&format!("{part}.qabsmax"));
                let map = Box::new(DYNAMIC_MAP);
                let nested =
                    NestedAbsmax::from_parts(q, get_f32("nested_absmax"), map, get_f32("offset")[0], 256);
                Absmax::Nested(nested.unwrap())
            }
        };
        let packed = self.file.get(&format!("{part}.packed"));
        let blocksize = size(&self.file.json, "blocksize");
        Nf4Matrix::from_parts([self.n, self.k], packed, absmax, blocksize, Codebook::nf4(), dtype).unwrap()
    }

    fn base(&self) -> Nf4Matrix {
        self.matrix("base", self.dtype)
    }

    /// The formula over `weight`.
    fn truth(&self, weight: &[f64]) -> Linear {
        Linear::new(&self.adapter, self.scaling, weight)
    }
}

fn dtype(name: &str) -> DType {
    match name {
        "torch.float32" => DType::F32,
        "torch.bfloat16" => DType::BF16,
        other => panic!("{other}"),
    }
}

fn each_case(check: impl Fn(&Case)) {
    ["nodq_bs64_f32", "dq_bs64_bf16", "dora_bs64_f32"].iter().for_each(|name| check(&Case::open(name)));
}

/// The weight as a base of that dtype stands for it.
fn dequantized(matrix: &Nf4Matrix, dtype: DType) -> Vec<f64> {
    match dtype {
        DType::F32 => matrix.dequantize::<f32>().into_iter().map(f64::from).collect(),
        _ => matrix.dequantize::<half::bf16>().into_iter().map(f64::from).collect(),
    }
}

/// f64 truth that PEFT and our own loops agree on, and PEFT's f32.
#[test]
fn forward_is_pefts() {
    each_case(|case| {
        let base = case.base();
        let stack = Stack::new(&[&case.adapter], &base).unwrap();
        // DoRA's norm is over the base in its own dtype, the product over the base in that of x. Here both are f32.
        assert!(stack.row_scale().is_none() || case.dtype == DType::F32);
        let mut truth = case.truth(&dequantized(&base, DType::F32));
        truth.bias = case.bias.as_ref().map_or(vec![0.0; case.n], Tensor::to_f64);
        for tokens in TOKENS {
            let x = case.file.tensor(&format!("T{tokens}.x"));
            let y = stack.forward(&x, &base, case.bias.as_ref()).unwrap();
            let sums: Vec<Sum> = x.to_f64().chunks(case.k).flat_map(|x| truth.forward(x)).collect();
            let roundings = (2 * case.k + truth.rank + 8) as f64;
            let what = format!("{} T{tokens}", case.name);
            let bound = || sums.iter().map(|sum| (sum.value, roundings * F64 * sum.magnitude));
            assert_close(&what, &y, bound());
            assert_close(
                &format!("{what} y_f64"),
                &case.file.get::<f64>(&format!("T{tokens}.y_f64")),
                bound(),
            );
            let theirs = sums.iter().enumerate().map(|(i, sum)| {
                let (scale, relative) = truth.row_scale(i % case.n);
                let spread = if truth.magnitude.is_some() { 2.0 + 2.0 / scale.abs() } else { 1.0 };
                (sum.value, (roundings * F32 + relative) * spread * sum.magnitude)
            });
            assert_close(
                &format!("{what} y_f32"),
                &case.file.tensor(&format!("T{tokens}.y_f32")).to_f64(),
                theirs,
            );
        }
    });
}

/// x in bf16: the base is dequantised straight to bf16.
#[test]
fn forward_in_bf16_is_pefts() {
    each_case(|case| {
        let base = case.base();
        let stack = Stack::new(&[&case.adapter], &base).unwrap();
        let mut truth = case.truth(&dequantized(&base, DType::BF16));
        truth.bias = case.bias.as_ref().map_or(vec![0.0; case.n], |bias| {
            Tensor::from_f32([case.n], &bias.to_f32(), DType::BF16).unwrap().to_f64()
        });
        let bias = Tensor::from_f32(
            [case.n],
            &truth.bias.iter().map(|&b| b as f32).collect::<Vec<_>>(),
            DType::BF16,
        );
        // DoRA's norm is over the base in its own dtype.
        let own = case.truth(&dequantized(&base, case.dtype));
        let scale: Vec<(f64, f64)> = (0..case.n).map(|n| own.row_scale(n)).collect();
        truth.magnitude = None;
        for tokens in TOKENS {
            let x = case.file.tensor(&format!("T{tokens}.x"));
            let x = Tensor::from_f32(x.shape(), &x.to_f32(), DType::BF16).unwrap();
            let y = stack.forward(&x, &base, Some(bias.as_ref().unwrap())).unwrap();
            let what = format!("{} T{tokens} in bf16", case.name);
            let sums: Vec<Sum> = x.to_f64().chunks(case.k).flat_map(|x| truth.forward(x)).collect();
            let sums: Vec<Sum> = sums
                .iter()
                .enumerate()
                .map(|(i, sum)| {
                    let (bias, scale) = (truth.bias[i % case.n], scale[i % case.n].0);
                    let value = scale * (sum.value - bias) + bias;
                    Sum { value, magnitude: scale.abs().max(1.0) * sum.magnitude }
                })
                .collect();
            let roundings = (2 * case.k + truth.rank + 8) as f64;
            assert_close(&what, &y, sums.iter().map(|sum| (sum.value, roundings * F64 * sum.magnitude)));

            // PEFT rounds the base's output, the adapter's, and their sum; of DoRA the base's output without its bias, too.
            let base_output: Vec<f64> =
                x.to_f64().chunks(case.k).flat_map(|x| base_outputs(&truth, x)).collect();
            let theirs = sums.iter().zip(&base_output).enumerate().map(|(i, (sum, base))| {
                let ((scale, relative), bias) = (scale[i % case.n], truth.bias[i % case.n]);
                let (spread, dora) = match own.magnitude {
                    None => (1.0, 0.0),
                    Some(_) => {
                        (2.0 + 2.0 / scale.abs(), (scale - 1.0).abs() * (base.abs() + (base - bias).abs()))
                    }
                };
                // With DoRA, what is added to the base's output is (g - 1) (base - bias) + g * lora.
                let rounded = base.abs() + (sum.value - base).abs() + sum.value.abs() + dora;
                let error = BF16 * (1.0 + 2.0 * BF16) * rounded;
                (sum.value, error + (roundings * F32 + relative) * spread * sum.magnitude)
            });
            let stored = case.file.tensor(&format!("T{tokens}.y_bf16")).to_f64();
            assert_close(&format!("{what}, PEFT"), &stored, theirs);
        }
    });
}

fn base_outputs(linear: &Linear, x: &[f64]) -> Vec<f64> {
    let rows = linear.weight.chunks(linear.k).zip(&linear.bias);
    rows.map(|(w, bias)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias).collect()
}

/// A weight in f64 that is about to be quantised, with the error that each of its elements may have by then.
struct Target {
    value: Vec<f64>,
    error: Vec<f64>,
}

impl Target {
    /// Checks that `matrix` holds what quantisation in f32 can make of the target: each scale is that of its block, and
    /// each code is the nearest one for some value within the error.
    fn check(&self, what: &str, matrix: &Nf4Matrix) {
        let blocksize = matrix.blocksize();
        let blocks = || self.value.chunks(blocksize).zip(self.error.chunks(blocksize));
        let scales: Vec<(f64, f64)> = blocks()
            .map(|(value, error)| {
                let largest = value.iter().fold(0.0f64, |largest, v| largest.max(v.abs()));
                (largest, error.iter().fold(0.0f64, |largest, e| largest.max(*e)))
            })
            .collect();
        match matrix.absmax() {
            Absmax::Plain(absmax) => {
                let got: Vec<f64> = absmax.iter().copied().map(f64::from).collect();
                assert_close(&format!("{what}: absmax"), &got, scales.iter().copied());
            }
            Absmax::Nested(nested) => check_nested(what, nested, &scales),
        }
        let thresholds = Codebook::nf4().thresholds().map(f64::from);
        let nearest = |x: f64| thresholds.iter().filter(|&&t| x > t).count();
        for (block, (value, error)) in blocks().enumerate() {
            let (absmax, absmax_error) = scales[block];
            for (i, (v, error)) in value.iter().zip(error).enumerate() {
                let at = block * blocksize + i;
                let code = usize::from(matrix.packed()[at / 2] >> (4 * (1 - at % 2)) & 15);
                let x = v / absmax;
                // The reciprocal and the product are rounded too.
                let slack = (error + x.abs() * absmax_error) / absmax + 3.0 * F32 * x.abs();
                let (low, high) = (nearest(x - slack), nearest(x + slack));
                assert!((low..=high).contains(&code), "{what}: code {code} at {at}, {low} to {high} for {x}");
            }
        }
    }
}

/// The same for scales that are quantised themselves.
fn check_nested(what: &str, nested: &NestedAbsmax, scales: &[(f64, f64)]) {
    let largest_error = scales.iter().fold(0.0f64, |largest, (_, error)| largest.max(*error));
    let mean = scales.iter().map(|(v, _)| v).sum::<f64>() / scales.len() as f64;
    // A mean in f32: each of the additions rounds.
    let offset_error = largest_error + scales.len() as f64 * F32 * mean;
    assert_close(&format!("{what}: offset"), &[nested.offset().into()], [(mean, offset_error)]);
    let midpoint = |i: usize| (f64::from(DYNAMIC_MAP[i]) + f64::from(DYNAMIC_MAP[i + 1])) / 2.0;
    let nearest = |x: f64| (0..255).filter(|&i| x > midpoint(i)).count();
    for (block, blocks) in scales.chunks(256).enumerate() {
        let error = largest_error + offset_error;
        let centred: Vec<f64> = blocks.iter().map(|(v, _)| v - mean).collect();
        let absmax = centred.iter().fold(0.0f64, |largest, v| largest.max(v.abs()));
        let got = f64::from(nested.absmax()[block]);
        assert_close(&format!("{what}: nested absmax"), &[got], [(absmax, error + F32 * absmax)]);
        for (i, v) in centred.iter().enumerate() {
            let (x, slack) = (v / absmax, 2.0 * (error / absmax + 3.0 * F32));
            let code = usize::from(nested.q()[block * 256 + i]);
            let (low, high) = (nearest(x - slack), nearest(x + slack));
            assert!((low..=high).contains(&code), "{what}: scale code {code}, {low} to {high} for {x}");
        }
    }
}

/// Roundings in f32 before a merged element is quantised: PEFT's and ours.
fn roundings(truth: &Linear) -> f64 {
    (truth.rank + 6) as f64 * F32
}

/// `row_scale (W + delta)` of the base in its dtype.
fn merged(case: &Case) -> Target {
    let truth = case.truth(&dequantized(&case.base(), case.dtype));
    let sums =
        (0..case.n * case.k).map(|i| (truth.merged(i / case.k, i % case.k), truth.row_scale(i / case.k).1));
    let (value, error) =
        sums.map(|(sum, relative)| (sum.value, (roundings(&truth) + relative) * sum.magnitude)).unzip();
    Target { value, error }
}

#[test]
fn merge_into_4_bits_is_pefts() {
    each_case(|case| {
        let (base, target) = (case.base(), merged(case));
        let ours = Stack::new(&[&case.adapter], &base)
            .unwrap()
            .merge(&base, Requantize::default().forced())
            .unwrap()
            .weight;
        target.check(case.name, &ours);
        target.check(&format!("{} PEFT", case.name), &case.matrix("merged", DType::F32));
        assert_eq!(
            (ours.shape(), ours.blocksize(), ours.dtype()),
            (base.shape(), base.blocksize(), base.dtype())
        );
        assert_eq!(matches!(ours.absmax(), Absmax::Nested(_)), case.nested);
        // Half of the widest step between two codes, -1 and -0.696, in units of the block's largest; and what nesting has
        // done to that.
        let got = dequantized(&ours, DType::F32);
        for (block, (value, got)) in
            target.value.chunks(base.blocksize()).zip(got.chunks(base.blocksize())).enumerate()
        {
            let largest = value.iter().fold(0.0f64, |largest, v| largest.max(v.abs()));
            let scale_error = (f64::from(ours.absmax().get(block)) - largest).abs();
            for (v, got) in value.iter().zip(got) {
                assert!(
                    (v - got).abs() <= 0.1521 * largest + scale_error + 1e-6,
                    "{}: {got} for {v}",
                    case.name
                );
            }
        }
    });
}

/// PEFT's own merged matrix, unmerged by us and by PEFT. Neither restores the base, as the documentation says.
#[test]
fn unmerge_from_4_bits_is_pefts() {
    each_case(|case| {
        let base = case.base();
        let stack = Stack::new(&[&case.adapter], &base).unwrap();
        let merged = case.matrix("merged", dtype(text(&case.file.json, "merged_quant_state_dtype")));
        let weights = dequantized(&merged, DType::F32);
        let truth = case.truth(&dequantized(&base, case.dtype));
        let (value, error) = (0..case.n * case.k)
            .map(|i| {
                let (scale, relative) = truth.row_scale(i / case.k);
                let (w, delta) = (weights[i] / scale, truth.delta(i / case.k, i % case.k));
                (w - delta.value, (roundings(&truth) + relative) * (w.abs() + delta.magnitude))
            })
            .unzip();
        let target = Target { value, error };
        let ours = stack.unmerge(&merged, Requantize::default()).unwrap().weight;
        target.check(case.name, &ours);
        target.check(&format!("{} PEFT", case.name), &case.matrix("unmerged", DType::F32));
        assert_ne!(ours.packed(), base.packed(), "{}", case.name);
    });
}

/// A dense target keeps what 4 bits lose.
#[test]
fn merge_into_a_dense_weight() {
    each_case(|case| {
        let (base, target) = (case.base(), merged(case));
        let stack = Stack::new(&[&case.adapter], &base).unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let ours = stack.merge(&base, dtype).unwrap().weight;
            assert_eq!(ours.dtype(), dtype);
            let bound = target
                .value
                .iter()
                .zip(&target.error)
                .map(|(v, e)| (*v, e + dtype.unit_roundoff() * (v.abs() + e)));
            assert_close(&format!("{} {dtype}", case.name), &ours.to_f64(), bound);
        }
    });
}

/// Rows that do not end with a block, odd ones among them: panels of whole blocks give what one piece gives.
#[test]
fn any_shape_and_blocksize() {
    for (n, k, blocksize) in
        [(3, 5, 32), (1, 1, 64), (67, 999, 64), (130, 1000, 4096), (300, 512, 128), (4, 0, 64)]
    {
        let values: Vec<f32> = (0..n * k).map(|i| ((i * 37 % 1009) as f32 - 504.0) / 300.0).collect();
        let factor = |rows: usize, columns: usize| {
            let values: Vec<f32> =
                (0..rows * columns).map(|i| ((i * 11 % 97) as f32 - 48.0) / 64.0).collect();
            Tensor::from_f32([rows, columns], &values, DType::F32).unwrap()
        };
        let adapter = Adapter::from(Lora::new(factor(3, k), factor(n, 3), 0.5).unwrap());
        for nesting in [Nesting::Plain, Nesting::Nested] {
            let base = Nf4Matrix::quantize(&values, [n, k], blocksize, &Codebook::nf4(), nesting).unwrap();
            let stack = Stack::new(&[&adapter], &base).unwrap();
            let whole = stack.merge(&base, DType::F32).unwrap().weight;
            let wanted = Nf4Matrix::quantize_tensor(&whole, blocksize, &Codebook::nf4(), nesting).unwrap();
            assert!(
                stack.merge(&base, Requantize::default().forced()).unwrap().weight == wanted,
                "[{n}, {k}] in blocks of {blocksize}"
            );
        }
    }
}
