//! `config.json` and its block `quantization_config`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::quant_state::{DTYPES, QUANT_TYPES, QuantState, name};
use super::{Checkpoint, Parameter, Storage};
use crate::formats::json;
use crate::nf4::{Nf4Matrix, QuantType};
use crate::{DType, Error, Result};

/// The block's key.
const BLOCK: &str = "quantization_config";

/// Reads the file.
pub(super) fn read(path: &Path) -> Result<Map<String, Value>> {
    json::object(&path.display().to_string(), &crate::formats::read(path)?)
}

/// Checks that the block, where there is one, says of the weights what their own quant_states say.
pub(super) fn check(config: &Map<String, Value>, parameters: &BTreeMap<String, Parameter>) -> Result<()> {
    let Some(Value::Object(block)) = config.get(BLOCK) else { return Ok(()) };
    let place = |key: &str| format!("config.json: {BLOCK}: {key}");
    if let Some(method) = block.get("quant_method").filter(|method| *method != "bitsandbytes") {
        return Err(Error::unsupported(place("quant_method"), json::short(method)));
    }
    if block.get("load_in_8bit") == Some(&Value::Bool(true)) {
        return Err(Error::unsupported(place("load_in_8bit"), "LLM.int8"));
    }
    for (weight, parameter) in parameters {
        let Parameter::Nf4 { state, storage } = parameter else { continue };
        for (key, has) in said(state.quant_type, state.nested.is_some(), *storage) {
            if let Some(says) = block.get(key).filter(|says| **says != has) {
                return Err(Error::format(
                    place(key),
                    format!("{has}, as {weight} has it"),
                    json::short(says),
                ));
            }
        }
    }
    Ok(())
}

/// What the block says of all weights.
fn said(quant_type: QuantType, nested: bool, storage: Storage) -> [(&'static str, Value); 3] {
    [
        ("bnb_4bit_quant_type", json!(name(&QUANT_TYPES, quant_type))),
        ("bnb_4bit_use_double_quant", json!(nested)),
        ("bnb_4bit_quant_storage", json!(storage.name())),
    ]
}

impl Checkpoint {
    /// The `quantization_config` with which transformers loads this checkpoint, its codes stored as `storage`. What
    /// [`Checkpoint::config`] has there already is kept (the compute type, the modules to skip), where it is not about
    /// the weights.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no 4-bit weight, or some differ in quantisation type or double quantisation, which the
    /// block cannot say.
    pub fn quantization_config(&self, storage: Storage) -> Result<Value> {
        let of = |matrix: &Nf4Matrix| {
            let state = QuantState::of(matrix);
            (state.quant_type, state.nested.is_some())
        };
        let Some(first) = self.nf4.values().next() else {
            return Err(Error::argument("checkpoint.nf4", "a 4-bit weight", "none"));
        };
        if let Some((weight, _)) = self.nf4.iter().find(|(_, matrix)| of(matrix) != of(first)) {
            let wanted = "the quantisation of the other weights";
            return Err(Error::argument(format!("checkpoint.nf4[{weight:?}]"), wanted, "another"));
        }
        let before = self.config.as_ref().and_then(|config| config.get(BLOCK));
        Ok(block(before, &QuantState::of(first), storage, first.dtype(), None))
    }

    /// `config.json` as it belongs beside the checkpoint: with the block if there are 4-bit weights, else without.
    pub(super) fn config_text(&self, storage: Storage) -> Result<Option<String>> {
        let Some(config) = &self.config else { return Ok(None) };
        let mut config = without_quantization(config);
        if !self.nf4.is_empty() {
            config.insert(BLOCK.into(), self.quantization_config(storage)?);
        }
        Ok(Some(text(config)))
    }
}

/// `config.json` with the `quantization_config` with which transformers loads weights quantised like `state`. What the block
/// has already is kept, where it is not about the weights.
///
/// `compute` is the type that it computes in. `kept` are the modules that are not quantised, where they are others than those
/// that transformers keeps by itself: the output embeddings, and what is tied to them.
pub fn with_quantization(
    config: &Map<String, Value>,
    state: &QuantState,
    storage: Storage,
    compute: DType,
    kept: Option<&[String]>,
) -> Map<String, Value> {
    let block = block(config.get(BLOCK), state, storage, compute, kept);
    let mut config = config.clone();
    config.insert(BLOCK.into(), block);
    config
}

/// `config.json` of a model without 4-bit weights.
pub fn without_quantization(config: &Map<String, Value>) -> Map<String, Value> {
    let mut config = config.clone();
    config.remove(BLOCK);
    config
}

/// The block.
fn block(
    before: Option<&Value>,
    state: &QuantState,
    storage: Storage,
    compute: DType,
    kept: Option<&[String]>,
) -> Value {
    let mut block = Map::new();
    block.insert("_load_in_4bit".into(), json!(true));
    block.insert("_load_in_8bit".into(), json!(false));
    block.insert("bnb_4bit_compute_dtype".into(), json!(name(&DTYPES, compute)));
    block.insert("llm_int8_enable_fp32_cpu_offload".into(), json!(false));
    block.insert("llm_int8_has_fp16_weight".into(), json!(false));
    block.insert("llm_int8_skip_modules".into(), kept.map_or(Value::Null, |kept| json!(kept)));
    block.insert("llm_int8_threshold".into(), json!(6.0));
    block.insert("load_in_4bit".into(), json!(true));
    block.insert("load_in_8bit".into(), json!(false));
    block.insert("quant_method".into(), json!("bitsandbytes"));
    if let Some(Value::Object(before)) = before {
        block.extend(before.clone());
    }
    let said = said(state.quant_type, state.nested.is_some(), storage);
    block.extend(said.map(|(key, value)| (key.to_owned(), value)));
    block.sort_keys();
    Value::Object(block)
}

/// The file's text, as transformers writes it: keys sorted, two spaces.
pub fn text(mut config: Map<String, Value>) -> String {
    config.sort_keys();
    format!("{:#}\n", Value::Object(config))
}
