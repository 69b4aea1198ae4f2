//! A kernel in the form that runs: instructions with register rows, and a cold table of what they were.

use crate::counters::Class;
use crate::ops::lanes::{AluFn, Args, Row};
use crate::ops::{atomic::AtomicOp, matrix::Mma, wgmma::Wgmma};
use crate::parse::ast::{Loc, Space};

/// Rows of the predicate file with a fixed meaning.
pub(crate) const ALWAYS: Row = 0;
pub(crate) const CARRY: Row = 1;

/// Which register file a row is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum File {
    Pred,
    R32,
    R64,
}

/// A register: file, row, and how wide it was declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Reg {
    pub file: File,
    pub row: Row,
    pub bits: u8,
}

/// An address operand: a row of 32 or 64 bits, and a constant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub row: Row,
    pub wide: bool,
    pub offset: i64,
}

/// A load or store of 1, 2, 4 or 8 elements per lane.
#[derive(Clone, Debug)]
pub(crate) struct MemOp {
    pub space: Space,
    pub address: Address,
    /// Bytes of one element.
    pub elem: u8,
    /// One per element; None for `_`.
    pub regs: Vec<Option<Reg>>,
    pub signed: bool,
    /// Bytes of the load that are used (a pragma of nvcc); the others may be uninitialised.
    pub used: u64,
    /// `.volatile`, `.relaxed`, `.acquire`, `.release`: other threads may touch the same memory by intent.
    pub strong: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct AtomOp {
    pub space: Space,
    pub address: Address,
    pub op: AtomicOp,
    /// Bytes: 2, 4 or 8.
    pub size: u8,
    /// None for `red`.
    pub dst: Option<Reg>,
    pub a: Reg,
    /// The new value of `cas`.
    pub b: Option<Reg>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShflMode {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Clone, Debug)]
pub(crate) struct Shfl {
    pub mode: ShflMode,
    pub d: Row,
    pub p: Option<Row>,
    pub a: Row,
    pub b: Row,
    pub c: Row,
    pub members: Row,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduce {
    Add,
    MinS,
    MaxS,
    MinU,
    MaxU,
    And,
    Or,
    Xor,
}

/// `bar` and `barrier.cta`: what the warp does at the barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarMode {
    Sync,
    Arrive,
    Popc,
    And,
    Or,
}

#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub mode: BarMode,
    pub aligned: bool,
    pub id: Row,
    /// Threads; None for the whole block.
    pub count: Option<Row>,
    /// Predicate of `bar.red`, and whether it is negated.
    pub a: Option<(Row, bool)>,
    pub d: Option<Reg>,
}

#[derive(Clone, Debug)]
pub(crate) struct CpAsync {
    pub dst: Address,
    pub src: Address,
    pub bytes: u8,
    /// Bytes to read; the rest is zero.
    pub src_bytes: Option<Row>,
    /// `ignore-src`
    pub ignore: Option<Row>,
}

/// `barrier.cluster`: what the threads do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClusterMode {
    /// Publishes what the thread did before, if true.
    Arrive(bool),
    /// Takes what the others published, if true.
    Wait(bool),
}

/// What a fence orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fence {
    /// `fence.acq_rel`, `fence.sc`, `membar`
    Memory,
    /// `fence.proxy.async`: what was written by ordinary stores, for asynchronous work.
    Async,
    /// `fence.mbarrier_init`
    BarrierInit,
    /// Orders nothing that is modelled.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MbarrierMode {
    Init,
    Inval,
    /// Arrivals, then bytes to expect.
    Arrive {
        expect: bool,
        drop: bool,
        /// May not complete the phase.
        no_complete: bool,
    },
    ExpectTx,
    CompleteTx,
    /// `test_wait`, or `try_wait` if true.
    Wait {
        suspends: bool,
        parity: bool,
    },
    /// `cp.async.mbarrier.arrive`; true for `.noinc`.
    CopiesArrive(bool),
}

#[derive(Clone, Debug)]
pub(crate) struct MbarrierOp {
    pub mode: MbarrierMode,
    pub space: Space,
    pub address: Address,
    /// State or predicate.
    pub d: Option<Reg>,
    /// Count, bytes, state or parity.
    pub a: Option<Reg>,
    /// `.release` or `.acquire`, not `.relaxed`.
    pub ordered: bool,
}

/// What a bulk copy moves.
#[derive(Clone, Debug)]
pub(crate) enum Bulk {
    /// Global to shared memory of the cluster: destination, source, size; blocks of a multicast.
    Load {
        dst: Address,
        src: Address,
        size: Reg,
        barrier: Address,
        mask: Option<Reg>,
    },
    /// Shared memory to that of another block.
    Share {
        dst: Address,
        src: Address,
        size: Reg,
        barrier: Address,
    },
    /// Shared to global memory.
    Store {
        dst: Address,
        src: Address,
        size: Reg,
    },
    /// A box of a tensor map to shared memory.
    TensorLoad {
        dst: Address,
        map: Address,
        at: Vec<Row>,
        barrier: Address,
        mask: Option<Reg>,
    },
    /// A box of a tensor map from shared memory.
    TensorStore {
        map: Address,
        at: Vec<Row>,
        src: Address,
    },
    /// Registers to shared memory of the cluster: `st.async`.
    Registers {
        dst: Address,
        elem: u8,
        regs: Vec<Reg>,
        barrier: Address,
    },
    /// Only a hint, whose addresses must be valid: a tensor map, or bytes of global memory.
    PrefetchTensor {
        map: Address,
        at: Vec<Row>,
    },
    Prefetch {
        src: Address,
        size: Reg,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct MatrixMove {
    pub address: Address,
    pub transposed: bool,
    pub regs: Vec<Row>,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Alu(AluFn, Args),
    Branch {
        target: u32,
    },
    /// `brx.idx`
    Switch {
        index: Row,
        targets: Box<[u32]>,
    },
    Exit,
    Trap(&'static str),
    Nop,
    Clock {
        d: Reg,
    },
    Load(Box<MemOp>),
    Store(Box<MemOp>),
    Atomic(Box<AtomOp>),
    Shfl(Box<Shfl>),
    Vote {
        mode: VoteMode,
        d: Reg,
        a: Row,
        negate: bool,
        members: Row,
    },
    Match {
        all: bool,
        d: Row,
        p: Option<Row>,
        a: Reg,
        members: Row,
    },
    Redux {
        op: Reduce,
        d: Row,
        a: Row,
        members: Row,
    },
    ActiveMask {
        d: Row,
    },
    Elect {
        d: Option<Row>,
        p: Row,
        members: Row,
    },
    SyncWarp {
        members: Row,
    },
    Bar(Box<Bar>),
    CpAsync(Box<CpAsync>),
    CpCommit,
    /// Waits until at most this many of the youngest groups are pending; None for `wait_all`.
    CpWait(Option<u32>),
    LoadMatrix(Box<MatrixMove>),
    StoreMatrix(Box<MatrixMove>),
    Mma(Box<Mma>),
    /// `griddepcontrol`: true for `.wait`.
    GridControl(bool),
    Cluster {
        mode: ClusterMode,
        aligned: bool,
    },
    /// Address of the same variable in another block of the cluster.
    MapAddress {
        d: Reg,
        a: Reg,
        rank: Row,
        generic: bool,
    },
    /// Rank of the block that an address belongs to.
    RankOf {
        d: Row,
        a: Reg,
        generic: bool,
    },
    Fence(Fence),
    Mbarrier(Box<MbarrierOp>),
    Bulk(Box<Bulk>),
    BulkCommit,
    BulkWait {
        pending: u32,
        /// Only until the sources were read.
        read: bool,
    },
    /// `setmaxnreg`: registers per thread; true for `.inc`.
    SetMaxRegisters(u32, bool),
    Wgmma(Box<Wgmma>),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait(u32),
}

/// Flags of an instruction that need a second look before it runs.
pub(crate) const JOIN: u8 = 1;
pub(crate) const TRACK: u8 = 2;
/// Touches a register that some `wgmma` uses.
pub(crate) const FLIGHT: u8 = 4;

#[derive(Clone, Debug)]
pub(crate) struct Inst {
    pub op: Op,
    pub guard: Row,
    /// All ones for `@!p`.
    pub negate: u32,
    pub flags: u8,
}

/// What an instruction does with values that were never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Undefined {
    /// Hands them on to its destination.
    Propagate,
    /// Is not allowed to see one.
    Forbid,
    /// `selp`: only the chosen source matters.
    Select,
    /// `wgmma`: accumulators matter only if they are added to.
    Accumulate,
}

/// The cold side of an instruction.
#[derive(Clone, Debug)]
pub(crate) struct Info {
    pub line: u32,
    pub loc: Option<Loc>,
    pub text: Box<str>,
    /// None for the second and later steps of one PTX instruction.
    pub class: Option<Class>,
    pub uses: Vec<Reg>,
    pub defs: Vec<Reg>,
    pub undefined: Undefined,
}

/// Registers that the machine fills before a warp starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    WarpCount,
    SmId,
    SmCount,
    GridId,
    LaneMask(LaneMask),
    ClusterId(u8),
    ClusterCount(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterCtarank,
    ClusterNctarank,
    DynamicShared,
    TotalShared,
    AggregateShared,
    EnvReg,
    /// A predicate, unlike the others.
    ExplicitCluster,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LaneMask {
    Eq,
    Lt,
    Le,
    Gt,
    Ge,
}

/// Value of a constant row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Const {
    Value(u64),
    /// Address of a module variable, plus an offset.
    Global(usize, u64),
    /// Start of dynamic shared memory, plus an offset.
    Dynamic(u64),
}

/// A `.param` of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name in the PTX.
    pub name: String,
    /// Bytes.
    pub size: usize,
    /// Bytes that its address is a multiple of.
    pub align: usize,
    /// Offset in the parameter block.
    pub offset: usize,
}

/// A kernel entry: what a host needs to know to launch it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name in the PTX.
    pub name: String,
    /// Parameters, in order.
    pub params: Vec<Param>,
    /// Bytes of static shared memory.
    pub static_shared: usize,
    /// Bytes of local memory per thread.
    pub local: usize,
    /// `.maxntid`: the block shape that the kernel was compiled for.
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`
    pub required_threads: Option<[u32; 3]>,
    /// `.minnctapersm`
    pub min_blocks: Option<u32>,
    /// `.reqnctapercluster`
    pub required_cluster: Option<[u32; 3]>,
    /// `.maxnreg`
    pub max_registers: Option<u32>,
    /// The most 32-bit registers that are live at once: what the kernel needs at least.
    pub live_registers: u32,
    /// PTX instructions.
    pub instructions: usize,
    pub(crate) kernel: Kernel,
}

/// The executable side of an entry.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kernel {
    pub code: Vec<Inst>,
    pub info: Vec<Info>,
    pub rows32: usize,
    pub rows64: usize,
    pub preds: usize,
    pub consts: Vec<(Reg, Const)>,
    pub specials: Vec<(Reg, Special)>,
    /// Numbers of the registers that some path leaves unwritten before a use: the only ones that are tracked.
    pub suspects: Vec<usize>,
    /// Some instruction uses the asynchronous proxy.
    pub asynchronous: bool,
    /// Reconvergence point of every branch: by pc, `NEVER` if there is none.
    pub reconverge: Vec<u32>,
    pub param_bytes: usize,
    /// Named static arrays in shared memory: name, start, bytes.
    pub shared: Vec<(String, usize, usize)>,
    /// Start of dynamic shared memory.
    pub dynamic_base: usize,
    pub local_bytes: usize,
}

pub(crate) const NEVER: u32 = u32::MAX;

/// Shared addresses below this are never valid.
pub(crate) const SHARED_BASE: usize = 0x400;
/// Local addresses below this are never valid.
pub(crate) const LOCAL_BASE: usize = 0x40;
