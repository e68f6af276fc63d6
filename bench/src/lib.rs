//! Everything that measures or predicts, as `trireme bench …`.

pub mod client;
pub mod sse;
