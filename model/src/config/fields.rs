//! Checked access to the fields of a JSON object: every error names the field, dotted for a nested one.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ConfigError;
use crate::ids::TokenId;

/// A JSON object and the path that leads to it. `null` counts as absent, as everywhere in Hugging Face's files.
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// Empty, or the outer field's name and a dot.
    prefix: String,
}

impl<'a> Fields<'a> {
    /// The fields of a whole file.
    pub(crate) fn new(root: &'a Value) -> Result<Self, ConfigError> {
        let object = root.as_object().ok_or(ConfigError::NotAnObject)?;
        Ok(Self { object, prefix: String::new() })
    }

    /// The value, unless it is absent or null.
    pub(crate) fn value(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|v| !v.is_null())
    }

    /// A nested object.
    pub(crate) fn object(&self, field: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(object)) => {
                Ok(Some(Fields { object, prefix: format!("{}{field}.", self.prefix) }))
            }
            Some(other) => Err(self.invalid(field, "an object", other)),
        }
    }

    /// A whole number in `range`.
    pub(crate) fn integer(
        &self,
        field: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        // Some tools write 1e6 or 4096.0 where a whole number is meant.
        let whole = value.as_u64().or_else(|| {
            value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x)).map(|x| x as u64)
        });
        match whole.and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let expected = format!("a whole number in {}..={}", range.start(), range.end());
                Err(self.invalid(field, &expected, value))
            }
        }
    }

    /// A number in `range`, never NaN.
    pub(crate) fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        match value.as_f64().filter(|x| range.contains(x)) {
            Some(x) => Ok(Some(x)),
            None => {
                let expected = format!("a number in {}..={}", range.start(), range.end());
                Err(self.invalid(field, &expected, value))
            }
        }
    }

    /// True or false.
    pub(crate) fn boolean(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.invalid(field, "true or false", other)),
        }
    }

    /// A string.
    pub(crate) fn text(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.invalid(field, "a string", other)),
        }
    }

    /// One of a few names, each standing for a value.
    pub(crate) fn choice<T: Copy>(
        &self,
        field: &str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let found = value.as_str().and_then(|name| choices.iter().find(|(known, _)| *known == name));
        match found {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let names: Vec<_> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
                Err(self.invalid(field, &names.join(" or "), value))
            }
        }
    }

    /// Refuses every value but `only`; absence is fine. For switches of which we implement one side.
    pub(crate) fn only(&self, field: &str, only: Value) -> Result<(), ConfigError> {
        match self.value(field) {
            Some(value) if *value != only => {
                Err(self.invalid(field, &format!("{only} (nothing else is supported)"), value))
            }
            _ => Ok(()),
        }
    }

    /// One token id or a list of them, each below `vocab_size`; empty when absent.
    pub(crate) fn token_ids(&self, field: &str, vocab_size: usize) -> Result<Vec<TokenId>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(Vec::new()) };
        let ids = match value {
            Value::Array(ids) => ids.as_slice(),
            one => std::slice::from_ref(one),
        };
        let id = |v: &Value| {
            v.as_u64()
                .filter(|n| *n < vocab_size as u64)
                .and_then(|n| u32::try_from(n).ok())
                .map(TokenId)
                .ok_or_else(|| self.invalid(field, &format!("token ids below {vocab_size}"), value))
        };
        // 64: an end-of-sequence list has a handful; it is searched for every token.
        if ids.len() > 64 {
            return Err(self.invalid(field, "at most 64 token ids", value));
        }
        ids.iter().map(id).collect()
    }

    /// The error of a field that must be there.
    pub(crate) fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing { field: format!("{}{field}", self.prefix) }
    }

    /// The error of a field whose value cannot be used.
    pub(crate) fn invalid(&self, field: &str, expected: &str, found: &Value) -> ConfigError {
        invalid(&format!("{}{field}", self.prefix), expected, &found.to_string())
    }
}

/// The error of a field whose value cannot be used, by its full name.
pub(crate) fn invalid(field: &str, expected: &str, found: &str) -> ConfigError {
    // A hostile value must not fill the log.
    const FOUND_CHARS_MAX: usize = 80;
    let mut short: String = found.chars().take(FOUND_CHARS_MAX).collect();
    if short.len() < found.len() {
        short.push('…');
    }
    ConfigError::Invalid { field: field.to_owned(), expected: expected.to_owned(), found: short }
}
