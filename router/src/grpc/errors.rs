//! Our errors as gRPC's: code, message, and the consequence in the metadata.

use proto::control::Consequence;
use tonic::{Code, Status};

use crate::error::RequestError;

/// The status of an error.
pub(super) fn status(error: &RequestError) -> Status {
    let code = match error {
        RequestError::ModelNotFound { .. } | RequestError::NoSuchPath { .. } => Code::NotFound,
        RequestError::ContextLength { .. } => Code::OutOfRange,
        RequestError::Unauthorized => Code::Unauthenticated,
        RequestError::Overloaded { .. } | RequestError::BodyTooLarge { .. } => Code::ResourceExhausted,
        RequestError::Deadline { .. } => Code::DeadlineExceeded,
        RequestError::Cancelled => Code::Cancelled,
        RequestError::Internal => Code::Internal,
        RequestError::Worker { code: Code::ResourceExhausted, .. } => Code::ResourceExhausted,
        _ => match error.consequence() {
            Consequence::Rejected => Code::InvalidArgument,
            Consequence::Unavailable => Code::Unavailable,
            Consequence::Lost => Code::Aborted,
        },
    };
    error.consequence().status_with_code(code, error.to_string())
}
