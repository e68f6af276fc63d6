//! Losses as a server tells them: `/v1/completions` with `echo`, `logprobs` and no token to generate.

use model::TokenId;
use serde_json::{Value, json};

use crate::client::{Client, ClientError};

/// Why a server gave no losses.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// An answer without what was asked for.
    #[error("the server told {told} log-probabilities for a prompt of {tokens} tokens")]
    Incomplete {
        /// Log-probabilities that came.
        told: usize,
        /// Tokens asked about.
        tokens: usize,
    },
}

/// Negative log-likelihoods, in nats, of `tokens[first..]`, `first` being 1 or more.
///
/// # Errors
/// The server fails, or does not know `echo` with `logprobs`.
pub async fn losses(
    client: &Client,
    model: &str,
    tokens: &[TokenId],
    first: usize,
) -> Result<Vec<f64>, ServerError> {
    let body = json!({
        "model": model,
        "prompt": tokens.iter().map(|token| token.0).collect::<Vec<u32>>(),
        "max_tokens": 0,
        "echo": true,
        "logprobs": 0,
        "temperature": 0,
        "stream": true,
    });
    let mut told = Vec::with_capacity(tokens.len());
    let note = |event: &Value| {
        let logprobs = event["choices"][0]["logprobs"]["token_logprobs"].as_array();
        told.extend(logprobs.into_iter().flatten().map(Value::as_f64));
    };
    client.stream_patiently("/v1/completions", &body, note).await?;
    let losses: Vec<f64> =
        told.iter().take(tokens.len()).skip(first).map_while(|&logprob| Some(-logprob?)).collect();
    if losses.len() + first != tokens.len() {
        return Err(ServerError::Incomplete { told: told.len(), tokens: tokens.len() });
    }
    Ok(losses)
}
