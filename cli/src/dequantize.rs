//! `dequantize`: a 4-bit model's folder to a dense one.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use half::{bf16, f16};
use lora_kernels::formats::bitsandbytes::{Parameter, config};
use lora_kernels::formats::safetensors::Dtype;
use lora_kernels::nf4::Nf4Matrix;
use lora_kernels::{DType, Element, Tensor};
use serde_json::{Map, Value, json};

use crate::model::{Change, Fate, Output, Rows, Slab, Source, Summary, rewrite};
use crate::quantize::{Out, dtype, write_config};

const EXAMPLES: &str = "\
Examples:
  lora-kernels dequantize Llama-3-8B-nf4 --out Llama-3-8B-decoded
  lora-kernels dequantize Llama-3-8B-nf4 --out Llama-3-8B-decoded --dtype f32

The weights are those that bitsandbytes computes with: code times scale, rounded once to the type. What was not quantised stays
as it is.";

/// Arguments of `lora-kernels dequantize`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// The model's folder.
    model: PathBuf,
    #[command(flatten)]
    out: Out,
    /// The type of the decoded weights: f32, f16 or bf16 [default: what each was quantised from].
    #[arg(long, value_parser = dtype)]
    dtype: Option<DType>,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut summary = Summary::start();
    let source = Source::open(&arguments.model)?;
    let count = source.four_bit().count();
    ensure!(count > 0, "{}: wanted a model in 4 bits, got a dense one", source.folder().display());
    let output = Output::create(&arguments.out.out, &[source.folder()], arguments.out.force)?;
    let bytes = rewrite(&source, &output, &Decode(arguments.dtype), &mut summary)?;
    write_config(&output, dense_config(source.config(), arguments.dtype))?;
    output.commit()?;
    summary.say(format!("{count} weights decoded"));
    summary.field("dequantized", count);
    summary.finish("dequantized", bytes, arguments.out.json);
    Ok(true)
}

/// `config.json` of a model whose linear layers have become dense. The type that it names is the one that it is loaded in.
pub fn dense_config(config: &Map<String, Value>, dtype: Option<DType>) -> Map<String, Value> {
    let mut config = config::without_quantization(config);
    if let Some(dtype) = dtype {
        let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        config.insert(key.into(), json!(torch_name(dtype)));
    }
    config
}

fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
    }
}

/// The type as files have it.
pub fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

/// Decodes to a type, or to what each weight was.
struct Decode(Option<DType>);

impl Change for Decode {
    fn fate(&self, _: &str, parameter: &Parameter) -> Result<Fate> {
        Ok(match parameter {
            Parameter::Nf4 { state, .. } => {
                let dtype = stored(self.0.unwrap_or(state.dtype));
                Fate::Change(Parameter::Dense { dtype, shape: state.shape.clone() }, Slab::Any)
            }
            Parameter::Dense { .. } => Fate::Keep,
        })
    }

    fn rows(&self, source: &Source, name: &str, rows: Range<usize>) -> Result<Rows> {
        let rows = source.reader().nf4_rows(name, rows)?;
        decode(&rows, self.0.unwrap_or(rows.dtype())).map(Rows::Dense)
    }
}

/// A 4-bit weight as a dense one.
pub fn decode(weight: &Nf4Matrix, dtype: DType) -> Result<Tensor> {
    fn decode<T: Element>(weight: &Nf4Matrix) -> Result<Tensor> {
        Ok(Tensor::new(weight.shape(), T::into_data(weight.dequantize::<T>()))?)
    }
    match dtype {
        DType::F32 => decode::<f32>(weight),
        DType::F16 => decode::<f16>(weight),
        DType::BF16 => decode::<bf16>(weight),
    }
}
