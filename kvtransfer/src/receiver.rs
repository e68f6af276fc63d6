//! Hop 10, decode's end of the hand-off: tickets out, blocks in.
//!
//! [`Receiver::poll`] is called by the device thread between steps. Everything that a push can change, it changes
//! there, through the caller's [`BlockSink`]; the fabric's threads only queue frames.

mod arrival;
mod core;
mod ticket;

use std::time::{Duration, Instant};

use crossbeam_channel::Select;
use fabric::{Event, LossReason};
use model::{ExecutionFingerprint, KvLayout, TokenId};
use proto::ticket::{KvTicket, TicketId};

pub use self::core::ReceiverCore;
use crate::error::TransferError;
pub use crate::extent::Violation;
use crate::rails::{RailPeer, Rails};

/// Where blocks go that a live ticket permits.
pub trait BlockSink {
    /// The place of one layer of one block of a live ticket: `bytes` bytes, whole rows from row 0. `block_in_sequence` is
    /// counted from the sequence's start and lies within the ticket. Asked for once; the copy that was put there is checked,
    /// and a ticket with a damaged one ends.
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
        /// How it went.
        report: TransferReport,
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

/// How a transfer went, seen from decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferReport {
    /// From the ticket to the transfer's first frame: the router, prefill's queue and its first layer.
    pub reserved: Duration,
    /// From the first frame to the last piece.
    pub arriving: Duration,
    /// From the last piece to the commit: the first token's sampling.
    pub finishing: Duration,
    /// Bytes that have landed.
    pub bytes: u64,
    /// Paths after the first.
    pub resumes: u32,
}

impl TransferReport {
    fn new(times: &ticket::Times, now: Instant) -> Self {
        let ticket::Times { reserved, first, last, bytes, resumes } = *times;
        Self {
            reserved: first.saturating_duration_since(reserved),
            arriving: last.saturating_duration_since(first),
            finishing: now.saturating_duration_since(last),
            bytes,
            resumes,
        }
    }
}

/// The proof that no write for a ticket can land any more. Whoever gives a ticket's blocks to somebody else needs one
/// first, and only the receiver makes them.
///
/// Every transport here lets the receiver alone write to the pool: it copies, on its own thread, for tickets in its table.
/// So the proof is at hand as soon as a ticket has left the table, and the time that blocks spend in quarantine is zero. A
/// transport that addressed the pool itself would have to hand in a proof of its own before this could be made.
#[must_use = "blocks are free behind this proof only"]
#[derive(Debug)]
pub struct Fenced(());

impl Fenced {
    fn by_the_table() -> Self {
        Self(())
    }
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
    /// How long a ticket lives in silence, from its first frame on. A sender without anything to send renews it.
    pub lease: Duration,
    /// How long a ticket lives before its first frame: as long as its prompt may wait in prefill's queue.
    pub reserve: Duration,
    /// Tickets alive at once, those of running sequences included.
    pub tickets_max: usize,
}

impl ReceiverOptions {
    /// Longer than any one layer of a prefill step takes, during which its thread cannot renew. It is not how deaths are
    /// found: a lost connection or a cancelled request ends a ticket at once.
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
    /// Frames late on a path that its transfer has given up, stopped as well.
    pub superseded: u64,
    /// Tickets whose path was lost in the middle of them.
    pub broken: u64,
    /// Resumes that were accepted.
    pub resumed: u64,
    /// Tickets revoked in the middle of a transfer.
    pub revoked: u64,
    /// Frames that their ticket does not permit.
    pub violations: u64,
    /// Frames that are no message.
    pub malformed: u64,
    /// Replies dropped because their queue was full; the sender's lease covers for them.
    pub replies_dropped: u64,
}

/// Decode's end, on the fabric's KV channel.
pub struct Receiver {
    core: ReceiverCore<RailPeer>,
    rails: Rails,
    landing: Duration,
}

/// Bytes copied in one poll: some 2 ms, so that a flood of arriving blocks delays a decode step by no more. The rest
/// waits in the fabric, whose flow control slows the senders.
const POLL_BYTES_MAX: usize = 16 << 20;

impl Receiver {
    /// A receiver that owns the KV channel of these ends. Its tickets list all of them.
    pub fn new(rails: impl Into<Rails>, options: ReceiverOptions) -> Self {
        let rails = rails.into();
        let core = ReceiverCore::new(options, rails.addresses());
        Self { core, rails, landing: Duration::ZERO }
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
            let Some((rail, event)) = self.rails.next_event() else {
                self.core.handle_timeout(now);
                break;
            };
            match event {
                Event::Frame { peer, head, body } => {
                    span.get_or_insert_with(|| tracing::info_span!("receive", hop = 10).entered());
                    bytes += head.len() + body.len();
                    let started = Instant::now();
                    self.core.handle_frame(RailPeer { rail, peer }, &head, &body, now, sink);
                    self.landing += started.elapsed();
                }
                Event::PeerLost { peer, reason } => {
                    let peer = RailPeer { rail, peer };
                    self.core.handle_peer_lost(peer, process_lives(&reason), &reason, now);
                }
                Event::PeerUp { peer, info } => {
                    self.core.handle_peer_up(RailPeer { rail, peer }, &info.worker, info.incarnation);
                }
            }
        }
        self.core.flush(&mut self.rails);
        self.core.take_events()
    }

    /// Ends a ticket, whatever its state: from here on no push can write to its blocks. Unknown ones are dead already.
    pub fn revoke(&mut self, ticket: TicketId) -> Fenced {
        let fenced = self.core.revoke(ticket);
        self.core.flush(&mut self.rails);
        fenced
    }

    /// Adds what makes [`Self::poll`] worth calling to what a thread sleeps on.
    pub fn wait_on<'a>(&'a self, select: &mut Select<'a>) {
        self.rails.wait_on(select);
    }

    /// Whether the fabric is closed, as the last [`Self::poll`] has seen it: nothing can arrive any more.
    pub fn is_closed(&self) -> bool {
        self.rails.is_closed()
    }

    /// This process start.
    pub fn incarnation(&self) -> u64 {
        self.core.incarnation()
    }

    /// Counters since the start.
    pub fn stats(&self) -> ReceiverStats {
        self.core.stats()
    }

    /// Time spent so far on checking frames and copying them to their places.
    pub fn landing(&self) -> Duration {
        self.landing
    }
}

/// Whether the process behind a lost connection may still be there, and come back over another one.
pub(crate) fn process_lives(reason: &LossReason) -> bool {
    match reason {
        LossReason::Closed | LossReason::Died | LossReason::Restarted | LossReason::Superseded => false,
        LossReason::Silent
        | LossReason::Protocol(_)
        | LossReason::Refused { .. }
        | LossReason::Failed { .. } => true,
    }
}
