//! The folder that is read.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use lora_kernels::formats::bitsandbytes::{Parameter, Reader};
use serde_json::{Map, Value};

/// Names within a model's folder.
pub const MODEL: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const CONFIG: &str = "config.json";

/// Ends of files that hold weights in some form. They are those of the unchanged model, and are not carried over.
const WEIGHTS: [&str; 9] = [
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
];

/// A model's folder, with its tensors open.
pub struct Source {
    folder: PathBuf,
    reader: Reader<'static>,
    config: Map<String, Value>,
}

impl Source {
    /// Opens a folder with `config.json` and `model.safetensors`, or shards and their index.
    pub fn open(folder: &Path) -> Result<Self> {
        let place = folder.display();
        ensure!(
            folder.is_dir(),
            "{place}: wanted a model's folder, got {}",
            if folder.exists() { "a file" } else { "none" }
        );
        let found = [MODEL, INDEX].map(|name| folder.join(name).exists());
        match found {
            [true, true] => bail!("{place}: wanted {MODEL} or {INDEX}, got both"),
            [false, false] => bail!("{place}: wanted {MODEL}, or shards and {INDEX}, got neither"),
            _ => {}
        }
        let reader = Reader::open(folder)?;
        let config = reader.config().with_context(|| format!("{place}: wanted {CONFIG}, got none"))?.clone();
        Ok(Self { folder: folder.to_owned(), reader, config })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its tensors.
    pub fn reader(&self) -> &Reader<'static> {
        &self.reader
    }

    /// Its `config.json`.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// Its index, where the model is sharded.
    pub fn index(&self) -> Result<Option<Value>> {
        let path = self.folder.join(INDEX);
        if !path.exists() {
            return Ok(None);
        }
        let text = lora_kernels::formats::read(&path)?;
        serde_json::from_slice(&text).map(Some).with_context(|| path.display().to_string())
    }

    /// The names of its 4-bit weights.
    pub fn four_bit(&self) -> impl Iterator<Item = &String> {
        let is_four_bit = |(_, parameter): &(&String, &Parameter)| matches!(parameter, Parameter::Nf4 { .. });
        self.reader.parameters().iter().filter(is_four_bit).map(|(name, _)| name)
    }

    /// Files that belong to the model and hold no weights (the tokenizer and so on), and files that hold some in another form;
    /// by their paths within the folder. Hidden ones are neither.
    pub fn others(&self) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let (mut carried, mut left) = (Vec::new(), Vec::new());
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            let path = self.folder.join(&folder);
            let entries = fs::read_dir(&path).with_context(|| path.display().to_string())?;
            for entry in entries {
                let name = entry.with_context(|| path.display().to_string())?.file_name();
                let (inside, text) = (folder.join(&name), name.to_string_lossy().into_owned());
                if text.starts_with('.')
                    || folder.as_os_str().is_empty() && (text == CONFIG || self.reads(&text))
                {
                    continue;
                }
                if self.folder.join(&inside).is_dir() {
                    folders.push(inside);
                } else if WEIGHTS.iter().any(|end| text.ends_with(end)) {
                    left.push(inside);
                } else {
                    carried.push(inside);
                }
            }
        }
        carried.sort();
        left.sort();
        Ok((carried, left))
    }

    /// Whether this is one of the files that the model was read from.
    fn reads(&self, name: &str) -> bool {
        name == INDEX || self.reader.files().iter().any(|file| file_name(file.name()) == name)
    }
}

/// The last part of a path.
pub fn file_name(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path)
}
