//! One choice on its way out: its text, its tokens, its times.

use std::time::{Duration, Instant};

use model::TokenId;
use proto::v1;
use tokio::sync::mpsc;

use super::event::{Delta, Event, Finish, FinishReason, StopCause};
use crate::detokenise::{ChoiceText, Piece};
use crate::error::RequestError;
use crate::metrics::Metrics;

/// Where a session's events go.
pub(super) type Events = mpsc::Sender<Result<Event, RequestError>>;

/// Whether a choice wants more tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    More,
    /// A stop string ended it; the workers do not know.
    Finished,
}

/// One choice's way to the client.
pub(super) struct ChoiceOutput<'a> {
    index: u32,
    text: ChoiceText,
    events: &'a Events,
    metrics: &'a Metrics,
    received: Instant,
    last_tokens: Option<Instant>,
    ttft: Duration,
    completion: Vec<TokenId>,
    /// Goes with the next tokens.
    prompt: Vec<v1::GeneratedToken>,
}

impl<'a> ChoiceOutput<'a> {
    pub fn new(
        index: u32,
        text: ChoiceText,
        events: &'a Events,
        metrics: &'a Metrics,
        received: Instant,
    ) -> Self {
        Self {
            index,
            text,
            events,
            metrics,
            received,
            last_tokens: None,
            ttft: Duration::ZERO,
            completion: Vec::new(),
            prompt: Vec::new(),
        }
    }

    /// Whether the client may have seen something of this choice.
    pub fn started(&self) -> bool {
        self.last_tokens.is_some()
    }

    /// Receipt of the request to the choice's first token.
    pub fn ttft(&self) -> Duration {
        self.ttft
    }

    /// The tokens that have come so far.
    pub fn completion(&self) -> &[TokenId] {
        &self.completion
    }

    /// Tokens sent so far.
    pub fn tokens(&self) -> u32 {
        self.text.tokens()
    }

    /// Log-probabilities of the prompt, which the next tokens are sent with.
    pub fn take_prompt(&mut self, prompt: Vec<v1::GeneratedToken>) {
        self.prompt.extend(prompt);
    }

    /// Sends the next tokens with the text that they make certain.
    pub async fn push(&mut self, tokens: Vec<v1::GeneratedToken>) -> Result<Flow, RequestError> {
        self.note_time();
        let prompt = std::mem::take(&mut self.prompt);
        let mut delta = Delta { index: self.index, prompt, ..Delta::default() };
        for token in tokens {
            self.completion.push(TokenId(token.token_id));
            let piece = self.text.push(TokenId(token.token_id));
            delta.tokens.push(token);
            if let Some(stop) = extend(&mut delta, piece) {
                delta.finish = Some(stopped_by_text(stop));
                self.send(delta).await?;
                return Ok(Flow::Finished);
            }
        }
        self.send(delta).await?;
        Ok(Flow::More)
    }

    /// Sends what was held back, and how the choice ended.
    pub async fn finish(&mut self, reason: FinishReason, token: Option<TokenId>) -> Result<(), RequestError> {
        let mut delta = Delta { index: self.index, ..Delta::default() };
        let stop = extend(&mut delta, self.text.finish());
        let by_token = Finish { reason, stop: token.map(StopCause::Token) };
        delta.finish = Some(stop.map_or(by_token, stopped_by_text));
        self.send(delta).await
    }

    fn note_time(&mut self) {
        let now = Instant::now();
        match self.last_tokens.replace(now) {
            Some(last) => self.metrics.itl.observe((now - last).as_secs_f64()),
            None => {
                self.ttft = now.saturating_duration_since(self.received);
                self.metrics.ttft.observe(self.ttft.as_secs_f64());
            }
        }
    }

    /// Waits while the client reads slowly: the queue is bounded, and HTTP/2's flow control then slows the worker.
    async fn send(&self, delta: Delta) -> Result<(), RequestError> {
        self.events.send(Ok(Event::Delta(delta))).await.map_err(|_| RequestError::Cancelled)
    }
}

fn stopped_by_text(stop: String) -> Finish {
    Finish { reason: FinishReason::Stop, stop: Some(StopCause::Text(stop)) }
}

fn extend(delta: &mut Delta, piece: Piece) -> Option<String> {
    delta.reasoning.push_str(&piece.split.reasoning);
    delta.content.push_str(&piece.split.content);
    piece.stopped
}
