//! The time of a training step of one 4-bit layer with an adapter on the CPU: forward, backward with the gradient of the inputs,
//! AdamW. `benches/peers/train_step.py` runs it beside PEFT.
//!
//! `cargo bench --bench training_step -- OUT IN TOKENS RANK` prints the milliseconds of the fastest of some steps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lora_kernels::adapter::{Adapter, Lora};
use lora_kernels::cpu::AdamW;
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::train::{Gradient, Layer, MomentType, NotFinite, Optimizer, parameters};
use lora_kernels::{DType, Result, Tensor};

/// At least as many steps, and as long.
const STEPS: usize = 3;
const TIME: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let sizes: Vec<usize> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let &[n, k, m, rank] = &sizes[..] else {
        println!("wanted OUT IN TOKENS RANK; without them a toy runs once");
        return run([64, 96, 8, 4], 1, Duration::ZERO).map(drop);
    };
    println!("{:.3}", run([n, k, m, rank], STEPS, TIME)?);
    Ok(())
}

/// Milliseconds of the fastest step.
fn run([n, k, m, rank]: [usize; 4], steps: usize, time: Duration) -> Result<f64> {
    let values = |count: usize| -> Vec<f32> { (0..count).map(|i| (i as f32 * 0.7).sin() * 0.05).collect() };
    let tensor = |shape: [usize; 2]| Tensor::from_f32(shape, &values(shape[0] * shape[1]), DType::F32);
    let weight = Nf4Matrix::quantize_tensor(&tensor([n, k])?, 64, &Codebook::nf4(), Nesting::Nested)?;
    let layer = Layer::new(&weight, None)?;
    let adapter = Adapter::from(Lora::new(tensor([rank, k])?, tensor([n, rank])?, 2.0)?);
    let mut adapters = BTreeMap::from([("layer".to_owned(), adapter)]);
    let mut gradients = BTreeMap::from([("layer".to_owned(), Gradient::zeros(&adapters["layer"]))]);
    let mut optimizer = Optimizer::new(AdamW::default(), MomentType::F32);
    let (x, mut dx) = (values(m * k), vec![0.0; m * k]);
    let (begin, mut fastest, mut count) = (Instant::now(), f64::INFINITY, 0);
    while count < steps || begin.elapsed() < time {
        let start = Instant::now();
        let adapter = &adapters["layer"];
        let gradient = gradients.get_mut("layer").expect("it is there");
        gradient.clear();
        let forward = layer.forward(adapter, &x, m, None)?;
        // The gradient of half the sum of squares is the output itself.
        layer.backward(adapter, [&x, &forward.y], &forward, gradient, Some(&mut dx))?;
        let list = parameters(&mut adapters, &gradients)?;
        optimizer.step(list, 1e-4, None, NotFinite::Refuse)?;
        fastest = fastest.min(start.elapsed().as_secs_f64() * 1e3);
        count += 1;
    }
    Ok(fastest)
}
