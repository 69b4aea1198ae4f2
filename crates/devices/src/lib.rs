//! The device that tests and tools run kernels on.
//!
//! Code is written once, over [`Device`] and [`Buffer`]. Mistakes of the host (a length, an index) panic here, as they do
//! with slices; what a kernel does wrong comes back from the call that launched it.

mod bandwidth;
mod buffer;
mod cuda;
mod emulator;
mod front;
mod graph;
mod launched;

pub use bandwidth::Bandwidth;
pub use buffer::Buffer;
pub use graph::Graph;
pub use launched::was_launched;
pub use ptx_emulator::{Class, Counters, Issued, SharedTraffic, Spec, Traffic};

use std::env;
use std::sync::Arc;
use std::time::Duration;

use bytemuck::Pod;
use lora_kernels::Result;
use lora_kernels::cuda::{Properties, Queue};

use front::Front;
use graph::Replay;

/// A device with memory and a queue. Clones are the same device.
#[derive(Clone)]
pub struct Device {
    front: Arc<Front>,
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

    /// One device for each target that the kernels are compiled for: an emulated A100 and an emulated H200; or the GPU alone,
    /// where [`best`](Device::best) is one.
    ///
    /// # Panics
    /// As [`best`](Device::best).
    pub fn for_each_target() -> Vec<Self> {
        let best = Self::best();
        if best.backend().is_emulated() { vec![best, Self::emulate(Spec::h200())] } else { vec![best] }
    }

    /// An emulated A100.
    pub fn emulator() -> Self {
        Self::emulate(Spec::a100())
    }

    /// An emulated GPU: of capability 9.0 it runs what Hopper would, otherwise what all others run. Plans depend on the
    /// number of multiprocessors.
    pub fn emulate(spec: Spec) -> Self {
        Self::new(Arc::new(emulator::Emulator::new(spec)))
    }

    /// The first GPU. Every call gives a stream of its own.
    ///
    /// # Errors
    /// [`NoDevice`](lora_kernels::Error::NoDevice) where there is none.
    pub fn cuda() -> Result<Self> {
        Ok(Self::new(Arc::new(cuda::Cuda::open()?)))
    }

    fn new(backend: Arc<dyn Backend>) -> Self {
        let properties = *backend.queue().properties();
        Self { front: Arc::new(Front { backend, properties }) }
    }

    /// The same device, which says of itself that it has `count` multiprocessors: plans for it are those of a larger or
    /// smaller one.
    #[must_use]
    pub fn with_multiprocessors(&self, count: u32) -> Self {
        let properties = Properties { sm_count: count, ..self.front.properties };
        Self { front: Arc::new(Front { backend: Arc::clone(&self.front.backend), properties }) }
    }

    fn backend(&self) -> &dyn Backend {
        &*self.front.backend
    }

    /// The product's name.
    pub fn name(&self) -> String {
        self.backend().name()
    }

    /// Where launches go.
    pub fn queue(&self) -> &dyn Queue {
        &*self.front
    }

    /// Memory with a copy of `data`.
    pub fn upload<T: Pod>(&self, data: &[T]) -> Buffer<T> {
        let mut buffer = self.alloc(data.len());
        buffer.write(data);
        buffer
    }

    /// Memory for `len` elements that nobody has written. On a GPU its bytes are 255 (NaN in every float type), unless
    /// `LORA_KERNELS_ALLOC=uninitialised` leaves them as they are, for tools that look for reads of such memory; the emulator
    /// refuses to read them.
    pub fn alloc<T: Pod>(&self, len: usize) -> Buffer<T> {
        Buffer::new(self, len)
    }

    /// Waits for everything that was enqueued.
    pub fn synchronize(&self) {
        self.backend().synchronize();
    }

    /// Records the launches that `work` makes, and runs none of them: a CUDA graph, or a list for the emulator. `work` may
    /// neither allocate, write, read nor wait.
    pub fn capture(&self, work: impl FnOnce()) -> Graph {
        self.backend().begin_capture();
        work();
        Graph::new(Arc::clone(&self.front.backend).end_capture())
    }

    /// How long the device takes for what `work` enqueues, from its start to its end; waits for it. By events of the GPU's,
    /// or by the emulator's wall clock.
    pub fn time(&self, mut work: impl FnMut()) -> Duration {
        self.backend().time(&mut work)
    }

    /// What the last launch did. None on a GPU, before the first launch, and after one that failed.
    pub fn counters(&self) -> Option<Counters> {
        self.backend().counters()
    }
}

/// What a device is made of. Addresses and lengths come from [`Buffer`] and are right.
trait Backend: Send + Sync {
    fn name(&self) -> String;
    fn is_emulated(&self) -> bool;
    fn queue(&self) -> &dyn Queue;
    /// Never null, aligned to 256 bytes.
    fn alloc(&self, bytes: usize, label: &str) -> u64;
    fn free(&self, address: u64);
    fn write(&self, address: u64, bytes: &[u8]);
    fn read(&self, address: u64, bytes: &mut [u8]);
    /// Enqueues a kernel of `bandwidth.ptx`.
    ///
    /// # Safety
    /// What is read and written, `addresses`, holds so many pieces.
    unsafe fn probe(&self, entry: &str, blocks: u32, addresses: [u64; 2], pieces: u32);
    fn synchronize(&self);
    fn begin_capture(&self);
    fn end_capture(self: Arc<Self>) -> Box<dyn Replay>;
    fn time(&self, work: &mut dyn FnMut()) -> Duration;
    fn counters(&self) -> Option<Counters>;
}
