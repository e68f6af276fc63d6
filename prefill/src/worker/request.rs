//! A request's part in steps: what of it runs, what is wanted of it, and whether anybody waits for it.

use std::collections::HashMap;
use std::time::Instant;

use engine::{Draw, KvPool, LogitsWanted, SequenceInput, SequenceSampler, StepObserver, Watched};
use model::BlockId;
use tracing::Span;

use crate::handoff::PushWhileComputing;
use crate::intake::Checked;
use crate::outbox::Outbox;
use crate::prompt_logprobs::PromptLogprobs;
use crate::scheduler::{Chunk, SequenceId};

/// A queued request, besides its blocks.
pub(super) struct Request {
    pub(super) checked: Checked,
    pub(super) outbox: Outbox,
    pub(super) arrived: Instant,
    pub(super) started: Option<Instant>,
    /// With an MTP module: the hidden state of the last token that was computed, which the module's next row begins with.
    /// Empty before the first chunk.
    pub(super) state: Vec<f32>,
    /// Where the prompt's own log-probabilities are wanted.
    pub(super) prompt_logprobs: Option<PromptLogprobs>,
    /// Of the token behind the prompt.
    pub(super) sampler: SequenceSampler,
    pub(super) span: Span,
}

impl Request {
    /// The span of one of its chunks.
    pub(super) fn hop(&self, chunk: &Chunk) -> Span {
        tracing::info_span!(
            parent: &self.span,
            "chunk",
            hop = 7,
            request_id = %self.checked.request_id,
            start = chunk.start,
            tokens = chunk.tokens
        )
    }

    pub(super) fn input<'a>(&'a self, chunk: &Chunk, block_table: &'a [BlockId]) -> SequenceInput<'a> {
        SequenceInput {
            tokens: &self.checked.sequence.prompt[chunk.start..chunk.start + chunk.tokens],
            position: chunk.start,
            block_table,
            logits: match (&self.prompt_logprobs, chunk.last) {
                (Some(_), _) => LogitsWanted::All,
                (None, true) => LogitsWanted::Last,
                (None, false) => LogitsWanted::None,
            },
        }
    }

    /// How the token behind the prompt is drawn.
    pub(super) fn draw(&self) -> Draw<'_> {
        let Checked { sequence, suppressed, .. } = &self.checked;
        Draw { sampler: &self.sampler, position: sequence.prompt.len(), suppress: suppressed, ahead: &[] }
    }

    /// Rows of [`Self::input`] that logits are wanted for.
    pub(super) fn rows_wanted(&self, chunk: &Chunk) -> usize {
        if self.prompt_logprobs.is_some() { chunk.tokens } else { usize::from(chunk.last) }
    }
}

/// Pushes each layer's blocks as they are done, while one of the step's requests is waited for.
pub(super) struct WhileWanted<'a> {
    pub(super) pushing: PushWhileComputing<'a>,
    pub(super) requests: &'a HashMap<SequenceId, Request>,
    pub(super) step: &'a [Chunk],
}

impl StepObserver for WhileWanted<'_> {
    fn watched(&self) -> Watched {
        self.pushing.watched()
    }

    fn layer_done(&mut self, layer: usize, kv: &KvPool) {
        self.pushing.layer_done(layer, kv);
    }

    fn is_wanted(&self) -> bool {
        let abandoned = |chunk: &Chunk| self.requests.get(&chunk.id).is_none_or(|r| r.outbox.is_abandoned());
        !self.step.iter().all(abandoned)
    }
}
