//! What a warp does together, against the PTX ISA document: shuffles, votes, matrices, atomics, barriers.

// Tables of instructions and their meanings; fragments are indexed as the document does it.
#![allow(clippy::type_complexity, clippy::needless_range_loop, clippy::manual_is_multiple_of)]

mod common;
use common::{gpu, random};
use ptx_emulator::{Counters, Gpu, Launch, Module, Spec};

/// Runs `body` in blocks of `threads`. `x` holds words of input, `%rd2` is the address of 64 words of output per
/// thread, `%rd1` that of the input, `%r1` the thread, `%r2` the lane.
fn run(target: &str, body: &str, threads: u32, x: &[u32]) -> (Vec<Vec<u32>>, Counters) {
    let (out, counters, _) = run_both(target, body, threads, x);
    (out, counters)
}

/// Also what a GPU gave, if it was asked.
fn run_both(
    target: &str,
    body: &str,
    threads: u32,
    x: &[u32],
) -> (Vec<Vec<u32>>, Counters, Option<Vec<Vec<u32>>>) {
    // One shape of 8-bit floats came with 8.7.
    let version = if body.contains("e4m3") { "8.7" } else { "8.6" };
    let text = format!(
        ".version {version}\n.target {target}\n.address_size 64\n.visible .entry k(.param .u64 x, .param .u64 y) {{\n\
         .reg .pred p, q, r;\n.reg .b32 %r<64>;\n.reg .b64 %rd<16>;\n.reg .f32 %f<64>;\n.shared .align 1024 .b8 s[8192];\n\
         ld.param.u64 %rd1, [x];\nld.param.u64 %rd2, [y];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %laneid;\n\
         mul.wide.u32 %rd3, %r1, 256;\nadd.u64 %rd2, %rd2, %rd3;\n{body}\nret;\n}}\n"
    );
    let module = Module::parse("warp", &text).unwrap_or_else(|e| panic!("{e}\n{body}"));
    let gpu = Gpu::new(if target == "sm_80" { Spec::a100() } else { Spec::h200() });
    let words = |v: &[u32]| v.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let (px, py) =
        (gpu.alloc(4 * x.len().max(1), "x").unwrap(), gpu.alloc(256 * threads as usize, "y").unwrap());
    gpu.write(px, &words(x)).unwrap();
    let counters = gpu
        .launch(&module, "k", &Launch::linear(1, threads), &[&px.to_le_bytes(), &py.to_le_bytes()])
        .unwrap_or_else(|fault| panic!("{body}: {fault}"));
    let mut out = vec![0; 256 * threads as usize];
    gpu.read_unchecked(py, &mut out).unwrap();
    let second = second_opinion(body, &text, threads, (px, &words(x)), (py, &out));
    let out = out.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
    (out.chunks_exact(64).map(<[u32]>::to_vec).collect(), counters, second)
}

/// The same on a GPU; what it gave, if it was asked.
fn second_opinion(
    body: &str,
    text: &str,
    threads: u32,
    (px, x): (u64, &[u8]),
    (py, y): (u64, &[u8]),
) -> Option<Vec<Vec<u32>>> {
    let mut after = vec![0; x.len()];
    after.copy_from_slice(x);
    // What an atomic returns depends on the order of threads, and sums of tensor cores are bounded by the caller.
    let elsewhere = body.contains("atom.") || body.contains("mma.sync");
    let found = gpu::compare(&gpu::Case {
        name: body,
        ptx: text,
        entry: "k",
        launch: Launch::linear(1, threads),
        params: &[&px.to_le_bytes(), &py.to_le_bytes()],
        buffers: &[
            gpu::Buffer { address: px, before: x, after: &after },
            gpu::Buffer { address: py, before: &vec![0; y.len()], after: y },
        ],
        maps: &[],
        compare: if elsewhere { gpu::Compare::Elsewhere } else { gpu::Compare::Bits(4) },
    })?;
    let out = found[1].chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
    Some(out.chunks_exact(64).map(<[u32]>::to_vec).collect())
}

#[test]
fn shuffles() {
    // The pseudo-code of the document, for every mode, offset and clamp that CUDA's widths give.
    for (mode, clamp_of) in [("up", 0u32), ("down", 31), ("bfly", 31), ("idx", 31)] {
        for width in [32u32, 16, 8, 4, 2, 1] {
            for b in [0u32, 1, 2, 3, 5, 8, 15, 16, 31, 40] {
                let c = (32 - width) << 8 | clamp_of;
                let body = format!(
                    "add.u32 %r3, %r2, 100; shfl.sync.{mode}.b32 %r4|p, %r3, {b}, {c}, -1; selp.u32 %r5, 1, 0, p;\n\
                     st.global.v2.u32 [%rd2], {{%r4, %r5}};"
                );
                for (lane, got) in run("sm_80", &body, 32, &[]).0.iter().enumerate() {
                    let (lane, bval, segment) = (lane as i32, (b & 31) as i32, (c >> 8) as i32);
                    let cval = (c & 31) as i32;
                    let max = lane & segment | cval & !segment;
                    let min = lane & segment;
                    let (j, p) = match mode {
                        "up" => (lane - bval, lane - bval >= max),
                        "down" => (lane + bval, lane + bval <= max),
                        "bfly" => (lane ^ bval, lane ^ bval <= max),
                        _ => (min | bval & !segment, (min | bval & !segment) <= max),
                    };
                    let from = if p { j } else { lane };
                    assert_eq!(
                        got[..2],
                        [from as u32 + 100, p as u32],
                        "{mode} {b} width {width} lane {lane}"
                    );
                }
            }
        }
    }
}

#[test]
fn votes_matches_and_reductions() {
    let x: Vec<u32> = random(32, 9).map(|v| v as u32).collect();
    let load = "mul.wide.u32 %rd4, %r2, 4; add.u64 %rd4, %rd1, %rd4; ld.global.u32 %r3, [%rd4];\n";
    let body = format!(
        "{load}setp.gt.s32 p, %r3, 0; vote.sync.ballot.b32 %r4, p, -1; vote.sync.ballot.b32 %r5, !p, -1;\n\
         vote.sync.any.pred q, p, -1; selp.u32 %r6, 1, 0, q; vote.sync.all.pred q, p, -1; selp.u32 %r7, 1, 0, q;\n\
         setp.ge.s32 p, %r2, 0; vote.sync.all.pred q, p, -1; selp.u32 %r8, 1, 0, q;\n\
         vote.sync.uni.pred q, !p, -1; selp.u32 %r9, 1, 0, q; activemask.b32 %r10;\n\
         st.global.v4.u32 [%rd2], {{%r4, %r5, %r6, %r7}}; st.global.v2.u32 [%rd2+16], {{%r8, %r9}};\n\
         st.global.u32 [%rd2+24], %r10;"
    );
    let positive = (0..32).filter(|&i| (x[i] as i32) > 0).fold(0u32, |m, i| m | 1 << i);
    for got in run("sm_80", &body, 32, &x).0 {
        assert_eq!(got[..7], [positive, !positive, 1, 0, 1, 1, u32::MAX]);
    }
    let body = format!(
        "{load}and.b32 %r3, %r3, 3; match.any.sync.b32 %r4, %r3, -1; match.all.sync.b32 %r5|p, %r3, -1;\n\
         selp.u32 %r6, 1, 0, p; mov.u32 %r7, 5; match.all.sync.b32 %r8|p, %r7, -1; selp.u32 %r9, 1, 0, p;\n\
         st.global.v4.u32 [%rd2], {{%r4, %r5, %r6, %r8}}; st.global.u32 [%rd2+16], %r9;"
    );
    for (lane, got) in run("sm_80", &body, 32, &x).0.iter().enumerate() {
        let same = (0..32).filter(|&i| x[i] & 3 == x[lane] & 3).fold(0u32, |m, i| m | 1 << i);
        assert_eq!(got[..5], [same, 0, 0, u32::MAX, 1]);
    }
    for (op, f) in [
        ("add.u32", (|a, b| a.wrapping_add(b)) as fn(u32, u32) -> u32),
        ("min.u32", |a, b| a.min(b)),
        ("max.u32", |a, b| a.max(b)),
        ("min.s32", |a, b| (a as i32).min(b as i32) as u32),
        ("max.s32", |a, b| (a as i32).max(b as i32) as u32),
        ("and.b32", |a, b| a & b),
        ("or.b32", |a, b| a | b),
        ("xor.b32", |a, b| a ^ b),
    ] {
        // Two groups in one instruction, each with its own member mask.
        let body = format!(
            "{load}setp.lt.u32 p, %r2, 12; selp.b32 %r4, 0xfff, 0xfffff000, p; redux.sync.{op} %r5, %r3, %r4;\n\
             st.global.u32 [%rd2], %r5;"
        );
        for (lane, got) in run("sm_80", &body, 32, &x).0.iter().enumerate() {
            let group = if lane < 12 { &x[..12] } else { &x[12..] };
            assert_eq!(got[0], group.iter().copied().reduce(f).unwrap(), "{op} lane {lane}");
        }
    }
    let body = "elect.sync %r3|p, -1; selp.u32 %r4, 1, 0, p; st.global.v2.u32 [%rd2], {%r3, %r4};";
    let elected: Vec<_> = run("sm_90a", body, 32, &[]).0.iter().filter(|g| g[1] == 1).map(|g| g[0]).collect();
    assert_eq!(elected, [0]);
}

#[test]
fn lanes_meet_again_after_branches() {
    // Nested branches and a loop with a different count in each lane; every full-mask vote needs all lanes back.
    let body = "mov.u32 %r3, 0; setp.lt.u32 p, %r2, 10; @p bra A; add.u32 %r3, %r3, 1; setp.lt.u32 q, %r2, 20;\n\
                @q bra B; add.u32 %r3, %r3, 10; B: vote.sync.ballot.b32 %r4, q, 0xfffffc00; bra C;\n\
                A: add.u32 %r3, %r3, 100; C: mov.u32 %r5, 0; L: add.u32 %r5, %r5, 1; add.u32 %r3, %r3, 1000;\n\
                setp.lt.u32 p, %r5, %r2; @p bra L; vote.sync.ballot.b32 %r6, !p, -1; activemask.b32 %r7;\n\
                st.global.v4.u32 [%rd2], {%r3, %r6, %r7, %r5};";
    for (lane, got) in run("sm_80", body, 32, &[]).0.iter().enumerate() {
        let l = lane as u32;
        let loops = l.max(1);
        let sum = if l < 10 { 100 } else { 1 + if l < 20 { 0 } else { 10 } } + 1000 * loops;
        assert_eq!(got[..4], [sum, u32::MAX, u32::MAX, loops]);
    }
    // The two sides of a branch meet in one shuffle each side of which waits for the other.
    let body = "mov.u32 %r3, %r2; setp.lt.u32 p, %r2, 16; @p bra A; bar.warp.sync -1; add.u32 %r3, %r3, 1000; bra B;\n\
                A: bar.warp.sync -1; add.u32 %r3, %r3, 2000; B: st.global.u32 [%rd2], %r3;";
    for (lane, got) in run("sm_80", body, 32, &[]).0.iter().enumerate() {
        assert_eq!(got[0], lane as u32 + if lane < 16 { 2000 } else { 1000 });
    }
    // A jump table.
    let body = "and.b32 %r3, %r2, 3; T: .branchtargets A, B, C, D; brx.idx %r3, T;\n\
                A: mov.u32 %r4, 11; bra E; B: mov.u32 %r4, 22; bra E; C: mov.u32 %r4, 33; D: mov.u32 %r4, 44;\n\
                E: activemask.b32 %r5; st.global.v2.u32 [%rd2], {%r4, %r5};";
    for (lane, got) in run("sm_80", body, 32, &[]).0.iter().enumerate() {
        assert_eq!(got[..2], [[11, 22, 44, 44][lane % 4], u32::MAX]);
    }
    // Lanes that leave early are not waited for.
    let body =
        "setp.gt.u32 p, %r2, 20; @p exit; vote.sync.ballot.b32 %r3, !p, 0x1fffff; st.global.u32 [%rd2], %r3;";
    assert!(run("sm_80", body, 32, &[]).0[..21].iter().all(|g| g[0] == 0x1f_ffff));
}

#[test]
fn functions_are_called() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n\
        .func (.param .b32 out) triple(.param .b32 v) { .reg .b32 %r<4>; .reg .pred p; ld.param.u32 %r1, [v];\n\
        setp.gt.u32 p, %r1, 5; @p bra BIG; mul.lo.u32 %r2, %r1, 3; st.param.b32 [out], %r2; ret;\n\
        BIG: mov.u32 %r2, 999; st.param.b32 [out], %r2; ret; }\n\
        .visible .entry k(.param .u64 y) { .reg .b32 %r<8>; .reg .b64 %rd<4>; mov.u32 %r1, %tid.x;\n\
        { .param .b32 a; st.param.b32 [a], %r1; .param .b32 r; call.uni (r), triple, (a); ld.param.b32 %r2, [r]; }\n\
        ld.param.u64 %rd1, [y]; mul.wide.u32 %rd2, %r1, 4; add.u64 %rd1, %rd1, %rd2; st.global.u32 [%rd1], %r2; ret; }";
    let module = Module::parse("call", text).unwrap();
    let gpu = Gpu::new(Spec::a100());
    let y = gpu.alloc(128, "y").unwrap();
    gpu.launch(&module, "k", &Launch::linear(1, 32), &[&y.to_le_bytes()]).unwrap();
    let mut out = [0; 128];
    gpu.read(y, &mut out).unwrap();
    for (i, b) in out.chunks_exact(4).enumerate() {
        assert_eq!(u32::from_le_bytes(b.try_into().unwrap()), if i > 5 { 999 } else { 3 * i as u32 });
    }
}

#[test]
fn atomics() {
    // Each of 64 threads works on one of two words of shared memory; the results do not depend on the order.
    let cases: [(&str, u32, fn(&mut dyn Iterator<Item = u32>) -> u32); 8] = [
        ("add.u32", 0, |v| v.sum()),
        ("min.u32", 1000, |v| v.min().unwrap()),
        ("max.u32", 0, |v| v.max().unwrap()),
        ("or.b32", 0, |v| v.fold(0, |a, b| a | b)),
        ("and.b32", u32::MAX, |v| v.fold(u32::MAX, |a, b| a & b)),
        ("xor.b32", 0, |v| v.fold(0, |a, b| a ^ b)),
        ("inc.u32", 0, |v| v.count() as u32),
        ("dec.u32", 1000, |v| 1000 - v.count() as u32),
    ];
    for (op, start, wanted) in cases {
        for space in ["shared", "global"] {
            // `inc` and `dec` wrap at their operand: keep it high.
            let operand = if op.starts_with("inc") || op.starts_with("dec") { "5000" } else { "%r1" };
            let base = if space == "shared" {
                "mov.u32 %r3, s; cvt.u64.u32 %rd4, %r3;"
            } else {
                "mov.u64 %rd4, %rd1;"
            };
            let body = format!(
                "{base} and.b32 %r4, %r1, 1; mul.wide.u32 %rd5, %r4, 4; add.u64 %rd4, %rd4, %rd5;\n\
                 setp.lt.u32 p, %r1, 2; @p st.{space}.u32 [%rd4], {start}; bar.sync 0;\n\
                 atom.{space}.{op} %r5, [%rd4], {operand}; bar.sync 0; ld.{space}.u32 %r6, [%rd4];\n\
                 st.global.v2.u32 [%rd2], {{%r5, %r6}};"
            );
            for (thread, got) in run("sm_80", &body, 64, &[0, 0]).0.iter().enumerate() {
                let mut mine = (0..64).filter(|t| t % 2 == thread as u32 % 2);
                assert_eq!(got[1], wanted(&mut mine), "{op} {space} thread {thread}");
            }
        }
    }
    let body = "mov.u32 %r3, s; setp.eq.u32 p, %r1, 0; @p st.shared.u32 [%r3], 7; bar.sync 0;\n\
                atom.shared.cas.b32 %r4, [%r3], 7, %r1; st.global.u32 [%rd2], %r4;";
    let (got, counters) = run("sm_80", body, 32, &[]);
    // One lane saw the 7, all others what that one stored.
    assert_eq!(got.iter().filter(|g| g[0] == 7).count(), 1);
    let first = got.iter().position(|g| g[0] == 7).unwrap() as u32;
    assert!(got.iter().all(|g| g[0] == 7 || g[0] == first));
    assert_eq!(counters.atomics, 32);
    let body = "mov.u32 %r3, s; setp.eq.u32 p, %r1, 0; @p st.shared.f32 [%r3], 0f00000000; bar.sync 0;\n\
                cvt.rn.f32.u32 %f1, %r1; red.shared.add.f32 [%r3], %f1; bar.sync 0; ld.shared.u32 %r4, [%r3];\n\
                st.global.u32 [%rd2], %r4;";
    assert!(run("sm_80", body, 32, &[]).0.iter().all(|g| f32::from_bits(g[0]) == 496.0));
}

#[test]
fn barrier_reductions_and_partial_barriers() {
    let body = "setp.lt.u32 p, %r1, 40; barrier.cta.red.popc.aligned.u32 %r3, 0, p; bar.red.and.pred q, 0, p;\n\
                selp.u32 %r4, 1, 0, q; bar.red.or.pred q, 0, !p; selp.u32 %r5, 1, 0, q;\n\
                st.global.v2.u32 [%rd2], {%r3, %r4}; st.global.u32 [%rd2+8], %r5;";
    assert!(run("sm_80", body, 96, &[]).0.iter().all(|g| g[..3] == [40, 0, 1]));
    // Producers arrive, consumers wait: the data is there and nothing races.
    let body = "mov.u32 %r3, s; shl.b32 %r4, %r2, 2; add.u32 %r3, %r3, %r4; setp.lt.u32 p, %r1, 32; @p bra P;\n\
                bar.sync 5, 64; ld.shared.u32 %r5, [%r3]; st.global.u32 [%rd2], %r5; bra E;\n\
                P: st.shared.u32 [%r3], %r1; bar.arrive 5, 64; E:";
    let (got, counters) = run("sm_80", body, 64, &[]);
    assert!((32..64).all(|t| got[t][0] == t as u32 - 32));
    assert_eq!(counters.barriers, 1);
}

/// Places the 16-bit elements of an 8x8 matrix by the document: thread `t` holds row `t / 4`, columns `t % 4 * 2` and
/// the next.
#[test]
fn matrices_move_between_shared_memory_and_registers() {
    let fill = "mov.u32 %r3, s; mov.u32 %r4, 0; F: mad.lo.u32 %r5, %r4, 64, %r2; shl.b32 %r6, %r5, 1;\n\
                cvt.u16.u32 h0, %r5; add.u32 %r6, %r6, %r3; st.shared.u16 [%r6], h0; add.u32 %r6, %r6, 64;\n\
                add.u16 h0, h0, 32; st.shared.u16 [%r6], h0; add.u32 %r4, %r4, 1; setp.lt.u32 p, %r4, 16; @p bra F;\n\
                bar.warp.sync -1;";
    for count in [1u32, 2, 4] {
        for trans in [false, true] {
            let regs: Vec<_> = (0..count).map(|i| format!("%r{}", 20 + i)).collect();
            let regs = regs.join(", ");
            let suffix = if trans { ".trans" } else { "" };
            // Row r of matrix i starts at element (8 i + r) * 24 + 8: rows apart and out of order are as good as any.
            let body = format!(
                ".reg .b16 h0; {fill} mad.lo.u32 %r7, %r2, 48, 16; add.u32 %r7, %r7, %r3;\n\
                 ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{regs}}}, [%r7];\n\
                 st.global.{}u32 [%rd2], {{{regs}}};",
                if count == 1 { String::new() } else { format!("v{count}.") }
            );
            let body = if count == 1 {
                body.replace("st.global.u32 [%rd2], {%r20}", "st.global.u32 [%rd2], %r20")
            } else {
                body
            };
            for (lane, got) in run("sm_80", &body, 32, &[]).0.iter().enumerate() {
                for i in 0..count as usize {
                    let element = |row: usize, col: usize| ((8 * i + row) * 24 + 8 + col) as u32;
                    let (g, t) = (lane / 4, lane % 4 * 2);
                    let wanted = if trans {
                        element(t, g) | element(t + 1, g) << 16
                    } else {
                        element(g, t) | element(g, t + 1) << 16
                    };
                    assert_eq!(got[i], wanted, "x{count} trans {trans} lane {lane} matrix {i}");
                }
            }
            // stmatrix is its inverse: store what was loaded elsewhere, and load it plainly.
            let body = format!(
                ".reg .b16 h0; {fill} mad.lo.u32 %r7, %r2, 48, 16; add.u32 %r7, %r7, %r3;\n\
                 ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{regs}}}, [%r7];\n\
                 mad.lo.u32 %r8, %r2, 16, 4096; add.u32 %r8, %r8, %r3;\n\
                 stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%r8], {{{regs}}};\n\
                 bar.warp.sync -1; setp.ge.u32 p, %r2, {}; @p bra E; ld.shared.v4.u32 {{%r30, %r31, %r32, %r33}}, [%r8];\n\
                 st.global.v4.u32 [%rd2], {{%r30, %r31, %r32, %r33}}; E:",
                8 * count
            );
            for (lane, got) in run("sm_90a", &body, 32, &[]).0.iter().enumerate().take(8 * count as usize) {
                for word in 0..4 {
                    let element = |col: u32| lane as u32 * 24 + 8 + col;
                    assert_eq!(got[word as usize], element(2 * word) | element(2 * word + 1) << 16);
                }
            }
        }
    }
}

/// Where the document puts element `i` of the fragments of one lane: row and column.
fn a_place(bits: usize, k: usize, lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane / 4, lane % 4);
    match (bits, k) {
        (16, 8) => (if i < 2 { group } else { group + 8 }, thread * 2 + (i & 1)),
        (16, _) => {
            let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
            (row, thread * 2 + (i & 1) + if i < 4 { 0 } else { 8 })
        }
        (32, 4) => (if i == 0 { group } else { group + 8 }, thread),
        (32, _) => (if i % 2 == 0 { group } else { group + 8 }, if i < 2 { thread } else { thread + 4 }),
        (_, 16) => (if i < 4 { group } else { group + 8 }, thread * 4 + (i & 3)),
        _ => {
            let row = if i < 4 || (8..12).contains(&i) { group } else { group + 8 };
            (row, thread * 4 + (i & 3) + if i < 8 { 0 } else { 16 })
        }
    }
}

fn b_place(bits: usize, lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane / 4, lane % 4);
    let row = match bits {
        16 => thread * 2 + (i & 1) + if i < 2 { 0 } else { 8 },
        32 => thread + 4 * i,
        _ => thread * 4 + (i & 3) + if i < 4 { 0 } else { 16 },
    };
    (row, group)
}

fn c_place(lane: usize, i: usize) -> (usize, usize) {
    (if i < 2 { lane / 4 } else { lane / 4 + 8 }, lane % 4 * 2 + (i & 1))
}

#[test]
fn matrix_products() {
    let small = |bits: u32, exponent: u32, mantissa: u32| {
        let (bias, e) = ((1i32 << (exponent - 1)) - 1, (bits >> mantissa & ((1 << exponent) - 1)) as i32);
        let m = (bits & ((1 << mantissa) - 1)) as f64 / (1 << mantissa) as f64;
        let v = if e == 0 { m * 2f64.powi(1 - bias) } else { (1.0 + m) * 2f64.powi(e - bias) };
        if bits >> (exponent + mantissa) & 1 == 1 { -v } else { v }
    };
    // Type, bits, shapes, accumulators, and the value of a pattern. Patterns are thinned to moderate exponents.
    type Value<'a> = &'a dyn Fn(u32) -> f64;
    let cases: [(&str, usize, &[usize], &str, u32, Value); 7] = [
        ("f16", 16, &[8, 16], "f32", 0xbfff, &|b| small(b, 5, 10)),
        ("f16", 16, &[8, 16], "f16", 0xbbff, &|b| small(b, 5, 10)),
        ("bf16", 16, &[8, 16], "f32", 0xbfff, &|b| small(b, 8, 7)),
        ("tf32", 32, &[4, 8], "f32", 0xbfff_ffff, &|b| f32::from_bits(b & 0xffff_e000) as f64),
        ("e4m3", 8, &[16, 32], "f32", 0xbf, &|b| small(b, 4, 3)),
        ("s8", 8, &[16, 32], "s32", 0xff, &|b| b as u8 as i8 as f64),
        ("u8", 8, &[16, 32], "s32", 0xff, &|b| b as u8 as f64),
    ];
    for (name, bits, shapes, acc, keep, value) in cases {
        for &k in shapes {
            let pattern: Vec<u32> = random(32 * 12, k as u64 + bits as u64).map(|v| v as u32).collect();
            let thin = |v: u32| {
                (0..32 / bits).fold(0u64, |w, i| w | ((v >> (i * bits)) as u64 & keep as u64) << (i * bits))
                    as u32
            };
            let words_a = k * bits / 64;
            let words_b = words_a / 2;
            let mut x = vec![0u32; 32 * 12];
            let (mut a, mut b, mut c) =
                (vec![vec![0.0; k]; 16], vec![vec![0.0; 8]; k], vec![vec![0.0; 8]; 16]);
            let per = 32 / bits;
            for lane in 0..32 {
                for w in 0..words_a {
                    let word = thin(pattern[lane * 12 + w]);
                    x[lane * 12 + w] = word;
                    for i in 0..per {
                        let (row, col) = a_place(bits, k, lane, w * per + i);
                        a[row][col] =
                            value((word as u64 >> (i * bits)) as u32 & (u64::MAX >> (64 - bits)) as u32);
                    }
                }
                for w in 0..words_b {
                    let word = thin(pattern[lane * 12 + 4 + w]);
                    x[lane * 12 + 4 + w] = word;
                    for i in 0..per {
                        let (row, col) = b_place(bits, lane, w * per + i);
                        b[row][col] =
                            value((word as u64 >> (i * bits)) as u32 & (u64::MAX >> (64 - bits)) as u32);
                    }
                }
                for i in 0..4 {
                    let (row, col) = c_place(lane, i);
                    let v = (pattern[lane * 12 + 8 + i] % 64) as i32 - 32;
                    c[row][col] = v as f64;
                    match acc {
                        "f32" => x[lane * 12 + 8 + i] = (v as f32).to_bits(),
                        "s32" => x[lane * 12 + 8 + i] = v as u32,
                        _ => {
                            x[lane * 12 + 8 + i / 2] |=
                                (half::f16::from_f32(v as f32).to_bits() as u32) << (i % 2 * 16)
                        }
                    }
                }
            }
            let names = |from: usize, n: usize| {
                (from..from + n).map(|i| format!("%r{}", 10 + i)).collect::<Vec<_>>().join(", ")
            };
            let sums = if acc == "f16" { 2 } else { 4 };
            let float = acc == "f32";
            let c_names = if float { "%f8, %f9, %f10, %f11".to_string() } else { names(8, sums) };
            let d_names = if float { "%f12, %f13, %f14, %f15".to_string() } else { names(12, sums) };
            let loads: String = (0..12)
                .map(|i| {
                    let register = if float && i >= 8 { format!("%f{i}") } else { format!("%r{}", 10 + i) };
                    format!("ld.global.b32 {register}, [%rd4+{}];\n", 4 * i)
                })
                .collect();
            let stores: String = d_names
                .split(", ")
                .enumerate()
                .map(|(i, r)| format!("st.global.b32 [%rd2+{}], {r};\n", 4 * i))
                .collect();
            let body = format!(
                "mul.wide.u32 %rd4, %r2, 48; add.u64 %rd4, %rd1, %rd4;\n{loads}\
                 mma.sync.aligned.m16n8k{k}.row.col.{acc}.{name}.{name}.{acc} {{{d_names}}}, {{{}}}, {{{}}}, {{{c_names}}};\n{stores}",
                names(0, words_a),
                names(4, words_b)
            );
            let target = if name == "e4m3" { "sm_90a" } else { "sm_80" };
            let (got, counters, second) = run_both(target, &body, 32, &x);
            assert_eq!(counters.matrix_ops, (16 * 8 * k) as u64);
            let (mut different, mut first) = (0, String::new());
            for lane in 0..32 {
                for i in 0..4 {
                    let (row, col) = c_place(lane, i);
                    let exact: f64 = c[row][col] + (0..k).map(|j| a[row][j] * b[j][col]).sum::<f64>();
                    let size: f64 =
                        c[row][col].abs() + (0..k).map(|j| (a[row][j] * b[j][col]).abs()).sum::<f64>();
                    let value = |got: &[Vec<u32>]| match acc {
                        "f32" => f32::from_bits(got[lane][i]) as f64,
                        "s32" => got[lane][i] as i32 as f64,
                        _ => half::f16::from_bits((got[lane][i / 2] >> (i % 2 * 16)) as u16).to_f64(),
                    };
                    let bound = match acc {
                        "f32" => size * f32::EPSILON as f64,
                        "s32" => 0.0,
                        _ => exact.abs() * 2f64.powi(-11) + 1e-7,
                    };
                    let v = value(&got);
                    if let Some(second) = &second {
                        // Each of the k + 1 terms may be cut off 2^-23 below the largest, which is at most `size`.
                        let terms = (k + 1) as f64 * 2f64.powi(-23);
                        let limit = bound + if acc == "s32" { 0.0 } else { size * terms };
                        let v = value(second);
                        if (v - exact).abs() > limit {
                            first =
                                format!("lane {lane} element {i}: GPU {v}, exactly {exact}, limit {limit:e}");
                            different += 1;
                        }
                    }
                    assert!(
                        (v - exact).abs() <= bound,
                        "{name} k{k} {acc} lane {lane} element {i}: {v} {exact}"
                    );
                }
            }
            if second.is_some() {
                let verdict = if different == 0 { "same" } else { "DIFFERENT" };
                gpu::report(
                    verdict,
                    &format!("mma k{k} {name} {acc}, within its bound"),
                    128,
                    different,
                    &first,
                );
            }
        }
    }
}
