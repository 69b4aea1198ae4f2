//! Adapters of stacks of experts: as PEFT stores them, and rows that choose an adapter and an expert.

mod products;

use lora_kernels::adapter::Lora;
use lora_kernels::cuda::{AdapterTable, LowRank, lora_expand, lora_shrink};
use lora_kernels::{DType, Error, Tensor, cpu};
use lora_kernels_devices::Device;
use products::{Adapter, Factors, Numbers, expand_shape};

const EXPERTS: usize = 3;
const K: usize = 40;
const N: usize = 150;

/// Small whole numbers: sums of their products are exact in f32.
fn whole(numbers: &mut Numbers, len: usize) -> Vec<f32> {
    (0..len).map(|_| numbers.below(9) as f32 - 4.0).collect()
}

/// One stack in PEFT's layout.
struct Stack {
    rank: usize,
    lora_a: Vec<f32>,
    lora_b: Vec<f32>,
}

impl Stack {
    fn new(numbers: &mut Numbers, rank: usize) -> Self {
        let size = rank * EXPERTS;
        Self { rank, lora_a: whole(numbers, size * K), lora_b: whole(numbers, N * size) }
    }

    fn experts(&self) -> Vec<Lora> {
        let size = self.rank * EXPERTS;
        let lora_a = Tensor::from_f32([size, K], &self.lora_a, DType::F32).unwrap();
        let lora_b = Tensor::from_f32([N, size], &self.lora_b, DType::F32).unwrap();
        Lora::of_experts(&lora_a, &lora_b, EXPERTS, 0.5).unwrap()
    }

    /// `einsum('o r e, e r i -> e o i')`, PEFT's delta.
    fn delta(&self, expert: usize, n: usize, k: usize) -> f32 {
        let term = |r: usize| {
            let b = self.lora_b[(n * self.rank + r) * EXPERTS + expert];
            b * self.lora_a[(expert * self.rank + r) * K + k]
        };
        0.5 * (0..self.rank).map(term).sum::<f32>()
    }
}

#[test]
fn rows_choose_an_adapter_and_an_expert() {
    let mut numbers = Numbers::new(7);
    let stacks = [5, 16].map(|rank| Stack::new(&mut numbers, rank));
    let adapters: Vec<Adapter<f32>> = stacks
        .iter()
        .flat_map(Stack::experts)
        .map(|lora| Adapter {
            lora_a: lora.lora_a().to_f32(),
            lora_b: lora.lora_b().to_f32(),
            rank: lora.lora_a().shape()[0],
            scaling: lora.scaling() as f32,
        })
        .collect();
    let rows = 37;
    let choice: Vec<_> =
        (0..rows).map(|_| (numbers.below(3) as i32 - 1, numbers.below(EXPERTS) as i32)).collect();
    let index: Vec<i32> =
        choice.iter().map(|&(a, e)| if a < 0 { -1 } else { a * EXPERTS as i32 + e }).collect();
    let (x, y) = (whole(&mut numbers, rows * K), whole(&mut numbers, rows * N));
    let mut wanted = y.clone();
    for (row, &(adapter, expert)) in choice.iter().enumerate() {
        let Ok(adapter) = usize::try_from(adapter) else { continue };
        for n in 0..N {
            let delta = |k: usize| x[row * K + k] * stacks[adapter].delta(expert as usize, n, k);
            wanted[row * N + n] += (0..K).map(delta).sum::<f32>();
        }
    }

    let reference: Vec<_> = adapters.iter().map(Adapter::as_cpu).collect();
    let (mut v, mut got) = (vec![0.0; rows * 16], y.clone());
    cpu::lora_shrink(&x, [rows, K], &reference, Some(&index), None, 16, &mut v).unwrap();
    cpu::lora_expand(&v, 16, &reference, Some(&index), [rows, N], &mut got).unwrap();
    assert_eq!(got, wanted);

    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let factors = Factors::new(&device, &adapters);
    let mut entries = device.alloc(AdapterTable::<f32>::bytes(adapters.len()));
    let table = factors.table(&device, K, N, &mut entries).unwrap();
    let (x, index, mut y) = (device.upload(&x), device.upload(&index), device.upload(&y));
    let plan = lora_shrink::plan(&table.shrink_shape(rows, DType::F32), properties).unwrap();
    let mut v = device.alloc(plan.v_len());
    plan.run(queue, x.view(), &table, Some(index.view()), v.view_mut()).unwrap();
    let plan = lora_expand::plan(&expand_shape::<f32, f32>(rows, N), properties).unwrap();
    let branch = LowRank { adapters: &table, index: Some(index.view()), v: v.view() };
    plan.run(queue, &branch, y.view_mut()).unwrap();
    assert_eq!(y.download(), wanted);
}

#[test]
fn what_does_not_fit_is_named() {
    let tensor =
        |shape: [usize; 2]| Tensor::from_f32(shape, &vec![0.0; shape[0] * shape[1]], DType::BF16).unwrap();
    for (a, b, experts, argument) in
        [([6, 4], [5, 6], 4, "lora_a"), ([6, 4], [5, 6], 0, "lora_a"), ([6, 4], [5, 7], 3, "lora_b")]
    {
        match Lora::of_experts(&tensor(a), &tensor(b), experts, 1.0) {
            Err(Error::Argument { argument: named, .. }) => assert_eq!(named, argument),
            other => panic!("{other:?}"),
        }
    }
    let empty = Lora::of_experts(&tensor([0, 4]), &tensor([5, 0]), 3, 1.0).unwrap();
    assert!(empty.len() == 3 && empty.iter().all(|lora| lora.lora_b().shape() == [5, 0]));
}
