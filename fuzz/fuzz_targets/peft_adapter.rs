//! Any bytes as an adapter: `adapter_config.json`, a zero byte, `adapter_model.safetensors` (as [`container::file`]).

#![no_main]

mod container;

use libfuzzer_sys::fuzz_target;
use lora_kernels::formats::peft::AdapterFile;

fuzz_target!(|input: &[u8]| {
    let (config, model) = container::split(input);
    let Ok(adapter) = AdapterFile::parse(config, &container::file(model)) else { return };
    for (module, parameters) in &adapter.adapters {
        assert_eq!(parameters.rank(), adapter.config.rank_of(module));
        assert!(parameters.lora_a().numel() == 0 || parameters.scaling().is_finite());
    }
    let (config, model) = adapter.to_bytes().expect("what was read can be written");
    let again = AdapterFile::parse(&config, &model).expect("what is written can be read");
    assert!(again.to_bytes().expect("what was written once can be written") == (config, model));
});
