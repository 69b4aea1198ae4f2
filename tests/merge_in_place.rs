//! Merges into memory that the caller owns: the bits of `Stack::merge`, and nothing written when there is an error.

use half::{bf16, f16};
use lora_kernels::adapter::{Adapter, Dora, Lora, MergeReport, Stack};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::tensor::{DataMut, TensorView};
use lora_kernels::{DType, Element, Error, Tensor};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn noise(seed: u64, shape: &[usize], spread: f32) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| spread * rng.random_range(-1.0..1.0f32)).collect();
    Tensor::from_f32(shape, &values, DType::F32).unwrap()
}

fn lora(seed: u64, [n, rank, k]: [usize; 3], fan_in_fan_out: bool) -> Lora {
    let (a, b) = (noise(seed, &[rank, k], 0.3), noise(seed + 1, &[n, rank], 0.2));
    Lora::new(a, b, 0.75).unwrap().with_fan_in_fan_out(fan_in_fan_out)
}

fn dora(seed: u64, [n, rank, k]: [usize; 3], fan_in_fan_out: bool) -> Adapter {
    let magnitude: Vec<f32> = noise(seed + 2, &[n], 1.0).to_f32().iter().map(|v| 3.0 + v).collect();
    let magnitude = Tensor::from_f32([n], &magnitude, DType::F32).unwrap();
    Dora::new(lora(seed, [n, rank, k], fan_in_fan_out), magnitude).unwrap().into()
}

fn rounded(tensor: &Tensor, dtype: DType) -> Tensor {
    Tensor::from_f32(tensor.shape(), &tensor.to_f32(), dtype).unwrap()
}

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_f32(shape, &vec![0.0; shape.iter().product()], dtype).unwrap()
}

/// Awkward shapes: one element, parts of a strip and of a tile, several panels, sums of more ranks than there are rows.
#[test]
fn the_bits_are_those_of_merge_and_unmerge() {
    for (shape @ [n, _, k], fan_in_fan_out) in [
        ([1, 1, 1], false),
        ([5, 3, 257], false),
        ([70, 16, 1031], true),
        ([67, 33, 300], false),
        ([3, 200, 40], true),
        ([9, 0, 20], false),
        ([130, 2, 1], false),
    ] {
        let (one, two) = (lora(1, shape, fan_in_fan_out).into(), lora(2, shape, fan_in_fan_out).into());
        let scaled = dora(3, shape, fan_in_fan_out);
        let stored = if fan_in_fan_out { [k, n] } else { [n, k] };
        for adapters in [vec![&one], vec![&one, &two], vec![&one, &scaled]] {
            for (from, to) in DType::ALL.into_iter().flat_map(|from| DType::ALL.map(|to| (from, to))) {
                let what = format!("{shape:?} {fan_in_fan_out} {} {from} {to}", adapters.len());
                let weight = rounded(&noise(4, &stored, 1.0), from);
                let stack = Stack::new(&adapters, &weight).unwrap();
                let wanted = stack.merge(&weight, to).unwrap();

                let (mut merged, mut report) = (zeros(&stored, to), MergeReport::default());
                stack.merge_into(&weight, &mut merged, Some(&mut report)).unwrap();
                assert!(merged == wanted.weight && report == wanted.report, "{what}");
                let mut merged = zeros(&stored, to);
                stack.merge_into(&weight, &mut merged, None).unwrap();
                assert!(merged == wanted.weight, "{what}");

                let unmerged = stack.unmerge(&wanted.weight, from).unwrap().weight;
                let mut weight_again = zeros(&stored, from);
                stack.unmerge_into(&merged, &mut weight_again).unwrap();
                assert!(weight_again == unmerged, "{what}");
                if from == to {
                    let (mut place, mut report) = (weight.clone(), MergeReport::default());
                    stack.merge_in_place(&mut place, Some(&mut report)).unwrap();
                    assert!(place == wanted.weight && report == wanted.report, "{what}");
                    let mut place = weight.clone();
                    stack.merge_in_place(&mut place, None).unwrap();
                    assert!(place == wanted.weight, "{what}");
                    stack.unmerge_in_place(&mut place).unwrap();
                    assert!(place == unmerged, "{what}");
                }
            }
        }
    }
}

#[test]
fn a_4_bit_weight_goes_into_dense_memory() {
    let (n, k) = (33, 200);
    let weight = rounded(&noise(1, &[n, k], 1.0), DType::BF16);
    let nf4 = Nf4Matrix::quantize_tensor(&weight, 64, &Codebook::nf4(), Nesting::Nested).unwrap();
    let adapter = lora(2, [n, 4, k], false).into();
    let stack = Stack::new(&[&adapter], &nf4).unwrap();
    let wanted = stack.merge(&nf4, DType::F16).unwrap();
    let (mut merged, mut report) = (vec![f16::ZERO; n * k], MergeReport::default());
    stack.merge_into(&nf4, &mut merged[..], Some(&mut report)).unwrap();
    assert_eq!((Some(&merged[..]), report), (wanted.weight.as_slice(), wanted.report));
}

/// Memory of any owner serves as a weight.
#[test]
fn weights_are_borrowed() {
    let adapter = Adapter::from(lora(1, [2, 1, 3], false));
    let memory = [bf16::from_f32(0.5); 6];
    let view = TensorView::new(&[2, 3], &memory[..]).unwrap();
    let owned = Tensor::from_f32([2, 3], &[0.5; 6], DType::BF16).unwrap();
    let stack = Stack::new(&[&adapter], view).unwrap();
    assert_eq!(stack.merge(view, DType::F32).unwrap(), stack.merge(&owned, DType::F32).unwrap());
    assert_eq!((view, view.shape(), view.dtype()), (owned.view(), &[2, 3][..], DType::BF16));
    let wrong = TensorView::new(&[2, 4], &memory[..]).unwrap_err();
    assert_eq!(wrong.to_string(), "data: wanted the elements of shape [2, 4], got 6");
}

/// The error of `Stack::merge`, whose memory nobody has seen; and every bit stays.
fn refused<T: Element>(adapter: &Adapter, values: &[f32], place: &str) {
    let values: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
    let shape = adapter.weight_shape();
    let weight = Tensor::new(shape, T::into_data(values.clone())).unwrap();
    let stack = Stack::new(&[adapter], &weight).unwrap();
    let wanted = stack.merge(&weight, T::DTYPE).unwrap_err().to_string();
    assert!(wanted.starts_with(&format!("weight{place}, adapted: wanted a finite {}", T::DTYPE)), "{wanted}");
    let bits = |values: &[T]| values.iter().map(|v| v.bits()).collect::<Vec<_>>();

    let untouched = MergeReport { elements: 7, ..MergeReport::default() };
    for with_report in [false, true] {
        let (mut place, mut report) = (weight.clone(), untouched);
        let error = stack.merge_in_place(&mut place, with_report.then_some(&mut report)).unwrap_err();
        assert_eq!((error.to_string(), report), (wanted.clone(), untouched));
        assert_eq!(bits(place.as_slice().unwrap()), bits(&values));
        let (mut into, mut report) = (zeros(&shape, T::DTYPE), untouched);
        let error = stack.merge_into(&weight, &mut into, with_report.then_some(&mut report)).unwrap_err();
        assert_eq!((error.to_string(), report), (wanted.clone(), untouched));
        assert_eq!(into, zeros(&shape, T::DTYPE));
    }
    let wanted = stack.unmerge(&weight, T::DTYPE).map(|_| ()).map_err(|e| e.to_string());
    let mut place = weight.clone();
    assert_eq!(stack.unmerge_in_place(&mut place).map_err(|e| e.to_string()), wanted);
    if wanted.is_err() {
        assert_eq!(bits(place.as_slice().unwrap()), bits(&values));
    }
}

#[test]
fn nothing_is_written_when_an_element_would_not_be_finite() {
    let (n, k) = (40, 600);
    let adapter = lora(1, [n, 2, k], false).into();
    let spoiled = |at: &[usize], value: f32| {
        let mut values = noise(2, &[n, k], 1.0).to_f32();
        at.iter().for_each(|&i| values[i] = value);
        values
    };
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        refused::<f32>(&adapter, &spoiled(&[n * k - 1], value), "[39, 599]");
        refused::<f16>(&adapter, &spoiled(&[n * k - 1], value), "[39, 599]");
        refused::<bf16>(&adapter, &spoiled(&[n * k - 1], value), "[39, 599]");
        // The first by place, though tiles come upon another one before.
        refused::<f32>(&adapter, &spoiled(&[599, 600, 605], value), "[0, 599]");
    }
    // Finite, and the sum is not.
    let add = |by: f32, at: usize| {
        let mut a = vec![0.0; k];
        a[at % k] = by;
        let mut b = vec![0.0; n];
        b[at / k] = 1.0;
        let tensor = |shape, values: &[f32]| Tensor::from_f32(shape, values, DType::F32).unwrap();
        Adapter::from(Lora::new(tensor([1, k], &a), tensor([n, 1], &b), 1.0).unwrap())
    };
    let at = n * k - 7;
    refused::<f16>(&add(16.0, at), &spoiled(&[at], 65504.0), "[39, 593]");
    refused::<f32>(&add(2e38, at), &spoiled(&[at], 2e38), "[39, 593]");
    refused::<f32>(&add(f32::INFINITY, at), &spoiled(&[], 0.0), "[0, 593]");

    // So large that only trying tells that it is finite.
    for (by, value) in [(15.0, 65504.0), (-65504.0, 65504.0)] {
        let values: Vec<f16> = spoiled(&[at], value).into_iter().map(f16::from_f32).collect();
        let weight = Tensor::new([n, k], Element::into_data(values)).unwrap();
        let adapter = add(by, at);
        let stack = Stack::new(&[&adapter], &weight).unwrap();
        let mut place = weight.clone();
        stack.merge_in_place(&mut place, None).unwrap();
        assert_eq!(place, stack.merge(&weight, DType::F16).unwrap().weight);
        assert_eq!(place.to_f32()[at], if by < 0.0 { 0.0 } else { value });
    }

    // An output of magnitude 0 is merged to zeros, from which nothing comes back.
    let lora = lora(3, [n, 2, k], false);
    let magnitude: Vec<f32> = (0..n).map(|i| if i == 5 { 0.0 } else { 1.0 }).collect();
    let magnitude = Tensor::from_f32([n], &magnitude, DType::F32).unwrap();
    let adapter = Dora::new(lora, magnitude).unwrap().into();
    let weight = noise(4, &[n, k], 1.0);
    let stack = Stack::new(&[&adapter], &weight).unwrap();
    let mut place = weight.clone();
    stack.merge_in_place(&mut place, None).unwrap();
    let merged = place.clone();
    let error = stack.unmerge_in_place(&mut place).unwrap_err().to_string();
    assert!(error.starts_with("merged[5, 0], adapted: wanted a finite f32"), "{error}");
    assert_eq!(place, merged);
}

#[test]
fn memory_of_another_size_is_refused() {
    let adapter = lora(1, [3, 2, 5], false).into();
    let weight = noise(2, &[3, 5], 1.0);
    let stack = Stack::new(&[&adapter], &weight).unwrap();
    let text = |result: Result<(), Error>| result.unwrap_err().to_string();
    let mut short = vec![1.0f32; 14];
    assert_eq!(text(stack.merge_in_place(&mut short[..], None)), "weight: wanted 15 elements, got 14");
    assert_eq!(text(stack.unmerge_in_place(&mut short[..])), "merged: wanted 15 elements, got 14");
    assert_eq!(text(stack.merge_into(&weight, &mut short[..], None)), "merged: wanted 15 elements, got 14");
    assert_eq!(
        text(stack.unmerge_into(&weight, DataMut::F32(&mut short),)),
        "weight: wanted 15 elements, got 14"
    );
    let turned = noise(2, &[5, 3], 1.0);
    let error = text(stack.merge_into(&turned, &mut vec![0.0f32; 15][..], None));
    assert_eq!(error, "weight: wanted shape [3, 5], got [5, 3]");
    assert!(short.iter().all(|&v| v == 1.0));
}
