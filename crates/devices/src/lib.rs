//! The device that tests and tools run kernels on.
//!
//! Code is written once, over [`Device`] and [`Buffer`]. Mistakes of the host (a length, an index) panic here, as they do
//! with slices; what a kernel does wrong comes back from the call that launched it.

mod buffer;
mod cuda;
mod emulator;
mod launched;

pub use buffer::Buffer;
pub use launched::was_launched;
pub use ptx_emulator::{Class, Counters, Issued, SharedTraffic, Spec, Traffic};

use std::env;
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
    /// The first GPU, or the emulator where there is none. `LORA_KERNELS_DEVICE` set to `cuda` or `emulator` decides it.
    ///
    /// # Panics
    /// When `cuda` is asked for and there is no GPU.
    pub fn best() -> Self {
        match env::var("LORA_KERNELS_DEVICE").as_deref() {
            Ok("cuda") => Self::cuda().unwrap_or_else(|e| panic!("LORA_KERNELS_DEVICE=cuda: {e}")),
            Ok("emulator") => Self::emulator(),
            Ok(other) => panic!("LORA_KERNELS_DEVICE={other}: wanted cuda or emulator"),
            Err(_) => Self::cuda().unwrap_or_else(|_| Self::emulator()),
        }
    }

    /// An emulated A100.
    pub fn emulator() -> Self {
        Self::emulate(Spec::a100())
    }

    /// An emulated GPU: of capability 9.0 it runs what Hopper would, otherwise what all others run. Plans depend on the
    /// number of multiprocessors.
    pub fn emulate(spec: Spec) -> Self {
        Self { backend: Arc::new(emulator::Emulator::new(spec)) }
    }

    /// The first GPU. Every call gives a stream of its own.
    ///
    /// # Errors
    /// [`NoDevice`](lora_kernels::Error::NoDevice) where there is none.
    pub fn cuda() -> Result<Self> {
        Ok(Self { backend: Arc::new(cuda::Cuda::open()?) })
    }

    /// The product's name.
    pub fn name(&self) -> String {
        self.backend.name()
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

    /// What the last launch did. None on a GPU, before the first launch, and after one that failed.
    pub fn counters(&self) -> Option<Counters> {
        self.backend.counters()
    }
}

/// What a device is made of. Addresses and lengths come from [`Buffer`] and are right.
trait Backend: Send + Sync {
    fn name(&self) -> String;
    fn queue(&self) -> &dyn Queue;
    /// Never null, aligned to 256 bytes.
    fn alloc(&self, bytes: usize, label: &str) -> u64;
    fn free(&self, address: u64);
    fn write(&self, address: u64, bytes: &[u8]);
    fn read(&self, address: u64, bytes: &mut [u8]);
    fn synchronize(&self);
    fn counters(&self) -> Option<Counters>;
}
