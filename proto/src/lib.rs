//! What two processes must agree on: protobuf files, generated code, domain types and their conversions.
//!
//! The `.proto` files under `trireme/v1` are the contract; [`v1`] is their generated form. A message off
//! the wire is only bytes with a shape: the modules here turn it into a domain type and check every bound
//! on the way, with an error that names the field. Nothing behind a conversion checks again, and nothing
//! in front of one trusts.
//!
//! Deliberately not here: the fabric's own framing, and policy (who places, retries, admits) but for the order in which
//! tenants are served, which is the same on every tier or worth nothing.

pub mod control;
pub mod field;
pub mod fingerprint;
pub mod membership;
pub mod pace;
pub mod security;
pub mod sequence;
pub mod setting;
pub mod share;
pub mod ticket;
pub mod trace;
pub mod wire_version;

pub use wire_version::{WIRE_MAJOR, WIRE_MINOR};

/// Messages, clients and servers of package `trireme.v1`, generated from `trireme/v1/*.proto`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    include!("generated/trireme.v1.rs");
}

/// The encoded `FileDescriptorSet` of package `trireme.v1`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptor.bin");
