//! How long an engine takes.

use std::cell::Cell;
use std::time::{Duration, Instant};

use lora_kernels::adapter::Adapter;
use lora_kernels::cpu::AdamWStep;
use lora_kernels::nf4::{NestedAbsmax, Nf4Matrix};
use lora_kernels::{DType, Result, Tensor};

use super::engine::{Direction, Engine, Extras, Gradients, LowRank, Slack, Weight};

/// An engine that adds up the time of its operations, with the copies to and from the device.
pub struct Timed<'a> {
    engine: &'a dyn Engine,
    elapsed: Cell<Duration>,
}

impl<'a> Timed<'a> {
    /// Starts at zero.
    pub fn new(engine: &'a dyn Engine) -> Self {
        Self { engine, elapsed: Cell::default() }
    }

    /// The time of all operations so far.
    pub fn elapsed(&self) -> Duration {
        self.elapsed.get()
    }

    fn time<T>(&self, run: impl FnOnce(&dyn Engine) -> T) -> T {
        let start = Instant::now();
        let result = run(self.engine);
        self.elapsed.set(self.elapsed.get() + start.elapsed());
        result
    }
}

impl Engine for Timed<'_> {
    fn name(&self) -> String {
        self.engine.name()
    }

    fn on_host(&self) -> bool {
        self.engine.on_host()
    }

    fn nf4_quantize(&self, x: &Tensor, blocksize: usize) -> Result<(Vec<u8>, Vec<f32>)> {
        self.time(|e| e.nf4_quantize(x, blocksize))
    }

    fn absmax_quantize(&self, absmax: &[f32]) -> Result<NestedAbsmax> {
        self.time(|e| e.absmax_quantize(absmax))
    }

    fn nf4_dequantize(&self, weight: &Nf4Matrix, dtype: DType) -> Result<Tensor> {
        self.time(|e| e.nf4_dequantize(weight, dtype))
    }

    fn matmul(&self, x: &Tensor, weight: Weight<'_>, extras: Extras<'_>) -> Result<Tensor> {
        self.time(|e| e.matmul(x, weight, extras))
    }

    fn slack(&self, x: &Tensor, weight: Weight<'_>) -> Result<Slack> {
        self.engine.slack(x, weight)
    }

    fn dora_scale(&self, weight: Weight<'_>, lora: &LowRank, magnitude: &[f32]) -> Result<Vec<f32>> {
        self.time(|e| e.dora_scale(weight, lora, magnitude))
    }

    fn merge(
        &self,
        direction: Direction,
        weight: &Tensor,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
        fan_in_fan_out: bool,
    ) -> Result<Tensor> {
        self.time(|e| e.merge(direction, weight, lora, row_scale, fan_in_fan_out))
    }

    fn nf4_merge(
        &self,
        direction: Direction,
        weight: &Nf4Matrix,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
    ) -> Result<Nf4Matrix> {
        self.time(|e| e.nf4_merge(direction, weight, lora, row_scale))
    }

    fn gradients(&self, weight: Weight<'_>, adapter: &Adapter, x: &Tensor, dy: &Tensor) -> Result<Gradients> {
        self.time(|e| e.gradients(weight, adapter, x, dy))
    }

    fn adamw(
        &self,
        step: &AdamWStep,
        p: &[f32],
        gradient: &[f32],
        moments: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 3]> {
        self.time(|e| e.adamw(step, p, gradient, moments))
    }

    fn importance(
        &self,
        p: &[f32],
        gradient: &[f32],
        betas: [f64; 2],
        state: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 2]> {
        self.time(|e| e.importance(p, gradient, betas, state))
    }
}
