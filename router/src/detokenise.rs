//! One choice's tokens to the text a client may see: detokeniser, then stop strings, then the split into
//! reasoning and content.
//!
//! Stop strings are matched on the whole text, thinking included, as the field does. The token that ends a
//! choice (end of sequence, stop token id) is reported as a token and has no text.

use std::collections::HashSet;

use model::{Detokenizer, TokenId};

use crate::reasoning::{ReasoningSplitter, Split};
use crate::stop::{Certain, StopMatcher};

/// What one token made certain.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    /// The text, split.
    pub split: Split,
    /// The stop string that ended the choice; nothing may be pushed after it.
    pub stopped: Option<String>,
}

/// The text of one choice.
pub(crate) struct ChoiceText {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    reasoning: ReasoningSplitter,
    /// Tokens that end a choice and have no text.
    ending: HashSet<TokenId>,
    min_tokens: u32,
    tokens: u32,
}

impl ChoiceText {
    pub fn new(
        detokenizer: Detokenizer,
        stop: StopMatcher,
        reasoning: ReasoningSplitter,
        ending: HashSet<TokenId>,
        min_tokens: u32,
    ) -> Self {
        Self { detokenizer, stop, reasoning, ending, min_tokens, tokens: 0 }
    }

    /// Takes the next token.
    pub fn push(&mut self, token: TokenId) -> Piece {
        self.tokens += 1;
        if self.ending.contains(&token) {
            return Piece::default();
        }
        let text = self.detokenizer.push(token);
        self.take(&text)
    }

    /// The choice has ended: gives out what was held back, unless that completes a stop string after all
    /// (an unfinished character decodes to a replacement character, which one may contain).
    pub fn finish(&mut self) -> Piece {
        // At most an unfinished character is copied.
        let text = self.detokenizer.clone().finish();
        let mut piece = self.take(&text);
        if piece.stopped.is_none() {
            let rest = self.reasoning.push(&self.stop.finish());
            append(&mut piece.split, rest);
            append(&mut piece.split, self.reasoning.finish());
        }
        piece
    }

    /// Tokens taken.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    fn take(&mut self, text: &str) -> Piece {
        let Certain { text, stopped } = match self.tokens < self.min_tokens {
            true => Certain { text: self.stop.pass(text), stopped: None },
            false => self.stop.push(text),
        };
        let mut split = self.reasoning.push(&text);
        let stopped = stopped.map(|index| self.stop.stop(index).to_owned());
        if stopped.is_some() {
            append(&mut split, self.reasoning.finish());
        }
        Piece { split, stopped }
    }
}

fn append(split: &mut Split, more: Split) {
    split.reasoning.push_str(&more.reasoning);
    split.content.push_str(&more.content);
}

#[cfg(test)]
mod tests;
