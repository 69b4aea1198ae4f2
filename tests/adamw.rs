//! AdamW on the CPU: against f64 and torch, in f32 and 8-bit moments; the norm of gradients; arguments that do not fit.

mod fixtures;

use fixtures::Fixture;
use half::bf16;
use lora_kernels::cpu::{self, AdamW, AdamWStep, MOMENT_BLOCKSIZE, MomentsMut};
use lora_kernels::nf4::{DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP};
use lora_kernels::{DType, Error};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const U: f64 = DType::F32.unit_roundoff();

/// What a step gives in f64, and how far f32 may be from it.
struct Truth {
    m: (f64, f64),
    v: (f64, f64),
    p: (f64, f64),
}

/// `m` has five roundings (of each factor, of each product, of the sum), `v` six at most. The quotient inherits that of `m` and
/// half of that of `v`; on the way there are a root, two quotients, `correction`, `epsilon` and its sum; then `step_size` and
/// its product, `decay` and its product, and the difference. `units` is u, or a little more for higher orders.
fn truth(adamw: &AdamW, lr: f64, step: i32, p: f64, g: f64, m: f64, v: f64) -> Truth {
    let u = U * 1.0001;
    let (m_new, m_size) = {
        let (kept, new) = (adamw.beta1 * m, (1.0 - adamw.beta1) * g);
        (kept + new, kept.abs() + new.abs())
    };
    let v_new = adamw.beta2 * v + (1.0 - adamw.beta2) * g * g;
    let d = (v_new / (1.0 - adamw.beta2.powi(step))).sqrt() + adamw.epsilon;
    let step_size = lr / (1.0 - adamw.beta1.powi(step));
    let (kept, moved) = ((1.0 - lr * adamw.weight_decay) * p, step_size * m_new / d);
    let m_error = 5.0 * u * m_size;
    let p_error = 3.0 * u * kept.abs() + step_size * m_error / d + 13.0 * u * moved.abs();
    // Below the normal numbers a rounding is not relative.
    let tiny = 2f64.powi(-140);
    Truth {
        m: (m_new, m_error + tiny),
        v: (v_new, 6.0 * u * v_new + tiny),
        p: (kept - moved, p_error + tiny),
    }
}

fn close(what: &str, got: f32, (truth, bound): (f64, f64)) {
    let off = (f64::from(got) - truth).abs();
    assert!(off <= bound, "{what}: {got:e}, not {truth:e}: off by {off:e} of {bound:e}");
}

/// torch's own steps, in f32 and in f64, lie where ours lie.
#[test]
fn as_torch() {
    for name in ["lora_a", "lora_b"] {
        let file = Fixture::open(&format!("train_step/{name}"));
        let number = |key: &str| file.json["adamw"][key].as_f64().unwrap();
        let adamw = AdamW {
            beta1: number("b1"),
            beta2: number("b2"),
            epsilon: number("eps"),
            weight_decay: number("wd"),
        };
        for (step, factor) in [(1, "A"), (1, "B"), (5, "A"), (5, "B")] {
            let start = file.get::<f32>(&format!("lora_{factor}"));
            let gradient = file.get::<f32>(&format!("f32.d{factor}"));
            let moment = |name: &str| match step {
                1 => vec![0.0; start.len()],
                _ => file.get::<f32>(&format!("adamw.step5.{name}0_{factor}")),
            };
            let (m0, v0) = (moment("m"), moment("v"));
            let (mut p, mut m, mut v) = (start.clone(), m0.clone(), v0.clone());
            let factors = adamw.step(number("lr"), step).unwrap();
            let moments = MomentsMut::F32 { m: &mut m, v: &mut v };
            cpu::adamw(&factors, 1.0, &mut p, &gradient, moments).unwrap();

            let theirs = |part: &str| file.get::<f32>(&format!("adamw.f32.step{step}.{part}{factor}"));
            let f64s = |part: &str| file.get::<f64>(&format!("adamw.f64.step{step}.{part}{factor}"));
            let (their_p, their_m, their_v) = (theirs(""), theirs("m_"), theirs("v_"));
            let (p64, m64, v64, g64) =
                (f64s(""), f64s("m_"), f64s("v_"), file.get::<f64>(&format!("f64.d{factor}")));
            let element = |i: usize, g: f64| {
                let [p, m, v] = [start[i], m0[i], v0[i]].map(f64::from);
                truth(&adamw, number("lr"), step as i32, p, g, m, v)
            };
            for i in 0..start.len() {
                let truth = element(i, gradient[i].into());
                for (whose, p, m, v) in
                    [("ours", p[i], m[i], v[i]), ("torch", their_p[i], their_m[i], their_v[i])]
                {
                    close(&format!("{whose} m"), m, truth.m);
                    close(&format!("{whose} v"), v, truth.v);
                    close(&format!("{whose} p"), p, truth.p);
                }
                // The formula itself: f64 has 2^29 times the precision.
                let exact = element(i, g64[i]);
                let same =
                    |got: f64, (truth, bound): (f64, f64)| (got - truth).abs() <= bound * 2f64.powi(-26);
                assert!(
                    same(m64[i], exact.m) && same(v64[i], exact.v) && same(p64[i], exact.p),
                    "{factor} {i}"
                );
            }
        }
    }
}

fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0f32..1.0) * 10f32.powi(rng.random_range(-6..1))).collect()
}

/// Many steps stay near f64, the gradient's scale is a scale of the gradient, and parameters in bf16 are rounded at the end.
#[test]
fn steps() {
    let (adamw, count) = (AdamW { weight_decay: 0.1, ..AdamW::default() }, 1000);
    let (mut p, mut m, mut v) = (values(count, 1), vec![0.0; count], vec![0.0; count]);
    for step in 1..=20 {
        let gradient = values(count, 100 + step);
        let factors = adamw.step(1e-2, step).unwrap();
        let before = (p.clone(), m.clone(), v.clone());
        cpu::adamw(&factors, 0.5, &mut p, &gradient, MomentsMut::F32 { m: &mut m, v: &mut v }).unwrap();
        for i in 0..count {
            let g = f64::from(0.5 * gradient[i]);
            let [p0, m0, v0] = [before.0[i], before.1[i], before.2[i]].map(f64::from);
            let truth = truth(&adamw, 1e-2, step as i32, p0, g, m0, v0);
            close("p", p[i], truth.p);
            close("m", m[i], truth.m);
            close("v", v[i], truth.v);
        }

        let halved: Vec<f32> = gradient.iter().map(|g| 0.5 * g).collect();
        let (mut same, mut m2, mut v2) = before.clone();
        cpu::adamw(&factors, 1.0, &mut same, &halved, MomentsMut::F32 { m: &mut m2, v: &mut v2 }).unwrap();
        assert_eq!((&same, &m2, &v2), (&p, &m, &v));

        let mut narrow: Vec<bf16> = before.0.iter().map(|&p| bf16::from_f32(p)).collect();
        let mut wide: Vec<f32> = narrow.iter().map(|p| p.to_f32()).collect();
        let (_, mut m2, mut v2) = before.clone();
        cpu::adamw(&factors, 1.0, &mut narrow, &halved, MomentsMut::F32 { m: &mut m2, v: &mut v2 }).unwrap();
        let (_, mut m2, mut v2) = before;
        cpu::adamw(&factors, 1.0, &mut wide, &halved, MomentsMut::F32 { m: &mut m2, v: &mut v2 }).unwrap();
        assert!(narrow.iter().zip(wide).all(|(narrow, wide)| *narrow == bf16::from_f32(wide)));
    }
}

/// 8-bit moments of one tensor.
struct Codes {
    m: Vec<u8>,
    m_absmax: Vec<f32>,
    v: Vec<u8>,
    v_absmax: Vec<f32>,
}

impl Codes {
    fn zeros(count: usize) -> Self {
        let blocks = count.div_ceil(MOMENT_BLOCKSIZE);
        Self {
            m: vec![127; count],
            m_absmax: vec![0.0; blocks],
            v: vec![0; count],
            v_absmax: vec![0.0; blocks],
        }
    }

    fn moments(&mut self) -> MomentsMut<'_> {
        let Self { m, m_absmax, v, v_absmax } = self;
        MomentsMut::Blockwise { m, m_absmax, v, v_absmax }
    }

    fn decoded(&self) -> (Vec<f32>, Vec<f32>) {
        let decode = |map: &[f32; 256], codes: &[u8], absmax: &[f32]| -> Vec<f32> {
            codes
                .iter()
                .enumerate()
                .map(|(i, &code)| map[usize::from(code)] * absmax[i / MOMENT_BLOCKSIZE])
                .collect()
        };
        (
            decode(&DYNAMIC_MAP, &self.m, &self.m_absmax),
            decode(&UNSIGNED_DYNAMIC_MAP, &self.v, &self.v_absmax),
        )
    }
}

/// A step with 8-bit moments is the step from what they decode to, and then each moment is at the code nearest to it.
#[test]
fn eight_bits() {
    assert!(
        UNSIGNED_DYNAMIC_MAP.is_sorted()
            && UNSIGNED_DYNAMIC_MAP[0] == 0.0
            && UNSIGNED_DYNAMIC_MAP[255] == 1.0
    );
    for count in [1, 255, 256, 257, 1000] {
        let (mut p, mut codes) = (values(count, 3), Codes::zeros(count));
        for step in 1..=8 {
            let mut gradient = values(count, 50 + step);
            if count == 1000 {
                gradient[256..512].fill(0.0); // a block that stays zero
            }
            let factors = AdamW::default().step(1e-2, step).unwrap();
            let (mut m, mut v) = codes.decoded();
            let mut wide = p.clone();
            cpu::adamw(&factors, 1.0, &mut wide, &gradient, MomentsMut::F32 { m: &mut m, v: &mut v })
                .unwrap();
            cpu::adamw(&factors, 1.0, &mut p, &gradient, codes.moments()).unwrap();
            assert_eq!(p, wide);
            nearest(&DYNAMIC_MAP, &m, &codes.m, &codes.m_absmax);
            nearest(&UNSIGNED_DYNAMIC_MAP, &v, &codes.v, &codes.v_absmax);
        }
        if count == 1000 {
            assert!(codes.m[256..512].iter().all(|c| *c == 127) && codes.v[256..512].iter().all(|c| *c == 0));
            assert_eq!((codes.m_absmax[1], codes.v_absmax[1]), (0.0, 0.0));
        }
    }
}

fn nearest(map: &[f32; 256], values: &[f32], codes: &[u8], absmax: &[f32]) {
    for (block, (values, codes)) in values.chunks(256).zip(codes.chunks(256)).enumerate() {
        let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        assert_eq!(absmax[block], largest);
        for (value, code) in values.iter().zip(codes) {
            let distance =
                |code: u8| (f64::from(map[usize::from(code)]) * f64::from(largest) - f64::from(*value)).abs();
            let best = (0..=255).map(distance).fold(f64::INFINITY, f64::min);
            // The quotient by absmax has two roundings, the middle of two codes two more.
            assert!(distance(*code) <= best + 8.0 * U * f64::from(largest), "{value} {code}");
        }
    }
}

/// Steps of bitsandbytes' AdamW8bit (`tests/peers/adamw8.py`), each from where it started: parameters, scales and codes of both
/// lie where the formula says.
#[test]
fn as_bitsandbytes() {
    let file = Fixture::open("../peers/adamw8");
    assert_eq!((file.get("map.m"), file.get("map.v")), (DYNAMIC_MAP.to_vec(), UNSIGNED_DYNAMIC_MAP.to_vec()));
    let (adamw, lr) = (AdamW { beta2: 0.99, weight_decay: 0.05, ..AdamW::default() }, 2e-3);
    for step in 1..=6 {
        let f32s = |name: &str| file.get::<f32>(&format!("{step}.{name}"));
        let u8s = |name: &str| file.get::<u8>(&format!("{step}.{name}"));
        let stored = |when: &str| Codes {
            m: u8s(&format!("{when}.m")),
            m_absmax: f32s(&format!("{when}.m_absmax")),
            v: u8s(&format!("{when}.v")),
            v_absmax: f32s(&format!("{when}.v_absmax")),
        };
        let (start, gradient, their_p, theirs) =
            (f32s("before.p"), f32s("gradient"), f32s("after.p"), stored("after"));
        let mut ours = if step == 1 { Codes::zeros(start.len()) } else { stored("before") };
        let (m, v) = ours.decoded();
        let mut p = start.clone();
        let factors = adamw.step(lr, step).unwrap();
        cpu::adamw(&factors, 1.0, &mut p, &gradient, ours.moments()).unwrap();

        let truths: Vec<Truth> = (0..p.len())
            .map(|i| {
                let [p, g, m, v] = [start[i], gradient[i], m[i], v[i]].map(f64::from);
                truth(&adamw, lr, step as i32, p, g, m, v)
            })
            .collect();
        for (i, truth) in truths.iter().enumerate() {
            close("our p", p[i], truth.p);
            close("their p", their_p[i], truth.p);
        }
        let [m, v]: [Vec<(f64, f64)>; 2] =
            [truths.iter().map(|t| t.m).collect(), truths.iter().map(|t| t.v).collect()];
        for codes in [&ours, &theirs] {
            nearest_to_truth(&DYNAMIC_MAP, &m, &codes.m, &codes.m_absmax);
            nearest_to_truth(&UNSIGNED_DYNAMIC_MAP, &v, &codes.v, &codes.v_absmax);
        }
    }
}

/// As [`nearest`], for moments that are known to within an error: that moves the value, and what is nearest to it, too.
fn nearest_to_truth(map: &[f32; 256], truths: &[(f64, f64)], codes: &[u8], absmax: &[f32]) {
    for (block, (truths, codes)) in truths.chunks(256).zip(codes.chunks(256)).enumerate() {
        let largest = truths.iter().fold(0f64, |largest, t| largest.max(t.0.abs()));
        let error = truths.iter().fold(0f64, |largest, t| largest.max(t.1));
        let scale = f64::from(absmax[block]);
        assert!((scale - largest).abs() <= error, "block {block}: {scale:e} {largest:e}");
        for ((value, error), code) in truths.iter().zip(codes) {
            let distance = |code: u8| (f64::from(map[usize::from(code)]) * scale - value).abs();
            let best = (0..=255).map(distance).fold(f64::INFINITY, f64::min);
            assert!(
                distance(*code) <= best + 2.0 * error + 8.0 * U * scale,
                "block {block}: {value:e} {code}"
            );
        }
    }
}

/// A moment that is not finite makes its block so, and no other.
#[test]
fn not_finite() {
    let (mut p, mut codes, mut gradient) = (values(600, 3), Codes::zeros(600), values(600, 4));
    gradient[300] = f32::NAN;
    let factors = AdamW::default().step(1e-2, 1).unwrap();
    cpu::adamw(&factors, 1.0, &mut p, &gradient, codes.moments()).unwrap();
    let (m, v) = codes.decoded();
    for i in 0..600 {
        assert_eq!(m[i].is_nan() && v[i].is_nan(), (256..512).contains(&i), "{i}");
        assert_eq!(p[i].is_nan(), i == 300, "{i}");
    }
}

/// The norm is that of all elements, and clips as torch clips.
#[test]
fn norm() {
    let tensors: Vec<Vec<f32>> = [0, 1, 1000, 77].map(|count| values(count, count as u64)).into();
    let views: Vec<&[f32]> = tensors.iter().map(Vec::as_slice).collect();
    let norm = cpu::gradient_norm(&views);
    let square: f64 = tensors.iter().flatten().map(|g| f64::from(*g).powi(2)).sum();
    assert!((f64::from(norm.norm) - square.sqrt()).abs() <= 1.0001 * U * square.sqrt());
    assert_eq!((norm.squares.len(), norm.squares[0], norm.not_finite()), (4, 0.0, None));
    assert_eq!(norm.clip(1e9), 1.0);
    assert_eq!(norm.clip(0.5), 0.5 / (norm.norm + 1e-6));
    let huge = cpu::gradient_norm(&[&[3e38, 0.0], &[f32::MAX, f32::INFINITY], &[f32::NAN]]);
    assert_eq!(huge.not_finite(), Some(1));
    assert_eq!(cpu::gradient_norm(&[&[3e38]]).not_finite(), None);
    assert_eq!(cpu::gradient_norm(&[]).norm, 0.0);
}

#[test]
fn bad_arguments() {
    fn refused<R: std::fmt::Debug>(argument: &str, result: Result<R, Error>) {
        let Err(Error::Argument { argument: got, .. }) = result else { panic!("{argument}: {result:?}") };
        assert_eq!(got, argument);
    }
    let adamw = AdamW::default();
    refused("beta1", AdamW { beta1: 1.0, ..adamw }.step(1e-3, 1));
    refused("beta2", AdamW { beta2: f64::NAN, ..adamw }.step(1e-3, 1));
    refused("epsilon", AdamW { epsilon: 0.0, ..adamw }.step(1e-3, 1));
    refused("weight_decay", AdamW { weight_decay: f64::INFINITY, ..adamw }.step(1e-3, 1));
    refused("learning_rate", adamw.step(f64::NAN, 1));
    refused("step", adamw.step(1e-3, 0));
    assert!(adamw.step(1e-3, u64::MAX).is_ok());

    let factors: AdamWStep = adamw.step(1e-3, 1).unwrap();
    let mut p = [1.0f32; 300];
    let (mut m, mut v) = ([0.5f32; 300], [0.5f32; 300]);
    let g = [1.0; 300];
    let mut f32s = |g: &[f32], m_len: usize, v_len: usize| {
        cpu::adamw(&factors, 1.0, &mut p, g, MomentsMut::F32 { m: &mut m[..m_len], v: &mut v[..v_len] })
    };
    refused("gradient", f32s(&g[1..], 300, 300));
    refused("moments.m", f32s(&g, 299, 300));
    refused("moments.v", f32s(&g, 300, 299));
    type Cut = fn(&mut Codes);
    let cut: [(&str, Cut); 4] = [
        ("moments.m", |codes| codes.m.truncate(299)),
        ("moments.m_absmax", |codes| codes.m_absmax.truncate(1)),
        ("moments.v", |codes| codes.v.truncate(299)),
        ("moments.v_absmax", |codes| codes.v_absmax.push(0.0)),
    ];
    for (argument, cut) in cut {
        let mut codes = Codes::zeros(300);
        cut(&mut codes);
        refused(argument, cpu::adamw(&factors, 1.0, &mut p, &g, codes.moments()));
    }
    assert_eq!((p, m, v), ([1.0; 300], [0.5; 300], [0.5; 300]));
}
