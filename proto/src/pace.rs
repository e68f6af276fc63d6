//! How fast something goes: units per second of the time that they took, of late. One definition for every process, so that a
//! rate in a report means what its reader takes it for.
//!
//! A synchronous sum with a memory of [`MEMORY`]: what lies that much busy time back weighs a third of what is new. Idle time does
//! not count. Deliberately absent: clocks.

use std::time::Duration;

/// Busy time that a pace remembers: some hundred steps of the smallest models, and soon behind a change of load.
pub const MEMORY: Duration = Duration::from_secs(4);

/// Units and the time they took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pace {
    units: f64,
    seconds: f64,
}

impl Pace {
    /// `units` took `time`.
    pub fn add(&mut self, units: u64, time: Duration) {
        let seconds = time.as_secs_f64();
        self.forget(time);
        self.units += units as f64;
        self.seconds += seconds;
    }

    /// Lets what was seen weigh less, as if `time` had been busy.
    pub fn forget(&mut self, time: Duration) {
        let kept = (-time.as_secs_f64() / MEMORY.as_secs_f64()).exp();
        self.units *= kept;
        self.seconds *= kept;
    }

    /// Units per second; `None` before anything was seen.
    pub fn per_s(&self) -> Option<f64> {
        (self.units > 0.0 && self.seconds > 0.0).then(|| self.units / self.seconds)
    }

    /// Units per second where `prior` units per second were expected, as if they had been seen for `time`.
    pub fn per_s_with(&self, prior: f64, time: Duration) -> f64 {
        let time = time.as_secs_f64();
        (self.units + prior * time) / (self.seconds + time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(10);

    #[test]
    fn it_is_the_plain_rate_of_what_was_seen() {
        let mut pace = Pace::default();
        assert_eq!(pace.per_s(), None);
        pace.add(50, STEP);
        assert_eq!(pace.per_s(), Some(5000.0));
        (0..10_000).for_each(|_| pace.add(50, STEP));
        let rate = pace.per_s().expect("seen");
        assert!((rate - 5000.0).abs() < 1e-6, "{rate}");
    }

    #[test]
    fn it_follows_a_change_within_its_memory() {
        let mut pace = Pace::default();
        (0..1000).for_each(|_| pace.add(50, STEP));
        (0..800).for_each(|_| pace.add(10, STEP));
        let rate = pace.per_s().expect("seen");
        assert!((1000.0..1700.0).contains(&rate), "two memories later: {rate}");
    }

    #[test]
    fn a_prior_gives_way_to_what_is_seen() {
        let mut pace = Pace::default();
        let prior = |pace: &Pace| pace.per_s_with(100.0, Duration::from_secs(1));
        assert_eq!(prior(&pace), 100.0);
        pace.add(300, Duration::from_secs(1));
        assert!((prior(&pace) - 200.0).abs() < 1e-9);
        pace.forget(Duration::from_secs(400));
        assert!((prior(&pace) - 100.0).abs() < 1e-6);
    }
}
