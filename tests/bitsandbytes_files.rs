//! bitsandbytes checkpoints: what is read, what is written, and what is refused.

mod mutate;

use std::fs;
use std::path::PathBuf;

use lora_kernels::formats::bitsandbytes::{self, Checkpoint, Parameter, Reader, SaveOptions, Storage};
use lora_kernels::formats::safetensors::Layout;
use lora_kernels::nf4::{Absmax, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Error, Tensor};
use mutate::{Folder, Tensors, assert_refused, edit_header, file};
use safetensors::Dtype;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/nf4_checkpoint");
const FOLDERS: [&str; 3] = ["hf_dq_bf16", "hf_dq_bf16_storage_bf16", "hf_nodq_f16"];

fn data(name: &str) -> PathBuf {
    PathBuf::from(DATA).join(name)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// What bitsandbytes decoded, by the hashes of the sidecar.
fn assert_decodes_as(sidecar: &str, checkpoint: &Checkpoint) {
    let sidecar: Value = serde_json::from_slice(&fs::read(data(sidecar)).unwrap()).unwrap();
    let cases = sidecar["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let weight = &checkpoint.nf4[&format!("{}.weight", case["name"].as_str().unwrap())];
        assert_eq!(json!(weight.shape()), json!([case["N"], case["K"]]));
        assert_eq!(json!(weight.blocksize()), case["blocksize"]);
        assert_eq!(json!(matches!(weight.absmax(), Absmax::Nested(_))), case["nested"]);
        let f32s = weight.dequantize::<f32>();
        assert_eq!(sha256(bytemuck::cast_slice(&f32s)), case["dequant_f32_sha256"], "{case}");
        let own = weight.dequantize_tensor();
        assert_eq!(sha256(own.as_bytes()), case["dequant_in_quant_state_dtype_sha256"], "{case}");
    }
}

#[test]
fn weights_decode_as_bitsandbytes_decodes_them() {
    for folder in FOLDERS {
        let checkpoint = bitsandbytes::load(data(folder)).unwrap();
        assert_eq!((checkpoint.nf4.len(), checkpoint.raw.len()), (14, 0));
        assert_decodes_as(&format!("{folder}.io.json"), &checkpoint);
    }
    assert_decodes_as("bare.io.json", &bitsandbytes::load(data("bare.safetensors")).unwrap());
}

/// What is not quantised, by the reference implementation of the container.
#[test]
fn dense_tensors_are_all_there() {
    for folder in FOLDERS {
        let checkpoint = bitsandbytes::load(data(folder)).unwrap();
        let tensors = Tensors::read(data(folder).join("model.safetensors")).0;
        let described = |name: &str| name.contains(".weight.") || checkpoint.nf4.contains_key(name);
        let dense: Vec<_> = tensors.iter().filter(|(name, _)| !described(name)).collect();
        assert_eq!(dense.len(), checkpoint.dense.len());
        for (name, (_, shape, bytes)) in dense {
            let tensor = &checkpoint.dense[name];
            assert_eq!((tensor.shape(), tensor.as_bytes()), (&shape[..], &bytes[..]), "{name}");
        }
    }
}

/// What transformers and bitsandbytes wrote, read and written again, is the same bytes: no tensor, name, type or JSON key is
/// lost.
#[test]
fn round_trip_is_byte_for_byte() {
    let files = FOLDERS.map(|folder| format!("{folder}/model.safetensors"));
    for name in files.iter().map(String::as_str).chain(["bare.safetensors"]) {
        let bytes = fs::read(data(name)).unwrap();
        assert!(Reader::parse(name, &bytes).unwrap().load().unwrap().to_bytes().unwrap() == bytes, "{name}");
    }
}

#[test]
fn a_saved_folder_loads_as_the_same_checkpoint() {
    for folder in FOLDERS {
        let checkpoint = bitsandbytes::load(data(folder)).unwrap();
        let single = Folder::new(&format!("single-{folder}"));
        checkpoint.save(&single.0, &SaveOptions::default()).unwrap();
        assert_eq!(bitsandbytes::load(&single.0).unwrap(), checkpoint);

        let sharded = Folder::new(&format!("sharded-{folder}"));
        let options = SaveOptions { max_shard_bytes: Some(60_000), ..SaveOptions::default() };
        checkpoint.save(&sharded.0, &options).unwrap();
        let index = sharded.0.join("model.safetensors.index.json");
        assert_eq!(bitsandbytes::load(&sharded.0).unwrap(), checkpoint);
        assert_eq!(bitsandbytes::load(&index).unwrap(), Checkpoint { config: None, ..checkpoint.clone() });
        let map: Value = serde_json::from_slice(&fs::read(index).unwrap()).unwrap();
        let shards = fs::read_dir(&sharded.0)
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "safetensors"));
        assert_eq!(shards.count(), 4);
        assert_eq!(map["weight_map"]["lm_head.weight"], "model-00001-of-00004.safetensors");

        let both = checkpoint.save(&sharded.0, &SaveOptions::default());
        assert!(matches!(both, Err(Error::Argument { .. })), "two forms of the model in one folder");
    }
}

/// Every storage type is another name for the same bytes; `config.json` says which.
#[test]
fn storage_types_are_views() {
    let checkpoint = bitsandbytes::load(data("hf_dq_bf16")).unwrap();
    for storage in [Storage::U8, Storage::BF16, Storage::F16, Storage::F32] {
        let folder = Folder::new(storage.name());
        checkpoint.save(&folder.0, &SaveOptions { storage: Some(storage), max_shard_bytes: None }).unwrap();
        let back = bitsandbytes::load(&folder.0).unwrap();
        assert_eq!((back.storage, &back.nf4), (storage, &checkpoint.nf4));
        assert_eq!(back.config.unwrap()["quantization_config"]["bnb_4bit_quant_storage"], storage.name());
        if storage == Storage::BF16 {
            let reference = fs::read(data("hf_dq_bf16_storage_bf16/model.safetensors")).unwrap();
            let config = fs::read(data("hf_dq_bf16_storage_bf16/config.json")).unwrap();
            let ours = fs::read(folder.0.join("config.json")).unwrap();
            let value = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
            assert_eq!(value(&ours), value(&config));
            let name = "model.layers.0.mlp.up_proj.weight";
            let ours = Tensors::read(folder.0.join("model.safetensors")).0[name].clone();
            assert_eq!((ours.0, &ours.1[..]), (Dtype::BF16, &[6144, 1][..]));
            assert_eq!(Tensors::parse(&reference).0[name].1, ours.1);
        }
    }
}

/// A weight of every kind that bitsandbytes can store.
fn every_kind() -> Checkpoint {
    let values: Vec<f32> = (0..35 * 27).map(|i| (i as f32 * 0.37).sin() * (1.0 + i as f32 * 0.01)).collect();
    let mut checkpoint = Checkpoint::default();
    for (quant_type, codebook) in [("nf4", Codebook::nf4()), ("fp4", Codebook::fp4())] {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            for dtype in DType::ALL {
                for (shape, blocksize) in [(vec![35, 27], 32), (vec![945], 4096), (vec![3, 5, 9, 7], 64)] {
                    let name = format!("{quant_type}.{nesting:?}.{dtype}.{blocksize}");
                    let tensor = Tensor::from_f32(shape, &values, dtype).unwrap();
                    let matrix = Nf4Matrix::quantize_tensor(&tensor, blocksize, &codebook, nesting).unwrap();
                    checkpoint.nf4.insert(name, matrix);
                }
            }
        }
    }
    checkpoint
}

#[test]
fn every_kind_of_weight_survives() {
    let checkpoint = every_kind();
    let bytes = checkpoint.to_bytes().unwrap();
    assert_eq!(Reader::parse("memory", &bytes).unwrap().load().unwrap(), checkpoint);
}

/// Tensors of other types are kept, as bytes.
#[test]
fn other_types_are_kept() {
    let mut tensors = Tensors::read(data("bare.safetensors"));
    for (i, dtype) in [Dtype::I64, Dtype::BOOL, Dtype::F64, Dtype::F8_E4M3, Dtype::U8].into_iter().enumerate()
    {
        tensors.0.insert(format!("other.{i}"), (dtype, vec![2, 3], vec![i as u8; 6 * dtype.bitsize() / 8]));
    }
    tensors.0.insert("empty".into(), (Dtype::F16, vec![0, 3], vec![]));
    let checkpoint = Reader::parse("memory", &tensors.bytes()).unwrap().load().unwrap();
    assert_eq!(checkpoint.raw.len(), 5);
    assert_eq!(checkpoint.dense["empty"].shape(), [0, 3]);
    assert!(Tensors::parse(&checkpoint.to_bytes().unwrap()).0 == tensors.0);
}

/// The codes are decoded by the table that is stored with them, not by the name of its type.
#[test]
fn the_stored_tables_count() {
    let mut tensors = Tensors::read(data("bare.safetensors"));
    tensors.set_f32("proj_a.weight.quant_map", 3, -0.375);
    tensors.set_f32("proj_a.weight.nested_quant_map", 200, 0.625);
    let bytes = tensors.bytes();
    let checkpoint = Reader::parse("memory", &bytes).unwrap().load().unwrap();
    let weight = &checkpoint.nf4["proj_a.weight"];
    let Absmax::Nested(nested) = weight.absmax() else { panic!("nested") };
    assert_eq!((weight.codebook().values()[3], nested.map()[200]), (-0.375, 0.625));
    // bitsandbytes would decode it by its own table.
    assert!(matches!(checkpoint.to_bytes(), Err(Error::Unsupported { .. })));
}

#[test]
fn reading_one_tensor_at_a_time() {
    let reader = Reader::open(data("hf_nodq_f16")).unwrap();
    let parameter = &reader.parameters()["model.layers.1.mlp.up_proj.weight"];
    assert_eq!(parameter.shape(), [192, 128]);
    assert!(
        matches!(parameter, Parameter::Nf4 { state, .. } if state.dtype == DType::F16 && state.nested.is_none())
    );
    assert_eq!(reader.dense("lm_head.weight").unwrap().shape(), [97, 128]);
    for wrong in [reader.dense("model.layers.1.mlp.up_proj.weight").err(), reader.nf4("lm_head.weight").err()]
    {
        assert!(matches!(wrong, Some(Error::Argument { .. })), "{wrong:?}");
    }
}

/// A change to the file, and what its error must name.
type Case = (&'static str, fn(&mut Tensors), &'static [&'static str]);

const STATE: &str = "proj_a.weight.quant_state.bitsandbytes__nf4";

const BAD: &[Case] = &[
    ("truncated weight", |t| t.resize("proj_a.weight", -1), &["model: proj_a.weight:", "6144 bytes"]),
    ("padded weight", |t| t.resize("proj_a.weight", 1), &["model: proj_a.weight:", "6144 bytes"]),
    ("weight of another type", |t| t.get("proj_a.weight").0 = Dtype::I8, &["proj_a.weight:", "I8"]),
    ("weight in two columns", |t| t.get("proj_a.weight").1 = vec![3072, 2], &["proj_a.weight:", "[3072, 2]"]),
    ("transposed weight", |t| t.get("proj_a.weight").1 = vec![1, 6144], &["proj_a.weight:", "[1, 6144]"]),
    ("no weight", |t| drop(t.0.remove("proj_a.weight")), &["proj_a.weight", "none"]),
    ("short absmax", |t| t.resize("proj_c.weight.absmax", -1), &["proj_c.weight.absmax", "F32 [94]", "[93]"]),
    ("long absmax", |t| t.resize("proj_a.weight.absmax", 1), &["proj_a.weight.absmax", "U8 [192]", "[193]"]),
    ("no absmax", |t| drop(t.0.remove("proj_a.weight.absmax")), &["proj_a.weight.absmax", "none"]),
    (
        "absmax in bf16",
        |t| {
            let (dtype, _, bytes) = t.get("proj_c.weight.absmax");
            *dtype = Dtype::BF16;
            bytes.truncate(2 * 94);
        },
        &["proj_c.weight.absmax", "BF16"],
    ),
    (
        "NaN in absmax",
        |t| t.set_f32("proj_c.weight.absmax", 7, f32::NAN),
        &["proj_c.weight.absmax", "NaN at 7"],
    ),
    ("short quant_map", |t| t.resize("proj_a.weight.quant_map", -1), &["proj_a.weight.quant_map", "[16]"]),
    (
        "infinity in quant_map",
        |t| t.set_f32("proj_a.weight.quant_map", 15, f32::INFINITY),
        &["quant_map", "inf at 15"],
    ),
    ("no quant_map", |t| drop(t.0.remove("proj_a.weight.quant_map")), &["proj_a.weight.quant_map", "none"]),
    (
        "no nested_absmax",
        |t| drop(t.0.remove("proj_a.weight.nested_absmax")),
        &["proj_a.weight.nested_absmax"],
    ),
    (
        "long nested_absmax",
        |t| t.resize("proj_a.weight.nested_absmax", 1),
        &["proj_a.weight.nested_absmax", "F32 [1]"],
    ),
    (
        "negative nested_absmax",
        |t| t.set_f32("proj_a.weight.nested_absmax", 0, -1.0),
        &["nested_absmax", "-1 at 0"],
    ),
    (
        "infinite nested_absmax",
        |t| t.set_f32("proj_a.weight.nested_absmax", 0, f32::INFINITY),
        &["nested_absmax", "inf"],
    ),
    (
        "short nested_quant_map",
        |t| t.resize("proj_a.weight.nested_quant_map", -1),
        &["nested_quant_map", "[256]"],
    ),
    (
        "nested tensors without nested quant_state",
        |t| {
            t.0.insert("proj_c.weight.nested_absmax".into(), (Dtype::F32, vec![1], vec![0; 4]));
        },
        &["proj_c.weight.nested_absmax"],
    ),
    ("no quant_state", |t| drop(t.0.remove(STATE)), &["proj_a.weight.", "quant_state"]),
    (
        "two quant_states",
        |t| {
            let state = t.0[STATE].clone();
            t.0.insert(STATE.replace("nf4", "fp4"), state);
        },
        &["one quant_state", "bitsandbytes__nf4"],
    ),
    (
        "unknown quant_type in the name",
        |t| t.rename(STATE, "proj_a.weight.quant_state.bitsandbytes__nf3"),
        &["nf3"],
    ),
    (
        "quant_state of another package",
        |t| t.rename(STATE, "proj_a.weight.quant_state"),
        &["proj_a.weight.quant_state"],
    ),
    (
        "name and text disagree",
        |t| t.rename(STATE, "proj_a.weight.quant_state.bitsandbytes__fp4"),
        &["quant_type", "fp4"],
    ),
    ("unknown quant_type", |t| t.edit(STATE, "\"nf4\"", "\"nf3\""), &[STATE, "quant_type", "nf3"]),
    (
        "the table of the other quant_type",
        |t| {
            t.rename(STATE, "proj_a.weight.quant_state.bitsandbytes__fp4");
            t.edit("proj_a.weight.quant_state.bitsandbytes__fp4", "\"nf4\"", "\"fp4\"");
        },
        &["proj_a.weight.quant_map", "Fp4"],
    ),
    ("not UTF-8", |t| t.get(STATE).2[3] = 0xff, &[STATE, "UTF-8"]),
    ("not JSON", |t| t.edit(STATE, "{", "("), &[STATE, "JSON"]),
    ("a list", |t| t.edit(STATE, t_text(), "[]"), &[STATE, "a list"]),
    ("JSON cut off", |t| t.resize(STATE, -1), &[STATE, "JSON"]),
    (
        "a key twice",
        |t| t.edit(STATE, "\"dtype\"", "\"blocksize\": 64, \"dtype\""),
        &[STATE, "\"blocksize\" twice"],
    ),
    (
        "an unknown key",
        |t| t.edit(STATE, "\"dtype\"", "\"zero_point\": 1, \"dtype\""),
        &[STATE, "zero_point"],
    ),
    ("no quant_type", |t| t.edit(STATE, "\"quant_type\": \"nf4\", ", ""), &["quant_type", "none"]),
    ("no blocksize", |t| t.edit(STATE, "\"blocksize\": 64, \"d", "\"d"), &["blocksize", "none"]),
    ("no dtype", |t| t.edit(STATE, "\"dtype\": \"float32\", \"shape", "\"shape"), &["dtype", "none"]),
    ("no shape", |t| t.edit(STATE, ", \"shape\": [96, 128]", ""), &["shape", "null"]),
    ("null shape", |t| t.edit(STATE, "[96, 128]", "null"), &["shape", "null"]),
    (
        "blocksize 16",
        |t| t.edit(STATE, "\"blocksize\": 64", "\"blocksize\": 16"),
        &[STATE, "blocksize", "16"],
    ),
    (
        "blocksize 96",
        |t| t.edit(STATE, "\"blocksize\": 64", "\"blocksize\": 96"),
        &[STATE, "blocksize", "96"],
    ),
    ("blocksize 8192", |t| t.edit(STATE, "\"blocksize\": 64", "\"blocksize\": 8192"), &["blocksize", "8192"]),
    ("blocksize 0", |t| t.edit(STATE, "\"blocksize\": 64", "\"blocksize\": 0"), &["blocksize"]),
    (
        "negative blocksize",
        |t| t.edit(STATE, "\"blocksize\": 64", "\"blocksize\": -64"),
        &["blocksize", "-64"],
    ),
    (
        "another blocksize",
        |t| t.edit(STATE, "\"blocksize\": 64", "\"blocksize\": 128"),
        &["absmax", "U8 [96]"],
    ),
    (
        "unknown dtype",
        |t| t.edit(STATE, "\"dtype\": \"float32\", \"s", "\"dtype\": \"float64\", \"s"),
        &["dtype", "float64"],
    ),
    ("smaller shape", |t| t.edit(STATE, "[96, 128]", "[96, 127]"), &["proj_a.weight:", "[96, 127]"]),
    (
        "shape that overflows",
        |t| t.edit(STATE, "[96, 128]", "[1099511627776, 1099511627776]"),
        &["shape", "1099511627776"],
    ),
    (
        "huge shape",
        |t| t.edit(STATE, "[96, 128]", "[1099511627776, 96]"),
        &["proj_a.weight:", "1099511627776"],
    ),
    ("shape beyond u64", |t| t.edit(STATE, "[96, 128]", "[1e30, 1]"), &["shape", "1e"]),
    ("negative shape", |t| t.edit(STATE, "[96, 128]", "[-96, -128]"), &["shape", "-96"]),
    ("zero-size shape", |t| t.edit(STATE, "[96, 128]", "[0, 128]"), &["shape", "above 0"]),
    ("no dimension", |t| t.edit(STATE, "[96, 128]", "[]"), &["shape", "above 0"]),
    (
        "nested blocksize 0",
        |t| t.edit(STATE, "\"nested_blocksize\": 256", "\"nested_blocksize\": 0"),
        &["nested_blocksize"],
    ),
    (
        "nested dtype",
        |t| t.edit(STATE, "\"nested_dtype\": \"float32\"", "\"nested_dtype\": \"bfloat16\""),
        &["nested_dtype"],
    ),
    (
        "no offset",
        |t| t.edit(STATE, ", \"nested_offset\": 0.2081007957458496", ""),
        &["nested_offset", "none"],
    ),
    ("NaN offset", |t| t.edit(STATE, "0.2081007957458496", "NaN"), &[STATE]),
    ("offset beyond f32", |t| t.edit(STATE, "0.2081007957458496", "1e300"), &["nested_offset"]),
    (
        "nested keys without nested tensors",
        |t| {
            t.edit("proj_c.weight.quant_state.bitsandbytes__nf4", "}", ", \"nested_blocksize\": 256}");
        },
        &["proj_c", "nested"],
    ),
    ("orphan", |t| t.rename("proj_a.bias", "elsewhere.weight.absmax"), &["elsewhere.weight.absmax", "none"]),
    ("8-bit", |t| t.rename("proj_a.bias", "elsewhere.SCB"), &["elsewhere.SCB", "LLM.int8"]),
];

/// The text of [`STATE`].
const fn t_text() -> &'static str {
    "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float32\", \"shape\": [96, 128], \"nested_blocksize\": 256, \
     \"nested_dtype\": \"float32\", \"nested_offset\": 0.2081007957458496}"
}

#[test]
fn contradictions_are_refused_by_name() {
    let good = Tensors::read(data("bare.safetensors"));
    for (case, change, parts) in BAD {
        let mut tensors = good.clone();
        change(&mut tensors);
        let bytes = tensors.bytes();
        assert_refused(case, Reader::parse("model", &bytes).and_then(Reader::load), parts);
    }
}

/// The container's own lies: in memory and from disk.
#[test]
fn broken_containers_are_refused() {
    let good = fs::read(data("bare.safetensors")).unwrap();
    let header_length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let entry = r#""proj_a.bias":{"dtype":"F32","shape":[96],"data_offsets":[0,384]}"#;
    let with = |to: &str| edit_header(&good, |header| header.replace(entry, to));
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["0 bytes"]),
        ("seven bytes", good[..7].to_vec(), &["7 bytes"]),
        ("header cut off", good[..header_length].to_vec(), &["a header of at most"]),
        ("data cut off", good[..good.len() - 1].to_vec(), &["data_offsets"]),
        ("data padded", [&good[..], &[0]].concat(), &["bytes of tensors"]),
        ("length of u64::MAX", [&u64::MAX.to_le_bytes(), &good[8..]].concat(), &["18446744073709551615"]),
        ("header not UTF-8", [&good[..9], &[0xff], &good[10..]].concat(), &["UTF-8"]),
        ("header not JSON", edit_header(&good, |h| h.replacen('{', "[", 1)), &["JSON"]),
        ("header deeper than the stack", file(&"[".repeat(1_000_000), &[]), &["JSON"]),
        ("a name twice", with(&format!("{entry},{entry}")), &["proj_a.bias", "twice"]),
        ("unknown dtype", with(&entry.replace("F32", "F33")), &["proj_a.bias", "dtype", "F33"]),
        ("dtype of another size", with(&entry.replace("F32", "F64")), &["proj_a.bias", "F64 [96]"]),
        ("no shape", with(&entry.replace(r#""shape":[96],"#, "")), &["proj_a.bias", "shape"]),
        (
            "an unknown key",
            with(&entry.replace("\"shape\"", "\"strides\":[1],\"shape\"")),
            &["proj_a.bias", "strides"],
        ),
        (
            "shape that overflows",
            with(&entry.replace("[96]", "[1099511627776,1099511627776]")),
            &["proj_a.bias", "shape"],
        ),
        (
            "bytes that overflow",
            with(&entry.replace("[96]", "[4611686018427387904]")),
            &["proj_a.bias", "shape"],
        ),
        (
            "rows that overflow, of which there are none",
            with(&format!(
                r#""none":{{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}},{entry}"#
            )),
            &["none", "shape"],
        ),
        (
            "offsets beyond the file",
            with(&entry.replace("[0,384]", "[0,99999999]")),
            &["proj_a.bias", "data_offsets"],
        ),
        ("offsets beyond u64", with(&entry.replace("[0,384]", "[0,1e30]")), &["proj_a.bias", "data_offsets"]),
        (
            "offsets the wrong way",
            with(&entry.replace("[0,384]", "[384,0]")),
            &["proj_a.bias", "data_offsets"],
        ),
        ("a gap", with(&entry.replace("[0,384]", "[4,388]")), &["proj_a.bias", "data_offsets"]),
        (
            "an overlap",
            with(&entry.replace("[96],\"data_offsets\":[0,384]", "[97],\"data_offsets\":[0,388]")),
            &["data_offsets"],
        ),
        ("a tensor that is no object", with(r#""proj_a.bias":[0,384]"#), &["proj_a.bias", "a list"]),
    ];
    let folder = Folder::new("containers");
    for (case, bytes, parts) in cases {
        assert_ne!(bytes, good, "{case}");
        assert_refused(case, Reader::parse("model", &bytes).and_then(Reader::load), parts);
        let path = folder.0.join("model.safetensors");
        fs::write(&path, &bytes).unwrap();
        assert_refused(case, bitsandbytes::load(&path), &[parts, &["model.safetensors"]].concat());
    }
    let path = folder.0.join("model.safetensors");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_refused("a folder", bitsandbytes::load(&folder.0), &["model.safetensors", "a file"]);
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let folder = Folder::new("shrinks");
    let path = folder.0.join("model.safetensors");
    fs::copy(data("bare.safetensors"), &path).unwrap();
    let reader = Reader::open(&path).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(3000).unwrap();
    assert!(matches!(reader.load(), Err(Error::Io { .. })));
}

#[test]
fn indexes_that_do_not_fit_their_shards_are_refused() {
    let folder = Folder::new("index");
    let options = SaveOptions { max_shard_bytes: Some(60_000), ..SaveOptions::default() };
    bitsandbytes::load(data("hf_dq_bf16")).unwrap().save(&folder.0, &options).unwrap();
    let path = folder.0.join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let refused = |case: &str, change: &dyn Fn(&mut Value), parts: &[&str]| {
        let mut index = good.clone();
        change(&mut index);
        fs::write(&path, index.to_string()).unwrap();
        assert_refused(case, bitsandbytes::load(&folder.0), parts);
    };
    let map = |index: &mut Value| index["weight_map"].as_object_mut().unwrap().clone();
    refused("no map", &|i| drop(i.as_object_mut().unwrap().remove("weight_map")), &["weight_map"]);
    refused(
        "in another shard",
        &|i| i["weight_map"]["lm_head.weight"] = json!("model-00002-of-00004.safetensors"),
        &["weight_map", "lm_head.weight", "model-00001-of-00004.safetensors"],
    );
    refused(
        "a tensor too many",
        &|i| i["weight_map"]["ghost"] = json!("model-00001-of-00004.safetensors"),
        &["ghost"],
    );
    refused(
        "a tensor too few",
        &|i| {
            let mut short = map(i);
            short.remove("lm_head.weight");
            i["weight_map"] = Value::Object(short);
        },
        &["weight_map", "lm_head.weight"],
    );
    for outside in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", ".."] {
        refused(outside, &|i| i["weight_map"]["lm_head.weight"] = json!(outside), &["beside the index"]);
    }
    fs::write(&path, good.to_string()).unwrap();
    fs::remove_file(folder.0.join("model-00003-of-00004.safetensors")).unwrap();
    assert!(matches!(bitsandbytes::load(&folder.0), Err(Error::Io { .. })));
}

/// The same tensor in two shards, or twice in the index.
#[test]
fn duplicates_over_shards_are_refused() {
    let folder = Folder::new("duplicates");
    let tensor = |name: &str| (name.to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
    fs::write(folder.0.join("a.safetensors"), Tensors([tensor("x")].into()).bytes()).unwrap();
    fs::write(folder.0.join("b.safetensors"), Tensors([tensor("x"), tensor("y")].into()).bytes()).unwrap();
    let path = folder.0.join("model.safetensors.index.json");
    let load = |map: &str| {
        fs::write(&path, format!(r#"{{"weight_map": {map}}}"#)).unwrap();
        bitsandbytes::load(&path)
    };
    assert!(load(r#"{"x": "a.safetensors"}"#).is_ok());
    assert_refused(
        "in both",
        load(r#"{"x": "a.safetensors", "y": "b.safetensors"}"#),
        &["weight_map", "wanted x"],
    );
    assert_refused("twice", load(r#"{"x": "a.safetensors", "x": "b.safetensors"}"#), &["\"x\" twice"]);
}

#[test]
fn config_must_agree_with_the_weights() {
    let refused = |key: &str, value: Value, parts: &[&str]| {
        let folder = Folder::new(&format!("config-{key}"));
        fs::copy(data("hf_dq_bf16/model.safetensors"), folder.0.join("model.safetensors")).unwrap();
        let mut config: Value =
            serde_json::from_slice(&fs::read(data("hf_dq_bf16/config.json")).unwrap()).unwrap();
        config["quantization_config"][key] = value;
        fs::write(folder.0.join("config.json"), config.to_string()).unwrap();
        assert_refused(key, bitsandbytes::load(&folder.0), parts);
    };
    refused("quant_method", json!("gptq"), &["quant_method", "gptq"]);
    refused("load_in_8bit", json!(true), &["load_in_8bit"]);
    refused("bnb_4bit_quant_type", json!("fp4"), &["bnb_4bit_quant_type", "fp4"]);
    refused("bnb_4bit_use_double_quant", json!(false), &["bnb_4bit_use_double_quant", "false"]);
    refused("bnb_4bit_quant_storage", json!("float32"), &["bnb_4bit_quant_storage", "float32"]);
}

/// What cannot be written so that it reads back as it was.
#[test]
fn unwritable_checkpoints_are_refused() {
    let refused = |case: &str, checkpoint: Checkpoint| {
        let folder = Folder::new("unwritable");
        let result = checkpoint.save(&folder.0, &SaveOptions::default());
        assert!(result.is_err(), "{case}");
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 0, "{case}: nothing is written");
    };
    let weight = |values: &[f32], shape: &[usize], nesting| {
        Nf4Matrix::quantize(values, shape, 64, &Codebook::nf4(), nesting).unwrap()
    };
    let nan = [1.0, f32::NAN, 2.0, 3.0];
    let one =
        |name: &str, matrix| Checkpoint { nf4: [(name.to_owned(), matrix)].into(), ..Checkpoint::default() };
    refused("NaN", one("w", weight(&nan, &[2, 2], Nesting::Plain)));
    refused("NaN, nested", one("w", weight(&nan, &[2, 2], Nesting::Nested)));
    refused("no elements", one("w", weight(&[], &[0, 2], Nesting::Plain)));
    let good = one("w", weight(&[1.0; 6], &[2, 3], Nesting::Plain));
    refused("odd bytes in bf16", Checkpoint { storage: Storage::BF16, ..good.clone() });
    let dense = Tensor::from_f32([1], &[0.0], DType::F32).unwrap();
    for name in ["w", "w.absmax", "v.absmax", "v.SCB", "v.quant_state.bitsandbytes__nf4"] {
        refused(name, Checkpoint { dense: [(name.to_owned(), dense.clone())].into(), ..good.clone() });
    }
}

/// Parts of weights, as a model larger than memory is walked through.
#[test]
fn rows_are_those_of_the_whole() {
    for folder in FOLDERS {
        let (reader, whole) =
            (Reader::open(data(folder)).unwrap(), bitsandbytes::load(data(folder)).unwrap());
        for (name, weight) in &whole.nf4 {
            let &[n, k] = weight.shape() else { panic!("a matrix") };
            // 192 and 128 columns: every row begins with a block.
            for rows in [0..n, 0..1, 1..4, n - 3..n, n..n] {
                let part = reader.nf4_rows(name, rows.clone()).unwrap();
                assert_eq!((part.shape(), part.dtype()), (&[rows.len(), k][..], weight.dtype()));
                assert!(matches!(part.absmax(), Absmax::Plain(_)));
                assert_eq!(part.packed(), &weight.packed()[rows.start * k / 2..rows.end * k / 2]);
                let blocks = rows.start * k / 64..rows.end * k / 64;
                assert_eq!(part.absmax().dequantize()[..], weight.absmax().dequantize()[blocks]);
                assert_eq!(part.codebook(), weight.codebook());
            }
        }
        for (name, tensor) in &whole.dense {
            let count = tensor.shape()[0];
            for rows in [0..count, 1..2, count - 2..count, count..count] {
                assert_eq!(reader.dense_rows(name, rows.clone()).unwrap(), tensor.rows(rows).unwrap());
            }
        }
    }
    // A block of 64 spans rows of 100.
    let reader = Reader::open(data("bare.safetensors")).unwrap();
    assert_eq!(reader.nf4_rows("proj_c.weight", 16..60).unwrap().shape(), [44, 100]);
    let refusal = |result: lora_kernels::Result<Nf4Matrix>| result.unwrap_err().to_string();
    let error = refusal(reader.nf4_rows("proj_c.weight", 1..60));
    assert!(error.starts_with("rows: wanted a start at a multiple of 64"), "{error}");
    assert!(refusal(reader.nf4_rows("proj_c.weight", 0..61)).starts_with("rows: wanted"));
    assert!(refusal(reader.nf4_rows("nothing", 0..1)).starts_with("name: wanted a 4-bit weight"));
    assert!(reader.dense_rows("proj_c.bias", 3..61).unwrap_err().to_string().starts_with("rows: wanted"));
    assert!(
        reader
            .read_part("proj_c.weight", 2990, &mut [0; 11])
            .unwrap_err()
            .to_string()
            .starts_with("into: wanted")
    );
}

#[test]
fn the_tensors_of_a_parameter_are_its_own() {
    let reader = Reader::open(data("hf_dq_bf16")).unwrap();
    let all: usize = reader.parameters().keys().map(|name| reader.tensors(name).unwrap().len()).sum();
    assert_eq!(all, reader.files().iter().map(|file| file.entries().len()).sum::<usize>());
    let name = "model.layers.0.mlp.up_proj.weight";
    let Parameter::Nf4 { state, storage } = &reader.parameters()[name] else { panic!("a 4-bit weight") };
    let mut wanted = bitsandbytes::tensors_of(name, state, *storage).unwrap();
    for (name, dtype, shape) in &wanted {
        let entry = reader.entry(name).unwrap();
        assert_eq!((entry.dtype, &entry.shape), (*dtype, shape), "{name}");
    }
    wanted.sort();
    assert_eq!(
        wanted.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>(),
        reader.tensors(name).unwrap()
    );
    // And what is in them, but for the codes.
    let weight = reader.nf4(name).unwrap();
    let companions = bitsandbytes::companions(name, state, weight.codebook(), weight.absmax()).unwrap();
    assert_eq!(companions.len(), wanted.len() - 1);
    for (name, raw) in companions {
        let mut bytes = vec![0; raw.bytes.len()];
        reader.read_part(&name, 0, &mut bytes).unwrap();
        assert_eq!(raw.bytes, bytes, "{name}");
    }
    assert!(reader.tensors("nothing").is_err());
}

/// A file that is written in pieces is one that the reference implementation reads.
#[test]
fn a_layout_is_a_file() {
    let tensors = || {
        [
            ("b", Dtype::BF16, vec![2, 3]),
            ("a", Dtype::F32, vec![]),
            ("c", Dtype::U8, vec![0, 4]),
            ("d", Dtype::U8, vec![5]),
        ]
        .map(|(name, dtype, shape)| (name.to_owned(), dtype, shape))
    };
    for min_header in [0, 500] {
        let layout = Layout::new(tensors(), min_header).unwrap();
        assert!(layout.header().len() >= min_header && layout.header().len().is_multiple_of(8));
        let mut file = vec![0; layout.len() as usize];
        file[..layout.header().len()].copy_from_slice(layout.header());
        for (i, (name, ..)) in tensors().iter().enumerate() {
            let range = layout.range(name).unwrap();
            file[range.start as usize..range.end as usize].fill(i as u8 + 1);
        }
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (i, (name, dtype, shape)) in tensors().into_iter().enumerate() {
            let view = read.tensor(&name).unwrap();
            assert_eq!((view.dtype(), view.shape()), (dtype, &shape[..]));
            assert!(view.data().iter().all(|byte| *byte == i as u8 + 1));
        }
        assert_eq!(layout.tensors().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
        assert_eq!(layout.range("e"), None);
    }
    let twice = Layout::new([("a".to_owned(), Dtype::U8, vec![1]), ("a".to_owned(), Dtype::U8, vec![1])], 0);
    assert!(twice.unwrap_err().to_string().starts_with("tensors: wanted one tensor a"));
    let large = Layout::new([("a".to_owned(), Dtype::F32, vec![usize::MAX / 2, 2])], 0);
    assert!(large.unwrap_err().to_string().starts_with("tensors[\"a\"]: wanted"));
}
