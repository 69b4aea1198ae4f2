//! Two layers over several GPUs: the first cut along its outputs, the second along its inputs, one all-reduce.
//!
//! A process for each GPU, all on one machine, which needs that many NVIDIA GPUs of compute capability 8.0 or newer, driver R525 or newer, and
//! the NCCL 2 library (`libnccl.so.2`, of the package `nvidia-nccl-cu12` or `-cu13`) where the loader finds it:
//!
//! ```sh
//! cargo build --release --features nccl --example tensor_parallel
//! for rank in 0 1; do target/release/examples/tensor_parallel $rank 2 /tmp/nccl.id & done; wait
//! ```
//!
//! Rank 0 writes NCCL's id to the file (which must not exist before), the others wait for it. Each compares with the whole layers on the CPU.

use std::path::Path;
use std::time::Duration;
use std::{env, fs, thread};

use cudarc::driver::CudaSlice;
use cudarc::nccl::safe::{Comm, Id, ReduceOp};
use half::bf16;
use lora_kernels::DType;
use lora_kernels::cpu::{self, MatmulExtras, fast};
use lora_kernels::cuda::matmul::{self, Extras, Shape, Weight, WeightFormat};
use lora_kernels::cuda::{AbsmaxView, CudaQueue, Nf4View, Queue};
use lora_kernels::nf4::{Absmax, Codebook, Nesting, Nf4Matrix};
use lora_kernels::parallel::{Shard, Split};

type Failure = Box<dyn std::error::Error>;

const TOKENS: usize = 4;
const HIDDEN: usize = 2048;
const INNER: usize = 4096;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [rank, ranks, id] = arguments.as_slice() else {
        return Err("wanted: RANK RANKS ID_FILE".into());
    };
    let (rank, ranks): (usize, usize) = (rank.parse()?, ranks.parse()?);
    let queue = CudaQueue::open(rank)?;
    let comm = Comm::from_rank(queue.stream().clone(), rank, ranks, exchange_id(rank, Path::new(id))?)
        .map_err(nccl)?;

    let numbers = |len: usize, step: f32| (0..len).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    let quantized = |shape: [usize; 2], step| {
        Nf4Matrix::quantize(&numbers(shape[0] * shape[1], step), shape, 64, &Codebook::nf4(), Nesting::Plain)
    };
    let (up, down) = (quantized([INNER, HIDDEN], 0.37)?, quantized([HIDDEN, INNER], 0.73)?);
    let x: Vec<bf16> = numbers(TOKENS * HIDDEN, 0.11).iter().map(|&v| bf16::from_f32(v / 64.0)).collect();

    // What the rank has of both layers, and no more of the activations between them than that.
    let own_up = Shard::new(Split::Outputs, rank, ranks)?.nf4(&up)?.weight;
    let own_down = Shard::new(Split::Inputs, rank, ranks)?.nf4(&down)?.weight;
    let stream = queue.stream();
    let inner = product(&queue, &own_up, &stream.clone_htod(&x)?)?;
    let mut y = product(&queue, &own_down, &inner)?;
    comm.all_reduce_in_place(&mut y, &ReduceOp::Sum).map_err(nccl)?;
    let y = stream.clone_dtoh(&y)?;

    let whole = |x: &[bf16], weight: &Nf4Matrix| -> Result<Vec<bf16>, Failure> {
        let mut y = vec![bf16::ZERO; TOKENS * weight.shape()[0]];
        fast::matmul(x, TOKENS, &cpu::Weight::Nf4(weight), &MatmulExtras::<bf16>::default(), &mut y)?;
        Ok(y)
    };
    let wanted = whole(&whole(&x, &up)?, &down)?;
    let largest = wanted.iter().fold(0.0f32, |largest, v| largest.max(v.to_f32().abs()));
    let error = y.iter().zip(&wanted).fold(0.0f32, |e, (a, b)| e.max((a.to_f32() - b.to_f32()).abs()));
    println!("rank {rank} of {ranks}: largest difference {error:.2e}, of outputs up to {largest:.2e}");
    Ok(())
}

/// `x Wᵀ` on the rank's device.
fn product(queue: &CudaQueue, weight: &Nf4Matrix, x: &CudaSlice<bf16>) -> Result<CudaSlice<bf16>, Failure> {
    let stream = queue.stream();
    let &[n, k] = weight.shape() else { unreachable!("made as a matrix") };
    let Absmax::Plain(scales) = weight.absmax() else { unreachable!("made with f32 scales") };
    let (packed, scales) = (stream.clone_htod(weight.packed())?, stream.clone_htod(scales)?);
    let format = WeightFormat::Nf4 { blocksize: weight.blocksize() };
    let shape = Shape { tokens: TOKENS, n, k, dtype: DType::BF16, weight: format };
    let plan = matmul::plan(&shape, queue.properties())?;
    let (mut y, mut workspace) =
        (stream.alloc_zeros::<bf16>(TOKENS * n)?, stream.alloc_zeros::<u8>(plan.workspace_bytes.max(1))?);
    {
        let (x, packed, scales) =
            (queue.read(x.as_view())?, queue.read(packed.as_view())?, queue.read(scales.as_view())?);
        let (mut y, mut workspace) = (queue.write(y.as_view_mut())?, queue.write(workspace.as_view_mut())?);
        let codes = Nf4View {
            packed: packed.view(),
            absmax: AbsmaxView::Plain(scales.view()),
            blocksize: weight.blocksize(),
            codebook: weight.codebook(),
        };
        let extras = Extras::<bf16>::default();
        plan.run(queue, x.view(), &Weight::Nf4(codes), &extras, y.view_mut(), workspace.view_mut())?;
    }
    Ok(y)
}

/// NCCL's id, from rank 0 to the others by way of a file that appears whole.
fn exchange_id(rank: usize, path: &Path) -> Result<Id, Failure> {
    if rank == 0 {
        let id = Id::new().map_err(nccl)?;
        let bytes: Vec<u8> = id.internal().iter().map(|&c| c as u8).collect();
        let partial = path.with_extension("partial");
        fs::write(&partial, bytes)?;
        fs::rename(&partial, path)?;
        return Ok(id);
    }
    while !path.exists() {
        thread::sleep(Duration::from_millis(10));
    }
    let bytes: [u8; 128] = fs::read(path)?.try_into().map_err(|_| "the file holds no id of NCCL's")?;
    Ok(Id::uninit(bytes.map(|b| b as std::ffi::c_char)))
}

fn nccl(error: cudarc::nccl::result::NcclError) -> Failure {
    format!("NCCL: {error:?}").into()
}
