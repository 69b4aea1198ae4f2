//! Training goes on: the pieces that a fine-tuning engine puts together around a frozen weight.
//!
//! | piece | |
//! |---|---|
//! | [`Layer`] | forward and backward of one adapted layer on the CPU, of every kind of adapter |
//! | [`Gradient`] | the gradients of an adapter's parameters, which may add up over batches |
//! | [`Optimizer`] | AdamW over a list of tensors: moments in f32 or 8 bits, clipping, gradients that are not finite |
//! | [`RankAllocator`] | AdaLoRA's importance, budget, masks and final pruning |
//! | [`TrainingState`] | all that a run needs to go on, on disk beside the PEFT adapter |
//! | [`orthogonality`] | AdaLoRA's penalty for a whole model |
//!
//! The losses, the schedule of the learning rate and the order of the layers are the caller's. On a GPU the same steps are the
//! kernels of the same names as in [`crate::cpu`]; the optimiser's and the allocator's states are the same on disk.
//!
//! One step of a layer, with an adapter from PEFT over a weight in 4 bits:
//!
//! ```
//! use std::collections::BTreeMap;
//! use lora_kernels::cpu::AdamW;
//! use lora_kernels::formats::{bitsandbytes, peft};
//! use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
//! use lora_kernels::train::{Gradient, Layer, MomentType, NotFinite, Optimizer, parameters};
//!
//! # fn main() -> lora_kernels::Result<()> {
//! # let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/peft/llama");
//! let model = bitsandbytes::Reader::open(format!("{data}/base"))?;
//! let mut file = peft::load(format!("{data}/lora_r8a16"))?;
//! let module = "model.layers.0.self_attn.q_proj";
//! let dense = model.dense(&format!("{module}.weight"))?;
//! let weight = Nf4Matrix::quantize_tensor(&dense, 64, &Codebook::nf4(), Nesting::Nested)?;
//! file.adapters.retain(|name, _| name == module);
//!
//! let layer = Layer::new(&weight, None)?;
//! let (x, target) = (vec![0.5f32; 2 * 64], vec![0.1f32; 2 * 64]);
//! let mut optimizer = Optimizer::new(AdamW::default(), MomentType::F32);
//! let mut losses = Vec::new();
//! for _ in 0..5 {
//!     let adapter = &file.adapters[module];
//!     let forward = layer.forward(adapter, &x, 2, None)?;
//!     let dy: Vec<f32> = forward.y.iter().zip(&target).map(|(y, t)| y - t).collect();
//!     losses.push(dy.iter().map(|d| d * d).sum::<f32>());
//!     let mut gradient = Gradient::zeros(adapter);
//!     layer.backward(adapter, [&x, &dy], &forward, &mut gradient, None)?;
//!     let gradients = BTreeMap::from([(module.to_owned(), gradient)]);
//!     let list = parameters(&mut file.adapters, &gradients)?;
//!     optimizer.step(list, 1e-2, Some(1.0), NotFinite::Refuse)?;
//! }
//! assert!(losses[4] < losses[0]);
//! # Ok(())
//! # }
//! ```

mod allocator;
mod gradient;
mod layer;
mod optimizer;
mod state;

pub use allocator::{RankAllocator, RankSchedule, allocate};
pub use gradient::{Gradient, orthogonality, parameters};
pub use layer::{Forward, Layer};
pub use optimizer::{MomentType, NotFinite, Optimizer, Parameter, StepReport};
pub use state::{STATE, TrainingState};
