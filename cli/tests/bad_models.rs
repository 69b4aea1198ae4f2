//! What the commands that rewrite models do when something is wrong: they say what, the input stays as it is, and nothing appears
//! under the name of the output.
#![cfg(unix)]

mod common;
mod synthetic;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Output, Set, run};
use lora_kernels::DType;
use lora_kernels::formats::bitsandbytes::{self, SaveOptions};
use lora_kernels::formats::peft;
use synthetic::{adapter, model};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// All files below a folder, with their bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(self::files(&path))
        } else {
            drop(files.insert(path.clone(), fs::read(path).unwrap()))
        }
    }
    files
}

/// Runs the command on `in`, which must fail, and say these words on one line; and leave no trace.
fn refused(set: &Set, arguments: &[&str], words: &[&str]) {
    let before = files(&set.path(""));
    let output = run(arguments);
    assert_refused(&output, words);
    assert_eq!(files(&set.path("")), before, "{arguments:?} has changed something");
}

fn assert_refused(output: &Output, words: &[&str]) {
    assert_eq!(output.code, Some(1), "{}{}", output.stdout, output.stderr);
    assert!(output.stderr.starts_with("error: ") && output.stderr.lines().count() == 1, "{}", output.stderr);
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?} in: {}", output.stderr);
    }
}

/// A sharded model, its folder's path, and that of the output.
fn sharded(name: &str) -> (Set, String, String) {
    let set = Set::of(name, &["peft/llama"]);
    let whole = bitsandbytes::load(set.path("peft/llama/base")).unwrap();
    whole
        .save(set.path("in"), &SaveOptions { max_shard_bytes: Some(100_000), ..SaveOptions::default() })
        .unwrap();
    let (from, to) = (set.path("in"), set.path("out"));
    (set, text(&from).to_owned(), text(&to).to_owned())
}

const SHARD: &str = "in/model-00002-of-00003.safetensors";

#[test]
fn shards_that_are_missing_or_cut() {
    let (set, from, to) = sharded("bad-shards");
    assert!(set.path(SHARD).exists());
    let bytes = fs::read(set.path(SHARD)).unwrap();
    fs::remove_file(set.path(SHARD)).unwrap();
    refused(&set, &["quantize", &from, "--out", &to], &["model-00002-of-00003.safetensors", "No such file"]);
    for length in [0, 7, 300, bytes.len() - 1] {
        fs::write(set.path(SHARD), &bytes[..length]).unwrap();
        refused(&set, &["quantize", &from, "--out", &to], &["model-00002-of-00003.safetensors", "wanted"]);
    }
    fs::write(set.path(SHARD), &bytes).unwrap();
    set.edit_json("in/model.safetensors.index.json", |index| {
        index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00002-of-00003.safetensors".into();
    });
    refused(&set, &["quantize", &from, "--out", &to], &["model.layers.9.mlp.up_proj.weight"]);
}

#[test]
fn tensors_that_come_twice() {
    let (set, from, to) = sharded("bad-twice");
    // In two shards.
    let (first, second) = (set.path("in/model-00001-of-00003.safetensors"), set.path(SHARD));
    let bytes = fs::read(&second).unwrap();
    fs::copy(&first, &second).unwrap();
    refused(&set, &["quantize", &from, "--out", &to], &["model-00002-of-00003.safetensors", "wanted"]);
    fs::write(&second, bytes).unwrap();
    // In one header.
    set.rename(
        "in/model-00001-of-00003.safetensors",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    );
    refused(&set, &["quantize", &from, "--out", &to], &["model.layers.0.mlp.down_proj.weight", "twice"]);
}

#[test]
fn folders_that_are_no_models() {
    let set = Set::of("bad-folders", &["peft/llama"]);
    let path = |inside: &str| text(&set.path(inside)).to_owned();
    let (base, lora, out) = (path("peft/llama/base"), path("peft/llama/lora_r8a16"), path("out"));
    refused(&set, &["quantize", &path("nope"), "--out", &out], &["nope: wanted a model's folder, got none"]);
    refused(&set, &["quantize", &format!("{base}/config.json"), "--out", &out], &["got a file"]);
    refused(
        &set,
        &["quantize", &path("peft"), "--out", &out],
        &["model.safetensors.index.json, got neither"],
    );
    refused(&set, &["merge", &base, &path("peft"), "--out", &out], &["adapter_config.json"]);
    refused(&set, &["merge", &base, &base, "--out", &out], &["adapter_config.json"]);
    refused(&set, &["dequantize", &base, "--out", &out], &["wanted a model in 4 bits"]);
    refused(
        &set,
        &["quantize", &base, "--out", &out, "--blocksize", "100"],
        &["--blocksize", "power of two"],
    );
    refused(&set, &["quantize", &base, "--out", &out, "--only", "embed_tokens"], &["embed_tokens"]);
    refused(&set, &["quantize", &base, "--out", &out, "--skip", "nothing"], &["--skip nothing"]);
    refused(
        &set,
        &["merge", &base, &lora, "--out", &out, "--weight", "1", "--weight", "2"],
        &["--weight", "1 adapters"],
    );
    refused(&set, &["merge", &base, &lora, "--out", &out, "--rounding", "keep-gain"], &["4-bit model"]);
    refused(&set, &["merge", &base, &path("peft/llama/dora_r8"), "--out", &out, "--weight", "2"], &["DoRA"]);
    fs::remove_file(set.path("peft/llama/base/config.json")).unwrap();
    refused(&set, &["quantize", &base, "--out", &out], &["config.json"]);
}

#[test]
fn outputs_that_cannot_be() {
    let set = Set::of("bad-outputs", &["peft/llama"]);
    let path = |inside: &str| text(&set.path(inside)).to_owned();
    let (base, lora) = (path("peft/llama/base"), path("peft/llama/lora_r8a16"));
    for out in [base.clone(), path("peft/llama/base/inside"), path("peft/llama"), path("peft")] {
        refused(&set, &["quantize", &base, "--out", &out, "--force"], &["apart from the input"]);
    }
    refused(
        &set,
        &["merge", &base, &lora, "--out", &path("peft/llama/lora_r8a16"), "--force"],
        &["apart from the input"],
    );
    let model = path("peft/llama/base/model.safetensors");
    refused(
        &set,
        &["merge", &base, &lora, "--out", &path("out"), "--undo", &model, "--force"],
        &["--undo", "apart from the input"],
    );
    refused(&set, &["quantize", &base, "--out", &path("nope/out")], &["nope", "No such file"]);
    refused(&set, &["quantize", &base, "--out", "/"], &["wanted the name of a folder"]);
    refused(&set, &["quantize", &base, "--out", "/proc/out"], &["/proc"]);
    // What is there is not replaced unasked, and not if it is no model.
    fs::create_dir(set.path("full")).unwrap();
    fs::write(set.path("full/letter.txt"), "dear").unwrap();
    refused(&set, &["quantize", &base, "--out", &path("full")], &["is there already", "--force"]);
    refused(
        &set,
        &["quantize", &base, "--out", &path("full"), "--force"],
        &["no model's or adapter's folder"],
    );
    // A target that cannot be written; root may write anywhere.
    let locked = set.path("locked");
    fs::create_dir(&locked).unwrap();
    let mode =
        |bits| fs::set_permissions(&locked, std::os::unix::fs::PermissionsExt::from_mode(bits)).unwrap();
    mode(0o555);
    if fs::write(locked.join("probe"), "").is_err() {
        refused(
            &set,
            &["quantize", &base, "--out", text(&locked.join("out"))],
            &["cannot be written", "Permission denied"],
        );
    }
    mode(0o755);
}

#[test]
fn adapters_for_other_models() {
    let set = Set::of("bad-adapters", &["peft"]);
    let path = |inside: &str| text(&set.path(inside)).to_owned();
    let out = path("out");
    let (llama, bias, gpt2) = (path("peft/llama/base"), path("peft/llama_bias/base"), path("peft/gpt2/base"));
    let lora = path("peft/llama/lora_r8a16");
    refused(
        &set,
        &["merge", &gpt2, &lora, "--out", &out],
        &["for another model", "model.layers.0.mlp.down_proj [64, 96] (not there)", "and 6 more"],
    );
    refused(
        &set,
        &["merge", &bias, &lora, "--out", &out],
        &["model.layers.0.mlp.down_proj [64, 96] (it is [48, 72])"],
    );
    refused(&set, &["merge", &bias, &lora, "--out", &out, "--allow-missing"], &["it is [48, 72]"]);
    refused(
        &set,
        &["merge", &gpt2, &lora, "--out", &out, "--allow-missing"],
        &["no module that the model has"],
    );
    refused(&set, &["unmerge", &llama, &path("peft/llama/dora_r8"), "--out", &out], &["DoRA"]);
    refused(
        &set,
        &["unmerge", &llama, &path("peft/llama/embed_and_head"), "--out", &out],
        &["replaced", "gone"],
    );
    // A module that was trained whole, and is not in the file.
    let mut headless = peft::load(set.path("peft/llama/embed_and_head")).unwrap();
    headless.base_tensors.remove("lm_head.weight");
    headless.save(set.path("headless")).unwrap();
    refused(
        &set,
        &["merge", &llama, &path("headless"), "--out", &out, "--allow-missing"],
        &["modules_to_save [\"lm_head\"]", "no lm_head.weight"],
    );
    // A table that serves as the output layer too.
    let mut tied = bitsandbytes::load(set.path("peft/llama/base")).unwrap();
    tied.dense.remove("lm_head.weight");
    tied.save(set.path("tied"), &SaveOptions::default()).unwrap();
    refused(
        &set,
        &["merge", &path("tied"), &path("peft/llama/embed_and_head"), "--out", &out],
        &["embed_tokens", "tied"],
    );
}

#[test]
fn weights_that_are_not_finite() {
    let set = Set::of("bad-numbers", &["peft/llama"]);
    let weight = "model.layers.1.mlp.up_proj.weight";
    set.edit_tensor("peft/llama/base/model.safetensors", weight, |bytes| {
        bytes[400..404].copy_from_slice(&f32::NAN.to_le_bytes())
    });
    let path = |inside: &str| text(&set.path(inside)).to_owned();
    let (base, out) = (path("peft/llama/base"), path("out"));
    refused(&set, &["quantize", &base, "--out", &out], &[weight, "finite", "64..128"]);
    refused(
        &set,
        &["merge", &base, &path("peft/llama/lora_r8a16"), "--out", &out],
        &[weight, "[1, 36]", "finite"],
    );
}

/// A limit on the size of files fails the same calls as a full disk.
#[test]
fn a_disk_that_is_full() {
    let set = Set::empty("bad-disk");
    model(&set, "in", [1000, 1000], DType::BF16);
    adapter(&set, "lora", [1000, 1000], false);
    let before = files(&set.path(""));
    for arguments in ["quantize in", "merge in lora"] {
        // Blocks of 512 bytes, or of 1024; the signal that would end the process is ignored, so that the call fails instead.
        let script = format!(
            "trap '' XFSZ; ulimit -f 300; exec '{}' {arguments} --out out",
            env!("CARGO_BIN_EXE_lora-kernels")
        );
        let output = Command::new("sh").arg("-c").arg(script).current_dir(set.path("")).output().unwrap();
        let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert_refused(
            &Output { code: output.status.code(), stdout, stderr },
            &["model.safetensors", "File too large"],
        );
        assert_eq!(files(&set.path("")), before);
    }
}

#[test]
fn a_run_that_is_killed() {
    let set = Set::empty("bad-kill");
    model(&set, "in", [8000, 4096], DType::BF16);
    let before = files(&set.path("in"));
    let partial = set.path(".out.partial/model.safetensors");
    let start = |out: &str| {
        Command::new(env!("CARGO_BIN_EXE_lora-kernels"))
            .args(["quantize", text(&set.path("in")), "--out", text(&set.path(out))])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut child = start("out");
    let begun = Instant::now();
    while !partial.metadata().is_ok_and(|file| file.len() > 0) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it has not begun");
    }
    // While one is at it, another one is not let in.
    let second = run(&["quantize", text(&set.path("in")), "--out", text(&set.path("out"))]);
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it was done before it could be killed");
    assert_refused(&second, &["another run is writing it"]);
    assert!(!set.path("out").exists());
    assert!(bitsandbytes::Reader::open(set.path(".out.partial")).is_err(), "what is left must not load");
    assert_eq!(files(&set.path("in")), before);
    // The next run clears up, and is complete.
    let output = run(&["quantize", text(&set.path("in")), "--out", text(&set.path("out"))]);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    assert!(!set.path(".out.partial").exists());
    assert_eq!(bitsandbytes::load(set.path("out")).unwrap().nf4.len(), 2);
}

/// Between its two renames a run that replaces a model has put the old one aside.
#[test]
fn a_replacement_that_was_cut_off() {
    let set = Set::of("bad-replace", &["peft/llama/base"]);
    let path = |inside: &str| text(&set.path(inside)).to_owned();
    let base = path("peft/llama/base");
    assert_eq!(run(&["quantize", &base, "--out", &path("out")]).code, Some(0));
    let old = files(&set.path("out"));
    fs::rename(set.path("out"), set.path(".out.replaced")).unwrap();
    assert_refused(&run(&["quantize", &base, "--out", &path("out")]), &["is there already"]);
    assert_eq!(files(&set.path("out")), old);
    assert!(!set.path(".out.replaced").exists());
    assert_eq!(run(&["quantize", &base, "--out", &path("out"), "--force", "--double-quant"]).code, Some(0));
    assert_ne!(files(&set.path("out")), old);
    assert!(!set.path(".out.replaced").exists() && !set.path(".out.partial").exists());
}
