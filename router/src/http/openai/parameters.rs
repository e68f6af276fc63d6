//! The fields that both completion endpoints have in common.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::share::Priority;
use proto::v1;
use serde_json::Value;

use super::fields::Fields;
use crate::detokenise::TextOptions;
use crate::error::{FieldProblem, RequestError};

/// OpenAI's fields that change nothing about the answer's tokens here: accepted, ignored.
const IGNORED: &[&str] = &[
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "store",
    "user",
];

/// Fields with a meaning that we cannot give them.
const REFUSED: &[(&str, &str)] = &[
    ("audio", "only text is generated"),
    ("function_call", "functions are not available here"),
    ("functions", "functions are not available here"),
    ("guided_json", "guided decoding is not available here"),
    ("guided_regex", "guided decoding is not available here"),
    ("prediction", "predicted outputs are not available here"),
    ("reasoning_effort", "use chat_template_kwargs: {\"thinking\": true}"),
    ("tool_choice", "tools are not available here"),
    ("tools", "tools are not available here"),
    ("use_beam_search", "beam search is not available here"),
    ("verbosity", "ask for it in the prompt"),
    ("web_search_options", "the server has no web access"),
];

/// What both endpoints ask for besides the prompt.
#[derive(Debug)]
pub(super) struct Parameters {
    pub model: String,
    pub n: u32,
    pub sampling: v1::Sampling,
    pub stopping: v1::Stopping,
    /// Tokens to generate where `stopping` does not say; `None`: what the context leaves.
    pub max_tokens_default: Option<u32>,
    pub deadline: Option<Duration>,
    /// From `service_tier`.
    pub priority: Priority,
    pub text: TextOptions,
    pub answer: AnswerOptions,
}

/// How the answer is to be given.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AnswerOptions {
    pub stream: bool,
    /// A last chunk with usage.
    pub include_usage: bool,
    /// `trireme_timings` beside usage.
    pub timings: bool,
    /// `prompt_token_ids` and `token_ids`.
    pub token_ids: bool,
    /// Alternatives per token; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    /// The prompt stands before its completion, its tokens before the completion's.
    pub echo: bool,
    /// The completion is left out: with `echo`, nothing but the prompt was asked for.
    pub prompt_only: bool,
}

impl Parameters {
    /// Takes the common fields; the endpoint's own are left.
    ///
    /// # Errors
    /// Names the field that is missing, of the wrong type or not supported.
    pub fn take(fields: &mut Fields) -> Result<Self, RequestError> {
        fields.ignore(IGNORED);
        fields.refuse(REFUSED)?;
        text_only(fields)?;
        let model = fields.require("model", "a string")?;
        let n = fields.take("n", "a whole number, 1 or more")?.unwrap_or(1);
        best_of(fields, n)?;
        let stream = fields.take("stream", "true or false")?.unwrap_or(false);
        let answer = AnswerOptions {
            stream,
            include_usage: include_usage(fields, stream)?,
            timings: fields.take("trireme_timings", "true or false")?.unwrap_or(false),
            token_ids: fields.take("return_token_ids", "true or false")?.unwrap_or(false),
            logprobs: None,
            echo: false,
            prompt_only: false,
        };
        let deadline =
            fields.take("deadline_ms", "a whole number of milliseconds")?.map(Duration::from_millis);
        Ok(Self {
            model,
            n,
            sampling: sampling(fields)?,
            stopping: stopping(fields)?,
            max_tokens_default: None,
            deadline,
            priority: priority(fields)?,
            text: text(fields)?,
            answer,
        })
    }
}

fn sampling(fields: &mut Fields) -> Result<v1::Sampling, RequestError> {
    const NUMBER: &str = "a number";
    Ok(v1::Sampling {
        temperature: fields.take("temperature", NUMBER)?,
        top_p: fields.take("top_p", NUMBER)?,
        top_k: top_k(fields)?,
        min_p: fields.take("min_p", NUMBER)?,
        repetition_penalty: fields.take("repetition_penalty", NUMBER)?,
        presence_penalty: fields.take("presence_penalty", NUMBER)?,
        frequency_penalty: fields.take("frequency_penalty", NUMBER)?,
        logit_bias: logit_bias(fields)?,
        seed: seed(fields)?,
        // The two endpoints spell it differently.
        logprobs: None,
    })
}

/// vLLM's fields about the answer's text.
fn text(fields: &mut Fields) -> Result<TextOptions, RequestError> {
    const BOOL: &str = "true or false";
    Ok(TextOptions {
        skip_special_tokens: fields.take("skip_special_tokens", BOOL)?.unwrap_or(true),
        include_stop: fields.take("include_stop_str_in_output", BOOL)?.unwrap_or(false),
    })
}

/// OpenAI's tiers, of which `flex` is the one that trades time for price.
fn priority(fields: &mut Fields) -> Result<Priority, RequestError> {
    let tier: Option<String> = fields.take("service_tier", "a string")?;
    match tier.as_deref() {
        None | Some("auto" | "default" | "priority" | "scale") => Ok(Priority::Interactive),
        Some("flex" | "batch") => Ok(Priority::Batch),
        Some(other) => {
            Err(RequestError::out_of_range("service_tier", other, "must be auto, default, priority or flex"))
        }
    }
}

/// vLLM's -1 means what 0 means: keep every token.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, RequestError> {
    let expected = "a whole number from 0, or -1";
    let Some(top_k) = fields.take::<i64>("top_k", expected)? else { return Ok(None) };
    let top_k = if top_k == -1 { 0 } else { top_k };
    u32::try_from(top_k)
        .map(Some)
        .map_err(|_| RequestError::out_of_range("top_k", top_k, format!("must be {expected}")))
}

/// Any 64-bit integer, signed ones by their bits.
fn seed(fields: &mut Fields) -> Result<Option<u64>, RequestError> {
    let Some(value) = fields.take_value("seed") else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    let wrong = || RequestError::field("seed", FieldProblem::Type { expected: "a 64-bit integer" });
    seed.map(Some).ok_or_else(wrong)
}

fn logit_bias(fields: &mut Fields) -> Result<BTreeMap<u32, f32>, RequestError> {
    let expected = "an object of token ids and numbers";
    let biases: BTreeMap<String, f32> = fields.take("logit_bias", expected)?.unwrap_or_default();
    let parse = |(token, bias): (String, f32)| match token.parse() {
        Ok(token) => Ok((token, bias)),
        Err(_) => Err(RequestError::out_of_range("logit_bias", token, "keys are token ids")),
    };
    biases.into_iter().map(parse).collect()
}

fn stopping(fields: &mut Fields) -> Result<v1::Stopping, RequestError> {
    let stop = match fields.take_value("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(list) => serde_json::from_value(list).map_err(|_| {
            RequestError::field("stop", FieldProblem::Type { expected: "a string or a list of strings" })
        })?,
    };
    Ok(v1::Stopping {
        max_tokens: limit(fields, "max_tokens")?,
        min_tokens: fields.take("min_tokens", "a whole number from 0")?.unwrap_or(0),
        ignore_eos: fields.take("ignore_eos", "true or false")?.unwrap_or(false),
        stop_token_ids: fields.take("stop_token_ids", "a list of token ids")?.unwrap_or_default(),
        stop,
    })
}

/// A number of tokens, at least 1.
pub(super) fn limit(fields: &mut Fields, name: &'static str) -> Result<Option<u32>, RequestError> {
    let expected = "a whole number, 1 or more";
    match fields.take(name, expected)? {
        Some(0) => Err(RequestError::out_of_range(name, 0, "must be 1 or more")),
        limit => Ok(limit),
    }
}

/// `best_of` is beam search's relative; asking for as many as are returned asks for nothing.
fn best_of(fields: &mut Fields, n: u32) -> Result<(), RequestError> {
    match fields.take::<u32>("best_of", "a whole number")? {
        Some(best_of) if best_of != n => {
            Err(RequestError::field("best_of", FieldProblem::Unsupported("every choice is returned; use n")))
        }
        _ => Ok(()),
    }
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, RequestError> {
    let Some(options) = fields.take_value("stream_options") else { return Ok(false) };
    if !stream {
        let problem = FieldProblem::Unsupported("it goes with stream: true alone");
        return Err(RequestError::field("stream_options", problem));
    }
    let mut options = Fields::nested("stream_options".to_owned(), options)?;
    let include = options.take("include_usage", "true or false")?.unwrap_or(false);
    options.ignore(&["include_obfuscation"]);
    options.finish()?;
    Ok(include)
}

/// Forms of output: text is the only one.
fn text_only(fields: &mut Fields) -> Result<(), RequestError> {
    if let Some(format) = fields.take_value("response_format")
        && format.get("type").and_then(Value::as_str) != Some("text")
    {
        let problem = FieldProblem::Unsupported("text is the only format");
        return Err(RequestError::field("response_format", problem));
    }
    let modalities: Vec<String> = fields.take("modalities", "a list of strings")?.unwrap_or_default();
    if modalities.iter().any(|modality| modality != "text") {
        return Err(RequestError::field("modalities", FieldProblem::Unsupported("text is the only one")));
    }
    Ok(())
}
