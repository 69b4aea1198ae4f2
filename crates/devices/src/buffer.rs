//! Typed device memory that is freed when it is dropped.

use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};

use bytemuck::Pod;
use lora_kernels::cuda::{View, ViewMut};

use crate::Device;

/// `len` elements of device memory.
pub struct Buffer<T> {
    device: Device,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    pub(crate) fn new(device: &Device, len: usize) -> Self {
        let label = format!("{}[{len}]", std::any::type_name::<T>());
        let address = device.backend().alloc(len * size_of::<T>(), &label);
        Self { device: device.clone(), address, len, element: PhantomData }
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_, T> {
        self.slice(..)
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        self.slice_mut(..)
    }

    /// A part of it, to read.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> View<'_, T> {
        let (address, len) = self.locate(range);
        // SAFETY: inside the buffer, which is freed in the order of the queue, after work enqueued during the borrow.
        unsafe { View::from_raw(address, len, self.device.queue().properties().memory) }
    }

    /// A part of it, to write.
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> ViewMut<'_, T> {
        let (address, len) = self.locate(range);
        // SAFETY: as in `slice`; the borrow is exclusive.
        unsafe { ViewMut::from_raw(address, len, self.device.queue().properties().memory) }
    }

    /// Copies `data`, as many elements as the buffer has, to the device.
    pub fn write(&mut self, data: &[T]) {
        assert_eq!(data.len(), self.len, "elements written into a buffer");
        if !data.is_empty() {
            self.device.backend().write(self.address, bytemuck::cast_slice(data));
        }
    }

    /// Waits for the queue and copies everything to the host.
    pub fn download(&self) -> Vec<T> {
        let mut data = vec![T::zeroed(); self.len];
        if !data.is_empty() {
            self.device.backend().read(self.address, bytemuck::cast_slice_mut(&mut data));
        }
        data
    }

    fn locate(&self, range: impl RangeBounds<usize>) -> (u64, usize) {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len,
        };
        assert!(start <= end && end <= self.len, "{start}..{end} of a buffer of {}", self.len);
        (self.address + (start * size_of::<T>()) as u64, end - start)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        self.device.backend().free(self.address);
    }
}
