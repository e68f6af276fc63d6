//! What a consumer of the fabric is told.

use std::fmt;

use bytes::Bytes;

use crate::body::Body;
use crate::frame::ProtocolError;

/// One connection to a worker. Never reused within a [`Fabric`](crate::Fabric): a worker that comes back is another peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub(crate) u64);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "peer-{}", self.0)
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// The name the worker gave itself.
    pub worker: String,
    /// Fresh at each start of its process.
    pub incarnation: u64,
    /// Where it can be dialled: the address we used, or the one it named when it dialled us.
    pub address: String,
}

/// Something that happened on a channel.
#[derive(Clone, Debug)]
pub enum Event {
    /// A frame arrived whole.
    Frame {
        /// Who sent it.
        peer: PeerId,
        /// Its head.
        head: Bytes,
        /// Its body, in one piece; counted against the receive budget until dropped.
        body: Body,
    },
    /// A connection stands. Comes before the peer's first frame.
    PeerUp {
        /// Its id from now on.
        peer: PeerId,
        /// Who it is.
        info: PeerInfo,
    },
    /// A connection ended. Nothing more comes from this peer.
    PeerLost {
        /// Who is gone.
        peer: PeerId,
        /// Why.
        reason: LossReason,
    },
}

/// Why a peer was lost. For logs and counters: whatever the reason, its frames in flight have an unknown fate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LossReason {
    /// The other end closed.
    #[error("closed by the peer")]
    Closed,
    /// Its process is gone: the kernel closed what the two shared.
    #[error("its process ended")]
    Died,
    /// Nothing heard for longer than the idle time: killed, stopped, or cut off.
    #[error("silent for too long")]
    Silent,
    /// The peer's port answers, but does not know the connection: its process started anew.
    #[error("restarted")]
    Restarted,
    /// The same worker connected under a new incarnation: the old process is gone.
    #[error("replaced by a new incarnation")]
    Superseded,
    /// The peer sent what the protocol does not allow.
    #[error("the peer broke the protocol: {0}")]
    Protocol(ProtocolError),
    /// The peer says that we broke the protocol, or refuses us.
    #[error("refused by the peer: {detail}")]
    Refused {
        /// The reason it gave.
        detail: String,
    },
    /// The transport gave up for another reason.
    #[error("the connection failed: {detail}")]
    Failed {
        /// What the transport reported.
        detail: String,
    },
}
