//! Text to token ids and back, by the model's `tokenizer.json`.
//!
//! Encoding is the `tokenizers` library's. Decoding is ours: every DeepSeek tokenizer is byte-level, so a token *is* a
//! byte string, and a table of them gives decoding and [`Detokenizer`] at one lookup per token.

mod detokenizer;
mod vocabulary;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokenizers::DecoderWrapper;

pub use detokenizer::Detokenizer;
use vocabulary::Vocabulary;

use crate::chat::special_token;
use crate::error::{ModelError, TokenizerError};
use crate::files;
use crate::ids::TokenId;

/// V3's has 8 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Holds a chat template besides a few flags.
pub(crate) const TOKENIZER_CONFIG_BYTES_MAX: u64 = 16 << 20;

/// The model's tokenizer. Cloning shares it.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    file: PathBuf,
    encoder: tokenizers::Tokenizer,
    vocabulary: Vocabulary,
    /// What goes before a plain prompt, where tokenizer_config.json wants it.
    prompt_bos: Option<TokenId>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `add_bos_token` and `bos_token` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`ModelError`] naming the file: missing, malformed, or not byte-level.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        let file = dir.as_ref().join("tokenizer.json");
        let text = files::read(&file, TOKENIZER_BYTES_MAX)?;
        let fault = |source| ModelError::Tokenizer { file: file.clone(), source };
        let mut encoder: tokenizers::Tokenizer =
            text.parse().map_err(|e| fault(TokenizerError::Library(e)))?;
        // A server neither cuts a prompt silently nor pads it, whatever the file was trained with.
        encoder.with_padding(None);
        encoder.with_truncation(None).map_err(|e| fault(TokenizerError::Library(e)))?;
        if !matches!(encoder.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(fault(TokenizerError::Decoder));
        }
        let vocabulary = Vocabulary::new(&encoder).map_err(fault)?;
        let prompt_bos = prompt_bos(dir.as_ref(), &encoder)?;
        Ok(Self { shared: Arc::new(Shared { file, encoder, vocabulary, prompt_bos }) })
    }

    /// Token ids of a text. Marks that stand in the text (`<｜User｜>`, …) become their tokens; nothing is added.
    ///
    /// # Errors
    /// [`TokenizerError::Library`].
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, ModelError> {
        let encoding = self.shared.encoder.encode_fast(text, false).map_err(|source| {
            ModelError::Tokenizer { file: self.shared.file.clone(), source: TokenizerError::Library(source) }
        })?;
        Ok(encoding.get_ids().iter().map(|id| TokenId(*id)).collect())
    }

    /// Token ids of a plain prompt: with the begin-of-sequence token before it, where the model wants one and the text
    /// does not already begin with it. Not for a rendered chat, which brings its own.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<TokenId>, ModelError> {
        let mut ids = self.encode(text)?;
        if let Some(bos) = self.shared.prompt_bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The text of token ids. Bytes that are no UTF-8 become U+FFFD; ids without a token (the model's vocabulary may be
    /// larger than the tokenizer's) become nothing, and so do special tokens if `skip_special`.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let vocabulary = &self.shared.vocabulary;
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for id in ids.iter().filter(|id| !(skip_special && vocabulary.is_special(**id))) {
            bytes.extend_from_slice(vocabulary.bytes(*id));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// One more than the largest token id. May be less than the model's `vocab_size`, never more in a sound checkpoint.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocabulary.len()
    }

    /// The bytes that a token stands for: perhaps a part of a character, empty for an id without a token.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.shared.vocabulary.bytes(id)
    }

    /// A token on its own as text, U+FFFD where its bytes are no whole characters.
    pub fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// Whether the token is a mark that is not part of an answer's text.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.shared.vocabulary.is_special(id)
    }

    /// The id of a token by its content, such as `</think>`.
    pub fn id_of(&self, token: &str) -> Option<TokenId> {
        self.shared.encoder.token_to_id(token).map(TokenId)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer {{ file: {:?}, vocab_size: {} }}", self.shared.file, self.vocab_size())
    }
}

/// The begin-of-sequence token, if `add_bos_token` asks for it before plain prompts.
fn prompt_bos(dir: &Path, encoder: &tokenizers::Tokenizer) -> Result<Option<TokenId>, ModelError> {
    let file = dir.join("tokenizer_config.json");
    let Some(text) = files::read_if_present(&file, TOKENIZER_CONFIG_BYTES_MAX)? else { return Ok(None) };
    let config: Value =
        serde_json::from_str(&text).map_err(|source| ModelError::Json { file: file.clone(), source })?;
    if config.get("add_bos_token").and_then(Value::as_bool) != Some(true) {
        return Ok(None);
    }
    let token = special_token(&config, "bos_token").unwrap_or_default();
    match encoder.token_to_id(&token) {
        Some(id) => Ok(Some(TokenId(id))),
        None => Err(ModelError::Tokenizer { file, source: TokenizerError::NoBos { token } }),
    }
}

#[cfg(test)]
mod tests;
