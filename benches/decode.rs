//! Decode: how long a product of few tokens takes, by the shapes of models that are served.
//!
//! Each row is the median over replays of a CUDA graph of many launches, which take so many weights in turn that no cache holds
//! them, divided by their number. A weight named `-` is none: the adapters alone, added to a product that someone else has
//! computed. Rows named `layer` are a model's four products one after the other, each from the output of the
//! one before. `share` is of the bandwidth that a copy reaches in the same run, counting what has to be read and written once.
//!
//! `cargo bench --bench decode` runs all of it; `-- --model 8B --op qkv --tokens 1,16 --weight nf4 --adapters none` what fits,
//! `--quick` all of the first model and a part of the others, `--no-overlap` without launches that begin before the one before has ended.
//! Without a GPU, and without `--bench` (as in `cargo test --benches`), the same code runs on a model of toy size, in the
//! emulator, and measures nothing. With LORA_KERNELS_RESULTS rows are written to `decode.json` in that folder too.

use std::cell::RefCell;
use std::path::PathBuf;

use half::bf16;
use lora_kernels::DType;
use lora_kernels::cuda::matmul::{self, Extras, Weight, WeightFormat};
use lora_kernels::cuda::{
    AbsmaxView, AdapterTable, AdapterView, LowRank, NestedView, Nf4View, View, lora_expand, lora_shrink,
    nf4_dequantize,
};
use lora_kernels::nf4::{Codebook, DYNAMIC_MAP, NESTED_BLOCKSIZE};
use lora_kernels_devices::{Bandwidth, Buffer, Device, Graph};
use serde_json::{Value, json};

const BLOCKSIZE: usize = 64;

struct Model {
    name: &'static str,
    products: [(&'static str, usize, usize); 4],
}

/// N and K of each model's products, those with the same input in one.
const MODELS: [Model; 4] = [
    Model {
        name: "Llama-3-8B",
        products: [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate+up", 28672, 4096), ("down", 4096, 14336)],
    },
    Model {
        name: "Llama-3-70B",
        products: [("qkv", 10240, 8192), ("o", 8192, 8192), ("gate+up", 57344, 8192), ("down", 8192, 28672)],
    },
    Model {
        name: "Qwen2.5-7B",
        products: [("qkv", 4608, 3584), ("o", 3584, 3584), ("gate+up", 37888, 3584), ("down", 3584, 18944)],
    },
    Model {
        name: "Llama-2-7B",
        products: [("qkv", 12288, 4096), ("o", 4096, 4096), ("gate+up", 22016, 4096), ("down", 4096, 11008)],
    },
];
/// Not part of a layer: k or v alone.
const ALONE: &[(&str, &str, usize, usize)] =
    &[("Llama-3-8B", "k", 1024, 4096), ("Qwen2.5-7B", "k", 512, 3584)];

const TOY: [Model; 1] = [Model {
    name: "toy",
    products: [("qkv", 96, 64), ("o", 64, 64), ("gate+up", 128, 64), ("down", 64, 128)],
}];

#[derive(Clone, Copy, PartialEq)]
enum Storage {
    Nf4,
    Nf4Nested,
    Bf16,
    Nothing,
}

const STORAGES: [Storage; 4] = [Storage::Nf4, Storage::Nf4Nested, Storage::Bf16, Storage::Nothing];

impl Storage {
    fn name(self) -> &'static str {
        match self {
            Storage::Nf4 => "nf4",
            Storage::Nf4Nested => "nf4-nested",
            Storage::Bf16 => "bf16",
            Storage::Nothing => "-",
        }
    }

    fn format(self) -> Option<WeightFormat> {
        match self {
            Storage::Nf4 | Storage::Nf4Nested => Some(WeightFormat::Nf4 { blocksize: BLOCKSIZE }),
            Storage::Bf16 => Some(WeightFormat::Dense),
            Storage::Nothing => None,
        }
    }

    fn bytes(self, numel: usize) -> usize {
        let blocks = numel / BLOCKSIZE;
        match self {
            Storage::Nf4 => numel / 2 + 4 * blocks,
            Storage::Nf4Nested => numel / 2 + blocks + 4 * blocks.div_ceil(NESTED_BLOCKSIZE),
            Storage::Bf16 => 2 * numel,
            Storage::Nothing => 0,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Adapters {
    None,
    One { rank: usize },
    OnePerToken { rank: usize },
}

const ADAPTERS: [Adapters; 4] = [
    Adapters::None,
    Adapters::One { rank: 16 },
    Adapters::One { rank: 64 },
    Adapters::OnePerToken { rank: 16 },
];

impl Adapters {
    fn name(self) -> String {
        match self {
            Adapters::None => "none".into(),
            Adapters::One { rank } => format!("r{rank}"),
            Adapters::OnePerToken { rank } => format!("r{rank}-each"),
        }
    }

    fn count(self, tokens: usize) -> usize {
        match self {
            Adapters::None => 0,
            Adapters::One { .. } => 1,
            Adapters::OnePerToken { .. } => tokens,
        }
    }

    fn rank(self) -> usize {
        match self {
            Adapters::None => 0,
            Adapters::One { rank } | Adapters::OnePerToken { rank } => rank,
        }
    }

    fn bytes(self, tokens: usize, [n, k]: [usize; 2]) -> usize {
        2 * self.count(tokens) * self.rank() * (n + k)
    }
}

/// What is run, and how large.
struct Config {
    device: Device,
    models: &'static [Model],
    alone: &'static [(&'static str, &'static str, usize, usize)],
    tokens: Vec<usize>,
    /// Weights in memory, the length of every arena in elements.
    weights: usize,
    /// Elements of adapters in memory.
    adapters: usize,
    /// Bytes that a graph reads at least; the caches hold less.
    rotate: usize,
    replays: usize,
    /// Models but the first with 1 and 16 tokens only.
    quick: bool,
    /// Whether launches begin before the one before has ended, as no launch writes weights.
    overlap: bool,
    /// `--model` and so on, with what was given for them.
    filters: Vec<(String, String)>,
}

impl Config {
    fn from_arguments() -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let filters: Vec<_> = arguments
            .windows(2)
            .filter_map(|pair| Some((pair[0].strip_prefix("--")?.to_owned(), pair[1].clone())))
            .filter(|(name, value)| name != "bench" && !value.starts_with("--"))
            .collect();
        let asked = arguments.iter().any(|argument| argument == "--bench");
        let test = arguments.iter().any(|argument| argument == "--test");
        let quick = arguments.iter().any(|argument| argument == "--quick");
        let overlap = !arguments.iter().any(|argument| argument == "--no-overlap");
        let measured = if asked && !test { Device::cuda().ok() } else { None };
        match measured {
            Some(device) if std::env::var("LORA_KERNELS_DEVICE").as_deref() != Ok("emulator") => Self {
                device,
                models: &MODELS,
                alone: ALONE,
                tokens: vec![1, 2, 4, 8, 16, 32, 64],
                weights: 1 << 30,
                adapters: 1 << 27,
                rotate: 300 << 20,
                replays: 11,
                quick,
                overlap,
                filters,
            },
            _ => Self {
                device: Device::best(),
                models: &TOY,
                alone: &[],
                tokens: vec![1, 9],
                weights: 1 << 17,
                adapters: 1 << 18,
                rotate: 0,
                replays: 1,
                quick,
                overlap,
                filters: Vec::new(),
            },
        }
    }

    /// Whether a name fits what was asked for: one of the parts between commas, or all where nothing was.
    fn wants(&self, filter: &str, name: &str) -> bool {
        let asked = self.filters.iter().find(|(known, _)| known == filter);
        asked.is_none_or(|(_, values)| {
            let fits = |value: &str| if filter == "model" { name.contains(value) } else { name == value };
            values.split(',').any(fits)
        })
    }
}

/// Weights of every kind and adapters, as much of each as any row takes; rows take their pieces from the start on.
struct Arenas {
    codebook: Codebook,
    packed: Buffer<u8>,
    absmax: Buffer<f32>,
    q: Buffer<u8>,
    nested: Buffer<f32>,
    map: Buffer<f32>,
    offset: Buffer<f32>,
    dense: Buffer<bf16>,
    factors: Buffer<bf16>,
}

impl Arenas {
    fn new(config: &Config) -> Self {
        let device = &config.device;
        let mut random = Random(1);
        let blocks = config.weights / BLOCKSIZE;
        let codebook = Codebook::nf4();
        let packed = device.upload(&random.bytes(config.weights / 2));
        let absmax: Vec<f32> =
            random.bytes(blocks).iter().map(|&byte| 0.02 + f32::from(byte) * 1e-4).collect();
        let absmax = device.upload(&absmax);
        let shape = nf4_dequantize::Shape { numel: config.weights, blocksize: BLOCKSIZE, dtype: DType::BF16 };
        let decode = nf4_dequantize::plan(&shape, device.queue().properties()).unwrap();
        let mut dense = device.alloc(config.weights);
        let all = Nf4View {
            packed: packed.view(),
            absmax: AbsmaxView::Plain(absmax.view()),
            blocksize: BLOCKSIZE,
            codebook: &codebook,
        };
        decode.run(device.queue(), &all, dense.view_mut()).unwrap();
        let factors: Vec<bf16> = random
            .bytes(config.adapters)
            .iter()
            .map(|&byte| bf16::from_f32((f32::from(byte) - 127.5) * 1e-3))
            .collect();
        Self {
            q: device.upload(&random.bytes(blocks)),
            nested: device.upload(&vec![0.01; blocks.div_ceil(NESTED_BLOCKSIZE)]),
            map: device.upload(&DYNAMIC_MAP),
            offset: device.upload(&[0.03]),
            factors: device.upload(&factors),
            codebook,
            packed,
            absmax,
            dense,
        }
    }

    /// The weight whose first element is the arena's element `start`.
    fn weight(&self, storage: Storage, start: usize, numel: usize) -> Option<Weight<'_, bf16>> {
        let (block, blocks) = (start / BLOCKSIZE, numel / BLOCKSIZE);
        let absmax = match storage {
            Storage::Nothing => return None,
            Storage::Bf16 => return Some(Weight::Dense(self.dense.slice(start..start + numel))),
            Storage::Nf4 => AbsmaxView::Plain(self.absmax.slice(block..block + blocks)),
            Storage::Nf4Nested => {
                let first = block / NESTED_BLOCKSIZE;
                let nested = first..first + blocks.div_ceil(NESTED_BLOCKSIZE);
                AbsmaxView::Nested(NestedView {
                    q: self.q.slice(block..block + blocks),
                    absmax: self.nested.slice(nested),
                    map: self.map.view(),
                    offset: self.offset.view(),
                    blocksize: NESTED_BLOCKSIZE,
                })
            }
        };
        let packed = self.packed.slice(start / 2..(start + numel) / 2);
        Some(Weight::Nf4(Nf4View { packed, absmax, blocksize: BLOCKSIZE, codebook: &self.codebook }))
    }
}

/// Reproducible bits (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut words: Vec<u64> = (0..len.div_ceil(8)).map(|_| self.next()).collect();
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..len].to_vec()
    }
}

/// Hands out consecutive pieces of an arena, from its start again when there is no room.
struct Ring {
    len: usize,
    next: usize,
}

impl Ring {
    fn take(&mut self, piece: usize) -> usize {
        // Pieces begin where a nested block does, which is aligned for everything.
        let piece = piece.next_multiple_of(BLOCKSIZE * NESTED_BLOCKSIZE);
        if self.next + piece > self.len {
            self.next = 0;
        }
        self.next += piece;
        self.next - piece
    }
}

/// A product of one shape, the first half of the branch, and the second where there is no product that takes it up.
struct Product {
    size: [usize; 2],
    tokens: usize,
    plan: Option<matmul::Plan>,
    shrink: Option<lora_shrink::Plan>,
    expand: lora_expand::Plan,
}

impl Product {
    fn new(device: &Device, [n, k]: [usize; 2], tokens: usize, storage: Storage, adapters: Adapters) -> Self {
        let properties = device.queue().properties();
        let plan = storage.format().map(|weight| {
            let shape = matmul::Shape { tokens, n, k, dtype: DType::BF16, weight };
            matmul::plan(&shape, properties).unwrap()
        });
        let expand = lora_expand::Shape { tokens, n, dtype: DType::BF16, adapter_dtype: DType::BF16 };
        let shrink = lora_shrink::Shape {
            tokens,
            k,
            max_rank: adapters.rank(),
            slices: 1,
            dtype: DType::BF16,
            adapter_dtype: DType::BF16,
        };
        Self {
            size: [n, k],
            tokens,
            plan,
            shrink: (adapters != Adapters::None).then(|| lora_shrink::plan(&shrink, properties).unwrap()),
            expand: lora_expand::plan(&expand, properties).unwrap(),
        }
    }
}

/// What one launch of a product takes.
struct Call<'a> {
    product: &'a Product,
    weight: Option<Weight<'a, bf16>>,
    table: Option<AdapterTable<'a, bf16>>,
}

/// What all calls of a row share: activations, scratch.
struct Scratch {
    index: Option<Buffer<i32>>,
    v: RefCell<Buffer<f32>>,
    workspace: RefCell<Buffer<u8>>,
    /// Calls read one and write the other, in turn.
    activations: [RefCell<Buffer<bf16>>; 2],
}

impl Scratch {
    fn new(device: &Device, products: &[Product], tokens: usize, adapters: Adapters) -> Self {
        let most = |of: fn(&Product) -> usize| products.iter().map(of).max().unwrap_or(0);
        let mut random = Random(2);
        let width = most(|product| product.size[0].max(product.size[1]));
        let activations = [(); 2].map(|()| {
            let values = random.bytes(tokens * width);
            let values: Vec<bf16> =
                values.iter().map(|&byte| bf16::from_f32(f32::from(byte) / 128.0 - 1.0)).collect();
            RefCell::new(device.upload(&values))
        });
        let each: Vec<i32> = (0..tokens as i32).collect();
        Self {
            index: matches!(adapters, Adapters::OnePerToken { .. }).then(|| device.upload(&each)),
            v: RefCell::new(
                device.alloc(most(|product| product.shrink.as_ref().map_or(0, |plan| plan.v_len()))),
            ),
            workspace: RefCell::new(
                device.alloc(most(|product| product.plan.as_ref().map_or(0, |plan| plan.workspace_bytes))),
            ),
            activations,
        }
    }

    /// Enqueues one call, whose number says what it reads.
    fn enqueue(&self, config: &Config, number: usize, call: &Call<'_>) {
        let (queue, Product { size: [n, k], tokens, plan, shrink, expand }) =
            (config.device.queue(), call.product);
        let (x, mut y) =
            (self.activations[number % 2].borrow(), self.activations[1 - number % 2].borrow_mut());
        let x: View<'_, bf16> = x.slice(..tokens * k);
        let index = self.index.as_ref().map(|index| index.view());
        let mut v = self.v.borrow_mut();
        let low_rank = match (&call.table, shrink) {
            (Some(table), Some(shrink)) => {
                shrink.run(queue, x, table, index, v.slice_mut(..shrink.v_len())).unwrap();
                Some(LowRank { adapters: table, index, v: v.slice(..shrink.v_len()) })
            }
            _ => None,
        };
        let out = y.slice_mut(..tokens * n);
        match (plan, &call.weight, low_rank) {
            (Some(plan), Some(weight), low_rank) => {
                let extras = Extras::<bf16> { low_rank, overlap: config.overlap, ..Extras::default() };
                let mut workspace = self.workspace.borrow_mut();
                plan.run(queue, x, weight, &extras, out, workspace.view_mut()).unwrap();
            }
            (_, _, Some(branch)) => expand.run(queue, &branch, out).unwrap(),
            (_, _, None) => unreachable!("there is a weight, or there are adapters"),
        }
    }
}

/// The median time of a replay, in microseconds.
fn time(device: &Device, graph: &Graph, replays: usize) -> f64 {
    // SAFETY: the caller's buffers are alive, and it borrows none of them now.
    let replay = || unsafe { graph.launch() };
    replay();
    let mut times: Vec<_> = (0..replays).map(|_| device.time(replay)).collect();
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}

struct Bench<'a> {
    config: &'a Config,
    arenas: &'a Arenas,
    copy_gb_s: f64,
    read_gb_s: f64,
    rows: Vec<Value>,
}

impl Bench<'_> {
    /// Measures products that are called one after the other; the time is that of all of them together.
    fn measure(
        &mut self,
        [model, op]: [&str; 2],
        sizes: &[[usize; 2]],
        tokens: usize,
        storage: Storage,
        adapters: Adapters,
    ) {
        let Config { device, rotate, replays, .. } = self.config;
        let products: Vec<_> =
            sizes.iter().map(|&size| Product::new(device, size, tokens, storage, adapters)).collect();
        let weight_bytes: usize = sizes.iter().map(|[n, k]| storage.bytes(n * k)).sum();
        let adapter_bytes: usize = sizes.iter().map(|&size| adapters.bytes(tokens, size)).sum();
        let activation_bytes: usize = sizes.iter().map(|[n, k]| 2 * tokens * (n + k)).sum();
        let bytes = weight_bytes + adapter_bytes + activation_bytes;
        let rounds = (rotate / (weight_bytes + adapter_bytes) + 1).clamp(2, 128);

        let count = adapters.count(tokens);
        let mut entries: Vec<Buffer<u8>> =
            (0..rounds * products.len()).map(|_| device.alloc(AdapterTable::<bf16>::bytes(count))).collect();
        let mut weights = Ring { len: self.config.weights, next: 0 };
        let mut factors = Ring { len: self.config.adapters, next: 0 };
        let arenas = self.arenas;
        let calls: Vec<Call<'_>> = entries
            .iter_mut()
            .enumerate()
            .map(|(i, entries)| {
                let product = &products[i % products.len()];
                let [n, k] = product.size;
                let rank = adapters.rank();
                let mut factor = |len: usize| {
                    let start = factors.take(len);
                    arenas.factors.slice(start..start + len)
                };
                let views: Vec<_> = (0..count)
                    .map(|_| AdapterView {
                        lora_a: factor(rank * k),
                        lora_b: factor(n * rank),
                        rank,
                        scaling: 0.5,
                    })
                    .collect();
                let table = (adapters != Adapters::None)
                    .then(|| AdapterTable::upload(device.queue(), &views, k, n, entries.view_mut()).unwrap());
                Call { product, weight: arenas.weight(storage, weights.take(n * k), n * k), table }
            })
            .collect();
        let scratch = Scratch::new(device, &products, tokens, adapters);
        let graph = device.capture(|| {
            calls.iter().enumerate().for_each(|(number, call)| scratch.enqueue(self.config, number, call));
        });
        let us = time(device, &graph, *replays) / rounds as f64;
        let gb_s = bytes as f64 / us / 1e3;
        let kernels: Vec<_> =
            products.iter().filter_map(|product| product.plan.as_ref()?.kernel.map(|k| k.entry)).collect();
        let (n, k): (Vec<_>, Vec<_>) = sizes.iter().map(|&[n, k]| (n, k)).unzip();
        println!(
            "{model:<11} {op:<8} {:>13} M={tokens:<3} {:<10} {:<8} {us:>9.2} us {gb_s:>7.0} GB/s {:>5.1} %",
            if sizes.len() == 1 { format!("{}x{}", n[0], k[0]) } else { String::new() },
            storage.name(),
            adapters.name(),
            100.0 * gb_s / self.copy_gb_s,
        );
        self.rows.push(json!({
            "op": op, "model": model, "n": n, "k": k, "m": tokens, "weight": storage.name(),
            "adapters": adapters.name(), "us": us, "bytes": bytes, "gb_s": gb_s,
            "share_of_copy": gb_s / self.copy_gb_s, "kernels": kernels, "overlap": self.config.overlap,
        }));
    }

    /// All that is wanted of some products.
    fn sweep(&mut self, model: &str, op: &str, sizes: &[[usize; 2]]) {
        let config = self.config;
        if !config.wants("model", model) || !config.wants("op", op) {
            return;
        }
        for storage in STORAGES.into_iter().filter(|storage| config.wants("weight", storage.name())) {
            for adapters in ADAPTERS.into_iter().filter(|adapters| config.wants("adapters", &adapters.name()))
            {
                if storage == Storage::Nothing && adapters == Adapters::None {
                    continue;
                }
                let all = !config.quick || model == config.models[0].name;
                let tokens = config.tokens.iter().filter(|&&m| all || m == 1 || m == 16);
                for &tokens in tokens.filter(|m| config.wants("tokens", &m.to_string())) {
                    self.measure([model, op], sizes, tokens, storage, adapters);
                }
            }
        }
        self.write();
    }

    /// What there is so far.
    fn write(&self) {
        let Some(folder) = std::env::var_os("LORA_KERNELS_RESULTS") else { return };
        let results = json!({
            "device": self.config.device.name(), "copy_gb_s": self.copy_gb_s, "read_gb_s": self.read_gb_s,
            "rows": self.rows,
        });
        let path = PathBuf::from(folder).join("decode.json");
        std::fs::write(&path, format!("{results}\n")).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

fn main() {
    let config = Config::from_arguments();
    let arenas = Arenas::new(&config);
    let mut copied = config.device.alloc(config.weights);
    let Bandwidth { copy, read } = config.device.bandwidth(&arenas.dense, &mut copied);
    drop(copied);
    let (copy_gb_s, read_gb_s) = (copy / 1e9, read / 1e9);
    println!("{}: copying moves {copy_gb_s:.0} GB/s, reading {read_gb_s:.0}", config.device.name());
    let mut bench = Bench { config: &config, arenas: &arenas, copy_gb_s, read_gb_s, rows: Vec::new() };
    let mut seen = Vec::new();
    let products =
        config.models.iter().flat_map(|model| model.products.map(|(op, n, k)| (model.name, op, n, k)));
    for model in config.models {
        let sizes = model.products.map(|(_, n, k)| [n, k]);
        bench.sweep(model.name, "layer", &sizes);
    }
    for (model, op, n, k) in products.chain(config.alone.iter().copied()) {
        if !seen.contains(&[n, k]) {
            seen.push([n, k]);
            bench.sweep(model, op, &[[n, k]]);
        }
    }
    assert!(!bench.rows.is_empty(), "no row fits what was asked for");
}
