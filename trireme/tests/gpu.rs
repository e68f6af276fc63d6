//! Every test that runs on a GPU, as one program: what a machine with neither Rust nor a network gets.
//!
//! The tests live with what they test, and run there; this only links them once instead of ten times, to a sixth of the
//! bytes. Nothing else builds it (`test = false`): `compute/scripts/gpu_check.sh pack` does.

#![allow(clippy::duplicate_mod)] // each test file has its own support, as when it is a program of its own

#[path = "../../compute/tests/cuda/main.rs"]
mod operators;

#[path = "../../engine/tests/cuda.rs"]
mod engine_cuda;
#[path = "../../engine/tests/fp8_quality.rs"]
mod engine_fp8_quality;
#[path = "../../engine/tests/golden.rs"]
mod engine_golden;
#[path = "../../engine/tests/invariance.rs"]
mod engine_invariance;
#[path = "../../engine/tests/mtp.rs"]
mod engine_mtp;
#[path = "../../engine/tests/tiny.rs"]
mod engine_tiny;

#[path = "../../expert/tests/same_bits.rs"]
mod expert_same_bits;

#[path = "matrix.rs"]
mod cluster_matrix;
