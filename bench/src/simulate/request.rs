//! A simulated request: what it asks for, where it runs, and what its client sees.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::TokenId;
use serde_json::json;

use super::decode_worker::END;
use super::world::BLOCK_TOKENS;
use crate::client::Streamed;
use crate::serve::conversation::{Outcome, Reuse};
use crate::workload::RequestId;

/// One turn of a conversation, from its arrival to its last token.
pub(super) struct Request {
    pub(super) id: RequestId,
    pub(super) turn: u32,
    pub(super) due: Duration,
    pub(super) prompt: Arc<[TokenId]>,
    pub(super) output_tokens: u32,
    /// Tokens at its start that a prefill worker has computed for an earlier turn.
    pub(super) prefilled: u64,
    /// The last turn's prompt and answer, tokens.
    pub(super) earlier: Option<(u64, u64)>,
    pub(super) prefill: usize,
    pub(super) decode: usize,
    pub(super) prefill_here: bool,
    pub(super) shared_blocks: usize,
    pub(super) cached_tokens: usize,
    pub(super) answer: Vec<TokenId>,
    /// Of each token, from `due` on.
    pub(super) arrivals: Vec<Duration>,
}

impl Request {
    /// Draws the next token: the end where the answer's length says so, else one that no other request has there.
    pub(super) fn sample(&mut self, now: Duration) -> TokenId {
        self.arrivals.push(now.saturating_sub(self.due));
        let last = self.arrivals.len() >= self.output_tokens as usize;
        let of_its_own = self.id.index.wrapping_mul(2_654_435_761).wrapping_add(self.arrivals.len() as u32);
        let token = if last { END } else { TokenId(2 + of_its_own % 100_000) };
        self.answer.push(token);
        token
    }

    /// What the client saw.
    pub(super) fn outcome(&mut self, epoch: Instant, now: Duration) -> Outcome {
        let (prompt, cached) = (self.prompt.len() as u64, self.cached_tokens as u64);
        let reuse = self
            .earlier
            .map(|(earlier, answer)| Reuse::new(prompt, earlier, answer, BLOCK_TOKENS as u64, cached));
        let arrivals = std::mem::take(&mut self.arrivals);
        let answer = Streamed {
            ttft: arrivals.first().copied(),
            total: now.saturating_sub(self.due),
            usage: Some(json!({
                "prompt_tokens": prompt,
                "completion_tokens": arrivals.len(),
                "prompt_tokens_details": { "cached_tokens": cached },
            })),
            arrivals,
            timings: None,
        };
        let (due, ended) = ((epoch + self.due).into(), (epoch + now).into());
        Outcome { due, ended, refused: 0, reuse, answer: Ok(answer) }
    }
}
