//! A step's batch: several sequences with one or more rows each, flattened.
//!
//! There are no kinds of batches. A decode step is one row per sequence, a verification a few, a prefill chunk many, and
//! any mixture runs through the same code. A batch is checked whole before anything is computed.

use compute::{KvSlot, MlaRow};
use model::{BlockId, ModelConfig, TokenId};

use crate::error::InvalidBatch;

/// One sequence's rows in a step.
#[derive(Clone, Copy, Debug)]
pub struct SequenceInput<'a> {
    /// The tokens to run, at least one.
    pub tokens: &'a [TokenId],
    /// Position of `tokens[0]`; the rows of all earlier positions are in the cache.
    pub position: usize,
    /// The sequence's KV blocks in order, reaching at least the last of `tokens`.
    ///
    /// No other sequence of the batch may have rows to write in the blocks that this one writes.
    pub block_table: &'a [BlockId],
    /// For which rows logits are wanted.
    pub logits: LogitsWanted,
}

/// For which rows of a sequence the head runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted {
    /// For none: a chunk that is not a prompt's last.
    None,
    /// For the last row.
    Last,
    /// For every row: verification, teacher forcing.
    All,
}

/// What a batch is checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchLimits {
    pub step_tokens_max: usize,
    pub vocab_size: usize,
    pub context_max: usize,
    pub kv_blocks_max: usize,
    pub block_tokens: usize,
}

impl BatchLimits {
    pub fn new(
        config: &ModelConfig,
        step_tokens_max: usize,
        kv_blocks_max: usize,
        block_tokens: usize,
    ) -> Self {
        Self {
            step_tokens_max,
            vocab_size: config.vocab_size,
            context_max: config.max_position_embeddings,
            kv_blocks_max,
            block_tokens,
        }
    }
}

/// Whose rows a batch holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum RowsOf {
    /// The main model's: a token's row is at the token's position.
    #[default]
    Model,
    /// The MTP module's: a token's row is at the position before, and in the token's slot.
    Mtp,
}

impl RowsOf {
    /// How far a row's slot is behind its position.
    fn shift(self) -> u32 {
        match self {
            Self::Model => 0,
            Self::Mtp => 1,
        }
    }
}

/// The flattened batch; its buffers are reused from step to step.
#[derive(Default)]
pub(crate) struct StepBatch {
    rows_of: RowsOf,
    /// Token of each row.
    pub tokens: Vec<TokenId>,
    /// Position of each row: what it is rotated by.
    pub positions: Vec<u32>,
    /// Where each row's cache entry goes.
    pub slots: Vec<KvSlot>,
    /// Rows whose logits are wanted.
    pub wanted: Vec<u32>,
    /// All block tables, one after the other, and for each sequence its rows and the end of its table.
    tables: Vec<u32>,
    sequences: Vec<SequenceRows>,
}

struct SequenceRows {
    rows: usize,
    table_end: usize,
}

impl StepBatch {
    /// With room for `rows` rows and `blocks` blocks in all tables. Sequences that share many blocks have longer tables
    /// together than the pool has blocks; then they grow once.
    pub fn with_room(rows: usize, blocks: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            slots: Vec::with_capacity(rows),
            wanted: Vec::with_capacity(rows),
            tables: Vec::with_capacity(blocks),
            sequences: Vec::with_capacity(rows),
            ..Self::default()
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Checks and flattens `inputs`. After an error the batch is unusable until the next call.
    pub fn form<'a>(
        &mut self,
        rows_of: RowsOf,
        inputs: impl Iterator<Item = SequenceInput<'a>>,
        limits: &BatchLimits,
    ) -> Result<(), InvalidBatch> {
        self.clear();
        self.rows_of = rows_of;
        for (sequence, input) in inputs.enumerate() {
            self.push(sequence, &input, limits)?;
        }
        if self.sequences.is_empty() {
            return Err(InvalidBatch::Empty { sequence: 0 });
        }
        Ok(())
    }

    /// Empties the batch, to be filled row by row with [`Self::push_following`].
    pub fn start_following(&mut self) {
        self.clear();
        self.rows_of = RowsOf::Mtp;
    }

    /// Adds the MTP module's row for the token of `row` of `main`. Such a row can be stored, not run: it comes without a
    /// view of its sequence.
    pub fn push_following(&mut self, main: &Self, row: usize) {
        self.tokens.push(main.tokens[row]);
        self.positions.push(main.positions[row].saturating_sub(RowsOf::Mtp.shift()));
        self.slots.push(main.slots[row]);
    }

    /// All block tables, one after the other.
    pub fn tables(&self) -> &[u32] {
        &self.tables
    }

    /// For each row where its sequence's table begins in [`Self::tables`], and how many cache rows it sees.
    pub fn tables_of_rows(&self) -> impl Iterator<Item = (usize, u32)> {
        let shift = self.rows_of.shift();
        let starts = std::iter::once(0).chain(self.sequences.iter().map(|sequence| sequence.table_end));
        let rows = self.sequences.iter().zip(starts);
        let starts = rows.flat_map(|(sequence, start)| std::iter::repeat_n(start, sequence.rows));
        starts.zip(&self.positions).map(move |(start, position)| (start, position + shift + 1))
    }

    /// Number of rows of each sequence, in order.
    pub fn sequence_rows(&self) -> impl Iterator<Item = usize> {
        self.sequences.iter().map(|sequence| sequence.rows)
    }

    /// Each row's view of its sequence, in `recycled`'s memory.
    pub fn attention_rows<'a>(&'a self, mut recycled: Vec<MlaRow<'a>>) -> Vec<MlaRow<'a>> {
        recycled.clear();
        let shift = self.rows_of.shift();
        let mut table_start = 0;
        for sequence in &self.sequences {
            let block_table = &self.tables[table_start..sequence.table_end];
            let first = recycled.len();
            recycled.extend(
                self.positions[first..first + sequence.rows]
                    .iter()
                    .map(|&position| MlaRow { block_table, context: position + shift + 1 }),
            );
            table_start = sequence.table_end;
        }
        recycled
    }

    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.wanted.clear();
        self.tables.clear();
        self.sequences.clear();
    }

    fn push(
        &mut self,
        sequence: usize,
        input: &SequenceInput<'_>,
        limits: &BatchLimits,
    ) -> Result<(), InvalidBatch> {
        let blocks = check(sequence, input, self.rows(), limits)?;
        let shift = self.rows_of.shift();
        if input.position < shift as usize {
            return Err(InvalidBatch::MtpPosition { sequence });
        }
        let first = self.rows();
        self.tokens.extend_from_slice(input.tokens);
        for position in input.position..input.position + input.tokens.len() {
            self.positions.push(position as u32 - shift);
            let block = blocks[position / limits.block_tokens].0;
            self.slots.push(KvSlot { block, row: (position % limits.block_tokens) as u32 });
        }
        self.tables.extend(blocks.iter().map(|block| block.0));
        self.sequences.push(SequenceRows { rows: input.tokens.len(), table_end: self.tables.len() });
        let end = self.rows() as u32;
        match input.logits {
            LogitsWanted::None => {}
            LogitsWanted::Last => self.wanted.push(end - 1),
            LogitsWanted::All => self.wanted.extend(first as u32..end),
        }
        Ok(())
    }
}

/// The blocks that hold the sequence after this step.
fn check<'a>(
    sequence: usize,
    input: &SequenceInput<'a>,
    rows_before: usize,
    limits: &BatchLimits,
) -> Result<&'a [BlockId], InvalidBatch> {
    let BatchLimits { step_tokens_max, vocab_size, context_max, kv_blocks_max: blocks_max, block_tokens } =
        *limits;
    if input.tokens.is_empty() {
        return Err(InvalidBatch::Empty { sequence });
    }
    let rows = rows_before + input.tokens.len();
    if rows > step_tokens_max {
        return Err(InvalidBatch::TooManyRows { rows, step_tokens_max });
    }
    if let Some(&TokenId(token)) = input.tokens.iter().find(|token| token.0 as usize >= vocab_size) {
        return Err(InvalidBatch::Token { sequence, token, vocab_size });
    }
    let context = input.position.saturating_add(input.tokens.len());
    if context > context_max {
        return Err(InvalidBatch::Context { sequence, context, context_max });
    }
    let too_short = InvalidBatch::BlockTableTooShort { sequence, blocks: input.block_table.len(), context };
    let blocks = input.block_table.get(..context.div_ceil(block_tokens)).ok_or(too_short)?;
    if let Some(&BlockId(block)) = blocks.iter().find(|block| block.0 as usize >= blocks_max) {
        return Err(InvalidBatch::Block { sequence, block, blocks_max });
    }
    Ok(blocks)
}

/// An empty vector for rows of any lifetime, in the memory of one whose rows are no longer needed.
pub(crate) fn recycle<'a>(mut rows: Vec<MlaRow<'_>>) -> Vec<MlaRow<'a>> {
    rows.clear();
    // Collected in place, which keeps the allocation; there is no row left to convert.
    rows.into_iter().map(|row| MlaRow { block_table: &[], context: row.context }).collect()
}

#[cfg(test)]
mod tests;
