//! What the second tier of the prefix cache has counted, where a scrape can see it.

use std::sync::atomic::Ordering;

use engine::TierStats;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::as_gauge;

/// [`TierStats`], and the hits by where they came from.
#[derive(Clone, Debug)]
pub(crate) struct TierCounters {
    host_blocks: Gauge,
    host_hit_tokens: Counter,
    disk_hit_tokens: Counter,
    /// In the order of [`TierStats::counts`].
    counts: [Counter; 8],
}

impl TierCounters {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let host_blocks = Gauge::default();
        registry.register(
            "kv_tier_host_blocks",
            "KV blocks in host memory behind the pool",
            host_blocks.clone(),
        );
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        Self {
            host_blocks,
            host_hit_tokens: counter(
                "prefix_host_hit_tokens",
                "Of the found prompt tokens, those from host memory",
            ),
            disk_hit_tokens: counter(
                "prefix_disk_hit_tokens",
                "Of the found prompt tokens, those from the disk",
            ),
            counts: TierStats::default().counts().map(|(name, help, _)| counter(name, help)),
        }
    }

    pub(crate) fn store(&self, stats: &TierStats) {
        self.host_blocks.set(as_gauge(stats.host_blocks));
        for (counter, (_, _, total)) in self.counts.iter().zip(stats.counts()) {
            counter.inner().store(total, Ordering::Relaxed);
        }
    }

    pub(super) fn store_hits(&self, host_tokens: u64, disk_tokens: u64) {
        self.host_hit_tokens.inner().store(host_tokens, Ordering::Relaxed);
        self.disk_hit_tokens.inner().store(disk_tokens, Ordering::Relaxed);
    }
}
