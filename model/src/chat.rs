//! The model's chat template: a conversation to the text that the model was trained on.
//!
//! Templates are Jinja programs that come with a checkpoint. They run in an interpreter without access to anything, on
//! a budget of instructions, configured as `transformers` configures Jinja.

mod environment;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::Environment;
use minijinja::value::{Serde, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{ModelError, TemplateError};
use crate::files;
use crate::tokenizer::TOKENIZER_CONFIG_BYTES_MAX;

const NAME: &str = "chat_template";
/// The mark that opens a thought, in every DeepSeek template that has thoughts.
const THINK: &str = "<think>";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A compiled chat template.
pub struct ChatTemplate {
    file: PathBuf,
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Compiles the template of a model directory: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json`, a string or a list of named templates of which `default` is taken. `None` when the
    /// model has none.
    ///
    /// # Errors
    /// [`ModelError`] naming the file.
    pub fn open(dir: impl AsRef<Path>) -> Result<Option<Self>, ModelError> {
        let config_file = dir.as_ref().join("tokenizer_config.json");
        let config: Value = match files::read_if_present(&config_file, TOKENIZER_CONFIG_BYTES_MAX)? {
            None => Value::Null,
            Some(text) => serde_json::from_str(&text)
                .map_err(|source| ModelError::Json { file: config_file.clone(), source })?,
        };
        let own_file = dir.as_ref().join("chat_template.jinja");
        let (file, source) = match files::read_if_present(&own_file, TOKENIZER_CONFIG_BYTES_MAX)? {
            Some(source) => (own_file, source),
            None => match configured_template(&config) {
                Ok(Some(source)) => (config_file, source),
                Ok(None) => return Ok(None),
                Err(source) => return Err(ModelError::Template { file: config_file, source }),
            },
        };
        let compiled = environment::like_transformers().and_then(|mut environment| {
            environment.add_template_owned(NAME, source)?;
            Ok(environment)
        });
        let environment = match compiled {
            Ok(environment) => environment,
            Err(e) => return Err(ModelError::Template { file, source: TemplateError::Engine(e) }),
        };
        let bos_token = special_token(&config, "bos_token");
        let eos_token = special_token(&config, "eos_token");
        Ok(Some(Self { file, environment, bos_token, eos_token }))
    }

    /// The conversation as the model's text, begin-of-sequence mark included.
    ///
    /// `thinking` is the variable by which V3.1's template opens a thought; templates that always think, or never,
    /// do not read it. `add_generation_prompt` ends the text where the answer begins. `extra` are further variables
    /// (`chat_template_kwargs` of a request), which do not override those above.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] when the template itself refuses the conversation, else [`TemplateError::Engine`].
    pub fn render(
        &self,
        messages: &[ChatMessage],
        thinking: bool,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, ModelError> {
        let own = [
            ("messages", Jinja::from(Serde(messages))),
            ("thinking", Jinja::from(thinking)),
            ("add_generation_prompt", Jinja::from(add_generation_prompt)),
        ];
        let marks = [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)];
        let marks = marks.into_iter().filter_map(|(name, mark)| Some((name, Jinja::from(mark.as_ref()?))));
        let extra = extra.iter().map(|(name, value)| (name.as_str(), Jinja::from(Serde(value))));
        // Of two entries with one name the later stands.
        let variables: BTreeMap<&str, Jinja> = extra.chain(own).chain(marks).collect();
        let variables = Jinja::from_pairs(variables);
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(variables));
        rendered.map_err(|error| {
            let source = match environment::refusal(&error) {
                Some(message) => TemplateError::Refused { message },
                None => TemplateError::Engine(error),
            };
            ModelError::Template { file: self.file.clone(), source }
        })
    }

    /// Whether a rendered conversation ends inside a thought, so that the model's first tokens are reasoning although
    /// it never writes the opening mark itself.
    pub fn opens_thinking(rendered: &str) -> bool {
        rendered.trim_end().ends_with(THINK)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChatTemplate {{ file: {:?} }}", self.file)
    }
}

/// A special token of tokenizer_config.json, which spells it as a string or as an object with `content`.
pub(crate) fn special_token(tokenizer_config: &Value, name: &str) -> Option<String> {
    let token = tokenizer_config.get(name)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

fn configured_template(tokenizer_config: &Value) -> Result<Option<String>, TemplateError> {
    match tokenizer_config.get("chat_template") {
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str())
            .map(|source| Some(source.to_owned()))
            .ok_or(TemplateError::NoDefault),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests;
