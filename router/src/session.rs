//! Hop 4: owns a request from admission to its last token.
//!
//! For each choice: a pair of workers is placed, decode reserves and answers with a ticket, prefill gets
//! prompt and ticket, its first token and decode's tokens are merged into the choice's text. Invariants:
//! dropping the [`Session`] drops both streams of every choice, which cancels it on both tiers; a choice
//! is tried on another pair at most once and only while the client has seen nothing of it; the task ends
//! by the deadline whatever workers and client do, except for handing out its last event.

mod attempt;
mod event;
mod merge;
mod output;
mod streams;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use model::TokenId;
use proto::control::Consequence;
use proto::v1;
use tokio::sync::mpsc;
use tracing::{Instrument, debug, field, info, info_span};

use self::attempt::{Attempt, ChoiceReport, Failure};
pub(crate) use self::event::{Delta, Event, Finish, FinishReason, StopCause};
use self::output::{ChoiceOutput, Events};
use crate::admission::{Admitted, AdmittedPrompt, Reasoning};
use crate::detokenise::ChoiceText;
use crate::error::{FieldProblem, RequestError};
use crate::metrics::Metrics;
use crate::placement::disaggregation::Decision;
use crate::placement::{Need, PlacementError, Prefixes};
use crate::reasoning::ReasoningSplitter;
use crate::registry::{Placed, Registry};
use crate::served_model::ServedModel;
use crate::stop::StopMatcher;

/// Events between a session and its door: a few steps of jitter; behind it the worker's stream waits.
const EVENTS_MAX: usize = 32;

/// What a session works with.
pub(crate) struct SessionContext {
    pub model: Arc<ServedModel>,
    pub registry: Arc<Registry>,
    pub metrics: Arc<Metrics>,
}

/// A running request, as its door holds it. Dropping it cancels.
pub(crate) struct Session {
    /// Echoed in every message.
    pub request_id: String,
    /// The prompts as tokens, in order.
    pub prompts: Vec<Arc<[TokenId]>>,
    /// Choices of each prompt.
    pub n: u32,
    events: mpsc::Receiver<Result<Event, RequestError>>,
    ended: bool,
}

impl Session {
    /// Starts the request's task.
    pub fn start(context: SessionContext, admitted: Admitted) -> Self {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let prompts = admitted.prompts.iter().map(|prompt| Arc::clone(&prompt.tokens)).collect();
        let n = admitted.n;
        let request_id = admitted.context.request_id.clone();
        let span = info_span!(
            "session",
            hop = 4,
            request_id = %admitted.context.request_id,
            trace_id = %admitted.context.trace.trace_id(),
            parent_id = %admitted.context.trace.span_id(),
        );
        tokio::spawn(run(context, admitted, sender).instrument(span));
        Self { request_id, prompts, n, events, ended: false }
    }

    /// The next event; `None` behind [`Event::Done`] or an error.
    pub async fn next(&mut self) -> Option<Result<Event, RequestError>> {
        if self.ended {
            return None;
        }
        let event = self.events.recv().await.unwrap_or(Err(RequestError::Internal));
        self.ended = matches!(event, Ok(Event::Done(_)) | Err(_));
        Some(event)
    }
}

async fn run(context: SessionContext, admitted: Admitted, events: Events) {
    let deadline = admitted.deadline;
    let result = tokio::select! {
        biased;
        () = events.closed() => Err(RequestError::Cancelled),
        result = tokio::time::timeout_at(deadline.into(), serve(&context, &admitted, &events)) => {
            let after = deadline.saturating_duration_since(admitted.context.received);
            result.unwrap_or(Err(RequestError::Deadline { deadline: after }))
        }
    };
    let door = admitted.context.door;
    let total = admitted.context.received.elapsed();
    // Places go back before the last event: a client that reads slowly no longer holds one.
    drop(admitted);
    context.registry.room_freed();
    let last = match result {
        Ok(usage) => {
            context.metrics.request_ended(door, "ok");
            context.metrics.e2e.observe(total.as_secs_f64());
            context.metrics.tokens(usage.prompt_tokens.into(), usage.completion_tokens.into());
            debug!(completion_tokens = usage.completion_tokens, "request finished");
            Ok(Event::Done(usage))
        }
        Err(error) => {
            context.metrics.request_ended(door, error.outcome());
            info!(%error, "request failed");
            Err(error)
        }
    };
    // Fails when the client has gone; then nobody misses it.
    let _ = events.send(last).await;
}

/// Runs every choice; the first that fails ends them all.
async fn serve(
    context: &SessionContext,
    admitted: &Admitted,
    events: &Events,
) -> Result<v1::Usage, RequestError> {
    let choices = (0u32..).zip(&admitted.prompts).flat_map(|(prompt_index, prompt)| {
        (0..admitted.n).map(move |choice| Choice {
            context,
            admitted,
            prompt,
            choice,
            index: prompt_index * admitted.n + choice,
            events,
        })
    });
    let reports = try_join_all(choices.map(Choice::run)).await?;
    Ok(usage(admitted, &reports))
}

fn usage(admitted: &Admitted, reports: &[ChoiceReport]) -> v1::Usage {
    let prompt_tokens: usize = admitted.prompts.iter().map(|prompt| prompt.tokens.len()).sum();
    let first_choices = reports.iter().step_by(admitted.n as usize);
    let mut timings = reports.first().map(|report| report.timings).unwrap_or_default();
    timings.admission_us = micros(admitted.admission);
    timings.total_us = micros(admitted.context.received.elapsed());
    v1::Usage {
        prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
        completion_tokens: reports.iter().map(|report| report.completion_tokens).sum(),
        cached_tokens: first_choices.map(|report| report.cached_tokens).sum(),
        timings: Some(timings),
        accepted_prediction_tokens: reports.iter().map(|report| report.drafts.accepted).sum(),
        rejected_prediction_tokens: reports.iter().map(|report| report.drafts.rejected).sum(),
    }
}

/// One sequence of the request.
struct Choice<'a> {
    context: &'a SessionContext,
    admitted: &'a Admitted,
    prompt: &'a AdmittedPrompt,
    /// Which of the prompt's `n`: part of the sampler's key.
    choice: u32,
    /// Its number in the answer.
    index: u32,
    events: &'a Events,
}

impl Choice<'_> {
    async fn run(self) -> Result<ChoiceReport, RequestError> {
        let patience = self.admitted.patience;
        let mut failed: Option<Failure> = None;
        loop {
            let excluded = failed.as_ref().map(|failure| failure.worker.clone());
            let placed = match self.place(excluded.as_slice()) {
                Ok(placed) => placed,
                // There is no other pair: what happened on the first says more.
                Err(error) => return Err(failed.map_or(error, |failure| failure.error)),
            };
            let mut output = ChoiceOutput::new(
                self.index,
                self.text(),
                self.events,
                &self.context.metrics,
                self.admitted.context.received,
            );
            let attempt = Attempt {
                patience,
                trace: self.admitted.context.trace.child(),
                registry: &self.context.registry,
                metrics: &self.context.metrics,
                admitted: self.admitted,
                prompt: self.prompt,
                choice: self.choice,
            };
            let outcome = attempt.run(placed, &mut output).await;
            self.context.registry.room_freed();
            match outcome {
                Ok(report) => return Ok(report),
                Err(failure) if output.started() => return Err(failure.error),
                // As many wait there for memory as may: what its next report says is at most 250 ms away.
                Err(failure) if failure.no_room() => self.wait_for_change(patience).await?,
                Err(failure) if failed.is_none() && failure.error.consequence() != Consequence::Rejected => {
                    info!(error = %failure.error, "trying another pair");
                    self.context.metrics.retried(failure.tier);
                    failed = Some(failure);
                }
                Err(failure) => return Err(failure.error),
            }
        }
    }

    /// Hop 3.
    fn place(&self, excluded: &[crate::worker::WorkerKey]) -> Result<Placed, RequestError> {
        let prompt_tokens = self.prompt.tokens.len() as u64;
        let lifetime_tokens = prompt_tokens + u64::from(self.prompt.stopping.max_tokens);
        let only_prefill = self.admitted.prompt_logprobs.is_some();
        let need = Need { prompt_tokens, lifetime_tokens, only_prefill, excluded };
        let mut prompt = Prefixes::new(self.admitted.context.tenant.cache_salt, &self.prompt.tokens);
        let span = info_span!(
            "placement",
            hop = 3,
            request_id = %self.admitted.context.request_id,
            prefill_on = field::Empty,
            computed_tokens = field::Empty,
            local_us = field::Empty,
            remote_us = field::Empty,
        );
        let placed = span.in_scope(|| self.context.registry.place(&need, &mut prompt));
        let placed = placed.map_err(|error| match error {
            PlacementError::TooLong { .. } => {
                RequestError::field("max_tokens", FieldProblem::Unplaceable(error))
            }
            error => RequestError::NoWorker(error),
        })?;
        let Decision { local, remote, .. } = placed.decision;
        span.record("prefill_on", placed.decision.name());
        span.record("computed_tokens", placed.computed);
        span.record("local_us", micros(local));
        span.record("remote_us", micros(remote));
        self.context.metrics.prefilled_on(placed.decision.name());
        Ok(placed)
    }

    async fn wait_for_change(&self, patience: Instant) -> Result<(), RequestError> {
        let changed = self.context.registry.changed();
        tokio::time::timeout_at(patience.into(), changed).await.map_err(|_elapsed| overloaded())
    }

    fn text(&self) -> ChoiceText {
        let reasoning = match self.prompt.reasoning {
            Reasoning::Plain => ReasoningSplitter::plain(),
            Reasoning::Chat => ReasoningSplitter::chat(false),
            Reasoning::ChatOpened => ReasoningSplitter::chat(true),
        };
        let stopping = &self.prompt.stopping;
        ChoiceText::new(
            self.context.model.detokenizer(self.admitted.text.skip_special_tokens),
            StopMatcher::new(self.admitted.stop.clone()),
            reasoning,
            self.context.model.ending_tokens(stopping),
            stopping.min_tokens,
            self.admitted.text.include_stop,
        )
    }
}

fn overloaded() -> RequestError {
    RequestError::Overloaded { retry_after: Duration::from_secs(1) }
}

/// Microseconds, as [`v1::Timings`] counts.
fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
