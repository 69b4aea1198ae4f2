//! Branches, calls, barriers and fences.

use std::collections::HashMap;

use super::mods::{Mods, Ty};
use super::registers::Name;
use super::{Call, Lower, Lowered, MAX_CALL_DEPTH};
use crate::counters::Class;
use crate::parse::ast::{Operand, Space};
use crate::program::{ALWAYS, Address, Bar, BarMode, Const, Fence, File, MemOp, Op, Reg};

impl Lower<'_> {
    /// Control flow and barriers; false if this is none.
    pub(super) fn control(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        self.class = Some(Class::Branch);
        match m.base {
            "bra" => {
                m.take("uni");
                let [Operand::Word(name)] = ops else { return self.bad("a label is wanted") };
                let target = self.label(name)?;
                self.emit(Op::Branch { target });
            }
            "brx" => {
                m.take("idx");
                m.take("uni");
                let [index, Operand::Word(list)] = ops else {
                    return self.bad("an index and a list are wanted");
                };
                let Some(Name::Targets(labels)) = self.find(list).cloned() else {
                    return self.bad("a list of branch targets is wanted");
                };
                let index = self.src(index, Ty::U32)?;
                let targets = labels.iter().map(|l| self.label(l)).collect::<Lowered<Box<[u32]>>>()?;
                self.emit(Op::Switch { index, targets });
            }
            "ret" => {
                m.take("uni");
                match self.calls.last() {
                    Some(call) => {
                        let target = call.end as u32;
                        self.emit(Op::Branch { target });
                    }
                    None => {
                        self.emit(Op::Exit);
                    }
                }
            }
            "exit" => {
                self.emit(Op::Exit);
            }
            "trap" => {
                self.emit(Op::Trap("trap"));
            }
            "brkpt" | "pmevent" => {
                self.emit(Op::Nop);
            }
            "nanosleep" => {
                self.class = Some(Class::Other);
                m.need_ty()?;
                self.src(&ops[0], Ty::U32)?;
                self.emit(Op::Nop);
            }
            "call" => self.call(m, ops)?,
            "bar" | "barrier" if !m.opcode.contains(".cluster") => {
                self.class = Some(Class::Barrier);
                self.barrier(m, ops)?;
            }
            "membar" | "fence" if !m.opcode.contains("proxy") && !m.opcode.contains("mbarrier_init") => {
                self.class = Some(Class::Barrier);
                m.one_of(&["sc", "acq_rel", "acquire", "release"]);
                m.one_of(&["cta", "cluster", "gpu", "gl", "sys"]);
                self.emit(Op::Fence(Fence::Memory));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn label(&self, name: &str) -> Lowered<u32> {
        match self.find(name) {
            Some(Name::Label(label)) => Ok(*label as u32),
            _ => self.bad(&format!("`{name}` is not a label")),
        }
    }

    /// `bar.sync a, b`, `barrier.cta.arrive a, b`, `bar.red.popc.u32 d, a, b, p`, `bar.warp.sync mask`.
    fn barrier(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        if m.take("warp") {
            m.take("sync");
            let members = self.src(&ops[0], Ty::B32)?;
            self.emit(Op::SyncWarp { members });
            return Ok(());
        }
        m.take("cta");
        // `bar` is `barrier.cta.….aligned`.
        let aligned = m.take("aligned") || m.base == "bar";
        let kind = m.one_of(&["sync", "arrive", "red"]);
        let (mode, first) = match kind {
            Some("sync") => (BarMode::Sync, 0),
            Some("arrive") => (BarMode::Arrive, 0),
            Some(_) => match m.one_of(&["popc", "and", "or"]) {
                Some("popc") => (BarMode::Popc, 1),
                Some("and") => (BarMode::And, 1),
                Some(_) => (BarMode::Or, 1),
                None => return Err(m.unsupported()),
            },
            None => return Err(m.unsupported()),
        };
        let (mut a, mut d) = (None, None);
        let mut rest = &ops[first.min(ops.len())..];
        if first == 1 {
            let ty = m.need_ty()?;
            let Some((last, others)) = rest.split_last() else { return self.bad("a predicate is wanted") };
            a = Some(self.signed_predicate(last)?);
            rest = others;
            d = Some(self.dest(&ops[0], ty)?);
        }
        let (id, count) = match rest {
            [id] => (self.src(id, Ty::U32)?, None),
            [id, count] => (self.src(id, Ty::U32)?, Some(self.src(count, Ty::U32)?)),
            _ => return self.bad("a barrier, and perhaps a number of threads, are wanted"),
        };
        if mode == BarMode::Arrive && count.is_none() {
            return self.bad("an arrival needs the number of threads");
        }
        self.emit(Op::Bar(Box::new(Bar { mode, aligned, id, count, a, d })));
        Ok(())
    }

    /// Calls are inlined: arguments are `.param` variables of the caller, which become those of the function.
    fn call(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        m.take("uni");
        let (returns, rest) = match ops {
            [Operand::List(returns), rest @ ..] => (returns.as_slice(), rest),
            rest => (&[][..], rest),
        };
        let (name, arguments) = match rest {
            [Operand::Word(name)] => (name, &[][..]),
            [Operand::Word(name), Operand::List(arguments)] => (name, arguments.as_slice()),
            _ => return self.bad("indirect calls are not supported"),
        };
        let ptx = self.ptx;
        let found = ptx.funcs.iter().filter(|f| f.name == *name).max_by_key(|f| f.body.is_some());
        let Some(function) = found.filter(|f| f.body.is_some()) else {
            return self.external(name, returns);
        };
        if self.calls.iter().any(|c| c.function == *name) || self.calls.len() >= MAX_CALL_DEPTH {
            return self.bad("recursive calls are not supported");
        }
        let after = self.new_label();
        if self.guard.0 != ALWAYS {
            // Skip the call where the guard is off.
            let guard = self.guard;
            self.guard.1 = !guard.1;
            self.emit(Op::Branch { target: after as u32 });
            self.guard = (ALWAYS, 0);
        } else {
            self.emit(Op::Nop);
        }
        let mut scope = HashMap::new();
        let pairs = function.returns.iter().zip(returns).chain(function.params.iter().zip(arguments));
        for (formal, actual) in pairs {
            let Operand::Word(actual) = actual else { return self.bad("a variable is wanted as argument") };
            match self.find(actual) {
                Some(name @ (Name::Local(_) | Name::Reg(_))) => {
                    scope.insert(formal.name.clone(), name.clone());
                }
                _ => return self.bad(&format!("`{actual}` cannot be an argument")),
            }
        }
        if function.params.len() != arguments.len() || function.returns.len() != returns.len() {
            return self.bad("another number of arguments is wanted");
        }
        let end = self.new_label();
        let caller = (self.line, self.text.clone(), self.loc);
        self.calls.push(Call { function: name.clone(), end });
        // The function sees nothing of its caller's names.
        let outer = std::mem::replace(&mut self.scopes, vec![scope]);
        let result = self.body(function);
        self.scopes = outer;
        self.calls.pop();
        result?;
        (self.line, self.text, self.loc) = caller;
        self.labels[end] = Some(self.code.len() as u32);
        self.labels[after] = Some(self.code.len() as u32);
        Ok(())
    }

    /// The few functions that a driver provides.
    fn external(&mut self, name: &str, returns: &[Operand]) -> Lowered<()> {
        match name {
            "__assertfail" | "__assert_fail" => {
                self.emit(Op::Trap("a failed assert"));
            }
            // Output of kernels goes nowhere.
            "vprintf" => {
                if let [Operand::Word(result)] = returns
                    && let Some(Name::Local(at)) = self.find(result).cloned()
                {
                    let row = self.regs.constant(File::R64, Const::Value(at));
                    let value = Reg { file: File::R32, row: self.constant(0), bits: 32 };
                    let op = MemOp {
                        space: Space::Local,
                        address: Address { row, wide: true, offset: 0 },
                        elem: 4,
                        regs: vec![Some(value)],
                        signed: false,
                        used: !0,
                        strong: false,
                    };
                    self.emit(Op::Store(Box::new(op)));
                }
            }
            _ => return self.bad("a function without a body"),
        }
        Ok(())
    }
}
