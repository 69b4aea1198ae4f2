//! Whole models, from folder to folder: what the commands that rewrite one have in common.
//!
//! A [`Source`] is the folder that is read, an [`Output`] the one that appears when everything has been written, and a [`Change`]
//! says what becomes of each parameter. [`rewrite`](fn@rewrite) takes a weight in slabs of rows, so that neither a model nor a weight need fit
//! in memory.

mod adapter_config;
mod adapters;
mod output;
mod progress;
mod rewrite;
mod source;
mod undo;

pub use adapter_config::{adapter_config, set_ranks};
pub use adapters::{Adapters, cast};
pub use output::Output;
pub use progress::{Summary, number};
pub use rewrite::{Change, Fate, Rows, Slab, rewrite};
pub use source::Source;
pub use undo::{Restore, record};
