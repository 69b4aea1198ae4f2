//! DoRA's part of the backward pass against f64.

mod on_device;
mod products;

use std::ops::Range;

use half::{bf16, f16};
use lora_kernels::cuda::dora_gradient::{self, Gradient, Shape};
use lora_kernels::{DType, Element, Error};
use lora_kernels_devices::Device;
use on_device::assert_refuses;
use products::{Numbers, same};

fn check<T: Element>(device: &Device, tokens: usize, n: usize, before: Option<f32>) {
    let mut numbers = Numbers::new((tokens + n) as u64);
    let (dy, z) = (numbers.many::<T>(tokens * n), numbers.many::<T>(tokens * n));
    let (row_scale, inverse_norm) = (numbers.many::<f32>(n), numbers.many::<f32>(n));
    let shape = Shape { tokens, n, dtype: T::DTYPE };
    let plan = dora_gradient::plan(&shape, device.queue().properties()).unwrap();
    let (mut on_device, z_on_device) = (device.upload(&dy), device.upload(&z));
    let factors = [&row_scale, &inverse_norm].map(|factor| device.upload(factor));
    let mut dm = before.map_or_else(|| device.alloc(n), |before| device.upload(&vec![before; n]));
    let mut workspace = device.alloc(plan.workspace_bytes);
    let gradient = Gradient {
        dy: on_device.view_mut(),
        z: z_on_device.view(),
        row_scale: factors[0].view(),
        inverse_norm: factors[1].view(),
        dm: dm.view_mut(),
    };
    plan.run(device.queue(), gradient, before.is_some(), workspace.view_mut()).unwrap();
    let scaled: Vec<T> =
        dy.iter().enumerate().map(|(i, dy)| T::from_f32(row_scale[i % n] * dy.to_f32())).collect();
    assert!(same(&on_device.download(), &scaled));
    // A term goes through the additions of its warp's tokens, 64 of a chunk, of 7 warps, of the chunks, and has the product with
    // inverse_norm and the last addition.
    let share = 1.01 * (tokens.min(512).div_ceil(8) + 7 + tokens.div_ceil(512) + 2) as f64 * (-24f64).exp2();
    for (column, dm) in dm.download().into_iter().enumerate() {
        let terms = (0..tokens).map(|token| {
            f64::from(inverse_norm[column]) * dy[token * n + column].to_f64() * z[token * n + column].to_f64()
        });
        let start = f64::from(before.unwrap_or(0.0));
        let (value, magnitude) = terms.fold((start, start.abs()), |(v, m), t| (v + t, m + t.abs()));
        assert!((f64::from(dm) - value).abs() <= share * magnitude, "dm[{column}] is {dm}, wanted {value}");
    }
}

#[test]
fn any_shape() {
    for device in Device::for_each_target() {
        for (tokens, n) in [(1, 1), (7, 33), (513, 40), (64, 64), (1100, 3), (0, 5), (5, 0)] {
            check::<f32>(&device, tokens, n, None);
            check::<f16>(&device, tokens, n, Some(0.5));
            check::<bf16>(&device, tokens, n, None);
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let (queue, properties) = (device.queue(), device.queue().properties());
    let shape = Shape { tokens: 2, n: 4, dtype: DType::BF16 };
    assert_refuses(dora_gradient::plan(&Shape { tokens: 1 << 31, ..shape }, properties), "tokens");
    assert_refuses(dora_gradient::plan(&Shape { n: usize::MAX, ..shape }, properties), "n");
    let large = Shape { tokens: 1 << 30, n: 1 << 30, ..shape };
    assert_refuses(dora_gradient::plan(&large, properties), "tokens * n");
    let plan = dora_gradient::plan(&shape, properties).unwrap();
    let (mut dy, z) = (device.upload(&[bf16::ONE; 9]), device.upload(&[bf16::ONE; 9]));
    let (factor, mut dm) = (device.upload(&[1.0f32; 5]), device.alloc::<f32>(5));
    let mut workspace = device.alloc::<u8>(plan.workspace_bytes);
    // Lengths of dy, z, row_scale, inverse_norm, dm and the workspace.
    let mut run = |lengths: [usize; 6], plan: &dora_gradient::Plan| -> Result<(), Error> {
        let to = |length: usize| -> Range<usize> { 0..length };
        let gradient = Gradient {
            dy: dy.slice_mut(to(lengths[0])),
            z: z.slice(to(lengths[1])),
            row_scale: factor.slice(to(lengths[2])),
            inverse_norm: factor.slice(to(lengths[3])),
            dm: dm.slice_mut(to(lengths[4])),
        };
        plan.run(queue, gradient, false, workspace.slice_mut(to(lengths[5])))
    };
    let names = ["dy", "z", "row_scale", "inverse_norm", "dm"];
    for (i, name) in names.into_iter().enumerate() {
        let mut lengths = [8, 8, 4, 4, 4, 16];
        lengths[i] += 1;
        assert_refuses(run(lengths, &plan), name);
    }
    assert_refuses(run([8, 8, 4, 4, 4, 15], &plan), "workspace");
    let other = dora_gradient::plan(&Shape { dtype: DType::F16, ..shape }, properties).unwrap();
    assert_refuses(run([8, 8, 4, 4, 4, 16], &other), "dy");
}
