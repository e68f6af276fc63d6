//! The router's door, the one that the router runs, and what it knows of each request.

use std::collections::HashMap;
use std::time::Instant;

use proto::share::Share;
use router::door::{Arrival, Ask, Door, EntryId, Limits, PrefillPace, Turn, Work};
use router::estimate::Estimate;

/// What becomes of an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It has its places.
    In,
    /// It waits, no longer than to this moment.
    Waits(Instant),
    /// 429.
    Refused,
}

/// Requests by their numbers.
#[derive(Debug)]
pub struct Router {
    door: Door<usize>,
    estimate: Estimate,
    entries: HashMap<usize, Entry>,
    queue_seen_max: usize,
}

#[derive(Debug)]
struct Entry {
    id: EntryId,
    work: Option<Work>,
}

impl Router {
    pub fn new(limits: Limits) -> Self {
        Self {
            door: Door::new(limits),
            estimate: Estimate::default(),
            entries: HashMap::new(),
            queue_seen_max: 0,
        }
    }

    pub fn set_pace(&mut self, pace: PrefillPace) {
        self.door.set_pace(pace);
    }

    pub fn arrive(&mut self, request: usize, prompt_tokens: usize, now: Instant) -> Fate {
        let tokens = self.estimate.computed(0, prompt_tokens);
        let ask = Ask { share: Share::default(), sequences: 1, tokens, received: now, deadline: None };
        let arrival = self.door.arrive(ask, request, now);
        self.queue_seen_max = self.queue_seen_max.max(self.door.queue_len());
        match arrival {
            Arrival::Refused(_) => Fate::Refused,
            Arrival::In(id) => {
                self.entries.insert(request, Entry { id, work: None });
                Fate::In
            }
            Arrival::Waits { id, until } => {
                self.entries.insert(request, Entry { id, work: None });
                Fate::Waits(until)
            }
        }
    }

    /// The next request whose turn has come, or has come too late.
    pub fn next(&mut self, now: Instant) -> Option<(usize, bool)> {
        Some(match self.door.next(now)? {
            Turn::In(id, request) => {
                self.entries.insert(request, Entry { id, work: None });
                (request, true)
            }
            Turn::Refused(request, _) => {
                self.entries.remove(&request);
                (request, false)
            }
        })
    }

    /// Its patience has ended: whether it still waited.
    pub fn give_up(&mut self, request: usize, now: Instant) -> bool {
        let waited =
            self.entries.get(&request).is_some_and(|entry| self.door.give_up(entry.id, now).is_some());
        if waited {
            self.entries.remove(&request);
        }
        waited
    }

    /// It was placed, with so many tokens to compute.
    pub fn placed(&mut self, request: usize, prompt_tokens: usize, computed: usize) {
        if let Some(entry) = self.entries.get_mut(&request) {
            self.estimate.observe_placed(prompt_tokens as u64, computed as u64);
            entry.work = Some(self.door.placed(entry.id, computed as u64));
        }
    }

    /// Its first token is out.
    pub fn answered(&mut self, request: usize, now: Instant) {
        let work = self.entries.get_mut(&request).and_then(|entry| entry.work.take());
        work.into_iter().for_each(|work| self.door.answered(work, now));
    }

    /// A request has left.
    pub fn leave(&mut self, request: usize, now: Instant) {
        self.answered(request, now);
        if let Some(entry) = self.entries.remove(&request) {
            self.door.leave(entry.id, now);
        }
    }

    /// The longest that the queue has been.
    pub fn queue_seen_max(&self) -> usize {
        self.queue_seen_max
    }

    pub fn check(&self) {
        self.door.check_invariants();
    }
}
