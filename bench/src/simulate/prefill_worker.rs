//! A prefill worker: the real scheduler, and the step that is running.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::TokenId;
use prefill::scheduler::{Arrival, Chunk, Limits, Refusal, Scheduler, SequenceId};
use proto::pace::Pace;
use proto::share::Share;

use super::step_time::StepTime;

/// Numbers that `prefill::Config` has by default; the pool's size is the simulation's.
fn limits(kv_blocks: usize, block_tokens: usize) -> Limits {
    let config = prefill::Config::default();
    Limits {
        queue_requests_max: config.queue_requests_max,
        queue_tokens_max: config.queue_tokens_max,
        active_max: config.active_max,
        step_tokens_max: config.step_tokens_max,
        block_tokens,
        // No drafts are simulated.
        rerun_tokens: 0,
        kv_blocks,
    }
}

/// One prefill worker.
#[derive(Debug)]
pub struct PrefillWorker {
    scheduler: Scheduler,
    time: StepTime,
    step: Vec<Chunk>,
    took: Duration,
    pace: Pace,
    waiting_max: usize,
}

impl PrefillWorker {
    pub fn new(kv_blocks: usize, block_tokens: usize, time: StepTime) -> Self {
        let scheduler = Scheduler::new(limits(kv_blocks, block_tokens));
        Self {
            scheduler,
            time,
            step: Vec::new(),
            took: Duration::ZERO,
            pace: Pace::default(),
            waiting_max: 0,
        }
    }

    /// What placement looks at.
    pub fn load(&self) -> usize {
        self.scheduler.uncomputed_tokens()
    }

    pub fn submit(&mut self, request: usize, prompt: Arc<[TokenId]>, now: Instant) -> Result<(), Refusal> {
        let id = SequenceId(request as u64);
        self.scheduler.submit(
            Arrival {
                id,
                request_id: Arc::from(""),
                cache_salt: 0,
                share: Share::default(),
                prompt,
                recompute: false,
                deadline: None,
            },
            now,
        )?;
        self.waiting_max = self.waiting_max.max(self.scheduler.waiting());
        Ok(())
    }

    /// What it reports: prompt tokens a second.
    pub fn tokens_per_s(&self) -> Option<f64> {
        self.pace.per_s()
    }

    /// Starts the next step where none runs; returns how long it takes.
    pub fn start(&mut self, now: Instant) -> Option<Duration> {
        if !self.step.is_empty() {
            return None;
        }
        self.scheduler.schedule(&mut self.step, &mut (), now);
        let rows: usize = self.step.iter().map(|chunk| chunk.tokens).sum();
        let context = self.step.iter().map(|c| c.tokens * (2 * c.start + c.tokens + 1) / 2).sum();
        self.took = self.time.of(rows, context);
        (rows > 0).then_some(self.took)
    }

    /// Ends the step; returns the requests whose prompts are computed, each with its tokens found in the cache.
    pub fn end_step(&mut self) -> Vec<(usize, usize)> {
        let step = std::mem::take(&mut self.step);
        self.scheduler.complete(&step);
        self.pace.add(step.iter().map(|chunk| chunk.tokens as u64).sum(), self.took);
        let last = step.iter().filter(|chunk| chunk.last);
        last.map(|chunk| (chunk.id.0 as usize, self.scheduler.cached_tokens(chunk.id))).collect()
    }

    /// The request's KV is at decode, or nobody wants it.
    pub fn release(&mut self, request: usize) {
        self.scheduler.remove(SequenceId(request as u64));
    }

    pub fn waiting_max(&self) -> usize {
        self.waiting_max
    }

    pub fn check(&self) {
        self.scheduler.check_invariants();
    }
}
