//! Health as forward progress: a worker is well while its device thread goes round and, as long as there is something
//! to step, steps advance. That a process answers says nothing about either.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::metrics::Metrics;

/// How often health looks at progress.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// What the device thread has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Rounds of its loop.
    pub(crate) rounds: u64,
    /// Steps that gave tokens.
    pub(crate) steps: u64,
    /// Sequences that a step could run now.
    pub(crate) runnable: u64,
}

impl Progress {
    pub(crate) fn of(metrics: &Metrics) -> Self {
        Self {
            rounds: metrics.rounds.get(),
            steps: metrics.steps.get(),
            runnable: u64::try_from(metrics.runnable.get()).unwrap_or(0),
        }
    }
}

/// Judges progress from a series of looks at it.
#[derive(Debug)]
pub(crate) struct Watch {
    stall_max: Duration,
    last: Progress,
    round_at: Instant,
    /// When a step was last made, or none was owed.
    step_at: Instant,
}

impl Watch {
    pub(crate) fn new(stall_max: Duration, progress: Progress, now: Instant) -> Self {
        Self { stall_max, last: progress, round_at: now, step_at: now }
    }

    /// Whether the worker moves.
    pub(crate) fn observe(&mut self, progress: Progress, now: Instant) -> bool {
        if progress.rounds != self.last.rounds {
            self.round_at = now;
        }
        // A thread that goes round without work owes no step; one that hangs still owes what it last said.
        if progress.steps != self.last.steps || progress.runnable == 0 {
            self.step_at = now;
        }
        self.last = progress;
        now.duration_since(self.round_at) < self.stall_max
            && now.duration_since(self.step_at) < self.stall_max
    }

    /// Keeps `health` and `unwell` in step with what `metrics` say. `ended` closes with the device thread: no need to
    /// wait for its silence then.
    pub(crate) async fn report(
        mut self,
        metrics: Metrics,
        ended: watch::Receiver<()>,
        health: HealthReporter,
        unwell: Arc<AtomicBool>,
    ) {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        loop {
            ticks.tick().await;
            let moves = self.observe(Progress::of(&metrics), Instant::now());
            let well = moves && ended.has_changed().is_ok();
            if unwell.swap(!well, Ordering::Relaxed) == well {
                tracing::warn!(well, "forward progress changed");
            }
            let status = if well { ServingStatus::Serving } else { ServingStatus::NotServing };
            for service in ["", "trireme.v1.Decode"] {
                health.set_service_status(service, status).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_follows_progress() {
        let start = Instant::now();
        let mut watch =
            Watch::new(Duration::from_secs(5), Progress { rounds: 0, steps: 0, runnable: 0 }, start);
        let mut check = |second: u64, rounds, steps, runnable, expect: bool, why: &str| {
            let progress = Progress { rounds, steps, runnable };
            assert_eq!(watch.observe(progress, start + Duration::from_secs(second)), expect, "{why}");
        };
        check(4, 1, 0, 0, true, "idle and going round");
        check(8, 2, 0, 0, true, "idle as long as it likes");
        check(9, 3, 0, 2, true, "work has just come");
        check(12, 4, 1, 2, true, "a step was made");
        check(16, 5, 1, 2, true, "not long enough yet");
        check(17, 6, 1, 2, false, "it goes round without stepping");
        check(18, 7, 2, 2, true, "it recovered");
        check(20, 8, 2, 0, true, "nothing left to do");
        check(26, 8, 2, 0, false, "idle, but the thread hangs");
    }
}
