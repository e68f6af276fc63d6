//! Physical experts and their computation; the dispatch/combine client; placement and its balancer.
//!
//! Two halves meet over the fabric. [`RemoteExperts`] stands in an engine where `engine::LocalExperts`
//! would and gives the same bits; a worker made by [`start`] computes what it is sent. Both read one
//! [`Placement`], and every dispatch is stamped with its version.
//!
//! Deliberately absent: router weights (the source multiplies and sums), the shared expert (it runs at
//! the source), and any state of a request.

mod config;
mod dispatch;
mod metrics;
mod placement;
mod server;
mod wire;
mod worker;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use compute::Cpu;
use engine::ExpertBank;
use fabric::Fabric;
use model::ExecutionFingerprint;
use proto::membership::Announcement;
use proto::security::Identity;
use proto::v1::{Role, WorkerInfo, WorkerReport};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle as Task;

pub use config::{Config, ConfigError};
pub use dispatch::{DispatchCounters, RemoteExperts, RemoteOptions};
pub use placement::{Placement, PlacementError, WORKERS_MAX, moe_layers};
pub use wire::WireFormats;

use metrics::Metrics;
use server::Control;
use wire::Share;
use worker::{Parts, Worker};

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
    stop_server: Option<oneshot::Sender<()>>,
    server: Option<Task<()>>,
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
    let (stop_server, server_stopped) = oneshot::channel();
    let server =
        control.serve(&node.identity, Arc::clone(&metrics), config.progress_stall_max(), async move {
            drop(server_stopped.await)
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
    let report_metrics = Arc::clone(&metrics);
    let announcement = proto::membership::announce(node.routers, node.identity, move || WorkerReport {
        incarnation: info.incarnation,
        steps_total: report_metrics.steps_total(),
        info: Some(info.clone()),
        ..WorkerReport::default()
    });
    Ok(Handle {
        address,
        metrics,
        stop,
        device: Some(device),
        ended,
        stop_server: Some(stop_server),
        server: Some(tokio::spawn(server)),
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
        self.request_stop();
        self.wait().await;
        if let Some(server) = self.server.take() {
            drop(server.await);
        }
        if let Some(device) = self.device.take()
            && device.join().is_err()
        {
            tracing::error!("the device thread panicked");
        }
    }

    fn request_stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.stop_server.take());
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.request_stop();
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
