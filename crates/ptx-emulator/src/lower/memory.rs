//! Loads, stores, atomics, and copies to shared memory that run beside the threads.

use super::mods::{Mods, Ty};
use super::registers::Name;
use super::{Lower, Lowered};
use crate::counters::Class;
use crate::ops::atomic;
use crate::ops::lanes::{Args, alu};
use crate::parse::ast::{Operand, Space};
use crate::program::{AtomOp, Bulk, CpAsync, MemOp, Op, Undefined};

/// Modifiers that only steer caches or name a scope that the emulator need not tell apart.
fn take_hints(m: &mut Mods) {
    while m.prefixed("L1::").is_some() || m.prefixed("L2::evict").is_some() {}
    for size in ["L2::64B", "L2::128B", "L2::256B"] {
        m.take(size);
    }
    m.one_of(&["ca", "cg", "cs", "lu", "cv", "wb", "wt"]);
}

/// `.volatile`, or `.relaxed`, `.acquire`, `.release` and their scope.
fn take_order(m: &mut Mods) -> bool {
    m.take("weak");
    let strong = m.take("volatile") | m.one_of(&["relaxed", "acquire", "release", "acq_rel"]).is_some();
    m.one_of(&["cta", "cluster", "gpu", "sys"]);
    m.take("mmio");
    strong
}

pub(super) fn take_space(m: &mut Mods) -> Space {
    const NAMES: [(&str, Space); 11] = [
        ("global", Space::Global),
        ("shared", Space::Shared),
        ("shared::cta", Space::Shared),
        ("shared::cluster", Space::Cluster),
        ("local", Space::Local),
        ("param", Space::Param),
        ("param::entry", Space::Param),
        ("param::func", Space::Param),
        ("const", Space::Const),
        ("generic", Space::Generic),
        ("const::0", Space::Const),
    ];
    NAMES.iter().find(|(n, _)| m.take(n)).map_or(Space::Generic, |s| s.1)
}

impl Lower<'_> {
    /// Memory instructions; false if this is none.
    pub(super) fn memory(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        match m.base {
            "ld" | "ldu" => {
                self.class = Some(Class::Load);
                self.load(m, ops)?;
            }
            "st" if !m.opcode.contains("async") => {
                self.class = Some(Class::Store);
                self.store(m, ops)?;
            }
            "atom" | "red" if !m.opcode.contains("async") => {
                self.class = Some(Class::Atomic);
                self.atomic(m, ops)?;
            }
            "cp" if !m.opcode.contains("bulk") && !m.opcode.contains("mbarrier") => {
                self.class = Some(Class::Async);
                self.copy_async(m, ops)?;
            }
            "prefetch" if m.opcode.ends_with(".tensormap") => {
                self.class = Some(Class::Other);
                m.take("tensormap");
                let space = take_space(m);
                self.arity(ops, 1)?;
                let map = self.address(&ops[0], space)?;
                self.emit(Op::Bulk(Box::new(Bulk::PrefetchTensor { map, at: Vec::new() })));
            }
            "prefetch" | "prefetchu" | "applypriority" | "discard" => {
                self.class = Some(Class::Other);
                take_space(m);
                while m.prefixed("L").is_some() {}
                self.address(&ops[0], Space::Generic)?;
                self.emit(Op::Nop);
            }
            "createpolicy" => {
                // A policy is only a hint: any value will do.
                self.class = Some(Class::Other);
                while m.prefixed("L2::").is_some() {}
                m.one_of(&["fractional", "range", "cvt"]);
                take_space(m);
                m.need_ty()?;
                let d = self.dst(&ops[0], Ty::B64)?;
                self.alu(alu!(u64, u64; |_| 0), Args { d, ..Args::default() });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Where `.param` really is: parameters of functions live in local memory.
    fn param_space(&self, space: Space, address: &Operand) -> Space {
        if space != Space::Param {
            return space;
        }
        let by_name = match address {
            Operand::Memory { base, .. } => match &**base {
                Operand::Word(name) => self.find(name),
                _ => None,
            },
            _ => None,
        };
        match by_name {
            Some(Name::Local(_)) => Space::Local,
            Some(Name::Param(_)) => Space::Param,
            _ if self.calls.is_empty() => Space::Param,
            _ => Space::Local,
        }
    }

    fn vector_length(m: &mut Mods) -> usize {
        match m.one_of(&["v2", "v4", "v8"]) {
            Some("v2") => 2,
            Some("v4") => 4,
            Some(_) => 8,
            None => 1,
        }
    }

    fn load(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        let strong = take_order(m);
        let space = take_space(m);
        take_hints(m);
        m.take("nc");
        let policy = m.take("L2::cache_hint");
        let count = Self::vector_length(m);
        let ty = m.need_ty()?;
        self.arity(ops, 2 + policy as usize)?;
        let space = self.param_space(space, &ops[1]);
        let address = self.address(&ops[1], space)?;
        let parts = match &ops[0] {
            Operand::Vector(parts) => parts.as_slice(),
            one => std::slice::from_ref(one),
        };
        if parts.len() != count || count * ty.bits() as usize > 256 || ty.bits() == 128 {
            return self.bad("a vector of another length is wanted");
        }
        let mut regs = Vec::new();
        for p in parts {
            regs.push(self.any_dest(p, ty)?);
        }
        let op = MemOp {
            space,
            address,
            elem: ty.bits() / 8,
            regs,
            signed: ty.signed(),
            used: self.used_bytes,
            strong,
        };
        self.emit(Op::Load(Box::new(op)));
        Ok(())
    }

    fn store(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        let strong = take_order(m);
        let space = take_space(m);
        take_hints(m);
        let policy = m.take("L2::cache_hint");
        let count = Self::vector_length(m);
        let ty = m.need_ty()?;
        self.arity(ops, 2 + policy as usize)?;
        let space = self.param_space(space, &ops[0]);
        let address = self.address(&ops[0], space)?;
        let parts = match &ops[1] {
            Operand::Vector(parts) => parts.as_slice(),
            one => std::slice::from_ref(one),
        };
        if parts.len() != count || count * ty.bits() as usize > 256 || ty.bits() == 128 {
            return self.bad("a vector of another length is wanted");
        }
        let mut regs = Vec::new();
        for p in parts {
            regs.push(Some(self.any_source(p, ty)?));
        }
        let op = MemOp { space, address, elem: ty.bits() / 8, regs, signed: false, used: !0, strong };
        // Storing a value to local memory only moves it (spills, arguments).
        let undefined = if space == Space::Local { Undefined::Propagate } else { Undefined::Forbid };
        self.emit_as(Op::Store(Box::new(op)), undefined);
        Ok(())
    }

    fn atomic(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        take_order(m);
        let space = take_space(m);
        let policy = m.take("L2::cache_hint");
        m.take("noftz");
        let name = m.one_of(&["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]);
        let Some(name) = name else { return Err(m.unsupported()) };
        let count = Self::vector_length(m);
        let ty = m.need_ty()?;
        let returns = m.base == "atom";
        let cas = name == "cas";
        self.arity(ops, 2 + returns as usize + cas as usize + policy as usize)?;
        let lower = m.opcode.rsplit('.').next().unwrap_or("");
        let f = atomic::lookup(name, lower).ok_or_else(|| m.unsupported())?;
        let at = returns as usize;
        let parts = |op: &Operand| match op {
            Operand::Vector(parts) => parts.clone(),
            one => vec![one.clone()],
        };
        let (values, dests) = (parts(&ops[at + 1]), if returns { parts(&ops[0]) } else { Vec::new() });
        if values.len() != count {
            return self.bad("a vector of another length is wanted");
        }
        for (i, value) in values.iter().enumerate() {
            let mut address = self.address(&ops[at], space)?;
            address.offset += i as i64 * ty.bits() as i64 / 8;
            let a = self.source(value, ty)?;
            let b = if cas { Some(self.source(&ops[at + 2], ty)?) } else { None };
            let dst = match dests.get(i) {
                Some(d) => self.any_dest(d, ty)?,
                None => None,
            };
            let op = AtomOp { space, address, op: f, size: ty.bits() / 8, dst, a, b };
            self.emit(Op::Atomic(Box::new(op)));
        }
        Ok(())
    }

    fn copy_async(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        if !m.take("async") {
            return Err(m.unsupported());
        }
        if m.take("commit_group") {
            self.emit(Op::CpCommit);
            return Ok(());
        }
        if m.take("wait_all") {
            self.class = Some(Class::Barrier);
            self.emit(Op::CpWait(None));
            return Ok(());
        }
        if m.take("wait_group") {
            self.class = Some(Class::Barrier);
            let [Operand::Int(n)] = ops else { return self.bad("a number of groups is wanted") };
            self.emit(Op::CpWait(Some(*n as u32)));
            return Ok(());
        }
        let cg = m.one_of(&["ca", "cg"]) == Some("cg");
        let to_shared = m.take("shared") || m.take("shared::cta");
        if !to_shared || !m.take("global") {
            return Err(m.unsupported());
        }
        take_hints(m);
        let policy = m.take("L2::cache_hint");
        let extra = ops.len().saturating_sub(3 + policy as usize);
        if ops.len() < 3 || extra > 1 {
            return self.bad("three or four operands are wanted");
        }
        let Operand::Int(bytes) = ops[2] else { return self.bad("a size known at load is wanted") };
        if !(matches!(bytes, 4 | 8 | 16) && (!cg || bytes == 16)) {
            return self.bad("a size of 4, 8 or 16 bytes (16 with .cg) is wanted");
        }
        let dst = self.address(&ops[0], Space::Shared)?;
        let src = self.address(&ops[1], Space::Global)?;
        let (mut src_bytes, mut ignore) = (None, None);
        if extra == 1 {
            let is_predicate = matches!(&ops[3], Operand::Word(w)
                if matches!(self.find(w), Some(Name::Reg(r)) if r.bits == 1));
            if is_predicate {
                ignore = Some(self.predicate(&ops[3])?);
            } else {
                src_bytes = Some(self.src(&ops[3], Ty::U32)?);
            }
        }
        let op = CpAsync { dst, src, bytes: bytes as u8, src_bytes, ignore };
        self.emit(Op::CpAsync(Box::new(op)));
        Ok(())
    }
}
