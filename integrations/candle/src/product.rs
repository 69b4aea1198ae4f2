//! The product that all layers are: what it has, and candle's operations for it.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Storage, StorageRef, Tensor,
};

use crate::weight::Weight;
use crate::{cpu, refuse, weight};

/// What a layer has without its adapters. None of it is trained.
#[derive(Debug, Clone)]
pub struct Frozen {
    pub weight: Weight,
    /// `[out]`, of the activations' type.
    pub bias: Option<Tensor>,
    /// `[out]`, f32: DoRA's `magnitude / norm`.
    pub row_scale: Option<Tensor>,
}

/// `delta = scaling * lora_b @ lora_a`.
#[derive(Debug, Clone)]
pub struct Factors {
    /// `[rank, in]`.
    pub lora_a: Tensor,
    /// `[out, rank]`.
    pub lora_b: Tensor,
    pub scaling: f64,
}

/// The operand that an operation is given as storage and layout.
pub type Operand<'a, S> = (&'a S, &'a Layout);

/// The factors of one adapter, as an operation is given them.
pub struct Branch<'a, S> {
    pub lora_a: Operand<'a, S>,
    pub lora_b: Operand<'a, S>,
    pub scaling: f64,
}

impl Factors {
    /// Checks them for a layer, and brings them into rows.
    pub fn new(lora_a: &Tensor, lora_b: &Tensor, scaling: f64, frozen: &Frozen) -> Result<Self> {
        let (n, k) = frozen.weight.dims2()?;
        let rank = match *lora_a.dims() {
            [rank, columns] if columns == k => rank,
            _ => return refuse("lora_a", format!("shape [rank, {k}]"), format!("{:?}", lora_a.dims())),
        };
        if lora_b.dims() != [n, rank] {
            return refuse("lora_b", format!("shape [{n}, {rank}]"), format!("{:?}", lora_b.dims()));
        }
        if lora_b.dtype() != lora_a.dtype() {
            return refuse(
                "lora_b",
                format!("{}, as lora_a", lora_a.dtype().as_str()),
                lora_b.dtype().as_str(),
            );
        }
        weight::element("lora_a", lora_a.dtype())?;
        if !scaling.is_finite() {
            return refuse("scaling", "a finite number", scaling);
        }
        let factors = Self { lora_a: lora_a.contiguous()?, lora_b: lora_b.contiguous()?, scaling };
        factors.check_device(frozen)?;
        Ok(factors)
    }

    fn check_device(&self, frozen: &Frozen) -> Result<()> {
        let (wanted, got) = (frozen.weight.device(), self.lora_a.device());
        match wanted.same_device(got) && wanted.same_device(self.lora_b.device()) {
            true => Ok(()),
            false => refuse("lora_a, lora_b", format!("{wanted:?}, as the weight"), format!("{got:?}")),
        }
    }
}

impl Frozen {
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let (n, _) = weight.dims2()?;
        if let Some(bias) = &bias {
            if bias.dims() != [n] {
                return refuse("bias", format!("shape [{n}]"), format!("{:?}", bias.dims()));
            }
        }
        let weight = match weight {
            Weight::Dense(tensor) => {
                weight::element("weight", tensor.dtype())?;
                Weight::Dense(tensor.contiguous()?)
            }
            nf4 => nf4,
        };
        Ok(Self { weight, bias: bias.map(|bias| bias.contiguous()).transpose()?, row_scale: None })
    }

    /// Checks activations `[.., in]` of a type that goes with weight and bias, and brings them into rows.
    pub fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let (_, k) = self.weight.dims2()?;
        if x.dims().last() != Some(&k) {
            return refuse("x", format!("shape [.., {k}]"), format!("{:?}", x.dims()));
        }
        weight::element("x", x.dtype())?;
        let dtypes = match &self.weight {
            Weight::Dense(tensor) => [Some(tensor.dtype()), self.bias.as_ref().map(Tensor::dtype)],
            Weight::Nf4(_) => [None, self.bias.as_ref().map(Tensor::dtype)],
        };
        if let Some(dtype) = dtypes.into_iter().flatten().find(|&dtype| dtype != x.dtype()) {
            return refuse("x", format!("{}, as weight and bias", dtype.as_str()), x.dtype().as_str());
        }
        let device = self.weight.device();
        if !device.same_device(x.device()) {
            return refuse("x", format!("{device:?}, as the weight"), format!("{:?}", x.device()));
        }
        x.contiguous()
    }

    /// The shape of the outputs of activations `[.., in]`.
    pub fn output_shape(&self, x: &Layout) -> Result<Shape> {
        let mut dims = x.dims().to_vec();
        *dims.last_mut().expect("checked when it came in") = self.weight.dims2()?.0;
        Ok(dims.into())
    }

    /// `dX` of the frozen part, and `m ⊙ dY`, both f32 and flat: `[tokens, in]` and `[tokens, out]`.
    fn backward(&self, grad: &Tensor, dtype: DType) -> Result<(Tensor, Tensor)> {
        let (n, _) = self.weight.dims2()?;
        let grad = grad.to_dtype(DType::F32)?.reshape(((), n))?;
        let grad = match &self.row_scale {
            Some(scale) => grad.broadcast_mul(scale)?,
            None => grad,
        };
        Ok((self.weight.times_transposed(&grad, dtype)?, grad))
    }
}

/// A tensor's storage on one of the backends, while a guard is held.
pub fn cpu_storage<'a>(storage: &'a StorageRef<'_>) -> Result<&'a CpuStorage> {
    match &**storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => refuse("storage", "the CPU's, as x", "another device's"),
    }
}

/// The factors of several adapters, while their storages are lent.
struct Lent<'a>(Vec<LentFactors<'a>>);

struct LentFactors<'a> {
    lora_a: (StorageRef<'a>, &'a Layout),
    lora_b: (StorageRef<'a>, &'a Layout),
    scaling: f64,
}

impl<'a> Lent<'a> {
    fn new(adapters: &'a [Factors]) -> Self {
        let lend = |f: &'a Factors| LentFactors {
            lora_a: f.lora_a.storage_and_layout(),
            lora_b: f.lora_b.storage_and_layout(),
            scaling: f.scaling,
        };
        Self(adapters.iter().map(lend).collect())
    }

    /// On the backend that `storage` finds.
    fn branches<'b, S>(
        &'b self,
        storage: impl Fn(&'b StorageRef<'a>) -> Result<&'b S>,
    ) -> Result<Vec<Branch<'b, S>>> {
        let branch = |LentFactors { lora_a, lora_b, scaling }: &'b LentFactors<'a>| {
            let (a, b) = (storage(&lora_a.0)?, storage(&lora_b.0)?);
            Ok(Branch { lora_a: (a, lora_a.1), lora_b: (b, lora_b.1), scaling: *scaling })
        };
        self.0.iter().map(branch).collect()
    }
}

/// The layer without adapters.
pub struct NoAdapter(pub Arc<Frozen>);

impl CustomOp1 for NoAdapter {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        cpu::forward(&self.0, (x, layout), &[], None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        crate::cuda::forward(&self.0, (x, layout), &[], None, &Default::default())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (dx, _) = self.0.backward(grad, x.dtype())?;
        Ok(Some(dx.reshape(x.shape())?.to_dtype(x.dtype())?))
    }
}

/// The layer with one adapter for all tokens; x, lora_a and lora_b are its arguments.
pub struct OneAdapter {
    pub frozen: Arc<Frozen>,
    pub scaling: f64,
    #[cfg(feature = "cuda")]
    pub table: crate::cuda::TableCache,
}

impl CustomOp3 for OneAdapter {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let branch = Branch { lora_a: (a, a_layout), lora_b: (b, b_layout), scaling: self.scaling };
        cpu::forward(&self.frozen, (x, x_layout), &[branch], None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let branch = Branch { lora_a: (a, a_layout), lora_b: (b, b_layout), scaling: self.scaling };
        crate::cuda::forward(&self.frozen, (x, x_layout), &[branch], None, &self.table)
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, grad) = self.frozen.backward(grad, x.dtype())?;
        let [a32, b32] = [a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?];
        let x32 = x.to_dtype(DType::F32)?.reshape(((), a.dim(1)?))?;
        // s dY B: what reaches A; and s x Aᵀ, what B was multiplied by.
        let shrunk_grad = (grad.matmul(&b32)? * self.scaling)?;
        let shrunk = (x32.matmul(&a32.t()?)? * self.scaling)?;
        let dx = (dx + shrunk_grad.matmul(&a32)?)?;
        let da = shrunk_grad.t()?.matmul(&x32)?;
        let db = grad.t()?.matmul(&shrunk)?;
        let to = |grad: Tensor, like: &Tensor| grad.reshape(like.shape())?.to_dtype(like.dtype()).map(Some);
        Ok((to(dx, x)?, to(da, a)?, to(db, b)?))
    }
}

/// The layer with an adapter per token, or none (-1).
pub struct AdapterPerToken {
    pub frozen: Arc<Frozen>,
    pub adapters: Arc<[Factors]>,
    /// `[tokens]`, i32.
    pub index: Tensor,
    #[cfg(feature = "cuda")]
    pub table: crate::cuda::TableCache,
}

impl CustomOp1 for AdapterPerToken {
    fn name(&self) -> &'static str {
        "multi-lora-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let lent = Lent::new(&self.adapters);
        let branches = lent.branches(cpu_storage)?;
        let (index, index_layout) = self.index.storage_and_layout();
        cpu::forward(&self.frozen, (x, layout), &branches, Some((cpu_storage(&index)?, index_layout)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        use crate::cuda::cuda_storage;
        let lent = Lent::new(&self.adapters);
        let branches = lent.branches(cuda_storage)?;
        let (index, index_layout) = self.index.storage_and_layout();
        let index = Some((cuda_storage(&index)?, index_layout));
        crate::cuda::forward(&self.frozen, (x, layout), &branches, index, &self.table)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (mut dx, grad) = self.frozen.backward(grad, x.dtype())?;
        for (number, Factors { lora_a, lora_b, scaling }) in self.adapters.iter().enumerate() {
            let theirs = self.index.eq(number as i32)?.to_dtype(DType::F32)?.unsqueeze(1)?;
            let shrunk = grad.matmul(&lora_b.to_dtype(DType::F32)?)?.broadcast_mul(&theirs)?;
            dx = (dx + (shrunk * *scaling)?.matmul(&lora_a.to_dtype(DType::F32)?)?)?;
        }
        Ok(Some(dx.reshape(x.shape())?.to_dtype(x.dtype())?))
    }
}
