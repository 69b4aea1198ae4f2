//! A GPU that is emulated: it executes the very PTX that a driver would load.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs};

use lora_kernels::cuda::{
    EncodedMap, Image, Kernel, Launch, MemoryId, Properties, Queue, Swizzle, Target, TensorMap, kernels,
    modules, origin,
};
use lora_kernels::{Error, Result};
use ptx_emulator::{Counters, Gpu, MemoryError, Module, Spec};

use crate::graph::Replay;
use crate::{Backend, bandwidth};

pub(crate) struct Emulator {
    gpu: Gpu,
    target: Target,
    properties: Properties,
    counters: Mutex<Option<Counters>>,
    /// While launches are recorded.
    captured: Mutex<Option<Vec<Recorded>>>,
}

/// A [`Launch`] with parameters of its own.
struct Recorded {
    kernel: Kernel,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    params: Vec<u8>,
    overlap: bool,
}

struct List {
    emulator: Arc<Emulator>,
    launches: Vec<Recorded>,
}

impl Emulator {
    pub(crate) fn new(spec: Spec) -> Self {
        // Contexts of the driver, the other memories, are addresses of the lower half.
        static NEXT: AtomicU64 = AtomicU64::new(1 << 63);
        let target = Target::for_capability(spec.capability).unwrap_or_else(|e| panic!("{e}"));
        let properties = Properties {
            capability: spec.capability,
            sm_count: spec.sm_count,
            max_shared_bytes: u32::try_from(spec.max_shared_per_block).expect("kilobytes"),
            memory: MemoryId(NEXT.fetch_add(1, Ordering::Relaxed)),
        };
        Self {
            gpu: Gpu::new(spec),
            target,
            properties,
            counters: Mutex::default(),
            captured: Mutex::default(),
        }
    }

    fn counters(&self) -> MutexGuard<'_, Option<Counters>> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn captured(&self) -> MutexGuard<'_, Option<Vec<Recorded>>> {
        self.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, launch: &Launch<'_>) -> Result<Counters> {
        let kernel = launch.kernel;
        if !kernels().any(|known| known == kernel) {
            return Err(device_error(kernel.entry, "it is not in the registry of kernels"));
        }
        let image = image(kernel, self.target)?;
        let geometry = ptx_emulator::Launch {
            grid: launch.grid,
            block: launch.block,
            cluster: [1, if kernel.clusters { launch.grid[1] } else { 1 }, 1],
            dynamic_shared: launch.shared_bytes,
            // As on a GPU: older ones run launches one after the other.
            overlap: launch.overlap && self.properties.capability >= (9, 0),
        };
        let ran = self.gpu.launch(&load(image)?, kernel.entry, &geometry, &[launch.params]);
        let counters = ran.map_err(|fault| device_error(kernel.entry, fault))?;
        Ok(counters)
    }
}

// SAFETY: the memory is this device's alone; a launch has ended when the call returns.
unsafe impl Queue for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        if let Some(captured) = &mut *self.captured() {
            let Launch { kernel, grid, block, shared_bytes, params, overlap } = *launch;
            captured.push(Recorded { kernel, grid, block, shared_bytes, params: params.to_vec(), overlap });
            return Ok(());
        }
        let ran = self.run(launch);
        *self.counters() = ran.as_ref().ok().cloned();
        ran.map(drop)
    }

    unsafe fn upload(&self, destination: u64, bytes: &[u8]) -> Result<()> {
        self.gpu.write(destination, bytes).map_err(|e| device_error("upload", e))
    }

    fn encode(&self, map: &TensorMap<'_>) -> Result<EncodedMap> {
        map.check()?;
        if self.properties.capability.0 < 9 {
            return Err(device_error("tensor map", "the device has none"));
        }
        let map = ptx_emulator::TensorMap {
            address: map.address,
            element_bytes: map.element_bytes,
            dims: map.dims.to_vec(),
            strides: map.strides.to_vec(),
            box_dims: map.box_dims.to_vec(),
            swizzle: match map.swizzle {
                Swizzle::None => ptx_emulator::Swizzle::None,
                Swizzle::Bytes32 => ptx_emulator::Swizzle::Bytes32,
                Swizzle::Bytes64 => ptx_emulator::Swizzle::Bytes64,
                Swizzle::Bytes128 => ptx_emulator::Swizzle::Bytes128,
            },
            fill_nan: false,
        };
        let bytes = map.encode().map_err(|e| device_error("tensor map", e))?;
        Ok(bytemuck::cast(bytes))
    }
}

impl Backend for Emulator {
    fn name(&self) -> String {
        self.gpu.spec().name.clone()
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn queue(&self) -> &dyn Queue {
        self
    }

    fn alloc(&self, bytes: usize, label: &str) -> u64 {
        self.gpu.alloc(bytes, label).unwrap_or_else(misuse)
    }

    fn free(&self, address: u64) {
        self.gpu.free(address).unwrap_or_else(misuse);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.gpu.write(address, bytes).unwrap_or_else(misuse);
    }

    fn read(&self, address: u64, bytes: &mut [u8]) {
        self.gpu.read(address, bytes).unwrap_or_else(misuse);
    }

    unsafe fn probe(&self, entry: &str, blocks: u32, addresses: [u64; 2], pieces: u32) {
        let module = Module::parse("bandwidth.ptx", bandwidth::PTX).unwrap_or_else(|e| panic!("{e}"));
        let geometry = ptx_emulator::Launch::linear(blocks, bandwidth::THREADS);
        let [from, to] = addresses.map(u64::to_le_bytes);
        let ran = self.gpu.launch(&module, entry, &geometry, &[&from, &to, &pieces.to_le_bytes()]);
        ran.map(drop).unwrap_or_else(|fault| panic!("{entry}: {fault}"));
    }

    fn synchronize(&self) {}

    fn begin_capture(&self) {
        let before = self.captured().replace(Vec::new());
        assert!(before.is_none(), "launches are already being recorded");
    }

    fn end_capture(self: Arc<Self>) -> Box<dyn Replay> {
        let launches = self.captured().take().expect("begin_capture was called");
        Box::new(List { emulator: self, launches })
    }

    fn time(&self, work: &mut dyn FnMut()) -> Duration {
        let start = Instant::now();
        work();
        start.elapsed()
    }

    fn counters(&self) -> Option<Counters> {
        self.counters().clone()
    }
}

impl Replay for List {
    unsafe fn launch(&self) {
        for Recorded { kernel, grid, block, shared_bytes, params, overlap } in &self.launches {
            let launch = Launch {
                kernel: *kernel,
                grid: *grid,
                block: *block,
                shared_bytes: *shared_bytes,
                params,
                overlap: *overlap,
            };
            // SAFETY: the caller's promise.
            unsafe { self.emulator.launch(&launch) }.unwrap_or_else(|e| panic!("{e}"));
        }
    }
}

fn misuse<T>(error: MemoryError) -> T {
    panic!("{error}")
}

fn device_error(operation: &str, reason: impl ToString) -> Error {
    Error::Device { operation: operation.into(), reason: reason.to_string() }
}

fn image(kernel: Kernel, target: Target) -> Result<&'static Image> {
    let found = modules().iter().find(|image| image.module == kernel.module && image.target == target);
    found.ok_or_else(|| {
        device_error(kernel.entry, format!("this build has no {} for {target} ({})", kernel.module, origin()))
    })
}

/// The parsed module; every process parses it once.
fn load(image: &Image) -> Result<Module> {
    static LOADED: Mutex<Option<HashMap<(&str, Target), Module>>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    if let Some(module) = loaded.get(&(image.module, image.target)) {
        return Ok(module.clone());
    }
    let name = format!("{}.{}.ptx", image.module, image.target);
    // Other PTX than this build's, where the folder has it: `scripts/mutate` tries broken kernels so.
    let other = env::var_os("LORA_KERNELS_EMULATED_PTX").map(|folder| Path::new(&folder).join(&name));
    let ptx = match other.filter(|path| path.exists()) {
        Some(path) => fs::read_to_string(path).map_err(|e| device_error(image.module, e))?,
        None => image.ptx(),
    };
    let module = Module::parse(&name, &ptx).map_err(|e| device_error(image.module, e))?;
    loaded.insert((image.module, image.target), module.clone());
    Ok(module)
}
