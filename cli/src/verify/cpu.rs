//! The CPU reference as an [`Engine`].

use half::{bf16, f16};
use lora_kernels::adapter::Adapter;
use lora_kernels::cpu::{self, Accumulate, AdamWStep, ImportanceMut, MatmulExtras, MomentsMut, Update};
use lora_kernels::nf4::{self, Codebook, NestedAbsmax, Nf4Matrix};
use lora_kernels::train::{Gradient, Layer};
use lora_kernels::{DType, Element, Result, Tensor};

use super::engine::{Direction, Engine, Extras, Gradients, LowRank, Weight};
use super::layer::decoded;

/// The CPU reference, with f32 sums.
pub struct Cpu;

/// Runs `$body` with `$T` the element type that `$dtype` stands for.
macro_rules! typed {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::F16 => {
                type $T = f16;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
        }
    };
}

pub(super) use typed;

impl Engine for Cpu {
    fn name(&self) -> String {
        "the CPU reference".to_owned()
    }

    fn on_host(&self) -> bool {
        true
    }

    fn nf4_quantize(&self, x: &Tensor, blocksize: usize) -> Result<(Vec<u8>, Vec<f32>)> {
        let (mut packed, mut absmax) = codes(x.numel(), blocksize);
        let nf4 = Codebook::nf4();
        typed!(x.dtype(), T => nf4::quantize(elements::<T>(x), blocksize, &nf4, &mut packed, &mut absmax))?;
        Ok((packed, absmax))
    }

    fn absmax_quantize(&self, absmax: &[f32]) -> Result<NestedAbsmax> {
        Ok(nf4::nest(absmax))
    }

    fn nf4_dequantize(&self, weight: &Nf4Matrix, dtype: DType) -> Result<Tensor> {
        Ok(decoded(weight, dtype))
    }

    fn matmul(&self, x: &Tensor, weight: Weight<'_>, extras: Extras<'_>) -> Result<Tensor> {
        let adapters = extras.adapters.first().map_or(x.dtype(), |l| l.lora_a.dtype());
        typed!(x.dtype(), T => typed!(adapters, A => matmul::<T, A>(x, weight, extras)))
    }

    fn dora_scale(&self, weight: Weight<'_>, lora: &LowRank, magnitude: &[f32]) -> Result<Vec<f32>> {
        let mut row_scale = vec![0.0; magnitude.len()];
        let (dtype, lora_dtype) = (weight.dtype(), lora.lora_a.dtype());
        typed!(dtype, T => typed!(lora_dtype, A => {
            cpu::dora_scale(&weight.typed::<T>(), &lora.typed::<A>(), magnitude, &mut row_scale)
        }))?;
        Ok(row_scale)
    }

    fn merge(
        &self,
        direction: Direction,
        weight: &Tensor,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
        fan_in_fan_out: bool,
    ) -> Result<Tensor> {
        typed!(weight.dtype(), T => typed!(lora.lora_a.dtype(), A => {
            let adapters = [lora.typed::<A>()];
            let update = Update { adapters: &adapters, row_scale, fan_in_fan_out };
            merge::<T, A>(direction, weight, lora.shape(), &update)
        }))
    }

    fn nf4_merge(
        &self,
        direction: Direction,
        weight: &Nf4Matrix,
        lora: &LowRank,
        row_scale: Option<&[f32]>,
    ) -> Result<Nf4Matrix> {
        let (packed, absmax) = match direction {
            Direction::Merge => typed!(lora.lora_a.dtype(), A => {
                let adapters = [lora.typed::<A>()];
                let update = Update { adapters: &adapters, row_scale, fan_in_fan_out: false };
                let (mut packed, mut absmax) = codes(weight.numel(), weight.blocksize());
                cpu::nf4_merge(weight, &update, &mut packed, &mut absmax)?;
                (packed, absmax)
            }),
            Direction::Unmerge => {
                let values = decoded(weight, weight.dtype()).to_f32();
                let merged = Tensor::from_f32(weight.shape(), &values, DType::F32)?;
                let unmerged = self.merge(direction, &merged, lora, row_scale, false)?;
                self.nf4_quantize(&unmerged, weight.blocksize())?
            }
        };
        self.like(weight, packed, absmax)
    }

    fn gradients(&self, weight: Weight<'_>, adapter: &Adapter, x: &Tensor, dy: &Tensor) -> Result<Gradients> {
        typed!(x.dtype(), T => gradients::<T>(weight, adapter, x, dy))
    }

    fn adamw(
        &self,
        step: &AdamWStep,
        p: &[f32],
        gradient: &[f32],
        moments: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 3]> {
        let [mut p, mut m, mut v] = [p, moments[0], moments[1]].map(<[f32]>::to_vec);
        cpu::adamw(step, 1.0, &mut p, gradient, MomentsMut::F32 { m: &mut m, v: &mut v })?;
        Ok([p, m, v])
    }

    fn importance(
        &self,
        p: &[f32],
        gradient: &[f32],
        betas: [f64; 2],
        state: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 2]> {
        let [mut sensitivity, mut uncertainty] = state.map(<[f32]>::to_vec);
        let smoothed = ImportanceMut { sensitivity: &mut sensitivity, uncertainty: &mut uncertainty };
        cpu::importance(p, gradient, betas, smoothed)?;
        Ok([sensitivity, uncertainty])
    }
}

fn gradients<T: Element>(
    weight: Weight<'_>,
    adapter: &Adapter,
    x: &Tensor,
    dy: &Tensor,
) -> Result<Gradients> {
    let layer = match weight {
        Weight::Dense(weight) => Layer::new(weight, None)?,
        Weight::Nf4(weight) => Layer::new(weight, None)?,
    };
    let (m, mut dx) = (x.shape()[0], vec![T::from_f32(0.0); x.numel()]);
    let forward = layer.forward(adapter, elements::<T>(x), m, None)?;
    let mut gradient = Gradient::zeros(adapter);
    layer.backward(adapter, [elements(x), elements(dy)], &forward, &mut gradient, Some(&mut dx))?;
    let mut all = vec![("dX", dx.iter().map(|dx| dx.to_f64()).collect())];
    for (name, part) in
        [("dA", "lora_A"), ("dB", "lora_B"), ("dE", "lora_E"), ("dm", "lora_magnitude_vector")]
    {
        let values = gradient.get(part).map(|part| part.iter().map(|g| f64::from(*g)).collect());
        all.extend(values.map(|values| (name, values)));
    }
    Ok(Gradients(all))
}

/// Room for the codes and scales of `numel` elements. A wrong block size is left for the operation to refuse.
fn codes(numel: usize, blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    (vec![0; nf4::packed_len(numel)], vec![0.0; nf4::block_count(numel, blocksize.max(1))])
}

fn matmul<T: Element, A: Element>(x: &Tensor, weight: Weight<'_>, extras: Extras<'_>) -> Result<Tensor> {
    let (m, [n, _]) = (x.shape()[0], weight.shape());
    let adapters: Vec<_> = extras.adapters.iter().map(LowRank::typed::<A>).collect();
    let extras = MatmulExtras {
        bias: extras.bias.map(elements::<T>),
        row_scale: extras.row_scale,
        adapters: &adapters,
        adapter_index: extras.adapter_index,
        dropout: None,
    };
    let mut y = vec![T::from_f32(0.0); m * n];
    cpu::matmul(elements(x), m, &weight.typed::<T>(), &extras, Accumulate::F32, &mut y)?;
    Tensor::new([m, n], T::into_data(y))
}

fn merge<T: Element, A: Element>(
    direction: Direction,
    weight: &Tensor,
    shape: [usize; 2],
    update: &Update<'_, A>,
) -> Result<Tensor> {
    let mut out = vec![T::from_f32(0.0); weight.numel()];
    match direction {
        Direction::Merge => cpu::merge(elements::<T>(weight), shape, update, &mut out)?,
        Direction::Unmerge => cpu::unmerge(elements::<T>(weight), shape, update, &mut out)?,
    }
    Tensor::new(weight.shape(), T::into_data(out))
}

/// The elements, whose type the caller has looked up.
pub fn elements<T: Element>(tensor: &Tensor) -> &[T] {
    tensor.as_slice().expect("dispatched by dtype")
}

impl Weight<'_> {
    /// `[n, k]`.
    pub fn shape(&self) -> [usize; 2] {
        let shape = match self {
            Weight::Dense(tensor) => tensor.shape(),
            Weight::Nf4(matrix) => matrix.shape(),
        };
        [shape[0], shape[1]]
    }

    /// The type of a dense weight, or of a 4-bit one before it was quantised.
    fn dtype(&self) -> DType {
        match self {
            Weight::Dense(tensor) => tensor.dtype(),
            Weight::Nf4(matrix) => matrix.dtype(),
        }
    }

    fn typed<T: Element>(&self) -> cpu::Weight<'_, T> {
        let [n, k] = self.shape();
        match self {
            Weight::Dense(tensor) => cpu::Weight::Dense { data: elements(tensor), n, k },
            Weight::Nf4(matrix) => cpu::Weight::Nf4(matrix),
        }
    }
}

impl LowRank {
    /// `[n, k]` of the weight that it is for.
    pub fn shape(&self) -> [usize; 2] {
        [self.lora_b.shape()[0], self.lora_a.shape()[1]]
    }

    fn typed<A: Element>(&self) -> cpu::LowRank<'_, A> {
        cpu::LowRank {
            lora_a: elements(&self.lora_a),
            lora_b: elements(&self.lora_b),
            rank: self.lora_a.shape()[0],
            scaling: self.scaling as f32,
        }
    }
}
