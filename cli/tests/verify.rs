//! `verify` passes on the reference data, and on sets with other names; and it fails, with exit code 1, on every damage.

mod common;

use common::{Set, data, run};
use serde_json::json;

/// The set is refused, for a reason that `mention` is part of.
fn assert_fails(set: &Set, mention: &str) {
    let output = set.verify();
    assert_eq!(output.code, Some(1), "{}", output.stdout);
    assert!(output.stdout.contains(mention), "no `{mention}` in\n{}", output.stdout);
    assert!(!output.last_line().contains(" 0 failed"), "{}", output.last_line());
}

fn assert_passes(set: &Set) {
    let output = set.verify();
    assert_eq!(output.code, Some(0), "{}{}", output.stdout, output.stderr);
}

fn multiply(elements: &mut [u8], factor: f32) {
    for element in elements.as_chunks_mut().0 {
        *element = (f32::from_le_bytes(*element) * factor).to_le_bytes();
    }
}

#[test]
fn the_repositorys_own_data_pass() {
    let output = run(&["verify", data().to_str().unwrap()]);
    assert_eq!(output.code, Some(0), "{}", output.stdout);
    let totals: Vec<&str> = output.last_line().split(", ").collect();
    assert_eq!(totals.len(), 3, "{}", output.last_line());
    assert_eq!(totals[1], "0 failed");
    for family in ["nf4_blockwise", "nf4_checkpoint", "peft", "qlora", "multi_adapter", "svd", "real_minilm"]
    {
        assert!(
            output.stdout.lines().any(|l| l.starts_with(&format!("ok  {family}/"))),
            "nothing of {family}"
        );
    }
}

/// Every kernel, on all data that there is one for.
#[test]
fn the_emulated_kernels_pass() {
    if lora_kernels::cuda::modules().is_empty() {
        eprintln!("no kernels in this build");
        return;
    }
    let output = run(&["verify", data().to_str().unwrap(), "--device", "emulator"]);
    assert_eq!(output.code, Some(0), "{}", output.stdout);
    let skipped = output.stdout.split("\nskipped\n").nth(1).expect("svd has no kernel");
    let skipped = skipped.lines().take_while(|line| !line.is_empty());
    for line in skipped {
        let known = ["svd/"];
        assert!(known.iter().any(|k| line.trim().starts_with(k)), "{line}");
    }
}

#[test]
fn family_picks_families_and_refuses_unknown_ones() {
    let data = data();
    let output = run(&["verify", data.to_str().unwrap(), "--family", "qlora,multi_adapter"]);
    assert_eq!(output.code, Some(0));
    let rows: Vec<&str> = output.stdout.lines().filter(|l| l.starts_with("ok ")).collect();
    assert!(rows.iter().all(|r| r.contains("qlora/") || r.contains("multi_adapter/")), "{rows:#?}");
    let output = run(&["verify", data.to_str().unwrap(), "--family", "nope"]);
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("--family: wanted one of nf4_blockwise"), "{}", output.stderr);
}

#[test]
fn an_empty_folder_and_a_missing_one_are_not_good() {
    let set = Set::empty("empty");
    let output = set.verify();
    assert_eq!((output.code, output.last_line()), (Some(1), "0 passed, 0 failed, 0 skipped"));
    let output = run(&["verify", set.path("nope").to_str().unwrap()]);
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("nope"), "{}", output.stderr);
}

#[test]
fn only_skipped_files_are_not_good() {
    let set = Set::empty("only-skipped");
    std::fs::create_dir(set.path("another_family")).unwrap();
    let output = set.verify();
    assert_eq!(output.code, Some(1));
    assert!(output.stdout.contains("\nskipped\n  another_family: "), "{}", output.stdout);
    assert!(output.last_line().starts_with("0 passed, 0 failed, "), "{}", output.last_line());
}

#[test]
fn names_come_from_the_files() {
    let set = Set::of("renamed", &["nf4_blockwise/plain.json", "nf4_blockwise/plain.safetensors", "qlora"]);
    for ending in ["json", "safetensors"] {
        let from = set.path(&format!("nf4_blockwise/plain.{ending}"));
        std::fs::rename(from, set.path(&format!("nf4_blockwise/other.{ending}"))).unwrap();
    }
    set.rename("nf4_blockwise/other.safetensors", "plain_f32_bs64.", "weight number one.");
    set.edit_json("nf4_blockwise/other.json", |json| {
        let cases = json["cases"].as_array_mut().unwrap();
        cases.iter_mut().find(|c| c["name"] == "plain_f32_bs64").unwrap()["name"] =
            json!("weight number one");
    });
    set.rename("qlora/nodq_bs64_f32.safetensors", "\"T3.", "\"any batch.");
    let output = set.verify();
    assert_eq!(output.code, Some(0), "{}", output.stdout);
    assert!(output.stdout.contains("weight number one") && output.stdout.contains("any batch"));
}

#[test]
fn a_flipped_nibble_fails() {
    let set = Set::of("nibble", &["nf4_blockwise/plain.json", "nf4_blockwise/plain.safetensors"]);
    set.edit_tensor("nf4_blockwise/plain.safetensors", "plain_bf16_bs128.packed", |b| b[77] ^= 0x10);
    assert_fails(&set, "nf4_blockwise/plain plain_bf16_bs128\n    packed: element 154");
}

#[test]
fn a_flipped_nibble_of_a_checkpoint_fails() {
    let set = Set::of("checkpoint-nibble", &["nf4_checkpoint"]);
    let file = "nf4_checkpoint/hf_dq_bf16_storage_bf16/model.safetensors";
    set.edit_tensor(file, "model.layers.0.mlp.up_proj.weight", |b| b[3000] ^= 1);
    assert_fails(
        &set,
        "nf4_checkpoint/hf_dq_bf16_storage_bf16 model.layers.0.mlp.up_proj\n    dequant_f32: ",
    );
}

#[test]
fn a_scaled_absmax_fails() {
    let set = Set::of("absmax", &["nf4_checkpoint"]);
    let file = "nf4_checkpoint/bare.safetensors";
    set.edit_tensor(file, "proj_c.weight.absmax", |b| multiply(&mut b[..4], 1.0 + 1e-6));
    assert_fails(&set, "nf4_checkpoint/bare proj_c");
}

#[test]
fn a_nested_code_that_is_one_off_fails() {
    let set = Set::of("qabsmax", &["real_minilm"]);
    set.edit_tensor("real_minilm/w1.safetensors", "dq.qabsmax", |b| b[9000] = b[9000].wrapping_add(1));
    assert_fails(&set, "qabsmax (stored): element 9000");
}

#[test]
fn swapped_factors_fail() {
    let set = Set::of("swapped", &["peft/llama/base", "peft/llama/lora_r8a16"]);
    let (file, prefix) = (
        "peft/llama/lora_r8a16/adapter_model.safetensors",
        "base_model.model.model.layers.0.self_attn.q_proj.",
    );
    let mut other = Vec::new();
    set.edit_tensor(file, &format!("{prefix}lora_A.weight"), |b| other = b.to_vec());
    set.edit_tensor(file, &format!("{prefix}lora_B.weight"), |b| b.swap_with_slice(&mut other));
    set.edit_tensor(file, &format!("{prefix}lora_A.weight"), |b| b.copy_from_slice(&other));
    assert_fails(&set, "peft/llama/lora_r8a16 model.layers.0.self_attn.q_proj\n    delta (formula): ");
}

#[test]
fn a_wrong_scaling_fails() {
    let set = Set::of("scaling", &["peft/llama/base", "peft/llama/rslora_r16"]);
    set.edit_json("peft/llama/rslora_r16/adapter_config.json", |config| config["use_rslora"] = json!(false));
    assert_fails(&set, "scaling: element 0: got 5e-1, wanted 2e0");

    let set = Set::of("multi-scaling", &["multi_adapter"]);
    set.edit_json("multi_adapter/mix.json", |json| json["adapters"][1]["scaling"] = json!(1.375));
    assert_fails(&set, "multi_adapter/mix random\n    y_f32 (formula): ");
}

#[test]
fn swapped_adapters_of_a_batch_fail() {
    let set = Set::of("index", &["multi_adapter"]);
    set.edit_tensor("multi_adapter/unsorted_big.safetensors", "random.adapter_idx", |b| b.swap(0, 4));
    let output = set.verify();
    assert_eq!(output.code, Some(1), "{}", output.stdout);

    let set = Set::of("index-range", &["multi_adapter"]);
    set.edit_tensor("multi_adapter/mix.safetensors", "random.adapter_idx", |b| b[0] = 6);
    assert_fails(&set, "random.adapter_idx: ");
}

#[test]
fn an_output_that_is_a_little_off_fails() {
    for (file, tensor) in [
        ("qlora/dora_bs64_f32", "T7.y_f64"),
        ("qlora/dq_bs64_bf16", "T33.y_f32"),
        ("multi_adapter/mix", "random.nf4.y_f64"),
        ("real_minilm/w0", "y_original_f32"),
        ("peft/multi_merge", "merged.a3+a1"),
        ("peft/multi_merge", "y.a1+a3"),
        ("svd/svd", "tall.W_prime"),
        ("svd/svd", "wide.best_rank8_delta_f64"),
    ] {
        let set =
            Set::of(&format!("off-{tensor}"), &[&format!("{file}.json"), &format!("{file}.safetensors")]);
        assert_passes(&set);
        // The least exponent bit of one element: twice or half of it.
        set.edit_tensor(&format!("{file}.safetensors"), tensor, |b| {
            let size = if tensor.ends_with("f64") { 8 } else { 4 };
            let element = b.len() / size / 2 * size;
            b[element + size - 2] ^= if size == 8 { 0x10 } else { 0x80 };
        });
        assert_fails(&set, file);
    }
}

#[test]
fn logits_of_another_model_fail() {
    let parts = ["peft/llama/base", "peft/llama/lora_r8a16"];
    let io = "peft/llama/lora_r8a16/io.safetensors";
    let reason = "peft/llama/lora_r8a16 whole model\n    logits_";
    for name in ["logits_base", "logits_adapted", "logits_merged"] {
        let set = Set::of(name, &parts);
        set.edit_tensor(io, name, |b| multiply(&mut b[..4], 1.01));
        assert_fails(&set, reason);
    }
    // What only the whole model has: a norm, the order of layers, positions.
    let set = Set::of("norm", &parts);
    set.edit_tensor("peft/llama/base/model.safetensors", "model.norm.weight", |b| {
        multiply(&mut b[..4], 1.01)
    });
    assert_fails(&set, reason);
    let set = Set::of("theta", &parts);
    set.edit_json("peft/llama/base/config.json", |config| {
        config["rope_parameters"]["rope_theta"] = json!(9000.0)
    });
    assert_fails(&set, reason);
}

#[test]
fn missing_tensors_fail() {
    for (family, file, tensor) in [
        ("nf4_blockwise", "nf4_blockwise/plain", "plain_f32_bs64.dequant\""),
        ("nf4_checkpoint", "nf4_checkpoint/bare.io", "proj_b.y_bf16\""),
        ("qlora", "qlora/nodq_bs64_f32", "unmerged.packed\""),
        ("multi_adapter", "multi_adapter/mix", "ad3.lora_B\""),
        ("real_minilm", "real_minilm/w0", "y_nf4_f64\""),
    ] {
        let set = Set::of(&format!("missing-{family}"), &[family]);
        set.rename(&format!("{file}.safetensors"), tensor, "gone\"");
        assert_fails(&set, &tensor[..tensor.len() - 1]);
    }
}

#[test]
fn missing_and_unreadable_files_fail() {
    let remove = |set: &Set, file: &str| std::fs::remove_file(set.path(file)).unwrap();
    let set = Set::of("no-sidecar", &["qlora"]);
    remove(&set, "qlora/dq_bs64_bf16.json");
    assert_fails(&set, "dq_bs64_bf16.json");

    let set = Set::of("no-tensors", &["real_minilm"]);
    remove(&set, "real_minilm/w0.safetensors");
    assert_fails(&set, "w0.safetensors");

    let set = Set::of("neither", &["real_minilm", "index.json"]);
    for name in ["qlora", "peft", "svd", "multi_adapter", "nf4_blockwise", "nf4_checkpoint", "train_step"] {
        set.edit_json("index.json", |json| {
            json["files"].as_array_mut().unwrap().retain(|f| !f["path"].as_str().unwrap().starts_with(name));
        });
    }
    assert_passes(&set);
    remove(&set, "real_minilm/w0.json");
    remove(&set, "real_minilm/w0.safetensors");
    assert_fails(&set, "index.json real_minilm/w0.json");

    let set = Set::of("truncated", &["multi_adapter"]);
    set.edit("multi_adapter/mix.safetensors", |bytes| bytes.truncate(bytes.len() - 1));
    assert_fails(&set, "mix.safetensors");

    let set = Set::of("not-json", &["multi_adapter"]);
    set.edit("multi_adapter/mix.json", |bytes| bytes.truncate(100));
    assert_fails(&set, "mix.json: not JSON");

    let set = Set::of("no-checkpoint", &["nf4_checkpoint"]);
    remove(&set, "nf4_checkpoint/bare.safetensors");
    assert_fails(&set, "nf4_checkpoint/bare");

    let set = Set::of("no-io", &["nf4_checkpoint"]);
    remove(&set, "nf4_checkpoint/bare.io.safetensors");
    remove(&set, "nf4_checkpoint/bare.io.json");
    assert_fails(&set, "bare.io.safetensors is not there");

    let set = Set::of("no-base", &["peft/gpt2/dora_fifo"]);
    assert_fails(&set, "peft/gpt2/base");
}

#[test]
fn cases_that_only_one_side_knows_fail() {
    let set = Set::of("unlisted", &["nf4_blockwise"]);
    set.edit_json("nf4_blockwise/special.json", |json| {
        json["cases"].as_array_mut().unwrap().pop();
    });
    assert_fails(&set, "the sidecar lists no such case");

    let set = Set::of("unstored", &["nf4_blockwise"]);
    set.edit_json("nf4_blockwise/special.json", |json| json["cases"][0]["name"] = json!("no such case"));
    assert_fails(&set, "no such case.input");
}
