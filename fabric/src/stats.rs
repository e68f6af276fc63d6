//! Counters of one end.

use std::iter::Sum;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What an end has carried and refused since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Live connections.
    pub peers: u64,
    /// Those of them that share memory with this end.
    pub peers_shared: u64,
    /// Those of them that are written to by RDMA.
    pub peers_rdma: u64,
    /// Connections that came up.
    pub peers_up: u64,
    /// Connections that ended.
    pub peers_lost: u64,
    /// Connections refused during the handshake: wrong CA, wrong protocol, no room.
    pub handshakes_failed: u64,
    /// Connections closed because the peer broke the protocol.
    pub protocol_errors: u64,
    /// Frames handed to the transport.
    pub frames_sent: u64,
    /// Their heads and bodies.
    pub bytes_sent: u64,
    /// Frames delivered to a channel's queue.
    pub frames_received: u64,
    /// Their heads and bodies.
    pub bytes_received: u64,
    /// Sends refused because a queue was full.
    pub sends_full: u64,
    /// Packets the transport had to send again. 0 in process.
    pub packets_lost: u64,
    /// The smallest datagram payload limit among live connections; 0 in process and without peers.
    pub mtu_bytes_min: u64,
}

/// What several ends have done together.
impl Sum for Stats {
    fn sum<I: Iterator<Item = Self>>(ends: I) -> Self {
        ends.fold(Self::default(), |all, end| Self {
            peers: all.peers + end.peers,
            peers_shared: all.peers_shared + end.peers_shared,
            peers_rdma: all.peers_rdma + end.peers_rdma,
            peers_up: all.peers_up + end.peers_up,
            peers_lost: all.peers_lost + end.peers_lost,
            handshakes_failed: all.handshakes_failed + end.handshakes_failed,
            protocol_errors: all.protocol_errors + end.protocol_errors,
            frames_sent: all.frames_sent + end.frames_sent,
            bytes_sent: all.bytes_sent + end.bytes_sent,
            frames_received: all.frames_received + end.frames_received,
            bytes_received: all.bytes_received + end.bytes_received,
            sends_full: all.sends_full + end.sends_full,
            packets_lost: all.packets_lost + end.packets_lost,
            mtu_bytes_min: match (all.mtu_bytes_min, end.mtu_bytes_min) {
                (0, one) | (one, 0) => one,
                (one, other) => one.min(other),
            },
        })
    }
}

/// The counters behind [`Stats`], written from any thread.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub peers_up: AtomicU64,
    pub peers_lost: AtomicU64,
    pub handshakes_failed: AtomicU64,
    pub protocol_errors: AtomicU64,
    pub frames_sent: AtomicU64,
    pub bytes_sent: AtomicU64,
    pub frames_received: AtomicU64,
    pub bytes_received: AtomicU64,
    pub sends_full: AtomicU64,
    /// Of connections that ended; those of live ones are asked for.
    pub packets_lost: AtomicU64,
}

impl Counters {
    pub fn sent(&self, bytes: usize) {
        self.frames_sent.fetch_add(1, Relaxed);
        self.bytes_sent.fetch_add(bytes as u64, Relaxed);
    }

    pub fn received(&self, bytes: usize) {
        self.frames_received.fetch_add(1, Relaxed);
        self.bytes_received.fetch_add(bytes as u64, Relaxed);
    }

    /// The counters as they are now; the caller adds what only live connections know.
    pub fn snapshot(&self) -> Stats {
        Stats {
            peers: 0,
            peers_shared: 0,
            peers_rdma: 0,
            peers_up: self.peers_up.load(Relaxed),
            peers_lost: self.peers_lost.load(Relaxed),
            handshakes_failed: self.handshakes_failed.load(Relaxed),
            protocol_errors: self.protocol_errors.load(Relaxed),
            frames_sent: self.frames_sent.load(Relaxed),
            bytes_sent: self.bytes_sent.load(Relaxed),
            frames_received: self.frames_received.load(Relaxed),
            bytes_received: self.bytes_received.load(Relaxed),
            sends_full: self.sends_full.load(Relaxed),
            packets_lost: self.packets_lost.load(Relaxed),
            mtu_bytes_min: 0,
        }
    }
}
