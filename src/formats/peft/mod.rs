//! PEFT adapters on disk: a folder with `adapter_config.json` and `adapter_model.safetensors`
//! (<https://huggingface.co/docs/peft/developer_guides/checkpoint>).
//!
//! LoRA, rsLoRA, DoRA and AdaLoRA, on linear layers, GPT-2's Conv1D and embeddings. What would change the result and is not
//! known here is refused by name: see [`Config::parse`].
//!
//! ```
//! # fn main() -> lora_kernels::Result<()> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/peft/llama/patterns");
//! let file = lora_kernels::formats::peft::load(folder)?;
//! let module = "model.layers.0.self_attn.q_proj";
//! assert_eq!((file.config.rank_of(module), file.config.scaling_of(module)), (4, 8.0));
//! assert!(file.adapters.contains_key(module));
//! # Ok(())
//! # }
//! ```

mod config;
mod fields;
mod patterns;
mod tensors;

use std::collections::BTreeMap;
use std::path::Path;

pub use config::{Bias, Config, Method};
pub use patterns::Patterns;

use super::safetensors;
use crate::adapter::Adapter;
use crate::{Error, Result, Tensor};

/// The name of the configuration in an adapter's folder.
pub const CONFIG: &str = "adapter_config.json";
/// The name of the tensors' file in an adapter's folder.
pub const MODEL: &str = "adapter_model.safetensors";

/// What an adapter's folder holds.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFile {
    /// `adapter_config.json`.
    pub config: Config,
    /// The adapted modules, by their name in the base model (`model.layers.0.self_attn.q_proj`).
    pub adapters: BTreeMap<String, Adapter>,
    /// Tensors that take the place of the base model's, by their name there (`lm_head.weight`): the `modules_to_save`, trained
    /// biases, and the embedding tables that PEFT saves beside an adapter on them.
    pub base_tensors: BTreeMap<String, Tensor>,
}

/// Reads an adapter's folder.
///
/// # Errors
/// [`Error::Io`] when a file is not there; otherwise as [`AdapterFile::parse`].
pub fn load(folder: impl AsRef<Path>) -> Result<AdapterFile> {
    let folder = folder.as_ref();
    let config = super::read(folder.join(CONFIG))?;
    if !folder.join(MODEL).exists() && folder.join("adapter_model.bin").exists() {
        let place = folder.join("adapter_model.bin").display().to_string();
        return Err(Error::unsupported(place, "a pickle instead of adapter_model.safetensors"));
    }
    tensors::read(Config::parse(&config)?, &safetensors::File::open(folder.join(MODEL))?)
}

impl AdapterFile {
    /// Reads an adapter from memory: the bytes of `adapter_config.json` and of `adapter_model.safetensors`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a configuration that this crate would get wrong (see [`Config::parse`]), and for adapters on
    /// convolutions. [`Error::Format`], naming the tensor, for a name or suffix that the configuration does not explain, a
    /// factor without its partner, ranks that disagree with each other or with the configuration, and values that are not
    /// finite.
    pub fn parse(config: &[u8], model: &[u8]) -> Result<Self> {
        tensors::read(Config::parse(config)?, &safetensors::File::parse(MODEL, model)?)
    }

    /// The two files, as bytes: `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// [`Error::Argument`] when they would not read back as `self`: then the configuration contradicts the adapters.
    pub fn to_bytes(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        let config = self.config.to_json().into_bytes();
        let mut model = Vec::new();
        safetensors::write(&mut model, &tensors::items(self)).expect("a vector takes all bytes");
        let back = Self::parse(&config, &model)
            .map_err(|e| Error::argument("adapters", "adapters that their configuration describes", e))?;
        match tensors::difference(self, &back) {
            None => Ok((config, model)),
            Some(place) => Err(Error::argument(
                place,
                "what the configuration gives when it is read back",
                "another value",
            )),
        }
    }

    /// Writes the folder, which is made if need be. PEFT reads it with the same names and values.
    ///
    /// # Errors
    /// As [`AdapterFile::to_bytes`]; [`Error::Io`] when the folder cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let (config, model) = self.to_bytes()?;
        std::fs::create_dir_all(folder).map_err(|source| Error::Io { path: folder.to_owned(), source })?;
        safetensors::replace(&folder.join(MODEL), |to| to.write_all(&model))?;
        safetensors::replace(&folder.join(CONFIG), |to| to.write_all(&config))
    }

    /// Checks that every adapter has its module in the base model, with the right shape, and that `modules_to_save` are all here:
    /// PEFT fails to load an adapter that lacks one. `base` lists the base's tensors (`model.layers.0.self_attn.q_proj.weight`)
    /// with the shapes that they have unquantised. (Without the base nobody can tell: PEFT writes `["classifier", "score"]` for
    /// models that have one of them.)
    ///
    /// # Errors
    /// [`Error::Argument`] that lists all modules that do not match, or all tensors that should have been saved.
    pub fn match_base<'a>(&self, base: impl IntoIterator<Item = (&'a str, &'a [usize])>) -> Result<()> {
        let base: BTreeMap<&str, &[usize]> = base.into_iter().collect();
        let mismatch = |(module, adapter): (&String, &Adapter)| {
            let weight = format!("{module}.weight");
            let wanted = adapter.weight_shape();
            match base.get(weight.as_str()) {
                Some(shape) if **shape == wanted => None,
                Some(shape) => Some(format!("{weight} {wanted:?} (it is {shape:?})")),
                None => Some(format!("{weight} {wanted:?} (not there)")),
            }
        };
        let mismatches: Vec<String> = self.adapters.iter().filter_map(mismatch).collect();
        if !mismatches.is_empty() {
            let wanted = format!("the {} modules of the adapter", self.adapters.len());
            return Err(Error::argument("base", wanted, format!("no {}", mismatches.join(", no "))));
        }
        let saved = |name: &&&str| self.base_tensors.contains_key(**name);
        let lost: Vec<&str> =
            base.keys().filter(|name| self.config.saves(name) && !saved(name)).copied().collect();
        if !lost.is_empty() {
            let wanted = format!("the tensors of modules_to_save {:?}", self.config.modules_to_save);
            return Err(Error::argument("base_tensors", wanted, format!("no {}", lost.join(", no "))));
        }
        Ok(())
    }
}
