//! Text of a token stream as it becomes certain.
//!
//! Invariant: the concatenation of everything handed out, `finish` included, is what [`Tokenizer::decode`] gives for
//! the whole. At most three bytes are held back, so that a token costs the same however long the stream is.

use super::Tokenizer;
use crate::ids::TokenId;

/// Turns one sequence's tokens into text, piece by piece.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The beginning of a character whose rest has not come.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// For one sequence. `skip_special` leaves out marks such as the end of the sequence.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer: tokenizer.clone(), skip_special, pending: Vec::new() }
    }

    /// The text that became certain with `token`: empty while a character is incomplete.
    pub fn push(&mut self, token: TokenId) -> String {
        if !(self.skip_special && self.tokenizer.is_special(token)) {
            self.pending.extend_from_slice(self.tokenizer.token_bytes(token));
        }
        let incomplete = incomplete_tail(&self.pending);
        let certain = self.pending.len() - incomplete;
        let text = String::from_utf8_lossy(&self.pending[..certain]).into_owned();
        self.pending.drain(..certain);
        text
    }

    /// What is left at the end of the stream: U+FFFD for a character that was never completed.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Bytes at the end that may still become a character: at most three.
fn incomplete_tail(bytes: &[u8]) -> usize {
    match bytes.utf8_chunks().last() {
        // The last chunk's invalid part is either broken, or the cut-off beginning of a character; asking whether the
        // error has a length tells which.
        Some(chunk) if !chunk.invalid().is_empty() => match std::str::from_utf8(chunk.invalid()) {
            Err(e) if e.error_len().is_none() => chunk.invalid().len(),
            _ => 0,
        },
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
