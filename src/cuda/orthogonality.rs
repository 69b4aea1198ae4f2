//! AdaLoRA's penalty on singular vectors that are not orthonormal (arXiv:2303.10512, equation 4, as PEFT has it): the norm of `D = A Aᵀ - I`
//! of lora_a's rows, or `D = Bᵀ B - I` of lora_b's columns, and `weight` times its gradient, `2 D A / ‖D‖`, added to the factor's. See
//! [`cpu::orthogonality`](crate::cpu::orthogonality()).
//!
//! Sums are f64; what is added to the gradient is rounded to f32, and the sum again. Three launches: D in tiles of four by four vectors, its norm
//! by one block, and a thread for every element of the gradient. The bits depend on the shape and the factor alone.

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, find, read_only};
use super::{Kernel, Launch, MAX_RANK, Properties, Queue, View, ViewMut};
use crate::cpu::Vectors;
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    kernel("orthogonality_difference_f32"),
    kernel("orthogonality_difference_f16"),
    kernel("orthogonality_difference_bf16"),
    kernel("orthogonality_norm"),
    kernel("orthogonality_gradient_f32"),
    kernel("orthogonality_gradient_f16"),
    kernel("orthogonality_gradient_bf16"),
];

const fn kernel(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("orthogonality", entry)
}

const THREADS: u32 = 256;
const TILE: usize = 4;

/// A factor, `[rows, columns]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The rank of lora_a, the outputs of lora_b.
    pub rows: usize,
    /// The inputs of lora_a, the rank of lora_b.
    pub columns: usize,
    /// Which of them are the singular vectors.
    pub vectors: Vectors,
    /// The type of the factor.
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
    /// In this order.
    pub kernels: [Kernel; 3],
    /// Blocks of each.
    pub blocks: [u32; 3],
    /// f64 of device memory that [`Plan::run`] wants to be lent: D.
    pub workspace_len: usize,
}

/// `Params` of `orthogonality.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    factor: u64,
    difference: u64,
    norm: u64,
    gradient: u64,
    vectors: u32,
    length: u32,
    vector_pitch: u32,
    element_pitch: u32,
    weight: f32,
    padding: u32,
}

/// Chooses the kernels and the grids.
///
/// # Errors
/// [`Error::Argument`] for more than [`MAX_RANK`] vectors, and sizes or a grid of 2^31 and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    let Shape { rows, columns, vectors, dtype } = *shape;
    dimension("rows", rows)?;
    dimension("columns", columns)?;
    let (name, count) = match vectors {
        Vectors::Rows => ("rows", rows),
        Vectors::Columns => ("columns", columns),
    };
    if count > MAX_RANK {
        return Err(Error::argument(name, format!("at most {MAX_RANK} vectors"), count));
    }
    let of = |operation: &str| find(KERNELS, &format!("orthogonality_{operation}_{dtype}"));
    let elements = rows as u64 * columns as u64;
    Ok(Plan(Details {
        shape: *shape,
        kernels: [of("difference"), find(KERNELS, "orthogonality_norm"), of("gradient")],
        blocks: [
            count.div_ceil(TILE).pow(2) as u32,
            1,
            blocks("rows * columns", elements.div_ceil(u64::from(THREADS)))?,
        ],
        workspace_len: count * count,
    }))
}

impl Plan {
    /// Writes `norm` `[1]` and adds `weight` times the gradient to `gradient`, `[rows, columns]` as `factor`. `weight` is PEFT's
    /// `orth_reg_weight` over the number of factors. `workspace` has [`Details::workspace_len`] elements or more; what it holds
    /// does not matter.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, [`Error::Device`] when a launch fails.
    pub fn run<T: Element>(
        &self,
        queue: &dyn Queue,
        factor: View<'_, T>,
        weight: f32,
        gradient: ViewMut<'_, f32>,
        norm: ViewMut<'_, f64>,
        workspace: ViewMut<'_, f64>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { rows, columns, vectors, dtype } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("factor", dtype.name(), T::DTYPE));
        }
        factor.check("factor", rows * columns, dtype.size() as u64, device)?;
        gradient.check("gradient", rows * columns, 4, device)?;
        norm.check("norm", 1, 8, device)?;
        workspace.check_at_least("workspace", self.workspace_len, 8, device)?;
        let (count, length, vector_pitch, element_pitch) = match vectors {
            Vectors::Rows => (rows, columns, columns, 1),
            Vectors::Columns => (columns, rows, 1, columns),
        };
        let params = Params {
            factor: factor.address(),
            difference: workspace.address(),
            norm: norm.address(),
            gradient: gradient.address(),
            vectors: count as u32,
            length: length as u32,
            vector_pitch: vector_pitch as u32,
            element_pitch: element_pitch as u32,
            weight,
            padding: 0,
        };
        for (kernel, blocks) in self.kernels.into_iter().zip(self.blocks).filter(|(_, blocks)| *blocks > 0) {
            let launch = Launch {
                kernel,
                grid: [blocks, 1, 1],
                block: [THREADS, 1, 1],
                shared_bytes: 0,
                params: bytemuck::bytes_of(&params),
                overlap: false,
            };
            // SAFETY: the views cover what the kernels read and write, as was checked above, and those that are written are
            // borrowed alone.
            unsafe { queue.launch(&launch)? };
        }
        Ok(())
    }
}
