//! Memory and operators on a device; all unsafe arithmetic ends here.
//!
//! The crate knows no model: shapes, formats and rules come in as values. Two invariants hold for every operator of
//! every back end:
//!
//! * **Row invariance.** The bits of a result for one row depend on that row's inputs alone: the sequence of float
//!   operations behind an output element is fixed by the reduction length, never by how many rows share the call,
//!   where in a tile the element falls, or how many threads there are.
//! * **One truth.** [`mod@reference`] says in plain scalar code what each operator means; every instruction set is held
//!   to it by tests within a stated tolerance. Two instruction sets may differ in bits, therefore the execution
//!   fingerprint names the one in use.
#![allow(unsafe_code)] // SIMD intrinsics, the thread pool's erased closure, the CUDA driver; each block argues its safety.

mod activations;
mod aligned;
mod arena;
pub mod cpu;
pub mod cuda;
pub mod fp8;
mod kv;
mod matrix;
mod panels;
pub mod reference;
mod rope;
mod routing;

#[cfg(test)]
mod samples;

pub use activations::{ActivationFormat, Activations, WireError};
pub use arena::Arena;
pub use cpu::{
    Cpu, GUMBEL_TOKENS, GumbelKey, InputRows, Isa, LinearJob, ThreadPool, WEIGHT_BLOCK, WeightBlock,
};
pub use fp8::ScaleFormat;
pub use kv::{KvFormat, KvGeometry, KvSlot, KvView, KvViewMut, MlaRow, MlaShape};
pub use matrix::{HeadMatrices, Matrix, MatrixError, WeightFormat};
pub use rope::{RopeRows, RopeTable};
pub use routing::{RoutingRule, Scoring, Selection};
