//! The search for a server's peak: the largest goodput at any rate.
//!
//! Rates grow by half while the server keeps up with them; then the gap between the last rate it kept up with and the
//! first it did not is halved a few times. A plain state machine: who probes a rate, a cluster or a simulation, is not
//! known here.

use serde::Serialize;

/// Goodput of less than this share of what came means that the server no longer keeps up.
const KEEPS_UP: f64 = 0.9;
/// Steps of the search between the two rates: 1.5 becomes 1.03.
const HALVINGS: u32 = 4;
/// From one request a second this reaches three millions.
const GROWTHS_MAX: u32 = 40;

/// One rate that was tried.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Probe {
    /// Requests per second asked for.
    pub rate: f64,
    /// Requests per second that came: chance makes them more or fewer.
    pub offered: f64,
    /// Requests per second answered within the goal.
    pub goodput: f64,
}

impl Probe {
    fn kept_up(&self) -> bool {
        self.goodput >= KEEPS_UP * self.offered
    }
}

/// The search so far.
#[derive(Debug, Clone, Serialize)]
pub struct PeakSearch {
    /// Every rate tried, in order.
    pub probes: Vec<Probe>,
    #[serde(skip)]
    from: f64,
    #[serde(skip)]
    halvings: u32,
}

impl PeakSearch {
    /// Begins at `from` requests per second, more than 0.
    pub fn new(from: f64) -> Self {
        Self { probes: Vec::new(), from, halvings: 0 }
    }

    /// The rate to try next; `None` when the search is over.
    pub fn next_rate(&self) -> Option<f64> {
        let above = self.probes.iter().filter(|probe| !probe.kept_up()).map(|probe| probe.rate);
        let above = above.fold(f64::INFINITY, f64::min);
        let below = self.probes.iter().filter(|probe| probe.kept_up() && probe.rate < above);
        let below = below.map(|probe| probe.rate).fold(0.0, f64::max);
        match (below > 0.0, above.is_finite()) {
            (false, false) => Some(self.from),
            (true, false) => ((self.probes.len() as u32) < GROWTHS_MAX).then_some(below * 1.5),
            // Not even the first rate: downwards, as often as upwards.
            (false, true) => ((self.probes.len() as u32) < GROWTHS_MAX).then_some(above / 2.0),
            (true, true) => (self.halvings < HALVINGS).then_some(f64::midpoint(below, above)),
        }
    }

    /// What came of [`Self::next_rate`].
    pub fn record(&mut self, probe: Probe) {
        let bracketed = self.probes.iter().any(Probe::kept_up) && self.probes.iter().any(|p| !p.kept_up());
        self.halvings += u32::from(bracketed);
        self.probes.push(probe);
    }

    /// The largest goodput seen. Of several noisy probes the largest flatters: where time does not matter, measure
    /// [`Self::rate`] again.
    pub fn peak(&self) -> f64 {
        self.probes.iter().map(|probe| probe.goodput).fold(0.0, f64::max)
    }

    /// The rate at which it was seen.
    pub fn rate(&self) -> f64 {
        self.probes.iter().max_by(|a, b| a.goodput.total_cmp(&b.goodput)).map_or(0.0, |probe| probe.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(from: f64, goodput: impl Fn(f64) -> f64) -> PeakSearch {
        let mut search = PeakSearch::new(from);
        while let Some(rate) = search.next_rate() {
            assert!(search.probes.len() < 100, "the search ends");
            search.record(Probe { rate, offered: rate, goodput: goodput(rate) });
        }
        search
    }

    #[test]
    fn the_peak_is_found_from_below_and_from_above() {
        // Up to 17 a second; beyond it what is late grows with what is asked.
        let server = |rate: f64| if rate <= 17.0 { rate } else { (34.0 - rate).max(0.0) };
        for from in [0.01, 1.0, 16.9, 17.1, 400.0] {
            let found = search(from, server);
            assert!((found.peak() / 17.0 - 1.0).abs() < 0.06, "from {from}: {:?}", found.probes);
        }
    }

    #[test]
    fn a_server_that_answers_nothing_or_everything_ends_the_search() {
        assert_eq!(search(1.0, |_| 0.0).peak(), 0.0);
        assert!(search(1.0, |rate| rate).peak() > 1e5);
    }
}
