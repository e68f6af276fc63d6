//! Puts an expert worker together: device thread, health service, and its presence at the routers.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use compute::Cpu;
use engine::ExpertBank;
use fabric::Fabric;
use model::ExecutionFingerprint;
use proto::membership::Announcement;
use proto::security::Identity;
use proto::v1::{Role, WorkerInfo, WorkerReport};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Config, ConfigError};
use crate::metrics::Metrics;
use crate::placement::Placement;
use crate::server::{Control, Health};
use crate::wire::{Share, WireFormats};
use crate::worker::{Parts, Worker};

/// For health streams to end, once the device thread has.
const GOODBYE_MAX: Duration = Duration::from_secs(1);

/// What a worker is, beyond its settings.
pub struct Node {
    /// Its name in the cluster.
    pub worker_id: String,
    /// Fresh at each process start.
    pub incarnation: u64,
    /// Its certificates.
    pub identity: Identity,
    /// Control addresses of the routers to announce to.
    pub routers: Vec<String>,
    /// Where its experts are dispatched to.
    pub fabric: Fabric,
    /// The loaded experts: at least `placement.share(rank)`.
    pub bank: ExpertBank,
    /// The table in force.
    pub placement: Placement,
    /// Its place in the table.
    pub rank: usize,
    /// What computes.
    pub cpu: Cpu,
    /// What sources must be for the bits to agree.
    pub fingerprint: ExecutionFingerprint,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("worker_id", &self.worker_id)
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}

/// Why a worker did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is out of its range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The rank is not in the placement.
    #[error("expert rank {rank} is not in a placement of {workers} workers")]
    Rank {
        /// Asked for.
        rank: usize,
        /// In the placement.
        workers: usize,
    },
    /// The placement promises an expert that the bank does not hold.
    #[error("expert {expert} of layer {layer} belongs to rank {rank} and is not loaded")]
    NotLoaded {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: model::ExpertId,
        /// This worker.
        rank: usize,
    },
    /// The control address cannot be had.
    #[error("expert cannot listen on {address}")]
    Bind {
        /// The configured address.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The certificates do not make a TLS server.
    #[error("expert cannot set up mutual TLS")]
    Tls(#[source] tonic::transport::Error),
    /// The device thread cannot be started.
    #[error("expert cannot start its device thread")]
    Thread(#[source] std::io::Error),
}

/// A running expert worker. Dropping it without [`Handle::shutdown`] stops it as well, without waiting.
pub struct Handle {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    stop: Arc<AtomicBool>,
    device: Option<JoinHandle<()>>,
    ended: watch::Receiver<()>,
    stop_server: watch::Sender<bool>,
    tasks: JoinSet<()>,
    _announcement: Announcement,
}

/// Starts a worker: device thread, health service, announcement. Answers dispatches when it returns.
///
/// # Errors
/// A setting, rank or bank that does not fit the placement, a taken address, unusable certificates.
pub async fn start(config: Config, node: Node) -> Result<Handle, Error> {
    config.validate()?;
    check_share(&node)?;
    let metrics = Arc::new(Metrics::new());
    let control = Control::bind(config.listen).await?;
    let address = control.address();
    let unwell = Arc::new(AtomicBool::new(false));
    let (stop_server, mut stopping) = watch::channel(false);
    let health = Health {
        metrics: Arc::clone(&metrics),
        stall_max: config.progress_stall_max(),
        unwell: Arc::clone(&unwell),
    };
    let server = control.serve(&node.identity, health, async move {
        let _ = stopping.wait_for(|stop| *stop).await;
    })?;
    let info = worker_info(&node, address);
    let stop = Arc::new(AtomicBool::new(false));
    let (ending, ended) = watch::channel(());
    let device = spawn_device(
        &node.worker_id,
        Parts {
            share: share(&config, &node),
            fabric: node.fabric,
            bank: node.bank,
            cpu: node.cpu,
            replies_queued_max: config.replies_queued_max,
            metrics: Arc::clone(&metrics),
            stop: Arc::clone(&stop),
        },
        ending,
    )?;
    let counted = Arc::clone(&metrics);
    let announcement = proto::membership::announce(node.routers, node.identity, move || WorkerReport {
        incarnation: info.incarnation,
        steps_total: counted.steps_total(),
        draining: unwell.load(Ordering::Relaxed),
        info: Some(info.clone()),
        ..WorkerReport::default()
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(server);
    tracing::info!(%address, "expert worker serves");
    Ok(Handle {
        address,
        metrics,
        stop,
        device: Some(device),
        ended,
        stop_server,
        tasks,
        _announcement: announcement,
    })
}

impl Handle {
    /// Where the gRPC health service listens.
    pub fn control_address(&self) -> SocketAddr {
        self.address
    }

    /// The metrics in Prometheus' text format.
    pub fn metrics_text(&self) -> String {
        self.metrics.text()
    }

    /// Resolves when the device thread has ended, asked for or not. A worker without it serves nobody.
    pub async fn wait(&self) {
        // Nothing is ever sent: the channel closes with the thread.
        while self.ended.clone().changed().await.is_ok() {}
    }

    /// Stops announcing, answering and computing, and waits for all of it.
    pub async fn shutdown(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wait().await;
        self.stop_server.send_replace(true);
        // A client may hold its connection open for ever.
        let _ = tokio::time::timeout(GOODBYE_MAX, self.tasks.join_next()).await;
        if let Some(device) = self.device.take()
            && device.join().is_err()
        {
            tracing::error!("the device thread panicked");
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The bank must hold what the placement says it holds: better found now than in a request.
fn check_share(node: &Node) -> Result<(), Error> {
    let Node { rank, placement, bank, .. } = node;
    if *rank >= placement.workers() {
        return Err(Error::Rank { rank: *rank, workers: placement.workers() });
    }
    for (layer, experts) in placement.share(*rank) {
        if let Some(&expert) = experts.iter().find(|&&expert| !bank.contains(layer, expert)) {
            return Err(Error::NotLoaded { layer, expert, rank: *rank });
        }
    }
    Ok(())
}

fn share(config: &Config, node: &Node) -> Share {
    Share {
        placement: node.placement.clone(),
        rank: node.rank,
        wire: WireFormats::of_bank(&node.bank),
        tokens_max: config.dispatch_tokens_max,
        vectors_max: config.step_vectors_max,
    }
}

fn worker_info(node: &Node, address: SocketAddr) -> WorkerInfo {
    WorkerInfo {
        worker_id: node.worker_id.clone(),
        role: Role::Expert.into(),
        incarnation: node.incarnation,
        control_address: address.to_string(),
        fabric_address: node.fabric.address(),
        fingerprint: Some(proto::fingerprint::to_wire(&node.fingerprint)),
        wire_major: proto::WIRE_MAJOR,
        wire_minor: proto::WIRE_MINOR,
        kv_blocks_max: 0,
        kv_block_tokens: 0,
        placement_version: node.placement.version(),
        kv_tier_blocks: 0,
    }
}

/// `ending` is dropped when the thread ends, however it ends.
fn spawn_device(worker_id: &str, parts: Parts, ending: watch::Sender<()>) -> Result<JoinHandle<()>, Error> {
    let run = move || {
        let _ending = ending;
        Worker::new(parts).run();
    };
    std::thread::Builder::new().name(worker_id.to_owned()).spawn(run).map_err(Error::Thread)
}
