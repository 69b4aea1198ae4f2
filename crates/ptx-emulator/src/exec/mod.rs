//! Runs programs: warps of a cluster in turns on one thread, clusters beside each other.

pub(crate) mod access;
mod barrier;
mod bulk;
mod clocks;
mod cluster;
mod copies;
mod machine;
mod mbarrier;
mod memory_ops;
mod shared;
pub(crate) mod stats;
mod track;
mod warp;
mod warp_ops;
mod wgmma;

pub(crate) use machine::{GlobalRace, Job, Machine, Place};
