//! The one file that describes a cluster: every process reads the same TOML and finds its own part by name.
//!
//! Unknown keys are refused, everything is checked before a port is bound, and the start-up log prints what is in
//! force. Settings of a role live in that role's crate ([`router::Config`] and its peers) and are nested here.

use std::{
    collections::HashSet,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use model::{Device, KvFormat, ModelConfig, Numerics};
use proto::ticket::RAILS_MAX;
use serde::{Deserialize, Serialize};

use crate::identity;

mod cache;

pub use cache::CacheSection;

/// A whole cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is served.
    pub model: ModelSection,
    /// The certificates between processes. Absent only inside one process, which makes its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security: Option<identity::Config>,
    /// Memory and step sizes of the engines in prefill and decode workers.
    #[serde(default)]
    pub engine: EngineSection,
    /// KV blocks that the pools of prefill and decode workers have no room for.
    #[serde(default)]
    pub cache: CacheSection,
    /// What carries KV blocks and expert tokens.
    #[serde(default)]
    pub fabric: FabricSection,
    /// The front door.
    #[serde(default)]
    pub router: router::Config,
    /// Settings of every prefill worker.
    #[serde(default)]
    pub prefill: prefill::Config,
    /// Settings of every decode worker.
    #[serde(default)]
    pub decode: decode::Config,
    /// Settings of every expert worker.
    #[serde(default)]
    pub expert: expert::Config,
    /// The workers, by name. Expert workers hold shares of the experts in the order in which they stand here.
    #[serde(default, rename = "worker")]
    pub workers: Vec<Worker>,
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// A checkpoint folder in the Hugging Face layout.
    pub path: PathBuf,
    /// The name clients use. Default: the folder's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `fp8` to serve, `reference` to compare with golden values.
    #[serde(default = "default_numerics", with = "as_text")]
    pub numerics: Numerics,
    /// What a KV row is stored in. Default: f32 in `reference`, fp8 otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "as_optional_text")]
    pub kv_format: Option<KvFormat>,
}

impl ModelSection {
    /// The name clients use.
    pub fn served_id(&self) -> String {
        self.id.clone().unwrap_or_else(|| {
            let path = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
            match path.file_name() {
                Some(name) => name.to_string_lossy().into_owned(),
                None => "model".to_owned(),
            }
        })
    }
}

/// `[fabric]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FabricSection {
    /// Frames between workers of one host and user go through memory that both see. `false`: over QUIC, as between hosts.
    pub share_memory: bool,
    /// The largest UDP payload that the network between the workers carries, bytes. Default: loopback's on a loopback
    /// address, elsewhere what is found by trying, up to 9,000-byte Ethernet's 8,952.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub datagram_bytes: Option<u16>,
    /// Whether frames between hosts go over RDMA, through NIXL. RDMA is not encrypted.
    pub rdma: Rdma,
    /// NIXL's C library. Default: `libnixl_capi.so` where the loader finds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nixl_library: Option<PathBuf>,
}

/// `fabric.rdma`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rdma {
    /// Never: QUIC.
    Off,
    /// Where a host has an RDMA device and the library.
    #[default]
    Auto,
    /// Also without a device, over what UCX has instead; without the library a worker does not start.
    On,
}

impl From<Rdma> for fabric::RdmaUse {
    fn from(rdma: Rdma) -> Self {
        match rdma {
            Rdma::Off => Self::Off,
            Rdma::Auto => Self::Auto,
            Rdma::On => Self::On,
        }
    }
}

impl Default for FabricSection {
    fn default() -> Self {
        Self { share_memory: true, datagram_bytes: None, rdma: Rdma::Auto, nixl_library: None }
    }
}

/// `[engine]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineSection {
    /// KV blocks of 64 tokens in each worker's pool.
    pub kv_blocks_max: usize,
    /// Tokens in one forward step at most; sizes the workspace.
    pub step_tokens_max: usize,
    /// Whether workers keep the cache of the checkpoint's MTP module, so that decode can draft tokens with it. It is part of
    /// the KV layout: all workers of a cluster must agree.
    pub mtp: Mtp,
}

/// `engine.mtp`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mtp {
    /// Where the checkpoint has the module.
    #[default]
    Auto,
    /// Never: its memory and its share of the KV cache are saved.
    Off,
}

impl Mtp {
    /// Whether the module is used with this model.
    pub fn applies_to(self, model: &ModelConfig) -> bool {
        self == Self::Auto && model.num_nextn_predict_layers > 0
    }
}

impl Default for EngineSection {
    fn default() -> Self {
        // 2,048 blocks are 131,072 tokens: 32 sequences of the demo model at its full context.
        Self { kv_blocks_max: 2048, step_tokens_max: 512, mtp: Mtp::Auto }
    }
}

/// Which tier a worker belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// HTTP and gRPC in, tokens out.
    Router,
    /// Prompts to KV and a first token.
    Prefill,
    /// KV to the remaining tokens.
    Decode,
    /// Routed experts for both tiers.
    Expert,
}

impl Role {
    /// As configuration and command line spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Expert => "expert",
        }
    }
}

/// One `[[worker]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// Unique in the cluster, e.g. `prefill-0`.
    pub id: String,
    /// prefill, decode or expert.
    pub role: Role,
    /// Where its gRPC service listens.
    pub control: SocketAddr,
    /// Where its fabric endpoint listens (UDP).
    pub fabric: SocketAddr,
    /// Where it has further ones, each on a network of its own: rails, over which a prefill or decode worker's hand-offs spread, and
    /// which take over from each other. At most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fabric_rails: Vec<SocketAddr>,
    /// Where it answers `/metrics` and `/health`, if anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<SocketAddr>,
    /// What it computes on: `cpu` or `cuda:N`.
    #[serde(default, with = "as_text")]
    pub device: Device,
    /// Threads of its device.
    #[serde(default = "default_threads")]
    pub threads: usize,
}

impl Worker {
    fn validate_rails(&self) -> Result<(), String> {
        let rails = &self.fabric_rails;
        if self.role == Role::Expert && !rails.is_empty() {
            return Err("expert workers are reached at one address, fabric".to_owned());
        }
        if rails.len() > RAILS_MAX {
            return Err(format!("{} addresses, at most {RAILS_MAX} beside fabric", rails.len()));
        }
        let mut seen = HashSet::from([self.fabric]);
        // Port 0 is another one each time.
        match rails.iter().find(|&&rail| !seen.insert(rail) && rail.port() != 0) {
            Some(twice) => Err(format!("{twice} is there twice")),
            None => Ok(()),
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong kind; the message names the place.
    #[error("configuration {path}: {source}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Well-formed, but impossible.
    #[error("configuration: {field}: {reason}")]
    Invalid {
        /// The key, as a path.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every section and how they fit together.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let invalid = |field: &str, reason: String| ConfigError::Invalid { field: field.to_owned(), reason };
        range("engine.kv_blocks_max", self.engine.kv_blocks_max, 1, 1 << 24)?;
        // A launch on a GPU has at most so many rows.
        range("engine.step_tokens_max", self.engine.step_tokens_max, 1, 65_535)?;
        self.cache.validate()?;
        self.router.validate().map_err(|e| invalid("router", e.to_string()))?;
        self.prefill.validate().map_err(|e| invalid("prefill", e.to_string()))?;
        self.decode.validate().map_err(|e| invalid("decode", e.to_string()))?;
        self.expert.validate().map_err(|e| invalid("expert", e.to_string()))?;
        // A step that does not fit a worker's dispatch would be refused, every time.
        range(
            "expert.dispatch_tokens_max",
            self.expert.dispatch_tokens_max,
            self.engine.step_tokens_max,
            1 << 16,
        )?;
        range("decode.batch_max", self.decode.batch_max, 1, self.engine.step_tokens_max)?;
        let mut ids = HashSet::new();
        for (i, worker) in self.workers.iter().enumerate() {
            let field = |name: &str| format!("worker[{i}].{name}");
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
            if worker.id.is_empty() || worker.id.len() > 64 || !worker.id.chars().all(plain) {
                let reason = format!("{:?} must be 1 to 64 letters, digits, '-', '_' or '.'", worker.id);
                return Err(invalid(&field("id"), reason));
            }
            if !ids.insert(&worker.id) {
                return Err(invalid(&field("id"), format!("{:?} is taken by another worker", worker.id)));
            }
            if worker.role == Role::Router {
                return Err(invalid(&field("role"), "the router is configured in [router]".to_owned()));
            }
            range(&field("threads"), worker.threads, 1, 1024)?;
            worker.validate_rails().map_err(|reason| invalid(&field("fabric_rails"), reason))?;
        }
        Ok(())
    }

    /// Checks what depends on the model: each token of a step may go to all of its experts on one worker.
    pub fn validate_for(&self, model: &ModelConfig) -> Result<(), ConfigError> {
        range("worker", self.workers_of(Role::Expert).count(), 0, model.n_routed_experts).map_err(|_| {
            ConfigError::Invalid {
                field: "worker".to_owned(),
                reason: format!(
                    "more expert workers than the model's {} routed experts",
                    model.n_routed_experts
                ),
            }
        })?;
        let vectors = self.engine.step_tokens_max * model.num_experts_per_tok;
        range("expert.step_vectors_max", self.expert.step_vectors_max, vectors, 1 << 20)
    }

    /// The worker of that name.
    pub fn worker(&self, id: &str) -> Result<&Worker, ConfigError> {
        self.workers.iter().find(|w| w.id == id).ok_or_else(|| ConfigError::Invalid {
            field: "worker".to_owned(),
            reason: format!(
                "no worker is called {id:?}; there are {}",
                self.workers.iter().map(|w| w.id.as_str()).collect::<Vec<_>>().join(", ")
            ),
        })
    }

    /// The workers of one tier, in the file's order.
    pub fn workers_of(&self, role: Role) -> impl Iterator<Item = &Worker> {
        self.workers.iter().filter(move |w| w.role == role)
    }
}

fn range(field: &str, value: usize, least: usize, most: usize) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Invalid {
        field: field.to_owned(),
        reason: format!("{value} is not in {least}..={most}"),
    })
}

fn default_numerics() -> Numerics {
    Numerics::Fp8
}

fn default_threads() -> usize {
    1
}

/// Values that spell themselves through `Display` and `FromStr`.
mod as_text {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The same for values that may be absent.
mod as_optional_text {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserializer, Serializer};

    pub fn serialize<T: Display, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        super::as_text::deserialize(deserializer).map(Some)
    }
}

#[cfg(test)]
mod tests;
