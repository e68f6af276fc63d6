//! `trireme bench transfer`: what it costs to bring KV blocks from one process into another's pool.
//!
//! A sending and a receiving process on this host, as prefill and decode are: random blocks of a 256 MiB pool are gathered
//! into messages, and every block must lie at its own place of another 256 MiB pool, which is looked at afterwards (`pool`).
//! Our transports run under the whole hand-off, ticket, checksums and commit included (`push`); beside them stand what a
//! copy costs at all (`copies`), TCP (`tcp`), quinn on its own (`quinn`), and our shared memory without fence and checksums (`bare`), which exists
//! nowhere else. `--mode` runs one of them once and prints one line of JSON, with the options and fields of the harness that
//! the peers are driven by; without it all of them take turns.

mod bare;
mod copies;
mod ends;
mod peer;
mod plan;
mod pool;
mod push;
mod quinn;
mod rounds;
mod tcp;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use plan::{Outcome, Plan};

/// What to move, how, and how much of it.
#[derive(Debug, Clone, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// One path, once, as one line of JSON. Without it: all of them, in turns.
    #[arg(long)]
    mode: Option<Mode>,
    #[command(flatten)]
    shape: Shape,
    /// Rounds of the table.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Sizes of blocks in the table, bytes.
    #[arg(long, value_delimiter = ',', default_values_t = [9216, 41_984])]
    blocks: Vec<usize>,
    /// Modes of the table; default: all that this machine has.
    #[arg(long, value_delimiter = ',')]
    modes: Vec<Mode>,
}

/// What belongs to the benchmark besides its flags.
#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// The receiving process, started by the sending one.
    #[command(hide = true)]
    Receive,
}

/// One run's messages, and where both processes run.
#[derive(Debug, Clone, Serialize, Deserialize, clap::Args)]
pub(crate) struct Shape {
    /// Bytes of a block.
    #[arg(long, default_value_t = 9216)]
    block: usize,
    /// Blocks of a message, KiB.
    #[arg(long, default_value_t = 2048)]
    msg_kib: usize,
    /// Messages on their way at once.
    #[arg(long, default_value_t = 8)]
    inflight: usize,
    /// Messages that are timed; default: as many as `--total-mib` is.
    #[arg(long)]
    count: Option<usize>,
    /// What is timed, MiB.
    #[arg(long, default_value_t = 768)]
    total_mib: usize,
    /// What goes before it, MiB.
    #[arg(long, default_value_t = 128)]
    warm_mib: usize,
    /// Core of the sending process; negative: any.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pin_send: i64,
    /// Core of the receiving process; negative: any.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    pin_recv: i64,
    /// Largest UDP payload, bytes. Default: what the path allows.
    #[arg(long)]
    mtu: Option<u16>,
    /// NIXL's C library, for `rdma`.
    #[arg(long, env = "TRIREME_NIXL_LIBRARY")]
    nixl_library: Option<PathBuf>,
}

/// A way from pool to pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    /// One copy of each block, in one process.
    Memcpy,
    /// The same, and a checksum of each copy: the least that a checked transfer can cost.
    MemcpySum,
    /// Our shared memory.
    Shm,
    /// Our shared memory without tickets, checks and checksums.
    ShmBare,
    /// Our QUIC with mutual TLS.
    Quic,
    /// quinn driven directly, with mutual TLS: nothing is gathered, nothing is checked.
    Quinn,
    /// RDMA as we use it, through NIXL: over its TCP and CMA where there is no device (`UCX_TLS` chooses).
    Rdma,
    /// One TCP connection under tokio, unencrypted, unchecked.
    Tcp,
}

impl Mode {
    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Runs it, or is the receiving half of a run.
///
/// # Errors
/// A path is not there, or delivered a wrong block.
pub fn run(args: &Args) -> anyhow::Result<()> {
    match (&args.command, args.mode) {
        (Some(Command::Receive), _) => peer::receive(),
        (None, Some(mode)) => {
            println!("{}", once(mode, &args.shape)?.to_json(mode, &args.shape));
            Ok(())
        }
        (None, None) => rounds::run(args),
    }
}

/// One path, once.
fn once(mode: Mode, shape: &Shape) -> anyhow::Result<Outcome> {
    let plan = Plan::new(shape)?;
    plan::pin(shape.pin_send)?;
    match mode {
        Mode::Memcpy => copies::run(&plan, false),
        Mode::MemcpySum => copies::run(&plan, true),
        Mode::Shm | Mode::Quic | Mode::Rdma => push::run(mode, &plan, shape),
        Mode::ShmBare => bare::run(&plan, shape),
        Mode::Quinn => quinn::run(&plan, shape),
        Mode::Tcp => tcp::run(&plan, shape),
    }
}
