//! Hop 11: the device thread. It owns engine, KV pool, scheduler, receiver and samplers; nobody else touches them.
//!
//! One round is `receive → schedule → step → postprocess → prefill`, the last for prompts that are left to this worker. Everything
//! that reaches the thread does so in `receive`, over bounded channels that it never waits on while it has work; everything
//! that leaves does so in `postprocess`, into queues that it never waits on at all. Without work it sleeps until something
//! arrives or falls due.
//!
//! Invariant: blocks change hands between rounds only, on this thread. A push is copied into the pool by
//! `Receiver::poll` here, so once a ticket is revoked here no write to its blocks is left anywhere.

mod handoff;
mod owed;
mod prompt;
mod step;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver as Channel, Select, TryRecvError};
use engine::{Engine, KvTier, SequenceSampler, StepError};
use kvtransfer::Receiver;
use proto::share::Priority;
use proto::ticket::TicketId;
use proto::trace::TraceContext;
use tracing::Span;

use crate::error::{Failure, Refusal};
use crate::intake::{Intake, Submission, arm, name, queue};
use crate::metrics::{Metrics, as_gauge};
use crate::outbox::{Outbox, SequenceEvent};
use crate::scheduler::{End, Event, Limits, Scheduler, Sequence, SequenceId};
use crate::speculation::Speculation;

/// An idle thread still goes round this often, so that health can tell idle from dead.
const IDLE_MAX: Duration = Duration::from_millis(100);

/// What the device thread listens to.
pub(crate) struct Inputs {
    /// Checked requests.
    pub(crate) submissions: Channel<Submission>,
    /// Sequences whose text has ended.
    pub(crate) finishes: Channel<TicketId>,
    /// Rings when a stream was dropped or made room.
    pub(crate) doorbell: Channel<()>,
    /// The moment by which running sequences must have ended. Disconnected: now.
    pub(crate) drain: Channel<Instant>,
}

/// What the device thread is made of.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) tier: KvTier,
    pub(crate) scheduler: Scheduler,
    pub(crate) receiver: Receiver,
    pub(crate) intake: Arc<Intake>,
    pub(crate) inputs: Inputs,
    pub(crate) metrics: Metrics,
    /// With an MTP module in the engine, if drafts are wanted.
    pub(crate) speculation: Option<Speculation>,
    /// Prompt tokens between two steps.
    pub(crate) prefill_tokens_max: usize,
}

/// The device thread's state.
pub(crate) struct Worker {
    engine: Engine,
    /// What the pool has no room for.
    tier: KvTier,
    scheduler: Scheduler,
    receiver: Receiver,
    intake: Arc<Intake>,
    inputs: Inputs,
    metrics: Metrics,
    /// What the scheduler does not need to know of its sequences.
    seats: BTreeMap<SequenceId, Seat>,
    /// Set once the worker is asked to end.
    drain_by: Option<Instant>,
    /// Moving average, for [`Refusal::NoRoom`]'s hint.
    step_time: Duration,
    // Reused from step to step, so that a step allocates nothing.
    batch: Vec<SequenceId>,
    buffers: step::Buffers,
    sampled: Vec<step::Token>,
    speculation: Option<Speculation>,
    /// With drafts: what the last step's round takes is not known yet.
    round: Option<step::Round>,
    prompts: prompt::Prompts,
    /// One row of logits, reused.
    sampled_row: Vec<f32>,
}

/// One sequence's share of the worker, besides its blocks.
struct Seat {
    request_id: Arc<str>,
    trace: TraceContext,
    priority: Priority,
    outbox: Outbox,
    sampler: SequenceSampler,
    rows: step::Rows,
    prompt: prompt::Prompt,
    /// When it was submitted, and from its ticket on when that was issued.
    issued_at: Instant,
    committed_at: Option<Instant>,
    first_step_at: Option<Instant>,
    /// Open while the sequence runs.
    span: Span,
}

impl Worker {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            engine,
            tier,
            scheduler,
            receiver,
            intake,
            inputs,
            metrics,
            speculation,
            prefill_tokens_max,
        } = parts;
        let vocab_size = engine.config().vocab_size;
        let Limits { batch_max, step_rows_max, .. } = *scheduler.limits();
        Self {
            engine,
            tier,
            scheduler,
            receiver,
            intake,
            inputs,
            metrics,
            seats: BTreeMap::new(),
            drain_by: None,
            step_time: Duration::ZERO,
            batch: Vec::with_capacity(batch_max),
            buffers: step::Buffers::new(batch_max, vocab_size),
            sampled: Vec::with_capacity(batch_max * step_rows_max),
            speculation,
            round: None,
            prompts: prompt::Prompts::new(prefill_tokens_max),
            sampled_row: Vec::new(),
        }
    }

    /// Runs until drained.
    pub(crate) fn run(mut self) {
        while self.receive() {
            self.schedule();
            let outcome = self.step();
            let failed = outcome.is_err();
            self.postprocess(outcome);
            // Who failed a step may have no device any more.
            if !failed {
                self.prefill();
            }
        }
        if self.tier.has_disk() {
            self.scheduler.keep_cached(&mut self.tier.behind(self.engine.kv_mut()));
        }
        self.tier.close();
        tracing::info!("decode worker ended");
    }

    fn schedule(&mut self) {
        self.scheduler.schedule(&mut self.batch, &mut self.tier.behind(self.engine.kv_mut()));
    }

    /// Takes in what has arrived, waiting for it when there is nothing to step. `false` once drained.
    fn receive(&mut self) -> bool {
        if self.scheduler.runnable() == 0 {
            self.round_ended(Instant::now());
            self.wait();
        }
        let now = Instant::now();
        self.metrics.rounds.inc();
        self.heed_drain(now);
        // As many as there are now: a flood of refusals must not hold up a step.
        for _ in 0..self.inputs.submissions.len() {
            if let Ok(submission) = self.inputs.submissions.try_recv() {
                self.submit(submission, now);
            }
        }
        for _ in 0..self.inputs.finishes.len() {
            if let Some(id) = self.inputs.finishes.try_recv().ok().and_then(|at| self.scheduler.by_ticket(at))
            {
                self.scheduler.apply(id, Event::Stopped, now);
            }
        }
        for id in self.tier.poll() {
            self.scheduler.restored(SequenceId(id), now);
        }
        self.poll_receiver(now);
        self.look_at_readers(now);
        self.scheduler.tick(now);
        if self.drain_by.is_some() {
            self.scheduler.fail_queued(&Failure::Stopping);
        }
        if self.drain_by.is_some_and(|by| by <= now) {
            self.scheduler.fail_all(&Failure::Stopping);
        }
        self.admit(now);
        self.drain_by.is_none() || !self.scheduler.is_empty()
    }

    /// Sleeps until something arrives or falls due.
    fn wait(&mut self) {
        if self.receiver.is_closed() && self.drain_by.is_none() {
            tracing::error!("the fabric is closed: no KV can arrive any more");
            self.drain_by = Some(Instant::now());
        }
        let due = self.scheduler.next_deadline().into_iter().chain(self.drain_by).min();
        let until = due.map_or(IDLE_MAX, |at| at.saturating_duration_since(Instant::now()).min(IDLE_MAX));
        let mut select = Select::new();
        select.recv(&self.inputs.submissions);
        select.recv(&self.inputs.doorbell);
        if self.drain_by.is_none() {
            select.recv(&self.inputs.drain);
        }
        if let Some(arrivals) = self.tier.arrivals() {
            select.recv(arrivals);
        }
        self.receiver.wait_on(&mut select);
        // What has come shows when each of them is looked at, all in their order.
        let _ = select.ready_timeout(until);
        // Answered by going round.
        let _ = self.inputs.doorbell.try_recv();
    }

    fn heed_drain(&mut self, now: Instant) {
        match self.inputs.drain.try_recv() {
            Ok(by) => self.drain_by = Some(by),
            // The handle is gone: nobody is left to wait for us.
            Err(TryRecvError::Disconnected) => self.drain_by = Some(now),
            Err(TryRecvError::Empty) => {}
        }
    }

    fn submit(&mut self, submission: Submission, now: Instant) {
        let queued = if self.drain_by.is_some() {
            Err(Refusal::Draining)
        } else {
            queue(&mut self.scheduler, &submission, self.step_time, now)
        };
        let Submission { request_id, trace, admission, outbox, sampler } = submission;
        match queued {
            Ok(id) => {
                let seat = Seat {
                    request_id,
                    trace,
                    priority: admission.share.priority,
                    outbox,
                    sampler,
                    rows: step::Rows::default(),
                    prompt: prompt::Prompt::default(),
                    issued_at: now,
                    committed_at: None,
                    first_step_at: None,
                    span: Span::none(),
                };
                self.seats.insert(id, seat);
                if self.tier.has_disk() && self.tier.fetch(id.0, &self.scheduler.missing(id)) {
                    self.scheduler.restore_asked(id);
                }
            }
            Err(refusal) => {
                self.metrics.refused(refusal.kind());
                outbox.send(SequenceEvent::Refused(refusal));
            }
        }
    }

    /// Gives blocks and tickets to those that wait for them, as far as there is room.
    fn admit(&mut self, now: Instant) {
        loop {
            let mut tier = self.tier.behind(self.engine.kv_mut());
            let Some((id, queued)) = self.scheduler.admit_next(&mut tier, now) else { break };
            let reserved = if self.scheduler.sequence(id).is_some_and(Sequence::prefills_here) {
                let name = name(&mut self.scheduler, id, now);
                Ok(SequenceEvent::Reserved { incarnation: self.receiver.incarnation(), name })
            } else {
                let ticket = arm(&mut self.scheduler, &mut self.receiver, id, now);
                ticket.map(|ticket| SequenceEvent::Ticket(Box::new(ticket)))
            };
            let Some(seat) = self.seats.get_mut(&id) else { continue };
            match reserved {
                Ok(reserved) => {
                    self.metrics.admitted.inc();
                    self.metrics.queued_for(seat.priority, queued);
                    seat.issued_at = now;
                    seat.outbox.send(reserved);
                }
                Err(refusal) => {
                    self.metrics.refused(refusal.kind());
                    seat.outbox.send(SequenceEvent::Refused(refusal));
                    self.seats.remove(&id);
                }
            }
        }
    }

    /// Cancels sequences whose stream was dropped; pauses and resumes the others by the room in their queue.
    fn look_at_readers(&mut self, now: Instant) {
        for (&id, seat) in &self.seats {
            let event = if seat.outbox.is_abandoned() {
                Event::Failed(Failure::Cancelled)
            } else if seat.outbox.has_room() {
                Event::ReaderReady
            } else {
                Event::ReaderFull
            };
            self.scheduler.apply(id, event, now);
        }
    }

    /// Hands the step's tokens to their streams, and gives back what ended sequences hold.
    fn postprocess(&mut self, outcome: Result<(), StepError>) {
        let now = Instant::now();
        match outcome {
            Ok(()) => self.deliver(now),
            Err(error) => {
                let ids = std::mem::take(&mut self.batch);
                self.fail_step(&ids, error, now);
                self.batch = ids;
            }
        }
        self.settle(now);
    }

    /// Gives back what ended sequences hold, to those that wait for it.
    fn settle(&mut self, now: Instant) {
        self.release_finished(now);
        // What they gave back may be what somebody waits for, and there may be no other reason to go round again.
        self.admit(now);
        self.publish();
    }

    fn deliver(&mut self, now: Instant) {
        for step::Token { id, sampled, drafts } in self.sampled.drain(..) {
            let Some(seat) = self.seats.get_mut(&id) else { continue };
            if seat.first_step_at.is_none()
                && let Some(committed_at) = seat.committed_at
            {
                self.metrics.handoff_stages.first_step.observe(now.duration_since(committed_at));
            }
            seat.first_step_at.get_or_insert(now);
            let token = sampled.token;
            seat.outbox.send(SequenceEvent::Token(sampled, drafts));
            self.scheduler.apply(id, Event::Sampled(token), now);
        }
    }

    /// A failed step left unusable KV rows behind, for its own sequences only. The worker goes on with the others.
    fn fail_step(&mut self, ids: &[SequenceId], error: StepError, now: Instant) {
        tracing::warn!(%error, sequences = ids.len(), "a step failed");
        if let Some(error) = error.device_failure() {
            // Nothing that it is asked from now on would be answered: the worker ends, and is started anew.
            tracing::error!(%error, cause = ?std::error::Error::source(error), "the device failed");
            self.drain_by = Some(now);
        }
        let error = Arc::new(error);
        for &id in ids {
            self.scheduler.apply(id, Event::Failed(Failure::Step(Arc::clone(&error))), now);
        }
    }

    /// Gives back what ended sequences hold, all of this round's together.
    fn release_finished(&mut self, now: Instant) {
        let mut ended = std::mem::take(&mut self.buffers.ended);
        ended.clear();
        ended.extend(self.scheduler.finished());
        // In this order: behind these lines no push can land in the blocks any more.
        for &id in &ended {
            if let Some(ticket) = self.scheduler.sequence(id).and_then(|sequence| sequence.ticket()) {
                let _fenced = self.receiver.revoke(ticket);
            }
        }
        // The blocks stay to be found: with all that belongs in them.
        owed::store_owed(&mut self.engine, &self.scheduler, &mut self.seats, &ended, &mut self.buffers.owed);
        for &id in &ended {
            self.release(id, now);
        }
        self.buffers.ended = ended;
    }

    /// Returns a finished sequence's blocks, then tells its stream.
    fn release(&mut self, id: SequenceId, now: Instant) {
        let Some(end) = self.scheduler.release(id) else { return };
        let Some(seat) = self.seats.remove(&id) else { return };
        let _span = seat.span.enter();
        match end {
            End::Finished(finish) => {
                self.metrics.finished.inc();
                let first_step_at = seat.first_step_at.unwrap_or(now);
                let committed_at = seat.committed_at.unwrap_or(first_step_at);
                tracing::debug!(?finish, "sequence finished");
                seat.outbox.send(SequenceEvent::Finished {
                    finish,
                    first_step: first_step_at.duration_since(committed_at),
                    decode: now.duration_since(first_step_at),
                });
            }
            End::Failed(failure) => {
                self.metrics.failed(failure.kind());
                tracing::debug!(%failure, "sequence failed");
                seat.outbox.send(SequenceEvent::Failed(failure));
            }
        }
    }

    fn record_step(&mut self, took: Duration) {
        self.metrics.steps.inc();
        self.metrics.tokens.inc_by(self.sampled.len() as u64);
        self.metrics.step_time.observe(took);
        // An eighth of the newest: follows a change of batch size within some ten steps.
        self.step_time = if self.step_time.is_zero() { took } else { (self.step_time * 7 + took) / 8 };
    }

    fn publish(&self) {
        self.metrics.running.set(as_gauge(self.scheduler.running()));
        self.metrics.runnable.set(as_gauge(self.scheduler.runnable()));
        self.metrics.waiting.set(as_gauge(self.scheduler.waiting()));
        self.metrics.waiting_tokens.set(as_gauge(self.scheduler.uncomputed_tokens()));
        self.metrics.step_us.set(i64::try_from(self.step_time.as_micros()).unwrap_or(i64::MAX));
        for priority in Priority::ALL {
            self.metrics.queued[priority as usize].set(as_gauge(self.scheduler.queued(priority)));
        }
        self.metrics.short.set(as_gauge(self.scheduler.short()));
        self.metrics.plan.store(&self.scheduler.plan_stats());
        self.metrics.blocks_free.set(as_gauge(self.scheduler.free_blocks()));
        self.metrics.blocks_cached.set(as_gauge(self.scheduler.cached_blocks()));
        self.metrics.prefix(&self.scheduler.prefix_stats());
        self.metrics.tier.store(&self.tier.stats());
        self.metrics.handoffs.store(&self.receiver.stats(), self.receiver.landing());
    }
}

#[cfg(test)]
mod tests;
