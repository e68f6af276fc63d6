//! A worker's ends of the fabric: the first one, and one more for each further network that it is reached by.
//!
//! A *rail* joins the ends of the same place in two workers' lists, as the network cards of the same place are joined by a switch
//! of their own. A connection is known by its rail and by its peer there.

use bytes::Bytes;
use crossbeam_channel::{Select, TryRecvError};
use fabric::{Arrivals, Channel, Event, Fabric, Frame, PeerId, PeerInfo};

use crate::outlet::{Outlet, Unsent};

/// The ends, in the order of their rails. Owns their KV channels.
pub struct Rails {
    ends: Vec<End>,
    /// Which one is looked at first, so that none starves the others.
    turn: usize,
}

struct End {
    fabric: Fabric,
    events: Arrivals,
    closed: bool,
}

/// A connection, and the rail that it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RailPeer {
    pub(crate) rail: usize,
    pub(crate) peer: PeerId,
}

impl Rails {
    /// The end that everybody knows, and further ones.
    pub fn new(first: Fabric, others: Vec<Fabric>) -> Self {
        let ends = std::iter::once(first).chain(others);
        let ends = ends.map(|fabric| End { events: fabric.receiver(Channel::Kv), fabric, closed: false });
        Self { ends: ends.collect(), turn: 0 }
    }

    /// Where each of them is reached.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.ends.iter().map(|end| end.fabric.address()).collect()
    }

    /// Our end on a rail. Where there are fewer than the other side has, some serve several.
    pub(crate) fn end(&self, rail: usize) -> (usize, &Fabric) {
        let rail = rail % self.ends.len();
        (rail, &self.ends[rail].fabric)
    }

    /// Something that has happened, on which rail; from each in turn.
    pub(crate) fn next_event(&mut self) -> Option<(usize, Event)> {
        for at in 0..self.ends.len() {
            let rail = (self.turn + at) % self.ends.len();
            let end = &mut self.ends[rail];
            match end.events.try_recv() {
                Ok(event) => {
                    self.turn = rail + 1;
                    return Some((rail, event));
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => end.closed = true,
            }
        }
        None
    }

    /// Events that wait.
    pub(crate) fn events(&self) -> usize {
        self.ends.iter().map(|end| end.events.len()).sum()
    }

    /// Whether all are closed, and everything was read.
    pub(crate) fn is_closed(&self) -> bool {
        self.ends.iter().all(|end| end.closed)
    }

    /// Adds what comes in to what a thread sleeps on.
    pub(crate) fn wait_on<'a>(&'a self, select: &mut Select<'a>) {
        for end in self.ends.iter().filter(|end| !end.closed) {
            select.recv(end.events.queue());
        }
    }

    /// Who a live peer is.
    pub(crate) fn peer(&self, peer: RailPeer) -> Option<PeerInfo> {
        self.end(peer.rail).1.peer(peer.peer)
    }
}

/// One end, and no further ones.
impl From<Fabric> for Rails {
    fn from(fabric: Fabric) -> Self {
        Self::new(fabric, Vec::new())
    }
}

impl Outlet<RailPeer> for Rails {
    fn try_send(&mut self, peer: RailPeer, frame: Frame) -> Result<(), Unsent> {
        Ok(self.end(peer.rail).1.try_send(peer.peer, Channel::Kv, frame)?)
    }

    fn try_push(
        &mut self,
        peer: RailPeer,
        pieces: &[&[u8]],
        head: &mut dyn FnMut(Vec<u64>) -> Bytes,
    ) -> Result<(), Unsent> {
        Ok(self.end(peer.rail).1.try_send_gathered(peer.peer, Channel::Kv, pieces, head)?)
    }
}
