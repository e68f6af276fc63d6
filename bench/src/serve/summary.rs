//! The statistics of a load point.
//!
//! TTFT: from the moment at which the request was due to the first chunk with output. ITL: each gap between two such
//! chunks. TPOT: a request's mean time per token after the first. Latency: to the end of the stream. Failed requests count
//! in no latency. Rates are of the answers that ended inside the measured window.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::conversation::Reuse;
use super::hops::{self, HopSummary, Timings};
use super::load::{Load, Measured};
use super::memory::ProcessMemory;
use super::timeline::{self, Slice};
use crate::client::Streamed;

/// What a user would still call good service. Without any goal there is no goodput.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Slo {
    /// TTFT at most.
    pub ttft_ms: Option<f64>,
    /// A request's mean time between tokens at most.
    pub itl_ms: Option<f64>,
}

/// A load point's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The load.
    pub load: Load,
    /// Time that rates are taken over.
    pub window_s: f64,
    /// Requests answered to their end.
    pub completed: u64,
    /// The others, by kind: `connect`, `timeout`, `http_429`, `cut_off`, …
    pub errors: BTreeMap<String, u64>,
    /// Requests due per second.
    pub offered_per_s: f64,
    /// Answers of 429, those to requests that were answered later included.
    pub refused: u64,
    /// Completed requests per second.
    pub requests_per_s: f64,
    /// Prompt tokens of completed requests per second.
    pub prompt_tokens_per_s: f64,
    /// Generated tokens of completed requests per second.
    pub output_tokens_per_s: f64,
    /// Of the prompt tokens of completed requests, those that the server says came out of a cache.
    pub cached_share: f64,
    /// Completed requests within the goal per second.
    pub goodput_per_s: Option<f64>,
    /// Time to the first token.
    pub ttft_ms: Option<Percentiles>,
    /// Gaps between chunks with output.
    pub itl_ms: Option<Percentiles>,
    /// Mean time per token after the first, one value per request.
    pub tpot_ms: Option<Percentiles>,
    /// Time to the end.
    pub latency_ms: Option<Percentiles>,
    /// The server's own account; empty where it gives none.
    pub hops: Vec<HopSummary>,
    /// Later turns: tokens that a prefix cache could find, and found.
    pub reuse: Option<Reuse>,
    /// The load point in slices of equal length.
    pub timeline: Vec<Slice>,
    /// The server's processes, where they were named.
    pub memory: Vec<ProcessMemory>,
}

/// A distribution in a few numbers, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

/// Times, to three significant digits, from 1 µs to an hour; what lies beyond counts as the bound.
pub struct Distribution(Histogram<u64>);

impl Summary {
    /// Summarises what was measured under `load`.
    pub fn of(load: Load, measured: &Measured, slo: &Slo) -> Self {
        let mut errors = BTreeMap::new();
        let [mut ttft, mut itl, mut tpot, mut latency] = std::array::from_fn(|_| Distribution::new());
        let (mut completed, mut refused, mut inside) = (0_u64, 0_u64, Inside::default());
        let mut timings = Vec::new();
        let mut offered = 0_u64;
        let mut reuse: Option<Reuse> = None;
        for outcome in &measured.outcomes {
            refused += u64::from(outcome.refused);
            offered += u64::from(measured.window.contains(&outcome.due));
            if let Some(turn) = outcome.reuse {
                reuse.get_or_insert_default().add(turn);
            }
            let answer = match &outcome.answer {
                Ok(answer) => answer,
                Err(kind) => {
                    *errors.entry(kind.to_string()).or_default() += 1;
                    continue;
                }
            };
            completed += 1;
            latency.record(answer.total);
            if let Some(first) = answer.ttft {
                ttft.record(first);
            }
            for pair in answer.arrivals.windows(2) {
                itl.record(pair[1].saturating_sub(pair[0]));
            }
            if let Some(per_token) = time_per_output_token(answer) {
                tpot.record(per_token);
            }
            if measured.window.contains(&outcome.ended) {
                inside.add(answer, slo);
            }
            timings.extend(answer.timings.as_ref().and_then(Timings::read).map(|t| (t, answer.ttft)));
        }
        let window_s = measured.window.end.saturating_duration_since(measured.window.start);
        let window_s = window_s.as_secs_f64().max(1e-9);
        let per_s = |count: u64| count as f64 / window_s;
        Self {
            load,
            window_s,
            completed,
            errors,
            offered_per_s: per_s(offered),
            refused,
            requests_per_s: per_s(inside.completed),
            prompt_tokens_per_s: per_s(inside.prompt_tokens),
            output_tokens_per_s: per_s(inside.output_tokens),
            cached_share: inside.cached_tokens as f64 / inside.prompt_tokens.max(1) as f64,
            goodput_per_s: slo.is_set().then(|| per_s(inside.good)),
            ttft_ms: ttft.percentiles(),
            itl_ms: itl.percentiles(),
            tpot_ms: tpot.percentiles(),
            latency_ms: latency.percentiles(),
            hops: hops::summarise(&timings),
            reuse,
            timeline: timeline::slices(measured, slo),
            memory: Vec::new(),
        }
    }

    /// Requests per second within the goal; without a goal, those completed.
    pub fn goodput(&self) -> f64 {
        self.goodput_per_s.unwrap_or(self.requests_per_s)
    }

    /// Requests without a whole answer.
    pub fn failed(&self) -> u64 {
        self.errors.values().sum()
    }
}

/// What ended inside the window.
#[derive(Default)]
struct Inside {
    completed: u64,
    good: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
}

impl Inside {
    fn add(&mut self, answer: &Streamed, slo: &Slo) {
        self.completed += 1;
        self.good += u64::from(slo.met_by(answer));
        self.output_tokens += generated(answer);
        self.prompt_tokens += answer.usage.as_ref().and_then(|u| u["prompt_tokens"].as_u64()).unwrap_or(0);
        self.cached_tokens += answer.cached_tokens();
    }
}

/// Tokens generated: as the server counted them, else one per chunk.
fn generated(answer: &Streamed) -> u64 {
    answer.completion_tokens().unwrap_or(answer.arrivals.len() as u64)
}

fn time_per_output_token(answer: &Streamed) -> Option<Duration> {
    let after_first = u32::try_from(generated(answer)).ok()?.checked_sub(1).filter(|tokens| *tokens > 0)?;
    Some(answer.arrivals.last()?.saturating_sub(answer.ttft?) / after_first)
}

impl Slo {
    fn is_set(&self) -> bool {
        self.ttft_ms.is_some() || self.itl_ms.is_some()
    }

    /// An answer without a first token meets no TTFT; an answer of one token has no time between tokens to miss.
    pub fn met_by(&self, answer: &Streamed) -> bool {
        let within = |time: Duration, goal_ms: f64| time.as_secs_f64() * 1e3 <= goal_ms;
        let ttft_met = self.ttft_ms.is_none_or(|goal| answer.ttft.is_some_and(|time| within(time, goal)));
        let per_token = time_per_output_token(answer);
        let itl_met = self.itl_ms.is_none_or(|goal| per_token.is_none_or(|time| within(time, goal)));
        ttft_met && itl_met
    }
}

impl Distribution {
    /// Without any value.
    pub fn new() -> Self {
        let hour_us = 3_600_000_000;
        Self(Histogram::new_with_bounds(1, hour_us, 3).expect("constant bounds that hdrhistogram allows"))
    }

    /// Adds a time.
    pub fn record(&mut self, time: Duration) {
        self.record_us(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// Adds a time given in microseconds.
    pub fn record_us(&mut self, time_us: u64) {
        self.0.saturating_record(time_us);
    }

    /// `None` without values.
    pub fn percentiles(&self) -> Option<Percentiles> {
        let ms = |us: u64| us as f64 / 1e3;
        let at = |quantile| ms(self.0.value_at_quantile(quantile));
        (!self.0.is_empty()).then(|| Percentiles {
            mean: self.0.mean() / 1e3,
            p50: at(0.50),
            p90: at(0.90),
            p95: at(0.95),
            p99: at(0.99),
            max: ms(self.0.max()),
        })
    }
}

impl Default for Distribution {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
