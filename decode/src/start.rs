//! Puts a decode worker together: device thread, gRPC service, health, and its presence at the routers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use engine::{Engine, KvTier};
use kvtransfer::Receiver;
use proto::membership::{Announcement, announce};
use proto::security::Identity;
use proto::ticket::TicketId;
use proto::v1;
use proto::v1::decode_server::DecodeServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::config::Config;
use crate::error::Error;
use crate::health::{Progress, Watch};
use crate::intake::{Intake, Submission};
use crate::metrics::Metrics;
use crate::outbox::Doorbell;
use crate::scheduler::{Limits, Scheduler};
use crate::server::DecodeService;
use crate::speculation::Speculation;
use crate::worker::{Inputs, Parts, Worker};

/// A router that is silent for this long is gone; its streams end and their sequences with them.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// For streams to take their last event, once every sequence has ended.
const GOODBYE_MAX: Duration = Duration::from_secs(1);

/// What a decode worker is made of.
pub struct Node {
    /// Name in the cluster, the same after a restart.
    pub worker_id: String,
    /// Fresh random number of this process' start; the receiver's tickets carry the same.
    pub incarnation: u64,
    /// What it proves itself with.
    pub identity: Identity,
    /// Routers to announce to, host:port each.
    pub routers: Vec<String>,
    /// Where prefill workers push to.
    pub fabric_address: String,
    /// The receiving side of hand-offs, for the engine's KV layout.
    pub receiver: Receiver,
    /// The loaded model with its KV pool, none of whose blocks is in use.
    pub engine: Engine,
    /// What keeps the blocks that the pool has no room for.
    pub tier: KvTier,
    /// Whether a prefill worker computes on the engine's device: drafts then wait while prompts are awaited.
    pub prefill_beside: bool,
}

/// A running decode worker. Dropping it stops it at once.
pub struct Handle {
    control_address: SocketAddr,
    metrics: Metrics,
    draining: Arc<AtomicBool>,
    /// The device thread hears a moment to end by, or the end of this channel.
    drain: Sender<Instant>,
    drain_max: Duration,
    /// Closes when the device thread has ended, by a panic too.
    ended: watch::Receiver<()>,
    stop_serving: watch::Sender<bool>,
    tasks: JoinSet<()>,
    _announcement: Announcement,
}

/// Starts a decode worker: when this returns, it serves.
///
/// # Errors
/// A setting out of its range, an address that cannot be bound, certificates that are none.
pub async fn start(config: Config, node: Node) -> Result<Handle, Error> {
    config.validate()?;
    config.validate_for(&node.engine)?;
    let mut server = tls_server(&config, &node.identity)?;
    let bind = |source| Error::Bind { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(bind)?;
    let control_address = listener.local_addr().map_err(bind)?;
    let info = info(&node, control_address);

    let metrics = Metrics::new(node.engine.kv().blocks());
    let intake = Arc::new(Intake::new(node.engine.config(), node.engine.fingerprint().clone()));
    let prefill_tokens_max = config.prefill_tokens_max.min(node.engine.step_tokens_max());
    let device = start_device(
        &config,
        (node.engine, node.tier, node.prefill_beside),
        node.receiver,
        Arc::clone(&intake),
        metrics.clone(),
    )?;
    let service = DecodeService {
        intake,
        submissions: device.submissions,
        doorbell: device.doorbell,
        finishes: device.finishes,
        incarnation: node.incarnation,
        metrics: metrics.clone(),
        events_queued_max: config.events_queued_max,
        prefills: config.prefill_tokens_max > 0,
    };

    let (health, health_service) = tonic_health::server::health_reporter();
    let (stop_serving, mut stopping) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        // The server's own setting does not reach connections of a listener it was given, and a token is a small
        // packet: without this it waits 40 ms for the acknowledgement of the one before.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let stop = async move { drop(stopping.wait_for(|stop| *stop).await) };
        let router = server.add_service(health_service).add_service(DecodeServer::new(service));
        if let Err(error) = router.serve_with_incoming_shutdown(incoming, stop).await {
            tracing::error!(%error, "the decode service ended");
        }
    });

    let draining = Arc::new(AtomicBool::new(false));
    let unwell = Arc::new(AtomicBool::new(false));
    let watch = Watch::new(config.progress_stall_max(), Progress::of(&metrics), Instant::now());
    tasks.spawn(watch.report(metrics.clone(), device.ended.clone(), health, Arc::clone(&unwell)));
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let report = Report {
        info,
        batch_max: count(config.batch_max),
        step_prompt_tokens_max: count(prefill_tokens_max),
        metrics: metrics.clone(),
        draining: Arc::clone(&draining),
        unwell,
    };
    let announcement = announce(node.routers, node.identity, move || report.now());
    tracing::info!(%control_address, "decode worker serves");
    Ok(Handle {
        control_address,
        metrics,
        draining,
        drain: device.drain,
        drain_max: config.drain_max(),
        ended: device.ended,
        stop_serving,
        tasks,
        _announcement: announcement,
    })
}

/// A gRPC server that speaks to this cluster's members alone, and notices when one is gone.
fn tls_server(config: &Config, identity: &Identity) -> Result<Server, Error> {
    // One stream a sequence, and enough beyond that for one too many to be refused here instead of waiting unseen in
    // the router's connection, which is what the default of 200 would do.
    let streams_max = u32::try_from(config.sequences_max + config.queue_max + config.submissions_queued_max)
        .unwrap_or(u32::MAX);
    let server = Server::builder()
        .max_concurrent_streams(Some(streams_max))
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT));
    server.tls_config(identity.server_tls()).map_err(Error::Tls)
}

/// Who this worker is, for the routers.
fn info(node: &Node, control_address: SocketAddr) -> v1::WorkerInfo {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    v1::WorkerInfo {
        worker_id: node.worker_id.clone(),
        role: v1::Role::Decode.into(),
        incarnation: node.incarnation,
        control_address: control_address.to_string(),
        fabric_address: node.fabric_address.clone(),
        fingerprint: Some(proto::fingerprint::to_wire(node.engine.fingerprint())),
        wire_major: proto::WIRE_MAJOR,
        wire_minor: proto::WIRE_MINOR,
        kv_blocks_max: count(node.engine.kv().blocks()),
        kv_block_tokens: count(node.engine.kv_layout().block_tokens),
        // Which experts are where is the engine's `Experts`' business, not this role's.
        placement_version: 0,
        kv_tier_blocks: count(node.tier.blocks_max()),
    }
}

/// The ways to the device thread.
struct Device {
    submissions: Sender<Submission>,
    finishes: Sender<TicketId>,
    doorbell: Doorbell,
    drain: Sender<Instant>,
    ended: watch::Receiver<()>,
}

fn start_device(
    config: &Config,
    (engine, tier, prefill_beside): (Engine, KvTier, bool),
    receiver: Receiver,
    intake: Arc<Intake>,
    metrics: Metrics,
) -> Result<Device, Error> {
    let (submissions, submitted) = bounded(config.submissions_queued_max);
    // One for each sequence that could end so between two rounds.
    let (finishes, finished) = bounded(config.sequences_max);
    let (doorbell, heard) = Doorbell::new();
    let (drain, drain_by) = bounded(1);
    let (alive, ended) = watch::channel(());
    let scheduler = Scheduler::new(Limits {
        sequences_max: config.sequences_max,
        queue_max: config.queue_max,
        batch_max: config.batch_max,
        step_rows_max: 1 + if config.drafts_with(&engine) { config.draft_tokens_max } else { 0 },
        kv_blocks: engine.kv().blocks(),
        block_tokens: engine.kv_layout().block_tokens,
        reader_stall_max: config.reader_stall_max(),
        rerun_tokens: usize::from(config.drafts_with(&engine)),
    });
    let inputs = Inputs { submissions: submitted, finishes: finished, doorbell: heard, drain: drain_by };
    let speculation = config
        .drafts_with(&engine)
        .then(|| Speculation::new(config.draft_tokens_max).beside_prefill(prefill_beside));
    let prefill_tokens_max = config.prefill_tokens_max.min(engine.step_tokens_max());
    let worker = Worker::new(Parts {
        engine,
        tier,
        scheduler,
        receiver,
        intake,
        inputs,
        metrics,
        speculation,
        prefill_tokens_max,
    });
    let run = move || {
        let _alive = alive;
        worker.run();
    };
    std::thread::Builder::new().name("decode-device".to_owned()).spawn(run).map_err(Error::Thread)?;
    Ok(Device { submissions, finishes, doorbell, drain, ended })
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
        let mut ended = self.ended.clone();
        while ended.changed().await.is_ok() {}
    }

    /// Refuses new sequences, lets the running ones end for up to `drain_ms_max`, fails the rest, and stops.
    pub async fn shutdown(mut self) {
        self.draining.store(true, Ordering::Relaxed);
        // The only sender, and it sends once: there is room.
        let _ = self.drain.try_send(Instant::now() + self.drain_max);
        self.wait().await;
        self.stop_serving.send_replace(true);
        // Streams end with their sequences, but a client may hold its connection open for ever.
        let _ = tokio::time::timeout(GOODBYE_MAX, self.tasks.join_next()).await;
    }
}

/// What the routers are told.
struct Report {
    info: v1::WorkerInfo,
    batch_max: u32,
    step_prompt_tokens_max: u32,
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
            running: count(self.metrics.running.get()),
            waiting: count(self.metrics.waiting.get().saturating_add(self.metrics.queued_total())),
            queued: count(self.metrics.queued_total()),
            waiting_tokens: u64::try_from(self.metrics.waiting_tokens.get()).unwrap_or(0),
            prompt_tokens_per_s: u64::try_from(self.metrics.prompt_tokens_per_s.get()).unwrap_or(0),
            step_us: u64::try_from(self.metrics.step_us.get()).unwrap_or(0),
            batch_max: self.batch_max,
            step_prompt_tokens_max: self.step_prompt_tokens_max,
            runnable: count(self.metrics.runnable.get()),
            kv_blocks_free: count(self.metrics.blocks_free.get()),
            // A worker that does not move must get no more requests either.
            draining: self.draining.load(Ordering::Relaxed) || self.unwell.load(Ordering::Relaxed),
        }
    }
}
