//! Which prompt tokens run in the next step: a synchronous function of (state, event, now).
//!
//! Hop 6, second half. Prompts wait in one bounded queue in which tenants take turns by their weights, counted in prompt
//! tokens, and interactive goes before batch until batch has aged. The head of the queue
//! is admitted once the pool holds blocks for its *whole* prompt, so an admitted sequence never
//! waits for memory and two half-computed prompts can not starve each other; nobody
//! overtakes a head that lacks blocks, because a stream of short prompts would then hold a long one
//! off for ever. A step takes chunks of admitted sequences until its token budget is spent; `step.rs` says whose. Blocks
//! stay with a sequence until its hand-off has ended.
//!
//! What the prefix cache holds of a prompt is looked up when the prompt is admitted, the latest moment at which it
//! matters; its chunks begin behind that, or one token earlier ([`Limits::rerun_tokens`]). A prompt's blocks are findable as soon as the step that fills them has ended.
//!
//! Deliberately absent: clocks, threads, tokio, and the engine's step.

mod restore;
mod step;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{BlockPool, BlockTable, LowerTier};
use model::{BlockId, TokenId};
use proto::share::{FairQueue, Priority, Share};
use tracing::Span;

/// A sequence within this worker; numbers are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// How long a batch prompt that waits may go behind every interactive one.
pub const BATCH_AGING_MAX: Duration = Duration::from_secs(5);

/// Bounds on what the scheduler holds.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences waiting for their first chunk.
    pub queue_requests_max: usize,
    /// Prompt tokens of the waiting sequences together; one prompt alone may exceed it.
    pub queue_tokens_max: usize,
    /// Sequences that hold blocks: being computed or being handed off.
    pub active_max: usize,
    /// Token budget of a step.
    pub step_tokens_max: usize,
    /// Tokens in a KV block.
    pub block_tokens: usize,
    /// Blocks in the pool.
    pub kv_blocks: usize,
    /// Tokens before the end of a found prefix that are run again: 1 where an MTP module's cache is kept, whose rows behind
    /// the prefix begin with the hidden state before them; otherwise 0.
    pub rerun_tokens: usize,
}

/// A prompt that wants to be computed.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Its name here.
    pub id: SequenceId,
    /// Its name in the cluster, for spans.
    pub request_id: Arc<str>,
    /// Whose cached prefixes it may share.
    pub cache_salt: u64,
    /// Whose turns it takes.
    pub share: Share,
    /// Tokens to compute, at least one.
    pub prompt: Arc<[TokenId]>,
    /// Whether every token must be computed: something is wanted of each that no cache holds.
    pub recompute: bool,
    /// When nobody wants the answer any more.
    pub deadline: Option<Instant>,
}

/// Why an arrival was not queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// As many sequences as allowed are waiting.
    #[error("prefill queue is full: {waiting} requests wait")]
    QueueRequests {
        /// Waiting sequences.
        waiting: usize,
    },
    /// As many prompt tokens as allowed are waiting.
    #[error("prefill queue is full: {waiting} prompt tokens wait")]
    QueueTokens {
        /// Prompt tokens of the waiting sequences.
        waiting: usize,
    },
    /// The prompt could not fit even into an empty pool.
    #[error("prompt of {prompt_tokens} tokens exceeds this worker's KV pool of {pool_tokens}")]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens that the pool holds.
        pool_tokens: usize,
    },
    /// There is nothing to compute.
    #[error("prompt is empty")]
    Empty,
}

/// One sequence's share of a step: prompt tokens `start..start + tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub id: SequenceId,
    /// Position of the first token.
    pub start: usize,
    /// Number of tokens, at least one.
    pub tokens: usize,
    /// Whether the prompt ends here, so that this chunk yields the first token.
    pub last: bool,
}

/// What the prefix cache has done since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixStats {
    /// Tokens of the prompts that were looked up.
    pub tokens: u64,
    /// Those of them that were found.
    pub hit_tokens: u64,
    /// Those of the found ones that came from memory of the host.
    pub host_hit_tokens: u64,
    /// Those of the found ones that came from the disk.
    pub disk_hit_tokens: u64,
    /// Cached blocks that had to go.
    pub evictions: u64,
}

/// Sequences with what they wait for.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockPool,
    sequences: HashMap<SequenceId, Sequence>,
    /// Not started, in the order in which they are admitted.
    waiting: FairQueue<SequenceId>,
    /// Not started, and not to be before what a disk has of them has been read.
    restoring: usize,
    /// Admitted and not computed to the end, in order of admission.
    running: VecDeque<SequenceId>,
    /// Prompt tokens of `waiting` and of those that are being restored.
    queued_tokens: usize,
    /// Prompt tokens of these and the rest of `running`.
    uncomputed_tokens: usize,
    prefix: PrefixStats,
}

#[derive(Debug)]
struct Sequence {
    prompt: Arc<[TokenId]>,
    recompute: bool,
    cache_salt: u64,
    share: Share,
    /// Waits for a disk, outside the queue.
    restoring: bool,
    /// Tokens whose KV is there, found ones included.
    computed: usize,
    /// Tokens whose KV was found.
    cached: usize,
    deadline: Option<Instant>,
    /// `None` while waiting.
    table: Option<BlockTable>,
    /// Part of the step that is running: its blocks are being written.
    in_step: bool,
    /// Removed during the step; goes when the step ends.
    leaving: bool,
    /// Open from arrival to the first chunk.
    queued: Option<Span>,
}

impl Scheduler {
    /// An empty scheduler over a pool of `limits.kv_blocks` free blocks.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: BlockPool::new(limits.kv_blocks, limits.block_tokens),
            sequences: HashMap::new(),
            waiting: FairQueue::new(BATCH_AGING_MAX),
            restoring: 0,
            running: VecDeque::new(),
            queued_tokens: 0,
            uncomputed_tokens: 0,
            prefix: PrefixStats::default(),
        }
    }

    /// Queues a prompt. `arrival.id` must be new.
    pub fn submit(&mut self, arrival: Arrival, now: Instant) -> Result<(), Refusal> {
        let Arrival { id, request_id, cache_salt, share, prompt, recompute, deadline } = arrival;
        let prompt_tokens = prompt.len();
        debug_assert!(!self.sequences.contains_key(&id), "sequence ids are unique");
        if prompt_tokens == 0 {
            return Err(Refusal::Empty);
        }
        if self.blocks_for(prompt_tokens) > self.limits.kv_blocks {
            let pool_tokens = self.limits.kv_blocks * self.limits.block_tokens;
            return Err(Refusal::TooLong { prompt_tokens, pool_tokens });
        }
        let waiting = self.waiting();
        if waiting >= self.limits.queue_requests_max {
            return Err(Refusal::QueueRequests { waiting });
        }
        let waiting = self.queued_tokens;
        if waiting > 0 && waiting + prompt_tokens > self.limits.queue_tokens_max {
            return Err(Refusal::QueueTokens { waiting });
        }
        let queued = tracing::info_span!("schedule", hop = 6, %request_id);
        self.sequences.insert(
            id,
            Sequence {
                prompt,
                recompute,
                cache_salt,
                share,
                restoring: false,
                computed: 0,
                cached: 0,
                deadline,
                table: None,
                in_step: false,
                leaving: false,
                queued: Some(queued),
            },
        );
        self.waiting.push(share, prompt_tokens as u64, id, now);
        self.queued_tokens += prompt_tokens;
        self.uncomputed_tokens += prompt_tokens;
        Ok(())
    }

    /// Names the sequences whose deadline has passed; the caller removes them.
    pub fn overdue(&self, now: Instant) -> Vec<SequenceId> {
        let late = |sequence: &Sequence| sequence.deadline.is_some_and(|deadline| deadline <= now);
        let overdue = self.sequences.iter().filter(|(_, sequence)| late(sequence));
        overdue.map(|(&id, _)| id).collect()
    }

    /// Ends a step whose KV is computed: prompts move on, the blocks that it filled can be found, and sequences that were
    /// removed meanwhile go.
    pub fn complete(&mut self, step: &[Chunk]) {
        for chunk in step {
            let Some(sequence) = self.sequences.get_mut(&chunk.id) else {
                continue;
            };
            sequence.in_step = false;
            sequence.computed += chunk.tokens;
            self.uncomputed_tokens -= chunk.tokens;
            if let Some(table) = &mut sequence.table {
                self.blocks.commit(table, &sequence.prompt[..sequence.computed]);
            }
            let computed = sequence.computed == sequence.prompt.len();
            let leaving = sequence.leaving;
            if computed {
                self.running.retain(|&id| id != chunk.id);
            }
            if leaving {
                self.remove(chunk.id);
            }
        }
    }

    /// Ends a step that failed: nothing of it counts, and its sequences go.
    pub fn fail(&mut self, step: &[Chunk]) {
        for chunk in step {
            if let Some(sequence) = self.sequences.get_mut(&chunk.id) {
                sequence.in_step = false;
            }
            self.remove(chunk.id);
        }
    }

    /// Forgets a sequence in whatever state and frees its blocks; one that is in the running step
    /// goes when the step ends. Unknown ids are ignored, so that cancel, deadline and the end of a
    /// hand-off may race.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        if sequence.in_step {
            sequence.leaving = true;
            return;
        }
        let Some(sequence) = self.sequences.remove(&id) else {
            return;
        };
        self.uncomputed_tokens -= sequence.prompt.len() - sequence.computed;
        if let Some(table) = sequence.table {
            self.blocks.release(table);
            self.running.retain(|&running| running != id);
        } else {
            self.queued_tokens -= sequence.prompt.len();
            self.restoring -= usize::from(sequence.restoring);
            self.waiting.remove(|&waiting| waiting == id);
        }
    }

    /// The blocks of an admitted sequence in order; empty while it waits or when it is unknown.
    pub fn block_table(&self, id: SequenceId) -> &[BlockId] {
        let table = self.sequences.get(&id).and_then(|sequence| sequence.table.as_ref());
        table.map_or(&[], BlockTable::blocks)
    }

    /// Tokens at a prompt's start that were found instead of computed.
    pub fn cached_tokens(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |sequence| sequence.cached)
    }

    /// Sequences waiting for their first chunk.
    pub fn waiting(&self) -> usize {
        self.waiting.len() + self.restoring
    }

    /// Sequences of one class waiting for their first chunk.
    pub fn waiting_of(&self, priority: Priority) -> usize {
        self.waiting.len_of(priority)
    }

    /// Sequences that hold blocks: being computed or being handed off.
    pub fn active(&self) -> usize {
        self.sequences.len() - self.waiting()
    }

    /// Prompt tokens queued and not yet computed.
    pub fn uncomputed_tokens(&self) -> usize {
        self.uncomputed_tokens
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

    /// Blocks of a prompt that may be found: the last token is computed in any case, since the first token comes from its
    /// logits.
    fn shared_max(&self, sequence: &Sequence) -> usize {
        if sequence.recompute { 0 } else { (sequence.prompt.len() - 1) / self.limits.block_tokens }
    }

    fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.limits.block_tokens)
    }

    /// Panics when the books do not balance. For tests and simulation; costs a walk over everything.
    pub fn check_invariants(&self) {
        self.blocks.check_invariants(self.sequences.values().filter_map(|sequence| sequence.table.as_ref()));
        for (id, sequence) in &self.sequences {
            let waits = self.waiting.iter().any(|waiting| waiting == id);
            let runs = self.running.contains(id);
            assert!(!(waits && runs), "{id:?} waits and runs");
            assert!(!(waits && sequence.restoring), "{id:?} waits for its turn once it is restored");
            let waits = waits || sequence.restoring;
            assert_eq!(waits, sequence.table.is_none(), "{id:?} waits without blocks");
            assert_eq!(
                waits || runs,
                sequence.computed < sequence.prompt.len(),
                "{id:?} waits or runs until computed"
            );
            assert!(sequence.in_step || !sequence.leaving, "{id:?} leaves only after a step");
            if let Some(table) = &sequence.table {
                let blocks = self.blocks_for(sequence.prompt.len());
                assert_eq!(table.blocks().len(), blocks, "{id:?} holds its whole prompt's blocks");
                let shared = table.shared() * self.limits.block_tokens;
                assert_eq!(sequence.cached, shared, "{id:?} skips what it found");
                let rerun = self.limits.rerun_tokens;
                assert!(shared <= sequence.computed + rerun, "{id:?} starts behind what it found");
                assert!(shared < sequence.prompt.len(), "{id:?} computes its last token");
            }
        }
        let restoring: Vec<_> = self.sequences.iter().filter(|(_, sequence)| sequence.restoring).collect();
        assert_eq!(self.restoring, restoring.len());
        assert!(self.waiting() <= self.limits.queue_requests_max);
        assert!(self.active() <= self.limits.active_max);
        self.waiting.check_invariants();
        let uncomputed = |id: &SequenceId| self.sequences[id].prompt.len() - self.sequences[id].computed;
        let waiting = self.waiting.iter().chain(restoring.iter().map(|(id, _)| *id));
        let waiting: usize = waiting.map(uncomputed).sum();
        let running: usize = self.running.iter().map(uncomputed).sum();
        assert_eq!(self.queued_tokens, waiting);
        assert_eq!(self.uncomputed_tokens, waiting + running);
        assert!(
            self.waiting() <= 1 || self.queued_tokens <= self.limits.queue_tokens_max,
            "queued tokens are bounded"
        );
    }
}

#[cfg(test)]
mod tests;
