//! The first GPU.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaModule, DriverError, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;
use lora_kernels::cuda::{CudaQueue, Queue};
use lora_kernels::{Error, Result};
use ptx_emulator::Counters;

use crate::graph::Replay;
use crate::{Backend, bandwidth};

pub(crate) struct Cuda {
    queue: CudaQueue,
    /// Whether fresh memory is filled.
    fill: bool,
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
        let fill = match std::env::var("LORA_KERNELS_ALLOC").as_deref() {
            Ok("uninitialised") => false,
            Ok(other) => panic!("LORA_KERNELS_ALLOC={other}: wanted uninitialised"),
            Err(_) => true,
        };
        Ok(Self { queue: first.on_stream(stream)?, fill })
    }

    fn stream(&self) -> cudarc::driver::sys::CUstream {
        self.queue.stream().cu_stream()
    }

    /// Makes the context current: every call of the driver here wants it.
    fn bind(&self) {
        self.queue.stream().context().bind_to_thread().unwrap_or_else(failed("making the context current"));
    }
}

/// Every allocation is one of the driver's own, not a piece of a pool, so that tools see where it ends.
impl Backend for Cuda {
    fn name(&self) -> String {
        self.queue.stream().context().name().unwrap_or_else(failed("the device's name"))
    }

    fn is_emulated(&self) -> bool {
        false
    }

    fn queue(&self) -> &dyn Queue {
        &self.queue
    }

    fn alloc(&self, bytes: usize, label: &str) -> u64 {
        self.bind();
        // SAFETY: the context is current.
        let address = unsafe { result::malloc_sync(bytes.max(1)) };
        let address = address.unwrap_or_else(|e| panic!("allocating {label}: {e}"));
        if self.fill && bytes > 0 {
            // SAFETY: the memory was just allocated, with so many bytes.
            let filled = unsafe { result::memset_d8_async(address, u8::MAX, bytes, self.stream()) };
            filled.unwrap_or_else(failed("filling memory"));
        }
        address
    }

    fn free(&self, address: u64) {
        self.synchronize();
        // SAFETY: an address that `alloc` gave, once; the work that was enqueued on it has completed.
        let freed = unsafe { result::free_sync(address) };
        if !std::thread::panicking() {
            freed.unwrap_or_else(failed("freeing memory"));
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.bind();
        // SAFETY: inside an allocation, as the buffer has checked; the driver has staged `bytes` when the call returns.
        let written = unsafe { result::memcpy_htod_async(address, bytes, self.stream()) };
        written.unwrap_or_else(failed("writing a buffer"));
    }

    fn read(&self, address: u64, bytes: &mut [u8]) {
        self.bind();
        // SAFETY: inside an allocation, as the buffer has checked; `bytes` is borrowed until the copy has ended.
        let read = unsafe { result::memcpy_dtoh_async(bytes, address, self.stream()) };
        read.unwrap_or_else(failed("reading a buffer"));
        self.synchronize();
    }

    unsafe fn probe(&self, entry: &str, blocks: u32, addresses: [u64; 2], pieces: u32) {
        static MODULE: OnceLock<Arc<CudaModule>> = OnceLock::new();
        let stream = self.queue.stream();
        let load = || stream.context().load_module(Ptx::from_src(bandwidth::PTX));
        let module = MODULE.get_or_init(|| load().unwrap_or_else(failed("loading bandwidth.ptx")));
        let function = module.load_function(entry).unwrap_or_else(failed(entry));
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (bandwidth::THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let [from, to] = addresses;
        let mut launch = stream.launch_builder(&function);
        launch.arg(&from).arg(&to).arg(&pieces);
        // SAFETY: the kernels of this module take these three; the rest is the caller's promise.
        let launched = unsafe { launch.launch(config) };
        launched.map(drop).unwrap_or_else(failed(entry));
    }

    fn synchronize(&self) {
        let waited = self.queue.stream().synchronize();
        if !std::thread::panicking() {
            waited.unwrap_or_else(failed("waiting for the device"));
        }
    }

    fn begin_capture(&self) {
        self.queue.warm_up().unwrap_or_else(|e| panic!("{e}"));
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.queue.stream().begin_capture(mode).unwrap_or_else(failed("beginning a capture"));
    }

    fn end_capture(self: Arc<Self>) -> Box<dyn Replay> {
        let graph = self.queue.stream().end_capture(CUgraphInstantiate_flags(0));
        let graph = graph.unwrap_or_else(failed("ending a capture"));
        Box::new(Captured(graph.expect("the driver gives a graph, be it an empty one")))
    }

    fn time(&self, work: &mut dyn FnMut()) -> Duration {
        let stream = self.queue.stream();
        let mark =
            || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap_or_else(failed("an event"));
        let start = mark();
        work();
        let milliseconds = start.elapsed_ms(&mark()).unwrap_or_else(failed("the time between two events"));
        Duration::from_secs_f64(f64::from(milliseconds) / 1e3)
    }

    fn counters(&self) -> Option<Counters> {
        None
    }
}

struct Captured(CudaGraph);

impl Replay for Captured {
    unsafe fn launch(&self) {
        self.0.launch().unwrap_or_else(failed("launching a graph"));
    }
}

fn failed<T>(what: &str) -> impl FnOnce(DriverError) -> T {
    move |error| panic!("{what}: {error}")
}
