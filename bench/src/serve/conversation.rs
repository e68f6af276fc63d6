//! One conversation with the server: a request, or turns of which each sends everything that was said before.

use std::borrow::Cow;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::request::{PromptKind, RequestShape, words};
use crate::client::{Client, ClientError, Streamed, chunk_text};
use crate::workload::{RequestId, Workload};

const PATH: &str = "/v1/completions";
/// The load point that warm-up requests belong to, so that their prompts are not measured again.
const WARM_UP_POINT: u32 = u32::MAX;
/// A server that refuses without saying for how long.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(1);

/// Whom the requests go to, and what they look like.
#[derive(Debug)]
pub struct Target {
    /// The server.
    pub client: Client,
    /// What is asked.
    pub workload: Workload,
    /// In which form.
    pub shape: RequestShape,
    /// How often a refused request is sent again.
    pub retries: u32,
    /// How long a request may take, waiting to be sent again included.
    pub timeout: Duration,
    /// Tokens of the server's KV blocks.
    pub block_tokens: u32,
}

/// What came of a request, sent or not.
#[derive(Debug)]
pub struct Outcome {
    /// When it was to be sent.
    pub due: Instant,
    /// When it was answered, or given up.
    pub ended: Instant,
    /// Answers of 429 that it got.
    pub refused: u32,
    /// What a prefix cache could do for it; `None` for first turns.
    pub reuse: Option<Reuse>,
    /// Its answer, times from `due` on, or the kind of its failure.
    pub answer: Result<Streamed, Cow<'static, str>>,
}

/// Tokens of a turn's prompt that earlier turns have brought before the server, in whole KV blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Reuse {
    /// Of earlier prompts and answers: what an ideal cache finds.
    pub reusable: u64,
    /// Of earlier prompts alone.
    pub of_prompts: u64,
    /// Of these found, as the server's `cached_tokens` says. What others have left there does not count.
    pub found: u64,
}

impl Reuse {
    /// For a prompt of `prompt` tokens, of which the first `earlier` are the last turn's prompt and the next `answer` its
    /// answer. The last token said was never computed, and the prompt's own last one always is.
    pub fn new(prompt: u64, earlier: u64, answer: u64, block_tokens: u64, found: u64) -> Self {
        let whole = |tokens: u64| tokens.min(prompt.saturating_sub(1)) / block_tokens * block_tokens;
        let reusable = whole((earlier + answer).saturating_sub(1));
        Self { reusable, of_prompts: whole(earlier), found: found.min(reusable) }
    }

    /// Adds another turn's.
    pub fn add(&mut self, other: Self) {
        self.reusable += other.reusable;
        self.of_prompts += other.of_prompts;
        self.found += other.found;
    }
}

/// What has been said.
enum Said {
    Tokens(Vec<u32>),
    Text(String),
}

impl Target {
    /// One request outside any measurement.
    ///
    /// # Errors
    /// Whatever went wrong with it.
    pub async fn warm_up(&self, index: u32) -> Result<(), ClientError> {
        let id = RequestId { point: WARM_UP_POINT, index };
        let mut said = self.nothing();
        let output_tokens = self.say(&mut said, id, 0);
        self.client.stream(PATH, &self.shape.body(said.prompt(), output_tokens), |_| ()).await.map(drop)
    }

    /// All turns of conversation `id`, the first due at `due`; a turn that fails ends it.
    pub async fn converse(&self, id: RequestId, mut due: Instant, deadline: Instant) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = Vec::new();
        let mut said = self.nothing();
        let mut last: Option<(u64, u64)> = None;
        for turn in 0..self.workload.turns {
            let output_tokens = self.say(&mut said, id, turn);
            let body = self.shape.body(said.prompt(), output_tokens);
            let mut outcome = self.request(&body, due, deadline, &mut said).await;
            if let Ok(answer) = &outcome.answer {
                let tokens = |name| answer.usage.as_ref().and_then(|usage| usage[name].as_u64());
                let prompt = tokens("prompt_tokens").unwrap_or(0);
                let found = answer.cached_tokens();
                let block = u64::from(self.block_tokens);
                outcome.reuse =
                    last.map(|(earlier, answer)| Reuse::new(prompt, earlier, answer, block, found));
                last = Some((prompt, tokens("completion_tokens").unwrap_or(0)));
            }
            due = outcome.ended;
            let failed = outcome.answer.is_err();
            outcomes.push(outcome);
            if failed {
                break;
            }
        }
        outcomes
    }

    fn nothing(&self) -> Said {
        match self.shape.prompt_kind {
            PromptKind::TokenIds => Said::Tokens(Vec::new()),
            PromptKind::Text => Said::Text(String::new()),
        }
    }

    /// Adds what the client says in `turn`; returns the tokens of the answer that it wants.
    fn say(&self, said: &mut Said, id: RequestId, turn: u32) -> u32 {
        let plan = self.workload.plan(id, turn);
        match said {
            Said::Tokens(tokens) => tokens.extend(self.workload.tokens(&plan.input)),
            Said::Text(text) => {
                text.push_str(&words(plan.input_tokens(), &mut self.workload.text_rng(id, turn)));
            }
        }
        plan.output_tokens
    }

    /// Sends until it is answered, lost, or out of time. What is answered has been said.
    async fn request(&self, body: &Value, due: Instant, deadline: Instant, said: &mut Said) -> Outcome {
        let timeout = due + self.timeout;
        let mut refused = 0;
        let answer = loop {
            let sent = Instant::now();
            let mut heard = self.nothing();
            let streamed = self.client.stream(PATH, body, |chunk| heard.hear(chunk));
            match timeout_at(deadline.min(timeout), streamed).await {
                Ok(Ok(answer)) => {
                    said.append(heard);
                    break Ok(answer.later_by(sent.saturating_duration_since(due)));
                }
                Ok(Err(ClientError::Status { status: 429, retry_after_s, .. })) => {
                    refused += 1;
                    let wait = retry_after_s.map_or(RETRY_AFTER_DEFAULT, Duration::from_secs);
                    let again = Instant::now() + wait;
                    if refused > self.retries || again >= deadline.min(timeout) {
                        break Err("http_429".into());
                    }
                    sleep_until(again).await;
                }
                Ok(Err(error)) => break Err(error.kind()),
                Err(_) if timeout <= deadline => break Err("timeout".into()),
                Err(_) => break Err("cut_off".into()),
            }
        };
        Outcome { due, ended: Instant::now(), refused, reuse: None, answer }
    }
}

impl Said {
    fn prompt(&self) -> Value {
        match self {
            Self::Tokens(tokens) => tokens.iter().copied().collect(),
            Self::Text(text) => text.as_str().into(),
        }
    }

    /// Takes in what a chunk carries.
    fn hear(&mut self, chunk: &Value) {
        match self {
            Self::Tokens(tokens) => {
                let ids = chunk["choices"][0]["token_ids"].as_array().into_iter().flatten();
                tokens.extend(ids.filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
            }
            Self::Text(text) => text.push_str(chunk_text(chunk).0),
        }
    }

    fn append(&mut self, other: Self) {
        match (self, other) {
            (Self::Tokens(tokens), Self::Tokens(heard)) => tokens.extend(heard),
            (Self::Text(text), Self::Text(heard)) => text.push_str(&heard),
            // Both are of the target's kind.
            (Self::Tokens(_), Self::Text(_)) | (Self::Text(_), Self::Tokens(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_reused_is_whole_blocks_of_what_was_computed() {
        let of = |prompt, earlier, answer| {
            let reuse = Reuse::new(prompt, earlier, answer, 64, 0);
            (reuse.reusable, reuse.of_prompts)
        };
        assert_eq!(of(300, 100, 50), (128, 64), "149 tokens were computed");
        assert_eq!(of(300, 100, 29), (128, 64));
        assert_eq!(of(300, 100, 28), (64, 64), "the 128th was said and never computed");
        assert_eq!(of(128, 120, 9), (64, 64), "the prompt's last token is always computed");
        assert_eq!(of(10, 0, 0), (0, 0));
        assert_eq!(Reuse::new(300, 100, 50, 64, 256).found, 128, "the rest is of another conversation");
    }
}
