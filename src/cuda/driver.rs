//! The queue that is a CUDA stream, through cudarc.
//!
//! # Streams and threads
//! A queue may be used from any thread; every call makes its context current on the calling thread. On the default stream
//! launches are ordered with everything else of the context, but it cannot be captured in a graph. The per-thread default
//! stream is a different one in every thread: do not carry a queue on it to another thread.
//!
//! # Graphs
//! Nothing here waits, allocates or copies during a launch, so launches can be captured. Three things have to happen before
//! the capture begins: [`CudaQueue::warm_up`], uploads (adapter tables), and lending slices with [`CudaQueue::read`] and
//! [`CudaQueue::write`], whose guards are to be dropped after the capture has ended. The graph keeps the addresses: memory
//! has to live as long as the graph is launched.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock};

use bytemuck::Pod;
use cudarc::driver::sys;
use cudarc::driver::{CudaContext, CudaStream, CudaView, CudaViewMut, DeviceSlice, DriverError, SyncOnDrop};

use super::{
    EncodedMap, Image, Kernel, Launch, MemoryId, Properties, Queue, Swizzle, Target, TensorMap, View,
    ViewMut, kernels, modules, origin,
};
use crate::{Error, Result};

/// A CUDA stream that runs the kernels.
///
/// Make one for a context, and the others with [`on_stream`](CudaQueue::on_stream): they share the loaded kernels.
#[derive(Clone)]
pub struct CudaQueue {
    stream: Arc<CudaStream>,
    library: Arc<Library>,
}

impl CudaQueue {
    /// A new stream on the device `ordinal`, in its primary context.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver of CUDA 12.0 or newer, without that device, below compute capability 8.0, or
    /// when this build has no kernels.
    pub fn open(ordinal: usize) -> Result<Self> {
        let stream = open_context(ordinal)?.new_stream().map_err(driver("cuStreamCreate"))?;
        Self::new(stream)
    }

    /// The queue of a stream.
    ///
    /// # Errors
    /// [`Error::NoDevice`] below compute capability 8.0, or when this build has no kernels.
    pub fn new(stream: Arc<CudaStream>) -> Result<Self> {
        let library = Arc::new(Library::new(stream.context())?);
        Ok(Self { stream, library })
    }

    /// The queue of a stream that is known by its handle only (a `CUstream` or `cudaStream_t`), for callers without this
    /// version of cudarc.
    ///
    /// # Safety
    /// `stream` belongs to the primary context of the device `ordinal` and outlives the queue and its clones.
    ///
    /// # Errors
    /// As [`open`](CudaQueue::open).
    pub unsafe fn from_raw(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        let context = open_context(ordinal)?;
        // SAFETY: the caller's promise; order between what is launched here and elsewhere is the stream's own.
        Self::new(unsafe { context.wrap_borrowed_stream(stream.cast()) })
    }

    /// The queue of another stream of the same context.
    ///
    /// # Errors
    /// [`Error::Argument`] for a stream of another context.
    pub fn on_stream(&self, stream: Arc<CudaStream>) -> Result<Self> {
        if stream.context() != &self.library.context {
            return Err(Error::argument("stream", "one of the queue's context", "another context's"));
        }
        Ok(Self { stream, library: Arc::clone(&self.library) })
    }

    /// The stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Loads all kernels. Without this call a kernel's module is loaded, and compiled by the driver where its cache does not
    /// have it, at the first launch.
    ///
    /// # Errors
    /// [`Error::Device`] with the compiler's log when the driver refuses a module.
    pub fn warm_up(&self) -> Result<()> {
        self.bind()?;
        self.library.modules.keys().try_for_each(|module| self.library.load(module, &self.stream).map(drop))
    }

    /// Lends a slice to calls on this queue, to read. What wrote it before takes effect before them; what is enqueued after
    /// the guard was dropped, on any stream of cudarc's, takes effect after them.
    ///
    /// # Errors
    /// [`Error::Argument`] for a slice of another stream; for those see [`View::from_raw`].
    pub fn read<'a, T: Pod>(&'a self, slice: CudaView<'a, T>) -> Result<CudaRead<'a, T>> {
        self.check_stream(slice.stream())?;
        let len = slice.len();
        let (address, guard) = slice.view_ptr(&self.stream);
        // SAFETY: cudarc keeps `len` elements allocated during `'a`, and frees them in the order of this very stream, so
        // after the work that was enqueued on it.
        let view = unsafe { View::from_raw(address, len, self.library.properties.memory) };
        Ok(CudaRead { view, _guard: guard })
    }

    /// Lends a slice to calls on this queue, to write; otherwise as [`read`](CudaQueue::read).
    ///
    /// # Errors
    /// [`Error::Argument`] for a slice of another stream; for those see [`ViewMut::from_raw`].
    pub fn write<'a, T: Pod>(&'a self, slice: CudaViewMut<'a, T>) -> Result<CudaWrite<'a, T>> {
        self.check_stream(slice.stream())?;
        let len = slice.len();
        let (address, guard) = slice.view_ptr_mut(&self.stream);
        // SAFETY: as in `read`; the borrow is exclusive.
        let view = unsafe { ViewMut::from_raw(address, len, self.library.properties.memory) };
        Ok(CudaWrite { view, _guard: guard })
    }

    fn check_stream(&self, stream: &Arc<CudaStream>) -> Result<()> {
        if stream == &self.stream {
            return Ok(());
        }
        Err(Error::argument("slice", "memory of the queue's stream", "another stream's"))
    }

    fn bind(&self) -> Result<()> {
        self.library.context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))
    }
}

// SAFETY: the memory is the context's, which never changes; a stream runs its work in order.
unsafe impl Queue for CudaQueue {
    fn properties(&self) -> &Properties {
        &self.library.properties
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch { kernel, grid, block, shared_bytes, params, overlap } = *launch;
        if params.len() != kernel.param_bytes {
            return Err(Error::argument(
                kernel.entry,
                format!("{} bytes of parameters", kernel.param_bytes),
                params.len(),
            ));
        }
        self.bind()?;
        let function = self.library.function(kernel, &self.stream)?;
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        let (mut attributes, mut count) = ([ignored(); 2], 0);
        let overlapping = (overlap && self.library.overlaps).then(overlapping);
        let clusters = kernel.clusters.then(|| clusters_of(grid[1]));
        for attribute in [overlapping, clusters].into_iter().flatten() {
            attributes[count] = attribute;
            count += 1;
        }
        if count > 0 {
            let config = sys::CUlaunchConfig {
                gridDimX: grid[0],
                gridDimY: grid[1],
                gridDimZ: grid[2],
                blockDimX: block[0],
                blockDimY: block[1],
                blockDimZ: block[2],
                sharedMemBytes: shared_bytes,
                hStream: self.stream.cu_stream(),
                attrs: attributes.as_mut_ptr(),
                numAttrs: count as c_uint,
            };
            // SAFETY: as below; the driver reads the configuration during the call.
            let result =
                unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), ptr::null_mut()) };
            return check(result, kernel.entry);
        }
        // SAFETY: the function is the kernel's, of the current context; it has one parameter of `param_bytes` bytes
        // (`tests/kernels.rs`), which the driver copies during the call. The rest is the caller's promise.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                shared_bytes,
                self.stream.cu_stream(),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check(result, kernel.entry)
    }

    unsafe fn upload(&self, destination: u64, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        refuse_capture(&self.stream, "upload")?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's promise for `destination`; the driver has staged ordinary memory when the call returns.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                destination,
                bytes.as_ptr().cast(),
                bytes.len(),
                self.stream.cu_stream(),
            )
        };
        check(result, "cuMemcpyHtoDAsync")
    }

    fn encode(&self, map: &TensorMap<'_>) -> Result<EncodedMap> {
        use sys::CUtensorMapDataType::{
            CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_DATA_TYPE_UINT32,
            CU_TENSOR_MAP_DATA_TYPE_UINT64,
        };
        use sys::CUtensorMapSwizzle::{
            CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B,
            CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        map.check()?;
        if self.library.properties.capability.0 < 9 {
            return Err(device_error("tensor map", "the device has none"));
        }
        let element = match map.element_bytes {
            1 => CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2 => CU_TENSOR_MAP_DATA_TYPE_UINT16,
            4 => CU_TENSOR_MAP_DATA_TYPE_UINT32,
            _ => CU_TENSOR_MAP_DATA_TYPE_UINT64,
        };
        let swizzle = match map.swizzle {
            Swizzle::None => CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes32 => CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::Bytes64 => CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have as many items as there are dimensions (strides one fewer, and element strides five);
        // the driver only reads them and writes the map. It does not touch the memory at the address.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut encoded,
                element,
                map.dims.len() as u32,
                ptr::with_exposed_provenance_mut(map.address as usize),
                map.dims.as_ptr(),
                map.strides.as_ptr(),
                map.box_dims.as_ptr(),
                [1; 5].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(result, "cuTensorMapEncodeTiled")?;
        Ok(EncodedMap(encoded.opaque))
    }
}

/// The first compute capability whose launches may overlap, and the first CUDA version whose drivers take that into graphs.
const OVERLAPPING: ((u32, u32), c_int) = ((9, 0), 12_030);

/// What lets a launch start while the one before it in its stream still runs.
fn overlapping() -> sys::CUlaunchAttribute {
    let mut attribute = ignored();
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}

/// Clusters of so many blocks in y.
fn clusters_of(blocks: u32) -> sys::CUlaunchAttribute {
    let mut attribute = ignored();
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    (attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z) =
        (1, blocks, 1);
    attribute
}

/// An attribute that says nothing.
fn ignored() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
        pad: [0; 4],
        // SAFETY: zeros are a value of all variants of the union, which are numbers, pointers and arrays of them.
        value: unsafe { std::mem::zeroed() },
    }
}

/// A slice lent to be read. Work enqueued on other streams sees this reading when the guard has been dropped.
#[must_use = "the calls that read the slice have to be made while this lives"]
pub struct CudaRead<'a, T> {
    view: View<'a, T>,
    _guard: SyncOnDrop<'a>,
}

impl<T: Pod> CudaRead<'_, T> {
    /// The memory, for a call.
    pub fn view(&self) -> View<'_, T> {
        self.view
    }
}

/// A slice lent to be written. Work enqueued on other streams sees this writing when the guard has been dropped.
#[must_use = "the calls that write the slice have to be made while this lives"]
pub struct CudaWrite<'a, T> {
    view: ViewMut<'a, T>,
    _guard: SyncOnDrop<'a>,
}

impl<T: Pod> CudaWrite<'_, T> {
    /// The memory, for a call that reads.
    pub fn view(&self) -> View<'_, T> {
        self.view.as_view()
    }

    /// The memory, for a call that writes.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        self.view.reborrow()
    }
}

/// The kernels of one context. Modules are never unloaded: graphs may hold their functions. The context frees them.
struct Library {
    context: Arc<CudaContext>,
    properties: Properties,
    /// Launches may overlap.
    overlaps: bool,
    modules: HashMap<&'static str, Module>,
    loading: Mutex<()>,
}

struct Module {
    image: &'static Image,
    functions: OnceLock<HashMap<&'static str, Function>>,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: a handle; the driver takes it from every thread on which its context is current.
unsafe impl Send for Function {}
// SAFETY: the same.
unsafe impl Sync for Function {}

impl Library {
    fn new(context: &Arc<CudaContext>) -> Result<Self> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT,
        };
        let attribute = |which| {
            let value = context.attribute(which).map_err(driver("cuDeviceGetAttribute"))?;
            u32::try_from(value)
                .map_err(|_| device_error("cuDeviceGetAttribute", format!("{which:?} is {value}")))
        };
        let capability = (attribute(MAJOR)?, attribute(MINOR)?);
        let target = Target::for_capability(capability)?;
        if modules().is_empty() {
            return Err(Error::NoDevice { reason: format!("this build has no kernels ({})", origin()) });
        }
        let images = modules().iter().filter(|image| image.target == target);
        let mut version = 0;
        // SAFETY: the driver writes one number.
        check(unsafe { sys::cuDriverGetVersion(&mut version) }, "cuDriverGetVersion")?;
        Ok(Self {
            context: Arc::clone(context),
            overlaps: capability >= OVERLAPPING.0 && version >= OVERLAPPING.1,
            properties: Properties {
                capability,
                sm_count: attribute(COUNT)?,
                max_shared_bytes: attribute(SHARED)?,
                memory: MemoryId(context.cu_ctx() as u64),
            },
            modules: images
                .map(|image| (image.module, Module { image, functions: OnceLock::new() }))
                .collect(),
            loading: Mutex::new(()),
        })
    }

    fn function(&self, kernel: Kernel, stream: &CudaStream) -> Result<sys::CUfunction> {
        match self.load(kernel.module, stream)?.get(kernel.entry) {
            Some(function) => Ok(function.0),
            None => Err(device_error(kernel.entry, "it is not in the registry of kernels")),
        }
    }

    /// The functions of a module; loads it at the first call. The context is current.
    fn load(&self, module: &str, stream: &CudaStream) -> Result<&HashMap<&'static str, Function>> {
        let Some(Module { image, functions }) = self.modules.get(module) else {
            return Err(device_error(module, "there is no such module"));
        };
        if let Some(loaded) = functions.get() {
            return Ok(loaded);
        }
        let _one_at_a_time = self.loading.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if functions.get().is_none() {
            refuse_capture(stream, &format!("loading {module} (call warm_up before)"))?;
            let loaded = load_functions(image, self.properties.max_shared_bytes)?;
            // Cannot be set already: the lock is held.
            let _ = functions.set(loaded);
        }
        Ok(functions.get().expect("set above"))
    }
}

/// Loads a module into the current context and allows its kernels all the shared memory there is.
fn load_functions(image: &Image, max_shared_bytes: u32) -> Result<HashMap<&'static str, Function>> {
    let module = load_module(image)?;
    let of_module = kernels().filter(|kernel| kernel.module == image.module);
    of_module.map(|kernel| Ok((kernel.entry, load_function(module, kernel, max_shared_bytes)?))).collect()
}

fn load_module(image: &Image) -> Result<sys::CUmodule> {
    let operation = format!("loading {} for {}", image.module, image.target);
    let ptx = CString::new(image.ptx()).map_err(|_| device_error(&operation, "the PTX has a zero byte"))?;
    let mut log = vec![0u8; 16 << 10];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // By the driver's convention numbers are passed as the pointer itself.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(log.len())];
    let mut module = ptr::null_mut();
    // SAFETY: `ptx` ends in a zero byte, the two arrays have as many items as is said, and the log its stated size.
    let result = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            ptx.as_ptr().cast(),
            options.len() as c_uint,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(module);
    }
    let written = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    let log = String::from_utf8_lossy(&log[..written]);
    Err(device_error(&operation, format!("{}\n{}", text(result), log.trim_end())))
}

fn load_function(module: sys::CUmodule, kernel: Kernel, max_shared_bytes: u32) -> Result<Function> {
    use sys::CUfunction_attribute::{
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC,
        CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as STATIC,
    };
    let name = CString::new(kernel.entry)
        .map_err(|_| device_error("cuModuleGetFunction", "the name has a zero byte"))?;
    let mut function = ptr::null_mut();
    let mut fixed = 0;
    // SAFETY: the module is loaded, the name ends in a zero byte.
    check(unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) }, kernel.entry)?;
    // SAFETY: the function was just found.
    check(unsafe { sys::cuFuncGetAttribute(&mut fixed, STATIC, function) }, kernel.entry)?;
    let dynamic = i32::try_from(max_shared_bytes).unwrap_or(i32::MAX) - fixed;
    // SAFETY: the same.
    check(unsafe { sys::cuFuncSetAttribute(function, DYNAMIC, dynamic) }, kernel.entry)?;
    Ok(Function(function))
}

/// Refuses what would end a capture. The context is current.
fn refuse_capture(stream: &CudaStream, operation: &str) -> Result<()> {
    // The legacy default stream cannot be captured, and asking it while another stream is captured would be an error.
    if stream.cu_stream().is_null() {
        return Ok(());
    }
    match stream.capture_status().map_err(driver("cuStreamIsCapturing"))? {
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
        _ => Err(device_error(operation, "the stream is being captured")),
    }
}

/// The primary context of a device. Everything of cudarc panics without a driver, so that is looked for first.
fn open_context(ordinal: usize) -> Result<Arc<CudaContext>> {
    probe_driver()?;
    CudaContext::new(ordinal)
        .map_err(|DriverError(code)| Error::NoDevice { reason: format!("device {ordinal}: {}", text(code)) })
}

const DRIVER_NAMES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

/// The first CUDA version whose driver (R525) takes PTX 8.0.
const MIN_CUDA: c_int = 12_000;

fn probe_driver() -> Result<()> {
    let missing = |reason: String| Error::NoDevice { reason };
    // SAFETY: NVIDIA's driver library may be loaded at any time.
    let library = DRIVER_NAMES.iter().find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
    let library = library
        .ok_or_else(|| missing(format!("no NVIDIA driver ({} not found)", DRIVER_NAMES.join(", "))))?;
    // Never closed: cudarc opens it again, and a driver that has been initialised must stay.
    let library: &'static _ = Box::leak(Box::new(library));
    let symbol = |e: libloading::Error| missing(format!("the NVIDIA driver is not usable: {e}"));
    let mut version = 0;
    // SAFETY: the types are those of cuda.h.
    let codes = unsafe {
        let init = library.get::<unsafe extern "C" fn(c_uint) -> c_int>("cuInit").map_err(symbol)?;
        let get =
            library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDriverGetVersion").map_err(symbol)?;
        [("cuInit", init(0)), ("cuDriverGetVersion", get(&mut version))]
    };
    // Neither is named through the driver: a stub of it may not be able to.
    for (call, code) in codes {
        match code {
            0 => {}
            34 => return Err(missing("libcuda is the toolkit's stub, not a driver".into())),
            100 => return Err(missing("the driver sees no GPU".into())),
            _ => return Err(missing(format!("{call} failed with CUDA error {code}"))),
        }
    }
    if version < MIN_CUDA {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(missing(format!(
            "a driver for CUDA 12.0 (R525) or newer is needed, this one is for {major}.{minor}"
        )));
    }
    Ok(())
}

fn check(result: sys::CUresult, operation: &str) -> Result<()> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(device_error(operation, text(code))),
    }
}

fn driver(operation: &'static str) -> impl Fn(DriverError) -> Error {
    move |DriverError(code)| device_error(operation, text(code))
}

fn device_error(operation: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Device { operation: operation.into(), reason: reason.into() }
}

/// The driver's own words; only for codes that a driver has returned.
fn text(code: sys::CUresult) -> String {
    let error = DriverError(code);
    let words = |text: Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| String::new(), |t| t.to_string_lossy().into_owned())
    };
    format!("{} ({}): {}", words(error.error_name()), code as u32, words(error.error_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_gives_a_device_or_a_typed_error() {
        match CudaQueue::open(0) {
            Ok(queue) => assert!(queue.properties().capability >= (8, 0)),
            Err(error) => assert!(matches!(error, Error::NoDevice { .. }), "{error}"),
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_a_typed_error() {
        let error = CudaQueue::open(999).err().expect("no machine has a thousand");
        assert!(matches!(error, Error::NoDevice { .. }), "{error}");
    }
}
