//! From parsed PTX to programs: names resolved to register rows, opcodes to functions.

mod control;
mod convert;
mod float;
mod flow;
mod half;
mod hopper;
mod integer;
mod memory;
mod mods;
mod moves;
mod registers;
mod warp;

use std::collections::HashMap;

use crate::LoadError;
use crate::counters::Class;
use crate::parse::ast::{Func, Instr, Loc, Operand, Ptx, Space, Stmt, Var};
use crate::program::{
    ALWAYS, Entry, Info, Inst, Kernel, LOCAL_BASE, NEVER, Op, Param, Reg, SHARED_BASE, Undefined,
};
use mods::Mods;
use registers::{Name, Registers};

type Lowered<T> = Result<T, LoadError>;

/// Functions that a kernel may have inlined into each other.
const MAX_CALL_DEPTH: usize = 32;

pub(crate) fn lower(ptx: &Ptx) -> Lowered<Vec<Entry>> {
    ptx.funcs.iter().filter(|f| f.entry).map(|f| Lower::new(ptx).entry(f)).collect()
}

/// State while one entry, with all that it calls, becomes one program.
struct Lower<'a> {
    ptx: &'a Ptx,
    code: Vec<Inst>,
    info: Vec<Info>,
    regs: Registers,
    scopes: Vec<HashMap<String, Name>>,
    /// Labels by number: the pc, once seen.
    labels: Vec<Option<u32>>,
    /// What is being lowered.
    line: u32,
    text: String,
    class: Option<Class>,
    loc: Option<Loc>,
    guard: (u16, u32),
    uses: Vec<Reg>,
    defs: Vec<Reg>,
    used_bytes: u64,
    shared: Vec<(String, usize, usize)>,
    shared_end: usize,
    dynamic_align: Option<usize>,
    local_end: usize,
    calls: Vec<Call>,
    instructions: usize,
}

/// An inlined call: where `ret` goes.
struct Call {
    function: String,
    end: usize,
}

impl<'a> Lower<'a> {
    fn new(ptx: &'a Ptx) -> Lower<'a> {
        Lower {
            ptx,
            code: Vec::new(),
            info: Vec::new(),
            regs: Registers::default(),
            scopes: vec![HashMap::new()],
            labels: Vec::new(),
            line: 0,
            text: String::new(),
            class: None,
            loc: None,
            guard: (ALWAYS, 0),
            uses: Vec::new(),
            defs: Vec::new(),
            used_bytes: !0,
            shared: Vec::new(),
            shared_end: 0,
            dynamic_align: None,
            local_end: LOCAL_BASE,
            calls: Vec::new(),
            instructions: 0,
        }
    }

    fn entry(mut self, func: &Func) -> Lowered<Entry> {
        let mut offset = 0usize;
        let mut params = Vec::new();
        for p in &func.params {
            offset = offset.next_multiple_of(p.align);
            params.push(Param { name: p.name.clone(), size: p.size, align: p.align, offset });
            self.declare(&p.name, Name::Param(offset as u64));
            offset += p.size;
        }
        self.body(func)?;
        self.line = func.line;
        self.text = "exit".into();
        self.class = None;
        self.emit(Op::Exit);
        self.patch()?;
        let dynamic_base = self.dynamic_base();
        let static_shared = self.shared.iter().map(|s| s.2).sum();
        let mut kernel = Kernel {
            rows32: self.regs.count32(),
            rows64: self.regs.count64(),
            preds: self.regs.count_pred(),
            consts: self.regs.consts(),
            specials: self.regs.specials(),
            suspects: Vec::new(),
            asynchronous: false,
            reconverge: vec![NEVER; self.code.len()],
            param_bytes: offset,
            shared: self.shared,
            dynamic_base,
            local_bytes: self.local_end - LOCAL_BASE,
            code: self.code,
            info: self.info,
        };
        let live_registers = flow::analyse(&mut kernel);
        Ok(Entry {
            name: func.name.clone(),
            params,
            static_shared,
            local: kernel.local_bytes,
            max_threads: func.max_threads,
            required_threads: func.required_threads,
            min_blocks: func.min_blocks,
            required_cluster: func.required_cluster,
            max_registers: func.max_registers,
            live_registers,
            instructions: self.instructions,
            kernel,
        })
    }

    /// Dynamic shared memory begins behind the static arrays. Its start is a multiple of the alignment that the kernel
    /// declares and of no more, so that code which needs more than it asks for is found out; 128 is kept for the banks.
    fn dynamic_base(&self) -> usize {
        let align = self.dynamic_align.unwrap_or(16).max(128);
        if self.shared.is_empty() {
            return odd_multiple_below(align);
        }
        let start = self.shared_end.next_multiple_of(align);
        start + if start.is_multiple_of(2 * align) { align } else { 0 }
    }

    fn body(&mut self, func: &Func) -> Lowered<()> {
        let Some(body) = &func.body else {
            return Err(LoadError::unsupported(func.line, &format!("{} without a body", func.name)));
        };
        self.declare_scope(body, 0);
        let mut depth = 0;
        for (i, stmt) in body.iter().enumerate() {
            self.statement(stmt, &body[i + 1..])?;
            match stmt {
                Stmt::Open => depth += 1,
                Stmt::Close => depth -= 1,
                _ => {}
            }
            debug_assert!(depth >= 0);
        }
        Ok(())
    }

    /// Labels and jump tables are known in their whole scope, before they are met.
    fn declare_scope(&mut self, stmts: &[Stmt], _from: usize) {
        let mut depth = 0;
        for stmt in stmts {
            match stmt {
                Stmt::Open => depth += 1,
                Stmt::Close if depth == 0 => return,
                Stmt::Close => depth -= 1,
                Stmt::Label(name) if depth == 0 => {
                    let label = self.new_label();
                    self.declare(name, Name::Label(label));
                }
                Stmt::Targets(name, labels) if depth == 0 => {
                    self.declare(name, Name::Targets(labels.clone()));
                }
                _ => {}
            }
        }
    }

    fn new_label(&mut self) -> usize {
        self.labels.push(None);
        self.labels.len() - 1
    }

    fn declare(&mut self, name: &str, what: Name) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_string(), what);
        }
    }

    fn statement(&mut self, stmt: &Stmt, rest: &[Stmt]) -> Lowered<()> {
        match stmt {
            Stmt::Open => {
                self.scopes.push(HashMap::new());
                self.declare_scope(rest, 0);
            }
            Stmt::Close => drop(self.scopes.pop()),
            Stmt::Label(name) => {
                if let Some(Name::Label(label)) = self.scopes.last().and_then(|s| s.get(name)) {
                    self.labels[*label] = Some(self.code.len() as u32);
                }
            }
            Stmt::Reg(ty, name, count) => self.registers(ty, name, *count)?,
            Stmt::Var(var) => self.variable(var)?,
            Stmt::Loc(loc) => self.loc = Some(*loc),
            Stmt::UsedBytes(mask) => self.used_bytes = *mask,
            Stmt::Targets(..) => {}
            Stmt::Instr(instr) => {
                self.instruction(instr).map_err(|mut e| {
                    if e.line == 0 {
                        e.line = instr.line;
                    }
                    e
                })?;
                self.used_bytes = !0;
            }
        }
        Ok(())
    }

    fn variable(&mut self, var: &Var) -> Lowered<()> {
        match var.space {
            Space::Shared => {
                let name = self.shared_variable(var);
                self.declare(&var.name, name);
            }
            Space::Local | Space::Param => {
                let start = self.local_end.next_multiple_of(var.align);
                self.local_end = start + var.size;
                self.declare(&var.name, Name::Local(start as u64));
            }
            _ => return Err(LoadError::unsupported(var.line, "a module variable inside a function")),
        }
        Ok(())
    }

    /// Places a static shared array, with a gap behind it that belongs to nobody.
    fn shared_variable(&mut self, var: &Var) -> Name {
        if var.size == 0 {
            self.dynamic_align = Some(self.dynamic_align.unwrap_or(1).max(var.align));
            return Name::Dynamic;
        }
        if let Some((_, start, _)) = self.shared.iter().find(|s| s.0 == var.name) {
            return Name::Shared(*start as u64);
        }
        let start = if self.shared.is_empty() {
            odd_multiple_below(var.align.max(128))
        } else {
            self.shared_end.next_multiple_of(var.align)
        };
        // 128 keeps the banks of what follows where they would be without the gap.
        self.shared_end = start + var.size + 128;
        self.shared.push((var.name.clone(), start, var.size));
        Name::Shared(start as u64)
    }

    fn instruction(&mut self, instr: &Instr) -> Lowered<()> {
        self.line = instr.line;
        self.text = text_of(instr);
        self.instructions += 1;
        self.guard = (ALWAYS, 0);
        self.uses.clear();
        self.defs.clear();
        self.regs.release_temps();
        if let Some((name, negate)) = &instr.guard {
            let p = self.predicate(&Operand::Word(name.clone()))?;
            self.guard = (p, if *negate { !0 } else { 0 });
            self.uses.clear();
        }
        let mut mods = Mods::new(instr.line, &instr.opcode);
        let ops = &instr.operands;
        let first = self.code.len();
        let known = self.integer(&mut mods, ops)?
            || self.float(&mut mods, ops)?
            || self.half(&mut mods, ops)?
            || self.moves(&mut mods, ops)?
            || self.convert(&mut mods, ops)?
            || self.memory(&mut mods, ops)?
            || self.control(&mut mods, ops)?
            || self.warp(&mut mods, ops)?
            || self.hopper(&mut mods, ops)?;
        if !known {
            return Err(mods.unsupported());
        }
        mods.done()?;
        // Only the first step counts as the instruction.
        for info in self.info.iter_mut().skip(first + 1) {
            info.class = None;
        }
        Ok(())
    }

    /// Appends an operation of the current instruction, with the operands fetched since the last one.
    fn emit(&mut self, op: Op) -> usize {
        self.emit_as(op, Undefined::Forbid)
    }

    fn emit_as(&mut self, op: Op, undefined: Undefined) -> usize {
        // Steps that only write scratch rows run without the guard: it may belong to the step that writes the result.
        let scratch = !self.defs.is_empty() && self.defs.iter().all(|d| self.regs.is_temp(*d));
        let (guard, negate) = if scratch { (ALWAYS, 0) } else { self.guard };
        if guard != ALWAYS {
            self.uses.push(registers::predicate(guard));
        }
        self.code.push(Inst { op, guard, negate, flags: 0 });
        self.info.push(Info {
            line: self.line,
            loc: self.loc,
            text: self.text.as_str().into(),
            class: self.class,
            uses: std::mem::take(&mut self.uses),
            defs: std::mem::take(&mut self.defs),
            undefined,
        });
        self.code.len() - 1
    }

    /// Branch targets were label numbers so far.
    fn patch(&mut self) -> Lowered<()> {
        for (inst, info) in self.code.iter_mut().zip(&self.info) {
            let missing = || LoadError::syntax(info.line, "branch to a label that is not there");
            match &mut inst.op {
                Op::Branch { target, .. } => *target = self.labels[*target as usize].ok_or_else(missing)?,
                Op::Switch { targets, .. } => {
                    for target in targets.iter_mut() {
                        *target = self.labels[*target as usize].ok_or_else(missing)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The largest start below the first free address that is an odd multiple of `align`, or `align` itself.
fn odd_multiple_below(align: usize) -> usize {
    let top = SHARED_BASE / align;
    match top {
        0 => align,
        n if n % 2 == 1 => n * align,
        n => (n - 1) * align,
    }
}

fn text_of(instr: &Instr) -> String {
    fn operand(o: &Operand) -> String {
        let list = |v: &[Operand]| v.iter().map(operand).collect::<Vec<_>>().join(", ");
        match o {
            Operand::Word(w) => w.clone(),
            Operand::Int(v) => v.to_string(),
            Operand::F32(v) => format!("0f{v:08X}"),
            Operand::F64(v) => format!("0d{v:016X}"),
            Operand::Not(o) => format!("!{}", operand(o)),
            Operand::Pair(a, b) => format!("{}|{}", operand(a), operand(b)),
            Operand::Vector(v) => format!("{{{}}}", list(v)),
            Operand::List(v) => format!("({})", list(v)),
            Operand::Memory { base, offset, coordinates } => {
                let mut out = format!("[{}", operand(base));
                if *offset != 0 {
                    out += &format!("{offset:+}");
                }
                if !coordinates.is_empty() {
                    out += &format!(", {{{}}}", list(coordinates));
                }
                out + "]"
            }
        }
    }
    let guard = match &instr.guard {
        Some((p, true)) => format!("@!{p} "),
        Some((p, false)) => format!("@{p} "),
        None => String::new(),
    };
    let operands: Vec<_> = instr.operands.iter().map(operand).collect();
    format!("{guard}{} {}", instr.opcode, operands.join(", ")).trim_end().to_string()
}
