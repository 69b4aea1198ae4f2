//! Training goes on where PEFT left it: `cargo run --release --example continue_training [-- --resume] [--steps N] [--out FOLDER]`
//!
//! A layer of all-MiniLM-L6-v2 has been brought to 4 bits, and an adapter that PEFT has begun to train (`examples/data`) is to make
//! up for it: on real activations, the layer in 4 bits with its adapter shall give what the layer gave in f32. Every run leaves the
//! adapter in PEFT's format, the state of the training beside it, the outputs, and the curve of the loss as an SVG; with `--resume`
//! it goes on from there, exactly as if it had not stopped.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use lora_kernels::cpu::{AdamW, Dropout};
use lora_kernels::formats::{peft, safetensors::File};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::train::{Gradient, Layer, MomentType, NotFinite, Optimizer, TrainingState, parameters};
use lora_kernels::{Error, Result, Tensor};

const MODULE: &str = "encoder.layer.0.attention.self.query";
const LEARNING_RATE: f64 = 1e-3;
const DROPOUT: f32 = 0.05;

fn main() -> Result<()> {
    let options = Options::parse()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let data = File::open(root.join("tests/data/real_minilm/w0.safetensors"))?;
    let (dense, bias, x) = (data.tensor("weight")?, data.tensor("bias")?, data.tensor("x")?);
    let target = linear(&x, &dense, &bias);
    let weight = Nf4Matrix::quantize_tensor(&dense, 64, &Codebook::nf4(), Nesting::Plain)?;
    let layer = Layer::new(&weight, Some(&bias))?;
    let (tokens, x) = (x.shape()[0], x.to_f32());

    let (mut file, mut state, mut losses) = if options.resume {
        let (file, state) = TrainingState::load(&options.out)?;
        (file, state, read_losses(&options.out.join("loss.csv"))?)
    } else {
        let optimizer = Optimizer::new(AdamW::default(), MomentType::Blockwise);
        let state = TrainingState { step: 0, seed: 1, offset: 0, optimizer, allocator: None };
        (peft::load(root.join("examples/data/minilm_lora"))?, state, Vec::new())
    };

    let loss = |y: &[f32]| {
        let squares = y.iter().zip(&target).map(|(y, t)| f64::from(y - t).powi(2));
        squares.sum::<f64>() / y.len() as f64
    };
    let bar = ProgressBar::new(options.steps);
    let style = ProgressStyle::with_template("{bar:40} step {pos}/{len}  loss {msg}  {eta} left");
    bar.set_style(style.expect("the template is right"));
    for _ in 0..options.steps {
        let adapter = &file.adapters[MODULE];
        losses.push(loss(&layer.forward(adapter, &x, tokens, None)?.y));
        let dropout = Dropout::new(DROPOUT, state.seed, state.offset)?;
        let forward = layer.forward(adapter, &x, tokens, Some(dropout))?;
        let share = 2.0 / forward.y.len() as f32;
        let dy: Vec<f32> = forward.y.iter().zip(&target).map(|(y, t)| share * (y - t)).collect();
        let mut gradient = Gradient::zeros(adapter);
        layer.backward(adapter, [&x, &dy], &forward, &mut gradient, None)?;

        let gradients = BTreeMap::from([(MODULE.to_owned(), gradient)]);
        let list = parameters(&mut file.adapters, &gradients)?;
        state.optimizer.step(list, LEARNING_RATE, Some(1.0), NotFinite::Refuse)?;
        (state.step, state.offset) = (state.step + 1, state.offset + 1);
        bar.set_message(format!("{:.3e}", losses[losses.len() - 1]));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let y = layer.forward(&file.adapters[MODULE], &x, tokens, None)?.y;
    losses.push(loss(&y));

    state.save(&options.out, &file)?;
    let write = |name: &str, bytes: &[u8]| {
        let path = options.out.join(name);
        fs::write(&path, bytes).map_err(|source| Error::Io { path, source })
    };
    write("loss.csv", csv(&losses).as_bytes())?;
    write("loss.svg", curve(&losses).as_bytes())?;
    write("outputs.safetensors", &outputs(&y, tokens))?;
    println!(
        "step {}: the loss fell from {:.3e} to {:.3e}; adapter, state and loss.svg are in {}",
        state.step,
        losses[0],
        losses[losses.len() - 1],
        options.out.display()
    );
    Ok(())
}

struct Options {
    steps: u64,
    resume: bool,
    out: PathBuf,
}

impl Options {
    fn parse() -> Result<Self> {
        let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/continue_training");
        let mut options = Self { steps: 400, resume: false, out };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                "--resume" => options.resume = true,
                "--out" => options.out = words.next().unwrap_or_default().into(),
                "--steps" => {
                    let count = words.next().unwrap_or_default();
                    let wrong = |_| Error::argument("--steps", "a whole number", &count);
                    options.steps = count.parse().map_err(wrong)?;
                }
                _ => return Err(Error::argument("arguments", "--resume, --steps N or --out FOLDER", word)),
            }
        }
        Ok(options)
    }
}

/// What the layer gave before it was quantised.
fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Vec<f32> {
    let (x, weight, bias) = (x.to_f64(), weight.to_f64(), bias.to_f64());
    let k = weight.len() / bias.len();
    let output = |x: &[f64], n: usize| -> f64 {
        bias[n] + x.iter().zip(&weight[n * k..]).map(|(x, w)| x * w).sum::<f64>()
    };
    x.chunks(k).flat_map(|x| (0..bias.len()).map(move |n| (x, n))).map(|(x, n)| output(x, n) as f32).collect()
}

fn outputs(y: &[f32], tokens: usize) -> Vec<u8> {
    let bytes: Vec<u8> = y.iter().flat_map(|y| y.to_le_bytes()).collect();
    let shape = vec![tokens, y.len() / tokens];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &bytes);
    safetensors::serialize([("y", view.expect("as many bytes"))], None).expect("one tensor")
}

fn csv(losses: &[f64]) -> String {
    losses.iter().enumerate().fold("step,loss\n".into(), |mut text: String, (step, loss)| {
        writeln!(text, "{step},{loss:e}").expect("a string takes it");
        text
    })
}

/// The losses before each step; the last one is measured again.
fn read_losses(path: &Path) -> Result<Vec<f64>> {
    let text = fs::read_to_string(path).map_err(|source| Error::Io { path: path.into(), source })?;
    let number = |line: &str| line.split_once(',')?.1.parse().ok();
    let losses: Option<Vec<f64>> = text.lines().skip(1).map(number).collect();
    let mut losses = losses.ok_or_else(|| Error::format(path.display().to_string(), "step,loss", "other"))?;
    losses.pop();
    Ok(losses)
}

/// The losses over the steps, on a logarithmic scale.
fn curve(losses: &[f64]) -> String {
    let (width, height, margin) = (720.0, 400.0, 60.0);
    let logs: Vec<f64> = losses.iter().map(|loss| loss.max(f64::MIN_POSITIVE).log10()).collect();
    let low = logs.iter().copied().fold(f64::INFINITY, f64::min).floor();
    let high = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max).ceil().max(low + 1.0);
    let last = (losses.len() - 1).max(1) as f64;
    let x = |step: f64| margin + step / last * (width - 2.0 * margin);
    let y = |log: f64| height - margin - (log - low) / (high - low) * (height - 2.0 * margin);
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">
<rect width="{width}" height="{height}" fill="white"/>
<text x="{}" y="30" text-anchor="middle" font-size="15">{MODULE} in 4 bits: mean squared error of its outputs</text>
"#,
        width / 2.0
    );
    for decade in low as i32..=high as i32 {
        let at = y(f64::from(decade));
        let _ = writeln!(
            svg,
            r##"<path d="M{} {at:.1}H{}" stroke="#ccc"/><text x="{}" y="{:.1}" text-anchor="end">1e{decade}</text>"##,
            margin,
            width - margin,
            margin - 8.0,
            at + 4.0
        );
    }
    for quarter in 0..=4 {
        let step = (last * f64::from(quarter) / 4.0).round();
        let _ = writeln!(
            svg,
            r#"<text x="{:.1}" y="{}" text-anchor="middle">{step}</text>"#,
            x(step),
            height - margin + 22.0
        );
    }
    let points: String =
        logs.iter().enumerate().map(|(i, log)| format!("{:.1},{:.1} ", x(i as f64), y(*log))).collect();
    let _ = writeln!(
        svg,
        r##"<polyline points="{}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>
<text x="{}" y="{}" text-anchor="middle">step</text>
</svg>"##,
        points.trim_end(),
        width / 2.0,
        height - 12.0
    );
    svg
}
