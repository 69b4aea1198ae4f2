//! Low-rank adapters on dense and NF4 weights.
