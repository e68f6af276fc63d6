//! The bytes that each token stands for, as one flat table.

use crate::error::TokenizerError;
use crate::ids::TokenId;

/// 4 Mi: the bound of config.json's `vocab_size`.
const ID_MAX: u32 = (1 << 22) - 1;

pub(super) struct Vocabulary {
    /// All tokens' bytes, by id.
    bytes: Vec<u8>,
    /// Token `id` has `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
    special: Vec<bool>,
}

impl Vocabulary {
    pub(super) fn new(encoder: &tokenizers::Tokenizer) -> Result<Self, TokenizerError> {
        let mut tokens: Vec<(u32, String)> =
            encoder.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.sort_unstable();
        // An added token may carry the id of a vocabulary entry; either is its text, the first is kept.
        tokens.dedup_by_key(|(id, _)| *id);
        if let Some((id, token)) = tokens.last().filter(|(id, _)| *id > ID_MAX) {
            let (token, id) = (token.clone(), *id);
            return Err(TokenizerError::IdTooLarge { token, id, id_max: ID_MAX });
        }
        let len = tokens.last().map_or(0, |(id, _)| *id as usize + 1);
        let mut special = vec![false; len];
        for (id, token) in encoder.get_added_tokens_decoder() {
            if let Some(flag) = special.get_mut(id as usize) {
                *flag = token.special;
            }
        }
        let byte_of = byte_of_char();
        let mut table = Self { bytes: Vec::new(), ends: Vec::with_capacity(len), special };
        for (id, token) in tokens {
            // Ids between two tokens stand for nothing.
            table.ends.resize(id as usize, table.bytes.len() as u32);
            table.push(&token, &byte_of);
        }
        Ok(table)
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Empty for an id without a token.
    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        let index = id.index();
        let Some(end) = self.ends.get(index) else { return &[] };
        let begin = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[begin as usize..*end as usize]
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id.index()).copied().unwrap_or(false)
    }

    /// A vocabulary entry spells each byte as one printable character. An added token is plain text, and shows by a
    /// character that no byte is spelled with; one that shows nothing reads the same either way, as the library has it.
    fn push(&mut self, token: &str, byte_of: &[Option<u8>; SPELLED]) {
        let begin = self.bytes.len();
        for c in token.chars() {
            match byte_of.get(c as usize).copied().flatten() {
                Some(byte) => self.bytes.push(byte),
                None => {
                    self.bytes.truncate(begin);
                    self.bytes.extend_from_slice(token.as_bytes());
                    break;
                }
            }
        }
        self.ends.push(self.bytes.len() as u32);
    }
}

/// Characters below this spell bytes: 256, and one for each of the 68 bytes that are not printable.
const SPELLED: usize = 256 + 68;

/// GPT-2's spelling of bytes: a printable Latin-1 byte is its own character, the others are U+0100 and up in order.
fn byte_of_char() -> [Option<u8>; SPELLED] {
    let mut byte_of = [None; SPELLED];
    let mut next = 256;
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            byte_of[byte as usize] = Some(byte);
        } else {
            byte_of[next] = Some(byte);
            next += 1;
        }
    }
    byte_of
}
