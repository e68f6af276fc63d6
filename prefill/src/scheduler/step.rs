//! How a step's token budget is divided: which chunks of which prompts run next.
//!
//! The oldest admitted prompt gets the budget, except that prompts less than half as long as what it still lacks may
//! take up to half of it, the shortest first. So one prompt of 100,000 tokens does not stall everybody behind it, and
//! takes at most twice as long itself. What is left goes to the others in their order; those are let in from the queue
//! as the budget reaches them. Nobody waits for ever: each prompt that is admitted becomes the oldest in its turn.
//!
//! How a prompt is cut into chunks changes none of its bits.

use std::time::Instant;

use engine::{LowerTier, Reservation};

use super::{Chunk, Scheduler, SequenceId};

/// Prompts in progress at once for the sake of the short ones among them: each holds blocks for its whole length.
const INTERLEAVED_MAX: usize = 8;
/// Tokens of a step that something is wanted of each: their logits lie in memory together, half a megabyte a token with V3's vocabulary.
pub(super) const WANTED_TOKENS_MAX: usize = 256;

impl Scheduler {
    /// Forms the next step into `step`, which is cleared first; empty when there is nothing to run.
    /// Each non-empty step must be ended by [`Self::complete`] before the next is formed. What prompts that are let in do
    /// not find in the pool comes from `tier`.
    pub fn schedule(&mut self, step: &mut Vec<Chunk>, tier: &mut dyn LowerTier, now: Instant) {
        step.clear();
        let mut budget = self.limits.step_tokens_max;
        if self.running.is_empty() && !self.admit_head(tier, now) {
            return;
        }
        let Some(&oldest) = self.running.front() else { return };
        let lacking = self.remaining(oldest);
        let reserved = lacking.min(budget.div_ceil(2));
        // The oldest's chunk stands first, whatever it comes to.
        budget -= self.chunk(oldest, reserved, step);
        budget -= self.run_short_ones(lacking / 2, budget, step, tier, now);
        budget -= self.lengthen_first(budget, step);
        let mut next = 1;
        while budget > 0 {
            if next == self.running.len() && !self.admit_head(tier, now) {
                break;
            }
            let id = self.running[next];
            next += 1;
            if !self.in_step(id) {
                budget -= self.chunk(id, budget, step);
            }
        }
    }

    /// Chunks for prompts of at most `tokens_max` remaining tokens, the shortest first; returns what they take.
    fn run_short_ones(
        &mut self,
        tokens_max: usize,
        budget: usize,
        step: &mut Vec<Chunk>,
        tier: &mut dyn LowerTier,
        now: Instant,
    ) -> usize {
        let mut left = budget;
        while left > 0 {
            let others =
                self.running.iter().copied().filter(|&id| !self.in_step(id) && self.room(id, left, step) > 0);
            let shortest = others.min_by_key(|&id| self.remaining(id));
            match shortest.filter(|&id| self.remaining(id) <= tokens_max) {
                Some(id) => left -= self.chunk(id, left, step),
                // Perhaps the next in the queue is one.
                None if self.running.len() < INTERLEAVED_MAX && self.head_is_short(tokens_max, now) => {
                    if !self.admit_head(tier, now) {
                        break;
                    }
                }
                None => break,
            }
        }
        budget - left
    }

    /// Gives the step's first chunk up to `budget` more tokens; returns how many it takes.
    fn lengthen_first(&mut self, budget: usize, step: &mut [Chunk]) -> usize {
        let room = step.first().map_or(0, |first| self.room(first.id, budget, step));
        let Some(first) = step.first_mut() else { return 0 };
        let Some(sequence) = self.sequences.get(&first.id) else { return 0 };
        let more = (sequence.prompt.len() - first.start - first.tokens).min(room);
        first.tokens += more;
        first.last = first.start + first.tokens == sequence.prompt.len();
        more
    }

    /// Of `budget` tokens those that a prompt may have beside what is in the step already.
    fn room(&self, id: SequenceId, budget: usize, step: &[Chunk]) -> usize {
        if !self.recomputes(id) {
            return budget;
        }
        let wanted = step.iter().filter(|chunk| self.recomputes(chunk.id)).map(|chunk| chunk.tokens);
        budget.min(WANTED_TOKENS_MAX.saturating_sub(wanted.sum()))
    }

    /// Whether something is wanted of each of a prompt's tokens.
    fn recomputes(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.recompute)
    }

    /// A chunk of up to `budget` tokens of an admitted prompt; returns how many it takes.
    fn chunk(&mut self, id: SequenceId, budget: usize, step: &mut Vec<Chunk>) -> usize {
        let room = self.room(id, budget, step);
        let Some(sequence) = self.sequences.get_mut(&id) else { return 0 };
        let remaining = sequence.prompt.len() - sequence.computed;
        let tokens = remaining.min(room);
        if tokens == 0 {
            return 0;
        }
        sequence.in_step = true;
        step.push(Chunk { id, start: sequence.computed, tokens, last: tokens == remaining });
        tokens
    }

    fn in_step(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_none_or(|sequence| sequence.in_step)
    }

    pub(super) fn remaining(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |sequence| sequence.prompt.len() - sequence.computed)
    }

    /// Whether the prompt that is admitted next has at most `tokens_max` tokens.
    fn head_is_short(&self, tokens_max: usize, now: Instant) -> bool {
        self.waiting.peek(now).is_some_and(|&id| self.remaining(id) <= tokens_max)
    }

    /// Admits the head of the queue when there is room and memory for it.
    fn admit_head(&mut self, tier: &mut dyn LowerTier, now: Instant) -> bool {
        let Some(&id) = self.waiting.peek(now) else {
            return false;
        };
        if self.active() >= self.limits.active_max {
            return false;
        }
        let Some(shared_max) = self.sequences.get(&id).map(|sequence| self.shared_max(sequence)) else {
            return false;
        };
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let prompt_tokens = sequence.prompt.len();
        let blocks = prompt_tokens.div_ceil(self.limits.block_tokens);
        let reservation = Reservation {
            salt: sequence.cache_salt,
            prompt: &sequence.prompt,
            shared_max,
            blocks,
            // A prompt does not grow.
            blocks_max: blocks,
        };
        let Some(table) = self.blocks.reserve(reservation, tier) else {
            return false;
        };
        sequence.cached = table.shared() * self.limits.block_tokens;
        sequence.computed = sequence.cached.saturating_sub(self.limits.rerun_tokens);
        sequence.table = Some(table);
        sequence.queued = None;
        self.prefix.tokens += prompt_tokens as u64;
        self.prefix.hit_tokens += sequence.cached as u64;
        self.uncomputed_tokens -= sequence.computed;
        self.waiting.pop(now);
        self.queued_tokens -= prompt_tokens;
        self.running.push_back(id);
        true
    }
}
