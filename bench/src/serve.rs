//! `trireme bench serve`: a load generator for OpenAI-compatible servers.
//!
//! Closed loop: a number of clients that each wait for their answer before they ask again. Open loop: requests arrive
//! whatever the server does, which is how users behave and what shows a queue growing; at a rate, or at a share of the
//! peak that a ramp has found. What is asked is [`crate::workload`]'s. Every load point is bounded in requests and in time.

pub mod args;
pub mod conversation;
pub mod hops;
pub mod load;
pub mod memory;
pub mod request;
pub mod summary;
pub(crate) mod table;
pub mod timeline;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::Serialize;

use crate::client::Client;
use crate::json_file::JsonFile;
use crate::peak::{PeakSearch, Probe};
use crate::workload::{Scale, Source};
use load::{Bounds, Extent, Load, Target};
use memory::Sampler;
use request::RequestShape;
use summary::{Slo, Summary};

pub use args::Args;

/// What `--json` writes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The server measured.
    pub url: String,
    /// Its model.
    pub model: String,
    /// What was asked of it, in words.
    pub asked: String,
    /// What the lengths of a distribution or trace were multiplied by.
    pub scale: Scale,
    /// The form of the requests.
    pub request: RequestShape,
    /// The goal behind goodput.
    pub slo: Slo,
    /// The ramp, where there was one.
    pub peak: Option<PeakSearch>,
    /// One per load point, in the order given.
    pub points: Vec<Summary>,
}

/// Measures every load point, prints the tables and writes the JSON file.
///
/// # Errors
/// As [`measure`], a file that cannot be written, or a run without a single answer.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    let json = JsonFile::create(args.json.as_deref())?;
    let report = measure(args).await?;
    print!("{}", table::render(&report));
    if let Some(file) = json {
        file.write(&report)?;
    }
    ensure!(report.points.iter().any(|point| point.completed > 0), "no request was answered");
    Ok(())
}

/// Measures every load point.
///
/// # Errors
/// The server cannot be reached or fails a warm-up request.
pub async fn measure(args: &Args) -> anyhow::Result<Report> {
    let workload = args.workload.workload()?;
    let api_key = match &args.api_key_env {
        Some(name) => Some(std::env::var(name).with_context(|| format!("no API key in ${name}"))?),
        None => None,
    };
    let timeout = Duration::from_secs_f64(args.request_timeout_s);
    let client = Client::new(&args.url, api_key, timeout)?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => {
            client.first_model().await.with_context(|| format!("cannot ask {} for its models", args.url))?
        }
    };
    let shape = RequestShape {
        model: model.clone(),
        prompt_kind: args.prompt_kind,
        ignore_eos: args.ignore_eos,
        declare_max_tokens: args.declare_max_tokens,
        stop_token: *workload.token_ids.end(),
        timings: args.hops,
    };
    let target = Arc::new(Target {
        client,
        workload,
        shape: shape.clone(),
        retries: args.retries,
        timeout,
        block_tokens: args.kv_block_tokens,
    });
    for index in 0..args.warm_up {
        target.warm_up(index).await.with_context(|| format!("{} failed a warm-up request", args.url))?;
    }
    let slo = Slo { ttft_ms: args.slo_ttft_ms, itl_ms: args.slo_itl_ms };
    let mut run = Run { args, target: &target, slo, memory: args.memory_pid.map(Sampler::start), points: 0 };
    let mut loads = args.loads();
    let mut peak = None;
    if !args.load.is_empty() {
        let requests_per_s = match args.peak {
            Some(known) => known,
            None => peak.insert(run.ramp().await).peak(),
        };
        ensure!(requests_per_s > 0.0, "no rate gives any goodput: nothing to take a share of");
        let open = |percent: &f64| Load::Open { requests_per_s: requests_per_s * percent / 100.0 };
        loads = args.load.iter().map(open).collect();
    }
    let mut points = Vec::new();
    for load in loads {
        points.push(run.point(load, run.extent()).await);
    }
    Ok(Report {
        url: args.url.clone(),
        model,
        asked: asked(args, &target),
        scale: target.workload.scale,
        request: shape,
        slo,
        peak,
        points,
    })
}

/// A run in progress.
struct Run<'a> {
    args: &'a Args,
    target: &'a Arc<Target>,
    slo: Slo,
    memory: Option<Sampler>,
    /// Load points so far: each has prompts of its own.
    points: u32,
}

impl Run<'_> {
    fn extent(&self) -> Extent {
        match self.args.duration_s {
            Some(seconds) => Extent::Time(Duration::from_secs_f64(seconds)),
            None => Extent::Requests {
                requests: self.args.requests,
                duration_max: Duration::from_secs_f64(self.args.duration_s_max),
            },
        }
    }

    async fn point(&mut self, load: Load, extent: Extent) -> Summary {
        match extent {
            Extent::Time(time) => eprintln!("{load}: for {} s …", time.as_secs_f64()),
            Extent::Requests { requests, .. } => eprintln!("{load}: up to {requests} requests …"),
        }
        let pattern = self.args.workload.arrivals;
        let bounds = Bounds { extent, in_flight_max: self.args.in_flight_max as usize, pattern };
        if let Some(memory) = &self.memory {
            memory.take();
        }
        let measured = load::run(Arc::clone(self.target), load, bounds, self.points).await;
        self.points += 1;
        let mut summary = Summary::of(load, &measured, &self.slo);
        summary.memory = self.memory.as_ref().map(Sampler::take).unwrap_or_default();
        summary
    }

    async fn ramp(&mut self) -> PeakSearch {
        let step = Extent::Time(Duration::from_secs_f64(self.args.peak_step_s));
        let mut search = PeakSearch::new(self.args.peak_from);
        while let Some(rate) = search.next_rate() {
            let summary = self.point(Load::Open { requests_per_s: rate }, step).await;
            let (offered, goodput) = (summary.offered_per_s, summary.goodput());
            search.record(Probe { rate, offered, goodput });
        }
        search
    }
}

/// What is asked, in words.
fn asked(args: &Args, target: &Target) -> String {
    let about = if args.prompt_kind == request::PromptKind::Text { "about " } else { "" };
    let load = &target.workload;
    let lengths = match &load.source {
        Source::Fixed { input_tokens, output_tokens } => {
            format!("{about}{input_tokens} prompt tokens, {output_tokens} output tokens")
        }
        Source::Published(published) => {
            format!(
                "{about}{published:?} lengths, prompts × {:.3}, answers × {:.3}",
                load.scale.input, load.scale.output
            )
        }
        Source::Trace(trace) => format!(
            "{about}lengths of a trace of {} requests, prompts × {:.3}, answers × {:.3}",
            trace.requests.len(),
            load.scale.input,
            load.scale.output
        ),
    };
    match load.turns {
        1 => lengths,
        turns => format!("{lengths}, {turns} turns"),
    }
}

#[cfg(test)]
mod tests;
