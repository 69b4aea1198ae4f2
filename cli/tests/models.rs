//! Commands that rewrite whole models: what they write is what the library computes of whole tensors, bit for bit.

mod common;
mod synthetic;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::{Output, Set, data, run};
use lora_kernels::adapter::{Adapter, Requantize, Rounding, Scale, Stack};
use lora_kernels::formats::bitsandbytes::{self, Checkpoint, SaveOptions, Storage};
use lora_kernels::formats::peft;
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Tensor};
use serde_json::Value;
use synthetic::{adapter, model};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn done(output: &Output) {
    assert_eq!(output.code, Some(0), "{}{}", output.stdout, output.stderr);
    assert_eq!(output.stderr, "", "it is quiet when it is not on a terminal");
}

/// Runs a command from one folder of a set to another.
fn rewrite(set: &Set, command: &[&str], from: &str, options: &[&str], to: &str) -> Checkpoint {
    let (from, to) = (set.path(from), set.path(to));
    done(&run(&[&command[..1], &[text(&from)], &command[1..], &["--out", text(&to)], options].concat()));
    bitsandbytes::load(to).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn quantize_writes_what_the_library_quantises() {
    let set = Set::of("quantize", &["peft/llama/base"]);
    let dense = bitsandbytes::load(set.path("peft/llama/base")).unwrap();
    for (i, (options, blocksize, codebook, nesting, storage)) in [
        (&[][..], 64, Codebook::nf4(), Nesting::Plain, Storage::U8),
        (&["--double-quant"], 64, Codebook::nf4(), Nesting::Nested, Storage::U8),
        (
            &["--quant-type", "fp4", "--blocksize", "4096", "--double-quant", "--storage", "bfloat16"],
            4096,
            Codebook::fp4(),
            Nesting::Nested,
            Storage::BF16,
        ),
        (
            &["--quant-type", "fp4", "--blocksize", "32", "--storage", "float32"],
            32,
            Codebook::fp4(),
            Nesting::Plain,
            Storage::F32,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let quantised = rewrite(&set, &["quantize"], "peft/llama/base", options, &format!("q{i}"));
        assert_eq!(quantised.storage, storage);
        let (linear, rest): (BTreeMap<_, _>, BTreeMap<_, _>) =
            dense.dense.clone().into_iter().partition(|(name, _)| name.ends_with("_proj.weight"));
        assert_eq!(quantised.dense, rest);
        assert_eq!(linear.len(), 14);
        for (name, weight) in linear {
            let wanted = Nf4Matrix::quantize_tensor(&weight, blocksize, &codebook, nesting).unwrap();
            assert_eq!(quantised.nf4[&name], wanted, "{name} {options:?}");
        }
        // The file of a whole checkpoint has the same tensors and the same configuration.
        quantised.save(set.path(&format!("whole{i}")), &SaveOptions::default()).unwrap();
        let config = |folder: &str| fs::read_to_string(set.path(folder).join("config.json")).unwrap();
        assert_eq!(config(&format!("q{i}")), config(&format!("whole{i}")));
        assert_eq!(bitsandbytes::load(set.path(&format!("whole{i}"))).unwrap(), quantised);
    }
}

#[test]
fn modules_are_skipped_and_chosen() {
    let set = Set::of("skip", &["peft/llama/base"]);
    let skips = |to: &str| {
        let config: Value =
            serde_json::from_slice(&fs::read(set.path(to).join("config.json")).unwrap()).unwrap();
        config["quantization_config"]["llm_int8_skip_modules"].clone()
    };
    let some = rewrite(
        &set,
        &["quantize"],
        "peft/llama/base",
        &["--skip", "model.layers.0", "--skip", "down_proj"],
        "some",
    );
    assert_eq!(some.nf4.len(), 6);
    assert!(some.nf4.keys().all(|name| name.starts_with("model.layers.1.") && !name.contains("down")));
    let list = skips("some");
    assert_eq!(list.as_array().unwrap().len(), 9, "{list}");
    for kept in ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"] {
        assert!(list.as_array().unwrap().contains(&kept.into()), "{list}");
    }
    let head = rewrite(
        &set,
        &["quantize"],
        "peft/llama/base",
        &["--only", "lm_head", "--compute-dtype", "bf16"],
        "head",
    );
    assert_eq!(head.nf4.keys().collect::<Vec<_>>(), ["lm_head.weight"]);
    assert_eq!(head.config.unwrap()["quantization_config"]["bnb_4bit_compute_dtype"], "bfloat16");
}

/// A weight of more than a slab, whose rows do not end with blocks.
#[test]
fn slabs_make_no_difference() {
    let set = Set::empty("slabs");
    let dense = model(&set, "dense", [2900, 1508], DType::BF16);
    let weight = "model.layers.0.mlp.up_proj.weight";
    for (options, nesting) in [(&[][..], Nesting::Plain), (&["--double-quant"], Nesting::Nested)] {
        let quantised = rewrite(&set, &["quantize"], "dense", options, "four");
        let wanted = Nf4Matrix::quantize_tensor(&dense.dense[weight], 64, &Codebook::nf4(), nesting).unwrap();
        assert_eq!(quantised.nf4[weight], wanted);
        let decoded = rewrite(&set, &["dequantize"], "four", &[], "decoded");
        assert_eq!(decoded.dense[weight], wanted.dequantize_tensor());
        let lora = adapter(&set, "lora", [2900, 1508], false);
        let merged =
            rewrite(&set, &["merge", text(&set.path("lora"))], "four", &["--dtype", "f16"], "merged");
        let stack = Stack::new(&[&lora], &wanted).unwrap();
        assert_eq!(merged.dense[weight], stack.merge(&wanted, DType::F16).unwrap().weight);
        for folder in ["four", "decoded", "merged"] {
            fs::remove_dir_all(set.path(folder)).unwrap();
        }
    }
    for dora in [false, true] {
        let adapter = adapter(&set, "adapter", [2900, 1508], dora);
        let merged = rewrite(&set, &["merge", text(&set.path("adapter"))], "dense", &["--force"], "merged");
        let stack = Stack::new(&[&adapter], &dense.dense[weight]).unwrap();
        let wanted = stack.merge(&dense.dense[weight], DType::BF16).unwrap();
        assert!(merged.dense[weight] == wanted.weight, "dora {dora}");
        let untouched = "model.layers.0.mlp.down_proj.weight";
        assert!(merged.dense[untouched] == dense.dense[untouched]);
    }
}

#[test]
fn shards_stay_shards() {
    let set = Set::of("shards", &["peft/llama/base"]);
    let whole = bitsandbytes::load(set.path("peft/llama/base")).unwrap();
    whole
        .save(set.path("in"), &SaveOptions { max_shard_bytes: Some(100_000), ..SaveOptions::default() })
        .unwrap();
    set.edit_json("in/model.safetensors.index.json", |index| {
        index["metadata"]["total_parameters"] = 74304.into()
    });
    fs::write(set.path("in/tokenizer.json"), "{}").unwrap();
    fs::write(set.path("in/pytorch_model.bin"), "not this").unwrap();
    fs::create_dir(set.path("in/extra")).unwrap();
    fs::write(set.path("in/extra/template.jinja"), "{{ x }}").unwrap();
    let output = run(&["quantize", text(&set.path("in")), "--out", text(&set.path("out")), "--json"]);
    done(&output);
    let said: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(said["left_out"], serde_json::json!(["pytorch_model.bin"]));
    assert_eq!(said["quantized"].as_array().unwrap().len(), 14);
    let mut wanted = names(&set.path("in"));
    wanted.retain(|name| name != "pytorch_model.bin");
    assert_eq!(names(&set.path("out")), wanted);
    assert_eq!(fs::read(set.path("out/extra/template.jinja")).unwrap(), b"{{ x }}");
    let index: Value =
        serde_json::from_slice(&fs::read(set.path("out/model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_parameters"], 74304);
    let four = bitsandbytes::load(set.path("out")).unwrap();
    assert_eq!(four.nf4.len(), 14);
    let bytes = said["bytes_written"].as_u64().unwrap();
    let on_disk: u64 = wanted
        .iter()
        .filter(|name| name.ends_with("rs"))
        .map(|name| fs::metadata(set.path("out").join(name)).unwrap().len())
        .sum();
    assert_eq!(bytes, on_disk);
    assert!(index["metadata"]["total_size"].as_u64().unwrap() < on_disk);
}

/// Every adapter of the reference data, into dense weights.
#[test]
fn merge_writes_what_the_library_merges() {
    let set = Set::of("merge", &["peft"]);
    let mut folders = Vec::new();
    for family in ["llama", "llama_bias", "gpt2"] {
        let of_family = names(&set.path("peft").join(family)).into_iter();
        let adapters =
            of_family.filter(|name| set.path("peft").join(family).join(name).join(peft::CONFIG).exists());
        folders.extend(adapters.map(|name| (family, name)));
    }
    assert_eq!(folders.len(), 12);
    for (family, name) in folders {
        let base = bitsandbytes::load(set.path(&format!("peft/{family}/base"))).unwrap();
        let folder = set.path(&format!("peft/{family}/{name}"));
        let file = peft::load(&folder).unwrap();
        let merged =
            rewrite(&set, &["merge", text(&folder)], &format!("peft/{family}/base"), &["--force"], "merged");
        assert_eq!(merged.config, base.config);
        let mut wanted = base.dense.clone();
        wanted.extend(file.base_tensors.clone());
        for (module, adapter) in &file.adapters {
            let (weight, bias) = (format!("{module}.weight"), format!("{module}.bias"));
            let stack = Stack::new(&[adapter], &wanted[&weight]).unwrap();
            let sum = stack.merge(&wanted[&weight], DType::F32).unwrap().weight;
            if let Adapter::Lora(lora) = adapter
                && lora.lora_bias().is_some()
            {
                let sum = stack.merge_bias(wanted.get(&bias), DType::F32).unwrap().unwrap();
                wanted.insert(bias, sum);
            }
            wanted.insert(weight, sum);
        }
        assert_eq!(merged.dense, wanted, "{family}/{name}");
    }
}

#[test]
fn several_adapters_are_merged_in_one_pass() {
    let set = Set::of("several", &["peft/llama"]);
    let base = bitsandbytes::load(set.path("peft/llama/base")).unwrap();
    let [a, b] = ["lora_r8a16", "patterns"].map(|name| set.path("peft/llama").join(name));
    let merged = rewrite(
        &set,
        &["merge", text(&a), text(&b)],
        "peft/llama/base",
        &["--weight", "0.5", "--weight", "-2"],
        "merged",
    );
    let (first, second) = (peft::load(&a).unwrap(), peft::load(&b).unwrap());
    let times = |adapter: &Adapter, factor: f64| {
        let (a, b) = (adapter.lora_a().clone(), adapter.lora_b().clone());
        Adapter::from(lora_kernels::adapter::Lora::new(a, b, factor * adapter.scaling()).unwrap())
    };
    for (module, adapter) in &first.adapters {
        let weight = &base.dense[&format!("{module}.weight")];
        let adapters = [times(adapter, 0.5), times(&second.adapters[module], -2.0)];
        let stack = Stack::new(&[&adapters[0], &adapters[1]], weight).unwrap();
        let wanted = stack.merge(weight, DType::F32).unwrap().weight;
        assert_eq!(merged.dense[&format!("{module}.weight")], wanted, "{module}");
    }
    // And out again: what is in f32 comes back but for an ulp of the merged weight.
    let again = rewrite(
        &set,
        &["unmerge", text(&a), text(&b)],
        "merged",
        &["--weight", "0.5", "--weight", "-2"],
        "again",
    );
    for (name, weight) in &base.dense {
        for ((w, again), merged) in
            weight.to_f32().into_iter().zip(again.dense[name].to_f32()).zip(merged.dense[name].to_f32())
        {
            assert!(
                (w - again).abs() <= f32::EPSILON * merged.abs().max(w.abs()) * 2.0,
                "{name}: {w} {again}"
            );
        }
    }
}

#[test]
fn four_bit_models_stay_so_or_become_dense() {
    let set = Set::of("four-bit", &["peft/llama"]);
    let lora = set.path("peft/llama/lora_r8a16");
    let adapters = peft::load(&lora).unwrap().adapters;
    let four = rewrite(&set, &["quantize"], "peft/llama/base", &["--double-quant"], "four");
    let ways = [
        (&[][..], Requantize::default()),
        (
            &["--scale", "least-error", "--rounding", "keep-gain"],
            Requantize { scale: Scale::LeastError, rounding: Rounding::KeepGain, ..Requantize::default() },
        ),
    ];
    for (options, requantize) in ways {
        let merged =
            rewrite(&set, &["merge", text(&lora)], "four", &[options, &["--force"]].concat(), "merged");
        assert_eq!(merged.dense, four.dense);
        assert_eq!(merged.config, four.config);
        for (module, adapter) in &adapters {
            let weight = &four.nf4[&format!("{module}.weight")];
            let wanted = Stack::new(&[adapter], weight).unwrap().merge(weight, requantize.forced()).unwrap();
            assert_eq!(merged.nf4[&format!("{module}.weight")], wanted.weight, "{module} {options:?}");
        }
    }
    let stochastic = |seed: &str| {
        let options = ["--rounding", "stochastic", "--seed", seed, "--force"];
        rewrite(&set, &["merge", text(&lora)], "four", &options, "merged").nf4
    };
    assert_eq!(stochastic("1"), stochastic("1"));
    assert_ne!(stochastic("1"), stochastic("2"));
    // Dense, with every 4-bit weight decoded, adapted or not.
    let half = set.path("half");
    let mut file = peft::load(&lora).unwrap();
    file.adapters.retain(|module, _| module.contains("layers.0"));
    file.save(&half).unwrap();
    let dense = rewrite(&set, &["merge", text(&half)], "four", &["--dtype", "bf16"], "dense");
    assert!(dense.nf4.is_empty() && !dense.config.as_ref().unwrap().contains_key("quantization_config"));
    assert_eq!(dense.config.unwrap()["dtype"], "bfloat16");
    for (name, weight) in &four.nf4 {
        let wanted =
            match adapters.get(name.strip_suffix(".weight").unwrap()).filter(|_| name.contains("layers.0")) {
                Some(adapter) => {
                    Stack::new(&[adapter], weight).unwrap().merge(weight, DType::BF16).unwrap().weight
                }
                None => Tensor::from_f32(weight.shape(), &weight.dequantize::<f32>(), DType::BF16).unwrap(),
            };
        assert_eq!(dense.dense[name], wanted, "{name}");
    }
}

/// With a record every bit comes back: of dense and 4-bit models, of every kind of adapter, of weights of several slabs.
#[test]
fn a_merge_is_undone_to_the_bit() {
    let set = Set::of("undo", &["peft"]);
    model(&set, "large", [2900, 1508], DType::BF16);
    adapter(&set, "dora", [2900, 1508], true);
    for (family, dtype) in [("llama", DType::F16), ("llama_bias", DType::BF16), ("gpt2", DType::F32)] {
        let mut base = bitsandbytes::load(set.path(&format!("peft/{family}/base"))).unwrap();
        let narrow = |tensor: &mut Tensor| {
            *tensor = Tensor::from_f32(tensor.shape(), &tensor.to_f32(), dtype).unwrap();
        };
        base.dense.values_mut().for_each(narrow);
        let options = SaveOptions { max_shard_bytes: Some(60_000), ..SaveOptions::default() };
        base.save(set.path(family), &options).unwrap();
    }
    rewrite(&set, &["quantize"], "peft/llama/base", &["--double-quant"], "nested");
    rewrite(&set, &["quantize"], "peft/llama/base", &["--quant-type", "fp4", "--blocksize", "32"], "plain");
    let undo = set.path("undo");
    let better = ["--scale", "least-error", "--rounding", "keep-gain"];
    for (base, adapters, options) in [
        ("llama", &["llama/lora_r8a16", "llama/dora_r8", "llama/adalora_pruned"][..], &[][..]),
        ("llama", &["llama/embed_and_head"], &["--dtype", "f32"]),
        ("llama_bias", &["llama_bias/lora_bias"], &["--weight", "-0.3"]),
        ("llama_bias", &["llama_bias/bias_lora_only"], &[]),
        ("gpt2", &["gpt2/dora_fifo"], &[]),
        ("large", &["../dora"], &[]),
        ("nested", &["llama/lora_r8a16"], &[]),
        ("nested", &["llama/lora_r8a16", "llama/rslora_r16"], &better),
        ("plain", &["llama/patterns"], &[]),
    ] {
        let folders: Vec<_> = adapters.iter().map(|name| set.path("peft").join(name)).collect();
        let folders: Vec<&str> = folders.iter().map(|folder| text(folder)).collect();
        let options = [options, &["--force", "--undo", text(&undo)]].concat();
        let merged = rewrite(&set, &[&["merge"], &folders[..]].concat(), base, &options, "merged");
        let original = bitsandbytes::load(set.path(base)).unwrap();
        assert!(merged != original);
        let options: Vec<&str> = options
            .into_iter()
            .filter(|option| !["--dtype", "f32"].contains(option) && !better.contains(option))
            .collect();
        let again = rewrite(&set, &[&["unmerge"], &folders[..]].concat(), "merged", &options, "again");
        assert!(again == original, "{base} {adapters:?}");
        // For another model, or with other adapters, the record is refused.
        if adapters.len() == 2 {
            for (model, folders) in [(base, &folders[..]), ("merged", &folders[..1])] {
                let (model, no) = (set.path(model), set.path("no"));
                let arguments =
                    [&["unmerge", text(&model)], folders, &["--out", text(&no), "--undo", text(&undo)]];
                let output = run(&arguments.concat());
                assert_eq!(output.code, Some(1), "{}", output.stdout);
                assert!(!no.exists() && output.stderr.lines().count() == 1, "{}", output.stderr);
            }
        }
    }
    let [plain, patterns, other, new] =
        ["plain", "peft/llama/patterns", "other", "new"].map(|name| set.path(name));
    for (options, word) in [
        (&["--undo", text(&undo)][..], "is there already"),
        (&["--undo", text(&new), "--dtype", "bf16"], "keep the 4-bit model"),
    ] {
        let output =
            run(&[&["merge", text(&plain), text(&patterns), "--out", text(&other)], options].concat());
        assert_eq!(output.code, Some(1));
        assert!(output.stderr.contains(word) && !other.exists() && !new.exists(), "{}", output.stderr);
    }
}

/// A delta that 4 bits swallow is refused with the figures, unless that is accepted.
#[test]
fn a_lost_adapter_is_refused() {
    let set = Set::of("lost", &["peft/llama"]);
    rewrite(&set, &["quantize"], "peft/llama/base", &[], "four");
    let [four, lora, out] = [set.path("four"), set.path("peft/llama/lora_r8a16"), set.path("out")];
    let merge = |options: &[&str]| {
        run(&[&["merge", text(&four), text(&lora), "--out", text(&out), "--weight", "0.01"], options]
            .concat())
    };
    let output = merge(&[]);
    assert_eq!(output.code, Some(1));
    for word in
        ["retained gain of at least 0.9", "relative error", "--dtype bf16", "keep-gain", "--min-gain 0"]
    {
        assert!(output.stderr.contains(word), "{}", output.stderr);
    }
    assert!(!out.exists());
    done(&merge(&["--min-gain", "0"]));
    done(&merge(&["--force", "--dtype", "bf16"]));
    done(&merge(&["--force", "--rounding", "keep-gain"]));
    // Of a dense model, only when asked for.
    let output = run(&[
        "merge",
        text(&set.path("peft/llama/base")),
        text(&lora),
        "--out",
        text(&out),
        "--force",
        "--min-gain",
        "1.5",
    ]);
    assert_eq!(output.code, Some(1), "{}", output.stdout);
}

#[test]
fn modules_that_the_model_lacks_are_left_out_when_asked() {
    let set = Set::of("missing", &["peft/llama"]);
    let lora = set.path("peft/llama/lora_r8a16");
    let base = bitsandbytes::load(set.path("peft/llama/base")).unwrap();
    let mut smaller = base.clone();
    smaller.dense.retain(|name, _| !name.contains("layers.1.mlp"));
    smaller.save(set.path("smaller"), &SaveOptions::default()).unwrap();
    let arguments = ["merge", text(&set.path("smaller")), text(&lora), "--out", text(&set.path("out"))]
        .map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = run(&arguments);
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("model.layers.1.mlp.up_proj [96, 64] (not there)"), "{}", output.stderr);
    let output = run(&[&arguments[..], &["--allow-missing"]].concat());
    done(&output);
    assert!(output.stdout.contains("model.layers.1.mlp.up_proj"), "{}", output.stdout);
    // A headless checkpoint names the same modules without their first part.
    let mut headless = base.clone();
    headless.dense = base
        .dense
        .into_iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("model.")?.to_owned(), tensor)))
        .collect();
    headless.save(set.path("headless"), &SaveOptions::default()).unwrap();
    let merged = rewrite(&set, &["merge", text(&lora)], "headless", &[], "merged");
    let whole = rewrite(&set, &["merge", text(&lora)], "peft/llama/base", &[], "whole");
    assert!(merged.dense.iter().all(|(name, tensor)| *tensor == whole.dense[&format!("model.{name}")]));
}

#[test]
fn reference_checkpoints_are_dequantised() {
    for folder in ["hf_dq_bf16", "hf_dq_bf16_storage_bf16", "hf_nodq_f16"] {
        let set = Set::of(folder, &[&format!("nf4_checkpoint/{folder}")]);
        let from = format!("nf4_checkpoint/{folder}");
        let four = bitsandbytes::load(data().join(&from)).unwrap();
        let own = rewrite(&set, &["dequantize"], &from, &[], "own");
        assert_eq!(own.dense.len(), four.dense.len() + four.nf4.len());
        assert!(four.nf4.iter().all(|(name, weight)| own.dense[name] == weight.dequantize_tensor()));
        let wide = rewrite(&set, &["dequantize"], &from, &["--dtype", "f32"], "wide");
        let exact = |weight: &Nf4Matrix| {
            Tensor::from_f32(weight.shape(), &weight.dequantize::<f32>(), DType::F32).unwrap()
        };
        assert!(four.nf4.iter().all(|(name, weight)| wide.dense[name] == exact(weight)));
        assert_eq!(wide.config.unwrap()["dtype"], "float32");
    }
}
