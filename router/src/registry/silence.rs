//! How long a worker has been silent, by this router's own progress.
//!
//! A wall clock would blame a worker for the time in which the router itself did not run: stopped, swapped out, or behind
//! in its work, it would find every lease overdue at once, with the reports that renew them still unread. So a lease
//! is counted in pulses that this process has made; a gap of any length is one pulse, and what has arrived is read first.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior};

/// Pulses of a lease: silence shows at most a tenth of it late.
const PULSES: u32 = 10;

/// A lease's pulses.
pub(super) struct Silence {
    pulses: Interval,
}

impl Silence {
    /// Of a lease; must be made within a runtime.
    pub fn new(lease: Duration) -> Self {
        let mut pulses = tokio::time::interval((lease / PULSES).max(Duration::from_millis(1)));
        pulses.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { pulses }
    }

    /// What `next` gives, or `None` after a whole lease without it.
    pub async fn or<T>(&mut self, next: impl Future<Output = T>) -> Option<T> {
        self.pulses.reset();
        within_pulses(next, |context| self.pulses.poll_tick(context).map(drop)).await
    }
}

/// What `next` gives before the last of [`PULSES`] pulses, `None` after it.
async fn within_pulses<T>(
    next: impl Future<Output = T>,
    mut pulse: impl FnMut(&mut std::task::Context<'_>) -> Poll<()>,
) -> Option<T> {
    let mut next = pin!(next);
    let mut left = PULSES;
    std::future::poll_fn(move |context| {
        loop {
            if let Poll::Ready(heard) = next.as_mut().poll(context) {
                return Poll::Ready(Some(heard));
            }
            match pulse(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) => left -= 1,
            }
            if left == 0 {
                return Poll::Ready(None);
            }
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    /// Polls as often as it takes, with a pulse in every poll that `pulses` says yes to and a report at poll `report_at`.
    fn outcome(pulses: impl Fn(u32) -> bool, report_at: u32) -> Option<&'static str> {
        let at = std::cell::Cell::new(0);
        let seen = std::cell::Cell::new(u32::MAX);
        let next = std::future::poll_fn(|_| match at.get() >= report_at {
            true => Poll::Ready("report"),
            false => Poll::Pending,
        });
        // One pulse a poll at most, whatever time has passed between two.
        let pulse = |_: &mut Context<'_>| match seen.replace(at.get()) != at.get() && pulses(at.get()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        };
        let mut within = pin!(within_pulses(next, pulse));
        loop {
            if let Poll::Ready(outcome) = within.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return outcome;
            }
            at.set(at.get() + 1);
        }
    }

    #[test]
    fn a_lease_of_pulses_without_a_report_is_the_end() {
        assert_eq!(outcome(|_| true, u32::MAX), None);
        assert_eq!(outcome(|_| true, PULSES), None);
        assert_eq!(outcome(|_| true, PULSES - 1), Some("report"));
    }

    #[test]
    fn what_counts_is_pulses_and_not_time() {
        // Between polls there may be any time: only two of a hundred came with a pulse.
        assert_eq!(outcome(|at| at % 50 == 0, 100), Some("report"));
    }
}
