//! One question to a running cluster, its answer written as it comes, and how fast it came.

use std::io::Write;

use bench::client::{Client, ClientError, Streamed, chunk_text};
use serde_json::{Value, json};

/// What was said.
#[derive(Debug)]
pub struct Answer {
    /// The answer without its thinking.
    pub text: String,
    /// When it came.
    pub streamed: Streamed,
}

/// What is asked for beside the messages; each absent one is the server's default.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Tokens at most.
    pub max_tokens: Option<u32>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// For the same answer again.
    pub seed: Option<u64>,
    /// Let the model think first.
    pub thinking: bool,
}

impl Request {
    fn body(&self, model: &str) -> Value {
        let mut body = json!({ "model": model, "stream": true, "stream_options": { "include_usage": true } });
        for (key, value) in [
            ("max_tokens", self.max_tokens.map(Value::from)),
            ("temperature", self.temperature.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("chat_template_kwargs", self.thinking.then(|| json!({ "thinking": true }))),
        ] {
            if let Some(value) = value {
                body[key] = value;
            }
        }
        body
    }
}

/// Asks with a chat's messages.
pub async fn chat(
    client: &Client,
    model: &str,
    messages: &[Value],
    request: &Request,
    out: impl Write,
) -> Result<Answer, ClientError> {
    let mut body = request.body(model);
    body["messages"] = Value::from(messages);
    stream(client, "/v1/chat/completions", &body, out).await
}

/// Continues a text.
pub async fn complete(
    client: &Client,
    model: &str,
    prompt: &str,
    request: &Request,
    out: impl Write,
) -> Result<Answer, ClientError> {
    let mut body = request.body(model);
    body["prompt"] = Value::from(prompt);
    stream(client, "/v1/completions", &body, out).await
}

async fn stream(
    client: &Client,
    path: &str,
    body: &Value,
    mut out: impl Write,
) -> Result<Answer, ClientError> {
    let mut text = String::new();
    let mut thinking = false;
    let streamed = client
        .stream(path, body, |event| {
            let (answer, reasoning) = chunk_text(event);
            // A terminal that went away must not end the request's bookkeeping: writes are best effort.
            if !reasoning.is_empty() {
                let mark = if thinking { "" } else { "(thinking) " };
                let _ = write!(out, "{mark}{reasoning}");
                thinking = true;
            }
            if !answer.is_empty() {
                if std::mem::take(&mut thinking) {
                    let _ = writeln!(out);
                }
                let _ = write!(out, "{answer}");
                text.push_str(answer);
            }
            let _ = out.flush();
        })
        .await?;
    Ok(Answer { text, streamed })
}

/// `TTFT 14 ms · 312 tokens/s · 24 tokens`, with what is known.
pub fn figures(streamed: &Streamed) -> String {
    let mut parts = Vec::new();
    if let Some(ttft) = streamed.ttft {
        parts.push(format!("TTFT {:.0} ms", ttft.as_secs_f64() * 1e3));
    }
    if let Some(rate) = streamed.tokens_per_s() {
        parts.push(format!("{rate:.0} tokens/s"));
    }
    if let Some(tokens) = streamed.completion_tokens() {
        parts.push(format!("{tokens} tokens"));
    }
    parts.join(" · ")
}
