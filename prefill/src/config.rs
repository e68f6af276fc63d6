//! What a prefill worker can be told. Every queue it owns is bounded here, and the relations between the bounds
//! are checked before a port is opened.
//!
//! Not here: threads, numerics, the KV pool and the size of a step (they belong to the engine), addresses of routers
//! and of the fabric (they belong to the node).

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of one prefill worker, the `[prefill]` table of a cluster's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the gRPC service listens. Port 0 takes a free one, announced to the routers.
    pub listen: SocketAddr,
    /// Prompts that wait for their first chunk. Range 1..=65536.
    pub queue_requests_max: usize,
    /// Tokens of the waiting prompts together; a prompt that finds the queue empty may exceed it.
    /// Range 1..=1073741824.
    pub queue_tokens_max: usize,
    /// Sequences that hold KV blocks: being computed, or computed and not yet committed on decode. Range 1..=4096.
    pub active_max: usize,
    /// Prompt tokens in one step: the chunk. Longer steps use the device better, shorter ones let a new prompt in
    /// sooner. Range 1..=65536; more than the engine's own `step_tokens_max` has no effect.
    pub step_tokens_max: usize,
    /// Requests between the gRPC service and the device thread. Range 1..=4096.
    pub submissions_queued_max: usize,
    /// Milliseconds without a round of the device thread after which health says NOT_SERVING.
    /// Range 100..=600000; longer than the longest step.
    pub progress_stall_ms_max: u64,
    /// Milliseconds that admitted prompts are given to end by themselves at shutdown. Range 0..=600000.
    pub drain_ms_max: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            queue_requests_max: 1024,
            // Eight prompts of V3's whole context.
            queue_tokens_max: 1 << 20,
            active_max: 64,
            step_tokens_max: 512,
            submissions_queued_max: 256,
            progress_stall_ms_max: 5_000,
            drain_ms_max: 5_000,
        }
    }
}

impl Config {
    /// Checks every field's range.
    ///
    /// # Errors
    /// Names the first field that is out of its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        within("queue_requests_max", self.queue_requests_max as u64, 1, 1 << 16)?;
        within("queue_tokens_max", self.queue_tokens_max as u64, 1, 1 << 30)?;
        within("active_max", self.active_max as u64, 1, 4096)?;
        within("step_tokens_max", self.step_tokens_max as u64, 1, 1 << 16)?;
        within("submissions_queued_max", self.submissions_queued_max as u64, 1, 4096)?;
        within("progress_stall_ms_max", self.progress_stall_ms_max, 100, 600_000)?;
        within("drain_ms_max", self.drain_ms_max, 0, 600_000)
    }

    pub(crate) fn progress_stall_max(&self) -> Duration {
        Duration::from_millis(self.progress_stall_ms_max)
    }

    pub(crate) fn drain_max(&self) -> Duration {
        Duration::from_millis(self.drain_ms_max)
    }
}

/// A setting of the `[prefill]` table outside its range.
pub use proto::setting::OutOfRange as ConfigError;

fn within(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    proto::setting::within("prefill", field, value, min, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(Config::default().validate(), Ok(()));
    }

    #[test]
    fn a_field_out_of_range_is_named() {
        let check = |change: fn(&mut Config), field: &str| {
            let mut config = Config::default();
            change(&mut config);
            assert_eq!(config.validate().map_err(|error| error.field), Err(field));
        };
        check(|c| c.queue_requests_max = 0, "queue_requests_max");
        check(|c| c.queue_tokens_max = 0, "queue_tokens_max");
        check(|c| c.active_max = 0, "active_max");
        check(|c| c.step_tokens_max = 0, "step_tokens_max");
        check(|c| c.submissions_queued_max = 0, "submissions_queued_max");
        check(|c| c.progress_stall_ms_max = 0, "progress_stall_ms_max");
        check(|c| c.drain_ms_max = 600_001, "drain_ms_max");
    }
}
