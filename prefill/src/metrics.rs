//! What a prefill worker counts. The device thread writes; health, the routers' reports and Prometheus read the same
//! numbers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvtransfer::sender::SenderStats;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

mod tier;

use self::tier::TierCounters;
use crate::scheduler::PrefixStats;

/// Upper bounds in seconds: from a short prompt on loopback to a long one behind a queue.
const BOUNDS_S: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Everything counted, cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// Rounds of the device thread's loop, idle ones included: what health looks at.
    pub(crate) rounds: Counter,
    /// Steps that were computed.
    pub(crate) steps: Counter,
    /// Prompt tokens computed.
    pub(crate) tokens: Counter,
    /// Requests whose blocks are committed on decode.
    pub(crate) finished: Counter,
    /// Requests whose stream was dropped before they ended.
    pub(crate) cancelled: Counter,
    /// Prompts waiting for their first chunk.
    pub(crate) waiting: Gauge,
    /// Those of one class.
    pub(crate) waiting_of: [Gauge; 2],
    /// Prompts that hold blocks.
    pub(crate) active: Gauge,
    /// Prompt tokens queued and not yet computed.
    pub(crate) waiting_tokens: Gauge,
    /// Prompt tokens computed per second of the time that steps took, of late.
    pub(crate) tokens_per_s: Gauge,
    /// Blocks that no sequence holds, cached ones included.
    pub(crate) blocks_free: Gauge,
    /// Blocks that no sequence holds and whose KV can still be found.
    pub(crate) blocks_cached: Gauge,
    prefix_tokens: Counter,
    prefix_hit_tokens: Counter,
    evictions: Counter,
    handoffs: HandoffCounters,
    /// What the tier behind the pool has counted.
    pub(crate) tier: TierCounters,
    // These take a lock while they are scraped; they are observed once a request, not once a step.
    queue: Histogram,
    compute: Histogram,
    handoff: Histogram,
    failures: Family<Kind, Counter>,
    refusals: Family<Kind, Counter>,
}

/// [`SenderStats`] where a scrape can see them.
#[derive(Clone, Debug)]
struct HandoffCounters {
    bytes: Counter,
    full: Counter,
    broken: Counter,
    resumed: Counter,
    repeated: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

impl Metrics {
    /// Zeroes, for a pool of `kv_blocks`.
    pub(crate) fn new(kv_blocks: usize) -> Self {
        let mut registry = Registry::with_prefix("prefill");
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let rounds = counter("rounds", "Rounds of the device thread's loop");
        let steps = counter("steps", "Steps computed");
        let tokens = counter("tokens", "Prompt tokens computed");
        let finished = counter("finished", "Requests whose blocks are committed on decode");
        let cancelled = counter("cancelled", "Requests whose stream was dropped");
        let prefix_tokens = counter("prefix_tokens", "Prompt tokens looked up in the prefix cache");
        let prefix_hit_tokens =
            counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache and not computed");
        let evictions = counter("kv_evictions", "Cached KV blocks that gave way to new ones");
        let handoffs = HandoffCounters {
            bytes: counter("handoff_bytes", "KV bytes pushed to decode, repeated ones included"),
            full: counter("handoff_full", "Pushes handed back because decode had no room"),
            broken: counter("handoff_broken_paths", "Paths that were lost in the middle of a hand-off"),
            resumed: counter("handoff_resumed", "Hand-offs that went on where they were"),
            repeated: counter("handoff_repeated_pieces", "KV pieces that had to be pushed again"),
        };
        let tier = TierCounters::new(&mut registry);
        let mut gauge = |name: &str, help: &str| {
            let gauge: Gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let waiting = gauge("waiting", "Prompts waiting for their first chunk");
        let waiting_of = [
            gauge("waiting_interactive", "Interactive prompts waiting for their first chunk"),
            gauge("waiting_batch", "Batch prompts waiting for their first chunk"),
        ];
        let active = gauge("active", "Prompts that hold blocks");
        let waiting_tokens = gauge("waiting_tokens", "Prompt tokens queued and not yet computed");
        let tokens_per_s =
            gauge("tokens_per_second", "Prompt tokens computed per second of the time with any, of late");
        let blocks_free = gauge("kv_blocks_free", "KV blocks that no sequence holds, cached ones included");
        let blocks_cached =
            gauge("kv_blocks_cached", "KV blocks that no sequence holds and that can be found");
        let blocks = gauge("kv_blocks", "KV blocks in the pool");
        blocks.set(as_gauge(kv_blocks));
        blocks_free.set(as_gauge(kv_blocks));
        let mut time = |name: &str, help: &str| {
            let histogram = Histogram::new(BOUNDS_S);
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
            histogram
        };
        let queue = time("queue", "Time from arrival to the first chunk");
        let compute = time("compute", "Time from the first chunk to the first token");
        let handoff = time("handoff", "Time from the first token to the commit on decode");
        let failures = Family::default();
        registry.register("failures", "Queued requests that ended early", failures.clone());
        let refusals = Family::default();
        registry.register("refusals", "Requests that were not queued", refusals.clone());
        Self {
            registry: Arc::new(registry),
            rounds,
            steps,
            tokens,
            finished,
            cancelled,
            waiting,
            waiting_of,
            active,
            waiting_tokens,
            tokens_per_s,
            blocks_free,
            blocks_cached,
            prefix_tokens,
            prefix_hit_tokens,
            evictions,
            handoffs,
            tier,
            queue,
            compute,
            handoff,
            failures,
            refusals,
        }
    }

    /// Notes a first token: time in the queue and on the device.
    pub(crate) fn first_token(&self, queue: Duration, compute: Duration) {
        self.queue.observe(queue.as_secs_f64());
        self.compute.observe(compute.as_secs_f64());
    }

    /// Notes what the prefix cache has done since the start.
    pub(crate) fn prefix(&self, stats: &PrefixStats) {
        let store = |counter: &Counter, total| counter.inner().store(total, Ordering::Relaxed);
        store(&self.prefix_tokens, stats.tokens);
        store(&self.prefix_hit_tokens, stats.hit_tokens);
        store(&self.evictions, stats.evictions);
        self.tier.store_hits(stats.host_hit_tokens, stats.disk_hit_tokens);
    }

    /// Notes what the hand-offs' transfers have done since the start.
    pub(crate) fn transfers(&self, stats: &SenderStats) {
        let store = |counter: &Counter, total| counter.inner().store(total, Ordering::Relaxed);
        store(&self.handoffs.bytes, stats.bytes);
        store(&self.handoffs.full, stats.full);
        store(&self.handoffs.broken, stats.broken);
        store(&self.handoffs.resumed, stats.resumed);
        store(&self.handoffs.repeated, stats.repeated);
    }

    /// Notes a commit.
    pub(crate) fn handed_off(&self, handoff: Duration) {
        self.finished.inc();
        self.handoff.observe(handoff.as_secs_f64());
    }

    /// Counts a queued request that ended early.
    pub(crate) fn failed(&self, kind: &'static str) {
        self.failures.get_or_create(&Kind { kind }).inc();
    }

    /// Counts a request that was not queued.
    pub(crate) fn refused(&self, kind: &'static str) {
        self.refusals.get_or_create(&Kind { kind }).inc();
    }

    /// All of it in Prometheus' text format.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// A count as Prometheus' gauges hold it.
pub(crate) fn as_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_holds_what_was_counted() {
        let metrics = Metrics::new(7);
        metrics.steps.inc();
        metrics.failed("step");
        metrics.refused("queue");
        metrics.first_token(Duration::from_micros(1500), Duration::from_secs(60));
        let text = metrics.text();
        for line in [
            "prefill_kv_blocks_free 7",
            "prefill_steps_total 1",
            "prefill_failures_total{kind=\"step\"} 1",
            "prefill_refusals_total{kind=\"queue\"} 1",
            "prefill_queue_seconds_bucket{le=\"0.001\"} 0",
            "prefill_queue_seconds_bucket{le=\"0.0025\"} 1",
            "prefill_compute_seconds_bucket{le=\"30.0\"} 0",
            "prefill_compute_seconds_bucket{le=\"+Inf\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
