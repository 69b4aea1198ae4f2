//! Files, both ways: bitsandbytes 4-bit checkpoints ([`bitsandbytes`]) and PEFT adapters ([`peft`]), over [`safetensors`].
//!
//! Readers trust nothing: what contradicts the format or itself is an [`Error::Format`](crate::Error::Format) that names
//! file, tensor and key, and what would change the result but is not supported is an
//! [`Error::Unsupported`](crate::Error::Unsupported). No tensor is skipped.

pub mod bitsandbytes;
mod json;
pub mod peft;
pub mod safetensors;
