//! From a row of logits to a token: one sequence's sampler.
//!
//! The order of operations is vLLM's: logit bias, then repetition, frequency and presence penalties, then the
//! log-probabilities are taken, then temperature, min-p, top-k, top-p, and one draw. The draw is counter-based and each token
//! has its own noise ([`Isa::gumbel_argmax`]), so a token depends on (logits, parameters, seed, choice, position, tokens so far)
//! and on nothing else: a sampler rebuilt on another worker by replaying [`SequenceSampler::observe`] goes on with the same
//! tokens, and a draft model's logits that are nearly the main model's give nearly always the same token.
//!
//! What is deliberately not here: stop conditions. Whoever owns the sequence decides when it ends; it passes the tokens
//! that may not come yet (`min_tokens`) as `suppress`.

use std::collections::HashMap;

use compute::{GUMBEL_TOKENS, GumbelKey, Isa, WeightBlock};
use model::{SamplingParams, TokenId};

pub(crate) use plan::Adjustments;
use truncation::{Candidate, Truncation};

mod plan;
mod truncation;

/// Below this temperature the best token is taken; dividing by less overflows f32 (vLLM's `_SAMPLING_EPS`).
const GREEDY_BELOW: f32 = 1e-5;

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its natural log-probability after bias and penalties, before temperature and truncation. Never NaN.
    pub logprob: f32,
    /// The most probable tokens in descending order, as many as [`SamplingParams::logprobs`] asks for.
    pub top: Vec<(TokenId, f32)>,
}

impl Sampled {
    /// The log-probability of a token that is given, with the `count` most probable ones: of a prompt's token in the row
    /// before it. No bias, no penalty.
    pub fn given(token: TokenId, logits: &[f32], count: u32) -> Self {
        let isa = Isa::detect();
        let peak = logits[isa.argmax(logits)];
        let log_total = f64::from(peak) + isa.sum_exp(logits, peak).ln();
        let top = largest(logits, count as usize).into_iter();
        let logit = logits.get(token.0 as usize).copied().unwrap_or(f32::NEG_INFINITY);
        Self {
            token,
            logprob: log_probability(logit, log_total),
            top: top
                .map(|index| (TokenId(index as u32), log_probability(logits[index], log_total)))
                .collect(),
        }
    }
}

/// How often a token occurred, as the penalties see it.
#[derive(Clone, Copy, Default)]
struct Occurrence {
    in_prompt: bool,
    generated: u32,
}

/// Samples the tokens of one completion.
pub struct SequenceSampler {
    params: SamplingParams,
    choice: u32,
    /// Kept only where a penalty is in force: the common request pays nothing for it.
    occurrences: Option<HashMap<TokenId, Occurrence>>,
    /// Softmax weights of the vocabulary and of its blocks, and the tokens that survive truncation; stay empty unless top-k,
    /// top-p or min-p is in force.
    weights: Vec<f32>,
    blocks: Vec<WeightBlock>,
    candidates: Vec<Candidate>,
    spare: Vec<Candidate>,
    isa: Isa,
}

impl SequenceSampler {
    /// A sampler for completion number `choice` of a request whose prompt is `prompt`.
    ///
    /// `params` must hold what [`SamplingParams::validate`] checks.
    pub fn new(params: &SamplingParams, choice: u32, prompt: &[TokenId]) -> Self {
        let penalised = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        let occurrences = penalised.then(|| {
            let seen = Occurrence { in_prompt: true, generated: 0 };
            prompt.iter().map(|&token| (token, seen)).collect()
        });
        Self {
            params: params.clone(),
            choice,
            occurrences,
            weights: Vec::new(),
            blocks: Vec::new(),
            candidates: Vec::new(),
            spare: Vec::new(),
            isa: Isa::detect(),
        }
    }

    /// Notes a token of the completion, sampled here or (after a hand-off) elsewhere.
    pub fn observe(&mut self, token: TokenId) {
        if let Some(occurrences) = &mut self.occurrences {
            occurrences.entry(token).or_default().generated += 1;
        }
    }

    /// Samples the token at `position` of the sequence from `logits` (one per vocabulary entry; overwritten).
    ///
    /// Tokens in `suppress` get probability zero. The caller passes the token to [`Self::observe`] once it is accepted.
    pub fn sample(&mut self, logits: &mut [f32], position: usize, suppress: &[TokenId]) -> Sampled {
        self.adjust(logits, suppress);
        let best = self.isa.argmax(logits);
        let log_total = f64::from(logits[best]) + self.isa.sum_exp(logits, logits[best]).ln();
        let logprob = |index: usize, logits: &[f32]| log_probability(logits[index], log_total);
        let top = match self.params.logprobs {
            Some(count) if count > 0 => largest(logits, count as usize)
                .into_iter()
                .map(|index| (TokenId(index as u32), logprob(index, logits)))
                .collect(),
            _ => Vec::new(),
        };
        let chosen = self.choose(logits, best, position);
        Sampled { token: TokenId(chosen as u32), logprob: logprob(chosen, logits), top }
    }

    /// What [`Self::sample`] would take if these logits were the main model's: a guess from a draft model's. It is made
    /// with the same noise of each token, so where the two distributions agree a sampled token is guessed as well as a greedy
    /// one; the most probable token would be right only as often as it is probable.
    pub fn guess(&mut self, logits: &mut [f32], position: usize, suppress: &[TokenId]) -> TokenId {
        self.adjust(logits, suppress);
        TokenId(self.choose(logits, self.isa.argmax(logits), position) as u32)
    }

    /// Greedy, or by the noise of `position`.
    fn choose(&mut self, logits: &[f32], best: usize, position: usize) -> usize {
        if self.params.temperature < GREEDY_BELOW || !logits[best].is_finite() {
            return best;
        }
        let key = GumbelKey { seed: self.params.seed, choice: self.choice, position: position as u64 };
        self.draw(logits, best, key)
    }

    /// Bias, penalties and suppression, in place.
    fn adjust(&self, logits: &mut [f32], suppress: &[TokenId]) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit += bias;
            }
        }
        // Each token is adjusted on its own, so the map's order does not matter.
        for (token, seen) in self.occurrences.iter().flatten() {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit = self.penalised(*logit, *seen);
            }
        }
        for token in suppress {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Repetition looks at prompt and completion, frequency and presence at the completion alone.
    fn penalised(&self, logit: f32, seen: Occurrence) -> f32 {
        let mut logit = logit;
        if seen.in_prompt || seen.generated > 0 {
            let penalty = self.params.repetition_penalty;
            logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
        }
        logit -= self.params.frequency_penalty * seen.generated as f32;
        if seen.generated > 0 {
            logit -= self.params.presence_penalty;
        }
        logit
    }

    /// Of the tokens that truncation leaves the one with the largest sum of logit over temperature and noise, the lowest on a
    /// tie.
    fn draw(&mut self, logits: &[f32], best: usize, key: GumbelKey) -> usize {
        let Self { params, isa, weights, blocks, candidates, spare, .. } = self;
        let limits = Truncation { top_k: params.top_k, top_p: params.top_p, min_p: params.min_p };
        let (peak, temperature) = (logits[best], params.temperature);
        if limits.keeps_all(logits.len()) {
            return isa.gumbel_argmax(logits, best, peak, temperature, key);
        }
        isa.softmax_weights(logits, peak, temperature, weights, blocks);
        limits.apply(logits, weights, blocks, candidates, spare);
        let (mut drawn, mut largest) = (best, f32::NEG_INFINITY);
        for candidates in candidates.chunks(GUMBEL_TOKENS) {
            let mut tokens = [0; GUMBEL_TOKENS];
            for (token, candidate) in tokens.iter_mut().zip(candidates) {
                *token = candidate.token;
            }
            let noise = isa.gumbel_noise(key, &tokens);
            for (candidate, noise) in candidates.iter().zip(noise) {
                let sum = (candidate.logit - peak) / temperature + noise;
                if sum > largest {
                    (drawn, largest) = (candidate.token as usize, sum);
                }
            }
        }
        drawn
    }
}

/// Of a token that cannot come, and in a row without any finite logit: negative infinity, never NaN.
fn log_probability(logit: f32, log_total: f64) -> f32 {
    let value = f64::from(logit) - log_total;
    if value.is_nan() { f32::NEG_INFINITY } else { value as f32 }
}

/// Indices of the `count` largest values in descending order, lower indices first among equals.
fn largest(logits: &[f32], count: usize) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::with_capacity(count + 1);
    for (index, &logit) in logits.iter().enumerate() {
        if best.len() == count && best.last().is_some_and(|&last| logits[last] >= logit) {
            continue;
        }
        let place = best.partition_point(|&other| logits[other] >= logit);
        best.insert(place, index);
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests;
