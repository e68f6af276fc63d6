//! Log-probabilities in both endpoints' shapes.

use model::{TokenId, Tokenizer};
use proto::v1;
use serde::Serialize;
use serde_json::{Map, Value};

use super::answer::Answer;

/// Of `/v1/chat/completions`.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Debug, Serialize)]
struct Alternative {
    token: String,
    logprob: Option<f32>,
    /// UTF-8 of the token; a part of a character is possible.
    bytes: Vec<u8>,
}

/// Of `/v1/completions`.
#[derive(Debug, Serialize)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    /// Token and log-probability, the best first; the token itself is always among them. None where it has none.
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters before each token.
    text_offset: Vec<usize>,
}

impl Answer {
    pub(super) fn chat_logprobs(&self, tokens: &[v1::GeneratedToken]) -> ChatLogprobs {
        let alternative = |id: u32, logprob: Option<f32>| Alternative {
            token: self.model.tokenizer.token_text(TokenId(id)),
            logprob,
            bytes: self.model.tokenizer.token_bytes(TokenId(id)).to_vec(),
        };
        let content = tokens.iter().map(|token| ChatToken {
            token: alternative(token.token_id, token.logprob),
            top_logprobs: token.top.iter().map(|top| alternative(top.token_id, Some(top.logprob))).collect(),
        });
        ChatLogprobs { content: content.collect() }
    }

    /// `offset`: characters of the choice's tokens so far; moved on.
    pub(super) fn completion_logprobs(
        &self,
        tokens: &[v1::GeneratedToken],
        offset: &mut usize,
    ) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs {
            tokens: Vec::with_capacity(tokens.len()),
            token_logprobs: Vec::with_capacity(tokens.len()),
            top_logprobs: Vec::with_capacity(tokens.len()),
            text_offset: Vec::with_capacity(tokens.len()),
        };
        for token in tokens {
            let text = spelling(&self.model.tokenizer, token.token_id);
            let mut top: Map<String, Value> = token
                .top
                .iter()
                .map(|top| (spelling(&self.model.tokenizer, top.token_id), Value::from(top.logprob)))
                .collect();
            top.entry(text.clone()).or_insert(Value::from(token.logprob));
            logprobs.text_offset.push(*offset);
            *offset += self.model.tokenizer.token_text(TokenId(token.token_id)).chars().count();
            logprobs.tokens.push(text);
            logprobs.token_logprobs.push(token.logprob);
            logprobs.top_logprobs.push(token.logprob.map(|_| top));
        }
        logprobs
    }
}

/// A token's text, or OpenAI's notation for bytes that are no text: as keys they must not coincide.
fn spelling(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(TokenId(id));
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
    }
}
