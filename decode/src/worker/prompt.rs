//! Prompts that are computed here: a few chunks between two steps.
//!
//! The router leaves a prompt to decode when most of it is here already, or when that costs less than to have it handed over.
//! Its chunks run in a pass of their own behind a step, so that the step's tokens leave first, and with a budget of tokens, so
//! that the next step comes soon. What they write is what prefill would have: rows of the main model, and of the MTP
//! module where there is one; and the first token is drawn with its position's own random number, as everywhere.

use std::time::Instant;

use engine::{Draw, FollowedInput, LogitsWanted, SequenceInput, StepError};
use proto::pace::Pace;

use super::{Seat, Worker};
use crate::outbox::SequenceEvent;
use crate::scheduler::{Chunk, Event};

/// What the worker keeps for prompts that it computes.
pub(super) struct Prompts {
    /// Tokens between two steps.
    tokens_max: usize,
    chunks: Vec<Chunk>,
    /// Tokens by the time they took.
    pace: Pace,
}

/// What a sequence keeps while its prompt is computed here.
#[derive(Default)]
pub(super) struct Prompt {
    started: Option<Instant>,
    /// `[hidden]`: with an MTP module the state of the last token that was computed, which the module's next row begins with.
    state: Vec<f32>,
}

impl Prompts {
    pub fn new(tokens_max: usize) -> Self {
        Self { tokens_max, chunks: Vec::new(), pace: Pace::default() }
    }
}

impl Worker {
    /// Computes the next chunks of the prompts that are left to this worker, if there are any.
    pub(super) fn prefill(&mut self) {
        self.scheduler.schedule_chunks(self.prompts.tokens_max, &mut self.prompts.chunks);
        if self.prompts.chunks.is_empty() {
            return;
        }
        let started = Instant::now();
        let outcome = self.run_chunks(started);
        let now = Instant::now();
        match outcome {
            Ok(()) => {
                let tokens = self.prompts.chunks.iter().map(|chunk| chunk.tokens as u64).sum();
                self.prompts.pace.add(tokens, now.duration_since(started));
                self.metrics.steps.inc();
                self.metrics.prompt_tokens.inc_by(tokens);
                let per_s = self.prompts.pace.per_s().unwrap_or(0.0);
                self.metrics.prompt_tokens_per_s.set(per_s as i64);
            }
            Err(error) => {
                let ids: Vec<_> = self.prompts.chunks.iter().map(|chunk| chunk.id).collect();
                self.fail_step(&ids, error, now);
            }
        }
        self.settle(now);
    }

    fn run_chunks(&mut self, started: Instant) -> Result<(), StepError> {
        let Self { engine, scheduler, seats, prompts, speculation, sampled_row, .. } = self;
        let mut hops = Vec::with_capacity(prompts.chunks.len());
        for chunk in &prompts.chunks {
            if let Some(seat) = seats.get_mut(&chunk.id) {
                seat.prompt.started.get_or_insert(started);
                hops.push(hop(seat, chunk));
            }
        }
        let _hop = hops.first().map(tracing::Span::enter);
        let mut batch = Vec::with_capacity(prompts.chunks.len());
        for chunk in &prompts.chunks {
            let (Some(seat), Some(sequence)) = (seats.get(&chunk.id), scheduler.sequence(chunk.id)) else {
                continue;
            };
            let sequence = SequenceInput {
                tokens: &sequence.tokens()[chunk.start..chunk.start + chunk.tokens],
                position: chunk.start,
                block_table: sequence.block_table(),
                logits: if chunk.last { LogitsWanted::Last } else { LogitsWanted::None },
            };
            batch.push(FollowedInput { sequence, before: &seat.prompt.state });
        }
        let hidden_size = engine.config().hidden_size;
        let block_tokens = engine.kv_layout().block_tokens;
        let step_rows_max = scheduler.limits().step_rows_max;
        let of_last = prompts.chunks.iter().filter(|chunk| chunk.last);
        let draws = &mut of_last.map(|chunk| {
            let (seat, sequence) = (seats.get(&chunk.id)?, scheduler.sequence(chunk.id)?);
            let suppress = sequence.suppressed_after(0);
            Some(Draw { sampler: &seat.sampler, position: sequence.length(), suppress, ahead: &[] })
        });
        let (drawn, states) = if speculation.is_some() {
            engine.step_with_mtp_drawing(&batch, draws, &mut ())?
        } else {
            let batch: Vec<_> = batch.iter().map(|input| input.sequence).collect();
            (engine.step_drawing(&batch, draws, &mut ())?, [].as_slice())
        };
        let now = Instant::now();
        let mut wanted = 0;
        let mut states = states.chunks_exact(hidden_size);
        for chunk in &prompts.chunks {
            let state = states.next().unwrap_or_default();
            let Some(seat) = seats.get_mut(&chunk.id) else { continue };
            seat.prompt.state.clear();
            seat.prompt.state.extend_from_slice(state);
            scheduler.apply(chunk.id, Event::Computed(chunk.tokens), now);
            if !chunk.last {
                continue;
            }
            let row = wanted;
            wanted += 1;
            let Some(sequence) = scheduler.sequence(chunk.id) else { continue };
            let length = sequence.length();
            let place = (length, sequence.suppressed_after(0));
            let sampled = drawn.token(row, &mut seat.sampler, place, sampled_row);
            let token = sampled.token;
            let cached_tokens = sequence.shared_blocks() * block_tokens;
            seat.sampler.observe(token);
            if !state.is_empty() {
                // What a step of a sequence that was handed over has to run again.
                seat.rows.owed.push(length - 1, state, (step_rows_max, hidden_size));
            }
            let began = seat.prompt.started.unwrap_or(now);
            let queue = began.duration_since(seat.issued_at);
            let compute = now.duration_since(began);
            seat.committed_at = Some(now);
            seat.span = tracing::info_span!(
                "decode",
                hop = 11,
                request_id = %seat.request_id,
                trace_id = %seat.trace.trace_id(),
                parent_id = %seat.trace.span_id(),
            );
            seat.outbox.send(SequenceEvent::FirstToken { sampled, queue, compute, cached_tokens });
            scheduler.apply(chunk.id, Event::HandedOff(token), now);
        }
        Ok(())
    }
}

/// The span of a chunk.
fn hop(seat: &Seat, chunk: &Chunk) -> tracing::Span {
    tracing::info_span!(
        "chunk",
        hop = 7,
        request_id = %seat.request_id,
        trace_id = %seat.trace.trace_id(),
        parent_id = %seat.trace.span_id(),
        start = chunk.start,
        tokens = chunk.tokens
    )
}
