//! `trireme generate`: a file of prompts through a whole cluster, at full batch, answers in the file's order.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, BufWriter, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bench::client::Client;
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};

use crate::{
    answer::{self, Answer, Request},
    cluster, progress, up,
};

/// A file with more prompts than this is refused rather than held in memory.
const PROMPTS_MAX: usize = 1_000_000;

/// Flags of `trireme generate`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// One prompt a line; a line that is a JSON object may carry `prompt` or `messages`. `-` reads standard input.
    #[arg(long)]
    pub input_file: PathBuf,
    /// Where the answers go, one JSON object a line; default: standard output, as text.
    #[arg(long)]
    pub output_file: Option<PathBuf>,
    /// Continue the lines as plain text instead of answering them as chat messages.
    #[arg(long)]
    pub raw: bool,
    /// Use this running server instead of starting a cluster in this process.
    #[arg(long)]
    pub url: Option<String>,
    /// Tokens of an answer at most.
    #[arg(long, default_value_t = 256)]
    pub max_new_tokens: u32,
    /// 0 is greedy; default: what the model's generation_config.json says.
    #[arg(long)]
    pub temperature: Option<f32>,
    /// The same seed gives the same answers.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Prompts in flight at most.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub concurrency: u16,
    /// What to start.
    #[command(flatten)]
    pub shape: up::Shape,
}

/// One line of the input.
#[derive(Debug, Clone, PartialEq)]
enum Prompt {
    Text(String),
    Messages(Vec<Value>),
}

/// Answers every prompt of the file.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let prompts = read(&args)?;
    let own = match &args.url {
        Some(_) => None,
        None => Some(cluster::start(args.shape.in_process_config()?, cluster::Options::default()).await?),
    };
    let url = match (&args.url, &own) {
        (Some(url), _) => url.clone(),
        (None, Some(cluster)) => format!("http://{}", cluster.http_address()),
        (None, None) => bail!("neither a URL nor a cluster"),
    };
    let outcome = answer_all(&args, &url, prompts).await;
    if let Some(cluster) = own {
        cluster.shutdown().await;
    }
    outcome
}

async fn answer_all(args: &Args, url: &str, prompts: Vec<Prompt>) -> anyhow::Result<()> {
    let client = Client::new(url, None, Duration::from_secs(3600))?;
    let model = client.first_model().await?;
    let request = Request {
        max_tokens: Some(args.max_new_tokens),
        temperature: args.temperature,
        seed: args.seed,
        thinking: false,
    };
    let begin = Instant::now();
    let bar = progress::prompts(prompts.len() as u64);
    let mut answers = stream::iter(prompts.iter().enumerate().map(|(number, prompt)| {
        let (client, model, request) = (&client, model.as_str(), &request);
        async move {
            let answer = match prompt {
                Prompt::Text(text) if args.raw => {
                    answer::complete(client, model, text, request, std::io::sink()).await
                }
                Prompt::Text(text) => {
                    let messages = [json!({ "role": "user", "content": text })];
                    answer::chat(client, model, &messages, request, std::io::sink()).await
                }
                Prompt::Messages(messages) => {
                    answer::chat(client, model, messages, request, std::io::sink()).await
                }
            };
            (number, answer)
        }
    }))
    // In order of their ends: behind one long answer the batch would else run empty.
    .buffer_unordered(usize::from(args.concurrency));

    let mut out: Box<dyn Write> = match &args.output_file {
        Some(path) => Box::new(BufWriter::new(
            std::fs::File::create(path).with_context(|| format!("--output-file {}", path.display()))?,
        )),
        None => Box::new(std::io::stdout()),
    };
    let (mut tokens, mut failed, mut index) = (0, 0_usize, 0_usize);
    // Answers whose turn has not come.
    let mut early = BTreeMap::new();
    while let Some((number, answer)) = answers.next().await {
        bar.inc(1);
        early.insert(number, answer);
        while let Some(answer) = early.remove(&index) {
            match answer {
                Ok(answer) => {
                    tokens += answer.streamed.completion_tokens().unwrap_or(0);
                    report(&mut out, args.output_file.is_some(), &prompts[index], &answer)?;
                }
                Err(error) => {
                    failed += 1;
                    eprintln!("prompt {}: {error}", index + 1);
                }
            }
            index += 1;
        }
    }
    out.flush()?;
    bar.finish_and_clear();
    let seconds = begin.elapsed().as_secs_f64();
    eprintln!(
        "{} prompts, {tokens} tokens in {seconds:.2} s: {:.0} tokens/s",
        prompts.len(),
        tokens as f64 / seconds
    );
    if failed > 0 {
        bail!("{failed} of {} prompts failed", prompts.len());
    }
    Ok(())
}

fn report(out: &mut dyn Write, json_lines: bool, prompt: &Prompt, answer: &Answer) -> std::io::Result<()> {
    if json_lines {
        let prompt = match prompt {
            Prompt::Text(text) => Value::from(text.as_str()),
            Prompt::Messages(messages) => Value::from(messages.as_slice()),
        };
        let line = json!({ "prompt": prompt, "completion": answer.text, "usage": answer.streamed.usage });
        return writeln!(out, "{line}");
    }
    match prompt {
        Prompt::Text(text) => writeln!(out, "Prompt: {text}")?,
        Prompt::Messages(messages) => writeln!(out, "Prompt: {} messages", messages.len())?,
    }
    writeln!(out, "Completion: {}\n", answer.text)
}

fn read(args: &Args) -> anyhow::Result<Vec<Prompt>> {
    let input: Box<dyn BufRead> = if args.input_file.as_os_str() == "-" {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        let file = std::fs::File::open(&args.input_file)
            .with_context(|| format!("--input-file {}", args.input_file.display()))?;
        Box::new(BufReader::new(file))
    };
    let mut prompts = Vec::new();
    for (number, line) in input.lines().enumerate() {
        let line = line.with_context(|| format!("--input-file, line {}", number + 1))?;
        if line.trim().is_empty() {
            continue;
        }
        if prompts.len() == PROMPTS_MAX {
            bail!("--input-file has more than {PROMPTS_MAX} prompts");
        }
        prompts.push(parse(&line).with_context(|| format!("--input-file, line {}", number + 1))?);
    }
    Ok(prompts)
}

fn parse(line: &str) -> anyhow::Result<Prompt> {
    let Ok(Value::Object(object)) = serde_json::from_str::<Value>(line) else {
        return Ok(Prompt::Text(line.to_owned()));
    };
    match (object.get("prompt"), object.get("messages")) {
        (Some(Value::String(text)), None) => Ok(Prompt::Text(text.clone())),
        (None, Some(Value::Array(messages))) => Ok(Prompt::Messages(messages.clone())),
        _ => bail!("a JSON line must have either a string `prompt` or a list `messages`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_prompt_and_an_object_says_what_it_is() {
        let check = |line: &str, expected: Option<Prompt>| assert_eq!(parse(line).ok(), expected, "{line}");
        check("Hello", Some(Prompt::Text("Hello".to_owned())));
        check("[1, 2]", Some(Prompt::Text("[1, 2]".to_owned())));
        check("{\"prompt\": \"Hi\"}", Some(Prompt::Text("Hi".to_owned())));
        check("{\"messages\": []}", Some(Prompt::Messages(Vec::new())));
        check("{\"prompt\": 7}", None);
        check("{}", None);
    }
}
