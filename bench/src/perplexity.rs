//! `trireme bench perplexity`: how well a model predicts a text.
//!
//! Either a server is asked for the log-probabilities of the text as a prompt (`--url`), or the text is teacher-forced
//! through the engine in this process: the step, the cache and the arithmetic are those that a cluster serves with, and a
//! position's bits do not depend on who computes it, so both tell the same.
//!
//! A text longer than the window is walked in windows that overlap: every token is scored once, and all but those of the
//! first window with `window - stride` tokens before it at least.

mod score;
mod server;
mod windows;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use engine::{Engine, EngineOptions, ExpertBank, LocalExperts};
use model::{Checkpoint, Device, KvFormat, KvLayout, Numerics, TokenId, Tokenizer};
use serde::Serialize;

pub use score::Scorer;
pub use windows::{Window, windows};

use crate::client::Client;
use crate::json_file::JsonFile;
use crate::table::{aligned, number};
use crate::{demo, plot};

/// A longer text is refused rather than held in memory.
const TEXT_BYTES_MAX: u64 = 256 << 20;
/// Parts of the window that the loss is told by.
const BUCKETS: usize = 8;
/// Rows of a step: what a prefill worker runs at a time, and its logits are 130 MB with V3's vocabulary.
const STEP_TOKENS: usize = 256;
/// A window of a long context on a slow machine takes minutes.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3600);

/// Flags of `trireme bench perplexity`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The text.
    #[arg(long)]
    pub text: PathBuf,
    /// Ask this server, up to but without `/v1`, instead of running the engine in this process.
    #[arg(long, conflicts_with_all = ["numerics", "kv_format", "threads"])]
    pub url: Option<String>,
    /// Environment variable with the server's API key.
    #[arg(long, value_name = "VARIABLE", requires = "url")]
    pub api_key_env: Option<String>,
    /// A checkpoint folder in the Hugging Face layout; with --url the one that is served, whose tokenizer is used. Default:
    /// the demo model.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Tokens that the model sees at a time. Default: its context, but at most 4,096.
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..))]
    pub window: Option<u32>,
    /// New tokens of each window after the first. Default: half a window.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub stride: Option<u32>,
    /// Tokens of the text that are read at most.
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..))]
    pub tokens_max: Option<u32>,
    /// `fp8` as in serving, `reference` for the checkpoint's exact values.
    #[arg(long, default_value = "fp8")]
    pub numerics: Numerics,
    /// What KV rows are stored in: fp8, bf16 or f32. Default: f32 in `reference`, fp8 otherwise.
    #[arg(long)]
    pub kv_format: Option<KvFormat>,
    /// Threads. Default: all cores.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Write everything measured here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What `--json` writes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The checkpoint.
    pub model: PathBuf,
    /// The arithmetic, or the server.
    pub computed_by: String,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Bytes of the text that they stand for.
    pub bytes: usize,
    /// Tokens seen at a time, and new ones of each window.
    pub window: usize,
    /// New tokens of each window after the first.
    pub stride: usize,
    /// Mean negative log-likelihood of a token, in nats.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Bits for a byte of text: comparable between tokenizers.
    pub bits_per_byte: f64,
    /// The loss by place in the window.
    pub by_position: Vec<Bucket>,
}

/// A part of the window.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bucket {
    /// First position.
    pub from: usize,
    /// First position of the next part.
    pub to: usize,
    /// Tokens predicted here.
    pub tokens: usize,
    /// Their mean loss in nats.
    pub loss: f64,
}

/// Scores the text, prints table and plot and writes the JSON file.
///
/// # Errors
/// A file cannot be read or written, the checkpoint is not sound, or flags do not fit it.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    let json = JsonFile::create(args.json.as_deref())?;
    let report = measure(args).await?;
    print!("{}", render(&report));
    if let Some(file) = json {
        file.write(&report)?;
    }
    Ok(())
}

/// Scores the text.
///
/// # Errors
/// As [`run`].
pub async fn measure(args: &Args) -> anyhow::Result<Report> {
    let text_bytes =
        std::fs::metadata(&args.text).with_context(|| format!("--text {}", args.text.display()))?.len();
    ensure!(text_bytes <= TEXT_BYTES_MAX, "--text has {text_bytes} bytes, at most {TEXT_BYTES_MAX} are read");
    let text =
        std::fs::read_to_string(&args.text).with_context(|| format!("--text {}", args.text.display()))?;
    let folder = demo::model_folder(args.model.as_deref())?;
    let checkpoint = Checkpoint::open(&folder)?;
    // A server also draws the token behind a prompt, and throws it away.
    let context = checkpoint.config().max_position_embeddings - usize::from(args.url.is_some());
    let window = args.window.map_or(context.min(4096), |window| window as usize);
    ensure!(window <= context, "--window is {window}, the model's context leaves {context}");
    let stride = args.stride.map_or(window / 2, |stride| stride as usize);
    ensure!(stride < window, "--stride is {stride}, must be less than --window ({window})");

    let tokenizer = Tokenizer::open(&folder)?;
    let mut tokens = tokenizer.encode_prompt(&text)?;
    // What the model wants before every text, it gets before every window.
    let bos = (tokens.first() != tokenizer.encode(&text)?.first()).then(|| tokens.remove(0));
    tokens.truncate(args.tokens_max.map_or(usize::MAX, |max| max as usize));
    ensure!(tokens.len() + usize::from(bos.is_some()) >= 2, "--text has no token to predict");
    let vocab = checkpoint.config().vocab_size;
    ensure!(
        tokens.iter().all(|token| (token.0 as usize) < vocab),
        "--model: its tokenizer has ids beyond its vocabulary of {vocab}"
    );

    let mut by = By::new(args, &checkpoint, window).await?;
    let plan = windows(tokens.len(), window - usize::from(bos.is_some()), stride);
    let mut sums = Sums::new(window);
    let mut sequence = Vec::new();
    for (number, window) in plan.iter().enumerate() {
        eprintln!("window {} of {} …", number + 1, plan.len());
        sequence.clear();
        sequence.extend(bos);
        sequence.extend_from_slice(&tokens[window.text.clone()]);
        // The first token of all has nothing before it unless there is a mark.
        let first = (window.scored - window.text.start + usize::from(bos.is_some())).max(1);
        for (offset, loss) in by.losses(&sequence, first).await?.into_iter().enumerate() {
            sums.add(first + offset, loss);
        }
    }
    let scored = &tokens[usize::from(bos.is_none())..];
    let bytes: usize = scored.iter().map(|&token| tokenizer.token_bytes(token).len()).sum();
    let loss = sums.loss();
    Ok(Report {
        model: folder,
        computed_by: args.url.clone().unwrap_or_else(|| args.numerics.to_string()),
        tokens: sums.tokens(),
        bytes,
        window,
        stride,
        loss,
        perplexity: loss.exp(),
        bits_per_byte: loss * sums.tokens() as f64 / std::f64::consts::LN_2 / bytes.max(1) as f64,
        by_position: sums.buckets(),
    })
}

/// Who computes the losses.
enum By {
    Engine(Box<Scorer>),
    Server { client: Client, model: String },
}

impl By {
    async fn new(args: &Args, checkpoint: &Checkpoint, window: usize) -> anyhow::Result<Self> {
        let Some(url) = &args.url else {
            return Ok(Self::Engine(Box::new(Scorer::new(engine(args, checkpoint, window)?))));
        };
        let api_key = match &args.api_key_env {
            Some(name) => Some(std::env::var(name).with_context(|| format!("no API key in ${name}"))?),
            None => None,
        };
        let client = Client::new(url, api_key, REQUEST_TIMEOUT)?;
        let model = client.first_model().await.with_context(|| format!("cannot ask {url} for its models"))?;
        Ok(Self::Server { client, model })
    }

    async fn losses(&mut self, tokens: &[TokenId], first: usize) -> anyhow::Result<Vec<f64>> {
        Ok(match self {
            Self::Engine(scorer) => scorer.losses(tokens, first)?,
            Self::Server { client, model } => server::losses(client, model, tokens, first).await?,
        })
    }
}

fn engine(args: &Args, checkpoint: &Checkpoint, window: usize) -> anyhow::Result<Engine> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let layout = KvLayout::for_model(checkpoint.config(), KvFormat::Fp8, 0);
    let options = EngineOptions {
        device: Device::Cpu,
        numerics: args.numerics,
        kv_format: args.kv_format,
        kv_blocks_max: layout.blocks_for(window),
        threads: args.threads.map_or(cores, usize::from),
        step_tokens_max: STEP_TOKENS.min(window),
        mtp: false,
    };
    let bank = ExpertBank::load_all(checkpoint, args.numerics, false, &mut |_, _| {})?;
    Ok(Engine::load(checkpoint, &options, Box::new(LocalExperts::new(bank)), &mut |_, _| {})?)
}

/// Losses by place in the window.
struct Sums {
    window: usize,
    buckets: [(usize, f64); BUCKETS],
}

impl Sums {
    fn new(window: usize) -> Self {
        Self { window, buckets: [(0, 0.0); BUCKETS] }
    }

    fn add(&mut self, position: usize, loss: f64) {
        let (tokens, sum) = &mut self.buckets[(position * BUCKETS / self.window).min(BUCKETS - 1)];
        *tokens += 1;
        *sum += loss;
    }

    fn tokens(&self) -> usize {
        self.buckets.iter().map(|(tokens, _)| tokens).sum()
    }

    fn loss(&self) -> f64 {
        self.buckets.iter().map(|(_, sum)| sum).sum::<f64>() / self.tokens().max(1) as f64
    }

    fn buckets(&self) -> Vec<Bucket> {
        let bound = |bucket: usize| (bucket * self.window).div_ceil(BUCKETS);
        let filled = self.buckets.iter().enumerate().filter(|(_, (tokens, _))| *tokens > 0);
        filled
            .map(|(i, (tokens, sum))| Bucket {
                from: bound(i),
                to: bound(i + 1),
                tokens: *tokens,
                loss: sum / *tokens as f64,
            })
            .collect()
    }
}

fn render(report: &Report) -> String {
    let header = ["computed by", "tokens", "window", "stride", "loss", "perplexity", "bits/byte"];
    let row = vec![
        report.computed_by.clone(),
        report.tokens.to_string(),
        report.window.to_string(),
        report.stride.to_string(),
        format!("{:.5}", report.loss),
        format!("{:.4}", report.perplexity),
        number(report.bits_per_byte),
    ];
    let bars: Vec<(String, f64)> = report
        .by_position
        .iter()
        .map(|bucket| (format!("{}..{}", bucket.from, bucket.to), bucket.loss.exp()))
        .collect();
    format!(
        "{}\n\n{}\nperplexity by position in the window\n\n{}",
        report.model.display(),
        aligned(&[header.map(str::to_owned).to_vec(), row]),
        plot::bars(&bars)
    )
}

#[cfg(test)]
mod tests;
