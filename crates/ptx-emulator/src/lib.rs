//! Executes NVIDIA PTX on the CPU, with checks harsher than a GPU's and exact counters.
//!
//! Load a [`Module`], make a [`Gpu`], copy data, [`Gpu::launch`]. A kernel that does something wrong gives a [`Fault`]
//! that says what, in which line, block and thread; one that does nothing wrong gives [`Counters`].
//!
//! ```
//! use ptx_emulator::{Gpu, Launch, Module, Spec};
//!
//! let ptx = "
//!     .version 7.4
//!     .target sm_80
//!     .address_size 64
//!     .visible .entry double_it(.param .u64 x) {
//!         .reg .b32 %r<4>;
//!         .reg .b64 %rd<4>;
//!         ld.param.u64 %rd1, [x];
//!         mov.u32 %r1, %tid.x;
//!         mul.wide.u32 %rd2, %r1, 4;
//!         add.s64 %rd3, %rd1, %rd2;
//!         ld.global.u32 %r2, [%rd3];
//!         add.u32 %r3, %r2, %r2;
//!         st.global.u32 [%rd3], %r3;
//!         ret;
//!     }";
//! let module = Module::parse("example", ptx).unwrap();
//! let gpu = Gpu::new(Spec::a100());
//! let x = gpu.alloc(4 * 32, "x").unwrap();
//! let data: Vec<u8> = (0u32..32).flat_map(u32::to_le_bytes).collect();
//! gpu.write(x, &data).unwrap();
//! let counters = gpu.launch(&module, "double_it", &Launch::linear(1, 32), &[&x.to_le_bytes()]).unwrap();
//! assert_eq!(counters.global_loads.bytes, 128);
//! let mut out = [0; 4];
//! gpu.read(x + 4 * 7, &mut out).unwrap();
//! assert_eq!(u32::from_le_bytes(out), 14);
//! ```

mod counters;
mod exec;
mod fault;
mod gpu;
mod lower;
mod memory;
mod module;
mod ops;
mod parse;
mod program;
mod tensor_map;

pub use counters::{CLASSES, Class, Counters, Issued, SharedTraffic, Traffic};
pub use fault::{Fault, FaultKind, LoadError, MemoryError, Source};
pub use gpu::{Gpu, Launch, Spec};
pub use module::Module;
pub use program::{Entry, Param};
pub use tensor_map::{Swizzle, TensorMap};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
