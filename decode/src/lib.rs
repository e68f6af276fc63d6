//! The decode role: a sequence's KV to its remaining tokens.
//!
//! A request's way through here: `server` takes the call, `intake` reserves blocks and issues the ticket, the
//! hand-off's bytes land through the receiver that `worker` polls, `scheduler` lets the sequence into the running
//! batch, `finish` says when it ends, and `outbox` carries its tokens back to the stream.
//!
//! Invariants:
//! - One thread owns engine, KV pool, scheduler, receiver and samplers. tokio is in `server`, `health`, `start` and
//!   the readers' half of `outbox` alone.
//! - A sequence is admitted with blocks for its whole life, and none of them changes hands before its ticket is dead.
//! - The device thread never waits for a reader; every queue to and from it is bounded.
//!
//! Deliberately absent: prefill (the KV always comes from elsewhere), text, retries, and how KV travels.

pub mod config;
pub mod error;
pub mod finish;
mod health;
mod intake;
mod metrics;
mod outbox;
pub mod scheduler;
mod server;
mod start;
mod worker;

pub use config::{Config, ConfigError};
pub use error::{Error, Failure, RETRY_AFTER_METADATA, Refusal};
pub use start::{Handle, Node, start};
