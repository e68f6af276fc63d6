//! Why a request failed, classified by what happens next. `http/errors.rs` and `grpc/errors.rs` give it
//! to clients, each in its protocol's terms.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use proto::control::Consequence;
use proto::field::FieldError;

use crate::placement::PlacementError;
use crate::worker::WorkerKey;

/// Why the router did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting cannot be used.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// A port is taken or may not be bound.
    #[error("cannot listen on {address} for {door}")]
    Bind {
        /// `http`, `grpc` or `control`.
        door: &'static str,
        /// As configured.
        address: std::net::SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The identity's certificates cannot be used.
    #[error("the router's certificates cannot be used")]
    Identity(#[source] tonic::transport::Error),
    /// The descriptor set of the public service does not decode.
    #[error("the service descriptors cannot be served by reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
}

/// Why a request failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RequestError {
    /// The body is longer than the configuration allows.
    #[error("the request body is longer than {bytes_max} bytes")]
    BodyTooLarge {
        /// `body_bytes_max`.
        bytes_max: usize,
    },
    /// The connection broke before the body was complete.
    #[error("the request body could not be read to its end")]
    BodyIncomplete,
    /// The body is no UTF-8.
    #[error("the request body is not valid UTF-8 at byte {at}")]
    NotUtf8 {
        /// Offset of the first bad byte.
        at: usize,
    },
    /// The body is no JSON object.
    #[error("the request body is not a JSON object: {0}")]
    NotJson(#[source] Arc<serde_json::Error>),
    /// A field's value cannot be accepted.
    #[error("`{field}` {problem}")]
    Field {
        /// Path of the field as the client wrote it.
        field: Cow<'static, str>,
        /// What is wrong with it.
        problem: FieldProblem,
    },
    /// No model of this name is served here.
    #[error("the model `{model}` does not exist; this server has `{served}`")]
    ModelNotFound {
        /// As asked for.
        model: String,
        /// What there is.
        served: String,
    },
    /// Prompt and completion do not fit the context.
    #[error(
        "this model's context is {context_tokens_max} tokens; the request has {prompt_tokens} in the prompt \
         and asks for {completion_tokens} more"
    )]
    ContextLength {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for, at least 1.
        completion_tokens: usize,
        /// The model's context.
        context_tokens_max: usize,
    },
    /// The conversation cannot be rendered by the model's template.
    #[error("the chat template refuses these messages: {0}")]
    Template(#[source] Arc<model::ModelError>),
    /// The prompt cannot be made tokens of.
    #[error("the prompt cannot be tokenised: {0}")]
    Tokenizer(#[source] Arc<model::ModelError>),
    /// No or a wrong API key.
    #[error("a valid API key is required: `Authorization: Bearer …`")]
    Unauthorized,
    /// There is nothing at this path.
    #[error("there is nothing at {path}")]
    NoSuchPath {
        /// As asked for.
        path: String,
    },
    /// The path exists, the method does not.
    #[error("this path does not answer {method}")]
    MethodNotAllowed {
        /// As used.
        method: String,
    },
    /// Every place and every waiting place is taken.
    #[error("the server is at its limit of requests; retry after {} s", retry_after.as_secs())]
    Overloaded {
        /// When a place is likely to be free, whole seconds.
        retry_after: Duration,
    },
    /// No pair of workers can take the request.
    #[error("no workers can take the request now: {0}")]
    NoWorker(#[source] PlacementError),
    /// A worker answered with an error.
    #[error("worker {worker} failed the request: {message}")]
    Worker {
        /// Which worker.
        worker: WorkerKey,
        /// What follows.
        consequence: Consequence,
        /// The gRPC code it chose.
        code: tonic::Code,
        /// What it said.
        message: String,
    },
    /// A worker lost its lease, was replaced or left while it had the request.
    #[error("worker {worker} went away while it had the request")]
    WorkerGone {
        /// Which worker.
        worker: WorkerKey,
    },
    /// A worker broke the protocol.
    #[error("worker {worker} broke the protocol: {problem}")]
    WorkerProtocol {
        /// Which worker.
        worker: WorkerKey,
        /// What it did.
        problem: &'static str,
    },
    /// The request's deadline has passed.
    #[error("the request's deadline of {} ms has passed", deadline.as_millis())]
    Deadline {
        /// From receipt.
        deadline: Duration,
    },
    /// The client went away; nobody reads this.
    #[error("the client went away")]
    Cancelled,
    /// The router is shutting down.
    #[error("this server is shutting down")]
    Draining,
    /// A task of the router ended without an answer: a bug of ours.
    #[error("the request was dropped inside the server")]
    Internal,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FieldProblem {
    /// It must be given.
    #[error("is required")]
    Missing,
    /// It has another type.
    #[error("must be {expected}")]
    Type {
        /// The type it must have.
        expected: &'static str,
    },
    /// Its value lies outside what is allowed.
    #[error("is {value}, but {allowed}")]
    OutOfRange {
        /// As sent, shortened.
        value: String,
        /// What is accepted.
        allowed: String,
    },
    /// Nobody knows it.
    #[error("is not a field of this request")]
    Unknown,
    /// It has a meaning that this server cannot give it.
    #[error("is not supported: {0}")]
    Unsupported(&'static str),
    /// The checks that every process makes refused it.
    #[error(transparent)]
    Checked(#[from] proto::field::Problem),
    /// The sequence that it asks for fits nowhere.
    #[error("asks for too much: {0}")]
    Unplaceable(#[source] PlacementError),
}

impl RequestError {
    /// `field` has `problem`.
    pub(crate) fn field(field: impl Into<Cow<'static, str>>, problem: FieldProblem) -> Self {
        Self::Field { field: field.into(), problem }
    }

    /// `field` has a value outside of what is allowed.
    pub(crate) fn out_of_range(
        field: impl Into<Cow<'static, str>>,
        value: impl std::fmt::Display,
        allowed: impl Into<String>,
    ) -> Self {
        let value = value.to_string().chars().take(64).collect();
        Self::field(field, FieldProblem::OutOfRange { value, allowed: allowed.into() })
    }

    /// What the caller does next.
    pub fn consequence(&self) -> Consequence {
        match self {
            Self::Overloaded { .. } | Self::NoWorker(_) | Self::Draining => Consequence::Unavailable,
            Self::Worker { consequence, .. } => *consequence,
            Self::WorkerGone { .. } | Self::WorkerProtocol { .. } | Self::Internal => Consequence::Lost,
            _ => Consequence::Rejected,
        }
    }

    /// The label under which the metrics count it; a closed set.
    pub(crate) fn outcome(&self) -> &'static str {
        match self {
            Self::Overloaded { .. } => "overloaded",
            Self::Deadline { .. } => "deadline",
            Self::Unauthorized => "unauthorized",
            Self::Cancelled => "cancelled",
            _ => match self.consequence() {
                Consequence::Rejected => "rejected",
                Consequence::Unavailable => "unavailable",
                Consequence::Lost => "lost",
            },
        }
    }
}

impl From<FieldError> for RequestError {
    fn from(error: FieldError) -> Self {
        Self::Field { field: error.field, problem: error.problem.into() }
    }
}
