//! AdaLoRA's own parts of a training step (arXiv:2303.10512): `B (A ⊙ E)` as LoRA's product, the gradients of A and E from that of
//! `A ⊙ E`, and the smoothed importance of parameters. All have the bits of [`cpu::adalora_fold`](crate::cpu::adalora_fold()),
//! [`cpu::adalora_gradient`](crate::cpu::adalora_gradient()) and [`cpu::importance`](crate::cpu::importance()), but for dE, whose sum
//! is f32 in another order, which depends on the row's length alone.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, find, read_only};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    kernel("adalora_fold_f32"),
    kernel("adalora_fold_f16"),
    kernel("adalora_fold_bf16"),
    kernel("adalora_gradient_f32"),
    kernel("adalora_gradient_f16"),
    kernel("adalora_gradient_bf16"),
    kernel("adalora_importance_f32"),
    kernel("adalora_importance_f16"),
    kernel("adalora_importance_bf16"),
];

const fn kernel(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("adalora", entry)
}

const THREADS: u32 = 256;

/// A matrix of parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The rank, of lora_a.
    pub rows: usize,
    /// The inputs, of lora_a.
    pub columns: usize,
    /// The type of the parameters.
    pub dtype: DType,
}

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// Kernels of [`Plan::fold`], [`Plan::gradient`] and [`Plan::importance`].
    pub kernels: [Kernel; 3],
    /// Blocks of 256 elements. The gradient has one for each row.
    pub blocks: u32,
}

/// `Params` of `adalora.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    a: u64,
    e: u64,
    gradient: u64,
    de: u64,
    sensitivity: u64,
    uncertainty: u64,
    rows: u32,
    columns: u32,
    first: [f32; 2],
    second: [f32; 2],
}

/// Chooses the kernels and the grid.
///
/// # Errors
/// [`Error::Argument`] for sizes or a grid of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    dimension("rows", shape.rows)?;
    dimension("columns", shape.columns)?;
    let of = |operation: &str| find(KERNELS, &format!("adalora_{operation}_{}", shape.dtype));
    let elements = shape.rows as u64 * shape.columns as u64;
    Ok(Plan(Details {
        shape: *shape,
        kernels: [of("fold"), of("gradient"), of("importance")],
        blocks: blocks("rows * columns", elements.div_ceil(u64::from(THREADS)))?,
    }))
}

impl Plan {
    /// `folded[r, k] = A[r, k] E[r]`: what takes the place of lora_a in LoRA. `lora_a` and `folded` are `[rank, k]`, `lora_e` is
    /// `[rank]`; views are aligned to their elements.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, [`Error::Device`] when the launch fails.
    pub fn fold<T: Element>(
        &self,
        queue: &dyn Queue,
        lora_a: View<'_, T>,
        lora_e: View<'_, T>,
        folded: ViewMut<'_, f32>,
    ) -> Result<()> {
        let device = queue.properties();
        let params = self.params(("lora_a", lora_a), device)?;
        lora_e.check("lora_e", self.shape.rows, self.shape.dtype.size() as u64, device)?;
        folded.check("folded", lora_a.len(), 4, device)?;
        let params = Params { e: lora_e.address(), gradient: folded.address(), ..params };
        self.launch(queue, self.kernels[0], self.blocks, &params)
    }

    /// From the gradient of `folded` those of its factors: `de[r] = Σ_k gradient[r, k] A[r, k]`, and `gradient[r, k] E[r]`, which takes
    /// the place of `gradient`. Shapes are as in [`Plan::fold`]; `de` is `[rank]`.
    ///
    /// # Errors
    /// As [`Plan::fold`].
    pub fn gradient<T: Element>(
        &self,
        queue: &dyn Queue,
        lora_a: View<'_, T>,
        lora_e: View<'_, T>,
        gradient: ViewMut<'_, f32>,
        de: ViewMut<'_, f32>,
    ) -> Result<()> {
        let device = queue.properties();
        let params = self.params(("lora_a", lora_a), device)?;
        lora_e.check("lora_e", self.shape.rows, self.shape.dtype.size() as u64, device)?;
        gradient.check("gradient", lora_a.len(), 4, device)?;
        de.check("de", self.shape.rows, 4, device)?;
        let (e, gradient, de) = (lora_e.address(), gradient.address(), de.address());
        let params = Params { e, gradient, de, ..params };
        self.launch(queue, self.kernels[1], self.shape.rows as u32, &params)
    }

    /// One step of the averages `sensitivity` of `s = |p g|` and `uncertainty` of `|s - sensitivity|`, with their betas (equations 8
    /// to 10). All views are as long as the parameter, of any factor.
    ///
    /// # Errors
    /// As [`Plan::fold`].
    pub fn importance<T: Element>(
        &self,
        queue: &dyn Queue,
        parameter: View<'_, T>,
        gradient: View<'_, f32>,
        [beta1, beta2]: [f64; 2],
        [sensitivity, uncertainty]: [ViewMut<'_, f32>; 2],
    ) -> Result<()> {
        let device = queue.properties();
        let params = self.params(("parameter", parameter), device)?;
        gradient.check("gradient", parameter.len(), 4, device)?;
        sensitivity.check("sensitivity", parameter.len(), 4, device)?;
        uncertainty.check("uncertainty", parameter.len(), 4, device)?;
        let pair = |beta: f64| [beta as f32, (1.0 - beta) as f32];
        let params = Params {
            gradient: gradient.address(),
            sensitivity: sensitivity.address(),
            uncertainty: uncertainty.address(),
            first: pair(beta1),
            second: pair(beta2),
            ..params
        };
        self.launch(queue, self.kernels[2], self.blocks, &params)
    }

    fn params<T: Element>(&self, (name, a): (&str, View<'_, T>), device: &Properties) -> Result<Params> {
        let Shape { rows, columns, dtype } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument(name, dtype.name(), T::DTYPE));
        }
        a.check(name, rows * columns, dtype.size() as u64, device)?;
        Ok(Params { a: a.address(), rows: rows as u32, columns: columns as u32, ..Params::zeroed() })
    }

    fn launch(&self, queue: &dyn Queue, kernel: Kernel, blocks: u32, params: &Params) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let launch = Launch {
            kernel,
            grid: [blocks, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(params),
            overlap: false,
        };
        // SAFETY: the callers' views cover what the kernels read and write, as they have checked, and those that are written are
        // borrowed alone.
        unsafe { queue.launch(&launch) }
    }
}
