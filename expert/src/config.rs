//! What an expert worker can be told. Every queue it owns is bounded here.
//!
//! Not here: which experts it holds (the placement's business), threads (they belong to the device)
//! and addresses of routers and of the fabric (they belong to the node).

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of one expert worker, the `[expert]` table of a cluster's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the gRPC health service listens. Port 0 takes a free one, announced to the routers.
    pub listen: SocketAddr,
    /// Tokens in one dispatch frame at most; at least the `step_tokens_max` of every engine that
    /// dispatches here. Range 1..=65536.
    pub dispatch_tokens_max: usize,
    /// (token, expert) pairs computed together at most, from as many frames as fit; a single frame
    /// beyond it is refused. Range 1..=1048576; bounds the scratch memory at
    /// `step_vectors_max * hidden * 4` bytes.
    pub step_vectors_max: usize,
    /// Replies kept for peers that do not take them; beyond it the oldest is dropped and its source
    /// times out. Range 1..=4096.
    pub replies_queued_max: usize,
    /// Milliseconds without a turn of the device thread after which health says NOT_SERVING.
    /// Range 100..=600000; longer than the longest step.
    pub progress_stall_ms_max: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            dispatch_tokens_max: 2048,
            // A 2,048-token step at top-8, all of it on one worker.
            step_vectors_max: 16_384,
            replies_queued_max: 256,
            progress_stall_ms_max: 5_000,
        }
    }
}

impl Config {
    /// Checks every field's range.
    ///
    /// # Errors
    /// Names the first field that is out of its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        within("dispatch_tokens_max", self.dispatch_tokens_max as u64, 1, 1 << 16)?;
        within("step_vectors_max", self.step_vectors_max as u64, 1, 1 << 20)?;
        within("replies_queued_max", self.replies_queued_max as u64, 1, 4096)?;
        within("progress_stall_ms_max", self.progress_stall_ms_max, 100, 600_000)
    }

    pub(crate) fn progress_stall_max(&self) -> Duration {
        Duration::from_millis(self.progress_stall_ms_max)
    }
}

/// A setting of the `[expert]` table outside its range.
pub use proto::setting::OutOfRange as ConfigError;

fn within(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    proto::setting::within("expert", field, value, min, max)
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
        check(|c| c.dispatch_tokens_max = 0, "dispatch_tokens_max");
        check(|c| c.step_vectors_max = (1 << 20) + 1, "step_vectors_max");
        check(|c| c.replies_queued_max = 0, "replies_queued_max");
        check(|c| c.progress_stall_ms_max = 99, "progress_stall_ms_max");
    }
}
