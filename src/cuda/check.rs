//! Checks that all plans share.

use super::Kernel;
use crate::{Error, Result};

/// A size that kernels hold in 32 bits, with room to step over it.
pub(super) fn dimension(argument: &str, size: usize) -> Result<u32> {
    match i32::try_from(size) {
        Ok(size) => Ok(size as u32),
        Err(_) => Err(Error::argument(argument, format!("at most {}", i32::MAX), size)),
    }
}

/// The number of blocks of a grid's first dimension.
pub(super) fn blocks(argument: &str, count: u64) -> Result<u32> {
    match i32::try_from(count) {
        Ok(count) => Ok(count as u32),
        Err(_) => Err(Error::argument(argument, format!("a grid of at most {} blocks", i32::MAX), count)),
    }
}

/// The kernel of `table` with this entry.
pub(super) fn find(table: &[Kernel], entry: &str) -> Kernel {
    let found = table.iter().find(|kernel| kernel.entry == entry);
    *found.unwrap_or_else(|| panic!("{entry} is not in its module's table of kernels"))
}

/// Lets a plan be read as its details. It cannot be changed: the launch relies on it.
macro_rules! read_only {
    ($plan:ident, $details:ident) => {
        impl std::ops::Deref for $plan {
            type Target = $details;

            fn deref(&self) -> &$details {
                &self.0
            }
        }
    };
}
pub(super) use read_only;
