//! `y += v lora_b^T` against f64.

mod products;

use half::{bf16, f16};
use lora_kernels::cuda::{AdapterTable, LowRank, lora_expand};
use lora_kernels::{DType, Element, Error, Result};
use lora_kernels_devices::Device;
use products::{Factors, Numbers, Problem, expand_shape, same};

/// The rows of v, as `lora_shrink` would leave them: zeros behind an adapter's rank.
fn make_v<T: Element, A: Element>(problem: &Problem<T, A>) -> Vec<f32> {
    let mut numbers = Numbers::new(17);
    let columns = problem.max_rank().next_multiple_of(4);
    let mut v = vec![0.0; problem.tokens * columns];
    for token in 0..problem.tokens {
        let adapter = problem.index.as_ref().map_or(0, |index| index[token]);
        let Some(adapter) = usize::try_from(adapter).ok().and_then(|a| problem.adapters.as_ref()?.get(a))
        else {
            continue;
        };
        v[token * columns..][..adapter.rank].fill_with(|| numbers.number());
    }
    v
}

fn expand<T: Element, A: Element>(
    device: &Device,
    problem: &Problem<T, A>,
    v: &[f32],
    y: &[T],
) -> Result<Vec<T>> {
    let factors = Factors::new(device, problem.adapters.as_ref().unwrap());
    let mut entries = device.alloc(AdapterTable::<A>::bytes(factors.count()));
    let table = factors.table(device, problem.k, problem.n, &mut entries)?;
    let index = problem.index.as_ref().map(|index| device.upload(index));
    let (v, mut y) = (device.upload(v), device.upload(y));
    let index = index.as_ref().map(|index| index.view());
    let branch = LowRank { adapters: &table, index, v: v.view() };
    let plan =
        lora_expand::plan(&expand_shape::<T, A>(problem.tokens, problem.n), device.queue().properties())?;
    plan.run(device.queue(), &branch, y.view_mut())?;
    Ok(y.download())
}

/// Products are exact, and v is in one part. A term goes through the additions of an instruction for each 16 ranks and each
/// pair of pieces of v (3) and lora_b (at most 3), in which it meets 16 others and the sum so far; a step of a tensor core may
/// cut off what it shifts out instead of rounding it, which counts twice. Then comes the one to y. Each is off by at most 2^-24 of the sum of magnitudes; the result is rounded to T.
fn check<T: Element, A: Element>(problem: &Problem<T, A>, v: &[f32], before: &[T], after: &[T]) {
    let (n, columns) = (problem.n, problem.max_rank().next_multiple_of(4));
    let u_t = if T::DTYPE == DType::F32 { 0.0 } else { T::DTYPE.unit_roundoff() };
    for (i, got) in after.iter().enumerate() {
        let (token, row) = (i / n, i % n);
        let adapter = problem.index.as_ref().map_or(0, |index| index[token]);
        let Ok(adapter) = usize::try_from(adapter) else {
            assert!(same(&[*got], &before[i..=i]), "y[{token}, {row}] has no adapter, and was changed");
            continue;
        };
        let adapter = &problem.adapters.as_ref().unwrap()[adapter];
        let b = &adapter.lora_b[row * adapter.rank..][..adapter.rank];
        let terms = b.iter().zip(&v[token * columns..]).map(|(b, &v)| b.to_f64() * f64::from(v));
        let start = (before[i].to_f64(), before[i].to_f64().abs());
        let (value, magnitude) = terms.fold(start, |(v, m), t| (v + t, m + t.abs()));
        let pieces = match (T::DTYPE, A::DTYPE) {
            (_, DType::F32) => 9,
            (DType::F16, _) => 6,
            _ => 3,
        };
        let steps = 2 * 17 * pieces * adapter.rank.div_ceil(16) + 1;
        let sum = 1.01 * steps as f64 * (-24f64).exp2() * magnitude;
        let bound = sum + u_t * (value.abs() + sum) + (-25f64).exp2() * f64::from(u8::from(u_t > 0.0));
        assert!(
            (got.to_f64() - value).abs() <= bound,
            "y[{token}, {row}] is {got:?}, wanted {value} +- {bound:e}"
        );
    }
}

const RANKS: [usize; 9] = [8, 0, 1, 3, 16, 17, 64, 256, 5];

#[test]
fn any_shape_and_any_mix_of_ranks() {
    fn all<T: Element, A: Element>(device: &Device) {
        for (tokens, n) in [(1, 1), (1, 4096), (2, 3), (7, 65), (8, 64), (9, 33), (33, 129), (133, 66)] {
            let mixed = Problem::<T, A>::dense(tokens, n, 4).with_adapters(&RANKS);
            let one = Problem { index: None, ..Problem::<T, A>::dense(tokens, n, 4).with_adapters(&[12]) };
            for problem in [mixed, one] {
                let (v, y) = (make_v(&problem), Numbers::new(5).many(tokens * n));
                check(&problem, &v, &y, &expand(device, &problem, &v, &y).unwrap());
            }
        }
    }
    let device = Device::best();
    all::<f32, f32>(&device);
    all::<f16, f16>(&device);
    all::<f16, f32>(&device);
    all::<bf16, bf16>(&device);
    all::<bf16, f32>(&device);
}

/// v comes in 1, 2, 4 or 8 parts, as `lora_shrink` leaves it; here they are whole numbers, so that any order gives their sum.
#[test]
fn parts_of_v_add_up() {
    let device = Device::best();
    let problem = Problem::<bf16>::dense(5, 70, 4).with_adapters(&[16, 7, 40]);
    let whole: Vec<f32> = make_v(&problem).iter().map(|v| (v * 8.0).round()).collect();
    let y = Numbers::new(7).many(5 * 70);
    let wanted = expand(&device, &problem, &whole, &y).unwrap();
    for parts in [2, 4, 8] {
        // Part i is i everywhere, and the first one what is left.
        let rest = (1..parts).sum::<usize>() as f32;
        let first = whole.iter().map(|v| v - rest);
        let v: Vec<f32> =
            first.chain((whole.len()..parts * whole.len()).map(|i| (i / whole.len()) as f32)).collect();
        let got = expand(&device, &problem, &v, &y).unwrap();
        assert!(same(&got, &wanted), "{parts} parts");
    }
}

/// Minus zero, infinities and NaN are kept where there is no adapter; a wrong number gives NaN.
#[test]
fn rows_without_an_adapter_keep_their_bits() {
    let mut problem = Problem::<f16>::dense(6, 40, 4).with_adapters(&[4, 9]);
    problem.index = Some(vec![-1, 0, 2, -1, -2, 1]);
    let v = make_v(&problem);
    let y: Vec<f16> = Numbers::new(6).many(6 * 40);
    let mut y = y;
    y[..4].copy_from_slice(&[f16::NEG_ZERO, f16::INFINITY, f16::from_bits(0x7c01), f16::from_bits(0x8001)]);
    let after = expand(&Device::best(), &problem, &v, &y).unwrap();
    for token in [0, 3] {
        assert!(same(&after[token * 40..][..40], &y[token * 40..][..40]));
    }
    for token in [2, 4] {
        assert!(after[token * 40..][..40].iter().all(|y| y.is_nan()));
    }
    for token in [1, 5] {
        assert!(after[token * 40..][..40].iter().all(|y| y.is_finite()));
    }
}

#[test]
fn a_token_depends_on_itself_alone() {
    let problem = Problem::<bf16>::dense(11, 70, 4).with_adapters(&[4, 32]);
    let (v, y) = (make_v(&problem), Numbers::new(8).many(11 * 70));
    let device = Device::best();
    let after = expand(&device, &problem, &v, &y).unwrap();
    for token in 0..11 {
        let mut alone = problem.clone();
        alone.tokens = 1;
        alone.index = Some(vec![problem.index.as_ref().unwrap()[token]]);
        let row = token * 70..(token + 1) * 70;
        let got = expand(&device, &alone, &v[token * 32..(token + 1) * 32], &y[row.clone()]).unwrap();
        assert!(same(&got, &after[row]));
    }
}

#[test]
fn nothing_to_do() {
    for (tokens, n) in [(0, 8), (8, 0)] {
        let problem = Problem::<f32>::dense(tokens, n, 4).with_adapters(&[4]);
        assert!(expand(&Device::best(), &problem, &make_v(&problem), &[]).unwrap().is_empty());
    }
    let problem = Problem::<f32>::dense(3, 8, 4).with_adapters(&[0]);
    let y: Vec<f32> = Numbers::new(8).many(24);
    assert!(same(&expand(&Device::best(), &problem, &[], &y).unwrap(), &y));
}

/// 32 tokens with an adapter each: every lora_b is read once, in whole sectors.
#[test]
fn it_reads_every_adapter_once() {
    let mut problem = Problem::<bf16>::dense(32, 512, 4).with_adapters(&[16; 32]);
    problem.index = Some((0..32).collect());
    let (v, y) = (make_v(&problem), Numbers::new(8).many(32 * 512));
    let device = Device::emulator();
    check(&problem, &v, &y, &expand(&device, &problem, &v, &y).unwrap());
    let counters = device.counters().unwrap();
    let (b, y, v) = (32 * 512 * 16 * 2, 32 * 512 * 2, 32 * 16 * 4);
    let distinct = 32 * counters.global_loads.distinct_sectors;
    assert!((b + y + v..(b + y + v) * 101 / 100).contains(&distinct), "{counters}");
    assert!(counters.global_loads.sector_ratio() < 1.01, "{counters}");
    assert_eq!(counters.global_stores.sector_ratio(), 1.0);
    assert_eq!(counters.local_accesses, 0);
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let problem = Problem::<f16>::dense(3, 8, 4).with_adapters(&[4]);
    let (v, y) = (make_v(&problem), vec![f16::ONE; 24]);
    let refused = |result: Result<Vec<f16>>, argument: &str| match result {
        Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
        other => panic!("{argument}: {other:?}"),
    };
    refused(expand(&device, &problem, &v[1..], &y), "v");
    refused(expand(&device, &problem, &v, &y[1..]), "y");
    let short = Problem { index: Some(vec![0; 2]), ..problem.clone() };
    refused(expand(&device, &short, &v, &y), "adapter_index");
    let none = Problem { index: None, adapters: Some(Vec::new()), ..problem.clone() };
    refused(expand(&device, &none, &[], &y), "adapters");
    let shape = |n| lora_expand::Shape { tokens: 1, n, dtype: DType::F32, adapter_dtype: DType::BF16 };
    let plan = lora_expand::plan(&shape(1), device.queue().properties());
    assert!(matches!(plan, Err(Error::Argument { argument, .. }) if argument == "adapters.dtype"));
    let plan = lora_expand::plan(&shape(1 << 31), device.queue().properties());
    assert!(matches!(plan, Err(Error::Argument { argument, .. }) if argument == "n"));
}
