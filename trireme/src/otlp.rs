//! Spans on their way to an OTLP collector: one trace for a request, whichever processes it passed.
//!
//! A [`SpanLayer`] turns `tracing`'s spans into OTLP's. A span that names a `trace_id` begins a process' part of a trace; `span_id`
//! is the id that others know it by, and `parent_id` the span that it belongs to in another process: what the W3C trace context
//! brings across. Every span inside one inherits. Spans outside of any trace, and all events, stay here.
//!
//! Nobody waits for the collector: finished spans go into a bounded queue, and what does not fit is dropped and counted.
//! Deliberately absent: sampling, metrics and logs, which Prometheus and standard error have.

mod export;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

pub use self::export::{ENDPOINT, Exporter, OtlpError};

/// Finished spans that wait for the collector: a busy second's.
const SPANS_QUEUED_MAX: usize = 8192;

/// Sends finished spans of traces to an [`Exporter`].
pub struct SpanLayer {
    finished: mpsc::Sender<Span>,
    dropped: Arc<AtomicU64>,
}

/// A span under way.
struct Open(Span);

impl SpanLayer {
    /// A layer, and the queue that it fills.
    fn new(dropped: Arc<AtomicU64>) -> (Self, mpsc::Receiver<Span>) {
        let (finished, spans) = mpsc::channel(SPANS_QUEUED_MAX);
        (Self { finished, dropped }, spans)
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for SpanLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let around = span.parent().and_then(|parent| {
            let extensions = parent.extensions();
            extensions.get::<Open>().map(|Open(open)| (open.trace_id.clone(), open.span_id.clone()))
        });
        let (trace_id, parent_span_id) = match (fields.trace_id, around) {
            // Within a span of the same trace, that one is the parent.
            (Some(trace), Some((of, parent))) if trace == of => (trace, parent),
            (Some(trace), _) => (trace, fields.parent_id.unwrap_or_default()),
            (None, Some(around)) => around,
            (None, None) => return,
        };
        let metadata = attributes.metadata();
        fields.attributes.push(attribute("target", text(metadata.target())));
        let open = Span {
            trace_id,
            span_id: fields.span_id.unwrap_or_else(|| rand::random::<[u8; 8]>().to_vec()),
            parent_span_id,
            name: name(metadata),
            kind: SpanKind::Internal.into(),
            start_time_unix_nano: now_nanos(),
            attributes: fields.attributes,
            ..Span::default()
        };
        span.extensions_mut().insert(Open(open));
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(Open(mut open)) = span.extensions_mut().remove::<Open>() else { return };
        open.end_time_unix_nano = now_nanos();
        if self.finished.try_send(open).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The crate says which role it was: a process of tests has several.
fn name(metadata: &Metadata<'_>) -> String {
    let role = metadata.target().split("::").next().unwrap_or_default();
    format!("{role}.{}", metadata.name())
}

fn now_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn text(value: &str) -> Value {
    Value::StringValue(value.to_owned())
}

/// A span's fields: ids apart, everything else as attributes.
#[derive(Default)]
struct Fields {
    trace_id: Option<Vec<u8>>,
    span_id: Option<Vec<u8>>,
    parent_id: Option<Vec<u8>>,
    attributes: Vec<KeyValue>,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match i64::try_from(value) {
            Ok(value) => self.record_i64(field, value),
            Err(_) => self.record_str(field, &value.to_string()),
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.attributes.push(attribute(field.name(), Value::IntValue(value)));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "trace_id" => self.trace_id = hex(value, 16),
            "span_id" => self.span_id = hex(value, 8),
            "parent_id" => self.parent_id = hex(value, 8),
            name => self.attributes.push(attribute(name, text(value))),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.record_str(field, format!("{value:?}").trim_matches('"'));
    }
}

/// An id of `bytes` bytes in hexadecimal digits.
fn hex(digits: &str, bytes: usize) -> Option<Vec<u8>> {
    if digits.len() != 2 * bytes || !digits.is_ascii() {
        return None;
    }
    (0..bytes).map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::hex;

    #[test]
    fn ids_are_read_whole_or_not_at_all() {
        assert_eq!(hex("00ff", 2), Some(vec![0, 255]));
        for wrong in ["00f", "00fg", "00ff00", "", "é0f"] {
            assert_eq!(hex(wrong, 2), None, "{wrong}");
        }
    }
}
