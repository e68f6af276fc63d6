//! The flags of `trireme bench serve`.

use std::path::PathBuf;

use super::load::Load;
use super::request::PromptKind;
use crate::workload;

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
    #[arg(long, value_delimiter = ',', default_value = "1,8,64", conflicts_with_all = ["rate", "load"],
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub concurrency: Vec<u32>,
    /// Open loop: mean requests per second, one load point each. With --turns: conversations.
    #[arg(long, value_delimiter = ',', value_parser = positive)]
    pub rate: Vec<f64>,
    /// Open loop: percent of the peak, one load point each. The peak is the largest goodput that a ramp of rates finds
    /// before them, or --peak.
    #[arg(long, value_delimiter = ',', value_parser = positive, conflicts_with = "rate")]
    pub load: Vec<f64>,
    /// With --load: requests per second that are 100 %, from an earlier ramp.
    #[arg(long, value_parser = positive, requires = "load")]
    pub peak: Option<f64>,
    /// With --load: the ramp's first rate, requests per second.
    #[arg(long, value_parser = positive, default_value_t = 2.0)]
    pub peak_from: f64,
    /// With --load: seconds of each of the ramp's rates.
    #[arg(long, value_parser = positive, default_value_t = 20.0)]
    pub peak_step_s: f64,
    /// Requests of a load point; with --turns: conversations.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// Open loop: seconds in which requests arrive, instead of a number of them. Rates are those of this time without its
    /// first tenth; what still runs at its end is waited for.
    #[arg(long, value_parser = positive, conflicts_with = "requests")]
    pub duration_s: Option<f64>,
    /// Seconds of a load point at most; requests still running then are cut off and counted.
    #[arg(long, default_value_t = 300.0, value_parser = positive, conflicts_with = "duration_s")]
    pub duration_s_max: f64,
    /// Seconds of a request at most, waiting after a 429 included.
    #[arg(long, default_value_t = 120.0, value_parser = positive)]
    pub request_timeout_s: f64,
    /// Open loop: requests in flight at most; what would go beyond is not sent, and counted.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub in_flight_max: u32,
    /// Requests sent one by one before the first load point, and not measured.
    #[arg(long, default_value_t = 2)]
    pub warm_up: u32,
    /// After a 429, wait as its Retry-After says and ask again, so often at most; times count from the first try. 0: a
    /// request that is refused once is lost.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub retries: u32,
    /// What is asked.
    #[command(flatten)]
    pub workload: workload::Args,
    /// How prompts are sent: token ids have the exact length, text works everywhere and is about that long.
    #[arg(long, value_enum, default_value_t = PromptKind::TokenIds)]
    pub prompt_kind: PromptKind,
    /// Ask the server to go on after an end-of-sequence token, so that answers have the length asked for.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub ignore_eos: bool,
    /// The `max_tokens` that every request states, while its answer ends at its own length by a stop token: what a server
    /// does with clients that ask for more than they need.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub declare_max_tokens: Option<u32>,
    /// Ask for `trireme_timings`. Switch it off for servers that refuse fields they do not know.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub hops: bool,
    /// Tokens of the server's KV blocks: what a prefix cache can find at best is counted in these.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub kv_block_tokens: u32,
    /// Goodput counts requests with a TTFT of at most this.
    #[arg(long, value_parser = positive)]
    pub slo_ttft_ms: Option<f64>,
    /// Goodput counts requests whose mean time between tokens is at most this.
    #[arg(long, value_parser = positive)]
    pub slo_itl_ms: Option<f64>,
    /// A process of the server on this machine: its memory and that of its descendants is sampled every second.
    #[arg(long, value_name = "PID")]
    pub memory_pid: Option<u32>,
    /// Write everything measured here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Args {
    /// The load points that are known before anything is measured.
    pub(super) fn loads(&self) -> Vec<Load> {
        if !self.load.is_empty() {
            return Vec::new();
        }
        if self.rate.is_empty() {
            return self.concurrency.iter().map(|&clients| Load::Closed { clients }).collect();
        }
        self.rate.iter().map(|&requests_per_s| Load::Open { requests_per_s }).collect()
    }
}

/// A number that can be a rate or a time: positive, and small enough for a [`std::time::Duration`].
pub(crate) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1e9 => Ok(value),
        _ => Err("expected a positive number, at most 1e9".to_owned()),
    }
}
