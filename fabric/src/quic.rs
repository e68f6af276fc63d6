//! The transport between processes: QUIC with mutual TLS on one UDP port and one I/O thread.
//!
//! A connection carries one long-lived unidirectional stream per channel and direction; its life is in
//! [`connection`]. A peer of the same host is attached to [`crate::shared`] memory in the handshake, and its frames
//! go there. Device threads only touch bounded queues ([`outbox`], [`Inbox`]) and the table of peers; sockets,
//! timers and cryptography belong to the I/O thread, a current-thread runtime that sleeps until a packet, a timer
//! or a queued frame wakes it.

mod attachment;
mod congestion;
mod connection;
mod endpoint;
mod hello;
mod one_sided;
mod outbox;
mod path;
mod peers;
mod socket;
mod tls;

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use tokio::sync::{Notify, mpsc};

use crate::arrivals::{Arrivals, Rings};
use crate::error::{DialError, FabricError, SendError};
use crate::event::{Event, PeerId, PeerInfo};
use crate::frame::{Channel, Frame};
use crate::inbox::Inbox;
use crate::limits::Limits;
use crate::rdma::{Rdma, RdmaOptions};
use crate::stats::Stats;
use crate::sync::lock;
use endpoint::Dial;
use hello::Hello;
use path::Path;
pub use path::SILENCE_MAX;
use peers::Peers;
use socket::SOCKET_BUFFER_BYTES;

const SCHEME: &str = "quic://";

/// Dials that wait for the I/O thread to look at them.
const DIALS_MAX: usize = 256;

/// How to open a QUIC end.
#[derive(Clone)]
pub struct QuicOptions {
    /// UDP address to bind; port 0 takes a free one.
    pub bind: SocketAddr,
    /// The largest UDP payload that the network carries, 1,200 to 65,507 bytes: from the first datagram on, and no larger
    /// one is tried. `None`: what loopback carries on a loopback address; on any other one what is found by trying, up
    /// to the frames of 9,000-byte Ethernet.
    pub datagram_bytes: Option<u16>,
    /// The only certificate authority peers are checked against.
    pub ca_pem: String,
    /// Our certificate chain, for the name `trireme`.
    pub cert_pem: String,
    /// Its private key.
    pub key_pem: String,
    /// What this worker calls itself.
    pub worker: String,
    /// Fresh at each start of this process.
    pub incarnation: u64,
    /// Bounds of queues and frames.
    pub limits: Limits,
    /// Whether frames of peers on this host go through shared memory. They do where both ends want it.
    pub share_memory: bool,
    /// Whether frames of other peers go over RDMA. They do where both ends want it and reach each other's memory.
    pub rdma: RdmaOptions,
}

/// A worker's end on the network.
pub(crate) struct Endpoint {
    address: String,
    bound: SocketAddr,
    limits: Limits,
    peers: Arc<Peers>,
    receivers: [Receiver<Event>; 2],
    rings: Arc<Rings>,
    dials: mpsc::Sender<Dial>,
    closing: Arc<Notify>,
    rdma: Option<Arc<Rdma>>,
    io_thread: Mutex<Option<JoinHandle<()>>>,
}

impl Endpoint {
    pub fn start(options: QuicOptions) -> Result<Self, FabricError> {
        options.limits.validate()?;
        let configs = tls::configs(&options)?;
        let rdma = Rdma::open(&options.rdma)?;
        let path = Path::of(options.bind, options.datagram_bytes)?;
        let (socket, bound, buffer_bytes) = socket::bind(options.bind, SOCKET_BUFFER_BYTES)
            .map_err(|source| FabricError::Bind { address: options.bind, source })?;
        let in_flight_bytes = path::in_flight_bytes(&options.limits, buffer_bytes);
        let address = format!("{SCHEME}{bound}");
        let hello = Hello::new(options.worker, options.incarnation, address.clone())?;

        let peers = Arc::new(Peers::default());
        let rings = Rings::new(Arc::clone(&peers.counters)).map_err(FabricError::Thread)?;
        let rings = Arc::new(rings);
        let (kv, kv_events) = Inbox::new(&options.limits);
        let (experts, experts_events) = Inbox::beside(&options.limits, Some(Arc::clone(&rings)));
        let (dials, dials_received) = mpsc::channel(DIALS_MAX);
        let closing = Arc::new(Notify::new());
        let setup = endpoint::Setup {
            socket,
            path,
            in_flight_bytes,
            configs,
            hello,
            limits: options.limits.clone(),
            peers: Arc::clone(&peers),
            inboxes: [kv, experts],
            rings: options.share_memory.then(|| Arc::clone(&rings)),
            rdma: rdma.clone(),
            dials: dials_received,
            closing: Arc::clone(&closing),
        };
        let io_thread = endpoint::spawn(setup).map_err(FabricError::Thread)?;
        Ok(Self {
            address,
            bound,
            limits: options.limits,
            peers,
            receivers: [kv_events, experts_events],
            rings,
            dials,
            closing,
            rdma,
            io_thread: Mutex::new(Some(io_thread)),
        })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn connect(&self, address: &str, deadline: Duration) -> Result<PeerId, FabricError> {
        let unreachable = |source| FabricError::Unreachable { address: address.to_owned(), source };
        let host = address.strip_prefix(SCHEME).ok_or_else(|| FabricError::Address {
            address: address.to_owned(),
            expected: "quic://HOST:PORT",
        })?;
        // A name may have addresses of both families; only the bound one's can be reached from this socket.
        let remote = host
            .to_socket_addrs()
            .ok()
            .and_then(|mut found| found.find(|a| a.is_ipv4() == self.bound.is_ipv4()))
            .ok_or_else(|| unreachable(DialError::Unresolved))?;
        if let Some(peer) = self.peers.dialled(remote) {
            return Ok(peer);
        }
        let (answer, answered) = crossbeam_channel::bounded(1);
        self.dials.try_send(Dial { remote, answer }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => unreachable(DialError::Overloaded),
            mpsc::error::TrySendError::Closed(_) => FabricError::Closed,
        })?;
        match answered.recv_timeout(deadline) {
            Ok(connected) => connected.map_err(unreachable),
            Err(RecvTimeoutError::Timeout) => Err(unreachable(DialError::TimedOut(deadline))),
            Err(RecvTimeoutError::Disconnected) => Err(FabricError::Closed),
        }
    }

    pub fn try_send(&self, peer: PeerId, channel: Channel, frame: Frame) -> Result<(), SendError> {
        if !frame.fits(&self.limits) {
            return Err(SendError::Oversized(frame));
        }
        self.counted(self.peers.try_send(peer, channel, frame))
    }

    pub fn try_send_gathered(
        &self,
        peer: PeerId,
        channel: Channel,
        pieces: &[&[u8]],
        head: impl FnOnce(Vec<u64>) -> Bytes,
    ) -> Result<(), SendError> {
        if pieces.iter().map(|piece| piece.len()).sum::<usize>() > self.limits.body_bytes_max {
            return Err(SendError::Oversized(Frame::default()));
        }
        self.counted(self.peers.try_send_gathered(peer, channel, pieces, head))
    }

    fn counted(&self, sent: Result<(), SendError>) -> Result<(), SendError> {
        if matches!(sent, Err(SendError::Full(_))) {
            self.peers.counters.sends_full.fetch_add(1, Relaxed);
        }
        sent
    }

    pub fn receiver(&self, channel: Channel) -> Arrivals {
        let queue = self.receivers[channel.index()].clone();
        let rings = (channel == Channel::Experts).then(|| Arc::clone(&self.rings));
        Arrivals::new(queue, rings)
    }

    pub fn peer(&self, peer: PeerId) -> Option<PeerInfo> {
        self.peers.info(peer)
    }

    pub fn stats(&self) -> Stats {
        self.peers.stats()
    }

    pub fn close(&self) {
        self.closing.notify_one();
        if let Some(io_thread) = lock(&self.io_thread).take()
            && io_thread.join().is_err()
        {
            tracing::error!("the fabric's I/O thread panicked");
        }
        if let Some(rdma) = &self.rdma {
            rdma.join();
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.close();
    }
}
