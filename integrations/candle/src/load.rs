//! bitsandbytes' tensors, by way of a `VarBuilder`.

use std::collections::HashMap;

use candle_core::{DType, Device, Error, Result, Tensor};
use candle_nn::VarBuilder;
use lora_kernels::formats::bitsandbytes::Reader;
use lora_kernels::nf4::Nf4Matrix;

use crate::adapters::Adapters;
use crate::weight::{Nf4Weight, Weight, from_host};
use crate::{refuse, wrap};

const QUANT_TYPES: [&str; 2] = ["nf4", "fp4"];

/// Weight and bias of the linear layer at `vb`, checked to be `[out, in]` and `[out]`, on its device and in its type. What an
/// adapter's folder has in their place is taken from there.
pub fn linear(
    in_dim: usize,
    out_dim: usize,
    vb: &VarBuilder,
    adapters: &[&Adapters],
) -> Result<(Weight, Option<Tensor>)> {
    let replaced = |name: &str| -> Result<Option<Tensor>> {
        let tensors = adapters
            .iter()
            .map(|adapters| adapters.take_base_tensor(vb, name))
            .collect::<Result<Vec<_>>>()?;
        match (tensors.into_iter().flatten().next(), adapters.len()) {
            (None, _) => Ok(None),
            (Some(tensor), 1) => Ok(Some(from_host(tensor, vb.device())?.to_dtype(vb.dtype())?)),
            _ => refuse(
                &format!("{}.{name}", vb.prefix()),
                "the base model's own tensor under several adapters",
                "one of an adapter's",
            ),
        }
    };
    let weight = match (replaced("weight")?, nf4(vb)?) {
        (Some(tensor), _) => Weight::Dense(tensor),
        (None, Some(matrix)) => Weight::Nf4(Nf4Weight::new(matrix, vb.device())?),
        (None, None) => Weight::Dense(vb.get((out_dim, in_dim), "weight")?),
    };
    if weight.dims2()? != (out_dim, in_dim) {
        let name = format!("{}.weight", vb.prefix());
        return refuse(&name, format!("shape [{out_dim}, {in_dim}]"), format!("{:?}", weight.dims2()?));
    }
    let bias = match replaced("bias")? {
        None if vb.contains_tensor("bias") => Some(vb.get(out_dim, "bias")?),
        other => other,
    };
    Ok((weight, bias))
}

/// The 4-bit weight at `vb`, where there is one.
///
/// Its tensors are put together as a file and read by the library's reader, which checks all that there is to check.
fn nf4(vb: &VarBuilder) -> Result<Option<Nf4Matrix>> {
    let quant_state = |quant_type: &&str| {
        let name = format!("weight.quant_state.bitsandbytes__{quant_type}");
        vb.contains_tensor(&name).then_some(name)
    };
    let Some(quant_state) = QUANT_TYPES.iter().find_map(quant_state) else { return Ok(None) };
    let vb = vb.clone().set_device(Device::Cpu);
    let nested = vb.contains_tensor("weight.nested_absmax");
    let absmax = if nested { DType::U8 } else { DType::F32 };
    let mut names = vec![
        ("weight", DType::U8),
        ("weight.absmax", absmax),
        ("weight.quant_map", DType::F32),
        (quant_state.as_str(), DType::U8),
    ];
    if nested {
        names.extend([("weight.nested_absmax", DType::F32), ("weight.nested_quant_map", DType::F32)]);
    }
    let mut tensors = HashMap::new();
    for (name, dtype) in names {
        tensors.insert(name.to_owned(), vb.get_unchecked_dtype(name, dtype)?);
    }
    let file = safetensors::serialize(&tensors, None).map_err(Error::wrap)?;
    let read = |file: &[u8]| Reader::parse(&vb.prefix(), file)?.nf4("weight");
    read(&file).map(Some).map_err(|error| {
        // A VarBuilder converts other storage types (bnb_4bit_quant_storage) where their bytes should be taken as they are.
        wrap(error).context(
            "a 4-bit weight in a VarBuilder has to be stored as uint8; Weight::read reads all storage types",
        )
    })
}

impl Weight {
    /// Reads a weight from an open checkpoint (a folder as transformers writes it, with one file or shards): 4-bit blocks in any
    /// of bitsandbytes' storage types, or a dense tensor, which is brought to `dtype`.
    ///
    /// # Errors
    /// When there is no such tensor, or it is not a matrix.
    pub fn read(reader: &Reader<'_>, name: &str, dtype: DType, device: &Device) -> Result<Self> {
        use lora_kernels::formats::bitsandbytes::Parameter;
        match reader.parameters().get(name) {
            Some(Parameter::Nf4 { .. }) => {
                Ok(Nf4Weight::new(reader.nf4(name).map_err(wrap)?, device)?.into())
            }
            _ => {
                let tensor = from_host(&reader.dense(name).map_err(wrap)?, device)?.to_dtype(dtype)?;
                tensor.dims2()?;
                Ok(tensor.into())
            }
        }
    }
}
