//! `trireme bench engine`: what one process makes of a model, prompt and generation tokens per second by batch size.
//!
//! The step that the workers run, experts in this process, sampling included; nothing is sent anywhere. Beside the rates
//! stand the bytes of weights that a step has to read, the share of the memory bandwidth measured in the same run, and
//! where a step's time goes. What it must be compared with runs in alternating rounds on the same machine; this prints
//! its own spread.

mod gpu;
mod runner;
mod stages;
mod traffic;

use std::path::PathBuf;

use anyhow::ensure;
use compute::Cpu;
use model::{Checkpoint, Device, KvFormat, Numerics};
use serde::Serialize;

pub use self::gpu::Prompts;
pub(crate) use self::gpu::v3_config;
use self::runner::{Round, Runner};
use crate::demo;
use crate::json_file::JsonFile;
use crate::table::{aligned, number};

/// Flags of `trireme bench engine`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A checkpoint folder in the Hugging Face layout. Default: the demo model.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Where to run it: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Not a checkpoint but DeepSeek-V3's dimensions cut to so many layers, with weights made on the GPU.
    #[arg(long, value_name = "LAYERS", conflicts_with = "model", value_parser = clap::value_parser!(u16).range(2..=61))]
    pub synthetic: Option<u16>,
    /// With --synthetic: standard deviation of the routers' correction biases. 0 routes evenly; with 100 all tokens of a layer go
    /// to the same experts, as with the dummy weights of other engines.
    #[arg(long, value_name = "DEVIATION", default_value_t = 0.0, requires = "synthetic")]
    pub router_bias: f32,
    /// Prompts whose rate is measured, on a GPU: count and tokens, several with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "32x1024,8x4096")]
    pub prefill: Vec<Prompts>,
    /// Threads, this one included. Default: all cores.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Sequences that generate at the same time; several, with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "1,8,16", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub batch: Vec<u16>,
    /// Tokens of each prompt, drawn at random.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt: u32,
    /// Tokens that each sequence generates after its prompt.
    #[arg(long = "gen", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub generate: u32,
    /// How often all of it is done; the median of the rounds is printed with their spread.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
    /// Rows of a step at most: prompts run in chunks of it, several short ones in one.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub chunk: u32,
    /// `fp8` as in serving, `reference` for the checkpoint's exact values.
    #[arg(long, default_value = "fp8")]
    pub numerics: Numerics,
    /// What KV rows are stored in: fp8, bf16 or f32. Default: f32 in `reference`, fp8 otherwise.
    #[arg(long)]
    pub kv_format: Option<KvFormat>,
    /// Seed of the prompts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write everything measured here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What `--json` writes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The checkpoint.
    pub model: PathBuf,
    /// Back end and instruction set.
    pub backend: String,
    /// Threads.
    pub threads: usize,
    /// The arithmetic.
    pub numerics: String,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens generated after it.
    pub generated_tokens: usize,
    /// Rows of a step at most.
    pub chunk: usize,
    /// Reading memory in order: probes before and after each round's generation steps, as a virtual machine's share of a
    /// host's memory changes by the minute.
    pub read_gb_per_s: Spread,
    /// One per batch size.
    pub batches: Vec<Figures>,
}

/// What one batch size gave.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Sequences.
    pub batch: usize,
    /// Prompt tokens per second.
    pub prompt_tok_per_s: Spread,
    /// Generated tokens per second, all sequences together.
    pub generation_tok_per_s: Spread,
    /// Bytes of weights that a generation step reads, as stored in the checkpoint, the mean over its steps.
    pub weight_bytes_per_step: f64,
    /// Those bytes over the time of a round's median step, as a share of what the probes beside it read.
    pub bandwidth_share: Spread,
    /// Microseconds of a generation step by part, the mean of all rounds.
    pub step_us: Vec<StageTime>,
    /// Microseconds of all prompts by part, the mean of all rounds.
    pub prompt_us: Vec<StageTime>,
}

/// Time that went into a part of a step.
#[derive(Debug, Serialize)]
pub struct StageTime {
    /// The part.
    pub stage: &'static str,
    /// Microseconds.
    pub us: f64,
}

/// A rate over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The slowest round.
    pub min: f64,
    /// The one in the middle.
    pub median: f64,
    /// The fastest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self { min: at(0), median: at(values.len() / 2), max: at(values.len().saturating_sub(1)) }
    }

    fn text(&self) -> String {
        format!("{} ({}–{})", number(self.median), number(self.min), number(self.max))
    }

    fn percent(&self) -> String {
        let [median, min, max] = [self.median, self.min, self.max].map(|share| 100.0 * share);
        format!("{median:.0} % ({min:.0}–{max:.0})")
    }
}

/// Measures, prints the tables and writes the JSON file.
///
/// # Errors
/// A file cannot be read or written, the checkpoint is not sound, or flags do not fit it.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let json = JsonFile::create(args.json.as_deref())?;
    if args.device != Device::Cpu {
        ensure!(json.is_none(), "--json is for the CPU's figures");
        return gpu::run(args);
    }
    ensure!(args.synthetic.is_none(), "--synthetic makes its weights on a GPU: name one with --device");
    let report = measure(args)?;
    print!("{}", render(&report));
    if let Some(file) = json {
        file.write(&report)?;
    }
    Ok(())
}

/// Runs all rounds, the batch sizes in turn within each.
///
/// # Errors
/// As [`run`].
pub fn measure(args: &Args) -> anyhow::Result<Report> {
    let folder = demo::model_folder(args.model.as_deref())?;
    let checkpoint = Checkpoint::open(&folder)?;
    let context = args.prompt as usize + args.generate as usize;
    let context_max = checkpoint.config().max_position_embeddings;
    ensure!(
        context <= context_max,
        "--prompt and --gen are {context} tokens, the model's context is {context_max}"
    );
    let batch_max = args.batch.iter().copied().max().map_or(1, usize::from);
    ensure!(
        batch_max <= args.chunk as usize,
        "--batch {batch_max} does not fit a step of --chunk {}",
        args.chunk
    );
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.map_or(cores, usize::from);
    let cpu = Cpu::new(threads);
    let bandwidth = || cpu.memory_read_bandwidth() / 1e9;

    let mut runner = Runner::load(args, &checkpoint, threads, batch_max)?;
    let mut rounds: Vec<Vec<Round>> = args.batch.iter().map(|_| Vec::new()).collect();
    for round in 0..=args.rounds {
        for (&batch, rounds) in args.batch.iter().zip(&mut rounds) {
            let measured = runner.round(usize::from(batch), &bandwidth)?;
            // The first only warms: it faults the weights in and sizes the buffers.
            if round > 0 {
                rounds.push(measured);
            }
        }
    }
    let reads = rounds.iter().flatten().map(|round| round.read_gb_per_s);
    let read_gb_per_s = Spread::of(reads.collect());
    let batches = args.batch.iter().zip(&rounds).map(|(&batch, rounds)| figures(args, batch, rounds));
    Ok(Report {
        model: folder,
        backend: runner.backend().to_owned(),
        threads,
        numerics: args.numerics.to_string(),
        prompt_tokens: args.prompt as usize,
        generated_tokens: args.generate as usize,
        chunk: args.chunk as usize,
        read_gb_per_s,
        batches: batches.collect(),
    })
}

fn figures(args: &Args, batch: u16, rounds: &[Round]) -> Figures {
    let rate = |tokens: u32, seconds: &dyn Fn(&Round) -> f64| {
        let tokens = f64::from(batch) * f64::from(tokens);
        Spread::of(rounds.iter().map(|round| tokens / seconds(round).max(1e-9)).collect())
    };
    let generation = rate(args.generate, &|round| round.generation.seconds());
    let count = rounds.len().max(1) as f64;
    let steps = f64::from(args.generate);
    let bytes = rounds.iter().map(|round| round.weight_bytes as f64).sum::<f64>() / count / steps;
    let share =
        |round: &Round| round.weight_bytes as f64 / steps / round.step_s / (round.read_gb_per_s * 1e9);
    Figures {
        batch: usize::from(batch),
        prompt_tok_per_s: rate(args.prompt, &|round| round.prompt.seconds()),
        generation_tok_per_s: generation,
        weight_bytes_per_step: bytes,
        bandwidth_share: Spread::of(rounds.iter().map(share).collect()),
        step_us: stages::mean(rounds.iter().map(|round| &round.generation), count * steps),
        prompt_us: stages::mean(rounds.iter().map(|round| &round.prompt), count),
    }
}

fn render(report: &Report) -> String {
    let header = ["batch", "prompt tok/s", "generated tok/s", "weights/step MB", "GB/s", "share of reads"];
    let mut rates = vec![header.map(str::to_owned).to_vec()];
    for figures in &report.batches {
        rates.push(vec![
            figures.batch.to_string(),
            figures.prompt_tok_per_s.text(),
            figures.generation_tok_per_s.text(),
            number(figures.weight_bytes_per_step / 1e6),
            number(
                figures.weight_bytes_per_step / 1e9 * figures.generation_tok_per_s.median
                    / figures.batch as f64,
            ),
            figures.bandwidth_share.percent(),
        ]);
    }
    let mut parts = vec![vec!["µs of a step".to_owned()]];
    parts[0].extend(report.batches.iter().map(|figures| format!("batch {}", figures.batch)));
    parts[0].extend(report.batches.iter().map(|figures| format!("{} prompts", figures.batch)));
    let columns =
        || report.batches.iter().map(|f| &f.step_us).chain(report.batches.iter().map(|f| &f.prompt_us));
    for (index, stage) in stages::names().enumerate() {
        let mut row = vec![stage.to_owned()];
        row.extend(columns().map(|times| times.get(index).map_or_else(String::new, |time| number(time.us))));
        parts.push(row);
    }
    let mut total = vec!["all".to_owned()];
    total.extend(columns().map(|times| number(times.iter().map(|time| time.us).sum())));
    parts.push(total);
    format!(
        "{}\n{}, {} threads, {}; prompts of {} tokens in steps of {} rows, {} generated; memory reads {} GB/s\n\n{}\n{}",
        report.model.display(),
        report.backend,
        report.threads,
        report.numerics,
        report.prompt_tokens,
        report.chunk,
        report.generated_tokens,
        report.read_gb_per_s.text(),
        aligned(&rates),
        aligned(&parts)
    )
}

#[cfg(test)]
mod tests;
