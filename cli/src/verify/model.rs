//! Whole models: token numbers to logits through every layer, as transformers and PEFT compute them. Linear layers run on the
//! engine; what lies between them is computed here in f64 and rounded to f32.
//!
//! How far may f32 arithmetic be from the formula after so many steps? The formula is evaluated [`RUNS`] times more, and in each
//! run the result of each step is moved by a random amount, up to what that step's roundings may come to ([`bounds`], for a
//! single step). The spread of the logits over the runs is how far such errors carry (Monte Carlo arithmetic: Parker 1997);
//! the bound is [`LAMBDA`] standard deviations, as elsewhere in [`bounds`].

use std::f64::consts::FRAC_2_PI;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use lora_kernels::adapter::Adapter;
use lora_kernels::formats::peft::AdapterFile;
use lora_kernels::{DType, Tensor};

use super::bounds::{self, Factors, accumulation};
use super::engine::{Direction, Engine};
use super::layer::{Frozen, Layer, from_f64, transposed};
use super::peft::base_tensor;
use super::report::Case;
use super::truth::{Output, transpose};
use crate::tensors::{Sidecar, TensorFile};

/// Unit roundoff of f32.
const U: f64 = DType::F32.unit_roundoff();
/// Runs with moved results.
const RUNS: usize = 16;
/// Standard deviations that an error may come to.
const LAMBDA: f64 = 8.0;

/// How the adapter takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Not at all: PEFT with its adapters disabled. Trained biases stay in place, `modules_to_save` do not.
    Disabled,
    /// Beside the weights.
    Beside,
    /// Merged into them.
    Merged,
}

/// A model with an adapter.
pub struct Model<'a> {
    /// `config.json` of the base.
    pub config: &'a Sidecar,
    /// Its weights.
    pub base: &'a TensorFile,
    /// The adapter.
    pub adapter: &'a AdapterFile,
}

impl Model<'_> {
    /// Whether the layers of such a model are known here.
    pub fn check_architecture(&self) -> Result<()> {
        let architecture = self.config.text("model_type")?;
        ensure!(["llama", "gpt2"].contains(&architecture), "wanted a llama or a gpt2, got {architecture}");
        Ok(())
    }

    /// Compares the stored logits `name` with the formula, and the engine's with them.
    pub fn check(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        tokens: &[i64],
        how: How,
        name: &str,
        stored: &[f64],
    ) -> Result<()> {
        self.check_architecture()?;
        let mut pass = Pass { model: self, engine, how, case, random: Random(1) };
        let logits = match self.config.text("model_type")? {
            "llama" => pass.llama(tokens)?,
            _ => pass.gpt2(tokens)?,
        };
        let Some(Rows { exact, moved, ours, .. }) = logits else { return Ok(()) };
        let bound = |i: usize| {
            let squares: f64 = moved.iter().map(|run| (run[i] - exact[i]).powi(2)).sum();
            LAMBDA * (squares / RUNS as f64).sqrt()
        };
        case.close(&format!("{name} (formula)"), stored, &exact, bound);
        case.close(name, &ours, stored, |i| 2.0 * bound(i));
        Ok(())
    }

    /// A tensor of the model.
    fn tensor(&self, name: &str, how: How) -> Result<Option<Tensor>> {
        let (module, what) = name.rsplit_once('.').context("a name ends in what it names")?;
        let replaced = how != How::Disabled || what == "bias";
        match self.adapter.base_tensors.get(name).filter(|_| replaced) {
            Some(tensor) => Ok(Some(tensor.clone())),
            None => base_tensor(self.base, module, what)?.map(|t| t.tensor()).transpose(),
        }
    }
}

/// Rows of activations, one value after the other: by the formula, in the runs with moved results, and by way of the engine.
#[derive(Clone)]
struct Rows {
    width: usize,
    exact: Vec<f64>,
    moved: Vec<Vec<f64>>,
    ours: Vec<f64>,
}

impl Rows {
    fn count(&self) -> usize {
        self.exact.len() / self.width
    }
}

/// Numbers that look random, and are the same every time (splitmix64).
struct Random(u64);

impl Random {
    /// Between -1 and 1.
    fn number(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// What moves results: nothing, or a random share of a bound.
type Move<'a> = dyn FnMut(f64) -> f64 + 'a;

/// Rounded to f32.
fn single(values: Vec<f64>) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v as f32)).collect()
}

/// One forward pass. Its steps give nothing where the engine lacks an operation; the case says so then.
struct Pass<'a> {
    model: &'a Model<'a>,
    engine: &'a dyn Engine,
    how: How,
    case: &'a mut Case,
    random: Random,
}

impl Pass<'_> {
    fn llama(&mut self, tokens: &[i64]) -> Result<Option<Rows>> {
        let config = self.model.config;
        let eps = config.number("rms_norm_eps")?;
        let (heads, shared) = (config.size("num_attention_heads")?, config.size("num_key_value_heads")?);
        ensure!(config.text("hidden_act")? == "silu", "config.json: wanted hidden_act silu");
        let theta = match config.has("rope_parameters") {
            true => config.object("rope_parameters")?.number("rope_theta")?,
            false => config.number("rope_theta")?,
        };
        let Some(mut x) = self.embed("model.embed_tokens", tokens)? else { return Ok(None) };
        for layer in 0..config.size("num_hidden_layers")? {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let normed = self.norm(&name("input_layernorm"), &x, eps, false)?;
            let q = self.linear(&name("self_attn.q_proj"), &normed)?;
            let k = self.linear(&name("self_attn.k_proj"), &normed)?;
            let v = self.linear(&name("self_attn.v_proj"), &normed)?;
            let (Some(q), Some(k), Some(v)) = (q, k, v) else { return Ok(None) };
            let (q, k) = (self.rotate(&q, heads, theta), self.rotate(&k, shared, theta));
            let attended = self.attention(&q, &k, &v, heads, shared);
            let Some(out) = self.linear(&name("self_attn.o_proj"), &attended)? else { return Ok(None) };
            x = self.add(&x, &out);
            let normed = self.norm(&name("post_attention_layernorm"), &x, eps, false)?;
            let gate = self.linear(&name("mlp.gate_proj"), &normed)?;
            let up = self.linear(&name("mlp.up_proj"), &normed)?;
            let (Some(gate), Some(up)) = (gate, up) else { return Ok(None) };
            // An exponential right to two units, a sum, a division, two products.
            let gated = self.zip(
                &gate,
                &up,
                |gate, up| gate / (1.0 + (-gate).exp()) * up,
                |_, _, y| 6.0 * U * y.abs(),
            );
            let Some(down) = self.linear(&name("mlp.down_proj"), &gated)? else { return Ok(None) };
            x = self.add(&x, &down);
        }
        let normed = self.norm("model.norm", &x, eps, false)?;
        match self.model.tensor("lm_head.weight", self.how)? {
            Some(_) => self.linear("lm_head", &normed),
            None => self.tied_head("model.embed_tokens", &normed),
        }
    }

    fn gpt2(&mut self, tokens: &[i64]) -> Result<Option<Rows>> {
        let config = self.model.config;
        let (eps, heads) = (config.number("layer_norm_epsilon")?, config.size("n_head")?);
        ensure!(config.text("activation_function")? == "gelu_new", "config.json: wanted gelu_new");
        let positions: Vec<i64> = (0..tokens.len() as i64).collect();
        let words = self.embed("transformer.wte", tokens)?;
        let places = self.embed("transformer.wpe", &positions)?;
        let (Some(words), Some(places)) = (words, places) else { return Ok(None) };
        let mut x = self.add(&words, &places);
        for layer in 0..config.size("n_layer")? {
            let name = |part: &str| format!("transformer.h.{layer}.{part}");
            let normed = self.norm(&name("ln_1"), &x, eps, true)?;
            let Some(qkv) = self.linear(&name("attn.c_attn"), &normed)? else { return Ok(None) };
            let third = qkv.width / 3;
            let [q, k, v] = [0, 1, 2].map(|i| columns(&qkv, i * third..(i + 1) * third));
            let attended = self.attention(&q, &k, &v, heads, heads);
            let Some(out) = self.linear(&name("attn.c_proj"), &attended)? else { return Ok(None) };
            x = self.add(&x, &out);
            let normed = self.norm(&name("ln_2"), &x, eps, true)?;
            let Some(up) = self.linear(&name("mlp.c_fc"), &normed)? else { return Ok(None) };
            // The argument of tanh takes six roundings, of which tanh passes on at most half; 1 + tanh cancels, so that what
            // it is off by counts in units of x.
            let gelu = |x: f64| 0.5 * x * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            let bent = self.zip(&up, &up, |x, _| gelu(x), |x, _, _| 8.0 * U * x.abs());
            let Some(down) = self.linear(&name("mlp.c_proj"), &bent)? else { return Ok(None) };
            x = self.add(&x, &down);
        }
        let normed = self.norm("transformer.ln_f", &x, eps, true)?;
        self.tied_head("transformer.wte", &normed)
    }

    fn weight(&self, name: &str) -> Result<Tensor> {
        self.model.tensor(name, self.how)?.with_context(|| format!("the model has no `{name}`"))
    }

    /// The adapter on a module, if it takes part.
    fn adapter(&self, module: &str) -> Option<&Adapter> {
        self.model.adapter.adapters.get(module).filter(|_| self.how != How::Disabled)
    }

    /// A step without products: `step` computes all rows of some inputs.
    fn step(
        &mut self,
        inputs: &[&Rows],
        width: usize,
        step: impl Fn(&[&[f64]], &mut Move<'_>) -> Vec<f64>,
    ) -> Rows {
        let exact: Vec<&[f64]> = inputs.iter().map(|rows| &rows.exact[..]).collect();
        let ours: Vec<&[f64]> = inputs.iter().map(|rows| &rows.ours[..]).collect();
        let random = &mut self.random;
        let moved = (0..RUNS).map(|run| {
            let moved: Vec<&[f64]> = inputs.iter().map(|rows| &rows.moved[run][..]).collect();
            step(&moved, &mut |bound| bound * random.number())
        });
        let moved = moved.collect();
        Rows { width, exact: step(&exact, &mut |_| 0.0), moved, ours: single(step(&ours, &mut |_| 0.0)) }
    }

    fn zip(
        &mut self,
        a: &Rows,
        b: &Rows,
        f: impl Fn(f64, f64) -> f64,
        bound: impl Fn(f64, f64, f64) -> f64,
    ) -> Rows {
        self.step(&[a, b], a.width, |inputs, off| {
            let pairs = inputs[0].iter().zip(inputs[1]);
            let value = |(&a, &b): (&f64, &f64)| {
                let y = f(a, b);
                y + off(bound(a, b, y))
            };
            pairs.map(value).collect()
        })
    }

    fn add(&mut self, a: &Rows, b: &Rows) -> Rows {
        self.zip(a, b, |a, b| a + b, |_, _, y| U * y.abs())
    }

    /// A table; with an adapter on it, the merged table.
    fn table(&mut self, module: &str) -> Result<Option<Table>> {
        let table = self.weight(&format!("{module}.weight"))?;
        let [vocabulary, width] = *table.shape() else { bail!("{module}: wanted a matrix") };
        let Some(adapter) = self.adapter(module) else {
            let (values, error) = (table.to_f64(), vec![0.0; table.numel()]);
            return Ok(Some(Table { vocabulary, width, exact: values.clone(), error, ours: values }));
        };
        let layer = Layer::new(Frozen::Dense(transposed(&table)?), None).with_adapter(adapter, DType::F32)?;
        let merged = layer.merged(DType::F32);
        let rows = |values: Vec<f64>| transpose(&values, width, vocabulary);
        let exact = rows(merged.iter().map(|t| t.w).collect());
        let error = rows(merged.iter().map(|t| bounds::merge(DType::F32, t)).collect());
        let merged = self.engine.merge(Direction::Merge, &table, layer.low_rank(), None, true);
        let Some(merged) = self.case.offered(merged)? else { return Ok(None) };
        Ok(Some(Table { vocabulary, width, exact, error, ours: merged.to_f64() }))
    }

    /// Rows of a table; PEFT adds an adapter's part to the looked-up rows.
    fn embed(&mut self, module: &str, tokens: &[i64]) -> Result<Option<Rows>> {
        let Some(table) = self.table(module)? else { return Ok(None) };
        let (vocabulary, width) = (table.vocabulary, table.width);
        let row = |&token: &i64| {
            let token = usize::try_from(token).ok().filter(|&token| token < vocabulary);
            token.map(|token| token * width..(token + 1) * width).context("a token that is not in the table")
        };
        let rows: Vec<Range<usize>> = tokens.iter().map(row).collect::<Result<_>>()?;
        let look_up =
            |table: &[f64]| rows.iter().flat_map(|row| table[row.clone()].to_vec()).collect::<Vec<_>>();
        let (exact, error, ours) = (look_up(&table.exact), look_up(&table.error), look_up(&table.ours));
        let moved = (0..RUNS)
            .map(|_| exact.iter().zip(&error).map(|(v, e)| v + e * self.random.number()).collect())
            .collect();
        Ok(Some(Rows { width, exact, moved, ours }))
    }

    /// A head whose weight is the table of words. Merging an adapter into the table changes it; beside the table, the adapter
    /// only takes part where words are looked up.
    fn tied_head(&mut self, module: &str, x: &Rows) -> Result<Option<Rows>> {
        if self.how != How::Merged {
            let table = self.weight(&format!("{module}.weight"))?;
            return self.product(x, |_| Ok(Layer::new(Frozen::Dense(table.clone()), None)));
        }
        let Some(table) = self.table(module)? else { return Ok(None) };
        self.product(x, |run| {
            let values = match run {
                Run::Ours => table.ours.clone(),
                Run::Exact => table.exact.clone(),
                Run::Moved(random) => {
                    table.exact.iter().zip(&table.error).map(|(v, e)| v + e * random.number()).collect()
                }
            };
            let weight = from_f64(&[table.vocabulary, table.width], &values)?;
            Ok(Layer::new(Frozen::Dense(weight), None))
        })
    }

    /// A linear layer of the model, with its adapter beside it or merged.
    fn linear(&mut self, module: &str, x: &Rows) -> Result<Option<Rows>> {
        let stored = self.weight(&format!("{module}.weight"))?;
        // GPT-2 stores its weights [in, out].
        let turned = self.model.config.text("model_type")? == "gpt2";
        let weight = if turned { transposed(&stored)? } else { stored };
        let bias = self.model.tensor(&format!("{module}.bias"), self.how)?;
        let plain = Layer::new(Frozen::Dense(weight.clone()), bias.clone());
        let layer = match self.adapter(module) {
            None => return self.product(x, |_| Ok(plain.clone())),
            Some(adapter) => plain.with_adapter(adapter, DType::F32)?,
        };
        if self.how == How::Beside {
            return self.product(x, |_| Ok(layer.clone()));
        }
        let (n, k) = layer.shape();
        let Some(scale) = layer.row_scale(self.case, self.engine)? else { return Ok(None) };
        let ours = self.engine.merge(Direction::Merge, &weight, layer.low_rank(), scale.as_deref(), false);
        let Some(ours) = self.case.offered(ours)? else { return Ok(None) };
        let bias = layer.merged_bias().map(|b| from_f64(&[n], &b)).transpose()?.or(bias);
        let merged = layer.merged(DType::F32);
        self.product(x, |run| {
            let weight = match run {
                Run::Ours => ours.clone(),
                Run::Exact => from_f64(&[n, k], &merged.iter().map(|t| t.w).collect::<Vec<_>>())?,
                Run::Moved(random) => {
                    let moved = merged.iter().map(|t| t.w + bounds::merge(DType::F32, t) * random.number());
                    from_f64(&[n, k], &moved.collect::<Vec<_>>())?
                }
            };
            Ok(Layer::new(Frozen::Dense(weight), bias.clone()))
        })
    }

    /// The product with the layer that each run has.
    fn product(&mut self, x: &Rows, layer: impl Fn(Run<'_>) -> Result<Layer>) -> Result<Option<Rows>> {
        let shape = [x.count(), x.width];
        let here = layer(Run::Ours)?;
        ensure!(here.shape().1 == x.width, "a layer of {} inputs after {}", here.shape().1, x.width);
        let inputs = from_f64(&shape, &x.ours)?;
        let slack = here.slack(self.engine, &inputs)?;
        let Some(ours) = here.forward(self.case, self.engine, &inputs)? else { return Ok(None) };
        let bound = |t: &Output| {
            let packages = bounds::forward_packages(DType::F32, Factors::F32, t);
            packages.max(bounds::forward(DType::F32, slack, t))
        };
        let exact = layer(Run::Exact)?.truth(&from_f64(&shape, &x.exact)?).iter().map(|t| t.y).collect();
        let mut moved = Vec::with_capacity(RUNS);
        for inputs in &x.moved {
            let truth = layer(Run::Moved(&mut self.random))?.truth(&from_f64(&shape, inputs)?);
            moved.push(truth.iter().map(|t| t.y + bound(t) * self.random.number()).collect());
        }
        Ok(Some(Rows { width: here.shape().0, exact, moved, ours }))
    }

    /// `w x / sqrt(mean x^2 + eps)`; centred, `w (x - mean) / sqrt(mean (x - mean)^2 + eps) + b`.
    fn norm(&mut self, module: &str, x: &Rows, eps: f64, centred: bool) -> Result<Rows> {
        let weight = self.weight(&format!("{module}.weight"))?.to_f64();
        let bias =
            if centred { self.weight(&format!("{module}.bias"))?.to_f64() } else { vec![0.0; x.width] };
        let k = x.width;
        Ok(self.step(&[x], k, |inputs, off| {
            let mut y = Vec::with_capacity(inputs[0].len());
            for row in inputs[0].chunks(k) {
                let size = row.iter().map(|v| v.abs()).sum::<f64>() / k as f64;
                let mean = row.iter().sum::<f64>() / k as f64 + off(accumulation(k + 1) * size);
                let center = if centred { mean } else { 0.0 };
                let power = row.iter().map(|v| (v - center).powi(2)).sum::<f64>() / k as f64;
                // A mean and a variance that run along take a handful of operations per element; then eps, a root, a division.
                let power = (power + eps) * (1.0 + off(accumulation(k + 8) + 5.0 * U));
                y.extend(row.iter().zip(weight.iter().zip(&bias)).map(|(v, (w, b))| {
                    let scaled = w * (v - center) / power.sqrt();
                    scaled + b + off(3.0 * U * scaled.abs() + U * (scaled + b).abs())
                }));
            }
            y
        }))
    }

    /// Rotary positions: the halves of every head turn by `position / theta^(2 i / d)`.
    fn rotate(&mut self, x: &Rows, heads: usize, theta: f64) -> Rows {
        let (width, d) = (x.width, x.width / heads);
        self.step(&[x], width, |inputs, off| {
            let mut y = inputs[0].to_vec();
            for (position, row) in y.chunks_mut(width).enumerate() {
                for head in row.chunks_mut(d) {
                    for i in 0..d / 2 {
                        let angle = position as f64 / theta.powf(2.0 * i as f64 / d as f64);
                        // A power, a division, a product; then a sine that is right to a unit in the last place or two.
                        let angle = angle + off(6.0 * U * angle + 2.0 * U);
                        let (a, b) = (head[i], head[i + d / 2]);
                        let (sin, cos) = angle.sin_cos();
                        let bound = 2.0 * U * (a.abs() + b.abs());
                        head[i] = a * cos - b * sin + off(bound);
                        head[i + d / 2] = b * cos + a * sin + off(bound);
                    }
                }
            }
            y
        })
    }

    /// Causal attention; several heads of q share one of k and v.
    fn attention(&mut self, q: &Rows, k: &Rows, v: &Rows, heads: usize, shared: usize) -> Rows {
        let (width, d, narrow) = (q.width, q.width / heads, k.width);
        let scale = 1.0 / (d as f64).sqrt();
        self.step(&[q, k, v], width, |inputs, off| {
            let part = |of: usize, row: usize, head: usize| {
                let width = if of == 0 { width } else { narrow };
                &inputs[of][row * width + head * d..][..d]
            };
            let mut y = Vec::with_capacity(inputs[0].len());
            for row in 0..inputs[0].len() / width {
                for head in 0..heads {
                    let other = head / (heads / shared);
                    // Products of d terms, scaled in one or two steps.
                    let scores = (0..=row).map(|key| {
                        let terms = part(0, row, head).iter().zip(part(1, key, other)).map(|(q, k)| q * k);
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                        scale * (sum + off(accumulation(d + 4) * size))
                    });
                    let scores: Vec<f64> = scores.collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    // Every argument rounded, exponentials right to two units, a rescaling for each step of a softmax that
                    // runs along.
                    let powers = scores.iter().map(|s| {
                        let relative = U * ((largest - s).abs() + 2.0 * row as f64 + 16.0);
                        (s - largest).exp() * (1.0 + off(relative))
                    });
                    let powers: Vec<f64> = powers.collect();
                    let total: f64 = powers.iter().sum::<f64>() * (1.0 + off(accumulation(row + 3)));
                    for i in 0..d {
                        let terms =
                            powers.iter().enumerate().map(|(key, p)| p / total * part(2, key, other)[i]);
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                        y.push(sum + off(accumulation(row + 3) * size));
                    }
                }
            }
            y
        })
    }
}

/// A table of words `[vocabulary, width]`, by the formula and by way of the engine.
struct Table {
    vocabulary: usize,
    width: usize,
    exact: Vec<f64>,
    /// How far f32 may be from the formula.
    error: Vec<f64>,
    ours: Vec<f64>,
}

/// Which of the evaluations a layer is wanted for.
enum Run<'a> {
    Exact,
    Moved(&'a mut Random),
    Ours,
}

/// Some columns.
fn columns(rows: &Rows, columns: Range<usize>) -> Rows {
    let of = |values: &Vec<f64>| -> Vec<f64> {
        values.chunks(rows.width).flat_map(|row| row[columns.clone()].to_vec()).collect()
    };
    let moved = rows.moved.iter().map(of).collect();
    Rows { width: columns.len(), exact: of(&rows.exact), moved, ours: of(&rows.ours) }
}
