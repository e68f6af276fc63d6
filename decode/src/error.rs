//! What can go wrong on a decode worker, by when it goes wrong, and its one mapping to gRPC.
//!
//! [`Error`] keeps the worker from starting, a [`Refusal`] keeps a request from becoming a sequence, a [`Failure`] ends
//! a sequence that was admitted. Only the last one finds blocks to give back.

use std::sync::Arc;
use std::time::Duration;

use proto::control::Consequence;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::config::ConfigError;

/// Metadata key, in milliseconds, of a status that says when to come back.
pub const RETRY_AFTER_METADATA: &str = "retry-after-ms";

/// Why a decode worker did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is out of its range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The gRPC service's address cannot be had.
    #[error("decode cannot listen on {address}")]
    Bind {
        /// The configured address.
        address: std::net::SocketAddr,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The node's certificates do not make a TLS server.
    #[error("decode cannot set up mutual TLS")]
    Tls(#[source] tonic::transport::Error),
    /// The device thread cannot be started.
    #[error("decode cannot start its device thread")]
    Thread(#[source] std::io::Error),
}

/// Why a request did not become a sequence. Nothing is held for it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// A field of the request is malformed, or its fingerprint is another one.
    #[error(transparent)]
    Field(#[from] proto::field::FieldError),
    /// More KV than this worker has when it is empty.
    #[error("prompt and max_tokens need {blocks} KV blocks, this worker has {blocks_max} in all")]
    NeverFits {
        /// Blocks for prompt and completion.
        blocks: usize,
        /// Blocks in the pool.
        blocks_max: usize,
    },
    /// As many sequences wait for KV blocks as may.
    #[error("no room: {queued} sequences wait for KV blocks already, {blocks_free} blocks are free")]
    NoRoom {
        /// Sequences that wait.
        queued: usize,
        /// Blocks free now.
        blocks_free: usize,
        /// When a running sequence is expected to leave.
        retry_after: Duration,
    },
    /// The device thread has as many submissions before it as it may.
    #[error("the queue of submissions is full")]
    QueueFull,
    /// The hand-off has no ticket to give.
    #[error("no ticket can be issued")]
    Ticket(#[source] Arc<kvtransfer::TransferError>),
    /// The request's deadline passed before it was looked at.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// The worker is shutting down.
    #[error("this worker is draining")]
    Draining,
}

/// Why a sequence ended without finishing. Its blocks are free by the time its stream says so.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// Its stream was dropped: nobody is left to tell.
    #[error("cancelled")]
    Cancelled,
    /// Its deadline passed.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// No KV arrived for as long as the lease.
    #[error("the KV hand-off's lease ran out")]
    LeaseExpired,
    /// The prefill worker gave the hand-off up, or broke its rules.
    #[error("the KV hand-off ended without a commit: {0}")]
    HandoffAborted(Arc<str>),
    /// Its stream took nothing for too long.
    #[error("the stream was not read for {} ms", .0.as_millis())]
    ReaderStalled(Duration),
    /// A step found no experts. Everything that the step ran ends with it.
    #[error("a decode step failed")]
    Step(#[source] Arc<engine::StepError>),
    /// The worker stops.
    #[error("this worker is stopping")]
    Stopping,
}

impl Refusal {
    /// The label under which it is counted.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Field(_) => "field",
            Self::NeverFits { .. } => "never_fits",
            Self::NoRoom { .. } => "no_room",
            Self::QueueFull => "queue",
            Self::Ticket(_) => "ticket",
            Self::DeadlineExceeded => "deadline",
            Self::Draining => "draining",
        }
    }
}

impl Failure {
    /// The label under which it is counted.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::DeadlineExceeded => "deadline",
            Self::LeaseExpired => "lease",
            Self::HandoffAborted(_) => "handoff",
            Self::ReaderStalled(_) => "reader",
            Self::Step(_) => "step",
            Self::Stopping => "stopping",
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = with_sources(&refusal);
        match refusal {
            Refusal::Field(_) => Consequence::Rejected.status(message),
            // Another worker may have a larger pool, so this is not the caller's fault everywhere; but waiting is vain.
            Refusal::NeverFits { .. } => {
                Consequence::Unavailable.status_with_code(Code::ResourceExhausted, message)
            }
            Refusal::NoRoom { retry_after, .. } => {
                let mut status = Consequence::Unavailable.status_with_code(Code::ResourceExhausted, message);
                let retry_ms = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX);
                status.metadata_mut().insert(RETRY_AFTER_METADATA, MetadataValue::from(retry_ms));
                status
            }
            Refusal::QueueFull | Refusal::Ticket(_) => {
                Consequence::Unavailable.status_with_code(Code::ResourceExhausted, message)
            }
            Refusal::DeadlineExceeded => {
                Consequence::Rejected.status_with_code(Code::DeadlineExceeded, message)
            }
            Refusal::Draining => Consequence::Unavailable.status(message),
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let message = with_sources(&failure);
        match failure {
            Failure::Cancelled => Consequence::Rejected.status_with_code(Code::Cancelled, message),
            Failure::DeadlineExceeded => {
                Consequence::Rejected.status_with_code(Code::DeadlineExceeded, message)
            }
            Failure::ReaderStalled(_) => Consequence::Rejected.status_with_code(Code::Aborted, message),
            Failure::LeaseExpired | Failure::HandoffAborted(_) => Consequence::Lost.status(message),
            // The KV up to here is gone with the sequence; the code says that another attempt may work.
            Failure::Step(_) | Failure::Stopping => {
                Consequence::Lost.status_with_code(Code::Unavailable, message)
            }
        }
    }
}

/// An error and what caused it on one line: a status has no chain.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message.push_str(": ");
        message.push_str(&error.to_string());
        source = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_what_to_do_next() {
        let check = |status: Status, code: Code, consequence: Consequence| {
            assert_eq!((status.code(), Consequence::of(&status)), (code, consequence), "{status:?}");
        };
        let no_room = Refusal::NoRoom { queued: 3, blocks_free: 1, retry_after: Duration::from_millis(120) };
        let status = Status::from(no_room);
        assert_eq!(status.metadata().get(RETRY_AFTER_METADATA).unwrap(), "120");
        check(status, Code::ResourceExhausted, Consequence::Unavailable);
        check(Refusal::Draining.into(), Code::Unavailable, Consequence::Unavailable);
        check(Refusal::DeadlineExceeded.into(), Code::DeadlineExceeded, Consequence::Rejected);
        check(Failure::LeaseExpired.into(), Code::Aborted, Consequence::Lost);
        check(Failure::Stopping.into(), Code::Unavailable, Consequence::Lost);
        check(Failure::Cancelled.into(), Code::Cancelled, Consequence::Rejected);
    }
}
