//! What can go wrong on a prefill worker, by when it goes wrong, and its one mapping to gRPC.
//!
//! [`Error`] keeps the worker from starting, a [`Refusal`] keeps a request out of the queue, a [`Failure`] ends one
//! that was queued. Only the last one finds blocks to give back.

use std::net::SocketAddr;
use std::sync::Arc;

use engine::StepError;
use kvtransfer::TransferError;
use proto::control::Consequence;
use proto::field::FieldError;
use tonic::{Code, Status};

use crate::config::ConfigError;
use crate::scheduler;

/// Why a prefill worker did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is out of its range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The gRPC service's address cannot be had.
    #[error("prefill cannot listen on {address}")]
    Bind {
        /// The configured address.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The node's certificates do not make a TLS server.
    #[error("prefill cannot set up mutual TLS")]
    Tls(#[source] tonic::transport::Error),
    /// The device thread cannot be started.
    #[error("prefill cannot start its device thread")]
    Thread(#[source] std::io::Error),
}

/// Why a request was not queued. Nothing is held for it.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A field of request or ticket is malformed, or its fingerprint is another one.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The ticket does not fit the prompt or this worker's KV layout.
    #[error("ticket.{field} is {found}, expected {expected}")]
    Ticket {
        /// Field of the ticket.
        field: &'static str,
        /// As sent.
        found: u64,
        /// What prompt and layout ask for.
        expected: u64,
    },
    /// The queue has no room, or never will.
    #[error(transparent)]
    Queue(#[from] scheduler::Refusal),
    /// The device thread has as many submissions before it as it may.
    #[error("the queue of submissions is full")]
    SubmissionsFull,
    /// The decode worker of the ticket cannot be reached, or no more transfers fit.
    #[error("the hand-off cannot begin")]
    Transfer(#[source] TransferError),
    /// The request's deadline passed before it was looked at.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// The worker is shutting down.
    #[error("this worker is draining")]
    Draining,
}

/// Why a queued request ended without its hand-off. Its blocks are free by the time its stream says so.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// Its deadline passed.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// A step gave no result, most likely for want of experts. Everything that the step ran ends with it.
    #[error("a prefill step failed")]
    Step(#[source] Arc<StepError>),
    /// The decode worker did not accept the blocks.
    #[error("the decode worker refused the hand-off: {detail}")]
    HandoffRefused {
        /// Its words.
        detail: String,
    },
    /// The decode worker went away.
    #[error("the connection to the decode worker was lost")]
    HandoffLost,
    /// The worker stops.
    #[error("this worker is stopping")]
    Stopping,
}

impl Refusal {
    /// The label under which it is counted.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Field(_) => "field",
            Self::Ticket { .. } => "ticket",
            Self::Queue(_) | Self::SubmissionsFull => "queue",
            Self::Transfer(_) => "transfer",
            Self::DeadlineExceeded => "deadline",
            Self::Draining => "draining",
        }
    }
}

impl Failure {
    /// The label under which it is counted.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::DeadlineExceeded => "deadline",
            Self::Step(_) => "step",
            Self::HandoffRefused { .. } => "handoff_refused",
            Self::HandoffLost => "handoff_lost",
            Self::Stopping => "stopping",
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = with_sources(&refusal);
        let exhausted = Code::ResourceExhausted;
        match refusal {
            Refusal::Field(_) | Refusal::Ticket { .. } | Refusal::Queue(scheduler::Refusal::Empty) => {
                Consequence::Rejected.status(message)
            }
            // Another worker may have a larger pool or a shorter queue.
            Refusal::Queue(_) | Refusal::SubmissionsFull => {
                Consequence::Unavailable.status_with_code(exhausted, message)
            }
            Refusal::DeadlineExceeded => {
                Consequence::Rejected.status_with_code(Code::DeadlineExceeded, message)
            }
            Refusal::Transfer(_) | Refusal::Draining => Consequence::Unavailable.status(message),
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let message = with_sources(&failure);
        match failure {
            Failure::DeadlineExceeded => {
                Consequence::Rejected.status_with_code(Code::DeadlineExceeded, message)
            }
            // Nothing has left this worker that anybody builds on.
            Failure::Step(_) | Failure::Stopping => Consequence::Unavailable.status(message),
            Failure::HandoffRefused { .. } | Failure::HandoffLost => Consequence::Lost.status(message),
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
        let queue = |refusal| Status::from(Refusal::Queue(refusal));
        let full = queue(scheduler::Refusal::QueueRequests { waiting: 3 });
        check(full, Code::ResourceExhausted, Consequence::Unavailable);
        check(queue(scheduler::Refusal::Empty), Code::InvalidArgument, Consequence::Rejected);
        check(Refusal::Draining.into(), Code::Unavailable, Consequence::Unavailable);
        let ticket = Refusal::Ticket { field: "layers", found: 3, expected: 4 };
        check(ticket.into(), Code::InvalidArgument, Consequence::Rejected);
        check(Failure::DeadlineExceeded.into(), Code::DeadlineExceeded, Consequence::Rejected);
        check(Failure::HandoffLost.into(), Code::Aborted, Consequence::Lost);
        check(Failure::Stopping.into(), Code::Unavailable, Consequence::Unavailable);
    }

    #[test]
    fn a_status_keeps_the_chain_of_causes() {
        let experts = engine::ExpertsError::Unavailable { worker: "expert-1".into(), detail: "gone".into() };
        let status = Status::from(Failure::Step(Arc::new(StepError::Experts(experts))));
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains("expert-1"), "{}", status.message());
    }
}
