//! Hop 2: from a parsed request to sequences that may run, or an answer within milliseconds.
//!
//! A request takes a permit for each of its sequences. When none is free it waits in a bounded queue for a
//! bounded time, tenants by their weights and interactive before batch ([`places`]); when the queue is full it gets 429
//! at once. Permits come before the tokenizer, so that
//! overload costs nothing; everything that can be refused without the tokenizer is refused before both.

mod places;

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::{SamplingParams, Stopping, TokenId};
use proto::sequence::{sampling_from_wire, stopping_from_wire};
use proto::share::Share;
use tracing::{Instrument, info_span};

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
/// What an overloaded server asks clients to wait: about the time in which a place becomes free.
const RETRY_AFTER: Duration = Duration::from_secs(1);

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
    /// Time spent here.
    pub admission: Duration,
    /// Held, not read.
    pub _permit: Permit,
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
    queue_wait_max: Duration,
    deadline_max: Duration,
}

impl Admission {
    pub fn new(config: &Config, model: Arc<ServedModel>, metrics: Arc<Metrics>) -> Self {
        Self {
            model,
            places: Places::new(config.sequences_max, config.queue_max, Arc::clone(&metrics)),
            metrics,
            sequences_per_request_max: config.sequences_per_request_max,
            queue_wait_max: config.queue_wait_max(),
            deadline_max: config.deadline_max(),
        }
    }

    /// Checks, waits for places, tokenises. `lifetime_tokens_max`: the longest sequence that the live
    /// workers could hold; a request that names no `max_tokens` is fitted into it.
    ///
    /// # Errors
    /// What is wrong with the request; [`RequestError::Overloaded`]; [`RequestError::Deadline`].
    pub async fn admit(
        &self,
        generate: Generate,
        lifetime_tokens_max: Option<u64>,
    ) -> Result<Admitted, RequestError> {
        let span = info_span!("admission", hop = 2, request_id = %generate.context.request_id);
        self.admit_within(generate, lifetime_tokens_max).instrument(span).await
    }

    async fn admit_within(
        &self,
        generate: Generate,
        lifetime_tokens_max: Option<u64>,
    ) -> Result<Admitted, RequestError> {
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

        let permit = self.places(context.tenant.share, sequences, deadline, deadline_after).await?;
        let mut admitted = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let (tokens, reasoning) = self.tokenise(prompt).await?;
            let room = self.room(&tokens, &stopping, max_tokens_default, lifetime_tokens_max)?;
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
            admission,
            _permit: permit,
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

    async fn places(
        &self,
        share: Share,
        sequences: usize,
        deadline: Instant,
        deadline_after: Duration,
    ) -> Result<Permit, RequestError> {
        let patience = (Instant::now() + self.queue_wait_max).min(deadline);
        let taken = self.places.take(share, sequences, patience).await;
        taken.map_err(|_none| match deadline <= Instant::now() {
            true => RequestError::Deadline { deadline: deadline_after },
            false => RequestError::Overloaded { retry_after: RETRY_AFTER },
        })
    }

    /// Prompt to tokens, on a blocking thread when long.
    ///
    /// # Errors
    /// The template refuses the messages, or a token id lies outside of the vocabulary.
    pub async fn tokenise(&self, prompt: Prompt) -> Result<(Vec<TokenId>, Reasoning), RequestError> {
        let bytes = match &prompt {
            Prompt::Text(text) => text.len(),
            Prompt::Chat(chat) => chat.messages.iter().map(|message| message.content.len()).sum(),
            Prompt::Tokens(_) => 0,
        };
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
