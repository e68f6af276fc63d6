//! Hop 1, the other door: `trireme.v1.Inference`, with the meaning of the OpenAI endpoints, and beside it
//! standard health and reflection.

mod errors;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, stream};
use model::{ChatMessage, TokenId};
use proto::share::Priority;
use proto::v1;
use proto::v1::inference_server::{Inference, InferenceServer};
use proto::v1::{generate_request, tokenize_request};
use tonic::metadata::MetadataMap;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tracing::{Instrument, info_span};

use crate::connections::BoundedListener;
use crate::detokenise::TextOptions;
use crate::error::{FieldProblem, RequestError, StartError};
use crate::generate::{Chat, Generate, Prompt, REQUEST_ID_MAX, RequestContext};
use crate::http::{ApiKeys, Tenant, health};
use crate::service::Service;
use crate::session::{Delta, Event, FinishReason, Session, StopCause};

/// How often health is looked at; watchers hear of a change within this time.
const HEALTH_INTERVAL: Duration = Duration::from_millis(250);

/// The service's name in health checks.
const SERVICE: &str = <InferenceServer<InferenceService> as tonic::server::NamedService>::NAME;

/// Everything on the public gRPC port.
pub(crate) async fn router(service: Arc<Service>) -> Result<tonic::transport::server::Router, StartError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    // Known before the port answers: a watcher that comes first must not hear of an unknown service.
    set_health(&reporter, ServingStatus::NotServing).await;
    tokio::spawn(report_health(Arc::downgrade(&service), reporter));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(SERVICE)
            .with_service_name("grpc.health.v1.Health")
    };
    let v1 = reflection().build_v1().map_err(StartError::Reflection)?;
    let v1alpha = reflection().build_v1alpha().map_err(StartError::Reflection)?;
    let keys = Arc::new(ApiKeys::new(&service.config));
    let bytes_max = service.config.body_bytes_max;
    let inference = InferenceServer::new(InferenceService { service }).max_decoding_message_size(bytes_max);
    let require_key = move |mut request: Request<()>| {
        let authorization = request.metadata().get("authorization").map(|value| value.as_encoded_bytes());
        let tenant = keys.accept(authorization).ok_or_else(|| errors::status(&RequestError::Unauthorized))?;
        request.extensions_mut().insert(tenant);
        Ok(request)
    };
    Ok(tonic::transport::Server::builder()
        .add_service(InterceptedService::new(inference, require_key))
        .add_service(health)
        .add_service(v1)
        .add_service(v1alpha))
}

/// Serves until `shutdown`, then until the open requests have ended.
pub(crate) async fn serve(
    router: tonic::transport::server::Router,
    listener: BoundedListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    router.serve_with_incoming_shutdown(listener.incoming(), shutdown).await
}

/// Keeps the standard health service at what `/health` would say, for as long as the router lives.
async fn report_health(service: std::sync::Weak<Service>, reporter: HealthReporter) {
    let mut ticks = tokio::time::interval(HEALTH_INTERVAL);
    loop {
        ticks.tick().await;
        let Some(service) = service.upgrade() else { return };
        let status = match health(&service, Instant::now()).ok() {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        set_health(&reporter, status).await;
    }
}

/// Of the server as a whole and of its one service.
async fn set_health(reporter: &HealthReporter, status: ServingStatus) {
    reporter.set_service_status("", status).await;
    reporter.set_service_status(SERVICE, status).await;
}

struct InferenceService {
    service: Arc<Service>,
}

type Responses = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = Responses;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let mut context = context(&metadata, &request.request_id);
        // What the key's check has learnt.
        if let Some(&tenant) = extensions.get::<Tenant>() {
            context.tenant = tenant;
        }
        let request_id = context.request_id.clone();
        let span = info_span!(
            "grpc",
            hop = 1,
            %request_id,
            trace_id = %context.trace.trace_id(),
            span_id = %context.trace.span_id()
        );
        let session =
            self.begin(context, request).instrument(span).await.map_err(|error| errors::status(&error))?;
        let mut response = Response::new(responses(session));
        // Visible ASCII or our own hexadecimal digits.
        if let Ok(id) = request_id.parse() {
            response.metadata_mut().insert("x-request-id", id);
        }
        Ok(response)
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let context = self.service.model.config.max_position_embeddings;
        let model = v1::Model {
            id: self.service.model.id.clone(),
            context_tokens_max: u32::try_from(context).unwrap_or(u32::MAX),
            created_unix_s: self.service.created_unix_s,
        };
        Ok(Response::new(v1::ListModelsResponse { models: vec![model] }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let v1::TokenizeRequest { model, prompt } = request.into_inner();
        let prompt = match prompt {
            Some(tokenize_request::Prompt::Text(text)) => Ok(Prompt::Text(text)),
            Some(tokenize_request::Prompt::Chat(conversation)) => chat(conversation),
            None => Err(RequestError::field("prompt", FieldProblem::Missing)),
        };
        let prompt = prompt.map_err(|error| errors::status(&error))?;
        let tokens =
            self.service.tokenise(name(&model), prompt).await.map_err(|error| errors::status(&error))?;
        Ok(Response::new(v1::TokenizeResponse {
            token_ids: tokens.into_iter().map(|token| token.0).collect(),
        }))
    }
}

impl InferenceService {
    async fn begin(
        &self,
        context: RequestContext,
        request: v1::GenerateRequest,
    ) -> Result<Session, RequestError> {
        let generate = parse(context, request).inspect_err(|error| {
            self.service.metrics.request_ended("grpc", error.outcome());
        })?;
        self.service.generate(generate).await
    }
}

fn context(metadata: &MetadataMap, request_id: &str) -> RequestContext {
    let text = |name| metadata.get(name).and_then(|value| value.to_str().ok());
    let request_id = if request_id.is_empty() { text("x-request-id") } else { Some(request_id) };
    RequestContext::new("grpc", request_id, text("traceparent"))
}

fn parse(mut context: RequestContext, request: v1::GenerateRequest) -> Result<Generate, RequestError> {
    let v1::GenerateRequest {
        model,
        prompt,
        sampling,
        stopping,
        n,
        deadline_ms,
        request_id,
        priority,
        skip_special_tokens,
    } = request;
    context.tenant.share.priority = Priority::from_wire(priority)?;
    if request_id.len() > REQUEST_ID_MAX {
        let allowed = format!("at most {REQUEST_ID_MAX} characters are allowed");
        return Err(RequestError::out_of_range(
            "request_id",
            format_args!("{} bytes", request_id.len()),
            allowed,
        ));
    }
    let prompt = match prompt {
        Some(generate_request::Prompt::Text(text)) => Prompt::Text(text),
        Some(generate_request::Prompt::TokenIds(tokens)) => {
            Prompt::Tokens(tokens.ids.into_iter().map(TokenId).collect())
        }
        Some(generate_request::Prompt::Chat(conversation)) => chat(conversation)?,
        None => return Err(RequestError::field("prompt", FieldProblem::Missing)),
    };
    Ok(Generate {
        prompt_logprobs: None,
        context,
        model: name(&model).map(str::to_owned),
        prompts: vec![prompt],
        sampling: sampling.unwrap_or_default(),
        stopping: stopping.unwrap_or_default(),
        max_tokens_default: None,
        text: TextOptions {
            skip_special_tokens: skip_special_tokens.unwrap_or(true),
            ..TextOptions::default()
        },
        // protobuf cannot tell 0 from absent.
        n: n.max(1),
        deadline: deadline_ms.map(Duration::from_millis),
    })
}

fn chat(chat: v1::Chat) -> Result<Prompt, RequestError> {
    if chat.messages.is_empty() {
        return Err(RequestError::field("chat.messages", FieldProblem::Missing));
    }
    let message = |(index, message): (usize, v1::ChatMessage)| match message.role.as_str() {
        "system" | "user" | "assistant" => Ok(ChatMessage { role: message.role, content: message.content }),
        _ => {
            let field = format!("chat.messages[{index}].role");
            Err(RequestError::out_of_range(field, message.role, "must be system, user or assistant"))
        }
    };
    let messages = chat.messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
    Ok(Prompt::Chat(Chat { messages, thinking: chat.thinking, template_arguments: serde_json::Map::new() }))
}

fn name(model: &str) -> Option<&str> {
    Some(model).filter(|model| !model.is_empty())
}

/// A session as the stream of the call. Dropping it drops the session.
fn responses(session: Session) -> Responses {
    let span = info_span!("grpc_stream", hop = 12, request_id = %session.request_id);
    Box::pin(stream::unfold(session, move |mut session| {
        let span = span.clone();
        async move {
            let event = session.next().instrument(span).await?;
            let response = match event {
                Ok(Event::Delta(delta)) => Ok(delta_response(&session.request_id, delta)),
                Ok(Event::Done(usage)) => Ok(v1::GenerateResponse {
                    request_id: session.request_id.clone(),
                    usage: Some(usage),
                    ..v1::GenerateResponse::default()
                }),
                Err(error) => Err(errors::status(&error)),
            };
            Some((response, session))
        }
    }))
}

fn delta_response(request_id: &str, delta: Delta) -> v1::GenerateResponse {
    let reason = match delta.finish.as_ref().map(|finish| finish.reason) {
        None => v1::FinishReason::Unspecified,
        Some(FinishReason::Stop) => v1::FinishReason::Stop,
        Some(FinishReason::Length) => v1::FinishReason::Length,
    };
    let stop_reason = match delta.finish.and_then(|finish| finish.stop) {
        None => String::new(),
        Some(StopCause::Text(text)) => text,
        Some(StopCause::Token(token)) => token.to_string(),
    };
    v1::GenerateResponse {
        request_id: request_id.to_owned(),
        index: delta.index,
        text: delta.content,
        reasoning: delta.reasoning,
        tokens: delta.tokens,
        finish_reason: reason.into(),
        usage: None,
        stop_reason,
    }
}
