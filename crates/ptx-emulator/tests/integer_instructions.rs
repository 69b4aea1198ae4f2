//! Integer, logic, bit and comparison instructions against their definitions in the PTX ISA document.

// Tables of instructions and their meanings; fragments are indexed as the document does it.
#![allow(clippy::type_complexity, clippy::needless_range_loop, clippy::manual_is_multiple_of)]

mod common;
use common::{check, corners, random, rows};

/// Sign-extends the low bits.
fn signed(v: u64, bits: u32) -> i128 {
    (((v << (64 - bits)) as i64) >> (64 - bits)) as i128
}

fn unsigned(v: u64, bits: u32) -> i128 {
    (v & (u64::MAX >> (64 - bits))) as i128
}

/// A two-operand instruction on every width and signedness, as a function of wide integers.
fn arithmetic(op: &str, types: &[&str], f: impl Fn(i128, i128, u32) -> i128) {
    for ty in types {
        let bits: u32 = ty[1..].parse().unwrap();
        let value = |v: u64| if ty.starts_with('s') { signed(v, bits) } else { unsigned(v, bits) };
        check(&format!("{op}.{ty} d, a, b;"), &[bits; 2], bits, &rows(&[bits; 2], 500), |r| {
            f(value(r[0]), value(r[1]), bits) as u64
        });
    }
}

const ALL: &[&str] = &["u16", "s16", "u32", "s32", "u64", "s64"];

#[test]
fn add_sub_mul_div_rem_min_max() {
    arithmetic("add", ALL, |a, b, _| a + b);
    arithmetic("sub", ALL, |a, b, _| a - b);
    arithmetic("mul.lo", ALL, |a, b, _| a.wrapping_mul(b));
    arithmetic("mul.hi", ALL, |a, b, bits| {
        // 64-bit unsigned products pass 2^127: take the high part by halves.
        if bits == 64 && (a > i64::MAX as i128 || b > i64::MAX as i128) {
            return ((a as u128 * b as u128) >> 64) as i128;
        }
        (a * b) >> bits
    });
    arithmetic("min", ALL, |a, b, _| a.min(b));
    arithmetic("max", ALL, |a, b, _| a.max(b));
    for ty in ALL {
        let bits: u32 = ty[1..].parse().unwrap();
        let value = |v: u64| if ty.starts_with('s') { signed(v, bits) } else { unsigned(v, bits) };
        let nonzero: Vec<_> = rows(&[bits; 2], 500).into_iter().filter(|r| r[1] != 0).collect();
        check(&format!("div.{ty} d, a, b;"), &[bits; 2], bits, &nonzero, |r| {
            (value(r[0]) / value(r[1])) as u64
        });
        check(&format!("rem.{ty} d, a, b;"), &[bits; 2], bits, &nonzero, |r| {
            (value(r[0]) % value(r[1])) as u64
        });
    }
    arithmetic("add.sat", &["s32"], |a, b, _| (a + b).clamp(i32::MIN as i128, i32::MAX as i128));
    arithmetic("sub.sat", &["s32"], |a, b, _| (a - b).clamp(i32::MIN as i128, i32::MAX as i128));
}

#[test]
fn wide_products_and_multiply_add() {
    for (ty, bits) in [("u16", 16), ("s16", 16), ("u32", 32), ("s32", 32)] {
        let value = |v: u64, bits: u32| if ty.starts_with('s') { signed(v, bits) } else { unsigned(v, bits) };
        check(&format!("mul.wide.{ty} d, a, b;"), &[bits; 2], 2 * bits, &rows(&[bits; 2], 500), |r| {
            (value(r[0], bits) * value(r[1], bits)) as u64
        });
        let widths = [bits, bits, 2 * bits];
        check(&format!("mad.wide.{ty} d, a, b, c;"), &widths, 2 * bits, &rows(&widths, 500), |r| {
            (value(r[0], bits) * value(r[1], bits)).wrapping_add(r[2] as i128) as u64
        });
    }
    for ty in ALL {
        let bits: u32 = ty[1..].parse().unwrap();
        let value = |v: u64| if ty.starts_with('s') { signed(v, bits) } else { unsigned(v, bits) };
        check(&format!("mad.lo.{ty} d, a, b, c;"), &[bits; 3], bits, &rows(&[bits; 3], 500), |r| {
            value(r[0]).wrapping_mul(value(r[1])).wrapping_add(value(r[2])) as u64
        });
        if bits < 64 {
            check(&format!("mad.hi.{ty} d, a, b, c;"), &[bits; 3], bits, &rows(&[bits; 3], 500), |r| {
                (((value(r[0]) * value(r[1])) >> bits) + value(r[2])) as u64
            });
            check(&format!("sad.{ty} d, a, b, c;"), &[bits; 3], bits, &rows(&[bits; 3], 500), |r| {
                (value(r[2]) + (value(r[0]) - value(r[1])).abs()) as u64
            });
        }
    }
}

#[test]
fn carries_chain() {
    let body = "add.cc.u32 %r4, a, b; addc.u32 d, c, 0;";
    check(body, &[32; 3], 32, &rows(&[32; 3], 500), |r| r[2] + ((r[0] + r[1]) >> 32));
    let body = "sub.cc.u32 %r4, a, b; subc.u32 d, c, 0;";
    check(body, &[32; 3], 32, &rows(&[32; 3], 500), |r| r[2].wrapping_sub((r[0] < r[1]) as u64));
    // 64 x 64 -> high 64 bits by 32-bit steps, as compilers write it for wide integers.
    let body = "add.cc.u64 %rd4, a, b; addc.cc.u64 %rd5, a, b; addc.u64 d, 0, 0;";
    check(body, &[64; 2], 64, &rows(&[64; 2], 500), |r| {
        let (a, b) = (r[0] as u128, r[1] as u128);
        ((a + b + ((a + b) >> 64)) >> 64) as u64
    });
    let body = "mad.lo.cc.u32 %r4, a, b, c; madc.hi.u32 d, a, b, 0;";
    check(body, &[32; 3], 32, &rows(&[32; 3], 500), |r| {
        let product = r[0] * r[1];
        (product >> 32) + (((product & 0xffff_ffff) + r[2]) >> 32)
    });
}

#[test]
fn unary() {
    for bits in [16, 32, 64] {
        let r1: Vec<Vec<u64>> = rows(&[bits], 500);
        check(&format!("neg.s{bits} d, a;"), &[bits], bits, &r1, |r| r[0].wrapping_neg());
        check(&format!("abs.s{bits} d, a;"), &[bits], bits, &r1, |r| {
            signed(r[0], bits).unsigned_abs() as u64
        });
        check(&format!("not.b{bits} d, a;"), &[bits], bits, &r1, |r| !r[0]);
        check(&format!("cnot.b{bits} d, a;"), &[bits], bits, &r1, |r| (r[0] == 0) as u64);
    }
    for bits in [32, 64] {
        let r1: Vec<Vec<u64>> = rows(&[bits], 500);
        let digits = |v: u64| (0..bits).map(|i| v >> i & 1).collect::<Vec<_>>();
        check(&format!("popc.b{bits} d, a;"), &[bits], 32, &r1, |r| digits(r[0]).iter().sum());
        check(&format!("clz.b{bits} d, a;"), &[bits], 32, &r1, |r| {
            digits(r[0]).iter().rev().take_while(|&&b| b == 0).count() as u64
        });
        check(&format!("brev.b{bits} d, a;"), &[bits], bits, &r1, |r| {
            digits(r[0]).iter().fold(0, |out, bit| out << 1 | bit)
        });
        for (sign, fill) in [("u", false), ("s", true)] {
            let find = |v: u64| {
                let skip = if fill && v >> (bits - 1) & 1 == 1 { 1 } else { 0 };
                (0..bits).rev().find(|&i| v >> i & 1 != skip)
            };
            check(&format!("bfind.{sign}{bits} d, a;"), &[bits], 32, &r1, |r| {
                find(r[0]).map_or(u32::MAX as u64, u64::from)
            });
            check(&format!("bfind.shiftamt.{sign}{bits} d, a;"), &[bits], 32, &r1, |r| {
                find(r[0]).map_or(u32::MAX as u64, |i| (bits - 1 - i) as u64)
            });
        }
    }
}

#[test]
fn logic_and_shifts() {
    for bits in [16, 32, 64] {
        let r2 = rows(&[bits; 2], 300);
        check(&format!("and.b{bits} d, a, b;"), &[bits; 2], bits, &r2, |r| r[0] & r[1]);
        check(&format!("or.b{bits} d, a, b;"), &[bits; 2], bits, &r2, |r| r[0] | r[1]);
        check(&format!("xor.b{bits} d, a, b;"), &[bits; 2], bits, &r2, |r| r[0] ^ r[1]);
        // All amounts up to above the width, and huge ones, which clamp.
        let mut shifts = Vec::new();
        for v in corners(bits).into_iter().chain(random(5, 3)) {
            for n in (0..70).chain([255, 256, 0x8000_0000, 0xffff_ffff]) {
                shifts.push(vec![v & (u64::MAX >> (64 - bits)), n]);
            }
        }
        let by = |v: i128, n: u64, left: bool| {
            let n = n.min(100) as u32;
            (if left { v << n.min(64) } else { v >> n }) as u64
        };
        check(&format!("shl.b{bits} d, a, b;"), &[bits, 32], bits, &shifts, |r| {
            by(unsigned(r[0], bits), r[1], true)
        });
        check(&format!("shr.u{bits} d, a, b;"), &[bits, 32], bits, &shifts, |r| {
            by(unsigned(r[0], bits), r[1], false)
        });
        check(&format!("shr.s{bits} d, a, b;"), &[bits, 32], bits, &shifts, |r| {
            by(signed(r[0], bits), r[1], false)
        });
    }
}

/// The loop of the PTX document.
fn bfe(a: u64, pos: u64, len: u64, bits: u32, is_signed: bool) -> u64 {
    let (pos, len, msb) = (pos & 0xff, len & 0xff, bits as u64 - 1);
    let bit = |i: u64| a >> i & 1;
    let sbit = if !is_signed || len == 0 { 0 } else { bit((pos + len - 1).min(msb)) };
    (0..=msb).fold(0, |d, i| d | (if i < len && pos + i <= msb { bit(pos + i) } else { sbit }) << i)
}

fn bfi(a: u64, b: u64, pos: u64, len: u64, bits: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    (0..len)
        .filter(|i| pos + i < bits as u64)
        .fold(b, |f, i| f & !(1 << (pos + i)) | (a >> i & 1) << (pos + i))
}

#[test]
fn bit_fields() {
    let places = [0u64, 1, 5, 8, 16, 31, 32, 33, 47, 63, 64, 100, 255, 256, 257];
    for bits in [32, 64] {
        let mut three = Vec::new();
        for (i, v) in corners(bits).into_iter().chain(random(4, 5)).enumerate() {
            let v = v & (u64::MAX >> (64 - bits));
            let other = corners(bits)[(i * 7) % 17];
            for p in places {
                for l in places {
                    three.push(vec![v, p, l, other]);
                }
            }
        }
        let first: Vec<Vec<u64>> = three.iter().map(|r| r[..3].to_vec()).collect();
        for (sign, is_signed) in [("u", false), ("s", true)] {
            check(&format!("bfe.{sign}{bits} d, a, b, c;"), &[bits, 32, 32], bits, &first, |r| {
                bfe(r[0], r[1], r[2], bits, is_signed)
            });
        }
        check(&format!("bfi.b{bits} d, a, e, b, c;"), &[bits, 32, 32, bits], bits, &three, |r| {
            bfi(r[0], r[3], r[1], r[2], bits)
        });
    }
}

#[test]
fn permutes_and_tables() {
    let mut r3 = rows(&[32, 32, 32], 2000);
    r3.extend((0..65536).step_by(7).map(|s| vec![0x8391_a2b3, 0x44d5_e677, s]));
    check("prmt.b32 d, a, b, c;", &[32; 3], 32, &r3, |r| {
        let bytes = [r[0].to_le_bytes(), r[1].to_le_bytes()];
        let byte = |i: u64| bytes[(i / 4) as usize][(i % 4) as usize];
        (0..4).fold(0, |d, i| {
            let s = r[2] >> (4 * i) & 15;
            let b = byte(s & 7);
            let b = if s & 8 != 0 { if b & 0x80 != 0 { 0xff } else { 0 } } else { b };
            d | (b as u64) << (8 * i)
        })
    });
    // Modes of prmt, from the table of the document: bytes 3, 2, 1, 0 of the result for selectors 0 to 3.
    let modes: [(&str, [[usize; 4]; 4]); 6] = [
        ("f4e", [[3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2], [6, 5, 4, 3]]),
        ("b4e", [[5, 6, 7, 0], [6, 7, 0, 1], [7, 0, 1, 2], [0, 1, 2, 3]]),
        ("rc8", [[0; 4], [1; 4], [2; 4], [3; 4]]),
        ("ecl", [[3, 2, 1, 0], [3, 2, 1, 1], [3, 2, 2, 2], [3, 3, 3, 3]]),
        ("ecr", [[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, 1, 0], [3, 2, 1, 0]]),
        ("rc16", [[1, 0, 1, 0], [3, 2, 3, 2], [1, 0, 1, 0], [3, 2, 3, 2]]),
    ];
    for (mode, table) in modes {
        check(&format!("prmt.b32.{mode} d, a, b, c;"), &[32; 3], 32, &rows(&[32; 3], 200), |r| {
            let pool = r[0] | r[1] << 32;
            table[(r[2] & 3) as usize].iter().fold(0, |d, &i| d << 8 | pool >> (8 * i) & 0xff)
        });
    }
    for table in 0..256u64 {
        check(&format!("lop3.b32 d, a, b, c, {table};"), &[32; 3], 32, &rows(&[32; 3], 40)[2400..], |r| {
            (0..32).fold(0, |d, i| {
                let at = (r[0] >> i & 1) << 2 | (r[1] >> i & 1) << 1 | r[2] >> i & 1;
                d | (table >> at & 1) << i
            })
        });
    }
    let amounts: Vec<Vec<u64>> =
        (0..70).flat_map(|n| random(3, n + 1).map(move |v| vec![v & 0xffff_ffff, v >> 32, n])).collect();
    for (wrap, clamp) in [("wrap", false), ("clamp", true)] {
        let n = |c: u64| if clamp { c.min(32) } else { c & 31 };
        check(&format!("shf.l.{wrap}.b32 d, a, b, c;"), &[32; 3], 32, &amounts, |r| {
            (((r[1] << 32 | r[0]) as u128) << n(r[2]) >> 32) as u64
        });
        check(&format!("shf.r.{wrap}.b32 d, a, b, c;"), &[32; 3], 32, &amounts, |r| {
            (r[1] << 32 | r[0]) >> n(r[2])
        });
    }
}

#[test]
fn dot_products() {
    for (ta, sa) in [("u32", false), ("s32", true)] {
        for (tb, sb) in [("u32", false), ("s32", true)] {
            check(&format!("dp4a.{ta}.{tb} d, a, b, c;"), &[32; 3], 32, &rows(&[32; 3], 500), |r| {
                let byte = |v: u64, i: u32, s: bool| {
                    let b = v >> (8 * i) & 0xff;
                    if s { signed(b, 8) } else { unsigned(b, 8) }
                };
                (0..4).fold(r[2] as i128, |sum, i| sum + byte(r[0], i, sa) * byte(r[1], i, sb)) as u64
            });
        }
    }
}

#[test]
fn comparisons_and_selections() {
    for ty in ALL {
        let bits: u32 = ty[1..].parse().unwrap();
        let value = |v: u64| if ty.starts_with('s') { signed(v, bits) } else { unsigned(v, bits) };
        let r2 = rows(&[bits; 2], 300);
        let operators: [(&str, fn(i128, i128) -> bool); 6] = [
            ("eq", |a, b| a == b),
            ("ne", |a, b| a != b),
            ("lt", |a, b| a < b),
            ("le", |a, b| a <= b),
            ("gt", |a, b| a > b),
            ("ge", |a, b| a >= b),
        ];
        for (op, f) in operators {
            let body = format!("setp.{op}.{ty} p, a, b; selp.u32 d, 1, 0, p;");
            check(&body, &[bits; 2], 32, &r2, |r| f(value(r[0]), value(r[1])) as u64);
        }
    }
    for (op, f) in [
        ("lo", (|a, b| a < b) as fn(u64, u64) -> bool),
        ("ls", |a, b| a <= b),
        ("hi", |a, b| a > b),
        ("hs", |a, b| a >= b),
    ] {
        check(
            &format!("setp.{op}.u32 p, a, b; selp.u32 d, 1, 0, p;"),
            &[32; 2],
            32,
            &rows(&[32; 2], 300),
            |r| f(r[0], r[1]) as u64,
        );
    }
    // The logic with a third predicate, and both results.
    for (logic, f) in
        [("and", (|a, b| a & b) as fn(bool, bool) -> bool), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)]
    {
        for negate in [false, true] {
            let not = if negate { "!" } else { "" };
            let body = format!(
                "setp.ne.u32 r, c, 0; setp.lt.{logic}.s32 p|q, a, b, {not}r; selp.u32 d, 1, 0, p; @q add.u32 d, d, 2;"
            );
            let mut r3 = rows(&[32; 3], 300);
            r3.iter_mut().for_each(|r| r[2] &= 1);
            check(&body, &[32; 3], 32, &r3, |r| {
                let (less, c) = (signed(r[0], 32) < signed(r[1], 32), (r[2] != 0) != negate);
                f(less, c) as u64 + 2 * f(!less, c) as u64
            });
        }
    }
    check("set.lt.u32.s32 d, a, b;", &[32; 2], 32, &rows(&[32; 2], 100), |r| {
        if signed(r[0], 32) < signed(r[1], 32) { u32::MAX as u64 } else { 0 }
    });
    check("slct.b32.s32 d, a, b, c;", &[32; 3], 32, &rows(&[32; 3], 100), |r| {
        if signed(r[2], 32) >= 0 { r[0] } else { r[1] }
    });
}

#[test]
fn packing() {
    check("mov.b64 d, {a, b};", &[32, 32], 64, &rows(&[32; 2], 100), |r| r[0] | r[1] << 32);
    check("mov.b32 d, {a, b};", &[16, 16], 32, &rows(&[16; 2], 100), |r| r[0] | r[1] << 16);
    let parts = ".reg .b16 h<4>; mov.b64 {h0, h1, h2, h3}, a; mov.b64 d, {h3, h2, h1, h0};";
    check(parts, &[64], 64, &rows(&[64], 100), |r| {
        (0..4).fold(0, |d, i| d << 16 | r[0] >> (16 * i) & 0xffff)
    });
    check("mov.b64 {_, d}, a;", &[64], 32, &rows(&[64], 100), |r| r[0] >> 32);
    check("mov.b64 {a, d}, b; xor.b32 d, d, a;", &[32, 64], 32, &rows(&[32, 64], 100), |r| r[1] >> 32 ^ r[1]);
}

#[test]
fn every_integer_conversion() {
    for from in ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"] {
        let from_bits: u32 = from[1..].parse().unwrap();
        // Exhaustive below 32 bits.
        let inputs: Vec<Vec<u64>> = if from_bits <= 16 {
            (0..1 << from_bits).map(|v| vec![v]).collect()
        } else {
            rows(&[from_bits], 2000)
        };
        let value =
            |v: u64| if from.starts_with('s') { signed(v, from_bits) } else { unsigned(v, from_bits) };
        for to in ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"] {
            let to_bits: u32 = to[1..].parse().unwrap();
            let (low, high) = match (to.starts_with('s'), to_bits) {
                (true, n) => (-(1i128 << (n - 1)), (1i128 << (n - 1)) - 1),
                (false, n) => (0, (1i128 << n) - 1),
            };
            // 8-bit values live in 16-bit registers; narrower results are extended to the register.
            let register = to_bits.max(16);
            let extend = |v: i128| {
                let cut = v as u64 & (u64::MAX >> (64 - to_bits));
                (if to.starts_with('s') { signed(cut, to_bits) } else { cut as i128 }) as u64
            };
            let body = format!("cvt.{to}.{from} d, a;");
            check(&body, &[from_bits.max(16)], register, &inputs, |r| extend(value(r[0])));
            // Saturation is refused where the type holds every value.
            let (least, most) = if from.starts_with('s') {
                (-(1i128 << (from_bits - 1)), (1i128 << (from_bits - 1)) - 1)
            } else {
                (0, (1i128 << from_bits) - 1)
            };
            if low <= least && most <= high {
                continue;
            }
            let body = format!("cvt.sat.{to}.{from} d, a;");
            check(&body, &[from_bits.max(16)], register, &inputs, |r| extend(value(r[0]).clamp(low, high)));
        }
    }
}
