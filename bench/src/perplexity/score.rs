//! Teacher forcing: the loss of each token of a sequence, given those before it.

use engine::{Engine, LogitsWanted, SequenceInput, StepError};
use model::{BlockId, TokenId};

/// Scores one sequence after the other in the same cache blocks.
pub struct Scorer {
    engine: Engine,
    blocks: Vec<BlockId>,
}

impl Scorer {
    /// All blocks of `engine` are used for the one sequence.
    pub fn new(engine: Engine) -> Self {
        let blocks = (0..engine.kv().blocks() as u32).map(BlockId).collect();
        Self { engine, blocks }
    }

    /// Negative log-likelihoods, in nats, of `tokens[first..]`, `first` being 1 or more.
    ///
    /// # Errors
    /// The sequence does not fit the engine's cache or context, or has an unknown token.
    pub fn losses(&mut self, tokens: &[TokenId], first: usize) -> Result<Vec<f64>, StepError> {
        let vocab = self.engine.config().vocab_size;
        let step = self.engine.step_tokens_max();
        // The last token is predicted and predicts nothing.
        let inputs = tokens.len().saturating_sub(1);
        // The row of `tokens[i]` predicts `tokens[i + 1]`: rows from here on are wanted.
        let wanted = first.saturating_sub(1);
        let mut losses = Vec::with_capacity(inputs.saturating_sub(wanted));
        let mut start = 0;
        while start < inputs {
            let logits = if start < wanted { LogitsWanted::None } else { LogitsWanted::All };
            let bound = if start < wanted { wanted.min(inputs) } else { inputs };
            let end = (start + step).min(bound);
            let input = SequenceInput {
                tokens: &tokens[start..end],
                position: start,
                block_table: &self.blocks,
                logits,
            };
            let output = self.engine.step(&[input], &mut ())?;
            if logits == LogitsWanted::All {
                let rows = output.logits.chunks_exact(vocab).zip(&tokens[start + 1..]);
                losses.extend(rows.map(|(logits, next)| loss(logits, *next)));
            }
            start = end;
        }
        Ok(losses)
    }
}

/// `ln Σ exp(logits) - logits[token]`.
pub(super) fn loss(logits: &[f32], token: TokenId) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    let own = logits.get(token.0 as usize).copied().unwrap_or(f32::NEG_INFINITY);
    largest + sum.ln() - f64::from(own)
}
