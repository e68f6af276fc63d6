//! What the router counts, and its Prometheus text. Every label comes from a closed set.

use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use proto::share::Priority;

use crate::placement::Tier;

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// The router's metrics; all start with `router_`.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Labels<2>, Counter>,
    tokens: Family<Labels<1>, Counter>,
    retries: Family<Labels<1>, Counter>,
    workers: Family<Labels<1>, Gauge>,
    workers_lost: Family<Labels<2>, Counter>,
    /// Announcements that got no lease.
    pub workers_refused: Counter,
    queued: Family<Labels<1>, Gauge>,
    turned_away: Family<Labels<2>, Counter>,
    prefills: Family<Labels<1>, Counter>,
    expected_ttft: Family<Labels<1>, Histogram, fn() -> Histogram>,
    /// Prompt tokens let in whose request has no first token yet.
    pub ahead: Gauge,
    queue: Family<Labels<1>, Histogram, fn() -> Histogram>,
    /// Sequences admitted and unfinished.
    pub sequences: Gauge,
    /// Receipt to first token.
    pub ttft: Histogram,
    /// Between two messages of tokens of one sequence.
    pub itl: Histogram,
    /// Receipt to end, of requests that succeeded.
    pub e2e: Histogram,
    hops: Family<Labels<1>, Histogram, fn() -> Histogram>,
}

/// 100 µs to 52 s in doublings: a router's own hops are at one end, a long prompt at the other.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(1e-4, 2.0, 20))
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("router");
        let metrics = Self {
            requests: Family::default(),
            tokens: Family::default(),
            retries: Family::default(),
            workers: Family::default(),
            workers_lost: Family::default(),
            workers_refused: Counter::default(),
            queued: Family::default(),
            turned_away: Family::default(),
            prefills: Family::default(),
            expected_ttft: Family::new_with_constructor(seconds as fn() -> Histogram),
            ahead: Gauge::default(),
            queue: Family::new_with_constructor(seconds as fn() -> Histogram),
            sequences: Gauge::default(),
            ttft: seconds(),
            itl: seconds(),
            e2e: seconds(),
            hops: Family::new_with_constructor(seconds as fn() -> Histogram),
            registry: Registry::default(),
        };
        registry.register("requests", "Requests by door and outcome", metrics.requests.clone());
        registry.register("tokens", "Tokens by kind", metrics.tokens.clone());
        registry.register(
            "retries",
            "Sequences tried on another pair, by the tier that failed",
            metrics.retries.clone(),
        );
        registry.register("workers", "Workers that hold a lease, by tier", metrics.workers.clone());
        registry.register(
            "workers_lost",
            "Workers that lost their lease, by tier and reason",
            metrics.workers_lost.clone(),
        );
        registry.register(
            "workers_refused",
            "Announcements that got no lease",
            metrics.workers_refused.clone(),
        );
        registry.register("queue_depth", "Requests waiting for admission, by class", metrics.queued.clone());
        registry.register(
            "turned_away",
            "Requests that got 429 at the door, by class and reason",
            metrics.turned_away.clone(),
        );
        registry.register(
            "prefills",
            "Prompts by the tier that was to compute them",
            metrics.prefills.clone(),
        );
        registry.register_with_unit(
            "expected_ttft",
            "Receipt to first token as expected when a request came, by class",
            Unit::Seconds,
            metrics.expected_ttft.clone(),
        );
        registry.register(
            "ahead_tokens",
            "Prompt tokens let in whose sequence has no first token yet",
            metrics.ahead.clone(),
        );
        registry.register_with_unit(
            "queue",
            "Time that requests without a free place waited for one, by class",
            Unit::Seconds,
            metrics.queue.clone(),
        );
        registry.register("sequences", "Sequences admitted and unfinished", metrics.sequences.clone());
        registry.register_with_unit("ttft", "Receipt to first token", Unit::Seconds, metrics.ttft.clone());
        registry.register_with_unit(
            "itl",
            "Between two token messages of a sequence",
            Unit::Seconds,
            metrics.itl.clone(),
        );
        registry.register_with_unit(
            "e2e",
            "Receipt to end, of requests that succeeded",
            Unit::Seconds,
            metrics.e2e.clone(),
        );
        registry.register_with_unit("hop", "A sequence's time by hop", Unit::Seconds, metrics.hops.clone());
        Self { registry, ..metrics }
    }

    /// Counts a request that has ended.
    pub fn request_ended(&self, door: &'static str, outcome: &'static str) {
        self.requests.get_or_create(&[("door", door), ("outcome", outcome)]).inc();
    }

    /// Notes how many requests of a class wait for admission.
    pub fn queued(&self, priority: Priority, count: usize) {
        let labels = [("class", priority.name())];
        self.queued.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts a request that got 429 at the door.
    pub fn turned_away(&self, priority: Priority, reason: &'static str) {
        self.turned_away.get_or_create(&[("class", priority.name()), ("reason", reason)]).inc();
    }

    /// Notes when a request's first token was expected, as far as that was known.
    pub fn expect(&self, priority: Priority, ttft: Option<Duration>) {
        if let Some(ttft) = ttft {
            self.expected_ttft.get_or_create(&[("class", priority.name())]).observe(ttft.as_secs_f64());
        }
    }

    /// Notes how long a request waited for admission, whatever came of it.
    pub fn queued_for(&self, priority: Priority, time: Duration) {
        self.queue.get_or_create(&[("class", priority.name())]).observe(time.as_secs_f64());
    }

    /// Counts a prompt that `tier` is to compute.
    pub fn prefilled_on(&self, tier: &'static str) {
        self.prefills.get_or_create(&[("tier", tier)]).inc();
    }

    /// Counts the tokens of a request.
    pub fn tokens(&self, prompt: u64, completion: u64) {
        self.tokens.get_or_create(&[("kind", "prompt")]).inc_by(prompt);
        self.tokens.get_or_create(&[("kind", "completion")]).inc_by(completion);
    }

    /// Counts a sequence that is tried again because a worker of `tier` failed it.
    pub fn retried(&self, tier: Tier) {
        self.retries.get_or_create(&[("tier", tier.name())]).inc();
    }

    /// Counts a worker whose lease ended.
    pub fn worker_lost(&self, tier: Tier, reason: &'static str) {
        self.workers_lost.get_or_create(&[("tier", tier.name()), ("reason", reason)]).inc();
    }

    /// Notes the number of live workers of a tier.
    pub fn workers(&self, tier: Tier, count: usize) {
        self.workers.get_or_create(&[("tier", tier.name())]).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Notes the time that a sequence spent at a hop.
    pub fn hop(&self, hop: &'static str, time: Duration) {
        self.hops.get_or_create(&[("hop", hop)]).observe(time.as_secs_f64());
    }

    /// The Prometheus text (OpenMetrics 1.0).
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a `String` cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
