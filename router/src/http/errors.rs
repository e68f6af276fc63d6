//! Our errors as OpenAI's: status, `{error: {message, type, param, code}}`, `Retry-After`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use proto::control::Consequence;
use proto::field::Problem;
use serde::Serialize;

use crate::error::{FieldProblem, RequestError};

/// An error on its way to an HTTP client.
#[derive(Debug)]
pub(super) struct ApiError(pub RequestError);

/// The body of an error, and the payload of an error event in a stream.
#[derive(Debug, Serialize)]
pub(super) struct ErrorBody {
    error: ErrorObject,
}

#[derive(Debug, Serialize)]
struct ErrorObject {
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ErrorBody {
    pub fn new(error: &RequestError) -> Self {
        let (_, r#type, code) = kind(error);
        let param = match error {
            RequestError::Field { field, .. } => Some(field.to_string()),
            RequestError::ModelNotFound { .. } => Some("model".to_owned()),
            RequestError::Template(_) => Some("messages".to_owned()),
            _ => None,
        };
        Self { error: ErrorObject { message: error.to_string(), r#type, param, code } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, ..) = kind(&self.0);
        let mut response = (status, Json(ErrorBody::new(&self.0))).into_response();
        let retry_after = match &self.0 {
            RequestError::Overloaded { retry_after } => Some(retry_after.as_secs().max(1)),
            error if error.consequence() == Consequence::Unavailable => Some(1),
            _ => None,
        };
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self.0, RequestError::BodyTooLarge { .. } | RequestError::BodyIncomplete) {
            // What may still be on its way is not the next request.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// Status, OpenAI's type, and code.
fn kind(error: &RequestError) -> (StatusCode, &'static str, Option<&'static str>) {
    const INVALID: &str = "invalid_request_error";
    const SERVER: &str = "server_error";
    match error {
        RequestError::BodyTooLarge { .. } => {
            (StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("request_too_large"))
        }
        RequestError::BodyIncomplete => (StatusCode::BAD_REQUEST, INVALID, Some("request_incomplete")),
        RequestError::NotUtf8 { .. } => (StatusCode::BAD_REQUEST, INVALID, Some("invalid_utf8")),
        RequestError::NotJson(_) => (StatusCode::BAD_REQUEST, INVALID, Some("invalid_json")),
        RequestError::Field { problem, .. } => (StatusCode::BAD_REQUEST, INVALID, Some(field_code(problem))),
        RequestError::ModelNotFound { .. } => (StatusCode::NOT_FOUND, INVALID, Some("model_not_found")),
        RequestError::ContextLength { .. } => {
            (StatusCode::BAD_REQUEST, INVALID, Some("context_length_exceeded"))
        }
        RequestError::Template(_) => (StatusCode::BAD_REQUEST, INVALID, Some("invalid_messages")),
        RequestError::Tokenizer(_) => (StatusCode::BAD_REQUEST, INVALID, Some("invalid_prompt")),
        RequestError::Unauthorized => {
            (StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"))
        }
        RequestError::NoSuchPath { .. } => (StatusCode::NOT_FOUND, INVALID, Some("unknown_url")),
        RequestError::MethodNotAllowed { .. } => {
            (StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed"))
        }
        RequestError::Overloaded { .. } => {
            (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("server_overloaded"))
        }
        RequestError::NoWorker(_) => (StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("no_worker")),
        RequestError::Draining => (StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("shutting_down")),
        RequestError::Deadline { .. } => (StatusCode::GATEWAY_TIMEOUT, SERVER, Some("deadline_exceeded")),
        RequestError::Worker { code: tonic::Code::ResourceExhausted, .. } => {
            (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("server_overloaded"))
        }
        RequestError::Worker { consequence, .. } => match consequence {
            // Our own checks let it pass and the worker's did not: the worker's word names the field.
            Consequence::Rejected => (StatusCode::BAD_REQUEST, INVALID, Some("rejected_by_worker")),
            Consequence::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("worker_unavailable")),
            Consequence::Lost => (StatusCode::BAD_GATEWAY, SERVER, Some("worker_lost")),
        },
        RequestError::WorkerGone { .. } => (StatusCode::BAD_GATEWAY, SERVER, Some("worker_lost")),
        RequestError::WorkerProtocol { .. } => (StatusCode::BAD_GATEWAY, SERVER, Some("worker_protocol")),
        // Nobody reads it; 499 is what proxies log for a client that went away.
        RequestError::Cancelled => {
            (StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST), INVALID, Some("cancelled"))
        }
        RequestError::Internal => (StatusCode::INTERNAL_SERVER_ERROR, SERVER, None),
    }
}

fn field_code(problem: &FieldProblem) -> &'static str {
    match problem {
        FieldProblem::Missing => "missing_required_parameter",
        FieldProblem::Type { .. } => "invalid_type",
        FieldProblem::Checked(Problem::Missing) => "missing_required_parameter",
        FieldProblem::OutOfRange { .. } | FieldProblem::Checked(_) | FieldProblem::Unplaceable(_) => {
            "invalid_value"
        }
        FieldProblem::Unknown => "unknown_parameter",
        FieldProblem::Unsupported(_) => "unsupported_parameter",
    }
}
