//! Rows sorted by expert.

use lora_kernels::cuda::expert_groups::{MAX_EXPERTS, Shape, plan};
use lora_kernels::{Error, cpu};
use lora_kernels_devices::Device;

fn on_device(device: &Device, expert: &[i32], experts: usize) -> Vec<i32> {
    let plan = plan(&Shape { rows: expert.len(), experts }, device.queue().properties()).unwrap();
    let expert = device.upload(expert);
    let mut groups = device.upload(&vec![77; plan.len()]);
    plan.run(device.queue(), expert.view(), groups.view_mut()).unwrap();
    groups.download()
}

fn on_host(expert: &[i32], experts: usize) -> Vec<i32> {
    let rows = expert.len();
    let mut groups = vec![77; 2 * rows.min(experts + 2) + 1 + rows];
    cpu::expert_groups(expert, experts, &mut groups).unwrap();
    groups
}

#[test]
fn groups_of_a_few_rows() {
    let expert = [2, -1, 0, 2, 7, 0, -3, 2];
    let start = [0, 2, 5, 6, 8, 8];
    let wanted = [&start[..], &[0, 2, -1, -2, -1], &[2, 5, 0, 3, 7, 1, 4, 6]].concat();
    assert_eq!(on_host(&expert, 3), wanted);
    for device in Device::for_each_target() {
        assert_eq!(on_device(&device, &expert, 3), wanted);
    }
}

#[test]
fn any_number_of_rows_and_experts() {
    for device in Device::for_each_target() {
        for experts in [0, 1, 3, 8, 30, 31, 128] {
            for rows in [0, 1, 5, 31, 32, 33, 256, 257, 1000] {
                let expert: Vec<i32> = (0..rows).map(|i| i * i % 97 % (experts as i32 + 3) - 2).collect();
                assert_eq!(
                    on_device(&device, &expert, experts),
                    on_host(&expert, experts),
                    "{experts}, {rows}"
                );
            }
        }
        // All of one, of none, of the last one there can be, and what is no number of an expert.
        for (expert, experts) in
            [(4, 5), (-1, 5), (5, 5), (4093, MAX_EXPERTS), (i32::MIN, 2), (i32::MAX, MAX_EXPERTS)]
        {
            let expert = vec![expert; 40];
            assert_eq!(on_device(&device, &expert, experts), on_host(&expert, experts));
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let refused = |error: Error, argument: &str| {
        assert!(matches!(&error, Error::Argument { argument: name, .. } if name == argument), "{error}");
    };
    let device = Device::best();
    let properties = device.queue().properties();
    refused(plan(&Shape { rows: 1 << 31, experts: 1 }, properties).unwrap_err(), "rows");
    refused(plan(&Shape { rows: 1, experts: MAX_EXPERTS + 1 }, properties).unwrap_err(), "experts");

    let plan = plan(&Shape { rows: 3, experts: 2 }, properties).unwrap();
    assert_eq!((plan.len(), plan.is_empty()), (10, false));
    let expert = device.upload(&[0; 4]);
    let mut groups = device.upload(&[9; 11]);
    let queue = device.queue();
    refused(plan.run(queue, expert.view(), groups.slice_mut(0..10)).unwrap_err(), "expert");
    refused(plan.run(queue, expert.slice(..3), groups.view_mut()).unwrap_err(), "groups");
    assert_eq!(groups.download(), [9; 11]);
    let mut groups = [9; 9];
    refused(cpu::expert_groups(&[0; 3], 2, &mut groups).unwrap_err(), "groups");
    assert_eq!(groups, [9; 9]);
}
