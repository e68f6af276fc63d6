//! The decode role: a sequence's KV to its remaining tokens.
//!
//! A request's way through here: `server` takes the call, `intake` queues it, `scheduler` gives it blocks for its prompt,
//! `intake` issues the ticket, the hand-off's bytes land through the receiver that `worker` polls, `scheduler` lets the
//! sequence into the running batch and gives it more blocks as it grows, `finish` says when it ends, and `outbox` carries its tokens back to the stream.
//!
//! Invariants:
//! - One thread owns engine, KV pool, scheduler, receiver and samplers. tokio is in `server`, `health`, `start` and
//!   the readers' half of `outbox` alone.
//! - Every sequence that is admitted can reach its worst case: none is evicted, none waits for a block that cannot come.
//!   No block changes hands before its ticket is dead.
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
mod speculation;
mod start;
mod worker;

pub use config::{Config, ConfigError};
pub use error::{Error, Failure, RETRY_AFTER_METADATA, Refusal};
pub use start::{Handle, Node, start};
