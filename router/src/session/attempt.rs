//! One try of one choice on one pair of workers.
//!
//! decode reserves and answers with a ticket, prefill gets prompt and ticket, and what both send goes to
//! the client as one sequence of tokens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::TokenId;
use proto::control::Consequence;
use proto::sequence::{sampling_to_wire, stopping_to_wire};
use proto::trace::TraceContext;
use proto::v1::decode_client::DecodeClient;
use proto::v1::prefill_client::PrefillClient;
use proto::v1::{self, decode_event};
use tonic::{Status, Streaming};
use tracing::{Instrument, info_span};

use super::merge::{Drafts, Merge};
use super::output::{ChoiceOutput, Flow};
use super::streams::Streams;
use super::{micros, overloaded};
use crate::admission::{Admitted, AdmittedPrompt, Ahead};
use crate::error::RequestError;
use crate::metrics::Metrics;
use crate::placement::{Prefixes, Tier};
use crate::registry::{Placed, Registry};
use crate::worker::{Assignment, Worker, WorkerKey};

/// Longest message of a worker's error that is passed on, characters.
const MESSAGE_MAX: usize = 300;

/// What is the same for every try of a choice.
pub(super) struct Attempt<'a> {
    /// Until when the choice waits for KV blocks.
    pub patience: Instant,
    /// The try's own span, which the workers' spans belong to.
    pub trace: TraceContext,
    pub registry: &'a Registry,
    pub metrics: &'a Metrics,
    pub admitted: &'a Admitted,
    pub prompt: &'a AdmittedPrompt,
    pub choice: u32,
}

/// A choice that finished.
pub(super) struct ChoiceReport {
    pub completion_tokens: u32,
    pub cached_tokens: u32,
    pub drafts: Drafts,
    /// Admission and total are the request's and filled in there.
    pub timings: v1::Timings,
}

/// What decode has answered with.
enum Reserved {
    /// Leave for prefill to push.
    Ticket(Box<v1::KvTicket>),
    /// It computes the prompt; how to say that the text has ended.
    Here(v1::FinishRequest),
}

impl Reserved {
    fn incarnation(&self) -> u64 {
        match self {
            Self::Ticket(ticket) => ticket.incarnation,
            Self::Here(end) => end.incarnation,
        }
    }
}

/// A try that failed, and on whom.
pub(super) struct Failure {
    pub error: RequestError,
    pub tier: Tier,
    pub worker: WorkerKey,
}

impl Failure {
    pub fn at(worker: &Worker, error: RequestError) -> Self {
        Self { error, tier: worker.tier, worker: worker.key.clone() }
    }

    pub fn protocol(worker: &Worker, problem: &'static str) -> Self {
        Self::at(worker, RequestError::WorkerProtocol { worker: worker.key.clone(), problem })
    }

    pub fn gone(worker: &Worker) -> Self {
        Self::at(worker, RequestError::WorkerGone { worker: worker.key.clone() })
    }

    /// Decode has no KV blocks for the sequence now.
    pub fn no_room(&self) -> bool {
        let exhausted =
            matches!(&self.error, RequestError::Worker { code: tonic::Code::ResourceExhausted, .. });
        exhausted && self.tier == Tier::Decode
    }
}

impl Attempt<'_> {
    /// Runs the choice to its end on `placed`. Dropping the future cancels on both workers.
    pub async fn run(&self, placed: Placed, output: &mut ChoiceOutput<'_>) -> Result<ChoiceReport, Failure> {
        let Placed { prefill, decode, computed, decision } = placed;
        let ahead = self.admitted.permit.placed(self.prompt.tokens.len() as u64, computed);
        let span = info_span!(
            "attempt",
            hop = 4,
            trace_id = %self.trace.trace_id(),
            span_id = %self.trace.span_id(),
            request_id = %self.admitted.context.request_id,
            prefill = %prefill.worker().key,
            decode = %decode.worker().key,
            prefill_on = decision.name(),
        );
        self.run_within((prefill, ahead), (decode, decision.on_decode), output).instrument(span).await
    }

    async fn run_within(
        &self,
        (prefill, ahead): (Assignment, Ahead),
        (decode, prefill_here): (Assignment, bool),
        output: &mut ChoiceOutput<'_>,
    ) -> Result<ChoiceReport, Failure> {
        let reserving = Instant::now();
        let (tokens, reserved) = self.reserve(decode.worker(), prefill_here).await?;
        let reserve = reserving.elapsed();
        self.metrics.hop("reserve", reserve);
        let (merge, first_tokens, end) = match reserved {
            Reserved::Ticket(ticket) => {
                let end = v1::FinishRequest { incarnation: ticket.incarnation, ticket_id: ticket.ticket_id };
                let first_tokens = self.prefill(prefill.worker(), *ticket).await?;
                (Merge::new(self.prompt.stopping.max_tokens), Some(first_tokens), end)
            }
            Reserved::Here(end) => (Merge::of_one(self.prompt.stopping.max_tokens), None, end),
        };
        let mut streams = Streams {
            attempt: self,
            prefill: Arc::clone(prefill.worker()),
            decode: Arc::clone(decode.worker()),
            first_tokens,
            tokens,
            merge,
        };
        let decode_here = self.pass_on(&mut streams, (prefill, ahead), output).await?;
        let mut timings = streams.merge.timings();
        let (cached_tokens, drafts) = (streams.merge.cached_tokens(), streams.merge.drafts());
        timings.reserve_us = micros(reserve);
        timings.ttft_us = micros(output.ttft());
        if let Some(decode_here) = decode_here {
            timings.decode_us = micros(decode_here);
        }
        if decode_here.is_some() {
            streams.text_ended(end);
        }
        self.observe(&timings);
        // The next turn of a conversation begins with this one.
        let tokens: Vec<TokenId> = self.prompt.tokens.iter().chain(output.completion()).copied().collect();
        let mut held = Prefixes::new(self.admitted.context.tenant.cache_salt, &tokens);
        self.registry.holds(decode.worker(), &mut held);
        Ok(ChoiceReport { completion_tokens: output.tokens(), cached_tokens, drafts, timings })
    }

    /// Gives tokens to the client until the sequence has ended. When a stop string ended it, decode does not
    /// know and reports no time: returns ours, from decode's first token on.
    async fn pass_on(
        &self,
        streams: &mut Streams<'_>,
        queued: (Assignment, Ahead),
        output: &mut ChoiceOutput<'_>,
    ) -> Result<Option<Duration>, Failure> {
        let mut queued = Some(queued);
        let mut first_decoded = None;
        loop {
            let (worker, ready) = streams.next().await?;
            let client = |error| Failure::at(&worker, error);
            if worker.tier == Tier::Decode && !ready.is_empty() {
                first_decoded.get_or_insert_with(Instant::now);
            }
            output.take_prompt(streams.merge.take_prompt());
            if !ready.is_empty() && output.push(ready).await.map_err(client)? == Flow::Finished {
                return Ok(Some(first_decoded.map_or(Duration::ZERO, |first| first.elapsed())));
            }
            if output.started() {
                // Prefill's queue is what placement and the door look at, and the prompt is through it.
                drop(queued.take());
            }
            if let Some(end) = streams.merge.end() {
                output.finish(end.reason, end.token).await.map_err(client)?;
                streams.let_prefill_end().await;
                return Ok(None);
            }
        }
    }

    /// Asks decode for blocks; returns its stream behind the reservation.
    async fn reserve(
        &self,
        worker: &Worker,
        prefill_here: bool,
    ) -> Result<(Streaming<v1::DecodeEvent>, Reserved), Failure> {
        let channel = worker.channel.clone().ok_or_else(|| Failure::gone(worker))?;
        let request = v1::DecodeRequest { sequence: Some(self.sequence(worker)), prefill_here };
        let opening = async {
            let mut events = DecodeClient::new(channel).generate(request).await?.into_inner();
            let first = events.message().await?;
            Ok((events, first))
        };
        // Decode queues what it has no blocks for; giving up takes it out of there.
        let opened = tokio::time::timeout_at(self.patience.into(), self.with(worker, opening)).await;
        let (events, first) = opened.unwrap_or_else(|_elapsed| Err(Failure::at(worker, overloaded())))?;
        let reserved = match first.and_then(|event| event.event) {
            // Also from one that was asked to compute the prompt and does not do that.
            Some(decode_event::Event::Ticket(ticket)) if ticket.worker_id == *worker.key.id => {
                Reserved::Ticket(Box::new(ticket))
            }
            Some(decode_event::Event::Reserved(reserved)) if prefill_here => {
                let v1::Reserved { incarnation, ticket_id } = reserved;
                Reserved::Here(v1::FinishRequest { incarnation, ticket_id })
            }
            Some(decode_event::Event::Ticket(_)) => {
                return Err(Failure::protocol(worker, "its ticket is another worker's"));
            }
            _ => return Err(Failure::protocol(worker, "its first event was no ticket")),
        };
        if reserved.incarnation() != worker.key.incarnation {
            return Err(Failure::protocol(worker, "its ticket is another worker's"));
        }
        Ok((events, reserved))
    }

    /// Sends prompt and ticket to prefill.
    async fn prefill(
        &self,
        worker: &Worker,
        ticket: v1::KvTicket,
    ) -> Result<Streaming<v1::PrefillEvent>, Failure> {
        let channel = worker.channel.clone().ok_or_else(|| Failure::gone(worker))?;
        let request = v1::PrefillRequest {
            sequence: Some(self.sequence(worker)),
            ticket: Some(ticket),
            prompt_logprobs: self.admitted.prompt_logprobs,
        };
        let opening = async { Ok(PrefillClient::new(channel).prefill(request).await?.into_inner()) };
        self.with(worker, opening).await
    }

    /// A call to `worker`, ended when the worker's lease is.
    async fn with<T>(
        &self,
        worker: &Worker,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            result = call => result.map_err(|status| self.failure(worker, &status)),
            () = worker.gone() => Err(Failure::gone(worker)),
        }
    }

    pub fn failure(&self, worker: &Worker, status: &Status) -> Failure {
        let error = match status.code() {
            tonic::Code::DeadlineExceeded => RequestError::Deadline {
                deadline: self.admitted.deadline.saturating_duration_since(self.admitted.context.received),
            },
            code => RequestError::Worker {
                worker: worker.key.clone(),
                consequence: Consequence::of(status),
                code,
                message: status.message().chars().take(MESSAGE_MAX).collect(),
            },
        };
        Failure::at(worker, error)
    }

    fn sequence(&self, worker: &Worker) -> v1::SequenceRequest {
        let left = self.admitted.deadline.saturating_duration_since(Instant::now());
        let left = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        v1::SequenceRequest {
            request_id: self.admitted.context.request_id.clone(),
            traceparent: self.trace.to_string(),
            prompt: self.prompt.tokens.iter().map(|token| token.0).collect(),
            sampling: Some(sampling_to_wire(&self.admitted.sampling)),
            stopping: Some(stopping_to_wire(&self.prompt.stopping)),
            choice: self.choice,
            // 0 would mean none.
            deadline_ms: left.max(1),
            fingerprint: worker.fingerprint.as_deref().map(proto::fingerprint::to_wire),
            cache_salt: self.admitted.context.tenant.cache_salt,
            share: Some(self.admitted.context.tenant.share.to_wire()),
        }
    }

    fn observe(&self, timings: &v1::Timings) {
        if !timings.prefill_on_decode {
            self.registry.observe_handover(Duration::from_micros(timings.handoff_us));
        }
        for (hop, time) in [
            ("prefill_queue", timings.prefill_queue_us),
            ("prefill", timings.prefill_us),
            ("handoff", timings.handoff_us),
            ("decode_first", timings.decode_first_us),
            ("decode", timings.decode_us),
        ] {
            self.metrics.hop(hop, Duration::from_micros(time));
        }
    }
}
