//! The file that a measurement's report goes to, besides the terminal.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

/// A file that is open and empty.
pub(crate) struct JsonFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl JsonFile {
    /// Opened before anything is measured: minutes of measuring must not end at a mistyped path. `None` without a path.
    ///
    /// # Errors
    /// The file cannot be created.
    pub(crate) fn create(path: Option<&Path>) -> anyhow::Result<Option<Self>> {
        path.map(|path| {
            let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
            Ok(Self { path: path.to_owned(), file: BufWriter::new(file) })
        })
        .transpose()
    }

    /// Writes the report.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn write(mut self, report: &impl Serialize) -> anyhow::Result<()> {
        serde_json::to_writer_pretty(&mut self.file, report)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(self.file.flush()?))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}
