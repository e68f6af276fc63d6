//! A request's time by hop, from the `trireme_timings` object beside the final usage (`trireme.v1.Timings`).

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::summary::{Distribution, Percentiles};

/// What the server says about one request, in microseconds. A hop that it leaves out counts as 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Template, tokenizer and admission on the router.
    pub admission_us: u64,
    /// From asking decode for blocks to holding a ticket.
    pub reserve_us: u64,
    /// Waiting in prefill's queue.
    pub prefill_queue_us: u64,
    /// From the first chunk's start to the first token.
    pub prefill_us: u64,
    /// From prefill's last layer to the last block committed on decode.
    pub handoff_us: u64,
    /// From commit to the first decode step's token.
    pub decode_first_us: u64,
    /// From the first token of decode to the last.
    pub decode_us: u64,
    /// From receipt to the first token leaving the router.
    pub ttft_us: u64,
    /// From receipt to the end.
    pub total_us: u64,
}

impl Timings {
    /// Reads the object; `None` when it is no such object.
    pub fn read(object: &Value) -> Option<Self> {
        object.as_object()?;
        Self::deserialize(object).ok()
    }

    /// Time before the first token that no hop accounts for: the router's own work, and messages between processes.
    pub fn unaccounted_us(&self) -> u64 {
        let hops = [self.admission_us, self.reserve_us, self.prefill_queue_us, self.prefill_us];
        self.ttft_us.saturating_sub(hops.into_iter().fold(0, u64::saturating_add))
    }
}

/// One hop over all requests of a load point, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HopSummary {
    /// The hop.
    pub hop: &'static str,
    /// Its time.
    pub ms: Percentiles,
}

/// The hops in a request's order, then what the server saw as a whole, then what it did not see.
pub fn summarise(requests: &[(Timings, Option<Duration>)]) -> Vec<HopSummary> {
    type Hop = (&'static str, fn(&Timings) -> u64);
    const HOPS: [Hop; 10] = [
        ("admission", |t| t.admission_us),
        ("reserve", |t| t.reserve_us),
        ("prefill queue", |t| t.prefill_queue_us),
        ("prefill", |t| t.prefill_us),
        ("before first token, other", Timings::unaccounted_us),
        ("server TTFT", |t| t.ttft_us),
        ("hand-off", |t| t.handoff_us),
        ("first decode step", |t| t.decode_first_us),
        ("decode", |t| t.decode_us),
        ("server total", |t| t.total_us),
    ];
    let mut summaries = Vec::new();
    for (hop, of) in HOPS {
        let mut times = Distribution::new();
        for (timings, _) in requests {
            times.record_us(of(timings));
        }
        summaries.extend(times.percentiles().map(|ms| HopSummary { hop, ms }));
    }
    let mut outside = Distribution::new();
    for (timings, seen) in requests {
        if let Some(ttft) = seen {
            outside.record(ttft.saturating_sub(Duration::from_micros(timings.ttft_us)));
        }
    }
    summaries.extend(outside.percentiles().map(|ms| HopSummary { hop: "TTFT outside the server", ms }));
    summaries
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_object_is_read_leniently() {
        let read = Timings::read(&json!({ "prefill_us": 30, "ttft_us": 50, "a_later_hop_us": 1 }));
        assert_eq!(read, Some(Timings { prefill_us: 30, ttft_us: 50, ..Timings::default() }));
        for broken in [json!(null), json!([1]), json!({ "ttft_us": "soon" }), json!({ "ttft_us": -1 })] {
            assert_eq!(Timings::read(&broken), None, "{broken}");
        }
    }

    #[test]
    fn what_no_hop_explains_is_shown() {
        let timings = Timings {
            admission_us: 1_000,
            reserve_us: 2_000,
            prefill_queue_us: 3_000,
            prefill_us: 4_000,
            ttft_us: 15_000,
            ..Timings::default()
        };
        assert_eq!(timings.unaccounted_us(), 5_000);
        assert_eq!(Timings { ttft_us: 1, ..timings }.unaccounted_us(), 0, "clocks may disagree");
        let hops = summarise(&[(timings, Some(Duration::from_millis(17)))]);
        let mean = |name| hops.iter().find(|hop| hop.hop == name).map(|hop| hop.ms.mean.round());
        assert_eq!(mean("before first token, other"), Some(5.0));
        assert_eq!(mean("TTFT outside the server"), Some(2.0));
        assert!(summarise(&[]).is_empty());
    }
}
