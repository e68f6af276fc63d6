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
    stored: Counter,
    host_evictions: Counter,
    corrupt: Counter,
    disk_writes: Counter,
    disk_dropped: Counter,
    disk_reads: Counter,
    disk_misses: Counter,
    disk_reads_refused: Counter,
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
            stored: counter("kv_tier_stored", "Evicted KV blocks that were kept in host memory"),
            host_evictions: counter(
                "kv_tier_host_evictions",
                "KV blocks that gave way to others in host memory",
            ),
            corrupt: counter("kv_tier_corrupt", "Kept KV blocks whose checksum did not hold: computed again"),
            disk_writes: counter("kv_tier_disk_writes", "KV blocks handed to the disk"),
            disk_dropped: counter("kv_tier_disk_dropped", "KV blocks that the disk was too slow to take"),
            disk_reads: counter("kv_tier_disk_reads", "KV blocks that came back from the disk"),
            disk_misses: counter(
                "kv_tier_disk_misses",
                "KV blocks that the disk's index promised and that could not be read",
            ),
            disk_reads_refused: counter(
                "kv_tier_disk_reads_refused",
                "Reads that would have exceeded their bound",
            ),
        }
    }

    pub(crate) fn store(&self, stats: &TierStats) {
        let store = |counter: &Counter, total| counter.inner().store(total, Ordering::Relaxed);
        self.host_blocks.set(as_gauge(stats.host_blocks));
        store(&self.stored, stats.stored);
        store(&self.host_evictions, stats.host_evictions);
        store(&self.corrupt, stats.corrupt);
        store(&self.disk_writes, stats.disk_writes);
        store(&self.disk_dropped, stats.disk_dropped);
        store(&self.disk_reads, stats.disk_reads);
        store(&self.disk_misses, stats.disk_misses);
        store(&self.disk_reads_refused, stats.disk_reads_refused);
    }

    pub(super) fn store_hits(&self, host_tokens: u64, disk_tokens: u64) {
        self.host_hit_tokens.inner().store(host_tokens, Ordering::Relaxed);
        self.disk_hit_tokens.inner().store(disk_tokens, Ordering::Relaxed);
    }
}
