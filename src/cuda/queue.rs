//! Where launches go.

use bytemuck::Pod;

use super::{EncodedMap, MemoryId, TensorMap};
use crate::Result;

/// An entry of one of the compiled modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The file of `kernels/` that it comes from, without `.cu`.
    pub module: &'static str,
    /// The name after `.entry`.
    pub entry: &'static str,
    /// The size of its parameter struct.
    pub param_bytes: usize,
    /// Blocks of a grid with the same x and z form a cluster (Hopper): they run at the same time and reach each other's shared
    /// memory. There are at most 8 of them.
    pub clusters: bool,
}

impl Kernel {
    /// The entry `entry` of `kernels/{module}.cu`, which takes `P` by value.
    pub const fn new<P: Pod>(module: &'static str, entry: &'static str) -> Self {
        Self { module, entry, param_bytes: size_of::<P>(), clusters: false }
    }

    /// The same, for a kernel whose blocks form clusters.
    #[must_use]
    pub const fn in_clusters(self) -> Self {
        Self { clusters: true, ..self }
    }
}

/// One launch. `params` is the kernel's only parameter, a plain C struct passed by value.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// What to run.
    pub kernel: Kernel,
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The bytes of the parameter struct.
    pub params: &'a [u8],
    /// The kernel may start while the launch before it still runs (programmatic dependent launch, where the device has it): it
    /// waits by itself before it touches what that one writes.
    pub overlap: bool,
}

/// What plans need to know of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Properties {
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Dynamic shared memory that a block may opt in to, in bytes.
    pub max_shared_bytes: u32,
    /// The memory that launches can reach.
    pub memory: MemoryId,
}

/// An in-order queue of launches on one device: a CUDA stream, or the emulator.
///
/// # Safety
/// 1. [`properties`](Queue::properties) names the memory that `launch` reads and writes, and never changes.
/// 2. Launches take effect in the order of the calls.
pub unsafe trait Queue {
    /// The device behind the queue.
    fn properties(&self) -> &Properties;

    /// Enqueues one launch. Allocates nothing on the device and does not wait for it.
    ///
    /// # Safety
    /// `params` is the struct that `kernel` declares, and every pointer in it is valid for what the kernel does with it
    /// until the launch has completed.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when the device refuses it.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Copies `bytes` to device memory at `destination`, in order with the launches; `bytes` may be dropped after the
    /// call. For tables that are made once, not for the path of every token.
    ///
    /// # Safety
    /// `destination` is valid for writes of `bytes.len()` bytes until the copy has completed, and `bytes` lies in ordinary
    /// (not page-locked) memory.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when the device refuses it.
    unsafe fn upload(&self, destination: u64, bytes: &[u8]) -> Result<()>;

    /// What a kernel on this device takes for a tensor map. Only the host is at work here; for maps that are made once.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a map that the hardware does not take, and
    /// [`Error::Device`](crate::Error::Device) for a device without them: they came with capability 9.0.
    fn encode(&self, map: &TensorMap<'_>) -> Result<EncodedMap>;
}
