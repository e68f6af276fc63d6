//! Which sequences a worker holds, in what state, and which of them the next step runs: a synchronous function of
//! (state, event, now).
//!
//! ```text
//!          submit         admit_next         HandedOff            Sampled (rule ends it)
//!  request ──────► queued ───────────► waiting ─────────► running ────────────────────────► finished ──► released
//!                    │     gets blocks    │   for its KV    │ ▲ Sampled                         ▲
//!                    │                    │                 └─┘                                 │
//!                    └────────────────────┴── Cancelled, Failed, deadline, stalled reader ──────┘ (from running too)
//! ```
//!
//! A sequence whose prompt is computed here is *prefilling* where others wait: its chunks, in order of admission, share a
//! budget of tokens between two steps ([`Scheduler::schedule_chunks`]), so that no step waits for a whole prompt.
//!
//! Blocks are taken as a sequence grows: those of its prompt when it is admitted, one more each time that its tokens fill
//! the last. **No sequence is ever evicted, and none ever needs a block that cannot be had**: every admission and every
//! growth must leave a state from which all can reach their worst case, prompt and `max_tokens`, one after another
//! (`banker.rs` has the argument). One whose next block would not pauses for the step and keeps what it has, and
//! while somebody does, nobody is admitted. That pauses are rare is admission's business, which plans with the
//! lengths that completions had of late (`room.rs`, `length_estimate.rs`).
//!
//! Memory stays with a sequence until [`Scheduler::release`], which comes after its ticket is revoked; so a finished
//! sequence's memory still has an owner while a push to it may be in the air.
//!
//! Blocks are findable once every row in them is there: those of a prompt from its hand-off on, those of a completion as
//! they fill. What is found of a prompt at admission is shared, and only the rest is handed over; so the next turn of
//! a chat brings what the last one did not leave here.
//!
//! Invariant: a block that more than one sequence holds is full, findable, and written by none of them;
//! [`Scheduler::check_invariants`] says it all.
//! Deliberately absent: clocks, threads, the engine, and what happens to a sampled token besides ending its sequence.

mod banker;
mod forecast;
mod invariants;
mod length_estimate;
mod prefilling;
mod restore;
mod room;
mod sequence;
mod turns;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use engine::{BlockPool, LowerTier};
use model::TokenId;
use proto::share::{FairQueue, Priority};
use proto::ticket::TicketId;

use self::banker::Banker;
use self::forecast::Outlook;
use self::length_estimate::LengthEstimate;
use self::sequence::State;
pub use self::sequence::{Admission, Chunk, End, Event, Sequence, SequenceId};
use self::turns::Turns;
use crate::error::Failure;
use crate::finish::Finish;

/// How long a batch request that waits for memory may go behind every interactive one.
pub const BATCH_AGING_MAX: Duration = Duration::from_secs(5);

/// Bounds on what the scheduler holds.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences that hold blocks at once.
    pub sequences_max: usize,
    /// Sequences that wait for blocks.
    pub queue_max: usize,
    /// Sequences in one step.
    pub batch_max: usize,
    /// Rows of one sequence in a step: its last token and what is drafted behind it. At least 1.
    pub step_rows_max: usize,
    /// Blocks in the pool.
    pub kv_blocks: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// How long a running sequence may wait for its reader.
    pub reader_stall_max: Duration,
    /// Tokens before the end of a found prefix that are run again where a prompt is computed here: 1 where an MTP module's
    /// cache is kept, whose rows behind the prefix begin with the hidden state before them; otherwise 0.
    pub rerun_tokens: usize,
}

/// Why a request was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAdmitted {
    /// It needs more blocks than there are.
    NeverFits {
        /// Blocks for prompt and completion.
        blocks: usize,
        /// Blocks in the pool.
        blocks_max: usize,
    },
    /// As many wait for blocks as may.
    QueueFull {
        /// Sequences that wait.
        queued: usize,
    },
}

/// What the prefix cache has done since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixStats {
    /// Tokens of the prompts that were looked up.
    pub tokens: u64,
    /// Those of them whose KV was here.
    pub hit_tokens: u64,
    /// Those of the found ones that came from memory of the host.
    pub host_hit_tokens: u64,
    /// Those of the found ones that came from the disk.
    pub disk_hit_tokens: u64,
    /// Cached blocks that had to go.
    pub evictions: u64,
}

/// What planning with estimates has led to since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlanStats {
    /// Turns that were passed over because no block was safe to give.
    pub memory_pauses: u64,
    /// Tokens by which completions that ended by themselves outlived what was expected of them.
    pub underestimated_tokens: u64,
    /// Tokens by which they stayed below it.
    pub overestimated_tokens: u64,
}

/// Sequences, their blocks, and whose turn it is.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockPool,
    /// Ordered, so that a run is a function of its events alone.
    sequences: BTreeMap<SequenceId, Sequence>,
    tickets: HashMap<TicketId, SequenceId>,
    /// Sequences without blocks, in the order in which they are admitted.
    queue: FairQueue<SequenceId>,
    /// Sequences without blocks that wait for a disk before they are queued.
    restoring: BTreeSet<SequenceId>,
    /// The head that was found to have no room, until something gives blocks back.
    refused: Option<SequenceId>,
    turns: Turns,
    /// Sequences whose prompts are computed here, in order of admission.
    prefilling: VecDeque<SequenceId>,
    /// Ended sequences that are not released yet, in order of their end.
    finished: VecDeque<SequenceId>,
    /// Running sequences whose reader is behind.
    paused: usize,
    /// Running sequences that are short of a block.
    short: usize,
    /// The last step was empty although somebody could have been stepped: all were short.
    starved: bool,
    /// Sequences that hold blocks, in any state.
    holders: usize,
    /// Blocks that all of them together may still ask for.
    owed: usize,
    banker: Banker,
    lengths: LengthEstimate,
    /// Reused from forecast to forecast.
    outlooks: Vec<Outlook>,
    next_id: u64,
    prefix: PrefixStats,
    plan: PlanStats,
}

impl Scheduler {
    /// An empty scheduler over a pool of `limits.kv_blocks` free blocks.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: BlockPool::new(limits.kv_blocks, limits.block_tokens),
            sequences: BTreeMap::new(),
            tickets: HashMap::with_capacity(limits.sequences_max),
            queue: FairQueue::new(BATCH_AGING_MAX),
            restoring: BTreeSet::new(),
            refused: None,
            turns: Turns::new(),
            prefilling: VecDeque::new(),
            finished: VecDeque::with_capacity(limits.sequences_max),
            paused: 0,
            short: 0,
            starved: false,
            holders: 0,
            owed: 0,
            banker: Banker::new(limits.kv_blocks, limits.sequences_max),
            lengths: LengthEstimate::new(),
            outlooks: Vec::with_capacity(limits.sequences_max),
            next_id: 0,
            prefix: PrefixStats::default(),
            plan: PlanStats::default(),
        }
    }

    /// The bounds it was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Tells what happened to a sequence. What no longer matters to its state is ignored: a cancel, a deadline, an
    /// arrival and the end of a step may all race, and the first of them that ends a sequence wins.
    pub fn apply(&mut self, id: SequenceId, event: Event, now: Instant) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        match (&mut sequence.state, event) {
            (State::Finished(_), _) => {}
            (State::Waiting | State::Prefilling { .. }, Event::Armed(ticket)) => {
                sequence.ticket = Some(ticket);
                self.tickets.insert(ticket, id);
            }
            (State::Prefilling { computed }, Event::Computed(tokens)) => {
                *computed += tokens;
                if let Some(table) = &mut sequence.table {
                    self.blocks.commit(table, &sequence.tokens[..*computed]);
                }
            }
            (State::Waiting | State::Prefilling { .. }, Event::HandedOff(first)) => {
                self.prefilling.retain(|&prefilling| prefilling != id);
                sequence.state = State::Running { last: first, paused: None };
                if let Some(table) = &mut sequence.table {
                    self.blocks.commit(table, &sequence.tokens);
                }
                self.turns.join(id, sequence.share);
                self.accept(id, first);
            }
            (State::Running { .. }, Event::Sampled(token)) => {
                // The step that sampled it computed the row of the token before it.
                if let Some(table) = &mut sequence.table {
                    self.blocks.commit(table, &sequence.tokens);
                }
                self.accept(id, token);
            }
            (State::Running { paused: paused @ None, .. }, Event::ReaderFull) => {
                *paused = Some(now);
                self.paused += 1;
                // Nobody is kept waiting for a block that it could not use now.
                self.short -= usize::from(std::mem::take(&mut sequence.short));
            }
            (State::Running { paused: paused @ Some(_), .. }, Event::ReaderReady) => {
                *paused = None;
                self.paused -= 1;
            }
            (_, Event::Failed(failure)) => self.end(id, End::Failed(failure)),
            (State::Waiting | State::Prefilling { .. } | State::Running { .. }, Event::Stopped) => {
                self.end(id, End::Finished(Finish::StopString))
            }
            (State::Queued { .. }, _)
            | (
                State::Waiting | State::Prefilling { .. },
                Event::Sampled(_) | Event::ReaderFull | Event::ReaderReady,
            )
            | (State::Waiting | State::Running { .. }, Event::Computed(_))
            | (
                State::Running { .. },
                Event::Armed(_) | Event::HandedOff(_) | Event::ReaderFull | Event::ReaderReady,
            ) => {}
        }
    }

    /// Ends what time has ended: deadlines, and readers that took nothing for too long.
    pub fn tick(&mut self, now: Instant) {
        while let Some((id, failure)) = self.overdue(now) {
            self.end(id, End::Failed(failure));
        }
    }

    /// Ends everything: the worker cannot go on.
    pub fn fail_all(&mut self, failure: &Failure) {
        let ids: Vec<_> = self.sequences.keys().copied().collect();
        for id in ids {
            self.end(id, End::Failed(failure.clone()));
        }
    }

    /// Ends what has no blocks yet: it fares better elsewhere.
    pub fn fail_queued(&mut self, failure: &Failure) {
        let ids: Vec<_> = self.queue.iter().chain(&self.restoring).copied().collect();
        for id in ids {
            self.end(id, End::Failed(failure.clone()));
        }
    }

    /// Forms the next step into `batch`, which is cleared first, and sees to the blocks that it needs; empty when there is
    /// nothing to run.
    ///
    /// Where more sequences run than `batch_max`, tenants take turns by their weights. A sequence without a block for its
    /// next token is passed over. Which sequences share a step changes none of their bits. Cached blocks that give way to
    /// growth go to `tier`.
    pub fn schedule(&mut self, batch: &mut Vec<SequenceId>, tier: &mut dyn LowerTier) {
        batch.clear();
        let mut turns = std::mem::replace(&mut self.turns, Turns::new());
        let contended = turns.len() - self.paused > self.limits.batch_max;
        turns.begin();
        while batch.len() < self.limits.batch_max {
            let Some(id) = turns.next(contended, |id| self.can_step(id, tier)) else { break };
            batch.push(id);
        }
        self.turns = turns;
        self.starved = batch.is_empty() && self.turns.len() > self.paused;
    }

    /// Whether a running sequence can take its turn, with a block for it if it needs one.
    fn can_step(&mut self, id: SequenceId, tier: &mut dyn LowerTier) -> bool {
        let reads = |sequence: &Sequence| matches!(sequence.state, State::Running { paused: None, .. });
        if !self.sequences.get(&id).is_some_and(reads) {
            return false;
        }
        let fed = self.grow_for_step(id, tier);
        self.plan.memory_pauses += u64::from(!fed);
        fed
    }

    /// The sequence that ended longest ago and still holds its blocks.
    pub fn next_finished(&self) -> Option<SequenceId> {
        self.finished.front().copied()
    }

    /// All that ended and still hold their blocks, the oldest first.
    pub fn finished(&self) -> impl Iterator<Item = SequenceId> {
        self.finished.iter().copied()
    }

    /// Forgets a finished sequence and frees its blocks; the findable ones stay cached until they are needed. Its ticket must be dead by now. `None` when `id` has not
    /// finished.
    pub fn release(&mut self, id: SequenceId) -> Option<End> {
        if !matches!(self.sequences.get(&id)?.state, State::Finished(_)) {
            return None;
        }
        let sequence = self.sequences.remove(&id)?;
        self.finished.retain(|&finished| finished != id);
        if let Some(ticket) = sequence.ticket {
            self.tickets.remove(&ticket);
        }
        if let Some(table) = sequence.table {
            self.blocks.release(table);
            self.holders -= 1;
            self.refused = None;
            self.starved = false;
        }
        match sequence.state {
            State::Finished(end) => Some(end),
            State::Queued { .. } | State::Waiting | State::Prefilling { .. } | State::Running { .. } => None,
        }
    }

    /// A sequence that is held here, in any state.
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// The sequence that a ticket was issued for.
    pub fn by_ticket(&self, ticket: TicketId) -> Option<SequenceId> {
        self.tickets.get(&ticket).copied()
    }

    /// The next moment at which [`Self::tick`] has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.sequences.values().filter_map(|sequence| self.due(sequence)).map(|(at, _)| at).min()
    }

    /// Sequences without blocks, of one class.
    pub fn queued(&self, priority: Priority) -> usize {
        self.queue.len_of(priority)
    }

    /// Sequences whose KV is on the way, or is computed here.
    pub fn waiting(&self) -> usize {
        let queued = self.queue.len() + self.restoring.len();
        self.sequences.len() - queued - self.turns.len() - self.finished.len()
    }

    /// Sequences that take part in steps, paused ones included.
    pub fn running(&self) -> usize {
        self.turns.len()
    }

    /// Sequences that the next round could advance, by a token or a chunk of their prompt. None of those that run while all that read are short of a block: they wait for a hand-off's
    /// or a reader's end and owe no step.
    pub fn runnable(&self) -> usize {
        self.prefilling.len() + if self.starved { 0 } else { self.turns.len() - self.paused }
    }

    /// Running sequences that are short of a block.
    pub fn short(&self) -> usize {
        self.short
    }

    /// Whether no sequence is held in any state.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Blocks that no sequence holds, cached ones included.
    pub fn free_blocks(&self) -> usize {
        self.blocks.free_blocks()
    }

    /// Blocks that no sequence holds and whose KV can still be found.
    pub fn cached_blocks(&self) -> usize {
        self.blocks.cached_blocks()
    }

    /// What the prefix cache has done since the start.
    pub fn prefix_stats(&self) -> PrefixStats {
        let (restored, block_tokens) = (self.blocks.restored(), self.limits.block_tokens as u64);
        PrefixStats {
            host_hit_tokens: restored.host * block_tokens,
            disk_hit_tokens: restored.disk * block_tokens,
            evictions: self.blocks.evictions(),
            ..self.prefix
        }
    }

    /// Offers every block that nobody holds to `tier`: this worker ends.
    pub fn keep_cached(&self, tier: &mut dyn LowerTier) {
        self.blocks.keep_cached(tier);
    }

    /// What planning with estimates has led to since the start.
    pub fn plan_stats(&self) -> PlanStats {
        self.plan
    }

    /// Steps until the first running sequence reaches its `max_tokens`: the latest moment at which room appears.
    pub fn steps_until_room(&self) -> Option<u32> {
        let running = self.turns.iter().map(|id| &self.sequences[&id]);
        running.map(|sequence| sequence.rule.tokens_max() - sequence.generated).min()
    }

    /// Counts a token and lets the rule judge it.
    fn accept(&mut self, id: SequenceId, token: TokenId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.generated += 1;
        sequence.tokens.push(token);
        if let State::Running { last, .. } = &mut sequence.state {
            *last = token;
        }
        if let Some(finish) = sequence.rule.judge(token, sequence.generated) {
            self.end(id, End::Finished(finish));
        }
    }

    fn end(&mut self, id: SequenceId, end: End) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        match sequence.state {
            State::Finished(_) => return,
            State::Running { paused, .. } => {
                self.paused -= usize::from(paused.is_some());
                self.turns.leave(id, sequence.share);
            }
            State::Waiting => {}
            State::Prefilling { .. } => self.prefilling.retain(|&prefilling| prefilling != id),
            State::Queued { .. } => {
                self.restoring.remove(&id);
                self.queue.remove(|&queued| queued == id);
            }
        }
        self.owed -= sequence.owed_blocks();
        self.short -= usize::from(std::mem::take(&mut sequence.short));
        // What ends before its first token says nothing about lengths.
        if sequence.generated > 0 {
            let by_itself = matches!(&end, End::Finished(finish) if *finish != Finish::Length);
            self.lengths.observe(sequence.generated, by_itself);
            if by_itself {
                let (expected, generated) = (sequence.expected_tokens, sequence.generated);
                self.plan.underestimated_tokens += u64::from(generated.saturating_sub(expected));
                self.plan.overestimated_tokens += u64::from(expected.saturating_sub(generated));
            }
        }
        sequence.state = State::Finished(end);
        self.finished.push_back(id);
    }

    fn overdue(&self, now: Instant) -> Option<(SequenceId, Failure)> {
        self.sequences.iter().find_map(|(&id, sequence)| {
            self.due(sequence).filter(|(at, _)| *at <= now).map(|(_, failure)| (id, failure))
        })
    }

    /// When time ends `sequence`, and as what.
    fn due(&self, sequence: &Sequence) -> Option<(Instant, Failure)> {
        let stall_max = self.limits.reader_stall_max;
        let stalled = match sequence.state {
            State::Finished(_) => return None,
            State::Running { paused: Some(since), .. } => {
                Some((since + stall_max, Failure::ReaderStalled(stall_max)))
            }
            State::Queued { .. }
            | State::Waiting
            | State::Prefilling { .. }
            | State::Running { paused: None, .. } => None,
        };
        let deadline = sequence.deadline.map(|at| (at, Failure::DeadlineExceeded));
        deadline.into_iter().chain(stalled).min_by_key(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests;
