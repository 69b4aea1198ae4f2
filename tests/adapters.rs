//! Every kind of adapter against what PEFT computes: delta, forward, merge, unmerge.
//!
//! Two sorts of bounds. Ours: against f64 truth, from the roundings that the documentation promises. PEFT's: what its own
//! f32 or bf16 arithmetic can have lost, so that a wrong formula cannot hide behind a reference that is not exact.

mod fixtures;
mod low_rank;

use std::cell::Cell;

use fixtures::{Fixture, path, text};
use lora_kernels::adapter::{AdaLora, Adapter, Dora, EmbeddingLora, Lora, Requantize, Scaling, Stack};
use lora_kernels::formats::peft;
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Error, Tensor};
use low_rank::{BF16, F32, F64, Linear, assert_close};
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
        let ours = case.stack().merge(&case.weight, DType::F32).unwrap().weight;
        assert_eq!(ours.shape(), case.weight.shape());
        let c = merge_roundings(&truth);
        assert_close(
            &format!("{} merged", case.name),
            &ours.to_f64(),
            merged.iter().map(|(w, _)| (w.value, c * w.magnitude)),
        );
        let theirs = merged.iter().map(|(w, relative)| (w.value, (c + 2.0 * F32 + relative) * w.magnitude));
        assert_close(&format!("{} PEFT's merged", case.name), &case.f64("merged"), theirs);

        let restored = case.stack().unmerge(&ours, DType::F32).unwrap().weight.to_f64();
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

fn rounded(tensor: &Tensor, dtype: DType) -> Tensor {
    Tensor::from_f32(tensor.shape(), &tensor.to_f32(), dtype).unwrap()
}

/// The adapter with its parameters rounded.
fn rounded_adapter(adapter: &Adapter, dtype: DType) -> Adapter {
    let lora_of = |lora: &Lora| {
        let rounded_lora =
            Lora::new(rounded(lora.lora_a(), dtype), rounded(lora.lora_b(), dtype), lora.scaling());
        let rounded_lora = rounded_lora.unwrap().with_fan_in_fan_out(lora.fan_in_fan_out());
        match lora.lora_bias() {
            Some(bias) => rounded_lora.with_lora_bias(rounded(bias, dtype)).unwrap(),
            None => rounded_lora,
        }
    };
    match adapter {
        Adapter::Lora(lora) => lora_of(lora).into(),
        Adapter::Dora(dora) => {
            Dora::new(lora_of(dora.lora()), rounded(dora.magnitude(), dtype)).unwrap().into()
        }
        Adapter::AdaLora(ada) => {
            let [a, e, b] = [ada.lora_a(), ada.lora_e(), ada.lora_b()].map(|factor| rounded(factor, dtype));
            AdaLora::new(a, e, b, ada.alpha(), ada.init_r()).unwrap().into()
        }
        Adapter::Embedding(_) => panic!("PEFT's results for embeddings are in f32"),
    }
}

/// A bf16 base under an f32 adapter, and all in bf16: we sum in f32 and round once; what PEFT rounds besides is in its bound.
#[test]
fn merge_in_bf16_is_pefts() {
    let cases = Cell::new(0);
    each_module(false, |case| {
        let weight = rounded(&case.weight, DType::BF16);
        for (part, adapter) in [
            ("bf16", Some(case.adapter.clone())),
            ("bf16all", case.has("bf16all.merged").then(|| rounded_adapter(case.adapter, DType::BF16))),
        ] {
            let Some(adapter) = adapter.filter(|_| case.has(&format!("{part}.merged"))) else { continue };
            let truth = case.truth_of(&adapter, &weight);
            let stack = Stack::new(&[&adapter], &weight).unwrap();
            let f32_error =
                |n, k| (merge_roundings(&truth) + truth.row_scale(n).1) * truth.merged(n, k).magnitude;
            let merged = case.stored(|n, k| {
                let w = truth.merged(n, k).value;
                (w, BF16 * w.abs() + f32_error(n, k))
            });
            let ours = stack.merge(&weight, DType::BF16).unwrap().weight;
            assert_close(&format!("{} {part}", case.name), &ours.to_f64(), merged.iter().copied());

            // With an adapter in bf16, PEFT also rounds the delta; of DoRA the sum, the norm and the factor; of AdaLoRA
            // A * E, the product, its scaled value, and init_r.
            let more = |n, k| match (part, &adapter) {
                ("bf16all", Adapter::Lora(_)) => BF16 * truth.delta(n, k).magnitude,
                ("bf16all", Adapter::Dora(_)) => 5.0 * BF16 * truth.merged(n, k).magnitude,
                ("bf16all", _) => 5.0 * BF16 * truth.delta(n, k).magnitude,
                _ => 0.0,
            };
            let theirs = case.tensor(&format!("{part}.merged"));
            let extra = case.stored(more);
            let bound = merged.iter().zip(extra).map(|((w, tolerance), extra)| (*w, tolerance + extra));
            assert_close(&format!("{} PEFT's {part}", case.name), &theirs.to_f64(), bound);

            if part == "bf16" {
                // PEFT rounds the delta here too, and gives back other bits than it was given. So do we, by less.
                let theirs_stored = theirs.to_f64();
                let ours = stack.unmerge(&theirs, DType::BF16).unwrap().weight;
                let place =
                    |n, k| if case.adapter.fan_in_fan_out() { k * truth.n + n } else { n * truth.k + k };
                let unmerged = case.stored(|n, k| {
                    let w = theirs_stored[place(n, k)] / truth.row_scale(n).0 - truth.delta(n, k).value;
                    (w, BF16 * w.abs() + 2.0 * f32_error(n, k) / truth.row_scale(n).0.abs())
                });
                assert_close(
                    &format!("{} bf16 unmerged", case.name),
                    &ours.to_f64(),
                    unmerged.iter().copied(),
                );
                let delta = case
                    .stored(|n, k| 3.0 * BF16 * truth.merged(n, k).magnitude / truth.row_scale(n).0.abs());
                let bound = unmerged.iter().zip(delta).map(|((w, tolerance), delta)| (*w, tolerance + delta));
                assert_close(
                    &format!("{} PEFT's bf16 unmerged", case.name),
                    &case.f64("bf16.unmerged"),
                    bound,
                );
            }
            cases.set(cases.get() + 1);
        }
    });
    assert_eq!(cases.get(), 22);
}

/// x and base in bf16, the adapter in f32. Ours is exact but for f64; PEFT rounds the base's output, then their sum.
#[test]
fn forward_in_bf16_is_pefts() {
    let cases = Cell::new(0);
    each_module(false, |case| {
        if !case.has("bf16.y_adapted") {
            return;
        }
        let (weight, x) = (rounded(&case.weight, DType::BF16), rounded(&case.tensor("x"), DType::BF16));
        let bias = case.bias.as_ref().map(|bias| rounded(bias, DType::BF16));
        let mut truth = case.truth_of(case.adapter, &weight);
        truth.bias = bias.as_ref().map_or(vec![0.0; truth.n], Tensor::to_f64);
        let stack = Stack::new(&[case.adapter], &weight).unwrap();
        let y = stack.forward(&x, &weight, bias.as_ref()).unwrap();
        let sums: Vec<_> = x.to_f64().chunks(truth.k).flat_map(|x| truth.forward(x)).collect();
        let roundings = (2 * truth.k + truth.rank + 8) as f64;
        let name = format!("{} y in bf16", case.name);
        assert_close(&name, &y, sums.iter().map(|sum| (sum.value, roundings * F64 * sum.magnitude)));

        let base: Vec<f64> = x.to_f64().chunks(truth.k).flat_map(|x| base_output(&truth, x)).collect();
        let bound = sums.iter().zip(base).enumerate().map(|(i, (sum, base))| {
            let (scale, relative) = truth.row_scale(i % truth.n);
            let spread = if truth.magnitude.is_some() { 2.0 + 2.0 / scale.abs() } else { 1.0 };
            // DoRA takes the bias off again, and scales what was rounded.
            let bias = truth.bias[i % truth.n];
            let rounded =
                base.abs() + (scale - 1.0).abs() * (base.abs() + (base - bias).abs()) + sum.value.abs();
            (sum.value, BF16 * (1.0 + BF16) * rounded + (roundings * F32 + relative) * spread * sum.magnitude)
        });
        assert_close(&format!("{} PEFT's y in bf16", case.name), &case.f64("bf16.y_adapted"), bound);
        cases.set(cases.get() + 1);
    });
    assert_eq!(cases.get(), 11);
}

/// `x Wᵀ + bias`.
fn base_output(linear: &Linear, x: &[f64]) -> Vec<f64> {
    let rows = linear.weight.chunks(linear.k).zip(&linear.bias);
    rows.map(|(w, bias)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias).collect()
}

/// The merged weight and bias give the same outputs as weight and adapter, within what the merge rounds.
#[test]
fn merged_and_unmerged_agree() {
    each_module(false, |case| {
        let truth = case.truth();
        for (dtype, unit) in
            [(DType::F32, F32), (DType::BF16, BF16), (DType::F16, DType::F16.unit_roundoff())]
        {
            let stack = case.stack();
            let merged = stack.merge(&case.weight, dtype).unwrap().weight;
            let merged_bias = stack.merge_bias(case.bias.as_ref(), DType::F32).unwrap();
            let no_adapter =
                lora(&[0.0; 0], &[0.0; 0], [truth.n, 0, truth.k], 1.0, case.adapter.fan_in_fan_out());
            let plain = Stack::new(&[&no_adapter], &merged).unwrap();
            let x = case.tensor("x");
            let got = plain.forward(&x, &merged, merged_bias.as_ref()).unwrap();
            let wanted = stack.forward(&x, &case.weight, case.bias.as_ref()).unwrap();
            let bounds = x.to_f64().chunks(truth.k).flat_map(|x| truth.forward(x)).collect::<Vec<_>>();
            // f16 has no relative bound below its normal numbers: half of its smallest step there.
            let tiny = if dtype == DType::F16 { 2.0f64.powi(-25) } else { 0.0 };
            let tiny = x
                .to_f64()
                .chunks(truth.k)
                .map(|x| tiny * x.iter().map(|x| x.abs()).sum::<f64>())
                .collect::<Vec<_>>();
            let bound = wanted.iter().zip(bounds).enumerate().map(|(i, (y, sum))| {
                (*y, (unit + merge_roundings(&truth)) * sum.magnitude + tiny[i / truth.n])
            });
            assert_close(&format!("{} {dtype}", case.name), &got, bound);
        }
    });
}

/// A LoRA of f32 factors on a weight of shape `[n, k]`.
fn lora(a: &[f32], b: &[f32], [n, rank, k]: [usize; 3], scaling: f64, fan_in_fan_out: bool) -> Adapter {
    let tensor = |shape: [usize; 2], values: &[f32]| Tensor::from_f32(shape, values, DType::F32).unwrap();
    let lora = Lora::new(tensor([rank, k], a), tensor([n, rank], b), scaling).unwrap();
    lora.with_fan_in_fan_out(fan_in_fan_out).into()
}

#[test]
fn bias_of_lora_b_is_merged_scaled() {
    let cases = Cell::new(0);
    each_module(false, |case| {
        let (stack, truth) = (case.stack(), case.truth());
        let merged = stack.merge_bias(case.bias.as_ref(), DType::F32).unwrap();
        if !case.has("merged_bias") {
            assert_eq!(merged, case.bias, "{}", case.name);
            return;
        }
        let merged = merged.unwrap();
        let bound = |c: f64| {
            let sums = truth.bias.iter().zip(&truth.lora_bias);
            sums.map(move |(bias, b)| {
                (bias + truth.scaling * b, c * F32 * (bias.abs() + (truth.scaling * b).abs()))
            })
        };
        assert_close(&case.name, &merged.to_f64(), bound(2.0).collect::<Vec<_>>());
        assert_close(&case.name, &case.f64("merged_bias"), bound(3.0).collect::<Vec<_>>());
        let restored = stack.unmerge_bias(Some(&merged), DType::F32).unwrap().unwrap();
        let error = bound(4.0).map(|(_, error)| error);
        assert_close(
            &case.name,
            &restored.to_f64(),
            truth.bias.iter().copied().zip(error).collect::<Vec<_>>(),
        );
        cases.set(cases.get() + 1);
    });
    assert_eq!(cases.get(), 2);
}

#[test]
fn embeddings_are_pefts() {
    each_module(true, |case| {
        let truth = case.truth();
        let (stack, roundings) = (case.stack(), (truth.rank + 3) as f64);
        let delta = case.stored(|n, k| truth.delta(n, k));
        let merged = case.stored(|n, k| truth.merged(n, k));
        let bound = |sums: &[low_rank::Sum], unit: f64| {
            sums.iter().map(|sum| (sum.value, roundings * unit * sum.magnitude)).collect::<Vec<_>>()
        };
        assert_close("delta", &case.adapter.delta().unwrap(), bound(&delta, F64));
        assert_close("PEFT's delta", &case.f64("delta"), bound(&delta, F32));
        let ours = stack.merge(&case.weight, DType::F32).unwrap().weight;
        assert_close("merged", &ours.to_f64(), bound(&merged, F32));
        assert_close("PEFT's merged", &case.f64("merged"), bound(&merged, F32));

        let ids: Vec<usize> = case.io.get::<i64>(&case.key("x")).into_iter().map(|id| id as usize).collect();
        let rows: Vec<_> =
            ids.iter().flat_map(|id| merged[id * truth.n..(id + 1) * truth.n].to_vec()).collect();
        assert_close("y", &stack.lookup(&ids, &case.weight).unwrap(), bound(&rows, F64));
        assert_close("PEFT's y", &case.f64("y_adapted"), bound(&rows, F32));
        let beyond = stack.lookup(&[0, truth.k], &case.weight).unwrap_err();
        assert!(matches!(&beyond, Error::Argument { argument, .. } if argument == "ids[1]"), "{beyond}");
    });
}

/// Several adapters on one weight. DoRA's norm is over the weight without the others, and scales what came before it.
#[test]
fn several_adapters_are_pefts() {
    let file = Fixture::open("peft/multi_merge");
    let scaling = |name: &str| file.json["scaling"][name].as_f64().unwrap();
    let lora = |name: &str, scaling: f64| {
        Lora::new(file.tensor(&format!("{name}.lora_A")), file.tensor(&format!("{name}.lora_B")), scaling)
            .unwrap()
    };
    // alpha and rank, as the file's text says.
    let adapters = [
        ("a1", Adapter::from(lora("a1", Scaling::Lora.factor(16.0, 8)))),
        ("a2", lora("a2", Scaling::RsLora.factor(5.0, 3)).into()),
        (
            "a3",
            Dora::new(lora("a3", Scaling::Lora.factor(8.0, 4)), file.tensor("a3.magnitude")).unwrap().into(),
        ),
    ];
    let find = |name: &str| &adapters.iter().find(|(n, _)| *n == name).unwrap().1;
    let (weight, x) = (file.tensor("base_weight"), file.tensor("x"));
    for (name, adapter) in &adapters {
        assert_eq!(adapter.scaling(), scaling(name));
    }
    for names in ["a1", "a1+a2", "a1+a3", "a2+a1", "a3+a1"] {
        let stack: Vec<&Adapter> = names.split('+').map(find).collect();
        let n = weight.shape()[0];
        // W' in f64, one adapter after the other; and the magnitudes of its terms.
        let mut merged: Vec<low_rank::Sum> =
            weight.to_f64().into_iter().map(|w| low_rank::Sum { value: w, magnitude: w.abs() }).collect();
        let (mut relative, mut spread, mut rank) = (0.0f64, 1.0f64, 0);
        for adapter in &stack {
            let linear = Linear::new(adapter, adapter.scaling(), &weight.to_f64());
            rank += linear.rank;
            for (i, w) in merged.iter_mut().enumerate() {
                let delta = linear.delta(i / n, i % n);
                w.value += delta.value;
                w.magnitude += delta.magnitude;
            }
            for (row, w) in merged.chunks_mut(n).enumerate() {
                let (scale, error) = linear.row_scale(row);
                relative = relative.max(error);
                // Of DoRA's terms, as in `forward_is_pefts`.
                spread = spread.max(if linear.magnitude.is_some() { 2.0 + 2.0 / scale.abs() } else { 1.0 });
                w.iter_mut().for_each(|w| *w = w.scaled(scale));
            }
        }
        let made = Stack::new(&stack, &weight).unwrap();
        let ours = made.merge(&weight, DType::F32).unwrap().weight;
        let bound = |c: f64| merged.iter().map(move |w| (w.value, c * w.magnitude)).collect::<Vec<_>>();
        let c = (rank + 5) as f64 * F32;
        assert_close(names, &ours.to_f64(), bound(c));
        assert_close(
            &format!("PEFT's {names}"),
            &file.tensor(&format!("merged.{names}")).to_f64(),
            bound(c + 4.0 * F32 + relative),
        );

        let y = made.forward(&x, &weight, None).unwrap();
        let x = x.to_f64();
        let outputs: Vec<low_rank::Sum> = (0..x.len() / n * n)
            .map(|i| {
                let mut sum = low_rank::Sum::default();
                for (x, w) in x[i / n * n..].iter().zip(&merged[i % n * n..][..n]) {
                    sum.value += x * w.value;
                    sum.magnitude += x.abs() * w.magnitude;
                }
                sum
            })
            .collect();
        let roundings = (3 * n + rank + 8) as f64;
        let bound = |c: f64| outputs.iter().map(move |y| (y.value, c * y.magnitude)).collect::<Vec<_>>();
        assert_close(&format!("{names} y"), &y, bound(roundings * F64));
        let theirs = bound(spread * (roundings * F32 + relative));
        assert_close(&format!("{names} PEFT's y"), &file.tensor(&format!("y.{names}")).to_f64(), theirs);
    }
}

/// A module whose ranks have all been pruned adds nothing, and its scale does not matter.
#[test]
fn a_rank_of_zero_adds_nothing() {
    let file = peft::load(path("peft/llama/adalora_pruned")).unwrap();
    let adapter = &file.adapters["model.layers.1.self_attn.q_proj"];
    assert_eq!(adapter.rank(), 0);
    let weight = Fixture::open("peft/llama/base/model").tensor("model.layers.1.self_attn.q_proj.weight");
    assert!(adapter.delta().unwrap().iter().all(|&d| d == 0.0));
    let stack = Stack::new(&[adapter], &weight).unwrap();
    assert_eq!(stack.merge(&weight, DType::F32).unwrap().weight, weight);
    assert_eq!(stack.unmerge(&weight, DType::F32).unwrap().weight, weight);
    let plain = Linear::new(adapter, 0.0, &weight.to_f64());
    let x: Vec<f32> = (0..64).map(|i| (i as f32 - 31.5) / 16.0).collect();
    let x = Tensor::from_f32([64], &x, DType::F32).unwrap();
    let y = stack.forward(&x, &weight, None).unwrap();
    let bound = plain.forward(&x.to_f64()).into_iter().map(|sum| (sum.value, 64.0 * F64 * sum.magnitude));
    assert_close("rank 0", &y, bound);
    assert_eq!(Scaling::Lora.factor(16.0, 0), 0.0);
    assert_eq!(Scaling::RsLora.factor(16.0, 0), 0.0);
}

/// alpha of 0, and a scaling of 0, add nothing either; the outputs keep their bits.
#[test]
fn a_scaling_of_zero_adds_nothing() {
    let weight = Tensor::from_f32([3, 2], &[1.5, -2.0, 0.25, 3.0, -0.5, 0.125], DType::BF16).unwrap();
    let x = Tensor::from_f32([2, 2], &[0.3, -0.7, 1.1, 5.0], DType::F32).unwrap();
    let of = |scaling| lora(&[0.1, 0.2], &[1.0, 2.0, 3.0], [3, 1, 2], scaling, false);
    let none = lora(&[], &[], [3, 0, 2], 1.0, false);
    let stack = |adapter: &Adapter| Stack::new(&[adapter], &weight).unwrap();
    assert_eq!(stack(&of(0.0)).merge(&weight, DType::BF16).unwrap().weight, weight);
    let forward = |adapter: &Adapter| stack(adapter).forward(&x, &weight, None).unwrap();
    assert_eq!(forward(&of(0.0)), forward(&none));
    assert_ne!(forward(&of(1.0)), forward(&none));
}

/// A token's bits are the same alone, and anywhere in a batch.
#[test]
fn tokens_do_not_touch_each_other() {
    each_module(false, |case| {
        let (stack, x) = (case.stack(), case.tensor("x"));
        let (n, k) = (case.adapter.out_features(), case.adapter.in_features());
        let y = stack.forward(&x, &case.weight, case.bias.as_ref()).unwrap();
        for (x, y) in x.to_f32().chunks(k).zip(y.chunks(n)) {
            let alone = Tensor::from_f32([1, 1, k], x, DType::F32).unwrap();
            let alone = stack.forward(&alone, &case.weight, case.bias.as_ref()).unwrap();
            assert_eq!(
                bytemuck::cast_slice::<_, u8>(&alone),
                bytemuck::cast_slice::<_, u8>(y),
                "{}",
                case.name
            );
        }
    });
}

fn argument<R>(result: Result<R, Error>) -> String {
    match result {
        Err(Error::Argument { argument, .. }) => argument,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn misfits_are_refused() {
    let zeros =
        |shape: &[usize]| Tensor::from_f32(shape, &vec![0.0; shape.iter().product()], DType::F32).unwrap();
    let ones =
        |shape: &[usize]| Tensor::from_f32(shape, &vec![1.0; shape.iter().product()], DType::F32).unwrap();
    let (a, b) = (ones(&[2, 4]), ones(&[3, 2]));
    let good = || Lora::new(a.clone(), b.clone(), 1.0).unwrap();

    assert_eq!(argument(Lora::new(ones(&[8]), b.clone(), 1.0)), "lora_a");
    assert_eq!(argument(Lora::new(a.clone(), ones(&[3, 1]), 1.0)), "lora_b");
    assert_eq!(argument(Lora::new(a.clone(), ones(&[3, 2, 1]), 1.0)), "lora_b");
    for scaling in [f64::NAN, f64::INFINITY] {
        assert_eq!(argument(Lora::new(a.clone(), b.clone(), scaling)), "scaling");
        assert_eq!(argument(EmbeddingLora::new(a.clone(), b.clone(), scaling)), "scaling");
        assert_eq!(argument(AdaLora::new(a.clone(), ones(&[2, 1]), b.clone(), scaling, 4)), "alpha");
    }
    assert_eq!(argument(good().with_lora_bias(ones(&[4]))), "lora_bias");
    assert_eq!(argument(Dora::new(good(), ones(&[4]))), "magnitude");
    assert_eq!(argument(Dora::new(good().with_lora_bias(ones(&[3])).unwrap(), ones(&[3]))), "lora.lora_bias");
    assert_eq!(argument(AdaLora::new(a.clone(), ones(&[2]), b.clone(), 1.0, 4)), "lora_e");
    assert_eq!(argument(EmbeddingLora::new(a.clone(), ones(&[2, 3]), 1.0)), "lora_b");

    let (adapter, weight): (Adapter, _) = (good().into(), ones(&[3, 4]));
    let turned: Adapter = good().with_fan_in_fan_out(true).into();
    assert_eq!(argument(Stack::new(&[], &weight)), "adapters");
    assert_eq!(argument(Stack::new(&[&adapter], &ones(&[4, 3]))), "base of adapters[0]");
    assert_eq!(argument(Stack::new(&[&turned], &weight)), "base of adapters[0]");
    assert_eq!(argument(Stack::new(&[&adapter], &ones(&[12]))), "base of adapters[0]");
    let other = Adapter::from(Lora::new(ones(&[1, 5]), ones(&[3, 1]), 1.0).unwrap());
    assert_eq!(argument(Stack::new(&[&adapter, &other], &weight)), "base of adapters[1]");
    assert_eq!(argument(Stack::new(&[&adapter, &turned], &weight)), "adapters[1].fan_in_fan_out");
    let nf4 = Nf4Matrix::quantize_tensor(&ones(&[4, 3]), 64, &Codebook::nf4(), Nesting::Plain).unwrap();
    assert_eq!(argument(Stack::new(&[&turned], &nf4)), "adapters[0].fan_in_fan_out");

    let stack = Stack::new(&[&adapter], &weight).unwrap();
    assert_eq!(argument(stack.forward(&ones(&[2, 3]), &weight, None)), "x");
    assert_eq!(
        argument(stack.forward(&Tensor::from_f32([], &[1.0], DType::F32).unwrap(), &weight, None)),
        "x"
    );
    assert_eq!(argument(stack.forward(&ones(&[2, 4]), &ones(&[4, 3]), None)), "base");
    assert_eq!(argument(stack.forward(&ones(&[2, 4]), &weight, Some(&ones(&[4])))), "bias");
    assert_eq!(argument(stack.merge(&ones(&[4, 3]), DType::F32)), "weight");
    assert_eq!(argument(stack.unmerge(&ones(&[4, 3]), DType::F32)), "merged");
    assert_eq!(argument(stack.merge(&nf4, Requantize::default())), "weight");
    assert_eq!(argument(stack.unmerge(&nf4, Requantize::default())), "merged");
    assert_eq!(argument(stack.merge_bias(Some(&ones(&[4])), DType::F32)), "bias");
    assert_eq!(argument(stack.unmerge_bias(Some(&ones(&[4])), DType::F32)), "merged");
    assert_eq!(argument(stack.lookup(&[0], &weight)), "adapters.fan_in_fan_out");

    // A magnitude of 0 silences an output for good.
    let silent = Dora::new(good(), zeros(&[3])).unwrap().into();
    let stack = Stack::new(&[&silent], &weight).unwrap();
    let merged = stack.merge(&weight, DType::F32).unwrap().weight;
    assert!(merged.to_f32().iter().all(|&w| w == 0.0));
    assert_eq!(argument(stack.unmerge(&merged, DType::F32)), "merged[0, 0], adapted");

    // Without elements, and with more outputs than fit in memory.
    let empty = Adapter::from(Lora::new(zeros(&[0, 0]), zeros(&[3, 0]), 1.0).unwrap());
    let stack = Stack::new(&[&empty], &zeros(&[3, 0])).unwrap();
    assert_eq!(stack.forward(&zeros(&[2, 0]), &zeros(&[3, 0]), Some(&ones(&[3]))).unwrap(), [1.0; 6]);
    assert_eq!(stack.merge(&zeros(&[3, 0]), DType::F16).unwrap().weight.shape(), [3, 0]);
    let huge = Adapter::from(Lora::new(zeros(&[0, 1 << 59]), zeros(&[1 << 59, 0]), 1.0).unwrap());
    assert_eq!(argument(huge.delta()), "delta");
    let wide = Adapter::from(Lora::new(zeros(&[0, 0]), zeros(&[1 << 59, 0]), 1.0).unwrap());
    let stack = Stack::new(&[&wide], &zeros(&[1 << 59, 0])).unwrap();
    assert_eq!(argument(stack.forward(&zeros(&[1 << 59, 0]), &zeros(&[1 << 59, 0]), None)), "y");
}

/// A weight that is adapted in parts is the weight that is adapted as a whole.
#[test]
fn rows_are_adapted_as_the_whole_is() {
    let check = |case: &Case| {
        let (rows, norms_span_rows) = (
            case.weight.shape()[0],
            matches!(case.adapter, Adapter::Dora(_)) && case.adapter.fan_in_fan_out(),
        );
        let whole = Stack::new(&[case.adapter], &case.weight).unwrap();
        let merged = whole.merge(&case.weight, DType::F32).unwrap().weight;
        for part in [0..rows, 0..1, 1..rows / 2, rows / 2..rows, rows..rows] {
            if norms_span_rows && part.len() < rows {
                assert_eq!(argument(case.adapter.rows(part)), "rows");
                continue;
            }
            let adapter = case.adapter.rows(part.clone()).unwrap();
            let weight = case.weight.rows(part.clone()).unwrap();
            let stack = Stack::new(&[&adapter], &weight).unwrap();
            assert_eq!(
                stack.merge(&weight, DType::F32).unwrap().weight,
                merged.rows(part.clone()).unwrap(),
                "{}",
                case.name
            );
            let bias = (!adapter.fan_in_fan_out())
                .then(|| case.bias.as_ref().map(|bias| bias.rows(part.clone()).unwrap()))
                .flatten();
            if let (Some(bias), Some(all)) = (bias, whole.merge_bias(case.bias.as_ref(), DType::F32).unwrap())
            {
                assert_eq!(stack.merge_bias(Some(&bias), DType::F32).unwrap(), Some(all.rows(part).unwrap()));
            }
        }
        assert_eq!(argument(case.adapter.rows(0..rows + 1)), "rows");
        assert_eq!(
            argument(case.adapter.rows(
                #[expect(clippy::reversed_empty_ranges)]
                {
                    2..1
                }
            )),
            "rows"
        );
    };
    each_module(false, check);
    each_module(true, check);
}
