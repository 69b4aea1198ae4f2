//! The compiled kernels, as PTX text inside the library, compressed to a tenth of its size.

use std::fmt;

use miniz_oxide::inflate::decompress_to_vec_zlib;

use crate::{Error, Result};

/// A virtual architecture that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// Runs on everything from Ampere on.
    Compute80,
    /// Hopper's own instructions (wgmma, TMA). The `a` means: capability 9.0 and nothing else, newer devices included.
    Compute90a,
}

impl Target {
    /// All of them.
    pub const ALL: [Target; 2] = [Target::Compute80, Target::Compute90a];

    /// The target for a device of this compute capability.
    ///
    /// # Errors
    /// [`Error::NoDevice`] below capability 8.0.
    pub fn for_capability((major, minor): (u32, u32)) -> Result<Self> {
        match (major, minor) {
            (9, 0) => Ok(Target::Compute90a),
            (8.., _) => Ok(Target::Compute80),
            _ => Err(Error::NoDevice {
                reason: format!("compute capability 8.0 or newer is needed, the device has {major}.{minor}"),
            }),
        }
    }

    /// nvcc's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Target::Compute80 => "compute_80",
            Target::Compute90a => "compute_90a",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One file of `kernels/`, compiled for one target.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// The file's name without `.cu`.
    pub module: &'static str,
    /// What it was compiled for.
    pub target: Target,
    /// The lines of the text that name version and target.
    header: &'static str,
    /// Two such lines, and the rest of the text, compressed by zlib (`build.rs`).
    file: &'static [u8],
}

impl Image {
    /// The text that the driver or the emulator loads. It is decompressed by every call, which takes milliseconds.
    pub fn ptx(&self) -> String {
        let body =
            self.file.splitn(3, |&byte| byte == b'\n').nth(2).expect("build.rs writes two lines before it");
        let body = decompress_to_vec_zlib(body).expect("build.rs has compressed it");
        let body = String::from_utf8(body).expect("PTX is text");
        format!("{}{body}", self.header)
    }

    /// What is stored of the text. Other bytes are another text.
    pub fn stored(&self) -> (&'static str, &'static [u8]) {
        (self.header, self.file)
    }
}

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// All compiled kernels, for every target. Empty where the build had neither prebuilt PTX nor nvcc; see [`origin`].
pub fn modules() -> &'static [Image] {
    MODULES
}

/// Where the PTX came from: `kernels/prebuilt`, `nvcc` and its version, or `none: ` and the reason.
pub fn origin() -> &'static str {
    ORIGIN
}
