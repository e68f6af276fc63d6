//! What a step is told: tokens, positions, cache slots, block tables. One copy from page-locked memory brings all of it.

use compute::cuda::{Buffer, CudaError, Device, MlaRows, Pinned, View};

use crate::batch::StepBatch;

/// Numbers for each row: token, position, slot (block and row), context, start of its block table, and the row that its
/// logits are wanted of.
const PER_ROW: usize = 7;

/// A batch on the device.
///
/// Its sections lie one after the other, each with room for `rows` rows, so that a step of few rows copies little.
pub(super) struct StepInputs {
    pinned: Pinned<u32>,
    there: Buffer<u32>,
    /// Rows that there is room for now, padding included; set by [`Self::take`].
    rows: usize,
    wanted: usize,
    /// Longest context of the batch, and all of them together.
    context_max: usize,
    contexts_sum: usize,
    /// Entries of its block tables; 0 in a step that is recorded, which does not depend on them.
    entries: usize,
    /// Numbers of this batch.
    used: usize,
}

impl StepInputs {
    /// Room for `rows_max` rows with block tables of `table_blocks` blocks in all.
    pub fn new(device: &Device, rows_max: usize, table_blocks: usize) -> Result<Self, CudaError> {
        let len = 1 + PER_ROW * rows_max + table_blocks;
        let (pinned, there) = (device.pinned(len)?, device.alloc(len)?);
        Ok(Self { pinned, there, rows: 0, wanted: 0, context_max: 0, contexts_sum: 0, entries: 0, used: 0 })
    }

    /// Whether the batch's block tables fit beside its rows.
    pub fn fits(&self, batch: &StepBatch, rows: usize) -> bool {
        1 + PER_ROW * rows + batch.tables().len() <= self.pinned.len()
    }

    /// As [`Self::take`], for rows that attend to nothing: their block tables may not fit.
    pub fn take_without_tables(&mut self, batch: &StepBatch, rows: usize) {
        self.take_rows(batch, rows);
        self.entries = 0;
        self.used = 1 + PER_ROW * rows;
    }

    /// Takes a batch in, padded to `rows` rows: padding belongs to no sequence and is stored nowhere.
    pub fn take(&mut self, batch: &StepBatch, rows: usize) {
        self.take_rows(batch, rows);
        let tables = 1 + PER_ROW * rows;
        self.pinned[tables..tables + batch.tables().len()].copy_from_slice(batch.tables());
        self.used = tables + batch.tables().len();
        self.entries = batch.tables().len();
    }

    /// What was taken is for a step that is recorded, and replayed with other tables.
    pub fn for_recording(&mut self) {
        self.entries = 0;
    }

    fn take_rows(&mut self, batch: &StepBatch, rows: usize) {
        (self.rows, self.wanted) = (rows, batch.wanted.len());
        let count = batch.rows();
        self.pinned[0] = count as u32;
        let section = |index: usize| 1 + index * rows..1 + (index + 1) * rows;
        for (to, token) in self.pinned[section(0)].iter_mut().zip(padded(batch.tokens.iter().map(|t| t.0), 0))
        {
            *to = token;
        }
        for (to, position) in
            self.pinned[section(1)].iter_mut().zip(padded(batch.positions.iter().copied(), 0))
        {
            *to = position;
        }
        let slots = batch.slots.iter().flat_map(|slot| [slot.block, slot.row]);
        for (to, slot) in self.pinned[1 + 2 * rows..1 + 4 * rows].iter_mut().zip(padded(slots, u32::MAX)) {
            *to = slot;
        }
        (self.context_max, self.contexts_sum) = (0, 0);
        let (contexts, starts) = (1 + 4 * rows, 1 + 5 * rows);
        for (row, (start, context)) in batch.tables_of_rows().enumerate() {
            self.pinned[contexts + row] = context;
            self.pinned[starts + row] = start as u32;
            self.context_max = self.context_max.max(context as usize);
            self.contexts_sum += context as usize;
        }
        self.pinned[contexts + count..contexts + rows].fill(0);
        self.pinned[starts + count..starts + rows].fill(0);
        for (to, wanted) in self.pinned[section(6)].iter_mut().zip(padded(batch.wanted.iter().copied(), 0)) {
            *to = wanted;
        }
    }

    /// Sends what was taken.
    pub fn send(&mut self, device: &Device) -> Result<(), CudaError> {
        device.copy_in_later(&self.pinned, &mut self.there.slice_mut(0..self.used))
    }

    fn section(&self, first: usize, width: usize, rows: usize) -> View<'_, u32> {
        let start = 1 + first * self.rows;
        self.there.slice(start..start + width * rows)
    }

    /// Rows, padding included.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows whose logits are wanted.
    pub fn wanted(&self) -> usize {
        self.wanted
    }

    /// Longest context.
    pub fn context_max(&self) -> usize {
        self.context_max
    }

    /// Entries of the block tables whose cache rows attention had better decode once for all rows: all or none.
    pub fn unpacked(&self, block_tokens: usize) -> usize {
        let worth = MlaRows::worth_unpacking(self.entries, block_tokens, self.contexts_sum);
        if worth { self.entries } else { 0 }
    }

    /// How many rows are no padding.
    pub fn row_count(&self) -> View<'_, u32> {
        self.there.slice(0..1)
    }

    pub fn tokens(&self) -> View<'_, u32> {
        self.section(0, 1, self.rows)
    }

    pub fn positions(&self) -> View<'_, u32> {
        self.section(1, 1, self.rows)
    }

    pub fn slots(&self) -> View<'_, u32> {
        self.section(2, 2, self.rows)
    }

    pub fn contexts(&self) -> View<'_, u32> {
        self.section(4, 1, self.rows)
    }

    pub fn starts(&self) -> View<'_, u32> {
        self.section(5, 1, self.rows)
    }

    /// The first `count` rows whose logits are wanted.
    pub fn wanted_rows(&self, count: usize) -> View<'_, u32> {
        self.section(6, 1, count)
    }

    /// Block tables, one after the other: all the room there is, so that a recorded step does not depend on their length.
    pub fn tables(&self) -> View<'_, u32> {
        self.there.slice(1 + PER_ROW * self.rows..self.there.len())
    }
}

fn padded(values: impl Iterator<Item = u32>, with: u32) -> impl Iterator<Item = u32> {
    values.chain(std::iter::repeat(with))
}
