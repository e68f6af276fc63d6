//! Where log lines and spans go: lines to standard error, as text, levels by `TRIREME_LOG` in `tracing`'s filter syntax; spans of
//! requests to the OTLP collector that `OTEL_EXPORTER_OTLP_ENDPOINT` names, if it names one.

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::{EnvFilter, Layer, prelude::*};

use crate::otlp::{ENDPOINT, Exporter};

/// Installs the process' subscriber. Roles log from `info`, commands that a person reads from `warn`. Spans leave as long
/// as what is returned lives.
pub fn install(role: Option<&str>) -> Option<Exporter> {
    // A cluster inside a command is taken down worker by worker, which its router rightly warns of and nobody needs to read.
    let default = if role.is_some() { "info" } else { "warn,router=error,proto=error" };
    let filter = EnvFilter::try_from_env("TRIREME_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_filter(filter);
    let (exporter, spans) = match std::env::var(ENDPOINT).ok().filter(|endpoint| !endpoint.is_empty()) {
        None => (None, None),
        Some(endpoint) => {
            let service = std::env::var("OTEL_SERVICE_NAME").ok();
            let service = service.unwrap_or_else(|| match role {
                Some(role) => format!("trireme-{role}"),
                None => "trireme".to_owned(),
            });
            match Exporter::start(&endpoint, &service) {
                Ok((exporter, layer)) => (Some(exporter), Some(layer.with_filter(LevelFilter::INFO))),
                Err(error) => {
                    eprintln!("spans are not exported: {error}");
                    (None, None)
                }
            }
        }
    };
    // A second installation (a test's own subscriber is there already) is no error.
    let _ = tracing_subscriber::registry().with(lines).with(spans).try_init();
    exporter
}
