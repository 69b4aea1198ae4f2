//! bitsandbytes 4-bit checkpoints: what `Linear4bit` puts into a state dict, and transformers into a model's folder.
//!
//! For a weight P of `numel` elements in blocks of `blocksize` the file has
//!
//! | tensor | type | |
//! |---|---|---|
//! | P | u8 `[ceil(numel / 2), 1]` | the codes; or the same bytes seen as bf16, f16 or f32 ([`Storage`]) |
//! | P`.absmax` | f32 `[blocks]` | the scales; u8 when they are quantised themselves |
//! | P`.quant_map` | f32 `[16]` | what the codes stand for |
//! | P`.nested_absmax` | f32 `[ceil(blocks / 256)]` | with double quantisation: scales of the scales |
//! | P`.nested_quant_map` | f32 `[256]` | with double quantisation: what the bytes of absmax stand for |
//! | P`.quant_state.bitsandbytes__nf4` | u8 | JSON: [`QuantState`]; the name ends in `__fp4` for FP4 |
//!
//! ```
//! # fn main() -> lora_kernels::Result<()> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/nf4_checkpoint/hf_dq_bf16");
//! let checkpoint = lora_kernels::formats::bitsandbytes::load(folder)?;
//! let weight = &checkpoint.nf4["model.layers.0.self_attn.q_proj.weight"];
//! assert_eq!((weight.shape(), weight.blocksize()), (&[128, 128][..], 64));
//! assert!(checkpoint.dense.contains_key("lm_head.weight"));
//! # Ok(())
//! # }
//! ```

pub mod config;
mod layout;
mod quant_state;
mod reader;
mod writer;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

pub use quant_state::{NestedState, QuantState};
pub use reader::{Parameter, Reader};
pub use writer::{SaveOptions, companions, tensors_of};

use super::safetensors::{Dtype, Raw};
use crate::nf4::Nf4Matrix;
use crate::{Result, Tensor};

/// Names within a model's folder.
const MODEL: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

/// A whole checkpoint, in memory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Checkpoint {
    /// The 4-bit weights, by name (`model.layers.0.mlp.down_proj.weight`).
    pub nf4: BTreeMap<String, Nf4Matrix>,
    /// What is not quantised, by name: biases, norms, embeddings.
    pub dense: BTreeMap<String, Tensor>,
    /// Tensors of other types than [`crate::DType`], by name, as bytes.
    pub raw: BTreeMap<String, Raw>,
    /// The type that the codes are stored as: that of the first weight, should they differ.
    pub storage: Storage,
    /// The model's `config.json`, where one lay beside.
    pub config: Option<Map<String, Value>>,
}

/// The type that codes are stored as (`bnb_4bit_quant_storage`). It changes how the file calls the bytes, never the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Storage {
    /// u8, the default.
    #[default]
    U8,
    /// bf16.
    BF16,
    /// f16.
    F16,
    /// f32.
    F32,
}

impl Storage {
    /// All of them, and what files and `config.json` call them.
    const NAMES: [(Storage, Dtype, &'static str); 4] = [
        (Storage::U8, Dtype::U8, "uint8"),
        (Storage::BF16, Dtype::BF16, "bfloat16"),
        (Storage::F16, Dtype::F16, "float16"),
        (Storage::F32, Dtype::F32, "float32"),
    ];

    /// The type's name in `config.json`: `uint8`, `bfloat16`, `float16`, `float32`.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].2
    }

    /// The type of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, _, known)| *known == name).map(|(storage, ..)| *storage)
    }

    fn dtype(self) -> Dtype {
        Self::NAMES[self as usize].1
    }

    fn from_dtype(dtype: Dtype) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known, _)| *known == dtype).map(|(storage, ..)| *storage)
    }

    /// Bytes of one element.
    fn size(self) -> usize {
        self.dtype().bitsize() / 8
    }
}

/// Reads all of a checkpoint: see [`Reader::open`], which can also read one tensor at a time.
///
/// # Errors
/// As [`Reader::open`] and [`Reader::load`].
pub fn load(path: impl AsRef<Path>) -> Result<Checkpoint> {
    Reader::open(path)?.load()
}
