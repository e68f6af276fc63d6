//! The prefill role: prompts to KV and a first token, chunk by chunk.
//!
//! A request's way through here: `server` takes the call, `intake` checks it against model and ticket,
//! `scheduler` queues it and gives it its share of each step, `worker` runs the steps, `handoff` pushes finished
//! layers to decode while the next ones run, and `outbox` carries the first token and the end back to the stream.
//!
//! Invariants:
//! - One thread owns engine, KV pool, scheduler and hand-offs. tokio is in `server`, `health` and `start` alone.
//! - Blocks are taken for a whole prompt and kept until its hand-off has ended, whichever way.
//! - The device thread waits for no peer and no reader; every queue to and from it is bounded.
//!
//! Deliberately absent: decode's part (whether the first token ends the sequence is judged there), text, retries, and
//! how KV travels.

pub mod config;
pub mod error;
pub mod handoff;
mod health;
mod intake;
mod metrics;
mod outbox;
mod prompt_logprobs;
pub mod scheduler;
mod server;
mod start;
mod worker;

pub use config::{Config, ConfigError};
pub use error::{Error, Failure, Refusal};
pub use start::{Handle, Node, start};
