//! The table of live peers, shared between the I/O thread and the threads that send.
//!
//! A sender holds the lock for a look-up and one `try_send`; the I/O thread writes only when a peer comes or goes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, RwLock};

use bytes::Bytes;
use quinn::Connection;
use tokio::sync::Notify;

use super::outbox::Outbox;
use crate::error::SendError;
use crate::event::{PeerId, PeerInfo};
use crate::frame::{Channel, Frame};
use crate::stats::{Counters, Stats};
use crate::sync::{read, write};

/// Live peers, shared with the threads that send.
#[derive(Default)]
pub(crate) struct Peers {
    pub counters: Arc<Counters>,
    live: RwLock<HashMap<PeerId, Peer>>,
}

/// A live peer.
pub(crate) struct Peer {
    pub info: PeerInfo,
    /// The address we dialled, if we did.
    pub dialled: Option<SocketAddr>,
    pub outboxes: [Outbox; 2],
    pub connection: Connection,
    /// Told when a newer incarnation of the worker is here.
    pub superseded: Arc<Notify>,
}

impl Peers {
    /// The live connection that was dialled to `remote`.
    pub fn dialled(&self, remote: SocketAddr) -> Option<PeerId> {
        let live = read(&self.live);
        live.iter().find(|(_, peer)| peer.dialled == Some(remote)).map(|(id, _)| *id)
    }

    pub fn try_send(&self, peer: PeerId, channel: Channel, frame: Frame) -> Result<(), SendError> {
        let live = read(&self.live);
        let peer = live.get(&peer).ok_or(SendError::Gone)?;
        peer.outboxes[channel.index()].offer(frame, &self.counters)
    }

    pub fn try_send_gathered(
        &self,
        peer: PeerId,
        channel: Channel,
        pieces: &[&[u8]],
        head: impl FnOnce(Vec<u64>) -> Bytes,
    ) -> Result<(), SendError> {
        let live = read(&self.live);
        let peer = live.get(&peer).ok_or(SendError::Gone)?;
        peer.outboxes[channel.index()].offer_gathered(pieces, head, &self.counters)
    }

    pub fn info(&self, peer: PeerId) -> Option<PeerInfo> {
        read(&self.live).get(&peer).map(|peer| peer.info.clone())
    }

    pub fn stats(&self) -> Stats {
        let mut stats = self.counters.snapshot();
        let live = read(&self.live);
        stats.peers = live.len() as u64;
        for peer in live.values() {
            stats.peers_shared += u64::from(matches!(peer.outboxes[0], Outbox::Shared(_)));
            stats.peers_rdma += u64::from(matches!(peer.outboxes[0], Outbox::Rdma(_)));
            let path = peer.connection.stats().path;
            stats.packets_lost += path.lost_packets;
            let mtu_bytes = u64::from(path.current_mtu);
            stats.mtu_bytes_min = match stats.mtu_bytes_min {
                0 => mtu_bytes,
                least => least.min(mtu_bytes),
            };
        }
        stats
    }

    /// Adds a peer if there is `room` beside so many live ones, and ends the connections of its worker's older
    /// incarnations: their process cannot be alive, so nobody need wait until it has been silent for long enough.
    pub fn enter(&self, id: PeerId, peer: Peer, room: impl Fn(usize) -> bool) -> bool {
        let mut live = write(&self.live);
        if !room(live.len()) {
            return false;
        }
        for other in live.values() {
            if other.info.worker == peer.info.worker && other.info.incarnation != peer.info.incarnation {
                other.superseded.notify_one();
            }
        }
        live.insert(id, peer);
        self.counters.peers_up.fetch_add(1, Relaxed);
        true
    }

    /// Removes a peer and keeps its count of lost packets.
    pub fn leave(&self, id: PeerId) -> Option<PeerInfo> {
        let peer = write(&self.live).remove(&id)?;
        let lost_packets = peer.connection.stats().path.lost_packets;
        self.counters.packets_lost.fetch_add(lost_packets, Relaxed);
        self.counters.peers_lost.fetch_add(1, Relaxed);
        Some(peer.info)
    }

    /// Forgets everybody: the I/O thread ends.
    pub fn clear(&self) {
        write(&self.live).clear();
    }
}
