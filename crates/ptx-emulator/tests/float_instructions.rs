//! f32 and f64 instructions against their definitions in the PTX ISA document.

// Tables of instructions and their meanings; fragments are indexed as the document does it.
#![allow(clippy::type_complexity, clippy::needless_range_loop, clippy::manual_is_multiple_of)]

mod common;
use common::{check, floats, random, run};

const NAN: u32 = 0x7fff_ffff;

fn f(v: u64) -> f32 {
    f32::from_bits(v as u32)
}

fn bits(v: f32) -> u64 {
    // Results that are NaN have one pattern.
    (if v.is_nan() { NAN } else { v.to_bits() }) as u64
}

fn flush(v: f32) -> f32 {
    if v.is_subnormal() { 0f32.copysign(v) } else { v }
}

#[test]
fn arithmetic_to_nearest() {
    let (r1, r2, r3) = (floats(1, 500), floats(2, 2000), floats(3, 2000));
    check("add.f32 d, a, b;", &[32; 2], 32, &r2, |r| bits(f(r[0]) + f(r[1])));
    check("sub.rn.f32 d, a, b;", &[32; 2], 32, &r2, |r| bits(f(r[0]) - f(r[1])));
    check("mul.f32 d, a, b;", &[32; 2], 32, &r2, |r| bits(f(r[0]) * f(r[1])));
    check("div.rn.f32 d, a, b;", &[32; 2], 32, &r2, |r| bits(f(r[0]) / f(r[1])));
    check("sqrt.rn.f32 d, a;", &[32], 32, &r1, |r| bits(f(r[0]).sqrt()));
    check("rcp.rn.f32 d, a;", &[32], 32, &r1, |r| bits(1.0 / f(r[0])));
    check("fma.rn.f32 d, a, b, c;", &[32; 3], 32, &r3, |r| bits(f(r[0]).mul_add(f(r[1]), f(r[2]))));
    check("mul.ftz.f32 d, a, b;", &[32; 2], 32, &r2, |r| bits(flush(flush(f(r[0])) * flush(f(r[1])))));
    check("add.ftz.f32 d, a, b;", &[32; 2], 32, &r2, |r| bits(flush(flush(f(r[0])) + flush(f(r[1])))));
    check("fma.rn.ftz.f32 d, a, b, c;", &[32; 3], 32, &r3, |r| {
        bits(flush(flush(f(r[0])).mul_add(flush(f(r[1])), flush(f(r[2])))))
    });
    check("fma.rn.sat.f32 d, a, b, c;", &[32; 3], 32, &r3, |r| {
        let v = f(r[0]).mul_add(f(r[1]), f(r[2]));
        bits(if v.is_nan() || v <= 0.0 { 0.0 } else { v.min(1.0) })
    });
}

/// Whether `got` is `exact` rounded to f32 downwards, upwards or towards zero.
fn directed(exact: f64, got: f32, mode: &str) -> bool {
    let g = got as f64;
    let (next, previous) = (got.next_up() as f64, got.next_down() as f64);
    match mode {
        "rm" => g <= exact && (exact < next || got == f32::MAX),
        "rp" => g >= exact && (exact > previous || got == f32::MIN),
        _ if exact >= 0.0 => g <= exact && (exact < next || got == f32::MAX),
        _ => g >= exact && (exact > previous || got == f32::MIN),
    }
}

#[test]
fn directed_rounding() {
    // Exponents near each other: f64 holds the exact sum and product.
    let near = |n: usize| -> Vec<Vec<u64>> {
        floats(n, 3000).into_iter().skip(20usize.pow(n as u32)).step_by(2).collect()
    };
    for mode in ["rm", "rp", "rz"] {
        for (op, exact) in
            [("add", (|a, b| a + b) as fn(f64, f64) -> f64), ("sub", |a, b| a - b), ("mul", |a, b| a * b)]
        {
            let rows = near(2);
            let got = run("sm_80", &format!("{op}.{mode}.f32 d, a, b;"), &[32; 2], 32, &rows);
            for (r, g) in rows.iter().zip(got) {
                let e = exact(f(r[0]) as f64, f(r[1]) as f64);
                assert!(directed(e, f(g), mode), "{op}.{mode} {r:x?} gave {g:x}, exactly {e:e}");
            }
        }
        let rows = near(3);
        let got = run("sm_80", &format!("fma.{mode}.f32 d, a, b, c;"), &[32; 3], 32, &rows);
        let mut compared = 0;
        for (r, g) in rows.iter().zip(got) {
            let (p, c) = (f(r[0]) as f64 * f(r[1]) as f64, f(r[2]) as f64);
            let e = p + c;
            // Where f64 cannot hold the sum, the rest decides only if it lies on an f32; skip those.
            if e - p == c && e - c == p {
                compared += 1;
                assert!(directed(e, f(g), mode), "fma.{mode} {r:x?} gave {g:x}, exactly {e:e}");
            }
        }
        assert!(compared > 500, "{compared}");
        let rows = near(2);
        let got = run("sm_80", &format!("div.{mode}.f32 d, a, b;"), &[32; 2], 32, &rows);
        for (r, g) in rows.iter().zip(got) {
            // By multiplication: g <= a / b, and so on; g * b is exact in f64.
            let (a, b, g) = (f(r[0]) as f64, f(r[1]) as f64, f(g));
            let below = |q: f32| if b > 0.0 { q as f64 * b <= a } else { q as f64 * b >= a };
            let (low, high) = (g.next_down(), g.next_up());
            let negative = (a < 0.0) != (b < 0.0);
            let floor = below(g) && !below(high);
            let ceiling = (below(g) && g as f64 * b == a || !below(g)) && below(low);
            let fine = match mode {
                "rm" => floor,
                "rp" => ceiling,
                _ if negative => ceiling,
                _ => floor,
            };
            assert!(fine, "div.{mode} {r:x?} gave {g:e}");
        }
        for (op, square) in [("sqrt", true), ("rcp", false)] {
            let rows: Vec<Vec<u64>> = near(1).into_iter().map(|r| vec![r[0] & 0x7fff_ffff]).collect();
            let got = run("sm_80", &format!("{op}.{mode}.f32 d, a;"), &[32], 32, &rows);
            for (r, g) in rows.iter().zip(got) {
                let (a, g) = (f(r[0]) as f64, f(g));
                let below = |q: f32| if square { q as f64 * q as f64 <= a } else { q as f64 * a <= 1.0 };
                let exact = if square { g as f64 * g as f64 == a } else { g as f64 * a == 1.0 };
                let fine = match mode {
                    "rp" => (exact || !below(g)) && below(g.next_down()),
                    _ => below(g) && !below(g.next_up()),
                };
                assert!(fine, "{op}.{mode} {r:x?} gave {g:e}");
            }
        }
    }
    // An exact zero from opposite signs is -0 downwards, +0 otherwise.
    let zero = vec![vec![0x3f80_0000u64, 0xbf80_0000]];
    assert_eq!(run("sm_80", "add.rm.f32 d, a, b;", &[32; 2], 32, &zero)[0] as u32, 0x8000_0000);
    assert_eq!(run("sm_80", "add.rz.f32 d, a, b;", &[32; 2], 32, &zero)[0] as u32, 0);
    // A tiny addend moves a directed result, however small it is.
    let tiny = vec![vec![0x3f80_0000u64, 0x0000_0001]];
    assert_eq!(run("sm_80", "add.rp.f32 d, a, b;", &[32; 2], 32, &tiny)[0] as u32, 0x3f80_0001);
    assert_eq!(run("sm_80", "sub.rz.f32 d, a, b;", &[32; 2], 32, &tiny)[0] as u32, 0x3f7f_ffff);
}

#[test]
fn minimum_maximum_sign() {
    let (r1, r2) = (floats(1, 200), floats(2, 500));
    // -0 is below +0; one NaN loses; two give NaN.
    let order = |v: f32| {
        let b = v.to_bits() as i32;
        if b < 0 { !(b & i32::MAX) } else { b }
    };
    let pick = |a: f32, b: f32, min: bool| match (a.is_nan(), b.is_nan()) {
        (true, true) => f32::NAN,
        (true, false) => b,
        (false, true) => a,
        _ if (order(a) < order(b)) == min => a,
        _ => b,
    };
    for (op, min) in [("min", true), ("max", false)] {
        check(&format!("{op}.f32 d, a, b;"), &[32; 2], 32, &r2, |r| bits(pick(f(r[0]), f(r[1]), min)));
        check(&format!("{op}.NaN.f32 d, a, b;"), &[32; 2], 32, &r2, |r| {
            let (a, b) = (f(r[0]), f(r[1]));
            bits(if a.is_nan() || b.is_nan() { f32::NAN } else { pick(a, b, min) })
        });
        check(&format!("{op}.xorsign.abs.f32 d, a, b;"), &[32; 2], 32, &r2, |r| {
            let v = bits(pick(f(r[0]).abs(), f(r[1]).abs(), min)) & 0x7fff_ffff;
            v | (r[0] ^ r[1]) & 0x8000_0000
        });
    }
    check("abs.f32 d, a;", &[32], 32, &r1, |r| r[0] & 0x7fff_ffff);
    check("neg.f32 d, a;", &[32], 32, &r1, |r| r[0] ^ 0x8000_0000);
    check("copysign.f32 d, a, b;", &[32; 2], 32, &r2, |r| r[1] & 0x7fff_ffff | r[0] & 0x8000_0000);
    for (what, g) in [
        ("finite", (|v| v.is_finite()) as fn(f32) -> bool),
        ("infinite", |v| v.is_infinite()),
        ("number", |v| !v.is_nan()),
        ("notanumber", |v| v.is_nan()),
        ("normal", |v| v.is_normal()),
        ("subnormal", |v| v.is_subnormal()),
    ] {
        check(&format!("testp.{what}.f32 p, a; selp.u32 d, 1, 0, p;"), &[32], 32, &r1, |r| g(f(r[0])) as u64);
    }
}

#[test]
fn comparisons() {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let table: [(&str, &[std::cmp::Ordering]); 6] = [
        ("eq", &[Equal]),
        ("ne", &[Less, Greater]),
        ("lt", &[Less]),
        ("le", &[Less, Equal]),
        ("gt", &[Greater]),
        ("ge", &[Greater, Equal]),
    ];
    let rows = floats(2, 100);
    for (op, hits) in table {
        for (suffix, unordered) in [("", false), ("u", true)] {
            let body = format!("setp.{op}{suffix}.f32 p, a, b; selp.u32 d, 1, 0, p;");
            check(&body, &[32; 2], 32, &rows, |r| {
                f(r[0]).partial_cmp(&f(r[1])).map_or(unordered, |o| hits.contains(&o)) as u64
            });
        }
    }
    for (op, with_nan) in [("num", false), ("nan", true)] {
        check(&format!("setp.{op}.f32 p, a, b; selp.u32 d, 1, 0, p;"), &[32; 2], 32, &rows, |r| {
            ((f(r[0]).is_nan() || f(r[1]).is_nan()) == with_nan) as u64
        });
    }
    check(
        "set.gt.f32.f32 d, a, b;",
        &[32; 2],
        32,
        &rows,
        |r| if f(r[0]) > f(r[1]) { 0x3f80_0000 } else { 0 },
    );
    // Flushed, all subnormals are equal to zero.
    check("setp.eq.ftz.f32 p, a, b; selp.u32 d, 1, 0, p;", &[32; 2], 32, &rows, |r| {
        (flush(f(r[0])) == flush(f(r[1]))) as u64
    });
}

#[test]
fn approximations_are_rounded_correctly() {
    let mut rows = floats(1, 4000);
    rows.extend((0..2000).map(|i| vec![(i as f32 / 50.0 - 20.0).to_bits() as u64]));
    let functions: [(&str, fn(f64) -> f64); 8] = [
        ("rcp.approx.f32", |x| 1.0 / x),
        ("sqrt.approx.f32", f64::sqrt),
        ("rsqrt.approx.f32", |x| 1.0 / x.sqrt()),
        ("ex2.approx.f32", f64::exp2),
        ("lg2.approx.f32", f64::log2),
        ("tanh.approx.f32", f64::tanh),
        ("sin.approx.f32", f64::sin),
        ("cos.approx.f32", f64::cos),
    ];
    for (op, g) in functions {
        for (r, got) in rows.iter().zip(run("sm_80", &format!("{op} d, a;"), &[32], 32, &rows)) {
            let (exact, got) = (g(f(r[0]) as f64), f(got));
            let fine = if exact.is_nan() {
                got.to_bits() == NAN
            } else if exact.abs() > f32::MAX as f64 {
                got.is_infinite() || got.abs() == f32::MAX
            } else {
                // Half a unit in the last place, and the error of f64 functions.
                let ulp = (got.abs().next_up() - got.abs()) as f64;
                (got as f64 - exact).abs() <= ulp * 0.5000001
            };
            assert!(fine, "{op} of {:e} gave {got:e}, exactly {exact:e}", f(r[0]));
        }
    }
    check(
        "ex2.approx.ftz.f32 d, a;",
        &[32],
        32,
        &[vec![(-126f32).to_bits() as u64], vec![(-127f32).to_bits() as u64]],
        |r| {
            if f(r[0]) == -126.0 { f32::MIN_POSITIVE.to_bits() as u64 } else { 0 }
        },
    );
    check(
        "div.approx.f32 d, a, b;",
        &[32; 2],
        32,
        &[vec![0x3f80_0000, 0x7f00_0000], vec![0x4040_0000, 0x4000_0000]],
        |r| {
            // A divisor above 2^126 gives zero.
            if r[1] == 0x7f00_0000 { 0 } else { 1.5f32.to_bits() as u64 }
        },
    );
}

#[test]
fn doubles() {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        f64::MIN_POSITIVE,
        5e-324,
        f64::MAX,
    ];
    let mut rows: Vec<Vec<u64>> = Vec::new();
    for a in special {
        for b in special {
            rows.push(vec![a.to_bits(), b.to_bits(), 1.5f64.to_bits()]);
        }
    }
    let mut values = random(3000, 5);
    for _ in 0..1000 {
        rows.push(
            (0..3)
                .map(|_| {
                    values.next().unwrap() & !(0x7ff << 52) | (1000 + values.size_hint().0 as u64 % 40) << 52
                })
                .collect(),
        );
    }
    let d = f64::from_bits;
    let out = |v: f64| if v.is_nan() { 0x7fff_ffff_ffff_ffff } else { v.to_bits() };
    check("add.f64 d, a, b;", &[64; 3], 64, &rows, |r| out(d(r[0]) + d(r[1])));
    check("sub.f64 d, a, b;", &[64; 3], 64, &rows, |r| out(d(r[0]) - d(r[1])));
    check("mul.f64 d, a, b;", &[64; 3], 64, &rows, |r| out(d(r[0]) * d(r[1])));
    check("div.rn.f64 d, a, b;", &[64; 3], 64, &rows, |r| out(d(r[0]) / d(r[1])));
    check("fma.rn.f64 d, a, b, c;", &[64; 3], 64, &rows, |r| out(d(r[0]).mul_add(d(r[1]), d(r[2]))));
    check("sqrt.rn.f64 d, a;", &[64; 3], 64, &rows, |r| out(d(r[0]).sqrt()));
    check("rcp.rn.f64 d, a;", &[64; 3], 64, &rows, |r| out(1.0 / d(r[0])));
    check("setp.lt.f64 p, a, b; selp.b64 d, 1, 0, p;", &[64; 3], 64, &rows, |r| (d(r[0]) < d(r[1])) as u64);
    // Directed sums: the rounded value brackets the exact one, which `a - (s - b)` tells.
    for (mode, up) in [("rp", true), ("rm", false)] {
        let finite: Vec<Vec<u64>> = rows[100..].to_vec();
        let got = run("sm_80", &format!("add.{mode}.f64 d, a, b;"), &[64; 3], 64, &finite);
        for (r, g) in finite.iter().zip(got) {
            let (a, b, g) = (d(r[0]), d(r[1]), d(g));
            let nearest = a + b;
            let t = nearest - a;
            let error = (a - (nearest - t)) + (b - t);
            let wanted = match (up, error) {
                (true, e) if e > 0.0 => nearest.next_up(),
                (false, e) if e < 0.0 => nearest.next_down(),
                _ => nearest,
            };
            assert_eq!(g, wanted);
        }
    }
}
