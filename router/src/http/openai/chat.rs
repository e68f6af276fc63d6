//! `/v1/chat/completions`: what the request adds to the common fields, and the shape of the answer.

use model::ChatMessage;
use proto::v1;
use serde::Serialize;
use serde_json::{Map, Value};

use super::answer::{Answer, Encode, Head, Tail, WholeChoice, finish_reason, stop_reason, token_ids};
use super::fields::Fields;
use super::logprobs::ChatLogprobs;
use super::parameters::{Parameters, limit};
use crate::error::{FieldProblem, RequestError};
use crate::generate::{Chat, Prompt};
use crate::session::Delta;

/// Reads the endpoint's own fields and ends reading.
pub(super) fn parse(mut fields: Fields) -> Result<(Parameters, Vec<Prompt>), RequestError> {
    let mut parameters = Parameters::take(&mut fields)?;
    if let Some(limit) = limit(&mut fields, "max_completion_tokens")? {
        // The newer name of `max_tokens`; it wins where both stand.
        parameters.stopping.max_tokens = Some(limit);
    }
    parameters.sampling.logprobs = logprobs(&mut fields)?;
    parameters.answer.logprobs = parameters.sampling.logprobs;
    let messages: Vec<Value> = fields.require("messages", "a list of messages")?;
    let messages: Vec<_> = messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
    if messages.is_empty() {
        return Err(RequestError::field("messages", FieldProblem::Missing));
    }
    let mut template_arguments: Map<String, Value> =
        fields.take("chat_template_kwargs", "an object")?.unwrap_or_default();
    let thinking = thinking(&mut fields, &mut template_arguments)?;
    fields.finish()?;
    Ok((parameters, vec![Prompt::Chat(Chat { messages, thinking, template_arguments })]))
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, RequestError> {
    let wanted = fields.take("logprobs", "true or false")?.unwrap_or(false);
    let top: Option<u32> = fields.take("top_logprobs", "a whole number from 0 to 20")?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            let problem = FieldProblem::Unsupported("it goes with logprobs: true alone");
            Err(RequestError::field("top_logprobs", problem))
        }
    }
}

/// `thinking` of the body, else of the template's arguments under either of its names in the field.
fn thinking(fields: &mut Fields, arguments: &mut Map<String, Value>) -> Result<bool, RequestError> {
    let mut thinking = fields.take("thinking", "true or false")?;
    for name in ["thinking", "enable_thinking"] {
        let Some(value) = arguments.remove(name) else { continue };
        let value = value.as_bool().ok_or_else(|| {
            let problem = FieldProblem::Type { expected: "true or false" };
            RequestError::field(format!("chat_template_kwargs.{name}"), problem)
        })?;
        thinking.get_or_insert(value);
    }
    Ok(thinking.unwrap_or(false))
}

fn message((index, value): (usize, Value)) -> Result<ChatMessage, RequestError> {
    let path = format!("messages[{index}]");
    let mut fields = Fields::nested(path.clone(), value)?;
    let role: String = fields.require("role", "a string")?;
    let role = match role.as_str() {
        "system" | "user" | "assistant" => role,
        // OpenAI's newer name for it.
        "developer" => "system".to_owned(),
        "tool" | "function" => {
            let problem = FieldProblem::Unsupported("tools are not available here");
            return Err(RequestError::field(fields.name("role"), problem));
        }
        _ => {
            let allowed = "must be system, developer, user or assistant";
            return Err(RequestError::out_of_range(fields.name("role"), role, allowed));
        }
    };
    let content = content(&fields.name("content"), fields.take_value("content"))?;
    // What answers carry and clients send back; earlier thinking is not part of a conversation.
    fields.ignore(&["name", "reasoning_content", "refusal", "annotations", "token_ids"]);
    fields.refuse(&[
        ("tool_calls", "tools are not available here"),
        ("tool_call_id", "tools are not available here"),
        ("function_call", "functions are not available here"),
        ("audio", "only text is understood"),
    ])?;
    fields.finish()?;
    Ok(ChatMessage { role, content })
}

/// A string, or a list of text parts, which are joined.
fn content(path: &str, value: Option<Value>) -> Result<String, RequestError> {
    match value {
        None => Err(RequestError::field(path.to_owned(), FieldProblem::Missing)),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate();
            parts.map(|(index, part)| text_part(format!("{path}[{index}]"), part)).collect()
        }
        Some(_) => {
            let expected = "a string or a list of text parts";
            Err(RequestError::field(path.to_owned(), FieldProblem::Type { expected }))
        }
    }
}

fn text_part(path: String, part: Value) -> Result<String, RequestError> {
    let mut fields = Fields::nested(path, part)?;
    let kind: String = fields.require("type", "a string")?;
    if kind != "text" {
        let problem = FieldProblem::Unsupported("text is the only type of content");
        return Err(RequestError::field(fields.name("type"), problem));
    }
    let text = fields.require("text", "a string")?;
    fields.finish()?;
    Ok(text)
}

/// The answer's shape.
pub(super) struct ChatEncoder {
    answer: Answer,
    /// Choices that have had their first chunk, which names the role.
    begun: Vec<bool>,
}

impl ChatEncoder {
    pub fn new(answer: Answer) -> Self {
        Self { begun: vec![false; answer.choices()], answer }
    }
}

#[derive(Serialize)]
struct Body<'a, C> {
    #[serde(flatten)]
    head: Head<'a>,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(flatten)]
    tail: Tail,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: u32,
    delta: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
}

impl Encode for ChatEncoder {
    fn delta(&mut self, delta: Delta) -> Option<Value> {
        let first =
            self.begun.get_mut(delta.index as usize).is_some_and(|begun| !std::mem::replace(begun, true));
        if !first && !self.answer.worth_a_chunk(&delta) {
            return None;
        }
        let reasoning_content = (!delta.reasoning.is_empty()).then_some(delta.reasoning);
        // The first chunk has a content in any case: clients read `role` and `content` from it.
        let content =
            (!delta.content.is_empty() || (first && reasoning_content.is_none())).then_some(delta.content);
        let choice = ChunkChoice {
            index: delta.index,
            logprobs: self.answer.options.logprobs.map(|_| self.answer.chat_logprobs(&delta.tokens)),
            finish_reason: delta.finish.as_ref().map(finish_reason),
            stop_reason: delta.finish.as_ref().and_then(stop_reason),
            token_ids: self.answer.options.token_ids.then(|| token_ids(&delta.tokens)),
            delta: Message { role: first.then_some("assistant"), content, reasoning_content },
        };
        let body = Body {
            head: self.answer.head("chat.completion.chunk"),
            choices: vec![choice],
            prompt_token_ids: first.then(|| self.answer.prompt_token_ids(0)).flatten(),
            tail: self.answer.running_tail(),
        };
        serde_json::to_value(body).ok()
    }

    fn usage(&mut self, usage: &v1::Usage) -> Option<Value> {
        let body = Body::<ChunkChoice> {
            head: self.answer.head("chat.completion.chunk"),
            choices: Vec::new(),
            prompt_token_ids: None,
            tail: self.answer.last_tail(usage)?,
        };
        serde_json::to_value(body).ok()
    }

    fn whole(&mut self, choices: Vec<WholeChoice>, usage: &v1::Usage) -> Option<Value> {
        let choices = choices.into_iter().map(|choice| Choice {
            index: choice.index,
            logprobs: self.answer.options.logprobs.map(|_| self.answer.chat_logprobs(&choice.tokens)),
            finish_reason: choice.finish.as_ref().map(finish_reason),
            stop_reason: choice.finish.as_ref().and_then(stop_reason),
            token_ids: self.answer.options.token_ids.then(|| token_ids(&choice.tokens)),
            message: Message {
                role: Some("assistant"),
                content: Some(choice.content),
                reasoning_content: (!choice.reasoning.is_empty()).then_some(choice.reasoning),
            },
        });
        let body = Body {
            head: self.answer.head("chat.completion"),
            choices: choices.collect(),
            prompt_token_ids: self.answer.prompt_token_ids(0),
            tail: self.answer.whole_tail(usage),
        };
        serde_json::to_value(body).ok()
    }
}
