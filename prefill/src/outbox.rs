//! One request's events on their way from the device thread to its stream, and the way back: a dropped stream is the
//! cancel.
//!
//! A request has at most three events (queued, first token, end), so the queue never fills and the device
//! thread never waits for a reader. There is no cancel message that could be lost or overtake its request: the device
//! thread asks [`Outbox::is_abandoned`], and the dropped [`Inbox`] rings the doorbell so that it asks at once.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use proto::v1::GeneratedToken;
use tokio::sync::mpsc;
use tokio_stream::Stream;

use crate::error::{Failure, Refusal};

/// Queued, first token, end.
const EVENTS_MAX: usize = 3;

/// What a stream is told, in this order: queued, a first token, and one end; or a refusal alone.
#[derive(Debug)]
pub(crate) enum RequestEvent {
    /// It waits for its first chunk.
    Queued,
    /// The prompt is computed. `queue`: from arrival to the first chunk; `compute`: from there to the token;
    /// `cached_tokens`: how many of the prompt's were found instead of computed; `prompt`: log-probabilities of the
    /// prompt's tokens behind its first, where they were asked for.
    FirstToken {
        token: GeneratedToken,
        prompt: Vec<GeneratedToken>,
        queue: Duration,
        compute: Duration,
        cached_tokens: usize,
    },
    /// Every block is committed on decode; nothing follows. `handoff`: since the first token.
    Done { handoff: Duration },
    /// Never queued; nothing follows.
    Refused(Refusal),
    /// Ended early; nothing follows.
    Failed(Failure),
}

/// A request's queue, and the bell that its stream rings when it is dropped.
pub(crate) fn channel(doorbell: Doorbell) -> (Outbox, Inbox) {
    let (sender, receiver) = mpsc::channel(EVENTS_MAX);
    (Outbox(sender), Inbox { events: receiver, doorbell })
}

/// The device thread's end.
#[derive(Debug)]
pub(crate) struct Outbox(mpsc::Sender<RequestEvent>);

impl Outbox {
    /// Whether nobody will read this any more: the request is cancelled.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.0.is_closed()
    }

    /// Queues an event; an abandoned queue takes everything.
    pub(crate) fn send(&self, event: RequestEvent) {
        if let Err(mpsc::error::TrySendError::Full(event)) = self.0.try_send(event) {
            debug_assert!(false, "a request has more events than its queue: {event:?}");
            tracing::error!(?event, "an event found its stream's queue full");
        }
    }
}

/// The stream's end. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Inbox {
    events: mpsc::Receiver<RequestEvent>,
    doorbell: Doorbell,
}

impl Stream for Inbox {
    type Item = RequestEvent;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<RequestEvent>> {
        self.get_mut().events.poll_recv(context)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // Closed first: whoever answers the bell must find the queue abandoned.
        self.events.close();
        self.doorbell.ring();
    }
}

/// Wakes the device thread. Rings that come while one is unanswered are the same ring.
#[derive(Clone, Debug)]
pub(crate) struct Doorbell(Sender<()>);

impl Doorbell {
    /// A bell, and what hears it.
    pub(crate) fn new() -> (Self, Receiver<()>) {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        (Self(sender), receiver)
    }

    pub(crate) fn ring(&self) {
        match self.0.try_send(()) {
            // Disconnected: the device thread has ended and needs no waking.
            Ok(()) | Err(TrySendError::Full(()) | TrySendError::Disconnected(())) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_stream_is_a_cancel() {
        let (doorbell, heard) = Doorbell::new();
        let (outbox, inbox) = channel(doorbell);
        assert!(!outbox.is_abandoned());
        assert!(heard.try_recv().is_err());
        drop(inbox);
        assert!(heard.try_recv().is_ok());
        assert!(outbox.is_abandoned());
        outbox.send(RequestEvent::Failed(Failure::Stopping));
    }
}
