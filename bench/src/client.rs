//! A client of OpenAI-compatible servers: one streamed request, with the time of everything that arrives.
//!
//! Used by the load generator and by `trireme chat`, `generate` and `up`; it knows no server but by its URL.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use serde_json::Value;

use crate::sse::{Decoder, SseError};

/// Why a request gave no answer, or only a part of one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection, or one that broke.
    #[error("{0}")]
    Http(#[from] reqwest::Error),
    /// The server refused; the message is its own.
    #[error("HTTP {status}: {message}")]
    Status {
        /// The HTTP status.
        status: u16,
        /// `error.message` of the body, or the body's beginning.
        message: String,
        /// Seconds of `Retry-After`, where the server sent it.
        retry_after_s: Option<u64>,
    },
    /// The server reported an error after the stream had begun.
    #[error("error in the stream: {0}")]
    InStream(String),
    /// What came is not server-sent events.
    #[error("{0}")]
    Sse(#[from] SseError),
    /// An event is not JSON.
    #[error("an event is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The stream ended without its last mark.
    #[error("the stream ended early")]
    Truncated,
}

impl ClientError {
    /// A short name to count it under.
    pub fn kind(&self) -> Cow<'static, str> {
        match self {
            Self::Http(error) if error.is_timeout() => "timeout".into(),
            Self::Http(error) if error.is_connect() => "connect".into(),
            Self::Http(_) => "connection".into(),
            Self::Status { status, .. } => format!("http_{status}").into(),
            Self::InStream(_) => "in_stream".into(),
            Self::Sse(_) | Self::Json(_) => "malformed".into(),
            Self::Truncated => "truncated".into(),
        }
    }
}

/// What was seen of one streamed answer.
#[derive(Debug, Clone)]
pub struct Streamed {
    /// From sending the request to the first chunk that carries output.
    pub ttft: Option<Duration>,
    /// From sending the request to the end of the stream.
    pub total: Duration,
    /// Offsets from sending the request of every chunk that carried output.
    pub arrivals: Vec<Duration>,
    /// The `usage` object, where the server sent one.
    pub usage: Option<Value>,
    /// The `trireme_timings` object, where the server sent one.
    pub timings: Option<Value>,
}

/// How often a busy server is asked again: for some minutes at the least.
const BUSY_MAX: usize = 300;

/// One server.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    api_key: Option<String>,
}

impl Client {
    /// `base` is the URL before `/v1`, e.g. `http://127.0.0.1:8000`.
    pub fn new(base: &str, api_key: Option<String>, timeout: Duration) -> Result<Self, ClientError> {
        let http = reqwest::Client::builder().timeout(timeout).tcp_nodelay(true).build()?;
        Ok(Self { http, base: base.trim_end_matches('/').to_owned(), api_key })
    }

    /// The URL this client talks to.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// `GET path`, as JSON, whatever the status.
    pub async fn get(&self, path: &str) -> Result<(u16, Value), ClientError> {
        let response = self.authorised(self.http.get(format!("{}{path}", self.base))).send().await?;
        let status = response.status().as_u16();
        let body = response.bytes().await?;
        Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
    }

    /// The first model that the server lists.
    pub async fn first_model(&self) -> Result<String, ClientError> {
        let (status, body) = self.get("/v1/models").await?;
        match body["data"][0]["id"].as_str() {
            Some(id) => Ok(id.to_owned()),
            None => Err(ClientError::Status {
                status,
                message: "no model is listed".to_owned(),
                retry_after_s: None,
            }),
        }
    }

    /// As [`Self::stream`], and comes back as often and as late as a busy server asks for.
    pub async fn stream_patiently(
        &self,
        path: &str,
        body: &Value,
        mut chunk: impl FnMut(&Value),
    ) -> Result<Streamed, ClientError> {
        for _ in 0..BUSY_MAX {
            match self.stream(path, body, &mut chunk).await {
                Err(ClientError::Status { status: 429, retry_after_s, .. }) => {
                    tokio::time::sleep(Duration::from_secs(retry_after_s.unwrap_or(1))).await;
                }
                told => return told,
            }
        }
        self.stream(path, body, chunk).await
    }

    /// Posts `body` (with `stream: true` in it) to `path` and calls `chunk` for every JSON event.
    pub async fn stream(
        &self,
        path: &str,
        body: &Value,
        mut chunk: impl FnMut(&Value),
    ) -> Result<Streamed, ClientError> {
        let begin = Instant::now();
        let response =
            self.authorised(self.http.post(format!("{}{path}", self.base)).json(body)).send().await?;
        let status = response.status();
        if !status.is_success() {
            let retry_after_s = response
                .headers()
                .get("retry-after")
                .and_then(|v| v.to_str().ok())
                .and_then(|v| v.parse().ok());
            let text = response.text().await.unwrap_or_default();
            return Err(ClientError::Status {
                status: status.as_u16(),
                message: error_message(&text),
                retry_after_s,
            });
        }
        let mut seen =
            Streamed { ttft: None, total: Duration::ZERO, arrivals: Vec::new(), usage: None, timings: None };
        let mut decoder = Decoder::default();
        let mut done = false;
        let mut failure = None;
        let mut bytes = response.bytes_stream();
        while let Some(piece) = bytes.next().await {
            let at = begin.elapsed();
            decoder.push(&piece?, |data| {
                if data == "[DONE]" {
                    done = true;
                    return;
                }
                match serde_json::from_str::<Value>(data) {
                    Ok(event) if event.get("error").is_some() => {
                        failure.get_or_insert(ClientError::InStream(error_message(data)));
                    }
                    Ok(event) => {
                        seen.note(&event, at);
                        chunk(&event);
                    }
                    Err(error) => {
                        failure.get_or_insert(error.into());
                    }
                }
            })?;
        }
        seen.total = begin.elapsed();
        match failure {
            Some(error) => Err(error),
            None if !done => Err(ClientError::Truncated),
            None => Ok(seen),
        }
    }

    fn authorised(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }
}

impl Streamed {
    fn note(&mut self, event: &Value, at: Duration) {
        if carries_output(event) {
            self.ttft.get_or_insert(at);
            self.arrivals.push(at);
        }
        for (slot, key) in [(&mut self.usage, "usage"), (&mut self.timings, "trireme_timings")] {
            if let Some(value) = event.get(key).filter(|v| !v.is_null()) {
                *slot = Some(value.clone());
            }
        }
    }

    /// The same answer with times that begin `earlier`: when the request was due, not when it was sent at last.
    pub fn later_by(mut self, earlier: Duration) -> Self {
        self.ttft = self.ttft.map(|ttft| ttft + earlier);
        self.total += earlier;
        for arrival in &mut self.arrivals {
            *arrival += earlier;
        }
        self
    }

    /// Tokens generated, as the server counted them.
    pub fn completion_tokens(&self) -> Option<u64> {
        self.usage.as_ref()?["completion_tokens"].as_u64()
    }

    /// Prompt tokens that came out of a cache, as the server says; 0 where it does not.
    pub fn cached_tokens(&self) -> u64 {
        let cached = self.usage.as_ref().map(|usage| &usage["prompt_tokens_details"]["cached_tokens"]);
        cached.and_then(Value::as_u64).unwrap_or(0)
    }

    /// Tokens of the answer per second of the request, waiting for the first one included.
    ///
    /// A rate "after the first" would flatter: on a busy client tokens arrive in bundles, and the time between the
    /// first bundle and the last says little.
    pub fn tokens_per_s(&self) -> Option<f64> {
        let seconds = self.total.as_secs_f64();
        (seconds > 0.0).then_some(self.completion_tokens()? as f64 / seconds)
    }
}

/// The text of a chunk's first choice: answer, then reasoning.
pub fn chunk_text(event: &Value) -> (&str, &str) {
    let choice = &event["choices"][0];
    let answer = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or("");
    (answer, choice["delta"]["reasoning_content"].as_str().unwrap_or(""))
}

fn carries_output(event: &Value) -> bool {
    event["choices"].as_array().is_some_and(|choices| {
        choices.iter().any(|choice| {
            let delta = &choice["delta"];
            [&choice["text"], &delta["content"], &delta["reasoning_content"]]
                .iter()
                .any(|text| text.as_str().is_some_and(|t| !t.is_empty()))
                || choice["token_ids"].as_array().is_some_and(|ids| !ids.is_empty())
                || delta["token_ids"].as_array().is_some_and(|ids| !ids.is_empty())
        })
    })
}

fn error_message(body: &str) -> String {
    let parsed = serde_json::from_str::<Value>(body).ok();
    match parsed.as_ref().and_then(|v| v["error"]["message"].as_str()) {
        Some(message) => message.to_owned(),
        None => body.chars().take(300).collect(),
    }
}
