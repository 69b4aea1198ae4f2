//! Every kind of adapter against what PEFT computes: delta, forward, merge, unmerge.
//!
//! Two sorts of bounds. Ours: against f64 truth, from the roundings that the documentation promises. PEFT's: what its own
//! f32 or bf16 arithmetic can have lost, so that a wrong formula cannot hide behind a reference that is not exact.

mod fixtures;
mod low_rank;

use fixtures::{Fixture, path, text};
use lora_kernels::adapter::{Adapter, Stack};
use lora_kernels::formats::peft;
use lora_kernels::{DType, Tensor};
use low_rank::{F32, F64, Linear, assert_close};
use serde_json::Value;

const FOLDERS: [&str; 12] = [
    "gpt2/dora_fifo",
    "gpt2/lora_fifo",
    "llama/adalora_masked",
    "llama/adalora_pruned",
    "llama/dora_r8",
    "llama/embed_and_head",
    "llama/lora_r8a16",
    "llama/patterns",
    "llama/rslora_r16",
    "llama_bias/bias_lora_only",
    "llama_bias/dora_bias",
    "llama_bias/lora_bias",
];

/// One module of one adapter folder, with PEFT's results.
struct Case<'a> {
    name: String,
    adapter: &'a Adapter,
    json: &'a Value,
    io: &'a Fixture,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Case<'_> {
    fn key(&self, part: &str) -> String {
        format!("{}.{part}", text(self.json, "module"))
    }

    fn has(&self, part: &str) -> bool {
        self.io.has(&self.key(part))
    }

    fn tensor(&self, part: &str) -> Tensor {
        self.io.tensor(&self.key(part))
    }

    fn f64(&self, part: &str) -> Vec<f64> {
        self.tensor(part).to_f64()
    }

    /// The effective scale, from PEFT's own numbers.
    fn scaling(&self) -> f64 {
        let scaling = self.json["scaling"].as_f64().expect("scaling");
        self.json["ranknum"].as_f64().map_or(scaling, |ranknum| scaling / (ranknum + 1e-5))
    }

    fn stack(&self) -> Stack {
        Stack::new(&[self.adapter], &self.weight).expect("a stack")
    }

    fn truth(&self) -> Linear {
        self.truth_of(self.adapter, &self.weight)
    }

    fn truth_of(&self, adapter: &Adapter, weight: &Tensor) -> Linear {
        let mut linear = Linear::new(adapter, self.scaling(), &weight.to_f64());
        if let Some(bias) = &self.bias {
            linear.bias = bias.to_f64();
        }
        linear
    }

    /// Values per element of the stored weight.
    fn stored<R>(&self, f: impl Fn(usize, usize) -> R) -> Vec<R> {
        let [rows, columns] = self.adapter.weight_shape();
        let pairs = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
        pairs.map(|(i, j)| if self.adapter.fan_in_fan_out() { f(j, i) } else { f(i, j) }).collect()
    }
}

/// Runs `check` on every module that PEFT's results are stored for; `embedding` says of which sort.
fn each_module(embedding: bool, check: impl Fn(&Case)) {
    let mut count = 0;
    for folder in FOLDERS {
        let file = peft::load(path("peft").join(folder)).expect(folder);
        let io = Fixture::open(&format!("peft/{folder}/io"));
        let base = Fixture::open(&format!("peft/{}/base/model", folder.split('/').next().unwrap()));
        for json in io.json["modules"].as_array().expect("modules") {
            let module = text(json, "module");
            let adapter = &file.adapters[module];
            if matches!(adapter, Adapter::Embedding(_)) != embedding {
                continue;
            }
            let bias = format!("{module}.bias");
            let trained = file.base_tensors.get(&bias).cloned();
            let case = Case {
                name: format!("{folder} {module}"),
                adapter,
                json,
                io: &io,
                weight: base.tensor(&format!("{module}.weight")),
                bias: trained.or_else(|| base.has(&bias).then(|| base.tensor(&bias))),
            };
            check(&case);
            count += 1;
        }
    }
    assert_eq!(count, if embedding { 1 } else { 30 });
}

/// The scale from the configuration is that which PEFT reports for the module.
#[test]
fn scaling_is_pefts() {
    each_module(false, |case| {
        let (got, wanted) = (case.adapter.scaling(), case.scaling());
        assert!((got - wanted).abs() <= 2.0 * F64 * wanted, "{}: {got} for {wanted}", case.name);
        assert_eq!(case.adapter.rank(), case.json["r"].as_u64().unwrap() as usize, "{}", case.name);
    });
}

#[test]
fn delta_is_pefts() {
    each_module(false, |case| {
        let truth = case.truth();
        let delta = case.stored(|n, k| truth.delta(n, k));
        // `rank` products and sums, E, the scale.
        let ours = (truth.rank + 4) as f64 * F64;
        let name = format!("{} delta", case.name);
        assert_close(
            &name,
            &case.adapter.delta().unwrap(),
            delta.iter().map(|d| (d.value, ours * d.magnitude)),
        );
        // In f32; AdaLoRA also rounds A * E, init_r + 1e-5 and two quotients.
        let theirs = (truth.rank + 6) as f64 * F32;
        assert_close(&name, &case.f64("delta"), delta.iter().map(|d| (d.value, theirs * d.magnitude)));
    });
}

/// In f64 our forward pass, PEFT's, and the formula agree to f64's precision; PEFT's f32 one to f32's.
#[test]
fn forward_is_pefts() {
    each_module(false, |case| {
        let (truth, x) = (case.truth(), case.tensor("x"));
        let y = case.stack().forward(&x, &case.weight, case.bias.as_ref()).unwrap();
        let outputs: Vec<_> = x.to_f64().chunks(truth.k).flat_map(|x| truth.forward(x)).collect();
        // Sums over K and over the rank, the norm's sum, and a few single roundings.
        let roundings = (2 * truth.k + truth.rank + 8) as f64;
        let bound = |sum: &low_rank::Sum| (sum.value, roundings * F64 * sum.magnitude);
        assert_close(&format!("{} y", case.name), &y, outputs.iter().map(bound));
        let theirs = case.io.get::<f64>(&case.key("y_adapted_f64"));
        assert_close(&format!("{} y_adapted_f64", case.name), &theirs, outputs.iter().map(bound));
        let f32_bound = |(i, sum): (usize, &low_rank::Sum)| {
            let (scale, relative) = truth.row_scale(i % truth.n);
            // DoRA: base + (g - 1) * (base - bias) + g * lora, whose terms exceed their sum.
            let spread = if truth.magnitude.is_some() { 2.0 + 2.0 / scale.abs() } else { 1.0 };
            (sum.value, (roundings * F32 * spread + relative * spread) * sum.magnitude)
        };
        assert_close(
            &format!("{} y_adapted", case.name),
            &case.f64("y_adapted"),
            outputs.iter().enumerate().map(f32_bound),
        );
    });
}

/// The roundings of a merge in f32 sums, before the last one: weight and factors narrowed and scaled, the sum over ranks.
fn merge_roundings(truth: &Linear) -> f64 {
    (truth.rank + 5) as f64 * F32
}

#[test]
fn merge_is_pefts() {
    each_module(false, |case| {
        let truth = case.truth();
        let merged = case.stored(|n, k| (truth.merged(n, k), truth.row_scale(n).1));
        let ours = case.stack().merge(&case.weight, DType::F32).unwrap();
        assert_eq!(ours.shape(), case.weight.shape());
        let c = merge_roundings(&truth);
        assert_close(
            &format!("{} merged", case.name),
            &ours.to_f64(),
            merged.iter().map(|(w, _)| (w.value, c * w.magnitude)),
        );
        let theirs = merged.iter().map(|(w, relative)| (w.value, (c + 2.0 * F32 + relative) * w.magnitude));
        assert_close(&format!("{} PEFT's merged", case.name), &case.f64("merged"), theirs);

        let restored = case.stack().unmerge(&ours, DType::F32).unwrap().to_f64();
        let theirs = case.f64("unmerged");
        let weights = case.stored(|n, k| {
            let (scale, relative) = truth.row_scale(n);
            let error = (2.0 * c + 2.0 * relative) * truth.merged(n, k).magnitude / scale.abs();
            (truth.weight[n * truth.k + k], error)
        });
        assert_close(&format!("{} unmerged", case.name), &restored, weights.iter().copied());
        assert_close(&format!("{} PEFT's unmerged", case.name), &theirs, weights);
    });
}
