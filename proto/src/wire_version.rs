//! The version two processes must share before anything else they say has a meaning.

use crate::field::FieldError;

/// Equal majors work together, others refuse each other.
pub const WIRE_MAJOR: u32 = 1;
/// Grows with every addition that older peers may ignore.
/// 1: hand-offs resume on another path.
pub const WIRE_MINOR: u32 = 1;

/// Accepts a peer that speaks our major version, whatever its minor.
///
/// # Errors
/// Names `wire_major`, theirs and ours.
pub fn check(peer_major: u32) -> Result<(), FieldError> {
    if peer_major == WIRE_MAJOR {
        return Ok(());
    }
    Err(FieldError::out_of_range(
        "wire_major",
        peer_major,
        format_args!("{WIRE_MAJOR}, which this process speaks"),
    ))
}
