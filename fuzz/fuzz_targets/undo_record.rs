//! Any bytes as the record that undoes a merge: an error, or a weight of the right shape, of which a record can be made that works.
//!
//! The first byte chooses a merge. With its highest bit, what follows is the record; without, it is edits of the real one (two bytes of
//! offset, and one to be added there), which get further: a record names its merged weight by a digest.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use lora_kernels::adapter::{Adapter, Base, Dora, Lora, Requantize, Restored, Stack, Undo};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Tensor};

const SHAPE: [usize; 2] = [5, 77];

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
}

struct Merge {
    adapter: Adapter,
    merged: Weight,
    record: Vec<u8>,
}

/// Numbers that look random.
fn noise(seed: u32, shape: [usize; 2], size: f32, dtype: DType) -> Tensor {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state as i32 as f32) * size / i32::MAX as f32
    };
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| next()).collect();
    Tensor::from_f32(shape, &values, dtype).unwrap()
}

static MERGES: LazyLock<Vec<Merge>> = LazyLock::new(|| {
    let lora =
        Lora::new(noise(1, [2, SHAPE[1]], 0.1, DType::F32), noise(2, [SHAPE[0], 2], 0.1, DType::F32), 1.0)
            .unwrap();
    let magnitude = Tensor::from_f32([SHAPE[0]], &[0.5, 0.4, 0.6, 0.5, 0.3], DType::F32).unwrap();
    let dora = Adapter::from(Dora::new(lora.clone(), magnitude).unwrap());
    let lora = Adapter::from(lora);
    let dense = |dtype| Weight::Dense(noise(3, SHAPE, 0.1, dtype));
    let nf4 = |nesting| {
        let weight = noise(4, SHAPE, 0.1, DType::BF16);
        Weight::Nf4(Nf4Matrix::quantize_tensor(&weight, 64, &Codebook::nf4(), nesting).unwrap())
    };
    let into = |adapter: &Adapter, original: Weight, target: Option<DType>| {
        let stack = Stack::new(&[adapter], original.base()).unwrap();
        let merged = match target {
            Some(dtype) => Weight::Dense(stack.merge(original.base(), dtype).unwrap().weight),
            None => Weight::Nf4(stack.merge(original.base(), Requantize::default().forced()).unwrap().weight),
        };
        let record = Undo::record(&[adapter], original.base(), merged.base()).unwrap().as_bytes().to_vec();
        Merge { adapter: adapter.clone(), merged, record }
    };
    vec![
        into(&lora, dense(DType::F32), Some(DType::F32)),
        into(&lora, dense(DType::BF16), Some(DType::BF16)),
        into(&lora, dense(DType::F16), Some(DType::BF16)),
        into(&dora, dense(DType::BF16), Some(DType::BF16)),
        into(&lora, nf4(Nesting::Nested), Some(DType::BF16)),
        into(&lora, nf4(Nesting::Nested), None),
        into(&dora, nf4(Nesting::Plain), None),
    ]
});

/// So that a NaN equals itself.
fn bits(restored: &Restored) -> Vec<u8> {
    match restored {
        Restored::Dense(tensor) => tensor.as_bytes().to_vec(),
        Restored::Nf4(matrix) => {
            let scales = matrix.absmax().dequantize();
            matrix
                .packed()
                .iter()
                .copied()
                .chain(scales.iter().flat_map(|scale| scale.to_le_bytes()))
                .collect()
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&first, rest)) = input.split_first() else { return };
    let Merge { adapter, merged, record } = &MERGES[usize::from(first & 0x7f) % MERGES.len()];
    let bytes = if first & 0x80 == 0 {
        let mut bytes = record.clone();
        for edit in rest.chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % bytes.len();
            bytes[at] = bytes[at].wrapping_add(edit[2]);
        }
        bytes
    } else {
        rest.to_vec()
    };
    let unchanged = bytes == *record;
    let restored = Undo::from_bytes(bytes).and_then(|undo| undo.restore(&[adapter], merged.base()));
    assert!(restored.is_ok() || !unchanged, "the real record is refused");
    let Ok(restored) = restored else { return };
    let weight = match &restored {
        Restored::Dense(tensor) => Weight::Dense(tensor.clone()),
        Restored::Nf4(matrix) => Weight::Nf4(matrix.clone()),
    };
    assert_eq!(weight.base().shape(), SHAPE);
    // A scale of DoRA's cannot be formed of any weight.
    let Ok(again) = Undo::record(&[adapter], weight.base(), merged.base()) else { return };
    let again = again.restore(&[adapter], merged.base()).expect("what is recorded can be restored");
    assert!(bits(&again) == bits(&restored));
});
