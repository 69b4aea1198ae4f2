//! Runs the command, and makes damaged copies of the reference data.
#![allow(dead_code)] // each test file uses a part of this

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The repository's reference data.
pub fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data")
}

/// What a run of the command put out.
pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn last_line(&self) -> &str {
        self.stdout.lines().last().unwrap_or_default()
    }
}

/// Runs the command.
pub fn run(arguments: &[&str]) -> Output {
    let output =
        Command::new(env!("CARGO_BIN_EXE_lora-kernels")).args(arguments).output().expect("it starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Output { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A folder of its own for one test, removed when it is dropped.
pub struct Set(PathBuf);

impl Set {
    /// An empty folder.
    pub fn empty(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    /// A copy of some files and folders of the reference data.
    pub fn of(name: &str, parts: &[&str]) -> Self {
        let set = Self::empty(name);
        parts.iter().for_each(|part| copy(&data().join(part), &set.path(part)));
        set
    }

    pub fn path(&self, inside: &str) -> PathBuf {
        self.0.join(inside)
    }

    /// Runs `verify` on the set.
    pub fn verify(&self) -> Output {
        run(&["verify", self.0.to_str().expect("UTF-8")])
    }

    /// Lets `edit` change the bytes of a file.
    pub fn edit(&self, file: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(file)).expect("a file");
        edit(&mut bytes);
        fs::write(self.path(file), bytes).expect("written");
    }

    /// Lets `edit` change a JSON file.
    pub fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        self.edit(file, |bytes| {
            let mut value = serde_json::from_slice(bytes).expect("JSON");
            edit(&mut value);
            *bytes = serde_json::to_vec(&value).expect("JSON");
        });
    }

    /// Lets `edit` change the elements of a tensor.
    pub fn edit_tensor(&self, file: &str, tensor: &str, edit: impl FnOnce(&mut [u8])) {
        self.edit(file, |bytes| {
            let (header, data) = header(bytes);
            let place =
                |i: usize| data + header[tensor]["data_offsets"][i].as_u64().expect("an offset") as usize;
            edit(&mut bytes[place(0)..place(1)]);
        });
    }

    /// Replaces a text everywhere in the header of a safetensors file.
    pub fn rename(&self, file: &str, from: &str, to: &str) {
        self.edit(file, |bytes| {
            let (_, data) = header(bytes);
            let text = String::from_utf8(bytes[8..data].to_vec()).expect("UTF-8");
            assert!(text.contains(from), "{file} has no {from}");
            let text = text.replace(from, to);
            let elements = bytes.split_off(data);
            *bytes = (text.len() as u64).to_le_bytes().to_vec();
            bytes.extend(text.into_bytes());
            bytes.extend(elements);
        });
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The header of a safetensors file, and where its data begin.
fn header(bytes: &[u8]) -> (Value, usize) {
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    (serde_json::from_slice(&bytes[8..end]).expect("JSON"), end)
}

fn copy(from: &Path, to: &Path) {
    if !from.is_dir() {
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        // Not fs::copy: the copy must be writable even where the original is not.
        fs::write(to, fs::read(from).expect("a file")).expect("written");
        return;
    }
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let name = entry.expect("an entry").file_name();
        copy(&from.join(&name), &to.join(&name));
    }
}
