//! Clusters for the end-to-end tests, and clients that know nothing of their insides.
#![allow(dead_code)] // each test file uses its part

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use bench::client::Client;
use clap::Parser as _;
use model::Device;
use proto::v1::{
    GenerateRequest, GeneratedToken, Sampling, Stopping, TokenIds, generate_request::Prompt,
    inference_client::InferenceClient,
};
use tonic::transport::Channel;
use trireme::{
    cluster::{self, Carrier, Cluster, Options},
    config::Config,
    up::Shape,
};

/// Nothing in a test takes this long; a hang fails instead of lasting for ever.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The repository's root, which a machine that has only the built tests names in `TRIREME_ROOT`.
pub fn repository() -> PathBuf {
    let root = std::env::var_os("TRIREME_ROOT")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from);
    root.canonicalize().expect("the workspace")
}

/// What workers compute on: the CPU, or what `TRIREME_TEST_DEVICE` names.
pub fn device() -> Device {
    match std::env::var("TRIREME_TEST_DEVICE") {
        Ok(name) => name.parse().expect("TRIREME_TEST_DEVICE is a device"),
        Err(_) => Device::Cpu,
    }
}

pub fn fixture(name: &str) -> PathBuf {
    repository().join("fixtures").join(name)
}

pub fn demo() -> PathBuf {
    repository().join("model/tiny")
}

/// The golden checkpoints.
pub const FIXTURES: [&str; 5] = ["v3_bf16", "v3_fp8_mtp", "v3_fp8_aligned", "v2_lite", "v2_group"];

#[derive(clap::Parser)]
struct ShapeOnly {
    #[command(flatten)]
    shape: Shape,
}

/// What `trireme up` would make of these flags.
pub fn shape(flags: &str) -> Shape {
    ShapeOnly::parse_from(["shape"].into_iter().chain(USUAL).chain(flags.split_whitespace())).shape
}

/// On a machine that does much else nobody is refused for being slow; and hand-offs are what most tests look at.
const USUAL: [&str; 4] = ["--ttft-ms-max", "120000", "--prefill-on-decode", "never"];

pub async fn in_process(model: &Path, flags: &str, carrier: Carrier) -> Cluster {
    in_process_with(model, flags, carrier, |_| {}).await
}

/// The same with settings that have no flag.
pub async fn in_process_with(
    model: &Path,
    flags: &str,
    carrier: Carrier,
    change: impl FnOnce(&mut Config),
) -> Cluster {
    let shape = Shape { model: Some(model.to_owned()), ..shape(flags) };
    let mut config = shape.in_process_config().expect("a configuration");
    change(&mut config);
    cluster::start(config, Options { carrier }).await.expect("a cluster")
}

pub fn http(base: &str) -> Client {
    Client::new(base, None, PATIENCE).expect("a client")
}

/// One greedy or seeded request by token ids; the answer's tokens with their log-probabilities.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub max_tokens: u32,
    pub ignore_eos: bool,
    pub sampling: Sampling,
}

pub async fn grpc(address: std::net::SocketAddr) -> InferenceClient<Channel> {
    InferenceClient::connect(format!("http://{address}")).await.expect("the gRPC door")
}

pub async fn ask(
    mut client: InferenceClient<Channel>,
    ask: &Ask,
) -> Result<Vec<GeneratedToken>, tonic::Status> {
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: ask.prompt.clone() })),
        sampling: Some(ask.sampling.clone()),
        stopping: Some(Stopping {
            max_tokens: Some(ask.max_tokens),
            ignore_eos: ask.ignore_eos,
            ..Default::default()
        }),
        ..Default::default()
    };
    let run = async {
        let mut stream = client.generate(request).await?.into_inner();
        let mut tokens = Vec::new();
        while let Some(message) = stream.message().await? {
            tokens.extend(message.tokens);
        }
        Ok(tokens)
    };
    tokio::time::timeout(PATIENCE, run).await.expect("an answer in time")
}

/// A token's id, the bits of its log-probability, and those of the alternatives.
pub type TokenBits = (u32, Option<u32>, Vec<(u32, u32)>);

/// Token ids and the bits of every log-probability: what "the same answer" means.
pub fn bits(tokens: &[GeneratedToken]) -> Vec<TokenBits> {
    tokens
        .iter()
        .map(|t| {
            let top = t.top.iter().map(|l| (l.token_id, l.logprob.to_bits())).collect();
            (t.token_id, t.logprob.map(f32::to_bits), top)
        })
        .collect()
}

/// `trireme up` as a user starts it: processes, sockets, supervisor.
pub struct Up {
    child: Child,
    pub url: String,
    pub grpc: String,
    /// Worker id and process id, from the screen.
    pub workers: Vec<(String, u32)>,
    /// Where logs and configuration lie.
    pub state: PathBuf,
    pub screen: Vec<String>,
}

impl Up {
    pub fn start(flags: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_trireme"))
            .args(["up", "--port", "0", "--grpc-port", "0"])
            .args(USUAL)
            .args(flags.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the binary starts");
        let mut screen = Vec::new();
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        for line in lines.by_ref() {
            let line = line.expect("text");
            let last = line.starts_with("Ctrl-C");
            screen.push(line);
            if last {
                break;
            }
        }
        // What it says later must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let find = |mark: &str| {
            let line = screen
                .iter()
                .find(|l| l.contains(mark))
                .unwrap_or_else(|| panic!("no {mark:?}: {screen:#?}"));
            let (_, rest) = line.split_once(mark).expect("found");
            rest.trim_start().split([',', ' ']).next().expect("a word").to_owned()
        };
        let (url, grpc) = (find("HTTP "), format!("http://{}", find("gRPC ")));
        let state = PathBuf::from(find("configuration: "));
        let workers = screen
            .iter()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (id, pid) = (words.next()?, words.next()?.parse().ok()?);
                let known = ["router", "prefill-", "decode-", "expert-"].iter().any(|p| id.starts_with(p));
                known.then(|| (id.to_owned(), pid))
            })
            .collect();
        Self { child, url, grpc, workers, state, screen }
    }

    pub fn kill_worker(&self, id: &str) {
        let (_, pid) = self.workers.iter().find(|(w, _)| w == id).expect("a worker");
        let status = Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill");
        assert!(status.success(), "kill -9 {id}");
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        let _ = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status();
    }

    /// Ctrl-C, and the exit code.
    pub fn stop(mut self) -> Option<i32> {
        self.interrupt();
        self.child.wait().expect("it ends").code()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
