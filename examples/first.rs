//! The shortest way to a result: a weight in 4 bits, an adapter, a token.

use lora_kernels::adapter::{Adapter, Lora, Scaling, Stack};
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::{DType, Result, Tensor};

fn main() -> Result<()> {
    let values: Vec<f32> = (0..64 * 32).map(|i| (i as f32).sin()).collect();
    let weight = Nf4Matrix::quantize(&values, [32, 64], 64, &Codebook::nf4(), Nesting::Plain)?;
    let lora_a = Tensor::from_f32([4, 64], &values[..256], DType::F32)?;
    let lora_b = Tensor::from_f32([32, 4], &values[..128], DType::F32)?;
    let adapter = Adapter::from(Lora::new(lora_a, lora_b, Scaling::Lora.factor(8.0, 4))?);
    let x = Tensor::from_f32([1, 64], &values[..64], DType::F32)?;
    let y = Stack::new(&[&adapter], &weight)?.forward(&x, &weight, None)?;
    println!("{:?} ... of {} outputs; kernels: {}", y[0], y.len(), lora_kernels::cuda::origin());
    Ok(())
}
