//! Which sequences a worker holds, in what state, and which of them the next step runs: a synchronous function of
//! (state, event, now).
//!
//! ```text
//!            admit            HandedOff              Sampled (rule ends it)
//!  request ────────► waiting ───────────► running ─────────────────────────► finished ──► released
//!                       │   for its KV       │ ▲ Sampled                         ▲
//!                       │                    └─┘                                 │
//!                       └── Cancelled, Failed, deadline, stalled reader ─────────┘ (from running too)
//! ```
//!
//! A sequence is admitted only with blocks for its whole life, prompt and `max_tokens`: it can never be evicted, run
//! out of memory half-way, or wait for another one's end. It holds them until [`Scheduler::release`], which comes after
//! its ticket is revoked; so a finished sequence's memory still has an owner while a push to it may be in the air.
//!
//! Blocks are findable once every row in them is there: those of a prompt from its hand-off on, those of a completion as
//! they fill. What is found of a prompt at admission is shared, and only the rest is handed over; so the next turn of
//! a chat brings what the last one did not leave here.
//!
//! Invariant: a block that more than one sequence holds is full, findable, and written by none of them;
//! [`Scheduler::check_invariants`] says it all.
//! Deliberately absent: clocks, threads, the engine, and what happens to a sampled token besides ending its sequence.

mod invariants;
mod sequence;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use engine::{BlockPool, Reservation};
use model::TokenId;
use proto::ticket::TicketId;

use self::sequence::State;
pub use self::sequence::{Admission, End, Event, Sequence, SequenceId};
use crate::error::Failure;
/// Bounds on what the scheduler holds.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences held at once, in any state.
    pub sequences_max: usize,
    /// Sequences in one step.
    pub batch_max: usize,
    /// Blocks in the pool.
    pub kv_blocks: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// How long a running sequence may wait for its reader.
    pub reader_stall_max: Duration,
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
    /// Blocks or seats are taken at the moment.
    NoRoom {
        /// Blocks for prompt and completion.
        blocks: usize,
    },
}

/// What the prefix cache has done since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixStats {
    /// Tokens of the prompts that were looked up.
    pub tokens: u64,
    /// Those of them whose KV was here.
    pub hit_tokens: u64,
    /// Cached blocks that had to go.
    pub evictions: u64,
}

/// Sequences, their blocks, and whose turn it is.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockPool,
    /// Ordered, so that a run is a function of its events alone.
    sequences: BTreeMap<SequenceId, Sequence>,
    tickets: HashMap<TicketId, SequenceId>,
    /// Running sequences, the one that waited longest for a step first.
    turns: VecDeque<SequenceId>,
    /// Ended sequences that hold blocks, in order of their end.
    finished: VecDeque<SequenceId>,
    paused: usize,
    next_id: u64,
    prefix: PrefixStats,
}

impl Scheduler {
    /// An empty scheduler over a pool of `limits.kv_blocks` free blocks.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: BlockPool::new(limits.kv_blocks, limits.block_tokens),
            sequences: BTreeMap::new(),
            tickets: HashMap::with_capacity(limits.sequences_max),
            turns: VecDeque::with_capacity(limits.sequences_max),
            finished: VecDeque::with_capacity(limits.sequences_max),
            paused: 0,
            next_id: 0,
            prefix: PrefixStats::default(),
        }
    }

    /// The bounds it was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes a request in with blocks for its whole life, those that hold its prompt's KV already first; it waits for the
    /// rest of its KV from here on.
    pub fn admit(&mut self, admission: Admission) -> Result<SequenceId, NotAdmitted> {
        let Admission { prompt, cache_salt, rule, deadline } = admission;
        let prompt_tokens = prompt.len();
        let life_tokens = prompt_tokens + rule.tokens_max() as usize;
        let blocks = life_tokens.div_ceil(self.limits.block_tokens);
        if blocks > self.limits.kv_blocks {
            return Err(NotAdmitted::NeverFits { blocks, blocks_max: self.limits.kv_blocks });
        }
        if self.sequences.len() >= self.limits.sequences_max {
            return Err(NotAdmitted::NoRoom { blocks });
        }
        let reservation = Reservation {
            salt: cache_salt,
            prompt: &prompt,
            // Also the last block, when it is full: the first row that is computed here lies behind the prompt.
            shared_max: prompt_tokens / self.limits.block_tokens,
            blocks,
        };
        let table = self.blocks.reserve(reservation).ok_or(NotAdmitted::NoRoom { blocks })?;
        self.prefix.tokens += prompt_tokens as u64;
        self.prefix.hit_tokens += (table.shared() * self.limits.block_tokens) as u64;
        let mut tokens = Vec::with_capacity(life_tokens);
        tokens.extend_from_slice(&prompt);
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence {
            state: State::Waiting,
            table,
            tokens,
            prompt_tokens,
            generated: 0,
            rule,
            deadline,
            ticket: None,
        };
        self.sequences.insert(id, sequence);
        Ok(id)
    }

    /// Tells what happened to a sequence. What no longer matters to its state is ignored: a cancel, a deadline, an
    /// arrival and the end of a step may all race, and the first of them that ends a sequence wins.
    pub fn apply(&mut self, id: SequenceId, event: Event, now: Instant) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        match (&mut sequence.state, event) {
            (State::Finished(_), _) => {}
            (State::Waiting, Event::Armed(ticket)) => {
                sequence.ticket = Some(ticket);
                self.tickets.insert(ticket, id);
            }
            (State::Waiting, Event::HandedOff(first)) => {
                sequence.state = State::Running { last: first, paused: None };
                self.blocks.commit(&mut sequence.table, &sequence.tokens);
                self.turns.push_back(id);
                self.accept(id, first);
            }
            (State::Running { .. }, Event::Sampled(token)) => {
                // The step that sampled it computed the row of the token before it.
                self.blocks.commit(&mut sequence.table, &sequence.tokens);
                self.accept(id, token);
            }
            (State::Running { paused: paused @ None, .. }, Event::ReaderFull) => {
                *paused = Some(now);
                self.paused += 1;
            }
            (State::Running { paused: paused @ Some(_), .. }, Event::ReaderReady) => {
                *paused = None;
                self.paused -= 1;
            }
            (_, Event::Failed(failure)) => self.end(id, End::Failed(failure)),
            (State::Waiting, Event::Sampled(_) | Event::ReaderFull | Event::ReaderReady)
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

    /// Forms the next step into `batch`, which is cleared first; empty when there is nothing to run.
    ///
    /// Up to `batch_max` sequences in the order in which they last had a turn, so that more of them than fit take turns.
    /// Which sequences share a step changes none of their bits.
    pub fn schedule(&mut self, batch: &mut Vec<SequenceId>) {
        batch.clear();
        for _ in 0..self.turns.len() {
            if batch.len() == self.limits.batch_max {
                break;
            }
            self.turns.rotate_left(1);
            let Some(&id) = self.turns.back() else { break };
            if matches!(self.sequences[&id].state, State::Running { paused: None, .. }) {
                batch.push(id);
            }
        }
    }

    /// The sequence that ended longest ago and still holds its blocks.
    pub fn next_finished(&self) -> Option<SequenceId> {
        self.finished.front().copied()
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
        self.blocks.release(sequence.table);
        match sequence.state {
            State::Finished(end) => Some(end),
            State::Waiting | State::Running { .. } => None,
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

    /// Sequences whose KV is on the way.
    pub fn waiting(&self) -> usize {
        self.sequences.len() - self.turns.len() - self.finished.len()
    }

    /// Sequences that take part in steps, paused ones included.
    pub fn running(&self) -> usize {
        self.turns.len()
    }

    /// Sequences that the next step could run.
    pub fn runnable(&self) -> usize {
        self.turns.len() - self.paused
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
        PrefixStats { evictions: self.blocks.evictions(), ..self.prefix }
    }

    /// Sequences that could still be held.
    pub fn free_seats(&self) -> usize {
        self.limits.sequences_max - self.sequences.len()
    }

    /// Steps until the first running sequence reaches its `max_tokens`: the latest moment at which room appears.
    pub fn steps_until_room(&self) -> Option<u32> {
        let running = self.turns.iter().map(|id| &self.sequences[id]);
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
                self.turns.retain(|&running| running != id);
            }
            State::Waiting => {}
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
            State::Waiting | State::Running { paused: None, .. } => None,
        };
        let deadline = sequence.deadline.map(|at| (at, Failure::DeadlineExceeded));
        deadline.into_iter().chain(stalled).min_by_key(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests;
