//! Whole layers in training on the CPU: outputs and gradients against f64 and PEFT, the same bits in every batch, and what does not
//! fit.

mod fixtures;
mod training;

use fixtures::Fixture;
use half::bf16;
use lora_kernels::adapter::{AdaLora, Adapter, Dora, Lora, Stack};
use lora_kernels::cpu::{LoraGradient, MatmulExtras, Weight, fast};
use lora_kernels::nf4::{Absmax, Codebook, Nesting, Nf4Matrix};
use lora_kernels::train::{Gradient, Layer};
use lora_kernels::{DType, Element, Error, Tensor};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use training::{Batch, Sum, assert_close, round_to, roundings, widened};

/// What the fast path gives for a batch over a weight.
struct Backward<T> {
    gradients: Vec<[Vec<f32>; 2]>,
    dx: Vec<T>,
}

fn backward<T: Element>(batch: &Batch<T, f32>, weight: &Weight<'_, T>, before: Option<f32>) -> Backward<T> {
    let ([m, n, k], adapters) = (batch.shape, batch.low_ranks());
    let extras = MatmulExtras {
        adapters: &adapters,
        adapter_index: batch.index.as_deref(),
        dropout: batch.dropout,
        ..MatmulExtras::default()
    };
    let fill = before.unwrap_or(f32::NAN);
    let zeros = |a: &training::Owned<f32>| [vec![fill; a.rank * k], vec![fill; n * a.rank]];
    let mut gradients: Vec<[Vec<f32>; 2]> = batch.adapters.iter().map(zeros).collect();
    let views = gradients.iter_mut().zip(&batch.adapters);
    let mut views: Vec<LoraGradient<'_>> =
        views.map(|([lora_a, lora_b], a)| LoraGradient { lora_a, lora_b, rank: a.rank }).collect();
    let mut dx = vec![T::from_f32(f32::NAN); m * k];
    let inputs = [&batch.x[..], &batch.dy[..]];
    fast::backward(inputs, m, weight, &extras, before.is_some(), &mut views, Some(&mut dx)).unwrap();
    Backward { gradients, dx }
}

/// `dX` of the base: `Σ_n dy w`, added to the truth of the adapters.
fn add_base<T: Element>(batch: &Batch<T, f32>, weight: &[f64], dx: &mut [Sum]) {
    let [_, n, k] = batch.shape;
    for (ik, dx) in dx.iter_mut().enumerate() {
        for n_ in 0..n {
            let term = batch.dy[ik / k * n + n_].to_f64() * weight[n_ * k + ik % k];
            dx.value += term;
            dx.magnitude += term.abs();
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Over dense and 4-bit weights; an adapter alone and a token alone give the same bits.
    #[test]
    fn the_fast_path(
        shape in [0usize..40, 0usize..70, 0usize..300],
        ranks in prop::collection::vec(0usize..20, 0..4),
        [mixed, nf4]: [bool; 2],
        dropout in prop::option::of(0f32..0.9),
        seed: u64,
    ) {
        fn check<T: Element>(batch: &Batch<T, f32>, nf4: bool) -> Result<(), TestCaseError> {
            let [m, n, k] = batch.shape;
            let dense: Vec<T> = round_to(&(0..n * k).map(|i| ((i * 31 % 17) as f32 - 8.0) / 9.0).collect::<Vec<f32>>());
            let quantised = Nf4Matrix::quantize(&dense, [n, k], 64, &Codebook::nf4(), Nesting::Nested).unwrap();
            let weight = if nf4 { Weight::Nf4(&quantised) } else { Weight::Dense { data: &dense, n, k } };
            let got = backward(batch, &weight, None);
            let mut truth = batch.truth();
            let numbers = if nf4 { widened(&quantised.dequantize::<T>()) } else { widened(&dense) };
            add_base(batch, &numbers, &mut truth.dx);
            for (got, truth) in got.gradients.iter().zip(&truth.gradients) {
                assert_close("dA", &widened(&got[0]), &truth[0], roundings(n + m + 5), DType::F32);
                assert_close("dB", &widened(&got[1]), &truth[1], roundings(k + m + 5), DType::F32);
            }
            let share = roundings(n + n / 256 + batch.max_rank() + 8);
            assert_close("dX", &widened(&got.dx), &truth.dx, share, T::DTYPE);

            let again = backward(batch, &weight, Some(0.5));
            for (again, first) in again.gradients.iter().flatten().zip(got.gradients.iter().flatten()) {
                for (again, first) in again.iter().zip(first) {
                    // The sum begins at 0.5 instead of 0: one rounding of every addition more.
                    let bound = (m as f32 + 2.0) * 2f32.powi(-24) * (1.0 + first.abs() + 40.0);
                    prop_assert!((again - 0.5 - first).abs() <= bound, "{} {}", again, first);
                }
            }
            for adapter in 0..batch.adapters.len() as i32 {
                let mut alone = batch.clone();
                let Some(index) = alone.index.as_mut() else { break };
                index.iter_mut().filter(|index| **index != adapter).for_each(|index| *index = -1);
                let (alone, a) = (backward(&alone, &weight, None), adapter as usize);
                for (alone, together) in alone.gradients[a].iter().zip(&got.gradients[a]) {
                    prop_assert_eq!(bits(alone), bits(together));
                }
            }
            for i in (0..m).step_by(7) {
                let alone = Batch {
                    shape: [1, n, k],
                    x: batch.x[i * k..(i + 1) * k].to_vec(),
                    dy: batch.dy[i * n..(i + 1) * n].to_vec(),
                    adapters: batch.adapters.clone(),
                    index: batch.index.as_ref().map(|index| vec![index[i]]),
                    dropout: batch.dropout.map(|dropout| dropout.with_first_token(i as u32)),
                };
                let dx = backward(&alone, &weight, None).dx;
                // The product of the low-rank factors may depend on how many tokens share it, by its roundings.
                let range = i * k..(i + 1) * k;
                assert_close("dX alone", &widened(&dx), &truth.dx[range.clone()], share, T::DTYPE);
                if batch.adapter(i).is_none() {
                    prop_assert_eq!(widened(&dx), widened(&got.dx[range]));
                }
            }
            Ok(())
        }
        check(&Batch::<f32, f32>::random(shape, &ranks, mixed, dropout, seed), nf4)?;
        check(&Batch::<bf16, f32>::random(shape, &ranks, mixed, dropout, seed), nf4)?;
    }
}

/// A layer with DoRA or AdaLoRA, number by number.
#[derive(Clone)]
struct Numbers {
    /// `[m, n, k]`.
    shape: [usize; 3],
    rank: usize,
    scaling: f64,
    x: Vec<f64>,
    dy: Vec<f64>,
    w: Vec<f64>,
    a: Vec<f64>,
    e: Vec<f64>,
    b: Vec<f64>,
    magnitude: Vec<f64>,
    inverse_norm: Vec<f64>,
}

/// One of the numbers.
type Pick = fn(&mut Numbers, usize) -> &mut f64;

impl Numbers {
    /// `Σ dY ⊙ y`, with y's row factor `magnitude / norm`. DoRA's norm stays what it is, as in training.
    fn loss(&self) -> f64 {
        let [m, n, k] = self.shape;
        let dot = |x: &[f64], row: &[f64]| x.iter().zip(row).map(|(x, w)| x * w).sum::<f64>();
        let mut loss = 0.0;
        for (x, dy) in self.x.chunks(k).zip(self.dy.chunks(n)).take(m) {
            let shrunk: Vec<f64> =
                (0..self.rank).map(|r| dot(x, &self.a[r * k..][..k]) * self.e[r]).collect();
            for (i, dy) in dy.iter().enumerate() {
                let z = dot(x, &self.w[i * k..][..k])
                    + self.scaling * dot(&shrunk, &self.b[i * self.rank..][..self.rank]);
                loss += dy * self.magnitude[i] * self.inverse_norm[i] * z;
            }
        }
        loss
    }

    /// The loss is linear in every single number, so its difference is its derivative.
    fn derivative(&self, pick: Pick, i: usize) -> f64 {
        let at = |by: f64| {
            let mut changed = self.clone();
            *pick(&mut changed, i) += by;
            changed.loss()
        };
        at(0.5) - at(-0.5)
    }

    /// Without signs: derivatives are sums of magnitudes then.
    fn magnitudes(&self) -> Self {
        let mut numbers = Self { scaling: self.scaling.abs(), ..self.clone() };
        let Self { x, dy, w, a, e, b, magnitude, .. } = &mut numbers;
        for values in [x, dy, w, a, e, b, magnitude] {
            values.iter_mut().for_each(|v| *v = v.abs());
        }
        numbers
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// DoRA and AdaLoRA in any shape, of rank 0, too: gradients are differences of the loss.
    #[test]
    fn differences_of_the_loss(
        shape in [0usize..6, 1usize..10, 1usize..11],
        rank in 0usize..6,
        [dora, nf4]: [bool; 2],
        seed: u64,
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut random = |shape: &[usize]| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::from_f32(shape, &values, DType::F32).unwrap()
        };
        let [m, n, k] = shape;
        let (x, dy, weight) = (random(&[m, k]), random(&[m, n]), random(&[n, k]));
        // No code stands for 0: DoRA divides by the norm of a row.
        let far_from_zero: Vec<f32> = weight.to_f32().iter().map(|w| w.signum() * (0.25 + 0.75 * w.abs())).collect();
        let weight = Tensor::from_f32([n, k], &far_from_zero, DType::F32).unwrap();
        let (a, b, e, magnitude) = (random(&[rank, k]), random(&[n, rank]), random(&[rank, 1]), random(&[n]));
        let adapter: Adapter = match dora {
            true => Dora::new(Lora::new(a.clone(), b.clone(), 0.75).unwrap(), magnitude.clone()).unwrap().into(),
            false => AdaLora::new(a.clone(), e.clone(), b.clone(), 5.0, 7).unwrap().into(),
        };
        let quantised = Nf4Matrix::quantize(&weight.to_f32(), [n, k], 64, &Codebook::nf4(), Nesting::Nested).unwrap();
        let (layer, weight) = match nf4 {
            true => (Layer::new(&quantised, None).unwrap(), quantised.dequantize_tensor()),
            false => (Layer::new(&weight, None).unwrap(), weight.clone()),
        };
        let ones = |count: usize| vec![1.0; count];
        let norms = || Stack::new(&[&adapter], &weight).unwrap().row_scale().unwrap().to_vec();
        let magnitudes = magnitude.to_f64();
        let numbers = Numbers {
            shape,
            rank,
            scaling: adapter.scaling(),
            x: x.to_f64(),
            dy: dy.to_f64(),
            w: weight.to_f64(),
            a: a.to_f64(),
            e: if dora { ones(rank) } else { e.to_f64() },
            b: b.to_f64(),
            inverse_norm: if dora { norms().iter().zip(&magnitudes).map(|(scale, m)| scale / m).collect() } else { ones(n) },
            magnitude: if dora { magnitudes } else { ones(n) },
        };

        let (x, dy) = (x.to_f32(), dy.to_f32());
        let forward = layer.forward(&adapter, &x, m, None).unwrap();
        let (mut gradient, mut dx) = (Gradient::zeros(&adapter), vec![f32::NAN; m * k]);
        layer.backward(&adapter, [&x, &dy], &forward, &mut gradient, Some(&mut dx)).unwrap();
        let sizes = numbers.magnitudes();
        // As for what PEFT gave, below.
        let share = 1.01 * roundings(m + n + k + rank + 12);
        let check = |what: &str, got: &[f32], pick: Pick| {
            for (i, got) in got.iter().enumerate() {
                let (truth, size) = (numbers.derivative(pick, i), sizes.derivative(pick, i));
                // The difference itself has some f64 roundings of the whole loss.
                let bound = share * size + 1e-13 * (1.0 + sizes.loss());
                prop_assert!((f64::from(*got) - truth).abs() <= bound, "{what}[{i}]: {got}, not {truth} of {size}");
            }
            Ok(())
        };
        check("dX", &dx, |n, i| &mut n.x[i])?;
        check("dA", gradient.get("lora_A").unwrap(), |n, i| &mut n.a[i])?;
        check("dB", gradient.get("lora_B").unwrap(), |n, i| &mut n.b[i])?;
        match dora {
            true => check("dm", gradient.get("lora_magnitude_vector").unwrap(), |n, i| &mut n.magnitude[i])?,
            false => check("dE", gradient.get("lora_E").unwrap(), |n, i| &mut n.e[i])?,
        }
    }
}

/// More tokens than one pass takes: the same gradients as the reference, within the bound.
#[test]
fn many_tokens() {
    let batch = Batch::<f32, f32>::random([1100, 9, 33], &[3, 5], true, Some(0.2), 3);
    let weight = vec![0.0; 9 * 33];
    let got = backward(&batch, &Weight::Dense { data: &weight, n: 9, k: 33 }, None);
    let truth = batch.truth();
    for (got, truth) in got.gradients.iter().zip(&truth.gradients) {
        assert_close("dA", &widened(&got[0]), &truth[0], roundings(1100 + 14), DType::F32);
        assert_close("dB", &widened(&got[1]), &truth[1], roundings(1100 + 38), DType::F32);
    }
    assert_close("dX", &widened(&got.dx), &truth.dx, roundings(20), DType::F32);
}

/// A layer of `train_step` with what PEFT gave for it.
struct Peft {
    file: Fixture,
    m: usize,
    adapter: Adapter,
}

impl Peft {
    fn open(name: &str) -> Self {
        let file = Fixture::open(&format!("train_step/{name}"));
        let (a, b) = (file.tensor("lora_A"), file.tensor("lora_B"));
        let scaling = file.json["scaling"].as_f64().unwrap();
        let adapter = match name {
            "adalora" => AdaLora::new(a, file.tensor("lora_E"), b, scaling, 7).unwrap().into(),
            "dora" => Dora::new(Lora::new(a, b, scaling).unwrap(), file.tensor("magnitude")).unwrap().into(),
            _ => Lora::new(a, b, scaling).unwrap().into(),
        };
        Self { m: file.shape("x")[0], adapter, file }
    }

    /// Every output and gradient, as the sum of the magnitudes that it is a sum of: what the layer gives when nothing is negative.
    /// DoRA's scale, which is that of the signed weight, comes in with dY and goes out with y.
    fn magnitudes(&self, weight: &Tensor, bias: Option<&Tensor>) -> Vec<(&'static str, Vec<f64>)> {
        let abs = |values: &[f32]| values.iter().map(|v| v.abs()).collect::<Vec<f32>>();
        let tensor = |t: &Tensor| Tensor::from_f32(t.shape(), &abs(&t.to_f32()), DType::F32).unwrap();
        let (a, b) = (tensor(self.adapter.lora_a()), tensor(self.adapter.lora_b()));
        let adapter: Adapter = match &self.adapter {
            Adapter::AdaLora(own) => AdaLora::new(a, tensor(own.lora_e()), b, own.alpha(), 7).unwrap().into(),
            own => Lora::new(a, b, own.scaling().abs()).unwrap().into(),
        };
        let n = self.adapter.out_features();
        let stack = Stack::new(&[&self.adapter], weight).unwrap();
        let scale = stack.row_scale().map_or(vec![1.0; n], <[f64]>::to_vec);
        let (x, dy): (Vec<f32>, Vec<f32>) = (self.file.get("x"), self.file.get("dY"));
        let dz: Vec<f32> = dy.iter().enumerate().map(|(i, d)| d.abs() * scale[i % n].abs() as f32).collect();

        let weight = tensor(weight);
        let layer = Layer::new(&weight, None).unwrap();
        let forward = layer.forward(&adapter, &abs(&x), self.m, None).unwrap();
        let mut gradient = Gradient::zeros(&adapter);
        let mut dx = vec![0.0; x.len()];
        layer.backward(&adapter, [&abs(&x), &dz], &forward, &mut gradient, Some(&mut dx)).unwrap();
        let bias = bias.map_or(vec![0.0; n], Tensor::to_f64);
        let scaled = |i: usize, z: f32| f64::from(z) * scale[i % n].abs() + bias[i % n].abs();
        let mut found = vec![
            ("y", forward.y.iter().enumerate().map(|(i, &z)| scaled(i, z)).collect()),
            ("dX", widened(&dx)),
            ("dA", widened(gradient.get("lora_A").unwrap())),
            ("dB", widened(gradient.get("lora_B").unwrap())),
        ];
        match &self.adapter {
            Adapter::AdaLora(_) => found.push(("dE", widened(gradient.get("lora_E").unwrap()))),
            Adapter::Dora(own) => {
                // dm[n] = sum of dY z / norm, and scale = magnitude / norm.
                let magnitude = own.magnitude().to_f64();
                let mut dm = vec![0.0; n];
                for (i, (&dz, &z)) in dz.iter().zip(&forward.y).enumerate() {
                    dm[i % n] += f64::from(dz) * f64::from(z) / magnitude[i % n].abs();
                }
                found.push(("dm", dm));
            }
            _ => {}
        }
        found
    }

    fn check<'a>(&self, layer: &Layer<'a>, weight: &Tensor, bias: Option<&Tensor>) {
        let (x, dy): (Vec<f32>, Vec<f32>) = (self.file.get("x"), self.file.get("dY"));
        let forward = layer.forward(&self.adapter, &x, self.m, None).unwrap();
        let mut gradient = Gradient::zeros(&self.adapter);
        let mut dx = vec![f32::NAN; x.len()];
        layer.backward(&self.adapter, [&x, &dy], &forward, &mut gradient, Some(&mut dx)).unwrap();
        // A term goes through no more additions than there are tokens, inputs, outputs and ranks (of two of these and the ranks, in
        // every formula), and through some products and scales; the magnitudes themselves are f32 sums of as many.
        let [n, k] = [self.adapter.out_features(), self.adapter.in_features()];
        let share = 1.01 * roundings(self.m + n + k + self.adapter.rank() + 12);
        for (what, magnitudes) in self.magnitudes(weight, bias) {
            let part = match what {
                "dA" => "lora_A",
                "dB" => "lora_B",
                "dE" => "lora_E",
                _ => "lora_magnitude_vector",
            };
            let got = match what {
                "y" => &forward.y[..],
                "dX" => &dx,
                _ => gradient.get(part).unwrap(),
            };
            let wanted = self.file.get::<f64>(&format!("f64.{what}"));
            assert_eq!((got.len(), magnitudes.len()), (wanted.len(), wanted.len()), "{what}");
            for ((got, wanted), magnitude) in got.iter().zip(wanted).zip(magnitudes) {
                let off = (f64::from(*got) - wanted).abs();
                assert!(off <= share * magnitude, "{what}: {got} {wanted} of {magnitude}");
            }
        }
        // Batches add up.
        let first = gradient.clone();
        layer.backward(&self.adapter, [&x, &dy], &forward, &mut gradient, None).unwrap();
        for ((_, twice), (_, once)) in gradient.iter().zip(first.iter()) {
            assert!(twice.iter().zip(once).all(|(twice, once)| *twice == 2.0 * once));
        }
    }
}

/// LoRA over bitsandbytes' 4 bits, DoRA and AdaLoRA over a dense weight with a bias.
#[test]
fn as_peft() {
    for name in ["lora_a", "lora_b"] {
        let case = Peft::open(name);
        let [k, n] = [case.adapter.in_features(), case.adapter.out_features()];
        let absmax = Absmax::Plain(case.file.get("base.absmax"));
        let packed = case.file.get("base.packed");
        let nf4 = Nf4Matrix::from_parts([n, k], packed, absmax, 64, Codebook::nf4(), DType::F32).unwrap();
        case.check(&Layer::new(&nf4, None).unwrap(), &nf4.dequantize_tensor(), None);
    }
    for name in ["dora", "adalora"] {
        let case = Peft::open(name);
        let (weight, bias) = (case.file.tensor("weight"), case.file.tensor("bias"));
        case.check(&Layer::new(&weight, Some(&bias)).unwrap(), &weight, Some(&bias));
    }
}

/// The gradient of `lora_B.bias` is the difference of the loss, in which it is linear.
#[test]
fn bias_of_lora_b() {
    let (m, n, k) = (3, 4, 5);
    let tensor = |shape: &[usize], seed: usize| {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|i| ((i * 7 + seed) % 13) as f32 / 16.0).collect();
        Tensor::from_f32(shape, &values, DType::F32).unwrap()
    };
    let weight = tensor(&[n, k], 1);
    let adapter = |bias: &Tensor| {
        let lora = Lora::new(tensor(&[2, k], 2), tensor(&[n, 2], 3), 0.5).unwrap();
        Adapter::from(lora.with_lora_bias(bias.clone()).unwrap())
    };
    let layer = Layer::new(&weight, None).unwrap();
    let (x, dy) = (tensor(&[m, k], 4).to_f32(), tensor(&[m, n], 5).to_f32());
    let bias = tensor(&[n], 6);
    let loss = |bias: &Tensor| -> f64 {
        let y = layer.forward(&adapter(bias), &x, m, None).unwrap().y;
        y.iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
    };
    let forward = layer.forward(&adapter(&bias), &x, m, None).unwrap();
    let mut gradient = Gradient::zeros(&adapter(&bias));
    layer.backward(&adapter(&bias), [&x, &dy], &forward, &mut gradient, None).unwrap();
    for (i, got) in gradient.get("lora_B.bias").unwrap().iter().enumerate() {
        let mut raised = bias.to_f32();
        raised[i] += 1.0;
        let wanted = loss(&Tensor::from_f32([n], &raised, DType::F32).unwrap()) - loss(&bias);
        assert!((f64::from(*got) - wanted).abs() <= 1e-5, "{got} {wanted}");
    }
}

/// Activations in bf16 over factors in f32, and all in bf16: the gradients are f32 and those of the rounded numbers.
#[test]
fn narrow_activations() {
    let case = Peft::open("lora_a");
    let [k, n] = [case.adapter.in_features(), case.adapter.out_features()];
    let absmax = Absmax::Plain(case.file.get("base.absmax"));
    let nf4 =
        Nf4Matrix::from_parts([n, k], case.file.get("base.packed"), absmax, 64, Codebook::nf4(), DType::F32)
            .unwrap();
    let layer = Layer::new(&nf4, None).unwrap();
    let narrow = |tensor: &Tensor| Tensor::from_f32(tensor.shape(), &tensor.to_f32(), DType::BF16).unwrap();
    let (a, b) = (narrow(case.adapter.lora_a()), narrow(case.adapter.lora_b()));
    let all = Adapter::from(Lora::new(a, b, case.adapter.scaling()).unwrap());
    let (x, dy): (Vec<bf16>, Vec<bf16>) =
        (round_to(&case.file.get::<f32>("x")), round_to(&case.file.get::<f32>("dY")));
    for adapter in [&case.adapter, &all] {
        let forward = layer.forward(adapter, &x, case.m, None).unwrap();
        let mut gradient = Gradient::zeros(adapter);
        layer.backward(adapter, [&x, &dy], &forward, &mut gradient, None).unwrap();
        let batch = Batch::<bf16, f32> {
            shape: [case.m, n, k],
            x: x.clone(),
            dy: dy.clone(),
            adapters: vec![training::Owned {
                a: adapter.lora_a().to_f32(),
                b: adapter.lora_b().to_f32(),
                rank: adapter.rank(),
                scaling: adapter.scaling() as f32,
            }],
            index: None,
            dropout: None,
        };
        let truth = batch.truth();
        let close = |part: &str, truth: &[Sum], count: usize| {
            assert_close(part, &widened(gradient.get(part).unwrap()), truth, roundings(count), DType::F32);
        };
        close("lora_A", &truth.gradients[0][0], n + case.m + 5);
        close("lora_B", &truth.gradients[0][1], k + case.m + 5);
    }
}

#[test]
fn what_does_not_fit() {
    fn refused<R>(argument: &str, result: Result<R, Error>) {
        match result {
            Err(Error::Argument { argument: got, .. }) => assert_eq!(got, argument),
            Err(other) => panic!("{argument}: {other}"),
            Ok(_) => panic!("{argument} was taken"),
        }
    }
    let tensor = |shape: &[usize], dtype: DType| {
        Tensor::from_f32(shape, &vec![0.5; shape.iter().product()], dtype).unwrap()
    };
    let f32s = |shape: &[usize]| tensor(shape, DType::F32);
    let (weight, flat, short) = (f32s(&[4, 3]), f32s(&[12]), f32s(&[3]));
    refused("base", Layer::new(&flat, None));
    refused("bias", Layer::new(&weight, Some(&short)));
    let lora = Lora::new(f32s(&[2, 3]), f32s(&[4, 2]), 1.0).unwrap();
    let adapter = Adapter::from(lora.clone());
    let layer = Layer::new(&weight, None).unwrap();
    let (x, dy) = ([1.0f32; 6], [1.0f32; 8]);
    refused("adapter.fan_in_fan_out", layer.forward(&lora.with_fan_in_fan_out(true).into(), &x, 2, None));
    let other = Adapter::from(Lora::new(f32s(&[2, 4]), f32s(&[3, 2]), 1.0).unwrap());
    refused("adapter", layer.forward(&other, &x, 2, None));
    refused("x", layer.forward(&adapter, &x[1..], 2, None));
    refused("x", layer.forward(&adapter, &x, usize::MAX, None));
    refused("base", layer.forward(&adapter, &[bf16::ONE; 6], 2, None));
    let narrow_bias = tensor(&[4], DType::BF16);
    refused("bias", Layer::new(&weight, Some(&narrow_bias)).unwrap().forward(&adapter, &x, 2, None));

    let forward = layer.forward(&adapter, &x, 2, None).unwrap();
    let mut gradient = Gradient::zeros(&adapter);
    refused("dy", layer.backward(&adapter, [&x, &dy[1..]], &forward, &mut gradient, None));
    refused("x", layer.backward(&adapter, [&x[1..], &dy], &forward, &mut gradient, None));
    refused("dx", layer.backward(&adapter, [&x, &dy], &forward, &mut gradient, Some(&mut [0.0; 5])));
    assert_eq!(gradient, Gradient::zeros(&adapter));
    let mut wrong = Gradient::zeros(&other);
    refused("gradient", layer.backward(&adapter, [&x, &dy], &forward, &mut wrong, None));

    // The arguments of the product itself.
    let batch = Batch::<f32, f32>::random([2, 4, 3], &[2], true, None, 1);
    let adapters = batch.low_ranks();
    let data = weight.as_slice::<f32>().unwrap();
    let dense = Weight::Dense { data, n: 4, k: 3 };
    let extras = MatmulExtras { adapters: &adapters, ..MatmulExtras::default() };
    let call = |extras: &MatmulExtras<'_, f32>, rank: usize, lens: [usize; 2]| {
        let (mut a, mut b) = (vec![0.0; lens[0]], vec![0.0; lens[1]]);
        let mut gradients = [LoraGradient { lora_a: &mut a, lora_b: &mut b, rank }];
        let result = fast::backward([&batch.x, &batch.dy], 2, &dense, extras, true, &mut gradients, None);
        assert!(a.iter().chain(&b).all(|g| *g == 0.0) || result.is_ok());
        result
    };
    call(&extras, 2, [6, 8]).unwrap();
    refused("gradients[0].rank", call(&extras, 3, [6, 8]));
    refused("gradients[0].lora_a", call(&extras, 2, [5, 8]));
    refused("gradients[0].lora_b", call(&extras, 2, [6, 9]));
    refused("gradients", call(&MatmulExtras::default(), 2, [6, 8]));
    refused("row_scale", call(&MatmulExtras { row_scale: Some(&[1.0; 4]), ..extras }, 2, [6, 8]));
    refused("adapter_index[1]", call(&MatmulExtras { adapter_index: Some(&[0, 1]), ..extras }, 2, [6, 8]));
}
