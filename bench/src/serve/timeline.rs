//! A load point over its time: does it stay as it begins?

use std::time::Duration;

use serde::Serialize;

use super::load::Measured;
use super::summary::Slo;

/// Slices of a load point.
const SLICES: u32 = 20;

/// What happened in one slice, per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Slice {
    /// Where it begins, seconds from the load point's start.
    pub from_s: f64,
    /// Requests due.
    pub offered_per_s: f64,
    /// Requests answered.
    pub completed_per_s: f64,
    /// Those of them within the goal.
    pub good_per_s: f64,
    /// Requests that ended without an answer.
    pub failed_per_s: f64,
}

/// The load point's slices up to the end of its window.
pub(super) fn slices(measured: &Measured, slo: &Slo) -> Vec<Slice> {
    let slice = measured.window.end.saturating_duration_since(measured.start) / SLICES;
    if slice.is_zero() {
        return Vec::new();
    }
    let mut slices: Vec<Slice> = (0..SLICES)
        .map(|number| Slice { from_s: (slice * number).as_secs_f64(), ..Slice::default() })
        .collect();
    let each = 1.0 / slice.as_secs_f64();
    let number = |at: Duration| (at.as_nanos() / slice.as_nanos()) as usize;
    for outcome in &measured.outcomes {
        if let Some(slice) = slices.get_mut(number(outcome.due.saturating_duration_since(measured.start))) {
            slice.offered_per_s += each;
        }
        let Some(slice) = slices.get_mut(number(outcome.ended.saturating_duration_since(measured.start)))
        else {
            continue;
        };
        match &outcome.answer {
            Ok(answer) => {
                slice.completed_per_s += each;
                slice.good_per_s += if slo.met_by(answer) { each } else { 0.0 };
            }
            Err(_) => slice.failed_per_s += each,
        }
    }
    slices
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::super::load::Outcome;
    use super::*;

    #[test]
    fn each_request_is_in_the_slice_it_came_and_in_the_one_it_ended() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let lost = |due, ended| Outcome { due, ended, refused: 0, reuse: None, answer: Err("x".into()) };
        let outcomes = vec![lost(at(0), at(39)), lost(at(3), at(1000)), lost(at(3), at(3))];
        let measured = Measured { outcomes, start, window: at(4)..at(40) };
        let slices = slices(&measured, &Slo::default());
        assert_eq!(slices.len(), 20);
        assert_eq!((slices[0].offered_per_s, slices[1].offered_per_s), (0.5, 1.0));
        assert_eq!((slices[1].failed_per_s, slices[19].failed_per_s), (0.5, 0.5));
        assert_eq!(slices[19].from_s, 38.0);
    }
}
