//! Conversions between floats and integers, and arithmetic on 16-bit floats: exhaustive where the source has 8 or 16
//! bits, at every rounding boundary where the result has.

// Tables of instructions and their meanings; fragments are indexed as the document does it.
#![allow(clippy::type_complexity, clippy::needless_range_loop, clippy::manual_is_multiple_of)]

mod common;
use common::{check, floats, random, rows, run};

/// A small format as the list of all its magnitudes, by bit pattern.
struct Table {
    values: Vec<f64>,
    bits: u32,
    /// Pattern of overflow: infinity, or one above the largest finite value.
    infinite: bool,
}

impl Table {
    fn new(exponent: u32, mantissa: u32, infinite: bool) -> Table {
        let bias = (1i32 << (exponent - 1)) - 1;
        let count =
            if infinite { ((1 << exponent) - 1) << mantissa } else { (1 << (exponent + mantissa)) - 1 };
        let values = (0..=count)
            .map(|b: u32| {
                let (e, m) = ((b >> mantissa) as i32, (b & ((1 << mantissa) - 1)) as f64);
                let scale = |n: i32| 2f64.powi(n - mantissa as i32);
                if e == 0 { m * scale(1 - bias) } else { (m + (1u32 << mantissa) as f64) * scale(e - bias) }
            })
            .collect();
        Table { values, bits: exponent + mantissa + 1, infinite }
    }

    fn nan(&self) -> u64 {
        (1 << (self.bits - 1)) - 1
    }

    /// `x` rounded by search: the definition of rounding, not a way to do it.
    fn round(&self, x: f64, mode: &str) -> u64 {
        if x.is_nan() {
            return self.nan();
        }
        let sign = (x.is_sign_negative() as u64) << (self.bits - 1);
        let top = self.values.len() - 1;
        let a = x.abs();
        if a.is_infinite() {
            return sign | top as u64;
        }
        let up = self.values.partition_point(|&v| v < a).min(top);
        if self.values[up] == a {
            return sign | up as u64;
        }
        if a > self.values[top] {
            return sign
                | if mode == "rn" || (mode == "rp") != (sign != 0) && mode != "rz" { top } else { top - 1 }
                    as u64;
        }
        let down = up - 1;
        let (below, above) = (a - self.values[down], self.values[up] - a);
        let towards_up = match mode {
            "rn" => above < below || above == below && up % 2 == 0,
            "rna" => above <= below,
            "rz" => false,
            "rp" => sign == 0,
            _ => sign != 0,
        };
        sign | if towards_up { up } else { down } as u64
    }

    fn value(&self, bits: u64) -> f64 {
        let magnitude = bits & self.nan();
        let top = self.values.len() as u64 - 1;
        let v = if magnitude > top || !self.infinite && magnitude == top {
            f64::NAN
        } else if self.infinite && magnitude == top {
            f64::INFINITY
        } else {
            self.values[magnitude as usize]
        };
        if bits >> (self.bits - 1) & 1 == 1 { -v } else { v }
    }
}

fn f16() -> Table {
    Table::new(5, 10, true)
}

fn bf16() -> Table {
    Table::new(8, 7, true)
}

fn single(v: f64) -> u64 {
    if v.is_nan() { 0x7fff_ffff } else { (v as f32).to_bits() as u64 }
}

fn value32(v: u64) -> f64 {
    f32::from_bits(v as u32) as f64
}

/// All f32 around every boundary of a format: its values, the midpoints, and their neighbours.
fn boundaries(table: &Table) -> Vec<Vec<u64>> {
    let mut out = Vec::new();
    for pair in table.values.windows(2) {
        for v in [pair[0], (pair[0] + pair[1]) / 2.0] {
            let v = v as f32;
            for v in [v.next_down().max(0.0), v, v.next_up()] {
                out.push(vec![v.to_bits() as u64]);
                out.push(vec![(-v).to_bits() as u64]);
            }
        }
    }
    out.extend(floats(1, 300));
    out
}

#[test]
fn sixteen_bits_to_single_exhaustively() {
    let all: Vec<Vec<u64>> = (0..65536).map(|v| vec![v]).collect();
    for (name, table) in [("f16", f16()), ("bf16", bf16())] {
        check(&format!("cvt.f32.{name} d, a;"), &[16], 32, &all, |r| {
            let v = table.value(r[0]);
            if v == 0.0 { (r[0] & 0x8000) << 16 } else { single(v) }
        });
    }
    let table = f16();
    check("cvt.f64.f16 d, a;", &[16], 64, &all, |r| {
        let v = table.value(r[0]);
        if v.is_nan() { 0x7fff_ffff_ffff_ffff } else { v.to_bits() }
    });
}

#[test]
fn single_to_sixteen_bits_at_every_boundary() {
    for (name, table) in [("f16", f16()), ("bf16", bf16())] {
        let rows = boundaries(&table);
        for mode in if name == "f16" { &["rn", "rz", "rm", "rp"][..] } else { &["rn", "rz"] } {
            check(&format!("cvt.{mode}.{name}.f32 d, a;"), &[32], 16, &rows, |r| {
                table.round(value32(r[0]), mode)
            });
        }
        check(&format!("cvt.rn.relu.{name}.f32 d, a;"), &[32], 16, &rows, |r| {
            let v = value32(r[0]);
            if v.is_nan() { 0x7fff } else { table.round(if v > 0.0 { v } else { 0.0 }, "rn") }
        });
        let pairs: Vec<Vec<u64>> =
            rows.iter().zip(rows.iter().skip(7)).map(|(a, b)| vec![a[0], b[0]]).collect();
        for mode in ["rn", "rz"] {
            check(&format!("cvt.{mode}.{name}x2.f32 d, a, b;"), &[32; 2], 32, &pairs, |r| {
                table.round(value32(r[0]), mode) << 16 | table.round(value32(r[1]), mode)
            });
        }
    }
    // f64 to f16 must not round twice by way of f32.
    let table = f16();
    let doubles: Vec<Vec<u64>> = table
        .values
        .windows(2)
        .step_by(5)
        .flat_map(|p| {
            let middle = (p[0] + p[1]) / 2.0;
            [middle, middle.next_up(), middle.next_down(), -middle.next_up()].map(|v| vec![v.to_bits()])
        })
        .collect();
    check("cvt.rn.f16.f64 d, a;", &[64], 16, &doubles, |r| table.round(f64::from_bits(r[0]), "rn"));
    check("cvt.rn.f32.f64 d, a;", &[64], 32, &doubles, |r| (f64::from_bits(r[0]) as f32).to_bits() as u64);
}

#[test]
fn tf32_rounds_to_ten_bits() {
    let rows = floats(1, 5000);
    for (mode, away) in [("rna", true), ("rn", false)] {
        for (r, got) in
            rows.iter().zip(run("sm_90a", &format!("cvt.{mode}.tf32.f32 d, a;"), &[32], 32, &rows))
        {
            let v = value32(r[0]);
            if v.is_nan() || v.is_infinite() {
                continue;
            }
            // Magnitudes are ordered like their patterns: the neighbours are 2^13 patterns apart.
            let (low, rest) = (r[0] & 0x7fff_e000, r[0] & 0x1fff);
            let up = rest > 0x1000 || rest == 0x1000 && (away || low & 0x2000 != 0);
            let wanted = (low + if up { 0x2000 } else { 0 }) | r[0] & 0x8000_0000;
            assert_eq!(got, wanted, "{mode} {r:x?}");
        }
    }
}

#[test]
fn eight_bit_floats() {
    for (name, table, largest) in
        [("e4m3", Table::new(4, 3, false), 0x7e), ("e5m2", Table::new(5, 2, true), 0x7b)]
    {
        let rows: Vec<Vec<u64>> = boundaries(&table).into_iter().map(|r| vec![r[0], 0x3f80_0000]).collect();
        let body = format!("cvt.rn.satfinite.{name}x2.f32 d, a, b;");
        for (r, got) in rows.iter().zip(run("sm_90a", &body, &[32; 2], 16, &rows)) {
            let v = value32(r[0]);
            let rounded = table.round(v, "rn");
            let wanted = if v.is_nan() {
                0x7f
            } else if rounded & 0x7f > largest {
                rounded & 0x80 | largest
            } else {
                rounded
            };
            assert_eq!(got >> 8, wanted, "{name} of {v:e}");
            assert_eq!(table.value(got & 0xff), 1.0);
        }
        let all: Vec<Vec<u64>> = (0..65536).map(|v| vec![v]).collect();
        let half = f16();
        for (r, got) in
            all.iter().zip(run("sm_90a", &format!("cvt.rn.f16x2.{name}x2 d, a;"), &[16], 32, &all))
        {
            let wanted = |bits: u64| half.round(table.value(bits), "rn");
            assert_eq!(got, wanted(r[0] & 0xff) | wanted(r[0] >> 8) << 16, "{name} {r:x?}");
        }
    }
}

fn to_integral(v: f64, mode: &str) -> f64 {
    match mode {
        "rni" => v.round_ties_even(),
        "rzi" => v.trunc(),
        "rmi" => v.floor(),
        _ => v.ceil(),
    }
}

/// What a NaN becomes: 0, or the top bit where 64 bits are involved.
fn nan_integer(to_bits: u32, from: &str) -> u64 {
    if from == "f64" || to_bits == 64 { 1 << (to_bits - 1) } else { 0 }
}

#[test]
fn floats_to_integers() {
    let halves: Vec<Vec<u64>> = (0..65536).map(|v| vec![v]).collect();
    let mut singles = floats(1, 2000);
    singles.extend((0..4000).map(|i| vec![((i - 2000) as f32 / 8.0).to_bits() as u64]));
    for n in [7, 8, 15, 16, 31, 32, 63, 64] {
        let v = 2f32.powi(n);
        singles.extend(
            [v, v.next_down(), v.next_up(), -v, (-v).next_up(), (-v).next_down()]
                .map(|v| vec![v.to_bits() as u64]),
        );
    }
    let doubles: Vec<Vec<u64>> = singles.iter().map(|r| vec![value32(r[0]).to_bits()]).collect();
    for to in ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"] {
        let bits: u32 = to[1..].parse().unwrap();
        let signed = to.starts_with('s');
        let clamp = |v: f64| -> u64 {
            let (low, high) = if signed {
                (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
            } else {
                (0, (1i128 << bits) - 1)
            };
            (v as i128).clamp(low, high) as u64
        };
        let register = bits.max(16);
        let extend = |v: u64| {
            let shift = 64 - bits;
            if signed { ((v << shift) as i64 >> shift) as u64 } else { v << shift >> shift }
        };
        for mode in ["rni", "rzi", "rmi", "rpi"] {
            let sources: [(&str, u32, &[Vec<u64>]); 4] =
                [("f16", 16, &halves), ("f32", 32, &singles), ("f64", 64, &doubles), ("bf16", 16, &halves)];
            for (from, width, rows) in sources {
                // There is no such instruction.
                if from == "bf16" && bits == 8 {
                    continue;
                }
                // Exhaustive for a few types, thinned for the others.
                let rows: Vec<Vec<u64>> = if width == 16 && bits != 8 && bits != 32 {
                    rows.iter().step_by(17).cloned().collect()
                } else {
                    rows.to_vec()
                };
                let table = if from == "bf16" { bf16() } else { f16() };
                check(&format!("cvt.{mode}.{to}.{from} d, a;"), &[width], register, &rows, |r| {
                    let v = match from {
                        "f32" => value32(r[0]),
                        "f64" => f64::from_bits(r[0]),
                        _ => table.value(r[0]),
                    };
                    extend(if v.is_nan() { nan_integer(bits, from) } else { clamp(to_integral(v, mode)) })
                });
            }
        }
    }
    for mode in ["rni", "rzi", "rmi", "rpi"] {
        check(&format!("cvt.{mode}.f32.f32 d, a;"), &[32], 32, &singles, |r| {
            let v = f32::from_bits(r[0] as u32);
            if v.is_nan() { 0x7fff_ffff } else { single(to_integral(v as f64, mode)) }
        });
        let table = f16();
        check(&format!("cvt.{mode}.f16.f16 d, a;"), &[16], 16, &halves, |r| {
            table.round(to_integral(table.value(r[0]), mode), "rn")
        });
    }
}

#[test]
fn integers_to_floats() {
    for from in ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"] {
        let bits: u32 = from[1..].parse().unwrap();
        let mut inputs: Vec<Vec<u64>> =
            if bits <= 16 { (0..1 << bits).map(|v| vec![v]).collect() } else { rows(&[bits], 1500) };
        if bits > 16 {
            // Around what f32 and f64 can still hold.
            for p in [24, 25, 31, 53, 54, 62].into_iter().filter(|p| *p < bits) {
                inputs.extend((0..9).map(|i| vec![(1u64 << p) + i - 4]));
                inputs.extend(
                    (0..9).map(|i| vec![((1u64 << p) + i - 4).wrapping_neg() & (u64::MAX >> (64 - bits))]),
                );
            }
        }
        let value = |v: u64| {
            let shift = 64 - bits;
            if from.starts_with('s') { ((v << shift) as i64 >> shift) as i128 } else { v as i128 }
        };
        let width = bits.max(16);
        for mode in ["rn", "rz", "rm", "rp"] {
            let got = run("sm_80", &format!("cvt.{mode}.f32.{from} d, a;"), &[width], 32, &inputs);
            for (r, g) in inputs.iter().zip(got) {
                let (v, g) = (value(r[0]), f32::from_bits(g as u32));
                // Integers of f32 as integers again: all exact.
                let exact = |x: f32| x as i128;
                let fine = match mode {
                    "rn" => {
                        let d = |x: f32| (exact(x) - v).abs();
                        let (n, p) = (d(g.next_up()), d(g.next_down()));
                        let tie = (d(g) == n && n != 0 || d(g) == p && p != 0) && g.abs() > 16777216.0;
                        d(g) <= n && d(g) <= p && (!tie || g.to_bits() & 1 == 0) || exact(g) == v
                    }
                    "rz" if v < 0 => exact(g) >= v && (exact(g) == v || exact(g.next_down()) < v),
                    "rm" | "rz" => exact(g) <= v && (exact(g) == v || exact(g.next_up()) > v),
                    _ => exact(g) >= v && (exact(g) == v || exact(g.next_down()) < v),
                };
                assert!(fine, "cvt.{mode}.f32.{from} of {v} gave {g}");
            }
        }
        check(&format!("cvt.rn.f64.{from} d, a;"), &[width], 64, &inputs, |r| (value(r[0]) as f64).to_bits());
        let table = f16();
        check(&format!("cvt.rn.f16.{from} d, a;"), &[width], 16, &inputs, |r| {
            // i128 to f64 rounds, but never across a boundary of f16 below 2^53; above it all is infinite.
            table.round(value(r[0]) as f64, "rn")
        });
    }
}

/// Pairs and triples of 16-bit floats: corners and random ones with exponents near each other.
fn half_rows(count: usize, mantissa: u32, sources: usize) -> Vec<Vec<u64>> {
    let exponent = 15 - mantissa;
    let middle = (1u64 << (exponent - 1)) - 1;
    let top = ((1u64 << exponent) - 1) << mantissa;
    let corners = [
        0,
        0x8000,
        1,
        0x8001,
        middle << mantissa,
        0x8000 | middle << mantissa,
        top,
        0x8000 | top,
        top + 1,
        top - 1,
        0x7fff,
    ];
    let total = corners.len().pow(sources as u32);
    let mut out: Vec<Vec<u64>> = (0..total)
        .map(|i| (0..sources).map(|s| corners[i / corners.len().pow(s as u32) % corners.len()]).collect())
        .collect();
    let mut values = random(count * sources, 23);
    for i in 0..count {
        out.push(
            (0..sources)
                .map(|_| {
                    let v = values.next().unwrap();
                    if i % 3 == 0 {
                        v & 0xffff
                    } else {
                        v & 0x8000 | (middle - 6 + (v >> 32) % 12) << mantissa | v & ((1 << mantissa) - 1)
                    }
                })
                .collect(),
        );
    }
    out
}

#[test]
fn half_arithmetic_rounds_once() {
    for (name, table, mantissa) in [("f16", f16(), 10), ("bf16", bf16(), 7)] {
        let (two, three) = (half_rows(6000, mantissa, 2), half_rows(6000, mantissa, 3));
        // f64 holds products, and sums of what is near; elsewhere the smaller term cannot matter twice, because 53
        // bits are more than twice those of the format plus two.
        let v = |b: u64| table.value(b);
        let operations: [(&str, fn(f64, f64) -> f64); 3] =
            [("add", |a, b| a + b), ("sub", |a, b| a - b), ("mul", |a, b| a * b)];
        for (op, exact) in operations {
            let target = if name == "f16" { "sm_80" } else { "sm_90a" };
            let got = run(target, &format!("{op}.rn.{name} d, a, b;"), &[16; 2], 16, &two);
            for (r, g) in two.iter().zip(got) {
                let wanted = table.round(exact(v(r[0]), v(r[1])), "rn");
                assert_eq!(g, wanted, "{op}.{name} {r:x?}");
            }
        }
        // Where f64 cannot hold a sum, what is lost decides if the sum lies on a boundary, which has few bits.
        let fused = |a: f64, b: f64, c: f64| {
            let (p, s) = (a * b, a * b + c);
            let t = s - p;
            let lost = (p - (s - t)) + (c - t);
            match s.to_bits() & 0xffff {
                0 if lost > 0.0 => s.next_up(),
                0 if lost < 0.0 => s.next_down(),
                _ => s,
            }
        };
        check(&format!("fma.rn.{name} d, a, b, c;"), &[16; 3], 16, &three, |r| {
            table.round(fused(v(r[0]), v(r[1]), v(r[2])), "rn")
        });
        check(&format!("fma.rn.relu.{name} d, a, b, c;"), &[16; 3], 16, &three, |r| {
            let x = table.round(fused(v(r[0]), v(r[1]), v(r[2])), "rn");
            if x & 0x7fff > table.values.len() as u64 - 1 {
                0x7fff
            } else if x & 0x8000 != 0 {
                0
            } else {
                x
            }
        });
        // In pairs: each half for itself.
        let pairs: Vec<Vec<u64>> =
            three.windows(2).map(|w| (0..3).map(|i| w[0][i] | w[1][i] << 16).collect()).collect();
        check(&format!("fma.rn.{name}x2 d, a, b, c;"), &[32; 3], 32, &pairs, |r| {
            let one = |s: u32| {
                let x = |i: usize| v(r[i] >> s & 0xffff);
                table.round(fused(x(0), x(1), x(2)), "rn")
            };
            one(0) | one(16) << 16
        });
        let key = |b: u64| if b & 0x8000 != 0 { !(b & 0x7fff) as i64 } else { b as i64 };
        for (op, min) in [("min", true), ("max", false)] {
            check(&format!("{op}.{name} d, a, b;"), &[16; 2], 16, &two, |r| {
                match (v(r[0]).is_nan(), v(r[1]).is_nan()) {
                    (true, true) => 0x7fff,
                    (true, false) => r[1],
                    (false, true) => r[0],
                    _ if (key(r[0]) < key(r[1])) == min => r[0],
                    _ => r[1],
                }
            });
        }
        let all: Vec<Vec<u64>> = (0..65536).map(|v| vec![v]).collect();
        check(&format!("neg.{name} d, a;"), &[16], 16, &all, |r| r[0] ^ 0x8000);
        check(&format!("abs.{name} d, a;"), &[16], 16, &all, |r| r[0] & 0x7fff);
        check(&format!("setp.lt.{name} p, a, b; selp.b16 d, 1, 0, p;"), &[16; 2], 16, &two, |r| {
            (v(r[0]) < v(r[1])) as u64
        });
    }
    let all: Vec<Vec<u64>> = (0..65536).map(|v| vec![v]).collect();
    let table = f16();
    check("ex2.approx.f16 d, a;", &[16], 16, &all, |r| table.round(table.value(r[0]).exp2(), "rn"));
    check("mul.sat.f16 d, a, a;", &[16], 16, &all, |r| {
        let x = table.value(table.round(table.value(r[0]).powi(2), "rn"));
        table.round(if x.is_nan() { 0.0 } else { x.min(1.0) }, "rn")
    });
    check(
        "setp.gt.f16x2 p|q, a, b; selp.b32 d, 1, 0, p; @q add.u32 d, d, 2;",
        &[32; 2],
        32,
        &rows(&[32; 2], 500),
        |r| {
            let over = |s: u32| table.value(r[0] >> s & 0xffff) > table.value(r[1] >> s & 0xffff);
            over(0) as u64 + 2 * over(16) as u64
        },
    );
    check("set.ge.f16x2.f16x2 d, a, b;", &[32; 2], 32, &rows(&[32; 2], 500), |r| {
        let one = |s: u32| {
            if table.value(r[0] >> s & 0xffff) >= table.value(r[1] >> s & 0xffff) {
                0x3c00u64 << s
            } else {
                0
            }
        };
        one(0) | one(16)
    });
}
