//! Loads PTX files and lists their entries, or says what is not supported.

fn main() {
    for path in std::env::args().skip(1) {
        let text = std::fs::read_to_string(&path).expect("a readable file");
        match ptx_emulator::Module::parse(&path, &text) {
            Err(e) => println!("{e}"),
            Ok(module) => {
                for e in module.entries() {
                    println!(
                        "{path}: {} ({} instructions, {} live registers, {} B static shared memory, {} B local)",
                        e.name, e.instructions, e.live_registers, e.static_shared, e.local
                    );
                }
            }
        }
    }
}
