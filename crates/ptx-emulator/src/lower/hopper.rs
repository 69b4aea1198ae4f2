//! What Hopper adds: clusters, transaction barriers, bulk copies, warpgroup matrix products.

use super::memory::take_space;
use super::mods::{Mods, Ty};
use super::{Lower, Lowered};
use crate::counters::Class;
use crate::ops::lanes::Row;
use crate::ops::matrix::{Acc, Elem};
use crate::ops::wgmma::{Left, Wgmma};
use crate::parse::ast::{Operand, Space};
use crate::program::{Address, Bulk, ClusterMode, Fence, MbarrierMode, MbarrierOp, Op, Undefined};

impl Lower<'_> {
    /// Instructions of capability 9.0; false if this is none.
    pub(super) fn hopper(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<bool> {
        self.class = Some(Class::Barrier);
        let asynchronous = matches!(m.base, "st" | "cp") && m.take("async");
        match m.base {
            "griddepcontrol" => {
                let wait = m.one_of(&["wait", "launch_dependents"]) == Some("wait");
                self.arity(ops, 0)?;
                self.emit(Op::GridControl(wait));
            }
            "barrier" => {
                m.take("cluster");
                let mode = match m.one_of(&["arrive", "wait"]) {
                    Some("arrive") => {
                        ClusterMode::Arrive(m.one_of(&["relaxed", "release"]) != Some("relaxed"))
                    }
                    Some(_) => ClusterMode::Wait(m.one_of(&["relaxed", "acquire"]) != Some("relaxed")),
                    None => return Err(m.unsupported()),
                };
                let aligned = m.take("aligned");
                self.arity(ops, 0)?;
                self.emit(Op::Cluster { mode, aligned });
            }
            "fence" => self.proxy_fence(m, ops)?,
            "mapa" | "getctarank" => self.map_address(m, ops)?,
            "mbarrier" => self.mbarrier(m, ops)?,
            "setmaxnreg" => {
                let inc = m.one_of(&["inc", "dec"]) == Some("inc");
                if !(m.take("sync") && m.take("aligned")) || m.need_ty()? != Ty::U32 {
                    return Err(m.unsupported());
                }
                let [Operand::Int(n)] = ops else { return self.bad("a number of registers is wanted") };
                if !(24..=256).contains(n) || n % 8 != 0 {
                    return self.bad("24 to 256 registers in steps of 8 are wanted");
                }
                self.emit(Op::SetMaxRegisters(*n as u32, inc));
            }
            "wgmma" => self.wgmma(m, ops)?,
            "st" if asynchronous => self.store_async(m, ops)?,
            "cp" if asynchronous => {
                self.class = Some(Class::Async);
                if m.take("mbarrier") {
                    m.take("arrive");
                    let mode = MbarrierMode::CopiesArrive(m.take("noinc"));
                    self.mbarrier_op(m, mode, ops)?;
                } else if m.take("bulk") {
                    self.bulk(m, ops)?;
                } else {
                    return Err(m.unsupported());
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn proxy_fence(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        if m.take("mbarrier_init") {
            if !(m.take("release") && m.take("cluster")) {
                return Err(m.unsupported());
            }
            self.emit(Op::Fence(Fence::BarrierInit));
            return Ok(());
        }
        if !m.take("proxy") {
            return Err(m.unsupported());
        }
        let kind = m.one_of(&["async", "alias", "tensormap::generic"]);
        m.one_of(&["global", "shared::cta", "shared::cluster"]);
        if kind == Some("tensormap::generic") {
            m.one_of(&["acquire", "release"]);
            m.one_of(&["cta", "cluster", "gpu", "sys"]);
            if let Some(address) = ops.first() {
                self.address(address, Space::Generic)?;
            }
        } else {
            self.arity(ops, 0)?;
        }
        let fence = match kind {
            Some("async") => Fence::Async,
            Some(_) => Fence::Other,
            None => return Err(m.unsupported()),
        };
        self.emit(Op::Fence(fence));
        Ok(())
    }

    fn map_address(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.class = Some(Class::Integer);
        let generic = !m.take("shared::cluster");
        let ty = m.need_ty()?;
        if !matches!(ty, Ty::U32 | Ty::U64) || generic && ty != Ty::U64 {
            return Err(m.unsupported());
        }
        let map = m.base == "mapa";
        self.arity(ops, if map { 3 } else { 2 })?;
        let a = self.source(&ops[1], ty)?;
        if map {
            let rank = self.src(&ops[2], Ty::U32)?;
            let d = self.dest(&ops[0], ty)?;
            self.emit(Op::MapAddress { d, a, rank, generic });
        } else {
            let d = self.dst(&ops[0], Ty::U32)?;
            self.emit(Op::RankOf { d, a, generic });
        }
        Ok(())
    }

    fn mbarrier(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        let what = m.one_of(&[
            "init",
            "inval",
            "arrive",
            "arrive_drop",
            "expect_tx",
            "complete_tx",
            "test_wait",
            "try_wait",
            "pending_count",
        ]);
        let mode = match what {
            Some("init") => MbarrierMode::Init,
            Some("inval") => MbarrierMode::Inval,
            Some(arrive @ ("arrive" | "arrive_drop")) => MbarrierMode::Arrive {
                expect: m.take("expect_tx"),
                drop: arrive == "arrive_drop",
                no_complete: m.take("noComplete"),
            },
            Some("expect_tx") => MbarrierMode::ExpectTx,
            Some("complete_tx") => MbarrierMode::CompleteTx,
            Some(wait @ ("test_wait" | "try_wait")) => {
                MbarrierMode::Wait { suspends: wait == "try_wait", parity: m.take("parity") }
            }
            _ => return Err(m.unsupported()),
        };
        self.mbarrier_op(m, mode, ops)
    }

    fn mbarrier_op(&mut self, m: &mut Mods, mode: MbarrierMode, ops: &[Operand]) -> Lowered<()> {
        let ordered = m.one_of(&["relaxed", "release", "acquire"]) != Some("relaxed");
        m.one_of(&["cta", "cluster"]);
        let space = take_space(m);
        if m.need_ty()? != Ty::B64 || !matches!(space, Space::Generic | Space::Shared | Space::Cluster) {
            return Err(m.unsupported());
        }
        let (mut d, mut a) = (None, None);
        let address = match (mode, ops) {
            (MbarrierMode::Init | MbarrierMode::ExpectTx | MbarrierMode::CompleteTx, [at, count]) => {
                a = Some(self.source(count, Ty::U32)?);
                at
            }
            (MbarrierMode::Inval | MbarrierMode::CopiesArrive(_), [at]) => at,
            (MbarrierMode::Arrive { .. }, [state, at, rest @ ..]) if rest.len() <= 1 => {
                if let [count] = rest {
                    a = Some(self.source(count, Ty::U32)?);
                }
                d = self.any_dest(state, Ty::B64)?;
                at
            }
            // A hint of how long to suspend may follow.
            (MbarrierMode::Wait { parity, suspends }, [done, at, state, hint @ ..])
                if hint.len() <= suspends as usize =>
            {
                a = Some(self.source(state, if parity { Ty::U32 } else { Ty::B64 })?);
                if let [hint] = hint {
                    self.source(hint, Ty::U32)?;
                }
                d = self.any_dest(done, Ty::Pred)?;
                at
            }
            _ => return self.bad("another number of operands is wanted"),
        };
        if space == Space::Cluster && d.is_some() {
            return self.bad("an arrival at a barrier of the cluster returns no state: `_` is wanted");
        }
        let address = self.address(address, space)?;
        self.emit(Op::Mbarrier(Box::new(MbarrierOp { mode, space, address, d, a, ordered })));
        Ok(())
    }

    /// `st.async`: registers to shared memory of the cluster, which a barrier counts.
    fn store_async(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.class = Some(Class::Async);
        m.take("weak");
        if !(m.take("shared::cluster") && m.take("mbarrier::complete_tx::bytes")) {
            return Err(m.unsupported());
        }
        let count = match m.one_of(&["v2", "v4"]) {
            Some("v2") => 2,
            Some(_) => 4,
            None => 1,
        };
        let ty = m.need_ty()?;
        self.arity(ops, 3)?;
        let parts = match &ops[1] {
            Operand::Vector(parts) => parts.as_slice(),
            one => std::slice::from_ref(one),
        };
        if parts.len() != count || !matches!(ty.bits(), 32 | 64) {
            return self.bad("a vector of another length is wanted");
        }
        let regs = parts.iter().map(|p| self.source(p, ty)).collect::<Lowered<Vec<_>>>()?;
        let dst = self.address(&ops[0], Space::Cluster)?;
        let barrier = self.address(&ops[2], Space::Cluster)?;
        self.emit(Op::Bulk(Box::new(Bulk::Registers { dst, elem: ty.bits() / 8, regs, barrier })));
        Ok(())
    }

    fn bulk(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        if m.take("commit_group") {
            self.emit(Op::BulkCommit);
            return Ok(());
        }
        if m.take("wait_group") {
            self.class = Some(Class::Barrier);
            let read = m.take("read");
            let [Operand::Int(n)] = ops else { return self.bad("a number of groups is wanted") };
            self.emit(Op::BulkWait { pending: *n as u32, read });
            return Ok(());
        }
        if m.take("prefetch") {
            if m.take("tensor") {
                let dims = self.dimensions(m)?;
                m.take("L2");
                m.take("global");
                m.take("tile");
                let hint = m.take("L2::cache_hint");
                self.arity(ops, 1 + hint as usize)?;
                let (map, at) = self.tensor(&ops[0], dims)?;
                self.emit(Op::Bulk(Box::new(Bulk::PrefetchTensor { map, at })));
                return Ok(());
            }
            if !(m.take("L2") && m.take("global")) {
                return Err(m.unsupported());
            }
            let hint = m.take("L2::cache_hint");
            self.arity(ops, 2 + hint as usize)?;
            let (src, size) = (self.address(&ops[0], Space::Global)?, self.source(&ops[1], Ty::U32)?);
            self.emit(Op::Bulk(Box::new(Bulk::Prefetch { src, size })));
            return Ok(());
        }
        let dims = if m.take("tensor") { Some(self.dimensions(m)?) } else { None };
        // The first space is the destination's.
        let parts: Vec<&str> = m.opcode.split('.').collect();
        let spaces: Vec<&str> = parts
            .into_iter()
            .filter(|p| matches!(*p, "global" | "shared::cta" | "shared::cluster"))
            .collect();
        for space in &spaces {
            m.take(space);
        }
        let counted = m.take("mbarrier::complete_tx::bytes");
        let grouped = m.take("bulk_group");
        let multicast = m.take("multicast::cluster");
        m.take("tile");
        let hint = m.take("L2::cache_hint") as usize;
        let extra = multicast as usize + hint;
        let op = match (spaces.as_slice(), dims) {
            (["shared::cluster" | "shared::cta", "global"], None) if counted => {
                self.arity(ops, 4 + extra)?;
                let mask = if multicast { Some(self.source(&ops[4], Ty::B16)?) } else { None };
                Bulk::Load {
                    dst: self.address(&ops[0], Space::Cluster)?,
                    src: self.address(&ops[1], Space::Global)?,
                    size: self.source(&ops[2], Ty::U32)?,
                    barrier: self.address(&ops[3], Space::Cluster)?,
                    mask,
                }
            }
            (["shared::cluster", "shared::cta"], None) if counted && !multicast => {
                self.arity(ops, 4)?;
                Bulk::Share {
                    dst: self.address(&ops[0], Space::Cluster)?,
                    src: self.address(&ops[1], Space::Shared)?,
                    size: self.source(&ops[2], Ty::U32)?,
                    barrier: self.address(&ops[3], Space::Cluster)?,
                }
            }
            (["global", "shared::cta"], None) if grouped => {
                self.arity(ops, 3 + hint)?;
                Bulk::Store {
                    dst: self.address(&ops[0], Space::Global)?,
                    src: self.address(&ops[1], Space::Shared)?,
                    size: self.source(&ops[2], Ty::U32)?,
                }
            }
            (["shared::cluster" | "shared::cta", "global"], Some(dims)) if counted => {
                self.arity(ops, 3 + extra)?;
                let dst = self.address(&ops[0], Space::Cluster)?;
                let (map, at) = self.tensor(&ops[1], dims)?;
                let barrier = self.address(&ops[2], Space::Cluster)?;
                let mask = if multicast { Some(self.source(&ops[3], Ty::B16)?) } else { None };
                Bulk::TensorLoad { dst, map, at, barrier, mask }
            }
            (["global", "shared::cta"], Some(dims)) if grouped => {
                self.arity(ops, 2 + hint)?;
                let (map, at) = self.tensor(&ops[0], dims)?;
                Bulk::TensorStore { map, at, src: self.address(&ops[1], Space::Shared)? }
            }
            _ => return Err(m.unsupported()),
        };
        self.emit(Op::Bulk(Box::new(op)));
        Ok(())
    }

    fn dimensions(&mut self, m: &mut Mods) -> Lowered<usize> {
        let name = m.one_of(&["1d", "2d", "3d", "4d", "5d"]).ok_or_else(|| m.unsupported())?;
        Ok((name.as_bytes()[0] - b'0') as usize)
    }

    /// `[map, {c0, c1}]`
    fn tensor(&mut self, op: &Operand, dims: usize) -> Lowered<(Address, Vec<Row>)> {
        let Operand::Memory { coordinates, .. } = op else { return self.bad("a tensor map is wanted") };
        if coordinates.len() != dims {
            return self.bad(&format!("{dims} coordinates are wanted"));
        }
        let at = coordinates.iter().map(|c| self.src(c, Ty::S32)).collect::<Lowered<Vec<_>>>()?;
        Ok((self.address(op, Space::Generic)?, at))
    }

    fn wgmma(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        let what = m.one_of(&["fence", "commit_group", "wait_group", "mma_async"]);
        if !(m.take("sync") && m.take("aligned")) {
            return Err(m.unsupported());
        }
        match what {
            Some("fence") => drop(self.emit(Op::WgmmaFence)),
            Some("commit_group") => drop(self.emit(Op::WgmmaCommit)),
            Some("wait_group") => {
                let [Operand::Int(n)] = ops else { return self.bad("a number of groups is wanted") };
                self.emit(Op::WgmmaWait(*n as u32));
            }
            Some(_) => self.wgmma_product(m, ops)?,
            None => return Err(m.unsupported()),
        }
        Ok(())
    }

    fn wgmma_product(&mut self, m: &mut Mods, ops: &[Operand]) -> Lowered<()> {
        self.class = Some(Class::Matrix);
        let shape = m.prefixed("m64n").ok_or_else(|| m.unsupported())?;
        let n = shape["m64n".len()..].strip_suffix("k16").and_then(|n| n.parse::<usize>().ok());
        let Some(n) = n.filter(|n| n % 8 == 0 && (8..=256).contains(n)) else {
            return Err(m.unsupported());
        };
        let types: Vec<&str> = m.opcode.rsplit('.').take(3).collect();
        let (acc, elem) = match types.as_slice() {
            ["bf16", "bf16", "f32"] => (Acc::F32, Elem::Bf16),
            ["f16", "f16", "f32"] => (Acc::F32, Elem::F16),
            ["f16", "f16", "f16"] => (Acc::F16, Elem::F16),
            _ => return Err(m.unsupported()),
        };
        for name in &types {
            m.take(name);
        }
        let in_registers = matches!(ops.get(1), Some(Operand::Vector(_)));
        self.arity(ops, if in_registers { 7 } else { 8 })?;
        let sum = if acc == Acc::F32 { Ty::F32 } else { Ty::B32 };
        let a = if in_registers {
            Left::Registers(self.rows(&ops[1], Ty::B32, false)?)
        } else {
            Left::Shared(self.src(&ops[1], Ty::B64)?)
        };
        let b = self.src(&ops[2], Ty::B64)?;
        let (scale_d, negate) = self.scale(&ops[3])?;
        let number = |op: &Operand, low: i128| match op {
            Operand::Int(v) if *v == 1 || *v == low => Ok(*v == low),
            _ => self.bad(&format!("1 or {low} is wanted")),
        };
        let (negate_a, negate_b) = (number(&ops[4], -1)?, number(&ops[5], -1)?);
        let (transpose_a, transpose_b) = if in_registers {
            (false, !number(&ops[6], 0)?)
        } else {
            (!number(&ops[6], 0)?, !number(&ops[7], 0)?)
        };
        let d = self.rows(&ops[0], sum, true)?;
        // They are sources too.
        let accumulators = self.rows(&ops[0], sum, false)?;
        let sums = if acc == Acc::F32 { n / 2 } else { n / 4 };
        if accumulators.len() != sums || matches!(&a, Left::Registers(a) if a.len() != 4) {
            return self.bad("fragments of another length are wanted");
        }
        let op =
            Wgmma { n, elem, acc, d, a, b, scale_d, negate, negate_a, negate_b, transpose_a, transpose_b };
        self.emit_as(Op::Wgmma(Box::new(op)), Undefined::Accumulate);
        Ok(())
    }

    /// A predicate, or a constant.
    fn scale(&mut self, op: &Operand) -> Lowered<(Row, bool)> {
        match op {
            Operand::Int(v) => Ok((crate::program::ALWAYS, *v == 0)),
            p => self.signed_predicate(p),
        }
    }
}
