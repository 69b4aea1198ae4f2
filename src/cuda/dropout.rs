//! What kernels are told of dropout.

use bytemuck::{Pod, Zeroable};

use crate::cpu::Dropout;

/// `Dropout` of `dropout.cuh`. All zeros drop nothing.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Params {
    seed: u64,
    offset: u64,
    threshold: u32,
    first_token: u32,
}

impl Params {
    pub(super) fn new(dropout: Option<&Dropout>) -> Self {
        dropout.map_or(Self::zeroed(), |dropout| Self {
            seed: dropout.seed(),
            offset: dropout.offset(),
            threshold: dropout.threshold(),
            first_token: dropout.first_token(),
        })
    }
}
