//! What is let in, what waits and what is refused: a synchronous function of (state, event, now). `trireme bench simulate` runs
//! this code too.
//!
//! Behind the door a prompt waits for decode's memory, for prefill, and is computed; until its first token is out it is *ahead*
//! of whoever comes next. The door keeps no more than `AHEAD_S` of prefill's work ahead: enough that no worker runs dry, so
//! little that what happens to a request is still the door's to decide. The rest waits here, in fair order, and only as long
//! as its first token can be expected within the objective of its class:
//!
//! > expected TTFT = tokens before it in the queue / what the door sees drain + tokens ahead / prefill's pace + its own
//!
//! Prefill's pace is what workers report; what drains is counted here while somebody waits, so that it is true whatever
//! the cluster is short of: prefill, decode's memory, or places. Who would come too late is refused at once, told when it
//! would not; whose turn comes too late all the same is refused then, and never goes before one that can still make it.
//! A prompt whose own computation takes more than half of the objective is given twice that computation instead. One that
//! keeps a worker for more than `LONG_S` is *long*: prefill lets shorter ones pass it with half of its steps, and so does the
//! door.
//!
//! Invariants: as many sequences as let in and not left hold places, at most [`Limits::sequences_max`]; at most
//! [`Limits::queue_max`] wait; the queue moves whenever a place and a share of the work are free for its head.
//! Deliberately absent: clocks, locks, tokens themselves, and what is true of a request besides its size.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proto::pace::Pace;
use proto::share::{FairQueue, Priority, Share};

/// How long a batch request may wait behind every interactive one.
const BATCH_AGING_MAX: Duration = Duration::from_secs(5);
/// Prefill's work that is let in ahead, seconds: two reports of a worker, some ten rounds between router and workers.
const AHEAD_S: f64 = 0.5;
/// Tokens that are let in ahead in any case, and while no pace is known: a few steps.
const AHEAD_TOKENS_MIN: u64 = 2048;
/// A prompt that takes one worker for more seconds than this is passed by shorter ones.
const LONG_S: f64 = 1.0;
/// Long prompts let in at once for each worker: as many as prefill interleaves.
const LONG_MAX: u64 = 8;
/// What a request costs besides its tokens, in tokens: a step of its own and the way there.
const REQUEST_TOKENS: u64 = 16;
/// What drains is taken for what workers report, until it was seen for about so long.
const DRAIN_PRIOR: Duration = Duration::from_secs(1);
/// A client is asked to wait for no longer.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Bounds, from `[router]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences let in and not ended.
    pub sequences_max: usize,
    /// Requests that wait.
    pub queue_max: usize,
    /// The objective: receipt to first token, by [`Priority`].
    pub ttft_max: [Duration; 2],
}

/// What prefill workers report, all together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PrefillPace {
    /// Prompt tokens per second; 0: not known.
    pub tokens_per_s: f64,
    /// Workers that it is the sum of.
    pub workers: usize,
}

/// A request at the door.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    /// Whose.
    pub share: Share,
    /// Sequences: prompts times choices, at most [`Limits::sequences_max`].
    pub sequences: usize,
    /// Prompt tokens that are likely to be computed.
    pub tokens: u64,
    /// When it was received.
    pub received: Instant,
    /// When its client gives up.
    pub deadline: Option<Instant>,
}

/// A request that was let in or waits; numbers are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryId(u64);

/// What becomes of a request at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It has its places.
    In(EntryId),
    /// It waits for its turn, and has no use for one after `until`.
    Waits {
        /// Its name.
        id: EntryId,
        /// When to give up.
        until: Instant,
    },
    /// Not now.
    Refused(Refusal),
}

/// Why, and when to come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// When a request like this one is likely to be let in.
    pub retry_after: Duration,
}

/// Why a request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its first token would come too late.
    Ttft,
    /// Its turn came too late after all.
    Late,
    /// As many wait as may.
    QueueFull,
}

impl Reason {
    /// As metrics spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Late => "late",
            Self::QueueFull => "queue_full",
        }
    }
}

/// Whose turn it is, and what with.
#[derive(Debug)]
pub enum Turn<T> {
    /// It has its places.
    In(EntryId, T),
    /// It waited in vain.
    Refused(T, Refusal),
}

/// Requests before, at and behind the door.
#[derive(Debug)]
pub struct Door<T> {
    limits: Limits,
    pace: PrefillPace,
    queue: FairQueue<Waiter<T>>,
    inside: BTreeMap<EntryId, Inside>,
    sequences: usize,
    /// Tokens ahead, and those of long prompts, with how many there are.
    ahead: u64,
    ahead_long: u64,
    long: u64,
    /// Who had to make room in a full queue, and was not told yet.
    displaced: Vec<Waiter<T>>,
    /// Work that got its first token while somebody waited.
    drain: Pace,
    drained: u64,
    drained_at: Option<Instant>,
    next_id: u64,
}

#[derive(Debug)]
struct Waiter<T> {
    id: EntryId,
    ask: Ask,
    value: T,
}

/// A request that was let in.
#[derive(Debug)]
struct Inside {
    sequences: usize,
    /// Choices that were not placed yet, and what each is thought to cost.
    unplaced: u64,
    each: Work,
}

/// What a sequence is ahead with, until it has its first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "work that is not given back stays ahead for ever"]
pub struct Work {
    tokens: u64,
    long: bool,
}

impl<T> Door<T> {
    /// Nobody there.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            pace: PrefillPace::default(),
            queue: FairQueue::new(BATCH_AGING_MAX),
            inside: BTreeMap::new(),
            sequences: 0,
            ahead: 0,
            ahead_long: 0,
            long: 0,
            displaced: Vec::new(),
            drain: Pace::default(),
            drained: 0,
            drained_at: None,
            next_id: 0,
        }
    }

    /// Takes in what prefill workers report.
    pub fn set_pace(&mut self, pace: PrefillPace) {
        self.pace = pace;
    }

    /// A request has come. Behind it, ask [`Self::next`] whose turn it is.
    pub fn arrive(&mut self, ask: Ask, value: T, now: Instant) -> Arrival {
        self.observe(now);
        if self.queue.is_empty() && self.fits(&ask) {
            return Arrival::In(self.let_in(&ask));
        }
        let expected = self.expected_ttft(&ask, now);
        let objective = self.objective(&ask);
        if let Some(expected) = expected
            && expected > objective
        {
            return Arrival::Refused(refusal(Reason::Ttft, expected - objective));
        }
        if self.queue.len() >= self.limits.queue_max && !self.make_room(ask.share) {
            // Whoever is let in next makes room.
            let each = expected.unwrap_or(objective) / u32::try_from(self.queue.len().max(1)).unwrap_or(1);
            return Arrival::Refused(refusal(Reason::QueueFull, each));
        }
        let id = self.new_id();
        let until = self.useful_until(&ask);
        self.queue.push(ask.share, cost(&ask), Waiter { id, ask, value }, now);
        Arrival::Waits { id, until }
    }

    /// The next whose turn has come, or whose turn would come too late. Until `None`.
    pub fn next(&mut self, now: Instant) -> Option<Turn<T>> {
        self.observe(now);
        if let Some(Waiter { ask, value, .. }) = self.displaced.pop() {
            let Refusal { retry_after, .. } = self.late(&ask, now);
            return Some(Turn::Refused(value, refusal(Reason::QueueFull, retry_after)));
        }
        let head = self.queue.peek(now)?;
        let late = self.useful_until(&head.ask) < now;
        if !late && !self.fits(&head.ask) {
            return None;
        }
        let Waiter { ask, value, .. } = self.queue.pop(now)?;
        if late {
            return Some(Turn::Refused(value, self.late(&ask, now)));
        }
        Some(Turn::In(self.let_in(&ask), value))
    }

    /// A request that waited has gone, by itself or because its time is up. What a client would be told.
    pub fn give_up(&mut self, id: EntryId, now: Instant) -> Option<Refusal> {
        let ask = self.queue.iter().find(|waiter| waiter.id == id)?.ask;
        self.queue.remove(|waiter| waiter.id == id);
        Some(self.late(&ask, now))
    }

    /// One of the sequences was placed: now it is known what must be computed for it. Returns what counts as ahead
    /// until [`Self::answered`].
    pub fn placed(&mut self, id: EntryId, tokens: u64) -> Work {
        if let Some(inside) = self.inside.get_mut(&id)
            && inside.unplaced > 0
        {
            inside.unplaced -= 1;
            let each = inside.each;
            self.take_off(each, 1);
        }
        let work = self.work(tokens + REQUEST_TOKENS);
        self.put_on(work, 1);
        work
    }

    /// A sequence that was placed has its first token, or never gets one. `work` is what [`Self::placed`] said.
    pub fn answered(&mut self, work: Work, now: Instant) {
        self.take_off(work, 1);
        // A long prompt's tokens were computed over longer than they would count here.
        let at_once = (self.pace.tokens_per_s * LONG_S) as u64;
        self.drained += if work.long { work.tokens.min(at_once) } else { work.tokens };
        self.observe(now);
    }

    /// All of a request's sequences have ended.
    pub fn leave(&mut self, id: EntryId, now: Instant) {
        self.observe(now);
        if let Some(Inside { sequences, unplaced, each }) = self.inside.remove(&id) {
            self.sequences -= sequences;
            self.take_off(each, unplaced);
        }
    }

    /// Receipt to first token of a request that would come now; `None` while nothing is known of the cluster's pace.
    pub fn expected_ttft(&self, ask: &Ask, now: Instant) -> Option<Duration> {
        let waited = now.saturating_duration_since(ask.received).as_secs_f64();
        let rate = self.known_pace()?;
        let before = self.queue.cost_before(ask.share, cost(ask)) as f64;
        Some(seconds(waited + before / self.draining(rate) + self.behind_door(ask, rate)))
    }

    /// What [`Self::placed`] sequences and those to come are ahead with, tokens.
    pub fn ahead(&self) -> u64 {
        self.ahead + self.ahead_long
    }

    /// Sequences let in.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Requests that wait, of one class.
    pub fn queued(&self, priority: Priority) -> usize {
        self.queue.len_of(priority)
    }

    /// Requests that wait.
    pub fn queue_len(&self) -> usize {
        self.queue.len()
    }

    /// Panics when the books do not balance. For tests and simulation.
    pub fn check_invariants(&self) {
        self.queue.check_invariants();
        let sequences: usize = self.inside.values().map(|inside| inside.sequences).sum();
        assert_eq!(self.sequences, sequences, "places");
        assert!(self.sequences <= self.limits.sequences_max && self.queue.len() <= self.limits.queue_max);
        let unplaced: u64 = self.inside.values().map(|inside| inside.unplaced * inside.each.tokens).sum();
        assert!(self.ahead() >= unplaced, "work of those that were not placed");
        assert_eq!(self.ahead_long > 0, self.long > 0);
        for waiter in self.queue.iter() {
            assert!(waiter.ask.sequences <= self.limits.sequences_max, "its turn never comes");
        }
    }

    fn new_id(&mut self) -> EntryId {
        self.next_id += 1;
        EntryId(self.next_id)
    }

    fn let_in(&mut self, ask: &Ask) -> EntryId {
        let id = self.new_id();
        let unplaced = ask.sequences as u64;
        let each = self.work(cost(ask) / unplaced.max(1));
        self.inside.insert(id, Inside { sequences: ask.sequences, unplaced, each });
        self.sequences += ask.sequences;
        self.put_on(each, unplaced);
        id
    }

    fn work(&self, tokens: u64) -> Work {
        let long = self.known_pace().is_some_and(|rate| self.alone(tokens, rate) > LONG_S);
        Work { tokens, long }
    }

    fn put_on(&mut self, work: Work, count: u64) {
        let Work { tokens, long } = work;
        *if long { &mut self.ahead_long } else { &mut self.ahead } += count * tokens;
        self.long += if long { count } else { 0 };
    }

    fn take_off(&mut self, work: Work, count: u64) {
        let Work { tokens, long } = work;
        *if long { &mut self.ahead_long } else { &mut self.ahead } -= count * tokens;
        self.long -= if long { count } else { 0 };
    }

    /// Whether there are places and work to spare for it.
    fn fits(&self, ask: &Ask) -> bool {
        let long_max = LONG_MAX * self.pace.workers.max(1) as u64;
        let ahead = self.ahead < self.ahead_max() && (!self.work(cost(ask)).long || self.long < long_max);
        ahead && self.sequences + ask.sequences <= self.limits.sequences_max
    }

    fn ahead_max(&self) -> u64 {
        let rate = self.known_pace().map_or(0.0, |rate| self.draining(rate));
        ((rate * AHEAD_S) as u64).max(AHEAD_TOKENS_MIN)
    }

    /// Tokens per second: as reported, else as seen.
    fn known_pace(&self) -> Option<f64> {
        let reported = Some(self.pace.tokens_per_s).filter(|&rate| rate > 0.0);
        reported.or_else(|| self.drain.per_s())
    }

    /// Tokens per second that the cluster takes in, where it computes `rate`: less where it is short of something else. Not
    /// more: a lump that came at once may look like it.
    fn draining(&self, rate: f64) -> f64 {
        self.drain.per_s_with(rate, DRAIN_PRIOR).min(rate)
    }

    /// Seconds from being let in to the first token.
    fn behind_door(&self, ask: &Ask, rate: f64) -> f64 {
        let own = self.alone(cost(ask), rate);
        let ahead = if own > LONG_S {
            self.ahead() as f64
        } else {
            // Half of a step is theirs while a long prompt is computed.
            self.ahead as f64 * if self.long > 0 { 2.0 } else { 1.0 }
        };
        ahead / self.draining(rate) + own
    }

    /// Seconds that so many tokens take one worker.
    fn alone(&self, tokens: u64, rate: f64) -> f64 {
        tokens as f64 * self.pace.workers.max(1) as f64 / rate
    }

    fn objective(&self, ask: &Ask) -> Duration {
        let own = self.known_pace().map_or(0.0, |rate| self.alone(cost(ask), rate));
        self.limits.ttft_max[ask.share.priority as usize].max(seconds(2.0 * own))
    }

    /// The latest moment at which being let in still gives a first token in time.
    fn useful_until(&self, ask: &Ask) -> Instant {
        let due = ask.received + self.objective(ask);
        let due = ask.deadline.map_or(due, |deadline| deadline.min(due));
        let behind = self.known_pace().map_or(0.0, |rate| self.behind_door(ask, rate));
        due.checked_sub(seconds(behind)).unwrap_or(ask.received)
    }

    fn late(&self, ask: &Ask, now: Instant) -> Refusal {
        let again = Ask { received: now, ..*ask };
        let over = self.expected_ttft(&again, now).unwrap_or_default();
        refusal(Reason::Late, over.saturating_sub(self.objective(&again)))
    }

    /// Takes somebody out of the full queue, if that is fairer than to refuse a newcomer of `share`.
    fn make_room(&mut self, share: Share) -> bool {
        let out = self.queue.displace(share);
        let made = out.is_some();
        self.displaced.extend(out);
        made
    }

    /// Counts what drained while somebody waited.
    fn observe(&mut self, now: Instant) {
        let units = std::mem::take(&mut self.drained);
        let since = self.drained_at.replace(now).map(|at| now.saturating_duration_since(at));
        let Some(time) = since else { return };
        if self.queue.is_empty() {
            // What drains while nobody waits says what came, not what could.
            self.drain.forget(time);
        } else {
            self.drain.add(units, time);
        }
    }
}

fn cost(ask: &Ask) -> u64 {
    ask.tokens + REQUEST_TOKENS * ask.sequences as u64
}

/// At most a day: nobody waits longer, and every sum with a moment exists.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.min(86_400.0)).unwrap_or_default()
}

fn refusal(reason: Reason, retry_after: Duration) -> Refusal {
    // Whole seconds, as both protocols say it; sooner would be too soon.
    let seconds = retry_after.min(RETRY_AFTER_MAX).as_secs_f64().ceil().max(1.0);
    Refusal { reason, retry_after: Duration::from_secs(seconds as u64) }
}

#[cfg(test)]
mod tests;
