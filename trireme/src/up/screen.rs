//! What `trireme up` prints once the cluster is there: who runs where, what to try, and a first answer.

use std::{
    io::Write as _,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bench::client::Client;
use model::ModelConfig;
use serde_json::json;

use super::Args;
use crate::{
    answer,
    cluster::Cluster,
    config::{Config, Role, Worker},
    node,
    supervisor::Supervisor,
};

/// What the screen shows.
pub(super) struct View<'a> {
    pub(super) config: &'a Config,
    pub(super) model: ModelConfig,
    pub(super) parameters: u64,
    pub(super) http: SocketAddr,
    pub(super) grpc: SocketAddr,
    pub(super) supervisor: Option<&'a Supervisor>,
    pub(super) state: Option<&'a Path>,
}

impl<'a> View<'a> {
    pub(super) fn of_config(config: &'a Config) -> anyhow::Result<Self> {
        let checkpoint = node::open_checkpoint(config)?;
        Ok(Self {
            config,
            model: checkpoint.config().clone(),
            parameters: crate::inspect::parameters(&checkpoint),
            http: config.router.http_listen,
            grpc: config.router.grpc_listen,
            supervisor: None,
            state: None,
        })
    }

    pub(super) fn of_cluster(config: &'a Config, cluster: &Cluster) -> anyhow::Result<Self> {
        Ok(Self { http: cluster.http_address(), grpc: cluster.grpc_address(), ..Self::of_config(config)? })
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.http)
    }

    fn pid(&self, id: &str) -> String {
        match self.supervisor {
            Some(supervisor) => supervisor
                .processes()
                .iter()
                .find(|p| p.spec.id == id)
                .map_or_else(|| "-".to_owned(), |p| p.pid().to_string()),
            None => std::process::id().to_string(),
        }
    }
}

pub(super) async fn greet(args: &Args, view: &View<'_>, begin: Instant) -> anyhow::Result<()> {
    let (url, model) = (view.url(), view.config.model.served_id());
    println!(
        "Trireme {} serves {model}: {}, {} numerics, {} tokens of context. Ready in {:.1} s.\n",
        env!("CARGO_PKG_VERSION"),
        millions(view.parameters),
        view.config.model.numerics,
        view.model.max_position_embeddings,
        begin.elapsed().as_secs_f64(),
    );
    println!("  {:<12} {:>8}  what", "worker", "pid");
    println!("  {:<12} {:>8}  HTTP {url}, gRPC {}", "router", view.pid("router"), view.grpc);
    for worker in &view.config.workers {
        println!("  {:<12} {:>8}  {}", worker.id, view.pid(&worker.id), duty(view, worker));
    }
    if let Some(state) = view.state {
        println!("\nLogs, certificates and the configuration: {}", state.display());
    }
    println!(
        "\nTry, in another terminal:\n  curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n    -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Tell me a story about a fox.\"}}]}}'"
    );
    let program = program();
    let elsewhere = if args.port == 8000 { String::new() } else { format!(" --url {url}") };
    println!("  {program} chat{elsewhere}\n  {program} bench serve{elsewhere}\n  curl {url}/metrics\n");
    if !args.quiet {
        first_question(&url, &model).await?;
    }
    println!("Ctrl-C stops everything.");
    Ok(())
}

fn duty(view: &View<'_>, worker: &Worker) -> String {
    let experts = view.config.workers_of(Role::Expert).count();
    match worker.role {
        Role::Expert => {
            format!("1/{experts} of the {} routed experts of every layer", view.model.n_routed_experts)
        }
        Role::Prefill => "prompts to KV blocks, pushed to decode".to_owned(),
        Role::Decode => format!("{} KV blocks of 64 tokens", view.config.engine.kv_blocks_max),
        Role::Router => String::new(),
    }
}

async fn first_question(url: &str, model: &str) -> anyhow::Result<()> {
    let client = Client::new(url, None, Duration::from_secs(120))?;
    let request = answer::Request { max_tokens: Some(64), temperature: Some(0.0), ..Default::default() };
    let question = "What is a planet?";
    println!("> {question}");
    let messages = [json!({ "role": "user", "content": question })];
    let answered = match answer::chat(&client, model, &messages, &request, std::io::stdout()).await {
        // A base model has no chat template: it continues a text instead.
        Err(bench::client::ClientError::Status { status: 400, .. }) => {
            let mut out = std::io::stdout();
            let opening = "Once upon a time";
            write!(out, "{opening}")?;
            answer::complete(&client, model, opening, &request, out).await
        }
        other => other,
    }
    .context("the cluster is up, but did not answer the first question")?;
    println!("\n[{}]\n", answer::figures(&answered.streamed));
    Ok(())
}

fn millions(parameters: u64) -> String {
    match parameters {
        0..1_000_000_000 => format!("{:.1} M parameters", parameters as f64 / 1e6),
        _ => format!("{:.1} B parameters", parameters as f64 / 1e9),
    }
}

/// How the user started this program, for the commands that the screen suggests.
fn program() -> String {
    let built_by_cargo =
        std::env::current_exe().is_ok_and(|p| p.components().any(|c| c.as_os_str() == "target"));
    if built_by_cargo { "cargo run --release --".to_owned() } else { "trireme".to_owned() }
}
