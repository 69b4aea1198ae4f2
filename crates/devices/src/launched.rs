//! Which kernels the tests have launched: a file for every entry, in `target/<profile>/launched`, or in the folder that
//! `LORA_KERNELS_LAUNCHED` names, as test binaries are processes of their own. It holds a hash of the PTX, so that a record of
//! an older kernel does not count.

use std::collections::HashSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use lora_kernels::cuda::{Image, Kernel, Target, modules};

/// Whether a test has launched the kernel, as it is in this build: on the emulator without a fault, on a GPU without an error
/// when it was enqueued.
pub fn was_launched(kernel: Kernel) -> bool {
    let records =
        folder().and_then(|folder| fs::read_to_string(folder.join(kernel.entry)).ok()).unwrap_or_default();
    modules().iter().filter(|image| image.module == kernel.module).any(|image| records == hash(image))
}

pub(crate) fn record(kernel: Kernel, capability: (u32, u32)) {
    static RECORDED: Mutex<Option<HashSet<&str>>> = Mutex::new(None);
    let mut recorded = RECORDED.lock().unwrap_or_else(PoisonError::into_inner);
    if !recorded.get_or_insert_default().insert(kernel.entry) {
        return;
    }
    let target = Target::for_capability(capability).expect("the device runs kernels");
    let image = modules().iter().find(|image| image.module == kernel.module && image.target == target);
    if let (Some(folder), Some(image)) = (folder(), image) {
        let written =
            fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join(kernel.entry), hash(image)));
        written.unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    }
}

/// Unless it is named only for tests: their binaries lie in `target/<profile>/deps`.
fn folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("LORA_KERNELS_LAUNCHED") {
        return Some(folder.into());
    }
    let deps = std::env::current_exe().ok()?.parent()?.to_owned();
    deps.ends_with("deps").then(|| deps.with_file_name("launched"))
}

fn hash(image: &Image) -> String {
    let mut hasher = DefaultHasher::new();
    image.stored().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
