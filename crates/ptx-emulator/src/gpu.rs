//! The device: memory, properties, and launches.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use crate::counters::Counters;
use crate::exec::{GlobalRace, Job, Machine};
use crate::fault::{Fault, FaultKind, MemoryError};
use crate::memory::Memory;
use crate::module::Module;
use crate::parse::ast::Space;
use crate::program::Entry;

/// Properties of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// As shown to users.
    pub name: String,
    /// Compute capability: major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Most bytes of shared memory of a block (with the opt-in that CUDA asks for above 48 KiB).
    pub max_shared_per_block: usize,
    /// 32-bit registers of a multiprocessor, which one block may use.
    pub registers: u32,
    /// Bytes of global memory.
    pub memory: usize,
    /// Instructions that one warp may execute in a launch; more is taken for an endless loop.
    pub max_warp_instructions: u64,
    /// Threads of the host that execute blocks; 0 for all cores.
    pub host_threads: usize,
}

impl Spec {
    /// An A100: capability 8.0.
    pub fn a100() -> Spec {
        Spec {
            name: "emulated A100".into(),
            capability: (8, 0),
            sm_count: 108,
            max_shared_per_block: 163 << 10,
            registers: 65536,
            memory: 80 << 30,
            max_warp_instructions: 1 << 32,
            host_threads: 0,
        }
    }

    /// An H200: capability 9.0.
    pub fn h200() -> Spec {
        Spec {
            name: "emulated H200".into(),
            capability: (9, 0),
            sm_count: 132,
            max_shared_per_block: 227 << 10,
            registers: 65536,
            memory: 141 << 30,
            max_warp_instructions: 1 << 32,
            host_threads: 0,
        }
    }
}

/// Geometry of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Blocks of a cluster along x, y, z; `[1, 1, 1]` for none, or for what the kernel itself requires.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: u32,
    /// The launch may start before the one before it has ended (programmatic dependent launch): until
    /// `griddepcontrol.wait` the kernel may not touch what that one writes.
    pub overlap: bool,
}

impl Launch {
    /// A one-dimensional launch without clusters and dynamic shared memory.
    pub fn linear(blocks: u32, threads: u32) -> Launch {
        Launch {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            cluster: [1; 3],
            dynamic_shared: 0,
            overlap: false,
        }
    }
}

/// An emulated device.
pub struct Gpu {
    spec: Spec,
    memory: RwLock<Memory>,
    /// Addresses of the variables of modules, by the identity of the module.
    variables: Mutex<HashMap<usize, Vec<u64>>>,
    launches: AtomicU32,
    running: Mutex<()>,
}

impl Gpu {
    /// A device with empty memory.
    pub fn new(spec: Spec) -> Gpu {
        Gpu {
            spec,
            memory: RwLock::default(),
            variables: Mutex::default(),
            launches: AtomicU32::new(0),
            running: Mutex::new(()),
        }
    }

    /// Its properties.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Allocates uninitialised bytes; the address is a multiple of 256, with unmapped space before and behind.
    pub fn alloc(&self, bytes: usize, label: &str) -> Result<u64, MemoryError> {
        let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        let left = self.spec.memory.saturating_sub(memory.used());
        if bytes > left {
            return Err(MemoryError::OutOfMemory { label: label.to_string(), bytes, left });
        }
        Ok(memory.alloc(bytes, label, false))
    }

    /// Frees an allocation; its addresses are never used again.
    pub fn free(&self, address: u64) -> Result<(), MemoryError> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner).free(address)
    }

    /// Copies bytes to the device.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        memory.forget_earlier();
        memory.write(address, bytes)
    }

    /// Copies bytes from the device; every one of them must have been written.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        memory.forget_earlier();
        memory.read(address, out, true)
    }

    /// Like [`Gpu::read`], but bytes that nobody wrote are read as zero.
    pub fn read_unchecked(&self, address: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner).read(address, out, false)
    }

    /// The address of a `.global` or `.const` variable of a module on this device.
    pub fn variable(&self, module: &Module, name: &str) -> Option<u64> {
        let index = module.ptx().vars.iter().position(|v| v.name == name && v.space != Space::Shared)?;
        Some(self.load(module)[index])
    }

    /// Places the variables of a module in memory, once.
    fn load(&self, module: &Module) -> Vec<u64> {
        let mut loaded = self.variables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(addresses) = loaded.get(&module.identity()) {
            return addresses.clone();
        }
        let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        let vars = &module.ptx().vars;
        let mut addresses = Vec::new();
        for var in vars {
            let placed = var.space != Space::Shared && !var.external;
            addresses.push(if placed {
                memory.alloc(var.size, &var.name, var.space == Space::Const)
            } else {
                0
            });
        }
        for (var, &address) in vars.iter().zip(&addresses).filter(|(_, a)| **a != 0) {
            // Variables without an initialiser start as zero.
            let mut bytes = var.init.clone();
            bytes.resize(var.size, 0);
            for (at, symbol, addend) in &var.relocations {
                let target = vars.iter().position(|v| v.name == *symbol).map_or(0, |i| addresses[i]);
                bytes[*at..*at + 8].copy_from_slice(&(target + addend).to_le_bytes());
            }
            let written = memory.write(address, &bytes);
            debug_assert!(written.is_ok());
        }
        loaded.insert(module.identity(), addresses.clone());
        addresses
    }

    /// Runs a kernel to its end. `params` holds the bytes of every parameter, in order.
    pub fn launch(
        &self,
        module: &Module,
        entry: &str,
        launch: &Launch,
        params: &[&[u8]],
    ) -> Result<Counters, Box<Fault>> {
        let refuse = |message: String| {
            Err(Box::new(Fault {
                kind: FaultKind::Launch,
                module: module.name().to_string(),
                kernel: entry.to_string(),
                source_line: None,
                ptx_line: 0,
                instruction: String::new(),
                block: None,
                thread: None,
                address: None,
                message,
            }))
        };
        let Some(found) = module.entry(entry) else {
            return refuse(format!("the module has no entry `{entry}`"));
        };
        let cluster = match (found.required_cluster, launch.cluster) {
            (Some(required), [1, 1, 1]) => required,
            (_, given) => given,
        };
        let launch = &Launch { cluster, ..*launch };
        if let Err(message) = check(found, launch, &self.spec, params, module.ptx().target.as_str()) {
            return refuse(message);
        }
        let mut block = vec![0; found.kernel.param_bytes];
        for (param, bytes) in found.params.iter().zip(params) {
            block[param.offset..param.offset + param.size].copy_from_slice(bytes);
        }
        let globals = self.load(module);
        let _one_at_a_time = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        let number = self.launches.fetch_add(1, Ordering::Relaxed) + 1;
        let job = Job {
            entry: found,
            memory: &memory,
            spec: &self.spec,
            launch,
            params: &block,
            globals: &globals,
            number,
            overlap: launch.overlap,
        };
        if !launch.overlap {
            memory.forget_earlier();
        }
        let (mut counters, early) = run(&job, module).inspect_err(|_| {
            // Leaves nothing behind for the next launch.
            memory.take_touched();
            memory.forget_earlier();
        })?;
        if !early {
            // Whoever waits for this launch waits for those before, too.
            memory.forget_earlier();
        }
        let touched = memory.take_touched();
        counters.global_loads.distinct_sectors = touched.read;
        counters.global_stores.distinct_sectors = touched.written;
        Ok(counters)
    }
}

/// Everything that can be known to be wrong before a launch.
fn check(entry: &Entry, launch: &Launch, spec: &Spec, params: &[&[u8]], target: &str) -> Result<(), String> {
    let [x, y, z] = launch.block;
    let threads = x as u64 * y as u64 * z as u64;
    if launch.grid.contains(&0) || launch.block.contains(&0) || launch.cluster.contains(&0) {
        return Err(format!("a dimension is zero in {launch:?}"));
    }
    if launch.grid[0] > i32::MAX as u32 || launch.grid[1] > 65535 || launch.grid[2] > 65535 {
        return Err(format!("grid {:?} is above 2147483647 x 65535 x 65535", launch.grid));
    }
    if threads > 1024 || x > 1024 || y > 1024 || z > 64 {
        return Err(format!(
            "block {:?} has more than 1024 threads, or an axis above 1024 x 1024 x 64",
            launch.block
        ));
    }
    if let Some(max) = entry.max_threads {
        let max: u64 = max.iter().map(|&n| n as u64).product();
        if threads > max {
            return Err(format!("{threads} threads, but the kernel was compiled for {max} (.maxntid)"));
        }
    }
    if let Some(required) = entry.required_threads.filter(|r| *r != launch.block) {
        return Err(format!("block {:?}, but the kernel requires {required:?} (.reqntid)", launch.block));
    }
    if let Some(required) = entry.required_cluster.filter(|r| *r != launch.cluster) {
        return Err(format!("cluster {:?}, but the kernel requires {required:?}", launch.cluster));
    }
    let cluster: u32 = launch.cluster.iter().product();
    if (0..3).any(|i| !launch.grid[i].is_multiple_of(launch.cluster[i])) || cluster > 8 {
        return Err(format!(
            "cluster {:?} does not divide grid {:?}, or is above 8 blocks",
            launch.cluster, launch.grid
        ));
    }
    if cluster > 1 && spec.capability.0 < 9 {
        return Err(format!(
            "clusters need capability 9.0, the device has {}.{}",
            spec.capability.0, spec.capability.1
        ));
    }
    check_target(target, spec)?;
    let shared = entry.static_shared + launch.dynamic_shared as usize;
    if shared > spec.max_shared_per_block {
        let max = spec.max_shared_per_block;
        return Err(format!("{shared} bytes of shared memory, but a block has at most {max}"));
    }
    if entry.static_shared > 48 << 10 {
        return Err(format!(
            "{} bytes of static shared memory, but at most 49152 may be static",
            entry.static_shared
        ));
    }
    // The assembler keeps to what the kernel declares; without that it may use all it likes.
    let declared = entry.max_threads.is_some() || entry.required_threads.is_some();
    let free = if declared { 0 } else { entry.live_registers.min(255) };
    let each = entry.max_registers.unwrap_or(free);
    let per_warp = (each * 32).next_multiple_of(256);
    let needed = per_warp as u64 * threads.div_ceil(32);
    if needed > spec.registers as u64 {
        return Err(format!(
            "{threads} threads with at least {each} registers each need {needed}, but a block has {}",
            spec.registers
        ));
    }
    if params.len() != entry.params.len() {
        return Err(format!("{} parameters are wanted, {} given", entry.params.len(), params.len()));
    }
    for (param, bytes) in entry.params.iter().zip(params) {
        if bytes.len() != param.size {
            return Err(format!(
                "parameter `{}` has {} bytes, {} given",
                param.name,
                param.size,
                bytes.len()
            ));
        }
    }
    Ok(())
}

/// `sm_80` runs on 8.0 and later; `sm_90a` on 9.0 only.
fn check_target(target: &str, spec: &Spec) -> Result<(), String> {
    let digits: String = target.chars().filter(char::is_ascii_digit).collect();
    let wanted: u32 = digits.parse().unwrap_or(0);
    let have = spec.capability.0 * 10 + spec.capability.1;
    let exact = target.ends_with('a');
    if wanted > have || exact && wanted != have {
        return Err(format!("the module is for {target}, the device has capability {have}"));
    }
    Ok(())
}

/// Executes all clusters, several at once; the fault of the lowest one is reported.
///
/// Also whether some warp let the next launch start, or ended, before it knew that the launches before had ended.
fn run(job: &Job, module: &Module) -> Result<(Counters, bool), Box<Fault>> {
    let [gx, gy, gz] = job.launch.grid;
    let [cx, cy, cz] = job.launch.cluster;
    let counts = [(gx / cx) as usize, (gy / cy) as usize, (gz / cz) as usize];
    let clusters = counts[0] * counts[1] * counts[2];
    let first_block = |i: usize| {
        let (x, y, z) = (i % counts[0], i / counts[0] % counts[1], i / (counts[0] * counts[1]));
        [x as u32 * cx, y as u32 * cy, z as u32 * cz]
    };
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let lowest = AtomicUsize::new(usize::MAX);
    type Outcome = (Counters, bool, Vec<GlobalRace>, Option<(usize, Box<Fault>)>);
    let work = || -> Outcome {
        let mut machine = Machine::new(job);
        let mut fault = None;
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            // Clusters above a failed one need not run; those below may hold the first fault.
            if i >= clusters || failed.load(Ordering::Acquire) && i > lowest.load(Ordering::Acquire) {
                break;
            }
            if let Err(place) = machine.run_cluster(first_block(i)) {
                lowest.fetch_min(i, Ordering::AcqRel);
                failed.store(true, Ordering::Release);
                fault = Some((i, module.fault(job, place)));
                break;
            }
        }
        let counters = machine.stats.counters(&job.entry.kernel, &module.ptx().files);
        (counters, machine.early, machine.races, fault)
    };
    let cores = match job.spec.host_threads {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    };
    let threads = cores.min(clusters);
    let outcomes: Vec<Outcome> = if threads <= 1 {
        vec![work()]
    } else {
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            handles.into_iter().map(|h| h.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
        })
    };
    let mut counters = Counters::default();
    let (mut early, mut races, mut faults) = (false, Vec::new(), Vec::new());
    for (part, started, found, fault) in outcomes {
        counters.merge(&part);
        early |= started;
        races.extend(found);
        faults.extend(fault);
    }
    if let Some((_, fault)) = faults.into_iter().min_by_key(|(i, _)| *i) {
        return Err(fault);
    }
    if let Some(fault) = module.race_fault(job, races) {
        return Err(fault);
    }
    Ok((counters, early))
}
