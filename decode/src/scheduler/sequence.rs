//! One sequence of a decode worker: what it was admitted with, where it stands, and what can happen to it.
//!
//! Plain data with read access; every change of state is made by the [`Scheduler`](super::Scheduler), which owns it.

use std::sync::Arc;
use std::time::Instant;

use engine::BlockTable;
use model::{BlockId, TokenId};
use proto::share::Share;
use proto::ticket::TicketId;

use crate::error::Failure;
use crate::finish::{Finish, FinishRule};

/// A sequence within this worker; numbers are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// A request that wants to become a sequence.
#[derive(Debug, Clone)]
pub struct Admission {
    /// Tokens whose KV is found here or handed over, at least one.
    pub prompt: Arc<[TokenId]>,
    /// Whose cached prefixes it may share.
    pub cache_salt: u64,
    /// Whose turns it takes.
    pub share: Share,
    /// When it ends.
    pub rule: FinishRule,
    /// When nobody wants the answer any more.
    pub deadline: Option<Instant>,
    /// Its prompt is computed here, not handed over.
    pub prefill_here: bool,
}

/// Tokens `start..start + tokens` of a prompt that is computed here.
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

/// What happens to a sequence.
#[derive(Debug, Clone)]
pub enum Event {
    /// A ticket was issued for its blocks.
    Armed(TicketId),
    /// So many more tokens of its prompt were computed here.
    Computed(usize),
    /// The KV of its whole prompt is here; this token was sampled behind it.
    HandedOff(TokenId),
    /// A step sampled this token.
    Sampled(TokenId),
    /// Its event queue has no room for another token: it pauses.
    ReaderFull,
    /// Its event queue has room again.
    ReaderReady,
    /// Its text has reached its end, says the router: only there is text.
    Stopped,
    /// It ends here, whatever it was doing.
    Failed(Failure),
}

/// How a sequence ended.
#[derive(Debug, Clone)]
pub enum End {
    /// By its own rule.
    Finished(Finish),
    /// By something that happened to it.
    Failed(Failure),
}

/// One sequence, from its admission queue to its release.
#[derive(Debug)]
pub struct Sequence {
    pub(super) state: State,
    /// Covers what is computed and the next step. `None` while it is queued.
    pub(super) table: Option<BlockTable>,
    /// Prompt and completion so far; made for the whole life.
    pub(super) tokens: Vec<TokenId>,
    pub(super) prompt_tokens: usize,
    /// Tokens of the completion, the first one included.
    pub(super) generated: u32,
    /// What the completion was expected to be when it got its blocks.
    pub(super) expected_tokens: u32,
    /// Blocks for prompt and `max_tokens`: what it may need at worst.
    pub(super) life_blocks: usize,
    /// The last time it had a turn, there was no block for it that was safe to give.
    pub(super) short: bool,
    pub(super) share: Share,
    pub(super) rule: FinishRule,
    pub(super) deadline: Option<Instant>,
    pub(super) prefill_here: bool,
    /// Issued for these blocks: must be revoked before they are freed. Kept past the hand-off, because its name answers
    /// late duplicates for as long as the sequence lives.
    pub(super) ticket: Option<TicketId>,
}

#[derive(Debug)]
pub(super) enum State {
    /// It holds nothing yet.
    Queued { prompt: Arc<[TokenId]>, cache_salt: u64, since: Instant },
    /// Its KV is on the way.
    Waiting,
    /// Its prompt is being computed here: so many tokens of it are.
    Prefilling { computed: usize },
    /// `last` is sampled, its KV is not computed yet. `paused` since its reader fell behind.
    Running { last: TokenId, paused: Option<Instant> },
    /// Blocks are held until released.
    Finished(End),
}

impl Sequence {
    /// The blocks in order of position.
    pub fn block_table(&self) -> &[BlockId] {
        self.table.as_ref().map_or(&[], BlockTable::blocks)
    }

    /// Blocks at the prompt's start that were here at admission: the first that a hand-off may write to is behind them.
    pub fn shared_blocks(&self) -> usize {
        self.table.as_ref().map_or(0, BlockTable::shared)
    }

    /// Whether its prompt is computed here.
    pub fn prefills_here(&self) -> bool {
        self.prefill_here
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Rows that its blocks have room for in the next step, the one for the last token included. At least one for a
    /// scheduled sequence; as many as [`Limits::step_rows_max`](super::Limits) unless its life or the memory ends
    /// before. Rows behind those that stand stay its own and are written again.
    pub fn rows_max(&self, block_tokens: usize) -> usize {
        // The last token of a life is sampled and never computed.
        let life_rows = self.prompt_tokens + self.rule.tokens_max() as usize - 1;
        let rows = (self.block_table().len() * block_tokens).min(life_rows);
        (rows + 1).saturating_sub(self.length())
    }

    /// Blocks that it may still ask for.
    pub(super) fn owed_blocks(&self) -> usize {
        match self.state {
            State::Queued { .. } | State::Finished(_) => 0,
            State::Waiting | State::Prefilling { .. } | State::Running { .. } => {
                self.life_blocks - self.block_table().len()
            }
        }
    }

    /// What it takes of the memory, in tokens: the prompt at once, the completion on average half of the time.
    pub(super) fn queue_cost(&self) -> u64 {
        self.prompt_tokens as u64 + u64::from(self.expected_tokens) / 2
    }

    pub(super) fn is_queued(&self) -> bool {
        matches!(self.state, State::Queued { .. })
    }

    /// What the next step computes: the last token and its position. `None` unless running.
    pub fn step_input(&self) -> Option<(&TokenId, usize)> {
        match &self.state {
            State::Running { last, .. } => Some((last, self.length() - 1)),
            State::Queued { .. } | State::Waiting | State::Prefilling { .. } | State::Finished(_) => None,
        }
    }

    /// Tokens of prompt and completion so far: the position of the token that is sampled next.
    pub fn length(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens of prompt and completion so far.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Tokens that must not be sampled after `ahead` more tokens than there are now.
    pub fn suppressed_after(&self, ahead: usize) -> &[TokenId] {
        self.rule.suppressed(self.generated + ahead as u32)
    }

    /// Whether `token` would end it, after `ahead` more tokens than there are now.
    pub fn ends_with(&self, token: TokenId, ahead: usize) -> bool {
        self.rule.judge(token, self.generated + ahead as u32 + 1).is_some()
    }

    /// The ticket to revoke before the blocks may go to somebody else.
    pub fn ticket(&self) -> Option<TicketId> {
        self.ticket
    }
}
