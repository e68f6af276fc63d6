//! From calls to a figure.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::machine::{Arithmetic, Machine};

/// Calls of a figure at least, however long they take.
const CALLS_MIN: usize = 3;
/// Calls of a figure at most: their times are kept.
const CALLS_MAX: usize = 100_000;

/// How much is spent on a figure.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Time for its calls.
    pub time: Duration,
    /// Bytes of weights or cache rows that the calls walk over.
    pub weight_bytes: usize,
}

/// What an operator has to move and to compute in a call.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Bytes read and written once.
    pub bytes: f64,
    /// Operations, a multiply-add being two; 0 where counting them says nothing.
    pub operations: f64,
    /// What they are made of.
    pub arithmetic: Arithmetic,
    /// Whether the bytes come from memory; what fits a cache has no ceiling that was measured.
    pub from_memory: bool,
}

/// What holds an operator back on a perfect machine of these ceilings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Its bytes.
    Memory,
    /// Its operations.
    Compute,
    /// Neither was measured: small, and in a cache.
    Cache,
}

impl Bound {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Compute => "compute",
            Self::Cache => "cache",
        }
    }
}

/// One operator at one shape.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// The operator.
    pub operator: &'static str,
    /// Which of its shapes.
    pub shape: String,
    /// Tokens.
    pub rows: usize,
    /// Calls measured.
    pub calls: usize,
    /// Microseconds of the fastest call.
    pub best_us: f64,
    /// Microseconds of the middle call.
    pub median_us: f64,
    /// Bytes of a call over its time.
    pub gb_per_s: f64,
    /// Operations of a call over its time, in billions.
    pub gflop_per_s: Option<f64>,
    /// What holds it back at best.
    pub bound: Bound,
    /// The time that the bound allows over the time that it took.
    pub share: Option<f64>,
    /// What a call had to do.
    #[serde(skip)]
    work: Work,
}

/// Times of calls, ascending. Each call is told its number.
pub fn times(effort: Effort, mut call: impl FnMut(usize)) -> Vec<Duration> {
    call(0);
    let end = Instant::now() + effort.time;
    let mut times = Vec::new();
    while times.len() < CALLS_MIN || (Instant::now() < end && times.len() < CALLS_MAX) {
        let number = times.len() + 1;
        let begin = Instant::now();
        call(number);
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    times
}

impl Figure {
    /// The figure of calls that took `times`; its share is not known yet.
    pub fn new(operator: &'static str, shape: String, rows: usize, work: Work, times: &[Duration]) -> Self {
        let seconds = |index: usize| times.get(index).map_or(f64::NAN, Duration::as_secs_f64).max(1e-9);
        let best = seconds(0);
        Self {
            operator,
            shape,
            rows,
            calls: times.len(),
            best_us: best * 1e6,
            median_us: seconds(times.len() / 2) * 1e6,
            gb_per_s: work.bytes / best / 1e9,
            gflop_per_s: (work.operations > 0.0).then_some(work.operations / best / 1e9),
            bound: Bound::Cache,
            share: None,
            work,
        }
    }

    /// Holds the figure against what the machine gives.
    pub fn judge(&mut self, machine: &Machine) {
        let work = self.work;
        let compute = work.operations / (machine.peak(work.arithmetic) * 1e9);
        let memory = if work.from_memory { work.bytes / (machine.read_gb_per_s * 1e9) } else { 0.0 };
        // What is neither from memory nor arithmetic has no ceiling here.
        let (bound, floor) = match memory >= compute {
            true if memory > 0.0 => (Bound::Memory, Some(memory)),
            true => (Bound::Cache, None),
            false => (Bound::Compute, Some(compute)),
        };
        self.bound = bound;
        self.share = floor.map(|floor| floor / (self.best_us * 1e-6));
    }
}
