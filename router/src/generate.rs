//! What both front doors ask for: hop 1 ends with a [`Generate`], whatever protocol it came in.
//!
//! Sampling and stopping keep the form of `trireme.v1`, where an absent field is visible: admission fills
//! in the model's defaults and checks every range, once for both doors.

use std::time::{Duration, Instant};

use model::{ChatMessage, TokenId};
use proto::trace::TraceContext;
use proto::v1;

use crate::detokenise::TextOptions;
use crate::http::Tenant;

/// A request, parsed; nothing in it is checked against the model yet.
#[derive(Debug)]
pub(crate) struct Generate {
    /// Who asks, and since when.
    pub context: RequestContext,
    /// `None`: the only model served.
    pub model: Option<String>,
    /// At least one; each is answered `n` times.
    pub prompts: Vec<Prompt>,
    /// As sent.
    pub sampling: v1::Sampling,
    /// As sent; `stop` holds the stop strings.
    pub stopping: v1::Stopping,
    /// Tokens to generate where `stopping` does not say, as far as the context leaves them. `None`: all it leaves.
    pub max_tokens_default: Option<u32>,
    /// What of the text is given out.
    pub text: TextOptions,
    /// Choices of each prompt.
    pub n: u32,
    /// Alternatives with the log-probability of each prompt token; `None`: no log-probabilities of the prompt.
    pub prompt_logprobs: Option<u32>,
    /// From receipt. `None`: the server's limit.
    pub deadline: Option<Duration>,
}

/// What is to be continued.
#[derive(Debug)]
pub(crate) enum Prompt {
    /// Begin-of-sequence is added where the tokenizer's configuration says so.
    Text(String),
    /// Taken as they are.
    Tokens(Vec<TokenId>),
    /// Rendered by the model's chat template; the answer's thinking is split off.
    Chat(Chat),
}

/// A conversation.
#[derive(Debug)]
pub(crate) struct Chat {
    /// In order.
    pub messages: Vec<ChatMessage>,
    /// Opens the answer with the thinking mark where the template has one.
    pub thinking: bool,
    /// Further variables of the template.
    pub template_arguments: serde_json::Map<String, serde_json::Value>,
}

/// Who asks, and since when.
#[derive(Debug, Clone)]
pub(crate) struct RequestContext {
    /// The door it came through, `http` or `grpc`.
    pub door: &'static str,
    /// In logs, spans and the answer.
    pub request_id: String,
    /// The router's span in the client's trace.
    pub trace: TraceContext,
    /// When the request's head was read.
    pub received: Instant,
    /// On whose behalf, and in which class of service.
    pub tenant: Tenant,
}

/// Longest request id we echo, characters.
pub(crate) const REQUEST_ID_MAX: usize = 128;

impl RequestContext {
    /// Takes the client's id and trace where they are usable, makes its own otherwise.
    pub fn new(door: &'static str, request_id: Option<&str>, traceparent: Option<&str>) -> Self {
        let usable = |id: &&str| {
            !id.is_empty() && id.len() <= REQUEST_ID_MAX && id.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let request_id = match request_id.filter(usable) {
            Some(id) => id.to_owned(),
            None => format!("{:032x}", rand::random::<u128>()),
        };
        let trace = match traceparent.and_then(TraceContext::parse) {
            Some(clients) => clients.child(),
            None => TraceContext::root(),
        };
        Self { door, request_id, trace, received: Instant::now(), tenant: Tenant::default() }
    }
}
