//! A channel's queue of events, bounded by what its consumer has not dropped yet.
//!
//! The consumer's queue is a crossbeam channel, which cannot tell a task that there is room again. So the bound
//! is a budget in bytes: a frame is admitted before it is read off the transport and gives its share back when
//! the consumer drops the body. Waiting for the budget wakes the reader at once, without polling.
//!
//! Invariant: the queue itself never overflows. Frames in it are at most `receive_frames_max`, because each costs
//! at least its part of the budget; a connection is only let in while its `PeerUp` and `PeerLost` have room besides.

use std::sync::Arc;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::arrivals::Rings;
use crate::body::Body;
use crate::event::{Event, PeerId};
use crate::limits::Limits;

/// The producers' side of a channel's queue.
pub(crate) struct Inbox {
    events: Sender<Event>,
    budget: Arc<Semaphore>,
    /// What even an empty frame costs, so that frames are bounded in number too.
    frame_cost_min: usize,
    receive_bytes_max: usize,
    receive_frames_max: usize,
    /// Behind `events`: a consumer that is woken by the drop must find the queue closed.
    waker: Waker,
}

/// Wakes a consumer that sleeps on its rings' bell instead of on the queue.
struct Waker(Option<Arc<Rings>>);

impl Waker {
    fn wake(&self) {
        if let Some(rings) = &self.0 {
            rings.wake();
        }
    }
}

impl Drop for Waker {
    fn drop(&mut self) {
        self.wake();
    }
}

/// A frame's share of the budget, given back on drop.
pub(crate) struct Admission(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Inbox {
    /// A queue within `limits`, and its consumer's side.
    pub fn new(limits: &Limits) -> (Self, Receiver<Event>) {
        Self::beside(limits, None)
    }

    /// The same for a consumer that reads `rings` as well.
    pub fn beside(limits: &Limits, rings: Option<Arc<Rings>>) -> (Self, Receiver<Event>) {
        // Lifecycle events get room for every frame and four connections per peer slot: enough to tell a flood
        // of reconnections from a full queue (see `has_room_for_peers`).
        let capacity = 2 * limits.receive_frames_max + 4 * limits.peers_max;
        let (events, receiver) = crossbeam_channel::bounded(capacity);
        let inbox = Self {
            events,
            budget: Arc::new(Semaphore::new(limits.receive_bytes_max)),
            frame_cost_min: limits.receive_bytes_max.div_ceil(limits.receive_frames_max),
            receive_bytes_max: limits.receive_bytes_max,
            receive_frames_max: limits.receive_frames_max,
            waker: Waker(rings),
        };
        (inbox, receiver)
    }

    /// Waits until a frame of `bytes` may be taken in. `None`: never, the queue is closed.
    pub async fn admit(&self, bytes: usize) -> Option<Admission> {
        let permit = Arc::clone(&self.budget).acquire_many_owned(self.cost(bytes)).await;
        permit.ok().map(Admission)
    }

    /// Takes a frame of `bytes` in if there is room now.
    pub fn try_admit(&self, bytes: usize) -> Option<Admission> {
        Arc::clone(&self.budget).try_acquire_many_owned(self.cost(bytes)).ok().map(Admission)
    }

    /// Queues an admitted frame.
    pub fn deliver(&self, peer: PeerId, head: Bytes, body: impl Into<Body>) {
        self.push(Event::Frame { peer, head, body: body.into() });
    }

    /// Whether the `PeerUp` and `PeerLost` of `new` connections will fit, while `live` ones owe a `PeerLost` each.
    pub fn has_room_for_peers(&self, live: usize, new: usize) -> bool {
        let capacity = self.events.capacity().unwrap_or(usize::MAX);
        self.events.len() + live + 2 * new <= capacity - self.receive_frames_max
    }

    /// Queues a lifecycle event, for which `has_room_for_peers` was asked.
    pub fn announce(&self, event: Event) {
        self.push(event);
    }

    fn push(&self, event: Event) {
        // Full cannot be (the module's invariant), disconnected only when nobody wants to know any more.
        if let Err(error) = self.events.try_send(event) {
            debug_assert!(error.is_disconnected(), "the queue's bound was broken");
        }
        self.waker.wake();
    }

    fn cost(&self, bytes: usize) -> u32 {
        bytes.max(self.frame_cost_min).min(self.receive_bytes_max) as u32
    }
}

/// `bytes` that give `admission` back when the last slice of them is dropped.
pub(crate) fn admitted(bytes: impl AsRef<[u8]> + Send + 'static, admission: Admission) -> Bytes {
    struct Admitted<B>(B, #[expect(dead_code, reason = "held for its drop")] Admission);
    impl<B: AsRef<[u8]>> AsRef<[u8]> for Admitted<B> {
        fn as_ref(&self) -> &[u8] {
            self.0.as_ref()
        }
    }
    Bytes::from_owner(Admitted(bytes, admission))
}
