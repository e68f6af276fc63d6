//! The places that sequences take on this router, and the bounded queue of those that wait for one.
//!
//! Who is next is [`FairQueue`]'s: tenants by their weights, interactive before batch until batch has aged. The head
//! waits until all the places that it needs are free at once, and nobody behind it takes them. A full queue makes room
//! for a newcomer at the cost of whoever has the most waiting, if that is fairer; so no tenant locks another one out.
//!
//! Invariant: free places, held ones and those just granted add up to what there are, whoever gives up when.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::share::{FairQueue, Priority, Share};
use tokio::sync::oneshot;

use crate::metrics::Metrics;

/// How long a batch request may wait behind every interactive one.
const BATCH_AGING_MAX: Duration = Duration::from_secs(5);

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// As many wait as may, and nobody of them should make room.
    QueueFull,
    /// A newcomer took its waiting place, or it waited for as long as it would.
    GivenUp,
}

/// All places and who waits for them.
pub(super) struct Places {
    state: Mutex<State>,
    queue_max: usize,
    metrics: Arc<Metrics>,
}

struct State {
    free: usize,
    queue: FairQueue<Waiter>,
    next_id: u64,
}

struct Waiter {
    id: u64,
    places: usize,
    /// Dropped unsent when it is displaced.
    granted: oneshot::Sender<()>,
}

/// Held places; given back when dropped.
pub(crate) struct Permit {
    places: Arc<Places>,
    count: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.places.metrics.sequences.dec_by(gauge(self.count));
        self.places.give_back(self.count);
    }
}

impl Places {
    pub fn new(places: usize, queue_max: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        let state = State { free: places, queue: FairQueue::new(BATCH_AGING_MAX), next_id: 0 };
        Arc::new(Self { state: Mutex::new(state), queue_max, metrics })
    }

    /// Takes `count` places at once, at most as many as there are in all, waiting until `patience` ends.
    pub async fn take(
        self: &Arc<Self>,
        share: Share,
        count: usize,
        patience: Instant,
    ) -> Result<Permit, NoPlace> {
        let asked = Instant::now();
        let Some(mut waiting) = self.enter(share, count, asked)? else { return Ok(self.permit(count)) };
        let granted = tokio::time::timeout_at(patience.into(), &mut waiting.granted).await;
        self.metrics.queued_for(share.priority, asked.elapsed());
        match granted {
            Ok(Ok(())) => {
                waiting.taken = true;
                Ok(self.permit(count))
            }
            Ok(Err(_displaced)) => Err(NoPlace::GivenUp),
            Err(_elapsed) => Err(NoPlace::GivenUp),
        }
    }

    /// Takes places, `None`, or a waiting place.
    fn enter(self: &Arc<Self>, share: Share, count: usize, now: Instant) -> Result<Option<Waiting>, NoPlace> {
        let mut state = self.state();
        if state.queue.is_empty() && state.free >= count {
            state.free -= count;
            return Ok(None);
        }
        if state.queue.len() >= self.queue_max {
            // Dropping it tells the one that it was.
            state.queue.displace(share).ok_or(NoPlace::QueueFull)?;
        }
        let id = state.next_id;
        state.next_id += 1;
        let (sender, granted) = oneshot::channel();
        state.queue.push(share, count as u64, Waiter { id, places: count, granted: sender }, now);
        self.dispense(&mut state, now);
        Ok(Some(Waiting { places: Arc::clone(self), id, count, granted, taken: false }))
    }

    fn permit(self: &Arc<Self>, count: usize) -> Permit {
        self.metrics.sequences.inc_by(gauge(count));
        Permit { places: Arc::clone(self), count }
    }

    fn give_back(&self, count: usize) {
        let mut state = self.state();
        state.free += count;
        self.dispense(&mut state, Instant::now());
    }

    /// Gives free places to the queue's head for as long as they are enough for it.
    fn dispense(&self, state: &mut State, now: Instant) {
        while state.queue.peek(now).is_some_and(|head| head.places <= state.free) {
            let Some(head) = state.queue.pop(now) else { break };
            // Fails when it has given up meanwhile; then it needs none.
            if head.granted.send(()).is_ok() {
                state.free -= head.places;
            }
        }
        for priority in Priority::ALL {
            self.metrics.queued(priority, state.queue.len_of(priority));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the queue; given up when dropped.
struct Waiting {
    places: Arc<Places>,
    id: u64,
    count: usize,
    granted: oneshot::Receiver<()>,
    taken: bool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut state = self.places.state();
        // Granted between the end of its patience and now: others can have them.
        if self.granted.try_recv().is_ok() {
            state.free += self.count;
        }
        state.queue.remove(|waiter| waiter.id == self.id);
        self.places.dispense(&mut state, Instant::now());
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(tenant: u64) -> Share {
        Share { tenant, ..Share::default() }
    }

    fn places(count: usize, queue_max: usize) -> Arc<Places> {
        Places::new(count, queue_max, Arc::new(Metrics::new()))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    /// Asks in a task of its own; returns once it waits.
    async fn ask(places: &Arc<Places>, share: Share, count: usize) -> tokio::task::JoinHandle<bool> {
        let before = places.state().queue.len();
        let asking = Arc::clone(places);
        let task = tokio::spawn(async move { asking.take(share, count, soon()).await.is_ok() });
        while places.state().queue.len() == before {
            tokio::task::yield_now().await;
        }
        task
    }

    #[tokio::test]
    async fn the_head_gets_all_its_places_at_once_and_nobody_overtakes_it() {
        let places = places(4, 8);
        let held = [1, 3].map(|count| places.enter(share(1), count, Instant::now()).map(|_| count));
        assert_eq!(held, [Ok(1), Ok(3)]);
        let large = ask(&places, share(1), 4).await;
        let small = ask(&places, share(1), 1).await;
        places.give_back(1);
        assert_eq!(places.state().queue.len(), 2, "one is not enough for the head");
        places.give_back(3);
        assert!(large.await.expect("ends") && small.await.expect("ends"));
        assert_eq!(places.state().free, 4, "all came back");
    }

    #[tokio::test]
    async fn who_gives_up_leaves_nothing_behind() {
        let places = places(1, 8);
        let held = places.take(share(1), 1, soon()).await.ok();
        let late = places.take(share(1), 1, Instant::now()).await;
        assert_eq!(late.err(), Some(NoPlace::GivenUp));
        let gone = ask(&places, share(1), 1).await;
        gone.abort();
        assert!(gone.await.is_err());
        assert!(places.state().queue.is_empty());
        drop(held);
        assert_eq!(places.state().free, 1);
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_or_makes_room_for_a_tenant_that_has_less() {
        let places = places(1, 3);
        let held = places.take(share(1), 1, soon()).await.ok();
        let first = ask(&places, share(1), 1).await;
        let second = ask(&places, share(1), 1).await;
        let third = ask(&places, share(1), 1).await;
        let more = places.take(share(1), 1, soon()).await;
        assert_eq!(more.err(), Some(NoPlace::QueueFull));
        let other = {
            let places = Arc::clone(&places);
            tokio::spawn(async move { places.take(share(2), 1, soon()).await.is_ok() })
        };
        assert!(!third.await.expect("ends"), "the newest of the largest made room");
        drop(held);
        for waiting in [first, second, other] {
            assert!(waiting.await.expect("ends"));
        }
    }
}
