//! Reads a model or an adapter and writes it again, as `tests/interop/run` has it checked by bitsandbytes and PEFT.
//!
//! ```text
//! rewrite IN OUT [--quantize nf4|fp4] [--nested] [--blocksize N] [--dequantize] [--storage TYPE] [--shard-bytes N]
//! ```
//!
//! IN is a `.safetensors` file, a model's folder, or an adapter's. With `--quantize` every `*_proj.weight` becomes a 4-bit weight,
//! with `--dequantize` every 4-bit weight a dense one.

use std::path::Path;

use lora_kernels::formats::bitsandbytes::{self, Checkpoint, SaveOptions, Storage};
use lora_kernels::formats::peft;
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{Error, Result, Tensor};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [from, to, options @ ..] = &args[..] else {
        return Err(Error::argument("arguments", "IN OUT", args.join(" ")));
    };
    let (from, to) = (Path::new(from), Path::new(to));
    if from.join(peft::CONFIG).exists() {
        return peft::load(from)?.save(to);
    }
    let mut checkpoint = bitsandbytes::load(from)?;
    if let Some(name) = value(options, "--quantize") {
        quantize(&mut checkpoint, name, options)?;
    }
    if options.iter().any(|option| option == "--dequantize") {
        let weights = std::mem::take(&mut checkpoint.nf4);
        checkpoint.dense.extend(weights.into_iter().map(|(name, weight)| (name, weight.dequantize_tensor())));
    }
    if from.is_file() {
        return checkpoint.save_file(to);
    }
    let storage = value(options, "--storage").map(|name| {
        Storage::from_name(name)
            .ok_or_else(|| Error::argument("--storage", "uint8, bfloat16, float16 or float32", name))
    });
    let max_shard_bytes = number(options, "--shard-bytes")?.map(|n| n as u64);
    checkpoint.save(to, &SaveOptions { storage: storage.transpose()?, max_shard_bytes })
}

fn quantize(checkpoint: &mut Checkpoint, quant_type: &str, options: &[String]) -> Result<()> {
    let codebook = match quant_type {
        "nf4" => Codebook::nf4(),
        "fp4" => Codebook::fp4(),
        _ => return Err(Error::argument("--quantize", "nf4 or fp4", quant_type)),
    };
    let nested = options.iter().any(|option| option == "--nested");
    let nesting = if nested { Nesting::Nested } else { Nesting::Plain };
    let blocksize = number(options, "--blocksize")?.unwrap_or(64);
    let is_projection = |(name, _): &(String, Tensor)| name.ends_with("_proj.weight");
    let (projections, rest): (Vec<_>, Vec<_>) =
        std::mem::take(&mut checkpoint.dense).into_iter().partition(is_projection);
    checkpoint.dense = rest.into_iter().collect();
    for (name, tensor) in projections {
        let weight = Nf4Matrix::quantize_tensor(&tensor, blocksize, &codebook, nesting)?;
        checkpoint.nf4.insert(name, weight);
    }
    Ok(())
}

/// What follows the option `name`.
fn value<'a>(options: &'a [String], name: &str) -> Option<&'a str> {
    let at = options.iter().position(|option| option == name)?;
    options.get(at + 1).map(String::as_str)
}

fn number(options: &[String], name: &str) -> Result<Option<usize>> {
    let parse = |text: &str| text.parse().map_err(|_| Error::argument(name, "a number", text));
    value(options, name).map(parse).transpose()
}
