//! The command line: every way to start this program.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::{certificates, chat, generate, inspect, synth, up};

/// Serves DeepSeek-V3-architecture models from a cluster of prefill, decode and expert workers.
#[derive(Debug, Parser)]
#[command(name = "trireme", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a whole cluster on this machine.
    Up(up::Args),
    /// Run the router of a configured cluster.
    Router(RoleArgs),
    /// Run one prefill worker of a configured cluster.
    Prefill(RoleArgs),
    /// Run one decode worker of a configured cluster.
    Decode(RoleArgs),
    /// Run one expert worker of a configured cluster.
    Expert(RoleArgs),
    /// Talk with a served model in the terminal.
    Chat(chat::Args),
    /// Answer a file of prompts.
    Generate(generate::Args),
    /// Say what is in a checkpoint and what memory it needs where.
    Inspect(inspect::Args),
    /// Write a checkpoint of random weights in any dimensions.
    Synth(synth::Args),
    /// Make the certificates that the processes of a cluster over several machines trust each other by.
    Certificates(certificates::Args),
    /// Measure.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Flags of a single role.
#[derive(Debug, Clone, clap::Args)]
pub struct RoleArgs {
    /// The cluster's TOML file.
    #[arg(long)]
    pub config: PathBuf,
    /// Which `[[worker]]` this is; may be left out where only one has this role.
    #[arg(long)]
    pub id: Option<String>,
    /// End when standard input ends: set by the supervisor, whose death then ends this process too.
    #[arg(long, hide = true)]
    pub supervised: bool,
}
