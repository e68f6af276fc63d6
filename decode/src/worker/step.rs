//! A step of the running batch: draft, run, judge.
//!
//! With an MTP module a sequence may bring drafts to a step: rows behind its last token whose tokens were guessed. The
//! main model runs them all at once, and each position's token is then drawn from the row before it, in order, exactly as
//! it would have been drawn step by step: with that position's random number, and with the penalties of the tokens before
//! it. A draft stands when it is the token drawn; the first that does not ends the run, and the rows behind it are as if
//! they had never been. So drafts decide how many tokens a step gives, and never which.
//!
//! The module's cache needs each token's hidden state before it. Prefill keeps the one before the first token to itself: a
//! sequence's first step runs the prompt's last token once more for it, which changes no byte of the cache. What the module
//! is owed ([`super::owed`]) is stored before it drafts, and otherwise every few steps.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use engine::{DraftInput, Drafter, Draw, Drawn, LogitsWanted, MtpInput, Sampled, SequenceInput, StepError};
use model::TokenId;

use super::owed::{Owed, store_owed};
use super::{Seat, Worker};
use crate::outbox::Drafts;
use crate::scheduler::{Scheduler, Sequence, SequenceId};
use crate::speculation::OwnAcceptance;

/// What a sequence brings to a step.
#[derive(Default)]
pub(super) struct Rows {
    /// What is run again, its last token, drafts.
    tokens: Vec<TokenId>,
    /// Tokens at the front that are run again for their hidden state.
    rerun: usize,
    drafts_max: usize,
    /// With an MTP module: ends with the hidden state before the last token. Empty until the first step.
    pub owed: Owed,
    acceptance: OwnAcceptance,
}

/// Buffers of a step, so that it allocates nothing.
#[derive(Default)]
pub(super) struct Buffers {
    inputs: Vec<SequenceInput<'static>>,
    pub owed: Vec<MtpInput<'static>>,
    drafting: Vec<SequenceId>,
    pub ended: Vec<SequenceId>,
    states: Vec<Owed>,
    draft_inputs: Vec<DraftInput<'static>>,
    /// One row.
    logits: Vec<f32>,
}

impl Buffers {
    pub fn new(batch_max: usize, vocab_size: usize) -> Self {
        Self {
            inputs: Vec::with_capacity(batch_max),
            owed: Vec::with_capacity(batch_max),
            drafting: Vec::with_capacity(batch_max),
            ended: Vec::with_capacity(batch_max),
            states: Vec::with_capacity(batch_max),
            draft_inputs: Vec::with_capacity(batch_max),
            logits: Vec::with_capacity(vocab_size),
        }
    }
}

/// A step whose round has not ended: what drafts cost shows when the worker is ready for the next, tokens on their way included.
pub(super) struct Round {
    sequences: usize,
    planned: usize,
    drafted: usize,
    started: Instant,
}

/// A token that a step gave, and what became of the drafts for it and behind it.
pub(super) struct Token {
    pub id: SequenceId,
    pub sampled: Sampled,
    pub drafts: Drafts,
}

impl Worker {
    /// Runs the scheduled batch and samples its sequences' next tokens, one or more for each, into `sampled`.
    pub(super) fn step(&mut self) -> Result<(), StepError> {
        self.sampled.clear();
        let started = Instant::now();
        self.round_ended(started);
        if self.batch.is_empty() {
            return Ok(());
        }
        let held_back = self.speculation.as_ref().is_some_and(|s| s.holds_back(self.scheduler.waiting()));
        let planned = self.prepare(held_back);
        if self.batch.iter().any(|id| self.seats.get(id).is_some_and(|seat| seat.rows.owed.is_due())) {
            let Self { engine, scheduler, seats, batch, buffers, .. } = self;
            store_owed(engine, scheduler, seats, batch, &mut buffers.owed);
        }
        if planned > 0 {
            self.draft();
        }
        let drafted = self.run_rows()?;
        // What is compared with others is a step whose drafts were chosen.
        let sequences = self.batch.len();
        self.round = (!held_back).then_some(Round { sequences, planned, drafted, started });
        self.record_step(started.elapsed());
        Ok(())
    }

    /// The worker is ready for another step, or has nothing to run.
    pub(super) fn round_ended(&mut self, now: Instant) {
        if let (Some(speculation), Some(round)) = (&mut self.speculation, self.round.take()) {
            let Round { sequences, planned, drafted, started } = round;
            speculation.observe_round(sequences, planned, drafted, now.saturating_duration_since(started));
        }
    }

    /// Puts down each sequence's last token and how many drafts it may have; returns how many are planned.
    fn prepare(&mut self, held_back: bool) -> usize {
        let Self { engine, scheduler, seats, batch, speculation, .. } = self;
        let plan = speculation.as_mut().filter(|_| !held_back);
        let planned = plan.map_or(0, |speculation| speculation.plan(batch.len()));
        // Each may have a row that is run again.
        let mut rows_left = engine.step_tokens_max().saturating_sub(2 * batch.len());
        let block_tokens = engine.kv_layout().block_tokens;
        for id in &*batch {
            let (Some(seat), Some(sequence)) = (seats.get_mut(id), scheduler.sequence(*id)) else { continue };
            let Some((&last, position)) = sequence.step_input() else { continue };
            let Seat { outbox, rows, .. } = seat;
            rows.tokens.clear();
            // Also one that is run again. It grows once, whenever it first drafts.
            rows.tokens.reserve(1 + scheduler.limits().step_rows_max);
            (rows.rerun, rows.drafts_max) = (0, 0);
            if let Some(speculation) = speculation {
                if rows.owed.is_empty() {
                    rows.rerun = 1;
                    rows.tokens.push(sequence.tokens()[position - 1]);
                } else if planned > 0 && speculation.is_worth(&mut rows.acceptance, batch.len(), planned) {
                    // What its blocks, its life and its reader have room for.
                    let room =
                        (sequence.rows_max(block_tokens) - 1).min(outbox.tokens_max().saturating_sub(1));
                    rows.drafts_max = planned.min(room).min(rows_left);
                    rows_left -= rows.drafts_max;
                }
            }
            rows.tokens.push(last);
        }
        planned
    }

    /// Lets the module guess. Where it cannot, the step goes on without.
    fn draft(&mut self) {
        let Self { engine, scheduler, seats, batch, buffers, .. } = self;
        let Buffers { drafting, states, draft_inputs, owed, .. } = buffers;
        drafting.clear();
        drafting.extend(batch.iter().filter(|id| seats.get(id).is_some_and(|seat| seat.rows.drafts_max > 0)));
        store_owed(engine, scheduler, seats, drafting, owed);
        states.clear();
        states
            .extend(drafting.iter().filter_map(|id| Some(std::mem::take(&mut seats.get_mut(id)?.rows.owed))));
        let hidden_size = engine.config().hidden_size;
        let mut inputs: Vec<DraftInput<'_>> = std::mem::take(draft_inputs);
        for (id, state) in drafting.iter().zip(&*states) {
            let (Some(seat), Some(sequence)) = (seats.get(id), scheduler.sequence(*id)) else { continue };
            let Some((&token, position)) = sequence.step_input() else { continue };
            let block_table = sequence.block_table();
            let drafts_max = seat.rows.drafts_max;
            inputs.push(DraftInput {
                token,
                position,
                block_table,
                hidden: state.last(hidden_size),
                drafts_max,
            });
        }
        let result = if inputs.is_empty() {
            Ok(())
        } else {
            engine.draft_drawing(&inputs, &mut Guesses { drafting, seats, scheduler })
        };
        *draft_inputs = recycle_drafts(inputs);
        for (id, owed) in drafting.iter().zip(states.drain(..)) {
            if let Some(seat) = seats.get_mut(id) {
                seat.rows.owed = owed;
                if result.is_err() {
                    seat.rows.tokens.truncate(1);
                }
            }
        }
        if let Err(error) = result {
            tracing::warn!(%error, "drafting failed; the step goes on without drafts");
        }
    }

    /// Runs every row and judges the drafts; returns how many there were.
    fn run_rows(&mut self) -> Result<usize, StepError> {
        let Self { engine, scheduler, seats, batch, buffers, .. } = self;
        let Buffers { inputs, logits, .. } = buffers;
        let hidden_size = engine.config().hidden_size;
        let step_rows_max = scheduler.limits().step_rows_max;
        let mut rows: Vec<SequenceInput<'_>> = std::mem::take(inputs);
        for id in &*batch {
            let (Some(seat), Some(sequence)) = (seats.get(id), scheduler.sequence(*id)) else { continue };
            let Some((_, position)) = sequence.step_input() else { continue };
            rows.push(SequenceInput {
                tokens: &seat.rows.tokens,
                position: position - seat.rows.rerun,
                block_table: sequence.block_table(),
                logits: LogitsWanted::All,
            });
        }
        let mut draws = batch.iter().flat_map(|id| draws(seats.get(id), scheduler.sequence(*id)));
        let drawn = engine.step_drawing(&rows, &mut draws, &mut ());
        drop(draws);
        *inputs = recycle(rows);
        // Of every row, since every row is wanted.
        let drawn = drawn?;
        let (mut row, mut drafted) = (0, 0);
        for id in &*batch {
            let (Some(seat), Some(sequence)) = (seats.get_mut(id), scheduler.sequence(*id)) else { continue };
            let Some((_, position)) = sequence.step_input() else { continue };
            let first = row + seat.rows.rerun;
            row += seat.rows.tokens.len();
            let drafts = row - first - 1;
            drafted += drafts;
            let (tokens, stood) = judge(*id, seat, sequence, (&drawn, first..row), logits, &mut self.sampled);
            if let Some(speculation) = &mut self.speculation {
                speculation.observe_drafts(&mut seat.rows.acceptance, drafts, stood);
                self.metrics.drafts.count(drafts, stood);
                let Rows { owed, rerun, .. } = &mut seat.rows;
                let ran = &drawn.hidden()[(first - *rerun) * hidden_size..(first + tokens) * hidden_size];
                owed.push(position - *rerun, ran, (step_rows_max, hidden_size));
            }
        }
        Ok(drafted)
    }
}

/// The sequences that draft, and what they have guessed.
struct Guesses<'a> {
    drafting: &'a [SequenceId],
    seats: &'a mut BTreeMap<SequenceId, Seat>,
    scheduler: &'a Scheduler,
}

impl Drafter for Guesses<'_> {
    fn draw(&self, index: usize) -> Option<Draw<'_>> {
        let id = self.drafting.get(index)?;
        let (seat, sequence) = (self.seats.get(id)?, self.scheduler.sequence(*id)?);
        let ahead = &seat.rows.tokens[1..];
        let (position, suppress) = (sequence.length() + ahead.len(), sequence.suppressed_after(ahead.len()));
        Some(Draw { sampler: &seat.sampler, position, suppress, ahead })
    }

    fn guess(&mut self, index: usize, logits: &mut [f32]) -> Option<TokenId> {
        let id = self.drafting.get(index)?;
        let (seat, sequence) = (self.seats.get_mut(id)?, self.scheduler.sequence(*id)?);
        let ahead = seat.rows.tokens.len() - 1;
        Some(seat.sampler.guess(logits, sequence.length() + ahead, sequence.suppressed_after(ahead)))
    }

    fn take(&mut self, index: usize, token: TokenId) -> bool {
        let Some(id) = self.drafting.get(index) else { return false };
        let (Some(seat), Some(sequence)) = (self.seats.get_mut(id), self.scheduler.sequence(*id)) else {
            return false;
        };
        let ahead = seat.rows.tokens.len() - 1;
        seat.rows.tokens.push(token);
        !sequence.ends_with(token, ahead)
    }
}

/// How each row of a sequence is drawn: where it is run again not at all, behind drafts as if they stood.
fn draws<'a>(
    seat: Option<&'a Seat>,
    sequence: Option<&'a Sequence>,
) -> impl Iterator<Item = Option<Draw<'a>>> + use<'a> {
    let both = seat.zip(sequence.filter(|sequence| sequence.step_input().is_some()));
    both.into_iter().flat_map(|(seat, sequence)| {
        let Seat { rows: Rows { tokens, rerun, .. }, sampler, .. } = seat;
        let drafts = &tokens[*rerun + 1..];
        let drawn = (0..=drafts.len()).map(move |given| {
            let (position, suppress) = (sequence.length() + given, sequence.suppressed_after(given));
            Some(Draw { sampler, position, suppress, ahead: &drafts[..given] })
        });
        std::iter::repeat_n(None, *rerun).chain(drawn)
    })
}

/// Takes a sequence's next tokens, drawn from its `rows`, up to the first that is not what was drafted. Returns how many
/// tokens came and how many drafts stood.
fn judge(
    id: SequenceId,
    seat: &mut Seat,
    sequence: &Sequence,
    (step, rows): (&Drawn<'_>, Range<usize>),
    logits: &mut Vec<f32>,
    sampled: &mut Vec<Token>,
) -> (usize, usize) {
    let Seat { rows: Rows { tokens, rerun, .. }, sampler, .. } = seat;
    let drafts = &tokens[*rerun + 1..];
    let (mut given, mut stood) = (0, 0);
    for row in rows {
        let place = (sequence.length() + given, sequence.suppressed_after(given));
        let drawn = step.token(row, sampler, place, logits);
        sampler.observe(drawn.token);
        let token = drawn.token;
        let stands = drafts.get(given) == Some(&token);
        stood += usize::from(stands);
        sampled.push(Token {
            id,
            sampled: drawn,
            drafts: Drafts { accepted: u32::from(stands), rejected: 0 },
        });
        given += 1;
        if !stands || sequence.ends_with(token, given - 1) {
            break;
        }
    }
    if let Some(last) = sampled.last_mut() {
        last.drafts.rejected = (drafts.len() - stood) as u32;
    }
    (given, stood)
}

/// An empty vector for rows of any lifetime, in the memory of one whose rows are no longer needed.
fn recycle(mut rows: Vec<SequenceInput<'_>>) -> Vec<SequenceInput<'static>> {
    rows.clear();
    rows.into_iter().map(|row| SequenceInput { tokens: &[], block_table: &[], ..row }).collect()
}

/// The same for drafts.
fn recycle_drafts(mut inputs: Vec<DraftInput<'_>>) -> Vec<DraftInput<'static>> {
    inputs.clear();
    inputs.into_iter().map(|input| DraftInput { block_table: &[], hidden: &[], ..input }).collect()
}
