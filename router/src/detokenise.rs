//! One choice's tokens to the text a client may see: detokeniser, then the split into reasoning and content, then stop
//! strings.
//!
//! Stop strings end the answer, not the thinking about it: they are matched on content alone. The token that ends a
//! choice (end of sequence, stop token id) is reported as a token; it has no text, and a stop string is left out, unless
//! the client asks for what ended the answer.

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

/// What of the text a client wants to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TextOptions {
    /// Leaves out marks such as the end of the sequence.
    pub skip_special_tokens: bool,
    /// Gives out the stop string, or the text of the stop token, that ended the answer.
    pub include_stop: bool,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self { skip_special_tokens: true, include_stop: false }
    }
}

/// The text of one choice.
pub(crate) struct ChoiceText {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    reasoning: ReasoningSplitter,
    /// Tokens that end a choice and have no text.
    ending: HashSet<TokenId>,
    min_tokens: u32,
    include_stop: bool,
    tokens: u32,
}

impl ChoiceText {
    pub fn new(
        detokenizer: Detokenizer,
        stop: StopMatcher,
        reasoning: ReasoningSplitter,
        ending: HashSet<TokenId>,
        min_tokens: u32,
        include_stop: bool,
    ) -> Self {
        Self { detokenizer, stop, reasoning, ending, min_tokens, include_stop, tokens: 0 }
    }

    /// Takes the next token.
    pub fn push(&mut self, token: TokenId) -> Piece {
        self.tokens += 1;
        if self.ending.contains(&token) && !self.include_stop {
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
            let rest = self.reasoning.finish();
            append(&mut piece, self.cut(rest));
        }
        if piece.stopped.is_none() {
            piece.split.content.push_str(&self.stop.finish());
        }
        piece
    }

    /// Tokens taken.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    fn take(&mut self, text: &str) -> Piece {
        let split = self.reasoning.push(text);
        self.cut(split)
    }

    /// Looks for stop strings in the content.
    fn cut(&mut self, Split { reasoning, content }: Split) -> Piece {
        let Certain { text: mut content, stopped } = match self.tokens < self.min_tokens {
            true => Certain { text: self.stop.pass(&content), stopped: None },
            false => self.stop.push(&content),
        };
        let stopped = stopped.map(|index| self.stop.stop(index).to_owned());
        if let (Some(stop), true) = (&stopped, self.include_stop) {
            content.push_str(stop);
        }
        Piece { split: Split { reasoning, content }, stopped }
    }
}

fn append(piece: &mut Piece, more: Piece) {
    piece.split.reasoning.push_str(&more.split.reasoning);
    piece.split.content.push_str(&more.split.content);
    piece.stopped = more.stopped;
}

#[cfg(test)]
mod tests;
