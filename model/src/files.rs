//! Reading the small files of a model directory, each with a bound.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::error::{ConfigError, ModelError};

/// Reads a whole text file of at most `bytes_max` bytes; `None` when there is none.
pub(crate) fn read_if_present(file: &Path, bytes_max: u64) -> Result<Option<String>, ModelError> {
    let io = |source| ModelError::Io { file: file.to_owned(), source };
    let handle = match File::open(file) {
        Ok(handle) => handle,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    let bytes = handle.metadata().map_err(io)?.len();
    if bytes > bytes_max {
        return Err(ModelError::TooLarge { file: file.to_owned(), bytes, bytes_max });
    }
    let mut text = String::with_capacity(bytes as usize);
    // The size was asked a moment ago and the file may have grown since: the bound holds for what is read.
    handle.take(bytes_max).read_to_string(&mut text).map_err(io)?;
    Ok(Some(text))
}

/// As [`read_if_present`], where absence is an error.
pub(crate) fn read(file: &Path, bytes_max: u64) -> Result<String, ModelError> {
    read_if_present(file, bytes_max)?.ok_or_else(|| ModelError::Io {
        file: file.to_owned(),
        source: std::io::Error::from(ErrorKind::NotFound),
    })
}

/// Puts the file's name to a field's error.
pub(crate) fn in_file(file: &Path) -> impl FnOnce(ConfigError) -> ModelError + '_ {
    move |source| match source {
        ConfigError::Json(source) => ModelError::Json { file: file.to_owned(), source },
        source => ModelError::Config { file: file.to_owned(), source },
    }
}
