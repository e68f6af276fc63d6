//! A decode worker: the real scheduler, and the step that is running.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use decode::Failure;
use decode::finish::FinishRule;
use decode::scheduler::{Admission, End, Event, Limits, Scheduler, SequenceId};
use model::{Stopping, TokenId};
use proto::share::{Priority, Share};

use super::step_time::StepTime;

/// Ends an answer.
pub const END: TokenId = TokenId(1);

/// A request that wants blocks here.
#[derive(Debug)]
pub struct Wanted {
    pub request: usize,
    pub prompt: Arc<[TokenId]>,
    pub tokens_max: u32,
}

/// What has come of a sequence.
#[derive(Debug)]
pub struct Ended {
    pub request: usize,
    /// By its own rule; what else ends a sequence is a failure.
    pub by_itself: bool,
}

/// One decode worker.
#[derive(Debug)]
pub struct DecodeWorker {
    scheduler: Scheduler,
    time: StepTime,
    ids: HashMap<usize, SequenceId>,
    requests: HashMap<SequenceId, usize>,
    step: Vec<SequenceId>,
    stepping: bool,
    queue_seen_max: usize,
    batch_seen_max: usize,
}

impl DecodeWorker {
    pub fn new(kv_blocks: usize, block_tokens: usize, batch_max: usize, time: StepTime) -> Self {
        let config = decode::Config::default();
        let scheduler = Scheduler::new(Limits {
            sequences_max: config.sequences_max.max(batch_max),
            queue_max: config.queue_max,
            batch_max,
            step_rows_max: 1,
            kv_blocks,
            block_tokens,
            reader_stall_max: Duration::from_secs(86_400),
        });
        Self {
            scheduler,
            time,
            ids: HashMap::new(),
            requests: HashMap::new(),
            step: Vec::new(),
            stepping: false,
            queue_seen_max: 0,
            batch_seen_max: 0,
        }
    }

    /// What placement looks at.
    pub fn load(&self) -> usize {
        self.ids.len()
    }

    /// Queues a request for blocks; `false` where it is refused.
    pub fn submit(&mut self, wanted: Wanted, now: Instant) -> bool {
        let stopping = Stopping {
            max_tokens: wanted.tokens_max,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
        };
        let admission = Admission {
            prompt: wanted.prompt,
            cache_salt: 0,
            share: Share::default(),
            rule: FinishRule::new(&stopping, &[END]),
            deadline: None,
        };
        let Ok(id) = self.scheduler.submit(admission, now) else { return false };
        self.ids.insert(wanted.request, id);
        self.requests.insert(id, wanted.request);
        let queued = self.scheduler.queued(Priority::Interactive) + self.scheduler.queued(Priority::Batch);
        self.queue_seen_max = self.queue_seen_max.max(queued);
        true
    }

    /// The next request that has blocks now, with those that were here: it goes to prefill.
    pub fn admit(&mut self, now: Instant) -> Option<(usize, usize)> {
        let (id, _queued) = self.scheduler.admit_next(&mut (), now)?;
        let shared_blocks = self.scheduler.sequence(id).map_or(0, |sequence| sequence.shared_blocks());
        Some((self.requests[&id], shared_blocks))
    }

    /// Prefill refused the request.
    pub fn fail(&mut self, request: usize, now: Instant) {
        if let Some(&id) = self.ids.get(&request) {
            self.scheduler.apply(id, Event::Failed(Failure::Cancelled), now);
        }
    }

    /// The request's KV is here, and its first token.
    pub fn hand_off(&mut self, request: usize, first: TokenId, now: Instant) {
        if let Some(&id) = self.ids.get(&request) {
            self.scheduler.apply(id, Event::HandedOff(first), now);
        }
    }

    /// Starts the next step where none runs; returns how long it takes.
    pub fn start(&mut self) -> Option<Duration> {
        if self.stepping {
            return None;
        }
        self.scheduler.schedule(&mut self.step, &mut ());
        self.stepping = !self.step.is_empty();
        self.batch_seen_max = self.batch_seen_max.max(self.step.len());
        let lengths = self.step.iter().filter_map(|&id| self.scheduler.sequence(id)).map(|s| s.length());
        self.stepping.then(|| self.time.of(self.step.len(), lengths.sum()))
    }

    /// Ends the step with a token for each of its sequences, as `sample` draws them.
    pub fn end_step(&mut self, now: Instant, mut sample: impl FnMut(usize) -> TokenId) {
        self.stepping = false;
        for id in std::mem::take(&mut self.step) {
            let token = sample(self.requests[&id]);
            self.scheduler.apply(id, Event::Sampled(token), now);
        }
    }

    /// The next sequence that has ended, its blocks given back.
    pub fn reap(&mut self) -> Option<Ended> {
        let id = self.scheduler.next_finished()?;
        let end = self.scheduler.release(id)?;
        let request = self.requests.remove(&id)?;
        self.ids.remove(&request);
        Some(Ended { request, by_itself: matches!(end, End::Finished(_)) })
    }

    pub fn queue_seen_max(&self) -> usize {
        self.queue_seen_max
    }

    pub fn batch_seen_max(&self) -> usize {
        self.batch_seen_max
    }

    pub fn memory_pauses(&self) -> u64 {
        self.scheduler.plan_stats().memory_pauses
    }

    pub fn check(&self) {
        self.scheduler.check_invariants();
    }
}
