//! Where a step's time goes: a clock read at the end of each of its parts.

use std::time::{Duration, Instant};

use engine::{Stage, StepObserver};

use super::StageTime;
use super::traffic::Traffic;

/// The parts of a step, and what surrounds it.
const NAMES: usize = Stage::ALL.len() + 1;
/// Sampling and everything else between two steps.
const SAMPLING: usize = Stage::ALL.len();

/// Time by part. Its clock runs from [`Self::start`] on.
pub(super) struct Times {
    last: Instant,
    spent: [Duration; NAMES],
}

impl Times {
    /// Starts the clock.
    pub fn start() -> Self {
        Self { last: Instant::now(), spent: [Duration::ZERO; NAMES] }
    }

    /// What was spent since the last part ended went into sampling.
    pub fn sampled(&mut self) {
        self.ended(SAMPLING);
    }

    /// All of it.
    pub fn seconds(&self) -> f64 {
        self.spent.iter().sum::<Duration>().as_secs_f64()
    }

    fn ended(&mut self, part: usize) {
        let now = Instant::now();
        self.spent[part] += now - self.last;
        self.last = now;
    }
}

/// Watches a step: times of its parts, and which experts it read.
pub(super) struct Watch<'a> {
    pub times: &'a mut Times,
    pub traffic: &'a mut Traffic,
}

impl StepObserver for Watch<'_> {
    fn routed(&mut self, layer: usize, ids: &[u16], _: &[f32]) {
        self.traffic.routed(layer, ids);
    }

    fn stage(&mut self, ended: Stage) {
        self.times.ended(Stage::ALL.iter().position(|&stage| stage == ended).unwrap_or(SAMPLING));
    }
}

/// Names of the parts, in the order of [`mean`].
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    Stage::ALL.into_iter().map(Stage::name).chain(["sampling"])
}

/// The sum of several times over `count`.
pub(super) fn mean<'a>(times: impl Iterator<Item = &'a Times>, count: f64) -> Vec<StageTime> {
    let mut sums = [0.0; NAMES];
    for times in times {
        for (sum, spent) in sums.iter_mut().zip(&times.spent) {
            *sum += spent.as_secs_f64() * 1e6;
        }
    }
    names().zip(sums).map(|(stage, sum)| StageTime { stage, us: sum / count }).collect()
}
