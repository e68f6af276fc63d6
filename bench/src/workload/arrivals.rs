//! When the requests of an open loop arrive.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use super::{Source, Workload};

/// How arrivals are spread in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Exponential gaps.
    #[default]
    Poisson,
    /// The trace's gaps, stretched to the rate asked for: its bursts stay.
    Trace,
}

/// Arrivals of a Poisson process, as times from its start: exponential gaps of mean `1 / requests_per_s`.
pub struct Poisson {
    rng: StdRng,
    requests_per_s: f64,
    now_s: f64,
}

impl Poisson {
    /// The same seed and rate give the same arrivals.
    pub fn new(requests_per_s: f64, seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), requests_per_s, now_s: 0.0 }
    }
}

impl Iterator for Poisson {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        // 1 - u is in (0, 1], whose logarithm is finite.
        let u: f64 = self.rng.random();
        self.now_s += -(1.0 - u).ln() / self.requests_per_s;
        Duration::try_from_secs_f64(self.now_s).ok()
    }
}

/// Arrivals of a load point, as times from its start. Endless, up to the longest time there is.
pub type Arrivals<'a> = Box<dyn Iterator<Item = Duration> + Send + 'a>;

impl Workload {
    /// When the requests of load point `point` arrive, at a mean of `requests_per_s`.
    pub fn arrivals(&self, pattern: Pattern, requests_per_s: f64, point: u32) -> Arrivals<'_> {
        match (pattern, &self.source) {
            (Pattern::Trace, Source::Trace(trace)) => {
                let rows = &trace.requests;
                // The gap behind the last row is a mean one.
                let rows_s = rows.last().map_or(0.0, |last| last.at.as_secs_f64()).max(1e-9);
                let round_s = rows.len() as f64 / requests_per_s;
                let stretch = round_s * (rows.len() - 1).max(1) as f64 / rows.len() as f64 / rows_s;
                Box::new((0u64..).map_while(move |number| {
                    let (round, row) = (number / rows.len() as u64, (number % rows.len() as u64) as usize);
                    let at_s = round as f64 * round_s + rows[row].at.as_secs_f64() * stretch;
                    Duration::try_from_secs_f64(at_s).ok()
                }))
            }
            _ => Box::new(Poisson::new(requests_per_s, self.seed ^ u64::from(point))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 11;

    #[test]
    fn a_seed_gives_one_schedule() {
        let take = |seed| Poisson::new(5.0, seed).take(50).collect::<Vec<_>>();
        assert_eq!(take(SEED), take(SEED));
        assert_ne!(take(SEED), take(SEED + 1));
    }

    #[test]
    fn gaps_are_exponential_with_the_mean_asked_for() {
        let rate = 40.0;
        let arrivals: Vec<f64> = Poisson::new(rate, SEED).take(20_000).map(|at| at.as_secs_f64()).collect();
        let gaps: Vec<f64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| *gap >= 0.0), "time goes forward");
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((mean * rate - 1.0).abs() < 0.03, "mean gap {mean}, seed {SEED}");
        // Of an exponential distribution 1/e lies beyond the mean, and its deviation equals the mean.
        let beyond = gaps.iter().filter(|gap| **gap > mean).count() as f64 / gaps.len() as f64;
        assert!((beyond - (-1.0_f64).exp()).abs() < 0.02, "{beyond} beyond the mean, seed {SEED}");
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "deviation {}, seed {SEED}", variance.sqrt());
    }
}
