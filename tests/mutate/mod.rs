//! Real files, taken apart to be put together wrongly.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::path::Path;

use lora_kernels::Error;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

/// The tensors of a `.safetensors` file.
#[derive(Clone, Default)]
pub struct Tensors(pub BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    pub fn read(path: impl AsRef<Path>) -> Self {
        Self::parse(&std::fs::read(path).unwrap())
    }

    /// By the reference implementation.
    pub fn parse(bytes: &[u8]) -> Self {
        let file = SafeTensors::deserialize(bytes).unwrap();
        let tensors = file
            .iter()
            .map(|(name, t)| (name.to_owned(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())));
        Self(tensors.collect())
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut header = Map::new();
        let mut data = Vec::new();
        for (name, (dtype, shape, bytes)) in &self.0 {
            let offsets = [data.len(), data.len() + bytes.len()];
            header.insert(
                name.clone(),
                json!({ "dtype": dtype.to_string(), "shape": shape, "data_offsets": offsets }),
            );
            data.extend(bytes);
        }
        file(&Value::Object(header).to_string(), &data)
    }

    pub fn get(&mut self, name: &str) -> &mut (Dtype, Vec<usize>, Vec<u8>) {
        self.0.get_mut(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Cuts or pads a one-dimensional tensor, or one column.
    pub fn resize(&mut self, name: &str, change: isize) {
        let (dtype, shape, bytes) = self.get(name);
        shape[0] = shape[0].checked_add_signed(change).unwrap();
        bytes.resize(shape[0] * dtype.bitsize() / 8, 0);
    }

    pub fn set_f32(&mut self, name: &str, i: usize, value: f32) {
        let (dtype, _, bytes) = self.get(name);
        assert_eq!(*dtype, Dtype::F32);
        bytes[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.0.remove(from).unwrap_or_else(|| panic!("no {from}"));
        self.0.insert(to.to_owned(), tensor);
    }

    pub fn copy(&mut self, from: &str, to: &str) {
        let tensor = self.get(from).clone();
        self.0.insert(to.to_owned(), tensor);
    }

    /// Replaces text in a tensor that is one.
    pub fn edit(&mut self, name: &str, from: &str, to: &str) {
        let (_, shape, bytes) = self.get(name);
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(text.contains(from), "{text} has no {from}");
        *bytes = text.replace(from, to).into_bytes();
        *shape = vec![bytes.len()];
    }
}

/// A file of this header and data.
pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Changes the header's text.
pub fn edit_header(bytes: &[u8], change: impl FnOnce(String) -> String) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    file(&change(header), &bytes[8 + length..])
}

/// Asserts that a result is an error whose message has all of these parts.
#[track_caller]
pub fn assert_refused<T>(case: &str, result: Result<T, Error>, parts: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("{case}: was read"));
    assert!(matches!(error, Error::Format { .. } | Error::Unsupported { .. }), "{case}: {error:?}");
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{case}: no {part:?} in: {message}");
    }
}

/// A folder that is removed at the end.
pub struct Folder(pub std::path::PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("lora-kernels-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
