//! The device that tests and tools run kernels on.
