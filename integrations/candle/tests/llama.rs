//! A 4-bit Llama with adapters, through candle, gives the logits that transformers and PEFT gave for the same folders.
//!
//! How far may f32 arithmetic be from the formula after so many steps? The same model runs in f64 [`RUNS`] times, and each time
//! the inputs and outputs of every layer are moved by random amounts, up to what the roundings there may come to. The spread
//! of the logits is how far such errors carry (Monte Carlo arithmetic: Parker 1997), and [`LAMBDA`] standard deviations are the
//! bound for one implementation.

#[path = "../examples/llama/model.rs"]
mod model;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, RmsNorm, VarBuilder};
use candle_transformers::models::llama::{Config, LlamaConfig};
use lora_kernels_candle::{AdapterIndex, Adapters, MultiLoraLinear, QLoraLinear, Weight};
use model::{Cache, Layer, Layers, Llama};

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// Runs with moved results.
const RUNS: usize = 16;
/// Standard deviations that an error may come to.
const LAMBDA: f64 = 8.0;
/// Roundings of a number on its way into a layer: gate and product (6), the weighted sum of values (14 terms).
const BEFORE: f64 = 16.0;
/// Roundings on its way out: a rotation by an angle of up to 10 (6 for each unit of it, and 2), of a score and its exponential.
const BEHIND: f64 = 64.0 + 32.0;

/// The error of a sum of `n` products, as a share of the sum of their absolute values (Higham 3.1; Higham and Mary 2019).
fn accumulation(n: usize) -> f64 {
    U * (n as f64).min(8.0 * (n as f64).sqrt())
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn base() -> PathBuf {
    repository().join("tests/data/nf4_checkpoint/hf_dq_bf16")
}

fn adapters(name: &str) -> Adapters {
    Adapters::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap()
}

fn stored() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/logits.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn config() -> Config {
    let text = std::fs::read(base().join("config.json")).unwrap();
    serde_json::from_slice::<LlamaConfig>(&text).unwrap().into_config(false)
}

fn vb(dtype: DType) -> VarBuilder<'static> {
    // SAFETY: nobody changes the file while it is mapped.
    unsafe { VarBuilder::from_mmaped_safetensors(&[base().join("model.safetensors")], dtype, &Device::Cpu) }
        .unwrap()
}

fn run(layers: &dyn Layers, dtype: DType, tokens: &Tensor) -> Tensor {
    let config = config();
    let model = Llama::load(vb(dtype), &config, layers).unwrap();
    model.forward(tokens, 0, &mut Cache::new(dtype, &config, &Device::Cpu).unwrap()).unwrap()
}

/// One adapter for all tokens.
struct One(Adapters);

impl Layers for One {
    fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Layer> {
        Ok(Box::new(QLoraLinear::load(in_dim, out_dim, vb, &self.0)?))
    }
}

/// An adapter for each sequence.
struct Many<'a>(&'a [&'a Adapters], AdapterIndex);

impl Layers for Many<'_> {
    fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Layer> {
        Ok(Box::new(MultiLoraLinear::load(in_dim, out_dim, vb, self.0, &self.1)?))
    }
}

/// Numbers that look random, and are the same every time (splitmix64).
struct Random(u64);

impl Random {
    /// Numbers between -1 and 1.
    fn like(&mut self, tensor: &Tensor) -> Result<Tensor> {
        let mut number = || {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        let numbers: Vec<f64> = (0..tensor.elem_count()).map(|_| number()).collect();
        Tensor::from_vec(numbers, tensor.shape(), &Device::Cpu)
    }
}

type Noise = Option<Arc<Mutex<Random>>>;

/// `values`, each moved by a random share of `bound`.
fn moved(values: &Tensor, bound: &Tensor, noise: &Noise) -> Result<Tensor> {
    match noise {
        None => Ok(values.clone()),
        Some(random) => values + (bound * random.lock().unwrap().like(values)?)?,
    }
}

/// The layers by their formulas, in f64.
struct Formula<'a> {
    adapters: &'a Adapters,
    adapted: bool,
    noise: Noise,
}

struct FormulaLinear {
    weight: Tensor,
    factors: Option<(Tensor, Tensor, f64)>,
    noise: Noise,
}

struct FormulaNorm {
    norm: RmsNorm,
    noise: Noise,
}

impl Layers for Formula<'_> {
    fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Layer> {
        let layer = QLoraLinear::load(in_dim, out_dim, vb.clone().set_dtype(DType::F32), self.adapters)?;
        let weight = match layer.weight() {
            Weight::Dense(tensor) => tensor.to_dtype(DType::F64)?,
            Weight::Nf4(nf4) => nf4.dequantize(DType::F32)?.to_dtype(DType::F64)?,
        };
        let adapter = self.adapters.file().adapters.get(&vb.prefix()).filter(|_| self.adapted);
        let tensor = |t: &lora_kernels::Tensor| Tensor::from_vec(t.to_f64(), t.shape(), &Device::Cpu);
        let factors = adapter
            .map(|a| Ok::<_, candle_core::Error>((tensor(a.lora_a())?, tensor(a.lora_b())?, a.scaling())));
        Ok(Box::new(FormulaLinear { weight, factors: factors.transpose()?, noise: self.noise.clone() }))
    }

    fn norm(&self, size: usize, eps: f64, vb: VarBuilder) -> Result<Layer> {
        Ok(Box::new(FormulaNorm {
            norm: RmsNorm::new(vb.get(size, "weight")?, eps),
            noise: self.noise.clone(),
        }))
    }
}

impl Module for FormulaLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = moved(x, &(x.abs()? * (BEFORE * U))?, &self.noise)?;
        let k = self.weight.dim(1)?;
        let product = |x: &Tensor, w: &Tensor| x.broadcast_matmul(&w.t()?);
        let (mut y, size) = (product(&x, &self.weight)?, product(&x.abs()?, &self.weight.abs()?)?);
        let mut bound = (size * accumulation(k + 6))?;
        if let Some((a, b, scaling)) = &self.factors {
            y = (y + (product(&product(&x, a)?, b)? * *scaling)?)?;
            let size = (product(&product(&x.abs()?, &a.abs()?)?, &b.abs()?)? * scaling.abs())?;
            bound = (bound + (size * accumulation(k + a.dim(0)? + 8))?)?;
        }
        let bound = (bound + (y.abs()? * (BEHIND * U))?)?;
        moved(&y, &bound, &self.noise)
    }
}

impl Module for FormulaNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Sums of the residual stream before it; the mean of k squares, its root, a division and two products.
        let k = *x.dims().last().unwrap();
        let y = self.norm.forward_diff(&moved(x, &(x.abs()? * (2.0 * U))?, &self.noise)?)?;
        moved(&y, &(y.abs()? * (accumulation(k + 8) / 2.0 + 5.0 * U))?, &self.noise)
    }
}

/// The logits by the formula, and how far f32 may be from them.
fn formula(name: &str, tokens: &Tensor) -> (Vec<f64>, Vec<f64>) {
    let adapters = adapters(if name == "base" { "first" } else { name });
    let logits = |noise| {
        let layers = Formula { adapters: &adapters, adapted: name != "base", noise };
        numbers(&run(&layers, DType::F64, tokens))
    };
    let exact = logits(None);
    let mut squares = vec![0.0; exact.len()];
    for i in 0..RUNS {
        let run = logits(Some(Arc::new(Mutex::new(Random(i as u64)))));
        squares.iter_mut().zip(run.iter().zip(&exact)).for_each(|(s, (a, b))| *s += (a - b).powi(2));
    }
    (exact, squares.iter().map(|s| LAMBDA * (s / RUNS as f64).sqrt()).collect())
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// How far the worst element is outside its bound: 1 is just inside.
fn worst(got: &[f64], want: &[f64], bound: &[f64], times: f64) -> f64 {
    assert_eq!((got.len(), bound.len()), (want.len(), want.len()));
    got.iter().zip(want).zip(bound).map(|((g, w), b)| (g - w).abs() / (times * b)).fold(0.0, f64::max)
}

#[test]
fn logits_are_those_of_transformers_and_peft() {
    let stored = stored();
    let tokens = &stored["input_ids"];
    let index = AdapterIndex::new();
    let (first, second) = (adapters("first"), adapters("second"));
    let base = numbers(&run(&Many(&[&first, &second], index.clone()), DType::F32, tokens));
    let mut rows = Vec::new();
    for name in ["base", "first", "second"] {
        let theirs = numbers(&stored[&format!("logits_{name}")]);
        let (exact, bound) = formula(name, tokens);
        assert!(worst(&theirs, &exact, &bound, 1.0) < 1.0, "{name}: the stored logits are not the formula's");
        let ours = match name {
            "base" => base.clone(),
            _ => {
                let layers = One(adapters(name));
                let logits = numbers(&run(&layers, DType::F32, tokens));
                layers.0.check_all_taken().unwrap();
                logits
            }
        };
        let off = worst(&ours, &theirs, &bound, 2.0);
        assert!(off < 1.0, "{name}: {off} of the bound");
        if name != "base" {
            assert!(
                worst(&base, &theirs, &bound, 2.0) > 1000.0,
                "{name}: the bound cannot tell it from none"
            );
        }
        rows.push((theirs, bound));
    }

    // One sequence each: the second adapter, none, the first.
    index.set(&Tensor::new(&[1i64, -1, 0], &Device::Cpu).unwrap()).unwrap();
    let mixed = numbers(&run(&Many(&[&first, &second], index), DType::F32, tokens));
    let theirs = numbers(&stored["logits_mixed"]);
    let sequence = mixed.len() / 3;
    for (i, row) in [2, 0, 1].into_iter().enumerate() {
        let at = i * sequence..(i + 1) * sequence;
        let (alone, bound) = &rows[row];
        assert!(worst(&theirs[at.clone()], &alone[at.clone()], &bound[at.clone()], 2.0) < 1.0);
        let off = worst(&mixed[at.clone()], &theirs[at.clone()], &bound[at.clone()], 2.0);
        assert!(off < 1.0, "sequence {i}: {off} of the bound");
    }
}

#[test]
fn token_by_token_with_the_cache_gives_the_same_logits() {
    let stored = stored();
    let tokens = &stored["input_ids"];
    let (_, bound) = formula("first", tokens);
    let config = config();
    let model = Llama::load(vb(DType::F32), &config, &One(adapters("first"))).unwrap();
    let mut cache = Cache::new(DType::F32, &config, &Device::Cpu).unwrap();
    let mut step = |i: usize| model.forward(&tokens.narrow(1, i, 1).unwrap(), i, &mut cache).unwrap();
    let steps: Vec<_> = (0..tokens.dim(1).unwrap()).map(&mut step).collect();
    let logits = numbers(&Tensor::cat(&steps, 1).unwrap());
    let off = worst(&logits, &numbers(&stored["logits_first"]), &bound, 2.0);
    assert!(off < 1.0, "{off} of the bound");
}

#[test]
fn an_adapter_that_no_layer_takes_is_an_error() {
    /// Forgets one module.
    struct Forgetful(One);
    impl Layers for Forgetful {
        fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Layer> {
            if vb.prefix() == "model.layers.1.mlp.up_proj" {
                return Ok(Box::new(MultiLoraLinear::load(in_dim, out_dim, vb, &[], &AdapterIndex::new())?));
            }
            self.0.linear(in_dim, out_dim, vb)
        }
    }
    let layers = Forgetful(One(adapters("first")));
    Llama::load(vb(DType::F32), &config(), &layers).unwrap();
    let error = layers.0.0.check_all_taken().unwrap_err().to_string();
    assert!(error.contains("none for model.layers.1.mlp.up_proj"), "{error}");
    assert!(!error.contains("down_proj"), "{error}");
}
