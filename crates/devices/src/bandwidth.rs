//! What a device's memory can do: the limit that kernels are measured against.

use bytemuck::Pod;

use crate::{Buffer, Device};

pub(crate) const PTX: &str = include_str!("bandwidth.ptx");
pub(crate) const THREADS: u32 = 256;

/// Bytes that a block takes at a time.
const PIECE: usize = 32 << 10;

/// Bytes a second that simple kernels move: the median of several runs with the number of blocks that suits the device best.
#[derive(Debug, Clone, Copy)]
pub struct Bandwidth {
    /// Read and written by a copy, both counted.
    pub copy: f64,
    /// Read, and nothing done with it.
    pub read: f64,
}

impl Device {
    /// Measures how fast `from` is copied to `to`, of the same length, and read. They should be many times larger than the
    /// caches: gigabytes. What is left of a multiple of 32 KiB is not moved.
    pub fn bandwidth<T: Pod>(&self, from: &Buffer<T>, to: &mut Buffer<T>) -> Bandwidth {
        assert_eq!(from.len(), to.len(), "elements that are copied");
        let pieces = (from.len() * size_of::<T>() / PIECE) as u32;
        assert!(pieces > 0, "a buffer of {PIECE} bytes or more");
        let multiprocessors = self.queue().properties().sm_count;
        let measure = |entry: &str, bytes: usize| {
            let (from, to) = (from.view().address(), to.view().address());
            let with_blocks = |blocks: u32| {
                // SAFETY: both hold so many pieces, and are borrowed until `time` has waited.
                let run = || unsafe { self.backend().probe(entry, blocks, [from, to], pieces) };
                run();
                let mut times: Vec<_> = (0..5).map(|_| self.time(run).as_secs_f64()).collect();
                times.sort_by(f64::total_cmp);
                bytes as f64 * f64::from(pieces) / times[times.len() / 2]
            };
            [2 * multiprocessors, 4 * multiprocessors, pieces]
                .map(with_blocks)
                .into_iter()
                .fold(0.0, f64::max)
        };
        Bandwidth { copy: measure("bandwidth_copy", 2 * PIECE), read: measure("bandwidth_read", PIECE) }
    }
}
