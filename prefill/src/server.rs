//! Hop 6, first half: the gRPC service. A request goes to the device thread's queue, its events come back as a stream.
//!
//! tokio ends here. A request that is not queued gets its reason as the call's status. Dropping the stream, or the call
//! before it has become one, drops the request's queue of events and thereby cancels it.
//!
//! Deliberately absent: any state of requests.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TrySendError};
use proto::control::Consequence;
use proto::v1;
use proto::v1::prefill_event::Event;
use proto::v1::prefill_server::Prefill;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::error::Refusal;
use crate::intake::Intake;
use crate::metrics::Metrics;
use crate::outbox::{self, Doorbell, Inbox, RequestEvent};
use crate::worker::Submission;

/// The service, one for all connections.
pub(crate) struct PrefillService {
    pub(crate) intake: Arc<Intake>,
    pub(crate) submissions: Sender<Submission>,
    pub(crate) doorbell: Doorbell,
    pub(crate) metrics: Metrics,
}

#[tonic::async_trait]
impl Prefill for PrefillService {
    type PrefillStream = EventStream;

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Result<Response<EventStream>, Status> {
        let arrived = Instant::now();
        let request =
            self.intake.check(request.into_inner(), arrived).map_err(|refusal| self.refuse(refusal))?;
        let span = tracing::info_span!(
            "prefill",
            hop = 6,
            request_id = %request.request_id,
            trace_id = %request.sequence.trace.trace_id(),
            parent_id = %request.sequence.trace.span_id()
        );
        let (outbox, mut events) = outbox::channel(self.doorbell.clone());
        match self.submissions.try_send(Submission { request, outbox, arrived, span }) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(self.refuse(Refusal::SubmissionsFull)),
            Err(TrySendError::Disconnected(_)) => return Err(self.refuse(Refusal::Draining)),
        }
        match events.next().await {
            Some(RequestEvent::Queued) => Ok(Response::new(EventStream { events, open: true })),
            Some(RequestEvent::Refused(refusal)) => Err(refusal.into()),
            Some(RequestEvent::Failed(failure)) => Err(failure.into()),
            // The device thread ended with the request in its queue.
            Some(RequestEvent::FirstToken { .. } | RequestEvent::Done { .. }) | None => {
                Err(self.refuse(Refusal::Draining))
            }
        }
    }
}

impl PrefillService {
    fn refuse(&self, refusal: Refusal) -> Status {
        self.metrics.refused(refusal.kind());
        refusal.into()
    }
}

/// A request's events in the wire's form.
pub(crate) struct EventStream {
    events: Inbox,
    /// Until the request's end was passed on.
    open: bool,
}

impl Stream for EventStream {
    type Item = Result<v1::PrefillEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if !self.open {
            return Poll::Ready(None);
        }
        let event = match ready!(Pin::new(&mut self.events).poll_next(context)) {
            Some(event) => to_wire(event),
            // Every request is told its end, unless there is no device thread left to tell it.
            None => Err(Consequence::Lost.status("the prefill worker's device thread has ended")),
        };
        self.open = matches!(event, Ok(v1::PrefillEvent { event: Some(Event::FirstToken(_)) }));
        Poll::Ready(Some(event))
    }
}

/// One event as the router reads it.
fn to_wire(event: RequestEvent) -> Result<v1::PrefillEvent, Status> {
    let event = match event {
        RequestEvent::FirstToken { token, prompt, queue, compute, cached_tokens } => {
            Event::FirstToken(v1::FirstToken {
                token: Some(token),
                prompt,
                queue_us: micros(queue),
                compute_us: micros(compute),
                cached_tokens: u32::try_from(cached_tokens).unwrap_or(u32::MAX),
            })
        }
        RequestEvent::Done { handoff } => Event::Done(v1::PrefillDone { handoff_us: micros(handoff) }),
        RequestEvent::Refused(refusal) => return Err(refusal.into()),
        RequestEvent::Failed(failure) => return Err(failure.into()),
        RequestEvent::Queued => return Err(Consequence::Lost.status("the request was queued twice")),
    };
    Ok(v1::PrefillEvent { event: Some(event) })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
