//! Ordinary kernels as nvcc compiles them: a matrix product on tensor cores, a quantiser, a bit of everything.

use ptx_emulator::{Class, Gpu, Launch, Module, Spec};

fn module() -> Module {
    Module::parse("tour", include_str!("kernels/tour.ptx")).unwrap()
}

fn bf16(x: f32) -> half::bf16 {
    half::bf16::from_f32(x)
}

fn upload(gpu: &Gpu, label: &str, bytes: &[u8]) -> u64 {
    let address = gpu.alloc(bytes.len(), label).unwrap();
    gpu.write(address, bytes).unwrap();
    address
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn value(i: usize) -> f32 {
    // A cheap spread of small values of both signs.
    ((i * 2654435761) >> 7 & 0xff) as f32 / 64.0 - 2.0
}

#[test]
fn matrix_product_with_async_copies_and_tensor_cores() {
    let (m, n, k) = (128usize, 64usize, 96usize);
    let a: Vec<half::bf16> = (0..m * k).map(|i| bf16(value(i))).collect();
    let b: Vec<half::bf16> = (0..n * k).map(|i| bf16(value(i + 977))).collect();
    let bytes = |v: &[half::bf16]| v.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect::<Vec<u8>>();
    let gpu = Gpu::new(Spec::a100());
    let (pa, pb) = (upload(&gpu, "a", &bytes(&a)), upload(&gpu, "b", &bytes(&b)));
    let pc = gpu.alloc(4 * m * n, "c").unwrap();
    let mut params = Vec::new();
    for p in [pa, pb, pc] {
        params.extend(p.to_le_bytes());
    }
    for d in [m as u32, n as u32, k as u32] {
        params.extend(d.to_le_bytes());
    }
    params.extend((0..16).flat_map(|_| 1f32.to_le_bytes()));
    params.resize(104, 0);
    let launch = Launch {
        grid: [1, 2, 1],
        block: [128, 1, 1],
        cluster: [1; 3],
        dynamic_shared: 2 * 64 * 40 * 2,
        overlap: false,
    };
    let counters = gpu.launch(&module(), "mm", &launch, &[&params]).unwrap();
    let mut out = vec![0; 4 * m * n];
    gpu.read(pc, &mut out).unwrap();
    let c = floats(&out);
    for i in 0..m {
        for j in 0..n {
            let (mut exact, mut size) = (0f64, 0f64);
            for l in 0..k {
                let p = a[i * k + l].to_f64() * b[j * k + l].to_f64();
                exact += p;
                size += p.abs();
            }
            // One rounding to f32 per group of 16 products.
            let bound = size * (k / 16) as f64 * f32::EPSILON as f64;
            assert!((c[i * n + j] as f64 - exact).abs() <= bound, "{i} {j}: {} {exact}", c[i * n + j]);
        }
    }
    assert_eq!(counters.matrix_ops, (m * n * k) as u64);
    assert_eq!(counters.async_bytes, (m * k + 2 * n * k) as u64 * 2);
    assert!(counters.class(Class::Matrix).warps > 0);
}

#[test]
fn quantiser_with_shuffles_and_constant_memory() {
    let (n, bs, threads) = (1000usize, 64usize, 64u32);
    let x: Vec<half::bf16> = (0..n).map(|i| bf16(value(i))).collect();
    let codebook: Vec<f32> = (0..16).map(|i| (i as f32 - 7.5) / 7.5).collect();
    let gpu = Gpu::new(Spec::h200());
    let module = module();
    let px = upload(&gpu, "x", &x.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect::<Vec<_>>());
    let pcb = upload(&gpu, "codebook", &codebook.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    let blocks = n.div_ceil(bs);
    let (pq, pam) = (gpu.alloc(n / 2, "q").unwrap(), gpu.alloc(4 * blocks, "absmax").unwrap());
    let bytes = |v: u64| v.to_le_bytes();
    gpu.launch(
        &module,
        "quant",
        &Launch::linear(blocks as u32, threads),
        &[&bytes(px), &bytes(pq), &bytes(pam), &bytes(pcb), &bytes(n as u64), &(bs as u32).to_le_bytes()],
    )
    .unwrap();
    let (mut q, mut am) = (vec![0; n / 2], vec![0; 4 * blocks]);
    gpu.read(pq, &mut q).unwrap();
    gpu.read(pam, &mut am).unwrap();
    let am = floats(&am);
    for block in 0..blocks {
        let part = &x[block * bs..n.min((block + 1) * bs)];
        let absmax = part.iter().map(|v| v.to_f32().abs()).fold(0.0, f32::max);
        assert_eq!(am[block], absmax);
        for (i, v) in part.iter().enumerate() {
            let v = v.to_f32() / absmax;
            let (mut best, mut distance) = (0, 1e30);
            for (c, code) in codebook.iter().enumerate() {
                if (code - v).abs() < distance {
                    (best, distance) = (c, (code - v).abs());
                }
            }
            let at = block * bs + i;
            let got = if at % 2 == 0 { q[at / 2] >> 4 } else { q[at / 2] & 15 };
            assert_eq!(got as usize, best, "element {at}");
        }
    }
    let mut count = [0; 4];
    gpu.read(gpu.variable(&module, "counter").unwrap(), &mut count).unwrap();
    assert_eq!(u32::from_le_bytes(count), blocks as u32);
}
