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

use fabric::{Arrivals, Channel, Event, Fabric, PeerId};
use model::TokenId;
use proto::ticket::KvTicket;

pub use self::core::SenderCore;
use self::dial::Dialer;
pub use self::stats::SenderStats;
use crate::error::TransferError;
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
    core: SenderCore<PeerId>,
    fabric: Fabric,
    events: Arrivals,
    dialer: Dialer,
}

impl Sender {
    /// A sender that owns the KV channel of `fabric`.
    pub fn new(fabric: Fabric) -> Self {
        let events = fabric.receiver(Channel::Kv);
        let dialer = Dialer::new(fabric.clone());
        Self { core: SenderCore::new(), fabric, events, dialer }
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
        self.core.push_blocks(id, layer, first_block, pieces, last_rows, &mut self.fabric)
    }

    /// Sends the first token, behind the last block. Decode commits and answers.
    ///
    /// # Errors
    /// As [`Self::push_blocks`].
    pub fn finish(&mut self, id: TransferId, first_token: TokenId) -> Result<(), TransferError> {
        self.core.finish(id, first_token, &mut self.fabric)
    }

    /// Gives a transfer up and tells decode, as far as it can be told. No event follows. Ended ones are ignored.
    pub fn abort(&mut self, id: TransferId, reason: &str) {
        self.core.abort(id, reason);
        self.core.flush(Instant::now(), &mut self.fabric);
    }

    /// Takes in answers, connections and losses, and says which transfers have ended or must be offered again.
    pub fn poll(&mut self, now: Instant) -> Vec<SenderEvent> {
        // As many as there are now, so that a flood cannot hold the thread.
        for _ in 0..self.events.len() {
            match self.events.try_recv() {
                Ok(Event::Frame { peer, head, .. }) => self.core.handle_frame(peer, &head),
                Ok(Event::PeerLost { peer, reason }) => {
                    tracing::debug!(%peer, %reason, "a decode worker is lost");
                    self.core.handle_peer_lost(peer, process_lives(&reason), now);
                }
                // Rings before the dial's own end does, and wakes who waits for it.
                Ok(Event::PeerUp { peer, info }) => {
                    self.core.handle_connected(&info.address, peer, info.incarnation, now);
                }
                Err(_) => break,
            }
        }
        self.take_connections(now);
        self.core.handle_timeout(now);
        self.core.flush(now, &mut self.fabric);
        self.dial_where_wanted(now);
        self.core.take_events()
    }

    /// Becomes readable when an answer has come. To be waited on, never received from.
    pub fn arrivals(&self) -> &crossbeam_channel::Receiver<Event> {
        self.events.queue()
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
            && let Some(address) = self.core.next_dial()
        {
            self.dialer.dial(address);
            self.take_connections(now);
        }
    }

    fn take_connections(&mut self, now: Instant) {
        while let Some((address, connected)) = self.dialer.next() {
            // A peer that is lost by now has sent its `PeerLost` already: there is no second one to wait for.
            let peer = connected.and_then(|peer| Some((peer, self.fabric.peer(peer)?.incarnation)));
            match peer {
                Some((peer, incarnation)) => self.core.handle_connected(&address, peer, incarnation, now),
                None => self.core.handle_dial_failed(&address, now),
            }
        }
    }
}
