//! A ticket's states at decode, and who may push for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::arrival::Arrival;
use crate::extent::Extent;
use crate::wire::Reply;

/// How a ticket stands. One that is not in the table is dead.
#[derive(Clone, Hash)]
pub(super) enum Ticket<P> {
    /// Nothing has come for it yet.
    Reserved {
        extent: Extent,
        since: Instant,
        deadline: Instant,
    },
    Receiving(Receiving<P>),
    /// The blocks are the sequence's. Kept to tell a sender whose answer was lost.
    Committed {
        path: Path<P>,
    },
}

#[derive(Clone, Hash)]
pub(super) struct Receiving<P> {
    pub(super) arrival: Arrival,
    /// The way that the newest generation takes.
    pub(super) path: Path<P>,
    pub(super) generation: u32,
    /// The path is lost, and with it all that is late on it: only a resume goes on.
    pub(super) broken: bool,
    pub(super) deadline: Instant,
    pub(super) times: Times,
}

/// When what has come.
#[derive(Clone, Copy, Hash)]
pub(super) struct Times {
    pub(super) reserved: Instant,
    pub(super) first: Instant,
    pub(super) last: Instant,
    pub(super) bytes: u64,
    pub(super) resumes: u32,
}

/// A connection, and whose it is.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Path<P> {
    pub(super) peer: P,
    pub(super) who: Arc<Who>,
}

/// A process of a worker.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Who {
    pub(super) worker: String,
    pub(super) incarnation: u64,
}

impl<P: Copy + Eq> Receiving<P> {
    /// Goes on over `path`, or says once more how it stands: what has landed need not be sent again.
    pub(super) fn resume(&mut self, path: Path<P>, generation: u32) -> Option<Reply> {
        if generation == self.generation && (self.broken || path.peer != self.path.peer) {
            // Late: the path that it was sent on has been given up since.
            return None;
        }
        self.times.resumes += u32::from(generation > self.generation);
        (self.path, self.generation, self.broken) = (path, generation, false);
        Some(Reply::Held { generation, landed: self.arrival.landed().words().to_vec() })
    }
}

impl<P: Copy + Eq> Ticket<P> {
    /// The first frame has come: whose it is decides who may push.
    pub(super) fn begin(&mut self, path: &Path<P>, generation: u32, now: Instant, lease: Duration) {
        if let Self::Reserved { extent, since, .. } = self {
            *self = Self::Receiving(Receiving {
                arrival: Arrival::new(*extent),
                path: path.clone(),
                generation,
                broken: false,
                deadline: now + lease,
                times: Times { reserved: *since, first: now, last: now, bytes: 0, resumes: 0 },
            });
        }
    }

    pub(super) fn receiving(&self) -> Option<&Receiving<P>> {
        match self {
            Self::Receiving(receiving) => Some(receiving),
            Self::Reserved { .. } | Self::Committed { .. } => None,
        }
    }

    /// When it ends by itself.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Reserved { deadline, .. } | Self::Receiving(Receiving { deadline, .. }) => Some(*deadline),
            Self::Committed { .. } => None,
        }
    }
}
