//! Steps that were recorded, by what they can be replayed for.

use compute::cuda::Graph;

use crate::batch::RowsOf;

/// Rows of a recorded step at most, drafts and rows that are run again included: more take long enough for their launches
/// not to matter.
pub(super) const RECORDED_ROWS_MAX: usize = 512;

/// Recorded steps that are kept: those used last. Sizes and contexts make some hundreds, of which few are in use at a time, and each
/// takes memory of the device.
pub(super) const RECORDED_MAX: usize = 96;

/// A step of `rows` rows that see at most `context_max` cache rows.
pub(super) struct Recorded {
    pub of: RowsOf,
    pub rows: usize,
    pub context_max: usize,
    pub graph: Graph,
}

impl Recorded {
    /// Whether it is the one for such a step.
    pub fn is(&self, of: RowsOf, rows: usize, context_max: usize) -> bool {
        self.of == of && self.rows == rows && self.context_max == context_max
    }
}

/// Rows of the recorded step that `rows` rows run in.
pub(super) fn recorded_rows(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=8 => rows.next_multiple_of(2),
        9..=32 => rows.next_multiple_of(8),
        33..=128 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(64),
    }
}
