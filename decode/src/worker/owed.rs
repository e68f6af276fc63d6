//! Rows of the MTP module's cache that are not stored yet.
//!
//! While nothing is drafted nobody reads the module's cache, and to store one row a step costs nearly as much as to store many: the
//! states that the rows are made of are kept for a few steps, and their rows stored together. A row is the same whenever it is
//! stored. Until then, for at most [`STEPS_MAX`] steps, a full block of a running sequence may be found by another without
//! the last of them, whose first guesses are the worse for it, and nothing else.
//!
//! Deliberately not here: when to draft, and the row of a sequence's last token, which drafting stores itself.

use std::collections::BTreeMap;

use engine::{Engine, LogitsWanted, MtpInput, SequenceInput};

use super::Seat;
use crate::scheduler::{Scheduler, SequenceId};

/// Steps after which a sequence's rows are stored in any case. With V3's width eight states take 230 KB; the cost of storing
/// them one by one is mostly that of a call, an eighth of which is too little to measure.
const STEPS_MAX: usize = 8;

/// One sequence's debt to the module.
#[derive(Debug, Default)]
pub(super) struct Owed {
    /// Position of the first of `states`.
    first: usize,
    steps: usize,
    /// `[n, hidden]`: states at consecutive positions, each for the module's row of the token behind it. The last is that before the
    /// sequence's last token.
    states: Vec<f32>,
}

impl Owed {
    /// Before the first step.
    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// Whether it is time to store them, drafts or not.
    pub fn is_due(&self) -> bool {
        self.steps >= STEPS_MAX
    }

    /// `[hidden]`: the state before the sequence's last token.
    pub fn last(&self, hidden_size: usize) -> &[f32] {
        &self.states[self.states.len().saturating_sub(hidden_size)..]
    }

    /// A step of at most `rows_max` tokens a sequence has run those that stand from `position` on, with these `states`
    /// `[tokens, hidden]`.
    pub fn push(&mut self, position: usize, states: &[f32], (rows_max, hidden_size): (usize, usize)) {
        if self.states.is_empty() {
            self.first = position;
            // All that can come before they are stored, at once: one that is left, a step with drafts, which stores before it drafts, and
            // steps of a token each. When most of it is needed depends on when something is drafted.
            self.states.reserve_exact((STEPS_MAX + rows_max.max(2)) * hidden_size);
        }
        self.steps += 1;
        self.states.extend_from_slice(states);
    }

    /// All but the last are stored.
    fn settle(&mut self, hidden_size: usize) {
        let stored = self.states.len().saturating_sub(hidden_size);
        self.states.copy_within(stored.., 0);
        self.states.truncate(self.states.len() - stored);
        self.first += stored / hidden_size;
        self.steps = 0;
    }
}

/// Stores what the module is owed of `ids`' tokens, those of their last ones excepted. `recycled` keeps its memory.
pub(super) fn store_owed(
    engine: &mut Engine,
    scheduler: &Scheduler,
    seats: &mut BTreeMap<SequenceId, Seat>,
    ids: &[SequenceId],
    recycled: &mut Vec<MtpInput<'static>>,
) {
    let hidden_size = engine.config().hidden_size;
    let rows_max = engine.step_tokens_max();
    let mut inputs: Vec<MtpInput<'_>> = std::mem::take(recycled);
    let mut rows = 0;
    for id in ids {
        let (Some(seat), Some(sequence)) = (seats.get(id), scheduler.sequence(*id)) else { continue };
        let Owed { first, states, .. } = &seat.rows.owed;
        let count = (states.len() / hidden_size).saturating_sub(1);
        let tokens = sequence.tokens();
        let tokens = &tokens[(first + 1).min(tokens.len())..(first + 1 + count).min(tokens.len())];
        let mut position = first + 1;
        for (tokens, states) in tokens.chunks(rows_max).zip(states.chunks(rows_max * hidden_size)) {
            if rows + tokens.len() > rows_max {
                store(engine, &mut inputs);
                rows = 0;
            }
            rows += tokens.len();
            let block_table = sequence.block_table();
            let sequence = SequenceInput { tokens, position, block_table, logits: LogitsWanted::None };
            inputs.push(MtpInput { sequence, hidden: &states[..tokens.len() * hidden_size] });
            position += tokens.len();
        }
    }
    store(engine, &mut inputs);
    *recycled = inputs
        .into_iter()
        .map(|input| {
            let sequence = SequenceInput { tokens: &[], block_table: &[], ..input.sequence };
            MtpInput { sequence, hidden: &[] }
        })
        .collect();
    for id in ids {
        if let Some(seat) = seats.get_mut(id) {
            seat.rows.owed.settle(hidden_size);
        }
    }
}

fn store(engine: &mut Engine, inputs: &mut Vec<MtpInput<'_>>) {
    if inputs.is_empty() {
        return;
    }
    if let Err(error) = engine.mtp_store(inputs) {
        tracing::warn!(%error, "rows of the MTP module are missing; drafts will be the worse for it");
    }
    inputs.clear();
}
