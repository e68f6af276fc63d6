//! Everything that measures or predicts, as `trireme bench …`.
//!
//! [`serve`] loads a running server from outside, through its OpenAI endpoint, and so measures other servers alike;
//! [`simulate`] loads the workers' schedulers in simulated time, with the same requests ([`workload`]). [`ops`] times the
//! operators that a step is made of and holds them against what the machine can do. [`engine`] runs a model's steps in this
//! process, without anything around them, and [`drafts`] says what drafts among them cost. [`transfer`] moves KV blocks
//! between two processes, and [`handover`] times a prompt's from one device thread to another; [`cancel`] times how soon both
//! ends are free without its client. [`chaos`] puts the hand-off's state machines under faults. [`perplexity`] and [`niah`] ask whether what is served is still the model: how well it
//! predicts a text, how far back it remembers.
//! Deliberately absent: anything that a worker needs to run.

pub mod cancel;
pub mod chaos;
pub mod client;
mod demo;
pub mod drafts;
pub mod engine;
pub mod handover;
mod json_file;
pub mod niah;
pub mod ops;
pub mod peak;
pub mod perplexity;
mod plot;
pub mod serve;
pub mod simulate;
pub mod sse;
mod table;
pub mod transfer;
pub mod workload;

/// What can be measured.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum BenchCommand {
    /// Load an OpenAI-compatible server: latencies, throughput, goodput, and where a request's time goes.
    Serve(Box<serve::Args>),
    /// Load the workers' schedulers in simulated time: what overload does, counted exactly.
    Simulate(Box<simulate::Args>),
    /// Time every operator at a model's shapes: GB/s, GFLOP/s, and the share of what this machine can do.
    Ops(ops::Args),
    /// What one process makes of a model: prompt and generation tokens per second, and where a step's time goes.
    Engine(engine::Args),
    /// What drafts of the MTP module cost, by batch size, and how often they must stand to pay.
    Drafts(drafts::Args),
    /// What a hand-over of V3-shaped KV adds to a prompt's time, from prefill's last layer to decode's commit.
    Handover(handover::Args),
    /// How soon prefill and decode of a running cluster are free once clients have gone away.
    Cancel(cancel::Args),
    /// The protocols' state machines under faults, judged by an oracle.
    #[command(subcommand)]
    Chaos(chaos::Command),
    /// What bringing KV blocks from one process to another costs, by every transport, beside copies and TCP.
    Transfer(Box<transfer::Args>),
    /// How well a model predicts a text, by teacher forcing, through the engine or a server.
    Perplexity(perplexity::Args),
    /// Ask a running server for a needle in haystacks of several lengths, at several depths.
    Niah(niah::Args),
}

/// Runs a measurement: prints its tables and writes the files that were asked for.
///
/// # Errors
/// The server cannot be reached, nothing was answered, or a file cannot be written.
pub async fn run(command: BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Serve(args) => serve::run(&args).await,
        BenchCommand::Simulate(args) => simulate::run(&args),
        BenchCommand::Ops(args) => ops::run(&args),
        BenchCommand::Engine(args) => engine::run(&args),
        BenchCommand::Drafts(args) => drafts::run(&args),
        BenchCommand::Handover(args) => tokio::task::spawn_blocking(move || handover::run(&args)).await?,
        BenchCommand::Cancel(args) => cancel::run(&args).await,
        BenchCommand::Chaos(command) => chaos::run(&command),
        // On a thread of its own: some paths bring a runtime along.
        BenchCommand::Transfer(args) => tokio::task::spawn_blocking(move || transfer::run(&args)).await?,
        BenchCommand::Perplexity(args) => perplexity::run(&args).await,
        BenchCommand::Niah(args) => niah::run(&args).await,
    }
}
