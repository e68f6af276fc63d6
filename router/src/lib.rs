//! HTTP and gRPC in, tokens out.
//!
//! A request's way through this crate, one file per hop: `http/openai.rs` or `grpc.rs` parse it into a
//! `Generate`; `admission.rs` tokenises and admits it; `placement/` chooses its workers; `session.rs` owns
//! it until its last token; `http/sse.rs` streams it back. `registry.rs` knows which workers live.
//!
//! Invariants: every queue has its bound in [`Config`]; a client that goes away cancels on both tiers; an
//! error is classified where it enters ([`RequestError`]) and worded for a protocol in one file per door.
//!
//! Deliberately not here: model arithmetic, KV blocks, the fabric. The router moves token ids.

mod admission;
mod config;
mod connections;
mod detokenise;
mod error;
mod generate;
mod grpc;
mod http;
mod metrics;
mod placement;
mod reasoning;
mod registry;
mod served_model;
mod server;
mod service;
mod session;
mod stop;
mod worker;

pub use admission::{door, estimate};
pub use config::{CHOICES_MAX, Config, ConfigError};
pub use error::{FieldProblem, RequestError, StartError};
pub use placement::disaggregation::{self, PrefillOnDecode};
pub use placement::{Disagreement, PlacementError};
pub use served_model::ServedModel;
pub use server::{Handle, Node, start};
pub use worker::WorkerKey;
