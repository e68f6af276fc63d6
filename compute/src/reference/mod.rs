//! Scalar truth: what each operator means, in plain loops over f64.
//!
//! Nothing here is fast and nothing here is used to serve. Sums run in f64, so that a kernel's distance from these is
//! the kernel's own error.

mod attention;
mod elementwise;
mod linear;
mod route;

pub use attention::{decode_row, mla_attention};
pub use elementwise::{rms_norm, rope_interleaved, silu_mul};
pub use linear::{head_matmul, linear};
pub use route::route;
