//! Merges undone to the bit, whatever the weights, the adapters and the merge; and records that are not what they should be.

use lora_kernels::adapter::{
    AdaLora, Adapter, Base, Dora, Lora, Requantize, Restored, Rounding, Scale, Stack, Undo,
};
use lora_kernels::nf4::{Absmax, BLOCKSIZES, Codebook, NestedAbsmax, Nesting, Nf4Matrix};
use lora_kernels::tensor::Data;
use lora_kernels::{DType, Element, Error, Tensor};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sha2::{Digest, Sha256};

/// A weight that a test owns.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there are few of them")]
enum Weight {
    Dense(Tensor),
    Nf4(Nf4Matrix),
}

impl Weight {
    fn base(&self) -> Base<'_> {
        match self {
            Weight::Dense(tensor) => tensor.into(),
            Weight::Nf4(matrix) => matrix.into(),
        }
    }

    /// Bits, not numbers: NaN is equal to itself, and -0 is not 0.
    fn bits(&self) -> (DType, Vec<Vec<u8>>) {
        match self {
            Weight::Dense(tensor) => (tensor.dtype(), vec![tensor.as_bytes().to_vec()]),
            Weight::Nf4(matrix) => {
                let bytes = |values: &[f32]| bytemuck::cast_slice(values).to_vec();
                let mut parts = vec![
                    matrix.packed().to_vec(),
                    bytes(matrix.codebook().values()),
                    vec![matrix.blocksize().trailing_zeros() as u8],
                ];
                match matrix.absmax() {
                    Absmax::Plain(absmax) => parts.push(bytes(absmax)),
                    Absmax::Nested(nested) => parts.extend([
                        nested.q().to_vec(),
                        bytes(nested.absmax()),
                        bytes(nested.map()),
                        bytes(&[nested.offset(), nested.blocksize() as f32]),
                    ]),
                }
                (matrix.dtype(), parts)
            }
        }
    }
}

impl From<Restored> for Weight {
    fn from(restored: Restored) -> Self {
        match restored {
            Restored::Dense(tensor) => Weight::Dense(tensor),
            Restored::Nf4(matrix) => Weight::Nf4(matrix),
        }
    }
}

struct Random(StdRng);

impl Random {
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.0.random_range(0..from.len())]
    }

    fn normal(&mut self, len: usize, spread: f32) -> Vec<f32> {
        // Near enough: a sum of uniform numbers.
        let mut one = || (0..12).map(|_| self.0.random_range(-0.5..0.5f32)).sum::<f32>();
        (0..len).map(|_| spread * one()).collect()
    }

    fn tensor(&mut self, shape: &[usize], spread: f32, dtype: DType) -> Tensor {
        let values = self.normal(shape.iter().product(), spread);
        Tensor::from_f32(shape, &values, dtype).unwrap()
    }

    /// Any bits at all.
    fn any_bits(&mut self, shape: [usize; 2], dtype: DType) -> Tensor {
        fn bits<T: Element>(rng: &mut StdRng, len: usize) -> Vec<T> {
            (0..len).map(|_| T::from_bits(rng.random())).collect()
        }
        let (rng, len) = (&mut self.0, shape[0] * shape[1]);
        let data = match dtype {
            DType::F32 => Data::F32(bits(rng, len)),
            DType::F16 => Data::F16(bits(rng, len)),
            DType::BF16 => Data::BF16(bits(rng, len)),
        };
        Tensor::new(shape, data).unwrap()
    }

    /// Ordinary numbers, extreme ones, and zeros of both signs.
    fn dense(&mut self, shape: [usize; 2], dtype: DType) -> Tensor {
        if self.0.random_bool(0.1) {
            return self.any_bits(shape, dtype);
        }
        let (smallest, largest) = if dtype == DType::F16 { (-24, 12) } else { (-147, 120) };
        let exponent = if self.0.random_bool(0.5) { -6 } else { self.0.random_range(smallest..largest) };
        let mut values = self.normal(shape[0] * shape[1], 2.0f32.powi(exponent));
        for value in &mut values {
            match self.0.random_range(0..40) {
                0 => *value = 0.0,
                1 => *value = -0.0,
                2 => *value *= 2.0f32.powi(-40),
                _ => {}
            }
        }
        Tensor::from_f32(shape, &values, dtype).unwrap()
    }

    fn nf4(&mut self, shape: [usize; 2], dtype: DType) -> Nf4Matrix {
        let custom: [f32; 16] = std::array::from_fn(|_| self.pick(&[-1.0, 0.0, -0.0, 0.3, 0.3, 1.0, 1.5]));
        let codebook = match self.0.random_range(0..4) {
            0 => Codebook::fp4(),
            1 => Codebook::from_values(custom).unwrap(),
            _ => Codebook::nf4(),
        };
        let blocksize = self.pick(&BLOCKSIZES);
        let nesting = self.pick(&[Nesting::Plain, Nesting::Nested]);
        let weight = self.dense(shape, dtype);
        let matrix = Nf4Matrix::quantize_tensor(&weight, blocksize, &codebook, nesting).unwrap();
        if self.0.random_bool(0.7) {
            return matrix;
        }
        // Not what any quantiser writes.
        let packed: Vec<u8> = matrix.packed().iter().map(|_| self.0.random()).collect();
        let absmax = match matrix.absmax() {
            Absmax::Plain(absmax) => {
                Absmax::Plain(absmax.iter().map(|_| f32::from_bits(self.0.random())).collect())
            }
            Absmax::Nested(nested) => {
                let q = nested.q().iter().map(|_| self.0.random()).collect();
                let map = Box::new(std::array::from_fn(|_| self.0.random_range(-1.0..1.0)));
                let (absmax, offset) = (nested.absmax().to_vec(), self.0.random_range(-1.0..1.0));
                Absmax::Nested(NestedAbsmax::from_parts(q, absmax, map, offset, nested.blocksize()).unwrap())
            }
        };
        Nf4Matrix::from_parts(shape, packed, absmax, blocksize, codebook, dtype).unwrap()
    }

    fn adapter(&mut self, [n, k]: [usize; 2], fan_in_fan_out: bool, spread: f32) -> Adapter {
        let rank = self.pick(&[0, 1, 2, 5, 17]);
        let dtype = self.pick(&DType::ALL);
        let (a, b) = (self.tensor(&[rank, k], 1.0, dtype), self.tensor(&[n, rank], spread, dtype));
        let kind = self.0.random_range(0..3);
        if kind == 0 && !fan_in_fan_out {
            let e = self.tensor(&[rank, 1], 1.0, DType::F32);
            return AdaLora::new(a, e, b, 8.0, 6).unwrap().into();
        }
        let lora = Lora::new(a, b, self.0.random_range(-2.0..2.0)).unwrap();
        let lora = lora.with_fan_in_fan_out(fan_in_fan_out);
        match kind {
            1 => Dora::new(lora, self.tensor(&[n], 1.0, DType::F32)).unwrap().into(),
            _ => lora.into(),
        }
    }

    fn adapters(&mut self, shape: [usize; 2], fan_in_fan_out: bool, spread: f32) -> Vec<Adapter> {
        let count = self.0.random_range(1..4);
        (0..count).map(|_| self.adapter(shape, fan_in_fan_out, spread)).collect()
    }

    fn requantize(&mut self) -> Requantize {
        let seed = self.0.random();
        let scale = self.pick(&[Scale::Largest, Scale::LeastError]);
        let rounding = self.pick(&[Rounding::Nearest, Rounding::Stochastic { seed }, Rounding::KeepGain]);
        Requantize { scale, rounding, ..Requantize::default() }.forced()
    }

    /// A merge, into anything; when it is refused (what is not finite), or now and then, a weight that has nothing to do with it.
    fn merge(&mut self, stack: &Stack, weight: &Weight) -> Weight {
        let (shape, dtype) = (stack.weight_shape(), self.pick(&DType::ALL));
        let merged = match weight {
            _ if self.0.random_bool(0.1) => None,
            Weight::Nf4(matrix) if self.0.random_bool(0.7) => {
                stack.merge(matrix, self.requantize()).ok().map(|merged| Weight::Nf4(merged.weight))
            }
            _ => stack.merge(weight.base(), dtype).ok().map(|merged| Weight::Dense(merged.weight)),
        };
        merged.unwrap_or_else(|| match self.0.random_bool(0.5) {
            true => Weight::Dense(self.any_bits(shape, dtype)),
            false => Weight::Nf4(self.nf4(shape, dtype)),
        })
    }
}

fn refs(adapters: &[Adapter]) -> Vec<&Adapter> {
    adapters.iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Merges that follow one another come back one after the other, to the bit; in another order, or with other adapters,
    /// they are refused.
    #[test]
    fn every_bit_comes_back(seed: u64) {
        let mut random = Random(StdRng::seed_from_u64(seed));
        let nf4 = random.0.random_bool(0.5);
        let fan_in_fan_out = !nf4 && random.0.random_bool(0.3);
        let shapes: &[[usize; 2]] = &[[1, 1], [3, 5], [7, 64], [33, 129], [64, 96], [0, 4], [4, 0], [300, 401]];
        let [rows, columns] = random.pick(shapes);
        let shape = if fan_in_fan_out { [columns, rows] } else { [rows, columns] };
        let dtype = random.pick(&DType::ALL);
        let mut weight = match nf4 {
            true => Weight::Nf4(random.nf4([rows, columns], dtype)),
            false => Weight::Dense(random.dense([rows, columns], dtype)),
        };
        let mut history = Vec::new();
        for _ in 0..random.0.random_range(1..4) {
            let spread = 2.0f32.powi(random.0.random_range(-12..0));
            let adapters = random.adapters(shape, fan_in_fan_out, spread);
            // DoRA refuses what has no norm.
            let Ok(stack) = Stack::new(&refs(&adapters), weight.base()) else { continue };
            let merged = random.merge(&stack, &weight);
            if fan_in_fan_out && matches!(merged, Weight::Nf4(_)) {
                continue;
            }
            let undo = Undo::record(&refs(&adapters), weight.base(), merged.base()).unwrap();
            prop_assert_eq!(undo.shape(), [rows, columns]);
            prop_assert_eq!(&Undo::from_bytes(undo.as_bytes()).unwrap(), &undo);
            history.push((weight, adapters, undo));
            weight = merged;
        }
        for (original, adapters, undo) in history.iter().rev() {
            for (other, others, _) in &history {
                // Another weight, or other adapters: an error, or what is right all the same.
                if other.bits() != weight.bits() && rows * columns > 0 {
                    prop_assert!(undo.restore(&refs(adapters), other.base()).is_err());
                }
                if let Ok(restored) = undo.restore(&refs(others), weight.base()) {
                    prop_assert_eq!(Weight::from(restored).bits(), original.bits());
                }
            }
            weight = undo.restore(&refs(adapters), weight.base()).unwrap().into();
            prop_assert_eq!(weight.bits(), original.bits());
        }
    }

    /// Bytes that were cut, or changed, are refused; when their digest has been made to fit, nothing breaks.
    #[test]
    fn damaged_records_are_refused(seed: u64) {
        let mut random = Random(StdRng::seed_from_u64(seed));
        let (shape, dtype) = ([9, 40], random.pick(&DType::ALL));
        let weight = match random.0.random_bool(0.5) {
            true => Weight::Nf4(random.nf4(shape, dtype)),
            false => Weight::Dense(random.dense(shape, dtype)),
        };
        let adapters = random.adapters(shape, false, 0.01);
        let Ok(stack) = Stack::new(&refs(&adapters), weight.base()) else { return Ok(()) };
        let merged = random.merge(&stack, &weight);
        let undo = Undo::record(&refs(&adapters), weight.base(), merged.base()).unwrap();
        let whole = undo.as_bytes();
        for _ in 0..40 {
            let mut bytes = whole.to_vec();
            let at = random.0.random_range(0..bytes.len());
            match random.0.random_range(0..4) {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 1 << random.0.random_range(0..8),
                2 => bytes[at] = random.pick(&[0, 1, 255]),
                _ => bytes.insert(at, random.0.random()),
            }
            if bytes == whole {
                continue;
            }
            let refused = Undo::from_bytes(bytes.clone()).unwrap_err();
            prop_assert!(matches!(refused, Error::Format { place: _, .. }), "{}", refused);
            if bytes.len() >= 24 {
                let digest = Sha256::digest(&bytes[24..]);
                bytes[8..24].copy_from_slice(&digest[..16]);
                if let Ok(undo) = Undo::from_bytes(bytes) {
                    let _ = undo.restore(&refs(&adapters), merged.base());
                }
            }
        }
    }
}

fn simple() -> (Adapter, Tensor, Tensor) {
    // No library rounds these: small integers over powers of two.
    let values = |len: usize, step: usize, unit: f32| -> Vec<f32> {
        (0..len).map(|i| ((i * step) % 257) as f32 * unit - 128.0 * unit).collect()
    };
    let tensor = |shape: [usize; 2], step, unit| {
        Tensor::from_f32(shape, &values(shape[0] * shape[1], step, unit), DType::F32).unwrap()
    };
    let (a, b) = (tensor([2, 300], 19, 1.0 / 256.0), tensor([250, 2], 23, 1.0 / 512.0));
    let weight = Tensor::from_f32([250, 300], &values(75000, 101, 1.0 / 64.0), DType::BF16).unwrap();
    let adapter = Adapter::from(Lora::new(a, b, 0.5).unwrap());
    let merged = weight.to_f64().into_iter().zip(adapter.delta().unwrap()).map(|(w, d)| (w + d) as f32);
    let merged = Tensor::from_f32([250, 300], &merged.collect::<Vec<_>>(), DType::BF16).unwrap();
    (adapter, weight, merged)
}

/// Records are kept in files: what is written today has to be readable tomorrow, and elsewhere.
#[test]
fn the_format_stays() {
    let (adapter, weight, merged) = simple();
    let undo = Undo::record(&[&adapter], &weight, &merged).unwrap();
    let digest = Sha256::digest(undo.as_bytes());
    assert_eq!(&undo.as_bytes()[..8], b"LKUNDO\x01\0");
    assert_eq!((undo.as_bytes().len(), digest[..4].to_vec()), (1045, vec![179, 201, 126, 147]));
}

#[test]
fn what_does_not_fit_is_named() {
    let (adapter, weight, merged) = simple();
    let undo = Undo::record(&[&adapter], &weight, &merged).unwrap();
    let refused = |error: Error, wanted: &str| {
        let Error::Argument { argument, .. } = &error else { panic!("{error}") };
        assert_eq!(argument, wanted, "{error}");
    };
    let zeros =
        |shape: [usize; 2], dtype| Tensor::from_f32(shape, &vec![0.0; shape[0] * shape[1]], dtype).unwrap();
    refused(Undo::record(&[&adapter], &weight, &zeros([300, 250], DType::BF16)).unwrap_err(), "merged");
    refused(Undo::record(&[], &weight, &merged).unwrap_err(), "adapters");
    refused(undo.restore(&[&adapter], &zeros([300, 250], DType::BF16)).unwrap_err(), "merged");
    refused(undo.restore(&[&adapter], &zeros([250, 300], DType::F16)).unwrap_err(), "merged");
    let another = zeros([250, 300], DType::BF16);
    refused(undo.restore(&[&adapter], &another).unwrap_err(), "merged, elements 0 to 65535");
    // The last bit of the last element.
    let mut bits: Vec<f32> = merged.to_f32();
    *bits.last_mut().unwrap() = f32::from_bits(bits.last().unwrap().to_bits() ^ 0x1_0000);
    let another = Tensor::from_f32([250, 300], &bits, DType::BF16).unwrap();
    refused(undo.restore(&[&adapter], &another).unwrap_err(), "merged, elements 65536 to 74999");
    let nf4 = Nf4Matrix::quantize_tensor(&merged, 64, &Codebook::nf4(), Nesting::Plain).unwrap();
    refused(undo.restore(&[&adapter], &nf4).unwrap_err(), "merged");
    let Adapter::Lora(lora) = &adapter else { unreachable!() };
    let scaled = Lora::new(lora.lora_a().clone(), lora.lora_b().clone(), 0.25).unwrap().into();
    refused(undo.restore(&[&scaled], &merged).unwrap_err(), "adapters");
    refused(undo.restore(&[], &merged).unwrap_err(), "adapters");
    let dora = Dora::new(lora.clone(), Tensor::from_f32([250], &[1.0; 250], DType::F32).unwrap()).unwrap();
    refused(undo.restore(&[&dora.into()], &merged).unwrap_err(), "adapters");
    let narrow = Lora::new(zeros([1, 299], DType::F32), zeros([250, 1], DType::F32), 1.0).unwrap().into();
    refused(undo.restore(&[&narrow], &merged).unwrap_err(), "base of adapters[0]");
}

/// What the documentation promises of sizes, with deltas of a tenth of the weight.
#[test]
fn records_are_small() {
    let mut random = Random(StdRng::seed_from_u64(3));
    let shape = [512, 512];
    let (a, b) = (random.tensor(&[16, 512], 1.0, DType::F32), random.tensor(&[512, 16], 1.0, DType::F32));
    let adapter = Adapter::from(Lora::new(a, b, 0.02 * 0.1 / 4.0).unwrap());
    let per_weight = |weight: &Weight, merged: &Weight| {
        let undo = Undo::record(&[&adapter], weight.base(), merged.base()).unwrap();
        undo.as_bytes().len() as f64 / (512.0 * 512.0)
    };
    for (dtype, most) in [(DType::F32, 0.15), (DType::F16, 0.03), (DType::BF16, 0.03)] {
        let weight = random.tensor(&shape, 0.02, dtype);
        let merged = Stack::new(&[&adapter], &weight).unwrap().merge(&weight, dtype).unwrap().weight;
        let size = per_weight(&Weight::Dense(weight), &Weight::Dense(merged));
        assert!(size < most, "{dtype}: {size} bytes per weight");
    }
    let weight = random.tensor(&shape, 0.02, DType::BF16);
    let base = Nf4Matrix::quantize_tensor(&weight, 64, &Codebook::nf4(), Nesting::Nested).unwrap();
    let stack = Stack::new(&[&adapter], &base).unwrap();
    let dense = Weight::Dense(stack.merge(&base, DType::BF16).unwrap().weight);
    let nf4 = Weight::Nf4(stack.merge(&base, Requantize::default().forced()).unwrap().weight);
    let base = Weight::Nf4(base);
    for (merged, most) in [(dense, 0.006), (nf4, 0.03)] {
        let size = per_weight(&base, &merged);
        assert!(size < most, "4-bit: {size} bytes per weight");
    }
}
