//! Hop 5: a request becomes a sequence with blocks and a ticket.
//!
//! Three parts. [`Intake::check`] runs on the service's threads and decides everything that does not depend on the
//! worker's state: fields, fingerprint, ends. [`queue`] and [`arm`] run on the device thread: a place among those that
//! wait for blocks, and, once the scheduler has given them, a ticket that lets prefill push into those of the prompt
//! whose KV is not here already.
//!
//! Invariant: a request that is refused here holds nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::SequenceSampler;
use kvtransfer::{Receiver, Reservation};
use model::{ExecutionFingerprint, ModelConfig, TokenId};
use proto::field::{FieldError, Problem};
use proto::fingerprint;
use proto::sequence::{self, SequenceLimits};
use proto::ticket::{KvTicket, TicketId};
use proto::trace::TraceContext;
use proto::v1;

use crate::error::{Failure, Refusal};
use crate::finish::FinishRule;
use crate::outbox::Outbox;
use crate::scheduler::{Admission, Event, NotAdmitted, Scheduler, Sequence, SequenceId};

/// What every request is held against.
#[derive(Debug)]
pub(crate) struct Intake {
    fingerprint: ExecutionFingerprint,
    limits: SequenceLimits,
    end_of_sequence: Vec<TokenId>,
}

/// A checked request on its way to the device thread.
pub(crate) struct Submission {
    pub(crate) request_id: Arc<str>,
    pub(crate) trace: TraceContext,
    pub(crate) admission: Admission,
    pub(crate) sampler: SequenceSampler,
    pub(crate) outbox: Outbox,
}

/// A [`Submission`] that has no stream yet.
pub(crate) struct Checked {
    pub(crate) request_id: Arc<str>,
    pub(crate) trace: TraceContext,
    /// Whether the stream reports log-probabilities.
    pub(crate) logprobs: bool,
    admission: Admission,
    sampler: SequenceSampler,
}

impl Checked {
    /// Whether its prompt is computed here.
    pub(crate) fn prefill_here(mut self, here: bool) -> Self {
        self.admission.prefill_here = here;
        self
    }

    /// Gives it the queue that its stream reads.
    pub(crate) fn submit_with(self, outbox: Outbox) -> Submission {
        let Self { request_id, trace, admission, sampler, .. } = self;
        Submission { request_id, trace, admission, sampler, outbox }
    }
}

impl Intake {
    pub(crate) fn new(config: &ModelConfig, fingerprint: ExecutionFingerprint) -> Self {
        Self {
            fingerprint,
            limits: SequenceLimits {
                vocab_size: config.vocab_size,
                context_tokens_max: config.max_position_embeddings,
            },
            end_of_sequence: config.eos_token_ids.clone(),
        }
    }

    /// Checks a request that was received at `now`, fingerprint first: whoever runs another model would only learn
    /// of a token outside the vocabulary.
    pub(crate) fn check(&self, wire: Option<&v1::SequenceRequest>, now: Instant) -> Result<Checked, Refusal> {
        let missing = || FieldError { field: "sequence".into(), problem: Problem::Missing };
        let wire = wire.ok_or_else(missing)?;
        fingerprint::require_equal(&self.fingerprint, wire.fingerprint.as_ref())?;
        let sequence = sequence::Sequence::from_wire(wire, self.limits)?;
        let sampler = SequenceSampler::new(&sequence.sampling, sequence.choice, &sequence.prompt);
        let admission = Admission {
            cache_salt: sequence.cache_salt,
            share: sequence.share,
            rule: FinishRule::new(&sequence.stopping, &self.end_of_sequence),
            deadline: sequence.deadline.map(|left| now + left),
            // The prompt's share of the penalties was counted here, off the device thread.
            prompt: Arc::from(sequence.prompt),
            prefill_here: false,
        };
        Ok(Checked {
            request_id: Arc::from(sequence.request_id),
            trace: sequence.trace,
            logprobs: sequence.sampling.logprobs.is_some(),
            admission,
            sampler,
        })
    }

    /// Whether prefill may have sampled `token`.
    pub(crate) fn in_vocabulary(&self, token: TokenId) -> bool {
        (token.0 as usize) < self.limits.vocab_size
    }
}

/// Queues a request for blocks.
///
/// `step_time` is how long a step takes at present; from it follows when to come back after [`Refusal::NoRoom`].
pub(crate) fn queue(
    scheduler: &mut Scheduler,
    submission: &Submission,
    step_time: Duration,
    now: Instant,
) -> Result<SequenceId, Refusal> {
    let _span = tracing::info_span!(
        "intake",
        hop = 5,
        request_id = %submission.request_id,
        trace_id = %submission.trace.trace_id(),
        parent_id = %submission.trace.span_id()
    )
    .entered();
    let admission = submission.admission.clone();
    if admission.deadline.is_some_and(|deadline| deadline <= now) {
        return Err(Refusal::DeadlineExceeded);
    }
    scheduler.submit(admission, now).map_err(|not| match not {
        NotAdmitted::NeverFits { blocks, blocks_max } => Refusal::NeverFits { blocks, blocks_max },
        NotAdmitted::QueueFull { queued } => Refusal::NoRoom {
            queued,
            blocks_free: scheduler.free_blocks(),
            retry_after: retry_after(scheduler.steps_until_room(), step_time),
        },
    })
}

/// Names an admitted sequence whose prompt is computed here: nobody gets a ticket to push, but its router may say that its text
/// has ended.
pub(crate) fn name(scheduler: &mut Scheduler, id: SequenceId, now: Instant) -> TicketId {
    let mut name = TicketId(rand::random());
    while scheduler.by_ticket(name).is_some() {
        name = TicketId(rand::random());
    }
    scheduler.apply(id, Event::Armed(name), now);
    name
}

/// Arms a ticket for the blocks of an admitted sequence's prompt. Where there is none to be had, the sequence is gone.
pub(crate) fn arm(
    scheduler: &mut Scheduler,
    receiver: &mut Receiver,
    id: SequenceId,
    now: Instant,
) -> Result<KvTicket, Refusal> {
    let first_block = scheduler.sequence(id).map_or(0, Sequence::shared_blocks);
    let prompt_tokens = scheduler.sequence(id).map_or(0, Sequence::prompt_tokens);
    match receiver.issue(Reservation { first_block, prompt_tokens }, now) {
        Ok(ticket) => {
            scheduler.apply(id, Event::Armed(ticket.ticket_id), now);
            tracing::debug!(ticket = %ticket.ticket_id, blocks = ticket.blocks, first_block, "ticket issued");
            Ok(ticket)
        }
        Err(error) => {
            // It was never seen outside: no end to tell anybody, only blocks to give back.
            scheduler.apply(id, Event::Failed(Failure::Cancelled), now);
            scheduler.release(id);
            Err(Refusal::Ticket(Arc::new(error)))
        }
    }
}

/// When the first running sequence must have left, within what a client can be asked to wait.
fn retry_after(steps: Option<u32>, step_time: Duration) -> Duration {
    const MIN: Duration = Duration::from_millis(50);
    // Also when nothing runs yet: everything that is held waits for its KV.
    const MAX: Duration = Duration::from_secs(2);
    steps.map_or(MAX, |steps| step_time.saturating_mul(steps).clamp(MIN, MAX))
}
