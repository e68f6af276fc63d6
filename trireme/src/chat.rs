//! `trireme chat`: a conversation in the terminal with any OpenAI-compatible server.

use std::time::Duration;

use anyhow::Context as _;
use bench::client::{Client, ClientError};
use rustyline::{DefaultEditor, error::ReadlineError};
use serde_json::{Value, json};

use crate::answer::{self, Request};

/// Flags of `trireme chat`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The server, without /v1.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// The model's name; default: the first that the server lists.
    #[arg(long)]
    pub model: Option<String>,
    /// Sent as a bearer token.
    #[arg(long, env = "TRIREME_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// An instruction that comes before the first question.
    #[arg(long)]
    pub system: Option<String>,
    /// 0 is greedy; default: what the model's generation_config.json says.
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Tokens of an answer at most.
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// The same seed gives the same answers.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Let the model think before it answers.
    #[arg(long)]
    pub thinking: bool,
}

/// Talks until end of input.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = Client::new(&args.url, args.api_key, Duration::from_secs(600))?;
    let model = match args.model {
        Some(model) => model,
        None => client
            .first_model()
            .await
            .with_context(|| format!("no server answers at {}; `trireme up` starts one", client.base()))?,
    };
    let request = Request {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        seed: args.seed,
        thinking: args.thinking,
    };
    let opening: Vec<Value> =
        args.system.iter().map(|text| json!({ "role": "system", "content": text })).collect();
    let mut messages = opening.clone();
    println!("{model} at {}. /new starts over, /exit or Ctrl-D ends.", client.base());
    let mut editor = DefaultEditor::new()?;
    loop {
        // Reading a line blocks; the runtime has other threads for whatever is in flight.
        let line = match tokio::task::block_in_place(|| editor.readline("> ")) {
            Ok(line) => line,
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => return Ok(()),
            "/new" => {
                messages.clone_from(&opening);
                continue;
            }
            question => {
                let _ = editor.add_history_entry(question);
                messages.push(json!({ "role": "user", "content": question }));
            }
        }
        match answer::chat(&client, &model, &messages, &request, std::io::stdout()).await {
            Ok(answer) => {
                println!("\n[{}]", answer::figures(&answer.streamed));
                messages.push(json!({ "role": "assistant", "content": answer.text }));
            }
            Err(error) => {
                // The question was not answered: the conversation goes on as if it had not been asked.
                messages.pop();
                println!("\n{}", explain(&error));
            }
        }
    }
}

fn explain(error: &ClientError) -> String {
    match error {
        ClientError::Status { retry_after_s: Some(seconds), message, .. } => {
            format!("{message} (try again in {seconds} s)")
        }
        other => other.to_string(),
    }
}
