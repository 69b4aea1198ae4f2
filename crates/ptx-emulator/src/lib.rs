//! Executes NVIDIA PTX on the CPU.
