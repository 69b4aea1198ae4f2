//! PEFT adapters: what is read, what is written, and what is refused.

use std::fs;
use std::path::{Path, PathBuf};

use lora_kernels::formats::peft;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/peft");

/// Every adapter folder of the reference data.
fn folders() -> Vec<PathBuf> {
    let models = fs::read_dir(DATA).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir());
    let folders = models.flat_map(|m| fs::read_dir(m).unwrap().map(|e| e.unwrap().path()));
    let mut folders: Vec<_> = folders.filter(|f| f.join(peft::CONFIG).exists()).collect();
    folders.sort();
    assert_eq!(folders.len(), 12, "{folders:?}");
    folders
}

fn files(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    (fs::read(folder.join(peft::CONFIG)).unwrap(), fs::read(folder.join(peft::MODEL)).unwrap())
}

/// What PEFT wrote, read and written again, is the same bytes: no tensor, name, dtype or field is lost.
#[test]
fn round_trip_is_byte_for_byte() {
    for folder in folders() {
        let (config, model) = files(&folder);
        let (our_config, our_model) = peft::load(&folder).unwrap().to_bytes().unwrap();
        assert_eq!(
            String::from_utf8(our_config).unwrap(),
            String::from_utf8(config).unwrap(),
            "{}",
            folder.display()
        );
        assert!(our_model == model, "{}: {}", folder.display(), peft::MODEL);
    }
}
