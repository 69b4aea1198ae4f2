//! The products on the CPU: the f64 truth against what the packages computed, the f32 paths against the truth, the same
//! bits in every batch, and every argument that does not fit.

mod fixtures;

use fixtures::{Fixture, size, text};
use half::{bf16, f16};
use lora_kernels::cpu::{self, Accumulate, Dropout, LowRank, MatmulExtras, Truth, Weight};
use lora_kernels::formats::bitsandbytes;
use lora_kernels::nf4::{Absmax, BLOCKSIZES, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element, Error};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const F32: f64 = DType::F32.unit_roundoff();

/// How far a path with `roundings` may be from the truth, before and after the last rounding.
///
/// After c roundings a term is off by (1 + u)^c - 1 <= c u / (1 - c u) of itself (Higham, Accuracy and Stability of Numerical Algorithms,
/// lemma 3.1), and so the sum by that share of the magnitudes' sum.
fn bound<T: Element>(truth: Truth, roundings: usize) -> f64 {
    let c = roundings as f64 * F32;
    let sum = c / (1.0 - c) * truth.magnitude;
    let smallest = match T::DTYPE {
        DType::F16 => 2f64.powi(-24),
        DType::F32 | DType::BF16 => 2f64.powi(-133),
    };
    sum + T::DTYPE.unit_roundoff() * (truth.value.abs() + sum) + smallest
}

/// The roundings of a term of the longest sum, `row_scale * scaling * (x a) b`, one input and rank after the other: as a product and in
/// each addition, in both sums; by scaling, twice with dropout; when the adapter is added to the base; by row_scale; when the bias
/// is added.
fn reference_roundings(k: usize, rank: usize) -> usize {
    k + rank + 7
}

/// The same with eight sums: each adds an eighth of the inputs, and of the ranks to the base; then three additions make one of eight,
/// for the adapter's inputs and for the output.
fn fast_roundings(k: usize, rank: usize) -> usize {
    let sum = |terms: usize| 1 + terms.div_ceil(8) + 3;
    sum(k) + 2 + sum(rank) + 2
}

fn to<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&v| T::from_f32(v)).collect()
}

/// A product with all that it may have; what is `None` or empty is left out.
struct Case<T, A> {
    m: usize,
    n: usize,
    k: usize,
    x: Vec<T>,
    dense: Vec<T>,
    nf4: Option<Nf4Matrix>,
    bias: Option<Vec<T>>,
    row_scale: Option<Vec<f32>>,
    /// A, B, rank, scaling.
    adapters: Vec<(Vec<A>, Vec<A>, usize, f32)>,
    index: Option<Vec<i32>>,
    dropout: Option<Dropout>,
}

impl<T: Element, A: Element> Case<T, A> {
    fn weight(&self) -> Weight<'_, T> {
        match &self.nf4 {
            Some(nf4) => Weight::Nf4(nf4),
            None => Weight::Dense { data: &self.dense, n: self.n, k: self.k },
        }
    }

    /// Calls `run` with the arguments of a product.
    fn with<R>(&self, run: impl FnOnce(&[T], usize, &Weight<'_, T>, &MatmulExtras<'_, T, A>) -> R) -> R {
        let adapters: Vec<LowRank<'_, A>> = self
            .adapters
            .iter()
            .map(|(lora_a, lora_b, rank, scaling)| LowRank { lora_a, lora_b, rank: *rank, scaling: *scaling })
            .collect();
        let extras = MatmulExtras {
            bias: self.bias.as_deref(),
            row_scale: self.row_scale.as_deref(),
            adapters: &adapters,
            adapter_index: self.index.as_deref(),
            dropout: self.dropout,
        };
        run(&self.x, self.m, &self.weight(), &extras)
    }

    fn truth(&self) -> Vec<Truth> {
        self.with(|x, m, weight, extras| cpu::truth(x, m, weight, extras)).unwrap()
    }

    fn fast(&self) -> Vec<T> {
        let mut y = vec![T::from_f32(f32::NAN); self.m * self.n];
        self.with(|x, m, weight, extras| cpu::fast::matmul(x, m, weight, extras, &mut y)).unwrap();
        y
    }

    fn reference(&self, accumulate: Accumulate) -> Vec<T> {
        let mut y = vec![T::from_f32(f32::NAN); self.m * self.n];
        self.with(|x, m, weight, extras| cpu::matmul(x, m, weight, extras, accumulate, &mut y)).unwrap();
        y
    }

    /// All paths are within the bound of the truth, and the f64 one is the truth, rounded.
    fn check(&self) -> Result<(), TestCaseError> {
        let truth = self.truth();
        let rank = self.adapters.iter().map(|a| a.2).max().unwrap_or(0);
        let fast = ("fast", self.fast(), fast_roundings(self.k, rank));
        let reference = ("reference", self.reference(Accumulate::F32), reference_roundings(self.k, rank));
        for (path, y, roundings) in [fast, reference] {
            for (i, (y, truth)) in y.iter().zip(&truth).enumerate() {
                let bound = bound::<T>(*truth, roundings);
                let off = (y.to_f64() - truth.value).abs();
                prop_assert!(
                    off <= bound,
                    "{path} y[{i}] = {y:?}, not {truth:?}: off by {off:e}, not {bound:e}"
                );
            }
        }
        let rounded: Vec<T> = truth.iter().map(|t| T::from_f64(t.value)).collect();
        prop_assert_eq!(self.reference(Accumulate::F64), rounded);
        Ok(())
    }

    /// The same product for one token.
    fn alone(&self, i: usize) -> Self
    where
        T: Clone,
        A: Clone,
    {
        Self {
            m: 1,
            x: self.x[i * self.k..(i + 1) * self.k].to_vec(),
            index: self.index.as_ref().map(|index| vec![index[i]]),
            dropout: self.dropout.map(|dropout| dropout.with_first_token(i as u32)),
            n: self.n,
            k: self.k,
            dense: self.dense.clone(),
            nf4: self.nf4.clone(),
            bias: self.bias.clone(),
            row_scale: self.row_scale.clone(),
            adapters: self.adapters.clone(),
        }
    }
}

/// A random product: `parts` says which of nf4, nesting, bias, row_scale, index, dropout it has.
fn random_case<T: Element, A: Element>(
    [m, n, k]: [usize; 3],
    ranks: &[usize],
    parts: [bool; 6],
    seed: u64,
) -> Case<T, A> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| random.random_range(-1.0..1.0)).collect() };
    let [nf4, nested, bias, row_scale, index, dropout] = parts;
    let (x, dense) = (to(&values(m * k)), to::<T>(&values(n * k)));
    let nesting = if nested { Nesting::Nested } else { Nesting::Plain };
    let blocksize = BLOCKSIZES[seed as usize % 8];
    let nf4 = nf4.then(|| Nf4Matrix::quantize(&dense, [n, k], blocksize, &Codebook::nf4(), nesting).unwrap());
    let bias = bias.then(|| to(&values(n)));
    let row_scale = row_scale.then(|| values(n));
    let adapters = ranks.iter().map(|&r| (to(&values(r * k)), to(&values(n * r)), r, values(1)[0])).collect();
    let count = ranks.len() as i32;
    let index = index.then(|| (0..m).map(|_| random.random_range(-1..count)).collect());
    let dropout = dropout.then(|| Dropout::new([0.1, 0.5, 0.0][seed as usize % 3], seed, seed ^ 5).unwrap());
    Case { m, n, k, x, dense, nf4, bias, row_scale, adapters, index, dropout }
}

/// Few tokens and many, and rows that begin where a block, a byte, or half a byte does.
fn shapes(least: usize) -> impl Strategy<Value = [usize; 3]> {
    let m = prop_oneof![least..10, least..70];
    let k = prop_oneof![0usize..1200, (0usize..38).prop_map(|groups| 32 * groups)];
    (m, least..70, k).prop_map(|(m, n, k)| [m, n, k])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn within_the_bound(
        shape in shapes(0),
        ranks in prop::collection::vec(0usize..40, 0..5),
        parts: [bool; 6],
        seed: u64,
    ) {
        random_case::<f32, f32>(shape, &ranks, parts, seed).check()?;
        random_case::<bf16, f32>(shape, &ranks, parts, seed).check()?;
        random_case::<f16, f16>(shape, &ranks, parts, seed).check()?;
    }

    #[test]
    fn a_token_has_the_same_bits_in_every_batch(
        shape in shapes(1),
        ranks in prop::collection::vec(0usize..40, 0..5),
        parts: [bool; 6],
        seed: u64,
    ) {
        let case = random_case::<f32, f32>(shape, &ranks, parts, seed);
        let together = case.fast();
        for (i, together) in together.chunks_exact(case.n).enumerate() {
            let alone = case.alone(i).fast();
            prop_assert_eq!(bits(together), bits(&alone), "token {}", i);
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// More tokens than one pass over the weight takes.
#[test]
fn many_tokens() {
    let case = random_case::<f32, f32>([1100, 33, 70], &[3, 8], [true; 6], 1);
    case.check().unwrap();
    let together = case.fast();
    for i in [0, 127, 128, 1024, 1099] {
        assert_eq!(bits(&together[i * 33..(i + 1) * 33]), bits(&case.alone(i).fast()), "token {i}");
    }
}

/// A value that is not finite stays with its token, its output or its adapter's tokens.
#[test]
fn infinities_do_not_spread() {
    let mut case =
        random_case::<f32, f32>([20, 40, 64], &[4, 4], [false, false, false, false, true, false], 3);
    case.index = Some((0..20).map(|i| i % 3 - 1).collect());
    case.x[5 * 64] = f32::INFINITY; // token 5, of adapter 1
    case.dense[7 * 64 + 1] = f32::NAN; // output 7
    case.adapters[0].0[3] = f32::INFINITY; // tokens 1, 4, 7, ...
    for (i, y) in case.fast().iter().enumerate() {
        let (token, output) = (i / 40, i % 40);
        let finite = token != 5 && output != 7 && token % 3 != 1;
        assert_eq!(y.is_finite(), finite, "token {token}, output {output}");
    }
}

/// `truth` against f64 products that torch made over bitsandbytes' dequantised weights.
#[test]
fn checkpoints() {
    let mut layers = 0;
    for name in ["bare", "hf_dq_bf16", "hf_dq_bf16_storage_bf16", "hf_nodq_f16"] {
        let file = Fixture::open(&format!("nf4_checkpoint/{name}.io"));
        let path = if name == "bare" { "bare.safetensors" } else { name };
        let checkpoint = bitsandbytes::load(fixtures::path(&format!("nf4_checkpoint/{path}"))).unwrap();
        for json in file.cases() {
            let module = text(json, "name");
            let nf4 = &checkpoint.nf4[&format!("{module}.weight")];
            let bias = checkpoint.dense.get(&format!("{module}.bias")).map(|b| b.to_f32());
            let x = file.tensor(&format!("{module}.x")).to_f32();
            checkpoint_layer::<f32>(&file, json, nf4, &x, bias.as_deref(), "y_f64");
            checkpoint_layer::<bf16>(&file, json, nf4, &x, bias.as_deref(), "y_bf16_truth_f64");
            layers += 1;
        }
    }
    assert_eq!(layers, 26);
}

fn checkpoint_layer<T: Element>(
    file: &Fixture,
    json: &serde_json::Value,
    nf4: &Nf4Matrix,
    x: &[f32],
    bias: Option<&[f32]>,
    wanted: &str,
) {
    let (m, n, k) = (size(json, "T"), size(json, "N"), size(json, "K"));
    let case = Case::<T, T> {
        m,
        n,
        k,
        x: to(x),
        dense: Vec::new(),
        nf4: Some(nf4.clone()),
        bias: bias.map(to),
        row_scale: None,
        adapters: Vec::new(),
        index: None,
        dropout: None,
    };
    let wanted = file.get::<f64>(&format!("{}.{wanted}", text(json, "name")));
    for (truth, wanted) in case.truth().iter().zip(&wanted) {
        // Two sums of K + 1 f64 terms, in different orders.
        let bound = 2.0 * (k + 1) as f64 * (f64::EPSILON / 2.0) * truth.magnitude;
        assert!((truth.value - wanted).abs() <= bound, "{truth:?} {wanted}");
    }
    case.check().unwrap();
}

/// `truth` with an adapter per token, of mixed ranks, against f64 and PEFT.
#[test]
fn mixed_batches() {
    for name in ["mix", "single_token", "unsorted_big"] {
        let file = Fixture::open(&format!("multi_adapter/{name}"));
        for pattern in file.json["patterns"].as_array().unwrap() {
            let pattern = pattern.as_str().unwrap();
            // The file scales in f64, and `LowRank` in f32: one rounding apart.
            mixed_batch::<f32>(&file, pattern, false, &file.get(&format!("{pattern}.y_f64")), F32);
            let stored = file.get::<f32>(&format!("{pattern}.y_bf16_truth"));
            let stored: Vec<f64> = stored.into_iter().map(f64::from).collect();
            mixed_batch::<bf16>(&file, pattern, false, &stored, 2.0 * F32);
        }
        if file.has("random.nf4.y_f64") {
            mixed_batch::<f32>(&file, "random", true, &file.get("random.nf4.y_f64"), F32);
        }
    }
}

fn mixed_batch<T: Element>(file: &Fixture, pattern: &str, nf4: bool, wanted: &[f64], share: f64) {
    let weight = file.tensor("weight");
    let &[n, k] = weight.shape() else { panic!("a matrix") };
    let values = |name: &str| to::<T>(&file.tensor(name).to_f32());
    let adapters = file.json["adapters"].as_array().unwrap().iter().map(|json| {
        let id = size(json, "id");
        let scaling = json["scaling"].as_f64().unwrap() as f32;
        (values(&format!("ad{id}.lora_A")), values(&format!("ad{id}.lora_B")), size(json, "r"), scaling)
    });
    let nf4 = nf4.then(|| {
        let absmax = Absmax::Plain(file.get("nf4.absmax"));
        Nf4Matrix::from_parts([n, k], file.get("nf4.packed"), absmax, 64, Codebook::nf4(), DType::F32)
            .unwrap()
    });
    let index = file.get::<i32>(&format!("{pattern}.adapter_idx"));
    let case = Case::<T, T> {
        m: index.len(),
        n,
        k,
        x: values("x"),
        dense: values("weight"),
        nf4,
        bias: None,
        row_scale: None,
        adapters: adapters.collect(),
        index: Some(index),
        dropout: None,
    };
    for (truth, wanted) in case.truth().iter().zip(wanted) {
        // `share` for roundings to f32; f64 sums of K and of a rank's terms are below a millionth of that.
        let bound = share * 1.000001 * truth.magnitude;
        assert!((truth.value - wanted).abs() <= bound, "{pattern} {truth:?} {wanted}");
    }
    case.check().unwrap();
}

/// Every argument that does not fit is named, and `y` stays as it was.
#[test]
fn bad_arguments() {
    type Product = Case<f32, f32>;
    let refuse = |argument: &str, spoil: &dyn Fn(&mut Product)| {
        let mut case = random_case([3, 5, 64], &[2, 4], [false, false, true, true, true, true], 5);
        spoil(&mut case);
        let y_len = if argument == "y" { 14 } else { 15 };
        let mut y = vec![7.0f32; y_len];
        let fast = case.with(|x, m, weight, extras| cpu::fast::matmul(x, m, weight, extras, &mut y));
        let reference =
            case.with(|x, m, weight, extras| cpu::matmul(x, m, weight, extras, Accumulate::F32, &mut y));
        for result in [fast, reference] {
            let Err(Error::Argument { argument: got, .. }) = result else { panic!("{argument}: {result:?}") };
            assert_eq!(got, argument);
        }
        assert_eq!(y, vec![7.0; y_len], "{argument}");
    };
    refuse("x", &|case| case.x.truncate(191));
    refuse("x", &|case| case.m = usize::MAX);
    refuse("weight", &|case| case.dense.push(0.0));
    refuse("weight", &|case| (case.n, case.k) = (usize::MAX, usize::MAX));
    refuse("weight.shape", &|case| {
        case.nf4 =
            Some(Nf4Matrix::quantize(&case.dense, [320], 64, &Codebook::nf4(), Nesting::Plain).unwrap());
    });
    refuse("bias", &|case| case.bias = Some(vec![0.0; 4]));
    refuse("row_scale", &|case| case.row_scale = Some(vec![0.0; 6]));
    refuse("adapters[1].lora_a", &|case| case.adapters[1].0.truncate(255));
    refuse("adapters[0].lora_b", &|case| case.adapters[0].1.push(0.0));
    refuse("adapters[1].lora_a", &|case| case.adapters[1].2 = usize::MAX);
    refuse("adapter_index", &|case| case.index = Some(vec![0; 4]));
    refuse("adapter_index[2]", &|case| case.index = Some(vec![0, 1, 2]));
    refuse("adapter_index[0]", &|case| case.index = Some(vec![-2, 0, 1]));
    refuse("adapter_index[1]", &|case| {
        case.adapters.clear();
        case.index = Some(vec![-1, 0, -1]);
    });
    refuse("y", &|_| {});
}

/// Sizes of zero, beside sizes that could not exist.
#[test]
fn nothing_to_do() {
    let none = MatmulExtras::<f32>::default();
    let weight = Weight::Dense { data: &[], n: 0, k: 0 };
    for m in [0, 1, usize::MAX] {
        cpu::fast::matmul(&[], m, &weight, &none, &mut []).unwrap();
        cpu::matmul(&[], m, &weight, &none, Accumulate::F32, &mut []).unwrap();
        assert!(cpu::truth(&[], m, &weight, &none).unwrap().is_empty());
    }
    let no_inputs = Weight::Dense { data: &[], n: 2, k: 0 };
    let bias = MatmulExtras { bias: Some(&[1.0f32, 2.0][..]), ..MatmulExtras::<f32>::default() };
    let mut y = [0.0; 4];
    cpu::fast::matmul(&[], 2, &no_inputs, &bias, &mut y).unwrap();
    assert_eq!(y, [1.0, 2.0, 1.0, 2.0]);
}
