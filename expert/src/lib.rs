//! Physical experts and their computation; the dispatch/combine client; placement and its balancer.
//!
//! Two halves meet over the fabric. [`RemoteExperts`] stands in an engine where `engine::LocalExperts`
//! would and gives the same bits; a worker made by [`start`] computes what it is sent. Both read one
//! [`Placement`], and every dispatch is stamped with its version.
//!
//! Deliberately absent: router weights (the source multiplies and sums), the shared expert (it runs at
//! the source), and any state of a request.

mod config;
mod dispatch;
mod metrics;
mod placement;
mod server;
mod start;
mod wire;
mod worker;

pub use config::{Config, ConfigError};
pub use dispatch::{DispatchCounters, RemoteExperts, RemoteOptions};
pub use placement::{Placement, PlacementError, WORKERS_MAX, moe_layers};
pub use start::{Error, Handle, Node, start};
pub use wire::WireFormats;
