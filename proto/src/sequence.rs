//! [`v1::SequenceRequest`] ⇄ [`Sequence`]: one choice of one request, as the router hands it to workers.
//!
//! The router resolves every default before it sends, so that prefill and decode cannot disagree on one:
//! on this wire an absent sampling field is an error, not a default.

use std::time::Duration;

use model::{ExecutionFingerprint, SamplingParams, Stopping, TokenId};

use crate::field::{FieldError, at_most, name};
use crate::share::Share;
use crate::trace::TraceContext;
use crate::{fingerprint, v1};

/// Longest request id, bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;
/// Choices (`n`) of one request.
pub const CHOICES_MAX: u32 = 16;
/// A deadline further away than a day is a mistake (and would overflow a clock).
pub const DEADLINE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// One sequence to generate. Everything in it has been checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// The client's or the router's name for the request; in every log line and span.
    pub request_id: String,
    /// The router's span.
    pub trace: TraceContext,
    /// Never empty.
    pub prompt: Vec<TokenId>,
    /// Fully resolved.
    pub sampling: SamplingParams,
    /// `max_tokens` is at least 1 and fits the context behind the prompt.
    pub stopping: Stopping,
    /// Which of the request's choices: part of the sampler's key.
    pub choice: u32,
    /// Time left when the message was made.
    pub deadline: Option<Duration>,
    /// What the router expects the worker to be.
    pub fingerprint: ExecutionFingerprint,
    /// Prefix caches share KV among sequences of one salt only. The router's word: it is derived from who asks.
    pub cache_salt: u64,
    /// Whose turn it takes.
    pub share: Share,
}

/// What the served model allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceLimits {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Tokens of prompt and completion together.
    pub context_tokens_max: usize,
}

impl Sequence {
    /// Checks a message against the model's limits.
    ///
    /// # Errors
    /// Names the first field that is missing or out of bounds.
    pub fn from_wire(wire: &v1::SequenceRequest, limits: SequenceLimits) -> Result<Self, FieldError> {
        name("request_id", &wire.request_id, REQUEST_ID_BYTES_MAX)?;
        let prompt = prompt(&wire.prompt, limits)?;
        let sampling = wire.sampling.as_ref().ok_or_else(|| FieldError::missing("sampling"))?;
        let sampling = complete_sampling(sampling, limits).map_err(|error| error.within("sampling"))?;
        let stopping = wire.stopping.as_ref().ok_or_else(|| FieldError::missing("stopping"))?;
        let room = limits.context_tokens_max - prompt.len();
        let stopping = complete_stopping(stopping, room, limits).map_err(|error| error.within("stopping"))?;
        if wire.choice >= CHOICES_MAX {
            return Err(FieldError::out_of_range("choice", wire.choice, format_args!("below {CHOICES_MAX}")));
        }
        let deadline = (wire.deadline_ms != 0).then(|| Duration::from_millis(wire.deadline_ms));
        if deadline.is_some_and(|deadline| deadline > DEADLINE_MAX) {
            return Err(FieldError::out_of_range("deadline_ms", wire.deadline_ms, "at most a day"));
        }
        let fingerprint = wire.fingerprint.as_ref().ok_or_else(|| FieldError::missing("fingerprint"))?;
        Ok(Self {
            request_id: wire.request_id.clone(),
            trace: TraceContext::parse_or_root(&wire.traceparent),
            prompt,
            sampling,
            stopping,
            choice: wire.choice,
            deadline,
            fingerprint: fingerprint::from_wire(fingerprint).map_err(|error| error.within("fingerprint"))?,
            cache_salt: wire.cache_salt,
            share: Share::from_wire(wire.share.as_ref()).map_err(|error| error.within("share"))?,
        })
    }

    /// The wire's form. A deadline of less than a millisecond becomes one: 0 would mean none.
    pub fn to_wire(&self) -> v1::SequenceRequest {
        v1::SequenceRequest {
            request_id: self.request_id.clone(),
            traceparent: self.trace.to_string(),
            prompt: self.prompt.iter().map(|token| token.0).collect(),
            sampling: Some(sampling_to_wire(&self.sampling)),
            stopping: Some(stopping_to_wire(&self.stopping)),
            choice: self.choice,
            deadline_ms: self
                .deadline
                .map_or(0, |left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)),
            fingerprint: Some(fingerprint::to_wire(&self.fingerprint)),
            cache_salt: self.cache_salt,
            share: Some(self.share.to_wire()),
        }
    }
}

/// Lays the fields that `wire` carries over `defaults` (for the router: the model's
/// `generation_config.json` over the documented defaults, with a freshly drawn seed).
///
/// # Errors
/// Names the field that is out of its documented range.
pub fn sampling_from_wire(
    wire: &v1::Sampling,
    defaults: &SamplingParams,
) -> Result<SamplingParams, FieldError> {
    let params = SamplingParams {
        temperature: wire.temperature.unwrap_or(defaults.temperature),
        top_p: wire.top_p.unwrap_or(defaults.top_p),
        top_k: wire.top_k.unwrap_or(defaults.top_k),
        min_p: wire.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: wire.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: wire.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: wire.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        logit_bias: wire.logit_bias.iter().map(|(&token, &bias)| (TokenId(token), bias)).collect(),
        seed: wire.seed.unwrap_or(defaults.seed),
        logprobs: wire.logprobs,
    };
    params.validate()?;
    Ok(params)
}

/// The wire's form, every field set.
pub fn sampling_to_wire(params: &SamplingParams) -> v1::Sampling {
    v1::Sampling {
        temperature: Some(params.temperature),
        top_p: Some(params.top_p),
        top_k: Some(params.top_k),
        min_p: Some(params.min_p),
        repetition_penalty: Some(params.repetition_penalty),
        presence_penalty: Some(params.presence_penalty),
        frequency_penalty: Some(params.frequency_penalty),
        logit_bias: params.logit_bias.iter().map(|&(token, bias)| (token.0, bias)).collect(),
        seed: Some(params.seed),
        logprobs: params.logprobs,
    }
}

/// Checks when a sequence ends; an absent `max_tokens` takes `max_tokens_default` (for the router: what
/// the context leaves). Stop strings are the router's and are ignored here.
///
/// # Errors
/// Names `max_tokens` when 0, `min_tokens` above `max_tokens`, too many `stop_token_ids`.
pub fn stopping_from_wire(wire: &v1::Stopping, max_tokens_default: u32) -> Result<Stopping, FieldError> {
    let stopping = Stopping {
        max_tokens: wire.max_tokens.unwrap_or(max_tokens_default),
        min_tokens: wire.min_tokens,
        ignore_eos: wire.ignore_eos,
        stop_token_ids: wire.stop_token_ids.iter().map(|&token| TokenId(token)).collect(),
    };
    stopping.validate()?;
    Ok(stopping)
}

/// The wire's form. Carries no stop strings: those never leave the router.
pub fn stopping_to_wire(stopping: &Stopping) -> v1::Stopping {
    v1::Stopping {
        max_tokens: Some(stopping.max_tokens),
        min_tokens: stopping.min_tokens,
        ignore_eos: stopping.ignore_eos,
        stop_token_ids: stopping.stop_token_ids.iter().map(|token| token.0).collect(),
        stop: Vec::new(),
    }
}

fn prompt(wire: &[u32], limits: SequenceLimits) -> Result<Vec<TokenId>, FieldError> {
    if wire.is_empty() {
        return Err(FieldError::missing("prompt"));
    }
    // One token at least must be left to generate.
    at_most("prompt", wire.len(), limits.context_tokens_max.saturating_sub(1))?;
    let outside = |&(_, &token): &(usize, &u32)| token as usize >= limits.vocab_size;
    if let Some((index, token)) = wire.iter().enumerate().find(outside) {
        let allowed = format_args!("below the vocabulary's {}", limits.vocab_size);
        return Err(FieldError::out_of_range(format!("prompt[{index}]"), token, allowed));
    }
    Ok(wire.iter().map(|&token| TokenId(token)).collect())
}

/// Between processes every field must be there: see the module's doc.
fn complete_sampling(wire: &v1::Sampling, limits: SequenceLimits) -> Result<SamplingParams, FieldError> {
    let required = [
        ("temperature", wire.temperature.is_some()),
        ("top_p", wire.top_p.is_some()),
        ("top_k", wire.top_k.is_some()),
        ("min_p", wire.min_p.is_some()),
        ("repetition_penalty", wire.repetition_penalty.is_some()),
        ("presence_penalty", wire.presence_penalty.is_some()),
        ("frequency_penalty", wire.frequency_penalty.is_some()),
        ("seed", wire.seed.is_some()),
    ];
    if let Some((field, _)) = required.into_iter().find(|(_, present)| !present) {
        return Err(FieldError::missing(field));
    }
    let params = sampling_from_wire(wire, &SamplingParams::greedy())?;
    params.validate_tokens(limits.vocab_size)?;
    Ok(params)
}

fn complete_stopping(
    wire: &v1::Stopping,
    room: usize,
    limits: SequenceLimits,
) -> Result<Stopping, FieldError> {
    let max_tokens = wire.max_tokens.ok_or_else(|| FieldError::missing("max_tokens"))?;
    if max_tokens as usize > room {
        return Err(FieldError::out_of_range(
            "max_tokens",
            max_tokens,
            format_args!("at most the {room} tokens that the context leaves behind the prompt"),
        ));
    }
    let stopping = stopping_from_wire(wire, max_tokens)?;
    stopping.validate_tokens(limits.vocab_size)?;
    Ok(stopping)
}

#[cfg(test)]
mod tests;
