//! The [`Door`] among threads: requests wait for their turn here, and give back what they hold by being dropped.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::share::Priority;
use tokio::sync::oneshot;

use super::door::{Arrival, Ask, Door, EntryId, Limits, PrefillPace, Reason, Refusal, Turn, Work};
use super::estimate::Estimate;
use crate::metrics::Metrics;

/// The door, and who waits before it.
pub(super) struct Places {
    state: Mutex<State>,
    metrics: Arc<Metrics>,
}

struct State {
    door: Door<oneshot::Sender<Result<EntryId, Refusal>>>,
    estimate: Estimate,
}

/// A request's places; given back when dropped.
pub(crate) struct Permit {
    places: Arc<Places>,
    id: EntryId,
    sequences: usize,
}

/// A placed sequence without its first token. Dropped when it has one, or gets none.
pub(crate) struct Ahead {
    places: Arc<Places>,
    work: Work,
}

impl Permit {
    /// A sequence of `prompt_tokens` was placed, of which `computed` are thought to be nowhere.
    pub fn placed(&self, prompt_tokens: u64, computed: u64) -> Ahead {
        let mut state = self.places.state();
        state.estimate.observe_placed(prompt_tokens, computed);
        Ahead { work: state.door.placed(self.id, computed), places: Arc::clone(&self.places) }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.places.change(|door, now| door.answered(self.work, now));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.places.metrics.sequences.dec_by(gauge(self.sequences));
        self.places.change(|door, now| door.leave(self.id, now));
    }
}

impl Places {
    pub fn new(limits: Limits, metrics: Arc<Metrics>) -> Arc<Self> {
        let state = State { door: Door::new(limits), estimate: Estimate::default() };
        Arc::new(Self { state: Mutex::new(state), metrics })
    }

    /// A text of `bytes` became `tokens`.
    pub fn observe_text(&self, bytes: usize, tokens: usize) {
        self.state().estimate.observe_text(bytes, tokens);
    }

    /// Takes the places that `ask` needs, waiting for them as long as that is of use. Its tokens are estimated from `bytes`
    /// of text and `tokens`.
    pub async fn take(
        self: &Arc<Self>,
        ask: Ask,
        (bytes, tokens): (usize, usize),
        pace: PrefillPace,
    ) -> Result<Permit, Refusal> {
        let asked = Instant::now();
        let (granting, granted) = oneshot::channel();
        let arrival = {
            let mut state = self.state();
            let ask = Ask { tokens: state.estimate.computed(bytes, tokens), ..ask };
            state.door.set_pace(pace);
            let expected = state.door.expected_ttft(&ask, asked);
            self.metrics.expect(ask.share.priority, expected);
            let arrival = state.door.arrive(ask, granting, asked);
            self.dispense(&mut state, asked);
            arrival
        };
        let priority = ask.share.priority;
        let (id, until) = match arrival {
            Arrival::In(id) => return Ok(self.permit(id, ask.sequences)),
            Arrival::Refused(refusal) => return Err(self.refuse(priority, refusal)),
            Arrival::Waits { id, until } => (id, until),
        };
        let mut waiting = Waiting { places: Arc::clone(self), id, granted };
        let granted = tokio::time::timeout_at(until.into(), &mut waiting.granted).await;
        self.metrics.queued_for(priority, asked.elapsed());
        let refusal = match granted {
            Ok(Ok(Ok(id))) => return Ok(self.permit(id, ask.sequences)),
            Ok(Ok(Err(refusal))) => refusal,
            // The sender lives in the door until it has said something.
            Ok(Err(_)) => Refusal { reason: Reason::Late, retry_after: Duration::from_secs(1) },
            Err(_elapsed) => match waiting.give_up() {
                Ok(id) => return Ok(self.permit(id, ask.sequences)),
                Err(refusal) => refusal,
            },
        };
        Err(self.refuse(priority, refusal))
    }

    fn refuse(&self, priority: Priority, refusal: Refusal) -> Refusal {
        self.metrics.turned_away(priority, refusal.reason.name());
        refusal
    }

    fn permit(self: &Arc<Self>, id: EntryId, sequences: usize) -> Permit {
        self.metrics.sequences.inc_by(gauge(sequences));
        Permit { places: Arc::clone(self), id, sequences }
    }

    /// Tells the door what happened, and those whose turn it is then.
    fn change<R>(
        &self,
        event: impl FnOnce(&mut Door<oneshot::Sender<Result<EntryId, Refusal>>>, Instant) -> R,
    ) -> R {
        let mut state = self.state();
        let now = Instant::now();
        let result = event(&mut state.door, now);
        self.dispense(&mut state, now);
        result
    }

    fn dispense(&self, state: &mut State, now: Instant) {
        while let Some(turn) = state.door.next(now) {
            match turn {
                // Fails when it has given up meanwhile; then it needs none.
                Turn::In(id, granted) => {
                    if granted.send(Ok(id)).is_err() {
                        state.door.leave(id, now);
                    }
                }
                Turn::Refused(granted, refusal) => drop(granted.send(Err(refusal))),
            }
        }
        for priority in Priority::ALL {
            self.metrics.queued(priority, state.door.queued(priority));
        }
        self.metrics.ahead.set(i64::try_from(state.door.ahead()).unwrap_or(i64::MAX));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the queue; given up when dropped.
struct Waiting {
    places: Arc<Places>,
    id: EntryId,
    granted: oneshot::Receiver<Result<EntryId, Refusal>>,
}

impl Waiting {
    /// Leaves the queue, unless a turn came between the end of the wait and now.
    fn give_up(&mut self) -> Result<EntryId, Refusal> {
        let gone = self.places.change(|door, now| door.give_up(self.id, now));
        match (gone, self.granted.try_recv()) {
            (None, Ok(told)) => told,
            (gone, _) => {
                Err(gone.unwrap_or(Refusal { reason: Reason::Late, retry_after: Duration::from_secs(1) }))
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.places.change(|door, now| door.give_up(self.id, now)).is_some() {
            return;
        }
        // Granted and not taken: others can have it.
        if let Ok(Ok(id)) = self.granted.try_recv() {
            self.places.change(|door, now| door.leave(id, now));
        }
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proto::share::Share;

    use super::*;

    fn places(sequences_max: usize, queue_max: usize) -> Arc<Places> {
        let ttft_max = [Duration::from_secs(30); 2];
        Places::new(Limits { sequences_max, queue_max, ttft_max }, Arc::new(Metrics::new()))
    }

    fn ask(tenant: u64, sequences: usize) -> Ask {
        let share = Share { tenant, ..Share::default() };
        Ask { share, sequences, tokens: 0, received: Instant::now(), deadline: None }
    }

    async fn take(places: &Arc<Places>, ask: Ask) -> Result<Permit, Refusal> {
        places.take(ask, (0, 10), PrefillPace::default()).await
    }

    /// Asks in a task of its own; returns once it waits.
    async fn ask_later(places: &Arc<Places>, ask: Ask) -> tokio::task::JoinHandle<bool> {
        let before = places.state().door.queue_len();
        let asking = Arc::clone(places);
        let task = tokio::spawn(async move { take(&asking, ask).await.is_ok() });
        while places.state().door.queue_len() == before {
            tokio::task::yield_now().await;
        }
        task
    }

    #[tokio::test]
    async fn the_head_gets_all_its_places_at_once_and_nobody_overtakes_it() {
        let places = places(4, 8);
        let one = take(&places, ask(1, 1)).await.expect("a place");
        let three = take(&places, ask(1, 3)).await.expect("places");
        let large = ask_later(&places, ask(1, 4)).await;
        let small = ask_later(&places, ask(1, 1)).await;
        drop(one);
        assert_eq!(places.state().door.queue_len(), 2, "one is not enough for the head");
        drop(three);
        assert!(large.await.expect("ends") && small.await.expect("ends"));
        assert_eq!(places.state().door.sequences(), 0, "all came back");
    }

    #[tokio::test]
    async fn who_gives_up_leaves_nothing_behind() {
        let places = places(1, 8);
        let held = take(&places, ask(1, 1)).await.expect("a place");
        let impatient = Ask { deadline: Some(Instant::now()), ..ask(1, 1) };
        let late = take(&places, impatient).await;
        assert_eq!(late.err().map(|refusal| refusal.reason), Some(Reason::Late));
        let gone = ask_later(&places, ask(1, 1)).await;
        gone.abort();
        assert!(gone.await.is_err());
        assert_eq!(places.state().door.queue_len(), 0);
        drop(held);
        assert_eq!(places.state().door.sequences(), 0);
    }

    #[tokio::test]
    async fn what_is_placed_is_ahead_until_it_is_answered() {
        let places = places(4, 8);
        let permit = take(&places, ask(1, 1)).await.expect("a place");
        let ahead = permit.placed(1000, 100);
        assert_eq!(places.state().door.ahead(), 116);
        drop(permit);
        drop(ahead);
        assert_eq!(places.state().door.ahead(), 0);
        assert!(places.state().estimate.computed(0, 1000) < 1000, "what is found is learnt");
    }
}
