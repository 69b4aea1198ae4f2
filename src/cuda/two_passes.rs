//! Two passes over a 4-bit W: a 16-bit copy of it is made in the caller's workspace, and that is multiplied.
//!
//! It is chosen where it takes less by the model, and [`plan`](super::matmul::plan) says so: where rows of codes are not whole
//! pieces but rows of elements are, and on devices that are not Hopper for some small W, whose tiles are small and would decode it again and again.

use super::matmul::{Shape, Weight, WeightFormat, WeightParams};
use super::nf4_dequantize::{self, Plan};
use super::{Properties, Queue, ViewMut};
use crate::{Element, Error, Result};

/// Two passes take at most so much of the time of one, by a model that is not exact.
const LESS: f64 = 0.95;

/// A launch, in nanoseconds: what one is taken for that adds parts of sums.
const LAUNCH: f64 = 2500.0;

/// What a copy moves of a weight: 4.5 bits to be read, 16 to be written.
const BYTES: f64 = 2.5625;

/// Bytes that a multiprocessor moves in a nanosecond: what the memory of an A100 delivers to each of 108 (1.555 TB/s). On an H200
/// a copy took as long, 158 us for 28672 x 4096 (`benches/results`, *prefill*: what came before cuBLAS), which is half of what memory allows.
const RATE: f64 = 14.4;

/// The same shape of a copy.
pub(super) fn of_copy(shape: &Shape) -> Shape {
    Shape { weight: WeightFormat::Dense, ..*shape }
}

/// Whether a product of the copy, which takes `two` nanoseconds, and the copy before it take less than one that takes `one`.
pub(super) fn take_less(shape: &Shape, device: &Properties, one: f64, two: f64) -> bool {
    let rate = RATE * f64::from(device.sm_count.max(1));
    let copy = LAUNCH + BYTES * shape.n as f64 * shape.k as f64 / rate;
    shape.weight != WeightFormat::Dense && copy + two < LESS * one
}

/// What makes the copy.
pub(super) fn plan(shape: &Shape, device: &Properties) -> Result<Plan> {
    let WeightFormat::Nf4 { blocksize } = shape.weight else { unreachable!("a dense W is not copied") };
    nf4_dequantize::plan(
        &nf4_dequantize::Shape { numel: shape.n * shape.k, blocksize, dtype: shape.dtype },
        device,
    )
}

/// The workspace's part for the copy, in bytes. (Its rows are whole pieces of 16.)
pub(super) fn bytes(shape: &Shape) -> usize {
    shape.n * shape.k * shape.dtype.size()
}

/// Makes the copy at the start of the workspace, which has been checked, and says where it is.
pub(super) fn run<T: Element>(
    plan: &Plan,
    queue: &dyn Queue,
    weight: &Weight<'_, T>,
    workspace: &ViewMut<'_, u8>,
) -> Result<WeightParams> {
    let Weight::Nf4(weight) = weight else { return Err(Error::argument("weight", "4-bit codes", "dense")) };
    // SAFETY: the workspace has room for the copy and is aligned for it; it is lent for the whole call, which uses it as this alone.
    let copy = unsafe { ViewMut::<T>::from_raw(workspace.address(), plan.shape.numel, workspace.memory()) };
    plan.run(queue, weight, copy)?;
    Ok(WeightParams::dense(workspace.address()))
}
