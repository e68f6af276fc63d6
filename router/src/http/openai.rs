//! Hop 1: OpenAI's completion endpoints. Parses and checks, makes a [`Generate`], and gives the session's
//! events the endpoint's shape, as one answer or as a stream.

mod answer;
mod chat;
mod completions;
mod fields;
mod logprobs;
mod parameters;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Extension;
use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use proto::v1;
use serde_json::Value;
use tracing::{Instrument, info_span};

use self::answer::{Answer, WholeChoice};
use self::chat::ChatEncoder;
use self::completions::CompletionEncoder;
use self::fields::Fields;
use self::parameters::{AnswerOptions, Parameters};
use super::errors::ApiError;
use super::{body, sse};
use crate::error::RequestError;
use crate::generate::{Generate, Prompt, RequestContext};
use crate::service::Service;
use crate::session::{Event, Session};

pub(super) use self::answer::Encode;

/// Bodies above this are parsed on a blocking thread: JSON takes about a millisecond for it.
const INLINE_BODY_BYTES_MAX: usize = 256 << 10;

/// An endpoint's way to read its fields.
type Parse = fn(Fields) -> Result<(Parameters, Vec<Prompt>), RequestError>;

pub(super) async fn chat_completions(
    State(service): State<Arc<Service>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let id = format!("chatcmpl-{}", context.request_id);
    let (session, options) = begin(&service, context, request, chat::parse).await?;
    let answer = Answer::new(id, unix_s(), options, Arc::clone(&service.model), &session);
    respond(session, options, ChatEncoder::new(answer)).await
}

pub(super) async fn completions(
    State(service): State<Arc<Service>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let id = format!("cmpl-{}", context.request_id);
    let (session, options) = begin(&service, context, request, completions::parse).await?;
    let answer = Answer::new(id, unix_s(), options, Arc::clone(&service.model), &session);
    respond(session, options, CompletionEncoder::new(answer)).await
}

/// From the request to a running session.
async fn begin(
    service: &Service,
    context: RequestContext,
    request: Request,
    parse: Parse,
) -> Result<(Session, AnswerOptions), ApiError> {
    let span = info_span!(
        "openai",
        hop = 1,
        request_id = %context.request_id,
        trace_id = %context.trace.trace_id(),
        span_id = %context.trace.span_id(),
    );
    async {
        let (generate, options) = read(service, context, request, parse).await.inspect_err(|error| {
            service.metrics.request_ended("http", error.outcome());
        })?;
        let session = service.generate(generate).await?;
        Ok((session, options))
    }
    .instrument(span)
    .await
    .map_err(ApiError)
}

async fn read(
    service: &Service,
    context: RequestContext,
    request: Request,
    parse: Parse,
) -> Result<(Generate, AnswerOptions), RequestError> {
    let (head, body) = request.into_parts();
    let body = body::read(&head.headers, body, service.config.body_bytes_max).await?;
    let (parameters, prompts) = match body.len() <= INLINE_BODY_BYTES_MAX {
        true => parse_body(&body, parse)?,
        false => tokio::task::spawn_blocking(move || parse_body(&body, parse))
            .await
            .unwrap_or(Err(RequestError::Internal))?,
    };
    let Parameters { model, n, sampling, stopping, max_tokens_default, deadline, priority, text, answer } =
        parameters;
    let prompt_logprobs = answer.logprobs.filter(|_| answer.echo);
    let mut context = context;
    context.tenant.share.priority = priority;
    let generate = Generate {
        context,
        model: Some(model),
        prompts,
        sampling,
        stopping,
        max_tokens_default,
        text,
        n,
        prompt_logprobs,
        deadline,
    };
    Ok((generate, answer))
}

fn parse_body(body: &Bytes, parse: Parse) -> Result<(Parameters, Vec<Prompt>), RequestError> {
    parse(Fields::parse(body)?)
}

/// Streams or collects. The status waits for the first event, so that what fails before it has one.
async fn respond(
    mut session: Session,
    options: AnswerOptions,
    mut encoder: impl Encode,
) -> Result<Response, ApiError> {
    let first = next(&mut session).await?;
    if options.stream {
        return Ok(sse::respond(session, first, encoder));
    }
    let (choices, usage) = collect(session, first).await?;
    let whole = encoder.whole(choices, &usage).unwrap_or(Value::Null);
    Ok(Json(whole).into_response())
}

async fn collect(mut session: Session, first: Event) -> Result<(Vec<WholeChoice>, v1::Usage), ApiError> {
    let mut choices: Vec<WholeChoice> = Vec::new();
    let mut event = first;
    loop {
        match event {
            Event::Done(usage) => return Ok((choices, usage)),
            Event::Delta(delta) => {
                while choices.len() <= delta.index as usize {
                    let index = u32::try_from(choices.len()).unwrap_or(u32::MAX);
                    choices.push(WholeChoice { index, ..WholeChoice::default() });
                }
                choices[delta.index as usize].extend(delta);
            }
        }
        event = next(&mut session).await?;
    }
}

async fn next(session: &mut Session) -> Result<Event, ApiError> {
    session.next().await.unwrap_or(Err(RequestError::Internal)).map_err(ApiError)
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
