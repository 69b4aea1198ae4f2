//! A warp: registers, and the paths that its lanes are on.
//!
//! Lanes that run together form a split. A branch that sends them apart makes one split for each side and a frame that
//! remembers where they meet again (the immediate post-dominator); splits that arrive there are put together.

use crate::ops::lanes::{Regs, Row, WARP};
use crate::program::{Kernel, NEVER};

/// Why a split does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    Ready,
    /// For other lanes of its warp, at its pc.
    Lanes,
    /// At a block barrier.
    Barrier(u32),
    /// For the end of a phase of the cluster's barrier; to take what the others published, if true.
    Cluster(u32, bool),
    /// For the end of a phase of an mbarrier, in the shared memory of a block of the cluster.
    Mbarrier {
        block: usize,
        at: usize,
        phase: u32,
    },
    /// For so many registers per thread.
    Registers(u32),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Split {
    pub pc: u32,
    pub mask: u32,
    pub frame: usize,
    pub wait: Wait,
}

/// A place where splits meet. Frame 0 is the whole warp and meets nowhere.
#[derive(Clone, Copy, Debug)]
struct Frame {
    pc: u32,
    arrived: u32,
    /// Lanes that have to arrive; 0 for a free slot.
    expected: u32,
    parent: usize,
}

/// A `cp.async` that was not waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    pub lane: u8,
    pub bytes: u8,
    /// Bytes that are read; the rest becomes zero.
    pub read: u8,
    pub group: u32,
    pub dst: u32,
    pub src: u64,
    /// The source when the copy was issued.
    pub snapshot: [u8; 16],
}

#[derive(Default)]
pub(crate) struct Warp {
    pub regs: Regs,
    /// Lanes in which a register was written, for those that are tracked: predicates, 32-bit rows, 64-bit rows.
    pub init: Vec<u32>,
    pub splits: Vec<Split>,
    frames: Vec<Frame>,
    /// Lanes that exist and have not exited.
    pub live: u32,
    /// Block in the cluster.
    pub block: usize,
    /// Warp in the block.
    pub index: usize,
    /// Warp in the cluster.
    pub id: usize,
    pub local: Vec<u8>,
    pub local_init: Vec<u8>,
    pub copies: Vec<Copy>,
    /// Groups that each lane has committed.
    pub groups: [u32; WARP],
    /// Instructions executed, for the limit and the clock.
    pub steps: u64,
    /// The last wait for an mbarrier that was told to try again: block, address, phase.
    pub denied: Option<(usize, usize, u32)>,
    /// Lanes that arrived at the cluster's barrier in this phase, and those that have not waited since they did.
    pub cluster_arrived: u32,
    pub cluster_owed: u32,
    /// Has waited at the cluster's barrier: all its blocks have started.
    pub met_cluster: bool,
    /// Groups of bulk copies that each lane has committed.
    pub bulk_groups: [u32; WARP],
    /// Registers per thread that `setmaxnreg` has left it.
    pub registers: u32,
    /// Products of `wgmma` that were not waited for.
    pub products: Vec<Product>,
    /// Group that the next product belongs to, and products so far.
    pub product_group: u32,
    pub product_count: usize,
    /// By 32-bit row: products that use it and were not waited for.
    pub busy: Vec<u16>,
    /// By 32-bit row: accessed since the last `wgmma.fence`.
    pub dirty: Vec<bool>,
}

/// A `wgmma.mma_async` under way.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    pub group: u32,
    /// Rows of accumulators and of the left operand.
    pub rows: Vec<Row>,
    /// Accumulators come first; so many there are.
    pub accumulators: usize,
    /// Addresses of the 16-byte units that it reads.
    pub units: Vec<usize>,
}

impl Warp {
    /// Prepares for a block: `lanes` threads exist.
    pub(crate) fn restart(&mut self, kernel: &Kernel, lanes: u32) {
        self.live = lanes;
        self.splits.clear();
        self.splits.push(Split { pc: 0, mask: lanes, frame: 0, wait: Wait::Ready });
        self.frames.clear();
        self.frames.push(Frame { pc: NEVER, arrived: 0, expected: lanes, parent: 0 });
        self.copies.clear();
        self.groups = [0; WARP];
        self.steps = 0;
        self.denied = None;
        (self.cluster_arrived, self.cluster_owed) = (0, 0);
        self.met_cluster = false;
        self.bulk_groups = [0; WARP];
        self.products.clear();
        (self.product_group, self.product_count) = (0, 0);
        if kernel.asynchronous {
            self.busy.clear();
            self.busy.resize(kernel.rows32, 0);
            self.dirty.clear();
            self.dirty.resize(kernel.rows32, true);
        }
        self.local.resize(kernel.local_bytes * WARP, 0);
        self.local_init.clear();
        self.local_init.resize(kernel.local_bytes * WARP, 0);
    }

    pub(crate) fn done(&self) -> bool {
        self.splits.is_empty()
    }

    /// Sends the lanes of `taken` to `target` and the others of the split to `next`; they meet at `meet`.
    pub(crate) fn diverge(&mut self, at: usize, taken: u32, target: u32, next: u32, meet: u32) {
        let split = self.splits[at];
        let mut frame = split.frame;
        if meet != NEVER && self.frames[frame].pc != meet {
            let new = Frame { pc: meet, arrived: 0, expected: split.mask, parent: frame };
            frame = match self.frames.iter().position(|f| f.expected == 0) {
                Some(free) => {
                    self.frames[free] = new;
                    free
                }
                None => {
                    self.frames.push(new);
                    self.frames.len() - 1
                }
            };
        }
        self.splits[at] = Split { pc: next, mask: split.mask & !taken, frame, wait: Wait::Ready };
        self.splits.push(Split { pc: target, mask: taken, frame, wait: Wait::Ready });
    }

    /// Whether the split has come to where its frame meets.
    #[inline(always)]
    pub(crate) fn meets(&self, at: usize, pc: u32) -> bool {
        self.frames[self.splits[at].frame].pc == pc
    }

    /// The split has come to its meeting point: it waits there, or goes on with all the others.
    pub(crate) fn arrive(&mut self, at: usize) {
        let split = self.splits.swap_remove(at);
        self.frames[split.frame].arrived |= split.mask;
        self.close(split.frame);
    }

    /// Merges a frame whose lanes have all arrived (or exited).
    fn close(&mut self, mut frame: usize) {
        while frame != 0 {
            let f = self.frames[frame];
            if f.arrived != f.expected {
                return;
            }
            self.frames[frame].expected = 0;
            self.frames[frame].pc = NEVER;
            if f.arrived == 0 {
                frame = f.parent;
                continue;
            }
            if self.frames[f.parent].pc == f.pc {
                self.frames[f.parent].arrived |= f.arrived;
                frame = f.parent;
                continue;
            }
            self.splits.push(Split { pc: f.pc, mask: f.arrived, frame: f.parent, wait: Wait::Ready });
            return;
        }
    }

    /// Lanes of a split exit; true if it has none left (and is gone).
    pub(crate) fn exit(&mut self, at: usize, lanes: u32) -> bool {
        self.live &= !lanes;
        let split = &mut self.splits[at];
        split.mask &= !lanes;
        let (empty, start) = (split.mask == 0, split.frame);
        if empty {
            self.splits.swap_remove(at);
        }
        let mut frame = start;
        loop {
            self.frames[frame].expected &= !lanes;
            if frame == 0 {
                break;
            }
            frame = self.frames[frame].parent;
        }
        // A frame that only waited for these lanes is complete now; empty ones hand on to their parents.
        let mut frame = start;
        while frame != 0 {
            let f = self.frames[frame];
            if f.expected == 0 {
                self.frames[frame].pc = NEVER;
                frame = f.parent;
                continue;
            }
            self.close(frame);
            break;
        }
        empty
    }
}
