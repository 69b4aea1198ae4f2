//! Reads a checkpoint or an adapter and writes it again: `rewrite IN OUT [--storage TYPE] [--shard-bytes N]`.
//!
//! IN is a `.safetensors` file, the folder of a 4-bit model, or the folder of an adapter. `tests/interop/run` has bitsandbytes
//! and PEFT read what comes out.

use std::path::Path;

use lora_kernels::Result;
use lora_kernels::formats::{bitsandbytes, peft};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| args.iter().position(|a| a == name).map(|i| args[i + 1].as_str());
    let (from, to) = (Path::new(&args[0]), Path::new(&args[1]));
    if from.join(peft::CONFIG).exists() {
        return peft::load(from)?.save(to);
    }
    let checkpoint = bitsandbytes::load(from)?;
    if from.is_file() {
        return checkpoint.save_file(to);
    }
    let options = bitsandbytes::SaveOptions {
        storage: option("--storage")
            .map(|name| bitsandbytes::Storage::from_name(name).expect("a storage type")),
        max_shard_bytes: option("--shard-bytes").map(|n| n.parse().expect("a number of bytes")),
    };
    checkpoint.save(to, &options)
}
