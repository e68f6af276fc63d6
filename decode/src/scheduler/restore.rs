//! Sequences whose KV is being read from a disk: they stand outside the queue until it has come, so that nobody waits behind
//! them, and take their place in it then.
//!
//! What has come lies in host memory; it is looked up when the sequence is admitted, as everything is. So a read that fails
//! needs no event of its own: less is found.

use std::time::Instant;

use model::BlockDigest;

use super::sequence::State;
use super::{Scheduler, SequenceId};

impl Scheduler {
    /// What the pool lacks of a queued sequence's prompt.
    pub fn missing(&self, id: SequenceId) -> Vec<BlockDigest> {
        match self.sequences.get(&id).map(|sequence| &sequence.state) {
            Some(State::Queued { prompt, cache_salt, .. }) => {
                self.blocks.missing(*cache_salt, prompt, usize::MAX)
            }
            _ => Vec::new(),
        }
    }

    /// KV of a queued sequence has been asked for: it is not admitted before [`Self::restored`].
    pub fn restore_asked(&mut self, id: SequenceId) {
        if self.sequences.get(&id).is_some_and(|sequence| sequence.is_queued()) && self.restoring.insert(id) {
            self.queue.remove(|&queued| queued == id);
        }
    }

    /// What can be had of its KV is at hand. Unknown ids are ignored: whoever asked may have left.
    pub fn restored(&mut self, id: SequenceId, now: Instant) {
        if !self.restoring.remove(&id) {
            return;
        }
        if let Some(sequence) = self.sequences.get(&id) {
            self.queue.push(sequence.share, sequence.queue_cost(), id, now);
        }
    }
}
