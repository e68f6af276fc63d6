//! The control plane of an expert worker: standard gRPC health over mutual TLS, and nothing else.
//!
//! Tokens never come this way. Health means forward progress: it follows the turns of the device
//! thread, which go on while it is idle and stop when it hangs.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proto::security::Identity;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::metrics::Metrics;
use crate::start::Error;

/// How often the turns are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// The overall health of the process, by the health protocol's convention.
const WHOLE_SERVER: &str = "";

/// A bound server that is not answering yet.
pub(crate) struct Control {
    listener: TcpListener,
    address: SocketAddr,
}

impl Control {
    pub(crate) async fn bind(address: SocketAddr) -> Result<Self, Error> {
        let failed = |source| Error::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// What was bound, with the port that the system chose.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// A future that answers until `stopped` resolves.
    pub(crate) fn serve(
        self,
        identity: &Identity,
        health: Health,
        stopped: impl Future<Output = ()> + Send + 'static,
    ) -> Result<impl Future<Output = ()> + Send + 'static, Error> {
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let mut server = Server::builder().tls_config(identity.server_tls()).map_err(Error::Tls)?;
        let incoming = TcpIncoming::from(self.listener).with_nodelay(Some(true));
        let served = server.add_service(health_service).serve_with_incoming_shutdown(incoming, stopped);
        Ok(async move {
            tokio::select! {
                outcome = served => {
                    if let Err(error) = outcome {
                        tracing::error!(%error, "the control server ended");
                    }
                }
                () = health.watch(reporter) => {}
            }
        })
    }
}

/// What health is judged by, and who is told.
pub(crate) struct Health {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) stall_max: Duration,
    /// Follows the judgement: a worker that does not move must get no more work.
    pub(crate) unwell: Arc<AtomicBool>,
}

impl Health {
    /// Keeps the health status at what the turns say. Never ends.
    async fn watch(self, reporter: HealthReporter) {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        let mut progress = Progress::new(self.metrics.turns(), Instant::now());
        loop {
            ticks.tick().await;
            let well = progress.observe(self.metrics.turns(), Instant::now(), self.stall_max);
            if self.unwell.swap(!well, Ordering::Relaxed) == well {
                tracing::warn!(well, "forward progress changed");
            }
            let status = if well { ServingStatus::Serving } else { ServingStatus::NotServing };
            reporter.set_service_status(WHOLE_SERVER, status).await;
        }
    }
}

/// When the turn counter moved last.
struct Progress {
    turns: u64,
    moved: Instant,
}

impl Progress {
    fn new(turns: u64, now: Instant) -> Self {
        Self { turns, moved: now }
    }

    /// Whether the counter has moved within `stall_max`.
    fn observe(&mut self, turns: u64, now: Instant, stall_max: Duration) -> bool {
        if turns != self.turns {
            *self = Self::new(turns, now);
        }
        now - self.moved < stall_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_follows_the_turns() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let stall_max = Duration::from_secs(5);
        let mut progress = Progress::new(0, start);
        assert!(progress.observe(0, at(4), stall_max), "not long enough");
        assert!(!progress.observe(0, at(5), stall_max), "stalled");
        assert!(progress.observe(1, at(60), stall_max), "recovered");
        assert!(progress.observe(1, at(64), stall_max), "counted from the last move");
        assert!(!progress.observe(1, at(65), stall_max), "stalled again");
    }
}
