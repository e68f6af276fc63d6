//! What a decode worker counts. The device thread writes atomics and nothing else; health, the routers' reports and
//! Prometheus read the same ones.
//!
//! Names start with `decode_`, as the crate does.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvtransfer::{ReceiverStats, TransferReport};
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use proto::share::Priority;

mod tier;

use self::tier::TierCounters;
use crate::scheduler::{PlanStats, PrefixStats};
use crate::speculation::DRAFTS_MAX;

/// Upper bounds in microseconds: a step of the demo model takes about 1 ms, of V3 on a GPU 20 to 50 ms.
const STEP_BOUNDS_US: &[u64] =
    &[250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000];

/// Upper bounds in microseconds: from a short prompt on loopback to a long one behind a queue.
const HANDOFF_BOUNDS_US: &[u64] = &[
    1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000, 30_000_000,
];

/// Everything counted, cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// Sequences that take part in steps.
    pub(crate) running: Gauge,
    /// Running sequences that the next step could run: those whose reader keeps up.
    pub(crate) runnable: Gauge,
    /// Sequences whose KV is on the way.
    pub(crate) waiting: Gauge,
    /// Prompt tokens that are to be computed here, and how many a second are.
    pub(crate) waiting_tokens: Gauge,
    pub(crate) prompt_tokens_per_s: Gauge,
    /// Mean of the last steps, microseconds.
    pub(crate) step_us: Gauge,
    /// Prompt tokens computed here.
    pub(crate) prompt_tokens: Counter,
    /// Sequences that wait for blocks, by class.
    pub(crate) queued: [Gauge; 2],
    /// Running sequences that are short of a block.
    pub(crate) short: Gauge,
    /// What planning memory with estimates has led to.
    pub(crate) plan: PlanCounters,
    /// Blocks that no sequence holds, cached ones included.
    pub(crate) blocks_free: Gauge,
    /// Blocks that no sequence holds and whose KV can still be found.
    pub(crate) blocks_cached: Gauge,
    /// What the prefix cache has counted.
    pub(crate) prefix: PrefixCounters,
    /// What the tier behind the pool has counted.
    pub(crate) tier: TierCounters,
    /// Steps that gave tokens.
    pub(crate) steps: Counter,
    /// Tokens sampled here; first tokens are prefill's.
    pub(crate) tokens: Counter,
    /// Rounds of the device thread's loop, idle ones included.
    pub(crate) rounds: Counter,
    /// Sequences admitted.
    pub(crate) admitted: Counter,
    /// Sequences that ended by their own rule.
    pub(crate) finished: Counter,
    /// Time of a step, sampling included.
    pub(crate) step_time: DurationHistogram,
    /// Time from ticket to commit.
    pub(crate) handoff_time: DurationHistogram,
    /// Where that time goes.
    pub(crate) handoff_stages: HandoffStages,
    /// What the receiver of hand-offs has counted.
    pub(crate) handoffs: HandoffCounters,
    /// Drafted tokens, and those that stood.
    pub(crate) drafts: DraftCounters,
    /// Time from submission to blocks, by class.
    queue_time: [DurationHistogram; 2],
    failures: Family<Kind, Counter>,
    refusals: Family<Kind, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

impl Metrics {
    /// Zeroes, for a pool of `kv_blocks`.
    pub(crate) fn new(kv_blocks: usize) -> Self {
        let mut registry = Registry::with_prefix("decode");
        let mut gauge = |name: &str, help: &str| {
            let gauge: Gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let running = gauge("running", "Sequences that take part in steps");
        let runnable = gauge("runnable", "Running sequences whose reader keeps up");
        let waiting = gauge("waiting", "Sequences whose KV is on the way");
        let waiting_tokens = gauge("waiting_tokens", "Prompt tokens that are to be computed here");
        let prompt_tokens_per_s = gauge(
            "prompt_tokens_per_second",
            "Prompt tokens computed per second of the time with any, of late",
        );
        let step_us = gauge("step_mean_microseconds", "Mean time of a step, of late");
        let short = gauge("short", "Running sequences whose next KV block is not safe to give at the moment");
        let queued = [
            gauge("queued_interactive", "Interactive sequences that wait for KV blocks"),
            gauge("queued_batch", "Batch sequences that wait for KV blocks"),
        ];
        let blocks_free = gauge("kv_blocks_free", "KV blocks that no sequence holds, cached ones included");
        let blocks_cached =
            gauge("kv_blocks_cached", "KV blocks that no sequence holds and that can be found");
        let blocks = gauge("kv_blocks", "KV blocks in the pool");
        blocks.set(as_gauge(kv_blocks));
        blocks_free.set(as_gauge(kv_blocks));
        let tier = TierCounters::new(&mut registry);
        let mut counter = |name: &str, help: &str| {
            let counter: Counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let steps = counter("steps", "Steps that gave tokens");
        let tokens = counter("tokens", "Tokens sampled here");
        let prompt_tokens = counter("prompt_tokens", "Prompt tokens computed here");
        let rounds = counter("rounds", "Rounds of the device thread's loop");
        let admitted = counter("admitted", "Sequences admitted");
        let finished = counter("finished", "Sequences that ended by their own rule");
        let prefix = PrefixCounters {
            tokens: counter("prefix_tokens", "Prompt tokens looked up in the prefix cache"),
            hit_tokens: counter(
                "prefix_hit_tokens",
                "Prompt tokens whose KV was here and was not handed over",
            ),
            evictions: counter("kv_evictions", "Cached KV blocks that gave way to new ones"),
        };
        let plan = PlanCounters {
            memory_pauses: counter("memory_pauses", "Turns passed over for want of a safe KV block"),
            underestimated: counter(
                "length_underestimated_tokens",
                "Tokens by which completions outlived the estimate made at admission",
            ),
            overestimated: counter(
                "length_overestimated_tokens",
                "Tokens by which completions stayed below the estimate made at admission",
            ),
        };
        let handoffs = HandoffCounters {
            bytes: counter("handoff_bytes", "KV bytes written into the pool"),
            duplicates: counter("handoff_duplicates", "KV pieces that had landed before"),
            stale: counter("handoff_stale", "KV frames that the fence stopped: their ticket was dead"),
            violations: counter("handoff_violations", "KV frames that their ticket did not permit"),
            malformed: counter("handoff_malformed", "Frames on the KV channel that were no message"),
            superseded: counter(
                "handoff_superseded",
                "KV frames that the fence stopped: their transfer had left their path",
            ),
            broken: counter("handoff_broken_paths", "Paths that were lost in the middle of a hand-off"),
            resumed: counter("handoff_resumed", "Hand-offs that went on where they were, on another path"),
            revoked: counter("handoff_revoked", "Tickets that were revoked in the middle of a hand-off"),
            landing_us: counter(
                "handoff_landing_microseconds",
                "Time spent on checksums and on copying KV into the pool",
            ),
        };
        let step_time = DurationHistogram::new(STEP_BOUNDS_US);
        registry.register_with_unit(
            "step",
            "Time of a step, sampling included",
            Unit::Seconds,
            step_time.clone(),
        );
        let handoff_time = DurationHistogram::new(HANDOFF_BOUNDS_US);
        registry.register_with_unit(
            "handoff",
            "Time from ticket to commit",
            Unit::Seconds,
            handoff_time.clone(),
        );
        let handoff_stages = HandoffStages::new(&mut registry);
        let queue_time = [(); 2].map(|()| DurationHistogram::new(HANDOFF_BOUNDS_US));
        for (priority, histogram) in Priority::ALL.into_iter().zip(&queue_time) {
            let name = format!("queue_{}", priority.name());
            let help = "Time from submission to KV blocks";
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
        let drafts = DraftCounters::new(&mut registry);
        let failures = Family::default();
        registry.register("failures", "Sequences that ended without finishing", failures.clone());
        let refusals = Family::default();
        registry.register("refusals", "Requests that did not become sequences", refusals.clone());
        Self {
            registry: Arc::new(registry),
            running,
            runnable,
            waiting,
            waiting_tokens,
            prompt_tokens_per_s,
            step_us,
            prompt_tokens,
            queued,
            short,
            plan,
            queue_time,
            blocks_free,
            blocks_cached,
            prefix,
            tier,
            steps,
            tokens,
            rounds,
            admitted,
            finished,
            step_time,
            handoff_time,
            handoff_stages,
            handoffs,
            drafts,
            failures,
            refusals,
        }
    }

    /// Notes how long a sequence waited for blocks.
    pub(crate) fn queued_for(&self, priority: Priority, time: Duration) {
        self.queue_time[priority as usize].observe(time);
    }

    /// Sequences that wait for blocks.
    pub(crate) fn queued_total(&self) -> i64 {
        self.queued.iter().map(Gauge::get).sum()
    }

    /// Notes what the prefix cache has done since the start.
    pub(crate) fn prefix(&self, stats: &PrefixStats) {
        self.prefix.store(stats);
        self.tier.store_hits(stats.host_hit_tokens, stats.disk_hit_tokens);
    }

    /// Counts a sequence that ended without finishing.
    pub(crate) fn failed(&self, kind: &'static str) {
        self.failures.get_or_create(&Kind { kind }).inc();
    }

    /// Counts a request that did not become a sequence.
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

/// [`ReceiverStats`] where a scrape can see them.
#[derive(Clone, Debug)]
pub(crate) struct HandoffCounters {
    bytes: Counter,
    duplicates: Counter,
    stale: Counter,
    violations: Counter,
    malformed: Counter,
    superseded: Counter,
    broken: Counter,
    resumed: Counter,
    revoked: Counter,
    landing_us: Counter,
}

impl HandoffCounters {
    pub(crate) fn store(&self, stats: &ReceiverStats, landing: Duration) {
        let store = |counter: &Counter, total| counter.inner().store(total, Ordering::Relaxed);
        store(&self.bytes, stats.bytes);
        store(&self.duplicates, stats.duplicates);
        store(&self.stale, stats.stale);
        store(&self.violations, stats.violations);
        store(&self.malformed, stats.malformed);
        store(&self.superseded, stats.superseded);
        store(&self.broken, stats.broken);
        store(&self.resumed, stats.resumed);
        store(&self.revoked, stats.revoked);
        store(&self.landing_us, u64::try_from(landing.as_micros()).unwrap_or(u64::MAX));
    }
}

/// A hand-off's time by stage, and what it moved.
#[derive(Clone, Debug)]
pub(crate) struct HandoffStages {
    reserved: DurationHistogram,
    arriving: DurationHistogram,
    finishing: DurationHistogram,
    /// From the commit to the first token sampled here.
    pub(crate) first_step: DurationHistogram,
}

impl HandoffStages {
    fn new(registry: &mut Registry) -> Self {
        let mut stage = |name: &str, help: &str| {
            let histogram = DurationHistogram::new(HANDOFF_BOUNDS_US);
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
            histogram
        };
        Self {
            reserved: stage("handoff_reserved", "Time from the ticket to its first KV frame"),
            arriving: stage("handoff_arriving", "Time from the first KV frame to the last KV piece"),
            finishing: stage("handoff_finishing", "Time from the last KV piece to the commit"),
            first_step: stage("handoff_first_step", "Time from the commit to the first token sampled here"),
        }
    }

    pub(crate) fn observe(&self, report: &TransferReport) {
        self.reserved.observe(report.reserved);
        self.arriving.observe(report.arriving);
        self.finishing.observe(report.finishing);
    }
}

/// Drafted tokens by their place behind a sequence's last token, from 1 on.
#[derive(Clone, Debug)]
pub(crate) struct DraftCounters {
    drafted: [Counter; DRAFTS_MAX],
    accepted: [Counter; DRAFTS_MAX],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Place {
    position: u32,
}

impl DraftCounters {
    fn new(registry: &mut Registry) -> Self {
        // Looked up once: a lookup takes a lock.
        let mut counters = |name, help| {
            let family = Family::<Place, Counter>::default();
            let places = std::array::from_fn(|place| {
                family.get_or_create(&Place { position: place as u32 + 1 }).clone()
            });
            registry.register(name, help, family);
            places
        };
        Self {
            drafted: counters("drafted_tokens", "Tokens drafted with the MTP module"),
            accepted: counters("accepted_tokens", "Drafted tokens that the main model gave as well"),
        }
    }

    /// Of a sequence's `drafted` tokens the first `stood` stood.
    pub(crate) fn count(&self, drafted: usize, stood: usize) {
        for (counters, count) in [(&self.drafted, drafted), (&self.accepted, stood)] {
            for counter in counters.iter().take(count) {
                counter.inc();
            }
        }
    }
}

/// [`PlanStats`] where a scrape can see them.
#[derive(Clone, Debug)]
pub(crate) struct PlanCounters {
    memory_pauses: Counter,
    underestimated: Counter,
    overestimated: Counter,
}

impl PlanCounters {
    pub(crate) fn store(&self, stats: &PlanStats) {
        let store = |counter: &Counter, total| counter.inner().store(total, Ordering::Relaxed);
        store(&self.memory_pauses, stats.memory_pauses);
        store(&self.underestimated, stats.underestimated_tokens);
        store(&self.overestimated, stats.overestimated_tokens);
    }
}

/// [`PrefixStats`] where a scrape can see them.
#[derive(Clone, Debug)]
pub(crate) struct PrefixCounters {
    tokens: Counter,
    hit_tokens: Counter,
    evictions: Counter,
}

impl PrefixCounters {
    fn store(&self, stats: &PrefixStats) {
        let store = |counter: &Counter, total| counter.inner().store(total, Ordering::Relaxed);
        store(&self.tokens, stats.tokens);
        store(&self.hit_tokens, stats.hit_tokens);
        store(&self.evictions, stats.evictions);
    }
}

/// A count as Prometheus' gauges hold it.
pub(crate) fn as_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A histogram of durations that takes no lock to observe: prometheus-client's own holds a mutex while it is scraped,
/// and a scrape must not stop the device thread.
#[derive(Clone)]
pub(crate) struct DurationHistogram(Arc<Buckets>);

struct Buckets {
    bounds_us: &'static [u64],
    /// One per bound, then one for what exceeds them all.
    counts: Box<[AtomicU64]>,
    sum_us: AtomicU64,
}

impl DurationHistogram {
    fn new(bounds_us: &'static [u64]) -> Self {
        let counts = (0..=bounds_us.len()).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Buckets { bounds_us, counts, sum_us: AtomicU64::new(0) }))
    }

    pub(crate) fn observe(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = self.0.bounds_us.partition_point(|&bound| bound < us);
        self.0.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.0.sum_us.fetch_add(us, Ordering::Relaxed);
    }
}

impl fmt::Debug for DurationHistogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DurationHistogram").field("counts", &self.0.counts).finish_non_exhaustive()
    }
}

impl EncodeMetric for DurationHistogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let seconds = |us: u64| us as f64 / 1e6;
        let bounds = self.0.bounds_us.iter().map(|&us| seconds(us)).chain([f64::INFINITY]);
        let counts = self.0.counts.iter().map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = seconds(self.0.sum_us.load(Ordering::Relaxed));
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_holds_what_was_counted() {
        let metrics = Metrics::new(7);
        metrics.steps.inc();
        metrics.failed("lease");
        metrics.step_time.observe(Duration::from_micros(400));
        metrics.step_time.observe(Duration::from_secs(60));
        let text = metrics.text();
        for line in [
            "decode_kv_blocks_free 7",
            "decode_steps_total 1",
            "decode_failures_total{kind=\"lease\"} 1",
            "decode_step_seconds_bucket{le=\"0.00025\"} 0",
            "decode_step_seconds_bucket{le=\"0.0005\"} 1",
            "decode_step_seconds_bucket{le=\"1.0\"} 1",
            "decode_step_seconds_bucket{le=\"+Inf\"} 2",
            "decode_step_seconds_count 2",
            "decode_step_seconds_sum 60.0004",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
