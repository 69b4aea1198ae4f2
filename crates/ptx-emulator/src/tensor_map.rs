//! Tensor maps: how a box of a tensor in global memory is copied to and from shared memory.

/// Bytes of the units that a box is permuted in when it lies in shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Swizzle {
    /// As it comes.
    #[default]
    None,
    /// 16-byte units inside of 32 bytes, by bit 7 of the address.
    Bytes32,
    /// Inside of 64 bytes, by bits 7 and 8.
    Bytes64,
    /// Inside of 128 bytes, by bits 7 to 9.
    Bytes128,
}

impl Swizzle {
    pub(crate) fn bits(self) -> u32 {
        self as u32
    }
}

/// Parameters of `cuTensorMapEncodeTiled`, without interleaving and with element strides of 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Address of the first element, a multiple of 16.
    pub address: u64,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element_bytes: usize,
    /// Elements of each dimension, the fastest first; 1 to 5 dimensions.
    pub dims: Vec<u64>,
    /// Bytes from one index to the next, of every dimension but the first; multiples of 16.
    pub strides: Vec<u64>,
    /// Elements of the box that one copy moves, 1 to 256 per dimension.
    pub box_dims: Vec<u32>,
    /// Order of the box in shared memory.
    pub swizzle: Swizzle,
    /// Elements outside of the tensor are NaN, not zero.
    pub fill_nan: bool,
}

const MAGIC: [u8; 8] = *b"PTXEmuTM";

impl TensorMap {
    /// Bytes of an encoded map.
    pub const BYTES: usize = 128;

    /// What a kernel takes for a `CUtensorMap` on the emulator (a GPU's is of another form).
    ///
    /// # Errors
    /// Says what `cuTensorMapEncodeTiled` would refuse.
    pub fn encode(&self) -> Result<[u8; TensorMap::BYTES], String> {
        self.check()?;
        let mut out = Vec::from(MAGIC);
        out.extend(self.address.to_le_bytes());
        out.extend([
            self.dims.len() as u8,
            self.element_bytes as u8,
            self.swizzle as u8,
            self.fill_nan as u8,
        ]);
        for i in 0..5 {
            out.extend((self.dims.get(i).map_or(0, |d| d - 1) as u32).to_le_bytes());
            out.extend(&self.strides.get(i).copied().unwrap_or(0).to_le_bytes()[..5]);
            out.extend((self.box_dims.get(i).copied().unwrap_or(0) as u16).to_le_bytes());
        }
        out.resize(TensorMap::BYTES, 0);
        out.try_into().map_err(|_| "128 bytes".into())
    }

    fn check(&self) -> Result<(), String> {
        let rank = self.dims.len();
        let refuse = |message: String| Err(format!("tensor map: {message}"));
        if !(1..=5).contains(&rank) || self.strides.len() != rank - 1 || self.box_dims.len() != rank {
            return refuse(format!(
                "{rank} dimensions, {} strides, {} of the box",
                self.strides.len(),
                self.box_dims.len()
            ));
        }
        if !matches!(self.element_bytes, 1 | 2 | 4 | 8) {
            return refuse(format!("elements of {} bytes", self.element_bytes));
        }
        if !self.address.is_multiple_of(16) {
            return refuse(format!("address {:#x} is not a multiple of 16", self.address));
        }
        if self.dims.iter().any(|d| !(1..=1 << 32).contains(d)) {
            return refuse(format!("dimensions {:?}; 1 to 2^32 are possible", self.dims));
        }
        if self.strides.iter().any(|s| !s.is_multiple_of(16) || *s >= 1 << 40) {
            return refuse(format!("strides {:?}; multiples of 16 below 2^40 are possible", self.strides));
        }
        if self.box_dims.iter().any(|b| !(1..=256).contains(b)) {
            return refuse(format!("box {:?}; 1 to 256 elements are possible", self.box_dims));
        }
        let inner = self.box_dims[0] as usize * self.element_bytes;
        if !inner.is_multiple_of(16) {
            return refuse(format!("{inner} bytes of the inner box dimension are not a multiple of 16"));
        }
        let span = 16usize << self.swizzle.bits();
        if self.swizzle != Swizzle::None && inner > span {
            return refuse(format!("{inner} bytes of the inner box dimension with a swizzle of {span}"));
        }
        Ok(())
    }
}

/// A map as copies use it.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    address: u64,
    element: usize,
    dims: Vec<u64>,
    strides: Vec<u64>,
    boxes: Vec<usize>,
    pub swizzle: Swizzle,
    fill_nan: bool,
}

impl Layout {
    pub(crate) fn decode(bytes: &[u8; TensorMap::BYTES]) -> Option<Layout> {
        if bytes[..8] != MAGIC {
            return None;
        }
        let number =
            |at: usize, n: usize| bytes[at..at + n].iter().rev().fold(0u64, |v, &b| v << 8 | b as u64);
        let rank = bytes[16] as usize;
        let swizzle =
            [Swizzle::None, Swizzle::Bytes32, Swizzle::Bytes64, Swizzle::Bytes128].get(bytes[18] as usize)?;
        let at = |i: usize| 20 + 11 * i;
        Some(Layout {
            address: number(8, 8),
            element: bytes[17] as usize,
            dims: (0..rank).map(|i| number(at(i), 4) + 1).collect(),
            strides: (0..rank - 1).map(|i| number(at(i) + 4, 5)).collect(),
            boxes: (0..rank).map(|i| number(at(i) + 9, 2) as usize).collect(),
            swizzle: *swizzle,
            fill_nan: bytes[19] == 1,
        })
    }

    pub(crate) fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Bytes of a box.
    pub(crate) fn bytes(&self) -> usize {
        self.boxes.iter().product::<usize>() * self.element
    }

    /// A box that lies outside of the tensor.
    pub(crate) fn filled(&self) -> Vec<u8> {
        let nan: &[u8] = match self.element {
            2 => &[0xff, 0x7f],
            4 => &[0xff, 0xff, 0xff, 0x7f],
            _ => &[0],
        };
        let fill = if self.fill_nan { nan } else { &[0] };
        fill.iter().copied().cycle().take(self.bytes()).collect()
    }

    /// The parts of the box at these coordinates that lie inside of the tensor: address, bytes, offset in the box.
    pub(crate) fn pieces(&self, at: &[i64]) -> Vec<(u64, usize, usize)> {
        let inner = self.boxes[0];
        let first = at[0].clamp(0, self.dims[0] as i64);
        let last = (at[0] + inner as i64).clamp(0, self.dims[0] as i64);
        let mut out = Vec::new();
        let lines: usize = self.boxes[1..].iter().product();
        for line in 0..lines {
            let (mut rest, mut address, mut inside) = (line, self.address as i64, last > first);
            let outer = self.strides.iter().zip(&self.dims[1..]).zip(&self.boxes[1..]).zip(&at[1..]);
            for (((&stride, &dim), &extent), &first) in outer {
                let index = first + (rest % extent) as i64;
                rest /= extent;
                inside &= index >= 0 && (index as u64) < dim;
                address += index * stride as i64;
            }
            if inside {
                let element = self.element as i64;
                let offset = line * inner * self.element + ((first - at[0]) * element) as usize;
                out.push(((address + first * element) as u64, ((last - first) * element) as usize, offset));
            }
        }
        out
    }
}
