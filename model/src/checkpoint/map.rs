//! Mapping a weights file into memory. The one file of this crate with `unsafe` in it.

#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::ModelError;

/// Maps `file` read-only. Slices of the result share the mapping, which lives until the last of them is dropped.
pub(super) fn map(file: &Path) -> Result<Bytes, ModelError> {
    let io = |source| ModelError::Io { file: file.to_owned(), source };
    let handle = File::open(file).map_err(io)?;
    // SAFETY: the mapping is private to this process, read-only and owned by the `Bytes` that every slice keeps
    // alive, so no slice outlives it. What Rust cannot rule out is another process changing or truncating the file
    // under us; as with every program that maps weights, a checkpoint in use must not be edited in place (replace the
    // directory instead). The bytes are only ever read as plain numbers, for which every bit pattern is valid.
    let mapping = unsafe { Mmap::map(&handle) }.map_err(io)?;
    Ok(Bytes::from_owner(mapping))
}
