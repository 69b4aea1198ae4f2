//! The forward pass on a GPU: the library's kernels on candle's stream and buffers.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, StorageRef, Tensor};
use half::{bf16, f16};
use lora_kernels::cuda::matmul::{self, Extras, WeightFormat};
use lora_kernels::cuda::{
    AbsmaxView, AdapterTable, AdapterView, CudaQueue, CudaRead, LowRank, NestedView, Nf4View, Queue, View,
    ViewMut, lora_shrink, nf4_dequantize,
};
use lora_kernels::nf4::{Absmax, Codebook, NestedAbsmax, Nf4Matrix};
use lora_kernels::{DType as ElementType, Element};

use crate::product::{Branch, Frozen, Operand};
use crate::weight::{Place, Weight};
use crate::{refuse, wrap};

/// A type that both candle and the kernels know.
trait Number: Element + CudaDType + DeviceRepr + Send + Sync {}

impl Number for f32 {}
impl Number for f16 {}
impl Number for bf16 {}

/// `y` of `x`, with one adapter for all tokens, or the adapter that `index` (i32) names.
pub fn forward(
    frozen: &Frozen,
    x: Operand<'_, CudaStorage>,
    branches: &[Branch<'_, CudaStorage>],
    index: Option<Operand<'_, CudaStorage>>,
    table: &TableCache,
) -> Result<(CudaStorage, Shape)> {
    use DType::{BF16, F16, F32};
    let factors = branches.first().map_or(x.0.dtype(), |branch| branch.lora_a.0.dtype());
    match (x.0.dtype(), factors) {
        (F32, F32) => run::<f32, f32>(frozen, x, branches, index, table),
        (F16, F16) => run::<f16, f16>(frozen, x, branches, index, table),
        (F16, F32) => run::<f16, f32>(frozen, x, branches, index, table),
        (BF16, BF16) => run::<bf16, bf16>(frozen, x, branches, index, table),
        (BF16, F32) => run::<bf16, f32>(frozen, x, branches, index, table),
        (_, other) => refuse("lora_a, lora_b", "the type of x, or f32", other.as_str()),
    }
}

fn run<T: Number, A: Number>(
    frozen: &Frozen,
    x: Operand<'_, CudaStorage>,
    branches: &[Branch<'_, CudaStorage>],
    index: Option<Operand<'_, CudaStorage>>,
    table: &TableCache,
) -> Result<(CudaStorage, Shape)> {
    let device = x.0.device();
    let queue = &queue(device)?;
    let (n, k) = frozen.weight.dims2()?;
    let shape = frozen.output_shape(x.1)?;
    let tokens = x.1.dims()[..x.1.dims().len() - 1].iter().product();
    let mut y = scratch::<T>(device, shape.elem_count())?;
    if shape.elem_count() == 0 {
        return Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), shape));
    }

    // The kernels read x in pieces of 16 bytes: a part of a tensor that begins between them is copied.
    let x_slice = slice::<T>(x)?;
    let copy;
    let mut x = queue.read(x_slice.slice(..)).map_err(wrap)?;
    if !x.view().address().is_multiple_of(16) {
        copy = device.cuda_stream().clone_dtod(&x_slice).map_err(candle_core::Error::wrap)?;
        x = queue.read(copy.slice(..)).map_err(wrap)?;
    }

    let index = index.map(|index| queue.read(slice::<i32>(index)?).map_err(wrap)).transpose()?;
    let index = index.as_ref().map(CudaRead::view);
    let table = match branches.is_empty() {
        true => None,
        false => Some(table.get::<A>(queue, device, branches, n, k)?),
    };
    let shrink = match &table {
        None => None,
        Some(table) => {
            let shape = table.entries.shrink_shape(tokens, T::DTYPE);
            let plan = lora_shrink::plan(&shape, queue.properties()).map_err(wrap)?;
            let mut v = scratch::<f32>(device, plan.v_len())?;
            let mut guard = queue.write(v.slice_mut(..plan.v_len())).map_err(wrap)?;
            plan.run(queue, x.view(), &table.entries, index, guard.view_mut()).map_err(wrap)?;
            drop(guard);
            Some((v, plan.v_len()))
        }
    };
    let v = match &shrink {
        Some((v, len)) => Some(queue.read(v.slice(..*len)).map_err(wrap)?),
        None => None,
    };
    let low_rank = table.as_ref().zip(v.as_ref()).map(|(table, v)| LowRank {
        adapters: &table.entries,
        index,
        v: v.view(),
    });

    let bias_guard = frozen.bias.as_ref().map(Tensor::storage_and_layout);
    let bias = match &bias_guard {
        Some((storage, layout)) => {
            Some(queue.read(slice::<T>((cuda_storage(storage)?, layout))?).map_err(wrap)?)
        }
        None => None,
    };
    let scale_guard = frozen.row_scale.as_ref().map(Tensor::storage_and_layout);
    let scale = match &scale_guard {
        Some((storage, layout)) => {
            Some(queue.read(slice::<f32>((cuda_storage(storage)?, layout))?).map_err(wrap)?)
        }
        None => None,
    };
    let extras = Extras {
        bias: bias.as_ref().map(CudaRead::view),
        row_scale: scale.as_ref().map(CudaRead::view),
        low_rank,
        overlap: false,
    };

    let (dense_guard, dense, nf4);
    let (format, weight) = match &frozen.weight {
        Weight::Dense(tensor) => {
            dense_guard = tensor.storage_and_layout();
            let elements = slice::<T>((cuda_storage(&dense_guard.0)?, dense_guard.1))?;
            dense = queue.read(elements).map_err(wrap)?;
            (WeightFormat::Dense, matmul::Weight::Dense(dense.view()))
        }
        Weight::Nf4(weight) => match &weight.0 {
            Place::Host(_) => return refuse("weight", "CUDA, as x", "the CPU"),
            Place::Cuda(device_nf4) => {
                nf4 = device_nf4.lend(queue)?;
                let format = WeightFormat::Nf4 { blocksize: device_nf4.blocksize };
                (format, matmul::Weight::Nf4(nf4.view(device_nf4)))
            }
        },
    };
    let shape_of_product = matmul::Shape { tokens, n, k, dtype: T::DTYPE, weight: format };
    let plan = matmul::plan(&shape_of_product, queue.properties()).map_err(wrap)?;
    let mut workspace = scratch::<u8>(device, plan.workspace_bytes)?;
    let mut workspace = queue.write(workspace.slice_mut(..)).map_err(wrap)?;
    let mut out = queue.write(y.slice_mut(..shape.elem_count())).map_err(wrap)?;
    plan.run(queue, x.view(), &weight, &extras, out.view_mut(), workspace.view_mut()).map_err(wrap)?;
    drop(out);
    Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), shape))
}

/// The queue on candle's stream of a device. Kernels are loaded once for each context.
fn queue(device: &CudaDevice) -> Result<CudaQueue> {
    static QUEUES: Mutex<Vec<CudaQueue>> = Mutex::new(Vec::new());
    let stream = device.cuda_stream();
    let mut queues = QUEUES.lock().expect("nothing panics while it is held");
    if let Some(queue) = queues.iter().find(|queue| queue.stream() == &stream) {
        return Ok(queue.clone());
    }
    let relative = queues.iter().find(|queue| queue.stream().context() == stream.context());
    let queue = match relative {
        Some(queue) => queue.on_stream(stream),
        None => CudaQueue::new(stream),
    };
    let queue = queue.map_err(wrap)?;
    queues.push(queue.clone());
    Ok(queue)
}

/// Memory that a kernel will write. Never empty: the driver gives no memory of no bytes.
fn scratch<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every element is written by a kernel before anything reads it.
    unsafe { device.alloc::<T>(len.max(1)) }
}

/// The elements of an operand that lies in rows.
fn slice<'a, T: CudaDType + DeviceRepr>(
    (storage, layout): (&'a CudaStorage, &candle_core::Layout),
) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => refuse("operand", "contiguous elements", format!("strides {:?}", layout.stride())),
    }
}

/// A tensor's storage on the GPU, while a guard is held.
pub fn cuda_storage<'a>(storage: &'a StorageRef<'_>) -> Result<&'a CudaStorage> {
    match &**storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => refuse("storage", "CUDA's, as x", "another device's"),
    }
}

/// The table of a layer's adapters, uploaded at the first forward pass and again when the factors are elsewhere.
#[derive(Clone, Default)]
pub struct TableCache(Arc<Mutex<Option<Arc<dyn Any + Send + Sync>>>>);

impl fmt::Debug for TableCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TableCache")
    }
}

struct Table<A: 'static> {
    entries: AdapterTable<'static, A>,
    /// Where lora_a and lora_b were.
    addresses: Vec<[u64; 2]>,
    /// What `entries` is a view of.
    _buffer: CudaSlice<u8>,
}

impl TableCache {
    fn get<A: Number>(
        &self,
        queue: &CudaQueue,
        device: &CudaDevice,
        branches: &[Branch<'_, CudaStorage>],
        n: usize,
        k: usize,
    ) -> Result<Arc<Table<A>>> {
        let mut guards = Vec::with_capacity(branches.len());
        for branch in branches {
            let read = |operand| queue.read(slice::<A>(operand)?).map_err(wrap);
            guards.push((read(branch.lora_a)?, read(branch.lora_b)?));
        }
        let addresses: Vec<_> =
            guards.iter().map(|(a, b)| [a.view().address(), b.view().address()]).collect();
        let mut cached = self.0.lock().expect("nothing panics while it is held");
        let known = cached.clone().and_then(|table| table.downcast::<Table<A>>().ok());
        if let Some(table) = known.filter(|table| table.addresses == addresses) {
            return Ok(table);
        }
        let memory = queue.properties().memory;
        let views = branches.iter().zip(&guards).map(|(branch, (a, b))| {
            let (a, b) = (a.view(), b.view());
            // SAFETY: the table is used in calls only that were given these very factors, which candle keeps until then.
            let [lora_a, lora_b] = [a, b].map(|v| unsafe { View::from_raw(v.address(), v.len(), memory) });
            let rank = branch.lora_a.1.dims()[0];
            AdapterView { lora_a, lora_b, rank, scaling: branch.scaling as f32 }
        });
        let views: Vec<_> = views.collect();
        let bytes = AdapterTable::<A>::bytes(views.len());
        let mut buffer = scratch::<u8>(device, bytes)?;
        let address = queue.write(buffer.slice_mut(..)).map_err(wrap)?.view().address();
        // SAFETY: the buffer lies in the table beside the view, and nobody else has it.
        let view = unsafe { ViewMut::from_raw(address, bytes, memory) };
        let entries = AdapterTable::upload(queue, &views, k, n, view).map_err(wrap)?;
        let table = Arc::new(Table { entries, addresses, _buffer: buffer });
        *cached = Some(Arc::clone(&table) as Arc<dyn Any + Send + Sync>);
        Ok(table)
    }
}

/// A 4-bit matrix in candle's memory.
#[derive(Debug)]
pub struct DeviceNf4 {
    shape: (usize, usize),
    blocksize: usize,
    codebook: Codebook,
    dtype: ElementType,
    packed: CudaSlice<u8>,
    absmax: DeviceAbsmax,
    device: CudaDevice,
}

#[derive(Debug)]
enum DeviceAbsmax {
    Plain(CudaSlice<f32>),
    Nested {
        q: CudaSlice<u8>,
        absmax: CudaSlice<f32>,
        map: CudaSlice<f32>,
        offset: CudaSlice<f32>,
        blocksize: usize,
    },
}

/// The matrix, lent to a call.
struct Nf4Lent<'a> {
    packed: CudaRead<'a, u8>,
    absmax: AbsmaxLent<'a>,
}

enum AbsmaxLent<'a> {
    Plain(CudaRead<'a, f32>),
    Nested {
        q: CudaRead<'a, u8>,
        absmax: CudaRead<'a, f32>,
        map: CudaRead<'a, f32>,
        offset: CudaRead<'a, f32>,
        blocksize: usize,
    },
}

impl DeviceNf4 {
    pub fn new(matrix: &Nf4Matrix, device: &CudaDevice) -> Result<Self> {
        let absmax = match matrix.absmax() {
            Absmax::Plain(absmax) => DeviceAbsmax::Plain(device.clone_htod(absmax)?),
            Absmax::Nested(nested) => DeviceAbsmax::Nested {
                q: device.clone_htod(nested.q())?,
                absmax: device.clone_htod(nested.absmax())?,
                map: device.clone_htod(nested.map())?,
                offset: device.clone_htod(&[nested.offset()])?,
                blocksize: nested.blocksize(),
            },
        };
        Ok(Self {
            shape: (matrix.shape()[0], matrix.shape()[1]),
            blocksize: matrix.blocksize(),
            codebook: matrix.codebook().clone(),
            dtype: matrix.dtype(),
            packed: device.clone_htod(matrix.packed())?,
            absmax,
            device: device.clone(),
        })
    }

    pub fn dims2(&self) -> (usize, usize) {
        self.shape
    }

    pub fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    pub fn to_matrix(&self) -> Result<Nf4Matrix> {
        let device = &self.device;
        let absmax = match &self.absmax {
            DeviceAbsmax::Plain(absmax) => Absmax::Plain(device.clone_dtoh(absmax)?),
            DeviceAbsmax::Nested { q, absmax, map, offset, blocksize } => {
                let map = device.clone_dtoh(map)?.into_boxed_slice().try_into().expect("256 values");
                let (q, absmax) = (device.clone_dtoh(q)?, device.clone_dtoh(absmax)?);
                let offset = device.clone_dtoh(offset)?[0];
                Absmax::Nested(NestedAbsmax::from_parts(q, absmax, map, offset, *blocksize).map_err(wrap)?)
            }
        };
        let (packed, codebook) = (device.clone_dtoh(&self.packed)?, self.codebook.clone());
        Nf4Matrix::from_parts(
            [self.shape.0, self.shape.1],
            packed,
            absmax,
            self.blocksize,
            codebook,
            self.dtype,
        )
        .map_err(wrap)
    }

    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        match dtype {
            DType::F32 => self.decode::<f32>(),
            DType::F16 => self.decode::<f16>(),
            DType::BF16 => self.decode::<bf16>(),
            other => refuse("dtype", "f32, f16 or bf16", other.as_str()),
        }
    }

    fn decode<T: Number>(&self) -> Result<Tensor> {
        let queue = &queue(&self.device)?;
        let numel = self.shape.0 * self.shape.1;
        let mut out = scratch::<T>(&self.device, numel)?;
        let shape = nf4_dequantize::Shape { numel, blocksize: self.blocksize, dtype: <T as Element>::DTYPE };
        let plan = nf4_dequantize::plan(&shape, queue.properties()).map_err(wrap)?;
        let lent = self.lend(queue)?;
        let mut guard = queue.write(out.slice_mut(..numel)).map_err(wrap)?;
        plan.run(queue, &lent.view(self), guard.view_mut()).map_err(wrap)?;
        drop(guard);
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, self.device.clone()));
        Ok(Tensor::from_storage(storage, self.shape, BackpropOp::none(), false))
    }

    fn lend<'a>(&'a self, queue: &'a CudaQueue) -> Result<Nf4Lent<'a>> {
        let read = |slice: &'a CudaSlice<f32>| queue.read(slice.slice(..)).map_err(wrap);
        let absmax = match &self.absmax {
            DeviceAbsmax::Plain(absmax) => AbsmaxLent::Plain(read(absmax)?),
            DeviceAbsmax::Nested { q, absmax, map, offset, blocksize } => AbsmaxLent::Nested {
                q: queue.read(q.slice(..)).map_err(wrap)?,
                absmax: read(absmax)?,
                map: read(map)?,
                offset: read(offset)?,
                blocksize: *blocksize,
            },
        };
        Ok(Nf4Lent { packed: queue.read(self.packed.slice(..)).map_err(wrap)?, absmax })
    }
}

impl Nf4Lent<'_> {
    fn view<'b>(&'b self, nf4: &'b DeviceNf4) -> Nf4View<'b> {
        let absmax = match &self.absmax {
            AbsmaxLent::Plain(absmax) => AbsmaxView::Plain(absmax.view()),
            AbsmaxLent::Nested { q, absmax, map, offset, blocksize } => AbsmaxView::Nested(NestedView {
                q: q.view(),
                absmax: absmax.view(),
                map: map.view(),
                offset: offset.view(),
                blocksize: *blocksize,
            }),
        };
        Nf4View { packed: self.packed.view(), absmax, blocksize: nf4.blocksize, codebook: &nf4.codebook }
    }
}
