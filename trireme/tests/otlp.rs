//! A request's spans at an OTLP collector: one trace, router, prefill and decode in it, each span under the one that caused it.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;
use support::{demo, http, in_process};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};
use tracing_subscriber::{filter::LevelFilter, prelude::*};
use trireme::cluster::Carrier;
use trireme::otlp::Exporter;

struct Collector(mpsc::UnboundedSender<(String, Vec<Span>)>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of in request.into_inner().resource_spans {
            let service = format!("{:?}", of.resource.map(|resource| resource.attributes));
            let spans = of.scope_spans.into_iter().flat_map(|scope| scope.spans).collect();
            let _ = self.0.send((service, spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_trace_over_all_roles() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let (sender, mut batches) = mpsc::unbounded_channel();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let service = TraceServiceServer::new(Collector(sender));
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    let (exporter, layer) = Exporter::start(&endpoint, "trireme-test").expect("an endpoint");
    tracing_subscriber::registry()
        .with(layer.with_filter(LevelFilter::INFO))
        .try_init()
        .expect("the only subscriber");

    let cluster = in_process(&demo(), "", Carrier::InProcess).await;
    let base = format!("http://{}", cluster.http_address());
    let body = json!({
        "model": "tiny", "stream": true, "max_tokens": 4, "ignore_eos": true,
        "messages": [{ "role": "user", "content": "What is a planet?" }],
    });
    http(&base).stream("/v1/chat/completions", &body, |_| {}).await.expect("an answer");
    cluster.shutdown().await;

    // The last spans close with their tasks; whatever it takes, it is not for ever.
    let wanted = ["router.session", "router.attempt", "prefill.prefill", "prefill.handoff", "decode.decode"];
    let mut spans: Vec<Span> = Vec::new();
    let patience = Instant::now() + Duration::from_secs(60);
    while !wanted.iter().all(|name| spans.iter().any(|span| span.name == *name)) {
        let left = patience.saturating_duration_since(Instant::now());
        let batch = tokio::time::timeout(left, batches.recv()).await;
        let names: BTreeSet<&str> = spans.iter().map(|span| span.name.as_str()).collect();
        let (service, batch) = batch.unwrap_or_else(|_| panic!("only {names:?} came")).expect("a collector");
        assert!(service.contains("trireme-test"), "{service}");
        spans.extend(batch);
    }
    let traces: BTreeSet<&[u8]> = spans.iter().map(|span| span.trace_id.as_slice()).collect();
    assert_eq!(traces.len(), 1, "one request, one trace");
    let by_id: BTreeMap<&[u8], &Span> = spans.iter().map(|span| (span.span_id.as_slice(), span)).collect();
    let parent = |name: &str| {
        let span = spans.iter().find(|span| span.name == name).expect("looked for above");
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano, "{name} ends before it begins");
        by_id.get(span.parent_span_id.as_slice()).map(|parent| parent.name.as_str())
    };
    for (child, expected) in [
        ("router.attempt", "router.session"),
        ("prefill.prefill", "router.attempt"),
        ("prefill.handoff", "prefill.prefill"),
        ("decode.intake", "router.attempt"),
        ("decode.decode", "router.attempt"),
    ] {
        assert_eq!(parent(child), Some(expected), "the parent of {child}");
    }
    assert_eq!(exporter.dropped(), 0);
}
