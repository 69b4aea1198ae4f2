//! AdaLoRA's penalty on a device, against the reference.

mod on_device;
mod products;

use half::{bf16, f16};
use lora_kernels::cpu::{self, Vectors};
use lora_kernels::cuda::orthogonality::{Shape, plan};
use lora_kernels::{DType, Element};
use lora_kernels_devices::Device;
use on_device::assert_refuses;
use products::Numbers;

fn check<T: Element>(device: &Device, factor: &[T], [rows, columns]: [usize; 2], vectors: Vectors) {
    let (queue, mut numbers) = (device.queue(), Numbers::new((rows + 100 * columns) as u64));
    let (before, weight) = (numbers.many::<f32>(factor.len()), 0.3);
    let shape = Shape { rows, columns, vectors, dtype: T::DTYPE };
    let plan = plan(&shape, queue.properties()).unwrap();
    let (on_factor, mut gradient) = (device.upload(factor), device.upload(&before));
    let (mut norm, mut workspace) = (device.alloc::<f64>(1), device.alloc::<f64>(plan.workspace_len));
    plan.run(queue, on_factor.view(), weight, gradient.view_mut(), norm.view_mut(), workspace.view_mut())
        .unwrap();

    let mut wanted = before.clone();
    let wanted_norm = cpu::orthogonality(factor, [rows, columns], vectors, weight, &mut wanted).unwrap();
    let norm = norm.download()[0];
    // Both sum in f64: products are exact there (two of 24 bits), and an element of D is off by no more than `length` roundings of a sum
    // of at most `length` products of at most 1; the norm by as much in every element.
    let (count, length) = if vectors == Vectors::Rows { (rows, columns) } else { (columns, rows) };
    let of_d = 4.0 * (length.max(1) as f64).powi(2) * (-53f64).exp2();
    let of_norm = (count as f64 + 1.0) * of_d;
    assert!((norm - wanted_norm).abs() <= of_norm, "{shape:?}: {norm}, wanted {wanted_norm}");
    // A gradient is 2 weight (D A) / norm, with |A| <= 1: off by what D and the norm are off by, and by two roundings to f32 (its own
    // and the sum's), of numbers that may come to lie on either side of a tie.
    for (i, (got, wanted)) in gradient.download().into_iter().zip(&wanted).enumerate() {
        let added = f64::from((wanted - before[i]).abs()) + 1.0;
        let relative = if wanted_norm > 0.0 { (count as f64 * of_d + of_norm) / wanted_norm } else { 0.0 };
        let bound = added * (relative + 3.0 * (-24f64).exp2());
        assert!(
            f64::from((got - wanted).abs()) <= bound,
            "{shape:?}: gradient[{i}] is {got}, wanted {wanted}"
        );
    }
}

#[test]
fn the_reference() {
    fn all<T: Element>(device: &Device) {
        for [count, length] in [[1, 1], [4, 64], [7, 33], [16, 300], [3, 1000], [0, 5], [5, 0], [37, 20]] {
            let factor = Numbers::new(count as u64).many::<T>(count * length);
            check(device, &factor, [count, length], Vectors::Rows);
            check(device, &factor, [length, count], Vectors::Columns);
        }
    }
    for device in Device::for_each_target() {
        all::<f32>(&device);
        all::<f16>(&device);
        all::<bf16>(&device);
    }
}

/// Vectors that are orthonormal have no penalty, and nothing is added.
#[test]
fn orthonormal_vectors_are_left_alone() {
    let device = Device::best();
    let mut factor = vec![0.0f32; 5 * 40];
    (0..5).for_each(|i| factor[i * 40 + 3 * i] = 1.0);
    check(&device, &factor, [5, 40], Vectors::Rows);
    let plan = plan(
        &Shape { rows: 5, columns: 40, vectors: Vectors::Rows, dtype: DType::F32 },
        device.queue().properties(),
    )
    .unwrap();
    let (mut gradient, mut norm) = (device.upload(&vec![7.0f32; 200]), device.alloc::<f64>(1));
    let (factor, mut workspace) = (device.upload(&factor), device.alloc::<f64>(25));
    plan.run(device.queue(), factor.view(), 1.0, gradient.view_mut(), norm.view_mut(), workspace.view_mut())
        .unwrap();
    assert_eq!((norm.download()[0], gradient.download()), (0.0, vec![7.0; 200]));
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let shape = Shape { rows: 2, columns: 4, vectors: Vectors::Rows, dtype: DType::F32 };
    assert_refuses(plan(&Shape { rows: 257, ..shape }, properties), "rows");
    assert_refuses(plan(&Shape { columns: 1 << 31, ..shape }, properties), "columns");
    assert_refuses(plan(&Shape { columns: 257, vectors: Vectors::Columns, ..shape }, properties), "columns");
    let plan = plan(&shape, properties).unwrap();
    let (values, halves) = (device.upload(&[1.0f32; 9]), device.upload(&[f16::ONE; 8]));
    let mut gradient = device.upload(&[7.0f32; 9]);
    let (mut norm, mut work) = (device.upload(&[7.0f64; 2]), device.upload(&[7.0f64; 4]));
    let eight = values.slice(..8);
    {
        let (g, n, w) = (gradient.slice_mut(..8), norm.slice_mut(..1), work.view_mut());
        assert_refuses(plan.run(queue, values.view(), 1.0, g, n, w), "factor");
    }
    {
        let (g, n, w) = (gradient.slice_mut(..8), norm.slice_mut(..1), work.view_mut());
        assert_refuses(plan.run(queue, halves.view(), 1.0, g, n, w), "factor");
    }
    assert_refuses(
        plan.run(queue, eight, 1.0, gradient.view_mut(), norm.slice_mut(..1), work.view_mut()),
        "gradient",
    );
    assert_refuses(
        plan.run(queue, eight, 1.0, gradient.slice_mut(..8), norm.view_mut(), work.view_mut()),
        "norm",
    );
    assert_refuses(
        plan.run(queue, eight, 1.0, gradient.slice_mut(..8), norm.slice_mut(..1), work.slice_mut(..3)),
        "workspace",
    );
    assert_eq!(
        (gradient.download(), norm.download(), work.download()),
        (vec![7.0; 9], vec![7.0; 2], vec![7.0; 4])
    );
}
