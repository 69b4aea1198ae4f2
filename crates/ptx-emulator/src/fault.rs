//! What can go wrong: when PTX is loaded, when the host touches device memory, and when a kernel runs.

use std::fmt;

/// PTX that cannot be loaded.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{module}:{line}: {message}")]
pub struct LoadError {
    /// The name given to [`crate::Module::parse`].
    pub module: String,
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// What was met there.
    pub message: String,
}

impl LoadError {
    pub(crate) fn syntax(line: u32, message: &str) -> LoadError {
        LoadError { module: String::new(), line, message: message.to_string() }
    }

    pub(crate) fn unsupported(line: u32, what: &str) -> LoadError {
        LoadError::syntax(line, &format!("`{what}` is not supported"))
    }
}

/// A mistake of the host with device memory.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum MemoryError {
    /// The bytes are not inside one live allocation.
    #[error("{bytes} bytes at {address:#x} are not inside a live allocation ({nearest})")]
    OutOfBounds {
        /// First address asked for.
        address: u64,
        /// How many bytes.
        bytes: usize,
        /// The allocation that comes closest, in words.
        nearest: String,
    },
    /// The host reads bytes that nobody wrote.
    #[error("byte {offset} of `{label}` was never written")]
    Uninitialized {
        /// Label of the allocation.
        label: String,
        /// Offset of the first such byte in it.
        offset: usize,
    },
    /// `free` of an address that is not the start of a live allocation.
    #[error("{address:#x} is not the start of a live allocation")]
    NotAllocated {
        /// The address.
        address: u64,
    },
    /// More than the device has.
    #[error("{bytes} bytes for `{label}` are more than the device's memory leaves ({left})")]
    OutOfMemory {
        /// Label of the allocation.
        label: String,
        /// Bytes asked for.
        bytes: usize,
        /// Bytes left.
        left: usize,
    },
}

/// The kinds of mistakes that a launch is checked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// The launch itself is impossible: entry, geometry, parameters, shared memory or registers.
    Launch,
    /// Access outside of every allocation, array or window.
    OutOfBounds,
    /// Access to memory that was freed.
    UseAfterFree,
    /// Address not a multiple of the access size.
    Misaligned,
    /// Write to constant memory or to kernel parameters.
    ReadOnly,
    /// Read of memory that nobody wrote.
    UninitializedMemory,
    /// A register that was never written decides an address, a branch, or what is stored.
    UninitializedRegister,
    /// Two threads touch the same shared memory, one of them writing, with nothing that orders them.
    SharedRace,
    /// Two blocks write the same global memory without atomics.
    GlobalRace,
    /// An instruction that the whole warp must execute together is executed by a part of it.
    Divergence,
    /// Every warp waits for something that will not come.
    Deadlock,
    /// Use of the destination or source of asynchronous work before its completion was waited for.
    InFlight,
    /// Asynchronous work reads what a normal store wrote, without a proxy fence between.
    MissingFence,
    /// Access to memory that the launch before uses, before `griddepcontrol.wait`.
    EarlyAccess,
    /// An operand that the instruction does not allow (a descriptor, a count, a mask).
    Operand,
    /// `trap` or a failed `assert` in the kernel.
    Trap,
    /// The launch executed more instructions than the limit of [`crate::Spec`].
    Timeout,
}

/// A line of the source that was compiled to PTX.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// As `.file` names it.
    pub file: String,
    /// From 1.
    pub line: u32,
    /// Where the function with that line was inlined.
    pub inlined_at: Option<(String, u32)>,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)?;
        match &self.inlined_at {
            Some((file, line)) => write!(f, " (inlined at {file}:{line})"),
            None => Ok(()),
        }
    }
}

/// A mistake of a kernel, or of its launch, and where it happened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Fault {
    /// What kind of mistake.
    pub kind: FaultKind,
    /// Name of the module.
    pub module: String,
    /// Name of the entry.
    pub kernel: String,
    /// Line of the CUDA source; known when it was compiled with `-lineinfo`.
    pub source_line: Option<Source>,
    /// Line of the PTX, 0 if no instruction is to blame.
    pub ptx_line: u32,
    /// The PTX instruction.
    pub instruction: String,
    /// Index of the block.
    pub block: Option<[u32; 3]>,
    /// Index of the thread in its block.
    pub thread: Option<[u32; 3]>,
    /// The address, generic or of the space that the message names.
    pub address: Option<u64>,
    /// The rest, in words.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}\n  in {} of {}", self.kind, self.message, self.kernel, self.module)?;
        if let Some(source) = &self.source_line {
            write!(f, ", {source}")?;
        }
        if self.ptx_line > 0 {
            write!(f, "\n  PTX line {}: {}", self.ptx_line, self.instruction)?;
        }
        if let Some(block) = self.block {
            write!(f, "\n  block {block:?}")?;
        }
        if let Some(thread) = self.thread {
            write!(f, ", thread {thread:?}")?;
        }
        if let Some(address) = self.address {
            write!(f, ", address {address:#x}")?;
        }
        Ok(())
    }
}

/// What went wrong in one instruction, before the machine adds where.
#[derive(Clone, Debug)]
pub(crate) struct Trouble {
    pub kind: FaultKind,
    pub lane: Option<usize>,
    pub address: Option<u64>,
    pub message: String,
}

impl Trouble {
    pub(crate) fn new(kind: FaultKind, message: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble { kind, lane: None, address: None, message: message.into() })
    }

    pub(crate) fn at(kind: FaultKind, lane: usize, address: u64, message: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble { kind, lane: Some(lane), address: Some(address), message: message.into() })
    }
}

/// Result of executing something: boxed, so that the good path stays small.
pub(crate) type Run<T> = Result<T, Box<Trouble>>;
