//! Hop 7: the device thread. It owns engine, KV pool, scheduler and the sending side of hand-offs.
//!
//! One round is `receive → schedule → step → postprocess`. Requests come in over a bounded channel, cancels as dropped
//! streams, commits through the hand-off; first tokens and ends leave into queues that are never waited on. Without
//! work the thread sleeps until something arrives.
//!
//! Invariant: blocks change hands between steps only, on this thread. A failed step ends its own requests and nothing
//! else; one that nobody waits for any more ends between two layers.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver as Channel, Select, TryRecvError};
use engine::{Engine, FollowedInput, KvTier, Sampled, SequenceSampler, StepError};
use proto::pace::Pace;
use proto::share::Priority;
use tracing::Span;

use crate::error::{Failure, Refusal};
use crate::handoff::{Handoff, Outcome};
use crate::intake::Checked;
use crate::metrics::{Metrics, as_gauge};
use crate::outbox::{Outbox, RequestEvent};
use crate::prompt_logprobs::{PromptLogprobs, to_wire};
use crate::scheduler::{Arrival, Chunk, Scheduler, SequenceId};

use request::{Request, WhileWanted};

mod request;

/// An idle thread still goes round this often: health tells idle from dead by it, and deadlines are found.
const IDLE_MAX: Duration = Duration::from_millis(50);
/// With blocks that the transfer had no room for, look again after about the time that a few of them take to leave.
const BACKLOG_MAX: Duration = Duration::from_micros(500);

/// A checked request on its way to the device thread.
pub(crate) struct Submission {
    pub(crate) request: Checked,
    pub(crate) outbox: Outbox,
    pub(crate) arrived: Instant,
    /// The request's span on this worker.
    pub(crate) span: Span,
}

/// What the device thread listens to.
pub(crate) struct Inputs {
    pub(crate) submissions: Channel<Submission>,
    /// Rings when a stream was dropped.
    pub(crate) doorbell: Channel<()>,
    /// The moment by which requests must have ended. Disconnected: now.
    pub(crate) drain: Channel<Instant>,
}

/// The device thread's state.
pub(crate) struct Worker {
    engine: Engine,
    /// What the pool has no room for.
    tier: KvTier,
    scheduler: Scheduler,
    handoff: Handoff,
    inputs: Inputs,
    metrics: Metrics,
    requests: HashMap<SequenceId, Request>,
    next_id: u64,
    /// Set once the worker is asked to end.
    drain_by: Option<Instant>,
    step: Vec<Chunk>,
    /// One row, reused.
    logits: Vec<f32>,
    /// Prompt tokens by the time of the rounds that computed them, and the end of the last such round.
    pace: Pace,
    stepped_at: Option<Instant>,
}

impl Worker {
    pub(crate) fn new(
        (engine, tier): (Engine, KvTier),
        scheduler: Scheduler,
        handoff: Handoff,
        inputs: Inputs,
        metrics: Metrics,
    ) -> Self {
        Self {
            logits: Vec::with_capacity(engine.config().vocab_size),
            engine,
            tier,
            scheduler,
            handoff,
            inputs,
            metrics,
            requests: HashMap::new(),
            next_id: 0,
            drain_by: None,
            step: Vec::new(),
            pace: Pace::default(),
            stepped_at: None,
        }
    }

    /// Runs until drained.
    pub(crate) fn run(mut self) {
        while self.receive() {
            let mut tier = self.tier.behind(self.engine.kv_mut());
            self.scheduler.schedule(&mut self.step, &mut tier, Instant::now());
            let outcome = self.step();
            self.postprocess(outcome);
        }
        if self.tier.has_disk() {
            self.scheduler.keep_cached(&mut self.tier.behind(self.engine.kv_mut()));
        }
        self.tier.close();
        tracing::info!("prefill worker ended");
    }

    /// Takes in what has arrived, waiting for it when the last round found nothing to step. `false` once drained.
    fn receive(&mut self) -> bool {
        if self.step.is_empty() {
            self.wait();
            self.stepped_at = None;
        }
        let now = Instant::now();
        self.stepped_at.get_or_insert(now);
        self.metrics.rounds.inc();
        match self.inputs.drain.try_recv() {
            Ok(by) => self.drain_by = Some(by),
            // The handle is gone: nobody is left to wait for us.
            Err(TryRecvError::Disconnected) => self.drain_by = Some(now),
            Err(TryRecvError::Empty) => {}
        }
        // As many as there are now: a flood of refusals must not hold up a step.
        for _ in 0..self.inputs.submissions.len() {
            if let Ok(submission) = self.inputs.submissions.try_recv() {
                self.submit(submission, now);
            }
        }
        for id in self.tier.poll() {
            self.scheduler.restored(SequenceId(id), now);
        }
        self.settle_handoffs(now);
        self.drop_unwanted(now);
        self.publish();
        self.drain_by.is_none() || !self.requests.is_empty()
    }

    /// Sleeps until something arrives.
    fn wait(&self) {
        let patience = if self.handoff.has_backlog() { BACKLOG_MAX } else { IDLE_MAX };
        let mut select = Select::new();
        select.recv(&self.inputs.submissions);
        select.recv(&self.inputs.doorbell);
        if self.drain_by.is_none() {
            select.recv(&self.inputs.drain);
        }
        self.handoff.wait_on(&mut select);
        if let Some(arrivals) = self.tier.arrivals() {
            select.recv(arrivals);
        }
        // Which of them it is shows when they are looked at, all in their order.
        let _ = select.ready_timeout(patience);
        let _ = self.inputs.doorbell.try_recv();
    }

    fn submit(&mut self, submission: Submission, now: Instant) {
        let Submission { request: checked, outbox, arrived, span } = submission;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let queued = span.in_scope(|| self.queue(id, &checked, now));
        match queued {
            Ok(()) => {
                outbox.send(RequestEvent::Queued);
                let prompt_logprobs = checked.prompt_logprobs.map(PromptLogprobs::new);
                let sequence = &checked.sequence;
                let sampler = SequenceSampler::new(&sequence.sampling, sequence.choice, &sequence.prompt);
                let (started, state) = (None, Vec::new());
                let request =
                    Request { checked, outbox, arrived, started, state, prompt_logprobs, sampler, span };
                self.requests.insert(id, request);
                if self.tier.has_disk() && self.tier.fetch(id.0, &self.scheduler.missing(id)) {
                    self.scheduler.restore_asked(id);
                }
            }
            Err(refusal) => {
                self.metrics.refused(refusal.kind());
                outbox.send(RequestEvent::Refused(refusal));
            }
        }
    }

    fn queue(&mut self, id: SequenceId, checked: &Checked, now: Instant) -> Result<(), Refusal> {
        if self.drain_by.is_some() {
            return Err(Refusal::Draining);
        }
        if checked.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Refusal::DeadlineExceeded);
        }
        let arrival = Arrival {
            id,
            request_id: Arc::clone(&checked.request_id),
            cache_salt: checked.sequence.cache_salt,
            share: checked.sequence.share,
            prompt: Arc::from(checked.sequence.prompt.as_slice()),
            recompute: checked.prompt_logprobs.is_some(),
            deadline: checked.deadline,
        };
        self.scheduler.submit(arrival, now)?;
        self.handoff.begin(id, &checked.request_id, &checked.ticket, now).map_err(|error| {
            self.scheduler.remove(id);
            Refusal::Transfer(error)
        })
    }

    /// Moves hand-offs on, and ends the requests whose hand-off has ended.
    fn settle_handoffs(&mut self, now: Instant) {
        for (id, outcome) in self.handoff.poll(&self.scheduler, self.engine.kv(), now) {
            match outcome {
                Outcome::Committed { handoff } => self.finish(id, handoff),
                Outcome::Refused { detail } => self.fail(id, Failure::HandoffRefused { detail }),
                Outcome::Lost => self.fail(id, Failure::HandoffLost),
            }
        }
    }

    /// Ends requests that nobody waits for any more: cancelled, overdue, or at the end of draining.
    fn drop_unwanted(&mut self, now: Instant) {
        let abandoned = self.requests.iter().filter(|(_, request)| request.outbox.is_abandoned());
        for id in abandoned.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.cancel(id);
        }
        for id in self.scheduler.overdue(now) {
            self.fail(id, Failure::DeadlineExceeded);
        }
        if self.drain_by.is_some_and(|by| by <= now) {
            for id in self.requests.keys().copied().collect::<Vec<_>>() {
                self.fail(id, Failure::Stopping);
            }
        }
    }

    /// Runs the scheduled chunks, pushing each layer's blocks as they are done, and samples the first tokens.
    fn step(&mut self) -> Result<Vec<(SequenceId, Sampled)>, StepError> {
        if self.step.is_empty() {
            return Ok(Vec::new());
        }
        let started = Instant::now();
        let mut hops = Vec::with_capacity(self.step.len());
        let mut batch = Vec::with_capacity(self.step.len());
        for chunk in &self.step {
            // A scheduled sequence is a request: both go together, in `release`.
            if let Some(request) = self.requests.get_mut(&chunk.id) {
                request.started.get_or_insert(started);
                hops.push(request.hop(chunk));
            }
        }
        for chunk in &self.step {
            if let Some(request) = self.requests.get(&chunk.id) {
                let sequence = request.input(chunk, self.scheduler.block_table(chunk.id));
                batch.push(FollowedInput { sequence, before: &request.state });
            }
        }
        // What the step does for all its sequences together is shown under the first.
        let _hop = hops.first().map(Span::enter);
        let requests = &self.requests;
        let pushing = self.handoff.during(&self.scheduler, &self.step);
        let mut observer = WhileWanted { pushing, requests, step: &self.step };
        let hidden_size = self.engine.config().hidden_size;
        let of_chunk = |chunk: &Chunk| {
            let request = requests.get(&chunk.id);
            let rows = request.map_or(0, |request| request.rows_wanted(chunk));
            let draw = request.filter(|_| chunk.last).map(Request::draw);
            std::iter::repeat_n(None, rows.saturating_sub(1)).chain((rows > 0).then_some(draw))
        };
        let draws = &mut self.step.iter().flat_map(of_chunk);
        let drawn = if self.engine.has_mtp() {
            let (drawn, last) = self.engine.step_with_mtp_drawing(&batch, draws, &mut observer)?;
            keep_states(&mut self.requests, &self.step, last, hidden_size);
            drawn
        } else {
            let batch: Vec<_> = batch.iter().map(|input| input.sequence).collect();
            self.engine.step_drawing(&batch, draws, &mut observer)?
        };
        let mut first_tokens = Vec::new();
        let mut row = 0;
        for chunk in &self.step {
            let Some(request) = self.requests.get_mut(&chunk.id) else { continue };
            let rows = row..row + request.rows_wanted(chunk);
            row = rows.end;
            let Request { checked, sampler, prompt_logprobs, .. } = request;
            if let Some(logprobs) = prompt_logprobs {
                let logits = rows.clone().map(|row| drawn.logits(row));
                logprobs.rows(&checked.sequence.prompt, chunk.start, logits);
            }
            if chunk.last {
                let place = (checked.sequence.prompt.len(), checked.suppressed.as_slice());
                first_tokens.push((chunk.id, drawn.token(rows.end - 1, sampler, place, &mut self.logits)));
            }
        }
        Ok(first_tokens)
    }

    /// Lets the sequences move on, and their first tokens leave.
    fn postprocess(&mut self, outcome: Result<Vec<(SequenceId, Sampled)>, StepError>) {
        if self.step.is_empty() {
            return;
        }
        match outcome {
            Ok(first_tokens) => {
                self.metrics.steps.inc();
                let tokens = self.step.iter().map(|chunk| chunk.tokens as u64).sum();
                self.metrics.tokens.inc_by(tokens);
                self.scheduler.complete(&self.step);
                let now = Instant::now();
                self.keep_pace(tokens, now);
                for (id, sampled) in first_tokens {
                    self.deliver(id, sampled, now);
                }
            }
            Err(StepError::Unwanted) => {
                // What was not computed says nothing of the pace.
                self.stepped_at = None;
                self.scheduler.fail(&self.step);
                for id in self.step.iter().map(|chunk| chunk.id).collect::<Vec<_>>() {
                    self.cancel(id);
                }
            }
            Err(error) => self.fail_step(error),
        }
    }

    /// From the end of the round before on, or from the end of idling: what the next prompt in the queue waits for.
    fn keep_pace(&mut self, tokens: u64, now: Instant) {
        let since = self.stepped_at.replace(now).unwrap_or(now);
        self.pace.add(tokens, now.saturating_duration_since(since));
        let per_s = self.pace.per_s().unwrap_or(0.0);
        self.metrics.tokens_per_s.set(per_s as i64);
    }

    fn deliver(&mut self, id: SequenceId, sampled: Sampled, now: Instant) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let prompt = request.prompt_logprobs.as_mut().map(PromptLogprobs::take).unwrap_or_default();
        let started = request.started.unwrap_or(now);
        let queue = started.saturating_duration_since(request.arrived);
        let compute = now.saturating_duration_since(started);
        self.metrics.first_token(queue, compute);
        self.handoff.finish(id, sampled.token, now);
        let token = to_wire(sampled, request.checked.sequence.sampling.logprobs.is_some());
        let cached_tokens = self.scheduler.cached_tokens(id);
        request.outbox.send(RequestEvent::FirstToken { token, prompt, queue, compute, cached_tokens });
    }

    /// The rows of a failed step are unusable, those of its own sequences only: they go, the worker stays.
    fn fail_step(&mut self, error: StepError) {
        tracing::warn!(%error, sequences = self.step.len(), "a prefill step failed");
        if let Some(error) = error.device_failure() {
            // Nothing that it is asked from now on would be answered: the worker ends, and is started anew.
            tracing::error!(%error, cause = ?std::error::Error::source(error), "the device failed");
            self.drain_by = Some(Instant::now());
        }
        let error = Arc::new(error);
        self.scheduler.fail(&self.step);
        for id in self.step.iter().map(|chunk| chunk.id).collect::<Vec<_>>() {
            self.fail(id, Failure::Step(Arc::clone(&error)));
        }
    }

    /// Its client has gone away.
    fn cancel(&mut self, id: SequenceId) {
        if self.release(id, "cancelled").is_some() {
            self.metrics.cancelled.inc();
        }
    }

    fn finish(&mut self, id: SequenceId, handoff: Duration) {
        if let Some(request) = self.release(id, "committed") {
            self.metrics.handed_off(handoff);
            request.outbox.send(RequestEvent::Done { handoff });
        }
    }

    fn fail(&mut self, id: SequenceId, failure: Failure) {
        if let Some(request) = self.release(id, failure.kind()) {
            self.metrics.failed(failure.kind());
            let _span = request.span.enter();
            tracing::debug!(%failure, "request failed");
            request.outbox.send(RequestEvent::Failed(failure));
        }
    }

    /// Gives back what a request holds: its transfer, if that goes on, then its blocks.
    fn release(&mut self, id: SequenceId, reason: &str) -> Option<Request> {
        self.handoff.abort(id, reason);
        self.scheduler.remove(id);
        self.requests.remove(&id)
    }

    fn publish(&self) {
        self.metrics.waiting.set(as_gauge(self.scheduler.waiting()));
        for priority in Priority::ALL {
            self.metrics.waiting_of[priority as usize].set(as_gauge(self.scheduler.waiting_of(priority)));
        }
        self.metrics.active.set(as_gauge(self.scheduler.active()));
        self.metrics.waiting_tokens.set(as_gauge(self.scheduler.uncomputed_tokens()));
        self.metrics.blocks_free.set(as_gauge(self.scheduler.free_blocks()));
        self.metrics.blocks_cached.set(as_gauge(self.scheduler.cached_blocks()));
        self.metrics.prefix(&self.scheduler.prefix_stats());
        self.metrics.transfers(&self.handoff.stats());
        self.metrics.tier.store(&self.tier.stats());
    }
}

/// The states of the chunks' last tokens, `last` `[chunks, hidden]`, for the chunks that may follow.
fn keep_states(
    requests: &mut HashMap<SequenceId, Request>,
    step: &[Chunk],
    last: &[f32],
    hidden_size: usize,
) {
    for (chunk, state) in step.iter().zip(last.chunks_exact(hidden_size)) {
        if let Some(request) = requests.get_mut(&chunk.id) {
            request.state.clear();
            request.state.extend_from_slice(state);
        }
    }
}
