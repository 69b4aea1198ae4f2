//! Device memory that a caller lends to a call.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::Properties;
use crate::{Error, Result};

/// Names a device memory, so that a view of one device is not taken for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MemoryId(pub u64);

/// `len` elements of device memory to read.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    address: u64,
    len: usize,
    memory: MemoryId,
    borrow: PhantomData<&'a T>,
}

/// `len` elements of device memory to write (and read).
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    address: u64,
    len: usize,
    memory: MemoryId,
    borrow: PhantomData<&'a mut T>,
}

macro_rules! view {
    ($view:ident, $access:literal) => {
        impl<'a, T: Pod> $view<'a, T> {
            /// A view of raw device memory.
            ///
            /// # Safety
            #[doc = concat!("`address` is valid for ", $access, " of `len` elements on the device of `memory`,")]
            /// until the work enqueued during `'a` has completed.
            pub unsafe fn from_raw(address: u64, len: usize, memory: MemoryId) -> Self {
                Self { address, len, memory, borrow: PhantomData }
            }

            /// The device address.
            pub fn address(&self) -> u64 {
                self.address
            }

            /// How many elements there are.
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there are none.
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// The memory that the view lies in.
            pub fn memory(&self) -> MemoryId {
                self.memory
            }

            /// Checks that there are exactly `len` elements, aligned to `align` bytes, in the memory of `device`.
            ///
            /// # Errors
            /// [`Error::Argument`] naming `argument`.
            pub fn check(&self, argument: &str, len: usize, align: u64, device: &Properties) -> Result<()> {
                if self.len != len {
                    return Err(Error::argument(argument, format!("{len} elements"), self.len));
                }
                self.check_at_least(argument, len, align, device)
            }

            /// Checks that there are at least `len` elements, aligned to `align` bytes, in the memory of `device`.
            ///
            /// # Errors
            /// [`Error::Argument`] naming `argument`.
            pub fn check_at_least(&self, argument: &str, len: usize, align: u64, device: &Properties) -> Result<()> {
                if self.len < len {
                    return Err(Error::argument(argument, format!("at least {len} elements"), self.len));
                }
                if self.memory != device.memory {
                    return Err(Error::argument(argument, "memory of the queue's device", "another device's"));
                }
                if !self.is_empty() && !self.address.is_multiple_of(align) {
                    let got = format!("address {:#x}", self.address);
                    return Err(Error::argument(argument, format!("alignment to {align} bytes"), got));
                }
                Ok(())
            }
        }
    };
}

view!(View, "reads");
view!(ViewMut, "reads and writes");

impl<'a, T: Pod> ViewMut<'a, T> {
    /// The same memory, no longer to be written.
    pub fn into_view(self) -> View<'a, T> {
        View { address: self.address, len: self.len, memory: self.memory, borrow: PhantomData }
    }

    /// The same memory, to read, for as long as it is not written through this view.
    pub fn as_view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, memory: self.memory, borrow: PhantomData }
    }

    /// The same memory, lent on.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address, len: self.len, memory: self.memory, borrow: PhantomData }
    }
}
