//! What the tests of kernels share: 4-bit matrices and adapters on the device, data, comparisons.

#![allow(dead_code, reason = "no test needs all of it")]

use lora_kernels::cuda::{AbsmaxView, AdapterView, NestedView, Nf4View, View};
use lora_kernels::nf4::{Absmax, Codebook, Nf4Matrix};
use lora_kernels::{Element, Error, cpu};
use lora_kernels_devices::{Buffer, Device};

/// A 4-bit matrix in device memory.
pub struct Nf4Buffers {
    pub packed: Buffer<u8>,
    pub absmax: AbsmaxBuffers,
    pub blocksize: usize,
    pub codebook: Codebook,
}

pub enum AbsmaxBuffers {
    Plain(Buffer<f32>),
    Nested { q: Buffer<u8>, absmax: Buffer<f32>, map: Buffer<f32>, offset: Buffer<f32>, blocksize: usize },
}

impl Nf4Buffers {
    pub fn upload(device: &Device, matrix: &Nf4Matrix) -> Self {
        let absmax = match matrix.absmax() {
            Absmax::Plain(absmax) => AbsmaxBuffers::Plain(device.upload(absmax)),
            Absmax::Nested(nested) => AbsmaxBuffers::Nested {
                q: device.upload(nested.q()),
                absmax: device.upload(nested.absmax()),
                map: device.upload(nested.map()),
                offset: device.upload(&[nested.offset()]),
                blocksize: nested.blocksize(),
            },
        };
        Self {
            packed: device.upload(matrix.packed()),
            absmax,
            blocksize: matrix.blocksize(),
            codebook: matrix.codebook().clone(),
        }
    }

    pub fn view(&self) -> Nf4View<'_> {
        let absmax = match &self.absmax {
            AbsmaxBuffers::Plain(absmax) => AbsmaxView::Plain(absmax.view()),
            AbsmaxBuffers::Nested { q, absmax, map, offset, blocksize } => AbsmaxView::Nested(NestedView {
                q: q.view(),
                absmax: absmax.view(),
                map: map.view(),
                offset: offset.view(),
                blocksize: *blocksize,
            }),
        };
        Nf4View { packed: self.packed.view(), absmax, blocksize: self.blocksize, codebook: &self.codebook }
    }
}

/// An adapter on both sides.
pub struct Adapter<A> {
    pub rank: usize,
    pub scaling: f32,
    lora_a: Vec<A>,
    lora_b: Vec<A>,
    device_a: Buffer<A>,
    device_b: Buffer<A>,
}

impl<A: Element> Adapter<A> {
    /// Random factors, so that the elements of scaling * lora_b * lora_a are about `size`.
    pub fn random(device: &Device, data: &mut Data, [n, k]: [usize; 2], rank: usize, size: f32) -> Self {
        let (lora_a, lora_b) = (data.normal(rank * k, 1.0), data.normal(n * rank, 1.0));
        Self {
            rank,
            scaling: size / (rank as f32).max(1.0).sqrt(),
            device_a: device.upload(&lora_a),
            device_b: device.upload(&lora_b),
            lora_a,
            lora_b,
        }
    }

    pub fn host(&self) -> cpu::LowRank<'_, A> {
        cpu::LowRank { lora_a: &self.lora_a, lora_b: &self.lora_b, rank: self.rank, scaling: self.scaling }
    }

    pub fn view(&self) -> AdapterView<'_, A> {
        AdapterView {
            lora_a: self.device_a.view(),
            lora_b: self.device_b.view(),
            rank: self.rank,
            scaling: self.scaling,
        }
    }
}

/// Random numbers that are the same on every machine (splitmix64).
pub struct Data(pub u64);

impl Data {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About normal (the sum of twelve uniform numbers), with this standard deviation.
    pub fn normal<T: Element>(&mut self, len: usize, deviation: f32) -> Vec<T> {
        let mut sample = || (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0;
        (0..len).map(|_| T::from_f64(sample() * f64::from(deviation))).collect()
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.bits() as u8).collect()
    }
}

/// Asserts that all bits are equal, but that a NaN is any NaN.
pub fn assert_same_bits<T: Element>(ours: &[T], theirs: &[T], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (our, their)) in ours.iter().zip(theirs).enumerate() {
        let same = bytemuck::bytes_of(our) == bytemuck::bytes_of(their);
        let nan = our.to_f32().is_nan() && their.to_f32().is_nan();
        assert!(same || nan, "{what}: element {i} is {our:?}, not {their:?}");
    }
}

/// Asserts that a call was refused, and because of this argument.
pub fn assert_refuses<R>(result: Result<R, Error>, argument: &str) {
    match result {
        Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
        Err(other) => panic!("{argument}: {other}"),
        Ok(_) => panic!("{argument} was accepted"),
    }
}

/// A view of the same elements that claims to lie on another device.
pub fn elsewhere<T: bytemuck::Pod>(view: View<'_, T>) -> View<'_, T> {
    let memory = lora_kernels::cuda::MemoryId(view.memory().0 ^ 1);
    // SAFETY: nothing reads it: calls refuse it, as its memory is not the queue's.
    unsafe { View::from_raw(view.address(), view.len(), memory) }
}
