//! The thread of a connection over RDMA: it makes the agent, posts writes, polls until they are done, takes notices in, and
//! ends the agent. Nobody else calls NIXL for this connection.
//!
//! It spins only while something is going on. A sender wakes it; what comes in is found by looking, often at first, then
//! every millisecond.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use tokio::sync::oneshot;

use super::agent::{Agent, CallError, Write};
use super::library::Library;
use super::link::{Command, Link, StagedBody};
use super::staging::{Arena, Staging};
use super::wire::{Notice, Offer, PROOF_BYTES};
use crate::body::Body;
use crate::event::PeerId;
use crate::frame::{Channel, FrameHeader, ProtocolError};
use crate::inbox::Inbox;
use crate::limits::Limits;
use crate::places::InOrder;
use crate::stats::Counters;

/// Without a pause after something has happened. 20 µs would take a sixth less processor time for large frames, at the same throughput;
/// but whoever waits for one frame, as a decode step does, would have it 50 to 150 µs later.
const EAGER: Duration = Duration::from_micros(200);
/// Often after something has happened.
const WATCHFUL: Duration = Duration::from_millis(100);
/// Between two looks, watchful and idle.
const PAUSES: [Duration; 2] = [Duration::from_micros(50), Duration::from_millis(1)];

/// What the handshake tells the thread.
pub(crate) enum Control {
    /// Whom to write to. Answers with the proof's outcome.
    Meet(Offer, oneshot::Sender<()>),
    /// From here on frames go to the consumers, as this peer's.
    Deliver(PeerId),
    /// The connection is over: deliver no more, say so, and end.
    Stop(oneshot::Sender<()>),
}

/// How a link ended by itself.
#[derive(Debug)]
pub(crate) enum Ended {
    /// NIXL reports an error: the peer is gone, or the path to it.
    Failed(String),
    /// The peer broke the protocol.
    Broken(ProtocolError),
}

/// What a thread is started with.
pub(crate) struct Start {
    pub library: Arc<Library>,
    pub name: String,
    pub limits: Limits,
    pub inboxes: Arc<[Inbox; 2]>,
    pub counters: Arc<Counters>,
    pub link: Arc<Link>,
    pub commands: Receiver<Command>,
}

/// Starts the thread. Our offer comes through the first channel, or nothing where NIXL refuses; the link's own end through the
/// second.
pub(crate) fn spawn(
    start: Start,
    offered: oneshot::Sender<Offer>,
    ended: oneshot::Sender<Ended>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("fabric-rdma".to_owned()).spawn(move || {
        let agent = match Agent::new(&start.library, &start.name, Arc::clone(&start.link.staging)) {
            Ok(agent) => agent,
            Err(error) => return tracing::warn!(%error, "no RDMA with a peer"),
        };
        let metadata = match agent.metadata() {
            Ok(metadata) => metadata,
            Err(error) => return tracing::warn!(%error, "no RDMA with a peer"),
        };
        let staging = &start.link.staging;
        let offer = Offer {
            arenas: Channel::ALL
                .map(|channel| (staging.address() + staging.arena(Arena::Receive, channel)) as u64),
            arena_bytes: staging.arena_bytes() as u64,
            frames_max: start.limits.send_frames_max as u64,
            proof: rand::random(),
            metadata,
        };
        let proof = offer.proof;
        if offered.send(offer).is_err() {
            return;
        }
        let mut pump = Pump::new(start, agent, proof);
        if let Err(end) = pump.run() {
            // Nobody listens where the connection has ended already.
            let _ = ended.send(end);
            // Until the connection is told to stop, its consumers may still hold and drop bodies; nothing more is delivered.
            pump.wait_for_stop();
        }
    })
}

/// A connection's thread.
pub(crate) struct Pump {
    limits: Limits,
    inboxes: Arc<[Inbox; 2]>,
    counters: Arc<Counters>,
    link: Arc<Link>,
    commands: Receiver<Command>,
    /// Before the staging memory, which the link holds.
    agent: Agent,
    proof: [u8; PROOF_BYTES],
    /// Who waits for the peer's proof.
    proven: Option<oneshot::Sender<()>>,
    /// Whom we write to.
    theirs: Option<Offer>,
    deliver_as: Option<PeerId>,
    writes: Vec<Write>,
    arrived: [Arrived; 2],
    told: [u64; 2],
    stopped: bool,
}

/// A channel's frames that lie in staging memory and have not been delivered: writes end in any order.
#[derive(Default)]
struct Arrived {
    next: u64,
    waiting: BTreeMap<u64, (u64, FrameHeader)>,
    order: Arc<InOrder>,
}

impl From<CallError> for Ended {
    fn from(error: CallError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<ProtocolError> for Ended {
    fn from(error: ProtocolError) -> Self {
        Self::Broken(error)
    }
}

impl Pump {
    fn new(start: Start, agent: Agent, proof: [u8; PROOF_BYTES]) -> Self {
        let Start { limits, inboxes, counters, link, commands, .. } = start;
        Self {
            limits,
            inboxes,
            counters,
            link,
            commands,
            agent,
            proof,
            proven: None,
            theirs: None,
            deliver_as: None,
            writes: Vec::new(),
            arrived: Default::default(),
            told: [0; 2],
            stopped: false,
        }
    }

    /// Until it is told to stop, or the link ends by itself.
    fn run(&mut self) -> Result<(), Ended> {
        let mut active_at = Instant::now();
        while !self.stopped {
            let mut active = false;
            while let Ok(command) = self.commands.try_recv() {
                active |= !matches!(command, Command::Look);
                self.obey(command)?;
            }
            active |= self.finish_writes()?;
            active |= self.take_notices()?;
            active |= self.deliver()?;
            active |= self.tell()?;
            if active {
                active_at = Instant::now();
                continue;
            }
            let quiet_for = active_at.elapsed();
            if !self.writes.is_empty() || quiet_for < EAGER {
                // Whoever shares this core has the bytes to make or to take.
                std::thread::yield_now();
                continue;
            }
            match self.commands.recv_timeout(PAUSES[usize::from(quiet_for > WATCHFUL)]) {
                Ok(command) => {
                    active_at = Instant::now();
                    self.obey(command)?;
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Nobody is left who could stop it.
                Err(RecvTimeoutError::Disconnected) => self.stopped = true,
            }
        }
        Ok(())
    }

    fn wait_for_stop(&mut self) {
        while !self.stopped {
            match self.commands.recv() {
                Ok(Command::Control(Control::Stop(quiet))) => {
                    self.stopped = true;
                    let _ = quiet.send(());
                }
                Ok(_) => {}
                Err(_) => self.stopped = true,
            }
        }
    }

    fn obey(&mut self, command: Command) -> Result<(), Ended> {
        match command {
            Command::Look => {}
            Command::Post { channel, number, place, header } => {
                let Some(theirs) = &self.theirs else { return Ok(()) };
                let from = self.link.staging.arena(Arena::Send, channel) + place;
                let to = theirs.arenas[channel.index()] + place as u64;
                let notice = Notice::Frame { channel, number, place: place as u64, header };
                // An empty frame is a write of one byte that means nothing: a notice alone could overtake others.
                let bytes = header.payload_bytes().max(1);
                self.writes.push(self.agent.write(from, bytes, to, &notice.encode())?);
            }
            Command::Control(Control::Meet(offer, proven)) => {
                self.agent.meet(&offer.metadata)?;
                // Into a place that no frame lies in yet, and from one.
                let from = self.link.staging.arena(Arena::Send, Channel::Kv);
                self.link.staging.write(from, &offer.proof);
                let write = self.agent.write(from, PROOF_BYTES, offer.arenas[0], &Notice::Proof.encode())?;
                self.writes.push(write);
                self.theirs = Some(offer);
                self.proven = Some(proven);
            }
            Command::Control(Control::Deliver(peer)) => self.deliver_as = Some(peer),
            Command::Control(Control::Stop(quiet)) => {
                self.stopped = true;
                let _ = quiet.send(());
            }
        }
        Ok(())
    }

    /// Asks for every write under way: the asking is what sends its notice.
    fn finish_writes(&mut self) -> Result<bool, Ended> {
        let mut left = Vec::with_capacity(self.writes.len());
        let before = self.writes.len();
        let mut failed = None;
        for write in self.writes.drain(..) {
            match self.agent.is_done(&write) {
                Ok(true) => self.agent.release(write),
                Ok(false) => left.push(write),
                Err(error) => {
                    self.agent.release(write);
                    failed = Some(error);
                }
            }
        }
        self.writes = left;
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(self.writes.len() < before),
        }
    }

    fn take_notices(&mut self) -> Result<bool, Ended> {
        // The peer's proof may be here before we know who it is, and has to wait for that.
        if self.theirs.is_none() {
            return Ok(false);
        }
        let mut notices = VecDeque::new();
        self.agent.notifications(|wire| notices.push_back(Notice::decode(wire)))?;
        let any = !notices.is_empty();
        for notice in notices {
            match notice? {
                Notice::Proof => self.check_proof(),
                Notice::Done { channel, count } => {
                    self.link.credit[channel.index()].fetch_max(count, Ordering::AcqRel);
                }
                Notice::Frame { channel, number, place, header } => {
                    header.check(&self.limits)?;
                    let end =
                        usize::try_from(place).ok().and_then(|at| at.checked_add(header.payload_bytes()));
                    if end.is_none_or(|end| end > self.link.staging.arena_bytes()) {
                        return Err(
                            ProtocolError::SharedPlace { place, bytes: header.payload_bytes() }.into()
                        );
                    }
                    let arrived = &mut self.arrived[channel.index()];
                    let granted = arrived.next..arrived.next + self.limits.send_frames_max as u64;
                    if !granted.contains(&number) || arrived.waiting.insert(number, (place, header)).is_some()
                    {
                        return Err(ProtocolError::Notice.into());
                    }
                }
            }
        }
        Ok(any)
    }

    fn check_proof(&mut self) {
        let mut got = [0; PROOF_BYTES];
        self.link.staging.copy_out(self.link.staging.arena(Arena::Receive, Channel::Kv), &mut got);
        if got == self.proof
            && let Some(proven) = self.proven.take()
        {
            let _ = proven.send(());
        }
    }

    /// Hands frames on in the order in which they were sent, as far as there is room.
    fn deliver(&mut self) -> Result<bool, Ended> {
        let Some(peer) = self.deliver_as else { return Ok(false) };
        let mut any = false;
        for channel in Channel::ALL {
            let arrived = &mut self.arrived[channel.index()];
            while let Some(&(place, header)) = arrived.waiting.get(&arrived.next) {
                let inbox = &self.inboxes[channel.index()];
                let Some(admission) = inbox.try_admit(header.payload_bytes()) else { break };
                let number = arrived.next;
                arrived.waiting.remove(&number);
                arrived.next += 1;
                let at = self.link.staging.arena(Arena::Receive, channel) + place as usize;
                let bytes = header.body_bytes as usize;
                let mut head = vec![0; header.head_bytes as usize];
                self.link.staging.copy_out(at + bytes, &mut head);
                let body = StagedBody {
                    link: Arc::clone(&self.link),
                    order: Arc::clone(&arrived.order),
                    channel,
                    at,
                    bytes,
                    number,
                };
                self.counters.received(header.payload_bytes());
                inbox.deliver(peer, head.into(), Body::staged(body, admission));
                any = true;
            }
        }
        Ok(any)
    }

    /// Tells the peer what its frames have left room for.
    fn tell(&mut self) -> Result<bool, Ended> {
        let mut any = false;
        for channel in Channel::ALL {
            let count = self.link.done[channel.index()].load(Ordering::Acquire);
            if count > self.told[channel.index()] {
                self.agent.notify(&Notice::Done { channel, count }.encode())?;
                self.told[channel.index()] = count;
                any = true;
            }
        }
        Ok(any)
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        // What is still under way is cancelled as far as that goes; the agent's end is what ends it.
        for write in self.writes.drain(..) {
            self.agent.release(write);
        }
    }
}

/// Staging memory and counters for one connection, and the queue that its thread reads.
pub(crate) fn link(limits: &Limits) -> io::Result<(Arc<Link>, Receiver<Command>)> {
    let staging = Arc::new(Staging::new(limits)?);
    // Every frame under way, and a look beside it.
    let (commands, received) = crossbeam_channel::bounded(4 * limits.send_frames_max + 16);
    let link = Link { staging, commands, credit: Default::default(), done: Default::default() };
    Ok((Arc::new(link), received))
}
