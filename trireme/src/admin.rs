//! A worker's own small HTTP door: `/metrics` for Prometheus, and `/health` that says only that it answers
//! (forward progress is the gRPC health service's business, and the router's).

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use axum::{Router, http::header, routing::get};
use fabric::Fabric;
use prometheus_client::{
    encoding::text,
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use tokio::{sync::oneshot, task::JoinHandle};

/// The running door.
pub struct Admin {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Admin {
    /// Listens on `address` and answers `/metrics` with what `metrics` returns.
    pub async fn start(
        address: SocketAddr,
        metrics: impl Fn() -> String + Send + Sync + 'static,
    ) -> anyhow::Result<Self> {
        let listener =
            tokio::net::TcpListener::bind(address).await.with_context(|| format!("admin: {address}"))?;
        let metrics = Arc::new(metrics);
        let text = move || {
            let metrics = metrics.clone();
            async move {
                (
                    [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")],
                    metrics(),
                )
            }
        };
        let app = Router::new().route("/metrics", get(text)).route("/health", get(|| async { "ok" }));
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let served =
                axum::serve(listener, app).with_graceful_shutdown(async move { drop(stopped.await) });
            if let Err(error) = served.await {
                tracing::error!(%error, "the admin door closed");
            }
        });
        Ok(Self { stop, task })
    }

    /// Stops listening.
    pub async fn shutdown(self) {
        drop(self.stop);
        // A scraper that keeps its connection open must not keep the worker alive.
        self.task.abort();
        let _ = self.task.await;
    }
}

/// The role's metrics followed by those of its ends of the fabric, as one OpenMetrics text.
pub fn with_fabric(role: &str, ends: &[Fabric]) -> String {
    // A text has one end mark; the role's own comes off before more is added.
    let role = role.strip_suffix("# EOF\n").unwrap_or(role);
    let stats: fabric::Stats = ends.iter().map(Fabric::stats).sum();
    let mut registry = Registry::with_prefix("fabric");
    for (name, help, value) in [
        ("peers_up", "Connections that came up", stats.peers_up),
        ("peers_lost", "Connections that ended", stats.peers_lost),
        ("handshakes_failed", "Connections refused during the handshake", stats.handshakes_failed),
        ("protocol_errors", "Connections closed because the peer broke the protocol", stats.protocol_errors),
        ("frames_sent", "Frames handed to the transport", stats.frames_sent),
        ("bytes_sent", "Bytes of those frames", stats.bytes_sent),
        ("frames_received", "Frames delivered to a channel", stats.frames_received),
        ("bytes_received", "Bytes of those frames", stats.bytes_received),
        ("sends_full", "Sends refused because a queue was full", stats.sends_full),
        ("packets_lost", "Packets sent again", stats.packets_lost),
    ] {
        registry.register(name, help, ConstCounter::new(value));
    }
    for (name, help, value) in [
        ("peers", "Live connections", stats.peers),
        ("peers_shared", "Live connections through shared memory", stats.peers_shared),
        ("peers_rdma", "Live connections over RDMA", stats.peers_rdma),
        ("mtu_bytes_min", "Smallest datagram payload among live connections", stats.mtu_bytes_min),
    ] {
        registry.register(name, help, ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)));
    }
    let mut own = String::new();
    match text::encode(&mut own, &registry) {
        Ok(()) => format!("{role}{own}"),
        Err(error) => {
            tracing::error!(%error, "the fabric's metrics cannot be written");
            format!("{role}# EOF\n")
        }
    }
}
