//! Which adapter of a stack of experts a row has.

use lora_kernels::cuda::expert_index::{Shape, plan};
use lora_kernels::{Error, cpu};
use lora_kernels_devices::Device;

fn shape(tokens: usize, choices: usize, adapters: usize, experts: usize) -> Shape {
    Shape { tokens, choices, adapters, experts }
}

fn on_device(shape: Shape, adapter: &[i32], expert: &[i32]) -> Vec<i32> {
    let device = Device::best();
    let plan = plan(&shape, device.queue().properties()).unwrap();
    let (adapter, expert) = (device.upload(adapter), device.upload(expert));
    let mut index = device.alloc(plan.rows);
    plan.run(device.queue(), adapter.view(), expert.view(), index.view_mut()).unwrap();
    index.download()
}

#[test]
fn rows_of_tokens_and_experts() {
    // Two stacks of four; two experts for each token.
    let adapter = [1, 0, -1, 2, -2, i32::MAX];
    let expert = [3, 0, -1, 2, 1, 4, 0, 1, 0, -1, i32::MAX, -7];
    let wanted = [7, 4, -1, 2, -1, -1, -2, -2, -2, -1, -2, -2];
    assert_eq!(on_device(shape(6, 2, 2, 4), &adapter, &expert), wanted);
    let mut index = [0; 12];
    cpu::expert_index(&adapter, &expert, [2, 2, 4], &mut index).unwrap();
    assert_eq!(index, wanted);
}

#[test]
fn any_number_of_rows() {
    for (tokens, choices, adapters, experts) in
        [(0, 2, 1, 1), (3, 0, 1, 1), (1, 1, 1, 1), (300, 1, 5, 7), (77, 8, 3, 128), (129, 3, 0, 4)]
    {
        let adapter: Vec<i32> = (0..tokens as i32).map(|i| i * 7 % (adapters as i32 + 2) - 1).collect();
        let expert: Vec<i32> =
            (0..(tokens * choices) as i32).map(|i| i * 11 % (experts as i32 + 2) - 1).collect();
        let mut wanted = vec![0; expert.len()];
        cpu::expert_index(&adapter, &expert, [choices, adapters, experts], &mut wanted).unwrap();
        assert_eq!(on_device(shape(tokens, choices, adapters, experts), &adapter, &expert), wanted);
    }
}

#[test]
fn what_is_wrong_is_named() {
    let refused = |error: Error, argument: &str| {
        assert!(matches!(&error, Error::Argument { argument: name, .. } if name == argument), "{error}");
    };
    let device = Device::best();
    let properties = device.queue().properties();
    refused(plan(&shape(1 << 31, 1, 1, 1), properties).unwrap_err(), "tokens");
    refused(plan(&shape(1, 1 << 31, 1, 1), properties).unwrap_err(), "choices");
    refused(plan(&shape(1 << 16, 1 << 15, 1, 1), properties).unwrap_err(), "tokens * choices");
    refused(plan(&shape(1, 1, 1 << 16, 1 << 15), properties).unwrap_err(), "experts");
    refused(plan(&shape(1, 1, usize::MAX, 2), properties).unwrap_err(), "experts");

    let plan = plan(&shape(2, 2, 3, 3), properties).unwrap();
    let (two, four, three) = (device.upload(&[0; 2]), device.upload(&[0; 4]), device.upload(&[0; 3]));
    let mut out = device.upload(&[9; 4]);
    let queue = device.queue();
    refused(plan.run(queue, three.view(), four.view(), out.view_mut()).unwrap_err(), "adapter");
    refused(plan.run(queue, two.view(), three.view(), out.view_mut()).unwrap_err(), "expert");
    refused(plan.run(queue, two.view(), four.view(), out.slice_mut(0..3)).unwrap_err(), "index");
    assert_eq!(out.download(), [9; 4]);

    let mut index = [9; 4];
    refused(cpu::expert_index(&[0; 2], &[0; 3], [2, 3, 3], &mut index).unwrap_err(), "expert");
    refused(cpu::expert_index(&[0; 2], &[0; 4], [2, 3, 3], &mut index[..3]).unwrap_err(), "index");
    refused(cpu::expert_index(&[0; 2], &[0; 4], [2, 1 << 16, 1 << 15], &mut index).unwrap_err(), "experts");
    assert_eq!(index, [9; 4]);
}
