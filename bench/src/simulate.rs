//! `trireme bench simulate`: the workers' own schedulers under load, without models, machines or time.
//!
//! A discrete-event simulation: [`prefill::scheduler::Scheduler`] and [`decode::scheduler::Scheduler`] are the ones that
//! workers run, and are told what workers would tell them; what a step takes is a formula. So ten minutes of overload are
//! seconds, the same seed gives the same run, and what is claimed of the schedulers is counted, not sampled: no running
//! sequence ends but by its own rule, no queue exceeds its bound.
//! Not simulated: faults, slow readers, and the network between router and workers.

mod decode_worker;
mod door;
mod prefill_worker;
mod report;
mod request;
mod step_time;
mod world;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use serde::Serialize;

use crate::json_file::JsonFile;
use crate::peak::{PeakSearch, Probe};
use crate::serve::args::positive;
use crate::serve::load::Load;
use crate::serve::summary::{Slo, Summary};
use crate::workload;
use router::PrefillOnDecode;
pub use step_time::{HandoffTime, StepTime};
pub use world::{Counts, Shape, World};

/// The ramp's first rate: at fewer requests a second chance weighs more than load.
const RAMP_FROM: f64 = 4.0;
/// Simulated seconds of each of its rates: long enough for a queue to show that it grows.
const RAMP_S_MAX: f64 = 120.0;

/// Flags of `trireme bench simulate`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Mean requests per second, one load point each; with --turns: conversations.
    #[arg(long, value_delimiter = ',', value_parser = positive)]
    pub rate: Vec<f64>,
    /// Percent of the peak, one load point each. The peak is the goodput at the rate that a ramp
    /// finds before them, over --duration-s.
    #[arg(long, value_delimiter = ',', value_parser = positive, default_value = "100,200", conflicts_with = "rate")]
    pub load: Vec<f64>,
    /// Simulated seconds in which requests arrive; those that run then are let to end. Rates are those of this time
    /// without its first tenth.
    #[arg(long, value_parser = positive, default_value_t = 600.0)]
    pub duration_s: f64,
    /// What is asked.
    #[command(flatten)]
    pub workload: workload::Args,
    /// The `max_tokens` that requests state, while answers end at their own lengths. Default: the answer's length.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub declare_max_tokens: Option<u32>,
    /// Prefill workers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub prefill: u16,
    /// Decode workers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub decode: u16,
    /// KV blocks of 64 tokens in each worker's pool.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub kv_blocks_max: u32,
    /// Sequences in a decode step.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub batch_max: u16,
    /// Sequences that the router lets in at once.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub sequences_max: u32,
    /// Requests that wait at the router.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(0..=1 << 20))]
    pub queue_max: u32,
    /// The router's objective, milliseconds to the first token: requests that cannot be expected to meet it get 429.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub ttft_ms_max: u64,
    /// A prefill step: microseconds of its own, of each token, and nanoseconds of each pair of token and context token.
    #[arg(long, default_value = "1500,230,10", value_name = "STEP,ROW,CONTEXT")]
    pub prefill_step: StepTime,
    /// A decode step, likewise.
    #[arg(long, default_value = "1500,350,20", value_name = "STEP,ROW,CONTEXT")]
    pub decode_step: StepTime,
    /// A hand-off: microseconds of its own, and of each block.
    #[arg(long, default_value = "800,30", value_name = "HANDOFF,BLOCK")]
    pub handoff: HandoffTime,
    /// Which prompts decode computes itself: auto, never or always.
    #[arg(long, default_value = "auto")]
    pub prefill_on_decode: PrefillOnDecode,
    /// Goodput counts requests with a TTFT of at most this.
    #[arg(long, value_parser = positive)]
    pub slo_ttft_ms: Option<f64>,
    /// Goodput counts requests whose mean time between tokens is at most this.
    #[arg(long, value_parser = positive)]
    pub slo_itl_ms: Option<f64>,
    /// Check the schedulers' invariants after so many events; 0: never.
    #[arg(long, default_value_t = 1000)]
    pub check_every: u64,
    /// Write everything measured here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What `--json` writes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was simulated.
    pub shape: Shape,
    /// What lengths were multiplied by.
    pub scale: workload::Scale,
    /// The goal behind goodput.
    pub slo: Slo,
    /// Where there was a ramp.
    pub peak: Option<Peak>,
    /// One per load point, in the order given.
    pub points: Vec<Point>,
}

/// The peak.
#[derive(Debug, Serialize)]
pub struct Peak {
    /// How it was found.
    pub search: PeakSearch,
    /// Goodput at its rate, over a load point's whole duration.
    pub goodput: f64,
}

/// A load point.
#[derive(Debug, Serialize)]
pub struct Point {
    /// As a load generator would have seen it.
    #[serde(flatten)]
    pub summary: Summary,
    /// As only a simulator sees it.
    pub counts: Counts,
}

/// Simulates every load point, prints the tables and writes the JSON file.
///
/// # Errors
/// Flags that do not fit together, or a file that cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let json = JsonFile::create(args.json.as_deref())?;
    let report = simulate(args)?;
    print!("{}", report::render(&report));
    if let Some(file) = json {
        file.write(&report)?;
    }
    Ok(())
}

/// Simulates every load point.
///
/// # Errors
/// Flags that do not fit together.
pub fn simulate(args: &Args) -> anyhow::Result<Report> {
    let workload = args.workload.workload()?;
    let shape = args.shape();
    let slo = Slo { ttft_ms: args.slo_ttft_ms, itl_ms: args.slo_itl_ms };
    let mut points = 0;
    let mut point = |requests_per_s: f64, seconds: f64| {
        let mut world = World::new(&shape, &workload, points);
        points += 1;
        let arrivals = workload.arrivals(args.workload.arrivals, requests_per_s, points);
        let measured = world.run(arrivals, Duration::from_secs_f64(seconds), args.check_every);
        let summary = Summary::of(Load::Open { requests_per_s }, &measured, &slo);
        Point { summary, counts: world.counts() }
    };
    let (mut rates, mut peak) = (args.rate.clone(), None);
    if rates.is_empty() {
        let mut search = PeakSearch::new(RAMP_FROM);
        while let Some(rate) = search.next_rate() {
            let found = point(rate, args.duration_s.min(RAMP_S_MAX)).summary;
            search.record(Probe { rate, offered: found.offered_per_s, goodput: found.goodput() });
        }
        ensure!(search.peak() > 0.0, "no rate gives any goodput: nothing to take a share of");
        let at_peak = point(search.rate(), args.duration_s).summary.goodput();
        rates = args.load.iter().map(|percent| at_peak * percent / 100.0).collect();
        peak = Some(Peak { search, goodput: at_peak });
    }
    let points = rates.into_iter().map(|rate| point(rate, args.duration_s)).collect();
    Ok(Report { scale: workload.scale, shape, slo, peak, points })
}

impl Args {
    fn shape(&self) -> Shape {
        Shape {
            prefill_workers: self.prefill.into(),
            decode_workers: self.decode.into(),
            kv_blocks: self.kv_blocks_max as usize,
            batch_max: self.batch_max.into(),
            declare_max_tokens: self.declare_max_tokens,
            sequences_max: self.sequences_max as usize,
            queue_max: self.queue_max as usize,
            ttft_ms_max: self.ttft_ms_max,
            prefill_step: self.prefill_step,
            decode_step: self.decode_step,
            handoff: self.handoff,
            prefill_on_decode: self.prefill_on_decode,
        }
    }
}

#[cfg(test)]
mod tests;
