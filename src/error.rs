//! The one error type. Every message says which argument or tensor is wrong, what was wanted and what came.

use std::path::PathBuf;

use crate::adapter::MergeReport;

/// What every fallible call of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused. Nothing has been written when one of these comes back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument of a call does not fit the others, or the operation.
    #[error("{argument}: wanted {wanted}, got {got}")]
    Argument {
        /// The argument's name, as in the signature (`x`, `weight.absmax`, `adapter_index[3]`).
        argument: String,
        /// What the operation needs there.
        wanted: String,
        /// What came.
        got: String,
    },
    /// A merge into 4 bits that would lose its adapters.
    #[error(
        "{argument}: wanted a retained gain of at least {wanted}, got {report}; a merge into 16 bits keeps the adapters, \
         and so does a low-rank remainder beside the 4-bit weight; other scales and roundings may; and it can be forced"
    )]
    AdapterLost {
        /// The weight.
        argument: String,
        /// The least share of the delta that has to be left.
        wanted: f64,
        /// What would be left.
        report: MergeReport,
    },
    /// A file contradicts its format, or itself.
    #[error("{place}: wanted {wanted}, got {got}")]
    Format {
        /// File, tensor or JSON key.
        place: String,
        /// What the format needs there.
        wanted: String,
        /// What the file holds.
        got: String,
    },
    /// A file holds something that is known but not supported. Ignoring it would give wrong numbers.
    #[error("{place}: {what} is not supported")]
    Unsupported {
        /// File, tensor or JSON key.
        place: String,
        /// The feature.
        what: String,
    },
    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// There is no device to run on: no driver, no GPU, or one that is too old.
    #[error("no usable CUDA device: {reason}")]
    NoDevice {
        /// What was looked for and what was found.
        reason: String,
    },
    /// The driver or the emulator refused or failed an operation.
    #[error("{operation} failed: {reason}")]
    Device {
        /// The operation: a kernel's entry name, or a driver call.
        operation: String,
        /// The driver's code and text, or the emulator's fault.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Argument`].
    pub fn argument(argument: impl Into<String>, wanted: impl Into<String>, got: impl ToString) -> Self {
        Self::Argument { argument: argument.into(), wanted: wanted.into(), got: got.to_string() }
    }

    /// The same, of a part of `whole`: the argument `packed` becomes `weight.packed`. So that names are put together only when
    /// something is wrong: calls check a dozen of them per launch.
    pub(crate) fn within(self, whole: impl std::fmt::Display) -> Self {
        match self {
            Self::Argument { argument, wanted, got } => {
                Self::Argument { argument: format!("{whole}.{argument}"), wanted, got }
            }
            other => other,
        }
    }

    /// An [`Error::Format`].
    pub fn format(place: impl Into<String>, wanted: impl Into<String>, got: impl ToString) -> Self {
        Self::Format { place: place.into(), wanted: wanted.into(), got: got.to_string() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Unsupported { place: place.into(), what: what.into() }
    }
}
