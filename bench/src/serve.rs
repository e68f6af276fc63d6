//! `trireme bench serve`: a load generator for OpenAI-compatible servers.
//!
//! Closed loop: a number of clients that each wait for their answer before they ask again. Open loop: requests arrive
//! as a Poisson process whatever the server does, which is how users behave and what shows a queue growing. Every load
//! point is bounded in requests and in time.

pub mod hops;
pub mod load;
pub mod request;
pub mod schedule;
pub mod summary;
mod table;

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::Serialize;

use crate::client::Client;
use load::{Bounds, Load};
use request::{PromptKind, RequestShape};
use summary::{Slo, Summary};

/// Flags of `trireme bench serve`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The server, up to but without `/v1`.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Its model; default: the first that it lists.
    #[arg(long)]
    pub model: Option<String>,
    /// Environment variable with the API key; a key on the command line would be visible to everybody.
    #[arg(long, value_name = "VARIABLE")]
    pub api_key_env: Option<String>,
    /// Closed loop: clients at a time, one load point each.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64", conflicts_with = "rate",
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub concurrency: Vec<u32>,
    /// Open loop: mean requests per second, Poisson arrivals, one load point each.
    #[arg(long, value_delimiter = ',', value_parser = positive)]
    pub rate: Vec<f64>,
    /// Requests of a load point.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// Seconds of a load point at most; requests still running then are cut off and counted.
    #[arg(long, default_value_t = 300.0, value_parser = positive)]
    pub duration_s_max: f64,
    /// Seconds of a request at most.
    #[arg(long, default_value_t = 120.0, value_parser = positive)]
    pub request_timeout_s: f64,
    /// Open loop: requests in flight at most; what would go beyond is not sent, and counted.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub in_flight_max: u32,
    /// Requests sent one by one before the first load point, and not measured.
    #[arg(long, default_value_t = 2)]
    pub warm_up: u32,
    /// Tokens of each prompt; every prompt is another one, so that none is served from a prefix cache.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: u32,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub output_tokens: u32,
    /// How prompts are sent: token ids have the exact length, text works everywhere and is about that long.
    #[arg(long, value_enum, default_value_t = PromptKind::TokenIds)]
    pub prompt_kind: PromptKind,
    /// Prompt token ids are drawn from 100 up to this; keep it inside the model's vocabulary.
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(101..))]
    pub token_id_max: u32,
    /// Ask the server to go on after an end-of-sequence token, so that answers have the length asked for.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub ignore_eos: bool,
    /// Ask for `trireme_timings`. Switch it off for servers that refuse fields they do not know.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub hops: bool,
    /// Seed of prompts and arrivals.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Goodput counts requests with a TTFT of at most this.
    #[arg(long, value_parser = positive)]
    pub slo_ttft_ms: Option<f64>,
    /// Goodput counts requests whose mean time between tokens is at most this.
    #[arg(long, value_parser = positive)]
    pub slo_itl_ms: Option<f64>,
    /// Write everything measured here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What `--json` writes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The server measured.
    pub url: String,
    /// Its model.
    pub model: String,
    /// What was asked of it.
    pub request: RequestShape,
    /// The goal behind goodput.
    pub slo: Slo,
    /// One per load point, in the order given.
    pub points: Vec<Summary>,
}

/// Measures every load point, prints the tables and writes the JSON file.
///
/// # Errors
/// As [`measure`], a file that cannot be written, or a run without a single answer.
pub async fn run(args: Args) -> anyhow::Result<()> {
    // Opened first: minutes of measuring must not end at a mistyped path.
    let json = match &args.json {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
            Some((path, BufWriter::new(file)))
        }
        None => None,
    };
    let report = measure(&args).await?;
    print!("{}", table::render(&report));
    if let Some((path, mut file)) = json {
        serde_json::to_writer_pretty(&mut file, &report)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(file.flush()?))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    ensure!(report.points.iter().any(|point| point.completed > 0), "no request was answered");
    Ok(())
}

/// Measures every load point.
///
/// # Errors
/// The server cannot be reached or fails a warm-up request.
pub async fn measure(args: &Args) -> anyhow::Result<Report> {
    let timeout = Duration::from_secs_f64(args.request_timeout_s);
    let api_key = match &args.api_key_env {
        Some(name) => Some(std::env::var(name).with_context(|| format!("no API key in ${name}"))?),
        None => None,
    };
    let client = Client::new(&args.url, api_key, timeout)?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => {
            client.first_model().await.with_context(|| format!("cannot ask {} for its models", args.url))?
        }
    };
    let shape = RequestShape {
        model: model.clone(),
        prompt_tokens: args.prompt_tokens,
        output_tokens: args.output_tokens,
        prompt_kind: args.prompt_kind,
        token_id_max: args.token_id_max,
        ignore_eos: args.ignore_eos,
        timings: args.hops,
        seed: args.seed,
    };
    let slo = Slo { ttft_ms: args.slo_ttft_ms, itl_ms: args.slo_itl_ms };
    let target = Arc::new(load::Target { client, shape: shape.clone() });
    for index in 0..args.warm_up {
        target.warm_up(index).await.with_context(|| format!("{} failed a warm-up request", args.url))?;
    }
    let bounds = Bounds {
        requests: args.requests,
        duration_max: Duration::from_secs_f64(args.duration_s_max),
        in_flight_max: args.in_flight_max as usize,
    };
    let mut points = Vec::new();
    for (number, load) in loads(args).into_iter().enumerate() {
        eprintln!("{load}: up to {} requests …", bounds.requests);
        let measured = load::run(Arc::clone(&target), load, bounds, number as u32).await;
        points.push(Summary::of(load, &measured, &slo));
    }
    Ok(Report { url: args.url.clone(), model, request: shape, slo, points })
}

fn loads(args: &Args) -> Vec<Load> {
    if args.rate.is_empty() {
        args.concurrency.iter().map(|&clients| Load::Closed { clients }).collect()
    } else {
        args.rate.iter().map(|&requests_per_s| Load::Open { requests_per_s }).collect()
    }
}

/// A number that can be a rate or a time: positive, and small enough for a [`Duration`].
fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1e9 => Ok(value),
        _ => Err("expected a positive number, at most 1e9".to_owned()),
    }
}

#[cfg(test)]
mod tests;
