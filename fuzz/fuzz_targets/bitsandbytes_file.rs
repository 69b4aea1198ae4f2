//! Any bytes as a 4-bit checkpoint: an error or a checkpoint that can be used, and that reads back as what was written.

#![no_main]

mod container;

use libfuzzer_sys::fuzz_target;
use lora_kernels::formats::bitsandbytes::Reader;

fuzz_target!(|input: &[u8]| {
    let bytes = container::file(input);
    let Ok(checkpoint) = Reader::parse("fuzz", &bytes).and_then(Reader::load) else { return };
    for matrix in checkpoint.nf4.values() {
        assert_eq!(matrix.dequantize::<f32>().len(), matrix.numel());
    }
    // A table of its own cannot be written; all else that was read can.
    let Ok(written) = checkpoint.to_bytes() else { return };
    let again = Reader::parse("written", &written).and_then(Reader::load).expect("what is written can be read");
    assert!(again.to_bytes().expect("what was written once can be written") == written);
});
