//! Who gets memory, and when: admission from the queue, and growth before a step.
//!
//! Two questions, of different kinds. *May it be given?* is the [`Banker`](super::banker::Banker)'s, is asked for every block,
//! and is what the guarantee rests on: no sequence ever needs a block that cannot be had, none is evicted. *Should
//! another sequence be let in?* is admission's, and asks more: that the blocks expected at the worst moment stay under
//! the high-water mark. An estimate that is wrong costs pauses, never a sequence.
//!
//! While a sequence that runs is short of a block, nobody is let in: those that run come to their ends, and what they give
//! back reaches the one that is short. So a pause ends, however many wait.

use std::time::{Duration, Instant};

use engine::{BlockTable, LowerTier, Reservation};
use model::TokenId;

use super::forecast::{Outlook, peak_blocks};
use super::sequence::State;
use super::{Admission, NotAdmitted, Scheduler, Sequence, SequenceId};

/// Part of the pool that admission plans to fill, in sixteenths. The rest takes the estimate's error: of the sequences that
/// run, one in five outlives its estimate.
const HIGH_WATER_SIXTEENTHS: usize = 15;

impl Scheduler {
    /// Queues a request for blocks; [`Self::admit_next`] gives them.
    ///
    /// # Errors
    /// It would not fit an empty pool, or as many wait as may.
    pub fn submit(&mut self, admission: Admission, now: Instant) -> Result<SequenceId, NotAdmitted> {
        let Admission { prompt, cache_salt, share, rule, deadline, prefill_here } = admission;
        let prompt_tokens = prompt.len();
        let life_tokens = prompt_tokens + rule.tokens_max() as usize;
        let life_blocks = life_tokens.div_ceil(self.limits.block_tokens);
        if life_blocks > self.limits.kv_blocks {
            return Err(NotAdmitted::NeverFits { blocks: life_blocks, blocks_max: self.limits.kv_blocks });
        }
        let queued = self.queue.len() + self.restoring.len();
        if queued >= self.limits.queue_max {
            return Err(NotAdmitted::QueueFull { queued });
        }
        let expected_tokens = self.lengths.tokens(0, rule.tokens_max());
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence {
            state: State::Queued { prompt, cache_salt, since: now },
            table: None,
            tokens: Vec::new(),
            prompt_tokens,
            generated: 0,
            expected_tokens,
            life_blocks,
            short: false,
            share,
            rule,
            deadline,
            prefill_here,
            ticket: None,
        };
        self.queue.push(share, sequence.queue_cost(), id, now);
        self.sequences.insert(id, sequence);
        Ok(id)
    }

    /// Gives the queue's head blocks for its prompt, those that hold its KV already first; from here on it waits for the
    /// rest of its KV. What the pool does not have may come from `tier`. `None` where nobody waits, or the head has to.
    /// Returns how long it was queued, too.
    pub fn admit_next(&mut self, tier: &mut dyn LowerTier, now: Instant) -> Option<(SequenceId, Duration)> {
        let &id = self.queue.peek(now)?;
        if self.holders >= self.limits.sequences_max || self.short > 0 || self.refused == Some(id) {
            return None;
        }
        let Some(table) = self.room_for(id, tier) else {
            // Until something gives blocks back the answer stays the same.
            self.refused = Some(id);
            return None;
        };
        self.queue.pop(now);
        let sequence = self.sequences.get_mut(&id)?;
        let State::Queued { prompt, since, .. } = std::mem::replace(&mut sequence.state, State::Waiting)
        else {
            return None;
        };
        if sequence.prefill_here {
            let found = table.shared() * self.limits.block_tokens;
            let computed = found.saturating_sub(self.limits.rerun_tokens);
            sequence.state = State::Prefilling { computed };
            self.prefilling.push_back(id);
        }
        self.prefix.tokens += prompt.len() as u64;
        self.prefix.hit_tokens += (table.shared() * self.limits.block_tokens) as u64;
        let mut tokens: Vec<TokenId> = Vec::with_capacity(prompt.len() + sequence.rule.tokens_max() as usize);
        tokens.extend_from_slice(&prompt);
        sequence.tokens = tokens;
        sequence.expected_tokens = self.lengths.tokens(0, sequence.rule.tokens_max());
        sequence.table = Some(table);
        self.holders += 1;
        self.owed += sequence.owed_blocks();
        Some((id, now.saturating_duration_since(since)))
    }

    /// Blocks for the prompt of a queued sequence, if it may and should be let in.
    fn room_for(&mut self, id: SequenceId, tier: &mut dyn LowerTier) -> Option<BlockTable> {
        let sequence = self.sequences.get(&id)?;
        let State::Queued { prompt, cache_salt, .. } = &sequence.state else { return None };
        let block_tokens = self.limits.block_tokens;
        let life_blocks = sequence.life_blocks;
        let reservation = Reservation {
            salt: *cache_salt,
            prompt,
            // Also the last block, when it is full and the first row that is computed here lies behind the prompt.
            shared_max: (prompt.len() - usize::from(sequence.prefill_here)) / block_tokens,
            blocks: prompt.len().div_ceil(block_tokens),
            blocks_max: life_blocks,
        };
        let table = self.blocks.reserve(reservation, tier)?;
        let owed = life_blocks - table.blocks().len();
        // Where everybody's worst case fits there is nothing to plan and nothing to prove.
        if self.blocks.free_blocks() >= self.owed + owed {
            return Some(table);
        }
        let high_water = self.limits.kv_blocks * HIGH_WATER_SIXTEENTHS / 16;
        let sequence = self.sequences.get_mut(&id)?;
        sequence.table = Some(table);
        // Counted as what it is about to be.
        let queued = std::mem::replace(&mut sequence.state, State::Waiting);
        let fits =
            self.expected_peak() <= high_water && self.banker.safe(&self.blocks, &self.sequences, None);
        let sequence = self.sequences.get_mut(&id)?;
        sequence.state = queued;
        let table = sequence.table.take()?;
        if fits {
            return Some(table);
        }
        self.blocks.release(table);
        None
    }

    /// Blocks held at the worst moment, if every sequence that holds some ends when it is expected to.
    fn expected_peak(&mut self) -> usize {
        let block_tokens = self.limits.block_tokens;
        let mut own_blocks = 0;
        self.outlooks.clear();
        for sequence in self.sequences.values() {
            let Some(table) = &sequence.table else { continue };
            let own = table.blocks().len() - self.blocks.in_common(table);
            if matches!(sequence.state, State::Finished(_)) {
                // On its way out: its blocks are free by the time that anybody grows.
                own_blocks += own;
                continue;
            }
            own_blocks += own;
            let expected = self.lengths.tokens(sequence.generated, sequence.rule.tokens_max());
            let length = sequence.prompt_tokens + sequence.generated as usize;
            let common_tokens = (table.blocks().len() - own) * block_tokens;
            self.outlooks.push(Outlook {
                left: expected.saturating_sub(sequence.generated) as usize,
                own_tokens: length.saturating_sub(common_tokens),
            });
        }
        let held = self.limits.kv_blocks - self.blocks.free_blocks();
        peak_blocks(&mut self.outlooks, held.saturating_sub(own_blocks), block_tokens)
    }

    /// Sees to it that a running sequence has blocks for its next step: for as many rows as a step may have where that is
    /// safe, for one at least. `false`: it must pause for this step.
    pub(super) fn grow_for_step(&mut self, id: SequenceId, tier: &mut dyn LowerTier) -> bool {
        let Some(sequence) = self.sequences.get(&id) else { return false };
        let held = sequence.block_table().len();
        let life_rows = sequence.prompt_tokens + sequence.rule.tokens_max() as usize;
        let blocks_for =
            |rows: usize| (sequence.length() - 1 + rows).min(life_rows).div_ceil(self.limits.block_tokens);
        let (wanted, needed) = (blocks_for(self.limits.step_rows_max), blocks_for(1));
        let grows = wanted > held
            && (self.grant(id, wanted - held, tier)
                || (needed > held && wanted > needed && self.grant(id, needed - held, tier)));
        let fed = grows || needed <= held;
        if let Some(sequence) = self.sequences.get_mut(&id)
            && sequence.short == fed
        {
            sequence.short = !fed;
            self.short = if fed { self.short - 1 } else { self.short + 1 };
        }
        fed
    }

    /// Gives a sequence `more` blocks, if what follows is safe.
    fn grant(&mut self, id: SequenceId, more: usize, tier: &mut dyn LowerTier) -> bool {
        let free = self.blocks.free_blocks();
        if free < more
            || (free < self.owed && !self.banker.safe(&self.blocks, &self.sequences, Some((id, more))))
        {
            return false;
        }
        let Some(table) = self.sequences.get_mut(&id).and_then(|sequence| sequence.table.as_mut()) else {
            return false;
        };
        let blocks = table.blocks().len() + more;
        let grown = self.blocks.grow(table, blocks, tier);
        self.owed -= if grown { more } else { 0 };
        grown
    }
}
