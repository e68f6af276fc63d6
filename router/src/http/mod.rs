//! The HTTP door: OpenAI's endpoints, health and metrics.
//!
//! Every answer carries `x-request-id`, every error is OpenAI's error object, also for paths and methods
//! that do not exist.

mod auth;
mod body;
mod errors;
mod health;
mod models;
mod openai;
mod sse;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::Listener as _;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;

use self::errors::ApiError;
use crate::connections::BoundedListener;
use crate::error::RequestError;
use crate::generate::RequestContext;
use crate::service::Service;

pub(crate) use self::auth::{ApiKeys, Tenant};
pub(crate) use self::health::health;

const REQUEST_ID: &str = "x-request-id";
const TRACEPARENT: &str = "traceparent";

/// Serves until `shutdown`, then until the open requests have ended.
pub(crate) async fn serve(
    service: Arc<Service>,
    mut listener: BoundedListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let head_wait_max = Duration::from_millis(service.config.head_wait_ms_max);
    // HTTP/1 alone: telling the versions apart waits for a first byte, without a limit.
    let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
    server.http1().timer(TokioTimer::new()).header_read_timeout(head_wait_max);
    let open = GracefulShutdown::new();
    let routes = routes(service);
    tokio::pin!(shutdown);
    loop {
        let connection = tokio::select! {
            (connection, _peer) = listener.accept() => connection,
            () = &mut shutdown => break,
        };
        let service = TowerToHyperService::new(routes.clone());
        let connection = server.serve_connection(TokioIo::new(connection), service).into_owned();
        let connection = open.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error, "a connection ended early");
            }
        });
    }
    drop(listener);
    open.shutdown().await;
}

fn routes(service: Arc<Service>) -> axum::Router {
    let keys = Arc::new(ApiKeys::new(&service.config));
    let guarded = axum::Router::new()
        .route("/v1/chat/completions", post(openai::chat_completions))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .layer(from_fn_with_state(keys, auth::require_key));
    guarded
        .route("/health", get(health::respond))
        .route("/metrics", get(metrics))
        .fallback(no_such_path)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn(identify))
        .with_state(service)
}

/// Gives the request its identity, and the answer the request's.
async fn identify(mut request: Request, next: Next) -> Response {
    let text = |headers: &HeaderMap, name| {
        headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let headers = request.headers();
    let (id, traceparent) = (text(headers, REQUEST_ID), text(headers, TRACEPARENT));
    let context = RequestContext::new("http", id.as_deref(), traceparent.as_deref());
    // The id is visible ASCII or our own hexadecimal digits.
    let id = HeaderValue::from_str(&context.request_id);
    request.extensions_mut().insert(context);
    let mut response = next.run(request).await;
    if let Ok(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

async fn metrics(State(service): State<Arc<Service>>) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], service.metrics_text()).into_response()
}

async fn no_such_path(request: Request) -> ApiError {
    ApiError(RequestError::NoSuchPath { path: request.uri().path().chars().take(256).collect() })
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError(RequestError::MethodNotAllowed { method: request.method().to_string() })
}
