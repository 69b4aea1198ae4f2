//! Types and modifiers of an opcode.

use crate::LoadError;
use crate::ops::round::Mode;

/// A fundamental type of PTX, as an instruction names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    U16x2,
    S16x2,
    E4m3x2,
    E5m2x2,
}

impl Ty {
    pub(crate) fn parse(name: &str) -> Option<Ty> {
        Some(match name {
            "pred" => Ty::Pred,
            "b8" => Ty::B8,
            "b16" => Ty::B16,
            "b32" => Ty::B32,
            "b64" => Ty::B64,
            "b128" => Ty::B128,
            "u8" => Ty::U8,
            "u16" => Ty::U16,
            "u32" => Ty::U32,
            "u64" => Ty::U64,
            "s8" => Ty::S8,
            "s16" => Ty::S16,
            "s32" => Ty::S32,
            "s64" => Ty::S64,
            "f16" => Ty::F16,
            "f16x2" => Ty::F16x2,
            "bf16" => Ty::Bf16,
            "bf16x2" => Ty::Bf16x2,
            "tf32" => Ty::Tf32,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            "u16x2" => Ty::U16x2,
            "s16x2" => Ty::S16x2,
            "e4m3x2" => Ty::E4m3x2,
            "e5m2x2" => Ty::E5m2x2,
            _ => return None,
        })
    }

    pub(crate) fn bits(self) -> u8 {
        match self {
            Ty::Pred => 1,
            Ty::B8 | Ty::U8 | Ty::S8 => 8,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 | Ty::E4m3x2 | Ty::E5m2x2 => 16,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 64,
            Ty::B128 => 128,
            _ => 32,
        }
    }

    pub(crate) fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    pub(crate) fn is_float(self) -> bool {
        matches!(self, Ty::F32 | Ty::F64 | Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2)
    }

    /// The unsigned type of the same width, for operations that do not look at the sign.
    pub(crate) fn plain(self) -> Ty {
        match self {
            Ty::B8 | Ty::S8 => Ty::U8,
            Ty::B16 | Ty::S16 => Ty::U16,
            Ty::B32 | Ty::S32 => Ty::U32,
            Ty::B64 | Ty::S64 => Ty::U64,
            other => other,
        }
    }
}

/// The modifiers of one opcode; what nobody takes is an error in the end.
pub(crate) struct Mods<'a> {
    pub line: u32,
    pub opcode: &'a str,
    pub base: &'a str,
    rest: Vec<(&'a str, bool)>,
}

impl<'a> Mods<'a> {
    pub(crate) fn new(line: u32, opcode: &'a str) -> Mods<'a> {
        let mut parts = opcode.split('.');
        let base = parts.next().unwrap_or("");
        Mods { line, opcode, base, rest: parts.map(|p| (p, false)).collect() }
    }

    pub(crate) fn unsupported(&self) -> LoadError {
        LoadError::unsupported(self.line, self.opcode)
    }

    /// Takes a modifier if it is there.
    pub(crate) fn take(&mut self, name: &str) -> bool {
        match self.rest.iter_mut().find(|(n, used)| *n == name && !used) {
            Some(slot) => {
                slot.1 = true;
                true
            }
            None => false,
        }
    }

    /// Takes the first of several that is there.
    pub(crate) fn one_of(&mut self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().find(|n| self.take(n)).copied()
    }

    /// Takes what starts so.
    pub(crate) fn prefixed(&mut self, prefix: &str) -> Option<&'a str> {
        let slot = self.rest.iter_mut().find(|(n, used)| n.starts_with(prefix) && !used)?;
        slot.1 = true;
        Some(slot.0)
    }

    /// Takes the first type that is left.
    pub(crate) fn ty(&mut self) -> Option<Ty> {
        for (name, used) in &mut self.rest {
            if let Some(ty) = Ty::parse(name).filter(|_| !*used) {
                *used = true;
                return Some(ty);
            }
        }
        None
    }

    pub(crate) fn need_ty(&mut self) -> Result<Ty, LoadError> {
        self.ty().ok_or_else(|| self.unsupported())
    }

    /// `.rn`, `.rz`, `.rm`, `.rp`, `.rna`
    pub(crate) fn rounding(&mut self) -> Option<Mode> {
        Some(match self.one_of(&["rn", "rz", "rm", "rp", "rna"])? {
            "rn" => Mode::Nearest,
            "rz" => Mode::Zero,
            "rm" => Mode::Down,
            "rp" => Mode::Up,
            _ => Mode::Away,
        })
    }

    /// `.rni`, `.rzi`, `.rmi`, `.rpi`
    pub(crate) fn integer_rounding(&mut self) -> Option<Mode> {
        Some(match self.one_of(&["rni", "rzi", "rmi", "rpi"])? {
            "rni" => Mode::Nearest,
            "rzi" => Mode::Zero,
            "rmi" => Mode::Down,
            _ => Mode::Up,
        })
    }

    pub(crate) fn done(&self) -> Result<(), LoadError> {
        match self.rest.iter().find(|(_, used)| !used) {
            Some((name, _)) => {
                Err(LoadError::syntax(self.line, &format!("`.{name}` of `{}` is not supported", self.opcode)))
            }
            None => Ok(()),
        }
    }
}
