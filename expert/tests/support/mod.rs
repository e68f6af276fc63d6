//! Expert workers on both transports, and batches with the answer they must get.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use compute::{Activations, Cpu};
use engine::{EngineOptions, ExpertBank, ExpertBatch, Experts, ExpertsError, LocalExperts};
use expert::{Config, Handle, Node, Placement, RemoteExperts, RemoteOptions, WireFormats, moe_layers};
use fabric::{Fabric, Hub, Limits, QuicOptions};
use model::{Checkpoint, Device, ExecutionFingerprint, KvFormat, KvLayout, Numerics};
use proto::security::Identity;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// For tests that expect an answer: far above what any machine takes, so that only a hang meets it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What experts and engines are tested on: the CPU, or what `TRIREME_TEST_DEVICE` names.
pub fn device() -> Device {
    match std::env::var("TRIREME_TEST_DEVICE") {
        Ok(name) => name.parse().expect("TRIREME_TEST_DEVICE is a device"),
        Err(_) => Device::Cpu,
    }
}

pub fn checkpoint(fixture: &str) -> Checkpoint {
    // A machine that has only the built tests names the repository's root.
    let root = std::env::var_os("TRIREME_ROOT")
        .map_or_else(|| [env!("CARGO_MANIFEST_DIR"), ".."].iter().collect(), PathBuf::from);
    Checkpoint::open(root.join("fixtures").join(fixture)).expect("the fixture lies in the repository")
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// A cluster's certificates.
pub fn identity() -> Identity {
    let ca_key = KeyPair::generate().expect("key");
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).expect("certificate").pem();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().expect("key");
    let node = CertificateParams::new(vec!["trireme".to_owned()]).expect("name");
    let cert_pem = node.signed_by(&key, &issuer).expect("certificate").pem();
    Identity { ca_pem, cert_pem, key_pem: key.serialize_pem() }
}

/// Where ends of the fabric find each other.
pub enum Network {
    InProcess(Hub),
    Quic { identity: Identity, share_memory: bool },
}

impl Network {
    pub fn in_process() -> Self {
        Self::InProcess(Hub::new())
    }

    pub fn quic() -> Self {
        Self::Quic { identity: identity(), share_memory: false }
    }

    /// Ends of one host that share memory.
    pub fn shared() -> Self {
        Self::Quic { identity: identity(), share_memory: true }
    }

    pub fn join(&self, worker: &str, incarnation: u64) -> Fabric {
        self.join_with(worker, incarnation, Limits::default())
    }

    pub fn join_with(&self, worker: &str, incarnation: u64, limits: Limits) -> Fabric {
        match self {
            Self::InProcess(hub) => Fabric::in_process(hub, worker, incarnation, limits),
            Self::Quic { identity, share_memory } => Fabric::quic(QuicOptions {
                bind: SocketAddr::from(([127, 0, 0, 1], 0)),
                ca_pem: identity.ca_pem.clone(),
                cert_pem: identity.cert_pem.clone(),
                key_pem: identity.key_pem.clone(),
                worker: worker.to_owned(),
                incarnation,
                limits,
                datagram_bytes: None,
                share_memory: *share_memory,
                rdma: Default::default(),
            }),
        }
        .expect("an end of the fabric")
    }
}

/// One running worker.
pub struct Worker {
    pub handle: Handle,
    pub fabric: Fabric,
}

impl Worker {
    pub fn start(
        checkpoint: &Checkpoint,
        numerics: Numerics,
        placement: &Placement,
        rank: usize,
        fabric: Fabric,
    ) -> Self {
        let share = placement.share(rank);
        let bank = ExpertBank::load_on(device(), checkpoint, &share, numerics, &mut |_, _| {});
        let layout = KvLayout::for_model(checkpoint.config(), KvFormat::F32, 0);
        let node = Node {
            worker_id: format!("expert-{rank}"),
            incarnation: 1,
            identity: identity(),
            routers: Vec::new(),
            fabric: fabric.clone(),
            bank: bank.expect("experts"),
            placement: placement.clone(),
            rank,
            cpu: Cpu::new(1),
            fingerprint: ExecutionFingerprint {
                weights: checkpoint.weights_hash(),
                numerics,
                kv_layout_digest: layout.digest(),
                backend: "cpu".to_owned(),
                arithmetic_revision: 1,
            },
        };
        let handle = expert::start(Config::default(), node);
        let runtime = tokio::runtime::Handle::current();
        Self { handle: tokio::task::block_in_place(|| runtime.block_on(handle)).expect("a worker"), fabric }
    }

    /// Goes away as a killed process does, as far as its peers can tell.
    pub fn kill(self) {
        self.fabric.close();
        drop(self.handle);
    }
}

/// The placement over `workers` that a cluster of this checkpoint has.
pub fn placement(checkpoint: &Checkpoint, workers: usize) -> Placement {
    let config = checkpoint.config();
    Placement::contiguous(moe_layers(config), config.n_routed_experts, workers).expect("a placement")
}

pub fn remote(
    checkpoint: &Checkpoint,
    numerics: Numerics,
    placement: &Placement,
    workers: Vec<String>,
    fabric: Fabric,
    timeout: Duration,
) -> RemoteExperts {
    let options = RemoteOptions {
        placement: placement.clone(),
        workers,
        incarnation: 7,
        wire: WireFormats::new(checkpoint.config(), numerics),
        timeout,
    };
    RemoteExperts::new(fabric, options).expect("one address per rank")
}

pub fn local(checkpoint: &Checkpoint, numerics: Numerics) -> LocalExperts {
    let mtp = checkpoint.config().num_nextn_predict_layers > 0;
    let bank = ExpertBank::load_all_on(device(), checkpoint, numerics, mtp, &mut |_, _| {});
    LocalExperts::new(bank.expect("experts"))
}

/// Tokens of one layer with their chosen experts.
pub struct Batch {
    pub layer: usize,
    pub activations: Activations,
    pub topk: usize,
    pub ids: Vec<u16>,
    hidden: usize,
}

impl Batch {
    /// `tokens` random rows, each with distinct random experts. The same seed gives the same batch.
    pub fn random(
        checkpoint: &Checkpoint,
        numerics: Numerics,
        layer: usize,
        tokens: usize,
        seed: u64,
    ) -> Self {
        let config = checkpoint.config();
        let mut rng = StdRng::seed_from_u64(seed);
        let hidden = config.hidden_size;
        let rows: Vec<f32> = (0..tokens * hidden).map(|_| rng.random_range(-2.0..2.0)).collect();
        let mut activations = Activations::new();
        let format = engine::wire_activation_format(config, numerics);
        activations.prepare(&Cpu::new(1), &rows, tokens, hidden, format);
        let topk = config.num_experts_per_tok;
        let mut ids = Vec::new();
        for _ in 0..tokens {
            let start = ids.len();
            while ids.len() < start + topk {
                let id = rng.random_range(0..config.n_routed_experts as u16);
                if !ids[start..].contains(&id) {
                    ids.push(id);
                }
            }
        }
        Self { layer, activations, topk, ids, hidden }
    }

    pub fn as_expert_batch(&self) -> ExpertBatch<'_> {
        ExpertBatch {
            layer: self.layer,
            activations: &self.activations,
            topk: self.topk,
            expert_ids: &self.ids,
        }
    }

    pub fn vectors(&self) -> usize {
        self.ids.len()
    }

    /// One NaN-filled output: whatever is not written is seen.
    pub fn output(&self) -> Vec<f32> {
        vec![f32::NAN; self.ids.len() * self.hidden]
    }

    /// Dispatch and combine in one go; the bits of the result.
    pub fn run(&self, experts: &mut dyn Experts) -> Result<Vec<u32>, ExpertsError> {
        let cpu = Cpu::new(1);
        let mut out = self.output();
        experts.dispatch(&cpu, &self.as_expert_batch())?;
        experts.combine(&cpu, &mut out)?;
        Ok(out.iter().map(|value| value.to_bits()).collect())
    }
}

pub fn options(numerics: Numerics) -> EngineOptions {
    EngineOptions {
        device: device(),
        numerics,
        kv_format: None,
        kv_blocks_max: 4,
        threads: 1,
        step_tokens_max: 64,
        mtp: false,
    }
}
