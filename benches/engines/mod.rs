//! What runs the operations.

mod cpu;
mod gpu;

use half::bf16;
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The rank of the adapters.
pub const RANK: usize = 16;
/// How many adapters a [`Problem`] has.
pub const ADAPTERS: usize = 16;
/// How many tokens a [`Problem`] has.
pub const MAX_TOKENS: usize = 64;
/// Experts that the rows of a weight are shared among, and those of a token.
pub const EXPERTS: usize = 8;
pub const CHOICES: usize = 2;
const BLOCKSIZE: usize = 64;

/// The experts of `m` tokens.
fn chosen(m: usize) -> Vec<i32> {
    (0..m * CHOICES).map(|row| (row * 5 % EXPERTS) as i32).collect()
}

/// A linear layer in every form that the operations take.
pub struct Problem {
    pub n: usize,
    pub k: usize,
    pub weight: Vec<bf16>,
    pub plain: Nf4Matrix,
    pub nested: Nf4Matrix,
    pub x: Vec<bf16>,
    /// A and B of each adapter.
    pub adapters: Vec<[Vec<bf16>; 2]>,
}

impl Problem {
    pub fn new(n: usize, k: usize) -> Self {
        let mut random = StdRng::seed_from_u64(7);
        let mut values = |len: usize| -> Vec<bf16> {
            (0..len).map(|_| bf16::from_f32(random.random_range(-0.1f32..0.1))).collect()
        };
        let weight = values(n * k);
        let quantize =
            |nesting| Nf4Matrix::quantize(&weight, [n, k], BLOCKSIZE, &Codebook::nf4(), nesting).unwrap();
        Self {
            n,
            k,
            plain: quantize(Nesting::Plain),
            nested: quantize(Nesting::Nested),
            x: values(MAX_TOKENS * k),
            adapters: (0..ADAPTERS).map(|_| [values(RANK * k), values(n * RANK)]).collect(),
            weight,
        }
    }
}

/// Times calls of what it is given.
pub type Timer<'a> = &'a mut dyn FnMut(&mut dyn FnMut());

/// Prepares an operation on a problem, and hands the call of it to the timer.
pub trait Engine {
    fn name(&self) -> &'static str;
    /// `[N, K]` of the weights.
    fn shapes(&self) -> &'static [[usize; 2]];
    /// Waits for all calls.
    fn synchronize(&self);
    fn quantize(&self, problem: &Problem, timer: Timer<'_>);
    fn dequantize(&self, problem: &Problem, timer: Timer<'_>);
    /// The first `m` tokens; without adapters, with one for all of them, or with one after the other.
    fn matmul(&self, problem: &Problem, m: usize, adapters: usize, timer: Timer<'_>);
    /// The first `m` tokens, by the weight as a stack of [`EXPERTS`]; token i has [`CHOICES`] of them, one after the other.
    fn experts(&self, problem: &Problem, m: usize, timer: Timer<'_>);
    fn merge(&self, problem: &Problem, timer: Timer<'_>);
    fn nf4_merge(&self, problem: &Problem, timer: Timer<'_>);
    /// The sums of a report, of a 4-bit weight and itself.
    fn merge_report(&self, problem: &Problem, timer: Timer<'_>);
    /// Scales by their error, and codes that keep the gain, of a 4-bit weight without a delta.
    fn nf4_requantize(&self, problem: &Problem, timer: Timer<'_>);
}

/// The CPU, and the GPU where there is one.
pub fn all() -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(cpu::Cpu)];
    if let Some(gpu) = gpu::Gpu::find() {
        engines.push(Box::new(gpu));
    }
    engines
}
