//! A channel's events as their consumer takes them: from its queue, and straight from the rings of peers on this host.
//!
//! On the experts' channel the consumer reads shared memory itself, because a decode step waits for each frame:
//! handing it from thread to thread would cost more than carrying it. It looks for a while before it sleeps, and sleeps on
//! one eventfd that every producer knows. On the KV channel the I/O thread reads the rings, and the queue has everything.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::body::Body;
use crate::event::{Event, PeerId};
use crate::frame::ProtocolError;
use crate::shared::{self, Consumer};
use crate::stats::Counters;
use crate::sync::lock;

/// How long to look before sleeping: what being woken costs.
const SPIN: Duration = Duration::from_micros(20);

/// A channel's events. Clones share them: an event goes to one of them. To be waited on by one thread.
#[derive(Clone)]
pub struct Arrivals {
    queue: Receiver<Event>,
    rings: Option<Arc<Rings>>,
}

/// The rings of peers on this host, read by the consumer itself.
pub(crate) struct Rings {
    state: Mutex<State>,
    active: AtomicUsize,
    bell: OwnedFd,
    sleeping: AtomicBool,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct State {
    /// Of peers whose `PeerUp` is still in the queue.
    arriving: HashMap<PeerId, Ring>,
    active: Vec<(PeerId, Ring)>,
    /// Which one is looked at first, so that none starves the others.
    turn: usize,
}

/// A ring, and how to say that its peer broke the protocol.
pub(crate) struct Ring {
    pub consumer: Consumer,
    pub broken: Box<dyn FnOnce(ProtocolError) + Send>,
}

impl Arrivals {
    pub(crate) fn new(queue: Receiver<Event>, rings: Option<Arc<Rings>>) -> Self {
        Self { queue, rings }
    }

    /// The queue, for a `Select` over several. On [`Channel::Kv`](crate::Channel::Kv) it has every event; on
    /// [`Channel::Experts`](crate::Channel::Experts) frames of peers on this host are not in it.
    pub fn queue(&self) -> &Receiver<Event> {
        &self.queue
    }

    /// An event if there is one.
    ///
    /// # Errors
    /// There is none now, or this end is closed and everything was read.
    pub fn try_recv(&self) -> Result<Event, TryRecvError> {
        let queued = self.queue.try_recv();
        let Some(rings) = &self.rings else { return queued };
        match queued {
            Ok(event) => {
                rings.note(&event);
                Ok(event)
            }
            Err(TryRecvError::Disconnected) => Err(TryRecvError::Disconnected),
            Err(TryRecvError::Empty) => rings.take().ok_or(TryRecvError::Empty),
        }
    }

    /// Waits for an event.
    ///
    /// # Errors
    /// This end is closed and everything was read.
    pub fn recv(&self) -> Result<Event, RecvTimeoutError> {
        self.wait(None)
    }

    /// Waits for an event for at most `timeout`.
    ///
    /// # Errors
    /// There was none, or as [`Self::recv`].
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Event, RecvTimeoutError> {
        self.wait(Instant::now().checked_add(timeout))
    }

    /// Waits for an event until `deadline`.
    ///
    /// # Errors
    /// There was none, or as [`Self::recv`].
    pub fn recv_deadline(&self, deadline: Instant) -> Result<Event, RecvTimeoutError> {
        self.wait(Some(deadline))
    }

    /// Events in the queue.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether nothing waits to be taken.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.rings.as_ref().is_none_or(|rings| !rings.is_ready())
    }

    fn wait(&self, deadline: Option<Instant>) -> Result<Event, RecvTimeoutError> {
        loop {
            match self.try_recv() {
                Ok(event) => return Ok(event),
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) => {}
            }
            let rings = self.rings.as_ref().filter(|rings| rings.active.load(Ordering::Relaxed) > 0);
            let Some(rings) = rings else {
                // The first ring is announced in the queue, so waiting there misses nothing.
                let event = match deadline {
                    Some(deadline) => self.queue.recv_deadline(deadline)?,
                    None => self.queue.recv().map_err(|_| RecvTimeoutError::Disconnected)?,
                };
                if let Some(rings) = &self.rings {
                    rings.note(&event);
                }
                return Ok(event);
            };
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(RecvTimeoutError::Timeout);
            }
            if !self.look() {
                rings.sleep(&self.queue, deadline);
            }
        }
    }

    /// Looks for a moment, letting others run who are ready to.
    fn look(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < SPIN {
            for _ in 0..16 {
                if !self.is_empty() {
                    return true;
                }
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
        false
    }
}

impl Rings {
    pub fn new(counters: Arc<Counters>) -> std::io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            active: AtomicUsize::new(0),
            bell: shared::new_bell()?,
            sleeping: AtomicBool::new(false),
            counters,
        })
    }

    /// What producers ring.
    pub fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    /// A ring whose peer's `PeerUp` is about to be queued.
    pub fn enter(&self, peer: PeerId, ring: Ring) {
        lock(&self.state).arriving.insert(peer, ring);
    }

    /// Something was queued: wakes a consumer that sleeps on the bell.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            shared::ring_bell(&self.bell);
        }
    }

    /// Follows peers as the consumer learns of them: no frame before `PeerUp`, none after `PeerLost`.
    fn note(&self, event: &Event) {
        let mut state = lock(&self.state);
        match event {
            Event::PeerUp { peer, .. } => {
                if let Some(ring) = state.arriving.remove(peer) {
                    state.active.push((*peer, ring));
                }
            }
            Event::PeerLost { peer, .. } => {
                state.arriving.remove(peer);
                state.active.retain(|(id, _)| id != peer);
            }
            Event::Frame { .. } => return,
        }
        self.active.store(state.active.len(), Ordering::Relaxed);
    }

    fn take(&self) -> Option<Event> {
        if self.active.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut state = lock(&self.state);
        let rings = state.active.len();
        for _ in 0..rings {
            let turn = state.turn % rings.max(1);
            state.turn = turn + 1;
            let (peer, ring) = &mut state.active[turn];
            match ring.consumer.take() {
                Ok(None) => {}
                Ok(Some((head, body))) => {
                    self.counters.received(head.len() + body.len());
                    return Some(Event::Frame { peer: *peer, head, body: Body::shared(body, None) });
                }
                Err(error) => {
                    // Its `PeerLost` follows; nothing more is read of it.
                    let (_, ring) = state.active.swap_remove(turn);
                    self.active.store(state.active.len(), Ordering::Relaxed);
                    (ring.broken)(error);
                    return None;
                }
            }
        }
        None
    }

    fn is_ready(&self) -> bool {
        self.active.load(Ordering::Relaxed) > 0
            && lock(&self.state).active.iter().any(|(_, ring)| ring.consumer.is_ready())
    }

    /// Sleeps until the bell rings or `deadline`, unless something is there.
    fn sleep(&self, queue: &Receiver<Event>, deadline: Option<Instant>) {
        self.set_sleeping(true);
        if queue.is_empty() && !self.is_ready() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            // Early or interrupted returns are as good: the caller looks again.
            let _ = poll(&mut [PollFd::new(&self.bell.as_fd(), PollFlags::IN)], timeout.as_ref());
        }
        self.set_sleeping(false);
        shared::silence_bell(&self.bell);
    }

    fn set_sleeping(&self, sleeping: bool) {
        self.sleeping.store(sleeping, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for (_, ring) in &lock(&self.state).active {
            ring.consumer.set_sleeping(sleeping);
        }
    }
}
