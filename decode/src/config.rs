//! What a decode worker can be told. Every queue and pool it owns is bounded here, and the relations between the
//! bounds are checked before a port is opened.
//!
//! Not here: threads, numerics and the size of the KV pool (they belong to the engine), addresses of routers and of
//! the fabric (they belong to the node), and the lease of a ticket (it belongs to the hand-off).

use std::net::SocketAddr;
use std::time::Duration;

use engine::Engine;
use serde::{Deserialize, Serialize};

use crate::speculation::DRAFTS_MAX;

/// Settings of one decode worker, the `[decode]` table of a cluster's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the gRPC service listens. Port 0 takes a free one, announced to the routers.
    pub listen: SocketAddr,
    /// Sequences that hold KV blocks at once, those that wait for their KV included. Range 1..=4096.
    pub sequences_max: usize,
    /// Sequences that wait for KV blocks: interactive ones first, tenants by their weights; the next one is told to come
    /// back later. Range 1..=65536.
    pub queue_max: usize,
    /// Sequences in one step; more take turns. Range 1..=`sequences_max`, at most 512: the batch up to which the
    /// operators are held to be row invariant.
    pub batch_max: usize,
    /// Tokens drafted for a sequence in one step at most, with the checkpoint's MTP module; how many it is follows from what
    /// they have been worth. Range 0..=8, 0 drafts none.
    pub draft_tokens_max: usize,
    /// Prompt tokens computed between two steps at most, of prompts that the router leaves to this worker: a step of the
    /// running sequences comes later by what these take. Range 0..=4096; 0 computes no prompts.
    pub prefill_tokens_max: usize,
    /// Submissions between the gRPC service and the device thread. Range 1..=4096.
    pub submissions_queued_max: usize,
    /// Events queued for one stream. When it has room for fewer than two, the sequence pauses. Range 4..=4096:
    /// ticket, hand-off, one token and the end must fit.
    pub events_queued_max: usize,
    /// Milliseconds a sequence may stay paused behind a reader that takes nothing before its blocks are worth more
    /// to somebody else. Range 100..=600_000.
    pub reader_stall_ms_max: u64,
    /// Milliseconds without a step, while there is something to step, after which health says NOT_SERVING.
    /// Range 100..=600_000; longer than the longest step.
    pub progress_stall_ms_max: u64,
    /// Milliseconds that running sequences are given to end by themselves at shutdown. Range 0..=600_000.
    pub drain_ms_max: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            sequences_max: 256,
            queue_max: 512,
            batch_max: 64,
            // DeepSeek trained the module for one; fed with its own states it is right about the next two often enough.
            draft_tokens_max: 3,
            // Two blocks: about what as many rows of a full batch take, twice.
            prefill_tokens_max: 128,
            submissions_queued_max: 256,
            // At 50 tokens a second, a reader may sleep for over a second before its sequence feels it.
            events_queued_max: 64,
            reader_stall_ms_max: 30_000,
            progress_stall_ms_max: 5_000,
            drain_ms_max: 5_000,
        }
    }
}

impl Config {
    /// Checks every field's range and the relations between fields.
    ///
    /// # Errors
    /// Names the first field that is out of its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        within("sequences_max", self.sequences_max as u64, 1, 4096)?;
        within("queue_max", self.queue_max as u64, 1, 1 << 16)?;
        within("batch_max", self.batch_max as u64, 1, self.sequences_max.min(512) as u64)?;
        within("draft_tokens_max", self.draft_tokens_max as u64, 0, DRAFTS_MAX as u64)?;
        within("prefill_tokens_max", self.prefill_tokens_max as u64, 0, 4096)?;
        within("submissions_queued_max", self.submissions_queued_max as u64, 1, 4096)?;
        within("events_queued_max", self.events_queued_max as u64, 4, 4096)?;
        within("reader_stall_ms_max", self.reader_stall_ms_max, 100, 600_000)?;
        within("progress_stall_ms_max", self.progress_stall_ms_max, 100, 600_000)?;
        within("drain_ms_max", self.drain_ms_max, 0, 600_000)
    }

    /// Checks what depends on the engine: a batch must fit one step of it.
    pub(crate) fn validate_for(&self, engine: &Engine) -> Result<(), ConfigError> {
        // A sequence that has just come may have a second row.
        let rows = if self.drafts_with(engine) { 2 } else { 1 };
        within("batch_max", self.batch_max as u64, 1, (engine.step_tokens_max() / rows) as u64)
    }

    /// Whether sequences draft.
    pub(crate) fn drafts_with(&self, engine: &Engine) -> bool {
        engine.has_mtp() && self.draft_tokens_max > 0
    }

    pub(crate) fn reader_stall_max(&self) -> Duration {
        Duration::from_millis(self.reader_stall_ms_max)
    }

    pub(crate) fn progress_stall_max(&self) -> Duration {
        Duration::from_millis(self.progress_stall_ms_max)
    }

    pub(crate) fn drain_max(&self) -> Duration {
        Duration::from_millis(self.drain_ms_max)
    }
}

/// A setting of the `[decode]` table outside its range.
pub use proto::setting::OutOfRange as ConfigError;

fn within(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    proto::setting::within("decode", field, value, min, max)
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
            assert_eq!(config.validate().unwrap_err().field, field);
        };
        check(|c| c.sequences_max = 0, "sequences_max");
        check(|c| c.queue_max = 0, "queue_max");
        check(|c| c.batch_max = c.sequences_max + 1, "batch_max");
        check(|c| c.batch_max = 0, "batch_max");
        check(|c| c.draft_tokens_max = 9, "draft_tokens_max");
        check(|c| c.prefill_tokens_max = 4097, "prefill_tokens_max");
        check(|c| c.submissions_queued_max = 0, "submissions_queued_max");
        check(|c| c.events_queued_max = 3, "events_queued_max");
        check(|c| c.reader_stall_ms_max = 0, "reader_stall_ms_max");
        check(|c| c.progress_stall_ms_max = 0, "progress_stall_ms_max");
        check(|c| c.drain_ms_max = 600_001, "drain_ms_max");
    }
}
