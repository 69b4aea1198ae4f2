//! `size`: against the arithmetic of published models, models on disk, and files that were written.

mod common;

use common::{Set, data, run};
use lora_kernels::adapter::{Adapter, Lora};
use lora_kernels::formats::bitsandbytes::Reader;
use lora_kernels::formats::peft::{AdapterFile, Config, MODEL};
use lora_kernels::{DType, Tensor};
use serde_json::json;

/// The whole numbers of a line that begins so.
fn numbers(output: &common::Output, line: &str) -> Vec<u64> {
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let found = output.stdout.lines().find(|l| l.trim_start().starts_with(line));
    let found = found.unwrap_or_else(|| panic!("no line {line} in\n{}", output.stdout));
    found.split(|c: char| !c.is_ascii_digit() && c != '.').filter_map(|n| n.parse().ok()).collect()
}

/// Adapter and base as their publishers and PEFT's `print_trainable_parameters` count them, and by hand: layers times rank times the
/// sides of the adapted weights.
#[test]
fn published_models() {
    for (model, adapter, base) in [
        ("chatglm-6b", 28 * 8 * (4096 + 3 * 4096), 6_707_929_088),
        ("llama-2-7b", 32 * 8 * 2 * (4096 + 4096), 6_738_415_616),
        ("llama-3-8b", 32 * 8 * (4096 + 4096 + 1024 + 4096), 8_030_261_248),
        ("qwen2.5-7b", 28 * 8 * (3584 + 3584 + 512 + 3584), 7_615_616_512),
    ] {
        let output = run(&["size", model, "--rank", "8"]);
        assert_eq!(numbers(&output, "adapter of rank 8")[1..], [adapter], "{model}");
        assert_eq!(numbers(&output, "base:")[0], base, "{model}");
        assert_eq!(numbers(&output, "in f32")[1], 4 * adapter, "{model}");
    }
    let output = run(&["size", "chatglm-6b", "--targets", "query_key_value"]);
    assert!(
        output.stdout.contains("3670016 parameters\n  in f32: 14.7 MB (14680064 bytes)"),
        "{}",
        output.stdout
    );
    let output = run(&["size", "llama-2-7b", "--rank", "16", "--targets", "all-linear", "--dtype", "bf16"]);
    assert_eq!(numbers(&output, "adapter of rank 16")[1], 39_976_960);
    assert_eq!(numbers(&output, "in bf16")[1], 2 * 39_976_960);
}

/// 4-bit weights take half a byte and 1 / 64 of a scale, of 4 bytes or of 1 and 1 / 256 of 4.
#[test]
fn bases_in_four_bits() {
    let linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008u64);
    let rest = 2 * (6_738_415_616 - linear);
    for (options, scales) in [
        (&["--nf4"][..], linear / 64 * 4),
        (&["--nf4", "--double-quant"], linear / 64 + linear / 64 / 256 * 4),
    ] {
        let output = run(&[&["size", "llama-2-7b"], options].concat());
        assert_eq!(numbers(&output, "in NF4").last(), Some(&(linear / 2 + scales + rest)));
    }
}

/// Models that transformers wrote have as many parameters as their configuration gives; GPT-2's head is its table.
#[test]
fn models_on_disk() {
    for name in ["llama", "llama_bias", "gpt2"] {
        let folder = data().join("peft").join(name).join("base");
        let reader = Reader::open(&folder).unwrap();
        let count: usize = reader.parameters().values().map(|p| p.shape().iter().product::<usize>()).sum();
        let output = run(&["size", folder.to_str().unwrap()]);
        assert_eq!(numbers(&output, "base:")[0], count as u64, "{name}");
    }
}

#[test]
fn files_have_the_size_that_was_told_to_the_byte() {
    let folder = data().join("peft/llama/base");
    let reader = Reader::open(&folder).unwrap();
    let set = Set::empty("size");
    for (dtype, rank) in [(DType::F32, 3), (DType::BF16, 8), (DType::F16, 31)] {
        for targets in [&["q_proj", "v_proj"][..], &["k_proj", "up_proj", "down_proj"]] {
            let zeros =
                |shape: [usize; 2]| Tensor::from_f32(shape, &vec![0.0; shape[0] * shape[1]], dtype).unwrap();
            let adapters = reader
                .parameters()
                .iter()
                .filter_map(|(name, p)| Some((name.strip_suffix(".weight")?, p.shape())))
                .filter(|(module, _)| targets.iter().any(|target| module.ends_with(target)))
                .map(|(module, shape)| {
                    let lora = Lora::new(zeros([rank, shape[1]]), zeros([shape[0], rank]), 1.0).unwrap();
                    (module.to_owned(), Adapter::from(lora))
                });
            let file = AdapterFile {
                config: Config::lora(rank, rank as f64, targets).unwrap(),
                adapters: adapters.collect(),
                base_tensors: Default::default(),
            };
            file.save(set.path("adapter")).unwrap();
            let written = std::fs::metadata(set.path("adapter").join(MODEL)).unwrap().len();
            let (targets, rank) = (targets.join(","), rank.to_string());
            let output = run(&[
                "size",
                folder.to_str().unwrap(),
                "--rank",
                &rank,
                "--targets",
                &targets,
                "--dtype",
                dtype.name(),
            ]);
            assert_eq!(numbers(&output, &format!("in {dtype}")).last(), Some(&written), "{}", output.stdout);
        }
    }
}

/// Packed, grouped and wide heads, each by hand.
#[test]
fn other_architectures() {
    let set = Set::empty("size-architectures");
    let shared = json!({ "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 1, "hidden_size": 64,
        "intermediate_size": 100, "vocab_size": 10 });
    // One layer: attention, feed-forward, norms; then the last norm, the table and, where it is not the same, the head.
    for (model_type, more, target, adapter, base) in [
        ("mistral", json!({}), "k_proj", 16 + 64, 64 * 160 + 3 * 6400 + 128 + 64 + 2 * 640),
        ("gemma", json!({ "head_dim": 16 }), "o_proj", 64 + 128, 64 * 320 + 3 * 6400 + 128 + 64 + 640),
        ("gemma2", json!({ "head_dim": 16 }), "q_proj", 128 + 64, 64 * 320 + 3 * 6400 + 256 + 64 + 640),
        (
            "qwen2",
            json!({ "tie_word_embeddings": true }),
            "v_proj",
            16 + 64,
            64 * 160 + 96 + 3 * 6400 + 128 + 64 + 640,
        ),
        ("qwen3", json!({ "head_dim": 16 }), "down_proj", 164, 64 * 320 + 3 * 6400 + 128 + 32 + 64 + 2 * 640),
        ("phi3", json!({}), "qkv_proj", 96 + 64, 64 * 160 + 3 * 6400 + 128 + 64 + 2 * 640),
        (
            "llama",
            json!({ "attention_bias": true, "mlp_bias": true }),
            "lm_head",
            10 + 64,
            64 * 160 + 160 + 3 * 6400 + 264 + 128 + 64 + 2 * 640,
        ),
        (
            "chatglm",
            json!({ "ffn_hidden_size": 100, "intermediate_size": null, "kv_channels": 8, "num_key_value_heads": null,
                "multi_query_group_num": 2, "num_layers": 1, "num_hidden_layers": null, "padded_vocab_size": 10,
                "add_qkv_bias": true }),
            "query_key_value",
            96 + 64,
            64 * 160 + 96 + 3 * 6400 + 128 + 64 + 2 * 640,
        ),
    ] {
        let mut config = shared.as_object().unwrap().clone();
        config.extend(more.as_object().unwrap().clone());
        config.insert("model_type".into(), json!(model_type));
        let path = set.path("config.json");
        std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        let output = run(&["size", path.to_str().unwrap(), "--rank", "2", "--targets", target]);
        assert_eq!(numbers(&output, "adapter of rank 2")[1], 2 * adapter, "{model_type}");
        assert_eq!(numbers(&output, "base:")[0], base, "{model_type}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let set = Set::empty("size-wrong");
    let write = |name: &str, text: &str| {
        std::fs::write(set.path(name), text).unwrap();
        set.path(name).to_str().unwrap().to_owned()
    };
    let phi = r#"{"model_type": "phi3", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 8, "vocab_size": 4}"#;
    for (model, options, wanted) in [
        ("nothing-here".to_owned(), &[][..], "nothing-here: cannot be read, and is none of chatglm-6b"),
        (write("text", "not JSON"), &[], "wanted JSON"),
        (write("list", "[]"), &[], "wanted an object, got []"),
        (write("none", "{}"), &[], "config.json: wanted a text at the key model_type, got none"),
        (write("other", r#"{"model_type": "bert"}"#), &[], "model_type: wanted llama, mistral"),
        (write("short", r#"{"model_type": "llama"}"#), &[], "wanted the key num_hidden_layers or n_layer"),
        (
            write("odd", &phi.replace("\"num_attention_heads\": 2", "\"num_attention_heads\": 3")),
            &[],
            "a multiple of 3 heads, got 8",
        ),
        (
            write("zero", &phi.replace("\"hidden_size\": 8", "\"hidden_size\": 0")),
            &[],
            "hidden_size: wanted a size from 1 on, got 0",
        ),
        (
            write("huge", &phi.replace("\"hidden_size\": 8", "\"hidden_size\": 99999999999")),
            &[],
            "hidden_size: wanted a size",
        ),
        (
            write("phi", phi),
            &[],
            "--targets: PEFT has no default for phi3; wanted some of down_proj, gate_up_proj, lm_head",
        ),
        (write("phi", phi), &["--targets", "q_proj"], "--targets: wanted some of down_proj"),
        (write("phi", phi), &["--targets", "all-linear,qkv_proj"], "got both"),
        (
            write("phi", phi),
            &["--targets", "qkv_proj", "--rank", "9"],
            "--rank: wanted at most the sides of model.layers.0.self_attn.qkv_proj [24, 8]",
        ),
        (write("phi", phi), &["--targets", "qkv_proj", "--rank", "0"], "--rank: wanted 1 or more, got 0"),
        (write("phi", phi), &["--double-quant"], "--nf4"),
    ] {
        let output = run(&[&["size", &model], options].concat());
        assert_ne!(output.code, Some(0), "{model}");
        assert!(output.stderr.contains(wanted), "{model}: {}", output.stderr);
    }
}
