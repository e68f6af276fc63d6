//! The router's door: places for sequences, and a bounded queue for a bounded time before it.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

/// The door's bounds, `[router]` of a cluster's configuration.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct RouterLimits {
    /// Sequences in flight.
    pub sequences_max: usize,
    /// Requests that wait for a place.
    pub queue_max: usize,
    /// How long they do.
    pub queue_wait_max: Duration,
}

/// What becomes of an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// It has a place.
    Open,
    /// It waits, no longer than to this moment.
    Waits(Duration),
    /// 429.
    Shut,
}

/// Requests by their numbers.
#[derive(Debug)]
pub struct Router {
    limits: RouterLimits,
    in_flight: usize,
    queue: VecDeque<usize>,
    queue_seen_max: usize,
}

impl Router {
    pub fn new(limits: RouterLimits) -> Self {
        Self { limits, in_flight: 0, queue: VecDeque::new(), queue_seen_max: 0 }
    }

    pub fn arrive(&mut self, request: usize, now: Duration) -> Door {
        if self.in_flight < self.limits.sequences_max && self.queue.is_empty() {
            self.in_flight += 1;
            return Door::Open;
        }
        if self.queue.len() >= self.limits.queue_max {
            return Door::Shut;
        }
        self.queue.push_back(request);
        self.queue_seen_max = self.queue_seen_max.max(self.queue.len());
        Door::Waits(now + self.limits.queue_wait_max)
    }

    /// Its patience has ended: whether it still waited.
    pub fn give_up(&mut self, request: usize) -> bool {
        let before = self.queue.len();
        self.queue.retain(|&waiting| waiting != request);
        self.queue.len() < before
    }

    /// A request has left; the next one that has a place now.
    pub fn leave(&mut self) -> Option<usize> {
        self.in_flight -= 1;
        let next = self.queue.pop_front()?;
        self.in_flight += 1;
        Some(next)
    }

    /// The longest that the queue has been.
    pub fn queue_seen_max(&self) -> usize {
        self.queue_seen_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_then_a_queue_then_nothing() {
        let second = Duration::from_secs(1);
        let mut router = Router::new(RouterLimits { sequences_max: 1, queue_max: 2, queue_wait_max: second });
        let doors: Vec<_> = (0..4).map(|request| router.arrive(request, second)).collect();
        assert_eq!(doors, [Door::Open, Door::Waits(2 * second), Door::Waits(2 * second), Door::Shut]);
        assert!(router.give_up(1) && !router.give_up(1));
        assert_eq!(router.leave(), Some(2));
        assert_eq!(router.leave(), None);
        assert_eq!((router.arrive(5, second), router.queue_seen_max()), (Door::Open, 2));
    }
}
