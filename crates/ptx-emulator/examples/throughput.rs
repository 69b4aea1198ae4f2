//! How fast the emulator is: thread instructions per second and core, all checks on.
//!
//! `cargo run --release -p ptx-emulator --example throughput`

use std::time::Instant;

use ptx_emulator::{Counters, Gpu, Launch, Module, Spec, Swizzle, TensorMap};

fn upload(gpu: &Gpu, label: &str, bytes: &[u8]) -> u64 {
    let address = gpu.alloc(bytes.len(), label).expect("memory");
    gpu.write(address, bytes).expect("inside the allocation");
    address
}

/// Time that this thread has been running, where Linux tells it: others may be using the cores.
fn now(start: Instant) -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
    nanoseconds.map_or(start.elapsed().as_secs_f64(), |n| n / 1e9)
}

fn report(name: &str, run: impl Fn() -> Counters) {
    let start = Instant::now();
    let begin = now(start);
    let (mut instructions, mut warps, mut products, mut rounds) = (0, 0, 0, 0);
    while now(start) - begin < 1.0 || rounds < 2 {
        let counters = run();
        instructions += counters.total().threads;
        warps += counters.total().warps;
        products += counters.matrix_ops;
        rounds += 1;
    }
    let seconds = now(start) - begin;
    println!(
        "{name:<24}{:>10.1} M thread instructions/s/core{:>10.1} ns per warp instruction{:>8.0} M multiply-adds/s",
        instructions as f64 / seconds / 1e6,
        seconds * 1e9 / warps as f64,
        products as f64 / seconds / 1e6
    );
}

fn main() {
    let module = Module::parse("tour", include_str!("../tests/kernels/tour.ptx")).expect("PTX that loads");
    // One thread of the host, so that the figure is per core.
    let gpu = Gpu::new(Spec { host_threads: 1, ..Spec::h200() });

    let (m, n, k) = (256usize, 256usize, 512usize);
    let ones: Vec<u8> = (0..m * k).flat_map(|_| 0x3f80u16.to_le_bytes()).collect();
    let (a, b) = (upload(&gpu, "a", &ones), upload(&gpu, "b", &ones));
    let c = gpu.alloc(4 * m * n, "c").expect("memory");
    let mut params: Vec<u8> = [a, b, c].iter().flat_map(|p| p.to_le_bytes()).collect();
    params.extend([m as u32, n as u32, k as u32].iter().flat_map(|d| d.to_le_bytes()));
    params.extend((0..16).flat_map(|_| 1f32.to_le_bytes()));
    params.resize(104, 0);
    report("matrix product", || {
        let launch = Launch {
            grid: [n as u32 / 64, m as u32 / 64, 1],
            block: [128, 1, 1],
            cluster: [1; 3],
            dynamic_shared: 2 * 64 * 40 * 2,
            overlap: false,
        };
        gpu.launch(&module, "mm", &launch, &[&params]).expect("no fault")
    });

    let (count, blocksize) = (1usize << 18, 1024usize);
    let x = upload(
        &gpu,
        "x",
        &(0..count).flat_map(|i| (0x3f80 + i as u16 % 64).to_le_bytes()).collect::<Vec<_>>(),
    );
    let codebook =
        upload(&gpu, "codebook", &(0..16).flat_map(|i| (i as f32 / 16.0).to_le_bytes()).collect::<Vec<_>>());
    let (q, absmax) =
        (gpu.alloc(count / 2, "q").expect("memory"), gpu.alloc(count / 256, "absmax").expect("memory"));
    let le = |v: u64| v.to_le_bytes();
    report("quantiser", || {
        let launch = Launch::linear((count / blocksize) as u32, 128);
        let args: [&[u8]; 6] = [
            &le(x),
            &le(q),
            &le(absmax),
            &le(codebook),
            &le(count as u64),
            &(blocksize as u32).to_le_bytes(),
        ];
        gpu.launch(&module, "quant", &launch, &args).expect("no fault")
    });

    let hopper =
        Module::parse("hopper", include_str!("../tests/kernels/hopper.ptx")).expect("PTX that loads");
    let map = |address: u64, rows: usize, tile: u32| TensorMap {
        address,
        element_bytes: 2,
        dims: vec![k as u64, rows as u64],
        strides: vec![2 * k as u64],
        box_dims: vec![64, tile],
        swizzle: Swizzle::Bytes128,
        fill_nan: false,
    };
    let mut params = Vec::new();
    params.extend(map(a, m, 64).encode().expect("a map"));
    params.extend(map(b, n, 16).encode().expect("a map"));
    params.extend(c.to_le_bytes());
    params.extend([n as u32, k as u32].iter().flat_map(|v| v.to_le_bytes()));
    params.resize(320, 0);
    report("warpgroup product", || {
        let launch = Launch {
            grid: [n as u32 / 16, m as u32 / 64, 1],
            block: [384, 1, 1],
            dynamic_shared: 4 * 16384,
            ..Launch::linear(1, 1)
        };
        gpu.launch(&hopper, "product_pipeline", &launch, &[&params]).expect("no fault")
    });
}
