//! `pissa` and `loftq`: a 4-bit base and an adapter that are nearer to the model together; `reduce`: smaller ranks.

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::{Set, data, run};
use lora_kernels::DType;
use lora_kernels::adapter::{Adapter, Difference, Initial, Quantisation, Rank};
use lora_kernels::formats::bitsandbytes::{self, Reader};
use lora_kernels::formats::peft::{self, Method};
use lora_kernels::nf4::{Codebook, Nesting};
use serde_json::Value;

const LLAMA: &str = "peft/llama/base";

fn reference(inside: &str) -> String {
    data().join(inside).to_str().unwrap().to_owned()
}

fn path(set: &Set, inside: &str) -> String {
    set.path(inside).to_str().unwrap().to_owned()
}

/// Runs a command that has to succeed, and gives what it says of itself.
fn done(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    serde_json::from_str(&output.stdout).unwrap()
}

/// Runs a command that has to fail with these words; nothing appears in the folder.
fn refused(set: &Set, arguments: &[&str], wanted: &str) {
    let list = || {
        let mut names: Vec<_> = fs::read_dir(set.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = list();
    let output = run(arguments);
    assert_ne!(output.code, Some(0), "{}", output.stdout);
    assert!(output.stderr.contains(wanted), "{wanted}\n{}", output.stderr);
    assert_eq!(list(), before);
}

/// Base and factors are those of the library, weight by weight; what is not quantised stays; the figures are the truth.
#[test]
fn base_and_adapter_are_nearer_together() {
    let set = Set::empty("initial");
    let dense = Reader::open(reference(LLAMA)).unwrap();
    let quantisation = Quantisation { blocksize: 64, codebook: Codebook::nf4(), nesting: Nesting::Nested };
    for (command, options) in [("pissa", &[][..]), ("loftq", &["--iterations", "2"])] {
        let out = path(&set, command);
        let said = done(
            &[&[command, &reference(LLAMA), "--out", &out, "--rank", "40", "--double-quant"], options]
                .concat(),
        );
        let base = bitsandbytes::load(&out).unwrap();
        let file = peft::load(set.path(&format!("{command}/{command}_init"))).unwrap();
        file.match_base(dense.parameters().iter().map(|(name, p)| (name.as_str(), p.shape()))).unwrap();
        let layers = said["layers"].as_array().unwrap();
        assert_eq!((base.nf4.len(), file.adapters.len(), layers.len()), (14, 14, 14));
        assert_eq!((file.config.rank, file.config.other["task_type"].as_str()), (40, Some("CAUSAL_LM")));
        let (mut plain, mut rest) = (0.0, 0.0);
        for layer in layers {
            let module = layer["module"].as_str().unwrap();
            let name = format!("{module}.weight");
            let weight = dense.dense(&name).unwrap();
            // Two of its weights have a side of 32.
            let rank = weight.shape().iter().fold(40, |rank, side| rank.min(*side));
            let wanted = match command {
                "pissa" => Initial::pissa(&weight, rank, DType::F32, &quantisation),
                _ => Initial::loftq(&weight, rank, 2, DType::F32, &quantisation),
            }
            .unwrap();
            let adapter = &file.adapters[module];
            assert_eq!((&base.nf4[&name], adapter), (&wanted.base, &Adapter::from(wanted.lora)), "{module}");
            assert_eq!((layer["rank"].as_u64(), adapter.scaling()), (Some(rank as u64), 1.0), "{module}");
            let error = Difference::between(&base.nf4[&name], &weight).unwrap().rest(adapter).unwrap();
            let told = |key: &str| layer[key].as_f64().unwrap();
            assert!((told("error") - error).abs() <= 1e-12 * error, "{module}");
            assert!((told("plain_error") - wanted.plain_error).abs() <= 1e-12 * error, "{module}");
            assert!(error < wanted.plain_error, "{module}: {error} of {}", wanted.plain_error);
            (plain, rest) = (plain + wanted.plain_error.powi(2), rest + error * error);
        }
        for (key, wanted) in [("plain_error", plain.sqrt()), ("error", rest.sqrt())] {
            assert!((said[key].as_f64().unwrap() - wanted).abs() <= 1e-12 * wanted, "{key}");
        }
        for (name, tensor) in &base.dense {
            assert_eq!(*tensor, dense.dense(name).unwrap(), "{name}");
        }
    }
}

#[test]
fn what_cannot_begin_is_named() {
    let set = Set::of("initial-wrong", &[LLAMA]);
    let (base, out, four) = (path(&set, LLAMA), path(&set, "out"), path(&set, "four"));
    let adapter = reference("peft/llama/lora_r8a16");
    done(&["quantize", &base, "--out", &four]);
    for command in ["pissa", "loftq"] {
        refused(&set, &[command, &base, "--out", &out, "--rank", "0"], "--rank: wanted 1 or more, got 0");
        refused(&set, &[command, &base, "--out", &out], "--rank <RANK>");
        refused(
            &set,
            &[command, &four, "--out", &out, "--rank", "4"],
            "wanted a dense model, got model.layers.0.",
        );
        refused(&set, &[command, &adapter, "--out", &out, "--rank", "4"], "got neither");
        refused(&set, &[command, &base, "--out", &four, "--rank", "4"], "is there already");
        refused(&set, &[command, &base, "--out", &base, "--force", "--rank", "4"], "apart from the input");
        refused(&set, &[command, &base, "--out", &out, "--rank", "4", "--blocksize", "65"], "--blocksize");
        refused(&set, &[command, &base, "--out", &out, "--rank", "4", "--skip", "nope"], "--skip nope");
    }
    refused(
        &set,
        &["loftq", &base, "--out", &out, "--rank", "4", "--iterations", "0"],
        "--iterations: wanted 1",
    );
    set.edit_tensor("peft/llama/base/model.safetensors", "model.layers.1.mlp.up_proj.weight", |bytes| {
        bytes[400..404].copy_from_slice(&f32::NAN.to_le_bytes())
    });
    for command in ["pissa", "loftq"] {
        refused(&set, &[command, &base, "--out", &out, "--rank", "4", "--only", "up_proj"], "finite");
    }
}

/// The adapters of the reference data, of every kind.
const ADAPTERS: [&str; 8] = [
    "llama/lora_r8a16",
    "llama/rslora_r16",
    "llama/patterns",
    "llama/dora_r8",
    "llama/adalora_pruned",
    "llama/embed_and_head",
    "llama_bias/lora_bias",
    "gpt2/dora_fifo",
];

/// Each module's update is the nearest of its rank, or the same where it had no more; all else stays.
#[test]
fn reduced_adapters_are_the_nearest() {
    let (set, mut pruned) = (Set::empty("reduce"), 0);
    for (i, name) in ADAPTERS.into_iter().enumerate() {
        let (from, before) =
            (reference(&format!("peft/{name}")), peft::load(reference(&format!("peft/{name}"))).unwrap());
        for (rank, option) in [(Rank::Number(3), ["--rank", "3"]), (Rank::Energy(0.9), ["--energy", "0.9"])] {
            let out = format!("{i}{}", option[0]);
            let said = done(&["reduce", &from, "--out", &path(&set, &out), option[0], option[1]]);
            let after = peft::load(set.path(&out)).unwrap();
            assert_eq!(
                after.adapters.keys().collect::<Vec<_>>(),
                before.adapters.keys().collect::<Vec<_>>(),
                "{name}"
            );
            assert_eq!(after.base_tensors, before.base_tensors, "{name}");
            assert!(matches!(after.config.method, Method::Lora), "{name}");
            let layers: BTreeMap<&str, &Value> = said["layers"]
                .as_array()
                .unwrap()
                .iter()
                .map(|layer| (layer["module"].as_str().unwrap(), layer))
                .collect();
            for (module, old) in &before.adapters {
                let new = &after.adapters[module];
                if old.decompose(rank).unwrap().rank() == 0 {
                    // All its ranks were pruned; a file has one at least.
                    assert_eq!(
                        (new.rank(), layers[module.as_str()]["rank"].as_u64()),
                        (1, Some(1)),
                        "{name}: {module}"
                    );
                    assert!(new.delta().unwrap().iter().all(|d| *d == 0.0), "{name}: {module}");
                    pruned += 1;
                    continue;
                }
                let wanted = old.reduced(rank, old.lora_a().dtype()).unwrap();
                assert_eq!(new, &wanted, "{name}: {module}");
                assert!(new.rank() <= old.rank() && new.scaling() == 1.0, "{name}: {module}");
                let best = old.decompose(rank).unwrap();
                let (told, relative) = (
                    layers[module.as_str()]["relative_error"].as_f64().unwrap(),
                    best.frobenius_error() / best.norm(),
                );
                assert!((told - relative).abs() <= 1e-12, "{name}: {module}");
                assert_eq!(layers[module.as_str()]["rank"].as_u64(), Some(new.rank() as u64));
            }
        }
    }
    assert!(pruned > 0);
}

#[test]
fn what_cannot_be_reduced_is_named() {
    let set = Set::of("reduce-wrong", &["peft/llama/lora_r8a16"]);
    let (from, out) = (path(&set, "peft/llama/lora_r8a16"), path(&set, "out"));
    for (options, wanted) in [
        (&["--rank", "0"][..], "--rank: wanted 1 or more, got 0"),
        (&["--energy", "1.5"], "--energy: wanted a share from 0 to 1, got 1.5"),
        (&["--energy", "nan"], "--energy: wanted a share from 0 to 1, got NaN"),
        (&[], "--rank <RANK>|--energy <SHARE>"),
        (&["--rank", "2", "--energy", "0.5"], "cannot be used with"),
    ] {
        refused(&set, &[&["reduce", &from, "--out", &out], options].concat(), wanted);
    }
    refused(
        &set,
        &["reduce", &path(&set, "nope"), "--out", &out, "--rank", "2"],
        "nope: wanted an adapter's folder",
    );
    refused(&set, &["reduce", &reference(LLAMA), "--out", &out, "--rank", "2"], "adapter_config.json");
    refused(&set, &["reduce", &from, "--out", &from, "--force", "--rank", "2"], "apart from the input");
    // 16 bits have no room for factors of this size.
    set.edit_tensor(
        "peft/llama/lora_r8a16/adapter_model.safetensors",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        |bytes| bytes[..4].copy_from_slice(&1e30f32.to_le_bytes()),
    );
    refused(
        &set,
        &["reduce", &from, "--out", &out, "--rank", "2", "--dtype", "f16"],
        "model.layers.0.mlp.up_proj",
    );
}
