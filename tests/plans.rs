//! What plans choose, by a model that is written here once more: no tile and no number of splits takes less, and no neighbour's plan does.
//!
//! The model takes what is counted (`kernels/SASS.md`) and measured (`benches/results`), and the three assumptions that
//! `src/cuda/block_product.rs` names. It says what should be fast, not what is.

use std::collections::HashMap;
use std::fs;

use lora_kernels::DType;
use lora_kernels::cuda::matmul::{self, Shape, WeightFormat};
use lora_kernels::cuda::{Properties, matmul_transposed};
use lora_kernels_devices::{Device, Spec};

const NF4: WeightFormat = WeightFormat::Nf4 { blocksize: 64 };
const SHAPES: [(usize, usize); 9] = [
    (512, 4096),
    (1024, 4096),
    (4096, 4096),
    (6144, 4096),
    (4096, 14336),
    (28672, 4096),
    (8192, 8192),
    (8192, 28672),
    (1000, 1024),
];

/// Clocks of an A100's schedulers for 1000 weights, by kernel.
fn issue() -> HashMap<String, f64> {
    let text = fs::read_to_string("kernels/SASS.md").unwrap();
    let rows = text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.trim_matches(['|', ' ']).split(" | ").collect();
        Some((cells.first()?.trim_matches('`').to_owned(), cells.get(7)?.parse().ok()?))
    });
    rows.collect()
}

fn properties(spec: Spec) -> Properties {
    *Device::emulate(spec).queue().properties()
}

/// What a choice of `matmul` or `matmul_transposed` takes on an A100, in clocks.
fn clocks(issue: f64, codes: bool, tile: usize, splits: usize, [tokens, outputs, length]: [usize; 3]) -> f64 {
    let columns = outputs.div_ceil(128);
    let rounds = (tokens.div_ceil(tile) * columns * splits).div_ceil(108) as f64;
    // A tile of 128 by 64.
    let (issue, tensor) = (1.5 * issue * 8.192, 8192.0 * tile as f64 / 1024.0);
    let row = if codes { 32 } else { 128 };
    let l2 = (tile * 128 + 128 * row) as f64 / (5120.0 / 108.0);
    let stages = if codes { 4 } else { 3 };
    let shared = (stages * (tile * 128 + 128 * row)).max(tile * 132 * 4);
    let (together, apart) = (issue.max(tensor).max(l2), (issue + tensor).max(l2));
    let memory = 2.0 * 466.0 / (stages - 1) as f64;
    let (together, apart) = (together.max(memory / 2.0), apart.max(memory));
    let together_alone = together.max(memory);
    let two = rounds > 1.0 && 2 * (shared + 1024) <= 164 << 10;
    let slice = match (two, codes) {
        (true, _) => together,
        (false, true) => apart,
        (false, false) => together_alone,
    };
    let work = rounds * (length.div_ceil(64).div_ceil(splits) as f64 * slice + 18.0 * tile as f64);
    let bytes = (outputs * length) as f64 * if codes { 0.5625 } else { 2.0 };
    let per_clock = 1.555e12 / 1.41e9;
    let finish = 2.5e-6 * 1.41e9 + 8.0 * (splits * tokens * outputs) as f64 / per_clock;
    work.max(bytes / per_clock) + if splits > 1 { finish } else { 0.0 }
}

/// Nanoseconds that the prototypes of `prefill` took for a launch of one tile on each multiprocessor of an H200, and for 64 elements of a sum, by
/// what W is and tokens of the tile.
struct Prototypes(HashMap<(bool, usize), (f64, f64)>);

impl Prototypes {
    /// Lines through 256 tokens, n = 4096, k = 4096 and 14336.
    fn read() -> Self {
        let text = fs::read_to_string("benches/results/2026-11-27-nvidia-h200-prefill.json").unwrap();
        let measured: serde_json::Value = serde_json::from_str(&text).unwrap();
        let time = |k: u64, kernel: &str| {
            let mut rows = measured["rows"].as_array().unwrap().iter();
            let row = rows.find(|row| {
                row["run"] == "prototypes"
                    && row["kernel"] == kernel
                    && (&row["m"], &row["n"], &row["k"]) == (&256.into(), &4096.into(), &k.into())
            });
            1000.0 * row.unwrap()["us"].as_f64().unwrap()
        };
        let lines = [
            (true, 64, "hmul_t64"),
            (true, 128, "hmul_t128"),
            (true, 256, "hmul_t256_j4"),
            (false, 64, "dense_t64"),
            (false, 128, "dense_t128"),
            (false, 256, "dense_t256"),
        ];
        let line = |(codes, tokens, kernel)| {
            // 32, 64 or 128 tiles.
            let slice = (time(14336, kernel) - time(4096, kernel)) / 160.0;
            ((codes, tokens), (time(4096, kernel) - 64.0 * slice, slice))
        };
        Self(lines.map(line).into())
    }

    fn nanoseconds(
        &self,
        codes: bool,
        tile: usize,
        splits: usize,
        [tokens, outputs, length]: [usize; 3],
    ) -> f64 {
        let (start, slice) = self.0[&(codes, tile)];
        let rounds = (tokens.div_ceil(tile) * outputs.div_ceil(128) * splits).div_ceil(132);
        let finish = if splits > 1 { 2500.0 + (splits * tokens * outputs) as f64 / 500.0 } else { 0.0 };
        start + (rounds * length.div_ceil(64).div_ceil(splits)) as f64 * slice + finish
    }
}

/// What it takes an A100 to make a 16-bit copy of a 4-bit W, in clocks: a launch, and 2.5625 bytes for each weight.
fn copy([n, k]: [usize; 2]) -> f64 {
    3525.0 + 2.5625 * (n * k) as f64 / 1103.0
}

/// Numbers of tokens: all few, and then some.
fn all_tokens(from: usize) -> impl Iterator<Item = usize> {
    (from..520).chain((520..2048).step_by(37)).chain([2048, 3000, 4096, 8192])
}

/// Asserts that what a plan has chosen takes least, of all tiles by all splits that make up to eight blocks for each multiprocessor.
fn check_choice(
    what: &str,
    (chosen_tile, chosen_splits): (usize, usize),
    tiles: &[usize],
    [tokens, outputs, length, multiprocessors]: [usize; 4],
    time: impl Fn(usize, usize) -> f64,
) {
    let chosen = time(chosen_tile, chosen_splits);
    for &tile in tiles {
        let most = 8 * multiprocessors / (tokens.div_ceil(tile) * outputs.div_ceil(128));
        for splits in 1..=most.min(length.div_ceil(64) / 4).max(1) {
            let other = time(tile, splits);
            // The table has whole clocks.
            assert!(
                chosen <= 1.01 * other,
                "{what}, {tokens} tokens, {outputs} outputs, sums of {length}: tile {chosen_tile} in {chosen_splits} takes \
                 {chosen:.0}, {tile} in {splits} would take {other:.0}"
            );
        }
    }
}

/// On an A100.
#[test]
fn no_other_grid_of_matmul_takes_less() {
    let (a100, issue) = (properties(Spec::a100()), issue());
    for weight in [NF4, WeightFormat::Dense] {
        let (codes, kind) = (weight == NF4, if weight == NF4 { "nf4" } else { "dense" });
        for (n, k) in SHAPES {
            for tokens in all_tokens(17) {
                let shape = Shape { tokens, n, k, dtype: DType::BF16, weight };
                let forward = matmul::plan(&shape, &a100).unwrap();
                let backward = matmul_transposed::plan(&shape, &a100).unwrap();
                let [forward_copy, backward_copy] = [forward.dequantize, backward.dequantize];
                for (module, copy, chosen, tiles, [outputs, length]) in [
                    (
                        "matmul",
                        forward_copy,
                        (forward.tile.tokens, forward.splits),
                        &[16, 32, 64, 128][..],
                        [n, k],
                    ),
                    (
                        "matmul_transposed",
                        backward_copy,
                        (backward.tile.tokens, backward.splits),
                        &[16, 64, 128],
                        [k, n],
                    ),
                ] {
                    if copy.is_some() {
                        continue; // what a dense W has
                    }
                    let what = format!("{module}_{kind}_bf16_t");
                    check_choice(&what, chosen, tiles, [tokens, outputs, length, 108], |tile, splits| {
                        clocks(
                            issue[&format!("{what}{tile}")],
                            codes,
                            tile,
                            splits,
                            [tokens, outputs, length],
                        )
                    });
                }
            }
        }
    }
}

/// On an H200, by lines through what the prototypes took.
#[test]
fn no_other_grid_of_prefill_takes_less() {
    let (h200, prototypes) = (properties(Spec::h200()), Prototypes::read());
    for weight in [NF4, WeightFormat::Dense] {
        for (n, k) in SHAPES {
            for tokens in all_tokens(17) {
                let shape = Shape { tokens, n, k, dtype: DType::BF16, weight };
                let plan = matmul::plan(&shape, &h200).unwrap();
                assert_eq!(plan.dequantize, None);
                let chosen = (plan.tile.tokens, plan.splits);
                check_choice("prefill", chosen, &[64, 128, 256], [tokens, n, k, 132], |tile, splits| {
                    prototypes.nanoseconds(weight == NF4, tile, splits, [tokens, n, k])
                });
            }
        }
    }
}

/// A plan for more tokens takes longer, but for a twentieth: nobody gains by adding tokens, also where one kernel takes over from another.
#[test]
fn more_tokens_take_longer() {
    let (a100, h200, issue, prototypes) =
        (properties(Spec::a100()), properties(Spec::h200()), issue(), Prototypes::read());
    for weight in [NF4, WeightFormat::Dense] {
        let four_bits = weight == NF4;
        for (n, k) in SHAPES {
            let bytes = (n * k) as f64 * if four_bits { 0.5625 } else { 2.0 };
            let time = |tokens, properties: &Properties| {
                let plan =
                    matmul::plan(&Shape { tokens, n, k, dtype: DType::BF16, weight }, properties).unwrap();
                let (kernel, tile, splits) = (plan.kernel.unwrap(), plan.tile.tokens, plan.splits);
                let codes = four_bits && plan.dequantize.is_none();
                let copy = if codes == four_bits { 0.0 } else { copy([n, k]) };
                let kind = if codes { "nf4" } else { "dense" };
                let issue = |module: &str| issue[&format!("{module}_{kind}_bf16_t{tile}")];
                copy + match kernel.module {
                    "prefill" => prototypes.nanoseconds(codes, tile, splits, [tokens, n, k]),
                    "matmul" => clocks(issue("matmul"), codes, tile, splits, [tokens, n, k]),
                    // Its stages of 16 by 4096 took 1.3 us, a launch 2.4 us (COUNTERS.md).
                    "decode" => {
                        let stages =
                            n.div_ceil(16).div_ceil(132 / splits) * k.div_ceil(4096).div_ceil(splits);
                        2400.0 + 1300.0 * stages as f64
                    }
                    // Steps of 32 by 512; two blocks have four warps for each scheduler, which is taken to be enough.
                    "skinny" => {
                        let rounds = (n.div_ceil(32) * splits).div_ceil(108);
                        let step = if rounds > 1 { 16.384 } else { 1.5 * 16.384 } * issue("skinny");
                        let finish = if splits > 1 { 3525.0 } else { 0.0 };
                        let steps = rounds * k.div_ceil(512).div_ceil(splits);
                        (step * steps as f64).max(bytes / 1103.0) + finish
                    }
                    module => panic!("no model of {module}"),
                }
            };
            for (device, from) in
                [(&a100, if four_bits { 1 } else { 9 }), (&h200, if four_bits { 1 } else { 17 })]
            {
                let mut before = (0, 0.0);
                for tokens in all_tokens(from) {
                    let now = time(tokens, device);
                    let (fewer, longer) = before;
                    assert!(
                        0.95 * longer <= 1.01 * now,
                        "{weight:?} {n} x {k} on {:?}: {fewer} tokens take {longer:.0}, {tokens} {now:.0}",
                        device.capability
                    );
                    before = (tokens, now);
                }
            }
        }
    }
}

/// Whichever of one pass and two takes less is chosen, two if they take a twentieth less.
#[test]
fn two_passes_are_chosen_where_they_take_less() {
    let (a100, issue) = (properties(Spec::a100()), issue());
    let mut two_passes = 0;
    for (n, k) in SHAPES {
        for tokens in all_tokens(17) {
            let time = |weight| {
                let plan = matmul::plan(&Shape { tokens, n, k, dtype: DType::BF16, weight }, &a100).unwrap();
                let codes = plan.dequantize.is_none() && weight == NF4;
                let issue = issue
                    [&format!("matmul_{}_bf16_t{}", if codes { "nf4" } else { "dense" }, plan.tile.tokens)];
                let time = clocks(issue, codes, plan.tile.tokens, plan.splits, [tokens, n, k]);
                (time, plan.dequantize.is_some())
            };
            let ((one, copied), (of_copy, _)) = (time(NF4), time(WeightFormat::Dense));
            let two = of_copy + copy([n, k]);
            two_passes += usize::from(copied);
            // If two passes are chosen, `one` is what they take but for the copy.
            assert!(
                copied || 0.94 * one <= two,
                "{tokens} tokens, {n} x {k}: {one:.0}, {two:.0} in two passes"
            );
        }
    }
    assert!(two_passes > 0);
}

/// On an H200, dequantising before cuBLAS, or before a dense prototype, took longer than the prototypes of `prefill` at every shape that was measured.
#[test]
fn two_passes_took_longer_on_hopper() {
    let text = fs::read_to_string("benches/results/2026-11-27-nvidia-h200-prefill.json").unwrap();
    let measured: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rows: Vec<_> =
        measured["rows"].as_array().unwrap().iter().filter(|row| row["run"] == "prototypes").collect();
    let time = |row: &serde_json::Value| row["us"].as_f64().unwrap();
    let two_passes = ["dequant_cublas", "two_pass_t128", "two_pass_t256"];
    let mut shapes = 0;
    for two in rows.iter().filter(|row| two_passes.contains(&row["kernel"].as_str().unwrap())) {
        let same = |row: &&&serde_json::Value| ["m", "n", "k"].iter().all(|size| row[size] == two[size]);
        let one =
            rows.iter().filter(same).filter(|row| row["kernel"].as_str().unwrap().starts_with("hmul_t"));
        let one = one.map(|row| time(row)).fold(f64::INFINITY, f64::min);
        assert!(one < time(two), "{two}: {one}");
        shapes += 1;
    }
    assert!(shapes >= 32);
}

/// Sizes whose products no integer holds are an error, or a plan, on every device.
#[test]
fn the_largest_sizes() {
    let most = (1 << 31) - 1;
    for (spec, weight) in
        [Spec::a100, Spec::h200].into_iter().flat_map(|spec| [NF4, WeightFormat::Dense].map(|w| (spec(), w)))
    {
        let device = properties(spec);
        for k in [most, most - 7, most - 31] {
            let shape = Shape { tokens: most, n: most, k, dtype: DType::BF16, weight };
            for error in [
                matmul::plan(&shape, &device).unwrap_err(),
                matmul_transposed::plan(&shape, &device).unwrap_err(),
            ] {
                assert!(matches!(error, lora_kernels::Error::Argument { .. }), "{error}");
            }
        }
    }
}
