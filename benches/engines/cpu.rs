//! The CPU's paths.

use half::bf16;
use lora_kernels::adapter::Rounding;
use lora_kernels::cpu::{self, Accumulate, LowRank, MatmulExtras, Update, Weight};
use lora_kernels::nf4;

use super::{CHOICES, EXPERTS, Engine, Problem, RANK, Timer, chosen};

pub struct Cpu;

/// Projections of small models: square, up, down.
pub const SHAPES: &[[usize; 2]] = &[[1024, 1024], [3072, 1024], [1024, 3072]];

impl Problem {
    fn low_rank(&self, count: usize) -> Vec<LowRank<'_, bf16>> {
        let adapters = self.adapters[..count].iter();
        adapters.map(|[lora_a, lora_b]| LowRank { lora_a, lora_b, rank: RANK, scaling: 2.0 }).collect()
    }
}

impl Engine for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn shapes(&self) -> &'static [[usize; 2]] {
        SHAPES
    }

    fn synchronize(&self) {}

    fn quantize(&self, problem: &Problem, timer: Timer<'_>) {
        let (blocksize, codebook) = (problem.plain.blocksize(), problem.plain.codebook());
        let mut packed = vec![0; problem.plain.packed().len()];
        let mut absmax = vec![0.0; problem.plain.absmax().len()];
        timer(&mut || nf4::quantize(&problem.weight, blocksize, codebook, &mut packed, &mut absmax).unwrap());
    }

    fn dequantize(&self, problem: &Problem, timer: Timer<'_>) {
        let (blocksize, codebook) = (problem.plain.blocksize(), problem.plain.codebook());
        let absmax = problem.plain.absmax().dequantize();
        let mut out = problem.weight.clone();
        timer(&mut || {
            nf4::dequantize(problem.plain.packed(), &absmax, blocksize, codebook, &mut out).unwrap()
        });
    }

    fn matmul(&self, problem: &Problem, m: usize, adapters: usize, timer: Timer<'_>) {
        let adapters = problem.low_rank(adapters);
        let index: Vec<i32> = (0..m as i32).collect();
        let extras = MatmulExtras {
            adapters: &adapters,
            adapter_index: (adapters.len() > 1).then_some(&index),
            ..MatmulExtras::default()
        };
        let (weight, x) = (Weight::Nf4(&problem.nested), &problem.x[..m * problem.k]);
        let mut y = vec![bf16::ZERO; m * problem.n];
        timer(&mut || cpu::fast::matmul(x, m, &weight, &extras, &mut y).unwrap());
    }

    fn experts(&self, problem: &Problem, m: usize, timer: Timer<'_>) {
        let (weight, x, expert) = (Weight::Nf4(&problem.nested), &problem.x[..m * problem.k], chosen(m));
        let mut y = vec![bf16::ZERO; m * CHOICES * problem.n / EXPERTS];
        let (sizes, extras) = ([m, CHOICES, EXPERTS], MatmulExtras::<bf16>::default());
        timer(&mut || {
            cpu::expert_matmul(x, sizes, &weight, &expert, &extras, Accumulate::F32, &mut y).unwrap();
        });
    }

    fn merge(&self, problem: &Problem, timer: Timer<'_>) {
        let adapters = problem.low_rank(1);
        let update = Update { adapters: &adapters, row_scale: None, fan_in_fan_out: false };
        let mut merged = problem.weight.clone();
        timer(&mut || cpu::merge(&problem.weight, [problem.n, problem.k], &update, &mut merged).unwrap());
    }

    fn nf4_merge(&self, problem: &Problem, timer: Timer<'_>) {
        let adapters = problem.low_rank(1);
        let update = Update { adapters: &adapters, row_scale: None, fan_in_fan_out: false };
        let mut packed = problem.plain.packed().to_vec();
        let mut absmax = problem.plain.absmax().dequantize().into_owned();
        timer(&mut || cpu::nf4_merge(&problem.plain, &update, &mut packed, &mut absmax).unwrap());
    }

    fn merge_report(&self, problem: &Problem, timer: Timer<'_>) {
        let weight = problem.plain.dequantize::<f32>();
        timer(&mut || _ = cpu::merge_report(&weight, &weight, &weight).unwrap());
    }

    fn nf4_requantize(&self, problem: &Problem, timer: Timer<'_>) {
        let (before, wanted) = (&problem.plain, problem.plain.dequantize::<f32>());
        let mut packed = before.packed().to_vec();
        let mut absmax = before.absmax().dequantize().into_owned();
        timer(&mut || {
            cpu::nf4_requantize_scales(before, &wanted, &mut absmax).unwrap();
            cpu::nf4_requantize(before, &wanted, before.absmax(), Rounding::KeepGain, &mut packed).unwrap();
        });
    }
}
