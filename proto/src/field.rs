//! The error of every conversion from the wire: which field, and what is wrong with it.

use std::borrow::Cow;
use std::fmt::Display;

use model::ParamError;

/// A message that decodes but does not mean anything we accept. Always the sender's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct FieldError {
    /// Path of the field from the message's root, e.g. `stopping.max_tokens` or `prompt[17]`.
    pub field: Cow<'static, str>,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The field must be set and is not.
    #[error("is missing")]
    Missing,
    /// The value lies outside what is allowed.
    #[error("is {value}, must be {allowed}")]
    OutOfRange {
        /// The value as sent, shortened if long.
        value: String,
        /// What would have been accepted.
        allowed: String,
    },
    /// A list, string or map is longer than its bound.
    #[error("has {count} entries, at most {max} are allowed")]
    TooMany {
        /// Entries (bytes for strings) sent.
        count: usize,
        /// The bound.
        max: usize,
    },
}

impl FieldError {
    pub(crate) fn missing(field: impl Into<Cow<'static, str>>) -> Self {
        Self { field: field.into(), problem: Problem::Missing }
    }

    /// `value` is not what `allowed` says.
    pub fn out_of_range(
        field: impl Into<Cow<'static, str>>,
        value: impl Display,
        allowed: impl Display,
    ) -> Self {
        Self {
            field: field.into(),
            problem: Problem::OutOfRange { value: shorten(value.to_string()), allowed: allowed.to_string() },
        }
    }

    /// The same error one message further out: `prefix.field`.
    #[must_use]
    pub fn within(mut self, prefix: &str) -> Self {
        self.field = format!("{prefix}.{}", self.field).into();
        self
    }
}

/// Sampling and stopping parameters check their own ranges, in `model`.
impl From<ParamError> for FieldError {
    fn from(error: ParamError) -> Self {
        Self::out_of_range(error.field, error.value, error.requirement)
    }
}

/// Checks `count <= max` for the entries of `field`.
pub(crate) fn at_most(field: &'static str, count: usize, max: usize) -> Result<(), FieldError> {
    if count <= max {
        return Ok(());
    }
    Err(FieldError { field: field.into(), problem: Problem::TooMany { count, max } })
}

/// Checks that a name is neither empty nor longer than `max` bytes.
pub(crate) fn name(field: &'static str, value: &str, max: usize) -> Result<(), FieldError> {
    if value.is_empty() {
        return Err(FieldError::missing(field));
    }
    at_most(field, value.len(), max)
}

/// A hostile value must not fill a log line: keeps the first 64 characters.
fn shorten(value: String) -> String {
    const CHARACTERS_MAX: usize = 64;
    match value.char_indices().nth(CHARACTERS_MAX) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value,
    }
}
