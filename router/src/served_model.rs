//! The one model served: its name, its text in and out, its defaults.

use std::collections::HashSet;
use std::sync::Arc;

use model::{ChatTemplate, Detokenizer, GenerationDefaults, ModelConfig, SamplingParams, TokenId, Tokenizer};

use crate::error::{FieldProblem, RequestError};
use crate::generate::Chat;

/// What the router needs of a model; no weights among it.
pub struct ServedModel {
    /// The name clients use.
    pub id: String,
    /// `config.json`.
    pub config: ModelConfig,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// `None`: chats are refused.
    pub template: Option<ChatTemplate>,
    /// `generation_config.json`.
    pub defaults: GenerationDefaults,
}

impl ServedModel {
    /// Accepts the model's own name, or none.
    pub(crate) fn check_name(&self, model: Option<&str>) -> Result<(), RequestError> {
        match model {
            Some(model) if model != self.id => Err(RequestError::ModelNotFound {
                model: model.chars().take(128).collect(),
                served: self.id.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// What a request that names nothing samples with; the seed is drawn afresh.
    pub(crate) fn sampling_defaults(&self) -> SamplingParams {
        let base = SamplingParams::default();
        let own = &self.defaults;
        SamplingParams {
            temperature: own.temperature.unwrap_or(base.temperature),
            top_p: own.top_p.unwrap_or(base.top_p),
            top_k: own.top_k.unwrap_or(base.top_k),
            min_p: own.min_p.unwrap_or(base.min_p),
            repetition_penalty: own.repetition_penalty.unwrap_or(base.repetition_penalty),
            seed: rand::random(),
            ..base
        }
    }

    /// The chat as the model's template writes it, and whether that ends inside the thinking mark.
    pub(crate) fn render(&self, chat: &Chat) -> Result<(String, bool), RequestError> {
        let no_template = FieldProblem::Unsupported("this model has no chat template; use /v1/completions");
        let template = self.template.as_ref().ok_or_else(|| RequestError::field("messages", no_template))?;
        let rendered = template
            .render(&chat.messages, chat.thinking, true, &chat.template_arguments)
            .map_err(|error| RequestError::Template(Arc::new(error)))?;
        let opened = ChatTemplate::opens_thinking(&rendered);
        Ok((rendered, opened))
    }

    /// Plain text to tokens, with begin-of-sequence where the tokenizer's configuration says so.
    pub(crate) fn encode_prompt(&self, text: &str) -> Result<Vec<TokenId>, RequestError> {
        self.tokenizer.encode_prompt(text).map_err(|error| RequestError::Tokenizer(Arc::new(error)))
    }

    /// Rendered text to tokens: the template has written the special tokens already.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<TokenId>, RequestError> {
        self.tokenizer.encode(text).map_err(|error| RequestError::Tokenizer(Arc::new(error)))
    }

    /// A fresh detokeniser for one choice.
    pub(crate) fn detokenizer(&self, skip_special_tokens: bool) -> Detokenizer {
        Detokenizer::new(&self.tokenizer, skip_special_tokens)
    }

    /// The tokens that end a sequence.
    pub(crate) fn ending_tokens(&self, stopping: &model::Stopping) -> HashSet<TokenId> {
        let eos = self.config.eos_token_ids.iter().chain(&self.defaults.eos_token_ids);
        let eos = eos.filter(|_| !stopping.ignore_eos);
        eos.chain(&stopping.stop_token_ids).copied().collect()
    }
}
