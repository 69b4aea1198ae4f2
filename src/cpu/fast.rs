//! The products in parallel, for whole models.

use super::{Accumulate, MatmulExtras, Weight};
use crate::{Element, Result};

/// [`cpu::matmul`](super::matmul()).
///
/// # Errors
/// As there.
pub fn matmul<T: Element, A: Element>(
    x: &[T],
    m: usize,
    weight: &Weight<'_, T>,
    extras: &MatmulExtras<'_, T, A>,
    y: &mut [T],
) -> Result<()> {
    super::matmul(x, m, weight, extras, Accumulate::F32, y)
}
