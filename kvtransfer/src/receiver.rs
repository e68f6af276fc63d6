//! Hop 10, decode's end of the hand-off: tickets out, blocks in.
//!
//! [`Receiver::poll`] is called by the device thread between steps. Everything that a push can change, it changes
//! there, through the caller's [`BlockSink`]; the fabric's threads only queue frames.

mod arrival;
mod core;

use std::time::{Duration, Instant};

use fabric::{Arrivals, Channel, Event, Fabric, PeerId};
use model::{ExecutionFingerprint, KvLayout, TokenId};
use proto::ticket::{KvTicket, TicketId};

pub use self::core::ReceiverCore;
use crate::error::TransferError;
pub use crate::extent::Violation;

/// Where blocks go that a live ticket permits.
pub trait BlockSink {
    /// The place of one layer of one block of a live ticket: `bytes` bytes, whole rows from row 0. `block_in_sequence` is
    /// counted from the sequence's start and lies within the ticket. The receiver copies there and checks the copy; a
    /// place whose copy fails the check is never asked for again, and belongs to a ticket that is dead then.
    ///
    /// `None`: the caller's books have no such block. The ticket dies.
    fn place(
        &mut self,
        ticket: TicketId,
        block_in_sequence: u32,
        layer: u32,
        bytes: usize,
    ) -> Option<&mut [u8]>;
}

/// What became of a ticket. Each ticket has one end: one of these, or [`Receiver::revoke`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReceiverEvent {
    /// Every block is in place and belongs to the sequence, which goes on from `first_token`. Whether that is a
    /// token of the vocabulary is for the caller to check.
    Committed {
        /// The ticket. It answers late duplicates until it is revoked, and writes nothing any more.
        ticket: TicketId,
        /// Sampled on prefill.
        first_token: TokenId,
    },
    /// Nothing arrived for as long as the lease says. The ticket is dead, its blocks are the caller's again.
    Expired {
        /// The ticket.
        ticket: TicketId,
    },
    /// Prefill gave up, went away or sent what the ticket does not permit. The ticket is dead, its blocks are the
    /// caller's again.
    Aborted {
        /// The ticket.
        ticket: TicketId,
        /// For logs and the router.
        reason: String,
    },
}

/// What a receiver is told once.
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// This worker.
    pub worker_id: String,
    /// This process start.
    pub incarnation: u64,
    /// What a pushing worker must be; goes out with every ticket.
    pub fingerprint: ExecutionFingerprint,
    /// How pieces look.
    pub layout: KvLayout,
    /// How long a ticket lives without bytes arriving.
    pub lease: Duration,
    /// Tickets alive at once, those of running sequences included.
    pub tickets_max: usize,
}

impl ReceiverOptions {
    /// Long enough for a prompt to wait in prefill's queue. It is not how deaths are found: a lost connection or a
    /// cancelled request ends a ticket at once.
    pub const LEASE: Duration = Duration::from_secs(30);
}

/// A prompt whose blocks decode holds, and from which of them on bytes are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reservation {
    /// First missing block, counted from the sequence's start; the prefix cache holds those before it.
    pub first_block: usize,
    /// Tokens of the whole prompt.
    pub prompt_tokens: usize,
}

/// What a receiver has seen since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiverStats {
    /// Tickets issued.
    pub issued: u64,
    /// Tickets committed.
    pub committed: u64,
    /// Tickets that ran out.
    pub expired: u64,
    /// Tickets that ended by abort, loss or violation.
    pub aborted: u64,
    /// Pieces written.
    pub pieces: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Pieces that had landed before.
    pub duplicates: u64,
    /// Frames for dead tickets or other incarnations: pushes that the fence has stopped.
    pub stale: u64,
    /// Frames that their ticket does not permit.
    pub violations: u64,
    /// Frames that are no message.
    pub malformed: u64,
    /// Replies dropped because their queue was full; the sender's lease covers for them.
    pub replies_dropped: u64,
}

/// Decode's end, on the fabric's KV channel.
pub struct Receiver {
    core: ReceiverCore<PeerId>,
    fabric: Fabric,
    events: Arrivals,
}

/// Bytes copied in one poll: some 2 ms, so that a flood of arriving blocks delays a decode step by no more. The rest
/// waits in the fabric, whose flow control slows the senders.
const POLL_BYTES_MAX: usize = 16 << 20;

impl Receiver {
    /// A receiver that owns the KV channel of `fabric`.
    pub fn new(fabric: Fabric, options: ReceiverOptions) -> Self {
        let events = fabric.receiver(Channel::Kv);
        let core = ReceiverCore::new(options, fabric.address());
        Self { core, fabric, events }
    }

    /// Permits one push of the blocks that are missing.
    ///
    /// # Errors
    /// [`TransferError::TooMany`] tickets are alive, or the [`TransferError::Reservation`] makes no sense.
    pub fn issue(&mut self, reservation: Reservation, now: Instant) -> Result<KvTicket, TransferError> {
        // Random, so that a name is not reused in this incarnation, and not guessed.
        let mut ticket = TicketId(rand::random());
        while self.core.is_alive(ticket) {
            ticket = TicketId(rand::random());
        }
        self.core.issue(reservation, ticket, now)
    }

    /// Takes in what has arrived, writes what is permitted into `sink`, and says which tickets have ended.
    ///
    /// A ticket's lease is looked at only when nothing waits to be taken in: a stall of this thread is not the
    /// sender's silence.
    pub fn poll(&mut self, now: Instant, sink: &mut dyn BlockSink) -> Vec<ReceiverEvent> {
        let mut bytes = 0;
        let mut span = None;
        while bytes < POLL_BYTES_MAX {
            match self.events.try_recv() {
                Ok(Event::Frame { peer, head, body }) => {
                    span.get_or_insert_with(|| tracing::info_span!("receive", hop = 10).entered());
                    bytes += head.len() + body.len();
                    self.core.handle_frame(peer, &head, &body, now, sink);
                }
                Ok(Event::PeerLost { peer, reason }) => self.core.handle_peer_lost(peer, &reason),
                Ok(Event::PeerUp { .. }) => {}
                Err(_) => {
                    self.core.handle_timeout(now);
                    break;
                }
            }
        }
        self.core.flush(&mut self.fabric);
        self.core.take_events()
    }

    /// Ends a ticket, whatever its state: from here on no push can write to its blocks. Unknown ones are ignored.
    pub fn revoke(&mut self, ticket: TicketId) {
        self.core.revoke(ticket);
        self.core.flush(&mut self.fabric);
    }

    /// Becomes readable when [`Self::poll`] has something to do. To be waited on, never received from.
    pub fn arrivals(&self) -> &crossbeam_channel::Receiver<Event> {
        self.events.queue()
    }

    /// This process start.
    pub fn incarnation(&self) -> u64 {
        self.core.incarnation()
    }

    /// Counters since the start.
    pub fn stats(&self) -> ReceiverStats {
        self.core.stats()
    }
}
