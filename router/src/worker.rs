//! A live worker as the router knows it: what it announced, its last report, the load that this router
//! put on it since, and the one channel to it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::ExecutionFingerprint;
use proto::v1;
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::placement::{StepLoad, Tier, WorkerLoad};

/// A worker's name and process: a restarted worker is another one.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerKey {
    /// Unique in the cluster at any moment.
    pub id: Arc<str>,
    /// Fresh number of each process start.
    pub incarnation: u64,
}

impl fmt::Display for WorkerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (incarnation {:016x})", self.id, self.incarnation)
    }
}

impl fmt::Debug for WorkerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A worker that holds a lease.
pub(crate) struct Worker {
    pub key: WorkerKey,
    pub tier: Tier,
    pub info: v1::WorkerInfo,
    pub fingerprint: Option<Arc<ExecutionFingerprint>>,
    /// Connects when first used; all sequences share it. Expert workers serve the fabric alone.
    pub channel: Option<Channel>,
    progress: Mutex<Progress>,
    own: OwnLoad,
    gone: watch::Sender<bool>,
}

/// What the last report said, and since when it says the same.
#[derive(Debug, Clone)]
struct Progress {
    report: v1::WorkerReport,
    /// KV blocks that our own sequences held when the report came.
    own_kv_blocks: u64,
    /// When a step was last seen to end, or there was last nothing to do.
    advanced: Instant,
}

/// What this router has given the worker and not got back: exact where a report is a quarter second old.
#[derive(Default)]
struct OwnLoad {
    sequences: AtomicU64,
    waiting_tokens: AtomicU64,
    kv_blocks: AtomicU64,
}

impl Worker {
    pub fn new(
        key: WorkerKey,
        tier: Tier,
        fingerprint: Option<Arc<ExecutionFingerprint>>,
        channel: Option<Channel>,
        info: v1::WorkerInfo,
        report: v1::WorkerReport,
        now: Instant,
    ) -> Self {
        let progress = Mutex::new(Progress { report, own_kv_blocks: 0, advanced: now });
        let (gone, _) = watch::channel(false);
        Self { key, tier, info, fingerprint, channel, progress, own: OwnLoad::default(), gone }
    }

    /// Takes the next report of the same incarnation.
    pub fn report(&self, report: v1::WorkerReport, now: Instant) {
        let mut progress = self.progress();
        let advanced = report.steps_total != progress.report.steps_total;
        // Idle until now: what has just arrived has its full time to make a step.
        let was_idle = !has_work(&progress.report);
        if advanced || was_idle || !has_work(&report) {
            progress.advanced = now;
        }
        progress.report = report;
        progress.own_kv_blocks = self.own.kv_blocks.load(Ordering::Relaxed);
    }

    /// Has work and has made no step for longer than `stall_max`.
    pub fn stalled(&self, now: Instant, stall_max: Duration) -> bool {
        let progress = self.progress();
        has_work(&progress.report) && now.saturating_duration_since(progress.advanced) > stall_max
    }

    /// The last report's view of the worker, or ours where we have given it more since.
    pub fn load(&self) -> WorkerLoad {
        let Progress { report, own_kv_blocks: own_then, .. } = self.progress().clone();
        let own_now = self.own.kv_blocks.load(Ordering::Relaxed);
        let kv_blocks_max = u64::from(self.info.kv_blocks_max);
        // What was free at the report, moved on by what we have given and got back since. With one router
        // the second bound is exact.
        let kv_blocks_free = (u64::from(report.kv_blocks_free) + own_then)
            .saturating_sub(own_now)
            .min(kv_blocks_max.saturating_sub(own_now));
        WorkerLoad {
            key: self.key.clone(),
            tier: self.tier,
            fingerprint: self.fingerprint.clone(),
            draining: report.draining,
            sequences: (u64::from(report.running) + u64::from(report.waiting))
                .max(self.own.sequences.load(Ordering::Relaxed)),
            waiting_tokens: report.waiting_tokens.max(self.own.waiting_tokens.load(Ordering::Relaxed)),
            kv_blocks_free,
            kv_blocks_max,
            kv_block_tokens: u64::from(self.info.kv_block_tokens).max(1),
            queued: report.queued.into(),
            prompt_tokens_per_s: report.prompt_tokens_per_s,
            step: StepLoad {
                running: u64::from(report.running),
                time: Duration::from_micros(report.step_us),
                batch_max: report.batch_max.into(),
                prompt_tokens_max: report.step_prompt_tokens_max.into(),
            },
            matched_tokens: 0,
        }
    }

    /// Steps made so far, as last reported.
    pub fn steps_total(&self) -> u64 {
        self.progress().report.steps_total
    }

    /// Counts a sequence against the worker until the guard is dropped.
    /// `kv_tokens`: what it takes of the pool at once; how much it grows is known by the worker's reports.
    pub fn assign(self: &Arc<Self>, waiting_tokens: u64, kv_tokens: u64) -> Assignment {
        let kv_blocks = kv_tokens.div_ceil(u64::from(self.info.kv_block_tokens).max(1));
        self.own.sequences.fetch_add(1, Ordering::Relaxed);
        self.own.waiting_tokens.fetch_add(waiting_tokens, Ordering::Relaxed);
        self.own.kv_blocks.fetch_add(kv_blocks, Ordering::Relaxed);
        Assignment { worker: Arc::clone(self), waiting_tokens, kv_blocks }
    }

    /// Ends every sequence that waits on this worker: it was replaced, fell silent or left.
    pub fn end(&self) {
        self.gone.send_replace(true);
    }

    /// Returns once [`Worker::end`] was called.
    pub async fn gone(&self) {
        // The sender lives in `self`, so waiting ends by the value alone.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        // Nothing panics while holding it, and a half-written report does no harm.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_work(report: &v1::WorkerReport) -> bool {
    report.runnable > 0
}

/// A sequence's share of a worker's load; given back when dropped.
pub(crate) struct Assignment {
    worker: Arc<Worker>,
    waiting_tokens: u64,
    kv_blocks: u64,
}

impl Assignment {
    /// The worker that carries it.
    pub fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        self.worker.own.sequences.fetch_sub(1, Ordering::Relaxed);
        self.worker.own.waiting_tokens.fetch_sub(self.waiting_tokens, Ordering::Relaxed);
        self.worker.own.kv_blocks.fetch_sub(self.kv_blocks, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
