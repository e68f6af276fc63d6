//! Hop 12: the gRPC service. A request goes to the device thread, its events come back as a stream.
//!
//! tokio ends here. A stream is only a reader of its sequence's bounded queue: what a slow client does not take waits in
//! that queue, in the connection's flow-control window, and then not at all, because the sequence pauses. Dropping the
//! stream, or the call before it has become one, drops the queue and thereby cancels the sequence.
//!
//! Deliberately absent: any state of sequences.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TrySendError};
use engine::Sampled;
use proto::control::Consequence;
use proto::ticket::TicketId;
use proto::v1;
use proto::v1::decode_event::Event;
use proto::v1::decode_server::Decode;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use tracing::{Instrument, Span};

use crate::error::Refusal;
use crate::finish::Finish;
use crate::intake::{Intake, Submission};
use crate::metrics::Metrics;
use crate::outbox::{self, Doorbell, Drafts, Inbox, SequenceEvent};

/// Tokens in one message at most: those of a step or two.
const TOKENS_PER_MESSAGE_MAX: usize = 16;

/// The service, one for all connections.
pub(crate) struct DecodeService {
    pub(crate) intake: Arc<Intake>,
    pub(crate) submissions: Sender<Submission>,
    /// Sequences whose text has ended, by ticket.
    pub(crate) finishes: Sender<TicketId>,
    pub(crate) incarnation: u64,
    pub(crate) doorbell: Doorbell,
    pub(crate) metrics: Metrics,
    pub(crate) events_queued_max: usize,
    /// Whether prompts are computed here at all.
    pub(crate) prefills: bool,
}

#[tonic::async_trait]
impl Decode for DecodeService {
    type GenerateStream = EventStream;

    async fn generate(&self, request: Request<v1::DecodeRequest>) -> Result<Response<EventStream>, Status> {
        let received = Instant::now();
        let request = request.into_inner();
        let checked =
            self.intake.check(request.sequence.as_ref(), received).map_err(|refusal| self.refuse(refusal))?;
        let checked = checked.prefill_here(request.prefill_here && self.prefills);
        let span = tracing::info_span!(
            "stream",
            hop = 12,
            request_id = %checked.request_id,
            trace_id = %checked.trace.trace_id(),
            parent_id = %checked.trace.span_id()
        );
        let logprobs = checked.logprobs;
        let (outbox, mut events) = outbox::channel(self.events_queued_max, self.doorbell.clone());
        match self.submissions.try_send(checked.submit_with(outbox)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(self.refuse(Refusal::QueueFull)),
            Err(TrySendError::Disconnected(_)) => return Err(self.refuse(Refusal::Draining)),
        }
        // A refusal becomes the call's status; only a sequence with a ticket becomes a stream.
        match events.next().instrument(span.clone()).await {
            Some(SequenceEvent::Refused(refusal)) => Err(refusal.into()),
            Some(first) => {
                Ok(Response::new(EventStream { next: Some(first), events, logprobs, open: true, span }))
            }
            None => Err(self.refuse(Refusal::Draining)),
        }
    }

    async fn finish(
        &self,
        request: Request<v1::FinishRequest>,
    ) -> Result<Response<v1::FinishResponse>, Status> {
        let v1::FinishRequest { incarnation, ticket_id } = request.into_inner();
        // Only of this process' sequences. A full queue costs nothing but the reason: the router drops the stream next.
        if incarnation == self.incarnation && self.finishes.try_send(TicketId(ticket_id)).is_ok() {
            self.doorbell.ring();
        }
        Ok(Response::new(v1::FinishResponse {}))
    }
}

impl DecodeService {
    fn refuse(&self, refusal: Refusal) -> Status {
        self.metrics.refused(refusal.kind());
        refusal.into()
    }
}

/// A sequence's events in the wire's form.
pub(crate) struct EventStream {
    /// The ticket at first, later what was read behind the tokens of a message.
    next: Option<SequenceEvent>,
    events: Inbox,
    /// Whether the request asked for log-probabilities.
    logprobs: bool,
    /// Until the sequence's end was passed on.
    open: bool,
    span: Span,
}

impl Stream for EventStream {
    type Item = Result<v1::DecodeEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if !this.open {
            return Poll::Ready(None);
        }
        let span = this.span.clone();
        let _span = span.enter();
        let event = match this.next.take() {
            Some(first) => Some(first),
            None => std::task::ready!(Pin::new(&mut this.events).poll_next(context)),
        };
        let item = event.map_or_else(
            // Every sequence is told its end, unless there is no device thread left to tell it.
            || Err(Consequence::Lost.status("the decode worker's device thread has ended")),
            |event| this.encode(event, context),
        );
        let ends = match &item {
            Ok(v1::DecodeEvent { event }) => matches!(event, Some(Event::Finished(_)) | None),
            Err(_) => true,
        };
        if ends {
            this.open = false;
            tracing::debug!(?item, "stream ends");
        }
        Poll::Ready(Some(item))
    }
}

impl EventStream {
    /// A token and those that are there already: a step may give several.
    fn tokens(&mut self, sampled: Sampled, drafts: Drafts, context: &mut Context<'_>) -> v1::DecodedTokens {
        let mut message = v1::DecodedTokens {
            tokens: vec![token(sampled, self.logprobs)],
            accepted_drafts: drafts.accepted,
            rejected_drafts: drafts.rejected,
        };
        while message.tokens.len() < TOKENS_PER_MESSAGE_MAX
            && let Poll::Ready(Some(event)) = Pin::new(&mut self.events).poll_next(context)
        {
            let SequenceEvent::Token(sampled, drafts) = event else {
                self.next = Some(event);
                break;
            };
            message.tokens.push(token(sampled, self.logprobs));
            message.accepted_drafts += drafts.accepted;
            message.rejected_drafts += drafts.rejected;
        }
        message
    }

    /// One event as the router reads it.
    fn encode(&mut self, event: SequenceEvent, context: &mut Context<'_>) -> Result<v1::DecodeEvent, Status> {
        let event = match event {
            SequenceEvent::Ticket(ticket) => Event::Ticket(ticket.to_wire()),
            SequenceEvent::Reserved { incarnation, name } => {
                Event::Reserved(v1::Reserved { incarnation, ticket_id: name.0 })
            }
            SequenceEvent::FirstToken { sampled, queue, compute, cached_tokens } => {
                Event::FirstToken(v1::FirstToken {
                    token: Some(token(sampled, self.logprobs)),
                    queue_us: micros(queue),
                    compute_us: micros(compute),
                    cached_tokens: u32::try_from(cached_tokens).unwrap_or(u32::MAX),
                    prompt: Vec::new(),
                })
            }
            SequenceEvent::HandedOff { handoff } => {
                Event::Handoff(v1::HandoffDone { handoff_us: micros(handoff) })
            }
            SequenceEvent::Token(sampled, drafts) => Event::Tokens(self.tokens(sampled, drafts, context)),
            SequenceEvent::Finished { finish, first_step, decode } => {
                let (reason, stop_token_id) = match finish {
                    Finish::EndOfSequence | Finish::StopString => (v1::FinishReason::Stop, None),
                    Finish::StopToken(token) => (v1::FinishReason::Stop, Some(token.0)),
                    Finish::Length => (v1::FinishReason::Length, None),
                };
                Event::Finished(v1::DecodeFinished {
                    reason: reason.into(),
                    stop_token_id,
                    first_step_us: micros(first_step),
                    decode_us: micros(decode),
                })
            }
            SequenceEvent::Refused(refusal) => return Err(refusal.into()),
            SequenceEvent::Failed(failure) => return Err(failure.into()),
        };
        Ok(v1::DecodeEvent { event: Some(event) })
    }
}

fn token(sampled: Sampled, logprobs: bool) -> v1::GeneratedToken {
    let top = sampled.top.into_iter().map(|(token, logprob)| v1::TokenLogprob { token_id: token.0, logprob });
    v1::GeneratedToken {
        token_id: sampled.token.0,
        logprob: logprobs.then_some(sampled.logprob),
        top: top.collect(),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
