//! Prompts that are computed here: which chunks of them run between two steps.
//!
//! In order of admission, which is the fair one; each gets what is left of the budget. How a prompt is cut changes none of its
//! bits. Their blocks are the whole prompt's from admission on, so none of them ever waits for memory.

use super::sequence::State;
use super::{Chunk, Scheduler, SequenceId};

impl Scheduler {
    /// Forms the next chunks of the prompts that are computed here into `chunks`, which is cleared first: `tokens_max` tokens at
    /// most, in order of admission. Each is followed by `Event::Computed`, or by the end of its sequence.
    pub fn schedule_chunks(&self, tokens_max: usize, chunks: &mut Vec<Chunk>) {
        chunks.clear();
        let mut left = tokens_max;
        for &id in &self.prefilling {
            let Some(sequence) = self.sequences.get(&id) else { continue };
            let State::Prefilling { computed } = sequence.state else { continue };
            let remaining = sequence.prompt_tokens - computed;
            let tokens = remaining.min(left);
            if tokens == 0 {
                break;
            }
            left -= tokens;
            chunks.push(Chunk { id, start: computed, tokens, last: tokens == remaining });
        }
    }

    /// Prompt tokens that are still to be computed here.
    pub fn uncomputed_tokens(&self) -> usize {
        let left = |id: &SequenceId| match self.sequences.get(id).map(|sequence| (sequence, &sequence.state))
        {
            Some((sequence, State::Prefilling { computed })) => sequence.prompt_tokens - computed,
            _ => 0,
        };
        self.prefilling.iter().map(left).sum()
    }
}
