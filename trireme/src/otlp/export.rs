//! The thread that brings finished spans to the collector, in batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use tokio::sync::{mpsc, oneshot};
use tonic::transport::{Channel, Endpoint};

use super::{SpanLayer, attribute, text};

/// OTLP's own variable for where the collector is: `http://host:4317`.
pub const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// A batch leaves at this size, or at this age.
const BATCH_SPANS_MAX: usize = 512;
const BATCH_AGE_MAX: Duration = Duration::from_millis(500);
/// A collector that takes longer has failed; its batch is dropped and counted.
const EXPORT_MAX: Duration = Duration::from_secs(5);

/// Why no spans are exported.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// The endpoint is no URI.
    #[error("{ENDPOINT} is {endpoint:?}, which is no address of a collector")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong with it.
        #[source]
        source: tonic::transport::Error,
    },
    /// The thread cannot be made.
    #[error("no thread to export spans")]
    Thread(#[source] std::io::Error),
}

/// The exporting thread. Dropping it lets what is queued leave, for `EXPORT_MAX` at most.
pub struct Exporter {
    dropped: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Exporter {
    /// Starts to export to `endpoint` as `service`; the layer is for the process' subscriber. Connects when there is
    /// something to send, and anew after a failure.
    ///
    /// # Errors
    /// The endpoint is none.
    pub fn start(endpoint: &str, service: &str) -> Result<(Self, SpanLayer), OtlpError> {
        let error = |source| OtlpError::Endpoint { endpoint: endpoint.to_owned(), source };
        let remote = Endpoint::from_shared(endpoint.to_owned()).map_err(error)?.timeout(EXPORT_MAX);
        let resource =
            Resource { attributes: vec![attribute("service.name", text(service))], ..Resource::default() };
        let dropped = Arc::new(AtomicU64::new(0));
        let (layer, spans) = SpanLayer::new(Arc::clone(&dropped));
        let (stop, stopping) = oneshot::channel();
        let lost = Arc::clone(&dropped);
        // A thread and a runtime of its own: a process ends its runtime before its last spans are closed.
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            match runtime {
                Ok(runtime) => runtime.block_on(async {
                    let client = TraceServiceClient::new(remote.connect_lazy());
                    export(client, resource, spans, stopping, &lost).await;
                }),
                Err(error) => eprintln!("spans are not exported: {error}"),
            }
        };
        let thread = std::thread::Builder::new().name("otlp-export".to_owned()).spawn(run);
        let thread = Some(thread.map_err(OtlpError::Thread)?);
        Ok((Self { dropped, stop: Some(stop), thread }, layer))
    }

    /// Spans that were not brought to the collector: it was away, or too slow.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been told already.
            let _ = thread.join();
        }
    }
}

async fn export(
    mut client: TraceServiceClient<Channel>,
    resource: Resource,
    mut spans: mpsc::Receiver<Span>,
    mut stopping: oneshot::Receiver<()>,
    lost: &AtomicU64,
) {
    let mut stopped = false;
    while !stopped {
        let mut batch = Vec::new();
        let full = async {
            while batch.len() < BATCH_SPANS_MAX {
                match spans.recv().await {
                    Some(span) => batch.push(span),
                    None => return,
                }
            }
        };
        tokio::select! {
            () = full => {}
            () = tokio::time::sleep(BATCH_AGE_MAX) => {}
            _ = &mut stopping => {
                stopped = true;
                spans.close();
            }
        }
        while stopped && let Ok(span) = spans.try_recv() {
            batch.push(span);
        }
        if batch.is_empty() {
            stopped |= spans.is_closed();
            continue;
        }
        let count = batch.len() as u64;
        if let Err(status) = client.export(request(&resource, batch)).await {
            lost.fetch_add(count, Ordering::Relaxed);
            tracing::debug!(%status, count, "spans were not taken by the collector");
        }
    }
}

fn request(resource: &Resource, spans: Vec<Span>) -> ExportTraceServiceRequest {
    let scope = InstrumentationScope {
        name: env!("CARGO_PKG_NAME").to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() }];
    let resource = Some(resource.clone());
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans { resource, scope_spans, ..ResourceSpans::default() }],
    }
}
