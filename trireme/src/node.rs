//! One role of a cluster, put together: the only place that knows all crates at once.
//!
//! A worker's parts are made here in dependency order (fabric, experts, engine, hand-off end) and given to the
//! role, which never learns whether its experts are local or remote, or which transport carries them.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use compute::Cpu;
use engine::{BlockRows, Engine, EngineOptions, ExpertBank, Experts, KvTier, LocalExperts};
use expert::{Placement, RemoteExperts, RemoteOptions, WireFormats};
use fabric::{Fabric, QuicOptions, RdmaOptions};
use kvtransfer::{Rails, Receiver, ReceiverOptions};
use model::{
    ChatTemplate, Checkpoint, Device, ExecutionFingerprint, GenerationDefaults, ModelConfig, Tokenizer,
};
use proto::{security::Identity, ticket::LEASE_MAX};
use router::ServedModel;

use crate::{
    admin::{self, Admin},
    cli::RoleArgs,
    config::{Config, Role, Worker},
    identity, progress,
};

/// From a dispatch to its combine; longer than the 1.5 s of silence after which the fabric gives a peer up.
const EXPERT_TIMEOUT: Duration = Duration::from_secs(4);

/// What every role of one process shares.
#[derive(Clone)]
pub struct Surroundings {
    /// The cluster's description.
    pub config: Arc<Config>,
    /// What this process proves itself with.
    pub identity: Identity,
    /// The mapped weights.
    pub checkpoint: Arc<Checkpoint>,
    /// Control addresses of the routers.
    pub routers: Vec<String>,
    /// Fabric addresses of the expert workers, by rank. Empty: experts are local.
    pub experts: Vec<String>,
    /// Whether a supervisor reads this process' standard output.
    pub supervised: bool,
}

/// A running worker of any tier.
pub enum Handle {
    /// A prefill worker.
    Prefill(Box<prefill::Handle>),
    /// A decode worker.
    Decode(Box<decode::Handle>),
    /// An expert worker.
    Expert(expert::Handle),
}

impl Handle {
    /// Its metrics in Prometheus' text format.
    pub fn metrics_text(&self) -> String {
        match self {
            Self::Prefill(handle) => handle.metrics_text(),
            Self::Decode(handle) => handle.metrics_text(),
            Self::Expert(handle) => handle.metrics_text(),
        }
    }

    /// Resolves when the worker ended by itself: its invariants no longer hold, and it must be started anew.
    pub async fn wait(&self) {
        match self {
            Self::Prefill(handle) => handle.wait().await,
            Self::Decode(handle) => handle.wait().await,
            Self::Expert(handle) => handle.wait().await,
        }
    }

    /// Ends what runs, in bounded time.
    pub async fn shutdown(self) {
        match self {
            Self::Prefill(handle) => handle.shutdown().await,
            Self::Decode(handle) => handle.shutdown().await,
            Self::Expert(handle) => handle.shutdown().await,
        }
    }
}

/// Runs one role of the configured cluster until it is told to stop.
pub async fn run(role: Role, args: RoleArgs) -> anyhow::Result<()> {
    let begin = Instant::now();
    let config = Config::load(&args.config)?;
    let security =
        config.security.as_ref().context("configuration: security: needed outside of one process")?;
    let surroundings = Surroundings {
        identity: identity::load(security)?,
        checkpoint: open_checkpoint(&config)?,
        routers: vec![config.router.control_listen.to_string()],
        experts: config.workers_of(Role::Expert).map(|w| format!("quic://{}", w.fabric)).collect(),
        supervised: args.supervised,
        config: Arc::new(config),
    };
    let stop = stop_requested(args.supervised);
    if role == Role::Router {
        let handle = start_router(&surroundings).await?;
        tracing::info!(
            http = %handle.http_address(), grpc = %handle.grpc_address(), control = %handle.control_address(),
            start_ms = begin.elapsed().as_millis() as u64, "router is up"
        );
        stop.await;
        handle.shutdown().await;
        return Ok(());
    }
    let worker = chosen(&surroundings.config, role, args.id.as_deref())?.clone();
    let incarnation = rand::random();
    let ends = quic(&surroundings.config, &worker, incarnation, &surroundings.identity)?;
    let handle = Arc::new(start_worker(&surroundings, &worker, ends.clone(), incarnation).await?);
    let admin = match worker.admin {
        Some(address) => {
            let source = handle.clone();
            Some(Admin::start(address, move || admin::with_fabric(&source.metrics_text(), &ends)).await?)
        }
        None => None,
    };
    tracing::info!(
        worker = worker.id, incarnation, config = ?surroundings.config.engine,
        start_ms = begin.elapsed().as_millis() as u64, "worker is up"
    );
    let ended = tokio::select! {
        () = stop => false,
        () = handle.wait() => true,
    };
    if let Some(admin) = admin {
        admin.shutdown().await;
    }
    match Arc::into_inner(handle) {
        Some(handle) => handle.shutdown().await,
        None => tracing::warn!("the worker is still being looked at; it ends with the process"),
    }
    anyhow::ensure!(!ended, "the device thread of {} ended", worker.id);
    Ok(())
}

/// Serves the front doors.
pub async fn start_router(surroundings: &Surroundings) -> anyhow::Result<router::Handle> {
    let Surroundings { config, identity, checkpoint, .. } = surroundings;
    let directory = checkpoint.dir();
    let model = ServedModel {
        id: config.model.served_id(),
        config: checkpoint.config().clone(),
        tokenizer: Tokenizer::open(directory)?,
        template: ChatTemplate::open(directory)?,
        defaults: GenerationDefaults::open(directory, checkpoint.config())?,
    };
    let mut settings = config.router.clone();
    // No expert has a second holder yet: with one expert worker missing no request can be answered.
    settings.expert_workers_min = settings.expert_workers_min.max(config.workers_of(Role::Expert).count());
    Ok(router::start(settings, router::Node { identity: identity.clone(), model }).await?)
}

/// Loads what the worker needs and starts it on its ends of the fabric, one for each rail.
pub async fn start_worker(
    surroundings: &Surroundings,
    worker: &Worker,
    mut ends: Vec<Fabric>,
    incarnation: u64,
) -> anyhow::Result<Handle> {
    anyhow::ensure!(!ends.is_empty(), "{}: no end of the fabric", worker.id);
    let fabric = ends.remove(0);
    let rails = ends;
    let Surroundings { config, identity, routers, .. } = surroundings;
    let (worker_id, identity, routers) = (worker.id.clone(), identity.clone(), routers.clone());
    let handle = match worker.role {
        Role::Expert => {
            let parts = blocking(surroundings, worker, load_experts).await?;
            let mut settings = config.expert.clone();
            settings.listen = worker.control;
            let (bank, placement, rank, cpu, fingerprint) = parts;
            let node = expert::Node {
                worker_id,
                incarnation,
                identity,
                routers,
                fabric,
                bank,
                placement,
                rank,
                cpu,
                fingerprint,
            };
            Handle::Expert(expert::start(settings, node).await?)
        }
        Role::Prefill => {
            let experts_fabric = fabric.clone();
            let (engine, tier) =
                blocking(surroundings, worker, move |s, w| load_engine(s, w, &experts_fabric, incarnation))
                    .await?;
            let mut settings = config.prefill.clone();
            settings.listen = worker.control;
            let fabric_address = fabric.address();
            let sender = kvtransfer::Sender::new(Rails::new(fabric, rails));
            let node = prefill::Node {
                worker_id,
                incarnation,
                identity,
                routers,
                fabric_address,
                sender,
                engine,
                tier,
            };
            Handle::Prefill(Box::new(prefill::start(settings, node).await?))
        }
        Role::Decode => {
            let experts_fabric = fabric.clone();
            let (engine, tier) =
                blocking(surroundings, worker, move |s, w| load_engine(s, w, &experts_fabric, incarnation))
                    .await?;
            let mut settings = config.decode.clone();
            settings.listen = worker.control;
            let fabric_address = fabric.address();
            let receiver = Receiver::new(
                Rails::new(fabric, rails),
                ReceiverOptions {
                    worker_id: worker_id.clone(),
                    incarnation,
                    fingerprint: engine.fingerprint().clone(),
                    layout: engine.kv_layout().clone(),
                    lease: ReceiverOptions::LEASE,
                    // A prompt may wait in prefill's queue for as long as its request may live. Whoever dies is
                    // noticed long before: by the router's streams, whose end revokes the ticket.
                    reserve: Duration::from_millis(config.router.deadline_ms_max).min(LEASE_MAX),
                    tickets_max: settings.sequences_max,
                },
            );
            let node = decode::Node {
                worker_id,
                incarnation,
                identity,
                routers,
                fabric_address,
                receiver,
                engine,
                tier,
                prefill_beside: prefill_beside(&config.workers, worker),
            };
            Handle::Decode(Box::new(decode::start(settings, node).await?))
        }
        Role::Router => anyhow::bail!("{}: the router is not a worker", worker.id),
    };
    Ok(handle)
}

/// A worker's QUIC endpoints: the one that everybody knows, and one for each further rail.
pub fn quic(
    config: &Config,
    worker: &Worker,
    incarnation: u64,
    identity: &Identity,
) -> anyhow::Result<Vec<Fabric>> {
    let addresses = std::iter::once(&worker.fabric).chain(&worker.fabric_rails);
    addresses.map(|&bind| quic_end(config, worker, bind, incarnation, identity)).collect()
}

fn quic_end(
    config: &Config,
    worker: &Worker,
    bind: SocketAddr,
    incarnation: u64,
    identity: &Identity,
) -> anyhow::Result<Fabric> {
    Fabric::quic(QuicOptions {
        bind,
        ca_pem: identity.ca_pem.clone(),
        cert_pem: identity.cert_pem.clone(),
        key_pem: identity.key_pem.clone(),
        worker: worker.id.clone(),
        incarnation,
        limits: Default::default(),
        datagram_bytes: config.fabric.datagram_bytes,
        share_memory: config.fabric.share_memory,
        rdma: RdmaOptions { when: config.fabric.rdma.into(), library: config.fabric.nixl_library.clone() },
    })
    .with_context(|| format!("{}: fabric on {bind}", worker.id))
}

/// The static placement: contiguous shares, one for each expert worker.
fn placement(surroundings: &Surroundings) -> anyhow::Result<Placement> {
    let model = surroundings.checkpoint.config();
    // One module drafts, however many the checkpoint has.
    let end = model.num_hidden_layers + usize::from(surroundings.config.engine.mtp.applies_to(model));
    let layers: Vec<usize> = model.moe_layers().filter(|&layer| layer < end).collect();
    Ok(Placement::contiguous(layers, model.n_routed_experts, surroundings.experts.len())?)
}

/// Reads a checkpoint and checks that the configuration suits it.
pub fn open_checkpoint(config: &Config) -> anyhow::Result<Arc<Checkpoint>> {
    let checkpoint = Checkpoint::open(&config.model.path)?;
    config.validate_for(checkpoint.config())?;
    engine_options(config, checkpoint.config(), Device::Cpu, 1).kv_layout(checkpoint.config())?;
    Ok(Arc::new(checkpoint))
}

/// Whether a prefill worker is on the same device of the same host: a GPU, or the cores that all workers of a host share.
fn prefill_beside(workers: &[Worker], worker: &Worker) -> bool {
    let same = |other: &&Worker| other.device == worker.device && other.control.ip() == worker.control.ip();
    workers.iter().any(|other| other.role == Role::Prefill && same(&other))
}

fn engine_options(
    config: &Config,
    checkpoint: &ModelConfig,
    device: Device,
    threads: usize,
) -> EngineOptions {
    let Config { model, engine, .. } = config;
    EngineOptions {
        device,
        numerics: model.numerics,
        kv_format: model.kv_format,
        kv_blocks_max: engine.kv_blocks_max,
        threads,
        step_tokens_max: engine.step_tokens_max,
        mtp: engine.mtp.applies_to(checkpoint),
    }
}

/// The engine, and what lies behind its KV pool.
fn load_engine(
    surroundings: &Surroundings,
    worker: &Worker,
    fabric: &Fabric,
    incarnation: u64,
) -> anyhow::Result<(Engine, KvTier)> {
    let engine = load_model(surroundings, worker, fabric, incarnation)?;
    let config = &surroundings.config;
    let drafts = worker.role == Role::Prefill || config.decode.draft_tokens_max > 0;
    let rows = if engine.has_mtp() && drafts { BlockRows::LayersAndMtp } else { BlockRows::Layers };
    let options = config.cache.options(&worker.id);
    let tier = KvTier::open(&options, engine.kv_layout(), engine.fingerprint(), rows)
        .with_context(|| format!("{}: [cache]", worker.id))?;
    Ok((engine, tier))
}

fn load_model(
    surroundings: &Surroundings,
    worker: &Worker,
    fabric: &Fabric,
    incarnation: u64,
) -> anyhow::Result<Engine> {
    let Surroundings { config, checkpoint, experts, .. } = surroundings;
    let numerics = config.model.numerics;
    let options = engine_options(config, checkpoint.config(), worker.device, worker.threads);
    if experts.is_empty() && worker.device != Device::Cpu {
        let bar = progress::Weights::new(&worker.id, "weights and experts", surroundings.supervised);
        return Ok(Engine::load_with_experts(checkpoint, &options, &mut |d, t| bar.at(d, t))?);
    }
    let experts: Box<dyn Experts> = if experts.is_empty() {
        let bar = progress::Weights::new(&worker.id, "experts", surroundings.supervised);
        Box::new(LocalExperts::new(ExpertBank::load_all(checkpoint, numerics, options.mtp, &mut |d, t| {
            bar.at(d, t)
        })?))
    } else {
        let options = RemoteOptions {
            placement: placement(surroundings)?,
            workers: experts.clone(),
            incarnation,
            wire: WireFormats::new(checkpoint.config(), numerics),
            timeout: EXPERT_TIMEOUT,
        };
        Box::new(RemoteExperts::new(fabric.clone(), options)?)
    };
    let bar = progress::Weights::new(&worker.id, "weights", surroundings.supervised);
    Ok(Engine::load(checkpoint, &options, experts, &mut |d, t| bar.at(d, t))?)
}

type ExpertParts = (ExpertBank, Placement, usize, Cpu, ExecutionFingerprint);

fn load_experts(surroundings: &Surroundings, worker: &Worker) -> anyhow::Result<ExpertParts> {
    let Surroundings { config, checkpoint, .. } = surroundings;
    let placement = placement(surroundings)?;
    let rank = config
        .workers_of(Role::Expert)
        .position(|w| w.id == worker.id)
        .with_context(|| format!("{} is not in the configuration", worker.id))?;
    let bar = progress::Weights::new(&worker.id, "experts", surroundings.supervised);
    let (share, numerics) = (placement.share(rank), config.model.numerics);
    let bank = ExpertBank::load_on(worker.device, checkpoint, &share, numerics, &mut |d, t| bar.at(d, t))?;
    let cpu = Cpu::new(worker.threads);
    let options = engine_options(config, checkpoint.config(), worker.device, worker.threads);
    let layout = options.kv_layout(checkpoint.config())?;
    let fingerprint = engine::execution_fingerprint(checkpoint, &layout, numerics, bank.backend(&cpu));
    Ok((bank, placement, rank, cpu, fingerprint))
}

/// Loading maps and copies gigabytes: off the runtime's threads.
async fn blocking<T: Send + 'static>(
    surroundings: &Surroundings,
    worker: &Worker,
    load: impl FnOnce(&Surroundings, &Worker) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (surroundings, worker) = (surroundings.clone(), worker.clone());
    tokio::task::spawn_blocking(move || {
        load(&surroundings, &worker).with_context(|| format!("loading {}", worker.id))
    })
    .await
    .context("the loading thread panicked")?
}

fn chosen<'a>(config: &'a Config, role: Role, id: Option<&str>) -> anyhow::Result<&'a Worker> {
    let worker = match id {
        Some(id) => config.worker(id)?,
        None => {
            let all: Vec<_> = config.workers_of(role).collect();
            match all[..] {
                [only] => only,
                _ => anyhow::bail!(
                    "the configuration has {} {} workers: say which with --id",
                    all.len(),
                    role.name()
                ),
            }
        }
    };
    anyhow::ensure!(
        worker.role == role,
        "{} is a {} worker, not {}",
        worker.id,
        worker.role.name(),
        role.name()
    );
    Ok(worker)
}

/// A signal, or the end of a supervised process' standard input.
async fn stop_requested(supervised: bool) {
    let supervisor_gone = async {
        if !supervised {
            return std::future::pending().await;
        }
        // A thread of its own: a blocking read of standard input cannot be cancelled, and must not keep
        // the runtime from ending.
        let (gone, heard) = tokio::sync::oneshot::channel();
        let spawned = std::thread::Builder::new().name("supervisor-watch".to_owned()).spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            let _ = gone.send(());
        });
        match spawned {
            Ok(_) => drop(heard.await),
            Err(error) => tracing::error!(%error, "cannot watch for the supervisor's end"),
        }
    };
    let signal = async {
        let kind = tokio::signal::unix::SignalKind::terminate();
        match tokio::signal::unix::signal(kind) {
            Ok(mut terminate) => {
                tokio::select! {
                    _ = tokio::signal::ctrl_c() => {}
                    _ = terminate.recv() => {}
                }
            }
            Err(error) => {
                tracing::error!(%error, "cannot listen for signals");
                std::future::pending().await
            }
        }
    };
    tokio::select! {
        () = supervisor_gone => {}
        () = signal => {}
    }
}
