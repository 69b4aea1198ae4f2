//! Layers from folders: every kind of adapter that PEFT wrote, and every storage of bitsandbytes.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_kernels::adapter::Adapter;
use lora_kernels::formats::bitsandbytes::Reader;
use lora_kernels_candle::{AdapterIndex, Adapters, LoraLinear, MultiLoraLinear, QLoraLinear, Weight};

const CPU: Device = Device::Cpu;
/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

fn data(inside: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(inside)
}

fn vb(folder: &str) -> VarBuilder<'static> {
    // SAFETY: nobody changes the file while it is mapped.
    unsafe {
        VarBuilder::from_mmaped_safetensors(&[data(folder).join("model.safetensors")], DType::F32, &CPU)
    }
    .unwrap()
}

/// The message of what must fail, without the backtrace that candle may put behind it.
fn message<T: std::fmt::Debug>(result: candle_core::Result<T>) -> String {
    result.unwrap_err().to_string().lines().next().unwrap_or_default().to_owned()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// How far two f32 evaluations of an adapted layer may be from each other: each is off by at most the roundings on the way to an
/// output, times the sum of absolute values there. DoRA's factor f is a norm of k elements, each off by its roundings times the
/// condition of the row; PEFT computes `base + (f - 1) base + f lora`.
fn bound(adapter: &Adapter, weight: &[f64], x: &[f64], bias: Option<Vec<f64>>) -> Vec<f64> {
    let (n, k, rank) = (adapter.out_features(), adapter.in_features(), adapter.rank());
    let (a, b) = (adapter.lora_a().to_f64(), adapter.lora_b().to_f64());
    let mut a = a;
    if let Adapter::AdaLora(adalora) = adapter {
        a.chunks_mut(k)
            .zip(adalora.lora_e().to_f64())
            .for_each(|(row, e)| row.iter_mut().for_each(|v| *v *= e));
    }
    let term =
        |row: usize, r: usize, column: usize| adapter.scaling() * b[row * rank + r] * a[r * k + column];
    let rows = (0..n).map(|row| {
        let mut sizes = vec![0.0; k];
        let (mut sum, mut size) = (0.0, 0.0);
        for (column, total) in sizes.iter_mut().enumerate() {
            let w = weight[row * k + column];
            let terms = (0..rank).map(|r| term(row, r, column));
            let (delta, delta_size) = terms.fold((0.0, 0.0), |(d, s), t| (d + t, s + t.abs()));
            *total = w.abs() + delta_size;
            sum += (w + delta).powi(2);
            size += total.powi(2);
        }
        let roundings = (2 * k + 2 * rank + 16) as f64;
        match adapter {
            Adapter::Dora(dora) => {
                let f = dora.magnitude().to_f64()[row] / sum.sqrt();
                (sizes, roundings * (size / sum).sqrt() * (1.0 + (f - 1.0).abs()))
            }
            _ => (sizes, roundings),
        }
    });
    let rows: Vec<(Vec<f64>, f64)> = rows.collect();
    let output = |x: &[f64]| {
        let one = |(row, (sizes, roundings)): (usize, &(Vec<f64>, f64))| {
            let size: f64 = sizes.iter().zip(x).map(|(s, x)| s * x.abs()).sum();
            2.0 * roundings * U * (size + bias.as_ref().map_or(0.0, |bias| bias[row].abs()))
        };
        rows.iter().enumerate().map(one).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(output).collect()
}

#[test]
fn outputs_are_those_of_peft_for_every_kind_of_adapter() {
    let mut kinds = 0;
    for base in ["peft/llama/base", "peft/llama_bias/base"] {
        let root = data(base).parent().unwrap().to_owned();
        let entries =
            std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        for name in entries.filter(|name| name != "base" && root.join(name).is_dir()) {
            let adapters = Adapters::open(root.join(&name)).unwrap();
            let io = candle_core::safetensors::load(root.join(&name).join("io.safetensors"), &CPU).unwrap();
            let mut checked = 0;
            for (module, adapter) in &adapters.file().adapters {
                let (Some(x), Some(want)) =
                    (io.get(&format!("{module}.x")), io.get(&format!("{module}.y_adapted")))
                else {
                    continue;
                };
                let (n, k) = (adapter.out_features(), adapter.in_features());
                if matches!(adapter, Adapter::Embedding(_)) {
                    let layer = adapters.embedding(k, n, vb(base).pp(module)).unwrap();
                    let y = layer.forward(x).unwrap();
                    // Theirs and ours are off by the roundings of a sum of the row's element and of rank products.
                    let plain = vb(base).get((k, n), &format!("{module}.weight")).unwrap();
                    let plain = numbers(&candle_nn::Embedding::new(plain, n).forward(x).unwrap());
                    let (a, b, ids) = (adapter.lora_a().to_f64(), adapter.lora_b().to_f64(), numbers(x));
                    let rank = adapter.rank();
                    for (i, ((y, want), plain)) in
                        numbers(&y).iter().zip(numbers(want)).zip(plain).enumerate()
                    {
                        let (id, d) = (ids[i / n] as usize, i % n);
                        let delta: f64 = (0..rank).map(|r| (b[d * rank + r] * a[r * k + id]).abs()).sum();
                        let size = plain.abs() + adapter.scaling().abs() * delta;
                        let bound = 2.0 * (rank + 4) as f64 * U * size;
                        assert!(
                            (y - want).abs() <= bound,
                            "{name} {module}[{i}]: {y}, not {want} +- {bound:e}"
                        );
                    }
                    checked += 1;
                    continue;
                }
                let layer = LoraLinear::load(k, n, vb(base).pp(module), &adapters).unwrap();
                let y = layer.forward(x).unwrap();
                let weight = vb(base).get((n, k), &format!("{module}.weight")).unwrap();
                let bound = bound(adapter, &numbers(&weight), &numbers(x), layer.bias().map(numbers));
                for (i, ((y, want), bound)) in numbers(&y).iter().zip(numbers(want)).zip(bound).enumerate() {
                    assert!((y - want).abs() <= bound, "{name} {module}[{i}]: {y}, not {want} +- {bound:e}");
                }
                checked += 1;
            }
            assert!(checked > 0, "{name}: no module was checked");
            kinds += 1;
        }
    }
    assert!(kinds >= 9, "{kinds}");
}

#[test]
fn weights_in_every_storage_type_have_the_bits_of_the_checkpoint() {
    let module = "model.layers.1.mlp.down_proj";
    let none = Adapters::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/second")).unwrap();
    for folder in ["hf_dq_bf16", "hf_nodq_f16"] {
        let folder = format!("nf4_checkpoint/{folder}");
        let layer = QLoraLinear::load(192, 128, vb(&folder).pp(module), &none).unwrap();
        let Weight::Nf4(nf4) = layer.weight() else { panic!("not in 4 bits") };
        let want = Reader::open(data(&folder)).unwrap().nf4(&format!("{module}.weight")).unwrap();
        assert_eq!(*nf4.to_matrix().unwrap(), want);
    }
    // A VarBuilder converts what is to be reinterpreted.
    let folder = "nf4_checkpoint/hf_dq_bf16_storage_bf16";
    let error = message(QLoraLinear::load(192, 128, vb(folder).pp(module), &none));
    assert!(error.contains("has to be stored as uint8"), "{error}");
    let reader = Reader::open(data(folder)).unwrap();
    let read = Weight::read(&reader, &format!("{module}.weight"), DType::F32, &CPU).unwrap();
    let Weight::Nf4(nf4) = &read else { panic!("not in 4 bits") };
    assert_eq!(*nf4.to_matrix().unwrap(), reader.nf4(&format!("{module}.weight")).unwrap());
    let head = Weight::read(&reader, "lm_head.weight", DType::F16, &CPU).unwrap();
    assert!(matches!(head, Weight::Dense(tensor) if tensor.dtype() == DType::F16));
}

#[test]
fn what_a_folder_lacks_or_has_too_much_is_named() {
    let vb = || vb("nf4_checkpoint/hf_dq_bf16");
    let second = Adapters::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/second")).unwrap();
    let module = "model.layers.0.self_attn.q_proj";
    let error = message(QLoraLinear::load(128, 64, vb().pp(module), &second));
    assert!(error.contains("q_proj.weight: wanted shape [64, 128], got (128, 128)"), "{error}");
    let error = message(QLoraLinear::load(128, 128, vb().pp("model.layers.7.q_proj"), &second));
    assert!(error.contains("model.layers.7.q_proj.weight"), "{error}");
    assert!(Adapters::open(data("nf4_checkpoint")).is_err());

    // A module that was trained whole, and is not in the adapter's file.
    let mut file = Adapters::open(data("peft/llama/embed_and_head")).unwrap().file().clone();
    let head = |adapters: &Adapters| {
        let head = self::vb("peft/llama/base").pp("lm_head");
        let [n, k] = head.get_unchecked("weight")?.dims2()?.into();
        LoraLinear::load(k, n, head, adapters).map(drop)
    };
    head(&Adapters::new(file.clone())).unwrap();
    file.base_tensors.remove("lm_head.weight");
    let error = message(head(&Adapters::new(file)));
    let wanted = "adapters: wanted the tensors of modules_to_save [\"lm_head\"], got no lm_head.weight";
    assert_eq!(error, wanted);

    let dora = Adapters::open(data("peft/llama/dora_r8")).unwrap();
    let (module, adapter) = dora.file().adapters.iter().next().unwrap();
    let (n, k) = (adapter.out_features(), adapter.in_features());
    let base = self::vb("peft/llama/base");
    let error = MultiLoraLinear::load(k, n, base.pp(module), &[&dora], &AdapterIndex::new());
    assert_eq!(message(error), "adapters: wanted LoRA, rsLoRA or AdaLoRA, got DoRA");
}
