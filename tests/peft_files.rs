//! PEFT adapters: what is read, what is written, and what is refused.

mod mutate;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lora_kernels::adapter::{Adapter, Lora};
use lora_kernels::formats::bitsandbytes;
use lora_kernels::formats::peft::{self, AdapterFile, Bias, Config, Method, Patterns};
use lora_kernels::{DType, Error, Tensor};
use mutate::{Folder, Tensors, assert_refused};
use safetensors::Dtype;
use serde_json::{Value, json};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/peft");

/// Every adapter folder of the reference data.
fn folders() -> Vec<PathBuf> {
    let models = fs::read_dir(DATA).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir());
    let folders = models.flat_map(|m| fs::read_dir(m).unwrap().map(|e| e.unwrap().path()));
    let mut folders: Vec<_> = folders.filter(|f| f.join(peft::CONFIG).exists()).collect();
    folders.sort();
    assert_eq!(folders.len(), 12, "{folders:?}");
    folders
}

fn files(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    (fs::read(folder.join(peft::CONFIG)).unwrap(), fs::read(folder.join(peft::MODEL)).unwrap())
}

fn load(name: &str) -> AdapterFile {
    peft::load(Path::new(DATA).join(name)).unwrap()
}

/// What PEFT wrote, read and written again, is the same bytes: no tensor, name, dtype or field is lost.
#[test]
fn round_trip_is_byte_for_byte() {
    for folder in folders() {
        let (config, model) = files(&folder);
        let (our_config, our_model) = peft::load(&folder).unwrap().to_bytes().unwrap();
        assert_eq!(
            String::from_utf8(our_config).unwrap(),
            String::from_utf8(config).unwrap(),
            "{}",
            folder.display()
        );
        assert!(our_model == model, "{}: {}", folder.display(), peft::MODEL);
    }
}

#[test]
fn a_saved_folder_loads_as_the_same_adapter() {
    for (i, folder) in folders().iter().enumerate() {
        let to = Folder::new(&format!("adapter-{i}"));
        let adapter = peft::load(folder).unwrap();
        adapter.save(&to.0).unwrap();
        assert_eq!(peft::load(&to.0).unwrap(), adapter);
    }
}

/// Rank, alpha and scale of every module, as PEFT reports them for the loaded model.
#[test]
fn ranks_and_scales_are_those_of_peft() {
    let mut modules = 0;
    for folder in folders() {
        let sidecar: Value = serde_json::from_slice(&fs::read(folder.join("io.json")).unwrap()).unwrap();
        let file = peft::load(&folder).unwrap();
        for case in sidecar["modules"].as_array().unwrap() {
            let (Some(module), Some(scaling)) = (case["module"].as_str(), case["scaling"].as_f64()) else {
                continue;
            };
            let adapter = &file.adapters[module];
            // PEFT divides AdaLoRA's by ranknum + 1e-5, which it keeps apart.
            let divisor = case["ranknum"].as_f64().map_or(1.0, |ranknum| ranknum + 1e-5);
            assert_eq!(adapter.scaling(), scaling / divisor, "{}: {module}", folder.display());
            assert_eq!(json!(adapter.rank()), case["r"], "{}: {module}", folder.display());
            assert_eq!(json!(file.config.rank_of(module)), case["r"]);
            assert_eq!(Some(file.config.alpha_of(module)), case["lora_alpha"].as_f64());
            assert_eq!(json!(adapter.weight_shape()), case["base_weight_shape"]);
            modules += 1;
        }
    }
    assert_eq!(modules, 31);
}

/// Every tensor of the files is in the adapter, by the reference implementation of the container.
#[test]
fn every_tensor_is_somewhere() {
    for folder in folders() {
        let mut tensors = Tensors::read(folder.join(peft::MODEL)).0;
        let file = peft::load(&folder).unwrap();
        let mut found = |name: String, tensor: &Tensor| {
            let (_, shape, bytes) =
                tensors.remove(&name).unwrap_or_else(|| panic!("{name} in {}", folder.display()));
            assert_eq!((&shape[..], &bytes[..]), (tensor.shape(), tensor.as_bytes()), "{name}");
        };
        for (module, adapter) in &file.adapters {
            let [a, b] = match adapter {
                Adapter::Lora(_) | Adapter::Dora(_) => ["lora_A.weight", "lora_B.weight"],
                Adapter::AdaLora(_) => ["lora_A", "lora_B"],
                Adapter::Embedding(_) => ["lora_embedding_A", "lora_embedding_B"],
            };
            found(format!("base_model.model.{module}.{a}"), adapter.lora_a());
            found(format!("base_model.model.{module}.{b}"), adapter.lora_b());
            match adapter {
                Adapter::Lora(lora) => {
                    if let Some(bias) = lora.lora_bias() {
                        found(format!("base_model.model.{module}.lora_B.bias"), bias);
                    }
                }
                Adapter::Dora(dora) => {
                    found(format!("base_model.model.{module}.lora_magnitude_vector"), dora.magnitude())
                }
                Adapter::AdaLora(adalora) => {
                    found(format!("base_model.model.{module}.lora_E"), adalora.lora_e())
                }
                Adapter::Embedding(_) => {}
            }
        }
        for (name, tensor) in &file.base_tensors {
            let (module, parameter) = name.rsplit_once('.').unwrap();
            let layer = if file.adapters.contains_key(module) { ".base_layer" } else { "" };
            found(format!("base_model.model.{module}{layer}.{parameter}"), tensor);
        }
        assert!(tensors.is_empty(), "{}: {:?}", folder.display(), tensors.keys());
    }
}

#[test]
fn kinds_and_flags_follow_the_configuration() {
    assert!(load("llama/dora_r8").adapters.values().all(|a| matches!(a, Adapter::Dora(_))));
    assert!(load("gpt2/lora_fifo").adapters.values().all(Adapter::fan_in_fan_out));
    assert!(
        load("gpt2/dora_fifo").adapters.values().all(|a| matches!(a, Adapter::Dora(_)) && a.fan_in_fan_out())
    );
    assert!(load("llama/rslora_r16").config.use_rslora);
    let bias = load("llama_bias/bias_lora_only");
    assert_eq!(bias.config.bias, Bias::LoraOnly);
    assert_eq!(bias.base_tensors["model.layers.0.self_attn.q_proj.bias"].shape(), [48]);
    let saved = load("llama/embed_and_head");
    assert_eq!(saved.config.modules_to_save, ["lm_head"]);
    let names: Vec<&str> = saved.base_tensors.keys().map(String::as_str).collect();
    assert_eq!(names, ["lm_head.weight", "model.embed_tokens.weight"]);
    assert!(matches!(saved.adapters["model.embed_tokens"], Adapter::Embedding(_)));
}

/// Masked and pruned, AdaLoRA keeps the scale of the rank that it began with; a module may have no rank left.
#[test]
fn adalora_keeps_its_first_rank_in_the_scale() {
    for (name, ranks) in [("adalora_masked", [12; 6]), ("adalora_pruned", [2, 4, 7, 3, 0, 8])] {
        let file = load(&format!("llama/{name}"));
        assert!(matches!(file.config.method, Method::AdaLora { .. }));
        let got: Vec<usize> = file.adapters.values().map(Adapter::rank).collect();
        assert_eq!(got, ranks);
        assert!(file.adapters.values().all(|a| a.scaling() == 32.0 / (12.0 + 1e-5)));
    }
}

/// Adapters in any of the dtypes, also mixed.
#[test]
fn dtypes_survive() {
    let mut file = load("llama/dora_r8");
    for (i, adapter) in file.adapters.values_mut().enumerate() {
        let Adapter::Dora(dora) = &*adapter else { panic!("DoRA") };
        let cast = |tensor: &Tensor, n: usize| {
            let dtype = DType::ALL[(i + n) % 3];
            Tensor::from_f32(tensor.shape(), &tensor.to_f32(), dtype).unwrap()
        };
        let lora = dora.lora();
        let lora = Lora::new(cast(lora.lora_a(), 0), cast(lora.lora_b(), 1), lora.scaling()).unwrap();
        *adapter = lora_kernels::adapter::Dora::new(lora, cast(dora.magnitude(), 2)).unwrap().into();
    }
    let (config, model) = file.to_bytes().unwrap();
    assert_eq!(AdapterFile::parse(&config, &model).unwrap(), file);
}

/// PEFT's rule: `re.match(r"(.*\.)?(KEY)$", module)`, the first key in the order of the dictionary.
#[test]
fn patterns_match_as_in_python() {
    let module = "model.layers.10.self_attn.q_proj";
    for (pattern, matches) in [
        ("q_proj", true),
        ("self_attn.q_proj", true),
        ("_proj", false),
        (r"layers\.\d+\.self_attn\.q_proj", true),
        (r"layers\.\d\.self_attn\.q_proj", false),
        (r"layers\.1\d?.*", true),
        (r"^model\.layers\.10\.self_attn\.q_proj", true),
        (r"^self_attn\.q_proj", false),
        ("k_proj|q_proj", true),
        ("(q|k)_proj", true),
        ("self_attn", false),
        ("Q_PROJ", false),
        ("(?i)Q_PROJ", true),
        (r".*\.q_proj$", true),
    ] {
        let patterns = Patterns::new([(pattern.to_owned(), 1)]).unwrap();
        assert_eq!(patterns.get(module).is_some(), matches, "{pattern}");
    }
    let both = [("q_proj".to_owned(), 1), (r"layers\.10\..*".to_owned(), 2)];
    assert_eq!(Patterns::new(both.clone()).unwrap().get(module), Some(&1));
    assert_eq!(Patterns::new(both.into_iter().rev()).unwrap().get(module), Some(&2));
    for unknown in [r"(?<=q)_proj", r"(a)\1", "[a&&b]", "(", r"a{1000}{1000}"] {
        assert!(
            matches!(Patterns::new([(unknown.to_owned(), 1)]), Err(Error::Unsupported { .. })),
            "{unknown}"
        );
    }
}

/// A change to the configuration or the tensors of an adapter, and what its error must name.
type Change = fn(&mut Value, &mut Tensors);
type Case = (&'static str, &'static str, Change, &'static [&'static str]);

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// A tensor of layer 0's q_proj.
macro_rules! q {
    ($suffix:literal) => {
        &format!("{Q}.{}", $suffix)
    };
}

const LORA: &str = "llama/lora_r8a16";
const DORA: &str = "llama/dora_r8";
const BIAS: &str = "llama_bias/lora_bias";
const PRUNED: &str = "llama/adalora_pruned";
const EMBED: &str = "llama/embed_and_head";
const ONLY: &str = "llama_bias/bias_lora_only";

const BAD: &[Case] = &[
    (
        "no lora_B",
        LORA,
        |_, t| drop(t.0.remove(q!("lora_B.weight"))),
        &["layers.0.self_attn.q_proj.lora_B.weight", "none"],
    ),
    (
        "no lora_A",
        LORA,
        |_, t| drop(t.0.remove(q!("lora_A.weight"))),
        &["layers.0.self_attn.q_proj.lora_A.weight", "none"],
    ),
    (
        "A and B disagree",
        LORA,
        |_, t| {
            t.get(q!("lora_B.weight")).1 = vec![128, 4];
        },
        &["q_proj.lora_B.weight", "[out, 8]", "[128, 4]"],
    ),
    (
        "both of another rank",
        LORA,
        |_, t| {
            t.get(q!("lora_A.weight")).1 = vec![4, 128];
            t.get(q!("lora_B.weight")).1 = vec![128, 4];
        },
        &["q_proj.lora_A.weight", "[8, in]", "[4, 128]"],
    ),
    ("config of another rank", LORA, |c, _| c["r"] = json!(16), &["lora_A.weight", "[16, in]", "[8, "]),
    (
        "rank_pattern of another rank",
        LORA,
        |c, _| c["rank_pattern"] = json!({"q_proj": 4}),
        &["q_proj.lora_A.weight", "[4, in]"],
    ),
    (
        "one dimension",
        LORA,
        |_, t| t.get(q!("lora_A.weight")).1 = vec![512],
        &["q_proj.lora_A.weight", "[512]"],
    ),
    (
        "convolution",
        LORA,
        |_, t| t.get(q!("lora_A.weight")).1 = vec![8, 64, 1, 1],
        &["q_proj.lora_A.weight", "convolution"],
    ),
    (
        "no inputs",
        LORA,
        |_, t| {
            let (_, shape, bytes) = t.get(q!("lora_A.weight"));
            *shape = vec![8, 0];
            bytes.clear();
        },
        &["q_proj.lora_A.weight", "[8, 0]"],
    ),
    ("NaN", LORA, |_, t| t.set_f32(q!("lora_A.weight"), 3, f32::NAN), &["q_proj.lora_A.weight", "NaN at 3"]),
    (
        "infinity",
        LORA,
        |_, t| t.set_f32(q!("lora_B.weight"), 0, f32::INFINITY),
        &["q_proj.lora_B.weight", "inf at 0"],
    ),
    (
        "f64",
        LORA,
        |_, t| (t.get(q!("lora_A.weight")).0, t.get(q!("lora_A.weight")).1) = (Dtype::F64, vec![8, 32]),
        &["F64"],
    ),
    (
        "another prefix",
        LORA,
        |_, t| t.rename(q!("lora_A.weight"), "model.x.lora_A.weight"),
        &["model.x", "base_model.model."],
    ),
    (
        "the adapter's name in the key",
        LORA,
        |_, t| t.rename(q!("lora_A.weight"), q!("lora_A.default.weight")),
        &["lora_A.default"],
    ),
    ("unknown suffix", LORA, |_, t| t.rename(q!("lora_A.weight"), q!("lora_C.weight")), &["lora_C.weight"]),
    ("unknown tensor", LORA, |_, t| t.copy(q!("lora_A.weight"), q!("vera_lambda_b")), &["vera_lambda_b"]),
    (
        "base weight without reason",
        LORA,
        |_, t| t.copy(q!("lora_A.weight"), q!("base_layer.weight")),
        &["q_proj"],
    ),
    ("module that is no target", LORA, |c, _| c["target_modules"] = json!(["k_proj"]), &["target_modules"]),
    (
        "expression that does not match",
        LORA,
        |c, _| c["target_modules"] = json!(".*\\.self_attn\\..*"),
        &["mlp", "target_modules"],
    ),
    ("excluded module", LORA, |c, _| c["exclude_modules"] = json!(["q_proj"]), &["q_proj", "target_modules"]),
    (
        "layer that is not chosen",
        LORA,
        |c, _| c["layers_to_transform"] = json!([0]),
        &["layers.1", "target_modules"],
    ),
    (
        "layer of another list",
        LORA,
        |c, _| {
            c["layers_to_transform"] = json!([0, 1]);
            c["layers_pattern"] = json!("h");
        },
        &["target_modules"],
    ),
    (
        "module that is saved whole",
        LORA,
        |c, _| c["modules_to_save"] = json!(["mlp"]),
        &["mlp", "target_modules"],
    ),
    ("magnitude without DoRA", DORA, |c, _| c["use_dora"] = json!(false), &["lora_magnitude_vector"]),
    ("DoRA without magnitude", LORA, |c, _| c["use_dora"] = json!(true), &["lora_magnitude_vector", "none"]),
    (
        "short magnitude",
        DORA,
        |_, t| t.resize(q!("lora_magnitude_vector"), -1),
        &["lora_magnitude_vector", "[64]", "[63]"],
    ),
    ("bias without lora_bias", BIAS, |c, _| c["lora_bias"] = json!(false), &["lora_B.bias"]),
    ("lora_bias without bias", LORA, |c, _| c["lora_bias"] = json!(true), &["lora_B.bias", "none"]),
    (
        "short lora_bias",
        BIAS,
        |_, t| t.resize(q!("lora_B.bias"), -1),
        &["q_proj.lora_B.bias", "[48]", "[47]"],
    ),
    ("DoRA with lora_bias", BIAS, |c, _| c["use_dora"] = json!(true), &["lora_bias", "DoRA"]),
    ("bias that is not trained", ONLY, |c, _| c["bias"] = json!("none"), &["base_layer.bias"]),
    ("unknown bias", ONLY, |c, _| c["bias"] = json!("some"), &["bias", "some"]),
    // `lm_head` itself is a name that PEFT may save unasked.
    (
        "saved module that is not named",
        EMBED,
        |_, t| t.rename("base_model.model.lm_head.weight", "base_model.model.score.weight"),
        &["base_model.model.score.weight"],
    ),
    ("DoRA on an embedding", EMBED, |c, _| c["use_dora"] = json!(true), &["embedding"]),
    (
        "no lora_embedding_B",
        EMBED,
        |_, t| drop(t.0.remove("base_model.model.model.embed_tokens.lora_embedding_B")),
        &["lora_embedding_B"],
    ),
    ("AdaLoRA without lora_E", PRUNED, |_, t| drop(t.0.remove(q!("lora_E"))), &["q_proj.lora_E", "none"]),
    (
        "lora_E of another rank",
        PRUNED,
        |_, t| t.resize(q!("lora_E"), 1),
        &["q_proj.lora_E", "[4, 1]", "[5, 1]"],
    ),
    ("another init_r", PRUNED, |c, _| c["init_r"] = json!(13), &["rank_pattern", "13"]),
    ("no rank_pattern", PRUNED, |c, _| c["rank_pattern"] = json!(null), &["lora_A", "[12, in]"]),
    (
        "rank_pattern that is no list",
        PRUNED,
        |c, _| c["rank_pattern"] = json!({"q_proj.lora_E": 3}),
        &["rank_pattern", "q_proj"],
    ),
    (
        "rank_pattern without lora_E",
        PRUNED,
        |c, _| c["rank_pattern"] = json!({"q_proj": [true]}),
        &["rank_pattern", "lora_E"],
    ),
    (
        "rank_pattern of no module",
        PRUNED,
        |c, _| {
            let pattern = c["rank_pattern"].as_object_mut().unwrap();
            pattern.insert("elsewhere.lora_E".into(), json!(vec![true; 12]));
        },
        &["elsewhere"],
    ),
    (
        "AdaLoRA with alpha_pattern",
        PRUNED,
        |c, _| c["alpha_pattern"] = json!({"q_proj": 4}),
        &["alpha_pattern"],
    ),
    ("AdaLoRA with alpha 0", PRUNED, |c, _| c["lora_alpha"] = json!(0), &["lora_alpha"]),
    ("rank 0", LORA, |c, _| c["r"] = json!(0), &["r", "above 0"]),
    ("negative rank", LORA, |c, _| c["r"] = json!(-8), &["r", "-8"]),
    ("rank with a point", LORA, |c, _| c["r"] = json!(8.5), &["r", "8.5"]),
    ("no rank", LORA, |c, _| drop(c.as_object_mut().unwrap().remove("r")), &["r", "none"]),
    ("no alpha", LORA, |c, _| drop(c.as_object_mut().unwrap().remove("lora_alpha")), &["lora_alpha", "none"]),
    ("alpha that is text", LORA, |c, _| c["lora_alpha"] = json!("16"), &["lora_alpha", "\"16\""]),
    ("flag that is text", LORA, |c, _| c["use_rslora"] = json!("yes"), &["use_rslora", "yes"]),
    ("pattern that is a list", LORA, |c, _| c["alpha_pattern"] = json!([1]), &["alpha_pattern", "[1]"]),
    (
        "pattern with a lookbehind",
        LORA,
        |c, _| c["alpha_pattern"] = json!({"(?<=q)_proj": 1}),
        &["(?<=q)_proj"],
    ),
    ("another method", LORA, |c, _| c["peft_type"] = json!("LOHA"), &["peft_type", "LOHA"]),
    ("no method", LORA, |c, _| c["peft_type"] = json!(null), &["peft_type"]),
    // What would change the result, and is not known here.
    ("PiSSA", LORA, |c, _| c["init_lora_weights"] = json!("pissa"), &["init_lora_weights", "pissa"]),
    (
        "PiSSA, fast",
        LORA,
        |c, _| c["init_lora_weights"] = json!("pissa_niter_16"),
        &["init_lora_weights", "pissa_niter_16"],
    ),
    ("OLoRA", LORA, |c, _| c["init_lora_weights"] = json!("olora"), &["init_lora_weights", "olora"]),
    ("CorDA", LORA, |c, _| c["init_lora_weights"] = json!("corda"), &["init_lora_weights", "corda"]),
    ("LoftQ", LORA, |c, _| c["init_lora_weights"] = json!("loftq"), &["init_lora_weights", "loftq"]),
    ("LoRA-GA", LORA, |c, _| c["init_lora_weights"] = json!("lora_ga"), &["init_lora_weights", "lora_ga"]),
    (
        "an initialisation to come",
        LORA,
        |c, _| c["init_lora_weights"] = json!("new"),
        &["init_lora_weights", "new"],
    ),
    ("aLoRA", LORA, |c, _| c["alora_invocation_tokens"] = json!([1, 2]), &["alora_invocation_tokens"]),
    (
        "trainable tokens",
        LORA,
        |c, _| c["trainable_token_indices"] = json!([5]),
        &["trainable_token_indices"],
    ),
    ("QALoRA", LORA, |c, _| c["use_qalora"] = json!(true), &["use_qalora"]),
    ("Megatron", LORA, |c, _| c["megatron_config"] = json!({"tp": 2}), &["megatron_config"]),
    (
        "repeated layers",
        LORA,
        |c, _| c["layer_replication"] = json!([[0, 2], [1, 2]]),
        &["layer_replication"],
    ),
    (
        "expert parameters",
        LORA,
        |c, _| c["target_parameters"] = json!(["experts.gate"]),
        &["target_parameters"],
    ),
    ("BD-LoRA", LORA, |c, _| c["use_bdlora"] = json!({"nblocks": 2}), &["use_bdlora"]),
    ("Arrow", LORA, |c, _| c["arrow_config"] = json!({"top_k": 3}), &["arrow_config"]),
    ("KaSA", LORA, |c, _| c["kasa_config"] = json!({"beta": 1e-4}), &["kasa_config"]),
    ("tied weights", LORA, |c, _| c["ensure_weight_tying"] = json!(true), &["ensure_weight_tying"]),
    ("a flag to come", LORA, |c, _| c["use_newlora"] = json!(true), &["use_newlora", "true"]),
    ("a number to come", LORA, |c, _| c["new_scale"] = json!(2), &["new_scale", "2"]),
];

#[test]
fn contradictions_are_refused_by_name() {
    for (case, folder, change, parts) in BAD {
        let (config, model) = files(&Path::new(DATA).join(folder));
        let (mut config, mut tensors) = (serde_json::from_slice(&config).unwrap(), Tensors::parse(&model));
        change(&mut config, &mut tensors);
        assert_refused(case, AdapterFile::parse(config.to_string().as_bytes(), &tensors.bytes()), parts);
    }
}

#[test]
fn broken_files_are_refused() {
    let (config, model) = files(&Path::new(DATA).join(LORA));
    assert_refused(
        "UTF-8",
        AdapterFile::parse(b"{\"r\": \"\xff\"}", &model),
        &["adapter_config.json", "UTF-8"],
    );
    assert_refused("JSON", AdapterFile::parse(b"{", &model), &["adapter_config.json", "JSON"]);
    assert_refused("a list", AdapterFile::parse(b"[]", &model), &["adapter_config.json", "a list"]);
    assert_refused("a key twice", AdapterFile::parse(br#"{"r": 8, "r": 16}"#, &model), &["\"r\" twice"]);
    assert_refused(
        "cut off",
        AdapterFile::parse(&config, &model[..model.len() - 1]),
        &["adapter_model.safetensors"],
    );
    assert_refused("empty", AdapterFile::parse(&config, b""), &["adapter_model.safetensors", "0 bytes"]);

    let folder = Folder::new("pickle");
    assert!(
        matches!(peft::load(&folder.0), Err(Error::Io { path, .. }) if path.ends_with("adapter_config.json"))
    );
    fs::write(folder.0.join("adapter_config.json"), &config).unwrap();
    assert!(
        matches!(peft::load(&folder.0), Err(Error::Io { path, .. }) if path.ends_with("adapter_model.safetensors"))
    );
    fs::write(folder.0.join("adapter_model.bin"), b"").unwrap();
    assert_refused("a pickle", peft::load(&folder.0), &["adapter_model.bin", "pickle"]);
}

/// Fields of other versions and of training do not matter; those that are off do not either.
#[test]
fn harmless_fields_are_kept() {
    let (config, model) = files(&Path::new(DATA).join(LORA));
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["use_newlora"] = json!(false);
    config["new_config"] = json!(null);
    config["init_lora_weights"] = json!("gaussian");
    config["layers_to_transform"] = json!([0, 1]);
    config["layers_pattern"] = json!(["layers"]);
    config["exclude_modules"] = json!("lm_head");
    let file = AdapterFile::parse(config.to_string().as_bytes(), &model).unwrap();
    let (written, _) = file.to_bytes().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), config);
}

/// `layers_to_transform`: a number or a list, found at the first number in the name, or after `layers_pattern`.
#[test]
fn layers_are_chosen_by_number() {
    let (config, model) = files(&Path::new(DATA).join(LORA));
    let config: Value = serde_json::from_slice(&config).unwrap();
    let mut first = Tensors::parse(&model);
    first.0.retain(|name, _| name.contains("layers.0."));
    for (layers, pattern, layer_0, both) in [
        (json!(0), json!(null), true, false),
        (json!(1), json!(null), false, false),
        (json!([0]), json!("layers"), true, false),
        (json!([1, 0]), json!(["h", "layers"]), true, true),
        (json!([0, 1]), json!(["h"]), false, false),
        (json!([]), json!(null), true, true),
    ] {
        let mut config = config.clone();
        (config["layers_to_transform"], config["layers_pattern"]) = (layers, pattern);
        let text = config.to_string();
        let reads = |tensors: &[u8]| AdapterFile::parse(text.as_bytes(), tensors).is_ok();
        assert_eq!((reads(&first.bytes()), reads(&model)), (layer_0, both), "{text}");
    }
}

/// An expression as fine-tuning tools write it for models with several towers.
#[test]
fn long_expressions_are_understood() {
    let (config, model) = files(&Path::new(DATA).join(LORA));
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    let expression = r"(?:.*?(?:language|text).*?(?:self_attn|mlp|dense).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))";
    config["target_modules"] = json!(expression);
    assert_eq!(AdapterFile::parse(config.to_string().as_bytes(), &model).unwrap().adapters.len(), 14);
    config["target_modules"] = json!(expression.replace("|down_proj", ""));
    assert_refused("fewer", AdapterFile::parse(config.to_string().as_bytes(), &model), &["down_proj"]);
}

/// With `bias: all` the file has biases of modules without adapter, too.
#[test]
fn all_biases() {
    let (config, model) = files(&Path::new(DATA).join(ONLY));
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["bias"] = json!("all");
    let mut tensors = Tensors::parse(&model);
    let bias = (Dtype::F32, vec![2], vec![7; 8]);
    tensors.0.insert("base_model.model.model.layers.0.mlp.up_proj.bias".into(), bias);
    let file = AdapterFile::parse(config.to_string().as_bytes(), &tensors.bytes()).unwrap();
    assert!(file.base_tensors.contains_key("model.layers.0.mlp.up_proj.bias"));
    assert!(Tensors::parse(&file.to_bytes().unwrap().1).0 == tensors.0);
}

/// PEFT saves modules whose name ends with an entry of `modules_to_save`, and adapts none that has one as a part of its name.
#[test]
fn modules_to_save_by_the_end_of_their_name() {
    let (config, model) = files(&Path::new(DATA).join(LORA));
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["modules_to_save"] = json!(["norm", "_mlp"]);
    let mut tensors = Tensors::parse(&model);
    for name in ["model.norm.weight", "model.layers.0.input_layernorm.weight"] {
        tensors.0.insert(format!("base_model.model.{name}"), (Dtype::F32, vec![1], vec![0; 4]));
    }
    let file = AdapterFile::parse(config.to_string().as_bytes(), &tensors.bytes()).unwrap();
    assert_eq!(file.base_tensors.len(), 2);
    tensors.rename("base_model.model.model.norm.weight", "base_model.model.model.norms.weight");
    let refused = AdapterFile::parse(config.to_string().as_bytes(), &tensors.bytes());
    assert_refused("norms", refused, &["model.norms.weight"]);
}

/// The tensors of a base model, and their shapes.
fn base(name: &str) -> BTreeMap<String, Vec<usize>> {
    let tensors = Tensors::read(Path::new(DATA).join(name).join("base/model.safetensors")).0;
    tensors.into_iter().map(|(name, (_, shape, _))| (name, shape)).collect()
}

fn matches(file: &AdapterFile, base: &BTreeMap<String, Vec<usize>>) -> lora_kernels::Result<()> {
    file.match_base(base.iter().map(|(name, shape)| (name.as_str(), &shape[..])))
}

#[test]
fn adapters_match_their_base_and_no_other() {
    for folder in folders() {
        let model = folder.parent().unwrap().file_name().unwrap().to_str().unwrap();
        let file = peft::load(&folder).unwrap();
        matches(&file, &base(model)).unwrap();
        let other = matches(&file, &base(if model == "gpt2" { "llama" } else { "gpt2" }));
        let message = other.unwrap_err().to_string();
        for module in file.adapters.keys() {
            assert!(message.contains(&format!("{module}.weight")), "{message}");
        }
    }
}

#[test]
fn adapters_for_modules_that_are_not_there_are_all_listed() {
    let file = load(LORA);
    let mut base = base("llama");
    base.remove("model.layers.0.self_attn.q_proj.weight");
    base.insert("model.layers.1.mlp.up_proj.weight".into(), vec![96, 65]);
    let error = matches(&file, &base).unwrap_err();
    assert!(matches!(error, Error::Argument { .. }));
    let message = error.to_string();
    assert!(message.contains("model.layers.0.self_attn.q_proj.weight [64, 64] (not there)"), "{message}");
    assert!(message.contains("model.layers.1.mlp.up_proj.weight [96, 64] (it is [96, 65])"), "{message}");
    assert!(!message.contains("k_proj"), "{message}");
}

/// PEFT fails to load what lacks a tensor of a module that was trained whole, and so it is refused here, by name.
#[test]
fn modules_to_save_that_are_not_saved_are_all_listed() {
    let mut file = load("llama/embed_and_head");
    let mut base = base("llama");
    matches(&file, &base).unwrap();
    file.base_tensors.remove("lm_head.weight");
    let error = matches(&file, &base).unwrap_err();
    let wanted = "base_tensors: wanted the tensors of modules_to_save [\"lm_head\"], got no lm_head.weight";
    assert_eq!(error.to_string(), wanted);
    // Not when the base does not have it: PEFT names heads of either name.
    base.remove("lm_head.weight");
    matches(&file, &base).unwrap();
    file.config.modules_to_save = vec!["input_layernorm".into(), "model.norm".into()];
    let message = matches(&file, &base).unwrap_err().to_string();
    for name in [
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    ] {
        assert!(message.contains(&format!("no {name}")), "{message}");
    }
    assert!(!message.contains("post_attention"), "{message}");
}

/// Opening a pipe would wait for ever for somebody who writes.
#[cfg(unix)]
#[test]
fn pipes_are_no_files() {
    let folder = Folder::new("pipes");
    let pipe = |inside: &str| {
        let path = folder.0.join(inside);
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        path
    };
    let refused = |path: PathBuf, open: fn(PathBuf) -> lora_kernels::Result<()>| {
        let (send, receive) = std::sync::mpsc::channel();
        let place = path.display().to_string();
        std::thread::spawn(move || send.send(open(path).unwrap_err().to_string()));
        let error = receive.recv_timeout(std::time::Duration::from_secs(20)).expect("an answer");
        assert!(
            error.starts_with(&place) && error.contains("wanted a file, got a folder or a device"),
            "{error}"
        );
    };
    let adapter = |path: PathBuf| peft::load(path.parent().unwrap()).map(drop);
    fs::create_dir_all(&folder.0).unwrap();
    refused(pipe(peft::CONFIG), adapter);
    let model = |path: PathBuf| bitsandbytes::Reader::open(path.parent().unwrap()).map(drop);
    let config = pipe("config.json");
    let base = Path::new(DATA).join("llama/base/model.safetensors");
    fs::copy(base, folder.0.join("model.safetensors")).unwrap();
    refused(config, model);
    refused(pipe("model.safetensors.index.json"), |path| bitsandbytes::Reader::open(path).map(drop));
}

/// An adapter made here: what its configuration does not say cannot be written.
#[test]
fn adapters_that_contradict_their_configuration_are_not_written() {
    let lora = |rank: usize, scaling: f64| {
        let a = Tensor::from_f32([rank, 6], &vec![0.5; 6 * rank], DType::BF16).unwrap();
        let b = Tensor::from_f32([4, rank], &vec![0.25; 4 * rank], DType::F32).unwrap();
        Lora::new(a, b, scaling).unwrap()
    };
    let file = |config: Config, lora: Lora| AdapterFile {
        config,
        adapters: [("h.0.mlp".to_owned(), lora.into())].into(),
        base_tensors: BTreeMap::new(),
    };
    let config = || Config::lora(2, 3.0, &["mlp"]).unwrap();
    let good = file(config(), lora(2, 1.5));
    let (json, model) = good.to_bytes().unwrap();
    assert_eq!(AdapterFile::parse(&json, &model).unwrap(), good);

    let pattern = Patterns::new([("mlp".to_owned(), 3)]).unwrap();
    file(Config { rank_pattern: pattern, ..config() }, lora(3, 1.0)).to_bytes().unwrap();
    for (case, bad) in [
        ("rank", file(config(), lora(3, 1.0))),
        ("scale", file(config(), lora(2, 1.0))),
        ("transposition", file(config(), lora(2, 1.5).with_fan_in_fan_out(true))),
        ("target", file(Config::lora(2, 3.0, &["attn"]).unwrap(), lora(2, 1.5))),
        ("rsLoRA", file(Config { use_rslora: true, ..config() }, lora(2, 1.5))),
    ] {
        let folder = Folder::new("contradiction");
        assert!(matches!(bad.save(&folder.0), Err(Error::Argument { .. })), "{case}");
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 0, "{case}: nothing is written");
    }
}
