//! `extract`: adapters that were merged are found again, and what cannot be captured is named.

mod common;
mod synthetic;

use std::fs;

use common::{Output, Set, data, run};
use lora_kernels::adapter::{Adapter, Decomposition, Difference, Lora, Rank};
use lora_kernels::formats::bitsandbytes::{self, Checkpoint, Reader, SaveOptions};
use lora_kernels::formats::peft::{self, AdapterFile};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Tensor};
use serde_json::{Value, json};
use synthetic::noise;

const LLAMA: &str = "peft/llama/base";

fn path(set: &Set, name: &str) -> String {
    set.path(name).to_str().unwrap().to_owned()
}

fn reference(name: &str) -> String {
    data().join(name).to_str().unwrap().to_owned()
}

/// Runs the command with `--json` and returns what it says.
fn extract(base: &str, tuned: &str, out: &str, options: &[&str]) -> Value {
    let output = run(&[&["extract", base, tuned, "--out", out, "--json"], options].concat());
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    serde_json::from_str(&output.stdout).expect("JSON")
}

fn refused(base: &str, tuned: &str, out: &str, options: &[&str]) -> Output {
    let output = run(&[&["extract", base, tuned, "--out", out], options].concat());
    assert_ne!(output.code, Some(0), "{}", output.stdout);
    output
}

/// Merges an adapter of the reference data into its base, in f32.
fn tuned(set: &Set, model: &str, adapter: &str) -> String {
    let out = path(set, "tuned");
    let [base, adapter] =
        [format!("peft/{model}/base"), format!("peft/{model}/{adapter}")].map(|p| reference(&p));
    let output = run(&["merge", &base, &adapter, "--out", &out]);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    out
}

/// The delta that was merged comes back, but for the rounding of the merge to f32; for a weight stored [in, out] too.
#[test]
fn a_merged_adapter_is_found_again() {
    for (model, adapter) in [("llama", "lora_r8a16"), ("gpt2", "lora_fifo")] {
        let set = Set::empty(&format!("extract-{model}"));
        let (tuned, out) = (tuned(&set, model, adapter), path(&set, "out"));
        let wanted = peft::load(reference(&format!("peft/{model}/{adapter}"))).unwrap().adapters;
        let rank = wanted.values().map(Adapter::rank).max().unwrap();
        extract(&reference(&format!("peft/{model}/base")), &tuned, &out, &["--rank", &rank.to_string()]);
        let made = peft::load(&out).unwrap();
        assert_eq!(made.adapters.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        let base = Reader::open(reference(&format!("peft/{model}/base"))).unwrap();
        for (module, adapter) in &made.adapters {
            assert_eq!(adapter.fan_in_fan_out(), model == "gpt2");
            let weight = base.dense(&format!("{module}.weight")).unwrap().to_f64();
            let (got, wanted) = (adapter.delta().unwrap(), wanted[module].delta().unwrap());
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let off = norm(&mut got.iter().zip(&wanted).map(|(a, b)| a - b));
            let size = norm(&mut weight.iter().zip(&wanted).map(|(w, d)| w.abs() + d.abs()));
            // The merge rounds each sum once, the best approximation of what it gave at most doubles that, and each factor is rounded
            // once more, to within 2 sqrt(rank) units of the delta.
            let unit = DType::F32.unit_roundoff();
            let bound =
                2.0 * unit * size + 2.1 * unit * (rank as f64).sqrt() * norm(&mut wanted.iter().copied());
            assert!(off <= bound, "{module}: {off:e} of {bound:e}");
        }
        made.match_base(base.parameters().iter().map(|(name, p)| (name.as_str(), p.shape()))).unwrap();
    }
}

/// Ranks and figures by energy are those of the library, layer by layer; 16-bit factors cost what is told.
#[test]
fn by_energy() {
    let set = Set::empty("extract-energy");
    let (base, tuned) = (reference(LLAMA), tuned(&set, "llama", "lora_r8a16"));
    for dtype in ["f32", "bf16"] {
        let out = path(&set, dtype);
        let said = extract(&base, &tuned, &out, &["--energy", "0.8", "--dtype", dtype]);
        let made = peft::load(&out).unwrap();
        let [old, new] = [&base, &tuned].map(|folder| Reader::open(folder).unwrap());
        for layer in said["layers"].as_array().unwrap() {
            let module = layer["module"].as_str().unwrap();
            let [old, new] = [&old, &new].map(|reader| reader.dense(&format!("{module}.weight")).unwrap());
            let difference = Difference::between(&old, &new).unwrap();
            let best = difference.extract(Rank::Energy(0.8)).unwrap();
            assert_eq!(layer["rank"], best.rank(), "{module}");
            let adapter = &made.adapters[module];
            assert_eq!((adapter.rank(), adapter.lora_a().dtype().name()), (best.rank(), dtype));
            let relative = difference.rest(adapter).unwrap() / difference.norm();
            assert!((layer["relative_error"].as_f64().unwrap() - relative).abs() <= 1e-12, "{module}");
        }
    }
}

/// The file keeps within its budget, uses it but for less than one rank, and no other ranks of that size keep more.
#[test]
fn by_budget() {
    let set = Set::empty("extract-budget");
    let (base, tuned) = (reference(LLAMA), tuned(&set, "llama", "lora_r8a16"));
    let mut before = 0.0;
    for budget in [9_000, 15_000, 25_000, 1_000_000] {
        let out = path(&set, &budget.to_string());
        let said = extract(&base, &tuned, &out, &["--budget", &budget.to_string(), "--dtype", "f16"]);
        let file = fs::metadata(set.path(&budget.to_string()).join(peft::MODEL)).unwrap().len();
        let energy = said["energy"].as_f64().unwrap();
        assert!(
            file <= budget && energy > before,
            "{file} bytes of {budget}, energy {energy} after {before}"
        );
        before = energy;
        // The whole model has ranks of 16, which take less than the last budget. The header is counted as if all modules had factors.
        let (largest, header) = (2 * (64 + 96), 4000);
        assert!(budget == 1_000_000 || budget - file < largest + header, "{file} bytes of {budget}");
    }
    assert!(before > 0.99999, "{before}");
    for (budget, wanted) in [("100B", "wanted at least"), ("1.5x", "wanted kB, MB"), ("-3", "")] {
        let output = refused(&base, &tuned, &path(&set, "none"), &["--budget", budget]);
        assert!(output.stderr.contains(wanted) && output.stderr.contains("--budget"), "{}", output.stderr);
    }
    assert!(!set.path("none").exists());
}

/// Large weights go by subspace iteration. Of four only one has changed, so that it gets more ranks than were computed at first.
#[test]
fn a_budget_that_one_large_layer_takes() {
    let set = Set::empty("extract-large");
    let mut checkpoint = synthetic::model(&set, "small", [48, 32], DType::BF16);
    let name = |i: usize| format!("model.layers.{i}.mlp.gate_proj.weight");
    for i in 0..4 {
        checkpoint.dense.insert(name(i), noise(70 + i as u32, &[600, 530], DType::F32));
    }
    checkpoint.save(set.path("base"), &SaveOptions::default()).unwrap();
    checkpoint.dense.insert(name(2), noise(80, &[600, 530], DType::F32));
    checkpoint.save(set.path("tuned"), &SaveOptions::default()).unwrap();
    let [base, tuned, out] = ["base", "tuned", "out"].map(|name| path(&set, name));
    // 40 ranks of 1130 f32 and the header of seven modules.
    let budget = (40 * 1130 * 4 + 3000).to_string();
    let said = extract(&base, &tuned, &out, &["--budget", &budget]);
    assert_eq!((&said["layers"].as_array().unwrap().len(), &said["layers"][0]["rank"]), (&1, &json!(40)));
    let [old, new] = [&base, &tuned].map(|folder| Reader::open(folder).unwrap().dense(&name(2)).unwrap());
    // The singular values of noise lie close together, and the iteration may end before the last ones are parted: the error is
    // between the least of rank 40 and that of a slightly smaller one.
    let all =
        Difference::between(&old, &new).unwrap().with_decomposition(Decomposition::Full).extract(40).unwrap();
    let relative = |rank: usize| all.clone().cut(rank).frobenius_error() / all.norm();
    let error = said["relative_error"].as_f64().unwrap();
    assert!((relative(40) - 1e-6..relative(38)).contains(&error), "{error} for {}", relative(40));
    assert!(peft::load(&out).unwrap().adapters.len() == 1);
}

/// What differs and is no linear weight, one that was skipped, and one that is the same.
#[test]
fn what_is_not_captured_is_named_or_saved() {
    let set = Set::empty("extract-others");
    let mut checkpoint = synthetic::model(&set, "base", [48, 32], DType::BF16);
    for (name, seed) in [
        ("model.embed_tokens.weight", 50),
        ("model.layers.0.input_layernorm.weight", 51),
        ("model.layers.0.mlp.up_proj.weight", 52),
        ("lm_head.weight", 53),
    ] {
        let shape = checkpoint.dense[name].shape().to_vec();
        checkpoint.dense.insert(name.to_owned(), noise(seed, &shape, DType::BF16));
    }
    checkpoint.save(set.path("tuned"), &SaveOptions::default()).unwrap();
    let [base, tuned, out, saved] = ["base", "tuned", "out", "saved"].map(|name| path(&set, name));

    let said = extract(&base, &tuned, &out, &["--rank", "4", "--skip", "lm_head"]);
    let lost = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"];
    assert_eq!((&said["not_captured"], &said["unchanged"]), (&json!(lost), &json!(1)));
    let made = peft::load(&out).unwrap();
    assert_eq!(made.adapters.keys().collect::<Vec<_>>(), ["model.layers.0.mlp.up_proj"]);
    assert!(made.base_tensors.is_empty());

    let said = extract(&base, &tuned, &saved, &["--rank", "4", "--only", "up_proj", "--save-others"]);
    assert_eq!((&said["saved"], &said["not_captured"]), (&json!(lost), &json!([])));
    let made = peft::load(&saved).unwrap();
    for name in lost {
        assert_eq!(made.base_tensors[name], checkpoint.dense[name], "{name}");
    }
    assert_eq!(made.config.other["base_model_name_or_path"], json!(base));
    let output = run(&["extract", &base, &tuned, "--out", &path(&set, "text"), "--rank", "4"]);
    assert!(
        output.stdout.contains("differ, and are not captured: model.embed_tokens.weight"),
        "{}",
        output.stdout
    );
}

/// From a base in 4 bits and a sharded, dense model: the adapter makes up for the quantisation too.
#[test]
fn a_base_in_four_bits() {
    let set = Set::empty("extract-nf4");
    let dense = bitsandbytes::load(reference(LLAMA)).unwrap();
    let mut checkpoint = dense.clone();
    let weights: Vec<String> =
        dense.dense.keys().filter(|name| name.ends_with("_proj.weight")).cloned().collect();
    for name in &weights {
        let tensor = checkpoint.dense.remove(name).unwrap();
        let matrix = Nf4Matrix::quantize_tensor(&tensor, 64, &Codebook::nf4(), Nesting::Nested).unwrap();
        checkpoint.nf4.insert(name.clone(), matrix);
    }
    checkpoint.save(set.path("base"), &SaveOptions::default()).unwrap();
    let shards = SaveOptions { max_shard_bytes: Some(60_000), ..SaveOptions::default() };
    dense.save(set.path("tuned"), &shards).unwrap();
    let [base, tuned, out] = ["base", "tuned", "out"].map(|name| path(&set, name));
    let said = extract(&base, &tuned, &out, &["--rank", "64"]);
    // 64 is more than some have.
    let ranks: Vec<u64> =
        said["layers"].as_array().unwrap().iter().map(|l| l["rank"].as_u64().unwrap()).collect();
    assert_eq!((ranks.len(), ranks.iter().max(), ranks.iter().min()), (weights.len(), Some(&64), Some(&32)));
    for (module, adapter) in &peft::load(&out).unwrap().adapters {
        let name = format!("{module}.weight");
        let (matrix, tensor) = (&checkpoint.nf4[&name], &dense.dense[&name]);
        let difference = Difference::between(matrix, tensor).unwrap();
        // Nothing is left but the rounding of the factors to f32.
        let bound = 2.1 * DType::F32.unit_roundoff() * 8.0 * difference.norm();
        assert!(difference.rest(adapter).unwrap() <= bound, "{module}");
    }
}

#[test]
fn what_is_wrong_is_named_and_nothing_is_written() {
    let set = Set::empty("extract-wrong");
    let checkpoint = synthetic::model(&set, "base", [48, 32], DType::BF16);
    let up = "model.layers.0.mlp.up_proj.weight";
    let write = |name: &str, edit: &dyn Fn(&mut Checkpoint)| {
        let mut other = checkpoint.clone();
        edit(&mut other);
        other.save(set.path(name), &SaveOptions::default()).unwrap();
        path(&set, name)
    };
    let changed = |other: &mut Checkpoint| {
        other.dense.insert(up.into(), noise(60, &[48, 32], DType::BF16));
    };
    let tuned = write("tuned", &changed);
    let wide = write("wide", &|other| {
        other.dense.insert(up.into(), noise(60, &[48, 33], DType::BF16));
    });
    let less = write("less", &|other| {
        other.dense.remove(up);
    });
    let more = write("more", &|other| {
        other.dense.insert("model.extra.weight".into(), noise(1, &[2, 2], DType::F32));
    });
    let nan = write("nan", &|other| {
        let mut values = noise(60, &[48, 32], DType::F32).to_f32();
        values[40] = f32::NAN;
        other.dense.insert(up.into(), Tensor::from_f32([48, 32], &values, DType::BF16).unwrap());
    });
    let huge = write("huge", &|other| {
        let tensor = Tensor::from_f32([48, 32], &vec![3e38; 48 * 32], DType::BF16).unwrap();
        other.dense.insert(up.into(), tensor);
    });
    let (base, out) = (path(&set, "base"), path(&set, "out"));
    let rank = ["--rank", "4"];
    for (tuned, options, wanted) in [
        (&base, &rank[..], "wanted linear weights that differ"),
        (&wide, &rank, "model.layers.0.mlp.up_proj.weight: wanted shape [48, 32]"),
        (&less, &rank, "got none called model.layers.0.mlp.up_proj.weight"),
        (&more, &rank, "got none called model.extra.weight"),
        (
            &nan,
            &rank,
            "model.layers.0.mlp.up_proj.weight: tuned - base at [1, 8]: wanted a finite number, got NaN",
        ),
        (
            &huge,
            &["--rank", "4", "--dtype", "f16"],
            "model.layers.0.mlp.up_proj: lora_a: wanted elements that fit in f16",
        ),
        (&tuned, &["--rank", "0"], "--rank: wanted 1 or more, got 0"),
        (&tuned, &["--energy", "1.5"], "--energy: wanted a share from 0 to 1, got 1.5"),
        (&tuned, &["--energy", "nan"], "--energy: wanted a share from 0 to 1, got NaN"),
        (&tuned, &["--rank", "4", "--energy", "0.5"], "cannot be used with"),
        (&tuned, &[], "--rank <RANK>|--energy <SHARE>|--budget <SIZE>"),
        (&tuned, &["--rank", "4", "--skip", "nope"], "--skip nope: wanted a linear module"),
        (&tuned, &["--rank", "4", "--only", "embed_tokens"], "--only embed_tokens: wanted a linear module"),
        (&"nope".to_owned(), &rank, "nope: wanted a model's folder"),
    ] {
        let output = refused(&base, tuned, &out, options);
        assert!(output.stderr.contains(wanted), "{wanted}\n{}", output.stderr);
        let left: Vec<_> = fs::read_dir(set.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(
            !left.iter().any(|name| name == "out" || name.to_string_lossy().starts_with(".out")),
            "{left:?}"
        );
    }
    // A folder that is there stays as it is.
    extract(&base, &tuned, &out, &rank);
    let before = fs::read(set.path("out").join(peft::MODEL)).unwrap();
    let output = refused(&base, &tuned, &out, &["--rank", "2"]);
    assert!(output.stderr.contains("is there already"), "{}", output.stderr);
    assert_eq!(fs::read(set.path("out").join(peft::MODEL)).unwrap(), before);
    extract(&base, &tuned, &out, &["--rank", "2", "--force"]);
    let file: AdapterFile = peft::load(&out).unwrap();
    assert!(
        file.adapters
            .values()
            .all(|adapter| matches!(adapter, Adapter::Lora(lora) if Lora::lora_a(lora).shape()[0] == 2))
    );
}
