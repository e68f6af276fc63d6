//! What a load is made of: how long prompts and answers are, which prompts begin alike, and when requests arrive.
//!
//! One source for the load generator and the simulator. A request is named by its load point and its number there, and
//! everything about it follows from that name and the seed: two runs ask the same, and a load point meets nothing that
//! an earlier one has left in a prefix cache. Lengths are of one size, drawn from a published distribution, or read from
//! a trace; a trace with block hashes also says what prompts share.
//! Deliberately absent: clocks, sending, and text.

mod args;
mod arrivals;
mod lengths;
mod trace;

use std::ops::RangeInclusive;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

pub use args::Args;
pub use arrivals::{Arrivals, Pattern, Poisson};
pub use lengths::Published;
pub use trace::{Trace, TraceError, TraceRequest};

/// Below these ids tokenizers keep their special tokens.
pub const TOKEN_ID_MIN: u32 = 100;

/// Requests in a row that have the distribution of all.
const STRATA: u64 = 64;

/// Which request of a run this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    /// The load point; warm-up has one of its own.
    pub point: u32,
    /// Within the point. With several turns: the conversation.
    pub index: u32,
}

/// A stretch of a prompt. Equal keys give equal tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    key: [u64; 3],
    /// Its length.
    pub tokens: u32,
}

/// One request, or one turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What the client adds: the prompt of a first turn.
    pub input: Vec<Segment>,
    /// Tokens of the answer.
    pub output_tokens: u32,
}

impl Plan {
    /// Tokens that the client adds.
    pub fn input_tokens(&self) -> u32 {
        self.input.iter().map(|segment| segment.tokens).sum()
    }
}

/// Where lengths come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// All alike.
    Fixed {
        /// Tokens of a prompt.
        input_tokens: u32,
        /// Tokens of an answer.
        output_tokens: u32,
    },
    /// Drawn, prompt and answer independently: their rank correlation is below 0.08 in the traces it was taken from.
    Published(Published),
    /// In the file's order, from its beginning again behind its end.
    Trace(Trace),
}

/// What the lengths of a source are multiplied by, so that the longest fits the served model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scale {
    /// Prompts.
    pub input: f64,
    /// Answers.
    pub output: f64,
}

/// A load's requests.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Seed of lengths and tokens.
    pub seed: u64,
    /// Where lengths come from.
    pub source: Source,
    /// What they are multiplied by.
    pub scale: Scale,
    /// Turns of a conversation.
    pub turns: u32,
    /// Token ids of prompts.
    pub token_ids: RangeInclusive<u32>,
}

/// What a random stream is for: no two purposes share one.
#[derive(Clone, Copy)]
enum Purpose {
    Lengths = 1,
    Own = 2,
    Shared = 3,
}

impl Workload {
    /// Turn `turn` of conversation `id`; a plain request is turn 0.
    pub fn plan(&self, id: RequestId, turn: u32) -> Plan {
        let own = |tokens| Segment { key: key(Purpose::Own, id.point, id.index, turn.into()), tokens };
        match &self.source {
            Source::Fixed { input_tokens, output_tokens } => {
                Plan { input: vec![own(*input_tokens)], output_tokens: *output_tokens }
            }
            Source::Published(published) => {
                let number = u64::from(id.index) * u64::from(self.turns) + u64::from(turn);
                let [input, output] = [0, 1].map(|which| self.share(id.point, number, which));
                let input_tokens = scaled(published.input().at(input), self.scale.input);
                let output_tokens = scaled(published.output().at(output), self.scale.output);
                Plan { input: vec![own(input_tokens)], output_tokens }
            }
            Source::Trace(trace) => {
                // A conversation takes as many rows as it has turns.
                let number = u64::from(id.index) * u64::from(self.turns) + u64::from(turn);
                let rows = trace.requests.len() as u64;
                let row = &trace.requests[(number % rows) as usize];
                let input_tokens = scaled(row.input_tokens.into(), self.scale.input);
                let input = match (row.blocks.is_empty(), self.turns) {
                    (false, 1) => self.blocks(trace, row, input_tokens, id.point, number / rows),
                    // Later turns begin with what was said before: no room for a prefix of others.
                    _ => vec![own(input_tokens)],
                };
                Plan { input, output_tokens: scaled(row.output_tokens.into(), self.scale.output) }
            }
        }
    }

    /// The tokens of `segments`, one behind the other.
    pub fn tokens(&self, segments: &[Segment]) -> Vec<u32> {
        let mut tokens = Vec::with_capacity(segments.iter().map(|segment| segment.tokens as usize).sum());
        for segment in segments {
            let mut rng = self.rng(segment.key);
            tokens.extend((0..segment.tokens).map(|_| rng.random_range(self.token_ids.clone())));
        }
        tokens
    }

    /// A random stream of one turn for what is not tokens: the words of a text.
    pub fn text_rng(&self, id: RequestId, turn: u32) -> StdRng {
        self.rng(key(Purpose::Own, id.point, id.index, turn.into()))
    }

    /// The trace's blocks at their scaled bounds, so that equal hashes stay equal tokens at equal places. A trace that
    /// begins again shares nothing with its last round.
    fn blocks(
        &self,
        trace: &Trace,
        row: &TraceRequest,
        input_tokens: u32,
        point: u32,
        round: u64,
    ) -> Vec<Segment> {
        let bound = |block: usize| {
            let tokens = block as f64 * f64::from(trace.block_tokens) * self.scale.input;
            (tokens.round() as u32).min(input_tokens)
        };
        let last = row.blocks.len() - 1;
        let segments = row.blocks.iter().enumerate().map(|(block, &hash)| {
            let end = if block == last { input_tokens } else { bound(block + 1) };
            Segment { key: key(Purpose::Shared, point, round as u32, hash), tokens: end - bound(block) }
        });
        segments.filter(|segment| segment.tokens > 0).collect()
    }

    /// Where request `number` stands in a distribution, 0 to 1. Stratified: of [`STRATA`] requests in a row one falls into
    /// each part of equal probability, in random order. Drawn freely, tails as long as these would let the mean of a
    /// minute wander by more than what load points are compared for.
    fn share(&self, point: u32, number: u64, which: u64) -> f64 {
        let (round, place) = (number / STRATA, number % STRATA);
        let mut rng = self.rng(key(Purpose::Lengths, point, round as u32, which));
        let mut strata: [u64; STRATA as usize] = std::array::from_fn(|stratum| stratum as u64);
        for last in (1..strata.len()).rev() {
            strata.swap(last, rng.random_range(0..=last));
        }
        let within: f64 = rng.random();
        (strata[place as usize] as f64 + within) / STRATA as f64
    }

    fn rng(&self, key: [u64; 3]) -> StdRng {
        let mut seed = [0; 32];
        for (bytes, word) in seed.chunks_exact_mut(8).zip([self.seed].into_iter().chain(key)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        StdRng::from_seed(seed)
    }
}

fn key(purpose: Purpose, point: u32, index: u32, part: u64) -> [u64; 3] {
    [purpose as u64, (u64::from(point) << 32) | u64::from(index), part]
}

/// At least one token: nobody sends an empty prompt.
fn scaled(tokens: f64, by: f64) -> u32 {
    (tokens * by).round().clamp(1.0, f64::from(u32::MAX)) as u32
}

#[cfg(test)]
mod tests;
