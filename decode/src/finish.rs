//! When a sequence ends. One rule for every token, the first one included: it comes from prefill, but whether it ends
//! the sequence is decided here, where the other tokens are judged.
//!
//! Text stop strings are not judged here: only the router has text, and says when one has ended a sequence.

use model::{Stopping, TokenId};

/// Why a sequence ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// One of the model's end-of-sequence tokens.
    EndOfSequence,
    /// One of the request's `stop_token_ids`.
    StopToken(TokenId),
    /// One of the request's stop strings, says the router.
    StopString,
    /// `max_tokens`, which the model's context bounds.
    Length,
}

/// The ends a request asked for, resolved against the model.
#[derive(Clone, Debug)]
pub struct FinishRule {
    /// Tokens that end the sequence: the request's own first, then the model's end of sequence unless ignored.
    ending: Vec<TokenId>,
    /// How many of `ending` are the request's own.
    own: usize,
    tokens_min: u32,
    tokens_max: u32,
}

impl FinishRule {
    /// Resolves `stopping` against the model's `end_of_sequence` tokens. That `max_tokens` is at least 1 and fits the
    /// context has been checked where the request left the wire, so the end of the context is a [`Finish::Length`] too.
    pub fn new(stopping: &Stopping, end_of_sequence: &[TokenId]) -> Self {
        let mut ending = stopping.stop_token_ids.clone();
        let own = ending.len();
        if !stopping.ignore_eos {
            ending.extend_from_slice(end_of_sequence);
        }
        Self { ending, own, tokens_min: stopping.min_tokens, tokens_max: stopping.max_tokens }
    }

    /// Tokens that this sequence generates at most.
    pub fn tokens_max(&self) -> u32 {
        self.tokens_max
    }

    /// Judges `token`, the `generated`-th of the completion (counted from 1).
    ///
    /// A token that ends the sequence wins over the length that it happens to fill.
    pub fn judge(&self, token: TokenId, generated: u32) -> Option<Finish> {
        if generated >= self.tokens_min
            && let Some(at) = self.ending.iter().position(|&ending| ending == token)
        {
            return Some(if at < self.own { Finish::StopToken(token) } else { Finish::EndOfSequence });
        }
        (generated >= self.tokens_max).then_some(Finish::Length)
    }

    /// Tokens that must not be drawn next, `generated` tokens into the completion: while `min_tokens` is not reached,
    /// the ones that would end it.
    pub fn suppressed(&self, generated: u32) -> &[TokenId] {
        if generated < self.tokens_min { &self.ending } else { &[] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EOS: TokenId = TokenId(1);
    const STOP: TokenId = TokenId(7);
    const WORD: TokenId = TokenId(100);

    fn rule(max_tokens: u32, min_tokens: u32, ignore_eos: bool) -> FinishRule {
        let stopping = Stopping { max_tokens, min_tokens, ignore_eos, stop_token_ids: vec![STOP] };
        FinishRule::new(&stopping, &[EOS])
    }

    #[test]
    fn every_end_has_its_reason() {
        let check = |rule: FinishRule, token, generated, expect| {
            assert_eq!(rule.judge(token, generated), expect, "{rule:?}, {token:?} as token {generated}");
        };
        check(rule(5, 0, false), WORD, 1, None);
        check(rule(5, 0, false), WORD, 5, Some(Finish::Length));
        check(rule(5, 0, false), EOS, 1, Some(Finish::EndOfSequence));
        check(rule(5, 0, false), STOP, 1, Some(Finish::StopToken(STOP)));
        check(rule(5, 0, false), EOS, 5, Some(Finish::EndOfSequence));
        check(rule(5, 0, true), EOS, 1, None);
        check(rule(5, 0, true), STOP, 1, Some(Finish::StopToken(STOP)));
        check(rule(5, 3, false), EOS, 2, None);
        check(rule(5, 3, false), EOS, 3, Some(Finish::EndOfSequence));
        check(rule(1, 0, false), WORD, 1, Some(Finish::Length));
    }

    #[test]
    fn what_would_end_it_is_suppressed_until_min_tokens() {
        assert_eq!(rule(5, 2, false).suppressed(0), [STOP, EOS]);
        assert_eq!(rule(5, 2, false).suppressed(1), [STOP, EOS]);
        assert_eq!(rule(5, 2, false).suppressed(2), []);
        assert_eq!(rule(5, 2, true).suppressed(0), [STOP]);
    }
}
