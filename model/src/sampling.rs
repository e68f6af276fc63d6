//! How tokens are drawn and when a sequence ends: plain parameters, checked before a worker sees them.

use std::ops::RangeInclusive;

use crate::ids::TokenId;

/// How a token is drawn from the logits. Applied in the order of the fields' arithmetic: penalties, bias, then (after
/// log-probabilities are taken) temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the best token. 0..=2.
    pub temperature: f32,
    /// Probability mass that is kept, best tokens first. Above 0, at most 1.
    pub top_p: f32,
    /// Tokens that are kept; 0 keeps all.
    pub top_k: u32,
    /// Keeps tokens with at least this share of the best token's probability. 0..=1.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output. Above 0, at most 2.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token in the output. -2..=2.
    pub presence_penalty: f32,
    /// Subtracted for every occurrence in the output. -2..=2.
    pub frequency_penalty: f32,
    /// Added to these tokens' logits, each -100..=100, no token twice.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the counter-based generator, with choice and position.
    pub seed: u64,
    /// Alternatives reported per position, 0..=20; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
}

impl SamplingParams {
    /// Alternatives reported per position at most: OpenAI's bound.
    pub const LOGPROBS_MAX: u32 = 20;
    /// Biased tokens at most. OpenAI allows 300; the list is walked for every token.
    pub const LOGIT_BIAS_MAX: usize = 1024;

    /// Always the best token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the draw is the best token.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Checks every range. Token ids are checked against the vocabulary where one is known, by
    /// [`Self::validate_tokens`].
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), ParamError> {
        within("temperature", self.temperature, 0.0..=2.0)?;
        positive("top_p", self.top_p, 1.0)?;
        within("min_p", self.min_p, 0.0..=1.0)?;
        positive("repetition_penalty", self.repetition_penalty, 2.0)?;
        within("presence_penalty", self.presence_penalty, -2.0..=2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?;
        if self.logit_bias.len() > Self::LOGIT_BIAS_MAX {
            let requirement = format!("at most {} tokens", Self::LOGIT_BIAS_MAX);
            return Err(ParamError::new("logit_bias", requirement, self.logit_bias.len()));
        }
        for (_, bias) in &self.logit_bias {
            within("logit_bias", *bias, -100.0..=100.0)?;
        }
        let mut biased: Vec<_> = self.logit_bias.iter().map(|(token, _)| *token).collect();
        biased.sort_unstable();
        if let Some(pair) = biased.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ParamError::new("logit_bias", "without repeated tokens", pair[0]));
        }
        match self.logprobs {
            Some(n) if n > Self::LOGPROBS_MAX => {
                Err(ParamError::new("logprobs", format!("at most {}", Self::LOGPROBS_MAX), n))
            }
            _ => Ok(()),
        }
    }

    /// Checks that every biased token is in a vocabulary of `vocab_size`.
    ///
    /// # Errors
    /// Names `logit_bias`.
    pub fn validate_tokens(&self, vocab_size: usize) -> Result<(), ParamError> {
        in_vocabulary("logit_bias", self.logit_bias.iter().map(|(token, _)| *token), vocab_size)
    }
}

impl Default for SamplingParams {
    /// OpenAI's defaults: temperature 1, nothing cut off, nothing penalised.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// When a sequence ends. Stop strings are the router's: workers know no text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopping {
    /// Tokens to generate at most, 1 or more.
    pub max_tokens: u32,
    /// Tokens to generate at least: until then neither an end of sequence nor a stop token is drawn.
    pub min_tokens: u32,
    /// Generate past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Tokens that end the sequence besides the model's own.
    pub stop_token_ids: Vec<TokenId>,
}

impl Stopping {
    /// Stop tokens at most: the list is walked for every token.
    pub const STOP_TOKENS_MAX: usize = 64;

    /// Checks every range.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), ParamError> {
        if self.max_tokens == 0 {
            return Err(ParamError::new("max_tokens", "at least 1", 0));
        }
        if self.min_tokens > self.max_tokens {
            return Err(ParamError::new("min_tokens", "at most max_tokens", self.min_tokens));
        }
        if self.stop_token_ids.len() > Self::STOP_TOKENS_MAX {
            let requirement = format!("at most {} tokens", Self::STOP_TOKENS_MAX);
            return Err(ParamError::new("stop_token_ids", requirement, self.stop_token_ids.len()));
        }
        Ok(())
    }

    /// Checks that every stop token is in a vocabulary of `vocab_size`.
    ///
    /// # Errors
    /// Names `stop_token_ids`.
    pub fn validate_tokens(&self, vocab_size: usize) -> Result<(), ParamError> {
        in_vocabulary("stop_token_ids", self.stop_token_ids.iter().copied(), vocab_size)
    }
}

/// A request's parameter that is out of range: the caller's fault, and worded for the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` must be {requirement}, got {value}")]
pub struct ParamError {
    /// The parameter's name, as it is on the wire.
    pub field: &'static str,
    /// What would have been accepted.
    pub requirement: String,
    /// What was given.
    pub value: String,
}

impl ParamError {
    /// An error for `field`.
    pub fn new(field: &'static str, requirement: impl Into<String>, value: impl ToString) -> Self {
        Self { field, requirement: requirement.into(), value: value.to_string() }
    }
}

fn within(field: &'static str, value: f32, range: RangeInclusive<f32>) -> Result<(), ParamError> {
    // NaN is in no range.
    if range.contains(&value) {
        return Ok(());
    }
    Err(ParamError::new(field, format!("in {}..={}", range.start(), range.end()), value))
}

fn positive(field: &'static str, value: f32, max: f32) -> Result<(), ParamError> {
    if value > 0.0 && value <= max {
        return Ok(());
    }
    Err(ParamError::new(field, format!("above 0, at most {max}"), value))
}

fn in_vocabulary(
    field: &'static str,
    mut tokens: impl Iterator<Item = TokenId>,
    vocab_size: usize,
) -> Result<(), ParamError> {
    match tokens.find(|token| token.index() >= vocab_size) {
        Some(token) => Err(ParamError::new(field, format!("made of token ids below {vocab_size}"), token)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
