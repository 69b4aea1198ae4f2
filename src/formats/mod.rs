//! Files, both ways: bitsandbytes 4-bit checkpoints ([`bitsandbytes`]) and PEFT adapters ([`peft`]), over [`safetensors`].
//!
//! Readers trust nothing: what contradicts the format or itself is an [`Error::Format`] that names
//! file, tensor and key, and what would change the result but is not supported is an
//! [`Error::Unsupported`]. No tensor is skipped.

pub mod bitsandbytes;
mod json;
pub mod peft;
pub mod safetensors;

use std::path::Path;

use crate::{Error, Result};

/// The bytes of a file.
///
/// # Errors
/// [`Error::Io`] when it cannot be read; [`Error::Format`] when it is none: opening a pipe would wait for somebody who writes.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let path = path.as_ref();
    check_file(path)?;
    std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// Refuses what is there and no file.
fn check_file(path: &Path) -> Result<()> {
    match std::fs::metadata(path).map_err(|source| Error::Io { path: path.to_owned(), source })?.is_file() {
        true => Ok(()),
        false => Err(Error::format(path.display().to_string(), "a file", "a folder or a device")),
    }
}
