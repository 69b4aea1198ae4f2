//! What the parser hands to the lowering: PTX as written, names unresolved.

/// A state space of PTX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Space {
    Generic,
    Global,
    Const,
    Shared,
    /// `.shared::cluster`: the shared memory of any block of the cluster.
    Cluster,
    Local,
    Param,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Ptx {
    pub target: String,
    pub vars: Vec<Var>,
    pub funcs: Vec<Func>,
    /// Source files by the number that `.loc` uses.
    pub files: Vec<(u32, String)>,
}

#[derive(Clone, Debug)]
pub(crate) struct Var {
    pub name: String,
    pub space: Space,
    pub align: usize,
    /// Bytes; 0 for `extern` arrays without a length.
    pub size: usize,
    pub external: bool,
    pub init: Vec<u8>,
    /// Addresses to place in `init`: byte offset, symbol, addend.
    pub relocations: Vec<(usize, String, u64)>,
    pub line: u32,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Func {
    pub name: String,
    pub entry: bool,
    pub returns: Vec<Var>,
    pub params: Vec<Var>,
    /// `.maxntid`
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`
    pub required_threads: Option<[u32; 3]>,
    /// `.reqnctapercluster`
    pub required_cluster: Option<[u32; 3]>,
    pub max_registers: Option<u32>,
    pub min_blocks: Option<u32>,
    /// None for a declaration.
    pub body: Option<Vec<Stmt>>,
    pub line: u32,
}

#[derive(Clone, Debug)]
pub(crate) enum Stmt {
    Open,
    Close,
    Label(String),
    /// Type, name, and for `name<n>` the count.
    Reg(String, String, Option<u32>),
    Var(Var),
    Loc(Loc),
    /// `.pragma "used_bytes_mask 15"`: bytes of the next load that are used.
    UsedBytes(u64),
    /// `name: .branchtargets a, b, c;`
    Targets(String, Vec<String>),
    Instr(Instr),
}

/// A source position from `.loc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct Loc {
    pub file: u32,
    pub line: u32,
    /// Where the function that holds the line was inlined (innermost): file and line, 0 if not.
    pub at_file: u32,
    pub at_line: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Instr {
    pub line: u32,
    /// Guard predicate: name, and true for `@!`.
    pub guard: Option<(String, bool)>,
    /// As written, with modifiers.
    pub opcode: String,
    pub operands: Vec<Operand>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    /// A register, symbol, label, special register, or `_`.
    Word(String),
    Int(i128),
    /// Bits of a `0f` constant.
    F32(u32),
    /// Bits of a `0d` constant or of a decimal fraction.
    F64(u64),
    Not(Box<Operand>),
    /// `d|p`
    Pair(Box<Operand>, Box<Operand>),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `(a, b)`
    List(Vec<Operand>),
    /// `[base + offset]`, with `{c0, c1}` coordinates for tensor maps.
    Memory {
        base: Box<Operand>,
        offset: i64,
        coordinates: Vec<Operand>,
    },
}
