//! Runs one instruction on many values.
#![allow(dead_code)]

pub mod gpu;

use ptx_emulator::{Gpu, Launch, Module, Spec};

/// Kernel around a few lines of PTX: sources come in `%a0..`, `%b0..` (32 and 64 bits) and `%h0..` (16 bits) registers
/// loaded from `x`, 8 bytes per source and thread; the result goes to `y`, 8 bytes per thread.
///
/// `sources` and `result` are widths in bits; in the body `a`, `b`, `c` are the sources and `d` is the result.
pub fn snippet(target: &str, body: &str, sources: &[u32], result: u32) -> String {
    let names = ["a", "b", "c", "e"];
    let mut text = format!(
        ".version 8.6\n.target {target}\n.address_size 64\n.visible .entry k(.param .u64 x, .param .u64 y) {{\n\
         .reg .pred p, q, r;\n.reg .b32 %r<8>;\n.reg .b64 %rd<8>;\n.reg .b{result} d;\n\
         ld.param.u64 %rd1, [x];\nld.param.u64 %rd2, [y];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\n\
         mov.u32 %r3, %ntid.x;\nmad.lo.u32 %r1, %r2, %r3, %r1;\nmul.wide.u32 %rd3, %r1, {};\n\
         add.u64 %rd1, %rd1, %rd3;\nmul.wide.u32 %rd3, %r1, 8;\nadd.u64 %rd2, %rd2, %rd3;\n",
        8 * sources.len().max(1)
    );
    for (i, bits) in sources.iter().enumerate() {
        text += &format!(".reg .b{bits} {0};\nld.global.b{bits} {0}, [%rd1+{1}];\n", names[i], 8 * i);
    }
    text += &format!("{body}\nst.global.b{result} [%rd2], d;\nret;\n}}\n");
    text
}

/// Results of a snippet for every row of sources.
pub fn run(target: &str, body: &str, widths: &[u32], result: u32, rows: &[Vec<u64>]) -> Vec<u64> {
    let text = snippet(target, body, widths, result);
    let module = Module::parse("snippet", &text).unwrap_or_else(|e| panic!("{e}\n{body}"));
    let spec = if target == "sm_80" { Spec::a100() } else { Spec::h200() };
    let gpu = Gpu::new(Spec { host_threads: 1, ..spec });
    let mut padded = rows.to_vec();
    padded.resize(rows.len().next_multiple_of(128), rows[0].clone());
    let data: Vec<u8> = padded.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    let (x, y) = (gpu.alloc(data.len(), "x").unwrap(), gpu.alloc(8 * padded.len(), "y").unwrap());
    gpu.write(x, &data).unwrap();
    let launch = Launch::linear(padded.len() as u32 / 128, 128);
    gpu.launch(&module, "k", &launch, &[&x.to_le_bytes(), &y.to_le_bytes()])
        .unwrap_or_else(|fault| panic!("{body}: {fault}"));
    let mut out = vec![0; 8 * padded.len()];
    gpu.read_unchecked(y, &mut out).unwrap();
    let zeros = vec![0; out.len()];
    gpu::compare(&gpu::Case {
        name: body,
        ptx: &text,
        entry: "k",
        launch,
        params: &[&x.to_le_bytes(), &y.to_le_bytes()],
        buffers: &[
            gpu::Buffer { address: x, before: &data, after: &data },
            gpu::Buffer { address: y, before: &zeros, after: &out },
        ],
        maps: &[],
        compare: gpu::tolerance(body, result),
    });
    out.chunks_exact(8).take(rows.len()).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Compares a snippet with a reference on every row.
pub fn check(body: &str, widths: &[u32], result: u32, rows: &[Vec<u64>], wanted: impl Fn(&[u64]) -> u64) {
    let keep = |v: u64| v & (u64::MAX >> (64 - result));
    for (row, got) in rows.iter().zip(run("sm_80", body, widths, result, rows)) {
        let want = keep(wanted(row));
        assert_eq!(keep(got), want, "{body}: {row:x?} gave {got:#x}, wanted {want:#x}");
    }
}

/// A fixed sequence of spread-out 64-bit values.
pub fn random(count: usize, seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    })
    .take(count)
}

/// Values at the corners of a width.
pub fn corners(bits: u32) -> Vec<u64> {
    let top = 1u64 << (bits - 1);
    let all = u64::MAX >> (64 - bits);
    vec![
        0,
        1,
        2,
        3,
        7,
        31,
        32,
        33,
        63,
        64,
        top - 1,
        top,
        top + 1,
        all - 1,
        all,
        0x55 & all,
        0xaaaa_5555_1234 & all,
    ]
}

/// Corner pairs and random rows of sources of these widths.
pub fn rows(widths: &[u32], count: usize) -> Vec<Vec<u64>> {
    let mut out = Vec::new();
    let mask = |bits: u32, v: u64| v & (u64::MAX >> (64 - bits));
    let sets: Vec<Vec<u64>> = widths.iter().map(|&b| corners(b)).collect();
    let total: usize = sets.iter().map(Vec::len).product();
    let step = total.div_ceil(4000).max(1);
    for i in (0..total).step_by(step) {
        let mut rest = i;
        out.push(
            sets.iter()
                .map(|s| {
                    let v = s[rest % s.len()];
                    rest /= s.len();
                    v
                })
                .collect(),
        );
    }
    let mut values = random(count * widths.len(), 7);
    for _ in 0..count {
        out.push(widths.iter().map(|&b| mask(b, values.next().unwrap())).collect());
    }
    out
}

/// Interesting f32 patterns, in pairs or triples, and random ones with exponents near each other.
pub fn floats(sources: usize, count: usize) -> Vec<Vec<u64>> {
    let special: Vec<u64> = [
        0x0000_0000u32,
        0x8000_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc0_1234,
        0x7fa0_0000,
        0x0000_0001,
        0x8000_0001,
        0x007f_ffff,
        0x0080_0000,
        0x7f7f_ffff,
        0xff7f_ffff,
        0x3fff_ffff,
        0x4b80_0000,
        0x4b7f_ffff,
        0x3f7f_ffff,
        0x3f00_0000,
    ]
    .iter()
    .map(|&v| v as u64)
    .collect();
    let total = special.len().pow(sources as u32);
    let mut out: Vec<Vec<u64>> = (0..total)
        .map(|i| (0..sources).map(|s| special[i / special.len().pow(s as u32) % special.len()]).collect())
        .collect();
    let mut values = random(count * sources, 11);
    for i in 0..count {
        let near = i % 2 == 0;
        out.push(
            (0..sources)
                .map(|_| {
                    let v = values.next().unwrap();
                    let exponent = if near { 120 + (v >> 32) % 14 } else { (v >> 32) % 256 };
                    (v & 0x807f_ffff) | exponent << 23
                })
                .collect(),
        );
    }
    out
}
