//! Products of a mixture of experts with a stack of weights, against f64.

mod products;

use half::{bf16, f16};
use lora_kernels::cuda::expert_matmul::{self, Plan, Shape};
use lora_kernels::cuda::matmul::{Extras, Rounding, WeightFormat};
use lora_kernels::cuda::{AdapterTable, LowRank, expert_groups, lora_shrink};
use lora_kernels::nf4::{Codebook, Nesting};
use lora_kernels::{DType, Element, Error, cpu};
use lora_kernels_devices::{Counters, Device};
use products::{Adapter, DeviceWeight, Factors, Numbers, Problem, Weight, same, widen};

/// A layer: its weights as one product of `experts * n` outputs, its rows as one of `tokens * choices`.
#[derive(Clone)]
struct Mixture<T, A = T> {
    choices: usize,
    experts: usize,
    /// x, the stack, bias and scale.
    stack: Problem<T, A>,
    /// Adapters and their index.
    rows: Problem<T, A>,
    expert: Vec<i32>,
}

struct Outcome<T> {
    plan: Plan,
    y: Vec<T>,
    counters: Option<Counters>,
}

impl<T: Element, A: Element> Mixture<T, A> {
    /// Tokens that choose any of the experts, or now and then none.
    fn dense([tokens, choices, experts]: [usize; 3], n: usize, k: usize) -> Self {
        let mut numbers = Numbers::new((tokens + 31 * experts + 97 * n) as u64);
        let expert = (0..tokens * choices).map(|_| numbers.below(experts * 5 + 1) as i32 / 5);
        let expert = expert.map(|e| if e == experts as i32 { -1 } else { e }).collect();
        let rows = Problem::dense(tokens * choices, n, 0);
        Self {
            choices,
            experts,
            stack: Problem::dense(tokens, experts * n, k),
            rows: Problem { k, ..rows },
            expert,
        }
    }

    fn nf4(sizes: [usize; 3], n: usize, k: usize, blocksize: usize) -> Self {
        let mixture = Self::dense(sizes, n, k);
        let stack = mixture.stack.in_4_bits(blocksize, &Codebook::nf4(), Nesting::Plain);
        Self { stack, ..mixture }
    }

    fn with_bias_and_scale(self) -> Self {
        Self { stack: self.stack.with_bias_and_scale(), ..self }
    }

    fn with_adapters(self, ranks: &[usize]) -> Self {
        Self { rows: self.rows.with_adapters(ranks), ..self }
    }

    fn plan(&self, device: &Device) -> Plan {
        let shape = Shape {
            tokens: self.stack.tokens,
            choices: self.choices,
            experts: self.experts,
            n: self.rows.n,
            k: self.stack.k,
            dtype: T::DTYPE,
            weight: self.stack.shape().weight,
        };
        expert_matmul::plan(&shape, device.queue().properties()).unwrap()
    }

    fn run(&self, device: &Device) -> Outcome<T> {
        let (plan, queue, properties) = (self.plan(device), device.queue(), device.queue().properties());
        let Problem { n, k, .. } = self.rows;
        let (x, expert) = (device.upload(&self.stack.x), device.upload(&self.expert));
        let weight = DeviceWeight::new(device, &self.stack.weight);
        let bias = self.stack.bias.as_ref().map(|bias| device.upload(bias));
        let row_scale = self.stack.row_scale.as_ref().map(|scale| device.upload(scale));
        let sort = expert_groups::plan(&plan.groups_shape(), properties).unwrap();
        let mut groups = device.alloc(sort.len());
        let groups = sort.run(queue, expert.view(), groups.view_mut()).unwrap();

        let index = self.rows.index.as_ref().map(|index| device.upload(index));
        let factors = Factors::new(device, self.rows.adapters.as_deref().unwrap_or(&[]));
        let mut entries = device.alloc(AdapterTable::<A>::bytes(factors.count()));
        let table = self.rows.adapters.as_ref().map(|_| factors.table(device, k, n, &mut entries).unwrap());
        let index = index.as_ref().map(|index| index.view());
        let mut v = device.alloc(0);
        if let Some(table) = &table {
            let shrink = lora_shrink::plan(&table.shrink_shape(plan.rows, T::DTYPE), properties).unwrap();
            let shrink = shrink.with_choices(self.choices).unwrap();
            v = device.alloc(shrink.v_len());
            shrink.run(queue, x.view(), table, index, v.view_mut()).unwrap();
        }
        let extras = Extras {
            bias: bias.as_ref().map(|bias| bias.view()),
            row_scale: row_scale.as_ref().map(|scale| scale.view()),
            low_rank: table.as_ref().map(|adapters| LowRank { adapters, index, v: v.view() }),
            overlap: false,
        };
        let mut y = device.alloc(plan.rows * n);
        plan.run::<T, A>(queue, x.view(), &weight.view(), &groups, &extras, y.view_mut()).unwrap();
        Outcome { plan, y: y.download(), counters: device.counters() }
    }

    /// Checks every row against f64 over its own expert's weight.
    fn check(&self, outcome: &Outcome<T>) {
        let Problem { n, k, .. } = self.rows;
        let stack = self.stack.weight_values(outcome.plan.rounding);
        let (x, bias) = (widen(&self.stack.x), self.stack.bias.as_ref().map(|bias| widen(bias)));
        let adapters: Vec<_> = self.rows.adapters.iter().flatten().map(Adapter::as_cpu).collect();
        for (i, (&expert, y)) in self.expert.iter().zip(outcome.y.chunks(n.max(1))).enumerate() {
            let Ok(expert) = usize::try_from(expert) else {
                assert!(y.iter().all(|y| y.to_f32().to_bits() == 0), "row {i} has no expert");
                continue;
            };
            let part = expert * n..(expert + 1) * n;
            let extras = cpu::MatmulExtras {
                bias: bias.as_ref().map(|bias| &bias[part.clone()]),
                row_scale: self.stack.row_scale.as_ref().map(|scale| &scale[part]),
                adapters: &adapters,
                adapter_index: self.rows.index.as_ref().map(|index| &index[i..=i]),
                dropout: None,
            };
            let weight = cpu::Weight::Dense { data: &stack[expert * n * k..(expert + 1) * n * k], n, k };
            let token = i / self.choices;
            let truth = cpu::truth(&x[token * k..(token + 1) * k], 1, &weight, &extras).unwrap();
            for (column, (y, truth)) in y.iter().zip(&truth).enumerate() {
                let bound = self.rows.bound_of(outcome.plan.rounding, false, truth);
                let error = (y.to_f64() - truth.value).abs();
                assert!(
                    error <= bound,
                    "{:?}: y[{i}, {column}] of expert {expert} is {y:?}, wanted {} +- {bound:e}",
                    outcome.plan,
                    truth.value
                );
            }
        }
    }

    fn run_and_check(&self, device: &Device) -> Outcome<T> {
        let outcome = self.run(device);
        self.check(&outcome);
        outcome
    }
}

/// Runs a check for both types of x.
macro_rules! each_type {
    ($check:ident($($argument:expr),*)) => {
        $check::<f16>($($argument),*);
        $check::<bf16>($($argument),*);
    };
}

#[test]
fn any_number_of_tokens_and_experts() {
    fn run<T: Element>(device: &Device) {
        for experts in [1, 3, 8] {
            for tokens in [0, 1, 5, 33, 100] {
                Mixture::<T>::nf4([tokens, 2, experts], 35, 64, 64).run_and_check(device);
                Mixture::<T>::dense([tokens, 1, experts], 20, 40).with_bias_and_scale().run_and_check(device);
            }
        }
    }
    for device in Device::for_each_target() {
        each_type!(run(&device));
    }
}

/// Every tile of every kernel, with rows and k that end inside a tile, and blocks that end in another row or expert.
#[test]
fn every_kernel() {
    fn run<T: Element>(device: &Device, kernel: &str, mixture: &Mixture<T>) {
        let mixture = mixture.clone().with_bias_and_scale();
        let outcome = mixture.run_and_check(device);
        let (name, tile) = kernel.split_once('_').unwrap();
        let kind = if matches!(mixture.stack.weight, Weight::Dense(_)) { "dense" } else { "nf4" };
        let entry = format!("{name}_{kind}_{}_{tile}_experts", T::DTYPE);
        assert_eq!(outcome.plan.kernel.unwrap().entry, entry);
    }
    fn all<T: Element>(device: &Device) {
        let nf4 = |tokens, n, k, blocksize| Mixture::<T>::nf4([tokens, 2, 3], n, k, blocksize);
        let dense = |tokens, n, k| Mixture::<T>::dense([tokens, 2, 3], n, k);
        run(device, "skinny_t8", &nf4(9, 35, 192, 64));
        run(device, "skinny_t8", &nf4(7, 3, 64, 4096));
        run(device, "skinny_t8", &nf4(4, 33, 1024 + 64, 128));
        run(device, "skinny_t16", &nf4(20, 35, 320, 64));
        run(device, "matmul_t16", &nf4(9, 131, 96, 32));
        run(device, "matmul_t16", &nf4(20, 5, 32, 256));
        run(device, "matmul_t64", &nf4(60, 130, 96, 64));
        run(device, "matmul_t128", &nf4(130, 150, 64, 64));
        run(device, "matmul_t64_ragged", &nf4(7, 33, 41, 64));
        run(device, "matmul_t64_ragged", &nf4(70, 131, 21, 32));
        run(device, "matmul_t16", &dense(9, 131, 72));
        run(device, "matmul_t64", &dense(60, 31, 40));
        run(device, "matmul_t128", &dense(130, 33, 136));
        run(device, "matmul_t64_ragged", &dense(20, 35, 37));
    }
    each_type!(all(&Device::best()));
}

#[test]
fn every_way_to_store_4_bits() {
    fn run<T: Element>(device: &Device) {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            for (k, blocksize) in [(64, 64), (128, 512), (96, 32), (96, 128), (33, 64)] {
                for codebook in [Codebook::nf4(), Codebook::fp4()] {
                    let mut mixture = Mixture::<T>::dense([3, 2, 5], 21, k);
                    mixture.stack = mixture.stack.in_4_bits(blocksize, &codebook, nesting);
                    mixture.run_and_check(device);
                }
            }
        }
    }
    each_type!(run(&Device::best()));
}

#[test]
fn any_routing() {
    fn run<T: Element>(device: &Device) {
        let rows = 2 * 40;
        let mut mixture = Mixture::<T>::nf4([40, 2, 4], 33, 64, 64).with_bias_and_scale();
        let middle = |i: usize| if (30..50).contains(&i) { 1 } else { 3 };
        let routings: [Vec<i32>; 5] = [
            vec![-1; rows],
            vec![2; rows],
            (0..rows).map(middle).collect(),
            (0..rows as i32).map(|i| i % 5 - 1).collect(),
            (0..rows as i32).map(|i| if i == 79 { 0 } else { -1 }).collect(),
        ];
        for routing in routings {
            mixture.expert = routing;
            mixture.run_and_check(device);
        }
        // No weights at all: all numbers are wrong, but -1.
        let mut none = Mixture::<T>::dense([3, 1, 0], 7, 8);
        none.expert = vec![-1, 0, -1];
        let y = none.run(device).y;
        assert!(y[..7].iter().chain(&y[14..]).all(|y| y.to_f32() == 0.0));
        assert!(y[7..14].iter().all(|y| y.to_f32().is_nan()));
    }
    each_type!(run(&Device::best()));
}

/// Sums of no products: the bias is left.
#[test]
fn no_inputs_at_all() {
    for device in Device::for_each_target() {
        Mixture::<bf16>::nf4([3, 2, 2], 5, 0, 64).with_bias_and_scale().run_and_check(&device);
        Mixture::<bf16>::dense([40, 2, 2], 5, 0).with_bias_and_scale().run_and_check(&device);
    }
}

#[test]
fn adapters_of_experts() {
    fn run<T: Element, A: Element>(device: &Device) {
        const RANKS: [usize; 8] = [8, 0, 1, 3, 16, 17, 64, 256];
        for tokens in [6, 30, 100, 200] {
            let mixture = Mixture::<T, A>::nf4([tokens, 2, 3], 40, 64, 64).with_bias_and_scale();
            mixture.with_adapters(&RANKS).run_and_check(device);
        }
        Mixture::<T, A>::dense([9, 3, 4], 37, 33).with_adapters(&RANKS).run_and_check(device);
    }
    let device = Device::best();
    run::<f16, f16>(&device);
    run::<f16, f32>(&device);
    run::<bf16, bf16>(&device);
    run::<bf16, f32>(&device);
}

/// A wrong expert, or adapter, makes its row NaN, and no other.
#[test]
fn wrong_numbers_are_seen() {
    fn run<T: Element>(device: &Device) {
        for tokens in [6, 30, 60] {
            let right = Mixture::<T>::nf4([tokens, 2, 3], 40, 64, 64).with_adapters(&[4, 12]);
            let mut wrong = right.clone();
            for (row, expert) in [(0, 3), (4, -2), (7, i32::MAX)] {
                wrong.expert[row] = expert;
            }
            wrong.rows.index.as_mut().unwrap()[9] = 2;
            wrong.expert[9] = 1;
            let (right, wrong) = (right.run(device).y, wrong.run(device).y);
            for (row, (right, wrong)) in right.chunks(40).zip(wrong.chunks(40)).enumerate() {
                if [0, 4, 7, 9].contains(&row) {
                    assert!(wrong.iter().all(|y| y.to_f32().is_nan()), "row {row}");
                } else {
                    assert!(same(right, wrong), "row {row}");
                }
            }
        }
    }
    each_type!(run(&Device::best()));
}

/// The same bits twice, and for a row whatever the others are and wherever they go.
#[test]
fn a_row_depends_on_itself_alone() {
    fn run<T: Element>(device: &Device) {
        for (tokens, k) in [(5, 192), (20, 64), (50, 96), (140, 64), (9, 33)] {
            let mixture = Mixture::<T>::nf4([tokens, 2, 3], 33, k, 32 << (k % 64 == 0) as usize);
            let mixture = mixture.with_adapters(&[4, 9]);
            let outcome = mixture.run(device);
            assert!(same(&outcome.y, &mixture.run(device).y), "{:?}: other bits", outcome.plan);
            let mut other = mixture.clone();
            let mut numbers = Numbers::new(9);
            let kept = tokens / 2;
            for token in (0..tokens).filter(|&token| token != kept) {
                for row in [2 * token, 2 * token + 1] {
                    other.expert[row] = numbers.below(5) as i32 - 1;
                    other.rows.index.as_mut().unwrap()[row] = numbers.below(4) as i32 - 1;
                }
                for x in &mut other.stack.x[token * k..(token + 1) * k] {
                    *x = T::from_f32([f32::NAN, f32::INFINITY, 1e30, 0.0][numbers.below(4)]);
                }
            }
            let rows = 2 * kept * 33..(2 * kept + 2) * 33;
            assert!(same(&outcome.y[rows.clone()], &other.run(device).y[rows]), "{:?}", outcome.plan);
        }
    }
    each_type!(run(&Device::best()));
}

/// The weights of experts that were chosen are read once, those of others never.
#[test]
fn what_nobody_chose_is_not_read() {
    let device = Device::emulator();
    for (mut mixture, used) in
        [(Mixture::<bf16>::nf4([4, 2, 8], 256, 512, 64), 3), (Mixture::<bf16>::dense([4, 2, 8], 256, 512), 3)]
    {
        mixture.expert = vec![1, 4, 4, 7, 1, 4, 7, 1];
        let outcome = mixture.run_and_check(&device);
        let counters = outcome.counters.unwrap();
        let weight = match &mixture.stack.weight {
            Weight::Dense(values) => values.len() * 2,
            Weight::Nf4(nf4) => nf4.packed().len() + nf4.absmax().len() * 4,
        };
        let wanted = (weight * used / 8 + mixture.stack.x.len() * 2) as f64;
        let read = 32.0 * counters.global_loads.distinct_sectors as f64;
        assert!(read >= wanted && read < 1.02 * wanted, "{:?} reads {read}, wanted {wanted}", outcome.plan);
        assert_eq!(counters.shared_loads.conflicts, 0);
        assert_eq!(counters.local_accesses, 0);
    }
}

#[test]
fn the_reference_is_a_product_for_each_row() {
    let mixture = Mixture::<bf16, f32>::nf4([6, 2, 3], 11, 40, 64);
    let mixture = mixture.with_bias_and_scale().with_adapters(&[3, 5]);
    let Weight::Nf4(nf4) = &mixture.stack.weight else { unreachable!() };
    let stack = nf4.dequantize::<bf16>();
    let adapters: Vec<_> = mixture.rows.adapters.iter().flatten().map(Adapter::as_cpu).collect();
    let extras = cpu::MatmulExtras {
        bias: mixture.stack.bias.as_deref(),
        row_scale: mixture.stack.row_scale.as_deref(),
        adapters: &adapters,
        adapter_index: mixture.rows.index.as_deref(),
        dropout: None,
    };
    let (x, expert, sizes) = (&mixture.stack.x, &mixture.expert, [6, 2, 3]);
    let dense = cpu::Weight::Dense { data: &stack, n: 33, k: 40 };
    for accumulate in [cpu::Accumulate::F32, cpu::Accumulate::F64] {
        for weight in [cpu::Weight::Nf4(nf4), dense] {
            let mut y = vec![bf16::NAN; 12 * 11];
            cpu::expert_matmul(x, sizes, &weight, expert, &extras, accumulate, &mut y).unwrap();
            for (i, y) in y.chunks(11).enumerate() {
                let mut wanted = vec![bf16::ZERO; 11];
                if let Ok(e) = usize::try_from(expert[i]) {
                    let part = e * 11..(e + 1) * 11;
                    let extras = cpu::MatmulExtras {
                        bias: extras.bias.map(|bias| &bias[part.clone()]),
                        row_scale: extras.row_scale.map(|scale| &scale[part]),
                        adapter_index: extras.adapter_index.map(|index| &index[i..=i]),
                        ..extras
                    };
                    let weight = cpu::Weight::Dense { data: &stack[e * 440..(e + 1) * 440], n: 11, k: 40 };
                    let x = &x[i / 2 * 40..(i / 2 + 1) * 40];
                    cpu::matmul(x, 1, &weight, &extras, accumulate, &mut wanted).unwrap();
                }
                assert!(same(y, &wanted), "row {i}");
            }
        }
    }

    let refused =
        |sizes, expert: &[i32], extras: &cpu::MatmulExtras<'_, bf16, f32>, rows: usize, named: &str| {
            let mut y = vec![bf16::NAN; rows * 11];
            match cpu::expert_matmul(x, sizes, &dense, expert, extras, cpu::Accumulate::F32, &mut y) {
                Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
                other => panic!("{named}: {other:?}"),
            }
            assert!(y.iter().all(|y| y.is_nan()));
        };
    refused([6, 2, 3], &[&expert[..11], &[3]].concat(), &extras, 12, "expert[11]");
    refused([6, 2, 3], &expert[..11], &extras, 12, "expert");
    refused([6, 2, 3], expert, &extras, 11, "y");
    refused([7, 2, 3], expert, &extras, 12, "x");
    refused([6, 2, 2], expert, &extras, 12, "weight");
    refused([6, 2, 3], expert, &cpu::MatmulExtras { bias: Some(&[bf16::ONE; 11]), ..extras }, 12, "bias");
    refused([6, 2, 3], expert, &cpu::MatmulExtras { row_scale: Some(&[1.0; 11]), ..extras }, 12, "row_scale");
    refused(
        [6, 2, 3],
        expert,
        &cpu::MatmulExtras { adapter_index: Some(&[2; 12]), ..extras },
        12,
        "adapter_index[0]",
    );
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let weight = WeightFormat::Nf4 { blocksize: 64 };
    let shape = Shape { tokens: 3, choices: 2, experts: 4, n: 8, k: 64, dtype: DType::BF16, weight };
    let refused = |shape: Shape, named: &str| match expert_matmul::plan(&shape, properties) {
        Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
        other => panic!("{named}: {other:?}"),
    };
    refused(Shape { dtype: DType::F32, ..shape }, "dtype");
    refused(Shape { tokens: 1 << 31, ..shape }, "tokens");
    refused(Shape { choices: 1 << 31, ..shape }, "choices");
    refused(Shape { tokens: 1 << 20, choices: 1 << 20, ..shape }, "tokens * choices");
    refused(Shape { experts: 4095, ..shape }, "experts");
    refused(Shape { n: 1 << 31, ..shape }, "n");
    refused(Shape { n: 1 << 30, ..shape }, "experts * n");
    refused(Shape { k: 1 << 31, ..shape }, "k");
    refused(Shape { tokens: 1 << 29, n: 1 << 28, ..shape }, "tokens * choices * n");
    refused(Shape { weight: WeightFormat::Nf4 { blocksize: 48 }, ..shape }, "weight.blocksize");

    let plan = expert_matmul::plan(&shape, properties).unwrap();
    assert_eq!((plan.rows, plan.rounding), (6, Rounding::Value));
    let mixture = Mixture::<bf16>::nf4([3, 2, 4], 8, 64, 64);
    let weight = DeviceWeight::new(&device, &mixture.stack.weight);
    let small = DeviceWeight::new(&device, &Mixture::<bf16>::nf4([3, 2, 3], 8, 64, 64).stack.weight);
    let dense = DeviceWeight::new(&device, &Mixture::<bf16>::dense([3, 2, 4], 8, 64).stack.weight);
    let (x, expert) = (device.upload(&[bf16::ONE; 200]), device.upload(&mixture.expert));
    let sort = |rows: usize, experts: usize| {
        expert_groups::plan(&expert_groups::Shape { rows, experts }, properties).unwrap()
    };
    let mut buffers = [sort(6, 4), sort(5, 4), sort(6, 3)].map(|sort| device.alloc::<i32>(sort.len()));
    let [a, b, c] = &mut buffers;
    let groups = sort(6, 4).run(queue, expert.view(), a.view_mut()).unwrap();
    let fewer_rows = sort(5, 4).run(queue, expert.slice(..5), b.view_mut()).unwrap();
    let fewer_experts = sort(6, 3).run(queue, expert.view(), c.view_mut()).unwrap();
    let short = device.upload(&[bf16::ONE; 31]);
    let mut y = device.upload(&[bf16::ONE; 50]);
    let none = Extras::<bf16>::default;
    let mut run = |x, weight: &DeviceWeight<bf16>, groups, extras: Extras<'_, bf16>, len, named: &str| {
        let result = plan.run(queue, x, &weight.view(), groups, &extras, y.slice_mut(0..len));
        match result {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    };
    let good = x.slice(..192);
    run(x.slice(..191), &weight, &groups, none(), 48, "x");
    run(x.slice(1..193), &weight, &groups, none(), 48, "x");
    run(good, &small, &groups, none(), 48, "weight.packed");
    run(good, &dense, &groups, none(), 48, "weight");
    run(good, &weight, &fewer_rows, none(), 48, "groups");
    run(good, &weight, &fewer_experts, none(), 48, "groups");
    run(good, &weight, &groups, Extras { bias: Some(short.view()), ..none() }, 48, "bias");
    run(good, &weight, &groups, none(), 47, "y");
    assert!(y.download().iter().all(|&y| y == bf16::ONE));

    let shrink = lora_shrink::Shape {
        tokens: 6,
        k: 64,
        max_rank: 4,
        slices: 1,
        dtype: DType::BF16,
        adapter_dtype: DType::BF16,
    };
    for (plan, choices) in [
        (lora_shrink::plan(&shrink, properties).unwrap(), 4),
        (lora_shrink::plan(&shrink, properties).unwrap(), 0),
        (lora_shrink::plan_transposed(&shrink, properties).unwrap(), 2),
    ] {
        match plan.with_choices(choices) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, "choices"),
            other => panic!("{other:?}"),
        }
    }
}
