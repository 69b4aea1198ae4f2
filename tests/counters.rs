//! What decides how fast the products and the adapters' kernels can be, counted in the emulator: the table in
//! `kernels/COUNTERS.md`, which is checked here and written with `LORA_KERNELS_BLESS=1 cargo test --test counters`.

mod products;

use std::{env, fs};

use half::bf16;
use lora_kernels::cuda::matmul::{self, WeightFormat};
use lora_kernels::cuda::{
    AdapterTable, Kernel, LowRank, expert_groups, expert_matmul, lora_expand, lora_shrink,
};
use lora_kernels::{DType, Element};
use lora_kernels_devices::{Counters, Device, Spec};
use products::transposed::{run as run_transposed, with_dy};
use products::{DeviceWeight, Factors, Problem, Weight, expand_shape};

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/COUNTERS.md");

/// Another nvcc may choose other instructions; everything else is exact.
const INSTRUCTIONS_MAY_DIFFER: f64 = 0.05;

const ABOUT: &str = "\
# What the kernels do, counted

Counts of the emulator, for one launch, x and y in bf16, codes with an f32 absmax for every 64 where nothing else is said. They are exact and repeat;
`cargo test --test counters` fails when they change, and `LORA_KERNELS_BLESS=1` before it writes this file. They say what a kernel asks of the
machine, not how long that takes; times are in `benches/results`.

* *blocks*: of the launch, on a device with 132 multiprocessors (H200) or 108 (A100). `prefill` and `decode` never start more than there are.
* *instructions*: of PTX, executed by threads, per weight and tile of tokens that it is read for (per element of lora_a or lora_b for `lora_shrink`
  and `lora_expand`). Register moves count, which the machine mostly does not have; waits count as often as they are tried.
* Experts: of each token two rows of y, by a stack of eight; the weights are those of the experts that were chosen.
* *read*, *written*: distinct 32-byte sectors of device memory over the fewest bytes that have to move: W, its absmax, x, the adapters, y (`lora_expand`
  reads and writes y; `..._transposed` has dY in the place of x and dX in that of y), or the parts of split sums. 1.00 is the least.
* *asked*: sectors asked for by all instructions over the same bytes; what is above *read* is answered by the cache.
* *conflicts*: passes through the banks of shared memory that conflict-free accesses would not need, loads and stores, per hundred accesses.

";

const ABOUT_BLOCKS: &str = "\
A star: W is dequantised first, by a launch of its own.

The percentage is what the multiprocessors have to do, of what they could do while the one with the most works (all tiles and steps taken to
be alike; blocks of one multiprocessor take turns). `matmul` and `prefill` have the tile and the splits that take least by the model of
`src/cuda/rounds.rs`, of all that there are (`tests/plans.rs`): a share is split further only where that gains more than adding the parts costs, so
a grid may be left at 69 %. When `matmul` had as many splits as make one block for each multiprocessor, 256 tokens kept an A100 busy for 59 % with
4096 x 4096, 4096 x 14336 and 8192 x 28672 (128 tiles for 108 multiprocessors), 64 tokens with 8192 x 28672.

What a model says of grids that do not fill an H200, in microseconds at 1.755 GHz. Only what is said of prototypes has been measured.

`decode`, few rows: a cluster shares a tile of 16 rows, in parts of 1024 elements of k (two slices of 64 for each warp) or more. 512 x 4096 has 32 tiles,
four blocks for each: 128 of 132 multiprocessors, 1024 elements each where an even share would be 993. More than 132 blocks would be a second round. Clusters
have two, four or eight blocks, since multiprocessors that can share a cluster come in groups of 16 or 18, and more than eight need not be possible: fewer than 256 rows leave
multiprocessors idle, as do 256 with k below 8192 (64 blocks at k = 4096). More than 1024 rows have one block for each tile: 64 multiprocessors decode, at 63 weights
a clock (`SASS.md`), what memory delivers to 132 at 33. For the same reason 72 % (3072 x 4096: 60 have two tiles, 72 have one) still wait for memory.

| 512 x 4096, one token | one block a tile | a cluster of four |
|---|--:|--:|
| all bytes, 1.2 MB at 4.3 TB/s | 0.27 | 0.27 |
| bytes of a block, at 64 a clock | 0.33 | 0.08 |
| decoding them after they have come (63 and 52 weights a clock) | 0.59 | 0.18 |
| exchange | | 0.15 to 0.44 |
| sum, without the start (2.4: see below) | 0.92 | 0.60 to 0.89 |

Prototypes took 5.10 us for 4096 x 4096 and 6.44 us for 6144 x 4096 (`benches/results`, *decode*): 1.3 us a stage where all share the memory, 2.4 us before its first. Their
exchange, two barriers of the cluster, took 0.44 us for each tile (28672 x 4096 in clusters of two: 32.5 us, 20.6 us without). Here it is a store in the first block's shared
memory, an arrival there, and a look at it, and the barrier at the start is waited for when it is long over; 0.15 us, 260 clocks, is a guess. So 512 x 4096 gains little.
512 x 14336 gains most: its sums used to be added by a second kernel, which takes 0.72 us even when it is empty. Few rows should rather not be launched alone: query, key and
value of 4096, 1024 and 1024 rows are 6144 x 4096, one launch (`Nf4Matrix::stacked` makes one weight of three).

`matvec`, up to 8 tokens of dense weights: tiles of 32 rows by 1024 elements. 512 x 4096 has 64 of them.
";

/// A launch, and the fewest bytes that it has to read and write.
struct Row {
    kernel: Kernel,
    device: &'static str,
    what: String,
    counters: Counters,
    elements: f64,
    read: f64,
    written: f64,
}

/// A row of numbers, as it is in the file.
struct Cells {
    exact: Vec<String>,
    instructions: f64,
}

impl Row {
    fn cells(&self) -> Cells {
        let Counters { global_loads, global_stores, shared_loads, shared_stores, blocks, .. } =
            &self.counters;
        let share = |sectors: u64, least: f64| format!("{:.2}", 32.0 * sectors as f64 / least);
        let conflicts = |conflicts: u64, requests: u64| {
            if conflicts == 0 {
                "0".into()
            } else {
                format!("{:.1}", 100.0 * conflicts as f64 / requests as f64)
            }
        };
        Cells {
            exact: vec![
                format!("`{}`", self.kernel.entry),
                self.device.into(),
                self.what.clone(),
                blocks.to_string(),
                share(global_loads.distinct_sectors, self.read),
                share(global_loads.sectors, self.read),
                share(global_stores.sectors, self.written),
                conflicts(shared_loads.conflicts, shared_loads.requests),
                conflicts(shared_stores.conflicts, shared_stores.requests),
            ],
            instructions: self.counters.total().threads as f64 / self.elements,
        }
    }

    /// What DESIGN wants of every kernel, whatever the table says.
    fn check(&self) {
        let Self { counters, kernel, .. } = self;
        assert_eq!(counters.local_accesses, 0, "{}", kernel.entry);
        let read = 32.0 * counters.global_loads.distinct_sectors as f64 / self.read;
        assert!((1.0..1.05).contains(&read), "{} reads {read} of what it has to", kernel.entry);
        let written = 32.0 * counters.global_stores.sectors as f64 / self.written;
        assert!((1.0..1.05).contains(&written), "{} writes {written} of what it has to", kernel.entry);
        assert_eq!(counters.shared_loads.conflicts, 0, "{}", kernel.entry);
    }
}

fn product<T: Element>(device: (&'static str, &Device), problem: &Problem<T>) -> Row {
    let outcome = problem.run(device.1);
    let plan = outcome.plan;
    assert!(plan.splits == 1 || plan.kernel.unwrap().clusters, "the counts are those of the last launch");
    row(device.0, problem, plan.kernel.unwrap(), plan.tile.tokens, outcome.counters.unwrap())
}

/// The same with the transposed weight: dY in the place of x, dX in the place of y.
fn transposed<T: Element>(device: (&'static str, &Device), problem: Problem<T>) -> Row {
    let problem = with_dy(problem);
    let outcome = run_transposed(&problem, device.1);
    let plan = outcome.plan;
    assert_eq!(plan.splits, 1, "the counts are those of the last launch");
    row(device.0, &problem, plan.kernel.unwrap(), plan.tile.tokens, outcome.counters.unwrap())
}

fn row<T: Element>(
    device: &'static str,
    problem: &Problem<T>,
    kernel: Kernel,
    tile: usize,
    counters: Counters,
) -> Row {
    let (size, weights) = (T::DTYPE.size(), problem.n * problem.k);
    let (weight, kind) = match &problem.weight {
        Weight::Dense(_) => (weights * size, "dense"),
        Weight::Nf4(nf4) => (nf4.packed().len() + nf4.absmax().len() * 4, "NF4"),
    };
    // x and y, or dY and dX.
    let (n, k) = (problem.n, problem.k);
    let (inputs, outputs) = if problem.x.len() == problem.tokens * k { (k, n) } else { (n, k) };
    Row {
        kernel,
        device,
        what: format!("{} tokens, {kind} {n} x {k}", problem.tokens),
        counters,
        elements: (weights * problem.tokens.div_ceil(tile)) as f64,
        read: (weight + problem.tokens * inputs * size) as f64,
        written: (problem.tokens * outputs * size) as f64,
    }
}

/// Tokens that take turns among adapters, in one launch of each of the two kernels.
fn adapters(device: (&'static str, &Device), tokens: usize, count: usize, rank: usize) -> [Row; 2] {
    let (n, k) = (4096, 4096);
    let mut problem = Problem::<bf16>::dense(tokens, 1, k).with_adapters(&vec![rank; count]);
    problem.n = n;
    for adapter in problem.adapters.as_mut().unwrap() {
        adapter.lora_b = products::Numbers::new(2).many(n * rank);
    }
    problem.index = Some((0..tokens).map(|token| (token % count) as i32).collect());
    let (x, index) = (device.1.upload(&problem.x), device.1.upload(problem.index.as_ref().unwrap()));
    let factors = Factors::new(device.1, problem.adapters.as_ref().unwrap());
    let mut entries = device.1.alloc(AdapterTable::<bf16>::bytes(count));
    let table = factors.table(device.1, k, n, &mut entries).unwrap();

    let shape = table.shrink_shape(tokens, DType::BF16);
    let plan = lora_shrink::plan(&shape, device.1.queue().properties()).unwrap();
    let v = problem.shrink(device.1, &table, &x, Some(&index)).unwrap();
    let (row, v_bytes) = (count * rank, (plan.v_len() * 4) as f64);
    let what = format!("{tokens} tokens, {count} adapters of rank {rank}, ");
    let shrink = Row {
        kernel: plan.kernel.unwrap(),
        device: device.0,
        what: format!("{what}k = {k}"),
        counters: device.1.counters().unwrap(),
        elements: (row * k) as f64,
        read: ((row + tokens) * k * 2) as f64,
        written: v_bytes,
    };

    let mut y = device.1.upload(&problem.x[..tokens * n]);
    let branch = LowRank { adapters: &table, index: Some(index.view()), v: v.view() };
    let plan =
        lora_expand::plan(&expand_shape::<bf16, bf16>(tokens, n), device.1.queue().properties()).unwrap();
    plan.run(device.1.queue(), &branch, y.view_mut()).unwrap();
    let expand = Row {
        kernel: plan.kernel.unwrap(),
        device: device.0,
        what: format!("{what}n = {n}"),
        counters: device.1.counters().unwrap(),
        elements: (row * n) as f64,
        read: ((row + tokens) * n * 2) as f64 + v_bytes,
        written: (tokens * n * 2) as f64,
    };
    [shrink, expand]
}

/// Two rows of y for each token, one of an expert that all chose and one of three others'; nobody chose the other four.
fn experts((name, device): (&'static str, &Device), tokens: usize, n: usize, k: usize) -> Row {
    let (choices, experts) = (2, 8);
    let problem = Problem::<bf16>::nf4(tokens, experts * n, k, 64);
    let Weight::Nf4(nf4) = &problem.weight else { unreachable!() };
    let shape = expert_matmul::Shape {
        tokens,
        choices,
        experts,
        n,
        k,
        dtype: DType::BF16,
        weight: problem.shape().weight,
    };
    let plan = expert_matmul::plan(&shape, device.queue().properties()).unwrap();
    let sort = expert_groups::plan(&plan.groups_shape(), device.queue().properties()).unwrap();
    let chosen: Vec<i32> =
        (0..plan.rows).map(|row| if row % 2 == 0 { 6 } else { [1, 3, 4][row / 2 % 3] }).collect();
    let tiles: usize = [1, 3, 4, 6]
        .map(|e| chosen.iter().filter(|&&chosen| chosen == e).count().div_ceil(plan.tile.tokens))
        .iter()
        .sum();
    let (x, expert) = (device.upload(&problem.x), device.upload(&chosen));
    let (weight, mut buffer) = (DeviceWeight::new(device, &problem.weight), device.alloc(sort.len()));
    let groups = sort.run(device.queue(), expert.view(), buffer.view_mut()).unwrap();
    let mut y = device.alloc::<bf16>(plan.rows * n);
    let extras = matmul::Extras::<bf16>::default();
    plan.run(device.queue(), x.view(), &weight.view(), &groups, &extras, y.view_mut()).unwrap();
    Row {
        kernel: plan.kernel.unwrap(),
        device: name,
        what: format!("{tokens} tokens, 4 of {experts} experts, NF4 {n} x {k}"),
        counters: device.counters().unwrap(),
        elements: (tiles * n * k) as f64,
        read: ((nf4.packed().len() + nf4.absmax().len() * 4) / 2 + tokens * k * 2) as f64,
        written: (plan.rows * n * 2) as f64,
    }
}

fn rows() -> Vec<Row> {
    let (a100, h200) = (Device::emulator(), Device::emulate(Spec::h200()));
    let (ampere, hopper) = (("A100", &a100), ("H200", &h200));
    let nf4 = |tokens, n, k| Problem::<bf16>::nf4(tokens, n, k, 64);
    let mut rows = vec![
        product(hopper, &nf4(1, 4096, 4096)),
        product(hopper, &nf4(8, 4096, 4096)),
        product(hopper, &nf4(16, 4096, 4096)),
        product(hopper, &nf4(1, 512, 4096)),
        product(hopper, &nf4(8, 512, 4096)),
        product(hopper, &nf4(16, 512, 4096)),
        product(hopper, &nf4(1, 512, 14336)),
        product(hopper, &nf4(1, 1024, 4096)),
        product(ampere, &nf4(1, 4096, 2048)),
        product(ampere, &nf4(16, 4096, 2048)),
        product(ampere, &Problem::<bf16>::dense(1, 4096, 1024)),
        product(ampere, &Problem::<bf16>::dense(8, 4096, 1024)),
        product(ampere, &Problem::<f32>::nf4(1, 4096, 1024, 64)),
        product(ampere, &Problem::<f32>::nf4(8, 4096, 1024, 64)),
        product(hopper, &nf4(64, 4096, 512)),
        product(hopper, &nf4(512, 4096, 256)),
        product(hopper, &nf4(1024, 4096, 256)),
        product(hopper, &Problem::<bf16>::dense(512, 4096, 256)),
        product(hopper, &Problem::<bf16>::dense(1024, 4096, 256)),
        product(ampere, &nf4(24, 16384, 256)),
        product(ampere, &nf4(64, 16384, 256)),
        product(ampere, &nf4(512, 6912, 128)),
        product(ampere, &Problem::<bf16>::dense(512, 6912, 128)),
        transposed(hopper, nf4(64, 512, 4096)),
        transposed(hopper, nf4(512, 256, 4096)),
        transposed(hopper, Problem::<bf16>::dense(512, 256, 4096)),
        transposed(ampere, nf4(512, 128, 6912)),
        transposed(ampere, Problem::<bf16>::dense(512, 128, 6912)),
        experts(ampere, 4, 1024, 1024),
        experts(ampere, 96, 1024, 256),
    ];
    for (tokens, count, rank) in [(1, 1, 16), (16, 1, 64), (32, 32, 16)] {
        rows.extend(adapters(hopper, tokens, count, rank));
    }
    rows
}

/// Blocks (and splits) of products by shape, and the share of the multiprocessors' time that has work: whether grids fill the device.
fn blocks() -> String {
    const TOKENS: [usize; 6] = [1, 16, 32, 64, 256, 2048];
    let mut text = format!("| W | device |{}\n", TOKENS.map(|tokens| format!(" {tokens} |")).concat());
    text += &format!("|---|---|{}\n", "--:|".repeat(TOKENS.len()));
    let codes = WeightFormat::Nf4 { blocksize: 64 };
    let few = [(512, 4096), (512, 14336), (1024, 4096), (1024, 14336), (2048, 4096), (3072, 4096)];
    let many = [(4096, 4096), (4096, 14336), (6144, 4096), (28672, 4096), (8192, 28672)];
    let all_codes = few.into_iter().chain(many).map(|shape| (codes, shape));
    let dense = few.into_iter().chain([(4096, 4096)]).map(|shape| (WeightFormat::Dense, shape));
    for (weight, (n, k)) in all_codes.chain(dense) {
        for (name, spec) in [("A100", Spec::a100()), ("H200", Spec::h200())] {
            let device = Device::emulate(spec);
            let multiprocessors = device.queue().properties().sm_count as usize;
            let cells = TOKENS.map(|tokens| {
                let shape = matmul::Shape { tokens, n, k, dtype: DType::BF16, weight };
                let plan = matmul::plan(&shape, device.queue().properties()).unwrap();
                let ([x, y, _], tile) = (plan.grid, plan.tile);
                // The multiprocessor with the most to do, and all.
                let steps = k.div_ceil(tile.step);
                let tiles = tokens.div_ceil(tile.tokens) * n.div_ceil(tile.rows);
                let rounds = (tiles * plan.splits).div_ceil(multiprocessors) * steps.div_ceil(plan.splits);
                let share = 100 * tiles * steps / (rounds * multiprocessors);
                let two_passes = if plan.dequantize.is_some() { "*" } else { "" };
                format!(" {} in {}, {share} %{two_passes} |", x * y, plan.splits)
            });
            let kind = if weight == codes { "NF4" } else { "dense" };
            text += &format!("| {kind} {n} x {k} | {name} |{}\n", cells.concat());
        }
    }
    text
}

#[test]
fn the_table_holds() {
    let rows = rows();
    let cells: Vec<_> = rows.iter().map(Row::cells).collect();
    let line = |row: &Cells| format!("| {} | {:.2} |\n", row.exact.join(" | "), row.instructions);
    let text = format!(
        "{ABOUT}| kernel | device | what | blocks | read | asked | written | conflicts, loads | stores | instructions |\n\
         |---|---|---|--:|--:|--:|--:|--:|--:|--:|\n{}\n\
         ## Blocks of a product, and the splits of its sums, by tokens\n\n{}\n{ABOUT_BLOCKS}",
        cells.iter().map(line).collect::<String>(),
        blocks()
    );
    if env::var_os("LORA_KERNELS_BLESS").is_some() {
        fs::write(TABLE, &text).unwrap();
    }
    rows.iter().for_each(Row::check);
    let committed = fs::read_to_string(TABLE).unwrap();
    let mut differing = committed.lines().zip(text.lines()).filter(|(old, new)| {
        match (old.rsplit_once(" | "), new.rsplit_once(" | ")) {
            (Some((old, a)), Some((new, b))) if old == new => {
                let number = |cell: &str| cell.trim_end_matches(" |").parse::<f64>();
                match (number(a), number(b)) {
                    (Ok(a), Ok(b)) => (a - b).abs() > INSTRUCTIONS_MAY_DIFFER * a,
                    _ => a != b,
                }
            }
            _ => old != new,
        }
    });
    if let Some((old, new)) = differing.next() {
        panic!("kernels/COUNTERS.md has\n{old}\nbut it is\n{new}");
    }
    assert_eq!(committed.lines().count(), text.lines().count());
}
