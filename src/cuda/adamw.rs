//! AdamW for all tensors of a model in one launch, with moments in f32 or in blocks of 8 bits, and before it the norm of all
//! gradients, to clip them by.
//!
//! Every element goes through the operations of [`cpu::adamw`](crate::cpu::adamw()), each rounded, so both give the same bits. The
//! norm's sum of squares is f64 in an order that depends on the tensors' sizes alone.
//!
//! [`Plan::norm`] leaves a [`Status`] on the device, which [`Plan::step`] reads there: the factor that clips, and whether a gradient
//! is not finite and the step is to be left out, with every parameter and moment as it was. The host waits for nothing; whoever
//! wants to know which tensor it was copies the status.

use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

use super::check::{blocks, dimension, read_only};
use super::deltas::code;
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::cpu::{AdamWStep, MOMENT_BLOCKSIZE};
use crate::nf4::{DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP, block_count};
use crate::{Element, Error, Result};

const NORM_SUM: Kernel = kernel("adamw_norm_sum");
const NORM_FINISH: Kernel = kernel("adamw_norm_finish");
const STEP_F32: Kernel = kernel("adamw_f32");
const STEP_8BIT: Kernel = kernel("adamw_8bit");

pub(super) const KERNELS: &[Kernel] = &[NORM_SUM, NORM_FINISH, STEP_F32, STEP_8BIT];

const fn kernel(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("adamw", entry)
}

const THREADS: u32 = 256;
const FINISH_THREADS: u32 = 1024;

/// Elements that a block takes.
const TILE: usize = 2048;

/// One tensor and its state.
#[derive(Debug)]
pub struct TensorView<'a, T> {
    /// What is learnt, aligned to 16 bytes.
    pub parameter: ViewMut<'a, T>,
    /// Its gradient, as long, aligned to 16 bytes.
    pub gradient: View<'a, f32>,
    /// Its moments.
    pub moments: Moments<'a>,
}

/// The moments of one tensor, zero before the first step; see [`cpu::MomentsMut`](crate::cpu::MomentsMut). All are aligned to 16
/// bytes, scales to 4.
#[derive(Debug)]
pub enum Moments<'a> {
    /// In f32, as long as the tensor.
    F32 {
        /// The first moment.
        m: ViewMut<'a, f32>,
        /// The second moment.
        v: ViewMut<'a, f32>,
    },
    /// In 8 bits, as long as the tensor, with a scale for every 256 elements. Zeros are the codes 127 of m and 0 of v, under any
    /// finite scale.
    Blockwise {
        /// Codes of the first moment.
        m: ViewMut<'a, u8>,
        /// Its scales: `[ceil(len / 256)]`.
        m_absmax: ViewMut<'a, f32>,
        /// Codes of the second moment.
        v: ViewMut<'a, u8>,
        /// Its scales.
        v_absmax: ViewMut<'a, f32>,
    },
}

/// What [`Plan::norm`] finds, as it lies on the device.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Status {
    /// The 2-norm of all gradients.
    pub norm: f32,
    /// `min(1, max_norm / (norm + 1e-6))`: what the step multiplies gradients by.
    pub scale: f32,
    /// The first tensor with a gradient that is not finite, or -1.
    pub not_finite: i32,
    /// Zero.
    pub padding: u32,
}

/// `Tensor` of `adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Entry {
    parameter: u64,
    gradient: u64,
    m: u64,
    v: u64,
    m_absmax: u64,
    v_absmax: u64,
    count: u64,
    first_block: u32,
    dtype: u32,
}

/// `Params` of `adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    maps: u64,
    tensors: u64,
    squares: u64,
    status: u64,
    count: u32,
    blocks: u32,
    max_norm: f32,
    skip: u32,
    first: [f32; 2],
    second: [f32; 2],
    decay: f32,
    step_size: f32,
    correction: f32,
    epsilon: f32,
}

const _: () = assert!(size_of::<Params>() == 80 && size_of::<Entry>() == 64);

/// All tensors that a step changes, in a device buffer that the caller lends. It is made once.
#[derive(Debug)]
pub struct TensorTable<'a> {
    entries: View<'a, u8>,
    shape: Shape,
    tensors: PhantomData<&'a mut f32>,
}

/// What is to be done; see [`TensorTable::shape`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many tensors there are.
    pub tensors: usize,
    /// Pieces of 2048 elements that they are cut into, each tensor on its own.
    pub pieces: usize,
    /// Whether the moments are in blocks of 8 bits.
    pub blockwise: bool,
}

impl<'a> TensorTable<'a> {
    const MAPS: [&'static [f32; 256]; 2] = [&DYNAMIC_MAP, &UNSIGNED_DYNAMIC_MAP];

    /// The size of the buffer for `count` tensors.
    pub const fn bytes(count: usize) -> usize {
        2 * 256 * size_of::<f32>() + count * size_of::<Entry>()
    }

    /// Checks `tensors`, whose moments are all of one kind, and uploads what kernels need to know of them into `buffer`:
    /// [`TensorTable::bytes`] bytes or more, aligned to 16.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as long as their parameter, not aligned, or another device's; for moments of both
    /// kinds, a buffer that is too small, or 2^42 elements and above. [`Error::Device`] when the upload fails.
    pub fn upload<T: Element>(
        queue: &dyn Queue,
        tensors: Vec<TensorView<'a, T>>,
        buffer: ViewMut<'a, u8>,
    ) -> Result<Self> {
        let device = queue.properties();
        dimension("tensors", tensors.len())?;
        buffer.check_at_least("buffer", Self::bytes(tensors.len()), 16, device)?;
        let blockwise =
            matches!(tensors.first(), Some(TensorView { moments: Moments::Blockwise { .. }, .. }));
        let (mut entries, mut pieces) = (Vec::with_capacity(tensors.len()), 0);
        for (i, tensor) in tensors.iter().enumerate() {
            entries.push(tensor.entry(i, pieces, blockwise, device)?);
            pieces = pieces.saturating_add(tensor.parameter.len().div_ceil(TILE));
            dimension("tensors", pieces)?;
        }
        let mut bytes: Vec<u8> =
            Self::MAPS.iter().flat_map(|map| bytemuck::cast_slice(*map).to_vec()).collect();
        bytes.extend_from_slice(bytemuck::cast_slice(&entries));
        // SAFETY: the buffer has room for the maps and the entries, as checked above.
        unsafe { queue.upload(buffer.address(), &bytes)? };
        let shape = Shape { tensors: tensors.len(), pieces, blockwise };
        Ok(Self { entries: buffer.into_view(), shape, tensors: PhantomData })
    }

    /// What [`plan`] is to be asked for.
    pub fn shape(&self) -> Shape {
        self.shape
    }
}

impl<T: Element> TensorView<'_, T> {
    fn entry(&self, i: usize, first_block: usize, blockwise: bool, device: &Properties) -> Result<Entry> {
        let name = |field: &str| format!("tensors[{i}].{field}");
        let len = self.parameter.len();
        self.parameter.check(&name("parameter"), len, 16, device)?;
        self.gradient.check(&name("gradient"), len, 16, device)?;
        let entry = Entry {
            parameter: self.parameter.address(),
            gradient: self.gradient.address(),
            count: len as u64,
            first_block: first_block as u32,
            dtype: code(T::DTYPE),
            ..Entry::zeroed()
        };
        match &self.moments {
            Moments::F32 { m, v } if !blockwise => {
                m.check(&name("moments.m"), len, 16, device)?;
                v.check(&name("moments.v"), len, 16, device)?;
                Ok(Entry { m: m.address(), v: v.address(), ..entry })
            }
            Moments::Blockwise { m, m_absmax, v, v_absmax } if blockwise => {
                let blocks = block_count(len, MOMENT_BLOCKSIZE);
                m.check(&name("moments.m"), len, 16, device)?;
                v.check(&name("moments.v"), len, 16, device)?;
                m_absmax.check(&name("moments.m_absmax"), blocks, 4, device)?;
                v_absmax.check(&name("moments.v_absmax"), blocks, 4, device)?;
                let (m_absmax, v_absmax) = (m_absmax.address(), v_absmax.address());
                Ok(Entry { m: m.address(), v: v.address(), m_absmax, v_absmax, ..entry })
            }
            _ => {
                let [wanted, got] = if blockwise {
                    ["8-bit, as tensors[0]'s", "f32"]
                } else {
                    ["f32, as tensors[0]'s", "8-bit"]
                };
                Err(Error::argument(name("moments"), wanted, got))
            }
        }
    }
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
    /// The kernel of the step.
    pub kernel: Kernel,
    /// Its blocks, one for each piece; none where there are no elements.
    pub blocks: u32,
    /// Device memory that [`Plan::norm`] wants to be lent.
    pub workspace_bytes: usize,
}

/// Chooses the kernel and the grid.
///
/// # Errors
/// [`Error::Argument`] for 2^31 tensors or pieces and above.
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    dimension("tensors", shape.tensors)?;
    Ok(Plan(Details {
        shape: *shape,
        kernel: if shape.blockwise { STEP_8BIT } else { STEP_F32 },
        blocks: blocks("pieces", shape.pieces as u64)?,
        workspace_bytes: (shape.pieces + shape.tensors) * size_of::<f64>(),
    }))
}

impl Plan {
    /// Finds the norm of all gradients, the factor that brings it to `max_norm` at most (infinity leaves gradients as they are), and
    /// the first tensor with one that is not finite. `workspace` has `Plan::workspace_bytes()` or more, aligned to 16.
    ///
    /// # Errors
    /// [`Error::Argument`] for a table that is not as the plan's shape says, views that are too small, or a `max_norm` that is not
    /// above 0; [`Error::Device`] when a launch fails.
    pub fn norm(
        &self,
        queue: &dyn Queue,
        tensors: &TensorTable<'_>,
        max_norm: f32,
        workspace: ViewMut<'_, u8>,
        status: ViewMut<'_, Status>,
    ) -> Result<()> {
        let device = queue.properties();
        let params = self.params(tensors, device)?;
        if max_norm.is_nan() || max_norm <= 0.0 {
            return Err(Error::argument("max_norm", "a number above 0", max_norm));
        }
        workspace.check_at_least("workspace", self.workspace_bytes, 16, device)?;
        status.check("status", 1, 16, device)?;
        let params = Params { squares: workspace.address(), status: status.address(), max_norm, ..params };
        if self.blocks > 0 {
            launch(queue, NORM_SUM, [self.blocks, THREADS], &params)?;
        }
        launch(queue, NORM_FINISH, [1, FINISH_THREADS], &params)
    }

    /// One step of all tensors. `step` is [`AdamW::step`](crate::cpu::AdamW::step)'s. With a `status`, which [`Plan::norm`] has made of
    /// the same gradients, these are clipped, and where `skip_not_finite` is set and one is not finite nothing is changed.
    ///
    /// # Errors
    /// [`Error::Argument`] for a table that is not as the plan's shape says; [`Error::Device`] when the launch fails.
    pub fn step(
        &self,
        queue: &dyn Queue,
        step: &AdamWStep,
        tensors: &mut TensorTable<'_>,
        status: Option<View<'_, Status>>,
        skip_not_finite: bool,
    ) -> Result<()> {
        let device = queue.properties();
        let params = self.params(tensors, device)?;
        if let Some(status) = status {
            status.check("status", 1, 16, device)?;
        }
        let params = Params {
            status: status.map_or(0, |status| status.address()),
            skip: u32::from(skip_not_finite),
            first: step.first,
            second: step.second,
            decay: step.decay,
            step_size: step.step_size,
            correction: step.correction,
            epsilon: step.epsilon,
            ..params
        };
        if self.blocks == 0 { Ok(()) } else { launch(queue, self.kernel, [self.blocks, THREADS], &params) }
    }

    fn params(&self, tensors: &TensorTable<'_>, device: &Properties) -> Result<Params> {
        if tensors.shape != self.shape {
            return Err(Error::argument(
                "tensors",
                format!("{:?}", self.shape),
                format!("{:?}", tensors.shape),
            ));
        }
        tensors.entries.check_at_least("tensors", 0, 16, device)?;
        Ok(Params {
            maps: tensors.entries.address(),
            tensors: tensors.entries.address() + TensorTable::bytes(0) as u64,
            count: self.shape.tensors as u32,
            blocks: self.blocks,
            ..Params::zeroed()
        })
    }
}

fn launch(queue: &dyn Queue, kernel: Kernel, [blocks, threads]: [u32; 2], params: &Params) -> Result<()> {
    let launch = Launch {
        kernel,
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        shared_bytes: 0,
        params: bytemuck::bytes_of(params),
        overlap: false,
    };
    // SAFETY: the tensors were checked when their table was made, the rest by the caller; they are borrowed, so they live until
    // the caller lets go of them, and those that are written are borrowed alone.
    unsafe { queue.launch(&launch) }
}
