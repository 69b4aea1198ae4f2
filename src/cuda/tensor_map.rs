//! How Hopper's copy engine sees a tensor.

use bytemuck::{Pod, Zeroable};

use crate::{Error, Result};

/// How the 16-byte units of a box are permuted in shared memory, by bits 7 and up of their address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    #[default]
    None,
    /// Inside of 32 bytes.
    Bytes32,
    /// Inside of 64 bytes.
    Bytes64,
    /// Inside of 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// The bytes inside of which units are permuted; what a line of a box may have at most.
    pub const fn span(self) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Bytes32 => Some(32),
            Self::Bytes64 => Some(64),
            Self::Bytes128 => Some(128),
        }
    }
}

/// A tensor in device memory, and the box of it that one copy moves. The slices have one item for each dimension, of which
/// there are 1 to 5, the fastest first.
///
/// What a box has outside of the tensor is zero. [`Queue::encode`](super::Queue::encode) makes of it what a kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap<'a> {
    /// Address of the first element, a multiple of 16.
    pub address: u64,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element_bytes: usize,
    /// Elements of each dimension: 1 to 2^32.
    pub dims: &'a [u64],
    /// Bytes from one index to the next, of every dimension but the first: multiples of 16 below 2^40.
    pub strides: &'a [u64],
    /// Elements of the box: 1 to 256 of each dimension, and multiples of 16 bytes of the first.
    pub box_dims: &'a [u32],
    /// Order of the box in shared memory.
    pub swizzle: Swizzle,
}

impl TensorMap<'_> {
    /// Checks everything that hardware asks for.
    ///
    /// # Errors
    /// [`Error::Argument`] for what it does not take.
    pub fn check(&self) -> Result<()> {
        let argument = |wanted: &str, found: String| Err(Error::argument("tensor map", wanted, found));
        let rank = self.dims.len();
        if !(1..=5).contains(&rank) || self.strides.len() != rank - 1 || self.box_dims.len() != rank {
            let found =
                format!("{rank}, with {} strides and {} of the box", self.strides.len(), self.box_dims.len());
            return argument(
                "1 to 5 dimensions, a stride for each but the first, and a box of as many",
                found,
            );
        }
        if !matches!(self.element_bytes, 1 | 2 | 4 | 8) {
            return argument("elements of 1, 2, 4 or 8 bytes", self.element_bytes.to_string());
        }
        if !self.address.is_multiple_of(16) {
            return argument("an address that is a multiple of 16", format!("{:#x}", self.address));
        }
        if self.dims.iter().any(|dim| !(1..=1 << 32).contains(dim)) {
            return argument("1 to 2^32 elements of each dimension", format!("{:?}", self.dims));
        }
        if self.strides.iter().any(|stride| !stride.is_multiple_of(16) || *stride >= 1 << 40) {
            return argument("strides that are multiples of 16 below 2^40", format!("{:?}", self.strides));
        }
        if self.box_dims.iter().any(|extent| !(1..=256).contains(extent)) {
            return argument("boxes of 1 to 256 elements", format!("{:?}", self.box_dims));
        }
        let line = self.box_dims[0] as usize * self.element_bytes;
        if !line.is_multiple_of(16) || self.swizzle.span().is_some_and(|span| line > span) {
            let wanted = match self.swizzle.span() {
                Some(span) => format!("lines of the box that are multiples of 16 bytes up to {span}"),
                None => "lines of the box that are multiples of 16 bytes".into(),
            };
            return argument(&wanted, line.to_string());
        }
        Ok(())
    }
}

/// An encoded [`TensorMap`], to be part of a kernel's parameters: a `CUtensorMap` on a GPU. It means something only to the
/// device that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct EncodedMap(pub [u64; 16]);

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: TensorMap<'_> = TensorMap {
        address: 0x1000,
        element_bytes: 2,
        dims: &[72, 40],
        strides: &[144],
        box_dims: &[64, 16],
        swizzle: Swizzle::Bytes128,
    };

    #[test]
    fn what_hardware_does_not_take_is_refused_by_name() {
        GOOD.check().unwrap();
        for (map, says) in [
            (TensorMap { address: 0x1008, ..GOOD }, "0x1008"),
            (TensorMap { element_bytes: 3, ..GOOD }, "elements of 1, 2, 4 or 8 bytes"),
            (TensorMap { dims: &[72], ..GOOD }, "1, with 1 strides"),
            (TensorMap { dims: &[72, 0], ..GOOD }, "1 to 2^32"),
            (TensorMap { strides: &[146], ..GOOD }, "multiples of 16"),
            (TensorMap { strides: &[1 << 40], ..GOOD }, "below 2^40"),
            (TensorMap { box_dims: &[64, 257], ..GOOD }, "1 to 256"),
            (TensorMap { box_dims: &[20, 16], ..GOOD }, "multiples of 16 bytes up to 128"),
            (TensorMap { box_dims: &[128, 16], ..GOOD }, "up to 128"),
        ] {
            let error = map.check().unwrap_err().to_string();
            assert!(error.contains("tensor map") && error.contains(says), "{error}");
        }
    }
}
