//! Puts a prefill worker together: device thread, gRPC service, health, and its presence at the routers.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use engine::{Engine, KvTier};
use proto::membership::{Announcement, announce};
use proto::security::Identity;
use proto::v1;
use proto::v1::prefill_server::PrefillServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::config::Config;
use crate::error::Error;
use crate::handoff::Handoff;
use crate::health;
use crate::intake::Intake;
use crate::metrics::Metrics;
use crate::outbox::Doorbell;
use crate::scheduler::{Limits, Scheduler};
use crate::server::PrefillService;
use crate::worker::{Inputs, Worker};

/// A router that is silent for this long is gone; its streams end and their requests with them.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// For streams to take their last event, once every request has ended.
const GOODBYE_MAX: Duration = Duration::from_secs(1);

/// What a prefill worker is made of.
pub struct Node {
    /// Name in the cluster, the same after a restart.
    pub worker_id: String,
    /// Fresh random number of this process' start.
    pub incarnation: u64,
    /// What it proves itself with.
    pub identity: Identity,
    /// Routers to announce to, host:port each.
    pub routers: Vec<String>,
    /// Its own end of the fabric.
    pub fabric_address: String,
    /// The sending side of hand-offs.
    pub sender: kvtransfer::Sender,
    /// The loaded model with its KV pool, none of whose blocks is in use.
    pub engine: Engine,
    /// What keeps the blocks that the pool has no room for.
    pub tier: KvTier,
}

/// A running prefill worker. Dropping it stops it at once.
pub struct Handle {
    control_address: SocketAddr,
    metrics: Metrics,
    draining: Arc<AtomicBool>,
    /// The device thread hears a moment to end by, or the end of this channel.
    drain: Sender<Instant>,
    drain_max: Duration,
    /// Turns `true`, or closes, when the device thread has ended.
    ended: watch::Receiver<bool>,
    stop_serving: watch::Sender<bool>,
    tasks: JoinSet<()>,
    _announcement: Announcement,
}

/// Starts a prefill worker: when this returns, it serves.
///
/// # Errors
/// A setting out of its range, an address that cannot be bound, certificates that are none.
pub async fn start(config: Config, node: Node) -> Result<Handle, Error> {
    config.validate()?;
    let mut server = Server::builder()
        .tls_config(node.identity.server_tls())
        .map_err(Error::Tls)?
        .max_concurrent_streams(Some(streams_max(&config)))
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT));
    let bind = |source| Error::Bind { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(bind)?;
    let control_address = listener.local_addr().map_err(bind)?;

    let info = worker_info(&node, control_address);
    let Node { identity, routers, sender, engine, tier, .. } = node;
    let metrics = Metrics::new(engine.kv().blocks());
    let intake = Arc::new(Intake::new(engine.config(), engine.fingerprint().clone(), engine.kv_layout()));
    let (submit, submissions) = bounded(config.submissions_queued_max);
    let (doorbell, heard) = Doorbell::new();
    let (drain, drain_by) = bounded(1);
    let scheduler = Scheduler::new(limits(&config, &engine));
    let handoff = Handoff::new(sender, engine.kv_layout());
    let inputs = Inputs { submissions, doorbell: heard, drain: drain_by };
    let ended = spawn_device(Worker::new((engine, tier), scheduler, handoff, inputs, metrics.clone()))?;

    let service = PrefillService { intake, submissions: submit, doorbell, metrics: metrics.clone() };
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let (stop_serving, mut stopping) = watch::channel(false);
    let mut tasks = JoinSet::new();
    // The server's own setting does not reach connections of a listener it was given, and a first token is a small
    // packet: without this it waits 40 ms for the acknowledgement of the one before.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serve = server
        .add_service(health_service)
        .add_service(PrefillServer::new(service))
        .serve_with_incoming_shutdown(incoming, async move {
            let _ = stopping.wait_for(|stop| *stop).await;
        });
    tasks.spawn(async move {
        if let Err(error) = serve.await {
            tracing::error!(%error, "the prefill service ended");
        }
    });

    let draining = Arc::new(AtomicBool::new(false));
    let unwell = Arc::new(AtomicBool::new(false));
    tasks.spawn(health::watch(config.progress_stall_max(), metrics.clone(), reporter, Arc::clone(&unwell)));
    let report = Report { info, metrics: metrics.clone(), draining: Arc::clone(&draining), unwell };
    let announcement = announce(routers, identity, move || report.now());
    tracing::info!(%control_address, "prefill worker serves");
    Ok(Handle {
        control_address,
        metrics,
        draining,
        drain,
        drain_max: config.drain_max(),
        ended,
        stop_serving,
        tasks,
        _announcement: announcement,
    })
}

impl Handle {
    /// Where the gRPC service listens.
    pub fn control_address(&self) -> SocketAddr {
        self.control_address
    }

    /// What it has counted, in Prometheus' text format.
    pub fn metrics_text(&self) -> String {
        self.metrics.text()
    }

    /// Returns once the device thread has ended: after [`Handle::shutdown`], or because an invariant was broken.
    pub async fn wait(&self) {
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Refuses new requests, lets the queued ones end for up to `drain_ms_max`, fails the rest, and stops.
    pub async fn shutdown(mut self) {
        self.draining.store(true, Ordering::Relaxed);
        // The only sender, and it sends once: there is room.
        let _ = self.drain.try_send(Instant::now() + self.drain_max);
        self.wait().await;
        self.stop_serving.send_replace(true);
        // Streams end with their requests, but a client may hold its connection open for ever.
        let _ = tokio::time::timeout(GOODBYE_MAX, self.tasks.join_next()).await;
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("control_address", &self.control_address).finish_non_exhaustive()
    }
}

/// hyper's default of 200 would let requests wait unseen in the router's connection instead of being refused here.
fn streams_max(config: &Config) -> u32 {
    let requests = config.submissions_queued_max + config.queue_requests_max + config.active_max;
    u32::try_from(requests).unwrap_or(u32::MAX)
}

fn limits(config: &Config, engine: &Engine) -> Limits {
    Limits {
        queue_requests_max: config.queue_requests_max,
        queue_tokens_max: config.queue_tokens_max,
        active_max: config.active_max,
        step_tokens_max: config.step_tokens_max.min(engine.step_tokens_max()),
        block_tokens: engine.kv_layout().block_tokens,
        kv_blocks: engine.kv().blocks(),
        rerun_tokens: usize::from(engine.has_mtp()),
    }
}

fn worker_info(node: &Node, control_address: SocketAddr) -> v1::WorkerInfo {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    v1::WorkerInfo {
        worker_id: node.worker_id.clone(),
        role: v1::Role::Prefill.into(),
        incarnation: node.incarnation,
        control_address: control_address.to_string(),
        fabric_address: node.fabric_address.clone(),
        fingerprint: Some(proto::fingerprint::to_wire(node.engine.fingerprint())),
        wire_major: proto::WIRE_MAJOR,
        wire_minor: proto::WIRE_MINOR,
        kv_blocks_max: count(node.engine.kv().blocks()),
        kv_block_tokens: count(node.engine.kv_layout().block_tokens),
        placement_version: 0,
        kv_tier_blocks: count(node.tier.blocks_max()),
    }
}

/// Starts the device thread; the receiver turns `true`, or closes, when it has ended.
fn spawn_device(worker: Worker) -> Result<watch::Receiver<bool>, Error> {
    let (end, ended) = watch::channel(false);
    let run = move || {
        worker.run();
        // Not reached by a panic: then the channel closes, which is heard as well.
        let _ = end.send(true);
    };
    std::thread::Builder::new().name("prefill-device".to_owned()).spawn(run).map_err(Error::Thread)?;
    Ok(ended)
}

/// What the routers are told.
struct Report {
    info: v1::WorkerInfo,
    metrics: Metrics,
    draining: Arc<AtomicBool>,
    unwell: Arc<AtomicBool>,
}

impl Report {
    fn now(&self) -> v1::WorkerReport {
        let count = |gauge: i64| u32::try_from(gauge.max(0)).unwrap_or(u32::MAX);
        v1::WorkerReport {
            info: Some(self.info.clone()),
            incarnation: self.info.incarnation,
            steps_total: self.metrics.steps.get(),
            running: count(self.metrics.active.get()),
            queued: 0,
            waiting: count(self.metrics.waiting.get()),
            waiting_tokens: u64::try_from(self.metrics.waiting_tokens.get()).unwrap_or(0),
            prompt_tokens_per_s: u64::try_from(self.metrics.tokens_per_s.get()).unwrap_or(0),
            // Decode's alone.
            step_us: 0,
            batch_max: 0,
            step_prompt_tokens_max: 0,
            // Every prompt that is here can be computed.
            runnable: count(self.metrics.active.get() + self.metrics.waiting.get()),
            kv_blocks_free: count(self.metrics.blocks_free.get()),
            // A worker that does not move must get no more requests either.
            draining: self.draining.load(Ordering::Relaxed) || self.unwell.load(Ordering::Relaxed),
        }
    }
}
