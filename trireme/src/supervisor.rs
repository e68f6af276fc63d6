//! The processes of one machine's cluster: started, watched, restarted, stopped together.
//!
//! A child knows that its supervisor is gone when its standard input ends, however the supervisor died; so no
//! cluster outlives its `up`, and no process group trickery is needed. A child that dies is started again at
//! once, and with a growing pause when it keeps dying.

use std::{
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::watch,
    task::JoinHandle,
};

use crate::progress;

/// What a child waits at most for its work to end after it was asked to stop.
/// Longer than any role's `drain_ms_max` default, so that what runs may end by itself.
const STOP_GRACE: Duration = Duration::from_secs(15);
/// A child that lived this long was healthy: its next death is restarted at once again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// One process to keep running.
#[derive(Debug, Clone)]
pub struct ProcessSpec {
    /// Worker id, or `router`.
    pub id: String,
    /// Program and arguments.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where its standard error goes.
    pub log: PathBuf,
    /// Processes end in this order, those of one number together: who still serves ends before who it needs.
    pub stop_order: u8,
}

/// A supervised process.
pub struct Process {
    /// What it was started from.
    pub spec: ProcessSpec,
    state: Arc<State>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    pid: AtomicU32,
    restarts: AtomicU64,
    loaded: AtomicU64,
    to_load: AtomicU64,
}

impl Process {
    /// Process id now, 0 while it is being restarted.
    pub fn pid(&self) -> u32 {
        self.state.pid.load(Ordering::Relaxed)
    }

    /// Bytes of weights that are in memory, and bytes in all; zeroes until it says so.
    pub fn loading(&self) -> (u64, u64) {
        (self.state.loaded.load(Ordering::Relaxed), self.state.to_load.load(Ordering::Relaxed))
    }

    /// How often it died and was started again.
    pub fn restarts(&self) -> u64 {
        self.state.restarts.load(Ordering::Relaxed)
    }
}

/// Keeps a set of processes alive until it is told to stop.
pub struct Supervisor {
    processes: Vec<Process>,
}

impl Supervisor {
    /// Starts every process; an error here means that one could not be started at all.
    pub fn start(specs: Vec<ProcessSpec>) -> anyhow::Result<Self> {
        let mut processes = Vec::with_capacity(specs.len());
        for spec in specs {
            let running = spawn(&spec)?;
            let state = Arc::new(State::default());
            state.pid.store(running.child.id().unwrap_or(0), Ordering::Relaxed);
            let (stop, stopping) = watch::channel(false);
            let task = tokio::spawn(watch_over(spec.clone(), running, state.clone(), stopping));
            processes.push(Process { spec, state, stop, task });
        }
        Ok(Self { processes })
    }

    /// The processes, in the order given to [`Supervisor::start`].
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// Ends the processes in their order: asks, waits for the grace period, then kills what is left.
    pub async fn stop(mut self) {
        self.processes.sort_by_key(|process| process.spec.stop_order);
        for together in self.processes.chunk_by_mut(|a, b| a.spec.stop_order == b.spec.stop_order) {
            for process in &*together {
                process.stop.send_replace(true);
            }
            for process in together {
                let _ = (&mut process.task).await;
            }
        }
    }
}

/// A child and the pipe whose end it takes as the order to stop. Held apart: `Child::wait` closes what it finds.
struct Running {
    child: Child,
    lifeline: Option<ChildStdin>,
}

fn spawn(spec: &ProcessSpec) -> anyhow::Result<Running> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&spec.log)
        .with_context(|| format!("log file {}", spec.log.display()))?;
    let mut child = Command::new(&spec.program)
        .args(&spec.arguments)
        // Kept open and never written: its end tells the child that the supervisor is gone.
        .stdin(Stdio::piped())
        // Progress while it loads; nothing else is written there.
        .stdout(Stdio::piped())
        .stderr(log)
        // The terminal's Ctrl-C belongs to the supervisor, which stops its children in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {} ({})", spec.id, spec.program.display()))?;
    let lifeline = child.stdin.take();
    Ok(Running { child, lifeline })
}

async fn watch_over(
    spec: ProcessSpec,
    mut running: Running,
    state: Arc<State>,
    mut stop: watch::Receiver<bool>,
) {
    let mut deaths_in_a_row = 0_u32;
    loop {
        let born = Instant::now();
        if let Some(reports) = running.child.stdout.take() {
            tokio::spawn(note_progress(reports, state.clone()));
        }
        tokio::select! {
            () = asked(&mut stop) => {
                end(&spec, running).await;
                return;
            }
            status = running.child.wait() => {
                state.pid.store(0, Ordering::Relaxed);
                tracing::warn!(worker = spec.id, ?status, "process ended, starting it again");
            }
        }
        deaths_in_a_row = if born.elapsed() >= HEALTHY_AFTER { 0 } else { deaths_in_a_row + 1 };
        loop {
            let pause = restart_pause(deaths_in_a_row);
            tokio::select! {
                () = asked(&mut stop) => return,
                () = tokio::time::sleep(pause) => {}
            }
            match spawn(&spec) {
                Ok(again) => {
                    running = again;
                    state.pid.store(running.child.id().unwrap_or(0), Ordering::Relaxed);
                    state.restarts.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Err(error) => {
                    deaths_in_a_row += 1;
                    tracing::error!(worker = spec.id, %error, "cannot start the process again");
                }
            }
        }
    }
}

/// Reads what a child tells of its loading, until it closes its standard output.
async fn note_progress(reports: ChildStdout, state: Arc<State>) {
    let mut lines = BufReader::new(reports).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some((done, total)) = progress::parse_report(&line) {
            state.loaded.store(done, Ordering::Relaxed);
            state.to_load.store(total, Ordering::Relaxed);
        }
    }
}

/// The supervisor wants an end, or is gone itself.
async fn asked(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Nothing for the first death, then doubling from 100 ms.
fn restart_pause(deaths_in_a_row: u32) -> Duration {
    match deaths_in_a_row {
        0 | 1 => Duration::ZERO,
        n => PAUSE_MAX.min(Duration::from_millis(100 << (n - 2).min(10))),
    }
}

async fn end(spec: &ProcessSpec, Running { mut child, lifeline }: Running) {
    drop(lifeline);
    if tokio::time::timeout(STOP_GRACE, child.wait()).await.is_err() {
        tracing::warn!(worker = spec.id, "did not end in time, killing it");
        let _ = child.kill().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_keeps_dying_is_restarted_ever_more_slowly_up_to_a_bound() {
        assert_eq!(restart_pause(1), Duration::ZERO);
        let pauses: Vec<_> = (2..12).map(restart_pause).collect();
        assert!(pauses.is_sorted());
        assert_eq!(restart_pause(u32::MAX), PAUSE_MAX);
    }
}
