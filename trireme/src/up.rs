//! `trireme up`: a whole cluster on this machine with one command, every role its own process, supervised, and a
//! first answer before the prompt comes back.

mod screen;
mod state_directory;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bench::client::Client;
use model::{Device, KvFormat, Numerics};
use router::PrefillOnDecode;
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};

use screen::{View, greet};
use state_directory::StateDirectory;

use crate::{
    cluster,
    config::{Config, ModelSection, Mtp, Role, Worker},
    identity, progress, ready,
    supervisor::{ProcessSpec, Supervisor},
};

/// A laptop loads the demo model in well under a second, a large checkpoint takes its time.
const READY_TIMEOUT: Duration = Duration::from_secs(1800);
/// A process that died this often before the cluster was ready will not get better.
const START_DEATHS_MAX: u64 = 3;

/// What a cluster consists of.
#[derive(Debug, Clone, clap::Args)]
pub struct Shape {
    /// A checkpoint folder in the Hugging Face layout. Default: the demo model of this repository.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// `fp8` to serve, `reference` to compare with golden values.
    #[arg(long, default_value = "fp8")]
    pub numerics: Numerics,
    /// What KV rows are stored in: fp8, bf16 or f32. Default: f32 in `reference`, fp8 otherwise.
    #[arg(long)]
    pub kv_format: Option<KvFormat>,
    /// Prefill workers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub prefill: u16,
    /// Decode workers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub decode: u16,
    /// Expert workers; 0 keeps the experts inside prefill and decode. Default: 2, on a GPU 0.
    #[arg(long, value_parser = clap::value_parser!(u16).range(0..=256))]
    pub expert: Option<u16>,
    /// What the workers compute on: cpu or cuda:N; several, with commas between them, are taken in turn by prefill, decode and
    /// expert workers: with cuda:0,cuda:1 prefill is on the first, decode on the second.
    #[arg(long, value_delimiter = ',', num_args = 1, default_value = "cpu")]
    pub device: Vec<Device>,
    /// Threads of each worker's device. Default: the machine's cores divided among the workers.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// KV blocks of 64 tokens in each pool.
    #[arg(long)]
    pub kv_blocks_max: Option<usize>,
    /// Bytes of host memory in which each prefill and decode worker keeps KV blocks that its pool has no room for; 0: none.
    #[arg(long)]
    pub cache_host_bytes: Option<usize>,
    /// Bytes on disk of each of them, behind that.
    #[arg(long, requires = "cache_disk_path", default_value_t = 0)]
    pub cache_disk_bytes: usize,
    /// Where these are; what is there outlives the workers.
    #[arg(long, requires = "cache_disk_bytes")]
    pub cache_disk_path: Option<PathBuf>,
    /// Whether decode drafts tokens with the checkpoint's MTP module: answers are the same, sooner.
    #[arg(long, value_enum, default_value_t = Mtp::Auto)]
    pub mtp: Mtp,
    /// Which prompts decode computes instead of having them handed over: auto, never or always.
    #[arg(long, default_value = "auto")]
    pub prefill_on_decode: PrefillOnDecode,
    /// The router's objective, milliseconds to the first token: a request that cannot be expected to meet it gets 429.
    #[arg(long)]
    pub ttft_ms_max: Option<u64>,
    /// Sequences that the router lets in at once.
    #[arg(long)]
    pub sequences_max: Option<usize>,
    /// Requests that may wait at the router.
    #[arg(long)]
    pub queue_max: Option<usize>,
}

/// Flags of `trireme up`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What to start.
    #[command(flatten)]
    pub shape: Shape,
    /// Port of the HTTP front door on loopback; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Port of the gRPC front door; 0 takes a free one. Default: the HTTP port plus one.
    #[arg(long)]
    pub grpc_port: Option<u16>,
    /// Every role in this one process: for debuggers and small machines.
    #[arg(long)]
    pub in_process: bool,
    /// Do not ask the first question.
    #[arg(long)]
    pub quiet: bool,
}

/// The model of this repository, where the binary was built in a clone of it.
pub fn demo_model() -> anyhow::Result<PathBuf> {
    let beside_sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tiny");
    for path in [PathBuf::from("model/tiny"), beside_sources] {
        if path.join("config.json").is_file() {
            return Ok(path.canonicalize()?);
        }
    }
    bail!("the demo model (model/tiny) is not here; name a checkpoint with --model DIR")
}

impl Shape {
    /// A cluster whose roles share this process: every port is the system's choice.
    pub fn in_process_config(&self) -> anyhow::Result<Config> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        self.config(any, any, any, || Ok(any))
    }

    fn config(
        &self,
        http: SocketAddr,
        grpc: SocketAddr,
        control: SocketAddr,
        mut address: impl FnMut() -> anyhow::Result<SocketAddr>,
    ) -> anyhow::Result<Config> {
        let demo = self.model.is_none();
        let path = match &self.model {
            Some(path) => path.canonicalize().with_context(|| format!("--model {}", path.display()))?,
            None => demo_model()?,
        };
        let mut config = Config {
            model: ModelSection {
                path,
                id: demo.then(|| "trireme-tiny".to_owned()),
                numerics: self.numerics,
                kv_format: self.kv_format,
            },
            security: None,
            engine: Default::default(),
            cache: Default::default(),
            fabric: Default::default(),
            router: Default::default(),
            prefill: Default::default(),
            decode: Default::default(),
            expert: Default::default(),
            workers: Vec::new(),
        };
        config.engine.mtp = self.mtp;
        if let Some(blocks) = self.kv_blocks_max {
            config.engine.kv_blocks_max = blocks;
        }
        if let Some(bytes) = self.cache_host_bytes {
            config.cache.host_bytes = bytes;
        }
        config.cache.disk_bytes = self.cache_disk_bytes;
        config.cache.disk_path.clone_from(&self.cache_disk_path);
        config.router.prefill_on_decode = self.prefill_on_decode;
        if let Some(ms) = self.ttft_ms_max {
            config.router.ttft_ms_max = ms;
            config.router.batch_ttft_ms_max = config.router.batch_ttft_ms_max.max(ms);
        }
        if let Some(sequences) = self.sequences_max {
            config.router.sequences_max = sequences;
        }
        if let Some(requests) = self.queue_max {
            config.router.queue_max = requests;
        }
        config.router.http_listen = http;
        config.router.grpc_listen = grpc;
        config.router.control_listen = control;
        let expert = self.expert.unwrap_or(if self.device.contains(&Device::Cpu) { 2 } else { 0 });
        let workers = usize::from(self.prefill + self.decode + expert);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.map_or_else(|| (cores / workers).max(1), usize::from);
        let (prefill, decode) = (usize::from(self.prefill), usize::from(self.decode));
        for (role, count, before) in [
            (Role::Expert, expert, prefill + decode),
            (Role::Prefill, self.prefill, 0),
            (Role::Decode, self.decode, prefill),
        ] {
            for i in 0..count {
                config.workers.push(Worker {
                    id: format!("{}-{i}", role.name()),
                    role,
                    control: address()?,
                    fabric: address()?,
                    fabric_rails: Vec::new(),
                    admin: Some(address()?),
                    device: self.device[(before + usize::from(i)) % self.device.len()],
                    threads,
                });
            }
        }
        config.validate()?;
        Ok(config)
    }
}

/// Starts, shows, asks, and stays until Ctrl-C.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut stop = Stop::listen()?;
    let http = SocketAddr::from((Ipv4Addr::LOCALHOST, args.port));
    let grpc_port = match (args.grpc_port, args.port) {
        (Some(port), _) => port,
        (None, 0) => 0,
        (None, port) => port.checked_add(1).context("--port leaves no port for gRPC; give --grpc-port")?,
    };
    let grpc = SocketAddr::from((Ipv4Addr::LOCALHOST, grpc_port));
    if args.in_process {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let config = args.shape.config(http, grpc, any, || Ok(any))?;
        let cluster = cluster::start(config.clone(), cluster::Options::default()).await?;
        let view = View::of_cluster(&config, &cluster)?;
        let outcome = until(&mut stop, greet(&args, &view, begin)).await;
        cluster.shutdown().await;
        return outcome;
    }
    let mut ports = Ports::default();
    let (http, grpc) = (ports.fixed("--port", http)?, ports.fixed("--grpc-port", grpc)?);
    let control = ports.free()?;
    let mut config = args.shape.config(http, grpc, control, || ports.free())?;
    let state = StateDirectory::create()?;
    config.security = Some(identity::store(&identity::generate()?, &state.path)?);
    let file = state.path.join("cluster.toml");
    std::fs::write(&file, toml::to_string(&config)?)
        .with_context(|| format!("writing {}", file.display()))?;
    // Checked here, so that a wrong checkpoint is one message and not one of each process.
    let view = View::of_config(&config)?;
    drop(ports);
    let supervisor = Supervisor::start(processes(&config, &state.path, &file)?)?;
    let started = async {
        ready(&view, &supervisor).await?;
        greet(&args, &View { supervisor: Some(&supervisor), state: Some(&state.path), ..view }, begin).await
    };
    let outcome = until(&mut stop, started).await;
    supervisor.stop().await;
    if outcome.is_err() {
        state.keep();
    }
    outcome
}

/// Runs the start, then waits; a wish to stop ends either.
async fn until(stop: &mut Stop, started: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::select! {
        outcome = started => outcome?,
        () = stop.asked() => return Ok(()),
    }
    stop.asked().await;
    Ok(())
}

fn processes(config: &Config, state: &Path, file: &Path) -> anyhow::Result<Vec<ProcessSpec>> {
    let program = std::env::current_exe().context("finding this program's own file")?;
    let spec = |id: &str, role: Role| {
        let mut arguments = vec![role.name().to_owned(), "--config".to_owned(), file.display().to_string()];
        if role != Role::Router {
            arguments.extend(["--id".to_owned(), id.to_owned()]);
        }
        arguments.push("--supervised".to_owned());
        ProcessSpec {
            id: id.to_owned(),
            program: program.clone(),
            arguments,
            log: state.join(format!("{id}.log")),
            // The router drains first; the experts are needed until the last token is out.
            stop_order: match role {
                Role::Router => 0,
                Role::Prefill | Role::Decode => 1,
                Role::Expert => 2,
            },
        }
    };
    let mut specs = vec![spec("router", Role::Router)];
    specs.extend(config.workers.iter().map(|worker| spec(&worker.id, worker.role)));
    Ok(specs)
}

/// Waits until the router says that every tier is there.
async fn ready(view: &View<'_>, supervisor: &Supervisor) -> anyhow::Result<()> {
    let client = Client::new(&view.url(), None, Duration::from_secs(5))?;
    let router = supervisor.processes().iter().find(|p| p.spec.id == "router");
    // Another cluster may hold the port: its health is not ours.
    let ours = |body: &Value| router.is_some_and(|router| body["pid"] == router.pid());
    let bar = progress::cluster_weights();
    let watch = || {
        let (done, total) = supervisor
            .processes()
            .iter()
            .map(|process| process.loading())
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        bar.set_length(total);
        bar.set_position(done);
        let Some(dying) = supervisor.processes().iter().find(|p| p.restarts() >= START_DEATHS_MAX) else {
            return Ok(());
        };
        let log = std::fs::read_to_string(&dying.spec.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(12)..].join("\n");
        bail!("{} keeps dying; the end of {}:\n{end}", dying.spec.id, dying.spec.log.display())
    };
    let outcome = ready::wait(&client, READY_TIMEOUT, ours, watch).await;
    bar.finish_and_clear();
    outcome
}

/// Ctrl-C, and what a service manager sends, from the moment that it is made.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
        println!("\nStopping.");
    }
}

/// Ports that are free now, held until every one is chosen so that none is given twice.
#[derive(Default)]
struct Ports(Vec<(TcpListener, UdpSocket)>);

impl Ports {
    fn free(&mut self) -> anyhow::Result<SocketAddr> {
        for _ in 0..64 {
            let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("finding a free port")?;
            let address = tcp.local_addr()?;
            if let Ok(udp) = UdpSocket::bind(address) {
                self.0.push((tcp, udp));
                return Ok(address);
            }
        }
        bail!("no port is free for both TCP and UDP")
    }

    fn fixed(&mut self, flag: &str, address: SocketAddr) -> anyhow::Result<SocketAddr> {
        if address.port() == 0 {
            return self.free();
        }
        TcpListener::bind(address).with_context(|| format!("{flag}: {address} cannot be used"))?;
        Ok(address)
    }
}
