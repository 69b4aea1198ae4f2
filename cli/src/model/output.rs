//! The folder that is written: it has its name when it is complete, and not before.
//!
//! Everything is written to `.NAME.partial` beside it, brought to the disk, and renamed at the end. A run that was cut off leaves
//! that folder behind, and the next one with the same output empties it; a run that is still going on holds a lock on it.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use lora_kernels::formats::peft;

use super::source::{CONFIG, INDEX, MODEL};

/// A folder on its way.
pub struct Output {
    path: PathBuf,
    partial: PathBuf,
    /// The model that it replaces, while it does.
    replaced: PathBuf,
    complete: bool,
    /// Held as long as this lives, where folders can be locked.
    _lock: Option<File>,
}

impl Output {
    /// Prepares to write the folder `path`. It must not be one of the `inputs`, nor lie in one, nor hold one. What is there already
    /// is replaced with `force`, if it looks like a model or an adapter.
    pub fn create(path: &Path, inputs: &[&Path], force: bool) -> Result<Self> {
        let place = path.display();
        let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else {
            bail!("--out {place}: wanted the name of a folder");
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let parent = parent.canonicalize().with_context(|| format!("--out {place}: {}", parent.display()))?;
        let hidden = |end: &str| {
            let mut hidden = std::ffi::OsString::from(".");
            hidden.push(name);
            hidden.push(end);
            parent.join(hidden)
        };
        let (path, partial, replaced) = (parent.join(name), hidden(".partial"), hidden(".replaced"));
        for input in inputs {
            let input = input.canonicalize().with_context(|| input.display().to_string())?;
            let real = path.canonicalize().unwrap_or_else(|_| path.clone());
            if real.starts_with(&input) || input.starts_with(&real) {
                bail!("--out {place}: wanted a folder apart from the input {}", input.display());
            }
        }
        // A run that replaced a model was cut off between its two renames.
        if replaced.exists() && !path.exists() {
            fs::rename(&replaced, &path).with_context(|| replaced.display().to_string())?;
        }
        if path.exists() {
            ensure!(force, "--out {place}: is there already (--force replaces it)");
            let known = [CONFIG, MODEL, INDEX, peft::CONFIG].iter().any(|name| path.join(name).exists());
            ensure!(
                known || is_empty(&path),
                "--out {place}: is there already, and is no model's or adapter's folder: not replaced"
            );
        }
        let lock = claim(&partial).with_context(|| format!("--out {place}: cannot be written"))?;
        Ok(Self { path, partial, replaced, complete: false, _lock: lock })
    }

    /// A path within the folder, while it has its first name. Folders on the way are made.
    pub fn path(&self, inside: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.partial.join(inside);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        Ok(path)
    }

    /// Writes a small file.
    pub fn write(&self, inside: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(inside)?;
        let written =
            File::create(&path).and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
        written.with_context(|| path.display().to_string())
    }

    /// Copies a file to the same place within the folder.
    pub fn carry(&self, from: &Path, inside: &Path) -> Result<()> {
        let (from, to) = (from.join(inside), self.path(inside)?);
        let copied = lora_kernels::formats::read(&from)?;
        let written =
            File::create(&to).and_then(|mut file| file.write_all(&copied).and_then(|()| file.sync_all()));
        written.with_context(|| to.display().to_string())
    }

    /// Gives the folder its name. Its files have been brought to the disk.
    pub fn commit(mut self) -> Result<()> {
        sync_folder(&self.partial);
        if self.path.exists() {
            if self.replaced.exists() {
                fs::remove_dir_all(&self.replaced).with_context(|| self.replaced.display().to_string())?;
            }
            fs::rename(&self.path, &self.replaced).with_context(|| self.path.display().to_string())?;
        }
        if let Err(error) = fs::rename(&self.partial, &self.path) {
            // Back to what it was; the error that matters is the first one.
            let _ = fs::rename(&self.replaced, &self.path);
            return Err(error).with_context(|| self.path.display().to_string());
        }
        self.complete = true;
        self.path.parent().into_iter().for_each(sync_folder);
        if self.replaced.exists() {
            fs::remove_dir_all(&self.replaced).with_context(|| self.replaced.display().to_string())?;
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.complete {
            // What went wrong has been said, or is about to be.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Makes the folder, or empties the one that an earlier run left.
fn claim(partial: &Path) -> Result<Option<File>> {
    match fs::create_dir(partial) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        done => done.with_context(|| partial.display().to_string())?,
    }
    let lock = if cfg!(unix) { Some(File::open(partial)?) } else { None };
    if let Some(lock) = &lock {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("{}: another run is writing it", partial.display()),
            // Some network file systems have no locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
    }
    for entry in fs::read_dir(partial)? {
        let path = entry?.path();
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| path.display().to_string())?;
    }
    Ok(lock)
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Brings the names in a folder to the disk, where the system knows how.
fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}
