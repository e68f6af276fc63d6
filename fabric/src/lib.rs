//! Frames between workers: the one carrier under the KV hand-off and the experts' dispatch.
//!
//! A [`Fabric`] is a worker's end. It dials other ends, is dialled by them, and moves [`Frame`]s on two
//! channels, [`Channel::Kv`] and [`Channel::Experts`], inside a process, through memory that two processes of a host
//! share, by RDMA, or over QUIC: the first of these that both ends can. All keep the same promises:
//! frames of one peer and channel arrive whole and in order; a frame is never delivered twice;
//! [`Event::PeerUp`] comes before a peer's first frame and [`Event::PeerLost`] after its last one, on both channels;
//! a [`PeerId`] stands for one connection, so for one incarnation of a worker. A frame that was accepted for
//! sending may still be lost with its peer: whoever needs to know asks for an answer.
//!
//! Nothing here blocks a device thread: [`Fabric::try_send`] hands a full queue back to its caller and
//! [`Fabric::receiver`] can be polled. Every queue is bounded by [`Limits`].
//!
//! Deliberately absent: what the bytes mean (`kvtransfer`, `expert`), when to retry, and one-sided writes into a
//! worker's own memory. Over RDMA a peer writes into staging memory of its connection, and nowhere else; whatever the
//! transport, a receiver copies out of a frame after its own checks.

mod allocator;
mod arrivals;
mod body;
mod checksum;
mod error;
mod event;
mod frame;
mod in_process;
mod inbox;
mod limits;
mod places;
mod quic;
mod rdma;
mod shared;
mod spares;
mod stats;
mod sync;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub use allocator::keep_freed_memory;
pub use arrivals::Arrivals;
pub use body::{Body, OutsideBody};
pub use checksum::checksum;
pub use error::{CredentialError, DialError, FabricError, LibraryError, SendError};
pub use event::{Event, LossReason, PeerId, PeerInfo};
pub use frame::{Channel, Frame, ProtocolError};
pub use in_process::Hub;
pub use limits::Limits;
pub use quic::{QuicOptions, SILENCE_MAX};
pub use rdma::{RdmaOptions, RdmaUse};
pub use stats::Stats;

/// A worker's end of the fabric. Cheap to clone; the last clone dropped closes it.
#[derive(Clone)]
pub struct Fabric {
    transport: Arc<Transport>,
}

/// An enum instead of a trait object: there are two transports, both known here.
enum Transport {
    InProcess(in_process::Endpoint),
    Quic(quic::Endpoint),
}

impl Fabric {
    /// Binds a UDP port and starts the I/O thread. Peers are authenticated both ways against the CA given.
    pub fn quic(options: QuicOptions) -> Result<Self, FabricError> {
        let endpoint = quic::Endpoint::start(options)?;
        Ok(Self { transport: Arc::new(Transport::Quic(endpoint)) })
    }

    /// Takes the place of `worker` on `hub`: for a cluster in one process, and for tests.
    pub fn in_process(
        hub: &Hub,
        worker: impl Into<String>,
        incarnation: u64,
        limits: Limits,
    ) -> Result<Self, FabricError> {
        let endpoint = in_process::Endpoint::join(hub, worker.into(), incarnation, limits)?;
        Ok(Self { transport: Arc::new(Transport::InProcess(endpoint)) })
    }

    /// Where others reach this end: `quic://127.0.0.1:4433` or `inproc://decode-0`.
    pub fn address(&self) -> String {
        match &*self.transport {
            Transport::InProcess(endpoint) => endpoint.address().to_owned(),
            Transport::Quic(endpoint) => endpoint.address().to_owned(),
        }
    }

    /// Connects to another end, or returns the live connection that an earlier call made to the same address.
    ///
    /// Blocks the caller for at most `deadline`: not for a scheduler's loop, and on a tokio runtime only
    /// through `spawn_blocking`. Makes one attempt; whether to try again is the caller's policy.
    pub fn connect(&self, address: &str, deadline: Duration) -> Result<PeerId, FabricError> {
        match &*self.transport {
            Transport::InProcess(endpoint) => endpoint.connect(address),
            Transport::Quic(endpoint) => endpoint.connect(address, deadline),
        }
    }

    /// Queues a frame, without ever waiting.
    ///
    /// [`SendError::Full`] and [`SendError::Oversized`] give the frame back. `Ok` means queued, not delivered.
    pub fn try_send(&self, peer: PeerId, channel: Channel, frame: Frame) -> Result<(), SendError> {
        match &*self.transport {
            Transport::InProcess(endpoint) => endpoint.try_send(peer, channel, frame),
            Transport::Quic(endpoint) => endpoint.try_send(peer, channel, frame),
        }
    }

    /// Queues a frame whose body is gathered from `pieces`: straight into the memory that the peer reads, where it is of
    /// this host. `head` is made of each piece's [`checksum`], and may have 512 bytes and 32 more for each piece.
    ///
    /// # Errors
    /// As [`Fabric::try_send`]; the frames given back are empty, as no frame is made where there is no room.
    pub fn try_send_gathered(
        &self,
        peer: PeerId,
        channel: Channel,
        pieces: &[&[u8]],
        head: impl FnOnce(Vec<u64>) -> Bytes,
    ) -> Result<(), SendError> {
        match &*self.transport {
            Transport::InProcess(endpoint) => endpoint.try_send_gathered(peer, channel, pieces, head),
            Transport::Quic(endpoint) => endpoint.try_send_gathered(peer, channel, pieces, head),
        }
    }

    /// The events of a channel. All receivers of a channel share one queue: an event goes to one of them.
    ///
    /// A received body counts against [`Limits::receive_bytes_max`] until its last clone is dropped; at the limit
    /// the channel is read no further and its senders see [`SendError::Full`]. Room comes back in the order of the frames:
    /// a body that is held keeps that of the bodies behind it. After [`Fabric::close`] the
    /// queue can be read to its end and then disconnects.
    pub fn receiver(&self, channel: Channel) -> Arrivals {
        match &*self.transport {
            Transport::InProcess(endpoint) => endpoint.receiver(channel),
            Transport::Quic(endpoint) => endpoint.receiver(channel),
        }
    }

    /// Who a live peer is; `None` once it is lost.
    pub fn peer(&self, peer: PeerId) -> Option<PeerInfo> {
        match &*self.transport {
            Transport::InProcess(endpoint) => endpoint.peer(peer),
            Transport::Quic(endpoint) => endpoint.peer(peer),
        }
    }

    /// What this end has carried and refused so far.
    pub fn stats(&self) -> Stats {
        match &*self.transport {
            Transport::InProcess(endpoint) => endpoint.stats(),
            Transport::Quic(endpoint) => endpoint.stats(),
        }
    }

    /// Tells the peers goodbye and joins the I/O thread. Queued frames are dropped. Idempotent.
    pub fn close(&self) {
        match &*self.transport {
            Transport::InProcess(endpoint) => endpoint.close(),
            Transport::Quic(endpoint) => endpoint.close(),
        }
    }
}

impl std::fmt::Debug for Fabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fabric").field("address", &self.address()).finish_non_exhaustive()
    }
}
