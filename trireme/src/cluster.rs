//! A whole cluster in this process: what `up --in-process` and `generate` run, and every end-to-end test.
//!
//! The roles are those of the process-per-role cluster, started by the same functions ([`crate::node`]), with the
//! same gRPC and mutual TLS between them; only the fabric may be the in-process one.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bench::client::Client;
use fabric::{Fabric, Hub};

use crate::{
    config::{Config, Role, Worker},
    identity,
    node::{self, Handle, Surroundings},
    ready,
};

/// From the last worker's start to the router knowing it: one report over loopback.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// What carries KV blocks and expert tokens between the roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carrier {
    /// Queues inside this process.
    #[default]
    InProcess,
    /// QUIC with mutual TLS over loopback.
    Quic,
}

/// How to start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// The fabric.
    pub carrier: Carrier,
}

/// A running cluster.
pub struct Cluster {
    router: router::Handle,
    workers: Vec<(String, Handle)>,
}

/// Starts every role of `config` and returns when the router knows all of them.
pub async fn start(config: Config, options: Options) -> anyhow::Result<Cluster> {
    config.validate()?;
    let identity = match &config.security {
        Some(files) => identity::load(files)?,
        None => identity::generate()?,
    };
    let mut surroundings = Surroundings {
        checkpoint: node::open_checkpoint(&config)?,
        config: Arc::new(config),
        identity,
        routers: Vec::new(),
        experts: Vec::new(),
        supervised: false,
    };
    let router = node::start_router(&surroundings).await?;
    surroundings.routers = vec![router.control_address().to_string()];

    // Every fabric first: the experts' addresses are part of everybody's surroundings.
    let hub = Hub::new();
    let mut parts = Vec::new();
    for worker in &surroundings.config.workers {
        let incarnation = rand::random();
        let ends = ends(&hub, worker, incarnation, &surroundings, options)?;
        parts.push((worker.clone(), ends, incarnation));
    }
    surroundings.experts = parts
        .iter()
        .filter(|(worker, ..)| worker.role == Role::Expert)
        .filter_map(|(_, ends, _)| Some(ends.first()?.address()))
        .collect();
    let mut workers = Vec::new();
    for (worker, ends, incarnation) in parts {
        let handle = node::start_worker(&surroundings, &worker, ends, incarnation).await?;
        workers.push((worker.id, handle));
    }
    let client = Client::new(&format!("http://{}", router.http_address()), None, READY_TIMEOUT)?;
    ready::wait(&client, READY_TIMEOUT, |_| true, || Ok(())).await?;
    Ok(Cluster { router, workers })
}

/// A worker's ends of the fabric, by rail. Within a process there is one.
fn ends(
    hub: &Hub,
    worker: &Worker,
    incarnation: u64,
    surroundings: &Surroundings,
    options: Options,
) -> anyhow::Result<Vec<Fabric>> {
    match options.carrier {
        Carrier::InProcess => {
            Ok(vec![Fabric::in_process(hub, worker.id.clone(), incarnation, Default::default())?])
        }
        Carrier::Quic => node::quic(&surroundings.config, worker, incarnation, &surroundings.identity),
    }
}

impl Cluster {
    /// Where the OpenAI endpoints listen.
    pub fn http_address(&self) -> SocketAddr {
        self.router.http_address()
    }

    /// Where `trireme.v1.Inference` listens.
    pub fn grpc_address(&self) -> SocketAddr {
        self.router.grpc_address()
    }

    /// Each worker's metrics, by its id.
    pub fn worker_metrics(&self) -> impl Iterator<Item = (&str, String)> {
        self.workers.iter().map(|(id, handle)| (id.as_str(), handle.metrics_text()))
    }

    /// Ends the workers behind a router that takes nothing new.
    pub async fn shutdown(self) {
        self.router.shutdown().await;
        for (_, handle) in self.workers {
            handle.shutdown().await;
        }
    }
}
