//! The sender's state machine: a function of (state, call or frame, now).
//!
//! A transfer is *connecting* until a path to its ticket's incarnation stands, then *pushing* until it ends. When the path is
//! lost it is *broken* until another one stands, then *asking* until decode has said what has landed; then its caller
//! offers everything again, and only what is missing is sent. The same question finds out about an answer that does not
//! come. A transfer remembers one bit for each piece; the bytes are the caller's until decode has committed them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::time::Instant;

use bytes::Bytes;
use model::TokenId;
use proto::ticket::KvTicket;

use super::links::{Dial, Links};
use super::stats::SenderStats;
use super::transfer::{State, Transfer};
use super::{SenderEvent, TransferId};
use crate::budget::{ANSWER_MAX, CONNECTING_MAX, RESUME_MAX};
use crate::error::TransferError;
use crate::outlet::{Outlet, Unsent};
use crate::pieces::Pieces;
use crate::wire::{self, Push, Reply, Run, TicketKey};

/// Transfers alive at once. Each holds a sequence's blocks, so prefill's pool runs out first.
const TRANSFERS_MAX: usize = 4096;
/// Goodbyes that wait for room. More are dropped: decode's lease covers for them.
const GOODBYES_MAX: usize = 1024;
/// Paths and questions of one transfer: beyond, something is wrong that another one will not mend.
const GENERATIONS_MAX: u32 = 64;

/// Transfers and connections, with peers named by `P`.
#[derive(Clone)]
pub struct SenderCore<P> {
    /// Ordered, so that equal histories give equal events.
    transfers: BTreeMap<TransferId, Transfer<P>>,
    by_ticket: HashMap<TicketKey, TransferId>,
    links: Links<P>,
    goodbyes: VecDeque<(P, TicketKey, u32, String)>,
    events: Vec<SenderEvent>,
    next_id: u64,
    stats: SenderStats,
}

/// Where a transfer's frames go.
#[derive(Clone, Copy)]
struct Route<P> {
    id: TransferId,
    peer: P,
    key: TicketKey,
    generation: u32,
}

impl<P: Copy + Eq> SenderCore<P> {
    /// No transfers, no connections.
    pub fn new() -> Self {
        Self {
            transfers: BTreeMap::new(),
            by_ticket: HashMap::new(),
            links: Links::new(),
            goodbyes: VecDeque::new(),
            events: Vec::new(),
            next_id: 0,
            stats: SenderStats::default(),
        }
    }

    /// Opens the transfer that `ticket` permits.
    ///
    /// # Errors
    /// The ticket is in use here, or too many transfers are.
    pub fn begin(&mut self, ticket: KvTicket, now: Instant) -> Result<TransferId, TransferError> {
        let state = State::Connecting { until: now + CONNECTING_MAX.min(ticket.lease) };
        let transfer = Transfer::new(ticket, state, now);
        if self.by_ticket.contains_key(&transfer.key) {
            return Err(TransferError::TicketInUse(transfer.key.ticket_id));
        }
        if self.transfers.len() >= TRANSFERS_MAX {
            return Err(TransferError::TooMany { max: TRANSFERS_MAX });
        }
        let id = TransferId(self.next_id);
        self.next_id += 1;
        self.by_ticket.insert(transfer.key, id);
        self.transfers.insert(id, transfer);
        self.stats.begun += 1;
        self.find_paths(now, true);
        Ok(id)
    }

    /// Sends of a run of one layer what has not been sent. See [`super::Sender::push_blocks`].
    ///
    /// # Errors
    /// As there.
    pub fn push_blocks(
        &mut self,
        id: TransferId,
        layer: u32,
        first_block: u32,
        pieces: &[&[u8]],
        last_rows: u32,
        outlet: &mut impl Outlet<P>,
    ) -> Result<(), TransferError> {
        let transfer = self.transfers.get(&id).ok_or(TransferError::Ended(id))?;
        transfer.permits(layer, first_block, pieces.len())?;
        let route = self.route(id)?;
        let mut at = 0;
        while let Some((start, end)) = self.next_unsent(id, layer, first_block, at, pieces.len()) {
            let part = &pieces[start..end];
            let bytes = part.iter().map(|piece| piece.len()).sum();
            // As many as the ticket's blocks at most, as `permits` has checked.
            let (first_block, blocks) = (first_block + start as u32, part.len() as u32);
            let last_rows = rows_of(end - 1, pieces, last_rows);
            let sent = outlet.try_push(route.peer, part, &mut |checksums| {
                let run = Run { layer, first_block, blocks, last_rows, checksums };
                wire::encode_push_head(route.key, route.generation, Push::Blocks(run))
            });
            self.sent(route, bytes, sent)?;
            self.stats.bytes += bytes as u64;
            if let Some(transfer) = self.transfers.get_mut(&id) {
                let first = transfer.index(layer, first_block);
                (first..first + part.len()).for_each(|piece| transfer.sent.insert(piece));
            }
            at = end;
        }
        Ok(())
    }

    /// Sends the first token.
    ///
    /// # Errors
    /// As [`Self::push_blocks`].
    pub fn finish(
        &mut self,
        id: TransferId,
        first_token: TokenId,
        outlet: &mut impl Outlet<P>,
    ) -> Result<(), TransferError> {
        let route = self.route(id)?;
        let frame = wire::encode_push(route.key, route.generation, Push::Finish(first_token), Bytes::new());
        let sent = outlet.try_send(route.peer, frame);
        self.sent(route, 0, sent)?;
        if let Some(transfer) = self.transfers.get_mut(&id) {
            transfer.finished = true;
        }
        Ok(())
    }

    /// Forgets a transfer without an event. The next flush tells decode, if it has been heard of there.
    pub fn abort(&mut self, id: TransferId, reason: &str) {
        let Some(transfer) = self.remove(id) else { return };
        self.stats.aborted += 1;
        if let Some(peer) = transfer.peer()
            && self.goodbyes.len() < GOODBYES_MAX
        {
            self.goodbyes.push_back((peer, transfer.key, transfer.generation, reason.to_owned()));
        }
    }

    /// An answer from `peer`. Only the peer that a transfer goes to can end it.
    pub fn handle_frame(&mut self, peer: P, head: &[u8]) {
        let (key, reply) = match wire::decode_reply(head) {
            Ok(message) => message,
            Err(error) => {
                self.stats.unexpected += 1;
                return tracing::warn!(%error, "a frame on the KV channel is no reply");
            }
        };
        let id = self.by_ticket.get(&key).copied();
        let Some((id, transfer)) = id.and_then(|id| Some((id, self.transfers.get_mut(&id)?))) else {
            // Duplicates, and answers that crossed an abort.
            self.stats.unexpected += 1;
            return;
        };
        if transfer.peer() != Some(peer) {
            self.stats.unexpected += 1;
            return;
        }
        match reply {
            Reply::Committed => self.end(id, SenderEvent::Committed { id }),
            Reply::Stale(detail) | Reply::Refused(detail) => {
                self.end(id, SenderEvent::Refused { id, detail })
            }
            Reply::Held { generation, landed } => {
                let asked = matches!(transfer.state, State::Asking { .. });
                if !asked || generation != transfer.generation {
                    self.stats.unexpected += 1;
                    return;
                }
                let Some(landed) = Pieces::from_words(landed, transfer.pieces()) else {
                    let detail = "what it holds is not of this ticket".to_owned();
                    return self.end(id, SenderEvent::Refused { id, detail });
                };
                let missing = landed.missing();
                self.stats.repeated += missing.saturating_sub(transfer.sent.missing()) as u64;
                self.stats.resumed += 1;
                transfer.sent = landed;
                transfer.finished = false;
                transfer.state = State::Pushing { peer };
                self.events.push(SenderEvent::Resumed { id, missing });
            }
        }
    }

    /// A connection to `address` stands, at whose end is `incarnation`. Ignored where nobody wants one; telling it
    /// twice does no harm.
    pub fn handle_connected(&mut self, address: &str, peer: P, incarnation: u64, now: Instant) {
        if self.links.knows(address) {
            self.links.connected(address, peer, incarnation);
            self.find_paths(now, false);
        }
    }

    /// Nobody answers at `address`. Who issued a ticket there, and has no other address, is gone.
    pub fn handle_dial_failed(&mut self, address: &str, now: Instant) {
        if self.links.failed(address, now) {
            let hopeless: Vec<TransferId> = self
                .transfers
                .iter()
                .filter(|(_, at)| matches!(at.state, State::Connecting { .. }))
                .filter(|(_, at)| at.addresses.iter().any(|of| of == address))
                .filter(|(_, at)| {
                    !self.links.any_dialling(&at.addresses) && !self.links.any_up(&at.addresses)
                })
                .map(|(&id, _)| id)
                .collect();
            hopeless.into_iter().for_each(|id| self.end(id, SenderEvent::Lost { id }));
        }
    }

    /// A connection has ended. Where the process at its end lives, its transfers look for another one.
    pub fn handle_peer_lost(&mut self, lost: P, process_lives: bool, now: Instant) {
        self.goodbyes.retain(|(peer, ..)| *peer != lost);
        let was = self.links.lost(lost, now);
        let mut broken = 0;
        for transfer in self.transfers.values_mut().filter(|transfer| transfer.peer() == Some(lost)) {
            let until = now + RESUME_MAX.min(transfer.lease);
            if transfer.begun && process_lives && transfer.is_resumable() {
                transfer.state = State::Broken { until };
                broken += 1;
            } else if !transfer.begun && process_lives {
                transfer.state = State::Connecting { until };
            }
        }
        self.stats.broken += broken;
        self.lose(|transfer| {
            // A process that is gone is gone on all of its rails, whatever they have noticed.
            let of_the_dead = || was.as_ref().is_some_and(|(address, of)| transfer.goes_to(address, *of));
            transfer.peer() == Some(lost) || !process_lives && of_the_dead()
        });
        // Tickets of a new process at the old one's address have been waiting for this as well.
        self.find_paths(now, true);
    }

    /// Gives up what has looked for a path, or waited for an answer, for too long, and asks where an answer is missing.
    pub fn handle_timeout(&mut self, now: Instant) {
        for transfer in self.transfers.values_mut() {
            if std::mem::take(&mut transfer.active) {
                transfer.active_at = now;
            }
            let overdue = |since| now.saturating_duration_since(since) >= ANSWER_MAX;
            match transfer.state {
                State::Pushing { peer }
                    if transfer.finished && transfer.is_resumable() && overdue(transfer.active_at) =>
                {
                    transfer.ask(peer);
                }
                // The same question, so that an answer to either of them will do.
                State::Asking { peer, asked: Some(asked) } if overdue(asked) => {
                    transfer.state = State::Asking { peer, asked: None };
                }
                _ => {}
            }
        }
        let silent = |transfer: &Transfer<P>| now.saturating_duration_since(transfer.active_at);
        self.lose(|transfer| match transfer.state {
            State::Connecting { until } | State::Broken { until } => until <= now,
            _ if transfer.generation > GENERATIONS_MAX => true,
            State::Pushing { .. } if !transfer.begun => silent(transfer) >= transfer.reserve,
            // How long it computes is the caller's business; decode hears that it does.
            State::Pushing { .. } if !transfer.finished => false,
            State::Asking { .. } | State::Pushing { .. } => silent(transfer) >= transfer.lease,
        });
        self.find_paths(now, false);
        let transfers = &self.transfers;
        self.links.forget(|address| transfers.values().any(|at| at.addresses.iter().any(|of| of == address)));
    }

    /// Asks, renews leases, tells decode of aborts, and lets pushes try again.
    pub fn flush(&mut self, now: Instant, outlet: &mut impl Outlet<P>) {
        self.links.clear_full();
        for transfer in self.transfers.values_mut() {
            let silent = now.saturating_duration_since(transfer.active_at);
            let push = match transfer.state {
                State::Asking { asked: None, .. } => Push::Resume,
                State::Pushing { .. }
                    if transfer.begun && !transfer.finished && silent >= transfer.lease / 4 =>
                {
                    Push::Renew
                }
                _ => continue,
            };
            let Some(peer) = transfer.peer() else { continue };
            let asks = push == Push::Resume;
            let frame = wire::encode_push(transfer.key, transfer.generation, push, Bytes::new());
            if outlet.try_send(peer, frame).is_ok() {
                if asks {
                    transfer.state = State::Asking { peer, asked: Some(now) };
                } else {
                    transfer.active_at = now;
                }
            }
        }
        for _ in 0..self.goodbyes.len() {
            let Some((peer, key, generation, reason)) = self.goodbyes.pop_front() else { return };
            let frame = wire::encode_push(key, generation, Push::Abort(reason.clone()), Bytes::new());
            if outlet.try_send(peer, frame) == Err(Unsent::Full) {
                self.goodbyes.push_back((peer, key, generation, reason));
            }
        }
    }

    /// An address that a connection is wanted to. Answered by [`Self::handle_connected`] or
    /// [`Self::handle_dial_failed`].
    pub fn next_dial(&mut self) -> Option<Dial> {
        self.links.next_dial()
    }

    /// What has happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<SenderEvent> {
        std::mem::take(&mut self.events)
    }

    /// Pieces of a transfer that have not been sent; 0 for one that has ended.
    pub fn unsent(&self, id: TransferId) -> usize {
        self.transfers.get(&id).map_or(0, |transfer| transfer.sent.missing())
    }

    /// Counters since the start.
    pub fn stats(&self) -> SenderStats {
        self.stats
    }

    /// Hashes what decides how the machine goes on: all but its counters, which only grow.
    pub fn hash_state(&self, into: &mut impl Hasher)
    where
        P: Hash,
    {
        self.transfers.hash(into);
        self.links.hash(into);
        self.goodbyes.hash(into);
    }

    /// Checks what must hold between any two calls.
    ///
    /// # Panics
    /// Where it does not.
    pub fn check_invariants(&self) {
        assert_eq!(
            self.transfers.len(),
            self.by_ticket.len(),
            "a transfer without a ticket, or two with one"
        );
        assert!(self.goodbyes.len() <= GOODBYES_MAX, "more goodbyes than allowed");
        for (id, transfer) in &self.transfers {
            assert_eq!(self.by_ticket.get(&transfer.key), Some(id), "transfer {id} is not under its ticket");
            transfer.sent.check_invariants();
            if let State::Connecting { .. } = transfer.state {
                let waits =
                    self.links.any_dialling(&transfer.addresses) || self.links.any_up(&transfer.addresses);
                assert!(waits, "transfer {id} waits for a connection that nobody makes");
            }
        }
    }

    /// Gives transfers without a path one that stands, and sees to it that others are tried: at once by `force`, else when the
    /// time has come that follows a failure.
    fn find_paths(&mut self, now: Instant, force: bool) {
        let pathless: Vec<TransferId> =
            self.transfers.iter().filter(|(_, at)| at.peer().is_none()).map(|(&id, _)| id).collect();
        for id in pathless {
            let Some(transfer) = self.transfers.get(&id) else { continue };
            let load = |peer| self.transfers.values().filter(|other| other.peer() == Some(peer)).count();
            let best = self.links.best(&transfer.addresses, transfer.key.incarnation, load);
            let Some(transfer) = self.transfers.get_mut(&id) else { continue };
            match (best, transfer.begun) {
                (Some(peer), true) => transfer.ask(peer),
                (Some(peer), false) => transfer.state = State::Pushing { peer },
                (None, _) => {
                    let force = force && !self.links.any_dialling(&transfer.addresses);
                    for (rail, address) in transfer.addresses.iter().enumerate() {
                        self.links.want(rail, address, now, force);
                    }
                }
            }
        }
        // Paths that have failed come back while others carry what there is.
        for transfer in self.transfers.values() {
            if transfer.addresses.len() > 1 {
                for (rail, address) in transfer.addresses.iter().enumerate() {
                    self.links.want(rail, address, now, false);
                }
            }
        }
    }

    /// From `at` on the next run of pieces, counted within a push, that have not been sent.
    fn next_unsent(
        &self,
        id: TransferId,
        layer: u32,
        first_block: u32,
        at: usize,
        pieces: usize,
    ) -> Option<(usize, usize)> {
        let transfer = self.transfers.get(&id)?;
        let first = transfer.index(layer, first_block);
        let start = (at..pieces).find(|&piece| !transfer.sent.has(first + piece))?;
        let end = (start..pieces).find(|&piece| transfer.sent.has(first + piece)).unwrap_or(pieces);
        Some((start, end))
    }

    /// The way of a transfer that could send now.
    fn route(&self, id: TransferId) -> Result<Route<P>, TransferError> {
        let transfer = self.transfers.get(&id).ok_or(TransferError::Ended(id))?;
        match transfer.state {
            State::Pushing { peer } if !self.links.is_full(peer) => {
                Ok(Route { id, peer, key: transfer.key, generation: transfer.generation })
            }
            _ => Err(TransferError::Full),
        }
    }

    /// What becomes of a transfer when a frame of it was offered with this outcome.
    fn sent(&mut self, route: Route<P>, bytes: usize, sent: Result<(), Unsent>) -> Result<(), TransferError> {
        match sent {
            Ok(()) => {
                if let Some(transfer) = self.transfers.get_mut(&route.id) {
                    (transfer.active, transfer.begun) = (true, true);
                }
                Ok(())
            }
            Err(Unsent::TooLarge) => Err(TransferError::FrameTooLarge { bytes }),
            // Gone: its `PeerLost` is on the way, and says how to go on.
            Err(Unsent::Full | Unsent::Gone) => {
                self.stats.full += 1;
                self.links.note_full(route.peer);
                Err(TransferError::Full)
            }
        }
    }

    fn lose(&mut self, lost: impl Fn(&Transfer<P>) -> bool) {
        let ids: Vec<TransferId> =
            self.transfers.iter().filter(|(_, transfer)| lost(transfer)).map(|(&id, _)| id).collect();
        for id in ids {
            self.end(id, SenderEvent::Lost { id });
        }
    }

    fn end(&mut self, id: TransferId, event: SenderEvent) {
        if self.remove(id).is_none() {
            return;
        }
        match event {
            SenderEvent::Committed { .. } => self.stats.committed += 1,
            SenderEvent::Refused { .. } => self.stats.refused += 1,
            SenderEvent::Lost { .. } => self.stats.lost += 1,
            SenderEvent::Resumed { .. } => {}
        }
        self.events.push(event);
    }

    fn remove(&mut self, id: TransferId) -> Option<Transfer<P>> {
        let transfer = self.transfers.remove(&id)?;
        self.by_ticket.remove(&transfer.key);
        Some(transfer)
    }
}

impl<P: Copy + Eq> Default for SenderCore<P> {
    fn default() -> Self {
        Self::new()
    }
}

/// Rows of a run's piece: every row is as long as those of the last piece, which has `last_rows`.
fn rows_of(piece: usize, pieces: &[&[u8]], last_rows: u32) -> u32 {
    let last = pieces.last().map_or(0, |last| last.len());
    let rows = (pieces[piece].len() * last_rows as usize).checked_div(last).unwrap_or(0);
    u32::try_from(rows).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
