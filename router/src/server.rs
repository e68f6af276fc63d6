//! Starts the router: three doors (HTTP, gRPC, the workers' registry) over one service, and their orderly end.

use std::net::SocketAddr;
use std::sync::Arc;

use proto::security::Identity;
use proto::v1::registry_server::RegistryServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::server::TcpIncoming;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::connections::BoundedListener;
use crate::error::StartError;
use crate::metrics::Metrics;
use crate::registry::{Registry, RegistryService};
use crate::served_model::ServedModel;
use crate::service::Service;
use crate::{grpc, http};

/// What a router is made of besides its configuration.
pub struct Node {
    /// What it proves itself with to workers, and checks theirs by.
    pub identity: Identity,
    /// The model served.
    pub model: ServedModel,
}

/// A running router.
pub struct Handle {
    http_address: SocketAddr,
    grpc_address: SocketAddr,
    control_address: SocketAddr,
    service: Arc<Service>,
    stop_doors: watch::Sender<bool>,
    stop_registry: watch::Sender<bool>,
    doors: Vec<JoinHandle<()>>,
    registry: JoinHandle<()>,
}

/// Checks the configuration, binds the three ports and serves.
///
/// # Errors
/// A setting or the identity cannot be used, or a port cannot be bound.
pub async fn start(config: Config, node: Node) -> Result<Handle, StartError> {
    config.validate()?;
    let http = bind("http", config.http_listen).await?;
    let grpc = bind("grpc", config.grpc_listen).await?;
    let control = bind("control", config.control_listen).await?;
    let (http_address, grpc_address, control_address) =
        (address("http", &http)?, address("grpc", &grpc)?, address("control", &control)?);

    let http = BoundedListener::new(http, config.connections_max);
    let grpc = BoundedListener::new(grpc, config.connections_max);
    let metrics = Arc::new(Metrics::new());
    let registry = Arc::new(Registry::new(&config, node.identity.clone(), Arc::clone(&metrics)));
    let service = Arc::new(Service::new(config, node.model, Arc::clone(&registry), metrics));
    let (stop_doors, doors_stop) = watch::channel(false);
    let (stop_registry, registry_stop) = watch::channel(false);

    let registry_server = tonic::transport::Server::builder()
        .tls_config(node.identity.server_tls())
        .map_err(StartError::Identity)?
        .add_service(RegistryServer::new(RegistryService(registry)));
    let grpc_router = grpc::router(Arc::clone(&service)).await?;
    let registry = tokio::spawn(async move {
        let connections = TcpIncoming::from(control).with_nodelay(Some(true));
        let served = registry_server.serve_with_incoming_shutdown(connections, stopped(registry_stop)).await;
        ended("control", served);
    });
    let http_service = Arc::clone(&service);
    let http_stop = stopped(doors_stop.clone());
    let http = tokio::spawn(http::serve(http_service, http, http_stop));
    let grpc_stop = stopped(doors_stop);
    let grpc = tokio::spawn(async move { ended("grpc", grpc::serve(grpc_router, grpc, grpc_stop).await) });

    info!(http = %http_address, grpc = %grpc_address, control = %control_address, "router listens");
    Ok(Handle {
        http_address,
        grpc_address,
        control_address,
        service,
        stop_doors,
        stop_registry,
        doors: vec![http, grpc],
        registry,
    })
}

impl Handle {
    /// Where OpenAI's clients go.
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// Where `trireme.v1.Inference` is.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// Where workers announce themselves.
    pub fn control_address(&self) -> SocketAddr {
        self.control_address
    }

    /// What `/metrics` says.
    pub fn metrics_text(&self) -> String {
        self.service.metrics_text()
    }

    /// Live workers, by tier name.
    pub fn workers(&self) -> Vec<(&'static str, String)> {
        let workers = self.service.registry.workers();
        workers.iter().map(|worker| (worker.tier.name(), worker.key.id.to_string())).collect()
    }

    /// Refuses new requests, lets running ones end within `drain_ms_max`, then stops.
    pub async fn shutdown(self) {
        self.service.drain();
        self.stop_doors.send_replace(true);
        let drain_max = self.service.config.drain_max();
        let deadline = tokio::time::Instant::now() + drain_max;
        for mut door in self.doors {
            if tokio::time::timeout_at(deadline, &mut door).await.is_err() {
                warn!("requests still running after the drain time are dropped");
                door.abort();
            }
        }
        // Workers keep their lease until the last request is out.
        self.stop_registry.send_replace(true);
        self.service.registry.close();
        let mut registry = self.registry;
        if tokio::time::timeout(drain_max, &mut registry).await.is_err() {
            registry.abort();
        }
    }
}

async fn bind(door: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Bind { door, address, source })
}

fn address(door: &'static str, listener: &TcpListener) -> Result<SocketAddr, StartError> {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    listener.local_addr().map_err(|source| StartError::Bind { door, address: unknown, source })
}

/// Resolves when told to stop, or when nobody is left to tell.
async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn ended<E: std::error::Error>(door: &'static str, served: Result<(), E>) {
    match served {
        Ok(()) => info!(door, "door closed"),
        Err(error) => error!(door, %error, "door failed"),
    }
}
