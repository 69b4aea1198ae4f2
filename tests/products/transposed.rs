//! Products with the transposed weight: what `Problem` has with dY in the place of x.

use lora_kernels::cuda::matmul::Rounding;
use lora_kernels::cuda::{AdapterTable, LowRank, matmul_transposed};
use lora_kernels::nf4::{Codebook, Nesting};
use lora_kernels::{DType, Element, cpu};
use lora_kernels_devices::{Counters, Device};

use super::{Adapter, DeviceWeight, Factors, Numbers, Problem, same, widen};

/// What came of it.
pub struct Outcome<T> {
    pub plan: matmul_transposed::Plan,
    pub dx: Vec<T>,
    pub counters: Option<Counters>,
}

/// A product whose `x` `[tokens, n]` is dY. The weight and the adapters are those of the forward product.
pub fn with_dy<T: Element, A: Element>(mut problem: Problem<T, A>) -> Problem<T, A> {
    problem.x = Numbers::new(77).many(problem.tokens * problem.n);
    problem
}

/// u of each token, in f64 and rounded to f32: what `lora_shrink_transposed` would give, but for its rounding.
pub fn u<T: Element, A: Element>(problem: &Problem<T, A>, dropout: Option<cpu::Dropout>) -> Vec<f32> {
    let columns = problem.max_rank().next_multiple_of(4);
    let mut u = vec![0.0; problem.tokens * columns];
    let scale = f64::from(dropout.map_or(1.0, |dropout| dropout.scale()));
    for token in 0..problem.tokens {
        let index = problem.index.as_ref().map_or(0, |index| index[token]);
        let Some(adapter) =
            usize::try_from(index).ok().and_then(|i| problem.adapters.as_ref().unwrap().get(i))
        else {
            continue;
        };
        for r in 0..adapter.rank {
            let terms = (0..problem.n).map(|n| {
                problem.x[token * problem.n + n].to_f64() * adapter.lora_b[n * adapter.rank + r].to_f64()
            });
            u[token * columns + r] = (scale * f64::from(adapter.scaling) * terms.sum::<f64>()) as f32;
        }
    }
    u
}

pub fn plan<T: Element, A: Element>(problem: &Problem<T, A>, device: &Device) -> matmul_transposed::Plan {
    matmul_transposed::plan(&problem.shape(), device.queue().properties()).unwrap()
}

pub fn run<T: Element, A: Element>(problem: &Problem<T, A>, device: &Device) -> Outcome<T> {
    run_with(problem, device, None)
}

pub fn run_with<T: Element, A: Element>(
    problem: &Problem<T, A>,
    device: &Device,
    dropout: Option<cpu::Dropout>,
) -> Outcome<T> {
    let (mut plan, queue) = (plan(problem, device), device.queue());
    if let Some(dropout) = dropout {
        plan = plan.with_dropout(dropout);
    }
    let (dy, weight) = (device.upload(&problem.x), DeviceWeight::new(device, &problem.weight));
    let index = problem.index.as_ref().map(|index| device.upload(index));
    let factors = Factors::new(device, problem.adapters.as_deref().unwrap_or(&[]));
    let mut entries = device.alloc(AdapterTable::<A>::bytes(factors.count()));
    let table = factors.table(device, problem.k, problem.n, &mut entries).unwrap();
    let v = device.upload(&if problem.adapters.is_some() { u(problem, dropout) } else { Vec::new() });
    let branch = problem.adapters.is_some().then(|| LowRank {
        adapters: &table,
        index: index.as_ref().map(|index| index.view()),
        v: v.view(),
    });
    let mut dx = device.alloc(problem.tokens * problem.k);
    let mut workspace = device.alloc(plan.workspace_bytes);
    let workspace = workspace.view_mut();
    plan.run(queue, dy.view(), &weight.view(), branch.as_ref(), dx.view_mut(), workspace).unwrap();
    Outcome { plan, dx: dx.download(), counters: device.counters() }
}

/// How far dX may be from the truth: as `Problem::bound` has it for the forward product, with n in the place of k. u is given
/// rounded to f32 here, which counts once more.
fn bound<T: Element, A: Element>(
    problem: &Problem<T, A>,
    plan: &matmul_transposed::Plan,
    truth: &cpu::Truth,
) -> f64 {
    let (u, u_t) = ((-24f64).exp2(), if T::DTYPE.size() == 4 { 0.0 } else { T::DTYPE.unit_roundoff() });
    let branch = match problem.max_rank() {
        0 => 0,
        rank => 17 * 9 * rank.div_ceil(16) + rank.div_ceil(32),
    };
    let steps = (problem.n + branch + 4) as f64;
    let mut share = 2.0 * steps * u * (1.0 + u).powf(2.0 * steps);
    if plan.kernel.is_some_and(|kernel| kernel.module == "prefill_transposed") && problem.adapters.is_some() {
        share += 4.0 * (-16f64).exp2();
    }
    let sum = share * truth.magnitude;
    let smallest = if T::DTYPE == DType::F16 { (-25f64).exp2() } else { (-134f64).exp2() };
    sum + u_t * (truth.value.abs() + sum) + smallest
}

/// dX in f64, over the weight as a plan rounds it.
pub fn truth<T: Element, A: Element>(
    problem: &Problem<T, A>,
    rounding: Rounding,
    dropout: Option<cpu::Dropout>,
) -> Vec<cpu::Truth> {
    let weight = problem.weight_values(rounding);
    let adapters: Vec<_> = problem.adapters.iter().flatten().map(Adapter::as_cpu).collect();
    let extras =
        cpu::TransposedExtras { adapters: &adapters, adapter_index: problem.index.as_deref(), dropout };
    let weight = cpu::Weight::Dense { data: &weight, n: problem.n, k: problem.k };
    cpu::truth_transposed(&widen(&problem.x), problem.tokens, &weight, &extras).unwrap()
}

/// Runs it and compares every element with the truth.
pub fn check<T: Element, A: Element>(problem: &Problem<T, A>, device: &Device) -> Outcome<T> {
    check_with(problem, device, None)
}

pub fn check_with<T: Element, A: Element>(
    problem: &Problem<T, A>,
    device: &Device,
    dropout: Option<cpu::Dropout>,
) -> Outcome<T> {
    let outcome = run_with(problem, device, dropout);
    compare(problem, &outcome, dropout);
    outcome
}

/// Compares every element with the truth.
pub fn compare<T: Element, A: Element>(
    problem: &Problem<T, A>,
    outcome: &Outcome<T>,
    dropout: Option<cpu::Dropout>,
) {
    for (i, (dx, truth)) in outcome.dx.iter().zip(truth(problem, outcome.plan.rounding, dropout)).enumerate()
    {
        let (error, bound) = ((dx.to_f64() - truth.value).abs(), bound(problem, &outcome.plan, &truth));
        assert!(
            error <= bound,
            "{:?}: dx[{}, {}] is {dx:?}, wanted {} +- {bound:e}",
            outcome.plan,
            i / problem.k,
            i % problem.k,
            truth.value
        );
    }
}

/// With dY the identity, a sum has one term that is not zero: dX is the weight, as it is multiplied, to the bit.
pub fn check_identity<T: Element>(
    device: &Device,
    [n, k]: [usize; 2],
    blocksize: usize,
    nesting: Nesting,
) -> matmul_transposed::Plan {
    let mut problem = Problem::<T>::dense(n, n, k).in_4_bits(blocksize, &Codebook::nf4(), nesting);
    problem.x = (0..n * n).map(|i| T::from_f32(f32::from(u8::from(i / n == i % n)))).collect();
    let Outcome { plan, dx, .. } = run(&problem, device);
    let weight: Vec<T> = problem.weight_values(plan.rounding).into_iter().map(T::from_f32).collect();
    assert!(same(&dx, &weight), "{plan:?}");
    plan
}

/// The same bits twice, and for a token the same bits whatever the others are: not numbers, other adapters, or not there. Sizes are
/// tokens, n and k.
pub fn check_tokens_apart<T: Element>(device: &Device, sizes: &[[usize; 3]]) {
    for &[tokens, n, k] in sizes {
        let problem = with_dy(Problem::<T>::nf4(tokens, n, k, 64).with_adapters(&[4, 9]));
        let outcome = run(&problem, device);
        let plan = outcome.plan;
        assert!(same(&outcome.dx, &run(&problem, device).dx), "{plan:?}: another run, other bits");
        for kept in [0, tokens / 2, tokens - 1] {
            let mut other = problem.clone();
            let mut numbers = Numbers::new(9);
            for token in (0..tokens).filter(|&token| token != kept) {
                other.index.as_mut().unwrap()[token] = numbers.below(4) as i32 - 1;
                for x in &mut other.x[token * n..(token + 1) * n] {
                    *x = T::from_f32([f32::NAN, f32::INFINITY, 1e30, 0.0][numbers.below(4)]);
                }
            }
            let dx = run(&other, device).dx;
            let row = kept * k..(kept + 1) * k;
            assert!(same(&outcome.dx[row.clone()], &dx[row]), "{plan:?}: token {kept}");
        }
    }
}
