//! The `lora-kernels` command.
fn main() {}
