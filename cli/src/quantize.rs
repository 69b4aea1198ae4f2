//! `quantize`: a dense model's folder to one in 4 bits.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use lora_kernels::adapter;
use lora_kernels::formats::bitsandbytes::{NestedState, Parameter, QuantState, Storage, config};
use lora_kernels::formats::safetensors::Dtype;
use lora_kernels::nf4::{self, Codebook, NESTED_BLOCKSIZE, Nesting, Nf4Matrix, QuantType};
use lora_kernels::{DType, Tensor};
use serde_json::{Map, Value};

use crate::model::{Change, Fate, Output, Rows, Slab, Source, Summary, rewrite};

const EXAMPLES: &str = "\
Examples:
  lora-kernels quantize Llama-3-8B --out Llama-3-8B-nf4 --double-quant
  lora-kernels quantize Llama-3-8B --out small --blocksize 128 --skip down_proj --skip model.layers.0

Quantised is every two-dimensional `.weight` that transformers would make a Linear4bit: not embeddings, and not the layer that
makes logits of hidden states (lm_head and its like). The folder appears when it is complete; until then it is called
.NAME.partial, and the next run with the same --out removes what an interrupted one has left.";

/// Arguments of `lora-kernels quantize`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// The model's folder: config.json, and model.safetensors or shards and their index.
    model: PathBuf,
    #[command(flatten)]
    out: Out,
    #[command(flatten)]
    quantisation: Quantisation,
    /// The table of values.
    #[arg(long, value_enum, default_value_t = Type::Nf4)]
    quant_type: Type,
}

/// Where a new model goes, and what is said of it.
#[derive(clap::Args)]
pub struct Out {
    /// The folder to write.
    #[arg(long)]
    pub out: PathBuf,
    /// Replace the model or adapter that is there.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Which table of sixteen values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Type {
    Nf4,
    Fp4,
}

/// How weights are quantised, and which.
#[derive(clap::Args)]
pub struct Quantisation {
    /// Elements per scale. transformers' own models have 64.
    #[arg(long, default_value_t = 64)]
    blocksize: usize,
    /// Quantise the scales too (4.127 instead of 4.5 bits per weight in blocks of 64).
    #[arg(long)]
    double_quant: bool,
    /// The type that the codes are stored as: uint8, bfloat16, float16 or float32. It changes no bytes.
    #[arg(long, value_parser = storage, default_value = "uint8")]
    storage: Storage,
    /// The type that the model will compute in [default: that of its weights].
    #[arg(long, value_parser = dtype)]
    compute_dtype: Option<DType>,
    /// Keep these modules as they are: a name, or its beginning or end up to a dot. May be repeated.
    #[arg(long, value_name = "NAME")]
    skip: Vec<String>,
    /// Quantise these modules and no others. May be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
}

fn storage(name: &str) -> Result<Storage, String> {
    Storage::from_name(name).ok_or_else(|| "wanted uint8, bfloat16, float16 or float32".to_owned())
}

/// A type by its short name, or by torch's.
pub fn dtype(name: &str) -> Result<DType, String> {
    match name {
        "f32" | "float32" => Ok(DType::F32),
        "f16" | "float16" => Ok(DType::F16),
        "bf16" | "bfloat16" => Ok(DType::BF16),
        _ => Err("wanted f32, f16 or bf16".to_owned()),
    }
}

/// Modules that look like linear layers in a file and are tables of embeddings.
pub const EMBEDDINGS: [&str; 7] =
    ["embed", "wte", "wpe", "shared", "relative_attention_bias", "patch_embed", "position_emb"];
/// Layers that make logits or scores of hidden states, which transformers does not quantise.
pub const HEADS: [&str; 8] =
    ["lm_head", "embed_out", "score", "classifier", "proj_out", "qa_outputs", "output_projection", "decoder"];
/// Models whose linear layers are stored transposed (Conv1D): bitsandbytes has them the other way round.
pub const CONV1D: [&str; 4] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut summary = Summary::start();
    let source = Source::open(&arguments.model)?;
    if let Some(name) = source.four_bit().next() {
        bail!(
            "{}: wanted a dense model, got {name} in 4 bits (dequantize makes it dense)",
            source.folder().display()
        );
    }
    let plan = arguments.quantisation.plan(&source, arguments.quant_type)?;
    let output = Output::create(&arguments.out.out, &[source.folder()], arguments.out.force)?;
    let bytes = rewrite(&source, &output, &plan, &mut summary)?;
    plan.write_config(&source, &output)?;
    output.commit()?;
    plan.describe(&mut summary);
    summary.finish("quantized", bytes, arguments.out.json);
    Ok(true)
}

/// What is quantised, and how.
pub struct Plan {
    quant_type: Type,
    blocksize: usize,
    nesting: Nesting,
    storage: Storage,
    compute: DType,
    /// Names of weights.
    weights: Vec<String>,
    /// Modules that look linear and stay as they are.
    kept: Vec<String>,
}

impl Quantisation {
    /// Chooses the weights of a model.
    pub fn plan(&self, source: &Source, quant_type: Type) -> Result<Plan> {
        nf4::check_blocksize("--blocksize", self.blocksize)?;
        let model_type = source.config().get("model_type").and_then(Value::as_str).unwrap_or_default();
        ensure!(
            !CONV1D.contains(&model_type),
            "{}: model_type {model_type}: quantising transposed layers (Conv1D) is not supported",
            source.folder().display()
        );
        let (mut weights, mut kept, mut dtype) = (Vec::new(), Vec::new(), None);
        let (mut skipped, mut chosen) = (vec![false; self.skip.len()], vec![false; self.only.len()]);
        for (name, parameter) in source.reader().parameters() {
            let (Some(module), Some(from)) = (name.strip_suffix(".weight"), matrix(parameter)) else {
                continue;
            };
            let last = module.rsplit('.').next().unwrap_or(module);
            let skip = mark(&self.skip, &mut skipped, module);
            let only = mark(&self.only, &mut chosen, module);
            if EMBEDDINGS.iter().any(|part| last.contains(part)) && !HEADS.contains(&last) {
                ensure!(
                    !only,
                    "--only: {module} looks like a table of embeddings, which bitsandbytes does not quantise"
                );
            } else if skip || !self.only.is_empty() && !only || self.only.is_empty() && HEADS.contains(&last)
            {
                kept.push(module.to_owned());
            } else {
                dtype = dtype.or(Some(from));
                weights.push(name.clone());
            }
        }
        for (option, names, used) in [("--skip", &self.skip, &skipped), ("--only", &self.only, &chosen)] {
            if let Some(i) = used.iter().position(|used| !used) {
                bail!(
                    "{option} {}: wanted a module of the model with a two-dimensional weight, got none",
                    names[i]
                );
            }
        }
        let from = dtype.with_context(|| {
            format!("{}: wanted a weight to quantise, got none", source.folder().display())
        })?;
        let nesting = if self.double_quant { Nesting::Nested } else { Nesting::Plain };
        let compute = self.compute_dtype.unwrap_or(from);
        Ok(Plan {
            quant_type,
            blocksize: self.blocksize,
            nesting,
            storage: self.storage,
            compute,
            weights,
            kept,
        })
    }
}

/// Whether one of the names is that of the module; marks those that are.
pub fn mark(names: &[String], used: &mut [bool], module: &str) -> bool {
    let mut any = false;
    for (name, used) in names.iter().zip(used) {
        let ends =
            module.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        let begins =
            module.strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        any |= ends || begins;
        *used |= ends || begins;
    }
    any
}

/// The type of a two-dimensional floating-point tensor.
pub fn matrix(parameter: &Parameter) -> Option<DType> {
    match parameter {
        Parameter::Dense { dtype: Dtype::F32, shape } if shape.len() == 2 => Some(DType::F32),
        Parameter::Dense { dtype: Dtype::F16, shape } if shape.len() == 2 => Some(DType::F16),
        Parameter::Dense { dtype: Dtype::BF16, shape } if shape.len() == 2 => Some(DType::BF16),
        Parameter::Nf4 { state, .. } if state.shape.len() == 2 => Some(state.dtype),
        _ => None,
    }
}

impl Plan {
    /// Whether a weight is to be quantised.
    pub fn takes(&self, name: &str) -> bool {
        self.weights.binary_search_by(|weight| weight.as_str().cmp(name)).is_ok()
    }

    /// What a weight of this type and shape becomes.
    pub fn parameter(&self, dtype: DType, shape: &[usize]) -> Parameter {
        let nested = (self.nesting == Nesting::Nested)
            .then_some(NestedState { blocksize: NESTED_BLOCKSIZE, offset: 0.0 });
        let quant_type = match self.quant_type {
            Type::Nf4 => QuantType::Nf4,
            Type::Fp4 => QuantType::Fp4,
        };
        let state =
            QuantState { quant_type, blocksize: self.blocksize, dtype, shape: shape.to_vec(), nested };
        Parameter::Nf4 { state, storage: self.storage }
    }

    /// Quantises rows.
    pub fn quantise(&self, rows: &Tensor) -> Result<Nf4Matrix> {
        Ok(Nf4Matrix::quantize_tensor(rows, self.blocksize, &self.codebook(), Nesting::Plain)?)
    }

    /// The same for the library's initial adapters.
    pub fn quantisation(&self) -> adapter::Quantisation {
        let (blocksize, nesting) = (self.blocksize, self.nesting);
        adapter::Quantisation { blocksize, codebook: self.codebook(), nesting }
    }

    /// The table.
    pub fn codebook(&self) -> Codebook {
        if self.quant_type == Type::Fp4 { Codebook::fp4() } else { Codebook::nf4() }
    }

    /// Writes `config.json` with the block that tells transformers of all this.
    pub fn write_config(&self, source: &Source, output: &Output) -> Result<()> {
        let Parameter::Nf4 { state, .. } = self.parameter(DType::F32, &[]) else { unreachable!("it is") };
        let text = |list: &Value| {
            list.as_array()
                .is_some_and(|a| a.iter().all(|v| v.as_str().is_some_and(|s| s.ends_with("ForCausalLM"))))
        };
        let causal = source.config().get("architectures").is_some_and(text);
        // The list replaces transformers' own choice: the head of a causal model, and what is tied to it.
        let kept = match &self.kept[..] {
            [] if causal => None,
            [head] if causal && head == "lm_head" => None,
            kept => {
                let head = (!kept.iter().any(|k| k == "lm_head")).then(|| "lm_head".to_owned());
                Some(head.into_iter().chain(kept.iter().cloned()).collect::<Vec<_>>())
            }
        };
        let config =
            config::with_quantization(source.config(), &state, self.storage, self.compute, kept.as_deref());
        write_config(output, config)
    }

    fn describe(&self, summary: &mut Summary) {
        let kept = if self.kept.is_empty() { "none".to_owned() } else { self.kept.join(", ") };
        summary
            .say(format!("{} weights in 4 bits; linear layers kept as they are: {kept}", self.weights.len()));
        summary.field("quantized", self.weights.clone());
        summary.field("kept", self.kept.clone());
    }
}

/// Writes `config.json`.
pub fn write_config(output: &Output, config: Map<String, Value>) -> Result<()> {
    output.write("config.json", config::text(config).as_bytes())
}

impl Change for Plan {
    fn fate(&self, name: &str, parameter: &Parameter) -> Result<Fate> {
        match matrix(parameter) {
            Some(dtype) if self.takes(name) => {
                Ok(Fate::Change(self.parameter(dtype, parameter.shape()), Slab::Any))
            }
            _ => Ok(Fate::Keep),
        }
    }

    fn rows(&self, source: &Source, name: &str, rows: Range<usize>) -> Result<Rows> {
        Ok(Rows::Nf4(self.quantise(&source.reader().dense_rows(name, rows)?)?.into()))
    }
}
