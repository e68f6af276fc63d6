//! A worker's presence in the routers' tables: reports that are its lease, for as long as it lives.
//!
//! One task per router, each with its own connection, so that a dead router never delays the lease at
//! another. A refusal is logged once and tried again at the slowest pace: the router may be replaced by
//! one that agrees.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep};
use tokio_stream::Stream;

use crate::field::{FieldError, name};
use crate::security::Identity;
use crate::ticket::{ADDRESS_BYTES_MAX, WORKER_ID_BYTES_MAX};
use crate::v1::registry_client::RegistryClient;
use crate::v1::{Role, RouterReport, WorkerInfo, WorkerReport};
use crate::{fingerprint, wire_version};

/// Pace of reports. The registry calls a worker dead after 1.5 s of silence, so five may be lost.
pub const REPORT_INTERVAL: Duration = Duration::from_millis(250);
/// First pause after a broken connection; doubles up to [`BACKOFF_MAX`].
pub const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// A router that comes back is found within this time.
pub const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// The running announcement. Dropping it ends every connection, and with them the leases.
#[derive(Debug)]
pub struct Announcement {
    workers: watch::Receiver<Vec<WorkerInfo>>,
    _tasks: JoinSet<()>,
}

impl Announcement {
    /// Every worker that holds a lease, as the router that answered last knows them; empty until the first
    /// answer. Wakes its waiters on change.
    pub fn workers(&self) -> watch::Receiver<Vec<WorkerInfo>> {
        self.workers.clone()
    }
}

/// Announces this worker to `routers` (host:port each) until the returned handle is dropped.
///
/// `source` is called for every report, from the current tokio runtime, and must not block. Every report
/// must carry `info`: a router may be new at any time.
pub fn announce(
    routers: Vec<String>,
    identity: Identity,
    source: impl Fn() -> WorkerReport + Send + Sync + 'static,
) -> Announcement {
    let source: Source = Arc::new(source);
    let (publish, workers) = watch::channel(Vec::new());
    let mut tasks = JoinSet::new();
    for router in routers {
        let lease = Lease {
            router,
            identity: identity.clone(),
            source: Arc::clone(&source),
            workers: publish.clone(),
        };
        tasks.spawn(lease.hold());
    }
    Announcement { workers, _tasks: tasks }
}

type Source = Arc<dyn Fn() -> WorkerReport + Send + Sync>;

/// The lease at one router.
struct Lease {
    router: String,
    identity: Identity,
    source: Source,
    workers: watch::Sender<Vec<WorkerInfo>>,
}

/// How one connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the router refuses this worker: {0}")]
    Refused(String),
    #[error(transparent)]
    Endpoint(#[from] crate::security::EndpointError),
    #[error("cannot connect: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("{}: {}", .0.code(), .0.message())]
    Status(#[from] tonic::Status),
    #[error("the router closed the stream")]
    Closed,
}

impl Lease {
    async fn hold(self) {
        let mut backoff = BACKOFF_MIN;
        let mut logged = String::new();
        loop {
            let mut accepted = false;
            let ended = match self.report_until_broken(&mut accepted).await {
                Ok(()) => Ended::Closed,
                Err(ended) => ended,
            };
            if accepted {
                backoff = BACKOFF_MIN;
                logged.clear();
            }
            if matches!(ended, Ended::Refused(_)) {
                backoff = BACKOFF_MAX;
            }
            // The same reason again, once a second for an hour, tells nobody anything.
            let reason = ended.to_string();
            if reason != logged {
                tracing::warn!(router = %self.router, %reason, "no lease at this router, retrying");
                logged = reason;
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn report_until_broken(&self, accepted: &mut bool) -> Result<(), Ended> {
        let channel = self.identity.endpoint(&self.router)?.connect().await?;
        let (_open, closed) = oneshot::channel();
        let reports = Reports::new(Arc::clone(&self.source), closed);
        let mut answers = RegistryClient::new(channel).announce(reports).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            let RouterReport { refused, workers } = answer;
            if !refused.is_empty() {
                return Err(Ended::Refused(refused));
            }
            if !*accepted {
                tracing::info!(router = %self.router, "lease held");
                *accepted = true;
            }
            self.workers.send_if_modified(|known| {
                let changed = *known != workers;
                *known = workers;
                changed
            });
        }
        Ok(())
    }
}

/// One report now and one every [`REPORT_INTERVAL`], until `closed` resolves.
///
/// The connection owns this stream and goes on sending it after the caller has let go of the answers: without
/// `closed`, a dropped announcement would hold its lease for ever.
struct Reports {
    ticks: Interval,
    source: Source,
    closed: oneshot::Receiver<()>,
}

impl Reports {
    fn new(source: Source, closed: oneshot::Receiver<()>) -> Self {
        let mut ticks = interval(REPORT_INTERVAL);
        // After a stall one report says everything; a burst of old ones says no more.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { ticks, source, closed }
    }
}

impl Stream for Reports {
    type Item = WorkerReport;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<WorkerReport>> {
        if Pin::new(&mut self.closed).poll(context).is_ready() {
            return Poll::Ready(None);
        }
        self.ticks.poll_tick(context).map(|_| Some((self.source)()))
    }
}

/// What a router checks before it gives a lease: ids, addresses, role, fingerprint's shape, wire version.
///
/// # Errors
/// Names the field, for [`RouterReport::refused`].
pub fn check_info(info: &WorkerInfo) -> Result<(), FieldError> {
    wire_version::check(info.wire_major)?;
    name("worker_id", &info.worker_id, WORKER_ID_BYTES_MAX)?;
    let role = Role::try_from(info.role).unwrap_or(Role::Unspecified);
    if role == Role::Unspecified {
        return Err(FieldError::out_of_range("role", info.role, "prefill, decode or expert"));
    }
    // Experts serve the fabric alone.
    if role != Role::Expert {
        name("control_address", &info.control_address, ADDRESS_BYTES_MAX)?;
    }
    name("fabric_address", &info.fabric_address, ADDRESS_BYTES_MAX)?;
    let fingerprint = info.fingerprint.as_ref().ok_or_else(|| FieldError::missing("fingerprint"))?;
    fingerprint::from_wire(fingerprint).map_err(|error| error.within("fingerprint"))?;
    if role != Role::Expert && (info.kv_blocks_max == 0 || info.kv_block_tokens == 0) {
        return Err(FieldError::missing("kv_blocks_max and kv_block_tokens"));
    }
    Ok(())
}
