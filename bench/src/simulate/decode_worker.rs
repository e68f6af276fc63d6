//! A decode worker: the real scheduler, and the step that is running.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use decode::Failure;
use decode::finish::FinishRule;
use decode::scheduler::{Admission, Chunk, End, Event, Limits, Scheduler, SequenceId};
use model::{Stopping, TokenId};
use proto::pace::Pace;
use proto::share::{Priority, Share};
use router::disaggregation::Local;

use super::step_time::StepTime;

/// Ends an answer.
pub const END: TokenId = TokenId(1);

/// A request that wants blocks here.
#[derive(Debug)]
pub struct Wanted {
    pub request: usize,
    /// Its prompt is computed here.
    pub prefill_here: bool,
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
    prompt_time: StepTime,
    prefill_tokens_max: usize,
    batch_max: usize,
    chunks: Vec<Chunk>,
    /// What the last step took, and what chunks take.
    step_took: Duration,
    pace: Pace,
    ids: HashMap<usize, SequenceId>,
    requests: HashMap<SequenceId, usize>,
    step: Vec<SequenceId>,
    stepping: bool,
    queue_seen_max: usize,
    batch_seen_max: usize,
}

impl DecodeWorker {
    /// `time` of a step, `prompt_time` of chunks of prompts, which run as they do on prefill.
    pub fn new(
        kv_blocks: usize,
        block_tokens: usize,
        batch_max: usize,
        [time, prompt_time]: [StepTime; 2],
    ) -> Self {
        let config = decode::Config::default();
        let scheduler = Scheduler::new(Limits {
            sequences_max: config.sequences_max.max(batch_max),
            queue_max: config.queue_max,
            batch_max,
            step_rows_max: 1,
            kv_blocks,
            block_tokens,
            reader_stall_max: Duration::from_secs(86_400),
            // No drafts are simulated.
            rerun_tokens: 0,
        });
        Self {
            scheduler,
            time,
            prompt_time,
            prefill_tokens_max: config.prefill_tokens_max,
            batch_max,
            chunks: Vec::new(),
            step_took: Duration::ZERO,
            pace: Pace::default(),
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
            prefill_here: wanted.prefill_here,
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

    /// Starts the next round where none runs, a step and the chunks behind it; returns how long it takes.
    pub fn start(&mut self) -> Option<Duration> {
        if self.stepping {
            return None;
        }
        self.scheduler.schedule(&mut self.step, &mut ());
        self.scheduler.schedule_chunks(self.prefill_tokens_max, &mut self.chunks);
        self.stepping = !self.step.is_empty() || !self.chunks.is_empty();
        self.batch_seen_max = self.batch_seen_max.max(self.step.len());
        let mut took = Duration::ZERO;
        if !self.step.is_empty() {
            let lengths = self.step.iter().filter_map(|&id| self.scheduler.sequence(id)).map(|s| s.length());
            self.step_took = self.time.of(self.step.len(), lengths.sum());
            took += self.step_took;
        }
        if !self.chunks.is_empty() {
            let rows: usize = self.chunks.iter().map(|chunk| chunk.tokens).sum();
            let context = self.chunks.iter().map(|c| c.tokens * (2 * c.start + c.tokens + 1) / 2).sum();
            let chunks_take = self.prompt_time.of(rows, context);
            self.pace.add(rows as u64, chunks_take);
            took += chunks_take;
        }
        self.stepping.then_some(took)
    }

    /// Ends the round with a token for each of its sequences, as `sample` draws them. Returns the requests whose prompts were
    /// computed, each with its tokens found in the cache.
    pub fn end_step(
        &mut self,
        now: Instant,
        mut sample: impl FnMut(usize) -> TokenId,
    ) -> Vec<(usize, usize)> {
        self.stepping = false;
        for id in std::mem::take(&mut self.step) {
            let token = sample(self.requests[&id]);
            self.scheduler.apply(id, Event::Sampled(token), now);
        }
        let mut prompts = Vec::new();
        for chunk in std::mem::take(&mut self.chunks) {
            self.scheduler.apply(chunk.id, Event::Computed(chunk.tokens), now);
            if chunk.last {
                let block_tokens = self.scheduler.limits().block_tokens;
                let shared = self.scheduler.sequence(chunk.id).map_or(0, |sequence| sequence.shared_blocks());
                prompts.push((self.requests[&chunk.id], shared * block_tokens));
            }
        }
        prompts
    }

    /// What a prompt would meet here; `missing_tokens` of its own.
    pub fn local(&self, missing_tokens: u64) -> Local {
        Local {
            waiting_tokens: self.scheduler.uncomputed_tokens() as u64,
            missing_tokens,
            tokens_per_s: self.pace.per_s().map_or(0, |rate| rate as u64),
            chunk_tokens: self.prefill_tokens_max as u64,
            step: self.step_took,
            running: self.scheduler.running() as u64,
            batch_max: self.batch_max as u64,
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
