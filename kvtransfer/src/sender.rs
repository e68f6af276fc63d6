//! Prefill's end of the hand-off: blocks out, an answer in.
//!
//! Lives on the device thread and never waits. A push is copied once, into the frame that travels; what the peer has
//! no room for is handed back to the caller as [`TransferError::Full`], whose blocks stay where they are until the
//! transfer's end anyway. So a slow decode worker costs no memory here.

mod core;
mod dial;
mod links;
mod stats;
mod transfer;

use std::fmt;
use std::time::Instant;

use crossbeam_channel::Select;
use fabric::Event;
use model::TokenId;
use proto::ticket::KvTicket;

pub use self::core::SenderCore;
use self::dial::Dialer;
pub use self::links::Dial;
pub use self::stats::SenderStats;
use crate::error::TransferError;
use crate::rails::{RailPeer, Rails};
use crate::receiver::process_lives;

/// Names a transfer within its sender; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(u64);

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What became of a transfer. Each has one end: one of the first three, or [`Sender::abort`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SenderEvent {
    /// Decode has every block; ours may be reused.
    Committed {
        /// The transfer.
        id: TransferId,
    },
    /// Decode does not want the blocks: its ticket is dead, or a frame was wrong.
    Refused {
        /// The transfer.
        id: TransferId,
        /// Decode's words.
        detail: String,
    },
    /// Decode cannot be reached, is gone or silent. Whether it has the blocks is unknown.
    Lost {
        /// The transfer.
        id: TransferId,
    },
    /// No end: the transfer goes on, on another path or on the same one, and what decode has not got of it must be offered
    /// again. The caller offers everything from the start, and what is there already is not sent.
    Resumed {
        /// The transfer.
        id: TransferId,
        /// Pieces that decode has not got.
        missing: usize,
    },
}

/// Prefill's end, on the fabric's KV channel.
pub struct Sender {
    core: SenderCore<RailPeer>,
    rails: Rails,
    dialer: Dialer,
}

impl Sender {
    /// A sender that owns the KV channel of these ends. Each dials the address of its own place in a ticket.
    pub fn new(rails: impl Into<Rails>) -> Self {
        Self { core: SenderCore::new(), rails: rails.into(), dialer: Dialer::new() }
    }

    /// Opens the transfer that `ticket` permits. Connects to its worker if need be, without waiting for it: until the
    /// connection stands, pushes are answered with [`TransferError::Full`].
    ///
    /// # Errors
    /// The ticket is in use here, or too many transfers are.
    pub fn begin(&mut self, ticket: KvTicket, now: Instant) -> Result<TransferId, TransferError> {
        let id = self.core.begin(ticket, now)?;
        self.dial_where_wanted(now);
        Ok(id)
    }

    /// Sends consecutive blocks of one layer: `pieces[i]` holds the rows of block `first_block + i` of the sequence,
    /// all of them but in the last piece, which has `last_rows`. Blocks that decode has are not sent again.
    ///
    /// # Errors
    /// [`TransferError::Full`]: the same again after the next poll. [`TransferError::Ended`]: the next poll says how.
    /// The others are bugs of the caller.
    pub fn push_blocks(
        &mut self,
        id: TransferId,
        layer: u32,
        first_block: u32,
        pieces: &[&[u8]],
        last_rows: u32,
    ) -> Result<(), TransferError> {
        self.core.push_blocks(id, layer, first_block, pieces, last_rows, &mut self.rails)
    }

    /// Sends the first token, behind the last block. Decode commits and answers.
    ///
    /// # Errors
    /// As [`Self::push_blocks`].
    pub fn finish(&mut self, id: TransferId, first_token: TokenId) -> Result<(), TransferError> {
        self.core.finish(id, first_token, &mut self.rails)
    }

    /// Gives a transfer up and tells decode, as far as it can be told. No event follows. Ended ones are ignored.
    pub fn abort(&mut self, id: TransferId, reason: &str) {
        self.core.abort(id, reason);
        self.core.flush(Instant::now(), &mut self.rails);
    }

    /// Takes in answers, connections and losses, and says which transfers have ended or must be offered again.
    pub fn poll(&mut self, now: Instant) -> Vec<SenderEvent> {
        // As many as there are now, so that a flood cannot hold the thread.
        for _ in 0..self.rails.events() {
            let Some((rail, event)) = self.rails.next_event() else { break };
            match event {
                Event::Frame { peer, head, .. } => self.core.handle_frame(RailPeer { rail, peer }, &head),
                Event::PeerLost { peer, reason } => {
                    tracing::debug!(rail, %peer, %reason, "a decode worker is lost");
                    self.core.handle_peer_lost(RailPeer { rail, peer }, process_lives(&reason), now);
                }
                // Rings before the dial's own end does, and wakes who waits for it.
                Event::PeerUp { peer, info } => {
                    let peer = RailPeer { rail, peer };
                    self.core.handle_connected(&info.address, peer, info.incarnation, now);
                }
            }
        }
        self.take_connections(now);
        self.core.handle_timeout(now);
        self.core.flush(now, &mut self.rails);
        self.dial_where_wanted(now);
        self.core.take_events()
    }

    /// Adds what makes [`Self::poll`] worth calling to what a thread sleeps on.
    pub fn wait_on<'a>(&'a self, select: &mut Select<'a>) {
        self.rails.wait_on(select);
    }

    /// Pieces of a transfer that have not been sent; 0 for one that has ended.
    pub fn unsent(&self, id: TransferId) -> usize {
        self.core.unsent(id)
    }

    /// Counters since the start.
    pub fn stats(&self) -> SenderStats {
        self.core.stats()
    }

    fn dial_where_wanted(&mut self, now: Instant) {
        while self.dialer.has_room()
            && let Some(Dial { rail, address }) = self.core.next_dial()
        {
            let (rail, fabric) = self.rails.end(rail);
            self.dialer.dial(fabric, Dial { rail, address });
            self.take_connections(now);
        }
    }

    fn take_connections(&mut self, now: Instant) {
        while let Some((Dial { rail, address }, connected)) = self.dialer.next() {
            let peer = connected.map(|peer| RailPeer { rail, peer });
            // A peer that is lost by now has sent its `PeerLost` already: there is no second one to wait for.
            let peer = peer.and_then(|peer| Some((peer, self.rails.peer(peer)?.incarnation)));
            match peer {
                Some((peer, incarnation)) => self.core.handle_connected(&address, peer, incarnation, now),
                None => self.core.handle_dial_failed(&address, now),
            }
        }
    }
}
