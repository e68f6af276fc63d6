//! Errors on the control plane, classified by what the caller does next, and their gRPC form.

use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::field::FieldError;

/// What follows from an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Consequence {
    /// The caller's fault: the same request fails anywhere.
    Rejected,
    /// Not here, not now: nothing was done, retry elsewhere.
    Unavailable,
    /// Work was done and its state is gone: the sequence must be prefilled again.
    Lost,
}

/// Metadata key that carries the consequence where the code alone would not say it.
const METADATA_KEY: &str = "trireme-consequence";

impl Consequence {
    /// A status with this consequence's own code: `INVALID_ARGUMENT`, `UNAVAILABLE` or `ABORTED`.
    pub fn status(self, message: impl Into<String>) -> Status {
        let code = match self {
            Self::Rejected => Code::InvalidArgument,
            Self::Unavailable => Code::Unavailable,
            Self::Lost => Code::Aborted,
        };
        self.status_with_code(code, message)
    }

    /// A status with a code that says more, e.g. `RESOURCE_EXHAUSTED` for [`Consequence::Unavailable`].
    pub fn status_with_code(self, code: Code, message: impl Into<String>) -> Status {
        let mut status = Status::new(code, message);
        status.metadata_mut().insert(METADATA_KEY, MetadataValue::from_static(self.name()));
        status
    }

    /// What follows from `status`: what our own peers wrote into it, else what its code means when the
    /// transport made it. A stream that broke without saying why counts as [`Consequence::Lost`].
    pub fn of(status: &Status) -> Self {
        let stated = status.metadata().get(METADATA_KEY).and_then(|value| value.to_str().ok());
        match stated {
            Some("rejected") => return Self::Rejected,
            Some("unavailable") => return Self::Unavailable,
            Some("lost") => return Self::Lost,
            _ => {}
        }
        match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            // The deadline is the request's own: elsewhere it has passed as well.
            | Code::DeadlineExceeded => Self::Rejected,
            Code::Unavailable | Code::ResourceExhausted => Self::Unavailable,
            Code::Ok
            | Code::Aborted
            | Code::Cancelled
            | Code::DataLoss
            | Code::Internal
            | Code::Unknown => Self::Lost,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Unavailable => "unavailable",
            Self::Lost => "lost",
        }
    }
}

/// A field that cannot be accepted is the caller's fault.
impl From<FieldError> for Status {
    fn from(error: FieldError) -> Self {
        Consequence::Rejected.status(error.to_string())
    }
}

#[cfg(test)]
mod tests;
