//! `generation_config.json`: what the model's makers sample with when a request does not say.

use std::path::Path;

use serde_json::Value;

use crate::config::{Fields, ModelConfig};
use crate::error::{ConfigError, ModelError};
use crate::files;
use crate::ids::TokenId;

const GENERATION_CONFIG_BYTES_MAX: u64 = 1 << 20;

/// The model's own sampling defaults. Absent fields leave the server's. `do_sample` is not read: a request that wants
/// the best token says temperature 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// 0..=2.
    pub temperature: Option<f32>,
    /// (0, 1].
    pub top_p: Option<f32>,
    /// 0 keeps every token.
    pub top_k: Option<u32>,
    /// 0..=1.
    pub min_p: Option<f32>,
    /// (0, 2].
    pub repetition_penalty: Option<f32>,
    /// Ends of sequence besides config.json's; [`crate::Checkpoint::open`] has already merged them.
    pub eos_token_ids: Vec<TokenId>,
}

impl GenerationDefaults {
    /// Reads the file of a model directory; a directory without one has no defaults.
    ///
    /// # Errors
    /// [`ModelError`] names the file and the field that is out of range.
    pub fn open(dir: impl AsRef<Path>, config: &ModelConfig) -> Result<Self, ModelError> {
        let file = dir.as_ref().join("generation_config.json");
        match files::read_if_present(&file, GENERATION_CONFIG_BYTES_MAX)? {
            None => Ok(Self::default()),
            Some(text) => Self::from_json(&text, config.vocab_size).map_err(files::in_file(&file)),
        }
    }

    fn from_json(text: &str, vocab_size: usize) -> Result<Self, ConfigError> {
        let root: Value = serde_json::from_str(text)?;
        let fields = Fields::new(&root)?;
        let number = |field, range| Ok::<_, ConfigError>(fields.number(field, range)?.map(|x| x as f32));
        Ok(Self {
            temperature: number("temperature", 0.0..=2.0)?,
            top_p: number("top_p", 1e-6..=1.0)?,
            top_k: fields.integer("top_k", 0..=u32::MAX as usize)?.map(|k| k as u32),
            min_p: number("min_p", 0.0..=1.0)?,
            repetition_penalty: number("repetition_penalty", 1e-3..=2.0)?,
            eos_token_ids: fields.token_ids("eos_token_id", vocab_size)?,
        })
    }
}

#[cfg(test)]
mod tests;
