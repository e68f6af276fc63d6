//! `trireme bench chaos`: the protocols' own state machines under faults, judged by an oracle that shares no code with them.

pub mod transfer;

/// What is put under faults.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// KV hand-offs: workers killed, stopped and restarted, connections reset and partitioned, frames delayed, repeated,
    /// reordered, damaged and lost, requests cancelled, at any point of a transfer.
    Transfer(transfer::Args),
}

/// Runs what was asked for.
///
/// # Errors
/// The oracle objects: the seed of the history is in the message.
pub fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Transfer(args) => transfer::run(args),
    }
}
