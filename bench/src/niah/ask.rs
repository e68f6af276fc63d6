//! One haystack to the server, its answer back.

use serde_json::{Value, json};

use super::haystack::{ANSWER_TOKENS_MAX, Prompt};
use crate::client::{Client, ClientError, chunk_text};

/// What the server said.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub text: String,
    /// Of each generated token.
    pub logprobs: Vec<f64>,
}

/// Asks greedily.
pub(super) async fn ask(client: &Client, model: &str, prompt: &Prompt) -> Result<Answer, ClientError> {
    let body = json!({
        "model": model,
        "prompt": prompt.tokens.iter().map(|token| token.0).collect::<Vec<u32>>(),
        "max_tokens": ANSWER_TOKENS_MAX,
        "temperature": 0,
        "logprobs": 1,
        "stream": true,
    });
    let mut answer = Answer::default();
    client.stream_patiently("/v1/completions", &body, |event| answer.extend(event)).await?;
    Ok(answer)
}

impl Answer {
    pub(super) fn extend(&mut self, event: &Value) {
        self.text.push_str(chunk_text(event).0);
        let logprobs = event["choices"][0]["logprobs"]["token_logprobs"].as_array();
        self.logprobs.extend(logprobs.into_iter().flatten().filter_map(Value::as_f64));
    }
}
