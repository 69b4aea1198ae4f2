//! The first GPU.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::{CudaSlice, DevicePtr};
use lora_kernels::cuda::{CudaQueue, Queue};
use lora_kernels::{Error, Result};
use ptx_emulator::Counters;

use crate::Backend;

pub(crate) struct Cuda {
    queue: CudaQueue,
    /// By address.
    allocations: Mutex<HashMap<u64, CudaSlice<u8>>>,
}

impl Cuda {
    /// A new stream; the kernels are loaded once for the process.
    pub(crate) fn open() -> Result<Self> {
        static FIRST: OnceLock<CudaQueue> = OnceLock::new();
        let first = match FIRST.get() {
            Some(first) => first,
            None => {
                let opened = CudaQueue::open(0)?;
                FIRST.get_or_init(|| opened)
            }
        };
        let stream = first.stream().context().new_stream();
        let stream = stream.map_err(|e| Error::NoDevice { reason: e.to_string() })?;
        Ok(Self { queue: first.on_stream(stream)?, allocations: Mutex::default() })
    }

    fn allocations(&self) -> MutexGuard<'_, HashMap<u64, CudaSlice<u8>>> {
        self.allocations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Cuda {
    fn name(&self) -> String {
        self.queue.stream().context().name().unwrap_or_else(|e| panic!("the device's name: {e}"))
    }

    fn queue(&self) -> &dyn Queue {
        &self.queue
    }

    fn alloc(&self, bytes: usize, label: &str) -> u64 {
        let stream = self.queue.stream();
        let ones = vec![u8::MAX; bytes.max(1)];
        let slice = stream.clone_htod(&ones).unwrap_or_else(|e| panic!("allocating {label}: {e}"));
        let address = slice.device_ptr(stream).0;
        self.allocations().insert(address, slice);
        address
    }

    fn free(&self, address: u64) {
        self.allocations().remove(&address);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let mut allocations = self.allocations();
        let slice = allocations.get_mut(&address).expect("a buffer's address");
        self.queue.stream().memcpy_htod(bytes, slice).unwrap_or_else(|e| panic!("writing a buffer: {e}"));
    }

    fn read(&self, address: u64, bytes: &mut [u8]) {
        let allocations = self.allocations();
        let slice = allocations[&address].slice(..bytes.len());
        self.queue.stream().memcpy_dtoh(&slice, bytes).unwrap_or_else(|e| panic!("reading a buffer: {e}"));
        self.synchronize();
    }

    fn synchronize(&self) {
        self.queue.stream().synchronize().unwrap_or_else(|e| panic!("{e}"));
    }

    fn counters(&self) -> Option<Counters> {
        None
    }
}
