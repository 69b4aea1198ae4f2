//! `merge`, `unmerge`, `nf4_merge` and `dora_scale` on the CPU, bit for bit where bits are defined.

mod low_rank;

use half::{bf16, f16};
use lora_kernels::adapter::{Adapter, Dora, Lora, Requantize, Stack};
use lora_kernels::cpu::{self, LowRank, Update, Weight};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Element, Error, Tensor};
use low_rank::{F32, assert_close};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn bits<T: Element>(values: &[T]) -> &[u8] {
    bytemuck::cast_slice(values)
}

fn noise<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| T::from_f32(rng.random_range(-1.0..1.0))).collect()
}

/// One adapter with a scaling and a row scale.
struct Owned<A> {
    k: usize,
    rank: usize,
    a: Vec<A>,
    b: Vec<A>,
    scaling: f32,
    row_scale: Vec<f32>,
}

impl<A: Element> Owned<A> {
    fn new(seed: u64, [n, rank, k]: [usize; 3], scaling: f32) -> Self {
        let row_scale = noise::<f32>(seed + 2, n).into_iter().map(|v| 1.5 + v).collect();
        Self { k, rank, a: noise(seed, rank * k), b: noise(seed + 1, n * rank), scaling, row_scale }
    }

    fn low_rank(&self) -> LowRank<'_, A> {
        LowRank { lora_a: &self.a, lora_b: &self.b, rank: self.rank, scaling: self.scaling }
    }

    /// In f64: `w + s (B A)[n, k]`, and the magnitude of its terms.
    fn sum(&self, w: f64, n: usize, k: usize) -> (f64, f64) {
        (0..self.rank).fold((w, w.abs()), |(sum, magnitude), r| {
            let product = self.b[n * self.rank + r].to_f64() * self.a[r * self.k + k].to_f64();
            let term = f64::from(self.scaling) * product;
            (sum + term, magnitude + term.abs())
        })
    }
}

fn merge<T: Element, A: Element>(weight: &[T], shape: [usize; 2], update: &Update<A>) -> Vec<T> {
    let mut merged = vec![T::from_f32(f32::NAN); weight.len()];
    cpu::merge(weight, shape, update, &mut merged).unwrap();
    merged
}

fn unmerge<T: Element, A: Element>(merged: &[T], shape: [usize; 2], update: &Update<A>) -> Vec<T> {
    let mut weight = vec![T::from_f32(f32::NAN); merged.len()];
    cpu::unmerge(merged, shape, update, &mut weight).unwrap();
    weight
}

/// `[rows, columns]` to `[columns, rows]`.
fn transpose<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns)).copied().collect()
}

/// f32 fma chains over the rank, one for the scaling, the row scale, and the rounding to `T`.
fn merge_is_the_formula<T: Element, A: Element>() {
    for rank in [0, 1, 2, 3, 5, 7, 8, 12, 16, 17, 24, 31, 32, 33, 48, 64, 96, 100, 127, 128, 129, 256] {
        let (n, k) = (9, 23);
        let owned = Owned::<A>::new(rank as u64, [n, rank, k], 0.375);
        let weight = noise::<T>(99, n * k);
        let update = Update {
            adapters: &[owned.low_rank()],
            row_scale: Some(&owned.row_scale),
            fan_in_fan_out: false,
        };
        let merged = merge(&weight, [n, k], &update);
        let unit = T::DTYPE.unit_roundoff();
        let truth: Vec<(f64, f64)> = (0..n * k)
            .map(|i| {
                let (sum, magnitude) = owned.sum(weight[i].to_f64(), i / k, i % k);
                let scale = f64::from(owned.row_scale[i / k]);
                let error = (rank + 2) as f64 * F32 * magnitude * scale;
                (sum * scale, error + unit * ((sum * scale).abs() + error))
            })
            .collect();
        let wide: Vec<f64> = merged.iter().map(|v| v.to_f64()).collect();
        assert_close(&format!("{} rank {rank}", T::DTYPE), &wide, truth.iter().copied());

        // Back: the merge's error over the row scale, the same sums again, and the division.
        let restored: Vec<f64> = unmerge(&merged, [n, k], &update).iter().map(|v| v.to_f64()).collect();
        let bound = truth.iter().enumerate().map(|(i, (_, error))| {
            let (w, magnitude) = (weight[i].to_f64(), owned.sum(weight[i].to_f64(), i / k, i % k).1);
            let error = error / f64::from(owned.row_scale[i / k]) + (rank + 4) as f64 * F32 * magnitude;
            (w, error + unit * (w.abs() + error))
        });
        assert_close(&format!("{} rank {rank}, unmerged", T::DTYPE), &restored, bound);

        // The other layout has the same bits.
        let other = Update { fan_in_fan_out: true, ..update };
        let turned = merge(&transpose(&weight, k), [n, k], &other);
        assert_eq!(bits(&transpose(&turned, n)), bits(&merged));
        let turned = unmerge(&transpose(&merged, k), [n, k], &other);
        assert_eq!(bits(&transpose(&turned, n)), bits(&unmerge(&merged, [n, k], &update)));
    }
}

#[test]
fn merge_is_the_formula_in_every_dtype() {
    merge_is_the_formula::<f32, f32>();
    merge_is_the_formula::<f16, f32>();
    merge_is_the_formula::<bf16, f32>();
    merge_is_the_formula::<f16, f16>();
    merge_is_the_formula::<bf16, bf16>();
}

/// Numbers that tell one order of operations from another.
#[test]
fn the_order_of_operations_is_the_documented_one() {
    let one = |w: f32, a: &[f32], b: &[f32], scaling: f32, row_scale: f32| {
        let low_rank = LowRank { lora_a: a, lora_b: b, rank: a.len(), scaling };
        let update = Update { adapters: &[low_rank], row_scale: Some(&[row_scale]), fan_in_fan_out: false };
        merge(&[w], [1, 1], &update)[0]
    };
    let tiny = 2.0f32.powi(-12);
    // Ascending ranks: 2^24 + 1 rounds to 2^24 before 2^24 is taken off again.
    assert_eq!(one(0.0, &[16777216.0, 1.0, -16777216.0], &[1.0; 3], 1.0, 1.0), 0.0);
    // The product (1 + 2^-12)^2 is not rounded before 1 + 2^-11 is taken off it: 2^-24 is left.
    assert_eq!(one(0.0, &[-1.0 - 2.0 * tiny, 1.0 + tiny], &[1.0, 1.0 + tiny], 1.0, 1.0), tiny * tiny);
    // Nor is scaling * delta before W is added.
    assert_eq!(one(-1.0 - 2.0 * tiny, &[1.0 + tiny], &[1.0], 1.0 + tiny, 1.0), tiny * tiny);
    // The chain starts at 0 and is scaled after: 3 (1/3 rounded) is 1, but 3 * (2^24 + 1) is not 3 * 2^24 + 3.
    assert_eq!(one(1.0, &[16777216.0, 1.0], &[1.0; 2], 3.0, 1.0), 50331648.0);
    // The sum is rounded before the row scale: 1 + 2^-24 is 1.
    assert_eq!(one(1.0, &[tiny], &[tiny], 1.0, 3.0), 3.0);

    // One rounding to bf16: the delta is just over half a step of 1, and rounds to half a step by itself.
    let (half_step, more) = (2.0f32.powi(-8), 2.0f32.powi(-20));
    let low_rank = LowRank { lora_a: &[half_step + more], lora_b: &[1.0], rank: 1, scaling: 1.0 };
    let update = Update { adapters: &[low_rank], row_scale: None, fan_in_fan_out: false };
    assert_eq!(merge(&[bf16::ONE], [1, 1], &update), [bf16::from_f32(1.0 + 2.0 * half_step)]);
    // Several adapters, one after the other, in f32.
    let update = Update { adapters: &[low_rank; 3], ..update };
    assert_eq!(merge(&[bf16::ONE], [1, 1], &update), [bf16::from_f32(1.0 + 4.0 * half_step)]);
}

/// Not even the sign of a zero.
#[test]
fn nothing_to_add_keeps_every_bit() {
    let (n, k) = (5, 7);
    let mut weight = noise::<bf16>(5, n * k);
    weight[3] = bf16::from_f32(-0.0);
    weight[4] = bf16::from_bits(1);
    let empty = Owned::<f32>::new(1, [n, 0, k], 2.0);
    let update = |adapters| Update::<f32> { adapters, row_scale: None, fan_in_fan_out: false };
    assert_eq!(bits(&merge(&weight, [n, k], &update(&[]))), bits(&weight));
    assert_eq!(bits(&unmerge(&weight, [n, k], &update(&[]))), bits(&weight));
    let ones = vec![1.0; n];
    let update = Update { adapters: &[], row_scale: Some(&ones), ..update(&[]) };
    assert_eq!(bits(&merge(&weight, [n, k], &update)), bits(&weight));
    assert_eq!(bits(&unmerge(&weight, [n, k], &update)), bits(&weight));
    // With a scaling or a rank of 0, -0 + 0 is +0; all other bits stay.
    weight[3] = bf16::ZERO;
    let zero = Owned::<f32>::new(1, [n, 6, k], 0.0);
    for low_rank in [empty.low_rank(), zero.low_rank()] {
        let update = Update { adapters: &[low_rank], row_scale: None, fan_in_fan_out: false };
        assert_eq!(bits(&merge(&weight, [n, k], &update)), bits(&weight));
        assert_eq!(bits(&unmerge(&weight, [n, k], &update)), bits(&weight));
    }
}

/// A permutation of the outputs permutes the bits.
#[test]
fn outputs_do_not_touch_each_other() {
    let (n, k, rank) = (6, 10, 4);
    let (owned, weight) = (Owned::<f16>::new(3, [n, rank, k], 1.25), noise::<f16>(4, n * k));
    let run = |weight: &[f16], b: &[f16], row_scale: &[f32]| {
        let low_rank = LowRank { lora_b: b, ..owned.low_rank() };
        let update = Update { adapters: &[low_rank], row_scale: Some(row_scale), fan_in_fan_out: false };
        merge(weight, [n, k], &update)
    };
    let order = [3, 0, 5, 1, 4, 2];
    let pick = |values: &[f16], width: usize| -> Vec<f16> {
        order.iter().flat_map(|&n: &usize| values[n * width..(n + 1) * width].to_vec()).collect()
    };
    let row_scale: Vec<f32> = order.iter().map(|&n| owned.row_scale[n]).collect();
    let straight = run(&weight, &owned.b, &owned.row_scale);
    assert_eq!(bits(&run(&pick(&weight, k), &pick(&owned.b, rank), &row_scale)), bits(&pick(&straight, k)));
}

/// What models are merged with, against the plain loops: both sum in f32, in another order.
#[test]
fn the_parallel_merge_agrees() {
    for ([n, rank, k], fan_in_fan_out) in
        [([65, 16, 1100], false), ([1100, 3, 65], true), ([1, 256, 3], false), ([300, 64, 257], true)]
    {
        let owned = Owned::<f32>::new(11, [n, rank, k], 0.5);
        let weight = noise::<bf16>(12, n * k);
        let tensor = |shape: [usize; 2], values: &[f32]| Tensor::from_f32(shape, values, DType::F32).unwrap();
        let lora = Lora::new(tensor([rank, k], &owned.a), tensor([n, rank], &owned.b), 0.5).unwrap();
        let adapter = Adapter::from(lora.with_fan_in_fan_out(fan_in_fan_out));
        let stored = Tensor::new(adapter.weight_shape(), Element::into_data(weight.clone())).unwrap();
        let fast = Stack::new(&[&adapter], &stored).unwrap().merge(&stored, DType::BF16).unwrap();
        let update = Update { adapters: &[owned.low_rank()], row_scale: None, fan_in_fan_out };
        let plain: Vec<f64> = merge(&weight, [n, k], &update).iter().map(|v| v.to_f64()).collect();
        // Either may round to the other side of a tie.
        let bound = plain.iter().enumerate().map(|(i, v)| {
            let (n, k) = if fan_in_fan_out { (i % n, i / n) } else { (i / k, i % k) };
            let error = 2.0 * (rank + 5) as f64 * F32 * owned.sum(weight[i].to_f64(), n, k).1;
            (*v, error + 2.0 * DType::BF16.unit_roundoff() * (v.abs() + error))
        });
        assert_close(&format!("[{n}, {k}]"), &fast.weight.to_f64(), bound);
    }
}

/// Dequantise to the matrix's dtype, merge in f32, quantise the f32 sum; or round it.
#[test]
fn nf4_merge_is_its_parts() {
    fn check<T: Element>(n: usize, k: usize, blocksize: usize, nesting: Nesting) {
        let weight = noise::<T>(21, n * k);
        let base = Nf4Matrix::quantize(&weight, [n, k], blocksize, &Codebook::nf4(), nesting).unwrap();
        let owned = Owned::<f32>::new(22, [n, 5, k], 0.25);
        let update = Update {
            adapters: &[owned.low_rank()],
            row_scale: Some(&owned.row_scale),
            fan_in_fan_out: false,
        };
        let wide: Vec<f32> = base.dequantize::<T>().into_iter().map(T::to_f32).collect();
        let sum = merge(&wide, [n, k], &update);

        let wanted = Nf4Matrix::quantize(&sum, [n, k], blocksize, &Codebook::nf4(), Nesting::Plain).unwrap();
        let (mut packed, mut absmax) = (vec![0xaa; base.packed().len()], vec![f32::NAN; base.absmax().len()]);
        cpu::nf4_merge(&base, &update, &mut packed, &mut absmax).unwrap();
        assert_eq!(packed, wanted.packed());
        assert_eq!(bits(&absmax), bits(&wanted.absmax().dequantize()));

        let mut dense = vec![T::from_f32(f32::NAN); n * k];
        cpu::nf4_merge_dense(&base, &update, &mut dense).unwrap();
        let wanted: Vec<T> = sum.iter().map(|&v| T::from_f32(v)).collect();
        assert_eq!(bits(&dense), bits(&wanted));
    }
    for (n, k, blocksize) in [(8, 64, 64), (5, 77, 32), (3, 1, 64), (2, 4096, 4096), (7, 130, 128)] {
        for nesting in [Nesting::Plain, Nesting::Nested] {
            check::<f32>(n, k, blocksize, nesting);
            check::<f16>(n, k, blocksize, nesting);
            check::<bf16>(n, k, blocksize, nesting);
        }
    }
}

/// f64 sums and one rounding: half a step of f32, and what another order of the f64 sums can do.
#[test]
fn dora_scale_is_the_formula() {
    fn check<T: Element, A: Element>(weight: &Weight<T>, dense: &[T], [n, k]: [usize; 2]) {
        for rank in [0, 1, 5, 33] {
            let owned = Owned::<A>::new(31, [n, rank, k], 0.75);
            let magnitude = noise::<f32>(34, n);
            let mut row_scale = vec![f32::NAN; n];
            cpu::dora_scale(weight, &owned.low_rank(), &magnitude, &mut row_scale).unwrap();
            let truth = (0..n).map(|n| {
                let sum = |k_: usize| owned.sum(dense[n * k + k_].to_f64(), n, k_);
                let (squares, magnitudes) = (0..k)
                    .map(sum)
                    .fold((0.0, 0.0), |(s, m), (v, magnitude)| (s + v * v, m + magnitude * magnitude));
                let truth = f64::from(magnitude[n]) / squares.sqrt();
                let sums = f64::EPSILON * (k + rank + 4) as f64 * (magnitudes / squares).sqrt();
                (truth, truth.abs() * (F32 + sums))
            });
            let got: Vec<f64> = row_scale.iter().copied().map(f64::from).collect();
            assert_close(&format!("{} rank {rank}", T::DTYPE), &got, truth);
        }
    }
    fn both<T: Element, A: Element>() {
        let (n, k) = (6, 45);
        let data = noise::<T>(33, n * k);
        check::<T, A>(&Weight::Dense { data: &data, n, k }, &data, [n, k]);
        let nf4 = Nf4Matrix::quantize(&data, [n, k], 32, &Codebook::nf4(), Nesting::Nested).unwrap();
        check::<T, A>(&Weight::Nf4(&nf4), &nf4.dequantize::<T>(), [n, k]);
    }
    both::<f32, f32>();
    both::<f16, f32>();
    both::<bf16, f32>();
    both::<bf16, bf16>();
    both::<f16, f16>();

    // The direction's length and nothing else: 3, 4, and a delta of 12 on a third input.
    let low_rank = LowRank { lora_a: &[0.0, 0.0, 6.0], lora_b: &[1.0], rank: 1, scaling: 2.0 };
    let mut row_scale = [0.0];
    cpu::dora_scale(
        &Weight::Dense { data: &[3.0, 4.0, 0.0], n: 1, k: 3 },
        &low_rank,
        &[26.0],
        &mut row_scale,
    )
    .unwrap();
    assert_eq!(row_scale, [2.0]);
    let none = LowRank::<f32> { lora_a: &[], lora_b: &[], rank: 0, scaling: 1.0 };
    cpu::dora_scale(&Weight::Dense { data: &[0.0f32; 3], n: 1, k: 3 }, &none, &[1.0], &mut row_scale)
        .unwrap();
    assert_eq!(row_scale, [f32::INFINITY]);
}

fn argument(result: Result<(), Error>) -> String {
    match result {
        Err(Error::Argument { argument, .. }) => argument,
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("not refused"),
    }
}

#[test]
fn misfits_are_refused_and_nothing_is_written() {
    let (n, rank, k) = (4, 2, 3);
    let owned = Owned::<f32>::new(1, [n, rank, k], 1.0);
    let (good, weight) = (owned.low_rank(), noise::<f32>(2, n * k));
    let short_a = LowRank { lora_a: &owned.a[1..], ..good };
    let short_b = LowRank { lora_b: &owned.b[1..], ..good };
    let too_many = LowRank { rank: usize::MAX, ..good };
    let update = |adapters| Update { adapters, row_scale: None, fan_in_fan_out: false };
    let adapters = [[good, short_a], [good, short_b], [good, too_many]];
    let cases: [(&str, Update<f32>); 4] = [
        ("adapters[1].lora_a", update(&adapters[0])),
        ("adapters[1].lora_b", update(&adapters[1])),
        ("adapters[1].lora_a", update(&adapters[2])),
        ("row_scale", Update { row_scale: Some(&owned.row_scale[1..]), ..update(&[]) }),
    ];
    let nf4 = Nf4Matrix::quantize(&weight, [n, k], 64, &Codebook::nf4(), Nesting::Plain).unwrap();
    let (mut out, mut packed, mut absmax) = (vec![7.0f32; n * k], vec![7u8; 6], vec![7.0f32; 1]);
    for (wanted, update) in cases {
        assert_eq!(argument(cpu::merge(&weight, [n, k], &update, &mut out)), wanted);
        assert_eq!(argument(cpu::unmerge(&weight, [n, k], &update, &mut out)), wanted);
        assert_eq!(argument(cpu::nf4_merge(&nf4, &update, &mut packed, &mut absmax)), wanted);
        assert_eq!(argument(cpu::nf4_merge_dense(&nf4, &update, &mut out)), wanted);
    }
    let update = update(&[]);
    assert_eq!(argument(cpu::merge(&weight[1..], [n, k], &update, &mut out)), "weight");
    assert_eq!(argument(cpu::merge(&weight, [n, k], &update, &mut out[1..])), "merged");
    assert_eq!(argument(cpu::merge(&weight, [usize::MAX, 2], &update, &mut out)), "weight");
    assert_eq!(argument(cpu::unmerge(&weight[1..], [n, k], &update, &mut out)), "merged");
    assert_eq!(argument(cpu::unmerge(&weight, [n, k], &update, &mut out[1..])), "weight");
    assert_eq!(argument(cpu::nf4_merge(&nf4, &update, &mut packed[1..], &mut absmax)), "packed");
    assert_eq!(argument(cpu::nf4_merge(&nf4, &update, &mut packed, &mut [])), "absmax");
    assert_eq!(argument(cpu::nf4_merge_dense(&nf4, &update, &mut out[1..])), "merged_weight");
    let transposed = Update { fan_in_fan_out: true, ..update };
    assert_eq!(
        argument(cpu::nf4_merge(&nf4, &transposed, &mut packed, &mut absmax)),
        "update.fan_in_fan_out"
    );
    let cube = Nf4Matrix::quantize(&weight, [2, 2, 3], 64, &Codebook::nf4(), Nesting::Plain).unwrap();
    assert_eq!(argument(cpu::nf4_merge(&cube, &update, &mut packed, &mut absmax)), "weight.shape");
    assert_eq!((out, packed, absmax), (vec![7.0; n * k], vec![7; 6], vec![7.0]));

    let (dense, mut scale) = (Weight::Dense { data: &weight, n, k }, [7.0f32; 4]);
    let magnitude = [1.0f32; 4];
    assert_eq!(argument(cpu::dora_scale(&dense, &short_a, &magnitude, &mut scale)), "adapter.lora_a");
    assert_eq!(argument(cpu::dora_scale(&dense, &short_b, &magnitude, &mut scale)), "adapter.lora_b");
    assert_eq!(argument(cpu::dora_scale(&dense, &good, &magnitude[1..], &mut scale)), "magnitude");
    assert_eq!(argument(cpu::dora_scale(&dense, &good, &magnitude, &mut scale[1..])), "row_scale");
    let short = Weight::Dense { data: &weight[1..], n, k };
    assert_eq!(argument(cpu::dora_scale(&short, &good, &magnitude, &mut scale)), "weight");
    assert_eq!(scale, [7.0; 4]);
}

/// Infinities and NaN go through the plain loops as through any sum, and stop a merge of whole weights.
#[test]
fn what_is_not_finite_is_seen() {
    let (n, k) = (70, 1000);
    let tensor = |shape: [usize; 2], value: f32| {
        Tensor::from_f32(shape, &vec![value; shape[0] * shape[1]], DType::F32).unwrap()
    };
    let weight = tensor([n, k], 1.0);
    let mut b = vec![0.0f32; n];
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        b[69] = value;
        let lora_b = Tensor::from_f32([n, 1], &b, DType::F32).unwrap();
        let lora = Lora::new(tensor([1, k], 1.0), lora_b, 1.0).unwrap();
        let adapter = Adapter::from(lora.clone());
        let stack = Stack::new(&[&adapter], &weight).unwrap();
        let refused = stack.merge(&weight, DType::BF16).map(|_| ());
        assert_eq!(argument(refused), "weight[69, 0], adapted");
        let nf4 = Nf4Matrix::quantize_tensor(&weight, 64, &Codebook::nf4(), Nesting::Plain).unwrap();
        assert_eq!(argument(stack.merge(&nf4, Requantize::default()).map(|_| ())), "weight[69, 0], adapted");
        assert_eq!(argument(stack.unmerge(&weight, DType::F32).map(|_| ())), "merged[69, 0], adapted");
        let y = stack.forward(&tensor([1, k], 1.0), &weight, None).unwrap();
        assert!(y[..69].iter().all(|&y| y == 1000.0) && !y[69].is_finite(), "{}", y[69]);
        let dora = Adapter::from(
            Dora::new(lora, Tensor::from_f32([n], &vec![1.0; n], DType::F32).unwrap()).unwrap(),
        );
        if value.is_nan() {
            let refused = Stack::new(&[&dora], &weight).map(|_| ());
            assert_eq!(argument(refused), "adapters[0].magnitude[69] / ||W + delta||");
        }
        let low_rank = LowRank { lora_a: &vec![1.0f32; k], lora_b: &b, rank: 1, scaling: 1.0 };
        let update = Update { adapters: &[low_rank], row_scale: None, fan_in_fan_out: false };
        let merged = merge(&weight.to_f32(), [n, k], &update);
        assert!(
            merged[..69 * k].iter().all(|&w| w == 1.0) && merged[69 * k..].iter().all(|w| !w.is_finite())
        );
    }
    // A sum that f32 holds and f16 does not.
    let large = Adapter::from(Lora::new(tensor([1, k], 300.0), tensor([n, 1], 300.0), 1.0).unwrap());
    let stack = Stack::new(&[&large], &weight).unwrap();
    assert!(stack.merge(&weight, DType::F32).is_ok());
    assert_eq!(argument(stack.merge(&weight, DType::F16).map(|_| ())), "weight[0, 0], adapted");
    // A row of zeros has no direction.
    let none = Lora::new(tensor([0, k], 0.0), tensor([n, 0], 0.0), 1.0).unwrap();
    let dora = Dora::new(none, Tensor::from_f32([n], &vec![1.0; n], DType::F32).unwrap()).unwrap();
    let refused = Stack::new(&[&dora.into()], &tensor([n, k], 0.0)).map(|_| ());
    assert_eq!(argument(refused), "adapters[0].magnitude[0] / ||W + delta||");
}
