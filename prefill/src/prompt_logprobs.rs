//! Log-probabilities of a prompt's own tokens: what the row of each says of the one behind it.
//!
//! Collected chunk by chunk, so that no more logits are held than a step has rows.

use engine::Sampled;
use model::TokenId;
use proto::v1::{GeneratedToken, TokenLogprob};

/// One request's.
#[derive(Debug)]
pub(crate) struct PromptLogprobs {
    alternatives: u32,
    tokens: Vec<GeneratedToken>,
}

impl PromptLogprobs {
    /// With so many of the most probable tokens at each place.
    pub(crate) fn new(alternatives: u32) -> Self {
        Self { alternatives, tokens: Vec::new() }
    }

    /// Takes in the rows of `prompt` from `start` on, each `[vocab]`. The row of the last token says nothing of the prompt.
    pub(crate) fn rows<'a>(
        &mut self,
        prompt: &[TokenId],
        start: usize,
        logits: impl Iterator<Item = &'a [f32]>,
    ) {
        let behind = prompt.get(start + 1..).unwrap_or_default();
        for (&token, logits) in behind.iter().zip(logits) {
            self.tokens.push(to_wire(Sampled::given(token, logits, self.alternatives), true));
        }
    }

    /// Every token behind the first, once all rows are taken in.
    pub(crate) fn take(&mut self) -> Vec<GeneratedToken> {
        std::mem::take(&mut self.tokens)
    }
}

/// A token as the router reads it.
pub(crate) fn to_wire(sampled: Sampled, logprobs: bool) -> GeneratedToken {
    let top = sampled.top.into_iter().map(|(token, logprob)| TokenLogprob { token_id: token.0, logprob });
    GeneratedToken {
        token_id: sampled.token.0,
        logprob: logprobs.then_some(sampled.logprob),
        top: top.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_tells_of_the_token_behind_it() {
        let prompt = [2, 0, 1].map(TokenId);
        // Of three tokens: the second twice as probable as the others, then the first nine times.
        let rows = [[0.0, 2f32.ln(), 0.0], [9f32.ln(), 0.0, 0.0], [5.0, 0.0, 0.0]];
        let mut logprobs = PromptLogprobs::new(1);
        logprobs.rows(&prompt, 0, rows[..1].iter().map(<[f32; 3]>::as_slice));
        logprobs.rows(&prompt, 1, rows[1..].iter().map(<[f32; 3]>::as_slice));
        let seen: Vec<_> = logprobs
            .take()
            .into_iter()
            .map(|token| (token.token_id, token.logprob.map(f32::exp), token.top[0].token_id))
            .collect();
        let close = |p: Option<f32>, expected: f32| p.is_some_and(|p| (p - expected).abs() < 1e-6);
        assert_eq!(seen.iter().map(|token| (token.0, token.2)).collect::<Vec<_>>(), [(0, 1), (1, 0)]);
        assert!(close(seen[0].1, 0.25) && close(seen[1].1, 1.0 / 11.0), "{seen:?}");
    }
}
