//! Reads a request's body within its bound.
//!
//! A body that is too long is read on and thrown away for a while before the 413 goes out: a client that
//! is still sending when the connection closes would see a reset instead of the answer.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;

use crate::error::RequestError;

/// A body must have arrived after this time, however slow the client.
const READ_TIME_MAX: Duration = Duration::from_secs(60);
/// How much of a body that is too long is read before the connection is closed on its sender.
const DISCARDED_BYTES_MAX: usize = 256 << 20;

/// Reads the whole body.
///
/// # Errors
/// [`RequestError::BodyTooLarge`], or [`RequestError::BodyIncomplete`] when it breaks off or takes too long.
pub(super) async fn read(headers: &HeaderMap, body: Body, bytes_max: usize) -> Result<Bytes, RequestError> {
    let read = read_within(headers, body, bytes_max);
    tokio::time::timeout(READ_TIME_MAX, read).await.unwrap_or(Err(RequestError::BodyIncomplete))
}

async fn read_within(headers: &HeaderMap, body: Body, bytes_max: usize) -> Result<Bytes, RequestError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|length| length.parse::<usize>().ok());
    let too_large = RequestError::BodyTooLarge { bytes_max };
    // This client has sent nothing yet and asks first.
    let asks_first = headers.contains_key(header::EXPECT);
    if announced.is_some_and(|length| length > bytes_max) && asks_first {
        return Err(too_large);
    }
    let mut chunks = body.into_data_stream();
    let mut kept = BytesMut::with_capacity(announced.unwrap_or(0).min(bytes_max));
    let mut received = 0_usize;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| RequestError::BodyIncomplete)?;
        received = received.saturating_add(chunk.len());
        if received <= bytes_max {
            kept.extend_from_slice(&chunk);
        } else {
            kept = BytesMut::new();
            if received > bytes_max.saturating_add(DISCARDED_BYTES_MAX) {
                break;
            }
        }
    }
    match received <= bytes_max {
        true => Ok(kept.freeze()),
        false => Err(too_large),
    }
}
