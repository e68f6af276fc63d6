//! One sequence's events on their way from the device thread to its stream: a bounded queue with a doorbell back.
//!
//! The device thread never waits for a reader. It asks [`Outbox::has_room`] before it lets a sequence into a step, so
//! that a token and the end always fit; a sequence without room pauses, and the reader that makes room rings the
//! doorbell. The same queue carries cancellation: a dropped [`Inbox`] is seen as [`Outbox::is_abandoned`]. There is no
//! cancel message that could be lost or overtake its sequence.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use engine::Sampled;
use proto::ticket::{KvTicket, TicketId};
use tokio::sync::mpsc;
use tokio_stream::Stream;

use crate::error::{Failure, Refusal};
use crate::finish::Finish;

/// What a stream is told, in this order: a ticket and the hand-off, or the reservation and the first token; tokens, and one
/// end. Or a refusal alone.
#[derive(Debug)]
pub(crate) enum SequenceEvent {
    /// Blocks are reserved.
    Ticket(Box<KvTicket>),
    /// Blocks are reserved, and the prompt is computed here. `name` finds the sequence as a ticket would.
    Reserved { incarnation: u64, name: TicketId },
    /// The token behind a prompt that was computed here, with the time it waited for its first chunk and that from there on,
    /// and the tokens that were found.
    FirstToken { sampled: Sampled, queue: Duration, compute: Duration, cached_tokens: usize },
    /// Nothing is reserved and nothing follows.
    Refused(Refusal),
    /// All KV is committed. `handoff` is the time since the ticket was issued.
    HandedOff { handoff: Duration },
    /// One token, with what became of drafts.
    Token(Sampled, Drafts),
    /// The sequence ended by its own rule; nothing follows.
    Finished { finish: Finish, first_step: Duration, decode: Duration },
    /// The sequence ended otherwise; nothing follows.
    Failed(Failure),
}

/// What became of the tokens that were drafted for a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drafts {
    /// Drafts that became tokens.
    pub(crate) accepted: u32,
    /// Drafts that did not.
    pub(crate) rejected: u32,
}

/// A queue for `events_max` events that rings `doorbell` when the device thread should look again.
pub(crate) fn channel(events_max: usize, doorbell: Doorbell) -> (Outbox, Inbox) {
    let (sender, receiver) = mpsc::channel(events_max);
    let starved = Arc::new(AtomicBool::new(false));
    (Outbox { events: sender, starved: Arc::clone(&starved) }, Inbox { events: receiver, starved, doorbell })
}

/// The device thread's end.
#[derive(Debug)]
pub(crate) struct Outbox {
    events: mpsc::Sender<SequenceEvent>,
    starved: Arc<AtomicBool>,
}

impl Outbox {
    /// Whether one more token and the end after it fit. When not, the reader rings once they do.
    pub(crate) fn has_room(&self) -> bool {
        // Only this end takes room, so what is seen here can only grow.
        if self.events.capacity() >= 2 {
            return true;
        }
        self.starved.store(true, Ordering::SeqCst);
        // The reader may have made room between the look and the flag, without ringing: look again.
        self.events.capacity() >= 2
    }

    /// Tokens that fit now, with the end after them.
    pub(crate) fn tokens_max(&self) -> usize {
        self.events.capacity().saturating_sub(1)
    }

    /// Whether nobody will read this any more: the sequence is cancelled.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Queues an event. Callers have made sure of room; an abandoned queue takes everything.
    pub(crate) fn send(&self, event: SequenceEvent) {
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            debug_assert!(false, "no room was left for {event:?}");
            tracing::error!(?event, "an event found its stream's queue full");
        }
    }
}

/// The stream's end. Dropping it cancels the sequence.
#[derive(Debug)]
pub(crate) struct Inbox {
    events: mpsc::Receiver<SequenceEvent>,
    starved: Arc<AtomicBool>,
    doorbell: Doorbell,
}

impl Stream for Inbox {
    type Item = SequenceEvent;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<SequenceEvent>> {
        let this = self.get_mut();
        let event = this.events.poll_recv(context);
        if event.is_ready() && this.starved.swap(false, Ordering::SeqCst) {
            this.doorbell.ring();
        }
        event
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
    use tokio_stream::StreamExt;

    use super::*;

    fn token() -> SequenceEvent {
        let sampled = Sampled { token: model::TokenId(1), logprob: 0.0, top: Vec::new() };
        SequenceEvent::Token(sampled, Drafts::default())
    }

    #[tokio::test]
    async fn a_full_queue_pauses_and_its_reader_rings() {
        let (doorbell, heard) = Doorbell::new();
        let (outbox, mut inbox) = channel(3, doorbell);
        outbox.send(token());
        assert!(outbox.has_room());
        outbox.send(token());
        assert!(!outbox.has_room(), "one place is the end's");
        assert!(heard.try_recv().is_err());
        inbox.next().await;
        assert!(heard.try_recv().is_ok(), "the starved writer is rung");
        assert!(outbox.has_room());
        inbox.next().await;
        assert!(heard.try_recv().is_err(), "nobody waits, nobody rings");
    }

    #[test]
    fn a_dropped_stream_is_a_cancel() {
        let (doorbell, heard) = Doorbell::new();
        let (outbox, inbox) = channel(4, doorbell);
        assert!(!outbox.is_abandoned());
        drop(inbox);
        assert!(heard.try_recv().is_ok());
        assert!(outbox.is_abandoned());
        outbox.send(token());
    }
}
