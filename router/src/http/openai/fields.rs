//! A request body as named fields: each is taken once with its type, and what nobody took is an error.
//! So every message names the field at fault.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{FieldProblem, RequestError};

/// What is left of a JSON object.
#[derive(Debug)]
pub(super) struct Fields {
    /// Where the object stands in the body, `""` for the body itself.
    path: String,
    left: Map<String, Value>,
}

impl Fields {
    /// Reads a body.
    ///
    /// # Errors
    /// It is no UTF-8, or no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, RequestError> {
        let text =
            std::str::from_utf8(body).map_err(|error| RequestError::NotUtf8 { at: error.valid_up_to() })?;
        let left = serde_json::from_str(text).map_err(|error| RequestError::NotJson(Arc::new(error)))?;
        Ok(Self { path: String::new(), left })
    }

    /// An object inside the body.
    ///
    /// # Errors
    /// `value` is no object.
    pub fn nested(path: String, value: Value) -> Result<Self, RequestError> {
        match value {
            Value::Object(left) => Ok(Self { path, left }),
            _ => Err(RequestError::field(path, FieldProblem::Type { expected: "an object" })),
        }
    }

    /// Takes `name`; `null` counts as absent. `expected` completes "must be …".
    ///
    /// # Errors
    /// The value is no `T`.
    pub fn take<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &'static str,
    ) -> Result<Option<T>, RequestError> {
        match self.take_value(name) {
            None => Ok(None),
            Some(value) => {
                serde_json::from_value(value).map(Some).map_err(|_| self.wrong_type(name, expected))
            }
        }
    }

    /// As [`Fields::take`], for a field that must be there.
    ///
    /// # Errors
    /// It is missing, or no `T`.
    pub fn require<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &'static str,
    ) -> Result<T, RequestError> {
        self.take(name, expected)?.ok_or_else(|| RequestError::field(self.name(name), FieldProblem::Missing))
    }

    /// Takes `name` as it stands; `null` counts as absent.
    pub fn take_value(&mut self, name: &str) -> Option<Value> {
        // The order of what is left means nothing.
        self.left.swap_remove(name).filter(|value| !value.is_null())
    }

    /// Takes and forgets fields that change nothing here.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.left.swap_remove(*name);
        }
    }

    /// Refuses fields that would change the answer in a way we cannot; values that ask for nothing pass.
    ///
    /// # Errors
    /// One of them asks for something.
    pub fn refuse(&mut self, names: &[(&str, &'static str)]) -> Result<(), RequestError> {
        for (name, why) in names {
            if let Some(value) = self.take_value(name)
                && asks_for_something(&value)
            {
                return Err(RequestError::field(self.name(name), FieldProblem::Unsupported(why)));
            }
        }
        Ok(())
    }

    /// Ends reading.
    ///
    /// # Errors
    /// Names a field that nobody took.
    pub fn finish(self) -> Result<(), RequestError> {
        // Clients that write out every field they know leave the others at null: that asks for nothing.
        match self.left.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => {
                let name: String = name.chars().take(128).collect();
                Err(RequestError::field(self.name(&name), FieldProblem::Unknown))
            }
            None => Ok(()),
        }
    }

    /// The field's path in the body.
    pub fn name(&self, name: &str) -> String {
        match self.path.is_empty() {
            true => name.to_owned(),
            false => format!("{}.{name}", self.path),
        }
    }

    fn wrong_type(&self, name: &str, expected: &'static str) -> RequestError {
        RequestError::field(self.name(name), FieldProblem::Type { expected })
    }
}

fn asks_for_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::String(text) => !matches!(text.as_str(), "" | "none" | "auto"),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

#[cfg(test)]
mod tests;
