//! The header in `include/` is what cbindgen makes of the sources.

use std::path::Path;

#[test]
fn header_is_fresh() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(here.join("cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_src(here.join("src/lib.rs"));
    let mut made = Vec::new();
    builder.with_config(config).generate().unwrap().write(&mut made);
    let path = here.join("include/lora_kernels.h");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read(&path).unwrap_or_default();
    assert!(
        made == kept,
        "{} is not fresh: BLESS=1 cargo test -p lora-kernels-c --test header",
        path.display()
    );
}
