//! The safetensors header: eight bytes of length, then JSON with each tensor's dtype, shape and byte range.
//!
//! Parsed here and not by the `safetensors` crate because its errors name neither file nor tensor. Invariant of what
//! comes out: every range lies within the file, matches its shape and dtype, and shares no byte with another.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::Dtype;
use crate::error::{HeaderError, TensorError};

/// The format's own bound on the header.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Weights have at most two dimensions; eight leaves room for tensors that we never read.
const DIMENSIONS_MAX: usize = 8;
const PREFIX_BYTES: u64 = 8;

/// A tensor as its file describes it.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes within the file.
    pub range: Range<usize>,
}

/// What is wrong with a file: with its header as a whole, or with one tensor.
#[derive(Debug)]
pub(super) enum Problem {
    Header(HeaderError),
    Tensor { name: String, error: TensorError },
}

impl From<HeaderError> for Problem {
    fn from(error: HeaderError) -> Self {
        Self::Header(error)
    }
}

/// Parses and checks the header of a whole mapped file. Entries come in the order of their bytes.
pub(super) fn parse(file: &[u8]) -> Result<Vec<Entry>, Problem> {
    let bytes = file.len() as u64;
    let truncated = |needed| HeaderError::Truncated { needed, bytes };
    let (prefix, _) = file.split_first_chunk::<8>().ok_or_else(|| truncated(PREFIX_BYTES))?;
    let header_bytes = u64::from_le_bytes(*prefix);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(HeaderError::TooLarge { bytes: header_bytes, bytes_max: HEADER_BYTES_MAX }.into());
    }
    let data_begin = PREFIX_BYTES + header_bytes;
    // Within usize: at most HEADER_BYTES_MAX + 8.
    let header = file.get(PREFIX_BYTES as usize..data_begin as usize).ok_or_else(|| truncated(data_begin))?;
    let Header(mut described) = serde_json::from_slice(header).map_err(HeaderError::Json)?;

    let data_bytes = bytes - data_begin;
    described.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut entries: Vec<Entry> = Vec::with_capacity(described.len());
    let mut end_before = 0;
    for (name, tensor) in described {
        match tensor.check(end_before, data_bytes) {
            Ok((dtype, shape)) => {
                let [begin, end] = tensor.data_offsets;
                end_before = end;
                // Within usize: both ends lie within the mapped file.
                let range = (data_begin + begin) as usize..(data_begin + end) as usize;
                entries.push(Entry { name, dtype, shape, range });
            }
            Err(Fault::Own(error)) => return Err(Problem::Tensor { name, error }),
            Err(Fault::OverlapsPrevious) => {
                let other = entries.pop().map(|e| e.name).unwrap_or_default();
                return Err(Problem::Tensor { name, error: TensorError::Overlap { other } });
            }
        }
    }
    if end_before < data_bytes {
        return Err(HeaderError::TrailingBytes { bytes: data_bytes - end_before }.into());
    }
    match duplicate(&entries) {
        Some(name) => Err(Problem::Tensor { name, error: TensorError::Duplicate }),
        None => Ok(entries),
    }
}

/// One tensor's description as it stands in the header.
#[derive(Deserialize)]
struct Described {
    dtype: String,
    shape: Vec<u64>,
    /// Begin and end within the data.
    data_offsets: [u64; 2],
}

enum Fault {
    Own(TensorError),
    OverlapsPrevious,
}

impl From<TensorError> for Fault {
    fn from(error: TensorError) -> Self {
        Self::Own(error)
    }
}

impl Described {
    /// Checks this tensor against the end of the one before it and the end of the file.
    fn check(&self, end_before: u64, data_bytes: u64) -> Result<(Dtype, Vec<usize>), Fault> {
        let [begin, end] = self.data_offsets;
        let dtype = Dtype::from_safetensors(&self.dtype)
            .ok_or_else(|| TensorError::UnsupportedDtype { found: self.dtype.chars().take(32).collect() })?;
        if begin > end {
            return Err(TensorError::InvertedRange { begin, end }.into());
        }
        if end > data_bytes {
            return Err(TensorError::Truncated { end, bytes: data_bytes }.into());
        }
        let impossible = || TensorError::ImpossibleShape {
            found: self.shape.iter().copied().take(DIMENSIONS_MAX).collect(),
        };
        if self.shape.len() > DIMENSIONS_MAX {
            return Err(impossible().into());
        }
        let expected = self
            .shape
            .iter()
            .try_fold(dtype.bytes() as u64, |product, n| product.checked_mul(*n))
            .ok_or_else(impossible)?;
        if expected != end - begin {
            return Err(TensorError::WrongLength { found: end - begin, expected }.into());
        }
        if begin < end_before {
            return Err(Fault::OverlapsPrevious);
        }
        if begin > end_before {
            return Err(TensorError::Hole { bytes: begin - end_before }.into());
        }
        let shape: Result<_, _> = self.shape.iter().map(|n| usize::try_from(*n)).collect();
        Ok((dtype, shape.map_err(|_| impossible())?))
    }
}

/// The header as a list, so that a name given twice is seen instead of the last one winning.
struct Header(Vec<(String, Described)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

fn duplicate(entries: &[Entry]) -> Option<String> {
    let mut names: Vec<_> = entries.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0].to_owned())
}

#[cfg(test)]
mod tests;
