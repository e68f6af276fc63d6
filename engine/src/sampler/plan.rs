//! What a sampler would do to a row, written down for a device that draws.

use std::collections::HashMap;

use compute::cuda::{Adjustment, DrawRow};
use model::TokenId;

use super::{GREEDY_BELOW, SequenceSampler, largest, log_probability};
use crate::drawing::Draw;

/// What is done to a row's tokens, each once. Its memory is used for every row.
#[derive(Default)]
pub(crate) struct Adjustments {
    of_token: HashMap<TokenId, Adjustment>,
}

impl Adjustments {
    /// In no particular order: each changes its own token alone.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Adjustment> {
        self.of_token.values()
    }

    fn of(&mut self, token: TokenId) -> &mut Adjustment {
        self.of_token.entry(token).or_insert(Adjustment {
            token: token.0,
            bias: 0.0,
            in_prompt: false,
            generated: 0,
            suppressed: false,
        })
    }
}

impl Draw<'_> {
    /// The row's draw, but for where its adjustments lie, and these.
    pub(crate) fn plan(&self, adjustments: &mut Adjustments) -> DrawRow {
        let SequenceSampler { params, choice, occurrences, .. } = self.sampler;
        adjustments.of_token.clear();
        for &(token, bias) in &params.logit_bias {
            adjustments.of(token).bias += bias;
        }
        if let Some(occurrences) = occurrences {
            for (&token, seen) in occurrences {
                let adjustment = adjustments.of(token);
                (adjustment.in_prompt, adjustment.generated) = (seen.in_prompt, seen.generated);
            }
            for &token in self.ahead {
                adjustments.of(token).generated += 1;
            }
        }
        for &token in self.suppress {
            adjustments.of(token).suppressed = true;
        }
        DrawRow {
            adjustments: (0, adjustments.of_token.len() as u32),
            repetition: params.repetition_penalty,
            frequency: params.frequency_penalty,
            presence: params.presence_penalty,
            temperature: (params.temperature >= GREEDY_BELOW).then_some(params.temperature),
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            seed: params.seed,
            choice: *choice,
            position: self.position as u64,
        }
    }

    /// Whether the row's most probable tokens are asked for, which only its logits show.
    pub(crate) fn wants_logits(&self) -> bool {
        self.sampler.params.logprobs.is_some_and(|count| count > 0)
    }
}

impl SequenceSampler {
    /// The most probable tokens, as many as were asked for, of logits after bias and penalties.
    pub(crate) fn best_of(&self, logits: &[f32], log_total: f32) -> Vec<(TokenId, f32)> {
        let count = self.params.logprobs.unwrap_or(0) as usize;
        let best = largest(logits, count).into_iter();
        best.map(|index| (TokenId(index as u32), log_probability(logits[index], f64::from(log_total))))
            .collect()
    }
}
