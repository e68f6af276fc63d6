//! What a request must be before it may reach the device thread: everything that does not depend on the worker's state.
//!
//! Fingerprints are compared first: to a router that serves another model, a token outside the vocabulary would say
//! nothing. A refused request holds nothing.

use std::sync::Arc;
use std::time::Instant;

use model::{ExecutionFingerprint, KvLayout, ModelConfig, SamplingParams, TokenId};
use proto::field::FieldError;
use proto::fingerprint;
use proto::sequence::{Sequence, SequenceLimits};
use proto::ticket::KvTicket;
use proto::v1;

use crate::error::Refusal;

/// What every request is held against.
#[derive(Debug)]
pub(crate) struct Intake {
    fingerprint: ExecutionFingerprint,
    limits: SequenceLimits,
    end_of_sequence: Vec<TokenId>,
    block_tokens: usize,
    layers: usize,
    row_bytes: usize,
}

/// A checked request.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) request_id: Arc<str>,
    pub(crate) sequence: Sequence,
    pub(crate) ticket: KvTicket,
    /// Tokens that the first token may not be: those that would end the sequence below its `min_tokens`.
    pub(crate) suppressed: Vec<TokenId>,
    pub(crate) deadline: Option<Instant>,
    /// Alternatives with the log-probability of each prompt token; `None`: no log-probabilities of the prompt.
    pub(crate) prompt_logprobs: Option<u32>,
}

impl Intake {
    pub(crate) fn new(config: &ModelConfig, fingerprint: ExecutionFingerprint, layout: &KvLayout) -> Self {
        Self {
            fingerprint,
            limits: SequenceLimits {
                vocab_size: config.vocab_size,
                context_tokens_max: config.max_position_embeddings,
            },
            end_of_sequence: config.eos_token_ids.clone(),
            block_tokens: layout.block_tokens,
            layers: layout.layers,
            row_bytes: layout.row_bytes(),
        }
    }

    /// Checks a request received at `now`.
    pub(crate) fn check(&self, wire: v1::PrefillRequest, now: Instant) -> Result<Checked, Refusal> {
        let wire_sequence = wire.sequence.unwrap_or_default();
        let wire_ticket = wire.ticket.unwrap_or_default();
        fingerprint::require_equal(&self.fingerprint, wire_sequence.fingerprint.as_ref())?;
        fingerprint::require_equal(&self.fingerprint, wire_ticket.fingerprint.as_ref())
            .map_err(|error| error.within("ticket"))?;
        let sequence = Sequence::from_wire(&wire_sequence, self.limits)?;
        let ticket = KvTicket::from_wire(&wire_ticket).map_err(|error| error.within("ticket"))?;
        self.check_fit(&ticket, sequence.prompt.len())?;
        if let Some(count) = wire.prompt_logprobs.filter(|&count| count > SamplingParams::LOGPROBS_MAX) {
            let allowed = format_args!("at most {}", SamplingParams::LOGPROBS_MAX);
            return Err(FieldError::out_of_range("prompt_logprobs", count, allowed).into());
        }
        let deadline = sequence.deadline.map(|left| now + left);
        Ok(Checked {
            request_id: Arc::from(sequence.request_id.as_str()),
            suppressed: self.suppressed(&sequence),
            sequence,
            ticket,
            deadline,
            prompt_logprobs: wire.prompt_logprobs,
        })
    }

    /// A ticket must permit exactly the prompt's blocks, from some block on to the last, in each of our layers.
    fn check_fit(&self, ticket: &KvTicket, prompt_tokens: usize) -> Result<(), Refusal> {
        let check = |field, found: u64, expected: usize| {
            let expected = expected as u64;
            if found == expected { Ok(()) } else { Err(Refusal::Ticket { field, found, expected }) }
        };
        check("prompt_tokens", ticket.prompt_tokens.into(), prompt_tokens)?;
        check("layers", ticket.layers.into(), self.layers)?;
        let first_block = ticket.first_block as usize;
        let blocks = prompt_tokens.div_ceil(self.block_tokens).saturating_sub(first_block);
        check("blocks", ticket.blocks.into(), blocks)?;
        let rows = prompt_tokens.saturating_sub(first_block * self.block_tokens);
        check("bytes_per_layer", ticket.bytes_per_layer, rows * self.row_bytes)
    }

    fn suppressed(&self, sequence: &Sequence) -> Vec<TokenId> {
        let stopping = &sequence.stopping;
        if stopping.min_tokens == 0 {
            return Vec::new();
        }
        let mut suppressed = stopping.stop_token_ids.clone();
        if !stopping.ignore_eos {
            suppressed.extend_from_slice(&self.end_of_sequence);
        }
        suppressed
    }
}

#[cfg(test)]
mod tests;
