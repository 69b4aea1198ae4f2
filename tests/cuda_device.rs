//! What only a GPU and its driver can prove: that every module compiles there, that launches are ordered with a caller's
//! own work on streams, and that a captured graph replays them. `cargo test --test cuda_device -- --ignored` runs it.
#![cfg(feature = "cuda")]

use std::sync::Arc;
use std::thread;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream};
use lora_kernels::DType;
use lora_kernels::cuda::nf4_dequantize::{Plan, Shape, plan};
use lora_kernels::cuda::{AbsmaxView, CudaQueue, Launch, Nf4View, Queue, View, ViewMut, kernels};
use lora_kernels::nf4::{self, Codebook};

const NUMEL: usize = 1 << 20;
const BLOCKSIZE: usize = 64;

/// A 4-bit matrix in slices of cudarc's, and what it decodes to.
struct Matrix {
    codebook: Codebook,
    packed: CudaSlice<u8>,
    absmax: CudaSlice<f32>,
    plan: Plan,
    expected: Vec<f32>,
}

impl Matrix {
    fn new(queue: &CudaQueue) -> Self {
        let x: Vec<f32> = (0..NUMEL).map(|i| (i as f32 * 0.37).sin()).collect();
        let codebook = Codebook::nf4();
        let (mut packed, mut absmax) = (vec![0; NUMEL / 2], vec![0.0; NUMEL / BLOCKSIZE]);
        nf4::quantize(&x, BLOCKSIZE, &codebook, &mut packed, &mut absmax).unwrap();
        let mut expected = vec![0.0; NUMEL];
        nf4::dequantize(&packed, &absmax, BLOCKSIZE, &codebook, &mut expected).unwrap();
        let shape = Shape { numel: NUMEL, blocksize: BLOCKSIZE, dtype: DType::F32 };
        let plan = plan(&shape, queue.properties()).unwrap();
        let stream = queue.stream();
        let (packed, absmax) = (stream.clone_htod(&packed).unwrap(), stream.clone_htod(&absmax).unwrap());
        Self { codebook, packed, absmax, plan, expected }
    }

    fn decode(&self, queue: &CudaQueue, packed: View<'_, u8>, absmax: View<'_, f32>, out: ViewMut<'_, f32>) {
        let weight = Nf4View {
            packed,
            absmax: AbsmaxView::Plain(absmax),
            blocksize: BLOCKSIZE,
            codebook: &self.codebook,
        };
        self.plan.run(queue, &weight, out).unwrap();
    }

    /// Lends the slices and decodes.
    fn decode_into(&self, queue: &CudaQueue, out: &mut CudaSlice<f32>) {
        let (packed, absmax) =
            (queue.read(self.packed.as_view()).unwrap(), queue.read(self.absmax.as_view()).unwrap());
        let mut out = queue.write(out.as_view_mut()).unwrap();
        self.decode(queue, packed.view(), absmax.view(), out.view_mut());
    }
}

fn ones(stream: &Arc<CudaStream>) -> CudaSlice<f32> {
    stream.clone_htod(&vec![1.0f32; NUMEL]).unwrap()
}

fn download(stream: &Arc<CudaStream>, slice: &CudaSlice<f32>) -> Vec<f32> {
    let host = stream.clone_dtoh(slice).unwrap();
    stream.synchronize().unwrap();
    host
}

#[test]
#[ignore = "needs a GPU"]
fn the_driver_takes_every_module() {
    CudaQueue::open(0).unwrap().warm_up().unwrap();
}

/// The one that LORA_KERNELS_MODULE names: several processes compile modules side by side, and leave them in the driver's
/// cache. Nothing without it.
#[test]
#[ignore = "needs a GPU"]
fn the_driver_takes_a_module() {
    let Ok(module) = std::env::var("LORA_KERNELS_MODULE") else { return };
    let kernel = kernels().find(|kernel| kernel.module == module).expect("one of the modules");
    let params = vec![0; kernel.param_bytes];
    let launch =
        Launch { kernel, grid: [0; 3], block: [32, 1, 1], shared_bytes: 0, params: &params, overlap: false };
    // SAFETY: a launch without blocks reads and writes nothing: the driver refuses it, once the module is loaded.
    let refused = unsafe { CudaQueue::open(0).unwrap().launch(&launch) }.expect_err("a grid of nothing");
    assert!(refused.to_string().contains("CUDA_ERROR_INVALID_VALUE"), "{refused}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_captured_launch_runs_when_the_graph_does_and_not_before() {
    let queue = CudaQueue::open(0).unwrap();
    queue.warm_up().unwrap();
    let matrix = Matrix::new(&queue);
    let stream = queue.stream();
    let mut out = ones(stream);
    let packed = queue.read(matrix.packed.as_view()).unwrap();
    let absmax = queue.read(matrix.absmax.as_view()).unwrap();
    let mut writing = queue.write(out.as_view_mut()).unwrap();

    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    matrix.decode(&queue, packed.view(), absmax.view(), writing.view_mut());
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a graph of one launch");
    drop(writing);

    assert_eq!(download(stream, &out), vec![1.0; NUMEL]);
    for _ in 0..2 {
        stream.memset_zeros(&mut out).unwrap();
        graph.launch().unwrap();
        assert_eq!(download(stream, &out), matrix.expected);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn any_thread_may_launch() {
    let queue = CudaQueue::open(0).unwrap();
    let matrix = Matrix::new(&queue);
    let mut out = ones(queue.stream());
    thread::scope(|scope| {
        scope.spawn(|| matrix.decode_into(&queue, &mut out));
    });
    assert_eq!(download(queue.stream(), &out), matrix.expected);
}

#[test]
#[ignore = "needs a GPU"]
fn other_streams_of_cudarc_see_what_was_written() {
    let queue = CudaQueue::open(0).unwrap();
    let matrix = Matrix::new(&queue);
    let other = queue.stream().context().new_stream().unwrap();
    let mut out = ones(queue.stream());
    for _ in 0..20 {
        queue.stream().memset_zeros(&mut out).unwrap();
        matrix.decode_into(&queue, &mut out);
        assert_eq!(download(&other, &out), matrix.expected, "no one has waited but the streams");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_default_stream_will_do() {
    let first = CudaQueue::open(0).unwrap();
    let queue = first.on_stream(first.stream().context().default_stream()).unwrap();
    let matrix = Matrix::new(&queue);
    let mut out = ones(queue.stream());
    matrix.decode_into(&queue, &mut out);
    assert_eq!(download(queue.stream(), &out), matrix.expected);
}
