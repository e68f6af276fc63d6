//! Health as forward progress: a worker is well while its device thread goes round. It goes round with work and
//! without, and each round steps whatever can be stepped; that the process answers says nothing about either.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::metrics::Metrics;

/// How often health looks at progress.
const INTERVAL: Duration = Duration::from_millis(250);

/// Judges progress from a series of looks at it.
#[derive(Debug)]
struct Watch {
    stall_max: Duration,
    rounds: u64,
    moved_at: Instant,
}

impl Watch {
    fn new(stall_max: Duration, rounds: u64, now: Instant) -> Self {
        Self { stall_max, rounds, moved_at: now }
    }

    /// Whether the thread has gone round within `stall_max`.
    fn observe(&mut self, rounds: u64, now: Instant) -> bool {
        if rounds != self.rounds {
            (self.rounds, self.moved_at) = (rounds, now);
        }
        now.duration_since(self.moved_at) < self.stall_max
    }
}

/// Keeps the health service's answer, and `unwell`, in step with the device thread's progress. Never ends.
pub(crate) async fn watch(
    stall_max: Duration,
    metrics: Metrics,
    reporter: HealthReporter,
    unwell: Arc<AtomicBool>,
) {
    let mut watch = Watch::new(stall_max, metrics.rounds.get(), Instant::now());
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        ticks.tick().await;
        let well = watch.observe(metrics.rounds.get(), Instant::now());
        if unwell.swap(!well, Ordering::Relaxed) == well {
            tracing::warn!(well, "forward progress changed");
        }
        let status = if well { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in ["", "trireme.v1.Prefill"] {
            reporter.set_service_status(service, status).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_follows_the_rounds() {
        let start = Instant::now();
        let mut watch = Watch::new(Duration::from_secs(5), 0, start);
        let mut check = |second: u64, rounds, expect: bool, why: &str| {
            assert_eq!(watch.observe(rounds, start + Duration::from_secs(second)), expect, "{why}");
        };
        check(4, 1, true, "going round");
        check(8, 1, true, "not long enough yet");
        check(9, 1, false, "the thread hangs");
        check(60, 2, true, "it recovered");
        check(64, 2, true, "counted from the last round");
        check(65, 2, false, "it hangs again");
    }
}
