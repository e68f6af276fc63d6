//! The receiver's state machine: a function of (state, frame or time, now).
//!
//! A ticket is *reserved* until its first frame, then *receiving* until its last piece and its first token are here, then
//! *committed* until it is revoked. A receiving ticket whose path is lost is *broken* until its sender resumes it on another
//! one, for [`RESUME_MAX`]. Whatever else happens to a ticket removes it, and a ticket that is not in the table
//! cannot be written for. That table is the fence: there is no second place where a write is decided.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use fabric::Body;
use proto::ticket::{KvTicket, TicketId};

use super::arrival::{Landed, Place};
use super::ticket::{Path, Receiving, Ticket, Who};
use super::{BlockSink, Fenced, ReceiverEvent, ReceiverOptions, ReceiverStats, Reservation, TransferReport};
use crate::budget::RESUME_MAX;
use crate::error::TransferError;
use crate::extent::{Extent, Violation};
use crate::outlet::{Outlet, Unsent};
use crate::wire::{self, Push, Reply, TicketKey};

/// Generation of a ticket's first path. A frame of generation 0 is of a sender that does not resume, and means this one.
const FIRST_GENERATION: u32 = 1;

/// Tickets and what has landed for them, with peers named by `P`.
#[derive(Clone)]
pub struct ReceiverCore<P> {
    options: ReceiverOptions,
    addresses: Vec<String>,
    peers: BTreeMap<P, Arc<Who>>,
    /// Ordered, so that equal histories give equal events.
    tickets: BTreeMap<TicketId, Ticket<P>>,
    replies: VecDeque<(P, TicketKey, Reply)>,
    events: Vec<ReceiverEvent>,
    stats: ReceiverStats,
}

impl<P: Copy + Ord> ReceiverCore<P> {
    /// No tickets yet. `addresses` is where pushes shall go: to the first, or on another path to one of the others.
    pub fn new(options: ReceiverOptions, addresses: Vec<String>) -> Self {
        Self {
            options,
            addresses,
            peers: BTreeMap::new(),
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
        let ReceiverOptions { layout, lease, reserve, tickets_max, .. } = &self.options;
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
            fabric_address: self.addresses.first().cloned().unwrap_or_default(),
            fingerprint: self.options.fingerprint.clone(),
            first_block: extent.first_block,
            blocks: extent.blocks(),
            // `Extent::new` has made sure that it is one.
            prompt_tokens: prompt_tokens as u32,
            bytes_per_layer: extent.bytes_per_layer(),
            layers: extent.layers,
            lease: *lease,
            reserve: *reserve,
            generation: FIRST_GENERATION,
            fabric_rails: self.addresses.iter().skip(1).cloned().collect(),
        };
        self.tickets.insert(ticket_id, Ticket::Reserved { extent, since: now, deadline: now + *reserve });
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
        let (key, generation, push) = match wire::decode_push(head) {
            Ok(message) => message,
            Err(error) => {
                self.stats.malformed += 1;
                return tracing::warn!(%error, "a frame on the KV channel is no push");
            }
        };
        if key.incarnation != self.options.incarnation {
            return self.stale(peer, key, "the ticket is of another incarnation of this worker");
        }
        // Of a connection that is lost nothing comes any more, whatever is still in flight.
        let Some(who) = self.peers.get(&peer).cloned() else { return self.stats.superseded += 1 };
        let path = Path { peer, who };
        let generation = generation.max(FIRST_GENERATION);
        let lease = self.options.lease;
        let Some(ticket) = self.tickets.get_mut(&key.ticket_id) else {
            return self.stale(peer, key, "the ticket is unknown, expired or revoked");
        };
        ticket.begin(&path, generation, now, lease);
        let receiving = match ticket {
            Ticket::Receiving(receiving) => receiving,
            Ticket::Reserved { .. } => return,
            Ticket::Committed { path: of } if of.who == path.who => {
                self.stats.duplicates += 1;
                // The sender is asking again: its answer may have been lost.
                if matches!(push, Push::Finish(_) | Push::Resume) {
                    self.reply(peer, key, Reply::Committed);
                }
                return;
            }
            Ticket::Committed { .. } => return self.refuse_stranger(peer, key),
        };
        if receiving.path.who != path.who {
            return self.refuse_stranger(peer, key);
        }
        let taken = match (push, generation.cmp(&receiving.generation)) {
            (Push::Abort(reason), _) => {
                return self.end(key.ticket_id, format_args!("prefill gave up: {reason}"));
            }
            (Push::Resume, order @ (Ordering::Greater | Ordering::Equal)) => {
                match receiving.resume(path, generation) {
                    None => return self.stats.superseded += 1,
                    held => {
                        self.stats.resumed += u64::from(order == Ordering::Greater);
                        Ok(held)
                    }
                }
            }
            (_, Ordering::Greater) => {
                Err(Violation::Generation { known: receiving.generation, sent: generation })
            }
            // Late, on a path that is given up. What it brought is asked for again.
            (_, Ordering::Less) => return self.stats.superseded += 1,
            (_, Ordering::Equal) if receiving.broken => return self.stats.superseded += 1,
            (Push::Renew, _) => Ok(None),
            (Push::Finish(token), _) => receiving.arrival.finish(token).map(|()| None),
            (Push::Blocks(run), _) => {
                let place = &mut Place { sink, ticket: key.ticket_id, layer: run.layer };
                let landed = receiving.arrival.land(&run, body, place);
                landed.map(|landed| {
                    receiving.times.bytes += landed.bytes;
                    receiving.times.last = now;
                    self.stats.count(landed);
                    None
                })
            }
        };
        match taken {
            Ok(answer) => {
                receiving.deadline = now + lease;
                if !self.commit_if_complete(peer, key, now)
                    && let Some(held) = answer
                {
                    self.reply(peer, key, held);
                }
            }
            Err(violation) => {
                self.stats.violations += 1;
                tracing::warn!(ticket = %key.ticket_id, %violation, "a push is refused");
                self.end(key.ticket_id, format_args!("a push was refused: {violation}"));
                self.reply(peer, key, Reply::Refused(violation.to_string()));
            }
        }
    }

    /// A connection stands, at whose end is this process of this worker. Its predecessors are gone, and what they were
    /// pushing will never be complete.
    pub fn handle_peer_up(&mut self, peer: P, worker: &str, incarnation: u64) {
        let known = self.peers.values().find(|who| who.worker == worker && who.incarnation == incarnation);
        let who = known.cloned();
        let who = who.unwrap_or_else(|| Arc::new(Who { worker: worker.to_owned(), incarnation }));
        self.peers.insert(peer, who);
        self.end_where("the prefill worker was started anew", |receiving| {
            let of = &receiving.path.who;
            of.worker == worker && of.incarnation != incarnation
        });
    }

    /// A connection has ended. Where its process lives, what it was pushing may be resumed over another one.
    pub fn handle_peer_lost(&mut self, peer: P, process_lives: bool, reason: &dyn Display, now: Instant) {
        self.replies.retain(|(to, _, _)| *to != peer);
        let Some(who) = self.peers.remove(&peer) else { return };
        if !process_lives {
            let reason = format!("the prefill worker is lost: {reason}");
            return self.end_where(&reason, |receiving| receiving.path.who == who);
        }
        for ticket in self.tickets.values_mut() {
            if let Ticket::Receiving(receiving) = ticket
                && receiving.path.peer == peer
                && !receiving.broken
            {
                receiving.broken = true;
                receiving.deadline = receiving.deadline.min(now + RESUME_MAX);
                self.stats.broken += 1;
            }
        }
    }

    /// Ends the tickets that have waited for too long: for a first frame, for another one, or for another path.
    pub fn handle_timeout(&mut self, now: Instant) {
        let due = self.tickets.iter().filter(|(_, ticket)| ticket.deadline().is_some_and(|at| at <= now));
        let due: Vec<_> = due.map(|(&id, at)| (id, at.receiving().is_some_and(|at| at.broken))).collect();
        for (ticket, broken) in due {
            if broken {
                self.end(ticket, "its path is lost, and no other took over in time");
            } else {
                self.stats.expired += 1;
                self.dismiss(ticket, "the ticket's lease has run out");
                self.events.push(ReceiverEvent::Expired { ticket });
            }
        }
    }

    /// Ends a ticket. A sender that is in the middle of it is told, so that it lets go of its blocks.
    pub fn revoke(&mut self, ticket: TicketId) -> Fenced {
        self.stats.revoked += u64::from(self.tickets.get(&ticket).is_some_and(|at| at.receiving().is_some()));
        self.dismiss(ticket, "the ticket was revoked");
        // Nothing but `handle_frame` ever writes, and it has just forgotten the ticket.
        Fenced::by_the_table()
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
        self.peers.hash(into);
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
        self.tickets.iter().filter_map(|(&id, ticket)| Some((id, ticket.receiving()?)))
    }

    fn commit_if_complete(&mut self, pusher: P, key: TicketKey, now: Instant) -> bool {
        let Some(ticket) = self.tickets.get_mut(&key.ticket_id) else { return false };
        let Ticket::Receiving(receiving) = &*ticket else { return false };
        let Some(first_token) = receiving.arrival.complete() else { return false };
        let report = TransferReport::new(&receiving.times, now);
        *ticket = Ticket::Committed { path: receiving.path.clone() };
        tracing::debug!(ticket = %key.ticket_id, ?report, "every block is in place");
        self.stats.committed += 1;
        self.events.push(ReceiverEvent::Committed { ticket: key.ticket_id, first_token, report });
        self.reply(pusher, key, Reply::Committed);
        true
    }

    /// Removes a ticket, and tells its sender where there is one that can be told.
    fn dismiss(&mut self, ticket_id: TicketId, detail: &str) {
        if let Some(Ticket::Receiving(receiving)) = self.tickets.remove(&ticket_id)
            && !receiving.broken
        {
            let key = TicketKey { incarnation: self.options.incarnation, ticket_id };
            self.reply(receiving.path.peer, key, Reply::Stale(detail.to_owned()));
        }
    }

    fn end(&mut self, ticket: TicketId, reason: impl Display) {
        self.tickets.remove(&ticket);
        self.stats.aborted += 1;
        self.events.push(ReceiverEvent::Aborted { ticket, reason: reason.to_string() });
    }

    fn end_where(&mut self, reason: &str, ended: impl Fn(&Receiving<P>) -> bool) {
        let tickets = self.receiving().filter(|(_, receiving)| ended(receiving)).map(|(ticket, _)| ticket);
        for ticket in tickets.collect::<Vec<_>>() {
            self.end(ticket, reason);
        }
    }

    /// Whose first frame came first, pushes. Others are told, so that none waits for an answer.
    fn refuse_stranger(&mut self, peer: P, key: TicketKey) {
        self.stats.violations += 1;
        tracing::warn!(ticket = %key.ticket_id, "another worker pushes for a ticket that is in use");
        self.reply(peer, key, Reply::Refused("another worker is pushing for this ticket".to_owned()));
    }

    fn stale(&mut self, peer: P, key: TicketKey, detail: &str) {
        self.stats.stale += 1;
        tracing::debug!(ticket = %key.ticket_id, detail, "a push is fenced off");
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
