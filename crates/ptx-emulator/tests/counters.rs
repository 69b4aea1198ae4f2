//! The counts are exact: patterns whose numbers follow from the rules of the hardware.

use ptx_emulator::{Class, Counters, Gpu, Launch, Module, Spec};

fn launch(gpu: &Gpu, body: &str, blocks: u32, threads: u32, x: u64) -> Counters {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 x) {{\n\
         .reg .pred p;\n.reg .b32 %r<16>;\n.reg .b64 %rd<8>;\n.shared .align 128 .b8 s[16384];\n\
         ld.param.u64 %rd1, [x];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmov.u32 %r3, s;\n{body}\nret;\n}}\n"
    );
    let module = Module::parse("counters", &text).unwrap_or_else(|e| panic!("{e}\n{body}"));
    gpu.launch(&module, "k", &Launch::linear(blocks, threads), &[&x.to_le_bytes()])
        .unwrap_or_else(|fault| panic!("{body}: {fault}"))
}

fn with(body: &str) -> Counters {
    let gpu = Gpu::new(Spec::a100());
    let x = gpu.alloc(1 << 16, "x").unwrap();
    gpu.write(x, &[0; 1 << 16]).unwrap();
    launch(&gpu, body, 1, 32, x)
}

/// `(sectors, ideal)` of a load where lane `i` reads `size` bytes at `first + i * stride`.
fn sectors(size: u32, stride: u32, first: u32) -> (u64, u64) {
    let ty = match size {
        1 => "u8 %r5",
        2 => "u16 %r5",
        4 => "u32 %r5",
        8 => "v2.u32 {%r5, %r6}",
        _ => "v4.u32 {%r5, %r6, %r7, %r8}",
    };
    let body = format!(
        "mul.wide.u32 %rd2, %r1, {stride}; add.u64 %rd2, %rd1, %rd2; ld.global.{}, [%rd2+{first}];",
        ty
    );
    let t = with(&body).global_loads;
    assert_eq!((t.requests, t.bytes), (1, 32 * size as u64));
    (t.sectors, t.ideal_sectors)
}

#[test]
fn global_sectors() {
    // Coalesced: exactly what is needed.
    assert_eq!(sectors(4, 4, 0), (4, 4));
    assert_eq!(sectors(16, 16, 0), (16, 16));
    assert_eq!(sectors(1, 1, 0), (1, 1));
    assert_eq!(sectors(2, 2, 0), (2, 2));
    // Off by 16 bytes: one more sector.
    assert_eq!(sectors(4, 4, 16), (5, 4));
    // Strided: one sector for every lane, or every second.
    assert_eq!(sectors(4, 32, 0), (32, 4));
    assert_eq!(sectors(4, 16, 0), (16, 4));
    assert_eq!(sectors(4, 128, 0), (32, 4));
    // All lanes the same word.
    assert_eq!(sectors(4, 0, 64), (1, 1));
    // Backwards is as good as forwards.
    let t = with(
        "sub.u32 %r4, 31, %r1; mul.wide.u32 %rd2, %r4, 4; add.u64 %rd2, %rd1, %rd2; ld.global.u32 %r5, [%rd2];",
    );
    assert_eq!((t.global_loads.sectors, t.global_loads.ideal_sectors), (4, 4));
    assert_eq!(t.global_loads.sector_ratio(), 1.0);
}

#[test]
fn distinct_sectors_over_a_launch() {
    let gpu = Gpu::new(Spec::a100());
    let x = gpu.alloc(1 << 16, "x").unwrap();
    gpu.write(x, &[0; 1 << 16]).unwrap();
    // 8 blocks read the same 128 bytes and write 128 of their own.
    let body = "mul.wide.u32 %rd2, %r1, 4; add.u64 %rd3, %rd1, %rd2; ld.global.u32 %r5, [%rd3];\n\
                mul.wide.u32 %rd4, %r2, 128; add.u64 %rd3, %rd3, %rd4; st.global.u32 [%rd3+4096], %r5;";
    for _ in 0..2 {
        let c = launch(&gpu, body, 8, 32, x);
        assert_eq!((c.global_loads.sectors, c.global_loads.distinct_sectors), (32, 4));
        assert_eq!((c.global_stores.sectors, c.global_stores.distinct_sectors), (32, 32));
        assert_eq!(c.blocks, 8);
    }
}

/// Conflicts of a store and a load where lane `i` accesses `size` bytes at `i * stride`.
fn conflicts(size: u32, stride: u32) -> (u64, u64) {
    let vector = match size {
        4 => "u32 %r5",
        8 => "v2.u32 {%r5, %r6}",
        _ => "v4.u32 {%r5, %r6, %r7, %r8}",
    };
    let (ty, data) = vector.split_once(' ').unwrap();
    let body = format!(
        "mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0; mov.u32 %r8, 0; mad.lo.u32 %r4, %r1, {stride}, %r3;\n\
         st.shared.{ty} [%r4], {data}; bar.warp.sync -1; ld.shared.{ty} {data}, [%r4];"
    );
    let c = with(&body);
    assert_eq!((c.shared_loads.bytes, c.shared_stores.bytes), (32 * size as u64, 32 * size as u64));
    (c.shared_stores.conflicts, c.shared_loads.conflicts)
}

#[test]
fn bank_conflicts() {
    assert_eq!(conflicts(4, 4), (0, 0));
    assert_eq!(conflicts(4, 8), (1, 1));
    assert_eq!(conflicts(4, 16), (3, 3));
    assert_eq!(conflicts(4, 128), (31, 31));
    assert_eq!(conflicts(4, 132), (0, 0));
    // 8 bytes: two halves of the warp; 16 bytes: four quarters.
    assert_eq!(conflicts(8, 8), (0, 0));
    assert_eq!(conflicts(8, 16), (2, 2));
    assert_eq!(conflicts(16, 16), (0, 0));
    assert_eq!(conflicts(16, 32), (4, 4));
    assert_eq!(conflicts(16, 128), (28, 28));
    assert_eq!(conflicts(16, 144), (0, 0));
    // Threads that read the same word share it.
    let c = with(
        "st.shared.u32 [%r3+64], 0; bar.warp.sync -1;"
            .replace("st.", "setp.eq.u32 p, %r1, 0; @p st.")
            .as_str(),
    );
    assert_eq!(c.shared_stores.conflicts, 0);
    let c = with(
        "setp.eq.u32 p, %r1, 0; @p st.shared.u32 [%r3+64], 0; bar.warp.sync -1; ld.shared.u32 %r5, [%r3+64];",
    );
    assert_eq!((c.shared_loads.bytes, c.shared_loads.conflicts), (128, 0));
}

#[test]
fn matrix_loads_and_their_conflicts() {
    // Rows 64 bytes apart fall on two groups of banks: four rows share one. 80 bytes apart all is spread.
    for (pitch, extra) in [(16, 0), (64, 3), (80, 0), (128, 7)] {
        let body = format!(
            "mov.u32 %r4, 0; L: mad.lo.u32 %r5, %r4, 128, %r3; mad.lo.u32 %r5, %r1, 4, %r5; st.shared.u32 [%r5], %r4;\n\
             add.u32 %r4, %r4, 1; setp.lt.u32 p, %r4, 64; @p bra L; bar.warp.sync -1; mad.lo.u32 %r5, %r1, {pitch}, %r3;\n\
             ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r5];"
        );
        let c = with(&body);
        assert_eq!((c.shared_loads.requests, c.shared_loads.bytes), (4, 512));
        assert_eq!(c.shared_loads.conflicts, 4 * extra, "pitch {pitch}");
        assert_eq!(c.class(Class::Matrix).warps, 1);
    }
}

#[test]
fn instructions_by_class() {
    let c = with(
        "add.u32 %r4, %r1, 1; setp.lt.u32 p, %r1, 8; @p add.u32 %r4, %r4, 1; cvt.u64.u32 %rd2, %r4;\n\
         @p bra E; mul.lo.u32 %r4, %r4, 3; E: shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;",
    );
    let class = |class| (c.class(class).warps, c.class(class).threads);
    // add, guarded add (8 lanes), mul (24 lanes).
    assert_eq!(class(Class::Integer), (3, 32 + 8 + 24));
    assert_eq!(class(Class::Predicate), (1, 32));
    assert_eq!(class(Class::Convert), (1, 32));
    // The branch is taken by 8 lanes; `ret` by all.
    assert_eq!(class(Class::Branch), (2, 8 + 32));
    assert_eq!(class(Class::Warp), (1, 32));
    // ld.param; mov of three special values.
    assert_eq!(class(Class::Load), (1, 32));
    assert_eq!(class(Class::Move), (3, 96));
    assert!(c.to_string().contains("integer"));
}

#[test]
fn counts_do_not_depend_on_the_threads_of_the_host() {
    let body = "mul.wide.u32 %rd2, %r1, 4; add.u64 %rd3, %rd1, %rd2; mul.wide.u32 %rd4, %r2, 128;\n\
                add.u64 %rd3, %rd3, %rd4; st.global.u32 [%rd3], %r1; ld.global.u32 %r5, [%rd3]; red.global.add.u32 [%rd1+8192], %r5;";
    let runs: Vec<Counters> = [1, 2, 5]
        .map(|host_threads| {
            let gpu = Gpu::new(Spec { host_threads, ..Spec::a100() });
            let x = gpu.alloc(1 << 14, "x").unwrap();
            gpu.write(x, &[0; 1 << 14]).unwrap();
            launch(&gpu, body, 40, 32, x)
        })
        .to_vec();
    assert_eq!(runs[0], runs[1]);
    assert_eq!(runs[0], runs[2]);
    assert_eq!(runs[0].atomics, 40 * 32);
}

#[test]
fn source_lines_and_hot_spots() {
    let module = Module::parse("tour", include_str!("kernels/tour.ptx")).unwrap();
    let gpu = Gpu::new(Spec::a100());
    let (m, n, k) = (64u32, 64, 64);
    let ones: Vec<u8> = (0..m * k).flat_map(|_| 0x3f80u16.to_le_bytes()).collect();
    let upload = |name: &str| {
        let p = gpu.alloc(ones.len(), name).unwrap();
        gpu.write(p, &ones).unwrap();
        p
    };
    let (a, b) = (upload("a"), upload("b"));
    let c = gpu.alloc(4 * (m * n) as usize, "c").unwrap();
    let mut params: Vec<u8> = [a, b, c].iter().flat_map(|p| p.to_le_bytes()).collect();
    params.extend([m, n, k].iter().flat_map(|d| d.to_le_bytes()));
    params.extend((0..16).flat_map(|_| 1f32.to_le_bytes()));
    params.resize(104, 0);
    let launch = Launch { dynamic_shared: 2 * 64 * 40 * 2, ..Launch::linear(1, 128) };
    let counters = gpu.launch(&module, "mm", &launch, &[&params]).unwrap();
    let lines = counters.hot_lines();
    let total: u64 = lines.iter().map(|l| l.1.threads).sum();
    assert!(lines.windows(2).all(|w| w[0].1.threads >= w[1].1.threads));
    assert!(total <= counters.total().threads && total * 10 > counters.total().threads * 9);
    let mma =
        include_str!("kernels/tour.cu").lines().position(|l| l.contains("mma.sync")).unwrap() as u32 + 1;
    assert!(
        lines.iter().any(|(s, n)| s.line == mma && n.warps >= 4 * 8 * (k as u64 / 16)),
        "{mma} {lines:?}"
    );
    assert_eq!(counters.shared_loads.conflicts, 0);
}
