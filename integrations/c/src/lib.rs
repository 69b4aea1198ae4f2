//! The C interface: `include/lora_kernels.h`, `liblora_kernels_c.so` and `.a`.
//!
//! * Every call that can fail gives an [`LkStatus`]; [`lk_last_error`] has the message, which names the argument, what was wanted
//!   and what came. Nothing is written when a call fails, and no panic leaves the library.
//! * Handles are opaque, are made by `lk_*_new` and its like, and are freed once by `lk_*_free`, which takes NULL too. They may be
//!   used from any thread, by any number at a time.
//! * Matrices are row-major, without gaps. Sizes count elements, unless a name says bytes.
//! * What begins with `lk_cuda` enqueues work on a CUDA stream and does not wait for it: device addresses are numbers
//!   (`uint64_t`, as `CUdeviceptr`), and the memory has to live until the stream has done the work.
//!
//! The interface of one [`LK_ABI_VERSION`] only grows: functions, and values of constants, stay what they are.

mod cpu;
mod cuda;
mod memory;

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use lora_kernels::{DType, Error, Result};

pub use cpu::*;
pub use cuda::*;

/// The version of this interface.
pub const LK_ABI_VERSION: u32 = 1;

/// A type of elements: `LK_F32`, `LK_F16` or `LK_BF16`.
pub type LkDType = u32;
/// IEEE binary32.
pub const LK_F32: LkDType = 0;
/// IEEE binary16.
pub const LK_F16: LkDType = 1;
/// bfloat16.
pub const LK_BF16: LkDType = 2;

/// What became of a call.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LkStatus {
    /// It did what it says.
    Ok = 0,
    /// An argument does not fit the others, or the operation.
    Argument = 1,
    /// There is no GPU, no driver, or one that is too old.
    NoDevice = 2,
    /// The driver refused or failed an operation.
    Device = 3,
    /// Any other failure; the message says which.
    Failed = 4,
    /// A mistake in the library itself. Please report it.
    Panic = 5,
}

/// The `LK_ABI_VERSION` of the library, to be compared with that of the header.
#[unsafe(no_mangle)]
pub extern "C" fn lk_abi_version() -> u32 {
    LK_ABI_VERSION
}

/// The version of the library, as text; it lives for ever.
#[unsafe(no_mangle)]
pub extern "C" fn lk_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("a version has no zero inside"),
        };
    VERSION.as_ptr()
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// The message of the last call on this thread that failed, in UTF-8; empty before any did. It lives until the next call on
/// this thread fails.
#[unsafe(no_mangle)]
pub extern "C" fn lk_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|message| message.as_ptr())
}

/// Runs a call, and keeps its error for [`lk_last_error`].
fn call(body: impl FnOnce() -> Result<()>) -> LkStatus {
    let (status, message) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return LkStatus::Ok,
        Ok(Err(error)) => (status(&error), error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            (LkStatus::Panic, format!("a mistake in lora-kernels: {text}"))
        }
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.set(message);
    status
}

fn status(error: &Error) -> LkStatus {
    match error {
        Error::Argument { .. } => LkStatus::Argument,
        Error::NoDevice { .. } => LkStatus::NoDevice,
        Error::Device { .. } => LkStatus::Device,
        _ => LkStatus::Failed,
    }
}

fn dtype(argument: &str, dtype: LkDType) -> Result<DType> {
    match dtype {
        LK_F32 => Ok(DType::F32),
        LK_F16 => Ok(DType::F16),
        LK_BF16 => Ok(DType::BF16),
        other => Err(Error::argument(argument, "LK_F32, LK_F16 or LK_BF16", other)),
    }
}

/// Runs `$body` with `$type` as the type that `$dtype` names.
macro_rules! with_type {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            ::lora_kernels::DType::F32 => {
                type $type = f32;
                $body
            }
            ::lora_kernels::DType::F16 => {
                type $type = ::half::f16;
                $body
            }
            ::lora_kernels::DType::BF16 => {
                type $type = ::half::bf16;
                $body
            }
        }
    };
}

use with_type;

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        // SAFETY: the message lives until the next failure.
        unsafe { CStr::from_ptr(lk_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn panics_and_errors_become_a_status_and_a_message_of_this_thread() {
        assert_eq!(message(), "");
        assert_eq!(call(|| panic!("seven {}", 7)), LkStatus::Panic);
        assert_eq!(message(), "a mistake in lora-kernels: seven 7");
        assert_eq!(call(|| Err(Error::argument("x", "a\0b", 3))), LkStatus::Argument);
        assert_eq!(message(), "x: wanted a b, got 3");
        assert_eq!(call(|| Ok(())), LkStatus::Ok);
        assert_eq!(message(), "x: wanted a b, got 3");
        assert_eq!(std::thread::spawn(message).join().unwrap(), "");
        assert_eq!(call(|| Err(Error::NoDevice { reason: String::new() })), LkStatus::NoDevice);
        assert_eq!(call(|| Err(Error::unsupported("a", "b"))), LkStatus::Failed);
        assert_eq!(message(), "a: b is not supported");
    }
}
