//! The transport inside one process: a hub of names, and frames handed from queue to queue without a copy.
//!
//! It keeps every promise of the network transport, so that a cluster in one process and most tests need no port.
//! There is no send queue: a frame goes straight into the receiver's, and that one's budget says `Full`.
//!
//! Locks: the hub's mutex, then ports. Connecting is the only thing that holds two ports at once, and the hub's
//! mutex lets one connect run at a time; so there is no cycle.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};

use bytes::{Bytes, BytesMut};
use crossbeam_channel::Receiver;

use crate::arrivals::Arrivals;
use crate::body;
use crate::error::{DialError, FabricError, SendError};
use crate::event::{Event, LossReason, PeerId, PeerInfo};
use crate::frame::{Channel, Frame};
use crate::inbox::{Inbox, admitted};
use crate::limits::Limits;
use crate::spares::Spares;
use crate::stats::{Counters, Stats};
use crate::sync::{lock, read, write};

const SCHEME: &str = "inproc://";

/// Where the ends of one process find each other. Cheap to clone.
#[derive(Clone, Default)]
pub struct Hub {
    ports: Arc<Mutex<HashMap<String, Arc<Port>>>>,
}

impl Hub {
    /// A hub without anybody.
    pub fn new() -> Self {
        Self::default()
    }
}

/// A worker's end on a hub.
pub(crate) struct Endpoint {
    hub: Hub,
    port: Arc<Port>,
    receivers: [Receiver<Event>; 2],
    spares: Spares,
}

/// What others see of an end.
struct Port {
    address: String,
    worker: String,
    incarnation: u64,
    limits: Limits,
    counters: Counters,
    next_peer: AtomicU64,
    /// `None` once closed: dropping the inboxes is what ends the receivers.
    open: RwLock<Option<Open>>,
}

struct Open {
    inboxes: [Inbox; 2],
    links: HashMap<PeerId, Link>,
}

/// One side of a connection.
#[derive(Clone)]
struct Link {
    info: PeerInfo,
    to: Arc<Port>,
    /// What the other side calls us.
    us_there: PeerId,
    dialled: bool,
}

impl Endpoint {
    pub fn join(hub: &Hub, worker: String, incarnation: u64, limits: Limits) -> Result<Self, FabricError> {
        limits.validate()?;
        let address = format!("{SCHEME}{worker}");
        let (kv, kv_events) = Inbox::new(&limits);
        let (experts, experts_events) = Inbox::new(&limits);
        let open = Open { inboxes: [kv, experts], links: HashMap::new() };
        let port = Arc::new(Port {
            address: address.clone(),
            worker,
            incarnation,
            limits,
            counters: Counters::default(),
            next_peer: AtomicU64::new(1),
            open: RwLock::new(Some(open)),
        });
        let mut ports = lock(&hub.ports);
        if ports.contains_key(&address) {
            return Err(FabricError::AddressInUse { address });
        }
        ports.insert(address, Arc::clone(&port));
        drop(ports);
        Ok(Self { hub: hub.clone(), port, receivers: [kv_events, experts_events], spares: Spares::new() })
    }

    pub fn address(&self) -> &str {
        &self.port.address
    }

    pub fn connect(&self, address: &str) -> Result<PeerId, FabricError> {
        if !address.starts_with(SCHEME) {
            return Err(FabricError::Address { address: address.to_owned(), expected: "inproc://WORKER" });
        }
        let unreachable = |source| FabricError::Unreachable { address: address.to_owned(), source };
        let ports = lock(&self.hub.ports);
        if let Some(peer) = self.port.dialled(address)? {
            return Ok(peer);
        }
        let to = ports.get(address).ok_or_else(|| unreachable(DialError::Absent))?;
        link(&self.port, to).map_err(unreachable)
    }

    pub fn try_send(&self, peer: PeerId, channel: Channel, frame: Frame) -> Result<(), SendError> {
        if !frame.fits(&self.port.limits) {
            return Err(SendError::Oversized(frame));
        }
        let link = {
            let open = read(&self.port.open);
            let link = open.as_ref().and_then(|open| open.links.get(&peer));
            link.cloned().ok_or(SendError::Gone)?
        };
        let bytes = frame.bytes();
        let sent = link.to.accept(link.us_there, channel, frame);
        match &sent {
            Ok(()) => self.port.counters.sent(bytes),
            Err(SendError::Full(_)) => drop(self.port.counters.sends_full.fetch_add(1, Relaxed)),
            Err(_) => (),
        }
        sent
    }

    pub fn try_send_gathered(
        &self,
        peer: PeerId,
        channel: Channel,
        pieces: &[&[u8]],
        head: impl FnOnce(Vec<u64>) -> Bytes,
    ) -> Result<(), SendError> {
        let (body, checksums) = body::gather(pieces, &self.spares);
        self.try_send(peer, channel, Frame { head: head(checksums), body: vec![body] })
    }

    pub fn receiver(&self, channel: Channel) -> Arrivals {
        Arrivals::new(self.receivers[channel.index()].clone(), None)
    }

    pub fn peer(&self, peer: PeerId) -> Option<PeerInfo> {
        read(&self.port.open).as_ref()?.links.get(&peer).map(|link| link.info.clone())
    }

    pub fn stats(&self) -> Stats {
        let peers = read(&self.port.open).as_ref().map_or(0, |open| open.links.len()) as u64;
        Stats { peers, ..self.port.counters.snapshot() }
    }

    pub fn close(&self) {
        let mut ports = lock(&self.hub.ports);
        let Some(open) = write(&self.port.open).take() else { return };
        ports.remove(&self.port.address);
        // Still under the hub's mutex: a connect that runs now must not find a half-closed port.
        for (_, link) in open.links {
            link.to.lose(link.us_there, LossReason::Closed);
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.close();
    }
}

impl Port {
    /// The live connection that this end dialled to `address`.
    fn dialled(&self, address: &str) -> Result<Option<PeerId>, FabricError> {
        let open = read(&self.open);
        let open = open.as_ref().ok_or(FabricError::Closed)?;
        let found = open.links.iter().find(|(_, link)| link.dialled && link.info.address == address);
        Ok(found.map(|(peer, _)| *peer))
    }

    /// Takes a frame in from `peer`. The read lock is held to the end, so that a `PeerLost`, which needs the
    /// write lock, comes after it.
    fn accept(&self, peer: PeerId, channel: Channel, frame: Frame) -> Result<(), SendError> {
        let open = read(&self.open);
        let Some(open) = open.as_ref().filter(|open| open.links.contains_key(&peer)) else {
            return Err(SendError::Gone);
        };
        if !frame.fits(&self.limits) {
            return Err(SendError::Oversized(frame));
        }
        let inbox = &open.inboxes[channel.index()];
        let bytes = frame.bytes();
        let Some(admission) = inbox.try_admit(bytes) else {
            return Err(SendError::Full(frame));
        };
        inbox.deliver(peer, frame.head, admitted(in_one_piece(frame.body), admission));
        self.counters.received(bytes);
        Ok(())
    }

    fn lose(&self, peer: PeerId, reason: LossReason) {
        let mut open = write(&self.open);
        let Some(open) = open.as_mut() else { return };
        if open.links.remove(&peer).is_some() {
            self.counters.peers_lost.fetch_add(1, Relaxed);
            for inbox in &open.inboxes {
                inbox.announce(Event::PeerLost { peer, reason: reason.clone() });
            }
        }
    }

    fn info(&self) -> PeerInfo {
        PeerInfo { worker: self.worker.clone(), incarnation: self.incarnation, address: self.address.clone() }
    }

    fn new_peer(&self) -> PeerId {
        PeerId(self.next_peer.fetch_add(1, Relaxed))
    }
}

impl Open {
    fn has_room(&self, limits: &Limits, new: usize) -> bool {
        let live = self.links.len();
        live + new <= limits.peers_max && self.inboxes.iter().all(|inbox| inbox.has_room_for_peers(live, new))
    }

    fn add(&mut self, peer: PeerId, link: Link) {
        for inbox in &self.inboxes {
            inbox.announce(Event::PeerUp { peer, info: link.info.clone() });
        }
        self.links.insert(peer, link);
    }
}

/// Connects two ports, with the hub's mutex held. Both are locked while their links appear: whoever reads its
/// `PeerUp` may answer at once, and must find the other side connected.
fn link(from: &Arc<Port>, to: &Arc<Port>) -> Result<PeerId, DialError> {
    let (here, there) = (from.new_peer(), to.new_peer());
    let dialling = Link { info: to.info(), to: Arc::clone(to), us_there: there, dialled: true };
    let dialled = Link { info: from.info(), to: Arc::clone(from), us_there: here, dialled: false };

    let mut from_open = write(&from.open);
    let from_open = from_open.as_mut().ok_or(DialError::Closed)?;
    if Arc::ptr_eq(from, to) {
        if !from_open.has_room(&from.limits, 2) {
            return Err(DialError::Overloaded);
        }
        from_open.add(here, dialling);
        from_open.add(there, dialled);
    } else {
        let mut to_open = write(&to.open);
        let to_open = to_open.as_mut().ok_or(DialError::Absent)?;
        if !from_open.has_room(&from.limits, 1) || !to_open.has_room(&to.limits, 1) {
            return Err(DialError::Overloaded);
        }
        from_open.add(here, dialling);
        to_open.add(there, dialled);
    }
    from.counters.peers_up.fetch_add(1, Relaxed);
    to.counters.peers_up.fetch_add(1, Relaxed);
    Ok(here)
}

/// The body as its receiver gets it: one piece is passed on, several are joined.
fn in_one_piece(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 {
        return pieces.remove(0);
    }
    let mut whole = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    for piece in &pieces {
        whole.extend_from_slice(piece);
    }
    whole.freeze()
}
