//! Hop 12: a session's events as server-sent events, ending with `[DONE]`. An error in mid-stream is one
//! event with OpenAI's error object, and the end: without `[DONE]`, so that nobody takes the answer for whole.

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream;
use serde::Serialize;
use tracing::{Instrument, Span, info_span};

use super::errors::ErrorBody;
use super::openai::Encode;
use crate::error::RequestError;
use crate::session::{Event, Session};

const DONE: &[u8] = b"data: [DONE]\n\n";

/// A streamed answer. Dropping its body drops the session.
pub(super) fn respond(session: Session, first: Event, encoder: impl Encode) -> Response {
    // A child of the request's span; its own request id is in the parent's fields.
    let span = info_span!("sse", hop = 12, request_id = %session.request_id);
    let state = Streaming { session, next: Some(first), encoder, span };
    let body = Body::from_stream(stream::unfold(state, |mut state| async move {
        let span = state.span.clone();
        let bytes = state.bytes().instrument(span).await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), state))
    }));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Proxies of nginx's kind would collect tokens otherwise.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}

struct Streaming<E> {
    session: Session,
    next: Option<Event>,
    encoder: E,
    span: Span,
}

impl<E: Encode> Streaming<E> {
    /// The next bytes; `None` at the end.
    async fn bytes(&mut self) -> Option<Bytes> {
        loop {
            let event = match self.next.take() {
                Some(event) => Ok(event),
                None => self.session.next().await?,
            };
            if let Some(bytes) = self.encode(event) {
                return Some(bytes);
            }
        }
    }

    fn encode(&mut self, event: Result<Event, RequestError>) -> Option<Bytes> {
        match event {
            Ok(Event::Delta(delta)) => self.encoder.delta(delta).map(|chunk| frame(&chunk)),
            Ok(Event::Done(usage)) => {
                let mut last = BytesMut::new();
                if let Some(chunk) = self.encoder.usage(&usage) {
                    last.extend_from_slice(&frame(&chunk));
                }
                last.extend_from_slice(DONE);
                Some(last.freeze())
            }
            Err(error) => Some(frame(&ErrorBody::new(&error))),
        }
    }
}

/// One event. JSON has no bare line breaks, so a single `data:` line holds it.
fn frame(payload: &impl Serialize) -> Bytes {
    let mut frame = BytesMut::with_capacity(256).writer();
    frame.get_mut().extend_from_slice(b"data: ");
    // Writing to memory does not fail, and our own shapes have string keys only.
    let _ = serde_json::to_writer(&mut frame, payload);
    frame.get_mut().extend_from_slice(b"\n\n");
    frame.into_inner().freeze()
}

#[cfg(test)]
mod tests;
