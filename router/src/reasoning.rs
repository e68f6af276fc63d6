//! Splits an answer's thinking from its content at `<think>` and `</think>`.
//!
//! An answer thinks when the prompt opened the mark already, or when its first text is the opening mark.
//! White space right behind a mark belongs to the mark: templates and models put line breaks there.
//! After `</think>` everything is content, further marks included.

use crate::stop::longest_overlap;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// A piece of an answer, split.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Split {
    /// Between the marks.
    pub reasoning: String,
    /// Behind them, or all of it.
    pub content: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space and perhaps a part of the opening mark has come.
    Start,
    /// Between the marks; `fresh`: nothing but white space has come since the opening mark.
    Thinking { fresh: bool },
    /// Behind the closing mark, or there is no thinking; `fresh` as above.
    Content { fresh: bool },
}

/// Splits one choice's text.
#[derive(Debug)]
pub(crate) struct ReasoningSplitter {
    state: State,
    held: String,
}

impl ReasoningSplitter {
    /// For the answer to a chat; `opened`: the rendered prompt ends inside the opening mark.
    pub fn chat(opened: bool) -> Self {
        let state = if opened { State::Thinking { fresh: true } } else { State::Start };
        Self { state, held: String::new() }
    }

    /// For plain completions: everything is content.
    pub fn plain() -> Self {
        Self { state: State::Content { fresh: false }, held: String::new() }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Split {
        self.held.push_str(piece);
        let mut split = Split::default();
        while self.advance(&mut split) {}
        split
    }

    /// The text has ended: an unfinished mark is text.
    pub fn finish(&mut self) -> Split {
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::Thinking { .. } => Split { reasoning: rest, content: String::new() },
            State::Start | State::Content { .. } => Split { reasoning: String::new(), content: rest },
        }
    }

    /// Makes one transition; false when more text is needed.
    fn advance(&mut self, split: &mut Split) -> bool {
        match self.state {
            State::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.state = State::Thinking { fresh: true };
                    return true;
                }
                if OPEN.starts_with(text) {
                    return false;
                }
                self.state = State::Content { fresh: false };
                true
            }
            State::Thinking { fresh } => {
                if fresh && !self.skip_white_space() {
                    return false;
                }
                self.state = State::Thinking { fresh: false };
                if let Some(at) = self.held.find(CLOSE) {
                    split.reasoning.push_str(&self.held[..at]);
                    self.held.drain(..at + CLOSE.len());
                    self.state = State::Content { fresh: true };
                    return true;
                }
                let certain = self.held.len() - longest_overlap(&self.held, CLOSE);
                split.reasoning.extend(self.held.drain(..certain));
                false
            }
            State::Content { fresh } => {
                if fresh && !self.skip_white_space() {
                    return false;
                }
                self.state = State::Content { fresh: false };
                split.content.push_str(&self.held);
                self.held.clear();
                false
            }
        }
    }

    /// Drops leading white space; false when nothing is left.
    fn skip_white_space(&mut self) -> bool {
        let text = self.held.trim_start();
        self.held.drain(..self.held.len() - text.len());
        !self.held.is_empty()
    }
}

#[cfg(test)]
mod tests;
