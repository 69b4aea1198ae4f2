//! The device that tests and tools run kernels on.
//!
//! Code is written once, over [`Device`] and [`Buffer`]. Mistakes of the host (a length, an index) panic here, as they do
//! with slices; what a kernel does wrong comes back from the call that launched it.

mod buffer;
mod cuda;

pub use buffer::Buffer;

use std::sync::Arc;

use bytemuck::Pod;
use lora_kernels::Result;
use lora_kernels::cuda::Queue;

/// A device with memory and a queue. Clones are the same device.
#[derive(Clone)]
pub struct Device {
    backend: Arc<dyn Backend>,
}

impl Device {
    /// The first GPU. Every call gives a stream of its own.
    ///
    /// # Errors
    /// [`NoDevice`](lora_kernels::Error::NoDevice) where there is none.
    pub fn cuda() -> Result<Self> {
        Ok(Self { backend: Arc::new(cuda::Cuda::open()?) })
    }

    /// Where launches go.
    pub fn queue(&self) -> &dyn Queue {
        self.backend.queue()
    }

    /// Memory with a copy of `data`.
    pub fn upload<T: Pod>(&self, data: &[T]) -> Buffer<T> {
        let mut buffer = self.alloc(data.len());
        buffer.write(data);
        buffer
    }

    /// Memory for `len` elements that nobody has written. On a GPU its bytes are 255 (NaN in every float type); the
    /// emulator refuses to read them.
    pub fn alloc<T: Pod>(&self, len: usize) -> Buffer<T> {
        Buffer::new(self, len)
    }

    /// Waits for everything that was enqueued.
    pub fn synchronize(&self) {
        self.backend.synchronize();
    }
}

/// What a device is made of. Addresses and lengths come from [`Buffer`] and are right.
trait Backend: Send + Sync {
    fn queue(&self) -> &dyn Queue;
    /// Never null, aligned to 256 bytes.
    fn alloc(&self, bytes: usize, label: &str) -> u64;
    fn free(&self, address: u64);
    fn write(&self, address: u64, bytes: &[u8]);
    fn read(&self, address: u64, bytes: &mut [u8]);
    fn synchronize(&self);
}
