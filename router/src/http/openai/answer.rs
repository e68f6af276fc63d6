//! What the answers of both endpoints have in common.

use std::sync::Arc;

use model::TokenId;
use proto::v1;
use serde::Serialize;
use serde_json::Value;

use super::parameters::AnswerOptions;
use crate::served_model::ServedModel;
use crate::session::{Delta, Finish, FinishReason, Session, StopCause};

/// Turns a session's events into an endpoint's JSON. `None`: nothing to say.
pub(in crate::http) trait Encode: Send + 'static {
    /// A chunk for one delta.
    fn delta(&mut self, delta: Delta) -> Option<Value>;
    /// The last chunk, where one was asked for.
    fn usage(&mut self, usage: &v1::Usage) -> Option<Value>;
    /// The whole answer of a request that does not stream.
    fn whole(&mut self, choices: Vec<WholeChoice>, usage: &v1::Usage) -> Option<Value>;
}

/// A choice, collected.
#[derive(Debug, Default)]
pub(in crate::http) struct WholeChoice {
    pub index: u32,
    pub reasoning: String,
    pub content: String,
    pub tokens: Vec<v1::GeneratedToken>,
    /// The prompt's tokens behind its first, with their log-probabilities, where they were asked for.
    pub prompt: Vec<v1::GeneratedToken>,
    pub finish: Option<Finish>,
}

impl WholeChoice {
    /// Appends what came next.
    pub fn extend(&mut self, delta: Delta) {
        self.reasoning.push_str(&delta.reasoning);
        self.content.push_str(&delta.content);
        self.tokens.extend(delta.tokens);
        self.prompt.extend(delta.prompt);
        self.finish = delta.finish.or(self.finish.take());
    }

    /// A choice of one delta.
    pub fn of(delta: Delta) -> Self {
        let mut choice = Self { index: delta.index, ..Self::default() };
        choice.extend(delta);
        choice
    }
}

/// What is the same in every chunk of an answer.
pub(super) struct Answer {
    pub options: AnswerOptions,
    pub model: Arc<ServedModel>,
    id: String,
    created: u64,
    prompts: Vec<Arc<[TokenId]>>,
    n: u32,
}

/// The first fields of an answer or a chunk.
#[derive(Serialize)]
pub(super) struct Head<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
}

/// The last fields of an answer or a chunk.
#[derive(Default, Serialize)]
pub(super) struct Tail {
    /// Outer `None`: no such field. Inner: `null`, as every chunk but the last has it when usage is wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trireme_timings: Option<Timings>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
    completion_tokens_details: CompletionTokensDetails,
}

#[derive(Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

#[derive(Serialize)]
struct CompletionTokensDetails {
    accepted_prediction_tokens: u32,
    rejected_prediction_tokens: u32,
}

/// `trireme.v1.Timings`, microseconds by hop.
#[derive(Serialize)]
struct Timings {
    admission_us: u64,
    reserve_us: u64,
    prefill_queue_us: u64,
    prefill_us: u64,
    handoff_us: u64,
    decode_first_us: u64,
    decode_us: u64,
    ttft_us: u64,
    total_us: u64,
    prefill_on_decode: bool,
}

impl Answer {
    pub fn new(
        id: String,
        created: u64,
        options: AnswerOptions,
        model: Arc<ServedModel>,
        session: &Session,
    ) -> Self {
        Self { options, model, id, created, prompts: session.prompts.clone(), n: session.n }
    }

    /// Choices in all.
    pub fn choices(&self) -> usize {
        self.prompts.len() * self.n as usize
    }

    /// Whether a delta holds anything that the client asked to see: a token whose text is not certain yet is
    /// news only to who wants tokens.
    pub fn worth_a_chunk(&self, delta: &Delta) -> bool {
        let tokens_wanted = self.options.token_ids || self.options.logprobs.is_some();
        let text = !delta.reasoning.is_empty() || !delta.content.is_empty();
        text || delta.finish.is_some() || (tokens_wanted && !delta.tokens.is_empty())
    }

    pub fn head(&self, object: &'static str) -> Head<'_> {
        Head { id: &self.id, object, created: self.created, model: &self.model.id }
    }

    /// The prompt behind choice `index`, where token ids are wanted.
    pub fn prompt_token_ids(&self, index: u32) -> Option<Vec<u32>> {
        let prompt = self.prompts.get((index / self.n) as usize)?;
        self.options.token_ids.then(|| prompt.iter().map(|token| token.0).collect())
    }

    /// The text of the prompt behind choice `index`, special tokens aside.
    pub fn prompt_text(&self, index: u32) -> String {
        let prompt = self.prompts.get((index / self.n) as usize);
        prompt.map(|prompt| self.model.tokenizer.decode(prompt, true)).unwrap_or_default()
    }

    /// The tokens of that prompt. Of the first there is no log-probability: nothing stands before it.
    pub fn prompt_tokens(&self, index: u32, behind: Vec<v1::GeneratedToken>) -> Vec<v1::GeneratedToken> {
        let first = self.prompts.get((index / self.n) as usize).and_then(|prompt| prompt.first());
        let first =
            first.map(|token| v1::GeneratedToken { token_id: token.0, logprob: None, top: Vec::new() });
        first.into_iter().chain(behind).collect()
    }

    /// Of every chunk but the last.
    pub fn running_tail(&self) -> Tail {
        Tail { usage: self.options.include_usage.then_some(None), trireme_timings: None }
    }

    /// Of the last chunk, where one is wanted.
    pub fn last_tail(&self, usage: &v1::Usage) -> Option<Tail> {
        (self.options.include_usage || self.options.timings).then(|| self.whole_tail(usage))
    }

    /// Of an answer that does not stream.
    pub fn whole_tail(&self, usage: &v1::Usage) -> Tail {
        let timings = usage.timings.as_ref().filter(|_| self.options.timings).map(Timings::from);
        let mut usage = Usage::from(usage);
        if self.options.prompt_only {
            usage.completion_tokens = 0;
            usage.total_tokens = usage.prompt_tokens;
        }
        Tail { usage: Some(Some(usage)), trireme_timings: timings }
    }
}

impl From<&v1::Usage> for Usage {
    fn from(usage: &v1::Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
            completion_tokens_details: CompletionTokensDetails {
                accepted_prediction_tokens: usage.accepted_prediction_tokens,
                rejected_prediction_tokens: usage.rejected_prediction_tokens,
            },
        }
    }
}

impl From<&v1::Timings> for Timings {
    fn from(timings: &v1::Timings) -> Self {
        // Destructured so that a new field cannot be forgotten here.
        let &v1::Timings {
            admission_us,
            reserve_us,
            prefill_queue_us,
            prefill_us,
            handoff_us,
            decode_first_us,
            decode_us,
            ttft_us,
            total_us,
            prefill_on_decode,
        } = timings;
        Self {
            admission_us,
            reserve_us,
            prefill_queue_us,
            prefill_us,
            handoff_us,
            decode_first_us,
            decode_us,
            ttft_us,
            total_us,
            prefill_on_decode,
        }
    }
}

/// OpenAI's word for how a choice ended.
pub(super) fn finish_reason(finish: &Finish) -> &'static str {
    match finish.reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// vLLM's field: the stop string or the stop token id that the client had named.
pub(super) fn stop_reason(finish: &Finish) -> Option<Value> {
    finish.stop.as_ref().map(|stop| match stop {
        StopCause::Text(text) => Value::from(text.as_str()),
        StopCause::Token(token) => Value::from(token.0),
    })
}

/// The tokens' ids.
pub(super) fn token_ids(tokens: &[v1::GeneratedToken]) -> Vec<u32> {
    tokens.iter().map(|token| token.token_id).collect()
}
