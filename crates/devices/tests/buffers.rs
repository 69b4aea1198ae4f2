//! Buffers on the device that there is: what is uploaded comes back, parts are where they should be.

use lora_kernels_devices::{Device, Spec};

#[test]
fn uploads_come_back() {
    let device = Device::best();
    let data: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let mut buffer = device.upload(&data);
    assert_eq!(buffer.download(), data);
    buffer.write(&vec![7.0; 1000]);
    assert_eq!(buffer.download(), [7.0; 1000]);
    assert!(device.upload::<u16>(&[]).download().is_empty());
}

#[test]
fn parts_have_the_addresses_of_their_elements() {
    let device = Device::best();
    let mut buffer = device.upload(&[0u16; 100]);
    let start = buffer.view().address();
    assert!(start.is_multiple_of(256));
    let part = buffer.slice(3..7);
    assert_eq!((part.address(), part.len()), (start + 6, 4));
    assert_eq!(buffer.slice_mut(90..).len(), 10);
    assert!(buffer.slice(100..).is_empty());
}

#[test]
#[should_panic(expected = "50..101 of a buffer of 100")]
fn parts_end_with_the_buffer() {
    Device::best().upload(&[0u8; 100]).slice(50..101);
}

#[test]
#[should_panic(expected = "was never written")]
fn the_emulator_knows_what_nobody_wrote() {
    Device::emulator().alloc::<f32>(4).download();
}

#[test]
fn devices_have_memories_of_their_own() {
    let (one, two) = (Device::emulator(), Device::emulate(Spec { sm_count: 4, ..Spec::h200() }));
    assert_ne!(one.queue().properties().memory, two.queue().properties().memory);
    assert_eq!(two.queue().properties().sm_count, 4);
    assert_eq!(two.queue().properties().capability, (9, 0));
    assert!(one.upload(&[1u8]).view().check("x", 1, 1, two.queue().properties()).is_err());
}

#[test]
fn bandwidth_is_that_of_a_copy() {
    let device = Device::best();
    let data: Vec<u32> = (0..16 << 10).map(|i: u32| i.wrapping_mul(0x9e37_79b9)).collect();
    let (from, mut to) = (device.upload(&data), device.upload(&vec![0; data.len()]));
    let bandwidth = device.bandwidth(&from, &mut to);
    assert_eq!(to.download(), data);
    assert!(bandwidth.copy > 0.0 && bandwidth.read > 0.0, "{bandwidth:?}");
}
