//! The backward pass of adapters, `u = s dY B`, `dA = uᵀ x` and `dB = dYᵀ v`, against f64 and PEFT.

mod fixtures;
mod products;

use std::iter;

use fixtures::{Fixture, size};
use half::{bf16, f16};
use lora_kernels::cpu::{self, Dropout};
use lora_kernels::cuda::lora_gradient::{self, Batch};
use lora_kernels::cuda::{
    AdapterTable, GradientTable, GradientView, LowRank, MAX_RANK, lora_shrink, matmul_transposed,
};
use lora_kernels::nf4::{Absmax, Codebook, DYNAMIC_MAP, NestedAbsmax, Nf4Matrix};
use lora_kernels::{DType, Element, Error};
use lora_kernels_devices::{Buffer, Device};
use products::{Adapter, DeviceWeight, Factors, Numbers, Problem, Weight, same};

/// A layer with adapters, and a batch that has been through it.
#[derive(Clone)]
struct Layer<T, A> {
    slices: Vec<usize>,
    k: usize,
    /// Of every adapter's slices, one adapter after the other.
    adapters: Vec<Adapter<A>>,
    x: Vec<T>,
    dy: Vec<T>,
    index: Option<Vec<i32>>,
    dropout: Option<Dropout>,
}

/// What the kernels made of it.
struct Gradients {
    u: Vec<f32>,
    v: Vec<f32>,
    columns: usize,
    /// dA and dB of every adapter's slices.
    of: Vec<[Vec<f32>; 2]>,
    plan: lora_gradient::Plan,
}

impl<T: Element, A: Element> Layer<T, A> {
    fn new(tokens: usize, slices: &[usize], k: usize, ranks: &[usize]) -> Self {
        let (mut numbers, n) = (Numbers::new((tokens + k) as u64), slices.iter().sum::<usize>());
        let adapter = |(i, &rank): (usize, &usize)| Adapter {
            lora_a: Numbers::new(i as u64).many(rank * k),
            lora_b: Numbers::new(100 + i as u64).many(slices[i % slices.len()] * rank),
            rank,
            scaling: 1.0 / (rank + 1) as f32 + 0.1,
        };
        let adapters: Vec<_> = ranks.iter().enumerate().map(adapter).collect();
        let count = adapters.len() / slices.len();
        Self {
            slices: slices.to_vec(),
            k,
            adapters,
            x: numbers.many(tokens * k),
            dy: numbers.many(tokens * n),
            index: Some((0..tokens).map(|_| numbers.below(count + 1) as i32 - 1).collect()),
            dropout: None,
        }
    }

    fn n(&self) -> usize {
        self.slices.iter().sum()
    }

    fn tokens(&self) -> usize {
        self.index.as_ref().map_or(self.dy.len() / self.n(), Vec::len)
    }

    fn adapter_of(&self, token: usize) -> Option<usize> {
        let index = self.index.as_ref().map_or(0, |index| index[token]);
        usize::try_from(index).ok().filter(|&i| i < self.adapters.len() / self.slices.len())
    }

    /// Gradients of every slice begin as `before`; with it they are added to.
    fn run(&self, device: &Device, before: Option<f32>) -> Gradients {
        let (queue, properties) = (device.queue(), device.queue().properties());
        let (tokens, n) = (self.tokens(), self.n());
        let factors = Factors::new(device, &self.adapters);
        let mut entries = device.alloc(AdapterTable::<A>::bytes(factors.count()));
        let views = factors.views();
        let table =
            AdapterTable::upload_slices(queue, &views, self.k, &self.slices, entries.view_mut()).unwrap();
        let (x, dy) = (device.upload(&self.x), device.upload(&self.dy));
        let index = self.index.as_ref().map(|index| device.upload(index));
        let index = || index.as_ref().map(Buffer::view);
        let with_dropout =
            |plan: lora_shrink::Plan| self.dropout.map_or(plan, |dropout| plan.with_dropout(dropout));
        let plan = lora_shrink::plan(&table.shrink_shape(tokens, T::DTYPE), properties).unwrap();
        let mut v = device.alloc(plan.v_len());
        with_dropout(plan).run(queue, x.view(), &table, index(), v.view_mut()).unwrap();
        let shape = table.shrink_transposed_shape(tokens, T::DTYPE);
        assert_eq!(shape.k, n);
        let transposed = lora_shrink::plan_transposed(&shape, properties).unwrap();
        let mut u = device.alloc(transposed.v_len());
        with_dropout(transposed).run(queue, dy.view(), &table, index(), u.view_mut()).unwrap();

        let mut of: Vec<[Buffer<f32>; 2]> = Vec::new();
        for (i, adapter) in self.adapters.iter().enumerate() {
            let lens = [adapter.rank * self.k, self.slices[i % self.slices.len()] * adapter.rank];
            of.push(lens.map(|len| {
                before.map_or_else(|| device.alloc(len), |before| device.upload(&vec![before; len]))
            }));
        }
        let mut buffer = device.alloc(GradientTable::bytes(of.len()));
        let gradients = of.iter_mut().zip(&self.adapters).map(|([a, b], adapter)| GradientView {
            lora_a: a.view_mut(),
            lora_b: b.view_mut(),
            rank: adapter.rank,
        });
        let gradients = gradients.collect();
        let mut gradients =
            GradientTable::upload_slices(queue, gradients, self.k, &self.slices, buffer.view_mut()).unwrap();
        let plan = lora_gradient::plan(&gradients.shape(tokens, T::DTYPE), properties).unwrap();
        let plan = self.dropout.map_or(plan, |dropout| plan.with_dropout(dropout));
        let mut workspace = device.alloc(plan.workspace_bytes);
        let batch = Batch { x: x.view(), dy: dy.view(), v: v.view(), u: u.view(), index: index() };
        plan.run(queue, &batch, before.is_some(), &mut gradients, workspace.view_mut()).unwrap();
        let columns = table.v_columns();
        let whole = |parts: Vec<f32>| sum(parts.len().checked_div(tokens * columns).unwrap_or(1), &parts);
        let (u, v) = (whole(u.download()), whole(v.download()));
        let of = of.iter().map(|both| both.each_ref().map(|gradient| gradient.download())).collect();
        Gradients { u, v, columns, of, plan }
    }

    /// Runs it, and checks u and every gradient against f64 over what each was made of.
    fn check(&self, device: &Device, before: Option<f32>) -> Gradients {
        let got = self.run(device, before);
        let (tokens, n, eps) = (self.tokens(), self.n(), (-24f64).exp2());
        let pitch = got.columns / self.slices.len();
        let pieces = if T::DTYPE == DType::F32 { 3 } else { 1 + usize::from(T::DTYPE == DType::F16) };
        for (i, (adapter, [da, db])) in self.adapters.iter().zip(&got.of).enumerate() {
            let (slice, own) = (i % self.slices.len(), i / self.slices.len());
            let (first_row, rows) = (self.slices[..slice].iter().sum::<usize>(), self.slices[slice]);
            let mine: Vec<usize> = (0..tokens).filter(|&token| self.adapter_of(token) == Some(own)).collect();
            let close = |what: &str, got: f32, share: f64, terms: &mut dyn Iterator<Item = f64>| {
                let (value, magnitude) = terms.fold((0.0, 0.0), |(v, m), t| (v + t, m + t.abs()));
                let error = (f64::from(got) - value).abs();
                assert!(
                    error <= share * magnitude,
                    "{what}: {got}, wanted {value} +- {:e}",
                    share * magnitude
                );
            };
            // u: as lora_shrink's v (tests/lora_shrink.rs), with at most 9 pairs of pieces, and a factor more.
            let leaf = rows.div_ceil(32).div_ceil(64) * 2 * 9;
            let of_u = 1.01 * (2 * 17 * leaf + 6 + 2) as f64 * eps;
            let scaling =
                f64::from(adapter.scaling) * self.dropout.map_or(1.0, |dropout| f64::from(dropout.scale()));
            for &token in &mine {
                for r in 0..pitch {
                    let u = got.u[token * got.columns + slice * pitch + r];
                    if r >= adapter.rank {
                        assert_eq!(u.to_bits(), 0);
                        continue;
                    }
                    let dy = &self.dy[token * n + first_row..][..rows];
                    let b = adapter.lora_b.iter().skip(r).step_by(adapter.rank);
                    close(
                        "u",
                        u,
                        of_u,
                        &mut dy.iter().zip(b).map(|(y, b)| scaling * y.to_f64() * b.to_f64()),
                    );
                }
            }
            // Of a chunk a term meets 16 others and the sum so far for each 16 tokens and pair of pieces, at twice the unit as
            // a step may cut off; then the chunks are added, and what was there before.
            let chunk = mine.len().min(512).div_ceil(16) * 3 * pieces;
            let share = 1.01 * (2 * 17 * chunk + mine.len().div_ceil(512) + 1) as f64 * eps;
            let start = f64::from(before.unwrap_or(0.0));
            let of = |ranks: &[f32], token: usize, r: usize| {
                f64::from(ranks[token * got.columns + slice * pitch + r])
            };
            let keeps = |token, k| self.dropout.is_none_or(|dropout| dropout.keeps(token, k));
            for (at, &da) in da.iter().enumerate() {
                let (r, k) = (at / self.k, at % self.k);
                let kept = mine.iter().filter(|&&token| keeps(token, k));
                let terms = kept.map(|&token| of(&got.u, token, r) * self.x[token * self.k + k].to_f64());
                close("dA", da, share, &mut terms.chain(iter::once(start)));
            }
            for (at, &db) in db.iter().enumerate() {
                let (row, r) = (at / adapter.rank, at % adapter.rank);
                let terms = mine
                    .iter()
                    .map(|&token| self.dy[token * n + first_row + row].to_f64() * of(&got.v, token, r));
                close("dB", db, share, &mut terms.chain(iter::once(start)));
            }
        }
        got
    }
}

/// The sum of v's parts, as those who read it add them: neighbours first.
fn sum(parts: usize, v: &[f32]) -> Vec<f32> {
    if parts <= 1 {
        return v.to_vec();
    }
    let (low, high) = v.split_at(v.len() / 2);
    sum(parts / 2, low).iter().zip(sum(parts / 2, high)).map(|(low, high)| low + high).collect()
}

/// Runs a check for every pair of types.
macro_rules! each_type {
    ($check:ident($($argument:expr),*)) => {
        $check::<f32, f32>($($argument),*);
        $check::<f16, f16>($($argument),*);
        $check::<f16, f32>($($argument),*);
        $check::<bf16, bf16>($($argument),*);
        $check::<bf16, f32>($($argument),*);
    };
}

#[test]
fn any_shape_and_any_mix_of_ranks() {
    fn all<T: Element, A: Element>(device: &Device) {
        for (tokens, n, k, ranks) in [
            (1, 8, 8, &[4][..]),
            (7, 33, 1, &[1, 0, 3]),
            (33, 129, 40, &[16, 5]),
            (40, 1, 129, &[17, 64, 2]),
            (65, 72, 136, &[8, 16, 12, 1]),
            (30, 16, 24, &[256, 65]),
        ] {
            let layer = Layer::<T, A>::new(tokens, &[n], k, ranks);
            layer.check(device, None);
            let one = Layer { index: None, ..Layer::<T, A>::new(tokens, &[n], k, &ranks[..1]) };
            one.check(device, Some(0.5));
        }
    }
    each_type!(all(&Device::best()));
}

#[test]
fn slices_have_gradients_of_their_own() {
    fn all<T: Element, A: Element>(device: &Device) {
        for slices in [[33, 130, 26], [16, 136, 64]] {
            Layer::<T, A>::new(37, &slices, 72, &[4, 16, 3, 0, 40, 8]).check(device, Some(-1.0));
        }
    }
    each_type!(all(&Device::best()));
}

#[test]
fn chunks_are_added() {
    fn all<T: Element, A: Element>(device: &Device) {
        let mut layer = Layer::<T, A>::new(1300, &[24, 9], 17, &[3, 4, 5, 1]);
        let got = layer.check(device, Some(0.25));
        assert_eq!(got.plan.chunks, 3);
        // An adapter without tokens.
        layer.index.as_mut().unwrap().fill(0);
        layer.check(device, None);
    }
    for device in Device::for_each_target() {
        all::<f32, f32>(&device);
        all::<bf16, f32>(&device);
    }
}

/// What dropout takes from x in the forward pass is not in v, and not in dA.
#[test]
fn dropout_drops_the_same_elements_everywhere() {
    fn all<T: Element, A: Element>(device: &Device) {
        for (tokens, k) in [(21, 40), (40, 33)] {
            let mut layer = Layer::<T, A>::new(tokens, &[24], k, &[5, 16]);
            let dropout =
                Dropout::new(0.3, 0x1234_5678_9abc_def0, 7 << 40 | 3).unwrap().with_first_token(u32::MAX - 5);
            layer.dropout = Some(dropout);
            let got = layer.check(device, None);
            // v is that of x without the dropped elements, with a scaling that has the factor of the others.
            let mut masked = layer.clone();
            masked.dropout = None;
            (0..tokens * k)
                .filter(|i| !dropout.keeps(i / k, i % k))
                .for_each(|i| masked.x[i] = T::from_f32(0.0));
            masked.adapters.iter_mut().for_each(|adapter| adapter.scaling *= dropout.scale());
            assert!(same(&got.v, &masked.run(device, None).v));
        }
    }
    each_type!(all(&Device::best()));
}

/// A mixed batch gives an adapter the bits that its tokens alone would give, wherever they are, and whatever the others hold.
#[test]
fn gradients_depend_on_an_adapters_own_tokens() {
    fn all<T: Element, A: Element>(device: &Device) {
        let mut mixed = Layer::<T, A>::new(700, &[40], 24, &[8, 8, 3]);
        let kept: Vec<usize> = (0..700).filter(|&token| mixed.adapter_of(token) == Some(1)).collect();
        let mut numbers = Numbers::new(5);
        for token in (0..700).filter(|token| !kept.contains(token)) {
            mixed.index.as_mut().unwrap()[token] = [-1, 0, 2, 3, -7][numbers.below(5)];
            mixed.x[token * 24..][..24].fill(T::from_f32([f32::NAN, f32::INFINITY, 2.0][numbers.below(3)]));
            mixed.dy[token * 40..][..40].fill(T::from_f32([f32::NAN, f32::INFINITY, 2.0][numbers.below(3)]));
        }
        let rows = |values: &[T], columns: usize| {
            kept.iter().flat_map(|&t| values[t * columns..][..columns].to_vec()).collect()
        };
        let alone = Layer {
            adapters: vec![mixed.adapters[1].clone()],
            x: rows(&mixed.x, 24),
            dy: rows(&mixed.dy, 40),
            index: None,
            ..mixed.clone()
        };
        let (mixed, again, alone) =
            (mixed.run(device, None), mixed.run(device, None), alone.run(device, None));
        for side in 0..2 {
            assert!(same(&mixed.of[1][side], &alone.of[0][side]));
            assert!(same(&mixed.of[1][side], &again.of[1][side]));
        }
    }
    all::<f16, f32>(&Device::best());
    all::<bf16, bf16>(&Device::best());
}

#[test]
fn nothing_to_do() {
    let device = Device::best();
    // Without tokens the gradients are zero, or what they were.
    for (before, wanted) in [(None, 0.0f32), (Some(3.0), 3.0)] {
        for index in [Some(Vec::new()), None] {
            let mut layer = Layer::<bf16, f32>::new(0, &[9], 16, &[4]);
            layer.index = index;
            let got = layer.run(&device, before);
            assert!(got.of[0].iter().flatten().all(|g| g.to_bits() == wanted.to_bits()));
        }
    }
    let got = Layer::<bf16, f32>::new(5, &[9], 16, &[0]).run(&device, None);
    assert!(got.plan.kernel.is_none());
}

/// What is read, counted: x and dY once for every 64 ranks, and u and v for every 128 columns.
#[test]
fn counts() {
    let device = Device::emulator();
    let (tokens, n, k, rank) = (256, 256, 384, 16);
    let layer = Layer { index: None, ..Layer::<bf16, f32>::new(tokens, &[n], k, &[rank]) };
    layer.run(&device, None);
    let counters = device.counters().unwrap();
    assert_eq!((counters.local_accesses, counters.shared_loads.conflicts), (0, 0), "{counters}");
    let wanted = (tokens * (n + k) * 2 + 2 * tokens * rank * 4) as f64;
    let moved = 32.0 * counters.global_loads.distinct_sectors as f64;
    assert!(moved >= wanted && moved <= 1.02 * wanted, "{moved} bytes, wanted {wanted}");
    assert_eq!(counters.global_loads.sector_ratio(), 1.0, "{counters}");
    // u and v as three bf16 each.
    assert_eq!(counters.matrix_ops, (3 * tokens * (n + k) * rank) as u64);
}

/// Gradients that PEFT and bitsandbytes gave over a 4-bit base, in f64: u and dX, dA, dB from them.
#[test]
fn peft_fixtures() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    for name in ["lora_a", "lora_b"] {
        let file = Fixture::open(&format!("train_step/{name}"));
        let [n, k, tokens, rank] = ["N", "K", "T", "r"].map(|key| size(&file.json, key));
        let absmax = if file.has("base.qabsmax") {
            let (q, outer) = (file.get("base.qabsmax"), file.get("base.nested_absmax"));
            let offset = file.get::<f32>("base.offset")[0];
            Absmax::Nested(NestedAbsmax::from_parts(q, outer, DYNAMIC_MAP.into(), offset, 256).unwrap())
        } else {
            Absmax::Plain(file.get("base.absmax"))
        };
        let nf4 =
            Nf4Matrix::from_parts([n, k], file.get("base.packed"), absmax, 64, Codebook::nf4(), DType::F32)
                .unwrap();
        let scaling = file.json["scaling"].as_f64().unwrap() as f32;
        let adapter =
            Adapter::<f32> { lora_a: file.get("lora_A"), lora_b: file.get("lora_B"), rank, scaling };
        let layer = Layer::<f32, f32> {
            slices: vec![n],
            k,
            adapters: vec![adapter.clone()],
            x: file.get("x"),
            dy: file.get("dY"),
            index: None,
            dropout: None,
        };
        let got = layer.check(&device, None);
        // Their sums are f64 over the same f32 numbers; ours have u and v rounded, a few units of 2^-24 of their magnitudes.
        let close =
            |what: &str, ours: &[f32], theirs: &str, share: f64, magnitudes: &dyn Fn(usize) -> f64| {
                let theirs = file.get::<f64>(theirs);
                assert_eq!(ours.len(), theirs.len(), "{what}");
                for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                    let bound = share * magnitudes(i);
                    assert!(
                        (f64::from(*ours) - theirs).abs() <= bound,
                        "{what}[{i}]: {ours}, wanted {theirs} +- {bound:e}"
                    );
                }
            };
        let magnitude = |values: &[f32], at: &dyn Fn(usize) -> usize, count: usize| -> Vec<f64> {
            (0..count).map(|i| f64::from(values[at(i)]).abs()).collect()
        };
        // |u| and |v| in full magnitudes.
        let size_of = |rows: &[f32], columns: usize, factor: &dyn Fn(usize, usize) -> f32| -> Vec<f64> {
            let mut sizes = vec![0.0; tokens * rank];
            for (i, size) in sizes.iter_mut().enumerate() {
                let row = magnitude(rows, &|c| i / rank * columns + c, columns);
                let terms = row.iter().enumerate().map(|(c, x)| x * f64::from(factor(i % rank, c)).abs());
                *size = f64::from(scaling) * terms.sum::<f64>();
            }
            sizes
        };
        let u = size_of(&layer.dy, n, &|r, c| adapter.lora_b[c * rank + r]);
        let v = size_of(&layer.x, k, &|r, c| adapter.lora_a[r * k + c]);
        // Of u and v: leaves of 64 elements at most, 9 pairs; of the sums over tokens the same; see `check`.
        let share = 2.02 * (2.0 * 2.0 * 17.0 * 18.0 + 16.0) * (-24f64).exp2();
        close("dA", &got.of[0][0], "f64.dA", share, &|i| {
            (0..tokens).map(|t| u[t * rank + i / k] * f64::from(layer.x[t * k + i % k]).abs()).sum()
        });
        close("dB", &got.of[0][1], "f64.dB", share, &|i| {
            (0..tokens).map(|t| v[t * rank + i % rank] * f64::from(layer.dy[t * n + i / rank]).abs()).sum()
        });

        // dX from the same u.
        let weight = Weight::<f32>::Nf4(nf4.clone());
        let shape =
            Problem::<f32> { x: layer.dy.clone(), weight: weight.clone(), ..Problem::dense(tokens, n, k) }
                .shape();
        let plan = matmul_transposed::plan(&shape, properties).unwrap();
        let (dy, weight, u_buffer) =
            (device.upload(&layer.dy), DeviceWeight::new(&device, &weight), device.upload(&got.u));
        let factors = Factors::new(&device, &layer.adapters);
        let mut entries = device.alloc(AdapterTable::<f32>::bytes(1));
        let table = factors.table(&device, k, n, &mut entries).unwrap();
        let branch = LowRank { adapters: &table, index: None, v: u_buffer.view() };
        let (mut dx, mut workspace) = (device.alloc(tokens * k), device.alloc(plan.workspace_bytes));
        plan.run(queue, dy.view(), &weight.view(), Some(&branch), dx.view_mut(), workspace.view_mut())
            .unwrap();
        let values = nf4.dequantize::<f32>();
        close("dX", &dx.download(), "f64.dX", share + 2.0 * (n as f64) * (-24f64).exp2(), &|i| {
            let (t, c) = (i / k, i % k);
            let base: f64 = (0..n)
                .map(|row| (f64::from(layer.dy[t * n + row]) * f64::from(values[row * k + c])).abs())
                .sum();
            base + (0..rank)
                .map(|r| u[t * rank + r] * f64::from(adapter.lora_a[r * k + c]).abs())
                .sum::<f64>()
        });
    }
}

/// dX of a batch with dropout is the reference's: the branch reaches the elements that stayed, and no others.
#[test]
fn the_branch_of_dx_is_masked() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    for (tokens, n, k) in [(20, 64, 96), (70, 24, 40), (5, 9, 33)] {
        let mut layer = Layer::<bf16, f32>::new(tokens, &[n], k, &[5, 16]);
        let dropout = Dropout::new(0.4, 99, 5).unwrap();
        layer.dropout = Some(dropout);
        let (got, zero) = (layer.run(&device, None), vec![bf16::ZERO; n * k]);
        let shape = Problem::<bf16>::dense(tokens, n, k).shape();
        let plan = matmul_transposed::plan(&shape, properties).unwrap().with_dropout(dropout);
        let (dy, weight) =
            (device.upload(&layer.dy), DeviceWeight::new(&device, &Weight::Dense(zero.clone())));
        let (u, index) = (device.upload(&got.u), device.upload(layer.index.as_ref().unwrap()));
        let factors = Factors::new(&device, &layer.adapters);
        let mut entries = device.alloc(AdapterTable::<f32>::bytes(2));
        let table = factors.table(&device, k, n, &mut entries).unwrap();
        let branch = LowRank { adapters: &table, index: Some(index.view()), v: u.view() };
        let (mut dx, mut workspace) = (device.alloc(tokens * k), device.alloc(plan.workspace_bytes));
        plan.run(queue, dy.view(), &weight.view(), Some(&branch), dx.view_mut(), workspace.view_mut())
            .unwrap();
        let adapters: Vec<_> = layer.adapters.iter().map(Adapter::as_cpu).collect();
        let extras = cpu::TransposedExtras {
            adapters: &adapters,
            adapter_index: layer.index.as_deref(),
            dropout: Some(dropout),
        };
        let weight = cpu::Weight::Dense { data: &zero, n, k };
        let truth = cpu::truth_transposed(&layer.dy, tokens, &weight, &extras).unwrap();
        for (i, (dx, truth)) in dx.download().iter().zip(truth).enumerate() {
            if !dropout.keeps(i / k, i % k) {
                assert_eq!((dx.to_f32(), truth.value), (0.0, 0.0));
            }
            // As `Problem::bound` counts: in u two instructions of 17 additions for a leaf and each pair of pieces, the six levels of
            // the tree, the scale and dropout's; in the branch one instruction for 16 ranks and each pair, the sum with dX, and u
            // rounded once. All may count twice. Then dX is rounded to bf16.
            let steps = f64::from(17 * 9 * 2 + 6 + 2 + 17 * 9 + 2);
            let sum = 2.0 * steps * (-24f64).exp2() * 1.001 * truth.magnitude;
            let bound = sum + bf16::DTYPE.unit_roundoff() * (truth.value.abs() + sum) + (-134f64).exp2();
            assert!((dx.to_f64() - truth.value).abs() <= bound, "{i}: {dx}, wanted {}", truth.value);
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let shape = lora_gradient::Shape {
        tokens: 4,
        n: 8,
        k: 16,
        adapters: 1,
        slices: 1,
        widest_slice: 8,
        max_rank: 4,
        dtype: DType::BF16,
    };
    let refused = |shape: lora_gradient::Shape, argument: &str| match lora_gradient::plan(&shape, properties)
    {
        Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
        other => panic!("{argument}: {other:?}"),
    };
    refused(lora_gradient::Shape { tokens: 1 << 31, ..shape }, "tokens");
    refused(lora_gradient::Shape { n: 1 << 31, ..shape }, "n");
    refused(lora_gradient::Shape { k: usize::MAX, ..shape }, "k");
    refused(lora_gradient::Shape { adapters: 1 << 31, ..shape }, "adapters");
    refused(lora_gradient::Shape { max_rank: MAX_RANK + 1, ..shape }, "max_rank");
    refused(lora_gradient::Shape { slices: 0, ..shape }, "slices");
    refused(lora_gradient::Shape { slices: 17, ..shape }, "slices");
    refused(lora_gradient::Shape { widest_slice: 9, ..shape }, "widest_slice");
    refused(lora_gradient::Shape { adapters: 1 << 30, k: 1 << 30, ..shape }, "adapters * max_rank * (k + n)");

    let (mut a, mut b, mut buffer) =
        (device.alloc::<f32>(65), device.alloc::<f32>(32), device.alloc::<u8>(64));
    let mut table =
        |a_len: std::ops::Range<usize>, b_len: std::ops::Range<usize>, rank, bytes, slices: &[usize]| {
            let view = GradientView { lora_a: a.slice_mut(a_len), lora_b: b.slice_mut(b_len), rank };
            let uploaded =
                GradientTable::upload_slices(queue, vec![view], 16, slices, buffer.slice_mut(..bytes));
            match uploaded {
                Err(Error::Argument { argument, .. }) => argument,
                other => panic!("{other:?}"),
            }
        };
    assert_eq!(table(0..63, 0..32, 4, 32, &[8]), "gradients[0].lora_a");
    assert_eq!(table(0..64, 0..31, 4, 32, &[8]), "gradients[0].lora_b");
    assert_eq!(table(0..64, 0..32, MAX_RANK + 1, 32, &[8]), "gradients[0].rank");
    assert_eq!(table(0..64, 0..32, 4, 31, &[8]), "buffer");
    assert_eq!(table(0..64, 0..32, 4, 32, &[]), "slices");
    assert_eq!(table(0..64, 0..32, 4, 32, &[4, 4]), "gradients");

    let view = GradientView { lora_a: a.slice_mut(..64), lora_b: b.view_mut(), rank: 4 };
    let mut gradients = GradientTable::upload(queue, vec![view], 16, 8, buffer.view_mut()).unwrap();
    assert_eq!(gradients.shape(4, DType::BF16), shape);
    let plan = lora_gradient::plan(&shape, properties).unwrap();
    let (x, dy) = (device.upload(&[bf16::ONE; 72]), device.upload(&[bf16::ONE; 40]));
    let (ranks, index) = (device.upload(&[0.0f32; 20]), device.upload(&[0, 0, 0, 0, 0]));
    let mut workspace = device.alloc::<u8>(plan.workspace_bytes + 16);
    let good = Batch {
        x: x.slice(..64),
        dy: dy.slice(..32),
        v: ranks.slice(..16),
        u: ranks.slice(..16),
        index: None,
    };
    let mut run = |plan: &lora_gradient::Plan,
                   batch: Batch<'_, bf16>,
                   bytes: std::ops::Range<usize>,
                   argument: &str| {
        match plan.run(queue, &batch, false, &mut gradients, workspace.slice_mut(bytes)) {
            Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
            other => panic!("{argument}: {other:?}"),
        }
    };
    let bytes = plan.workspace_bytes;
    run(&plan, Batch { x: x.slice(..63), ..good }, 0..bytes, "x");
    run(&plan, Batch { x: x.slice(1..65), ..good }, 0..bytes, "x");
    run(&plan, Batch { dy: dy.slice(..33), ..good }, 0..bytes, "dy");
    run(&plan, Batch { u: ranks.slice(..15), ..good }, 0..bytes, "u");
    run(&plan, Batch { v: ranks.slice(..17), ..good }, 0..bytes, "v");
    run(&plan, Batch { index: Some(index.view()), ..good }, 0..bytes, "adapter_index");
    run(&plan, good, 0..bytes - 1, "workspace");
    run(&plan, good, 1..bytes + 1, "workspace");
    let other = lora_gradient::plan(&lora_gradient::Shape { k: 17, ..shape }, properties).unwrap();
    run(&other, good, 0..bytes, "gradients");
    let other =
        lora_gradient::plan(&lora_gradient::Shape { dtype: DType::F16, ..shape }, properties).unwrap();
    run(&other, good, 0..bytes, "x");
}
