//! What can happen in a history, and to whom.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use fabric::Frame;
use kvtransfer::{KvTicket, Outlet, TicketId, Unsent};

use super::{History, LinkId, PREFILLS};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Worker {
    Prefill(usize),
    Decode(usize),
}

pub(super) enum Happening {
    /// A request arrives at the router.
    Arrive,
    /// Its ticket reaches prefill.
    Begin {
        sequence: u64,
        ticket: Box<KvTicket>,
    },
    /// A device thread comes round, while its process lives.
    Turn {
        worker: Worker,
        epoch: u64,
    },
    Deliver(Packet),
    /// A worker learns that a connection is lost.
    Told {
        worker: Worker,
        epoch: u64,
        link: LinkId,
        /// Whether the process at the other end may live.
        process_lives: bool,
    },
    /// A dial comes to its end.
    Dialled {
        prefill: usize,
        epoch: u64,
        decode: usize,
        address: String,
    },
    /// The router lets go of decode's end.
    Release(u64),
    /// The router lets go of prefill's end.
    Cancel(u64),
    /// A running sequence has its last token.
    Finish {
        decode: usize,
        epoch: u64,
        ticket: TicketId,
    },
    /// A connection is given up after silence: by whom, [`Happening::Told`] says later.
    Cut(LinkId),
    Fault,
}

#[derive(Clone)]
pub(super) struct Packet {
    pub(super) link: LinkId,
    pub(super) to: Worker,
    pub(super) head: Bytes,
    pub(super) body: Bytes,
}

pub(super) struct Link {
    pub(super) prefill: usize,
    pub(super) decode: usize,
    pub(super) open: bool,
    /// Nothing passes from the one to the other moment.
    pub(super) partitioned: Option<(Duration, Duration)>,
    /// All frames are lost until then.
    pub(super) lossy: Duration,
    /// Frames of prefill's that have not arrived.
    pub(super) in_flight: usize,
}

/// A process, as the others see it.
#[derive(Clone, Copy, Default)]
pub(super) struct Process {
    /// Counts its starts.
    pub(super) epoch: u64,
    /// Stopped from the one to the other moment.
    pub(super) paused: Option<(Duration, Duration)>,
    /// When it last went on.
    pub(super) resumed: Duration,
}

/// A hand-off as the router sees it.
pub(super) struct Request {
    pub(super) ticket: TicketId,
    pub(super) prefill: usize,
    pub(super) prefill_epoch: u64,
    pub(super) decode: usize,
    pub(super) decode_epoch: u64,
    /// The faults that it has met.
    pub(super) met: Option<Met>,
    /// The connection that it has last pushed on.
    pub(super) path: Option<LinkId>,
    /// The router has let go of prefill's end: its call will not arrive any more.
    pub(super) cancelled: bool,
    pub(super) at_prefill: bool,
    pub(super) at_decode: bool,
}

/// Faults that have met one hand-off.
#[derive(Debug, Clone, Copy)]
pub(super) struct Met {
    pub(super) first: Duration,
    pub(super) last: Duration,
    /// What the last one was.
    pub(super) by: &'static str,
    pub(super) faults: u32,
}

impl Happening {
    /// Whose process has to run for it.
    pub(super) fn worker(&self, history: &History) -> Option<Worker> {
        match self {
            Self::Turn { worker, .. } | Self::Told { worker, .. } => Some(*worker),
            Self::Deliver(packet) => Some(packet.to),
            Self::Dialled { prefill, .. } => Some(Worker::Prefill(*prefill)),
            Self::Finish { decode, .. } => Some(Worker::Decode(*decode)),
            Self::Begin { sequence, .. } | Self::Cancel(sequence) => {
                history.requests.get(sequence).map(|request| Worker::Prefill(request.prefill))
            }
            Self::Release(sequence) => {
                history.requests.get(sequence).map(|request| Worker::Decode(request.decode))
            }
            Self::Arrive | Self::Cut(_) | Self::Fault => None,
        }
    }
}

impl Worker {
    pub(super) fn index(self) -> usize {
        match self {
            Self::Prefill(prefill) => prefill,
            Self::Decode(decode) => PREFILLS + decode,
        }
    }
}

/// Frames in flight on one connection at most: beyond, its queue is full.
const IN_FLIGHT_MAX: usize = 200;

/// One side's way into the network.
pub(super) struct Exit<'a> {
    pub(super) links: &'a BTreeMap<LinkId, Link>,
    /// Nobody has room for a moment.
    pub(super) full: bool,
    pub(super) sent: Vec<(LinkId, Frame)>,
}

impl Outlet<LinkId> for Exit<'_> {
    fn try_send(&mut self, link: LinkId, frame: Frame) -> Result<(), Unsent> {
        let in_flight = match self.links.get(&link) {
            Some(link) if link.open => link.in_flight,
            _ => return Err(Unsent::Gone),
        };
        if self.full || in_flight > IN_FLIGHT_MAX {
            return Err(Unsent::Full);
        }
        self.sent.push((link, frame));
        Ok(())
    }
}
