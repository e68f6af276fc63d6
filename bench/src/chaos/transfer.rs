//! Faults in KV hand-offs: seeded histories over the very state machines that serve.
//!
//! A history is a discrete-event simulation of two prefill and two decode workers, their connections, and a router that
//! reserves, cancels and notices deaths. Every row that is pushed carries its owner's stamp and place, and the oracle keeps
//! its own books over decode's memory: it looks at each place that is handed out for writing, at every byte of a
//! sequence when it commits and again when it ends, and at both pools when the history is over.
//!
//! The network is worse than any that the fabric has: frames overtake each other, come twice, and arrive from connections
//! that are lost and for processes that are gone.

mod decode;
mod history;
mod prefill;
mod tally;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::ensure;

use history::History;
pub use tally::Tally;

/// Hand-offs in one history: enough for every fault to meet every stage, few enough to be read.
const TRANSFERS_IN_HISTORY: u64 = 2_000;

/// `trireme bench chaos transfer`
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Hand-offs in all.
    #[arg(long, default_value_t = 100_000)]
    pub transfers: u64,
    /// The first history's seed; the others count up from it. Default: one that nobody has tried.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Threads; each runs histories of its own.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
}

/// Runs the histories and prints what happened.
///
/// # Errors
/// The oracle objects to something.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(|| rand::random::<u64>() >> 16);
    println!("histories from seed {seed}; `--seed` repeats them");
    let begin = Instant::now();
    let tally = histories(seed, args.transfers, args.threads.max(1));
    println!("{tally}");
    println!("{:.1} s", begin.elapsed().as_secs_f64());
    ensure!(tally.objections.is_empty(), "the oracle objects: {}", tally.objections.join("; "));
    Ok(())
}

/// The outcome of as many histories as hold `transfers` hand-offs, run by `threads` threads.
pub fn histories(seed: u64, transfers: u64, threads: usize) -> Tally {
    let next = AtomicU64::new(0);
    let total = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let left = transfers.saturating_sub(index * TRANSFERS_IN_HISTORY);
                    if left == 0 {
                        return;
                    }
                    let seed = seed.wrapping_add(index);
                    let mut tally = History::new(seed, left.min(TRANSFERS_IN_HISTORY)).run();
                    for objection in &mut tally.objections {
                        *objection = format!("seed {seed}: {objection}");
                    }
                    total.lock().unwrap_or_else(PoisonError::into_inner).add(tally);
                }
            });
        }
    });
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
