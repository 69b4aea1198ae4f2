//! What reaches the driver, on machines without one: the calls that a libcuda of our own gets.
//!
//! Every test runs in a process of its own that finds that library before any real one.
#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::thread;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use lora_kernels::cuda::{CudaQueue, Kernel, Launch, Properties, Queue, Target, kernels, modules};
use lora_kernels::{Error, Result};

/// Runs the test that calls this again, in a process whose libcuda is the fake, and there does `scenario`.
fn on_a_fake_driver(scenario: impl FnOnce(Fake)) {
    const INSIDE: &str = "LORA_KERNELS_FAKE_CUDA";
    if std::env::var_os(INSIDE).is_some() {
        return scenario(Fake::new());
    }
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(build);
    let name = thread::current().name().expect("the test harness names threads").to_owned();
    let child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", &name])
        .env("LD_LIBRARY_PATH", &*FOLDER)
        .env(INSIDE, "")
        .output()
        .expect("this test runs again");
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{text}{}", String::from_utf8_lossy(&child.stderr));
    assert!(text.contains("test result: ok. 1 passed"), "{text}");
}

/// Compiles the fake; the folder that it lies in.
fn build() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake_cuda");
    std::fs::create_dir_all(&folder).expect("a folder under target");
    let (library, second_name) = (folder.join("libcuda.so.1"), folder.join("libcuda.so"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_driver/fake_cuda.c");
    let status = Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).arg(&library).arg(source).status();
    assert!(status.expect("a C compiler, which Rust needs to link").success());
    // cudarc opens this name, the probe the other: one file, so that both get the same library.
    if !second_name.exists() {
        std::os::unix::fs::symlink(&library, &second_name).expect("a link");
    }
    folder
}

/// `struct Settings` of the fake.
#[repr(C)]
struct Settings {
    init_code: c_int,
    version: c_int,
    major: c_int,
    minor: c_int,
    refuse_ptx: c_int,
}

/// The library that cudarc has loaded, too.
struct Fake(libloading::Library);

impl Fake {
    fn new() -> Self {
        // SAFETY: loading the fake does nothing.
        let fake = Fake(unsafe { libloading::Library::new("libcuda.so") }.expect("the fake"));
        fake.reset();
        fake
    }

    fn reset(&self) {
        // SAFETY: the functions have the types of `fake_cuda.c`.
        unsafe { self.0.get::<unsafe extern "C" fn()>("fake_reset").expect("not a real driver")() }
    }

    fn set(&self, change: impl FnOnce(&mut Settings)) {
        // SAFETY: as above; tests run one at a time.
        unsafe {
            change(&mut *self.0.get::<unsafe extern "C" fn() -> *mut Settings>("fake_settings").expect("it")())
        }
    }

    /// The calls since the last time.
    fn calls(&self) -> Vec<String> {
        // SAFETY: as above.
        let text = unsafe {
            CStr::from_ptr(self.0.get::<unsafe extern "C" fn() -> *const c_char>("fake_calls").expect("it")())
        };
        text.to_str().expect("text").lines().map(str::to_owned).collect()
    }
}

fn some_kernel() -> Kernel {
    kernels().find(|kernel| kernel.entry == "nf4_dequantize_f32").expect("it")
}

fn launch(queue: &CudaQueue, param_bytes: usize) -> Result<()> {
    launch_with(queue, some_kernel(), param_bytes, false)
}

fn launch_with(queue: &CudaQueue, kernel: Kernel, param_bytes: usize, overlap: bool) -> Result<()> {
    let params: Vec<u8> = (0..param_bytes).map(|i| i as u8).collect();
    let (grid, block) = ([5, 6, 7], [32, 2, 1]);
    let launch = Launch { kernel, grid, block, shared_bytes: 4096, params: &params, overlap };
    // SAFETY: the fake runs nothing.
    unsafe { queue.launch(&launch) }
}

fn reason(error: Error) -> String {
    match error {
        Error::NoDevice { reason } | Error::Device { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_launch_is_one_call_and_nothing_else() {
    on_a_fake_driver(|fake| {
        let queue = CudaQueue::open(0).expect("a device");
        queue.warm_up().expect("modules");
        fake.calls();
        launch(&queue, some_kernel().param_bytes).expect("a launch");
        let stream = queue.stream().cu_stream();
        let expected = format!(
            "cuLaunchKernel nf4_dequantize_f32 (5 6 7) (32 2 1) 4096 on {stream:?} with 706050403020100"
        );
        assert_eq!(fake.calls(), [expected]);
    });
}

#[test]
fn a_launch_that_overlaps_says_so_in_the_same_one_call() {
    on_a_fake_driver(|fake| {
        fake.set(|s| s.version = 12_030);
        let queue = CudaQueue::open(0).expect("a device");
        queue.warm_up().expect("modules");
        fake.calls();
        launch_with(&queue, some_kernel(), some_kernel().param_bytes, true).expect("a launch");
        let stream = queue.stream().cu_stream();
        // 6: programmatic stream serialization.
        let expected = format!(
            "cuLaunchKernelEx nf4_dequantize_f32 (5 6 7) (32 2 1) 4096 on {stream:?} with 706050403020100, attribute 6 is 1 0 0"
        );
        assert_eq!(fake.calls(), [expected]);
    });
}

/// The blocks that lie side by side in y, alone or in a launch that overlaps.
#[test]
fn a_launch_in_clusters_says_so_too() {
    on_a_fake_driver(|fake| {
        fake.set(|s| s.version = 12_030);
        let queue = CudaQueue::open(0).expect("a device");
        queue.warm_up().expect("modules");
        let kernel = kernels().find(|kernel| kernel.clusters).expect("decode's");
        // 4: the size of a cluster.
        for (overlap, attributes) in
            [(false, ", attribute 4 is 1 6 1"), (true, ", attribute 6 is 1 0 0, attribute 4 is 1 6 1")]
        {
            fake.calls();
            launch_with(&queue, kernel, kernel.param_bytes, overlap).expect("a launch");
            let calls = fake.calls();
            let of = calls[0].strip_prefix("cuLaunchKernelEx ").and_then(|of| of.strip_prefix(kernel.entry));
            assert!(
                calls.len() == 1
                    && of.is_some_and(|of| of.ends_with(&format!("with 706050403020100{attributes}"))),
                "{calls:?}"
            );
        }
    });
}

/// Drivers before CUDA 12.3 do not take such launches into graphs, and devices before Hopper know nothing of them.
#[test]
fn launches_overlap_where_driver_and_device_let_them() {
    on_a_fake_driver(|fake| {
        for (version, major, expected) in
            [(12_030, 9, "cuLaunchKernelEx"), (12_020, 9, "cuLaunchKernel "), (13_000, 8, "cuLaunchKernel ")]
        {
            fake.reset();
            fake.set(|s| (s.version, s.major, s.minor) = (version, major, 0));
            let queue = CudaQueue::open(0).expect("a device");
            queue.warm_up().expect("modules");
            fake.calls();
            launch_with(&queue, some_kernel(), some_kernel().param_bytes, true).expect("a launch");
            let calls = fake.calls();
            assert!(calls.len() == 1 && calls[0].starts_with(expected), "{version}, {major}.0: {calls:?}");
        }
    });
}

#[test]
fn other_threads_get_the_context() {
    on_a_fake_driver(|fake| {
        let queue = CudaQueue::open(0).expect("a device");
        queue.warm_up().expect("modules");
        fake.calls();
        thread::scope(|scope| {
            scope.spawn(|| launch(&queue, some_kernel().param_bytes).expect("a launch"));
        });
        let calls = fake.calls();
        assert_eq!(calls.len(), 2, "{calls:?}");
        assert_eq!(calls[0], "cuCtxSetCurrent");
    });
}

#[test]
fn modules_load_at_the_first_launch_and_once() {
    on_a_fake_driver(|fake| {
        let queue = CudaQueue::open(0).expect("a device");
        let other = queue
            .on_stream(queue.stream().context().new_stream().expect("a stream"))
            .expect("the same context");
        fake.calls();
        for queue in [&queue, &other, &queue] {
            launch(queue, some_kernel().param_bytes).expect("a launch");
        }
        let loads: Vec<_> = fake.calls().into_iter().filter(|call| call.contains("Load")).collect();
        assert_eq!(loads, ["cuModuleLoadDataEx .target sm_90a"]);
    });
}

#[test]
fn capability_chooses_the_target() {
    on_a_fake_driver(|fake| {
        for ((major, minor), target) in
            [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((12, 0), "sm_80")]
        {
            fake.reset();
            fake.set(|s| (s.major, s.minor) = (major, minor));
            let queue = CudaQueue::open(0).expect("a device");
            let Properties { capability, sm_count, max_shared_bytes, .. } = *queue.properties();
            assert_eq!(
                (capability, sm_count, max_shared_bytes),
                ((major as u32, minor as u32), 132, 232_448)
            );
            fake.calls();
            queue.warm_up().expect("modules");
            let modules = modules().len() / Target::ALL.len();
            assert_eq!(fake.calls(), vec![format!("cuModuleLoadDataEx .target {target}"); modules]);
        }
    });
}

#[test]
fn machines_without_a_usable_device_are_named() {
    on_a_fake_driver(|fake| {
        type Change = fn(&mut Settings);
        let cases: [(Change, &str); 5] = [
            (|s| s.init_code = 34, "stub"),
            (|s| s.init_code = 100, "no GPU"),
            (|s| s.init_code = 999, "CUDA error 999"),
            (|s| s.version = 11_080, "this one is for 11.8"),
            (|s| (s.major, s.minor) = (7, 5), "the device has 7.5"),
        ];
        for (change, words) in cases {
            fake.reset();
            fake.set(change);
            let error = CudaQueue::open(0).err().expect(words);
            assert!(matches!(&error, Error::NoDevice { reason } if reason.contains(words)), "{error}");
        }
        fake.reset();
        let error = CudaQueue::open(1).err().expect("one device only");
        assert!(matches!(&error, Error::NoDevice { reason } if reason.contains("device 1")), "{error}");
    });
}

#[test]
fn the_compilers_log_is_in_the_error() {
    on_a_fake_driver(|fake| {
        let queue = CudaQueue::open(0).expect("a device");
        fake.set(|s| s.refuse_ptx = 1);
        let error = queue.warm_up().expect_err("refused");
        assert!(error.to_string().contains("for compute_90a failed"), "{error}");
        assert!(error.to_string().contains("unresolved extern function 'f'"), "{error}");
        fake.set(|s| s.refuse_ptx = 0);
        queue.warm_up().expect("a module that failed can be loaded later");
    });
}

#[test]
fn parameters_of_a_wrong_size_do_not_reach_the_driver() {
    on_a_fake_driver(|fake| {
        let queue = CudaQueue::open(0).expect("a device");
        fake.calls();
        let error = launch(&queue, 8).expect_err("too few");
        assert!(error.to_string().contains("bytes of parameters, got 8"), "{error}");
        assert_eq!(fake.calls(), [""; 0]);
    });
}

#[test]
fn launches_can_be_captured_after_warm_up_and_nothing_else_can() {
    on_a_fake_driver(|fake| {
        let queue = CudaQueue::open(0).expect("a device");
        let size = some_kernel().param_bytes;
        let capture = || {
            queue
                .stream()
                .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
                .expect("it")
        };
        let end = || drop(queue.stream().end_capture(CUgraphInstantiate_flags(0)).expect("it"));

        capture();
        fake.calls();
        assert!(launch(&queue, size).expect_err("not loaded").to_string().contains("warm_up"));
        // SAFETY: the fake copies nothing.
        let upload = unsafe { queue.upload(0x1000, &[1, 2, 3]) };
        assert!(reason(upload.expect_err("a copy")).contains("captured"));
        assert_eq!(fake.calls(), [""; 0], "nothing that would break the capture");
        end();

        queue.warm_up().expect("modules");
        capture();
        fake.calls();
        launch(&queue, size).expect("loaded");
        assert_eq!(fake.calls().len(), 1);
        end();
        // SAFETY: as above.
        unsafe { queue.upload(0x1000, &[1, 2, 3]) }.expect("no capture");
        let stream = queue.stream().cu_stream();
        assert_eq!(fake.calls(), [format!("cuMemcpyHtoDAsync 3 bytes to 1000 on {stream:?}")]);
    });
}

#[test]
fn slices_are_lent_with_the_events_that_cudarc_expects() {
    on_a_fake_driver(|fake| {
        let queue = CudaQueue::open(0).expect("a device");
        let mut slice = queue.stream().clone_htod(&[1.0f32; 8]).expect("memory");
        fake.calls();
        let kinds = |calls: Vec<String>| {
            calls.iter().map(|c| c.split(' ').next().unwrap_or("").to_owned()).collect::<Vec<_>>()
        };

        let reading = queue.read(slice.slice(2..)).expect("its stream");
        assert_eq!((reading.view().len(), reading.view().address()), (6, 0x70_0000_0008));
        assert_eq!(kinds(fake.calls()), ["cuStreamWaitEvent"], "the last writing");
        drop(reading);
        assert_eq!(kinds(fake.calls()), ["cuEventRecord"], "this reading");

        let mut writing = queue.write(slice.as_view_mut()).expect("its stream");
        assert_eq!(writing.view_mut().len(), 8);
        assert_eq!(
            kinds(fake.calls()),
            ["cuStreamWaitEvent", "cuStreamWaitEvent"],
            "the last reading and writing"
        );
        drop(writing);
        assert_eq!(kinds(fake.calls()), ["cuEventRecord"], "this writing");

        let other = queue
            .on_stream(queue.stream().context().new_stream().expect("a stream"))
            .expect("the same context");
        let error = other.read(slice.as_view()).err().expect("another stream's");
        assert!(error.to_string().contains("another stream's"), "{error}");
    });
}

#[test]
fn a_borrowed_stream_is_used_as_it_is() {
    on_a_fake_driver(|fake| {
        // SAFETY: the fake takes any handle.
        let queue =
            unsafe { CudaQueue::from_raw(0, std::ptr::without_provenance_mut(0xabc0)) }.expect("a device");
        queue.warm_up().expect("modules");
        fake.calls();
        launch(&queue, some_kernel().param_bytes).expect("a launch");
        drop(queue);
        let calls = fake.calls();
        assert!(calls[0].contains("on 0xabc0"), "{calls:?}");
        assert!(
            calls.iter().skip(1).all(|call| call == "cuCtxSetCurrent"),
            "nothing is destroyed: {calls:?}"
        );
    });
}
