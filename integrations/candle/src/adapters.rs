//! PEFT folders.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;

use candle_core::Result;
use candle_nn::{Embedding, VarBuilder};
use lora_kernels::adapter::{Adapter, Stack};
use lora_kernels::formats::peft::{self, AdapterFile};

use crate::weight::{element, from_host, to_host};
use crate::{refuse, wrap};

/// The adapters of a PEFT folder, by the name of their module. It remembers which of them layers have taken.
#[derive(Debug)]
pub struct Adapters {
    file: AdapterFile,
    taken: Mutex<BTreeSet<String>>,
}

impl Adapters {
    /// Reads a folder with `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// When a file is missing, contradicts itself, or has what is not supported; see [`peft::load`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        peft::load(folder).map(Self::new).map_err(wrap)
    }

    /// Adapters that are in memory already.
    pub fn new(file: AdapterFile) -> Self {
        Self { file, taken: Mutex::default() }
    }

    /// What the folder holds.
    pub fn file(&self) -> &AdapterFile {
        &self.file
    }

    /// The adapter of a module (`model.layers.0.self_attn.q_proj`), which counts as taken.
    pub fn take(&self, module: &str) -> Option<&Adapter> {
        let adapter = self.file.adapters.get(module);
        if adapter.is_some() {
            self.mark(module);
        }
        adapter
    }

    /// What takes the place of the base model's tensor `name` at `vb` (`weight` at `lm_head`), which counts as taken. There has to be
    /// something for all that `modules_to_save` name.
    pub(crate) fn take_base_tensor(
        &self,
        vb: &VarBuilder,
        name: &str,
    ) -> Result<Option<&lora_kernels::Tensor>> {
        let full = format!("{}.{name}", vb.prefix());
        let tensor = self.file.base_tensors.get(&full);
        match tensor {
            Some(_) => self.mark(&full),
            None if self.file.config.saves(&full) && vb.contains_tensor(name) => {
                let wanted = format!("the tensors of modules_to_save {:?}", self.file.config.modules_to_save);
                return refuse("adapters", wanted, format!("no {full}"));
            }
            None => {}
        }
        Ok(tensor)
    }

    fn mark(&self, name: &str) {
        self.taken.lock().expect("nothing panics while it is held").insert(name.to_owned());
    }

    /// Loads the embedding at `vb`, with the adapter that there is for it merged into its table.
    ///
    /// # Errors
    /// When the table is missing or has another shape, or the adapter does not fit it.
    pub fn embedding(&self, vocabulary: usize, dim: usize, vb: VarBuilder) -> Result<Embedding> {
        let table = match self.take_base_tensor(&vb, "weight")? {
            Some(tensor) => from_host(tensor, vb.device())?.to_dtype(vb.dtype())?,
            None => vb.get((vocabulary, dim), "weight")?,
        };
        let Some(adapter) = self.take(&vb.prefix()) else { return Ok(Embedding::new(table, dim)) };
        let host = to_host("weight", &table)?;
        let dtype = element("dtype", vb.dtype())?;
        let merged =
            Stack::new(&[adapter], &host).and_then(|stack| stack.merge(&host, dtype)).map_err(wrap)?.weight;
        Ok(Embedding::new(from_host(&merged, vb.device())?, dim))
    }

    /// To be called when the model has been built: a module that no layer has taken would be missing from its outputs.
    ///
    /// # Errors
    /// Naming the adapters and tensors that are left.
    pub fn check_all_taken(&self) -> Result<()> {
        let taken = self.taken.lock().expect("nothing panics while it is held");
        let names = self.file.adapters.keys().chain(self.file.base_tensors.keys());
        let left: Vec<&str> = names.filter(|name| !taken.contains(*name)).map(String::as_str).collect();
        match left.is_empty() {
            true => Ok(()),
            false => refuse("adapters", "a layer for each of them", format!("none for {}", left.join(", "))),
        }
    }
}
