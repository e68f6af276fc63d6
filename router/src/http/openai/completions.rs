//! `/v1/completions`: what the request adds to the common fields, and the shape of the answer.

use model::TokenId;
use proto::v1;
use serde::Serialize;
use serde_json::Value;

use super::answer::{Answer, Encode, Head, Tail, WholeChoice, finish_reason, stop_reason, token_ids};
use super::fields::Fields;
use super::logprobs::CompletionLogprobs;
use super::parameters::Parameters;
use crate::error::{FieldProblem, RequestError};
use crate::generate::Prompt;
use crate::session::Delta;

/// OpenAI's default of this endpoint; a chat has none.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// Reads the endpoint's own fields and ends reading.
pub(super) fn parse(mut fields: Fields) -> Result<(Parameters, Vec<Prompt>), RequestError> {
    let echo = fields.take("echo", "true or false")?.unwrap_or(false);
    // Who echoes a prompt for its log-probabilities wants no token behind it, and none is what nobody else may ask for.
    let max_tokens: Option<u32> = fields.take("max_tokens", "a whole number, 1 or more")?;
    let prompt_only = echo && max_tokens == Some(0);
    if max_tokens == Some(0) && !echo {
        return Err(RequestError::out_of_range(
            "max_tokens",
            0,
            "must be 1 or more, 0 with echo: true alone",
        ));
    }
    let mut parameters = Parameters::take(&mut fields)?;
    parameters.stopping.max_tokens = max_tokens.map(|tokens| tokens.max(1));
    (parameters.answer.echo, parameters.answer.prompt_only) = (echo, prompt_only);
    // `min_tokens` above the default says what the client expects of it.
    parameters.max_tokens_default = Some(MAX_TOKENS_DEFAULT.max(parameters.stopping.min_tokens));
    parameters.sampling.logprobs = fields.take("logprobs", "a whole number from 0 to 20")?;
    parameters.answer.logprobs = parameters.sampling.logprobs;
    fields.refuse(&[
        ("suffix", "text is continued, not filled in"),
        ("prompt_logprobs", "use echo: true with logprobs"),
    ])?;
    let prompts = prompts(&mut fields)?;
    fields.finish()?;
    Ok((parameters, prompts))
}

/// A string, a list of token ids, or a list of either.
fn prompts(fields: &mut Fields) -> Result<Vec<Prompt>, RequestError> {
    let value =
        fields.take_value("prompt").ok_or_else(|| RequestError::field("prompt", FieldProblem::Missing))?;
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text)]),
        Value::Array(items) if items.is_empty() => Err(RequestError::field("prompt", FieldProblem::Missing)),
        Value::Array(items) if items[0].is_number() => Ok(vec![tokens("prompt", items)?]),
        Value::Array(items) => {
            let each = |(index, item)| match item {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(items) => tokens(&format!("prompt[{index}]"), items),
                _ => Err(wrong_type(format!("prompt[{index}]"))),
            };
            items.into_iter().enumerate().map(each).collect()
        }
        _ => Err(wrong_type("prompt".to_owned())),
    }
}

fn tokens(path: &str, items: Vec<Value>) -> Result<Prompt, RequestError> {
    let token = |(index, item): (usize, Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(TokenId).ok_or_else(|| {
            let expected = "a token id, a whole number of 32 bits";
            RequestError::field(format!("{path}[{index}]"), FieldProblem::Type { expected })
        })
    };
    items.into_iter().enumerate().map(token).collect::<Result<_, _>>().map(Prompt::Tokens)
}

fn wrong_type(path: String) -> RequestError {
    let expected = "a string, a list of token ids, or a list of these";
    RequestError::field(path, FieldProblem::Type { expected })
}

/// The answer's shape.
pub(super) struct CompletionEncoder {
    answer: Answer,
    /// For each choice: whether it has had its first chunk, and characters of the tokens so far.
    begun: Vec<bool>,
    offsets: Vec<usize>,
}

impl CompletionEncoder {
    pub fn new(answer: Answer) -> Self {
        let choices = answer.choices();
        Self { answer, begun: vec![false; choices], offsets: vec![0; choices] }
    }

    fn logprobs(&mut self, index: u32, tokens: &[v1::GeneratedToken]) -> Option<CompletionLogprobs> {
        self.answer.options.logprobs?;
        let offset = self.offsets.get_mut(index as usize)?;
        Some(self.answer.completion_logprobs(tokens, offset))
    }

    fn choice(&mut self, mut choice: WholeChoice, first: bool) -> Choice {
        let index = choice.index;
        if self.answer.options.prompt_only {
            choice.tokens.clear();
            choice.content.clear();
        }
        let mut told = Vec::new();
        if self.answer.options.echo && first {
            choice.content.insert_str(0, &self.answer.prompt_text(index));
            told = self.answer.prompt_tokens(index, std::mem::take(&mut choice.prompt));
        }
        told.extend_from_slice(&choice.tokens);
        Choice {
            index,
            logprobs: self.logprobs(index, &told),
            finish_reason: choice.finish.as_ref().map(finish_reason),
            stop_reason: choice.finish.as_ref().and_then(stop_reason),
            token_ids: self.answer.options.token_ids.then(|| token_ids(&choice.tokens)),
            prompt_token_ids: first.then(|| self.answer.prompt_token_ids(index)).flatten(),
            text: choice.content,
        }
    }
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    head: Head<'a>,
    choices: Vec<Choice>,
    #[serde(flatten)]
    tail: Tail,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

impl Encode for CompletionEncoder {
    fn delta(&mut self, delta: Delta) -> Option<Value> {
        if !self.answer.worth_a_chunk(&delta) {
            return None;
        }
        let begun = self.begun.get_mut(delta.index as usize);
        let first = begun.is_some_and(|begun| !std::mem::replace(begun, true));
        let choices = vec![self.choice(WholeChoice::of(delta), first)];
        let head = self.answer.head("text_completion");
        serde_json::to_value(Body { head, choices, tail: self.answer.running_tail() }).ok()
    }

    fn usage(&mut self, usage: &v1::Usage) -> Option<Value> {
        let tail = self.answer.last_tail(usage)?;
        let head = self.answer.head("text_completion");
        serde_json::to_value(Body { head, choices: Vec::new(), tail }).ok()
    }

    fn whole(&mut self, choices: Vec<WholeChoice>, usage: &v1::Usage) -> Option<Value> {
        let choices = choices.into_iter().map(|choice| self.choice(choice, true)).collect();
        let head = self.answer.head("text_completion");
        serde_json::to_value(Body { head, choices, tail: self.answer.whole_tail(usage) }).ok()
    }
}
