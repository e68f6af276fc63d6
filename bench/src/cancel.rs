//! `trireme bench cancel`: how soon both ends of a hand-off are free once a client has gone away.
//!
//! Requests with prompts that nobody has seen are sent to a running cluster, and their connections dropped while prefill computes the
//! first of them and the others, where there are any, are beside it, wait in its queue or at the router's door. From then on the
//! workers' own metrics are read, over and over, until no sequence holds a block and none waits: in prefill's pool, in decode's. So
//! what is told has the way through every process in it, and one reading of the metrics.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rand::RngExt;
use serde_json::json;
use tokio::task::JoinSet;

use crate::client::Client;
use crate::table;

/// Without an answer, without both ends' being free, or without a cancel that meets prefill.
const STALLED: Duration = Duration::from_secs(30);
/// Cancels are spread over this, so that they meet a step at any point of it.
const SPREAD_US: u64 = 20_000;
/// Token ids below are of every vocabulary, the first ones apart, which may be special.
const TOKEN_IDS: std::ops::Range<u32> = 256..1_000;

/// What to cancel, how often.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The server.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Where each prefill worker answers `/metrics`: `http://HOST:PORT`, its `admin` address.
    #[arg(long, required = true, value_delimiter = ',')]
    prefill: Vec<String>,
    /// The same of each decode worker.
    #[arg(long, required = true, value_delimiter = ',')]
    decode: Vec<String>,
    /// Requests that are cancelled at once. With several of them, some wait; the door must not refuse any of them
    /// (`up --ttft-ms-max 60000`), nor leave their prompts to decode (`--prefill-on-decode never`).
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16])]
    requests: Vec<usize>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 2048)]
    prompt: usize,
    /// Cancels of each number of requests.
    #[arg(long, default_value_t = 50)]
    runs: usize,
}

/// From the dropped connections to an end that is free.
struct Sample {
    prefill: Duration,
    decode: Duration,
    /// Requests behind the first, computed beside it or waiting, when they were cancelled.
    waiting: f64,
}

/// Workers of one role.
struct Pool<'a> {
    http: reqwest::Client,
    role: &'static str,
    urls: &'a [String],
}

impl Pool<'_> {
    /// A metric's sum over the workers.
    async fn read<const N: usize>(&self, names: [&str; N]) -> anyhow::Result<[f64; N]> {
        let mut sums = [0.0; N];
        for url in self.urls {
            let text = self.http.get(format!("{}/metrics", url.trim_end_matches('/'))).send().await?;
            let text = text.error_for_status()?.text().await?;
            for (sum, name) in sums.iter_mut().zip(names) {
                let name = format!("{}_{name}", self.role);
                *sum += value(&text, &name).with_context(|| format!("{url} has no {name}"))?;
            }
        }
        Ok(sums)
    }

    /// Whether nobody holds a block or waits.
    async fn is_free(&self) -> anyhow::Result<bool> {
        let [blocks, free, waiting] = self.read(["kv_blocks", "kv_blocks_free", "waiting"]).await?;
        Ok(free == blocks && waiting == 0.0)
    }

    async fn until_free(&self, since: Instant) -> anyhow::Result<Duration> {
        while !self.is_free().await? {
            ensure!(since.elapsed() < STALLED, "{} still holds blocks after {STALLED:?}", self.role);
        }
        Ok(since.elapsed())
    }
}

/// Measures and prints the table.
///
/// # Errors
/// The cluster cannot be reached, or an end is not free for half a minute.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.runs > 0 && args.prompt > 0 && !args.requests.contains(&0), "nothing to cancel");
    let door = Client::new(&args.url, None, STALLED)?;
    let model = door.first_model().await?;
    let http = reqwest::Client::builder().timeout(STALLED).tcp_nodelay(true).build()?;
    let pool = |role, urls| Pool { http: http.clone(), role, urls };
    let (router, prefill, decode) = (
        pool("router", std::slice::from_ref(&args.url)),
        pool("prefill", &args.prefill),
        pool("decode", &args.decode),
    );
    println!(
        "prompts of {} tokens, {} cancels of each kind, from the dropped connections",
        args.prompt, args.runs
    );
    let header = [
        "requests",
        "behind the first",
        "prefill free p50 ms",
        "p99",
        "max",
        "decode free p50 ms",
        "p99",
        "max",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for &requests in &args.requests {
        let mut samples = Vec::new();
        let mut last = Instant::now();
        while samples.len() < args.runs {
            if let Some(sample) =
                cancel(&door, &model, requests, args.prompt, [&router, &prefill, &decode]).await?
            {
                samples.push(sample);
                last = Instant::now();
            }
            ensure!(
                last.elapsed() < STALLED,
                "no cancel has met prefill for {STALLED:?}: it is through before (longer prompts), or decode computes the prompts \
                 (up --prefill-on-decode never)"
            );
        }
        rows.push(row(requests, &samples));
    }
    print!("{}", table::aligned(&rows));
    Ok(())
}

/// Sends the requests and drops them; `None` where prefill was through with one of them before.
async fn cancel(
    door: &Client,
    model: &str,
    requests: usize,
    prompt_tokens: usize,
    [router, prefill, decode]: [&Pool<'_>; 3],
) -> anyhow::Result<Option<Sample>> {
    let started = Instant::now();
    prefill.until_free(started).await?;
    decode.until_free(started).await?;
    let [before] = prefill.read(["finished_total"]).await?;
    let mut clients = JoinSet::new();
    for _ in 0..requests {
        let prompt: Vec<u32> = (0..prompt_tokens).map(|_| rand::rng().random_range(TOKEN_IDS)).collect();
        let body = json!({ "model": model, "prompt": prompt, "max_tokens": 1, "stream": true });
        let door = door.clone();
        clients.spawn(async move { door.stream("/v1/completions", &body, |_| ()).await.map(drop) });
    }
    let waiting = loop {
        // The door lets in few at a time: all have come when it holds the others.
        let [computed] = prefill.read(["active"]).await?;
        let [admitted, queued] = router.read(["sequences", "queue_depth"]).await?;
        if computed > 0.0 && admitted + queued >= requests as f64 {
            break admitted + queued - 1.0;
        }
        if let Some(ended) = clients.try_join_next() {
            ended?.context("a request that was to be cancelled")?;
        }
        if clients.is_empty() {
            return Ok(None);
        }
    };
    let spread = Duration::from_micros(rand::rng().random_range(0..SPREAD_US));
    tokio::time::sleep(spread).await;
    let cancelled = Instant::now();
    clients.shutdown().await;
    let (prefill_free, decode_free) =
        tokio::try_join!(prefill.until_free(cancelled), decode.until_free(cancelled))?;
    let [after] = prefill.read(["finished_total"]).await?;
    let sample = Sample { prefill: prefill_free, decode: decode_free, waiting };
    Ok((after == before).then_some(sample))
}

fn row(requests: usize, samples: &[Sample]) -> Vec<String> {
    let ms = |of: fn(&Sample) -> Duration| {
        let mut values: Vec<f64> = samples.iter().map(|sample| of(sample).as_secs_f64() * 1e3).collect();
        values.sort_by(f64::total_cmp);
        [0.5, 0.99, 1.0].map(|share| {
            let at = ((values.len() - 1) as f64 * share).round() as usize;
            format!("{:.1}", values[at])
        })
    };
    let waiting = samples.iter().map(|sample| sample.waiting).sum::<f64>() / samples.len() as f64;
    let mut row = vec![requests.to_string(), format!("{waiting:.1}")];
    row.extend(ms(|sample| sample.prefill));
    row.extend(ms(|sample| sample.decode));
    row
}

/// A metric in a Prometheus text, its labels added up.
fn value(text: &str, name: &str) -> Option<f64> {
    let of = |line: &str| -> Option<f64> {
        let rest = line.strip_prefix(name)?;
        let rest = if rest.starts_with('{') { rest.split_once('}')?.1 } else { rest };
        rest.strip_prefix(' ')?.split(' ').next()?.parse().ok()
    };
    text.lines().filter_map(of).fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let text = "# TYPE prefill_kv_blocks gauge\nprefill_kv_blocks_free 7\nprefill_kv_blocks 12\n# EOF\n";
        assert_eq!(value(text, "prefill_kv_blocks"), Some(12.0));
        assert_eq!(value(text, "prefill_kv_blocks_free"), Some(7.0));
        assert_eq!(value(text, "prefill_kv"), None);
    }

    #[test]
    fn a_metric_of_several_labels_is_their_sum() {
        let text = "router_queue_depth{class=\"interactive\"} 7\nrouter_queue_depth{class=\"batch\"} 2\n";
        assert_eq!(value(text, "router_queue_depth"), Some(9.0));
        assert_eq!(value(text, "router_queue"), None);
    }

    #[test]
    fn a_row_shows_the_spread() {
        let sample = |ms| Sample {
            prefill: Duration::from_millis(ms),
            decode: Duration::from_millis(2 * ms),
            waiting: 3.0,
        };
        let samples: Vec<Sample> = [5, 1, 9].map(sample).into();
        let expected = ["4", "3.0", "5.0", "9.0", "9.0", "10.0", "18.0", "18.0"];
        assert_eq!(row(4, &samples), expected.map(str::to_owned));
    }
}
