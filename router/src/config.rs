//! What an operator may set on the router, checked whole before a port is bound.
//!
//! Every bound of the router stands here; a relation between two of them is asserted in
//! [`Config::validate`], next to both.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use proto::share::WEIGHT_MAX;
use serde::{Deserialize, Serialize};

use crate::admission::door::Limits;
use crate::placement::disaggregation::PrefillOnDecode;

/// The most choices of one prompt (`n`): the public protocol states it.
pub const CHOICES_MAX: u32 = 16;

/// The longest objective, milliseconds: what waits for longer is a job, not a request.
const TTFT_MS_LONGEST: u64 = 3_600_000;

/// `[router]` of a cluster's configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where `/v1`, `/health` and `/metrics` listen. Plain text: keep it on loopback or behind TLS.
    pub http_listen: SocketAddr,
    /// Where `trireme.v1.Inference` listens, likewise.
    pub grpc_listen: SocketAddr,
    /// Where workers announce themselves, over mutual TLS.
    pub control_listen: SocketAddr,
    /// SHA-256 of each accepted API key, 64 hexadecimal digits. Empty: no key is asked for.
    pub api_keys_sha256: Vec<String>,
    /// Parts that keys have of what is contended for, relative to each other: an entry of `api_keys_sha256` and 1 to 1000.
    /// A key without a weight has 1.
    pub tenant_weights: BTreeMap<String, u32>,
    /// Connections to each public door at once; more wait in the kernel's backlog.
    pub connections_max: usize,
    /// Milliseconds in which an HTTP client must have sent a request's head; also how long a kept-alive connection may
    /// rest. Silent connections would else take the places of others for ever.
    pub head_wait_ms_max: u64,
    /// Longest request body, bytes. 16 MiB hold a million-token prompt with room to spare.
    pub body_bytes_max: usize,
    /// Sequences (prompts × n) that may be in flight at once, over all requests.
    pub sequences_max: usize,
    /// Sequences of one request: prompts × n.
    pub sequences_per_request_max: usize,
    /// Requests that may wait for their sequences to be admitted; the next one gets 429.
    pub queue_max: usize,
    /// The objective of interactive requests, milliseconds from receipt to the first token: one that cannot be expected to
    /// meet it gets 429 at once, one that waits gets it when its turn would come too late. 1 to an hour.
    pub ttft_ms_max: u64,
    /// That of batch requests (`service_tier = "flex"`), at least `ttft_ms_max`.
    pub batch_ttft_ms_max: u64,
    /// Which prompts decode computes instead of having them handed over: `auto`, those that cost less there by what was measured;
    /// `never`; `always`.
    pub prefill_on_decode: PrefillOnDecode,
    /// Milliseconds from receipt to the last token; a client may ask for less.
    pub deadline_ms_max: u64,
    /// Milliseconds without a report after which a worker is dead. Workers report every 250.
    pub lease_ms: u64,
    /// Milliseconds a worker with work may go without a step before health says so.
    pub stall_ms_max: u64,
    /// Workers that may be registered at once.
    pub workers_max: usize,
    /// Expert workers that must be live for the cluster to be healthy; 0 where experts are local.
    pub expert_workers_min: usize,
    /// Milliseconds that running requests are given to end on shutdown.
    pub drain_ms_max: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http_listen: SocketAddr::from(([127, 0, 0, 1], 8000)),
            grpc_listen: SocketAddr::from(([127, 0, 0, 1], 8001)),
            control_listen: SocketAddr::from(([127, 0, 0, 1], 8002)),
            api_keys_sha256: Vec::new(),
            tenant_weights: BTreeMap::new(),
            connections_max: 4096,
            head_wait_ms_max: 60_000,
            body_bytes_max: 16 << 20,
            sequences_max: 1024,
            sequences_per_request_max: 64,
            queue_max: 1024,
            // Behind it most people have given up; and prefill's queue in front of a first token costs nothing but time.
            ttft_ms_max: 5000,
            batch_ttft_ms_max: 60_000,
            prefill_on_decode: PrefillOnDecode::Auto,
            deadline_ms_max: 600_000,
            lease_ms: 1500,
            stall_ms_max: 10_000,
            workers_max: 1024,
            expert_workers_min: 0,
            drain_ms_max: 10_000,
        }
    }
}

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("router.{field}: {problem}")]
pub struct ConfigError {
    /// The key in `[router]`.
    pub field: &'static str,
    /// What it must be.
    pub problem: &'static str,
}

impl Config {
    /// Checks each value and the relations between them.
    ///
    /// # Errors
    /// Names the first setting that cannot be used.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = |holds: bool, field, problem| match holds {
            true => Ok(()),
            false => Err(ConfigError { field, problem }),
        };
        let hashes_hold = self
            .api_keys_sha256
            .iter()
            .all(|hash| hash.len() == 64 && hash.bytes().all(|digit| digit.is_ascii_hexdigit()));
        check(hashes_hold, "api_keys_sha256", "each must be the 64 hexadecimal digits of a SHA-256")?;
        let weights_hold = self
            .tenant_weights
            .iter()
            .all(|(hash, weight)| self.api_keys_sha256.contains(hash) && (1..=WEIGHT_MAX).contains(weight));
        check(
            weights_hold,
            "tenant_weights",
            "each must name an entry of api_keys_sha256 and lie in 1..=1000",
        )?;
        check(self.connections_max > 0, "connections_max", "must be at least 1")?;
        check(
            (100..=3_600_000).contains(&self.head_wait_ms_max),
            "head_wait_ms_max",
            "must lie between 100 ms and one hour",
        )?;
        check(
            (1 << 10..=1 << 30).contains(&self.body_bytes_max),
            "body_bytes_max",
            "must lie between 1 KiB and 1 GiB",
        )?;
        check(
            self.sequences_per_request_max >= CHOICES_MAX as usize,
            "sequences_per_request_max",
            "must allow n = 16 choices of one prompt",
        )?;
        // A request takes all its permits at once: one that could never get them would wait for ever.
        check(
            self.sequences_max >= self.sequences_per_request_max,
            "sequences_max",
            "must be at least sequences_per_request_max",
        )?;
        check(self.sequences_max <= u32::MAX as usize / 2, "sequences_max", "must fit 31 bits")?;
        check(self.queue_max <= u32::MAX as usize, "queue_max", "must fit 32 bits")?;
        check(
            (1..=TTFT_MS_LONGEST).contains(&self.ttft_ms_max),
            "ttft_ms_max",
            "must lie between 1 ms and one hour",
        )?;
        check(
            (self.ttft_ms_max..=TTFT_MS_LONGEST).contains(&self.batch_ttft_ms_max),
            "batch_ttft_ms_max",
            "must lie between ttft_ms_max and one hour",
        )?;
        check(self.deadline_ms_max > 0, "deadline_ms_max", "must be at least 1 ms")?;
        // Two lost reports must not cost a lease.
        check(self.lease_ms >= 750, "lease_ms", "must cover three reports: at least 750")?;
        check(self.stall_ms_max >= self.lease_ms, "stall_ms_max", "must be at least lease_ms")?;
        check(self.workers_max > 0, "workers_max", "must be at least 1")?;
        check(
            self.expert_workers_min <= self.workers_max,
            "expert_workers_min",
            "must not exceed workers_max",
        )
    }

    pub(crate) fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    pub(crate) fn stall_max(&self) -> Duration {
        Duration::from_millis(self.stall_ms_max)
    }

    /// What the door goes by.
    pub(crate) fn door(&self) -> Limits {
        let ttft_max = [self.ttft_ms_max, self.batch_ttft_ms_max].map(Duration::from_millis);
        Limits { sequences_max: self.sequences_max, queue_max: self.queue_max, ttft_max }
    }

    pub(crate) fn deadline_max(&self) -> Duration {
        Duration::from_millis(self.deadline_ms_max)
    }

    pub(crate) fn drain_max(&self) -> Duration {
        Duration::from_millis(self.drain_ms_max)
    }
}

#[cfg(test)]
mod tests;
