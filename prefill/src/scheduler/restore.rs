//! Prompts whose KV is being read from a disk: they stand outside the queue until it has come, so that nobody waits behind
//! them, and take their place in it then.
//!
//! ```text
//!            restore_asked                    restored: read, or not to be had
//!  waiting ────────────────► being restored ──────────────────────────────────► waiting
//! ```
//!
//! What has come lies in host memory; it is looked up when the prompt is let in, as everything is. So a read that fails needs no
//! event of its own: less is found.

use std::time::Instant;

use model::BlockDigest;
use proto::share::Share;

use super::{Scheduler, SequenceId};

impl Scheduler {
    /// What the pool lacks of a waiting prompt's blocks, those that it could share.
    pub fn missing(&self, id: SequenceId) -> Vec<BlockDigest> {
        match self.sequences.get(&id) {
            Some(sequence) if sequence.table.is_none() => {
                let shared_max = self.shared_max(sequence);
                self.blocks.missing(sequence.cache_salt, &sequence.prompt, shared_max)
            }
            _ => Vec::new(),
        }
    }

    /// KV of a waiting prompt has been asked for: it is not let in before [`Self::restored`].
    pub fn restore_asked(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.table.is_none() && !std::mem::replace(&mut sequence.restoring, true) {
            self.waiting.remove(|&waiting| waiting == id);
            self.restoring += 1;
        }
    }

    /// What can be had of its KV is at hand. Unknown ids are ignored: whoever asked may have left.
    pub fn restored(&mut self, id: SequenceId, now: Instant) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if std::mem::take(&mut sequence.restoring) {
            self.restoring -= 1;
            let (share, cost): (Share, _) = (sequence.share, sequence.prompt.len() as u64);
            self.waiting.push(share, cost, id, now);
        }
    }
}
