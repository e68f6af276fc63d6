//! Hop 2: from a parsed request to sequences that may run, or an answer within milliseconds.
//!
//! A request takes a place for each of its sequences. Where there is none, or enough work ahead, it waits in a bounded
//! queue, tenants by their weights and interactive before batch, as long as its first token can still come in time; where
//! it cannot be expected to, it gets 429 at once ([`door`]). Places come before the tokenizer, so that
//! overload costs nothing; everything that can be refused without the tokenizer is refused before both.

pub mod door;
pub mod estimate;
mod places;

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::{SamplingParams, Stopping, TokenId};
use proto::sequence::{sampling_from_wire, stopping_from_wire};
use tracing::{Instrument, info_span};

use self::door::{Ask, PrefillPace};
pub(crate) use self::places::Ahead;
use self::places::{Permit, Places};
use crate::config::{CHOICES_MAX, Config};
use crate::detokenise::TextOptions;
use crate::error::{FieldProblem, RequestError};
use crate::generate::{Chat, Generate, Prompt, RequestContext};
use crate::metrics::Metrics;
use crate::served_model::ServedModel;
use crate::stop::{STOP_BYTES_MAX, STOPS_MAX};

/// Text above this goes to a blocking thread: the tokenizer takes about a millisecond for it.
const INLINE_TEXT_BYTES_MAX: usize = 8 << 10;
/// Log-probabilities of a prompt's tokens and their alternatives: each takes some 12 bytes of a gRPC message, of which 4 MiB
/// are taken.
const PROMPT_LOGPROBS_MAX: usize = 250_000;

/// A request that may run.
pub(crate) struct Admitted {
    pub context: RequestContext,
    pub prompts: Vec<AdmittedPrompt>,
    /// Choices of each prompt.
    pub n: u32,
    /// Alternatives with the log-probability of each prompt token.
    pub prompt_logprobs: Option<u32>,
    /// Every default filled in.
    pub sampling: SamplingParams,
    /// Stop strings; the token-level rules are each prompt's.
    pub stop: Vec<String>,
    /// What of the text is given out.
    pub text: TextOptions,
    /// When the request is given up.
    pub deadline: Instant,
    /// Until when a sequence may wait for memory on decode: its first token would come too late.
    pub patience: Instant,
    /// Time spent here.
    pub admission: Duration,
    /// Its places.
    pub permit: Permit,
}

/// One prompt, tokenised and checked against the model.
pub(crate) struct AdmittedPrompt {
    pub tokens: Arc<[TokenId]>,
    pub stopping: Stopping,
    pub reasoning: Reasoning,
}

/// How the answer's thinking is told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reasoning {
    /// Not at all: this is no chat.
    Plain,
    /// A chat whose prompt did not open the thinking mark.
    Chat,
    /// A chat whose prompt ends inside the thinking mark.
    ChatOpened,
}

/// The door-keeper.
pub(crate) struct Admission {
    model: Arc<ServedModel>,
    metrics: Arc<Metrics>,
    places: Arc<Places>,
    sequences_per_request_max: usize,
    ttft_max: [Duration; 2],
    deadline_max: Duration,
}

/// What the door needs to know of the cluster.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cluster {
    /// The longest sequence that the live workers could hold, tokens; a request that names no `max_tokens` is fitted into it.
    pub lifetime_tokens_max: Option<u64>,
    /// How fast they compute prompts.
    pub pace: PrefillPace,
}

impl Admission {
    pub fn new(config: &Config, model: Arc<ServedModel>, metrics: Arc<Metrics>) -> Self {
        let limits = config.door();
        Self {
            model,
            places: Places::new(limits, Arc::clone(&metrics)),
            metrics,
            sequences_per_request_max: config.sequences_per_request_max,
            ttft_max: limits.ttft_max,
            deadline_max: config.deadline_max(),
        }
    }

    /// Checks, waits for places, tokenises.
    ///
    /// # Errors
    /// What is wrong with the request; [`RequestError::Overloaded`]; [`RequestError::Deadline`].
    pub async fn admit(&self, generate: Generate, cluster: Cluster) -> Result<Admitted, RequestError> {
        let span = info_span!("admission", hop = 2, request_id = %generate.context.request_id);
        self.admit_within(generate, cluster).instrument(span).await
    }

    async fn admit_within(&self, generate: Generate, cluster: Cluster) -> Result<Admitted, RequestError> {
        let Generate {
            context,
            model,
            prompts,
            sampling,
            mut stopping,
            max_tokens_default,
            text,
            n,
            prompt_logprobs,
            deadline,
        } = generate;
        self.model.check_name(model.as_deref())?;
        let sequences = self.sequences(prompts.len(), n)?;
        let deadline_after = deadline.unwrap_or(self.deadline_max).min(self.deadline_max);
        let deadline = context.received + deadline_after;
        let stop = check_stops(std::mem::take(&mut stopping.stop))?;
        let sampling = sampling_from_wire(&sampling, &self.model.sampling_defaults())?;
        self.check_token_ids(&sampling, &stopping)?;

        let share = context.tenant.share;
        let received = context.received;
        let size = size(&prompts);
        let ask = Ask { share, sequences, tokens: 0, received, deadline: Some(deadline) };
        let taken = self.places.take(ask, size, cluster.pace).await;
        let permit = taken.map_err(|refusal| match deadline <= Instant::now() {
            true => RequestError::Deadline { deadline: deadline_after },
            false => RequestError::Overloaded { retry_after: refusal.retry_after },
        })?;
        // From here on it is served as well as it can be: what prefill takes for its own prompt is not counted.
        let patience = deadline.min(Instant::now().max(received) + self.ttft_max[share.priority as usize]);
        let mut admitted = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let bytes = text_bytes(&prompt);
            let (tokens, reasoning) = self.tokenise(prompt).await?;
            self.places.observe_text(bytes, tokens.len());
            let room = self.room(&tokens, &stopping, max_tokens_default, cluster.lifetime_tokens_max)?;
            let stopping = stopping_from_wire(&stopping, room)?;
            check_prompt_logprobs(prompt_logprobs, tokens.len())?;
            admitted.push(AdmittedPrompt { tokens: tokens.into(), stopping, reasoning });
        }
        let admission = context.received.elapsed();
        self.metrics.hop("admission", admission);
        Ok(Admitted {
            context,
            prompts: admitted,
            n,
            prompt_logprobs,
            sampling,
            stop,
            text,
            deadline,
            patience,
            admission,
            permit,
        })
    }

    fn sequences(&self, prompts: usize, n: u32) -> Result<usize, RequestError> {
        if n == 0 || n > CHOICES_MAX {
            return Err(RequestError::out_of_range("n", n, format!("must lie between 1 and {CHOICES_MAX}")));
        }
        let sequences = prompts.saturating_mul(n as usize);
        if prompts == 0 || sequences > self.sequences_per_request_max {
            let allowed =
                format!("prompts times n must lie between 1 and {}", self.sequences_per_request_max);
            return Err(RequestError::out_of_range("prompt", format_args!("{prompts} prompts"), allowed));
        }
        Ok(sequences)
    }

    /// Sampling and stopping may name tokens; they must exist.
    fn check_token_ids(
        &self,
        sampling: &SamplingParams,
        stopping: &proto::v1::Stopping,
    ) -> Result<(), RequestError> {
        let vocab_size = self.model.config.vocab_size;
        let allowed = || format!("token ids are below {vocab_size}");
        if let Some((token, _)) = sampling.logit_bias.iter().find(|(token, _)| token.index() >= vocab_size) {
            return Err(RequestError::out_of_range(
                "logit_bias",
                format_args!("for token {token}"),
                allowed(),
            ));
        }
        if let Some(token) = stopping.stop_token_ids.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(RequestError::out_of_range(
                "stop_token_ids",
                format_args!("naming token {token}"),
                allowed(),
            ));
        }
        Ok(())
    }

    /// Prompt to tokens, on a blocking thread when long.
    ///
    /// # Errors
    /// The template refuses the messages, or a token id lies outside of the vocabulary.
    pub async fn tokenise(&self, prompt: Prompt) -> Result<(Vec<TokenId>, Reasoning), RequestError> {
        let bytes = text_bytes(&prompt);
        let model = Arc::clone(&self.model);
        if bytes <= INLINE_TEXT_BYTES_MAX {
            return tokenise(&model, prompt);
        }
        tokio::task::spawn_blocking(move || tokenise(&model, prompt))
            .await
            .unwrap_or(Err(RequestError::Internal))
    }

    /// Tokens that may be generated behind the prompt when the client does not say.
    fn room(
        &self,
        prompt: &[TokenId],
        stopping: &proto::v1::Stopping,
        max_tokens_default: Option<u32>,
        lifetime_tokens_max: Option<u64>,
    ) -> Result<u32, RequestError> {
        let context = self.model.config.max_position_embeddings;
        let completion_tokens = stopping.max_tokens.map_or(1, |tokens| tokens.max(1)) as usize;
        if prompt.len().saturating_add(completion_tokens) > context {
            return Err(RequestError::ContextLength {
                prompt_tokens: prompt.len(),
                completion_tokens,
                context_tokens_max: context,
            });
        }
        let pool = lifetime_tokens_max.and_then(|tokens| usize::try_from(tokens).ok()).unwrap_or(context);
        let room = context.min(pool).saturating_sub(prompt.len()).max(1);
        Ok(max_tokens_default.unwrap_or(u32::MAX).min(u32::try_from(room).unwrap_or(u32::MAX)))
    }
}

fn text_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Chat(chat) => chat.messages.iter().map(|message| message.content.len()).sum(),
        Prompt::Tokens(_) => 0,
    }
}

/// Bytes of text and tokens in all prompts together: the choices of one share what is computed.
fn size(prompts: &[Prompt]) -> (usize, usize) {
    let tokens = |prompt: &Prompt| if let Prompt::Tokens(tokens) = prompt { tokens.len() } else { 0 };
    (prompts.iter().map(text_bytes).sum(), prompts.iter().map(tokens).sum())
}

/// The log-probabilities of a whole prompt come in one message, whose size is bounded.
fn check_prompt_logprobs(alternatives: Option<u32>, prompt_tokens: usize) -> Result<(), RequestError> {
    let values = |alternatives: u32| prompt_tokens.saturating_mul(alternatives as usize + 1);
    match alternatives.map(values) {
        Some(values) if values > PROMPT_LOGPROBS_MAX => {
            let allowed = format!("prompt tokens times (logprobs + 1) must be at most {PROMPT_LOGPROBS_MAX}");
            Err(RequestError::out_of_range(
                "echo",
                format_args!("with {prompt_tokens} prompt tokens"),
                allowed,
            ))
        }
        _ => Ok(()),
    }
}

fn tokenise(model: &ServedModel, prompt: Prompt) -> Result<(Vec<TokenId>, Reasoning), RequestError> {
    match prompt {
        Prompt::Text(text) => {
            let tokens = model.encode_prompt(&text)?;
            not_empty("prompt", tokens).map(|tokens| (tokens, Reasoning::Plain))
        }
        Prompt::Tokens(tokens) => {
            let vocab_size = model.config.vocab_size;
            if let Some(token) = tokens.iter().find(|token| token.index() >= vocab_size) {
                let allowed = format!("token ids are below {vocab_size}");
                return Err(RequestError::out_of_range(
                    "prompt",
                    format_args!("naming token {token}"),
                    allowed,
                ));
            }
            not_empty("prompt", tokens).map(|tokens| (tokens, Reasoning::Plain))
        }
        Prompt::Chat(chat) => tokenise_chat(model, &chat),
    }
}

fn tokenise_chat(model: &ServedModel, chat: &Chat) -> Result<(Vec<TokenId>, Reasoning), RequestError> {
    let (rendered, opened) = model.render(chat)?;
    let tokens = not_empty("messages", model.encode(&rendered)?)?;
    let reasoning = if opened { Reasoning::ChatOpened } else { Reasoning::Chat };
    Ok((tokens, reasoning))
}

fn not_empty(field: &'static str, tokens: Vec<TokenId>) -> Result<Vec<TokenId>, RequestError> {
    match tokens.is_empty() {
        true => Err(RequestError::field(field, FieldProblem::Missing)),
        false => Ok(tokens),
    }
}

fn check_stops(stops: Vec<String>) -> Result<Vec<String>, RequestError> {
    if stops.len() > STOPS_MAX {
        let allowed = format!("at most {STOPS_MAX} are allowed");
        return Err(RequestError::out_of_range("stop", format_args!("{} strings", stops.len()), allowed));
    }
    if let Some(stop) = stops.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
        let allowed = format!("each must have 1 to {STOP_BYTES_MAX} bytes");
        return Err(RequestError::out_of_range(
            "stop",
            format_args!("a string of {} bytes", stop.len()),
            allowed,
        ));
    }
    Ok(stops)
}
