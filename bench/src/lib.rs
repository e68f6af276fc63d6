//! Everything that measures or predicts, as `trireme bench …`.
//!
//! [`serve`] loads a running server from outside, through its OpenAI endpoint, and so measures other servers alike;
//! [`ops`] times the operators that a step is made of and holds them against what the machine can do.
//! Deliberately absent: anything that a worker needs to run.

pub mod client;
pub mod ops;
pub mod serve;
pub mod sse;
mod table;

/// What can be measured.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum BenchCommand {
    /// Load an OpenAI-compatible server: latencies, throughput, goodput, and where a request's time goes.
    Serve(serve::Args),
    /// Time every operator at a model's shapes: GB/s, GFLOP/s, and the share of what this machine can do.
    Ops(ops::Args),
}

/// Runs a measurement: prints its tables and writes the files that were asked for.
///
/// # Errors
/// The server cannot be reached, nothing was answered, or a file cannot be written.
pub async fn run(command: BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Serve(args) => serve::run(args).await,
        BenchCommand::Ops(args) => ops::run(&args),
    }
}
