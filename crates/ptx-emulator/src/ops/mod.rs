//! What instructions compute, apart from how they are decoded and scheduled.

pub(crate) mod atomic;
pub(crate) mod float;
pub(crate) mod half;
pub(crate) mod integer;
pub(crate) mod lanes;
pub(crate) mod matrix;
pub(crate) mod round;
pub(crate) mod wgmma;
