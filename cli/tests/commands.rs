//! `demo` and `inspect`, and what they say when something is wrong.

mod common;

use common::{Set, data, run};

fn inspect(path: &str) -> common::Output {
    run(&["inspect", data().join(path).to_str().unwrap()])
}

/// The cells of the table row that begins with `name`.
fn row<'a>(output: &'a str, name: &str) -> Vec<&'a str> {
    let row = output.lines().find(|line| line.split("  ").next() == Some(name));
    row.unwrap_or_else(|| panic!("no row {name} in\n{output}"))
        .split("  ")
        .map(str::trim)
        .filter(|c| !c.is_empty())
        .collect()
}

#[test]
fn demo_runs_on_the_cpu_and_compares_every_projection() {
    let output = run(&["demo", "--device", "cpu"]);
    assert_eq!(output.code, Some(0), "{}{}", output.stdout, output.stderr);
    assert!(output.stdout.starts_with("device: the CPU reference"), "{}", output.stdout);
    for projection in ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] {
        let rows = output.stdout.lines().filter(|l| l.starts_with("ok ") && l.contains(projection)).count();
        assert!(rows >= 2, "{rows} rows of {projection}");
    }
    assert!(output.last_line().ends_with("every error is within its bound"), "{}", output.last_line());
}

#[test]
fn demo_fails_on_damaged_data_and_on_none() {
    let parts = ["nf4_checkpoint", "real_minilm", "peft/llama", "qlora"];
    let set = Set::of("demo", &parts);
    let path = set.path("").to_str().unwrap().to_owned();
    assert_eq!(run(&["demo", "--device", "cpu", "--data", &path]).code, Some(0));
    set.edit_tensor("qlora/nodq_bs64_f32.safetensors", "lora_B", |b| b[402] ^= 0x80);
    let output = run(&["demo", "--device", "cpu", "--data", &path]);
    assert_eq!(output.code, Some(1));
    assert!(
        output.stdout.contains("FAILED") && output.last_line().contains("NOT every error"),
        "{}",
        output.stdout
    );
    let set = Set::empty("demo-empty");
    let output = run(&["demo", "--device", "cpu", "--data", set.path("").to_str().unwrap()]);
    assert_eq!(output.code, Some(1));
    assert!(output.stdout.contains("nf4_checkpoint: no such folder"), "{}", output.stdout);
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_that_says_so() {
    if lora_kernels_devices::Device::cuda().is_ok() {
        return;
    }
    for command in [&["demo"][..], &["verify", "."]] {
        let output = run(&[command, &["--device", "cuda"]].concat());
        assert_eq!(output.code, Some(1));
        assert!(output.stderr.contains("no usable CUDA device"), "{}", output.stderr);
    }
}

#[test]
fn inspect_shows_the_weights_of_a_checkpoint() {
    let output = inspect("nf4_checkpoint/bare.safetensors");
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    // 60 x 100 elements: 3000 bytes of codes and 94 scales of four bytes.
    let cells = row(&output.stdout, "proj_c.weight");
    assert_eq!(cells[1..], ["[60, 100]", "nf4", "64", "no", "f32", "uint8", "4.501", "3376"]);
    // 64 x 256 elements in 128 blocks: 8192 bytes of codes, 128 of scales, four of their scale.
    let cells = row(&output.stdout, "proj_b.weight");
    assert_eq!(cells[1..], ["[64, 256]", "nf4", "128", "by 256", "bf16", "uint8", "4.064", "8324"]);
    assert_eq!(row(&output.stdout, "proj_c.bias")[1..], ["[60]", "F32", "240"]);
    assert!(output.last_line().starts_with("5 4-bit weights of 42864 elements"), "{}", output.last_line());

    let output = inspect("nf4_checkpoint/hf_dq_bf16_storage_bf16");
    assert!(row(&output.stdout, "model.layers.1.self_attn.v_proj.weight").contains(&"bfloat16"));
}

#[test]
fn inspect_shows_the_modules_of_an_adapter() {
    let output = inspect("peft/llama/patterns");
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let cells = row(&output.stdout, "model.layers.0.mlp.down_proj");
    assert_eq!(cells[1..], ["LoRA", "96", "64", "32", "1", "0.03125", "f32", "5120", "20480"]);
    assert_eq!(output.last_line(), "14 adapted modules with 17088 parameters in 68352 bytes");
    for (path, module, kind) in [
        ("rslora_r16", "model.layers.0.self_attn.q_proj", "rsLoRA"),
        ("dora_r8", "model.layers.0.self_attn.q_proj", "DoRA"),
        ("adalora_pruned", "model.layers.1.self_attn.q_proj", "AdaLoRA"),
        ("embed_and_head/adapter_model.safetensors", "model.embed_tokens", "embedding"),
    ] {
        assert_eq!(row(&inspect(&format!("peft/llama/{path}")).stdout, module)[1], kind);
    }
}

#[test]
fn inspect_says_what_is_wrong() {
    for (path, mention) in [
        ("nope", "nope: No such file"),
        ("peft", "wanted adapter_config.json (an adapter), or model.safetensors"),
        ("README.md", "README.md: "),
        ("nf4_blockwise/plain.safetensors", "quant_state.bitsandbytes__nf4"),
    ] {
        let output = inspect(path);
        assert_eq!(output.code, Some(1), "{}", output.stdout);
        assert!(output.stderr.starts_with("error: ") && output.stderr.contains(mention), "{}", output.stderr);
        assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
    }
    let set = Set::of("inspect", &["nf4_checkpoint/bare.safetensors"]);
    set.edit("nf4_checkpoint/bare.safetensors", |bytes| bytes.truncate(20_000));
    let output = run(&["inspect", set.path("nf4_checkpoint/bare.safetensors").to_str().unwrap()]);
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("bare.safetensors"), "{}", output.stderr);

    let set = Set::of("inspect-adapter", &["peft/llama/dora_r8"]);
    set.edit_json("peft/llama/dora_r8/adapter_config.json", |config| config["r"] = 0.into());
    let output = run(&["inspect", set.path("peft/llama/dora_r8").to_str().unwrap()]);
    assert_eq!(output.code, Some(1));
    let wanted = "peft/llama/dora_r8: adapter_config.json: r: wanted a whole number above 0, got 0";
    assert!(output.stderr.contains(wanted), "{}", output.stderr);
}
