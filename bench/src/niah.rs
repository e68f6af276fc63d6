//! `trireme bench niah`: a needle in a haystack. Does the model still know something that was said long ago?
//!
//! The haystack is a conversation of questions and answers, rendered with the model's own chat template and sent as token
//! ids, so that its length is known to the token; the needle is one turn of it, at a given depth; the last turn asks for
//! it. A cell of the table is a context length and a depth, over several haystacks with other needles.

mod ask;
mod haystack;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::{StreamExt as _, stream};
use model::Checkpoint;
use serde::Serialize;

pub use haystack::{Haystack, Needle, Prompt};

use crate::client::Client;
use crate::json_file::JsonFile;
use crate::table::{aligned, number};
use crate::{demo, plot};

/// Flags of `trireme bench niah`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The server, up to but without `/v1`.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Environment variable with the API key.
    #[arg(long, value_name = "VARIABLE")]
    pub api_key_env: Option<String>,
    /// The checkpoint folder that the server serves: its tokenizer and chat template make the prompts. Default: the demo
    /// model.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Tokens of the prompt; each haystack is as long as whole turns allow, and never longer.
    #[arg(long, value_delimiter = ',', default_value = "256,512,1024,2048,4000",
          value_parser = clap::value_parser!(u32).range(64..=1_000_000))]
    pub lengths: Vec<u32>,
    /// Where the needle is, in percent of the way from the first turn to the question.
    #[arg(long, value_delimiter = ',', default_value = "0,25,50,75,100",
          value_parser = clap::value_parser!(u32).range(0..=100))]
    pub depths: Vec<u32>,
    /// What is hidden.
    #[arg(long, value_enum, default_value_t = Needle::Name)]
    pub needle: Needle,
    /// Haystacks of each cell.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub samples: u32,
    /// Requests in flight.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub concurrency: u16,
    /// Seconds of a request at most.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub request_timeout_s: u64,
    /// Seed of haystacks and needles.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
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
    /// What was hidden.
    pub needle: Needle,
    /// In the order of lengths, then depths.
    pub cells: Vec<Cell>,
}

/// One context length and depth.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// Tokens asked for.
    pub length: u32,
    /// Percent of the way.
    pub depth: u32,
    /// Mean tokens of the prompts.
    pub prompt_tokens: f64,
    /// Haystacks answered.
    pub answered: u32,
    /// Answers that have the needle.
    pub found: u32,
    /// Geometric mean of the probabilities of the answers' tokens: how sure the model was, right or wrong.
    pub confidence: f64,
    /// One answer that did not have it, as an example.
    pub missed: Option<String>,
}

impl Cell {
    /// Found of those answered; `None` where nothing was.
    pub fn share(&self) -> Option<f64> {
        (self.answered > 0).then(|| f64::from(self.found) / f64::from(self.answered))
    }
}

/// Measures, prints table and plot and writes the JSON file.
///
/// # Errors
/// As [`measure`], a file that cannot be written, or a run without a single answer.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    let json = JsonFile::create(args.json.as_deref())?;
    let report = measure(args).await?;
    print!("{}", render(&report));
    if let Some(file) = json {
        file.write(&report)?;
    }
    ensure!(report.cells.iter().any(|cell| cell.answered > 0), "no request was answered");
    Ok(())
}

/// Asks for every needle.
///
/// # Errors
/// The server cannot be reached, the model has no tokenizer or chat template, or a length is beyond its context. A request
/// that fails is told and left out.
pub async fn measure(args: &Args) -> anyhow::Result<Report> {
    let folder = demo::model_folder(args.model.as_deref())?;
    let context = Checkpoint::open(&folder)?.config().max_position_embeddings;
    let haystack = Haystack::open(&folder)?;
    for &length in &args.lengths {
        let needed = length as usize + haystack::ANSWER_TOKENS_MAX as usize;
        ensure!(needed <= context, "--lengths {length} and an answer take {needed} of {context} positions");
    }
    let api_key = match &args.api_key_env {
        Some(name) => Some(std::env::var(name).with_context(|| format!("no API key in ${name}"))?),
        None => None,
    };
    let client = Client::new(&args.url, api_key, Duration::from_secs(args.request_timeout_s))?;
    let model =
        client.first_model().await.with_context(|| format!("cannot ask {} for its models", args.url))?;

    let mut prompts = Vec::new();
    for (i, &length) in args.lengths.iter().enumerate() {
        for (j, &depth) in args.depths.iter().enumerate() {
            for sample in 0..args.samples {
                let prompt = haystack.prompt(args.needle, length as usize, depth, args.seed, sample)?;
                prompts.push((i * args.depths.len() + j, prompt));
            }
        }
    }
    let mut cells: BTreeMap<usize, Sum> = BTreeMap::new();
    let total = prompts.len();
    let mut answers = stream::iter(prompts)
        .map(|(cell, prompt)| {
            let (client, model) = (&client, &model);
            async move {
                let answer = ask::ask(client, model, &prompt).await;
                (cell, prompt, answer)
            }
        })
        .buffered(usize::from(args.concurrency));
    let mut done = 0;
    while let Some((cell, prompt, answer)) = answers.next().await {
        done += 1;
        match answer {
            Ok(answer) => cells.entry(cell).or_default().add(&prompt, answer),
            Err(error) => eprintln!("haystack of {} tokens: {error}", prompt.tokens.len()),
        }
        if done % 20 == 0 || done == total {
            eprintln!("{done} of {total} haystacks");
        }
    }
    drop(answers);
    let lengths = args.lengths.iter().flat_map(|&l| args.depths.iter().map(move |&d| (l, d)));
    let cells = lengths
        .enumerate()
        .map(|(i, (length, depth))| cells.remove(&i).unwrap_or_default().cell(length, depth))
        .collect();
    Ok(Report { url: args.url.clone(), model, needle: args.needle, cells })
}

/// A cell in the making.
#[derive(Default)]
struct Sum {
    prompt_tokens: usize,
    answered: u32,
    found: u32,
    logprobs: f64,
    logprob_tokens: usize,
    missed: Option<String>,
}

impl Sum {
    fn add(&mut self, prompt: &Prompt, answer: ask::Answer) {
        self.prompt_tokens += prompt.tokens.len();
        self.answered += 1;
        self.logprobs += answer.logprobs.iter().sum::<f64>();
        self.logprob_tokens += answer.logprobs.len();
        if prompt.found_in(&answer.text) {
            self.found += 1;
        } else if self.missed.is_none() {
            self.missed = Some(answer.text);
        }
    }

    fn cell(self, length: u32, depth: u32) -> Cell {
        Cell {
            length,
            depth,
            prompt_tokens: self.prompt_tokens as f64 / f64::from(self.answered.max(1)),
            answered: self.answered,
            found: self.found,
            confidence: (self.logprobs / self.logprob_tokens.max(1) as f64).exp(),
            missed: self.missed,
        }
    }
}

fn render(report: &Report) -> String {
    let mut lengths: Vec<u32> = report.cells.iter().map(|cell| cell.length).collect();
    lengths.dedup();
    let mut depths: Vec<u32> = Vec::new();
    for cell in &report.cells {
        if !depths.contains(&cell.depth) {
            depths.push(cell.depth);
        }
    }
    let cell = |length: u32, depth: u32| {
        report.cells.iter().find(|cell| cell.length == length && cell.depth == depth)
    };
    let mut rows = vec![vec!["depth \\ tokens".to_owned()]];
    rows[0].extend(lengths.iter().map(u32::to_string));
    let mut map = String::new();
    for &depth in &depths {
        let mut row = vec![format!("{depth} %")];
        map.push_str(&format!("{depth:>5} %  "));
        for &length in &lengths {
            let found = cell(length, depth).and_then(|cell| Some((cell.share()?, cell.confidence)));
            row.push(found.map_or_else(
                || "-".to_owned(),
                |(share, confidence)| format!("{:.0} % ({})", share * 100.0, number(confidence)),
            ));
            let shade = found.map_or('?', |(share, _)| plot::shade(share));
            map.extend(std::iter::repeat_n(shade, 6));
        }
        rows.push(row);
        map.push('\n');
    }
    map.push_str("         ");
    for length in &lengths {
        map.push_str(&format!("{length:<6}"));
    }
    let misses: Vec<String> = report
        .cells
        .iter()
        .filter_map(|cell| {
            let missed = cell.missed.as_ref()?;
            Some(format!("  {} tokens, depth {} %: {:?}\n", cell.length, cell.depth, missed))
        })
        .take(5)
        .collect();
    let misses = match misses.is_empty() {
        true => String::new(),
        false => format!("\nanswers without the needle, such as\n{}", misses.concat()),
    };
    format!(
        "{} at {}: needles found, and how sure the answers were\n\n{}\n{}\n{misses}",
        report.model,
        report.url,
        aligned(&rows),
        map.trim_end()
    )
}

#[cfg(test)]
mod tests;
