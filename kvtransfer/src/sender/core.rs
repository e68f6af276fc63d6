//! The sender's state machine: a function of (state, call or frame, now).
//!
//! A transfer is *connecting* until a connection to its ticket's incarnation stands, then *pushing* until it ends.
//! It remembers where it goes and when it was last active, and nothing of what it has sent: the caller's blocks are
//! the only copy until decode has committed them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

use bytes::Bytes;
use model::TokenId;
use proto::ticket::KvTicket;

use super::{SenderEvent, TransferId};
use crate::error::TransferError;
use crate::outlet::{Outlet, Unsent};
use crate::wire::{self, Push, Reply, Run, TicketKey};

/// Transfers alive at once. Each holds a sequence's blocks, so prefill's pool runs out first.
const TRANSFERS_MAX: usize = 4096;
/// Goodbyes that wait for room. More are dropped: decode's lease covers for them.
const GOODBYES_MAX: usize = 1024;
/// Longer than a dial takes, and than a dead process is found, whose successor issued the ticket.
const CONNECTING_MAX: Duration = Duration::from_secs(2);

/// Transfers and connections, with peers named by `P`.
#[derive(Clone)]
pub struct SenderCore<P> {
    /// Ordered, so that equal histories give equal events.
    transfers: BTreeMap<TransferId, Transfer<P>>,
    by_ticket: HashMap<TicketKey, TransferId>,
    links: BTreeMap<String, Link<P>>,
    dials: VecDeque<String>,
    goodbyes: VecDeque<(P, TicketKey, String)>,
    events: Vec<SenderEvent>,
    next_id: u64,
    stats: SenderStats,
}

/// What a sender has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SenderStats {
    /// Transfers begun.
    pub begun: u64,
    /// Transfers that decode committed.
    pub committed: u64,
    /// Transfers that decode refused.
    pub refused: u64,
    /// Transfers that were lost.
    pub lost: u64,
    /// Transfers that the caller gave up.
    pub aborted: u64,
    /// Bytes of blocks sent.
    pub bytes: u64,
    /// Pushes handed back for want of room.
    pub full: u64,
    /// Answers that nobody waits for, and frames that are none.
    pub unexpected: u64,
}

#[derive(Clone, Hash)]
struct Transfer<P> {
    key: TicketKey,
    address: String,
    first_block: u32,
    end_block: u32,
    layers: u32,
    lease: Duration,
    /// `None` while connecting.
    peer: Option<P>,
    /// When the transfer was begun, or was last seen to have sent something.
    active_at: Instant,
    /// Something was sent since the last [`SenderCore::handle_timeout`]: calls that send know no time.
    sent: bool,
}

/// Where a transfer's frames go.
struct Route<P> {
    id: TransferId,
    peer: P,
    key: TicketKey,
}

#[derive(Clone, Hash)]
enum Link<P> {
    Dialling,
    Up {
        peer: P,
        incarnation: u64,
        /// It had no room. No frame is made for it until the next flush, and then copied for nothing.
        full: bool,
    },
}

impl<P: Copy + Eq> SenderCore<P> {
    /// No transfers, no connections.
    pub fn new() -> Self {
        Self {
            transfers: BTreeMap::new(),
            by_ticket: HashMap::new(),
            links: BTreeMap::new(),
            dials: VecDeque::new(),
            goodbyes: VecDeque::new(),
            events: Vec::new(),
            next_id: 0,
            stats: SenderStats::default(),
        }
    }

    /// Opens a transfer; [`Self::next_dial`] says if a connection is wanted for it.
    ///
    /// # Errors
    /// The ticket is in use here, or too many transfers are.
    pub fn begin(&mut self, ticket: KvTicket, now: Instant) -> Result<TransferId, TransferError> {
        let key = TicketKey { incarnation: ticket.incarnation, ticket_id: ticket.ticket_id };
        if self.transfers.len() >= TRANSFERS_MAX {
            return Err(TransferError::TooMany { max: TRANSFERS_MAX });
        }
        if self.by_ticket.contains_key(&key) {
            return Err(TransferError::TicketInUse(ticket.ticket_id));
        }
        let peer = match self.links.get(&ticket.fabric_address) {
            // Another incarnation: the connection will be lost, and a new one wanted, or time decides.
            Some(&Link::Up { peer, incarnation, .. }) => (incarnation == key.incarnation).then_some(peer),
            Some(Link::Dialling) => None,
            None => {
                self.want(ticket.fabric_address.clone());
                None
            }
        };
        let id = TransferId(self.next_id);
        self.next_id += 1;
        self.by_ticket.insert(key, id);
        let transfer = Transfer {
            key,
            first_block: ticket.first_block,
            end_block: ticket.end_block(),
            layers: ticket.layers,
            lease: ticket.lease,
            address: ticket.fabric_address,
            peer,
            active_at: now,
            sent: false,
        };
        self.transfers.insert(id, transfer);
        self.stats.begun += 1;
        Ok(id)
    }

    /// Sends a run of one layer. See [`super::Sender::push_blocks`].
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
        let bytes = pieces.iter().map(|piece| piece.len()).sum();
        // As many as the ticket's blocks at most, as `permits` has checked.
        let blocks = pieces.len() as u32;
        let sent = outlet.try_push(route.peer, pieces, &mut |checksums| {
            let run = Run { layer, first_block, blocks, last_rows, checksums };
            wire::encode_push_head(route.key, Push::Blocks(run))
        });
        self.sent(route, bytes, sent)?;
        self.stats.bytes += bytes as u64;
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
        let frame = wire::encode_push(route.key, Push::Finish(first_token), Bytes::new());
        let sent = outlet.try_send(route.peer, frame);
        self.sent(route, 0, sent)
    }

    /// Forgets a transfer without an event. The next flush tells decode, if it has been heard of there.
    pub fn abort(&mut self, id: TransferId, reason: &str) {
        let Some(transfer) = self.remove(id) else { return };
        self.stats.aborted += 1;
        if let Some(peer) = transfer.peer
            && self.goodbyes.len() < GOODBYES_MAX
        {
            self.goodbyes.push_back((peer, transfer.key, reason.to_owned()));
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
        let Some(id) = id.filter(|id| self.transfers.get(id).is_some_and(|to| to.peer == Some(peer))) else {
            // Duplicates, and answers that crossed an abort.
            self.stats.unexpected += 1;
            return;
        };
        match reply {
            Reply::Committed => self.end(id, SenderEvent::Committed { id }),
            Reply::Stale(detail) | Reply::Refused(detail) => {
                self.end(id, SenderEvent::Refused { id, detail })
            }
        }
    }

    /// A connection to `address` stands, at whose end is `incarnation`. Ignored where nobody wants one; telling it
    /// twice does no harm.
    pub fn handle_connected(&mut self, address: &str, peer: P, incarnation: u64) {
        let Some(link) = self.links.get_mut(address) else { return };
        *link = Link::Up { peer, incarnation, full: false };
        for transfer in self.transfers.values_mut() {
            if transfer.address == address
                && transfer.peer.is_none()
                && transfer.key.incarnation == incarnation
            {
                transfer.peer = Some(peer);
            }
        }
    }

    /// Nobody answers at `address`. Who issued a ticket there is gone.
    pub fn handle_dial_failed(&mut self, address: &str) {
        if matches!(self.links.get(address), Some(Link::Dialling)) {
            self.links.remove(address);
            self.lose(|transfer| transfer.peer.is_none() && transfer.address == address);
        }
    }

    /// A connection has ended.
    pub fn handle_peer_lost(&mut self, lost: P) {
        self.goodbyes.retain(|(peer, _, _)| *peer != lost);
        self.lose(|transfer| transfer.peer == Some(lost));
        let of_lost = |link: &Link<P>| matches!(link, Link::Up { peer, .. } if *peer == lost);
        let Some(address) =
            self.links.iter().find(|(_, link)| of_lost(link)).map(|(address, _)| address.clone())
        else {
            return;
        };
        self.links.remove(&address);
        // Tickets of a new process at the old one's address have been waiting for this.
        if self.transfers.values().any(|transfer| transfer.peer.is_none() && transfer.address == address) {
            self.want(address);
        }
    }

    /// Gives up what has been connecting, or silent, for too long: decode has given it up as well by then.
    pub fn handle_timeout(&mut self, now: Instant) {
        for transfer in self.transfers.values_mut() {
            if std::mem::take(&mut transfer.sent) {
                transfer.active_at = now;
            }
        }
        self.lose(|transfer| {
            let limit =
                if transfer.peer.is_some() { transfer.lease } else { CONNECTING_MAX.min(transfer.lease) };
            now.saturating_duration_since(transfer.active_at) >= limit
        });
    }

    /// Tells decode of aborts, and lets pushes try again.
    pub fn flush(&mut self, outlet: &mut impl Outlet<P>) {
        for link in self.links.values_mut() {
            if let Link::Up { full, .. } = link {
                *full = false;
            }
        }
        for _ in 0..self.goodbyes.len() {
            let Some((peer, key, reason)) = self.goodbyes.pop_front() else { return };
            let frame = wire::encode_push(key, Push::Abort(reason.clone()), Bytes::new());
            if outlet.try_send(peer, frame) == Err(Unsent::Full) {
                self.goodbyes.push_back((peer, key, reason));
            }
        }
    }

    /// An address that a connection is wanted to. Answered by [`Self::handle_connected`] or
    /// [`Self::handle_dial_failed`].
    pub fn next_dial(&mut self) -> Option<String> {
        self.dials.pop_front()
    }

    /// What has ended since the last call, in order.
    pub fn take_events(&mut self) -> Vec<SenderEvent> {
        std::mem::take(&mut self.events)
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
        self.dials.hash(into);
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
            match (transfer.peer, self.links.get(&transfer.address)) {
                (None, None) => panic!("transfer {id} waits for a connection that nobody makes"),
                (Some(ours), Some(Link::Up { peer, incarnation, .. })) if ours == *peer => {
                    assert_eq!(
                        transfer.key.incarnation, *incarnation,
                        "transfer {id} goes to another process"
                    );
                }
                _ => {}
            }
        }
    }

    /// The way of a transfer that could send now.
    fn route(&self, id: TransferId) -> Result<Route<P>, TransferError> {
        let transfer = self.transfers.get(&id).ok_or(TransferError::Ended(id))?;
        let peer = transfer.peer.ok_or(TransferError::Full)?;
        match self.links.get(&transfer.address) {
            Some(Link::Up { full: true, .. }) => Err(TransferError::Full),
            _ => Ok(Route { id, peer, key: transfer.key }),
        }
    }

    /// What becomes of a transfer when a frame of it was offered with this outcome.
    fn sent(&mut self, route: Route<P>, bytes: usize, sent: Result<(), Unsent>) -> Result<(), TransferError> {
        let Route { id, peer, .. } = route;
        match sent {
            Ok(()) => {
                if let Some(transfer) = self.transfers.get_mut(&id) {
                    transfer.sent = true;
                }
                Ok(())
            }
            Err(Unsent::Full) => {
                self.stats.full += 1;
                let to_peer = |link: &&mut Link<P>| matches!(link, Link::Up { peer: at, .. } if *at == peer);
                if let Some(Link::Up { full, .. }) = self.links.values_mut().find(to_peer) {
                    *full = true;
                }
                Err(TransferError::Full)
            }
            Err(Unsent::TooLarge) => Err(TransferError::FrameTooLarge { bytes }),
            Err(Unsent::Gone) => {
                // Its `PeerLost` is on the way, for all its transfers; this one need not wait.
                self.end(id, SenderEvent::Lost { id });
                Err(TransferError::Ended(id))
            }
        }
    }

    fn want(&mut self, address: String) {
        self.links.insert(address.clone(), Link::Dialling);
        self.dials.push_back(address);
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

impl<P> Transfer<P> {
    /// What the sender can check without a layout; decode checks the rest.
    fn permits(&self, layer: u32, first_block: u32, pieces: usize) -> Result<(), TransferError> {
        if layer >= self.layers {
            let permitted = format!("layers below {}", self.layers);
            return Err(TransferError::OutsideTicket { field: "layer", value: layer.into(), permitted });
        }
        let room = self.end_block.saturating_sub(first_block) as usize;
        if first_block < self.first_block || pieces == 0 || pieces > room {
            let permitted = format!("blocks {}..{}", self.first_block, self.end_block);
            let value = u64::from(first_block);
            return Err(TransferError::OutsideTicket { field: "first_block", value, permitted });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
