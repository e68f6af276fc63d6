//! Request traces in the two published formats.
//!
//! Azure's CSV: `TIMESTAMP,ContextTokens,GeneratedTokens`, the first `2023-11-16 18:17:03.9799600`. Mooncake's JSON lines:
//! `{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2354]}`, milliseconds and one id
//! per 512-token block; equal ids are equal blocks with equal blocks before them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

/// Tokens behind one of Mooncake's hash ids.
const MOONCAKE_BLOCK_TOKENS: u32 = 512;
/// A longer trace is refused rather than held in memory.
const REQUESTS_MAX: usize = 2_000_000;

/// A request of the trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceRequest {
    /// From the first request on.
    pub at: Duration,
    /// Tokens of the prompt.
    pub input_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
    /// The prompt's blocks; empty where the trace does not tell.
    pub blocks: Vec<u64>,
}

/// A trace, never empty, in order of time.
#[derive(Debug, Clone)]
pub struct Trace {
    /// The requests.
    pub requests: Vec<TraceRequest>,
    /// Tokens of a block.
    pub block_tokens: u32,
}

/// Why a file is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It cannot be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// A line is none of the format's.
    #[error("line {line}: {problem}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// No request in it.
    #[error("the trace is empty")]
    Empty,
    /// More requests than are held in memory.
    #[error("the trace has more than {REQUESTS_MAX} requests")]
    TooLong,
}

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

impl Trace {
    /// Reads a file: JSON lines where its first character opens an object, CSV otherwise.
    ///
    /// # Errors
    /// Names the first line that cannot be used.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        Self::parse(BufReader::new(File::open(path)?))
    }

    /// As [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(lines: impl BufRead) -> Result<Self, TraceError> {
        let mut requests = Vec::new();
        for (number, line) in lines.lines().enumerate() {
            let line = line?;
            let line = line.trim().trim_start_matches('\u{feff}');
            if line.is_empty() || (number == 0 && line.starts_with("TIMESTAMP")) {
                continue;
            }
            if requests.len() == REQUESTS_MAX {
                return Err(TraceError::TooLong);
            }
            let request = if line.starts_with('{') { mooncake(line) } else { azure(line) };
            requests.push(request.map_err(|problem| TraceError::Line { line: number + 1, problem })?);
        }
        requests.sort_by_key(|request| request.at);
        let first = requests.first().ok_or(TraceError::Empty)?.at;
        for request in &mut requests {
            request.at -= first;
        }
        spread(&mut requests);
        Ok(Self { requests, block_tokens: MOONCAKE_BLOCK_TOKENS })
    }

    /// The longest prompt and the longest answer.
    pub fn longest(&self) -> (u32, u32) {
        self.requests.iter().fold((1, 1), |(input, output), request| {
            (input.max(request.input_tokens), output.max(request.output_tokens))
        })
    }
}

/// Mooncake's clock ticks every three seconds: the requests of a tick are spread evenly up to the next.
fn spread(requests: &mut [TraceRequest]) {
    let mut start = 0;
    while start < requests.len() {
        let at = requests[start].at;
        let end = start + requests[start..].iter().take_while(|request| request.at == at).count();
        if let Some(next) = requests.get(end).map(|request| request.at) {
            let step = (next - at) / (end - start) as u32;
            for (place, request) in (0u32..).zip(&mut requests[start..end]) {
                request.at += step * place;
            }
        }
        start = end;
    }
}

fn mooncake(line: &str) -> Result<TraceRequest, String> {
    let line: MooncakeLine = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let blocks = line.input_length.div_ceil(MOONCAKE_BLOCK_TOKENS) as usize;
    if !line.hash_ids.is_empty() && line.hash_ids.len() != blocks {
        return Err(format!("{} hash_ids for {} tokens", line.hash_ids.len(), line.input_length));
    }
    Ok(TraceRequest {
        at: Duration::from_millis(line.timestamp),
        input_tokens: line.input_length,
        output_tokens: line.output_length,
        blocks: line.hash_ids,
    })
}

fn azure(line: &str) -> Result<TraceRequest, String> {
    let mut fields = line.split(',');
    let mut field = |name: &str| fields.next().ok_or_else(|| format!("{name} is missing"));
    let at = timestamp(field("TIMESTAMP")?).ok_or("TIMESTAMP is no time like 2023-11-16 18:17:03.9799600")?;
    let mut tokens =
        |name: &str| field(name)?.trim().parse::<u32>().map_err(|_| format!("{name} is no number of tokens"));
    let (input_tokens, output_tokens) = (tokens("ContextTokens")?, tokens("GeneratedTokens")?);
    Ok(TraceRequest { at, input_tokens, output_tokens, blocks: Vec::new() })
}

/// Since the first day of the month: a trace of hours does not leave its month.
fn timestamp(text: &str) -> Option<Duration> {
    let (date, time) = text.trim().split_once(' ')?;
    let day: u64 = date.rsplit('-').next()?.parse().ok()?;
    let mut parts = time.trim_end_matches("+00:00").splitn(3, ':');
    let (hours, minutes): (u64, u64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let seconds = Duration::try_from_secs_f64(parts.next()?.parse().ok()?).ok()?;
    (day <= 31 && hours < 24 && minutes < 60)
        .then(|| Duration::from_secs(((day * 24 + hours) * 60 + minutes) * 60) + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Trace, String> {
        Trace::parse(text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn both_formats_are_read() {
        let azure = parse(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:59.5000000,4808,10\n\
             2023-11-16 18:18:00.7500000,110,27\n",
        )
        .expect("a trace");
        let seen: Vec<_> =
            azure.requests.iter().map(|r| (r.at.as_millis(), r.input_tokens, r.output_tokens)).collect();
        assert_eq!(seen, [(0, 4808, 10), (1250, 110, 27)]);
        let mooncake = parse(
            "{\"timestamp\": 3000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 7]}\n\
             {\"timestamp\": 3000, \"input_length\": 1, \"output_length\": 6, \"hash_ids\": [0]}\n\
             {\"timestamp\": 6000, \"input_length\": 2, \"output_length\": 7, \"hash_ids\": [1]}\n",
        )
        .expect("a trace");
        let seen: Vec<_> =
            mooncake.requests.iter().map(|r| (r.at.as_millis(), r.blocks.clone(), r.output_tokens)).collect();
        assert_eq!(seen, [(0, vec![0, 7], 5), (1500, vec![0], 6), (3000, vec![1], 7)], "a tick is spread");
        assert_eq!(mooncake.longest(), (600, 7));
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        for (text, expected) in [
            ("", "the trace is empty"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "the trace is empty"),
            ("2023-11-16 18:17:59.5,12\n", "line 1: GeneratedTokens is missing"),
            ("2023-11-16 18:17:59.5,-3,4\n", "line 1: ContextTokens is no number of tokens"),
            ("yesterday,3,4\n", "line 1: TIMESTAMP is no time like 2023-11-16 18:17:03.9799600"),
            (
                "{\"timestamp\": 1, \"input_length\": 513, \"output_length\": 5, \"hash_ids\": [0]}",
                "line 1: 1 hash_ids for 513 tokens",
            ),
        ] {
            assert_eq!(parse(text).err().as_deref(), Some(expected), "{text}");
        }
        assert!(parse("{\"timestamp\": -1}").is_err());
    }
}
