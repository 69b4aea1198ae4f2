//! AdaLoRA's parts of a training step on a device: the reference's bits.

mod on_device;
mod products;

use half::{bf16, f16};
use lora_kernels::cpu::{self, ImportanceMut};
use lora_kernels::cuda::adalora::{self, Shape};
use lora_kernels::{DType, Element};
use lora_kernels_devices::Device;
use on_device::assert_refuses;
use products::{Numbers, same};

const SHAPES: [[usize; 2]; 6] = [[1, 1], [4, 64], [7, 33], [3, 1000], [0, 5], [5, 0]];

#[test]
fn the_references_bits() {
    fn check<T: Element>(device: &Device, [rows, columns]: [usize; 2]) {
        let (queue, mut numbers) = (device.queue(), Numbers::new((rows * 31 + columns) as u64));
        let (a, e) = (numbers.many::<T>(rows * columns), numbers.many::<T>(rows));
        let gradient = numbers.many::<f32>(rows * columns);
        let plan = adalora::plan(&Shape { rows, columns, dtype: T::DTYPE }, queue.properties()).unwrap();
        let (on_a, on_e) = (device.upload(&a), device.upload(&e));

        let (mut folded, mut wanted) = (device.alloc(a.len()), vec![0.0; a.len()]);
        plan.fold(queue, on_a.view(), on_e.view(), folded.view_mut()).unwrap();
        cpu::adalora_fold(&a, &e, [rows, columns], &mut wanted).unwrap();
        assert!(same(&folded.download(), &wanted));

        let (mut on_gradient, mut de) = (device.upload(&gradient), device.alloc(rows));
        plan.gradient(queue, on_a.view(), on_e.view(), on_gradient.view_mut(), de.view_mut()).unwrap();
        let (mut scaled, mut sums) = (gradient.clone(), vec![0.0; rows]);
        cpu::adalora_gradient(&mut scaled, &a, &e, [rows, columns], &mut sums).unwrap();
        assert!(same(&on_gradient.download(), &scaled));
        // A term goes through the additions of its thread's elements, 5 of a warp and 7 of the warps.
        let share = 1.01 * (columns.div_ceil(256) + 12) as f64 * (-24f64).exp2();
        for (r, de) in de.download().into_iter().enumerate() {
            let row = r * columns..(r + 1) * columns;
            let terms = a[row.clone()].iter().zip(&gradient[row]).map(|(a, g)| a.to_f64() * f64::from(*g));
            let (value, magnitude) = terms.fold((0.0, 0.0), |(v, m), t| (v + t, m + t.abs()));
            assert!((f64::from(de) - value).abs() <= share * magnitude, "de[{r}] is {de}, wanted {value}");
        }

        let (mut sensitivity, mut uncertainty) = (vec![0.0; a.len()], vec![0.0; a.len()]);
        let (mut on_s, mut on_u) = (device.upload(&sensitivity), device.upload(&uncertainty));
        for _ in 0..3 {
            let gradient = numbers.many::<f32>(a.len());
            let averages = [on_s.view_mut(), on_u.view_mut()];
            let on_gradient = device.upload(&gradient);
            plan.importance(queue, on_a.view(), on_gradient.view(), [0.85, 0.95], averages).unwrap();
            let importance = ImportanceMut { sensitivity: &mut sensitivity, uncertainty: &mut uncertainty };
            cpu::importance(&a, &gradient, [0.85, 0.95], importance).unwrap();
        }
        assert!(same(&on_s.download(), &sensitivity) && same(&on_u.download(), &uncertainty));
    }
    for device in Device::for_each_target() {
        for shape in SHAPES {
            check::<f32>(&device, shape);
            check::<f16>(&device, shape);
            check::<bf16>(&device, shape);
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let shape = Shape { rows: 2, columns: 4, dtype: DType::F32 };
    assert_refuses(adalora::plan(&Shape { rows: 1 << 31, ..shape }, properties), "rows");
    assert_refuses(adalora::plan(&Shape { columns: usize::MAX, ..shape }, properties), "columns");
    let large = Shape { rows: 1 << 30, columns: 1 << 30, ..shape };
    assert_refuses(adalora::plan(&large, properties), "rows * columns");
    let plan = adalora::plan(&shape, properties).unwrap();
    let (values, halves) = (device.upload(&[1.0f32; 9]), device.upload(&[f16::ONE; 8]));
    let (eight, two) = (values.slice(..8), values.slice(..2));
    let (mut one, mut other) = (device.alloc::<f32>(9), device.alloc::<f32>(9));
    assert_refuses(plan.fold(queue, values.view(), two, one.slice_mut(..8)), "lora_a");
    assert_refuses(plan.fold(queue, halves.view(), halves.slice(..2), one.slice_mut(..8)), "lora_a");
    assert_refuses(plan.fold(queue, eight, eight, one.slice_mut(..8)), "lora_e");
    assert_refuses(plan.fold(queue, eight, two, one.view_mut()), "folded");
    assert_refuses(plan.gradient(queue, eight, two, one.view_mut(), other.slice_mut(..2)), "gradient");
    assert_refuses(plan.gradient(queue, eight, two, one.slice_mut(..8), other.slice_mut(..3)), "de");
    let betas = [0.9, 0.9];
    let mut importance = |gradient, s: usize, u: usize| {
        let averages = [one.slice_mut(..s), other.slice_mut(..u)];
        plan.importance(queue, eight, gradient, betas, averages)
    };
    assert_refuses(importance(two, 8, 8), "gradient");
    assert_refuses(importance(eight, 7, 8), "sensitivity");
    assert_refuses(importance(eight, 8, 9), "uncertainty");
}
