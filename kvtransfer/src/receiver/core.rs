//! The receiver's state machine: a function of (state, frame or time, now).
//!
//! A ticket is *receiving* until its last piece and its first token are here, then *committed* until it is revoked.
//! Whatever else happens to it removes it, and a ticket that is not in the table cannot be written for. That table
//! is the fence: there is no second place where a write is decided.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;
use std::hash::{Hash, Hasher};
use std::time::Instant;

use fabric::Body;
use proto::ticket::{KvTicket, TicketId};

use super::arrival::{Arrival, Landed, Place};
use super::{BlockSink, ReceiverEvent, ReceiverOptions, ReceiverStats, Reservation};
use crate::error::TransferError;
use crate::extent::Extent;
use crate::outlet::{Outlet, Unsent};
use crate::wire::{self, Push, Reply, TicketKey};

/// Tickets and what has landed for them, with peers named by `P`.
#[derive(Clone)]
pub struct ReceiverCore<P> {
    options: ReceiverOptions,
    fabric_address: String,
    /// Ordered, so that equal histories give equal events.
    tickets: BTreeMap<TicketId, Ticket<P>>,
    replies: VecDeque<(P, TicketKey, Reply)>,
    events: Vec<ReceiverEvent>,
    stats: ReceiverStats,
}

#[derive(Clone, Hash)]
enum Ticket<P> {
    Receiving(Receiving<P>),
    /// The blocks are the sequence's. Kept to tell a duplicate of the last frame that it has arrived.
    Committed {
        pusher: P,
    },
}

#[derive(Clone, Hash)]
struct Receiving<P> {
    arrival: Arrival,
    /// Whose frame came first. Nobody else may push.
    pusher: Option<P>,
    deadline: Instant,
}

impl<P: Copy + Eq> ReceiverCore<P> {
    /// No tickets yet. `fabric_address` is where pushes shall go.
    pub fn new(options: ReceiverOptions, fabric_address: String) -> Self {
        Self {
            options,
            fabric_address,
            tickets: BTreeMap::new(),
            replies: VecDeque::new(),
            events: Vec::new(),
            stats: ReceiverStats::default(),
        }
    }

    /// Makes a live ticket under a name that the caller drew.
    ///
    /// # Errors
    /// Too many are alive, this name is, or the reservation makes no sense.
    pub fn issue(
        &mut self,
        reservation: Reservation,
        ticket_id: TicketId,
        now: Instant,
    ) -> Result<KvTicket, TransferError> {
        let ReceiverOptions { layout, lease, tickets_max, .. } = &self.options;
        if self.tickets.len() >= *tickets_max {
            return Err(TransferError::TooMany { max: *tickets_max });
        }
        if self.is_alive(ticket_id) {
            return Err(TransferError::TicketInUse(ticket_id));
        }
        let Reservation { first_block, prompt_tokens } = reservation;
        let extent = Extent::new(layout, first_block, prompt_tokens)?;
        let ticket = KvTicket {
            worker_id: self.options.worker_id.clone(),
            incarnation: self.options.incarnation,
            ticket_id,
            fabric_address: self.fabric_address.clone(),
            fingerprint: self.options.fingerprint.clone(),
            first_block: extent.first_block,
            blocks: extent.blocks(),
            // `Extent::new` has made sure that it is one.
            prompt_tokens: prompt_tokens as u32,
            bytes_per_layer: extent.bytes_per_layer(),
            layers: extent.layers,
            lease: *lease,
        };
        let receiving = Receiving { arrival: Arrival::new(extent), pusher: None, deadline: now + *lease };
        self.tickets.insert(ticket_id, Ticket::Receiving(receiving));
        self.stats.issued += 1;
        Ok(ticket)
    }

    /// A frame from `peer`. Writes into `sink` only what a live ticket of this incarnation permits.
    pub fn handle_frame(
        &mut self,
        peer: P,
        head: &[u8],
        body: &Body,
        now: Instant,
        sink: &mut dyn BlockSink,
    ) {
        let (key, push) = match wire::decode_push(head) {
            Ok(message) => message,
            Err(error) => {
                self.stats.malformed += 1;
                return tracing::warn!(%error, "a frame on the KV channel is no push");
            }
        };
        if key.incarnation != self.options.incarnation {
            return self.stale(peer, key, "the ticket is of another incarnation of this worker");
        }
        let receiving = match self.tickets.get_mut(&key.ticket_id) {
            None => return self.stale(peer, key, "the ticket is unknown, expired or revoked"),
            Some(Ticket::Committed { pusher }) => {
                self.stats.duplicates += 1;
                // The sender is asking again: its answer may have been lost.
                if *pusher == peer && matches!(push, Push::Finish(_)) {
                    self.reply(peer, key, Reply::Committed);
                }
                return;
            }
            Some(Ticket::Receiving(receiving)) => receiving,
        };
        if *receiving.pusher.get_or_insert(peer) != peer {
            self.stats.violations += 1;
            let detail = "another worker is pushing for this ticket".to_owned();
            return self.reply(peer, key, Reply::Refused(detail));
        }
        let taken = match push {
            Push::Abort(reason) => return self.end(key.ticket_id, format_args!("prefill gave up: {reason}")),
            Push::Finish(token) => receiving.arrival.finish(token),
            Push::Blocks(run) => {
                let place = &mut Place { sink, ticket: key.ticket_id, layer: run.layer };
                receiving.arrival.land(&run, body, place).map(|landed| self.stats.count(landed))
            }
        };
        match taken {
            Ok(()) => {
                receiving.deadline = now + self.options.lease;
                self.commit_if_complete(peer, key);
            }
            Err(violation) => {
                self.stats.violations += 1;
                self.end(key.ticket_id, format_args!("a push was refused: {violation}"));
                self.reply(peer, key, Reply::Refused(violation.to_string()));
            }
        }
    }

    /// `peer` is gone: what it was pushing will never be complete.
    pub fn handle_peer_lost(&mut self, peer: P, reason: &dyn Display) {
        self.replies.retain(|(to, _, _)| *to != peer);
        let of_peer = self.receiving().filter(|(_, receiving)| receiving.pusher == Some(peer));
        let tickets: Vec<TicketId> = of_peer.map(|(ticket, _)| ticket).collect();
        for ticket in tickets {
            self.end(ticket, format_args!("the prefill worker is lost: {reason}"));
        }
    }

    /// Ends the tickets whose lease has run out.
    pub fn handle_timeout(&mut self, now: Instant) {
        let due = self.receiving().filter(|(_, receiving)| receiving.deadline <= now);
        let tickets: Vec<TicketId> = due.map(|(ticket, _)| ticket).collect();
        for ticket in tickets {
            self.stats.expired += 1;
            self.dismiss(ticket, "the ticket's lease has run out");
            self.events.push(ReceiverEvent::Expired { ticket });
        }
    }

    /// Ends a ticket. A sender that is in the middle of it is told, so that it lets go of its blocks.
    pub fn revoke(&mut self, ticket: TicketId) {
        self.dismiss(ticket, "the ticket was revoked");
    }

    /// Sends the replies that wait. Those for a peer without room stay.
    pub fn flush(&mut self, outlet: &mut impl Outlet<P>) {
        for _ in 0..self.replies.len() {
            let Some((peer, key, reply)) = self.replies.pop_front() else { return };
            if outlet.try_send(peer, wire::encode_reply(key, reply.clone())) == Err(Unsent::Full) {
                self.replies.push_back((peer, key, reply));
            }
        }
    }

    /// What has ended since the last call, in order.
    pub fn take_events(&mut self) -> Vec<ReceiverEvent> {
        std::mem::take(&mut self.events)
    }

    /// Whether a ticket of this name is receiving or committed.
    pub fn is_alive(&self, ticket: TicketId) -> bool {
        self.tickets.contains_key(&ticket)
    }

    /// This process start.
    pub fn incarnation(&self) -> u64 {
        self.options.incarnation
    }

    /// Counters since the start.
    pub fn stats(&self) -> ReceiverStats {
        self.stats
    }

    /// Hashes what decides how the machine goes on: all but its counters, which only grow.
    pub fn hash_state(&self, into: &mut impl Hasher)
    where
        P: Hash,
    {
        self.tickets.hash(into);
        self.replies.hash(into);
    }

    /// Checks what must hold between any two calls.
    ///
    /// # Panics
    /// Where it does not.
    pub fn check_invariants(&self) {
        assert!(self.tickets.len() <= self.options.tickets_max, "more tickets than allowed");
        assert!(self.replies.len() <= self.replies_max(), "more replies than allowed");
        for (ticket, receiving) in self.receiving() {
            receiving.arrival.check_invariants();
            assert!(receiving.arrival.complete().is_none(), "{ticket} is complete and not committed");
        }
    }

    fn receiving(&self) -> impl Iterator<Item = (TicketId, &Receiving<P>)> {
        self.tickets.iter().filter_map(|(&id, ticket)| match ticket {
            Ticket::Receiving(receiving) => Some((id, receiving)),
            Ticket::Committed { .. } => None,
        })
    }

    fn commit_if_complete(&mut self, pusher: P, key: TicketKey) {
        let Some(ticket) = self.tickets.get_mut(&key.ticket_id) else { return };
        let Ticket::Receiving(receiving) = ticket else { return };
        let Some(first_token) = receiving.arrival.complete() else { return };
        *ticket = Ticket::Committed { pusher };
        tracing::debug!(ticket = %key.ticket_id, "every block is in place");
        self.stats.committed += 1;
        self.events.push(ReceiverEvent::Committed { ticket: key.ticket_id, first_token });
        self.reply(pusher, key, Reply::Committed);
    }

    fn dismiss(&mut self, ticket_id: TicketId, detail: &str) {
        if let Some(Ticket::Receiving(Receiving { pusher: Some(peer), .. })) = self.tickets.remove(&ticket_id)
        {
            let key = TicketKey { incarnation: self.options.incarnation, ticket_id };
            self.reply(peer, key, Reply::Stale(detail.to_owned()));
        }
    }

    fn end(&mut self, ticket: TicketId, reason: impl Display) {
        self.tickets.remove(&ticket);
        self.stats.aborted += 1;
        self.events.push(ReceiverEvent::Aborted { ticket, reason: reason.to_string() });
    }

    fn stale(&mut self, peer: P, key: TicketKey, detail: &str) {
        self.stats.stale += 1;
        // One frame in flight is answered like a hundred: the first answer ends the transfer.
        let told = self.replies.iter().any(|(to, waiting, _)| *to == peer && *waiting == key);
        if !told {
            self.reply(peer, key, Reply::Stale(detail.to_owned()));
        }
    }

    fn reply(&mut self, peer: P, key: TicketKey, reply: Reply) {
        if self.replies.len() < self.replies_max() {
            self.replies.push_back((peer, key, reply));
        } else {
            self.stats.replies_dropped += 1;
        }
    }

    /// Every ticket may be waiting to be answered, and as many strangers.
    fn replies_max(&self) -> usize {
        2 * self.options.tickets_max
    }
}

impl ReceiverStats {
    fn count(&mut self, landed: Landed) {
        self.pieces += landed.pieces;
        self.bytes += landed.bytes;
        self.duplicates += landed.duplicates;
    }
}

#[cfg(test)]
mod tests;
